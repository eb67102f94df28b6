"""Fast float32 products for MLX on Linux without a GPU. Import this before `mlx.core`.

The Linux CPU wheel of MLX is linked against the reference BLAS, about 20 times slower than
OpenBLAS. The dynamic linker resolves a symbol to the first library that was loaded with
global visibility, so loading OpenBLAS first is enough to put it in place. macOS (Accelerate)
and CUDA builds are never touched.
"""

import ctypes
import importlib.util
import logging
import platform


def load_openblas() -> bool:
    """Load a system OpenBLAS on a CPU-only Linux. True if there is nothing left to wish for."""
    if platform.system() != "Linux" or importlib.util.find_spec("mlx_cuda") or _has_cuda_backend():
        return True
    for name in ("libopenblas.so.0", "libopenblas.so"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def _has_cuda_backend() -> bool:
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        return False
    from pathlib import Path

    return any(list(Path(p).glob("lib/libmlx*cuda*")) for p in spec.submodule_search_locations)


HAS_FAST_BLAS = load_openblas()


def warn_if_slow() -> None:
    if not HAS_FAST_BLAS:
        logging.getLogger(__name__).warning(
            "OpenBLAS not found: matrix products will be about 20 times slower (apt install libopenblas0)."
        )
