"""Shares and means with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np


def t_quantile(freedom: float) -> float:
    """Of the t distribution, for a two-sided 95% interval."""
    from scipy.special import stdtrit

    return float(stdtrit(max(freedom, 1), 0.975))


def wilson(share: float, n: float, z: float = 1.96) -> list[float]:
    """Score interval of a share of n, which need not be whole (Wilson 1927); all there is without any, NaN of NaN."""
    if np.isnan(share):
        return [float("nan"), float("nan")]
    if n <= 0:
        return [0.0, 1.0]
    spread = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((share + z * z / (2 * n) + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return [float(max(min(low, share), 0.0)), float(min(max(high, share), 1.0))]


def design_effect(values: Sequence[float] | np.ndarray, *clusters: Sequence[int]) -> tuple[float, float]:
    """How many times as large the variance of a mean is as that of independent values, and at least 1.

    The between-cluster variance over that of independent values (Kish 1965), the largest of several ways to cluster.

    Args:
        clusters: [values] labels of what varies together (folds, pairs that share a prompt).
    Returns:
        The effect, and the degrees of freedom of an interval: those of the clusters (their number less one) as far as
        the variance is theirs, infinite if none is.
    """
    x, largest, freedom = np.asarray(values, float), 1.0, np.inf
    if len(x) < 2 or x.std() == 0:
        return largest, freedom
    for labels in clusters:
        sums = np.bincount(np.unique(labels, return_inverse=True)[1], x - x.mean())
        others = len(sums) - 1
        effect = len(sums) / others * float((sums**2).sum()) / (len(x) * x.var(ddof=1)) if others else 1.0
        if effect > largest:
            largest, freedom = effect, others / (1 - 1 / effect)
    return largest, freedom


def rate(flags: Sequence[bool], *clusters: Sequence[int]) -> dict:
    """A share with its Wilson interval, for as many independent flags as the `design_effect` of the clusters leaves."""
    hits, n = int(sum(flags)), len(flags)
    effect, freedom = design_effect(flags, *clusters)
    interval = wilson(hits / n if n else 0.0, n / effect, t_quantile(freedom))
    return {"rate": hits / n if n else None, "hits": hits, "n": n, "ci": interval}


def paired_rates(first: Sequence[bool], second: Sequence[bool]) -> dict:
    """Two settings on the same prompts: second minus first rate, and whether that may be chance.

    Returns:
        "difference" with Newcombe's (1998, Statistics in Medicine 17:2635, method 10) interval "ci", and "p_value" of
        the exact McNemar test; None without prompts.
    """
    before, after = np.asarray(first, bool), np.asarray(second, bool)
    n = len(before)
    if n == 0:
        return {"difference": None, "ci": None, "p_value": None}
    both, only_first = int((before & after).sum()), int((before & ~after).sum())
    only_second = int((~before & after).sum())
    neither = n - both - only_first - only_second
    shares = np.array([after.mean(), before.mean()])
    low, high = np.transpose([wilson(float(x.mean()), n) for x in (after, before)])
    product = (both + only_first) * (both + only_second) * (neither + only_first) * (neither + only_second)
    lead = float(both * neither - only_first * only_second)
    lead = max(lead - n / 2, 0.0) if lead > 0 else lead  # continuity
    agreement = lead / np.sqrt(product) if product else 0.0
    down, up = shares - low, high - shares
    edges = [
        np.sqrt(max(a[0] ** 2 - 2 * agreement * a[0] * b[1] + b[1] ** 2, 0.0)) for a, b in ((down, up), (up, down))
    ]
    difference = float(shares[0] - shares[1])
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    return {
        "difference": difference,
        "ci": [difference - float(edges[0]), difference + float(edges[1])],
        "p_value": float(min(1.0, 2 * tail)),
    }


def bounded_mean(values: np.ndarray, groups: Sequence[int] | np.ndarray) -> dict:
    """A mean of scores in [0, 1] with its 95% interval over groups that vary as wholes, within these bounds.

    Wilson's for as many independent flags as would give the mean its variance, by t for so few groups. Of 6 to 20
    groups of toxicity scores it covered the truth in 87 to 96% of simulations, the interval of `mean` in 78 to 95%, and
    reached below 0. "ci" is None of a single group, and where all have the same mean.
    """
    centre, n = float(values.mean()), len(np.unique(groups))
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], values - centre)
    variance = n / max(n - 1, 1) * float((sums**2).sum()) / len(values) ** 2
    known = n > 1 and variance > 1e-12
    effective = centre * (1 - centre) / variance if known else 0.0
    return {"mean": centre, "ci": wilson(centre, effective, t_quantile(n - 1)) if known else None}


def relative_change(before: np.ndarray, after: np.ndarray, groups: Sequence[int] | np.ndarray) -> dict:
    """By what share of itself a mean of non-negative numbers changes, on the same prompts: "mean", and its 95% interval
    "ci" over groups that vary as wholes.

    The delta method on the logarithm of the ratio, by t for so few groups. Of 6 to 20 groups of toxicity scores it
    covered the truth in 90 to 96% of simulations, the bootstrap of the groups in 77 to 92%. None of what is undefined:
    everything without a mean before, the interval of a mean that fell to zero, or of a single group.

    Args:
        before, after, groups: [values].
    """
    if not before.sum() > 0:
        return {"mean": None, "ci": None}
    first, second = (np.bincount(np.unique(groups, return_inverse=True)[1], x) for x in (before, after))
    ratio, n = float(second.sum() / first.sum()), len(first)
    if n < 2 or ratio == 0:
        return {"mean": ratio - 1, "ci": None}
    error = np.sqrt(n / (n - 1) * ((second - ratio * first) ** 2).sum()) / second.sum()
    half = t_quantile(n - 1) * error
    return {"mean": ratio - 1, "ci": [float(ratio * np.exp(side * half) - 1) for side in (-1, 1)]}


def log_mean(groups: Sequence[np.ndarray], wider: float = 1.25) -> list[float | None]:
    """95% interval of a mean of positive numbers over all members of groups that vary as wholes, such as prompts.

    Symmetric on the logarithm: a few large values carry the mean, and resampled means omit what did not occur. It is
    made wider than the t distribution asks for because a sample says too little of such values
    (benchmarks/simulated_rates.py).
    """
    sums, counts = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    mean, n = sums.sum() / counts.sum(), len(groups)
    if not mean > 0 or n < 2:
        return [None, None]
    error = np.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum() / mean
    half = wider * t_quantile(n - 1) * error
    return [float(mean * np.exp(side * half)) for side in (-1, 1)]


def bootstrap_mean(groups: Sequence[np.ndarray] | np.ndarray, resamples: int = 1000, seed: int = 0) -> list[float]:
    """95% interval of the mean over all members, groups drawn with replacement."""
    sums, counts = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    drawn = np.random.default_rng(seed).integers(0, len(groups), (resamples, len(groups)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def mean(values: np.ndarray, *clusters: Sequence[int]) -> dict:
    """A mean with its bootstrap interval (None without spread); of True and False, that of `rate`.

    Clusters make it as much wider as their `design_effect` asks for.
    """
    if values.dtype == bool:
        share = rate(list(values), *clusters)
        return {"mean": share["rate"], "n": share["n"], "ci": share["ci"]}
    centre = float(values.mean()) if len(values) else None
    if len(set(values)) <= 1:
        return {"mean": centre, "n": len(values), "ci": None}
    effect, freedom = design_effect(values, *clusters)
    wider = np.sqrt(effect) * t_quantile(freedom) / t_quantile(np.inf)
    ends = [float(values.mean() + wider * (end - values.mean())) for end in bootstrap_mean(values[:, None])]
    return {"mean": centre, "n": len(values), "ci": ends}
