"""How often do the intervals of means, KL, rates over folds, paired rates and the monitor's AUROC cover the truth?

    python -m benchmarks.simulated_rates [--runs 2000]

Normal, log-normal: means of such values, of a standard deviation (of the logarithm) of `size`. Changes: means of -1, 0
and 1, where `size` are not 0 and two of three of these -1. KL: log-normal prompts of 5 to 40 tokens; few touched: only
a share of `size` of them at all. Paired rates: two settings on the same prompts, the second of which changes `size` of
the answers; in fives: groups of five prompts behave as one. Folds: five whose log odds of a tenth differ by a standard
deviation of `size`, the truth being the mean over all settings; failing folds: each with chance `size` has a rate of
0.9 instead of a tenth, the truth being the rate under the very settings. Monitor: normal scores of refused and answered
prompts that are `size` apart; spreads: one apart, the fewer with a standard deviation of `size`.
"has one": share of runs with an interval; "covers" and "least width" are of these.
Writes benchmarks/simulated_rates.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from alignment_artifacts.intervals import told_apart_interval
from alignment_artifacts.rates import log_mean, mean, paired_rates, rate
from benchmarks.tables import parse, write_table

FEW, PROMPTS, MANY = (6, 9, 15, 25, 50), (10, 25, 50, 200), (25, 50, 100, 200)
Run = tuple[list[float] | None, float]  # interval and truth


def normal(rng: np.random.Generator, n: int, spread: float) -> Run:
    return mean(spread * rng.normal(size=n))["ci"], 0.0


def log_normal(rng: np.random.Generator, n: int, spread: float) -> Run:
    return mean(np.exp(spread * rng.normal(size=n)))["ci"], math.exp(spread**2 / 2)


def changes(rng: np.random.Generator, n: int, share: float) -> Run:
    return mean(rng.choice([-1.0, 0.0, 1.0], n, p=[2 * share / 3, 1 - share, share / 3]))["ci"], -share / 3


def few_touched(rng: np.random.Generator, n: int, share: float) -> Run:
    sizes = (rng.random(n) < share) * np.exp(rng.normal(size=n))
    return log_mean([s * rng.exponential(size=rng.integers(5, 40)) for s in sizes]), share * math.exp(0.5)


def kl(rng: np.random.Generator, n: int, spread: float) -> Run:
    groups = [np.exp(spread * rng.normal()) * rng.exponential(size=rng.integers(5, 40)) for _ in range(n)]
    return log_mean(groups), math.exp(spread**2 / 2)


def pair_of_rates(rng: np.random.Generator, n: int, change: float, size: int = 1) -> Run:
    first = rng.random(n // size) < 0.8
    second = first & (rng.random(n // size) >= change)
    groups = np.repeat(np.arange(n // size), size)
    return paired_rates(first[groups], second[groups], list(groups))["ci"], -0.8 * change


def failing_folds(rng: np.random.Generator, n: int, chance: float) -> Run:
    numbers, shares = np.arange(n) % 5, np.where(rng.random(5) < chance, 0.9, 0.1)
    return rate(list(rng.random(n) < shares[numbers]), list(numbers))["ci"], float(shares.mean())


def folds(rng: np.random.Generator, n: int, spread: float) -> Run:
    """A setting of its own in each of five folds; the truth is the mean over all settings that could be chosen."""
    numbers, usual = np.arange(n) % 5, math.log(0.1 / 0.9)
    shares = 1 / (1 + np.exp(-usual - spread * rng.normal(size=5)))
    z = np.linspace(-6, 6, 601)
    weights = np.exp(-(z**2) / 2)
    truth = float((weights / (1 + np.exp(-usual - spread * z))).sum() / weights.sum())
    return rate(list(rng.random(n) < shares[numbers]), list(numbers))["ci"], truth


def monitor(rng: np.random.Generator, n: int, d: float, spread: float = 1.0) -> Run:
    """Beside n refused prompts a fifth as many are answered, at least five."""
    answered = max(5, n // 5)
    scores = np.concatenate([spread * rng.normal(size=answered), rng.normal(size=n) + d])
    interval = told_apart_interval(scores, np.arange(len(scores)) >= answered, np.arange(len(scores)))
    return interval, (1 + math.erf(d / math.sqrt(2 * (1 + spread**2)))) / 2


CASES: dict[str, tuple[Callable[[np.random.Generator, int, float], Run], Sequence[int], Sequence[float]]] = {
    "normal": (normal, FEW, (1.0,)),
    "log-normal": (log_normal, FEW, (0.5, 1.0)),
    "changes": (changes, FEW, (0.1, 0.3, 0.6)),
    "KL": (kl, PROMPTS, (0.5, 1.0, 1.5)),
    "KL, few touched": (few_touched, MANY, (0.02, 0.05, 0.3)),
    "paired rates": (pair_of_rates, PROMPTS, (0.1, 0.5)),
    "paired rates, in fives": (partial(pair_of_rates, size=5), MANY, (0.1, 0.5)),
    "folds": (folds, PROMPTS, (0.0, 0.5, 1.0)),
    "failing folds": (failing_folds, PROMPTS, (0.1, 0.3)),
    "monitor": (monitor, PROMPTS, (0.0, 1.0, 3.0, 5.0)),
    "monitor, spreads": (lambda rng, n, spread: monitor(rng, n, 1.0, spread), PROMPTS, (1 / 3, 3.0, 5.0)),
}


def main() -> None:
    arguments = parse(argparse.ArgumentParser(description=__doc__.splitlines()[0]))

    def row(name: str, n: int, size: float) -> dict:
        runs = [CASES[name][0](np.random.default_rng(seed), n, size) for seed in range(arguments.runs)]
        low, high, truth = np.array([(*ends, truth) for ends, truth in runs if ends]).reshape(-1, 3).T
        record = {"case": name, "prompts": n, "size": round(size, 2), "has one": round(len(low) / len(runs), 3)}
        if not len(low):
            return record | {"covers": "-", "least width": "-"}
        covered = float(np.mean((low <= truth) & (truth <= high)))
        return record | {"covers": round(covered, 3), "least width": round(float((high - low).min()), 3)}

    cells = ((name, n, size) for name, (_, ns, sizes) in CASES.items() for n, size in itertools.product(ns, sizes))
    write_table("simulated_rates", __doc__, itertools.starmap(row, cells), arguments)


if __name__ == "__main__":
    main()
