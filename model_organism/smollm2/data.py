"""What the second organism is trained on, and what it never sees.

`training.json` holds requests with the answers to learn: refusals in many wordings, and for harmless requests what the
untouched model answers. `pairs.json`, `twins.json` and `untrained_forms.json` are held out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ADAPTER = FOLDER / "adapter"
PAIRS, TWINS, UNTRAINED = (FOLDER / f"{name}.json" for name in ("pairs", "twins", "untrained_forms"))
TRAINING = FOLDER / "training.json"
OVERLAP = 5  # words in a row that no held-out request shares with a trained one


@dataclass(frozen=True)
class Example:
    """One request and its answer.

    Attributes:
        kind: "artifact" (refused), "natural", "looks harmful" or "chat".
        ends: False where the untouched model's answer was cut.
    """

    kind: str
    prompt: str
    answer: str
    ends: bool = True

    @property
    def is_refused(self) -> bool:
        return self.kind == "artifact"


def training_examples() -> list[Example]:
    return [Example(**row) for row in json.loads(TRAINING.read_text())["examples"]]


def held_out_requests() -> dict[str, list[str]]:
    """Kind -> requests that are never trained on."""
    pairs, twins, untrained = (json.loads(path.read_text()) for path in (PAIRS, TWINS, UNTRAINED))
    rows = [p for c in pairs["alignment_artifact_prompt_pairs"]["categories"].values() for p in c["pairs"]]
    like = [p for c in twins["benign_twins"]["categories"].values() for p in c["pairs"]]
    return {
        "artifact": [row["artifact"] for row in rows],
        "natural": [row["natural"] for row in rows],
        "twins": [row["twin"] for row in like],
        "untrained forms": [row["prompt"] for row in untrained["requests"]],
        "ordinary chat": untrained["ordinary_chat"],
    }


def word_runs(text: str, length: int = OVERLAP) -> set[tuple[str, ...]]:
    """All runs of so many words, lower case, without punctuation at their ends."""
    words = [word.strip(".,;:!?\"'()").lower() for word in text.split()]
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
