"""From a folder of .npz files to one array that the statistics work on."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alignment_artifacts.collected_files import Source, difference, find_sources, read_manifest
from alignment_artifacts.pairs import SUBCATEGORY, Pair, PromptPairs
from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import CERTIFICATE, PROMPT_EMBEDDING, is_file, read_json, step_file
from gemma_refactored.npz_files import NpzReader
from gemma_refactored.site_names import SITE_KINDS, kind_of, pattern_of

POSITIONS = ("prompt_end", "generated", "all", "answer", "answer_start")
AFTER_THOUGHTS = {"answer": "generated", "answer_start": "prompt_end"}  # and what they are where nothing is thought
IN_MEMORY = 1 << 29  # bytes; larger arrays are kept in a temporary file
PAIRS_AT_ONCE = 128
LAYER = re.compile(r"\{layer(?:_idx)?\}")
MAX_EXCLUDED = 0.05  # share of the pairs


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
        thoughts: [pairs, 2] how many of the generated tokens are a thought before the answer, -1 where it has not
            ended; None: the model does not think.
        excluded: pairs left out, each with its reason.
        manifest: of the collection, {} if it has none.
        folder: of the collection.
        site: what was read, with {layer_idx} for the layer: "model.layers.{layer_idx}.mlp.output".
        has_texts: the collection says which prompts it is of, and they are those of the pairs.
    """

    pairs: PromptPairs
    values: np.ndarray
    valid: np.ndarray
    prompt_embeddings: np.ndarray | None
    excluded: list[dict]
    manifest: dict
    folder: Path | None = None
    site: str = ""
    has_texts: bool = True
    prompt_lengths: np.ndarray | None = None
    thoughts: np.ndarray | None = None
    _prompt_vectors: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def num_layers(self) -> int:
        return self.values.shape[3]

    @property
    def model(self) -> str:
        """Name of the model, with what is not known wherever the numbers are shown."""
        name = self.manifest.get("model")
        if self.has_texts:
            return name or "model unknown"
        return f"{name} (prompts unknown)" if name else "model and prompts unknown"

    def mask(self, positions: str) -> np.ndarray:
        """[pairs, 2, steps] bool: which steps `positions` (one of POSITIONS) covers.

        "answer" is what was generated after the thought, "answer_start" the token before its first: none where a
        thought has not ended. Of a model that does not think they are "generated" and "prompt_end".
        """
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not {positions!r}")
        covered = self.valid.copy()
        if self.thoughts is not None and positions in AFTER_THOUGHTS:
            steps, thought = np.arange(covered.shape[2]), self.thoughts[:, :, None]
            return covered & (thought >= 0) & (steps > thought if positions == "answer" else steps == thought)
        positions = AFTER_THOUGHTS.get(positions, positions)
        if positions == "prompt_end":
            covered[:, :, 1:] = False
        elif positions == "generated":
            covered[:, :, 0] = False
        return covered

    def prompt_vectors(self, positions: str) -> np.ndarray:
        """[pairs, 2, layers, hidden] float32: each prompt's mean over its valid positions; kept for the next call.

        NaN where it has none, which can be with "answer" and "answer_start" only.
        """
        if self.thoughts is None:
            positions = AFTER_THOUGHTS.get(positions, positions)
        if positions not in self._prompt_vectors:
            mask = self.mask(positions)
            pairs, sides, _, layers, hidden = self.values.shape
            means = layers_first((pairs, sides, layers, hidden), self.folder)
            with np.errstate(invalid="ignore"):
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
    if not is_file(path, "certificate"):
        return "none (python run_model.py --check issues one)"
    certificate = read_json(path, "certificate")
    try:
        return _verdict_for(certificate, manifest)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not what run_model.py --check writes; run that again, or delete it.") from None


def _verdict_for(certificate: dict, manifest: dict) -> str:
    if certificate["model_revision"] != manifest.get("model_revision"):
        return f"for another model ({certificate['model']}); run run_model.py --check again"
    if certificate["dtype"] != manifest.get("weights_dtype"):
        return f"for {certificate['dtype']}, but this was collected in {manifest.get('weights_dtype')}"
    failed = [check["name"] for check in certificate["checks"] if check["passed"] is False]
    detail = f": {', '.join(failed)}" if failed else f", tolerance {certificate['tolerance']:g}"
    return f"{certificate['verdict']} on {certificate['device']} in {certificate['dtype']}{detail}"


def find_key_pattern(sites: Iterable[str], folder: Path, site: str | None = None) -> str:
    """Name of a collection's arrays with {layer_idx} for the layer number: those of a kind of site, or all there is.

    Raises:
        UserError: there is none of that kind; or none was named, and there are several.
    """
    patterns = sorted(name for name in set(map(pattern_of, sites)) if "{layer_idx}" in name)
    kinds = [kind for kind in SITE_KINDS if any(kind_of(pattern) == kind for pattern in patterns)]
    if site:
        chosen = [pattern for pattern in patterns if kind_of(pattern) == site]
        if not chosen:
            there = f"site {', '.join(kinds)}" if kinds else ", ".join(patterns[:4])
            raise UserError(
                f"{folder} holds no site {site}, but {there}; collect it with SITE={site}, or name another."
            )
        return chosen[0]
    if len(patterns) > 1:
        names = f"SITE to one of {', '.join(kinds)}, or " if kinds else ""
        raise UserError(
            f"{folder} holds {len(patterns)} sites in each layer, and the analysis is of one: set {names}"
            f"KEY_PATTERN_TEMPLATE to a name such as {', '.join(patterns[:3])}."
        )
    if not patterns:
        raise UserError(f"{folder} holds no arrays with a layer's number in their name, such as model.layers.0.output.")
    return patterns[0]


def names_a_layer(key_pattern: str) -> bool:
    """Does a pattern have {layer_idx}, or {layer}, once?"""
    return len(LAYER.findall(key_pattern)) == 1


def load_activation_set(
    folder: str | Path,
    pairs: Sequence[Pair],
    subcategory: str = SUBCATEGORY,
    key_pattern: str | None = None,
    num_layers: int | None = None,
    num_steps: int | None = None,
    hidden_size: int | None = None,
    progress: Callable = lambda items: items,
    site: str | None = None,
) -> ActivationSet:
    """Read a collection, grouped or flat, each file once.

    None for a setting means: what the collection's manifest (or, without one, its files) says. `site` is "mlp",
    "attention" or "residual", `key_pattern` a name with {layer_idx} for any other. Pairs whose texts are
    not those that were collected are excluded.

    Raises:
        UserError: no collection there, a damaged file, or a setting that contradicts the files.
    """
    folder = Path(folder)
    pairs = PromptPairs.of(pairs)
    manifest = read_manifest(folder)
    sources = find_sources(folder, manifest, pairs, subcategory)
    files = _survey(folder, manifest, [source for both in sources for source in both], key_pattern, num_steps, site)
    for name, wanted, actual in (
        ("NUM_LAYERS", num_layers, len(files.keys)),
        ("EXPECTED_HIDDEN_DIM", hidden_size, files.hidden),
    ):
        if wanted is not None and wanted != actual:
            raise UserError(f"{name} is {wanted}, but the files in {folder} have {actual}; None takes it from them.")

    valid = np.zeros((len(pairs), 2, files.num_steps + 1), bool)
    reasons = [
        _check_pair(pair, both, steps, files, pairs.sides)
        for pair, both, steps in zip(pairs, sources, valid, strict=True)
    ]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    excluded = [
        {"pair": pair.id, "category": pair.category, "reason": reason}
        for pair, reason in zip(pairs, reasons, strict=True)
        if reason
    ]
    if not kept:
        raise UserError(
            f"No pair in {folder} can be used (for example: {excluded[0]['reason']}){_other_pairs(manifest)}."
        )
    valid, sources = valid[kept], [sources[i] for i in kept]
    values = layers_first((*valid.shape, len(files.keys), files.hidden), folder)
    embeddings = _read_all(sources, valid, files, values, progress)
    return ActivationSet(
        pairs=pairs.only(kept),
        values=values,
        valid=valid,
        prompt_embeddings=embeddings,
        excluded=excluded,
        manifest=manifest,
        folder=folder,
        site=files.pattern,
        has_texts=all(source.text is not None for both in sources for source in both),
        prompt_lengths=_prompt_lengths(sources),
        thoughts=thought_lengths([[source.thought_tokens for source in both] for both in sources]),
    )


def _other_pairs(manifest: dict) -> str:
    """What to name where a collection is of other prompts, behind a sentence that says so."""
    groups = manifest.get("prompt_groups")
    subcategories = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    prompts = next(iter(subcategories.values()), None) if isinstance(subcategories, dict) else None
    if not isinstance(prompts, list) or not prompts:
        return ""
    return (
        f". It was collected from other prompts (the first is {shown(prompts[0])}): if they are those of a pairs file "
        "of your own, name that (pairs= in Python, PAIRS or --pairs for a script)"
    )


def _prompt_lengths(sources: list[list[Source]]) -> np.ndarray | None:
    """[pairs, 2] tokens of each prompt, where the collection has them all."""
    lengths = [[source.prompt_tokens for source in both] for both in sources]
    is_complete = all(length is not None for both in lengths for length in both)
    return np.array(lengths) if is_complete else None


def thought_lengths(tokens: list[list[int | None]]) -> np.ndarray | None:
    """`ActivationSet.thoughts` of the number of tokens of each thought, None where it has not ended."""
    lengths = np.array([[-1 if number is None else number for number in both] for both in tokens])
    return lengths if lengths.any() else None


def refuse_excluded(data: ActivationSet, limit: float = MAX_EXCLUDED) -> None:
    """Raise UserError if more than this share of the pairs cannot be used."""
    total = len(data.pairs) + len(data.excluded)
    if len(data.excluded) > limit * total:
        raise UserError(
            f"{len(data.excluded)} of {total} pairs cannot be used (for example {data.excluded[0]['pair']}: "
            f"{data.excluded[0]['reason']}). Complete the collection with `bash collect_activations.sh`, into another "
            "ACTIVATIONS_DIR if the prompts have changed; or name the pairs file that was collected (pairs= in Python, "
            "PAIRS or --pairs for a script); or raise MAX_EXCLUDED to go on without these pairs."
        )


@dataclass(frozen=True)
class _Files:
    """What is to be read of each prompt of a collection.

    Attributes:
        pattern: name of the arrays, with {layer_idx}; keys: the name in each layer; hidden: their width.
        num_steps: generated tokens, at most.
    """

    pattern: str
    keys: list[str]
    hidden: int
    num_steps: int
    reader: NpzReader


def _survey(
    folder: Path,
    manifest: dict,
    sources: list[Source],
    key_pattern: str | None,
    num_steps: int | None,
    site: str | None,
) -> _Files:
    """What there is to read: the first prompt's files speak for all, and must agree with the manifest."""
    if key_pattern and not names_a_layer(key_pattern):
        raise UserError(f"KEY_PATTERN_TEMPLATE must have {{layer_idx}} in it once, not be {key_pattern!r}.")
    collected_steps = manifest.get("max_tokens")
    if num_steps is None:
        num_steps = collected_steps
    elif collected_steps is not None and num_steps > collected_steps:
        raise UserError(
            f"NUM_TOKEN_STEPS_TO_COLLECT is {num_steps}, but {folder} was collected with {collected_steps}."
        )
    first = next((source for source in sources if source.is_collected), None)
    if first is None:
        _, problem = sources[0].find_steps(0)
        raise UserError(
            f"{folder} holds none of the prompt pairs' activations ({problem}); run `bash collect_activations.sh`"
            f"{_other_pairs(manifest)}."
        )
    reader = NpzReader()
    arrays = reader.read(first.file(0))
    sites = manifest.get("sites", [])
    key_pattern = key_pattern or find_key_pattern(sites or arrays, folder, site)
    layers, promised = (_count_layers(names, key_pattern) for names in (arrays, sites))
    if layers == 0:
        raise UserError(
            f"{first.file(0)} has no array named {_key(key_pattern, 0)!r}; "
            f"set KEY_PATTERN_TEMPLATE to match one of: {', '.join(list(arrays)[:4])} .."
        )
    if promised not in (0, layers):
        raise UserError(
            f"{first.file(0)} has {layers} of the {promised} layers; delete its folder and run the collection again."
        )
    if key_pattern.endswith(".self_attn.weights"):
        raise UserError(
            f"{key_pattern} holds attention weights, of another length for each prompt; the analysis needs vectors of "
            "one width. Collect another site, or set KEY_PATTERN_TEMPLATE to one."
        )
    if num_steps is None:
        folders = {source.folder for source in sources}
        steps = (int(f.stem.rsplit("_", 1)[1]) for place in folders for f in place.glob(step_file("[0-9]*")))
        num_steps = max(steps, default=-1) + 1
    keys = [_key(key_pattern, layer) for layer in range(layers)]
    return _Files(key_pattern, keys, arrays[keys[0]].size // first.rows, num_steps, reader)


def _check_pair(
    pair: Pair, sources: list[Source], valid: np.ndarray, files: _Files, sides: tuple[str, str]
) -> str | None:
    """Fill one pair's [2, steps]; returns why it cannot be used, if it cannot."""
    if changed := difference(pair, sources, sides):
        return changed
    for source, steps in zip(sources, valid, strict=True):
        number, problem = source.find_steps(len(steps))
        if problem:
            return problem
        steps[:number] = True
    if files.num_steps and not valid[:, 1:].any(axis=1).all():
        return "one of its prompts got an empty answer"
    return None


def _read_all(
    sources: list[list[Source]], valid: np.ndarray, files: _Files, values: np.ndarray, progress: Callable
) -> np.ndarray | None:
    """Fill [pairs, 2, steps, layers, hidden]; returns the prompts' embeddings [pairs, 2, hidden], if all have one."""
    prompts_in: dict[Path, list[tuple[int, int]]] = {}  # pair and side
    for pair, both in enumerate(sources):
        for side, source in enumerate(both):
            prompts_in.setdefault(source.folder, []).append((pair, side))
    embeddings = np.full((*valid.shape[:2], files.hidden), np.nan, np.float32)
    for prompts in progress(list(prompts_in.values())):
        first = sources[prompts[0][0]][prompts[0][1]]
        _read_embeddings(first, sources, prompts, embeddings, files.reader)
        for step in range(valid.shape[2]):
            reading = [(pair, side) for pair, side in prompts if valid[pair, side, step]]
            if not reading:
                break
            path = first.file(step)
            for layer, (key, array) in enumerate(files.reader.read(path, files.keys).items()):
                if array.size != first.rows * files.hidden:
                    raise UserError(
                        f"{path}: {key!r} has shape {array.shape}, expected ({first.rows}, 1, {files.hidden})."
                    )
                rows = array.reshape(first.rows, files.hidden)
                for pair, side in reading:
                    values[pair, side, step, layer] = rows[sources[pair][side].row]
            if not all(np.isfinite(values[pair, side, step]).all() for pair, side in reading):
                raise UserError(f"{path} holds NaN or infinite values; collect this prompt again.")
    return None if np.isnan(embeddings).any() else embeddings


def _read_embeddings(
    first: Source,
    sources: list[list[Source]],
    prompts: list[tuple[int, int]],
    embeddings: np.ndarray,
    reader: NpzReader,
) -> None:
    """Fill the mean token embeddings of one folder's prompts, if they have the activations' width."""
    path = first.folder / PROMPT_EMBEDDING
    if not path.exists():
        return
    array = reader.read(path, ["prompt_embedding"])["prompt_embedding"]
    if array.size == first.rows * embeddings.shape[-1]:
        for pair, side in prompts:
            embeddings[pair, side] = array.reshape(first.rows, -1)[sources[pair][side].row]


def _key(pattern: str, layer: int) -> str:
    return LAYER.sub(str(layer), pattern)  # other braces stay as they are


def _count_layers(names: Collection[str], key_pattern: str) -> int:
    layers = 0
    while _key(key_pattern, layers) in names:
        layers += 1
    return layers
