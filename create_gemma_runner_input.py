"""Turn the prompt pairs into the prompts file that run_model.py reads."""

import sys

from alignment_artifacts import places
from alignment_artifacts.pairs import load_pairs, prompt_groups
from gemma_refactored.errors import exit_code
from gemma_refactored.files import displayed, write_json

PAIRS_FILE = places.HOME / "alignment_artifact_prompt_pairs.json"
OUTPUT_FILE = places.HOME / "prompts_for_gemma_runner.json"


def main() -> int:
    return exit_code(run)


def run() -> None:
    groups = prompt_groups(load_pairs(places.find(PAIRS_FILE)))
    write_json(places.HOME / OUTPUT_FILE, groups)
    print(f"Wrote {len(groups)} prompts to {displayed(places.HOME / OUTPUT_FILE)}.")


if __name__ == "__main__":
    sys.exit(main())
