"""Category by category: where each separates, and whether categories differ from each other."""

from __future__ import annotations

import itertools

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.intervals import MIN_GROUPS, robust_sd
from alignment_artifacts.rates import t_quantile
from alignment_artifacts.scores import LayerScores, Settings, by_layer, score_layers


def score_categories(vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray, settings: Settings) -> dict:
    """Per category the same per-layer records from that category's pairs alone, and how categories differ.

    "p_value" is over all layers of all categories: each category's d is measured in its own null's spread, and
    the largest of them all is the null.

    Args:
        vectors: [pairs, 2, layers, hidden]; labels, groups: [pairs].
    """
    everything = st.sign_flips(groups, settings.permutations, settings.seed)
    categories: dict[str, dict] = {}
    scored: dict[str, LayerScores] = {}
    nulls: dict[str, np.ndarray] = {}
    spreads: dict[str, float] = {}
    for category in dict.fromkeys(labels):
        own = labels == category
        count = len(np.unique(groups[own]))
        if count < st.MIN_PAIRS:
            what = "pairs" if count == own.sum() else "independent groups of pairs"
            categories[category] = {"layer_scores": None, "reason": f"only {count} {what}, {st.MIN_PAIRS} needed"}
            continue
        different, rows = _different_flips(everything[:, own])
        scores = score_layers(vectors[own], labels[own], settings, groups=groups[own], signs=different)
        scored[category], nulls[category] = scores, scores.null[rows]
        spreads[category] = robust_sd(nulls[category][1:])
        categories[category] = {"layer_scores": by_layer(scores.layers), "best_layer_nested": scores.best_layer}
    usable = [name for name in scored if spreads[name] > 0]
    joint = st.best_of([nulls[name] / spreads[name] for name in usable]) if usable else np.empty(0)
    for name, scores in scored.items():
        for record in scores.layers:
            d = record["cohens_d"]
            defined = name in usable and np.isfinite(d)
            record["p_value"] = max(st.p_value(d / spreads[name], joint), record["p_floor"]) if defined else None
    differences = []
    if len(scored) > 1:
        layer = int(np.argmax(st.layer_separation(vectors, list(labels))))
        differences = category_differences(scored, layer)
    return {"categories": categories, "differences": differences}


def _different_flips(signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of flips [flips, pairs] those that differ by more than a swap of everything, and which of them each one is."""
    different, rows = np.unique(signs * signs[:, -1:], axis=0, return_inverse=True)
    return different[::-1], len(different) - 1 - rows.ravel()  # all ones, what was observed, comes first again


def category_differences(scored: dict[str, LayerScores], layer: int) -> list[dict]:
    """d of one category minus that of another at one layer, all pairs of categories; p by Holm's rule over them.

    Intervals are pointwise. That the layer has the largest d of all pairs together raises what categories have in
    common, not their differences.
    """
    from scipy.special import stdtr

    records: list[dict] = []
    for (first, a), (second, b) in itertools.combinations(scored.items(), 2):
        record: dict = {"first": first, "second": second, "layer": layer}
        record |= dict.fromkeys(("difference", "difference_ci", "p_value"))
        records.append(record)
        values = [
            (scores.layers[layer]["cohens_d"], scores.error(layer), scores.uncertainty.freedom(scores.folds))
            for scores in (a, b)
        ]
        d, errors, freedom = np.transpose(values)
        fewest = min(scores.uncertainty.count for scores in (a, b))
        if np.isfinite(d + errors).all() and (errors > 0).all() and fewest >= MIN_GROUPS:
            error, degrees = np.hypot(*errors), (errors**2).sum() ** 2 / (errors**4 / freedom).sum()  # Welch
            half = t_quantile(degrees) * error
            record["difference"] = d[0] - d[1]
            record["difference_ci"] = [d[0] - d[1] - half, d[0] - d[1] + half]
            record["p_value"] = 2 * stdtr(degrees, -abs(d[0] - d[1]) / error)
    tested = sorted((r for r in records if r["p_value"] is not None), key=lambda r: r["p_value"])
    largest = 0.0
    for rank, record in enumerate(tested):
        largest = record["p_value"] = float(min(1.0, max(largest, record["p_value"] * (len(tested) - rank))))
    return records
