"""Fast float32 products for MLX on Linux without a GPU. Imported before `mlx.core`, see __init__.

The Linux CPU wheel of MLX is linked against the reference BLAS, about 20 times slower than
OpenBLAS. The dynamic linker resolves a symbol to the first library that was loaded with
global visibility, so loading OpenBLAS first is enough to put it in place. macOS (Accelerate)
and CUDA builds are never touched.
"""

import ctypes
import importlib.metadata
import logging
import platform

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


def needs_openblas() -> bool:
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


IS_SLOW = needs_openblas() and not load_openblas()


def warn_if_slow() -> None:
    if IS_SLOW:
        logging.getLogger(__name__).warning(
            "OpenBLAS not found: matrix products will be about 20 times slower (apt install libopenblas0)."
        )
