"""What MLX needs on a Linux without a GPU, before `mlx.core` is imported (see __init__).

Its CPU wheel is linked against the reference BLAS, 20 times slower than OpenBLAS. The dynamic linker
resolves a symbol to the first library that was loaded with global visibility, so loading OpenBLAS
first is enough to put it in place. And it allocates every array afresh, which is slow where the C
library hands each freed one back to the kernel. macOS (Accelerate) and CUDA builds are never touched.
"""

import ctypes
import importlib.metadata
import logging
import platform

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


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


def keep_freed_memory() -> None:
    """Have the C library reuse freed arrays: fresh pages, zeroed by the kernel, cost a fifth of a collection."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most it accepts
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


IS_SLOW = False
if is_linux_cpu():
    IS_SLOW = not load_openblas()
    keep_freed_memory()


def warn_if_slow() -> None:
    if IS_SLOW:
        logging.getLogger(__name__).warning(
            "OpenBLAS not found: matrix products will be about 20 times slower (apt install libopenblas0)."
        )
