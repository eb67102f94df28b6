"""Comparing two models on simulated collections whose truth is known."""

import numpy as np
import pytest

from alignment_artifacts import separation as st
from alignment_artifacts.comparison.difference import compare_layers, cosine, d_along, exchanged_differences
from alignment_artifacts.scores import Settings
from benchmarks import simulated_model_comparison
from benchmarks.simulated_model_comparison import FOLDS, STRATA

SETTINGS = Settings(permutations=199, resamples=200)


def simulate(d_first, d_second, seed, same_direction=True):
    """Two models [50 pairs, 2, 2 layers, 32] that share half of their noise, with these d's at layer 0."""
    return simulated_model_comparison.simulate((d_first, d_second), 0.5, same_direction, seed, layers=2)


@pytest.mark.parametrize("d, same_direction", [(0, True), (2, True), (2, False), (4, False)])
def test_equal_separation_is_called_different_no_more_often_than_stated(d, same_direction):
    runs, p_values = 100, []
    for seed in range(runs):
        first, second, _ = simulate(d, d, seed, same_direction)
        p_values.append(min(r["p_value"] for r in compare_layers(first, second, STRATA, Settings(99, 50))))
    # At a true rate of 5% more than 11 of 100 come about in 1 of 200 cases.
    assert np.mean(np.array(p_values) <= 0.05) <= 0.11


def test_noise_of_another_shape_is_no_difference_in_separation():
    """Isotropic in one model, along two axes in the other; their learnt directions separate equally well."""
    found = []
    for seed in range(100):
        first, second, _ = simulated_model_comparison.simulate((3.2, 3), 0.0, True, seed, layers=1, axes=2)
        found.append(compare_layers(first, second, STRATA, Settings(99, 50))[0]["p_value"] <= 0.05)
    assert np.mean(found) <= 0.1  # swaps alone: 0.14 to 0.17


def test_a_loud_layer_does_not_drown_a_quiet_one():
    """Layer 0 differs and varies little between models, layer 1 varies much: it has few axes and no noise in common."""
    found = []
    for seed in range(30):
        quiet, second, _ = simulated_model_comparison.simulate((1, 1.8), 0.8, True, seed, layers=1)
        loud = np.random.default_rng(seed).normal(size=(2, 50, 2, 1, 32)) * np.where(np.arange(32) < 1, 1, 0.01)
        both = [np.concatenate(layers, axis=2) for layers in zip((quiet, second), loud, strict=True)]
        found.append(compare_layers(*both, STRATA, Settings(99, 50))[0]["p_value"] <= 0.05)
    assert np.mean(found) >= 0.8


@pytest.mark.parametrize("d_first, d_second, same_direction", [(0.8, 3, True), (4, 2, True), (0.8, 3, False)])
def test_a_planted_difference_is_found_and_its_interval_covers_the_truth(d_first, d_second, same_direction):
    covered, found = [], []
    for seed in range(60):
        first, second, truth = simulate(d_first, d_second, 1000 + seed, same_direction)
        record, other = compare_layers(first, second, STRATA, SETTINGS)
        low, high = record["difference_ci"]
        covered.append(low <= truth <= high)
        found.append(record["p_value"] <= 0.05)
        assert other["difference_ci"][0] < 1 and abs(other["difference"]) < 1.5
    assert np.mean(covered) >= 0.85 and np.mean(found) >= 0.9


def test_identical_models_differ_by_exactly_nothing():
    first, *_ = simulate(2, 2, 0)
    for record in compare_layers(first, first.copy(), STRATA, SETTINGS):
        assert record["difference"] == 0 == record["largest_change"] and record["difference_ci"] == [0, 0]
        assert record["p_value"] == 1 and record["cosine"] == pytest.approx(1)
        assert record["a_on_b"] == pytest.approx(record["d_a"]) == record["b_on_a"]


def test_a_scaled_space_is_no_difference_in_separation():
    runs, found = 60, 0
    for seed in range(runs):
        first, second, _ = simulate(2, 2, seed)
        records = compare_layers(first, 3 * second, STRATA, Settings(99, 50))
        assert [r["p_value"] for r in compare_layers(first, second, STRATA, Settings(99, 50))] == [
            r["p_value"] for r in records
        ]
        found += min(r["p_value"] for r in records) <= 0.05
    assert found <= 8  # at a rate of 5% more come about once in 200


def test_a_turned_space_is_no_difference_in_separation():
    first, *_ = simulate(2, 2, 1)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0]
    for record in compare_layers(first, first @ turn, STRATA, SETTINGS):
        assert record["d_b"] == pytest.approx(record["d_a"]) and record["difference"] == pytest.approx(0, abs=1e-9)
        assert record["p_value"] > 0.5 and abs(record["cosine"]) < 0.9


def test_the_observed_difference_is_that_of_the_scores():
    first, second, _ = simulate(1, 3, 2, same_direction=False)
    pairs = [st.pair_vectors(model[:, 0, 0], model[:, 1, 0]) for model in (first, second)]
    difference, *null = exchanged_differences(*pairs, FOLDS, st.sign_flips(np.arange(50), 300))
    d = [float(st.held_out_d(layer, FOLDS)) for layer in pairs]
    assert difference == pytest.approx(st.stabilised(d[1]) - st.stabilised(d[0]))  # the mirror changes no d
    assert len(null) == 300 and abs(np.mean(null)) < 0.1


def test_projections_on_the_other_direction():
    first, second, _ = simulate(3, 3, 3, same_direction=False)
    teacher = st.pair_vectors(second[:, 0, 0], second[:, 1, 0])
    assert abs(d_along(first[:, :, 0], teacher, FOLDS)) < 1.2  # orthogonal
    own = st.pair_vectors(first[:, 0, 0], first[:, 1, 0])
    assert d_along(first[:, :, 0], own, FOLDS) == pytest.approx(float(st.held_out_d(own, FOLDS)))
    assert cosine(np.array([1.0, 0]), np.array([1.0, 1])) == pytest.approx(np.sqrt(0.5))
    assert np.isnan(cosine(np.zeros(2), np.ones(2)))


def test_models_without_any_separation_give_null_not_nan():
    dead = np.zeros((50, 2, 1, 4))
    (record,) = compare_layers(dead, dead + np.array([0.0, 1.0])[:, None, None], STRATA, SETTINGS)
    assert record["d_a"] is None and record["d_b"] is None and record["p_value"] is None and record["cosine"] is None
