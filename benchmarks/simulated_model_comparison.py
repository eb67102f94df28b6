"""How often is a difference between two models detected, and covered by its interval, when its size is known?

    python benchmarks/simulated_model_comparison.py      (1 to 3 minutes)

50 pairs, 4 layers of which the first has an effect, 32 dimensions, 300 runs per case; part of the noise is
common to both models, as it is for the same prompts. Writes benchmarks/simulated_model_comparison.json.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment_artifacts import separation as st
from alignment_artifacts.comparison.difference import compare_layers
from alignment_artifacts.scores import Settings
from gemma_refactored.files import write_json

PAIRS, LAYERS, HIDDEN, RUNS = 50, 4, 32, 300
STRATA = np.arange(PAIRS) % 5
FOLDS = st.assign_folds(STRATA)
RESULTS = Path(__file__).with_suffix(".json")
# d of the first model, of the second, share of common noise, effects along one direction?
CASES = (
    (0, 0, 0.0, True), (0, 0, 0.5, True), (0.8, 0.8, 0.5, True), (0.8, 0.8, 0.5, False), (2, 2, 0.0, True),
    (2, 2, 0.5, False), (4, 4, 0.5, True), (4, 4, 0.0, False),
    (0.8, 2, 0.5, True), (0.8, 3, 0.5, True), (0.8, 3, 0.0, False), (2, 4, 0.5, True), (4, 2, 0.5, False),
)  # fmt: skip


def simulate(
    d: tuple[float, float], shared: float, same_direction: bool, seed: int, layers: int = LAYERS
) -> tuple[np.ndarray, np.ndarray, float]:
    """Two models [pairs, 2, layers, hidden] with these d's at layer 0, and the true difference there.

    The truth is that of the directions which are learnt: the effect's share along each, noise having unit variance.
    """
    rng = np.random.default_rng(seed)
    common, *separate = rng.normal(size=(3, PAIRS, 2, layers, HIDDEN))
    models = [np.sqrt(shared) * common + np.sqrt(1 - shared) * noise for noise in separate]
    true = []
    for model, size, axis in zip(models, d, (0, 0 if same_direction else 1), strict=True):
        model[:, 1, 0, axis] += size
        layer = st.pair_vectors(model[:, 0, 0], model[:, 1, 0])
        directions = [layer.differences[fold != FOLDS].mean(axis=0) for fold in np.unique(FOLDS)]
        true.append(np.mean([w[axis] / np.linalg.norm(w) for w in directions]) * size)
    return *models, float(true[1] - true[0])


def run(d: tuple[float, float], shared: float, same_direction: bool, seed: int) -> tuple[bool, bool, float]:
    """(p at most 0.05 at any layer, interval covers the truth, its width)."""
    *models, truth = simulate(d, shared, same_direction, seed)
    records = compare_layers(*models, STRATA, Settings(permutations=199, resamples=200))
    low, high = records[0]["difference_ci"]
    return min(r["p_value"] for r in records) <= 0.05, low <= truth <= high, high - low


def main() -> None:
    print("| d of A | d of B | common noise | one direction | p ≤ 0.05 | interval covers | its width |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    false_positives, covered = [], []
    for first, second, shared, same in CASES:
        rates = np.mean([run((first, second), shared, same, seed) for seed in range(RUNS)], axis=0)
        if first == second:
            false_positives.append(float(rates[0]))
        covered.append(float(rates[1]))
        direction = "yes" if same else "no"
        print(
            f"| {first} | {second} | {shared} | {direction} | {rates[0]:.1%} | {rates[1]:.1%} | {rates[2]:.2f} |",
            flush=True,
        )
    summary = {
        "false_positives": {"lowest": min(false_positives), "highest": max(false_positives)},
        "coverage": {"lowest": min(covered), "highest": max(covered)},
    }
    write_json(RESULTS, {"made": {"versions": {"numpy": metadata.version("numpy")}}, "runs": RUNS, **summary})


if __name__ == "__main__":
    main()
