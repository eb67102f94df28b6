"""From a folder of .npz files to one array that the statistics work on."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alignment_artifacts.pairs import SIDES, SUBCATEGORY, Pair
from gemma_refactored.errors import UserError
from gemma_refactored.files import (
    CERTIFICATE,
    MANIFEST,
    PROMPT_EMBEDDING,
    PROMPT_MARKER,
    is_folder,
    read_json,
    step_file,
)
from gemma_refactored.npz_files import NpzReader

POSITIONS = ("prompt_end", "generated", "all")
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
        if size > shutil.disk_usage(folder or tempfile.gettempdir()).free:
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
    sites = {re.sub(r"\.\d+\.", ".{layer_idx}.", site, count=1) for site in manifest.get("sites", [])}
    patterns = sorted(site for site in sites if "{layer_idx}" in site)
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
    manifest = _read_manifest(folder)
    places = {pair: [folder / pair.group(side) / subcategory / "batch_1" for side in SIDES] for pair in pairs}
    files = _survey(folder, manifest, list(places.values()), key_pattern, num_steps)
    for name, wanted, actual in (
        ("NUM_LAYERS", num_layers, len(files.keys)),
        ("EXPECTED_HIDDEN_DIM", hidden_size, files.hidden),
    ):
        if wanted is not None and wanted != actual:
            raise UserError(f"{name} is {wanted}, but the files in {folder} have {actual}; None takes it from them.")

    values = layers_first((len(pairs), 2, files.num_steps + 1, len(files.keys), files.hidden), folder)
    valid = np.zeros(values.shape[:3], bool)
    kept: list[Pair] = []
    embeddings, excluded = [], []
    for pair in progress(pairs):
        row = len(kept)
        reason = _read_pair(places[pair], files, values[row], valid[row])
        if reason is None:
            kept.append(pair)
            embeddings.append([_read_embedding(place, files) for place in places[pair]])
        else:
            values[row], valid[row] = 0, False  # the next pair takes its row
            excluded.append({"pair": pair.id, "category": pair.category, "reason": reason})
    if not kept:
        raise UserError(f"No pair in {folder} is complete (for example: {excluded[0]['reason']}).")
    has_embeddings = all(embedding is not None for both in embeddings for embedding in both)
    return ActivationSet(
        pairs=kept,
        values=values[: len(kept)],
        valid=valid[: len(kept)],
        prompt_embeddings=np.array(embeddings, np.float32) if has_embeddings else None,
        excluded=excluded,
        manifest=manifest,
        folder=folder,
        prompt_lengths=prompt_lengths([places[pair] for pair in kept]),
    )


@dataclass(frozen=True)
class _Files:
    """What is to be read of each prompt of a collection.

    Attributes:
        keys: name of the array of each layer; hidden: its size.
        num_steps: generated tokens, at most.
        have_markers: a prompt without its marker was interrupted. (Collections without a manifest have none.)
    """

    keys: list[str]
    hidden: int
    num_steps: int
    have_markers: bool
    reader: NpzReader


def _read_manifest(folder: Path) -> dict:
    if not is_folder(folder, "activations folder"):
        raise UserError(f"There is no collection in {folder}; run `bash collect_activations.sh` first.")
    path = folder / MANIFEST
    manifest = read_json(path, "manifest") if path.exists() else {}
    if not isinstance(manifest, dict):
        raise UserError(f"The manifest {path} is not an object; run the collection again.")
    return manifest


def _survey(
    folder: Path, manifest: dict, places: list[list[Path]], key_pattern: str | None, num_steps: int | None
) -> _Files:
    """What there is to read: the first prompt's files speak for all, and must agree with the manifest."""
    key_pattern = key_pattern or find_key_pattern(manifest, folder)
    collected_steps = manifest.get("max_tokens")
    if num_steps is None:
        num_steps = collected_steps
    elif collected_steps is not None and num_steps > collected_steps:
        raise UserError(
            f"NUM_TOKEN_STEPS_TO_COLLECT is {num_steps}, but {folder} was collected with {collected_steps}."
        )
    prefills = (place / _step_file(0) for both in places for place in both)
    first = next((path for path in prefills if path.exists()), None)
    if first is None:
        raise UserError(f"{folder} holds none of the prompt pairs' activations; run `bash collect_activations.sh`.")
    reader = NpzReader()
    arrays = reader.read(first)
    layers, promised = (_count_layers(names, key_pattern) for names in (arrays, manifest.get("sites", [])))
    if layers == 0:
        raise UserError(
            f"{first} has no array named {_key(key_pattern, 0)!r}; "
            f"set KEY_PATTERN_TEMPLATE to match one of: {', '.join(list(arrays)[:4])} .."
        )
    if promised not in (0, layers):
        raise UserError(
            f"{first} has {layers} of the {promised} layers; delete its folder and run the collection again."
        )
    if num_steps is None:
        steps = (int(f.stem.rsplit("_", 1)[1]) for place in places[0] for f in place.glob(step_file("[0-9]*")))
        num_steps = max(steps, default=-1) + 1
    keys = [_key(key_pattern, layer) for layer in range(layers)]
    return _Files(keys, arrays[keys[0]].size, num_steps, bool(manifest), reader)


def _read_pair(places: list[Path], files: _Files, values: np.ndarray, valid: np.ndarray) -> str | None:
    """Fill one pair's [2, steps, layers, hidden]; returns why it cannot be used, if it cannot."""
    for place, *sides in zip(places, values, valid, strict=True):
        if reason := _read_prompt(place, files, *sides):
            return reason
    if files.num_steps and not valid[:, 1:].any(axis=1).all():
        return "one of its prompts got an empty answer"
    return None


def prompt_lengths(places: list[list[Path]]) -> np.ndarray | None:
    """[pairs, 2] tokens of each prompt, from the markers in `places` [pair][side]; None where one has no count."""
    markers = [[place / PROMPT_MARKER for place in sides] for sides in places]
    if not all(marker.exists() for sides in markers for marker in sides):
        return None
    counts = [[read_json(marker, "prompt marker").get("prompt_tokens") for marker in sides] for sides in markers]
    complete = all(isinstance(count, int) for sides in counts for count in sides)
    return np.array(counts) if complete else None


def _read_prompt(place: Path, files: _Files, values: np.ndarray, valid: np.ndarray) -> str | None:
    """Fill one prompt's [steps, layers, hidden]; returns why it cannot be used, if it cannot."""
    if not (place / _step_file(0)).exists():
        return f"not collected: {place} has no {_step_file(0)}"
    answer_length = _answer_length(place)
    if answer_length is None and files.have_markers:
        return f"not complete: {place} has no {PROMPT_MARKER}"
    for step in range(len(values)):
        path = place / _step_file(step)
        if not path.exists():
            if step <= min(answer_length or 0, files.num_steps):
                return f"a step is missing: {path}"
            break
        _read_step(path, files, values[step])
        valid[step] = True
    return None


def _read_step(path: Path, files: _Files, values: np.ndarray) -> None:
    """Fill [layers, hidden] from one file."""
    for layer, (key, array) in enumerate(files.reader.read(path, files.keys).items()):
        if array.size != files.hidden:
            raise UserError(f"{path}: {key!r} has shape {array.shape}, expected (1, 1, {files.hidden}).")
        values[layer] = array.ravel()
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinite values; collect this prompt again.")


def _read_embedding(place: Path, files: _Files) -> np.ndarray | None:
    """[hidden] mean token embedding of a prompt; None without one of the activations' width."""
    path = place / PROMPT_EMBEDDING
    if not path.exists():
        return None
    embedding = files.reader.read(path, ["prompt_embedding"])["prompt_embedding"].ravel()
    return embedding if embedding.size == files.hidden else None


def _answer_length(place: Path) -> int | None:
    path = place / PROMPT_MARKER
    if not path.exists():
        return None
    marker = read_json(path, "prompt marker")
    if not isinstance(marker, dict) or not isinstance(marker.get("token_ids"), list):
        raise UserError(f"The prompt marker {path} has no 'token_ids'; delete its folder and run the collection again.")
    return len(marker["token_ids"])


def _step_file(step: int) -> str:
    """Step 0 is the prompt's last token, step k + 1 the k-th generated one."""
    return step_file(str(step - 1) if step else "prefill")


def _key(pattern: str, layer: int) -> str:
    return pattern.replace("{layer_idx}", str(layer))  # other braces are no business of ours


def _count_layers(names: Collection[str], key_pattern: str) -> int:
    layers = 0
    while _key(key_pattern, layers) in names:
        layers += 1
    return layers
