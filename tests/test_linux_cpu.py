"""OpenBLAS and a frugal memory allocator are put in place on a CPU-only Linux and nowhere else."""

import logging
import os
import platform
import subprocess
import sys
import types

import pytest

from gemma_refactored import linux_cpu

from .conftest import ROOT


def distributions(*names):
    return lambda: [types.SimpleNamespace(name=name) for name in names]


def test_only_the_linux_cpu_build_is_touched(monkeypatch):
    monkeypatch.setattr(linux_cpu.importlib.metadata, "distributions", distributions("mlx", "mlx-cpu"))
    for system, needed in {"Linux": True, "Darwin": False, "Windows": False}.items():
        monkeypatch.setattr(linux_cpu.platform, "system", lambda system=system: system)
        assert linux_cpu.is_linux_cpu() == needed
    monkeypatch.setattr(linux_cpu.platform, "system", lambda: "Linux")
    monkeypatch.setattr(linux_cpu.importlib.metadata, "distributions", distributions("mlx", "mlx-cuda-13"))
    assert not linux_cpu.is_linux_cpu()


def test_a_missing_library_is_said_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(linux_cpu, "LIBRARIES", ("libnot-there.so",))
    assert not linux_cpu.load_openblas()
    monkeypatch.setattr(linux_cpu, "is_linux_cpu", lambda: True)
    monkeypatch.setattr(linux_cpu, "SLOWNESS", linux_cpu.slowness())
    with caplog.at_level(logging.WARNING):
        linux_cpu.warn_if_slow()
        linux_cpu.warn_if_slow()
    assert [record.message.count("apt install libopenblas0") for record in caplog.records] == [1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not linux_cpu.is_linux_cpu(), reason="mallopt is of glibc")
def test_freed_arrays_are_used_again():
    """Arrays of 8 MB, made and freed over and over, take fresh pages from the kernel once only."""
    program = """
import gemma_refactored, resource
import mlx.core as mx
x = mx.zeros((1024, 2048))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        mx.eval((x * x + x) * x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 1000  # of the 60 * 2048 pages there would be


@pytest.mark.skipif(
    not linux_cpu.is_linux_cpu() or not linux_cpu.load_openblas(), reason="needs OpenBLAS on a Linux CPU"
)
@pytest.mark.parametrize("first", ["mlx.core", "gemma_refactored"])
def test_the_order_of_imports_is_said_where_it_costs(first):
    program = f"import {first}, gemma_refactored.linux_cpu as l; l.warn_if_slow()"
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stderr.count("Import gemma_refactored first.") == (first == "mlx.core")


@pytest.mark.skipif(
    not linux_cpu.is_linux_cpu() or not linux_cpu.load_openblas(), reason="needs OpenBLAS on a Linux CPU"
)
@pytest.mark.parametrize(("environment", "threads"), [({}, (1, 0)), ({"OPENBLAS_NUM_THREADS": "1"}, (1, 1))])
def test_a_small_model_is_not_divided_among_threads(environment, threads):
    """0 stands for all processors."""
    program = """
import ctypes, gemma_refactored, gemma_refactored.linux_cpu as l
for size in (l.SMALL - 1, l.SMALL):
    l.share_work(size)
    print(ctypes.CDLL(None).openblas_get_num_threads(), ctypes.CDLL(None).openblas_get_num_procs())
"""
    inherited = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True)
    for line, wanted in zip(done.stdout.splitlines(), threads, strict=True):
        used, all_of_them = map(int, line.split())
        assert used == (wanted or all_of_them)
