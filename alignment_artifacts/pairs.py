"""The matched prompt pairs: natural and artifact prompts of the same form, in categories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import read_json
from gemma_refactored.prompt_processing import check_name

SIDES = ("natural", "artifact")
SUBCATEGORY = "prompt_list"
# Beside the scripts of a checkout; in the package itself where that is installed (setup.py puts it there).
_INSTALLED = Path(__file__).resolve().with_name("alignment_artifact_prompt_pairs.json")
PAIRS_JSON = _INSTALLED if _INSTALLED.exists() else _INSTALLED.parent.parent / _INSTALLED.name
MAX_EXCLUDED = 0.05  # what is measured with more than this share of the pairs left out is about other prompts
ROOT_KEY = "alignment_artifact_prompt_pairs"


@dataclass(frozen=True)
class Pair:
    """A natural prompt and the artifact prompt that matches it; pairs of one `block` depend on each other."""

    id: str
    category: str
    natural: str
    artifact: str
    block: str | None = None

    def group(self, side: str) -> str:
        """Name of the prompt group that holds one side of this pair."""
        return f"{side}_{self.category}_{self.id}"


def load_pairs(path: str | Path) -> list[Pair]:
    """Read `alignment_artifact_prompt_pairs.json`, in file order.

    Raises:
        UserError: wrong structure, empty text, or an id that occurs twice.
    """
    content = read_json(Path(path), "pairs file")
    try:
        categories = content[ROOT_KEY]["categories"]
    except (KeyError, TypeError, IndexError):
        raise UserError(f'{path}: expected {{"{ROOT_KEY}": {{"categories": {{..}}}}}}.') from None
    if not isinstance(categories, dict) or not categories:
        raise UserError(f"{path}: 'categories' must be an object with at least one category.")
    pairs, seen = [], set()
    for category, body in categories.items():
        check_name(category, path)
        entries = body.get("pairs") if isinstance(body, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{path}: category {shown(category)} needs a list 'pairs' of at least one pair.")
        for number, entry in enumerate(entries, 1):
            pair = _read_pair(entry, category, f"{path}: pair {number} of {shown(category)}")
            if pair.group("natural") in seen:
                raise UserError(f"{path}: the id {shown(pair.id)} occurs twice in {shown(category)}; ids must differ.")
            seen.add(pair.group("natural"))
            pairs.append(pair)
    return pairs


def _read_pair(entry, category: str, where: str) -> Pair:
    if not isinstance(entry, dict):
        raise UserError(f'{where} must be an object with "id", "natural" and "artifact".')
    for key in ("id", *SIDES):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key!r} must be text that is not empty, not {shown(value)}.")
    check_name(entry["id"], where)
    block = entry.get("group")
    if block is not None and not (isinstance(block, str) and block.strip()):
        raise UserError(f"{where}: 'group' names pairs that depend on each other; it must be text, not {shown(block)}.")
    return Pair(entry["id"], category, entry["natural"], entry["artifact"], block)


def texts(pairs: Sequence[Pair]) -> list[str]:
    """Of both sides of each pair."""
    return [text for pair in pairs for text in (pair.natural, pair.artifact)]


def prompt_groups(pairs: list[Pair]) -> dict[str, dict[str, list[str]]]:
    """The prompts file of the experiment: one group for each side of each pair."""
    groups = {}
    for side in SIDES:
        for pair in pairs:
            groups[pair.group(side)] = {SUBCATEGORY: [getattr(pair, side)]}
    return groups


def pairs_hash(pairs: list[Pair]) -> str:
    """Of the texts, ids and categories in their order: whatever the file is called and how it is laid out."""
    content = json.dumps([astuple(pair) for pair in pairs])
    return hashlib.sha256(content.encode()).hexdigest()
