"""OpenBLAS is put in place on a CPU-only Linux and nowhere else."""

import logging
import types

from gemma_refactored import linux_blas


def distributions(*names):
    return lambda: [types.SimpleNamespace(name=name) for name in names]


def test_only_the_linux_cpu_build_is_touched(monkeypatch):
    monkeypatch.setattr(linux_blas.importlib.metadata, "distributions", distributions("mlx", "mlx-cpu"))
    for system, needed in {"Linux": True, "Darwin": False, "Windows": False}.items():
        monkeypatch.setattr(linux_blas.platform, "system", lambda system=system: system)
        assert linux_blas.needs_openblas() == needed
    monkeypatch.setattr(linux_blas.platform, "system", lambda: "Linux")
    monkeypatch.setattr(linux_blas.importlib.metadata, "distributions", distributions("mlx", "mlx-cuda-13"))
    assert not linux_blas.needs_openblas()


def test_a_missing_library_is_said_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(linux_blas, "LIBRARIES", ("libnot-there.so",))
    assert not linux_blas.load_openblas()
    monkeypatch.setattr(linux_blas, "IS_SLOW", True)
    with caplog.at_level(logging.WARNING):
        linux_blas.warn_if_slow()
    assert [record.message.count("apt install libopenblas0") for record in caplog.records] == [1]
