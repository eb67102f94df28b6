"""The direction as a monitor: reading instead of editing, before anything is written.

A score is the projection on the direction, scaled per layer so that -1 is the mean of natural and
+1 the mean of artifact prompts, averaged over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.behaviour.answers import Behaviour
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.directions.estimate import Directions, estimate
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.intervals import told_apart_interval
from alignment_artifacts.separation import separating_layers
from gemma_refactored.activation_capture import Edit, layer_sites, read
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import LoadedModel

MIN_OF_EACH = 5  # refused and answered artifact prompts; fewer measure nothing


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
    judge: Callable[[str, str], bool] = is_refusal,
) -> dict:
    """How well the score of a prompt tells beforehand whether the model will refuse it.

    Five folds by independent group of pairs; direction and layers from the training pairs. "auroc" is over all prompts,
    and where natural prompts are answered and artifact prompts refused it mostly tells those two apart. What the
    score knows beyond that is "within_artifact": refused against answered artifact prompts; None with fewer than
    MIN_OF_EACH of either. Also the scores themselves, one [natural, artifact] a pair, so that a threshold can be
    chosen.

    Raises:
        UserError: too few independent pairs to hold any out.
    """
    vectors = measured.vectors_at(site, positions)
    categories, groups = np.array([pair.category for pair in measured.pairs]), independent_groups(measured.pairs)
    if (independent := int(groups.max(initial=-1)) + 1) < st.MIN_PAIRS:
        raise UserError(f"The monitor needs at least {st.MIN_PAIRS} independent pairs, not {independent}; add some.")
    folds = st.assign_folds(categories, seed, groups)
    scored = np.zeros(vectors.shape[:2])
    for _, _, training, held in st.each_fold(folds):
        layers = separating_layers(vectors[training], list(categories[training]), groups[training])
        scored[held] = scores(estimate(vectors[training], {"site": site}), layers, vectors[held])
    refused = measured.judged(judge)
    return {
        "site": site,
        "positions": positions,
        **_told_apart(scored, refused, np.repeat(groups[:, None], 2, axis=1), 1),
        "within_artifact": _told_apart(scored[:, 1], refused[:, 1], groups, MIN_OF_EACH),
        "scores": scored.tolist(),
    }


def auroc_elsewhere(
    loaded: LoadedModel,
    measured: Measurements,
    site: str,
    prompts: Behaviour,
    judge: Callable[[str, str], bool] = is_refusal,
) -> dict:
    """How well the score of other prompts, such as twins, tells beforehand which of them will be refused.

    Direction and layers come from all pairs, at the prompt's end: never from these prompts, but, where they are twins,
    from the artifact prompts that they look like, which is not held out. "auroc" is None with fewer than MIN_OF_EACH
    refused or answered.
    """
    vectors = measured.vectors_at(site, "prompt_end")
    layers = measured.best_layers(site, "prompt_end", measured.rows())
    directions, sites = estimate(vectors, {"site": site}), layer_sites(loaded.model, site)
    scored, refused = np.zeros(len(prompts.texts)), np.zeros(len(prompts.texts), bool)
    for i, states in read(loaded.model, prompts.token_ids, sites):
        scored[i] = scores(directions, layers, states[-1])
    for i, (text, tokens) in enumerate(zip(prompts.texts, prompts.answers, strict=True)):
        answer = loaded.answer_text(tokens)
        refused[i] = answer is not None and judge(answer, text)
    return {"site": site, **_told_apart(scored, refused, np.arange(len(scored)), MIN_OF_EACH)}


def _told_apart(scored: np.ndarray, refused: np.ndarray, groups: np.ndarray, least: int) -> dict:
    """AUROC of refused above answered prompts with its interval; None with fewer than `least` of either."""
    answered = ~refused
    counts = {"refused": int(refused.sum()), "answered": int(answered.sum())}
    if min(counts.values()) < least:
        return {**counts, "auroc": None, "auroc_ci": None}
    area = st.auroc(scored[answered], scored[refused])
    return {**counts, "auroc": area, "auroc_ci": told_apart_interval(scored.ravel(), refused.ravel(), groups.ravel())}
