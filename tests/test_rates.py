"""Shares and means with their intervals."""

import numpy as np
import pytest

from alignment_artifacts.rates import log_mean, paired_rates, wilson


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
