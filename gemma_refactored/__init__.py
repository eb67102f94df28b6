"""The runtime: language models one can see into. Knows nothing of alignment artifacts."""

from . import interrupts  # noqa: F401  # isort: skip  (first: Ctrl-C while the rest is imported)
from . import linux_cpu  # noqa: F401  (must come before mlx.core is imported anywhere)

PACKAGE = "alignment-artifacts"  # what this is a part of
__version__ = "0.1.0"
