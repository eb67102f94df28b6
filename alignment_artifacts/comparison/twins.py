"""Twins: harmless prompts that look like artifact prompts, each with the artifact prompt it looks like.

Read as `Pair`s whose natural side is the twin, from the organism's JSON or from XSTest's CSV
(Röttger et al. 2024, arXiv 2308.01263; github.com/paul-rottger/xstest): columns id, prompt, type, label. Its earlier
versions call the first id_v2 and id_v1 and have no label, which follows from the type.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignment_artifacts.blocks import normalised
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.pairs import PAIRS_JSON, Pair, load_pairs, texts
from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import read_json
from gemma_refactored.tables import TABLES, ending, read_table

BUILT_IN = Path(DEFAULT_MODEL).with_name("benign_twins.json")  # of the pairs that are shipped
ROOT_KEY = "benign_twins"
CONTRAST = "contrast_"
# Types whose unsafe contrasts are not called "contrast_" followed by the type's name.
SHARED_CONTRASTS = {"real_group_nons_discr": "contrast_discr", "privacy_fictional": "contrast_privacy"}
COLUMNS, EARLIER_IDS = ("id", "prompt", "type", "label"), ("id_v2", "id_v1")


def twins_for(pairs: Sequence[Pair], path: str | Path | None) -> list[Pair]:
    """The twins of a file; without one those of the shipped pairs, if it is these that they are for, else none."""
    if path is not None:
        return load_twins(path)
    return load_twins(BUILT_IN) if set(texts(pairs)) <= set(texts(load_pairs(PAIRS_JSON))) else []


def load_twins(path: str | Path) -> list[Pair]:
    """Twins with their artifact prompts, in file order.

    Raises:
        UserError: there is no such file, it has neither layout, an id or a twin with its artifact prompt occurs twice,
            or a twin is one of the artifact prompts.
    """
    path = Path(path)
    twins = _from_xstest(path) if ending(path) in TABLES else _from_json(path)
    if not twins:
        raise UserError(f"{path} holds no twins.")
    artifacts = {normalised(twin.artifact) for twin in twins}
    used: dict[tuple, str] = {}
    for twin in twins:
        if normalised(twin.natural) in artifacts:
            raise UserError(f"{path}: twin {shown(twin.id)} is also an artifact prompt, so it is no harmless twin.")
        if (twin.category, twin.id) in used:
            raise UserError(f"{path}: the id {shown(twin.id)} occurs twice in {shown(twin.category)}; ids must differ.")
        if first := used.get((normalised(twin.natural), normalised(twin.artifact))):
            raise UserError(f"{path}: twin {shown(twin.id)} repeats {shown(first)}; each counts once.")
        used |= {(twin.category, twin.id): twin.id, (normalised(twin.natural), normalised(twin.artifact)): twin.id}
    return twins


def _from_json(path: Path) -> list[Pair]:
    content = read_json(path, "twins file")
    try:
        twins = [
            Pair(entry["id"], category, entry["twin"], entry["artifact"])
            for category, body in content[ROOT_KEY]["categories"].items()
            for entry in body["pairs"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not have the layout of model_organism/benign_twins.json ({type(error).__name__}: {error})."
        ) from None
    for twin in twins:
        if not all(isinstance(text, str) and text.strip() for text in (twin.id, twin.natural, twin.artifact)):
            raise UserError(f"{path}: twin {shown(twin.id)} needs text in id, twin and artifact.")
    return twins


def _from_xstest(path: Path) -> list[Pair]:
    """The k-th safe prompt of a type with its k-th unsafe contrast; types without contrasts are omitted."""
    rows = read_table(path, "twins file")
    if not rows:
        return []
    earlier = next((name for name in EARLIER_IDS if name in rows[0] and "id" not in rows[0]), None)
    if earlier:
        rows = [{**row, "id": row[earlier], "label": row.get("label") or _label(row.get("type", ""))} for row in rows]
    if missing := [name for name in COLUMNS if name not in rows[0]]:
        raise UserError(f"{path} has no column {missing[0]!r}; XSTest's columns are {', '.join(COLUMNS)}.")
    by_type: dict[str, list[dict]] = {}
    ids = [row["id"] for row in rows]
    if twice := next((row_id for i, row_id in enumerate(ids) if row_id in ids[:i]), None):
        raise UserError(f"{path}: the id {shown(twice)} occurs twice; each row needs its own.")
    for row in rows:
        expected = _label(row["type"])
        if row["label"] != expected or not row["prompt"].strip():
            raise UserError(
                f"{path}: {shown(row['id'])} of type {shown(row['type'])} must be {expected} and have text."
            )
        by_type.setdefault(row["type"], []).append(row)
    twins = []
    for kind, safe in by_type.items():
        unsafe = by_type.get(SHARED_CONTRASTS.get(kind, CONTRAST + kind), [])
        if kind.startswith(CONTRAST) or not unsafe:
            continue
        if len(safe) != len(unsafe):
            raise UserError(f"{path}: {len(safe)} prompts of type {shown(kind)}, but {len(unsafe)} contrasts.")
        twins += [Pair(s["id"], kind, s["prompt"], u["prompt"]) for s, u in zip(safe, unsafe, strict=True)]
    return twins


def _label(kind: str) -> str:
    """Of the prompts of a type."""
    return "unsafe" if kind.startswith(CONTRAST) else "safe"
