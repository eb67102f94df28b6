"""Any collection as arrays: prompts, sites, steps; no pairs needed.

from alignment_artifacts import load_collection
collected = load_collection("collected_activations_output", "mlp.output")
collected.values["model.layers.3.mlp.output"]  # [prompts, steps, width]; step 0 is the prompt's last token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alignment_artifacts.activation_set import layers_first
from alignment_artifacts.collected_files import Source, read_manifest
from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import BATCH_MARKER, PROMPT_MARKER, read_json
from gemma_refactored.npz_files import NpzReader


@dataclass
class CollectedArrays:
    """What run_model.py has collected, grouped or flat.

    Attributes:
        prompts: one record per prompt, in the order of the prompts file: "group", "subcategory", "number", "prompt"
            (a text, or a list of messages), its answer's "text" and "token_ids".
        values: site -> float32 [prompts, steps, width]; step 0 is the prompt's last token, step k + 1 the k-th
            generated token; zero where an answer had ended. What is large is in a temporary file.
        valid: bool [prompts, steps]; false where an answer had ended.
        manifest: of the collection.
    """

    prompts: list[dict] = field(repr=False)
    values: dict[str, np.ndarray] = field(repr=False)
    valid: np.ndarray = field(repr=False)
    manifest: dict = field(repr=False)

    @property
    def sites(self) -> list[str]:
        return list(self.values)

    def __repr__(self) -> str:
        prompts, steps = self.valid.shape
        return (
            f"CollectedArrays({prompts} prompts, {steps} steps, {len(self.values)} sites of {self.manifest['model']})"
        )


def load_collection(
    folder: str | Path,
    sites: str | Sequence[str] | None = None,
    progress: Callable = lambda items: items,
) -> CollectedArrays:
    """Read the activations of every complete prompt of a collection.

    Args:
        sites: names of sites, or a part of the names of all that are wanted ("mlp.output"); None: all that have one
            vector per token. Others are not read.
        progress: wraps the list of folders that are read.
    Raises:
        UserError: no collection there, a site that it does not hold, or a damaged file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if "layout" not in manifest:
        raise UserError(f"{folder} has no manifest that says what it holds; collect it with run_model.py.")
    found = _flat(folder) if manifest["layout"] == "flat" else _grouped(folder)
    order = {place: i for i, place in enumerate(_promised(manifest))}
    found = {place: found[place] for place in sorted(found, key=lambda place: order.get(place, len(order)))}
    if not found:
        raise UserError(f"No prompt of {folder} is complete; run the command that collects it again.")
    sources, reader = list(found.values()), NpzReader()
    first = reader.read(sources[0][1].file(0))
    chosen = _chosen({site: array.shape for site, array in first.items()}, sites, folder)
    steps = 1 + max(len(record["token_ids"]) for record, _ in sources)
    shape = (len(sources), steps)
    values = {site: layers_first((*shape, 1, first[site].shape[-1]), folder)[:, :, 0] for site in chosen}
    valid = np.zeros(shape, bool)
    rows_of: dict[Path, list[int]] = {}
    for i, (_, source) in enumerate(sources):
        rows_of.setdefault(source.folder, []).append(i)
    for rows in progress(list(rows_of.values())):
        for step in range(steps):
            reading = [i for i in rows if step <= len(sources[i][0]["token_ids"])]
            if not reading:
                break
            for site, array in reader.read(sources[reading[0]][1].file(step), chosen).items():
                for i in reading:
                    values[site][i, step] = array[sources[i][1].row, 0]
            valid[reading, step] = True
    return CollectedArrays([record for record, _ in sources], values, valid, manifest)


Place = tuple[str, str, int]  # group, subcategory, and number from 1


def _promised(manifest: dict) -> list[Place]:
    groups = manifest.get("prompt_groups", {})
    return [
        (group, subcategory, number)
        for group, subcategories in groups.items()
        for subcategory, texts in subcategories.items()
        for number in range(1, len(texts) + 1)
    ]


def _grouped(folder: Path) -> dict[Place, tuple[dict, Source]]:
    found = {}
    for path in sorted(folder.glob(f"*/*/batch_*/{PROMPT_MARKER}")):
        record = read_json(path, "prompt marker")
        number = int(path.parent.name.removeprefix("batch_"))
        found[record["group"], record["subcategory"], number] = ({**record, "number": number}, Source(path.parent))
    return found


def _flat(folder: Path) -> dict[Place, tuple[dict, Source]]:
    found = {}
    for path in sorted(folder.glob(f"batch_*/{BATCH_MARKER}")):
        for row, record in enumerate(read_json(path, "batch marker")["rows"]):
            place = (record["group"], record["subcategory"], record["number"])
            found[place] = (record, Source(path.parent, row))
    return found


def _chosen(shapes: dict[str, tuple[int, ...]], sites: str | Sequence[str] | None, folder: Path) -> list[str]:
    """The sites to read, among those of the collection."""
    usable = [site for site, shape in shapes.items() if len(shape) == 3 and shape[1] == 1]
    if sites is None or isinstance(sites, str):
        chosen = [site for site in usable if (sites or "") in site]
    else:
        chosen = list(sites)
    missing = [site for site in chosen if site not in shapes]
    if missing or not chosen:
        raise UserError(
            f"{folder} holds no site {shown(missing[0] if missing else sites)}; it holds, for example: "
            f"{', '.join(list(shapes)[:4])}."
        )
    if unlike := [site for site in chosen if site not in usable]:
        raise UserError(f"{unlike[0]} has no single vector per token; read its files with np.load.")
    return chosen
