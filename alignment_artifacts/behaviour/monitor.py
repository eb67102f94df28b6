"""The direction as a monitor: reading instead of editing, before anything is written.

A score is the projection on the direction, scaled per layer so that -1 is the mean of natural and
+1 the mean of artifact prompts, averaged over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.directions.estimate import Directions, estimate
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.separation import separating_layers
from gemma_refactored.activation_capture import Edit, layer_sites, read
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import LoadedModel


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


def score_texts(
    loaded: LoadedModel,
    directions: Directions,
    texts: Sequence[Sequence[int]],
    edits: Callable[[list[int]], Mapping[str, Edit]] = lambda batch: {},
) -> list[np.ndarray]:
    """[tokens, layers] the scores of each token of each text; `edits` as in `activation_capture.read`."""
    sites = layer_sites(loaded.model, directions.facts["site"])
    scored = {i: layer_scores(directions, states) for i, states in read(loaded.model, texts, sites, edits)}
    return [scored[i] for i in range(len(texts))]


def score_tokens(
    loaded: LoadedModel,
    directions: Directions,
    layers: Sequence[int],
    tokens: Sequence[int],
    edits: Mapping[str, Edit] | None = None,
) -> np.ndarray:
    """[tokens] the mean over some layers of a prompt's scores, its answer's included."""
    (scored,) = score_texts(loaded, directions, [tokens], lambda batch: edits or {})
    return scored[:, list(layers)].mean(axis=-1)


def held_out_auroc(
    measured: Measurements,
    site: str,
    positions: str = "prompt_end",
    seed: int = 0,
    judge: Callable[[str], bool] = is_refusal,
) -> dict:
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
    refused = measured.judged(judge)
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
