"""Shares and means with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST = 3  # values that a mean needs for an interval: two have no skewness
CARRIERS = 10  # prompts that must carry CARRIED of a KL that spares some; those not met may matter more
CARRIED = 0.9
ROUNDING = 1e-6  # nats per token: a prompt with less KL was not touched


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
    Where all values are equal nothing tells how far clusters vary as wholes, and each of the finest counts as one.

    Args:
        clusters: [values] labels of what varies together (folds, pairs that share a prompt).
    Returns:
        The effect, and the degrees of freedom of an interval: those of the clusters (their number less one) as far as
        the variance is theirs, infinite if none is.
    """
    x, largest, freedom = np.asarray(values, float), 1.0, np.inf
    if len(x) < 2:
        return largest, freedom
    if x.std() == 0:
        return len(x) / max(map(_count, clusters), default=len(x)), freedom
    for labels in clusters:
        sums = np.bincount(np.unique(labels, return_inverse=True)[1], x - x.mean())
        others = len(sums) - 1
        effect = len(sums) / others * float((sums**2).sum()) / (len(x) * x.var(ddof=1)) if others else 1.0
        if effect > largest:
            largest, freedom = effect, others / (1 - 1 / effect)
    return largest, freedom


def _count(labels: Sequence[int]) -> int:
    return len(set(labels))


def rate(flags: Sequence[bool], *clusters: Sequence[int]) -> dict:
    """A share with its Wilson interval, for as many independent flags as the `design_effect` of the clusters leaves.

    Over the folds of a cross-fit it is about the rate under these very settings on new pairs, and covers that. It says
    little of the settings that other pairs would give: where one setting in ten fails, five folds mostly show none
    that does.
    """
    hits, n = int(sum(flags)), len(flags)
    effect, freedom = design_effect(flags, *clusters)
    interval = wilson(hits / n if n else 0.0, n / effect, t_quantile(freedom))
    return {"rate": hits / n if n else None, "hits": hits, "n": n, "ci": interval}


def paired_rates(first: Sequence[bool], second: Sequence[bool], *clusters: Sequence[int]) -> dict:
    """Two settings on the same prompts: second minus first rate, and whether that may be chance.

    Args:
        clusters: of the prompts, as in `rate`; what p exchanges is whole clusters of the finest kind, since with five
            folds, say, no p could be below 0.06.
    Returns:
        "difference" with Newcombe's (1998, Statistics in Medicine 17:2635, method 10) interval "ci", for as many
        prompts as the difference's `design_effect` leaves, and "p_value" of the exact test that exchanges first and
        second in whole clusters (McNemar's without clusters); None without prompts.
    """
    before, after = np.asarray(first, bool), np.asarray(second, bool)
    n = len(before)
    if n == 0:
        return {"difference": None, "ci": None, "p_value": None}
    change = after.astype(int) - before
    effect, freedom = design_effect(change, *clusters)
    both, only_first = int((before & after).sum()), int((before & ~after).sum())
    only_second = int((~before & after).sum())
    neither = n - both - only_first - only_second
    shares = np.array([after.mean(), before.mean()])
    low, high = np.transpose([wilson(float(x.mean()), n / effect, t_quantile(freedom)) for x in (after, before)])
    product = (both + only_first) * (both + only_second) * (neither + only_first) * (neither + only_second)
    lead = float(both * neither - only_first * only_second)
    lead = max(lead - n * effect / 2, 0.0) if lead > 0 else lead  # continuity
    agreement = lead / np.sqrt(product) if product else 0.0
    down, up = shares - low, high - shares
    edges = [
        np.sqrt(max(a[0] ** 2 - 2 * agreement * a[0] * b[1] + b[1] ** 2, 0.0)) for a, b in ((down, up), (up, down))
    ]
    difference = float(shares[0] - shares[1])
    return {
        "difference": difference,
        "ci": [difference - float(edges[0]), difference + float(edges[1])],
        "p_value": _exchange_p(change, max(clusters, key=_count, default=range(n))),
    }


def _exchange_p(change: np.ndarray, labels: Sequence[int]) -> float:
    """Two-sided, exact: how often the sum is as far from 0 when each cluster's sum has a sign by the toss of a coin."""
    sums = np.bincount(np.unique(labels, return_inverse=True)[1], change).astype(int)
    chances = np.ones(1)  # of sums from -reach to reach
    for size in np.abs(sums[sums != 0]):
        coin = np.zeros(2 * size + 1)
        coin[[0, -1]] = 0.5
        chances = np.convolve(chances, coin)
    reach = len(chances) // 2
    return float(min(1.0, chances[np.abs(np.arange(-reach, reach + 1)) >= abs(sums.sum())].sum()))


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


def log_mean(groups: Sequence[np.ndarray], wider: float = 1.25) -> list[float] | None:
    """95% interval of a mean KL over all members of groups that vary as wholes, such as prompts.

    Symmetric on the logarithm: a few large values carry the mean, and resampled means omit what did not occur. It is
    made wider than the t distribution asks for because a sample says too little of such values. None where some
    groups are untouched and fewer than CARRIERS carry CARRIED of the sum: an edit that touches one prompt in fifty is
    often not seen at all. Where all are touched, prompts that are log-normal with a standard deviation of 1 are
    covered; of 1.5, 8 to 9 times in 10 (benchmarks/simulated_rates.py).

    Args:
        groups: nats per token, [tokens] each.
    """
    sums, counts = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    is_touched = sums > ROUNDING * counts
    carried = np.sort(sums[is_touched])[::-1].cumsum()
    if len(groups) < 2 or not is_touched.any():
        return None
    if not is_touched.all() and (carried < CARRIED * carried[-1]).sum() + 1 < CARRIERS:
        return None
    mean, n = sums.sum() / counts.sum(), len(groups)
    error = np.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum() / mean
    half = wider * t_quantile(n - 1) * error
    return [float(mean * np.exp(side * half)) for side in (-1, 1)]


def mean(values: np.ndarray, *clusters: Sequence[int]) -> dict:
    """A mean with its 95% interval, None without spread or of fewer than FEWEST values; of True and False, `rate`'s.

    The wider, on either side, of Student's t and of Hall's (1992, Journal of the Royal Statistical Society B 54:221)
    transformation of it, which takes out what skewness does: the first alone is too short for skewed values, the other
    for long tails on both sides (benchmarks/simulated_rates.py). Clusters make it as much wider as their
    `design_effect` asks for.
    """
    if values.dtype == bool:
        share = rate(list(values), *clusters)
        return {"mean": share["rate"], "n": share["n"], "ci": share["ci"]}
    n, centre = len(values), float(values.mean()) if len(values) else None
    if n < FEWEST or np.ptp(values) <= 1e-9 * np.abs(values).max():  # rounding is no spread
        return {"mean": centre, "n": n, "ci": None}
    effect, freedom = design_effect(values, *clusters)
    quantile, x = t_quantile(min(n - 1, freedom)), values - values.mean()
    student = np.array([-1, 1]) * quantile * np.sqrt(effect / n)  # in standard deviations, as is Hall's
    skew = float((x**3).mean() / x.std() ** 3)
    hall = student if abs(skew) < 1e-6 else -3 / skew * (np.cbrt(1 - skew * (student + skew * effect / (6 * n))) - 1)
    ends = values.mean() + values.std(ddof=1) * np.array([min(student[0], hall[0]), max(student[1], hall[1])])
    return {"mean": centre, "n": n, "ci": [float(end) for end in ends]}
