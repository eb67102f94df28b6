"""What does a direction say? The tokens that it promotes and demotes, layer by layer.

The lens (nostalgebraist 2020, "interpreting GPT: the logit lens") reads a direction of the residual stream as if no
further block came: through the final norm and the unembedding. What the later blocks really make of it is measured
beside it: the direction is added at the prompt's end, and the logits of the next word are compared. Both also for
random directions of the same norm, which promote some tokens too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from alignment_artifacts.directions.estimate import Directions, random_like
from alignment_artifacts.edits.options import PROMPT_END, Setting
from alignment_artifacts.edits.setting import NOTHING, Intervention, intervene
from gemma_refactored.activation_capture import forward, layer_sites
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import LoadedModel

from .evaluation import LOGIT_BYTES

VOCABULARY = "vocabulary.json"  # among the results
PROMPTS, TOKENS, RANDOM_DIRECTIONS = 8, 10, 2


def explain(
    loaded: LoadedModel,
    directions: Directions,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int] | None = None,
    tokens: int = TOKENS,
    random_directions: int = RANDOM_DIRECTIONS,
    scale: float = 1.0,
    progress: Callable[[int], object] = lambda layers: None,
) -> dict:
    """The tokens that a direction promotes and demotes most, and how far they really move.

    Args:
        directions: of the residual stream.
        prompts: token ids in the chat format, natural ones; PROMPTS of them, evenly spread, are steered.
        layers: default all that have a direction.
        scale: of the direction where it is added to the stream.
        progress: called with 1 after each layer.
    Returns:
        "site", "positions", "ends", "scale", "prompts" (their number), and "layers", a list of records:
        "layer", "norm" (of the direction), "promoted" and "demoted" (by the lens) and "steered" (by the real logits,
        most promoted first), each a list of {"id", "token", "lens", "steered"}; "agreement", the correlation of lens
        and real change over the vocabulary; "random", a list of records with the same keys. Changes of logits are
        relative to their mean over the vocabulary; "lens" is of the direction at the length that the final norm
        gives to it, whatever its own.
    Raises:
        UserError: directions of another site, a layer without one, or no prompts.
    """
    if directions.facts["site"] != "residual":
        raise UserError(
            f"Tokens are read from the residual stream, and these directions are of the site "
            f"{directions.facts['site']}, whose output a norm may still change; use --site residual."
        )
    layers = directions.available if layers is None else layers
    if missing := [layer for layer in layers if layer not in directions.available]:
        raise UserError(f"There is no direction for layer {missing[0]}; there is one for {directions.available}.")
    if not prompts:
        raise UserError("Steering needs at least one prompt.")
    steered_prompts = [list(prompts[i]) for i in np.unique(np.linspace(0, len(prompts) - 1, PROMPTS).astype(int))]
    of_everything = [directions, *(random_like(directions, seed) for seed in range(random_directions))]
    lenses = [lens(loaded, one.unit) for one in of_everything]
    unsteered = _next_word(loaded, steered_prompts, NOTHING)
    records = []
    for layer in layers:
        setting = Setting("add", scale, (layer,), "residual", PROMPT_END, where=PROMPT_END)
        read = []
        for one, by_lens in zip(of_everything, lenses, strict=True):
            steered = _next_word(loaded, steered_prompts, intervene(loaded, one, setting)) - unsteered
            read.append(_record(loaded, by_lens[layer], steered, tokens))
        norm = float(np.linalg.norm(directions.direction[layer]))
        records.append({"layer": layer, "norm": norm, **read[0], "random": read[1:]})
        progress(1)
    return {
        "site": "residual",
        "positions": directions.facts.get("positions"),
        "ends": directions.facts.get("ends"),
        "scale": scale,
        "prompts": len(steered_prompts),
        "layers": records,
    }


def lens(loaded: LoadedModel, vectors: np.ndarray) -> np.ndarray:
    """[n, vocabulary] logits of unit vectors [n, hidden] of the residual stream, less their mean over the vocabulary.

    Whatever the architecture does after its last block is done by the model itself, on a stream that is replaced. Half
    the difference of a vector and its opposite is taken, so that a norm's bias is no token of the direction.
    """
    last = layer_sites(loaded.model, "residual")[-1]
    states = mx.array(np.sqrt(vectors.shape[-1]) * vectors.astype(np.float32))[:, None]
    size = _rows_at_once(loaded)
    logits = []
    for start in range(0, len(vectors), size):
        part = states[start : start + size]
        both = []
        for sign in (1, -1):
            replaced = sign * part
            edits = {last: lambda x, replaced=replaced: replaced.astype(x.dtype)}
            both.append(forward(loaded.model, [[0]] * len(part), edits=edits)[0][:, 0].astype(mx.float32))
        logits.append(np.array(both[0] - both[1]) / 2)
    return _centred(np.concatenate(logits))


def _next_word(loaded: LoadedModel, prompts: list[list[int]], intervention: Intervention) -> np.ndarray:
    """[vocabulary] logits behind prompts, less their mean over the vocabulary, mean over the prompts."""
    summed = []
    for rows in loaded.batches(prompts, _rows_at_once(loaded)):
        logits = intervention.predict(loaded, [prompts[i] for i in rows], [[0]] * len(rows))
        summed.append(_centred(np.array(logits[:, 0].astype(mx.float32))).sum(axis=0))
    return np.sum(summed, axis=0) / len(prompts)


def _rows_at_once(loaded: LoadedModel) -> int:
    return int(np.clip(LOGIT_BYTES // (4 * len(loaded.tokenizer)), 1, PROMPTS))


def _centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(axis=-1, keepdims=True)


def _record(loaded: LoadedModel, by_lens: np.ndarray, steered: np.ndarray, tokens: int) -> dict:
    number = min(len(loaded.tokenizer), len(by_lens))  # tables are padded beyond the tokens there are
    by_lens, steered = by_lens[:number], steered[:number]

    def listed(order: np.ndarray) -> list[dict]:
        return [
            {
                "id": int(token),
                "token": loaded.tokenizer.decode([int(token)]),
                "lens": float(by_lens[token]),
                "steered": float(steered[token]),
            }
            for token in order[:tokens]
        ]

    order = np.argsort(-by_lens, kind="stable")
    is_flat = by_lens.std() == 0 or steered.std() == 0
    return {
        "promoted": listed(order),
        "demoted": listed(order[::-1]),
        "steered": listed(np.argsort(-steered, kind="stable")),
        "agreement": None if is_flat else float(np.corrcoef(by_lens, steered)[0, 1]),
    }
