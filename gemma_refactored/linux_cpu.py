"""What MLX needs on a Linux without a GPU, before `mlx.core` is imported (see __init__).

Its CPU wheel is linked against the reference BLAS, 20 times slower than OpenBLAS. The dynamic linker
resolves a symbol to the first library that was loaded with global visibility, so loading OpenBLAS
first is enough to put it in place. And it allocates every array afresh, which is slow where the C
library hands each freed one back to the kernel. macOS (Accelerate) and CUDA builds are never touched.
"""

import ctypes
import importlib.metadata
import logging
import os
import platform
import sys
from pathlib import Path

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
SMALL = 20_000_000  # parameters: below it threads wait for each other longer than they work


def is_linux_cpu() -> bool:
    """True for the CPU build of MLX on Linux."""
    if platform.system() != "Linux":
        return False
    return not any(d.name.lower().startswith("mlx-cuda") for d in importlib.metadata.distributions() if d.name)


def load_openblas() -> bool:
    """Put a system OpenBLAS in place of the reference BLAS; false if there is none."""
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def share_work(num_parameters: int) -> None:
    """Give OpenBLAS one thread for a small model (a search on the embedded one: 37 s instead of 62 on two cores), all
    of them for others. OPENBLAS_NUM_THREADS in the environment comes first."""
    if load_openblas() and "OPENBLAS_NUM_THREADS" not in os.environ:
        library = ctypes.CDLL(None)  # OpenBLAS is among its symbols
        library.openblas_set_num_threads(1 if num_parameters < SMALL else library.openblas_get_num_procs())


def keep_freed_memory() -> None:
    """Have the C library reuse freed arrays: fresh pages, zeroed by the kernel, cost a fifth of a collection."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most it accepts
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def slowness() -> str | None:
    """Why matrix products will be slow and what to do, having done what can be; None if they will not be."""
    if not is_linux_cpu():
        return None
    came_late = "mlx.core" in sys.modules and "/libopenblas" not in Path("/proc/self/maps").read_text()
    has_openblas = load_openblas()
    keep_freed_memory()
    if not has_openblas:
        return "OpenBLAS not found: matrix products will be about 20 times slower (apt install libopenblas0)."
    if came_late:
        return (
            "mlx.core was imported before gemma_refactored, so it keeps its own BLAS: matrix products will be about 20 "
            "times slower. Import gemma_refactored first."
        )
    return None


SLOWNESS = slowness()


def warn_if_slow() -> None:
    """Say once why matrix products are slow."""
    global SLOWNESS
    if SLOWNESS:
        logging.getLogger(__name__).warning(SLOWNESS)
        SLOWNESS = None
