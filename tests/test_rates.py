"""Shares and means with their intervals."""

import numpy as np
import pytest

from alignment_artifacts.rates import (
    bounded_mean,
    design_effect,
    log_mean,
    mean,
    paired_rates,
    rate,
    relative_change,
    wilson,
)


def test_paired_rates_are_symmetric_and_their_p_is_that_of_a_coin():
    first = [True] * 36 + [True] * 12 + [False] * 2
    second = [True] * 36 + [False] * 12 + [True] * 2
    result = paired_rates(second, first)
    assert result["difference"] == pytest.approx(0.2)
    assert 0 < result["ci"][0] < 0.2 < result["ci"][1] < 0.5
    assert result["p_value"] == pytest.approx(2 * (1 + 14 + 91) / 2**14)  # 2 of 14 at a fair coin
    swapped = paired_rates(first, second)
    np.testing.assert_allclose(swapped["ci"], [-x for x in result["ci"][::-1]])


def test_equal_answers_are_no_evidence_and_no_certainty():
    result = paired_rates([True] * 10, [True] * 10)
    assert result["difference"] == 0 and result["p_value"] == 1 and result["ci"][0] < 0 < result["ci"][1]
    assert paired_rates([], [])["difference"] is None


def test_the_interval_of_a_skewed_mean_covers_it():
    rng, covered, runs = np.random.default_rng(0), 0, 300
    for _ in range(runs):
        groups = [np.exp(rng.normal()) * rng.exponential(size=rng.integers(5, 40)) for _ in range(25)]
        low, high = log_mean(groups)
        covered += low <= np.exp(0.5) <= high
    assert covered / runs > 0.92 - 3 * np.sqrt(0.92 * 0.08 / runs)


def test_wilson_is_never_of_zero_width():
    assert all(low < high for low, high in (wilson(hits / 10, 10) for hits in range(11)))


def test_what_varies_together_counts_less():
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    assert design_effect(values, range(200))[0] == pytest.approx(1)
    doubled, pairs = np.repeat(values, 2), np.repeat(np.arange(200), 2)
    assert design_effect(doubled, pairs) == pytest.approx(
        (2, 398), rel=0.01
    )  # each counted twice; half of it is theirs
    assert design_effect(doubled, pairs, np.zeros(400, int)) == design_effect(doubled, pairs)
    flags = list(doubled > 1)
    low, high = rate(flags, pairs)["ci"]
    assert (low, high) == pytest.approx(rate(list(values > 1))["ci"], rel=0.02)
    apart = np.repeat([0.0, 1.0], 50)  # two clusters, and nothing but what lies between them
    assert design_effect(apart, apart)[1] == pytest.approx(1, rel=0.02)
    narrow, wide = mean(doubled)["ci"], mean(doubled, pairs)["ci"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1] and mean(doubled, range(400))["ci"] == pytest.approx(narrow)
    assert design_effect([True] * 5, [0, 0, 1, 1, 1]) == (1, np.inf) and rate([], [])["n"] == 0


def test_a_rate_over_folds_that_differ_covers_what_it_is_about():
    rng, folds = np.random.default_rng(0), np.arange(50) % 5
    covers = {"plain": 0, "over folds": 0}
    for _ in range(400):
        flags = list(rng.random(50) < rng.choice([0.15, 0.45], 5)[folds])
        for name, record in (("plain", rate(flags)), ("over folds", rate(flags, folds))):
            covers[name] += record["ci"][0] <= 0.3 <= record["ci"][1]
    assert covers["plain"] + 20 < covers["over folds"] and covers["over folds"] / 400 > 0.9


def test_the_interval_of_a_bounded_mean_stays_within_its_bounds_and_covers_it():
    rng, covered, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        about = np.repeat(np.arange(8), rng.integers(2, 8, 8))
        values = rng.binomial(5, rng.beta(0.6, 2.4, 8)[about]) * 0.2
        low, high = bounded_mean(values, about)["ci"]
        assert 0 <= low <= values.mean() <= high <= 1
        covered += low <= 0.2 <= high
    assert 0.87 < covered / runs < 0.99
    doubled = bounded_mean(np.repeat(values, 2), np.repeat(about, 2))["ci"]
    assert doubled == pytest.approx([low, high])  # the same people asked twice
    assert bounded_mean(np.full(9, 0.3), np.arange(9))["ci"] is None and bounded_mean(values, about * 0)["ci"] is None


def test_a_relative_change_knows_that_the_prompts_are_the_same_and_who_they_are_about():
    """Coverage for toxicity of eight people, some of whom are never answered rudely; the bootstrap's is smaller."""
    rng, effect, runs = np.random.default_rng(0), 0.5, 400
    covered = {"ours": 0, "bootstrap": 0}

    def scores(rng, people):
        about = np.repeat(np.arange(people), rng.integers(2, 8, people))
        rude = rng.beta(1.5, 0.5, people)
        left = rng.beta(3 * effect, 3 * (1 - effect), people)
        before, after = (rng.binomial(5, share[about]) * 0.15 for share in (rude, rude * left))
        return before, after, about

    for _ in range(runs):
        before, after, about = scores(rng, 8)
        found = relative_change(before, after, about)
        assert found["mean"] == pytest.approx(after.mean() / before.mean() - 1)
        first, second = (np.bincount(about, x) for x in (before, after))
        drawn = rng.integers(0, 8, (300, 8))
        resampled = np.quantile(second[drawn].sum(axis=1) / first[drawn].sum(axis=1), (0.025, 0.975)) - 1
        for name, (low, high) in (("ours", found["ci"]), ("bootstrap", resampled)):
            covered[name] += low <= effect - 1 <= high
    assert covered["ours"] / runs > 0.9 and covered["ours"] > covered["bootstrap"] + 0.03 * runs


def test_a_relative_change_by_the_same_share_everywhere_is_certain():
    before, groups = np.random.default_rng(0).random(20), np.arange(20) % 5
    assert relative_change(before, 0.4 * before, groups) == {
        "mean": pytest.approx(-0.6),
        "ci": pytest.approx([-0.6, -0.6]),
    }
    assert relative_change(np.zeros(20), before, groups) == {"mean": None, "ci": None}
    assert relative_change(before, np.zeros(20), groups) == {"mean": -1, "ci": None}
    assert relative_change(before, before, np.zeros(20))["ci"] is None  # one person
    np.testing.assert_allclose(
        relative_change(before, before[::-1] * 2, groups)["ci"],
        relative_change(3 * before, 6 * before[::-1], [f"g{g}" for g in groups])["ci"],
    )
