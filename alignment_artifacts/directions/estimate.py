"""Directions of a model: estimated from pairs, kept in a file, exchanged with other tools.

A direction belongs to one model, one site (MLP output or residual stream) and the positions it
was measured at; using it on another model is refused. On disk: `directions.safetensors` with
these facts as metadata, or a GGUF control vector as llama.cpp and repeng use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gemma_refactored.activation_capture import layer_sites, read
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_safetensors
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.versions import library_versions

SHORT_HASH = 19  # characters of a revision in a message: "sha256:" and twelve digits
COMPONENTS = 32  # kept of the pair differences, at most; `subspace` uses the first few


@dataclass
class Directions:
    """One direction per layer, with what the modes need to know about it. float32.

    Attributes:
        facts: which model (model, model_revision, num_layers, hidden_size), "site", "positions", "pairs",
            "ends" (what the direction points from and to) and the library "versions" it was made with.
        direction: [layers, hidden] mean artifact minus mean natural activation.
        natural_mean, artifact_mean: [layers, hidden]; None for an imported vector without them.
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
    facts = {"versions": library_versions(), **facts}
    return Directions(facts, **{name: value.astype(np.float32) for name, value in parts.items()})


def measure_natural_tokens(
    loaded: LoadedModel, directions: Directions, sequences: Sequence[Sequence[int]]
) -> Directions:
    """The same directions, with the projections of all tokens of natural prompts and answers: what `cap` needs.

    Attention sinks are left out.

    Args:
        sequences: token ids of natural prompts with the model's own answers, one list each.
    """
    sites = layer_sites(loaded.model, directions.facts["site"])
    sinks = loaded.sinks(sequences)
    projected = [
        np.einsum("plh,lh->lp", np.delete(x, sinks[i], axis=0), directions.unit)
        for i, x in read(loaded.model, sequences, sites)
    ]
    return replace(directions, natural_tokens=np.sort(np.concatenate(projected, axis=1)))


def planted_directions(loaded: LoadedModel) -> dict[int, np.ndarray]:
    """The truth of the embedded organism: layer -> unit direction [hidden] at the MLP output; {} for other models."""
    path = loaded.folder.parent / "planted_directions.safetensors"
    if loaded.adapter or not path.exists():
        return {}
    arrays = {int(site.split(".")[2]): np.array(value, np.float32) for site, value in read_safetensors(path)[0].items()}
    return {layer: value / np.linalg.norm(value) for layer, value in arrays.items()}


def random_like(directions: Directions, seed: int) -> Directions:
    """The control: random directions of the same norms, everything else as if they had been estimated.

    Without `natural_tokens`, which belong to the direction: measure them again.
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


# Names that other programs (llama.cpp, transformers) give to an architecture.
ALSO_CALLED = {
    "gemma3_text": ("gemma3",), "gemma3": ("gemma3_text",), "mistral": ("llama",), "mixtral": ("llama",),
    "phi3": ("phi-3",), "qwen3_moe": ("qwen3moe",), "gpt_neox": ("gptneox",),
}  # fmt: skip


def fit_to(directions: Directions, loaded: LoadedModel, transfer: bool = False) -> Directions:
    """The directions, if they are of this model; imported ones get zeros at the layers that they lack.

    Args:
        transfer: they may be of a relative, another model of the same type and shape; their facts then say so
            ("transferred_from": its "model" and "model_revision").
    Raises:
        UserError: they were made on another model, or on one of another shape or kind.
    """
    mine, theirs = loaded.facts(), directions.facts
    different = [name for name in ("num_layers", "hidden_size", "model_revision") if theirs.get(name) != mine[name]]
    is_relative = False
    for name in [name for name in different if theirs.get(name) is not None]:
        is_relative = name == "model_revision"
        if is_relative and transfer:
            continue
        relative = ", unless --transfer (in Python transfer=True) tries them on a relative" if is_relative else ""
        raise UserError(
            f"These directions were made on {theirs.get('model', 'another model')} ({name} "
            f"{str(theirs[name])[:SHORT_HASH]}), not on {loaded.name} ({str(mine[name])[:SHORT_HASH]}); "
            f"directions belong to one model only{relative}."
        )
    kind, hint = loaded.config["model_type"], theirs.get("model_type")
    if hint not in (None, "unknown", kind, *ALSO_CALLED.get(kind, ())):
        raise UserError(
            f"This control vector was made for a model of type {hint!r}, and {loaded.name} is of type {kind!r}; "
            "directions belong to one model only."
        )
    layers, width = directions.direction.shape
    if width != loaded.hidden_size or layers > loaded.num_layers:
        raise UserError(
            f"These directions have {layers} layers of width {width}, and {loaded.name} has {loaded.num_layers} of "
            f"{loaded.hidden_size}; directions belong to one model only."
        )
    if is_relative:
        source = {name: theirs.get(name) for name in ("model", "model_revision")}
        directions = replace(directions, facts={**theirs, "transferred_from": source, "transferred_to": mine["model"]})
    if layers == loaded.num_layers:
        return directions
    return replace(directions, direction=np.pad(directions.direction, ((0, loaded.num_layers - layers), (0, 0))))


def transferred(facts: dict) -> str | None:
    """Of directions that are tried on a relative of their model, in a sentence; None for others."""
    if "transferred_from" not in facts:
        return None
    source, revision = facts["transferred_from"], str(facts["transferred_from"]["model_revision"])
    return (
        f"They were measured on {source['model'] or 'another model'} ({revision[:SHORT_HASH]}) and are tried on "
        f"{facts['transferred_to']}, a model of the same shape."
    )
