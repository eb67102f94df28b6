"""The library versions that results are made with; every file of results carries them."""

import importlib.metadata

from . import __version__

LIBRARIES = ("mlx", "mlx-lm", "numpy", "transformers")


def library_versions() -> dict[str, str]:
    """By package; ours is that of the code itself, which need not be installed."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES} | {"alignment-artifacts": __version__}
