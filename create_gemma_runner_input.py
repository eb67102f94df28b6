"""Turn the prompt pairs into the prompts file that run_model.py reads."""

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment_artifacts import places
from gemma_refactored.errors import exit_code
from gemma_refactored.files import displayed
from gemma_refactored.settings import from_constants

PAIRS_FILE = places.HOME / "alignment_artifact_prompt_pairs.json"
OUTPUT_FILE = places.HOME / "prompts_for_gemma_runner.json"


@dataclass(frozen=True)
class Constants:
    pairs_file: Path
    """the matched prompt pairs"""
    output_file: Path
    """the prompts file that is written"""


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(from_constants(Constants, globals(), argv)))


def run(constants: Constants) -> None:
    from alignment_artifacts.pairs import load_pairs, prompt_groups
    from gemma_refactored.files import write_json

    groups = prompt_groups(load_pairs(places.find(constants.pairs_file)))
    write_json(constants.output_file, groups)
    print(f"Wrote {len(groups)} prompts to {displayed(constants.output_file)}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
