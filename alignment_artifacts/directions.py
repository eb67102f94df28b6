"""Directions of a model: estimated from pairs, kept in a file, exchanged with other tools.

A direction belongs to one model, one site (MLP output or residual stream) and the positions it
was measured at; using it on another model is refused. On disk: `directions.safetensors` with
these facts as metadata, or a GGUF control vector as llama.cpp and repeng use it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from gemma_refactored.activation_capture import block_sites, capture, modules_by_site
from gemma_refactored.errors import UserError
from gemma_refactored.files import write_safetensors
from gemma_refactored.model_loading import LoadedModel

from .interventions import ModeOptions, SiteDirection

SITES = ("mlp", "residual")
COMPONENTS = 8  # kept of the pair differences, at most; `subspace` uses the first few
PARTS = ("direction", "natural_mean", "artifact_mean", "components", "spread", "natural_tokens")


@dataclass
class Directions:
    """One direction a layer, with what the modes need to know about it. float32.

    Attributes:
        facts: which model (model, model_revision, num_layers, hidden_size), and "site", "positions", "pairs".
        direction: [layers, hidden] mean artifact minus mean natural activation.
        natural_mean, artifact_mean: [layers, hidden]; None for an imported vector that came without.
        components: [layers, k, hidden] leading right singular vectors of the pair differences, not centred
            (centring would remove the very mean difference).
        spread: [layers] root mean squared distance of a prompt from its class's mean.
        natural_tokens: [layers, tokens] projections of every natural token on the unit direction, sorted.
        available: layers that have a direction.
    """

    facts: dict
    direction: np.ndarray
    natural_mean: np.ndarray | None = None
    artifact_mean: np.ndarray | None = None
    components: np.ndarray | None = None
    spread: np.ndarray | None = None
    natural_tokens: np.ndarray | None = None
    available: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        norms = np.linalg.norm(self.direction, axis=-1)
        self.available = tuple(int(i) for i in np.flatnonzero(norms > 0))

    @property
    def unit(self) -> np.ndarray:
        """[layers, hidden]; zero where a layer has no direction."""
        return self.direction / np.maximum(np.linalg.norm(self.direction, axis=-1, keepdims=True), 1e-30)

    def at(self, layer: int, options: ModeOptions) -> SiteDirection:
        """What the modes need at one layer, as MLX arrays; NaN for what an imported vector does not know."""
        unknown = np.full(self.direction.shape[-1], np.nan, np.float32)
        natural, artifact = (
            unknown if mean is None else mean[layer] for mean in (self.natural_mean, self.artifact_mean)
        )
        components = self.components[layer] if self.components is not None else unknown[None]
        tokens = self.natural_tokens
        return SiteDirection(
            direction=mx.array(self.direction[layer]),
            natural_mean=mx.array(natural),
            artifact_mean=mx.array(artifact),
            components=mx.array(components),
            spread=float(self.spread[layer]) if self.spread is not None else float("nan"),
            cap=float(np.quantile(tokens[layer], options.cap_quantile)) if tokens is not None else float("nan"),
        )


def estimate(vectors: np.ndarray, facts: dict) -> Directions:
    """Mean differences of matched prompts and what belongs to them.

    Args:
        vectors: [pairs, 2 (natural, artifact), layers, hidden].
        facts: see `Directions.facts`.
    Raises:
        UserError: no pairs at all.
    """
    if not len(vectors):
        raise UserError("There are no pairs to estimate directions from; name other categories.")
    vectors = vectors.astype(np.float64)
    means = vectors.mean(axis=0)  # [2, layers, hidden]
    differences = (vectors[:, 1] - vectors[:, 0]).swapaxes(0, 1)  # [layers, pairs, hidden]
    within = ((vectors - means) ** 2).sum(axis=-1).mean(axis=(0, 1))
    parts = {
        "direction": means[1] - means[0],
        "natural_mean": means[0],
        "artifact_mean": means[1],
        "components": np.linalg.svd(differences, full_matrices=False)[2][:, :COMPONENTS],
        "spread": np.sqrt(within),
    }
    return Directions(facts, **{name: value.astype(np.float32) for name, value in parts.items()})


def site_names(loaded: LoadedModel, site: str) -> list[str]:
    """The site of each layer: "residual" is the stream after the block, "mlp" the MLP's output.

    Raises:
        UserError: this architecture's blocks have no MLP of that name.
    """
    blocks = block_sites(loaded.model)
    if site == "residual":
        return blocks
    if site != "mlp":
        raise UserError(f"The site must be one of {', '.join(SITES)}, not {site!r}.")
    names = [block.removesuffix(".output") + ".mlp.output" for block in blocks]
    if not set(names) <= modules_by_site(loaded.model).keys():
        raise UserError(f"{loaded.name} has no {names[0]}; use the residual stream (site residual).")
    return names


def measure_natural_tokens(
    loaded: LoadedModel, directions: Directions, sequences: Sequence[Sequence[int]]
) -> Directions:
    """The same directions, with the projections of every token of natural prompts and answers: what `cap` needs.

    Args:
        sequences: token ids of natural prompts with the model's own answers, one list each.
    """
    sites = site_names(loaded, directions.facts["site"])
    units = [mx.array(unit) for unit in directions.unit]
    found: list[list[np.ndarray]] = [[] for _ in sites]
    for tokens in sequences:
        with capture(loaded.model, sites) as activations:
            loaded.model(mx.array([list(tokens)]))
            projected = [activations[s][0].astype(mx.float32) @ u for s, u in zip(sites, units, strict=True)]
        mx.eval(projected)
        for layer, values in enumerate(projected):
            found[layer].append(np.array(values))
    return replace(directions, natural_tokens=np.sort([np.concatenate(layer) for layer in found]))


def planted_directions(loaded: LoadedModel) -> dict[int, np.ndarray]:
    """The truth of the embedded organism: layer -> unit direction [hidden] at the MLP output; {} for other models."""
    path = loaded.folder.parent / "planted_directions.safetensors"
    if not path.exists():
        return {}
    arrays = {int(site.split(".")[2]): np.array(value, np.float32) for site, value in mx.load(str(path)).items()}
    return {layer: value / np.linalg.norm(value) for layer, value in arrays.items()}


def random_like(directions: Directions, seed: int) -> Directions:
    """The control: random directions of the same norms, everything else as if they had been estimated.

    Without `natural_tokens`, which belong to the direction: measure them anew.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(directions.direction.shape).astype(np.float32)
    norms = np.linalg.norm(directions.direction, axis=-1, keepdims=True)
    drawn *= norms / np.linalg.norm(drawn, axis=-1, keepdims=True)
    components = None
    if directions.components is not None:
        random = rng.standard_normal(directions.components.shape)
        random[:, 0] = drawn
        basis = np.linalg.qr(random.swapaxes(1, 2))[0].swapaxes(1, 2)
        components = basis.astype(np.float32)
    artifact_mean = directions.natural_mean + drawn if directions.natural_mean is not None else None
    return replace(
        directions,
        facts={**directions.facts, "control": f"random, seed {seed}"},
        direction=drawn,
        artifact_mean=artifact_mean,
        components=components,
        natural_tokens=None,
    )


def check_model(directions: Directions, loaded: LoadedModel) -> None:
    """Raise UserError if the directions were made on another model."""
    mine, theirs = loaded.facts(), directions.facts
    for name in ("num_layers", "hidden_size", "model_revision"):
        if theirs.get(name) is not None and theirs[name] != mine[name]:
            raise UserError(
                f"These directions were made on {theirs.get('model', 'another model')} ({name} {theirs[name]}), not on "
                f"{loaded.name} ({mine[name]}); directions are of one model only."
            )


def save_directions(directions: Directions, path: Path) -> None:
    """Write `directions.safetensors`; the facts are its metadata."""
    arrays = {name: mx.array(getattr(directions, name)) for name in PARTS if getattr(directions, name) is not None}
    write_safetensors(path, arrays, {"facts": json.dumps(directions.facts)})


def load_directions(path: Path) -> Directions:
    """Read a file of `save_directions`, or a GGUF control vector.

    Raises:
        UserError: missing, damaged, or not a file of directions.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no directions file {path}.")
    if path.suffix == ".gguf":
        return read_gguf(path)
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        return Directions(json.loads(metadata["facts"]), **{name: np.array(value) for name, value in arrays.items()})
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of directions ({str(error).splitlines()[0]}).") from None


def write_gguf(directions: Directions, path: Path) -> None:
    """Export residual-stream directions as a control vector (llama.cpp, repeng).

    Tensor `direction.N` belongs to the residual stream after block N, blocks counted from 0, in both
    programs; llama.cpp has none for block 0, so that one is left out. Adding it amplifies.

    Raises:
        UserError: MLP directions (neither program can apply them), or no gguf package.
    """
    gguf = _gguf()
    if directions.facts["site"] != "residual":
        raise UserError("A GGUF control vector acts on the residual stream; export directions of the site residual.")
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(temporary, "controlvector")
    layers = [layer for layer in directions.available if layer > 0]
    writer.add_string("controlvector.model_hint", directions.facts.get("model_type", "unknown"))
    writer.add_uint32("controlvector.layer_count", len(layers))
    # Ours; other programs do not look at it.
    writer.add_string("alignment_artifacts.facts", json.dumps(directions.facts))
    for layer in layers:
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(directions.direction[layer]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)


def read_gguf(path: Path) -> Directions:
    """Import a control vector: residual-stream directions without the statistics behind them.

    Raises:
        UserError: not a control vector, or no gguf package.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{path} is not a GGUF file ({error}).") from None

    def text(name: str) -> str | None:
        field = reader.get_field(name)
        return bytes(field.parts[-1]).decode() if field else None

    if text("general.architecture") != "controlvector":
        raise UserError(f"{path} is a GGUF file of {text('general.architecture')!r}, not a control vector.")
    found = {int(t.name.split(".")[1]): t.data for t in reader.tensors if t.name.startswith("direction.")}
    if not found:
        raise UserError(f"{path} holds no direction.")
    own = text("alignment_artifacts.facts")
    facts = json.loads(own) if own else {"model_type": text("controlvector.model_hint"), "site": "residual"}
    layers = facts.get("num_layers") or max(found) + 1
    direction = np.zeros((layers, len(next(iter(found.values())))), np.float32)
    for layer, values in found.items():
        direction[layer] = values
    return Directions(facts, direction)


def _gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the gguf package: pip install gguf.") from None
    return gguf
