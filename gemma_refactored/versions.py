"""The library versions that results are made with; every file of results carries them."""

import importlib.metadata

from . import PACKAGE, __version__

LIBRARIES = ("mlx", "mlx-lm", "numpy", "transformers")


def library_versions() -> dict[str, str]:
    """By package; ours is that of the code itself, which need not be installed."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES} | {PACKAGE: __version__}
