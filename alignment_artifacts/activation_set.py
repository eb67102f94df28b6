"""From a folder of .npz files to one array that the statistics work on."""

from __future__ import annotations

import math
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alignment_artifacts.pairs import SIDES, SUBCATEGORY, Pair
from gemma_refactored.errors import UserError
from gemma_refactored.files import CERTIFICATE, MANIFEST, PROMPT_EMBEDDING, PROMPT_MARKER, read_json, step_file

POSITIONS = ("prompt_end", "generated", "all")
# What zipfile and NumPy raise for files of which some bit is wrong (a name or method they do not know, say).
DAMAGE = (OSError, ValueError, EOFError, KeyError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)
IN_MEMORY = 1 << 29  # bytes; larger arrays are kept in a temporary file
PAIRS_AT_ONCE = 128
DEFAULT_KEY = "model.layers.{layer_idx}.mlp.output"


@dataclass
class ActivationSet:
    """Activations of matched pairs.

    Attributes:
        pairs: the pairs, in the order of the first axis.
        values: float32 [pairs, 2 (natural, artifact), steps, layers, hidden]; step 0 is the prompt's
            last token, step k+1 the k-th generated token. A layer lies in one piece, and what is larger
            than IN_MEMORY is in a temporary file: go through it layer by layer.
        valid: bool [pairs, 2, steps]; false where a prompt had ended.
        prompt_embeddings: float32 [pairs, 2, hidden], mean token embedding of each prompt, or None.
        prompt_lengths: [pairs, 2] tokens of each prompt as the model read it, or None.
        excluded: pairs left out, each with its reason.
        manifest: of the collection, {} if it has none.
        folder: of the collection.
    """

    pairs: list[Pair]
    values: np.ndarray
    valid: np.ndarray
    prompt_embeddings: np.ndarray | None
    excluded: list[dict]
    manifest: dict
    folder: Path | None = None
    prompt_lengths: np.ndarray | None = None
    _prompt_vectors: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def num_layers(self) -> int:
        return self.values.shape[3]

    def mask(self, positions: str) -> np.ndarray:
        """[pairs, 2, steps] bool: which steps `positions` (one of POSITIONS) covers."""
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not {positions!r}")
        covered = self.valid.copy()
        if positions == "prompt_end":
            covered[:, :, 1:] = False
        elif positions == "generated":
            covered[:, :, 0] = False
        return covered

    def prompt_vectors(self, positions: str) -> np.ndarray:
        """[pairs, 2, layers, hidden] float32: each prompt's mean over its valid positions; kept for the next call."""
        if positions not in self._prompt_vectors:
            mask = self.mask(positions)
            pairs, sides, _, layers, hidden = self.values.shape
            means = layers_first((pairs, sides, layers, hidden), self.folder)
            weights = (mask / mask.sum(axis=2, keepdims=True)).astype(np.float32)[:, :, None]
            for layer in range(layers):
                for part in self._parts():
                    means[part, :, layer] = (weights[part] @ self.values[part, :, :, layer])[:, :, 0]
            self._prompt_vectors[positions] = means
        return self._prompt_vectors[positions]

    def step_vectors(self, positions: str, layer: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All single steps of one layer, natural and artifact [samples, hidden], some pairs at a time."""
        mask = self.mask(positions)
        for part in self._parts():
            yield tuple(self.values[part, side, :, layer][mask[part, side]] for side in range(2))

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.values), PAIRS_AT_ONCE):
            yield slice(start, start + PAIRS_AT_ONCE)


def layers_first(shape: tuple[int, ...], folder: Path | None) -> np.ndarray:
    """A float32 array [.., layers, hidden] whose layers lie one after the other, in memory or in a file.

    Args:
        folder: where the file goes; it has no name and is gone with the process.
    Raises:
        UserError: the disk has no room for it.
    """
    *outer, layers, hidden = shape
    stored, size = (layers, *outer, hidden), 4 * math.prod(shape)
    if size <= IN_MEMORY:
        array = np.zeros(stored, np.float32)
    else:
        if size > shutil.disk_usage(folder).free:
            raise UserError(
                f"The analysis needs {size / 1e9:.1f} GB of free disk in {folder} to work in; make some room."
            )
        with tempfile.TemporaryFile(dir=folder) as file:
            array = np.memmap(file, np.float32, "w+", shape=stored)
    return np.moveaxis(array, 0, -2)


def certificate_verdict(folder: str | Path, manifest: dict) -> str:
    """What `run_model.py --check` found for the model and precision of a collection, in a few words."""
    path = Path(folder) / CERTIFICATE
    if not path.exists():
        return "none (python run_model.py --check issues one)"
    certificate = read_json(path, "certificate")
    if certificate["model_revision"] != manifest.get("model_revision"):
        return f"for another model ({certificate['model']}); run run_model.py --check again"
    if certificate["dtype"] != manifest.get("weights_dtype"):
        return f"for {certificate['dtype']}, but this was collected in {manifest.get('weights_dtype')}"
    failed = [check["name"] for check in certificate["checks"] if check["passed"] is False]
    detail = f": {', '.join(failed)}" if failed else f", tolerance {certificate['tolerance']:g}"
    return f"{certificate['verdict']} on {certificate['device']} in {certificate['dtype']}{detail}"


def find_key_pattern(manifest: dict, folder: Path) -> str:
    """The site pattern of a collection, with {layer_idx} for the layer number."""
    patterns = {re.sub(r"\.\d+\.", ".{layer_idx}.", site, count=1) for site in manifest.get("sites", [])}
    patterns = sorted(p for p in patterns if "{layer_idx}" in p)
    if DEFAULT_KEY in patterns or not patterns:
        return DEFAULT_KEY
    if len(patterns) > 1:
        raise UserError(f"{folder} holds several sites a layer: set KEY_PATTERN_TEMPLATE to one of {patterns}.")
    return patterns[0]


def load_activation_set(
    folder: str | Path,
    pairs: list[Pair],
    subcategory: str = SUBCATEGORY,
    key_pattern: str | None = None,
    num_layers: int | None = None,
    num_steps: int | None = None,
    hidden_size: int | None = None,
    progress=lambda items: items,
) -> ActivationSet:
    """Read a grouped collection, each file once.

    None for a setting means: what the collection's manifest (or, without one, its files) says.

    Raises:
        UserError: no collection there, a damaged file, or a setting that contradicts the files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no collection in {folder}; run `bash collect_activations.sh` first.")
    manifest_path = folder / MANIFEST
    manifest = read_json(manifest_path, "manifest") if manifest_path.exists() else {}
    key_pattern = key_pattern or find_key_pattern(manifest, folder)
    steps_there = manifest.get("max_tokens")
    if num_steps is not None and steps_there is not None and num_steps > steps_there:
        raise UserError(f"NUM_TOKEN_STEPS_TO_COLLECT is {num_steps}, but {folder} was collected with {steps_there}.")
    num_steps = num_steps if num_steps is not None else steps_there

    places = {p: [folder / p.group(side) / subcategory / "batch_1" for side in SIDES] for p in pairs}
    first = next((f for fs in places.values() for d in fs for f in [d / step_file("prefill")] if f.exists()), None)
    if first is None:
        raise UserError(f"{folder} holds none of the prompt pairs' activations; run `bash collect_activations.sh`.")
    layers, hidden = _shape_of(first, key_pattern)
    promised = _count_layers(manifest.get("sites", []), key_pattern)
    if promised not in (0, layers):
        raise UserError(
            f"{first} has {layers} of the {promised} layers; delete its folder and run the collection again."
        )
    for name, wanted, there in (("NUM_LAYERS", num_layers, layers), ("EXPECTED_HIDDEN_DIM", hidden_size, hidden)):
        if wanted is not None and wanted != there:
            raise UserError(f"{name} is {wanted}, but the files in {folder} have {there}; None takes it from them.")
    if num_steps is None:
        num_steps = (
            max((_step_number(f) for d in places[pairs[0]] for f in d.glob(step_file("[0-9]*"))), default=-1) + 1
        )

    values = layers_first((len(pairs), 2, num_steps + 1, layers, hidden), folder)
    valid = np.zeros(values.shape[:3], bool)
    embeddings = np.zeros((len(pairs), 2, hidden), np.float32)
    has_embeddings, kept, excluded = True, [], []
    keys = [_key(key_pattern, i) for i in range(layers)]
    for pair in progress(pairs):
        i, reason = len(kept), None
        for side, place in enumerate(places[pair]):
            reason = reason or _read_prompt(place, keys, values[i, side], valid[i, side], needs_marker=bool(manifest))
            embedding = place / PROMPT_EMBEDDING
            if reason is None and has_embeddings and embedding.exists():
                row = _read_npz(embedding)["prompt_embedding"].ravel()
                has_embeddings = row.size == hidden
                embeddings[i, side] = row if has_embeddings else 0
            elif reason is None:
                has_embeddings = False
        if reason is None and num_steps and not valid[i, :, 1:].any(axis=1).all():
            reason = "one of its prompts got an empty answer"
        if reason is None:
            kept.append(pair)
        else:  # it leaves its place to the next
            values[i], valid[i] = 0, False
            excluded.append({"pair": pair.id, "category": pair.category, "reason": reason})
    if not kept:
        raise UserError(f"No pair in {folder} is complete (for example: {excluded[0]['reason']}).")
    here = slice(len(kept))
    return ActivationSet(
        kept,
        values[here],
        valid[here],
        embeddings[here] if has_embeddings else None,
        excluded,
        manifest,
        folder,
        prompt_lengths([places[pair] for pair in kept]),
    )


def prompt_lengths(places: list[list[Path]]) -> np.ndarray | None:
    """[pairs, 2] tokens of each prompt, from the markers in `places` [pair][side]; None where one has no count."""
    markers = [[place / PROMPT_MARKER for place in sides] for sides in places]
    if not all(marker.exists() for sides in markers for marker in sides):
        return None
    counts = [[read_json(marker, "prompt marker").get("prompt_tokens") for marker in sides] for sides in markers]
    complete = all(isinstance(count, int) for sides in counts for count in sides)
    return np.array(counts) if complete else None


def _read_prompt(place: Path, keys: list[str], values: np.ndarray, valid: np.ndarray, needs_marker: bool) -> str | None:
    """Fill one prompt's [steps, layers, hidden]; returns why it cannot be used, if it cannot."""
    if not (place / step_file("prefill")).exists():
        return f"not collected: {place} has no {step_file('prefill')}"
    last = _answer_length(place)
    if last is None and needs_marker:  # only files without a manifest (an older collection) have no markers
        return f"not complete: {place} has no {PROMPT_MARKER}"
    for step in range(values.shape[0]):
        path = place / step_file(str(step - 1) if step else "prefill")
        if not path.exists():
            if last is not None and step - 1 < min(last, values.shape[0] - 1):
                return f"a step is missing: {path}"
            break
        arrays = _read_npz(path)
        for layer, key in enumerate(keys):
            if key not in arrays:
                raise UserError(f"{path} has no array {key!r}; its arrays are {', '.join(list(arrays)[:4])} ..")
            if arrays[key].size != values.shape[-1]:
                raise UserError(f"{path}: {key!r} has shape {arrays[key].shape}, expected (1, 1, {values.shape[-1]}).")
            values[step, layer] = arrays[key].ravel()
        if not np.isfinite(values[step]).all():
            raise UserError(f"{path} holds NaN or infinite values; collect this prompt again.")
        valid[step] = True
    return None


def _answer_length(place: Path) -> int | None:
    marker = place / PROMPT_MARKER
    return len(read_json(marker, "prompt marker")["token_ids"]) if marker.exists() else None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder and run the collection again.") from None


def _shape_of(path: Path, key_pattern: str) -> tuple[int, int]:
    """Number of layers and hidden size, from one file."""
    arrays = _read_npz(path)
    layers = _count_layers(arrays, key_pattern)
    if layers == 0:
        raise UserError(
            f"{path} has no array named {_key(key_pattern, 0)!r}; "
            f"set KEY_PATTERN_TEMPLATE to match one of: {', '.join(list(arrays)[:4])} .."
        )
    return layers, arrays[_key(key_pattern, 0)].size


def _key(pattern: str, layer: int) -> str:
    return pattern.replace("{layer_idx}", str(layer))  # other braces are no business of ours


def _count_layers(names: Collection[str], key_pattern: str) -> int:
    layers = 0
    while _key(key_pattern, layers) in names:
        layers += 1
    return layers


def _step_number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])
