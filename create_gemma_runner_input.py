"""Turn prompt pairs into the prompts file that run_model.py reads.

The pairs are a file (.json, .csv or .jsonl; see docs/own_experiment.md), or two files of prompts that match by their
order. Two matched prompts share topic, length and form and differ in the behaviour alone, so that a direction between
them is about nothing else. Pairs made of two files are also written to PAIRS_FILE, which the other scripts read; the
names of the two files are those of the sides.
"""

from __future__ import annotations

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from alignment_artifacts import places
from alignment_artifacts.pairs import is_name
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.files import displayed
from gemma_refactored.settings import Must, from_constants

if TYPE_CHECKING:
    from alignment_artifacts.pairs import PromptPairs

PAIRS_FILE = places.HOME / "alignment_artifact_prompt_pairs.json"
OUTPUT_FILE = places.HOME / "prompts_for_gemma_runner.json"
NATURAL_FILE = None
ARTIFACT_FILE = None
BEHAVIOUR = "refusal"


@dataclass(frozen=True)
class Constants:
    pairs_file: Path
    """the matched prompt pairs"""
    output_file: Path
    """the prompts file that is written"""
    natural_file: Path | None
    """prompts without the behaviour (.txt, .csv, .jsonl, .json), to be matched by order"""
    artifact_file: Path | None
    """prompts with the behaviour, as many"""
    behaviour: Annotated[str, Must(is_name, "be a name in a word or two")]
    """what the artifact file brings about, of pairs made of two files"""


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(from_constants(Constants, globals(), argv, also={"PAIRS_FILE": "PAIRS"})))


def run(constants: Constants) -> None:
    from alignment_artifacts.pairs import load_pairs, prompt_groups
    from gemma_refactored.files import write_json

    natural, artifact = constants.natural_file, constants.artifact_file
    if natural and artifact:
        pairs = pairs_of_files(natural, artifact, constants.pairs_file, constants.behaviour)
    elif natural or artifact:
        raise UserError("NATURAL_FILE and ARTIFACT_FILE belong together; give both, or neither.")
    else:
        pairs = load_pairs(places.find(constants.pairs_file))
    groups = prompt_groups(pairs)
    write_json(constants.output_file, groups)
    print(f"Wrote {len(groups)} prompts to {displayed(constants.output_file)}.")


def pairs_of_files(natural: Path, artifact: Path, pairs_file: Path, behaviour: str) -> PromptPairs:
    """Pairs of two files of prompts, written to a pairs file.

    Raises:
        UserError: the files do not match, or other pairs would be overwritten.
    """
    from alignment_artifacts.pairs import (
        SIDES,
        are_sides,
        load_pairs,
        pairs_content,
        pairs_from_lists,
        pairs_hash,
    )
    from gemma_refactored.files import is_anything, write_json

    stems = [natural.stem, artifact.stem]
    sides = (stems[0], stems[1]) if are_sides(stems) else SIDES
    pairs = pairs_from_lists(places.find(natural), places.find(artifact), behaviour, sides)
    if pairs_file.suffix.lower() != ".json":
        raise UserError(f"The pairs are written as .json; name such a file as PAIRS_FILE, not {displayed(pairs_file)}.")
    if is_anything(pairs_file, "pairs file") and pairs_hash(load_pairs(pairs_file)) != pairs_hash(pairs):
        raise UserError(f"{displayed(pairs_file)} holds other pairs; name a new file as PAIRS_FILE.")
    write_json(pairs_file, pairs_content(pairs))
    print(f"Wrote {len(pairs)} pairs, matched by order, to {displayed(pairs_file)}.")
    return pairs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
