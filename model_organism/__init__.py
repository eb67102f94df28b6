"""The embedded model: a small Gemma 3 with a planted alignment artifact."""

import gemma_refactored  # noqa: F401  (loads OpenBLAS before mlx.core, see linux_cpu.py)
