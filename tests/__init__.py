import gemma_refactored  # noqa: F401  (before MLX: it puts OpenBLAS in place)
