"""How often is a difference between two models detected, and covered by its interval, when its size is known?

    python -m benchmarks.simulated_model_comparison [--runs 2000]

50 pairs, 4 layers of which the first has an effect, 32 dimensions; part of the noise is common to both models, as it
is for the same prompts. "scale" is how many times as large the second model's activations are, which is no separation.
"noise of B": along all axes, as in A, or along two; directions are learnt better there, and 1.32 in A comes to as much
as 1 in B, 3.2 to as much as 3.
"found" is the share of runs with p at most 0.05 at any layer.
Writes benchmarks/simulated_model_comparison.json and .md.
"""

from __future__ import annotations

import argparse

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.comparison.difference import compare_layers
from alignment_artifacts.scores import Settings
from benchmarks.tables import parse, write_table

PAIRS, LAYERS, HIDDEN = 50, 4, 32
STRATA = np.arange(PAIRS) % 5
FOLDS = st.assign_folds(STRATA)
# d of the first model, of the second, share of common noise, effects along one direction?, scale of the second, and
# along how many axes its noise lies
CASES = tuple((*case, HIDDEN) for case in (
    (0, 0, 0.0, True, 1), (0, 0, 0.5, True, 1), (0.8, 0.8, 0.5, True, 1), (0.8, 0.8, 0.5, False, 1),
    (2, 2, 0.0, True, 1), (2, 2, 0.5, False, 1), (4, 4, 0.5, True, 1), (4, 4, 0.0, False, 1),
    (2, 2, 0.5, True, 3), (4, 4, 0.0, False, 3),
    (0.8, 2, 0.5, True, 1), (0.8, 3, 0.5, True, 1), (0.8, 3, 0.0, False, 1), (2, 4, 0.5, True, 1),
    (4, 2, 0.5, False, 1), (2, 4, 0.5, True, 3),
)) + ((1.32, 1, 0.0, True, 1, 2), (3.2, 3, 0.0, True, 1, 2), (3.2, 4.5, 0.0, True, 1, 2))  # fmt: skip


def simulate(
    d: tuple[float, float], shared: float, same_direction: bool, seed: int, layers: int = LAYERS, axes: int = HIDDEN
) -> tuple[np.ndarray, np.ndarray, float]:
    """Two models [pairs, 2, layers, hidden] with these d's at layer 0, and the true difference there.

    The truth is that of the directions which are learnt: the effect's share along each, noise having unit variance.
    Along other than its first `axes` the second model has next to no noise.
    """
    rng = np.random.default_rng(seed)
    common, *separate = rng.normal(size=(3, PAIRS, 2, layers, HIDDEN))
    models = [np.sqrt(shared) * common + np.sqrt(1 - shared) * noise for noise in separate]
    spreads = np.ones((2, HIDDEN))
    spreads[1, axes:] = 0.02
    true = []
    for model, spread, size, axis in zip(models, spreads, d, (0, 0 if same_direction else 1), strict=True):
        model *= spread
        model[:, 1, 0, axis] += size
        layer = st.pair_vectors(model[:, 0, 0], model[:, 1, 0])
        directions = [layer.differences[fold != FOLDS].mean(axis=0) for fold in np.unique(FOLDS)]
        true.append(np.mean([w[axis] / np.linalg.norm(w * spread) for w in directions]) * size)
    return *models, float(true[1] - true[0])


def run(first: float, second: float, shared: float, same_direction: bool, scale: float, axes: int, seed: int) -> dict:
    a, b, truth = simulate((first, second), shared, same_direction, seed, axes=axes)
    records = compare_layers(a, scale * b, STRATA, Settings(permutations=199, resamples=200))
    low, high = records[0]["difference_ci"]
    found = min(r["p_value"] for r in records) <= 0.05
    return {"true difference": truth, "found": found, "covers": low <= truth <= high, "width": high - low}


def row(first: float, second: float, shared: float, same_direction: bool, scale: float, axes: int, runs: int) -> dict:
    measured = [run(first, second, shared, same_direction, scale, axes, seed) for seed in range(runs)]
    means = {key: round(float(np.mean([one[key] for one in measured])), 3) for key in measured[0]}
    case = {"d of A": first, "d of B": second, "common noise": shared, "scale": scale}
    case["noise of B"] = "all axes" if axes == HIDDEN else f"{axes} axes"
    return {**case, "one direction": "yes" if same_direction else "no", **means}


def main() -> None:
    arguments = parse(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    write_table("simulated_model_comparison", __doc__, (row(*case, arguments.runs) for case in CASES), arguments)


if __name__ == "__main__":
    main()
