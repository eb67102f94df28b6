"""Where does one model separate matched prompts better than another?

The difference of their held-out d's, layer by layer, with an interval and a test that swaps the
models within pairs; how alike their directions are; and each model's activations on the other's
direction.
"""

from __future__ import annotations

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.intervals import Uncertainty, robust_sd
from alignment_artifacts.rates import t_quantile
from alignment_artifacts.scores import Settings
from gemma_refactored.files import jsonable


def compare_layers(
    first: np.ndarray, second: np.ndarray, strata: np.ndarray, settings: Settings, groups: np.ndarray | None = None
) -> list[dict]:
    """One record a layer: both models' d, their difference, and what their directions have in common.

    p is of the largest difference of all layers, each in units of the spread that swaps give it, so that no layer
    drowns another. Swaps assume that the models' noise has one shape. Where it has not (isotropic in one, along few
    axes in the other) they vary less than the models do; what was observed is therefore measured in the standard
    error behind "difference_ci" wherever that is larger. Heavy tails in one model alone stay a weak point.

    Args:
        first, second: [pairs, 2 (natural, artifact), layers, hidden] prompt vectors of the two models.
        strata: [pairs] labels that the folds are balanced over.
        groups: [pairs] labels of pairs that depend on each other; default: every pair by itself.
    Returns:
        Records with "d_a", "d_b" (each with "_ci"), "difference" (b minus a, with "_ci") and its two-sided
        "p_value" over all layers; "cosine" of the two directions; "a_on_b" and "b_on_a", d of one model's
        activations along the other's direction, which was learnt from other pairs; "relative_change", the norm
        of a prompt's change by that of its vector before, mean over prompts; and "largest_change" of any activation.
    """
    groups = st.group_numbers(groups, len(strata))
    folds = st.assign_divisions(strata, settings.seed, groups)
    uncertainty = Uncertainty(groups, settings.resamples, settings.seed)
    signs = st.sign_flips(groups, settings.permutations, settings.seed)
    records, observed, nulls = [], [], []
    for layer in range(first.shape[2]):
        vectors = [model[:, :, layer].astype(np.float64) for model in (first, second)]
        pairs = [st.pair_vectors(v[:, 0], v[:, 1], groups) for v in vectors]
        held_out = [st.held_out_projections(p, folds) for p in pairs]
        means = [p.differences.mean(axis=0) for p in pairs]
        spreads = [robust_sd(st.sign_flip_d(p, folds, signs)[1:]) for p in pairs]
        intervals = [uncertainty.intervals(*both)["cohens_d_ci"] for both in zip(held_out, spreads, strict=True)]
        low, high = uncertainty.difference_interval(held_out[0], held_out[1], spreads)
        difference = held_out[1].d() - held_out[0].d()
        error = (high - low) / 2 / t_quantile(uncertainty.freedom(folds))
        exchanged = exchanged_differences(pairs[0], pairs[1], folds, signs)
        nulls.append(np.abs(exchanged) / (robust_sd(exchanged[1:]) or 1.0))
        observed.append(np.minimum(nulls[-1][0], abs(difference) / error if error > 0 else np.inf))
        records.append(
            {
                "d_a": held_out[0].d(),
                "d_a_ci": intervals[0],
                "d_b": held_out[1].d(),
                "d_b_ci": intervals[1],
                "difference": difference,
                "difference_ci": [low, high],
                "p_value": None,
                "cosine": cosine(*means),
                "a_on_b": d_along(vectors[0], pairs[1], folds),
                "b_on_a": d_along(vectors[1], pairs[0], folds),
                "relative_change": relative_change(*vectors),
                "largest_change": float(np.abs(vectors[1] - vectors[0]).max()),
            }
        )
    null = st.best_of(nulls)
    for record, statistic in zip(records, observed, strict=True):
        record["p_value"] = st.p_value(statistic, null) if np.isfinite(statistic) else None
    return jsonable(records)


def exchanged_differences(
    first: st.PairVectors, second: st.PairVectors, folds: np.ndarray, signs: np.ndarray
) -> np.ndarray:
    """The models' difference in separation at one layer, and what it is when they are swapped within pairs.

    Everything is repeated after a swap, learning of directions included. For that both models must speak
    of one direction and on one scale: the second's is mirrored onto the first's beforehand and both are divided
    by their own spread, which changes no d of either.
    Swaps assume noise of one shape, see `compare_layers`; how often its p is at most 0.05 at equal separation is in
    benchmarks/simulated_model_comparison.md. Without the mirror it is up to 12%, and swapping finished projections
    instead of learning anew gives up to 30%.

    Args:
        signs: [swaps, pairs] as `separation.sign_flips` gives them; -1 swaps the models.
    Returns:
        [swaps] second minus first on the scale of `separation.stabilised`; the first row is what was observed.
    """
    if np.array_equal(first.differences, second.differences) and np.array_equal(first.means, second.means):
        return np.zeros(len(signs))  # the last bit of equal sums in another order is no difference
    first, second = _standardised(first), _standardised(second)
    mirrored = _mirror(second, second.differences.mean(axis=0), first.differences.mean(axis=0))
    both = st.PairVectors(
        np.concatenate([first.differences, mirrored.differences]), np.concatenate([first.means, mirrored.means])
    )
    pairs = folds.shape[-1]
    rows_of_first, rows_of_second = np.arange(pairs), np.arange(pairs) + pairs

    def differences(swapped: np.ndarray) -> np.ndarray:
        """[permutations] of d, second minus first, for swaps [permutations, pairs] of bool."""
        d_first = _held_out_d_of_rows(both, np.where(swapped, rows_of_second, rows_of_first), folds)
        d_second = _held_out_d_of_rows(both, np.where(swapped, rows_of_first, rows_of_second), folds)
        return st.stabilised(d_second) - st.stabilised(d_first)

    swaps = signs < 0
    return np.concatenate([differences(swaps[start : start + st.CHUNK]) for start in range(0, len(swaps), st.CHUNK)])


def _standardised(vectors: st.PairVectors) -> st.PairVectors:
    """Divided by the root mean square within-class deviation, over all pairs and dimensions."""
    within = [x - x.mean(axis=0) for x in (vectors.differences / 2, vectors.means)]
    scale = np.sqrt(sum((x * x).mean() for x in within)) or 1.0
    return st.PairVectors(vectors.differences / scale, vectors.means / scale, vectors.groups)


def _held_out_d_of_rows(vectors: st.PairVectors, rows: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """[permutations] held-out d where `rows` [permutations, pairs] says which vectors stand for each pair."""
    everything = np.arange(len(vectors.differences))
    scores = []
    for _, _, training, held in st.each_fold(folds):
        weights = np.zeros((len(rows), len(everything)))
        np.put_along_axis(weights, rows[:, training], 1 / training.sum(), axis=1)
        shift, centre = (np.take_along_axis(p, rows[:, held], axis=1) for p in vectors.along(weights, everything))
        scores.append(st.matched_d(shift, centre, vectors.groups[held]))
    return np.mean(scores, axis=0)


def _mirror(vectors: st.PairVectors, source: np.ndarray, target: np.ndarray) -> st.PairVectors:
    """The vectors reflected so that the direction `source` becomes that of `target` (Householder)."""
    lengths = np.linalg.norm(source), np.linalg.norm(target)
    if min(lengths) == 0:
        return vectors
    axis = source / lengths[0] - target / lengths[1]
    size = np.linalg.norm(axis)
    if size < 1e-12:
        return vectors
    axis /= size
    differences, means = (x - 2 * np.outer(x @ axis, axis) for x in (vectors.differences, vectors.means))
    return st.PairVectors(differences, means, vectors.groups)


def d_along(vectors: np.ndarray, teacher: st.PairVectors, folds: np.ndarray) -> float:
    """Held-out d of vectors [pairs, 2, hidden] along the direction that `teacher` has learnt from other pairs."""
    scores = []
    for _, _, training, rows in st.each_fold(folds):
        direction = teacher.differences[training].mean(axis=0)
        natural, artifact = (vectors[rows] @ direction).T
        scores.append(st.matched_d(artifact - natural, (artifact + natural) / 2, teacher.groups[rows]))
    return float(np.mean(scores))


def relative_change(before: np.ndarray, after: np.ndarray) -> float:
    """||after - before|| / ||before||, mean over vectors [.., hidden]; NaN where one was 0 and changed."""
    change, size = np.linalg.norm(after - before, axis=-1), np.linalg.norm(before, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(change == 0, 0.0, np.where(size > 0, change / size, np.nan))
    return float(ratios.mean())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; NaN where one has no length."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths else float("nan")
