"""Intervals: never of zero width, and they cover what they should (all cells: benchmarks/simulated_coverage.md)."""

import numpy as np
import pytest

from alignment_artifacts import separation as st
from alignment_artifacts.intervals import Uncertainty, auroc_interval, told_apart_interval
from alignment_artifacts.rates import t_quantile
from benchmarks import simulated_coverage


@pytest.mark.parametrize(
    "noise, pairs, d",
    [("isotropic", 50, 5.0), ("heavy", 25, 5.0), ("paired", 10, 2.0), ("fives", 50, 5.0), ("lopsided", 80, 0.0)],
)
def test_intervals_cover_the_truth(noise, pairs, d):
    runs, projected = 40, simulated_coverage.Projected(noise, 100_000)
    rows = np.array([simulated_coverage.run(noise, pairs, d, 900 + seed, projected) for seed in range(runs)])
    estimate, low, high, truth = np.moveaxis(rows, 2, 0)
    covered = ((low <= truth) & (truth <= high)).mean(axis=0)
    assert (covered >= 0.92 - 3 * np.sqrt(0.92 * 0.08 / runs)).all()
    assert (low < high).all() and (low <= estimate).all() and (estimate <= high).all()
    if noise == "fives":  # what the pairs of a group share makes no spread smaller
        assert abs((estimate - truth)[:, 0].mean()) < 0.35


def test_fewer_than_eight_groups_have_no_interval():
    rng = np.random.default_rng(0)
    for count in (7, 8):
        groups = np.repeat(np.arange(count), 3)
        folds = st.assign_divisions(np.zeros(len(groups)), 0, groups)
        layer = st.pair_vectors(*rng.normal(size=(2, len(groups), 5)))
        intervals = Uncertainty(groups).intervals(st.held_out_projections(layer, folds))
        assert np.isfinite([end for interval in intervals.values() for end in interval]).all() == (count == 8)


def test_copies_make_no_interval_narrower():
    rng = np.random.default_rng(0)
    natural, artifact = rng.normal(size=(2, 20, 6)) + np.array([0.0, 1.0])[:, None, None]
    groups, copies = np.arange(20), np.tile(np.arange(20), 5)
    widths = []
    for rows in (groups, copies):
        layer = st.pair_vectors(natural[rows], artifact[rows])
        folds = st.assign_divisions(np.zeros(len(rows)), 0, rows)
        low, high = Uncertainty(rows).intervals(st.held_out_projections(layer, folds))["cohens_d_ci"]
        widths.append(high - low)
    assert widths[1] > 0.85 * widths[0]


def test_score_intervals():
    for area in (0.0, 0.5, 0.9, 1.0):
        low, high = auroc_interval(area, 20, 30)
        assert low <= area <= high and 0.05 < high - low < 0.5
        mirrored = auroc_interval(1 - area, 20, 30)
        np.testing.assert_allclose(mirrored, [1 - high, 1 - low], atol=2e-3)


@pytest.mark.parametrize("negatives, positives, spread", [(165, 35, 4.0), (10, 5, 1.0), (100, 25, 1.0), (30, 30, 0.3)])
def test_two_sides_of_unequal_spread_are_covered(negatives, positives, spread):
    rng, positive, covered = np.random.default_rng(0), np.arange(negatives + positives) >= negatives, 0
    for _ in range(300):
        scores = np.where(positive, spread, 1) * rng.normal(size=len(positive)) + positive * np.hypot(spread, 1) * 0.7
        low, high = told_apart_interval(scores, positive, np.arange(len(scores)))
        covered += low <= 0.7580 <= high
    assert covered / 300 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 300)


def test_equal_spreads_and_perfect_scores_keep_the_usual_interval():
    scores, positive = np.arange(30.0), np.arange(30) >= 20
    alone = told_apart_interval(scores, positive, np.arange(30))
    assert alone == auroc_interval(1.0, 20, 10, t_quantile(9))
    assert told_apart_interval(np.repeat(scores, 3), np.repeat(positive, 3), np.repeat(np.arange(30), 3)) == alone
    mixed = np.random.default_rng(0).normal(size=30)
    low, high = told_apart_interval(mixed, positive, np.arange(30))
    np.testing.assert_allclose(told_apart_interval(-mixed, positive, np.arange(30)), [1 - high, 1 - low], atol=2e-3)


def test_the_difference_of_equal_things_goes_together():
    rng = np.random.default_rng(0)
    natural, artifact = rng.normal(size=(2, 50, 8)) + np.array([0.0, 1.0])[:, None, None]
    folds = st.assign_divisions(np.arange(50) % 5)
    uncertainty = Uncertainty(np.arange(50))
    first = st.held_out_projections(st.pair_vectors(natural, artifact), folds)
    nearly = st.held_out_projections(st.pair_vectors(natural + 0.05 * rng.normal(size=(50, 8)), artifact), folds)
    other = st.held_out_projections(st.pair_vectors(*rng.normal(size=(2, 50, 8))), folds)
    alike, unlike = (np.ptp(uncertainty.difference_interval(first, x)) for x in (nearly, other))
    assert 0 < alike < 0.5 * unlike
