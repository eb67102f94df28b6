"""How often do the intervals of KL, of rates over folds, of paired rates and of the monitor's AUROC cover the truth?

    python -m benchmarks.simulated_rates [--runs 2000]

KL: log-normal prompts of 5 to 40 tokens. Paired rates: two settings on the same prompts, the second of which
changes `d` of the answers. Folds: five whose log odds of a tenth differ by a standard deviation of `d`. Monitor:
normal scores of refused and answered prompts that are `d` apart.
Writes benchmarks/simulated_rates.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np

from alignment_artifacts.intervals import auroc_interval
from alignment_artifacts.rates import log_mean, paired_rates, rate, t_quantile
from alignment_artifacts.separation import auroc
from benchmarks.tables import parse, write_table

PROMPTS = (10, 25, 50, 200)


def kl(rng: np.random.Generator, n: int, spread: float) -> tuple[list[float], float]:
    groups = [np.exp(spread * rng.normal()) * rng.exponential(size=rng.integers(5, 40)) for _ in range(n)]
    return log_mean(groups), math.exp(spread**2 / 2)


def pair_of_rates(rng: np.random.Generator, n: int, change: float) -> tuple[list[float], float]:
    first = rng.random(n) < 0.8
    second = first & (rng.random(n) >= change)
    return paired_rates(first, second)["ci"], -0.8 * change


def folds(rng: np.random.Generator, n: int, spread: float) -> tuple[list[float], float]:
    """A setting of its own in each of five folds; the truth is the mean over all settings that could be chosen."""
    numbers, usual = np.arange(n) % 5, math.log(0.1 / 0.9)
    shares = 1 / (1 + np.exp(-usual - spread * rng.normal(size=5)))
    z = np.linspace(-6, 6, 601)
    weights = np.exp(-(z**2) / 2)
    truth = float((weights / (1 + np.exp(-usual - spread * z))).sum() / weights.sum())
    return rate(list(rng.random(n) < shares[numbers]), list(numbers))["ci"], truth


def monitor(rng: np.random.Generator, n: int, d: float) -> tuple[list[float], float]:
    """A fifth of the prompts is answered, at least five."""
    answered = max(5, n // 5)
    scores = rng.normal(size=answered), rng.normal(size=n) + d
    interval = auroc_interval(auroc(*scores), answered, n, t_quantile(answered - 1))
    return interval, (1 + math.erf(d / 2)) / 2


CASES = {
    "KL": (kl, (0.5, 1.0)),
    "paired rates": (pair_of_rates, (0.1, 0.5)),
    "folds": (folds, (0.0, 0.5, 1.0)),
    "monitor": (monitor, (0.0, 1.0, 3.0, 5.0)),
}


def main() -> None:
    arguments = parse(argparse.ArgumentParser(description=__doc__.splitlines()[0]))

    def row(name: str, n: int, size: float) -> dict:
        runs = [CASES[name][0](np.random.default_rng(seed), n, size) for seed in range(arguments.runs)]
        low, high, truth = np.array([(*interval, truth) for interval, truth in runs]).T
        covered = float(np.mean((low <= truth) & (truth <= high)))
        return {"case": name, "prompts": n, "size": size, "covers": round(covered, 3),
                "least width": round(float((high - low).min()), 3)}  # fmt: skip

    cells = ((name, n, size) for name, (_, sizes) in CASES.items() for n, size in itertools.product(PROMPTS, sizes))
    write_table("simulated_rates", __doc__, itertools.starmap(row, cells), arguments)


if __name__ == "__main__":
    main()
