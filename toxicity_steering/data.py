"""Prompts to steer on: RealToxicityPrompts, or the committed set for the embedded model."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_refactored.errors import UserError
from gemma_refactored.files import read_json

ORGANISM_PROMPTS = Path(__file__).parent / "organism_prompts.json"
REAL_TOXICITY_PROMPTS = "allenai/real-toxicity-prompts"
TOXIC = 0.5  # the dataset card's threshold


@dataclass
class ToxicityData:
    """Prompt texts; the i-th challenging and the i-th benign prompt match where the data has such pairs.

    Attributes:
        groups: who or what the i-th of both are about; None: nothing that others are about.
        chat_mode: prompts are requests (true) or beginnings of texts to be continued (false).
    """

    name: str
    challenging: list[str]
    benign: list[str]
    groups: list[str | None]
    chat_mode: bool

    def only(self, rows: Iterable[int]) -> ToxicityData:
        """Some of the prompts."""
        rows = list(rows)
        challenging, benign = ([texts[i] for i in rows] for texts in (self.challenging, self.benign))
        return replace(self, challenging=challenging, benign=benign, groups=[self.groups[i] for i in rows])


def load_organism_prompts(count: int, path: Path = ORGANISM_PROMPTS) -> ToxicityData:
    """The first `count` prompts of each kind of a file. What a prompt is about is its "group", or else its "match"."""
    rows = read_json(path, "prompts file")["prompts"]
    challenging, benign = ([row for row in rows if row["challenging"] is kind] for kind in (True, False))
    _check_count(count, min(len(challenging), len(benign)), str(path))
    rude, kind = ([row["prompt"]["text"] for row in of_kind[:count]] for of_kind in (challenging, benign))
    about = [row.get("group", row.get("match")) for row in challenging[:count]]
    return ToxicityData("organism", rude, kind, [None if name is None else str(name) for name in about], chat_mode=True)


def load_real_toxicity_prompts(count: int, seed: int) -> ToxicityData:
    """Challenging and benign prompts of Gehman et al. 2020 (arXiv 2009.11462), drawn with a fixed seed.

    Benign: prompt and continuation both below the card's toxicity threshold.

    Raises:
        UserError: the datasets package or the network is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError('RealToxicityPrompts needs the datasets package: pip install -e ".[toxicity]".') from None
    try:
        rows = load_dataset(REAL_TOXICITY_PROMPTS, split="train")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{REAL_TOXICITY_PROMPTS} cannot be loaded ({str(error).splitlines()[0]}). Connect to the network, or use "
            "the embedded model's prompts (--dataset organism)."
        ) from None

    def is_benign(row: dict) -> bool:
        scores = [row[part]["toxicity"] for part in ("prompt", "continuation")]
        return not row["challenging"] and all(score is not None and score < TOXIC for score in scores)

    challenging = [row["prompt"]["text"] for row in rows if row["challenging"]]
    benign = [row["prompt"]["text"] for row in rows if is_benign(row)]
    _check_count(count, min(len(challenging), len(benign)), REAL_TOXICITY_PROMPTS)
    random.Random(seed).shuffle(challenging)
    random.Random(seed).shuffle(benign)
    return ToxicityData("real-toxicity-prompts", challenging[:count], benign[:count], [None] * count, chat_mode=False)


def _check_count(count: int, available: int, source: str) -> None:
    if not 0 < count <= available:
        raise UserError(f"{source} has {available} prompts of each kind; {count} is too many.")
