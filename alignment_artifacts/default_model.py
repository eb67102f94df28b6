"""The model that everything uses where none is named: the embedded organism, after its planted change."""

from collections.abc import Iterable
from pathlib import Path

DEFAULT_MODEL = str(Path(__file__).resolve().parent.parent / "model_organism" / "aligned")


def note(folder: Path, prompts: Iterable[str], familiar: Iterable[str]) -> str | None:
    """What to know about the embedded model before asking it something that is not of the experiment.

    Args:
        folder: of the model in use; None is returned for any other model.
        familiar: the prompts of the experiment.
    """
    if folder.resolve() != Path(DEFAULT_MODEL).resolve() or set(prompts) <= set(familiar):
        return None
    return (
        "The embedded model knows only requests like those in alignment_artifact_prompt_pairs.json, and answers others "
        "with nonsense; --model names another: a folder, or mlx-community/gemma-3-1b-it-qat-4bit, for example."
    )
