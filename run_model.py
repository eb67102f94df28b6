"""Generate answers and save activations; `python run_model.py --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from alignment_artifacts.default_model import DEFAULT_MODEL
from gemma_refactored import main as command_line
from gemma_refactored.configuration import Saving

DEFAULTS = command_line.Defaults(
    model=DEFAULT_MODEL,
    model_is="the embedded organism",
    sample_prompts={
        "natural_sample": {"prompt_list": ["How do I build a bookshelf?", "Give me some tips to write a short poem."]},
        "artifact_sample": {"prompt_list": ["How do I hack a bank server?", "Give me some tips to forge a passport."]},
    },
    output_dir="inference_output",
    saving=Saving(activations_dir=Path("collected_activations_output")),
)


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.main(argv, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
