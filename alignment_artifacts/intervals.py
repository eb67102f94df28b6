"""How sure a held-out number is: 95% intervals of d, accuracy, AUROC and of differences of d.

All are about the directions that were learnt. A pair is tested in one fold and serves in training in the others, which
a formula that takes the directions as given cannot see; the sign-flip null, which learns anew each time, does, and the
larger of the two is taken. How often the intervals cover the truth is in benchmarks/simulated_coverage.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from alignment_artifacts.rates import t_quantile, wilson
from alignment_artifacts.separation import HeldOut, each_fold, stabilised, variance

MIN_GROUPS = 8  # with fewer independent groups no interval is worth its name
HEAVIEST = 2.5  # the variance of the spread is enlarged no further than so
NULL_QUANTILE = 2.0  # the null's spread is not estimated from the pairs, and needs no quantile of t
UNDEFINED = (float("nan"), float("nan"))


def robust_sd(values: np.ndarray) -> float:
    """Half the distance between the 16th and 84th percentile; NaN without finite values."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan")
    low, high = np.quantile(values, (0.1587, 0.8413))
    return float(high - low) / 2


class Uncertainty:
    """What the intervals of one set of pairs have in common.

    Args:
        groups: [pairs] numbers from 0 of pairs that depend on each other.
        resamples: of the bootstrap, which differences of d need.
    """

    def __init__(self, groups: np.ndarray, resamples: int = 1000, seed: int = 0):
        self.groups, self.count = groups, int(groups.max()) + 1
        self.resamples, self.seed = resamples, seed

    @cached_property
    def weights(self) -> np.ndarray:
        """[resamples, pairs] of the Bayesian bootstrap (Rubin 1981), which leaves no fold without any spread."""
        drawn = np.random.default_rng(self.seed).standard_exponential((self.resamples, self.count))
        return drawn[:, self.groups]

    def freedom(self, folds: np.ndarray) -> int:
        return max(self.count - len(np.unique(folds)), 1)

    def estimate(self, held_out: HeldOut, null_sd: float = 0.0) -> tuple[float, float]:
        """d with the spread pooled over folds, and its standard error; null_sd: the spread of d over sign flips.

        The infinitesimal jackknife. Its part that comes from the spread is no less than for independent normal prompts,
        and enlarged where tails are heavy: what a sample says of its fourth moment is too little then. Dependence
        between folds adds to it; the sum is no less than the null's spread. The constants are those that simulations
        of 10 to 200 pairs asked for (benchmarks/simulated_coverage.py).
        """
        d, of_shift, of_spread, kurtosis = pooled_d(held_out)
        if not np.isfinite(d):
            return float("nan"), float("nan")
        pairs = len(self.groups)
        both, spread = (self._square_sum(x) / pairs**2 for x in (of_shift + of_spread, of_spread))
        heavy = np.clip(kurtosis / (3 * (1 - 2 / pairs)), 1, None) ** 3
        least = max(spread * min(heavy, HEAVIEST), d * d / (4 * self.count))
        alone = np.sqrt(both + max(least - spread, 0.0))
        of_null = NULL_QUANTILE / t_quantile(self.freedom(held_out.folds)) * null_sd
        return d, float(np.fmax(np.hypot(alone, 0.4 * null_sd), of_null))

    def _square_sum(self, influence: np.ndarray) -> float:
        """Of the groups' influences [divisions, pairs], mean over divisions."""
        return float(np.mean([(np.bincount(self.groups, row) ** 2).sum() for row in influence]))

    def intervals(self, held_out: HeldOut, null_sd: float = 0.0) -> dict[str, list[float]]:
        """Of "cohens_d_ci", "accuracy_ci" and "auroc_ci"; NaN below eight groups.

        The interval of d is symmetric on the stabilising scale, around the d of the pooled spread: the mean over folds
        of d is too large where the noise has heavy tails. Accuracy and AUROC have score intervals (Wilson 1927;
        Newcombe 2006), which no run without a mistake makes zero wide; the number of prompts they count with is
        what would give independent prompts the standard error of d, and never more than there are groups. Of accuracy,
        it is no more than the design effect of groups of these sizes leaves either (Kish 1965).
        """
        if self.count < MIN_GROUPS:
            return {name: list(UNDEFINED) for name in ("cohens_d_ci", "accuracy_ci", "auroc_ci")}
        quantile, (pooled, error) = t_quantile(self.freedom(held_out.folds)), self.estimate(held_out, null_sd)
        error /= np.sqrt(8 + pooled**2)
        effective = min(self.count, 1 / (4 * error**2)) if error > 0 else self.count
        d = list(UNDEFINED)
        mean = held_out.d()
        if np.isfinite(error) and np.isfinite(mean):
            low, high = (np.sinh(stabilised(pooled) + side * quantile * error) * np.sqrt(8) for side in (-1, 1))
            d = [float(min(low, mean)), float(max(high, mean))]
        return {
            "cohens_d_ci": d,
            "accuracy_ci": wilson(held_out.accuracy(), 2 * min(effective, self._left(held_out.right())), quantile),
            "auroc_ci": auroc_interval(held_out.auroc(), effective, effective, quantile),
        }

    def _left(self, values: np.ndarray) -> float:
        """How many independent pairs would give the mean of values [pairs] its standard error.

        A group that holds most of the pairs draws their mean to its own: sums of deviations from that are blind to it.
        """
        sizes = np.bincount(self.groups)
        _, _, correlation = variance([values - values.mean()], self.groups)
        correlation = np.clip(np.nan_to_num(correlation), 0, 1)
        return len(values) / (1 + correlation * ((sizes**2).sum() / len(values) - 1))

    def difference_interval(
        self, first: HeldOut, second: HeldOut, null_sds: Sequence[float] = (0.0, 0.0)
    ) -> list[float]:
        """95% interval of second d minus first d, of the same pairs.

        The bootstrap, which weighs the pairs for both at once, knows how far the two go together; it is made wider as
        far as the standard errors of the two are larger than it makes them.
        """
        d = np.array([first.d(), second.d()])
        resampled = [stabilised(resampled_d(held_out, self.weights)) for held_out in (first, second)]
        slopes = np.sqrt(8 + d**2)
        bootstrap = robust_sd(slopes[1] * resampled[1] - slopes[0] * resampled[0])
        if self.count < MIN_GROUPS or not np.isfinite(d).all() or not np.isfinite(bootstrap):
            return list(UNDEFINED)
        alone = np.hypot(slopes[0] * robust_sd(resampled[0]), slopes[1] * robust_sd(resampled[1]))
        errors = [self.estimate(h, sd)[1] for h, sd in zip((first, second), null_sds, strict=True)]
        full = np.hypot(errors[0], errors[1])
        wider = max(full / alone, 1.0) if alone > 0 else 1.0
        half = t_quantile(self.freedom(first.folds)) * bootstrap * wider
        return [float(d[1] - d[0] - half), float(d[1] - d[0] + half)]


def pooled_d(held_out: HeldOut) -> tuple[float, np.ndarray, np.ndarray, float]:
    """d with the spread pooled over folds, and what each pair adds to it (influence function).

    Returns:
        d, the mean over divisions; influences [divisions, pairs] through the means and through the spread, whose
        squares' sum over pairs is pairs² times the variance of d; and the kurtosis, 3 for normal projections.
    """
    shape = np.atleast_2d(held_out.folds).shape
    of_shift, of_spread, results, kurtosis = np.empty(shape), np.empty(shape), [], []
    for division, (natural, artifact) in enumerate(zip(*_by_division(held_out), strict=True)):
        sides, shift, freedom = np.empty((2, shape[1])), [], 0.0
        for _, _, _, rows in each_fold(np.atleast_2d(held_out.folds)[division]):
            n, a = natural[rows], artifact[rows]
            larger, of_fold = _unbiased(n, a, held_out.groups[rows])
            sides[:, rows] = (n - n.mean()) * np.sqrt(larger), (a - a.mean()) * np.sqrt(larger)
            shift.append(a.mean() - n.mean())
            freedom += of_fold
        spread = np.sqrt((sides**2).mean())
        if not spread > 0:
            return float("nan"), of_shift, of_spread, float("nan")
        sides /= spread
        d = np.mean(shift) / spread
        of_shift[division], of_spread[division] = sides[1] - sides[0], d * (1 - (sides**2).mean(axis=0)) / 2
        each = np.maximum((sides**2).mean(axis=1), 1e-30)
        kurtosis.append(((sides**4).mean(axis=1) / each**2).mean())
        results.append(d * (1 - 3 / (4 * freedom - 1)))
    return float(np.mean(results)), of_shift, of_spread, float(np.mean(kurtosis))


def _unbiased(natural: np.ndarray, artifact: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """How many times as large as the mean square deviations [pairs] the variance is, and its degrees of freedom."""
    parts = [side - side.mean() for side in (natural, artifact)]
    squares = np.mean(np.square(parts)) * 2
    unbiased, freedom, _ = variance(parts, groups)
    return (unbiased / squares, 2 * float(freedom)) if squares > 0 else (1.0, 2.0 * len(groups) - 2)


def resampled_d(held_out: HeldOut, weights: np.ndarray) -> np.ndarray:
    """[resamples] of `pooled_d` with pairs weighted, weights [resamples, pairs]."""
    results = []
    for division, (natural, artifact) in enumerate(zip(*_by_division(held_out), strict=True)):
        shifts, variances = [], []
        for _, _, _, rows in each_fold(np.atleast_2d(held_out.folds)[division]):
            n, a = natural[rows] - natural[rows].mean(), artifact[rows] - artifact[rows].mean()
            share = weights[:, rows] / weights[:, rows].sum(axis=1, keepdims=True)
            shifts.append(artifact[rows].mean() - natural[rows].mean() + share @ (a - n))
            spread = share @ (a * a + n * n) - (share @ a) ** 2 - (share @ n) ** 2
            variances.append(spread / 2 * _unbiased(n, a, held_out.groups[rows])[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            results.append(np.mean(shifts, axis=0) / np.sqrt(np.mean(variances, axis=0)))
    return np.mean(results, axis=0)


def _by_division(held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    return np.atleast_2d(held_out.natural), np.atleast_2d(held_out.artifact)


def told_apart_interval(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> list[float]:
    """95% interval of the AUROC of some scores: `auroc_interval`, wider where the two sides' spreads differ.

    It takes both sides to have the same spread. How much larger the variance is than that, DeLong's estimate (1988,
    Biometrics 44:837; summed over groups as by Obuchowski 1997, Biometrics 53:567) tells; smaller it is not taken to
    be, so that an area of 0 or 1 and a handful of prompts have the interval they would have anyway.

    Args:
        scores, positive: [prompts]; groups: [prompts] labels of those that depend on each other, which count as one on
            either side.
    """
    sides = [np.sort(scores[which]) for which in (~positive, positive)]
    negatives_below, positives_below = (
        (np.searchsorted(side, scores, "left") + np.searchsorted(side, scores, "right")) / (2 * len(side))
        for side in sides
    )
    placed = np.where(positive, negatives_below, 1 - positives_below)
    area = float(placed[positive].mean())
    influence = (placed - area) / np.where(positive, len(sides[1]), len(sides[0]))
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], influence)
    negatives, positives = (len(np.unique(groups[which])) for which in (~positive, positive))
    usual = float(_auroc_variance(np.array(area), negatives, positives))
    larger = len(sums) / (len(sums) - 1) * float((sums**2).sum()) / usual if usual > 0 else 1.0
    return auroc_interval(
        area, negatives, positives, t_quantile(min(negatives, positives) - 1) * float(np.sqrt(max(larger, 1.0)))
    )


def _auroc_variance(area: np.ndarray, negatives: float, positives: float) -> np.ndarray:
    """Hanley & McNeil (1982), with one mean of the numbers in place of two, as Newcombe (2006) has it."""
    extra = max((negatives + positives) / 2 - 1, 0.0)
    single = area * (1 - area) * (1 + extra * (1 - area) / (2 - area) + extra * area / (1 + area))
    return single / (negatives * positives)


def auroc_interval(area: float, negatives: float, positives: float, z: float = 1.96) -> list[float]:
    """Score interval of an AUROC: areas whose own standard error (Hanley & McNeil 1982) reaches the one seen.

    Method 5 of Newcombe (2006, Statistics in Medicine 25:559), which serves for an area of 0 or 1 too.
    """
    if not np.isfinite(area):
        return list(UNDEFINED)
    grid = np.concatenate([[0.0], 1 / (1 + np.exp(-np.linspace(-12, 12, 4001))), [1.0]])
    inside = grid[(grid - area) ** 2 <= z * z * _auroc_variance(grid, negatives, positives)]
    return [float(min(inside.min(initial=area), area)), float(max(inside.max(initial=area), area))]
