"""Scores, categories and summary on simulated collections."""

import numpy as np
import pytest

from alignment_artifacts.analysis import analyse, analyse_categories
from alignment_artifacts.categories import score_categories
from alignment_artifacts.pairs import Pair
from alignment_artifacts.scores import Settings, power, score_layers

from .test_analysis import SETTINGS, simulate


def test_more_pairs_find_smaller_effects_and_the_power_is_what_it_says():
    rng, found = np.random.default_rng(0), {}
    for pairs in (20, 80):
        scores = score_layers(rng.normal(size=(pairs, 2, 2, 8)), np.zeros(pairs), SETTINGS)
        found[pairs] = power(scores)["smallest_d"]
        assert power(scores)["groups_needed"]["0.3"] > power(scores)["groups_needed"]["0.8"]
    assert found[80] < 0.7 * found[20]
    hits = []
    for seed in range(60):  # an effect along the only dimension: the directions learnt have the true d
        vectors = np.random.default_rng(seed).normal(size=(40, 2, 1, 1))
        scores = score_layers(vectors, np.zeros(40), Settings(199, 2, seed))
        vectors[:, 1] += power(scores)["smallest_d"]
        hits.append(score_layers(vectors, np.zeros(40), Settings(199, 2, seed)).layers[0]["p_value"] <= 0.05)
    assert 0.6 < np.mean(hits) <= 1


def test_four_pairs_never_reach_significance_and_have_no_interval():
    result = analyse(simulate(effect=30.0, pairs=4), SETTINGS, {})
    record = result["layer_scores"]["2"]
    assert record["p_value"] == record["p_floor"] == 0.125 == result["independence"]["p_floor"]
    assert record["cohens_d_ci"] == [None, None] and "no layer separates" in result["summary"]


def test_shared_prompts_make_one_group():
    data = simulate(effect=3.0)
    data.pairs[:] = [Pair(p.id, p.category, p.natural, f"a{i // 5}") for i, p in enumerate(data.pairs)]
    result = analyse(data, SETTINGS, {})
    assert result["independence"]["num_groups"] == 10 and "50 pairs, 10 independent groups." in result["summary"]
    assert all(record["p_value"] >= 2**-9 for record in result["layer_scores"].values())


def test_categories_share_one_null_and_their_differences_are_found():
    rng = np.random.default_rng(0)
    labels = np.repeat([f"c{i}" for i in range(5)], 10)
    found = 0
    for seed in range(40):
        scored = score_categories(rng.normal(size=(50, 2, 3, 8)), labels, np.arange(50), Settings(199, 2, seed))
        p = [r["p_value"] for c in scored["categories"].values() for r in c["layer_scores"].values()]
        found += min(p) <= 0.05
        assert len(scored["differences"]) == 10
    assert found <= 7  # at a rate of 5% more come about once in 500
    vectors = rng.normal(size=(50, 2, 3, 8)) * 0.5
    vectors[:10, 1, :, 0] += 6
    differences = score_categories(vectors, labels, np.arange(50), SETTINGS)["differences"]
    with_first = [r for r in differences if r["first"] == "c0"]
    assert all(r["p_value"] <= 0.05 and r["difference_ci"][0] > 0 for r in with_first)
    assert all(r["p_value"] > 0.05 for r in differences if r["first"] != "c0")


def test_a_category_of_one_group_says_so():
    data = simulate(effect=1.0)
    data.pairs[:] = [Pair(p.id, p.category, p.natural, p.artifact, p.category) for p in data.pairs]
    reasons = [c["reason"] for c in analyse_categories(data, SETTINGS)["categories"].values()]
    assert reasons == ["only 1 independent groups of pairs, 4 needed"] * 5


def test_both_positions_are_said_prompt_end_first():
    summary = analyse(simulate(effect=3.0), SETTINGS, {})["summary"]
    assert 0 <= summary.index("At the end of the prompt") < summary.index("Over the generated tokens")


def test_a_prompt_out_of_all_proportion_is_named():
    data = simulate(effect=3.0)
    assert analyse(data, SETTINGS, {})["outliers"] == []
    data.values[7, 1] *= 1000
    result = analyse(simulate(effect=3.0), SETTINGS, {})
    data._prompt_vectors.clear()
    result = analyse(data, SETTINGS, {})
    assert result["outliers"][0]["pair"] == "p_7" and "median absolute deviations" in result["summary"]


@pytest.mark.parametrize("steps", [1, 6])
def test_accuracy_of_pairs_is_counted(steps):
    result = analyse(simulate(effect=4.0, steps=steps), SETTINGS, {})
    record = result["best_layer_nested"]
    assert record["pair_accuracy"] >= record["accuracy"] > 0.8
