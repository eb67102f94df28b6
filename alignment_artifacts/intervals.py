"""How sure a held-out number is: 95 % intervals of d, accuracy, AUROC and of differences of d.

All are about the directions that were learnt. Pairs serve in several folds, once tested and else in
training, so a bootstrap that takes the directions as given sees too little; the sign-flip null, which
learns anew each time, has what it misses, and the larger of the two is taken. How often the
intervals cover the truth is in benchmarks/simulated_coverage.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignment_artifacts.separation import HeldOut, each_fold, stabilised

MIN_GROUPS = 8  # with fewer independent groups no interval of d is worth its name
UNDEFINED = [float("nan")] * 2


def bootstrap_weights(groups: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """[resamples, pairs] weights of mean 1, one for each group (Bayesian bootstrap, Rubin 1981).

    Unlike draws with replacement they leave no fold with one pair many times and no spread.

    Args:
        groups: [pairs] numbers from 0.
    """
    return np.random.default_rng(seed).standard_exponential((resamples, groups.max() + 1))[:, groups]


def resampled_d(held_out: HeldOut, weights: np.ndarray) -> np.ndarray:
    """[resamples] d of the pairs weighted as `bootstrap_weights` says."""
    natural, artifact = np.atleast_2d(held_out.natural), np.atleast_2d(held_out.artifact)
    scores = []
    for division, _, _, rows in each_fold(held_out.folds):
        sides = [x[division, rows] - x[division, rows].mean() for x in (natural, artifact)]
        gap = artifact[division, rows].mean() - natural[division, rows].mean()
        share = weights[:, rows] / weights[:, rows].sum(axis=1, keepdims=True)
        means = [share @ x for x in sides]
        variance = sum(share @ (x * x) - mean**2 for x, mean in zip(sides, means, strict=True)) / 2
        freedom = 2 * len(rows) - 2
        with np.errstate(divide="ignore", invalid="ignore"):
            d = (gap + means[1] - means[0]) / np.sqrt(variance * len(rows) / (len(rows) - 1))
        scores.append(d * (1 - 3 / (4 * freedom - 1)))
    return np.mean(scores, axis=0)


def robust_sd(values: np.ndarray) -> float:
    """Half the distance between the 16th and 84th percentile; NaN without finite values."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan")
    low, high = np.quantile(values, (0.1587, 0.8413))
    return float(high - low) / 2


def t_quantile(freedom: float) -> float:
    """Of the t distribution, for a two-sided 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(max(freedom, 1), 0.975))


class Uncertainty:
    """What the intervals of one set of pairs have in common.

    Args:
        groups: [pairs] numbers from 0 of pairs that depend on each other.
        resamples: of the bootstrap.
    """

    def __init__(self, groups: np.ndarray, resamples: int, seed: int = 0):
        self.count = int(groups.max()) + 1
        self.weights = bootstrap_weights(groups, resamples, seed)

    def quantile(self, held_out: HeldOut) -> float:
        return t_quantile(self.count - len(np.unique(held_out.folds)))

    def standard_error(self, held_out: HeldOut, null_sd: float = 0.0) -> float:
        """Of d, on the scale of `stabilised`; null_sd: the spread of d over sign flips."""
        bootstrap = robust_sd(stabilised(resampled_d(held_out, self.weights)))
        return float(np.fmax(bootstrap, null_sd / np.sqrt(8 + held_out.d() ** 2)))

    def intervals(self, held_out: HeldOut, null_sd: float = 0.0) -> dict[str, list[float]]:
        """Of "cohens_d_ci", "accuracy_ci" and "auroc_ci"; that of d is NaN below eight groups.

        The interval of d is symmetric on the stabilising scale. Accuracy and AUROC have score intervals (Wilson 1927;
        Newcombe 2006), which no run without a mistake makes zero wide; the number of prompts they count with is
        what would give independent prompts the standard error of d, and never more than there are.
        """
        error, quantile, pairs = self.standard_error(held_out, null_sd), self.quantile(held_out), held_out.folds.shape[-1]
        effective = min(self.count, pairs, 1 / (4 * error**2) if error > 0 else np.inf)
        d = UNDEFINED
        if self.count >= MIN_GROUPS and np.isfinite(error) and np.isfinite(held_out.d()):
            centre = stabilised(held_out.d())
            d = [float(np.sinh(centre + side * quantile * error) * np.sqrt(8)) for side in (-1, 1)]
        return {
            "cohens_d_ci": d,
            "accuracy_ci": wilson_share(held_out.accuracy(), 2 * effective, quantile),
            "auroc_ci": auroc_interval(held_out.auroc(), effective, effective, quantile),
        }

    def difference_interval(
        self, first: HeldOut, second: HeldOut, null_sds: Sequence[float] = (0.0, 0.0)
    ) -> list[float]:
        """95 % interval of second d minus first d, of the same pairs.

        Standard errors are those on the stabilising scale, carried over to d by that scale's slope at the
        estimate. The bootstrap, which weighs the pairs for both at once, knows how far the two go together.
        """
        d = np.array([first.d(), second.d()])
        slopes = np.sqrt(8) * np.cosh(stabilised(d))
        resampled = [
            slope * stabilised(resampled_d(held_out, self.weights))
            for slope, held_out in zip(slopes, (first, second), strict=True)
        ]
        bootstrap = robust_sd(resampled[1] - resampled[0])
        if self.count < MIN_GROUPS or not np.isfinite(d).all() or not np.isfinite(bootstrap):
            return UNDEFINED
        # As much wider as the intervals of the two by themselves are wider than the bootstrap alone makes them.
        alone = [robust_sd(x) for x in resampled]
        full = [np.fmax(sd, null * slope / np.sqrt(8 + x**2))
                for sd, null, slope, x in zip(alone, null_sds, slopes, d, strict=True)]  # fmt: skip
        wider = np.hypot(*full) / np.hypot(*alone) if np.hypot(*alone) > 0 else 1.0
        half = self.quantile(first) * bootstrap * wider
        return [float(d[1] - d[0] + side * half) for side in (-1, 1)]


def wilson_share(share: float, n: float, z: float = 1.96) -> list[float]:
    """Score interval of a share of n prompts, which need not be whole (Wilson 1927)."""
    if not np.isfinite(share) or n <= 0:
        return UNDEFINED
    spread = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((share + z * z / (2 * n) + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return [float(max(low, 0.0)), float(min(high, 1.0))]


def auroc_interval(area: float, negatives: float, positives: float, z: float = 1.96) -> list[float]:
    """Score interval of an AUROC: areas whose own standard error (Hanley & McNeil 1982) reaches the one seen.

    Method 5 of Newcombe (2006, Statistics in Medicine 25:559), which serves for an area of 0 or 1 too.
    """
    if not np.isfinite(area):
        return UNDEFINED
    grid = np.concatenate([[0.0], 1 / (1 + np.exp(-np.linspace(-12, 12, 4001))), [1.0]])
    extra = max((negatives + positives) / 2 - 1, 0.0)
    variance = grid * (1 - grid) * (1 + extra * (1 - grid) / (2 - grid) + extra * grid / (1 + grid))
    inside = grid[(grid - area) ** 2 <= z * z * variance / (negatives * positives)]
    return [float(min(inside.min(initial=area), area)), float(max(inside.max(initial=area), area))]
