"""The second organism: SmolLM2-135M-Instruct, and an adapter that was trained to refuse."""

import gemma_refactored  # noqa: F401  (loads OpenBLAS before mlx.core, see linux_cpu.py)
