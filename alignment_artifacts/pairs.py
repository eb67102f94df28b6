"""The matched prompt pairs: natural and artifact prompts of the same form, in categories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_refactored.conversation import as_prompt, written
from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import read_json
from gemma_refactored.prompt_processing import check_name, prompt_texts
from gemma_refactored.tables import JSON_LINES, TABLES, ending, read_rows

SIDES = ("natural", "artifact")
REFUSAL = "refusal"  # the behaviour of a file that names none
SUBCATEGORY = "prompt_list"
# Beside the scripts of a checkout; in the package itself where that is installed (setup.py puts it there).
_INSTALLED = Path(__file__).resolve().with_name("alignment_artifact_prompt_pairs.json")
PAIRS_JSON = _INSTALLED if _INSTALLED.exists() else _INSTALLED.parent.parent / _INSTALLED.name
MAX_EXCLUDED = 0.05  # what is measured with more than this share of the pairs left out is about other prompts
ROOT_KEY = "alignment_artifact_prompt_pairs"
ROW_KEYS = ("category", "id", "group", "metadata")  # of a pair in a row, beside its two sides
LONGEST_NAME = 40  # of a behaviour or a side: they stand in legends and table heads


@dataclass(frozen=True)
class Pair:
    """A natural prompt and the artifact prompt that matches it; pairs of one `block` depend on each other.

    A prompt is a text, or a `gemma_refactored.conversation.Conversation` of several messages.
    """

    id: str
    category: str
    natural: str
    artifact: str
    block: str | None = None

    def group(self, side: str) -> str:
        """Name of the prompt group that holds one side of this pair."""
        return f"{side}_{self.category}_{self.id}"


class PromptPairs(list[Pair]):
    """Pairs in the order of their file, and what their two sides contrast.

    Attributes:
        behaviour: what the artifact side brings about and the natural side does not, in a word or two ("refusal").
        sides: what the two are called, natural side first ("natural", "artifact"; or "neutral", "opinion"). Only for
            what people read: folders and records say natural and artifact whatever the pairs are about.
        file: that they were read from; None for pairs made in Python.
    """

    def __init__(
        self,
        pairs: Iterable[Pair] = (),
        behaviour: str = REFUSAL,
        sides: tuple[str, str] = SIDES,
        file: Path | None = None,
    ):
        super().__init__(pairs)
        self.behaviour, self.sides, self.file = behaviour, sides, file

    @staticmethod
    def of(pairs: Iterable[Pair]) -> PromptPairs:
        """The same pairs; of a plain list it is not known what else they contrast than refusal."""
        return pairs if isinstance(pairs, PromptPairs) else PromptPairs(pairs)

    def side(self, side: str) -> str:
        """What "natural" or "artifact" is called here."""
        return self.sides[SIDES.index(side)]

    def only(self, rows: Iterable[int]) -> PromptPairs:
        """Some of the pairs, of the same contrast."""
        return PromptPairs([self[row] for row in rows], self.behaviour, self.sides, self.file)


def load_pairs(path: str | Path) -> PromptPairs:
    """Read matched pairs, in file order.

    - .json: `{"metadata": {"behaviour": .., "sides": [.., ..]}, "categories": {CATEGORY: {"pairs": [{"id": ..,
      "natural": .., "artifact": ..}]}}}`, as it is or as the value of "alignment_artifact_prompt_pairs". Metadata may
      be missing. The two prompts of a pair may have the names of the sides for keys. Each is a text, or a list of
      messages {"role": "system", "user" or "assistant", "content": ..} that ends with one of the user.
    - .csv, .tsv: a table with the columns category, id and the two sides, natural side first.
    - .jsonl: one object per line with the same keys; the first may be {"metadata": {..}}.

    In a table of other sides than natural and artifact, their columns are their names, and the file's name is the
    behaviour's.

    Raises:
        UserError: wrong structure, empty text, or an id that occurs twice.
    """
    path = Path(path)
    if ending(path) in (*TABLES, *JSON_LINES):
        entries, metadata = _from_rows(path)
    else:
        entries, metadata = _from_json(path)
    behaviour, sides = _contrast(metadata, path)
    return PromptPairs(_read_pairs(entries, sides, path), behaviour, sides, path)


def as_pairs(pairs: str | Path | Sequence[Pair]) -> PromptPairs:
    """Pairs of a file, or those that have been made already; a plain list of them contrasts what most files do."""
    return load_pairs(pairs) if isinstance(pairs, str | Path) else PromptPairs.of(pairs)


def pairs_from_lists(
    natural: str | Path | Sequence[str],
    artifact: str | Path | Sequence[str],
    behaviour: str = REFUSAL,
    sides: tuple[str, str] = SIDES,
    category: str = "pairs",
) -> PromptPairs:
    """Pairs of two lists of prompts, or files of them, that match by their order: the first with the first, and so on.

    Raises:
        UserError: lists of different lengths, empty ones, or a text that is empty.
    """
    natural, artifact = prompt_texts(natural), prompt_texts(artifact)
    if len(natural) != len(artifact):
        raise UserError(
            f"There are {len(natural)} {sides[0]} and {len(artifact)} {sides[1]} prompts, and each needs its match. "
            "Two matched prompts share topic, length and form and differ in the behaviour alone, so that a direction "
            "between them is about nothing else."
        )
    entries = [
        (f"pair {number}", category, {"id": f"{category}_{number}", **dict(zip(SIDES, texts, strict=True))})
        for number, texts in enumerate(zip(natural, artifact, strict=True), 1)
    ]
    return PromptPairs(_read_pairs(entries, sides, "pairs"), behaviour, sides)


def pairs_content(pairs: PromptPairs) -> dict:
    """What a .json of these pairs holds."""
    categories: dict[str, dict] = {}
    for pair in pairs:
        entry = {"id": pair.id, "natural": written(pair.natural), "artifact": written(pair.artifact)}
        if pair.block is not None:
            entry["group"] = pair.block
        categories.setdefault(pair.category, {"pairs": []})["pairs"].append(entry)
    metadata = {"behaviour": pairs.behaviour, "sides": list(pairs.sides)}
    return {ROOT_KEY: {"metadata": metadata, "categories": categories}}


Entry = tuple[str, str, object]  # place, category, and an object with id and texts


def _from_json(path: Path) -> tuple[list[Entry], dict]:
    content = read_json(path, "pairs file")
    root = content.get(ROOT_KEY, content) if isinstance(content, dict) else None
    if not isinstance(root, dict) or "categories" not in root:
        raise UserError(f'{path}: expected {{"{ROOT_KEY}": {{"categories": {{..}}}}}}.')
    categories, metadata = root["categories"], root.get("metadata", {})
    if not isinstance(categories, dict) or not categories:
        raise UserError(f"{path}: 'categories' must be an object with at least one category.")
    entries: list[Entry] = []
    for category, body in categories.items():
        of_category = body.get("pairs") if isinstance(body, dict) else None
        if not isinstance(of_category, list) or not of_category:
            raise UserError(f"{path}: category {shown(category)} needs a list 'pairs' of at least one pair.")
        for number, entry in enumerate(of_category, 1):
            entries.append((f"{path}: pair {number} of {shown(category)}", category, entry))
    return entries, metadata


def _from_rows(path: Path) -> tuple[list[Entry], dict]:
    rows = list(read_rows(path, "pairs file"))
    metadata = rows.pop(0)[1]["metadata"] if rows and list(rows[0][1]) == ["metadata"] else {}
    if not rows:
        raise UserError(f"{path} holds no pairs.")
    if isinstance(metadata, dict) and "sides" not in metadata:
        columns = [name for name in rows[0][1] if name not in ROW_KEYS]
        if not set(SIDES) <= set(columns):
            if len(columns) != 2:
                raise UserError(
                    f"{path}: pairs have the columns category, id and two sides (natural, artifact, or names of your "
                    f"own), not {', '.join(rows[0][1])}."
                )
            metadata = {**metadata, "sides": columns}
    entries: list[Entry] = []
    for number, (place, row) in enumerate(rows, 1):
        category = row.get("category") or "pairs"
        given = {name: value for name, value in row.items() if value != ""}
        entries.append((place, category, {**given, "id": str(given.get("id", number))}))
    return entries, metadata


def _contrast(metadata, path: Path) -> tuple[str, tuple[str, str]]:
    """Behaviour and sides of a file."""
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: 'metadata' must be an object, not {shown(metadata)}.")
    sides = metadata.get("sides", list(SIDES))
    if not are_sides(sides):
        raise UserError(
            f"{path}: 'sides' must be two different names, natural side first, such as {json.dumps(SIDES)}, not "
            f"{shown(sides)}."
        )
    if sides == list(SIDES)[::-1]:
        raise UserError(f"{path}: 'sides' has the natural side first, then the artifact side.")
    usual = REFUSAL if tuple(sides) == SIDES else path.stem.replace("_", " ")
    behaviour = metadata.get("behaviour", usual)
    if not is_name(behaviour):
        raise UserError(f"{path}: 'behaviour' must be a name in a word or two, not {shown(behaviour)}.")
    return behaviour, (sides[0], sides[1])


def are_sides(names) -> bool:
    """Are these two different names, none of them that of another column?"""
    are_names = isinstance(names, list) and len(names) == 2 and all(is_name(side) for side in names)
    return are_names and names[0] != names[1] and not set(names) & set(ROW_KEYS)


def is_name(text) -> bool:
    """Does a text fit legends and table heads?"""
    return isinstance(text, str) and bool(text.strip()) and len(text) <= LONGEST_NAME and text.isprintable()


def _read_pairs(entries: Sequence[Entry], sides: tuple[str, str], path: str | Path) -> list[Pair]:
    pairs: list[Pair] = []
    used = set()
    for place, category, entry in entries:
        check_name(category, path)
        pair = _read_pair(entry, category, sides, place)
        if pair.group("natural") in used:
            raise UserError(f"{path}: the id {shown(pair.id)} occurs twice in {shown(category)}; ids must differ.")
        used.add(pair.group("natural"))
        pairs.append(pair)
    return pairs


def _read_pair(entry, category: str, sides: tuple[str, str], where: str) -> Pair:
    if not isinstance(entry, dict):
        raise UserError(f'{where} must be an object with "id", "{sides[0]}" and "{sides[1]}".')
    # Either both sides have the names of the file, or both the usual ones.
    keys = sides if set(sides) & entry.keys() else SIDES
    if not isinstance(entry.get("id"), str) or not entry["id"].strip():
        raise UserError(f"{where}: 'id' must be text that is not empty, not {shown(entry.get('id'))}.")
    natural, artifact = (as_prompt(entry.get(key), f"{where}: {key!r}") for key in keys)
    check_name(entry["id"], where)
    block = entry.get("group")
    if block is not None and not (isinstance(block, str) and block.strip()):
        raise UserError(f"{where}: 'group' names pairs that depend on each other; it must be text, not {shown(block)}.")
    return Pair(entry["id"], category, natural, artifact, block)


def texts(pairs: Sequence[Pair]) -> list[str]:
    """Of both sides of each pair."""
    return [text for pair in pairs for text in (pair.natural, pair.artifact)]


def prompt_groups(pairs: list[Pair]) -> dict[str, dict[str, list]]:
    """The prompts file of the experiment: one group for each side of each pair."""
    groups = {}
    for side in SIDES:
        for pair in pairs:
            groups[pair.group(side)] = {SUBCATEGORY: [written(getattr(pair, side))]}
    return groups


def pairs_hash(pairs: list[Pair]) -> str:
    """Of the prompts, ids and categories in their order: whatever the file is called and how it is laid out."""
    content = json.dumps(
        [
            # What a pair does not have is left out, so that a field that is new changes no hash.
            [pair.id, pair.category, written(pair.natural), written(pair.artifact), *filter(None, [pair.block])]
            for pair in pairs
        ]
    )
    return hashlib.sha256(content.encode()).hexdigest()
