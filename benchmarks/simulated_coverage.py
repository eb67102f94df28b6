"""How often do the 95% intervals of d, accuracy and AUROC cover the truth, and how wide are they?

    python -m benchmarks.simulated_coverage [--runs 2000]

The truth is that of the fold-trained directions on infinite data, averaged over folds and divisions.
"wider" is the median width of the intervals of d divided by that of intervals scaled to cover exactly 95%.
Writes benchmarks/simulated_coverage.json and .md.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.intervals import Uncertainty, robust_sd
from benchmarks.tables import parse, write_table

NOISE = ("isotropic", "decaying", "heavy", "unequal", "paired")
GROUPED = {"fives": 0.9, "lopsided": 0.5}  # what pairs of a group have in common, as a share of the variance
PAIRS, SIZES = (10, 25, 50, 200), (0.0, 1.0, 2.0, 5.0)
FEWEST = 50  # pairs, of which groups are made
FLIPS = 500
HIDDEN = 64


def scales(noise: str) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations of natural and artifact prompts along each axis [hidden]."""
    spread = np.ones(HIDDEN)
    if noise == "decaying":
        spread = np.arange(1, HIDDEN + 1) ** -0.75
    return spread, 2 * spread if noise == "unequal" else spread


def simulate(noise: str, pairs: int, d: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Natural and artifact [pairs, hidden]; the true d along the third axis is `d`.

    isotropic: equal noise along all axes; decaying: spread falling as axis ** -0.75; heavy: multivariate t with 4
    degrees; unequal: artifact prompts spread twice as far; paired: 80% of the variance is shared by a pair; fives,
    lopsided: the prompts of a side are alike within the groups of `groups_of`.
    """
    shared, (natural, artifact) = 0.8 * (noise == "paired"), rng.normal(size=(2, pairs, HIDDEN))
    common = rng.normal(size=(pairs, HIDDEN))
    sides = [np.sqrt(shared) * common + np.sqrt(1 - shared) * x for x in (natural, artifact)]
    if noise == "heavy":
        sides = [x * np.sqrt(2 / rng.chisquare(4, (pairs, 1))) for x in sides]  # variance 1
    if noise in GROUPED:
        alike, groups = GROUPED[noise], groups_of(noise, pairs)
        sides = [np.sqrt(alike) * rng.normal(size=x.shape)[groups] + np.sqrt(1 - alike) * x for x in sides]
    natural, artifact = (x * scale for x, scale in zip(sides, scales(noise), strict=True))
    artifact[:, 2] += effect(noise, d)
    return natural, artifact


def groups_of(noise: str, pairs: int) -> np.ndarray:
    """[pairs] numbers: fives has five pairs a group, lopsided five eighths of all in one; others each by itself."""
    singles = np.arange(pairs)
    return {"fives": singles // 5, "lopsided": np.maximum(singles - pairs * 5 // 8, 0)}.get(noise, singles)


def effect(noise: str, d: float) -> float:
    """Shift along the third axis that makes d."""
    return d * np.sqrt(np.mean([scale[2] ** 2 for scale in scales(noise)]))


class Projected:
    """Distribution of a projection of a prompt with variance 1, and of the difference of two."""

    def __init__(self, noise: str, draws: int = 1_000_000):
        rng = np.random.default_rng(1)
        one = rng.normal(size=(2, draws))
        if noise == "heavy":
            one = one * np.sqrt(2 / rng.chisquare(4, one.shape))
        natural, artifact = (side[0] for side in scales(noise))
        self.one, self.difference = np.sort(one[0]), np.sort(artifact * one[1] - natural * one[0])

    def below(self, x: float) -> float:
        return np.searchsorted(self.one, x) / len(self.one)

    def above(self, shift: float) -> float:
        """Share of artifact above natural projections where their means differ by `shift`."""
        return 1 - np.searchsorted(self.difference, -shift) / len(self.difference)


def truths(noise: str, d: float, natural, artifact, folds, projected: Projected) -> tuple[float, float, float]:
    """d, accuracy and AUROC of the learnt directions."""
    results = []
    sds = scales(noise)
    for _, _, training, _ in st.each_fold(folds):
        w = (artifact - natural)[training].mean(axis=0)
        along = [np.sqrt((w**2 * sd**2).sum()) for sd in sds]
        shift = w[2] * effect(noise, d)
        threshold = ((natural[training].mean(axis=0) + artifact[training].mean(axis=0)) / 2) @ w
        right = projected.below(threshold / along[0]) + 1 - projected.below((threshold - shift) / along[1])
        unit = along[0] / sds[0][0]
        results.append((shift / np.sqrt(np.mean(np.square(along))), right / 2, projected.above(shift / unit)))
    return tuple(np.mean(results, axis=0))


def run(noise: str, pairs: int, d: float, seed: int, projected: Projected) -> np.ndarray:
    """[3 (d, accuracy, AUROC), 4 (estimate, low, high, truth)]."""
    natural, artifact = simulate(noise, pairs, d, np.random.default_rng(seed))
    groups = groups_of(noise, pairs)
    strata = groups % 5 if pairs >= 25 and noise not in GROUPED else np.zeros(pairs)
    folds = st.assign_divisions(strata, seed, groups)
    layer = st.pair_vectors(natural, artifact, groups)
    held_out = st.held_out_projections(layer, folds)
    null = st.sign_flip_d(layer, folds, st.sign_flips(groups, FLIPS, seed))
    intervals = Uncertainty(groups).intervals(held_out, robust_sd(null[1:]))
    estimates = held_out.d(), held_out.accuracy(), held_out.auroc()
    truth = truths(noise, d, natural, artifact, folds, projected)
    names = "cohens_d_ci", "accuracy_ci", "auroc_ci"
    return np.array([(e, *intervals[name], t) for e, name, t in zip(estimates, names, truth, strict=True)])


def cell(noise: str, pairs: int, d: float, runs: int) -> dict:
    projected = Projected(noise)
    rows = np.array([run(noise, pairs, d, seed, projected) for seed in range(runs)])
    estimate, low, high, truth = np.moveaxis(rows, 2, 0)
    covered = ((low <= truth) & (truth <= high)).mean(axis=0)
    centre, edge, true = (st.stabilised(x[:, 0]) for x in (estimate, high, truth))
    exact = np.quantile(np.abs(true - centre) / (edge - centre), 0.95)
    return {
        "noise": noise,
        "pairs": pairs,
        "d": d,
        "mean true d": round(float(truth[:, 0].mean()), 2),
        **{f"{name} covers": round(float(x), 3) for name, x in zip(("d", "accuracy", "AUROC"), covered, strict=True)},
        "wider": round(float(1 / exact), 2),
        "bias of d": round(float((estimate - truth)[:, 0].mean()), 3),
        "least width of accuracy": round(float((high - low)[:, 1].min()), 3),
        "least width of AUROC": round(float((high - low)[:, 2].min()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS)
    parser.add_argument("--noise", nargs="+", choices=[*NOISE, *GROUPED], default=[*NOISE, *GROUPED])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    arguments = parse(parser)
    cells = itertools.product(arguments.noise, arguments.pairs, arguments.sizes)
    rows = (cell(*c, arguments.runs) for c in cells if c[0] not in GROUPED or c[1] >= FEWEST)
    write_table("simulated_coverage", __doc__, rows, arguments)


if __name__ == "__main__":
    main()
