"""Changes that were planted in activations: directions that lie in them are told from others, and from chance."""

import numpy as np
import pytest

from alignment_artifacts.comparison.change_space import (
    MOST,
    direction_in_changes,
    leading_directions,
    random_shares,
    shares_in,
)

RNG = np.random.default_rng(0)
NAMES = ("before", "after")
HIDDEN, PAIRS = 64, 40


def unit(hidden=HIDDEN):
    vector = RNG.standard_normal(hidden)
    return vector / np.linalg.norm(vector)


def activations(layers):
    """[pairs, 2, layers, hidden] without any difference of the sides."""
    return RNG.standard_normal((PAIRS, 2, layers, HIDDEN))


def test_a_refusal_written_into_the_stream_is_what_the_direction_is():
    """Layer 0: nothing; 1: one direction on artifact prompts; 2: one on all prompts alike, across the direction."""
    before = activations(3)
    after, written = before.copy(), unit()
    after[:, 1, 1] += 40 * written
    before[:, 1, 2] += 40 * written
    across = unit()
    after[..., 2, :] = before[..., 2, :] + 40 * (across - (across @ written) * written)
    result = direction_in_changes(before, after, np.arange(PAIRS) % 4, NAMES)
    nothing, refusal, other = result["layers"]
    assert nothing["b"] == [None] * MOST
    assert refusal["b"][0] > 0.95 and refusal["a"][0] < 0.1 and refusal["of_changes"][0] == pytest.approx(1)
    assert other["b"][0] < 0.01 and other["of_changes"][0] == pytest.approx(1)
    low, high = refusal["b_range"][0]
    assert low <= refusal["b"][0] <= high
    assert "after lies in what training changed more than random ones at layer 1:" in result["summary"]


def test_a_change_that_wrote_nothing_is_not_credited_with_the_direction():
    """One per cent of everything: changes lie where the direction has been all along."""
    before = activations(1)
    before[:, 1] += 40 * unit()
    summary = direction_in_changes(before, 1.01 * before, np.arange(PAIRS) % 4, NAMES)["summary"]
    assert "no more than that of before: training need not have written it" in summary


def test_several_directions_are_counted_together():
    """Three equal parts: a third of the direction in each."""
    before, parts = activations(1), np.linalg.qr(RNG.standard_normal((HIDDEN, 3)))[0].T
    after = before.copy()
    strengths = RNG.standard_normal((PAIRS, 2, 3)) * 5 + np.array([0, 30])[None, :, None]
    after[:, :, 0] += strengths @ parts
    (record,) = direction_in_changes(before, after, np.arange(PAIRS) % 4, NAMES)["layers"]
    assert record["b"][2] > 0.97 and np.all(np.diff(record["b"]) >= 0) and record["of_changes"][2] == pytest.approx(1)


def test_random_directions_are_where_the_quantiles_say():
    basis = np.linalg.qr(RNG.standard_normal((HIDDEN, MOST)))[0].T
    drawn = np.array([shares_in(unit(), basis) for _ in range(4000)])
    assert drawn.mean(axis=0) == pytest.approx(np.arange(1, MOST + 1) / HIDDEN, rel=0.1)
    below = (drawn < random_shares(HIDDEN, 0.95)).mean(axis=0)
    assert below == pytest.approx(np.full(MOST, 0.95), abs=0.015)
    assert random_shares(3, 0.95)[2:].tolist() == [1, 1, 1]


def test_the_limit_holds_for_all_layers_together():
    """Training that writes along random directions: the direction of the pairs lies in it by chance alone."""
    hits = 0
    for _ in range(60):
        before = activations(6)
        after = before + RNG.standard_normal((PAIRS, 2, 6, 1)) * np.stack([unit() for _ in range(6)]) * 0.01
        result = direction_in_changes(before, after, np.arange(PAIRS) % 4, NAMES)
        hits += max(r["b"][0] for r in result["layers"]) > result["random_95"][0]
    assert hits <= 8


@pytest.mark.parametrize("rows", [1, 3, 30])
def test_leading_directions_are_those_of_the_changes(rows):
    changes = RNG.standard_normal((rows, HIDDEN))
    basis = leading_directions(changes)
    assert len(basis) == min(rows, MOST) and np.allclose(basis @ basis.T, np.eye(len(basis)))
    for direction in np.linalg.svd(changes)[2][: len(basis)]:
        assert shares_in(direction, basis)[-1] == pytest.approx(1)
    assert len(leading_directions(np.zeros((rows, HIDDEN)))) == 0
    assert np.isnan(shares_in(unit(), np.zeros((0, HIDDEN)))).all()


def test_nothing_changed_is_said():
    before = activations(2)
    assert "changed nothing" in direction_in_changes(before, before, np.arange(PAIRS) % 4, NAMES)["summary"]


def test_no_more_than_chance_is_said():
    before = activations(1)
    after = before + unit() * 0.01
    summary = direction_in_changes(before, after, np.arange(PAIRS) % 4, NAMES)["summary"]
    assert "no more than random ones do" in summary
