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


def test_groups_that_change_as_wholes_are_no_evidence_beyond_their_number():
    """Ten groups of five, each changed by a coin or not at all, and no effect on average."""
    rng, groups, runs = np.random.default_rng(0), np.repeat(np.arange(10), 5), 400
    found = {"by prompt": 0, "by group": 0, "not covered": 0}
    for _ in range(runs):
        first, second = (rng.random((2, 10)) < 0.5)[:, groups]
        whole = paired_rates(first, second, groups)
        found["by prompt"] += paired_rates(first, second)["p_value"] <= 0.05
        found["by group"] += whole["p_value"] <= 0.05
        found["not covered"] += not whole["ci"][0] <= 0 <= whole["ci"][1]
    assert found["by prompt"] > 0.15 * runs  # what it would be
    assert found["by group"] < 0.05 * runs + 3 * np.sqrt(0.05 * 0.95 * runs)
    assert found["not covered"] < 0.05 * runs + 3 * np.sqrt(0.05 * 0.95 * runs)


def test_p_exchanges_whole_groups_in_every_way():
    first, second, groups = [True] * 7 + [False] * 3, [False] * 5 + [True] * 5, [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    sums = np.bincount(groups, np.subtract(second, first, dtype=int))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    expected = (abs(sums @ signs) >= abs(sums.sum())).mean()
    folds = [0] * 7 + [1] * 3  # groups lie within them, and are what is exchanged
    assert paired_rates(first, second, folds, groups)["p_value"] == pytest.approx(expected)


def test_equal_answers_are_no_evidence_and_no_certainty():
    result = paired_rates([True] * 10, [True] * 10)
    assert result["difference"] == 0 and result["p_value"] == 1 and result["ci"][0] < 0 < result["ci"][1]
    assert paired_rates([], [])["difference"] is None


def test_the_interval_of_a_skewed_kl_covers_it():
    rng, ends, runs = np.random.default_rng(0), [], 300
    for _ in range(runs):
        ends.append(log_mean([np.exp(rng.normal()) * rng.exponential(size=rng.integers(5, 40)) for _ in range(25)]))
    covers = [low <= np.exp(0.5) <= high for low, high in filter(None, ends)]
    assert len(covers) > 0.95 * runs and np.mean(covers) > 0.92 - 3 * np.sqrt(0.92 * 0.08 / runs)


def test_a_kl_that_few_prompts_carry_has_no_interval():
    rng = np.random.default_rng(0)
    alike = [rng.exponential(size=20) for _ in range(50)]
    assert log_mean(alike) is not None and log_mean(alike[:1]) is None and log_mean([]) is None
    assert log_mean(alike[:9]) is not None and log_mean([*alike[:9], np.zeros(20)]) is None
    few = [g * (i < 9) for i, g in enumerate(alike)]
    assert log_mean(few) is None and log_mean([g + 1e-9 for g in few]) is None
    assert log_mean([np.full(20, 1e-8 * i) for i in range(50)]) is None  # nothing but rounding
    assert log_mean([g * (i < 20) for i, g in enumerate(alike)]) is not None


@pytest.mark.parametrize(
    "draw, truth, least",
    [
        (lambda rng, n: rng.normal(size=n), 0.0, 0.95),
        (lambda rng, n: rng.standard_t(3, size=n), 0.0, 0.95),
        (lambda rng, n: np.exp(rng.normal(size=n)), np.exp(0.5), 0.88),
        (lambda rng, n: -np.exp(rng.normal(size=n)), -np.exp(0.5), 0.88),
        (lambda rng, n: rng.choice([-1.0, 0.0, 1.0], n, p=[0.2, 0.7, 0.1]), -0.1, 0.94),
        (lambda rng, n: rng.beta(0.3, 2, n), 0.3 / 2.3, 0.91),
    ],
)
def test_the_interval_of_a_mean_of_few_covers_it(draw, truth, least):
    rng, runs = np.random.default_rng(0), 400
    for n in (6, 15):
        ends = [mean(draw(rng, n))["ci"] for _ in range(runs)]
        covers = np.mean([low <= truth <= high for low, high in filter(None, ends)])
        assert covers > least - 3 * np.sqrt(least * (1 - least) / runs)


def test_a_mean_over_groups_that_vary_as_wholes_covers_it():
    rng, groups, covered = np.random.default_rng(0), np.repeat(np.arange(10), 5), 0
    for _ in range(400):
        low, high = mean(rng.normal(size=10)[groups] + 0.3 * rng.normal(size=50), groups)["ci"]
        covered += low <= 0 <= high
    assert covered / 400 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 400)


def test_an_interval_needs_spread_and_moves_and_turns_with_the_values():
    assert mean(np.full(20, 0.1 + 0.2))["ci"] is None and mean(np.full(20, 0.3) + [0, 1e-17] * 10)["ci"] is None
    assert mean(np.array([1.0, 2.0]))["ci"] is None
    values = np.exp(np.random.default_rng(0).normal(size=12))
    low, high = mean(values)["ci"]
    assert mean(5 - 3 * values)["ci"] == pytest.approx([5 - 3 * high, 5 - 3 * low])
    symmetric = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert mean(symmetric)["ci"] == pytest.approx(np.array([-1, 1]) * 2.776 * np.sqrt(2.5 / 5), rel=1e-3)  # Student's


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
    assert design_effect([True] * 5) == (1, np.inf) and rate([], [])["n"] == 0
    assert design_effect([True] * 5, [0, 0, 1, 1, 1], [0] * 5)[0] == 2.5  # what is equal may be so by whole clusters


def test_a_rate_of_groups_that_vary_as_wholes_covers_it():
    rng, groups, covered = np.random.default_rng(0), np.repeat(np.arange(10), 5), 0
    for _ in range(400):
        low, high = rate((rng.random(10) < 0.1)[groups], groups)["ci"]
        covered += low <= 0.1 <= high
    assert covered / 400 > 0.93 - 3 * np.sqrt(0.93 * 0.07 / 400)


def test_a_rate_over_folds_one_of_which_fails_covers_that_of_these_very_settings():
    rng, folds, covered = np.random.default_rng(0), np.arange(50) % 5, 0
    for _ in range(400):
        shares = np.where(rng.random(5) < 0.2, 0.9, 0.1)
        low, high = rate(rng.random(50) < shares[folds], folds)["ci"]
        covered += low <= shares.mean() <= high
    assert covered / 400 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 400)


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
