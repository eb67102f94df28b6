"""The direction as a monitor: reading instead of editing, before anything is written.

A score is the projection on the direction, scaled per layer so that -1 is the mean of natural and
+1 the mean of artifact prompts, averaged over layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.directions.estimate import Directions, estimate
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.separation import separating_layers
from gemma_refactored.activation_capture import capture, layer_sites
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.prompt_processing import encode_prompts


def layer_scores(directions: Directions, activations: np.ndarray) -> np.ndarray:
    """Scores [.., layers] of activations [.., layers, hidden], each layer by itself; 0 where it has no direction.

    Raises:
        UserError: imported directions, which have no class means.
    """
    if directions.natural_mean is None:
        raise UserError("A monitor needs the class means, and imported control vectors have none.")
    middle = (directions.natural_mean + directions.artifact_mean) / 2
    half_gap = np.maximum(np.linalg.norm(directions.direction, axis=-1), 1e-30) / 2
    return np.einsum("...lh,lh->...l", activations - middle, directions.unit) / half_gap


def scores(directions: Directions, layers: Sequence[int], activations: np.ndarray) -> np.ndarray:
    """Scores [..] of activations [.., layers of the model, hidden]: the mean over some layers."""
    return layer_scores(directions, activations)[..., list(layers)].mean(axis=-1)


def score_tokens_by_layer(loaded: LoadedModel, directions: Directions, tokens: Sequence[int]) -> np.ndarray:
    """[tokens, layers] the scores of each token of a prompt and its answer, in one pass."""
    sites = layer_sites(loaded.model, directions.facts["site"])
    with capture(loaded.model, sites) as activations:
        loaded.model(mx.array([list(tokens)]))
        seen = [np.array(activations[site][0].astype(mx.float32)) for site in sites]
    return layer_scores(directions, np.stack(seen, axis=1))


def score_tokens(
    loaded: LoadedModel, directions: Directions, layers: Sequence[int], tokens: Sequence[int]
) -> np.ndarray:
    """[tokens] the mean over some layers."""
    return score_tokens_by_layer(loaded, directions, tokens)[:, list(layers)].mean(axis=-1)


def score_prompt(loaded: LoadedModel, directions: Directions, layers: Sequence[int], text: str) -> float:
    """The score of a prompt at its last token, before anything is written."""
    (tokens,) = encode_prompts(loaded.tokenizer, [text])
    return float(score_tokens(loaded, directions, layers, tokens)[-1])


def held_out_auroc(measured: Measurements, site: str, positions: str = "prompt_end", seed: int = 0) -> dict:
    """How well the score of a prompt tells beforehand whether the model will refuse it.

    Five folds by pair; direction and layers from the training pairs. Also the scores themselves, one
    [natural, artifact] a pair, so that a threshold can be chosen.
    """
    vectors = measured.vectors_at(site, positions)
    categories = np.array([pair.category for pair in measured.pairs])
    folds = st.assign_folds(categories, seed)
    scored = np.zeros(vectors.shape[:2])
    for fold in range(folds.max() + 1):
        training = folds != fold
        layers = separating_layers(vectors[training], list(categories[training]))
        scored[~training] = scores(estimate(vectors[training], {"site": site}), layers, vectors[~training])
    refused = measured.refused
    result = {"site": site, "positions": positions, "refused": int(refused.sum()), "answered": int((~refused).sum())}
    if not 0 < refused.mean() < 1:
        return {**result, "auroc": None, "auroc_ci": None, "scores": scored.tolist()}
    rng, resampled = np.random.default_rng(seed), []
    for _ in range(1000):
        rows = rng.integers(0, len(scored), len(scored))
        if 0 < refused[rows].mean() < 1:
            resampled.append(st.auroc(scored[rows][~refused[rows]], scored[rows][refused[rows]]))
    return {
        **result,
        "auroc": float(st.auroc(scored[~refused], scored[refused])),
        "auroc_ci": [float(q) for q in np.quantile(resampled, [0.025, 0.975])],
        "scores": scored.tolist(),
    }
