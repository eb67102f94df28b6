"""The science: from activations to statistics, directions, suppression and its proof."""

from gemma_refactored import __version__  # noqa: F401  (and before MLX: it puts OpenBLAS in place)


def __getattr__(name: str):
    # Only when asked for: the statistics alone need neither MLX nor transformers.
    if name in ("suppress_prompt", "AlignmentArtifacts"):
        from alignment_artifacts.suppression import library

        return getattr(library, name)
    if name == "load_run":
        from alignment_artifacts.analysis import load_run

        return load_run
    if name == "load_collection":
        from alignment_artifacts.collected_arrays import load_collection

        return load_collection
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
