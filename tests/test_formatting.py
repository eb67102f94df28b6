"""Numbers as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment_artifacts.formatting import (
    described_mean,
    interval,
    named_layers,
    number,
    p_value,
    percent,
    percents,
    rate,
    typeset,
)
from alignment_artifacts.rates import rate as rate_of

finite = st.floats(-1e6, 1e6)


@given(finite, st.integers(0, 4))
def test_a_number_is_the_nearest_with_so_many_decimals_and_zero_has_no_sign(value, digits):
    text = number(value, digits)
    assert float(text) == pytest.approx(value, abs=0.500001 * 10**-digits)
    assert len(text.partition(".")[2]) == digits
    assert (float(text) < 0) == text.startswith("-")
    assert float(percent(value, digits)[:-1]) == pytest.approx(100 * value, abs=0.500001 * 10**-digits)


def test_what_is_not_defined_is_a_dash():
    assert number(None) == percent(None) == p_value(None) == "-" and interval([None, 1]) == "[-, 1.00]"
    assert interval([None, None], 1, "undefined") == "[undefined, undefined]"
    assert rate(rate_of([])) == "- [0-100]"
    assert described_mean({"mean": 1.0, "n": 4, "ci": None}) == "1.00 (no interval)"
    assert described_mean({"mean": None, "n": 0, "ci": None}) == "-"


def test_intervals_shares_and_p():
    assert interval([-0.004, 2.5]) == "[0.00, 2.50]" and interval([-1, 0.26], 1) == "[-1.0, 0.3]"
    assert percents([0.704, 1]) == "[70-100]" and rate(rate_of([False] * 15)) == "0% [0-20]"
    assert [p_value(p) for p in (0.000999, 0.0312, 1.0)] == ["0.001", "0.031", "1"]


def test_layers_in_a_row_are_a_range():
    assert named_layers([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8" and named_layers([3]) == "layer 3"


@pytest.mark.parametrize(
    "text, typeset_text",
    [
        ("-", "–"),
        ("-1.50", "−1.50"),
        ("[-1.50, -]", "[−1.50, –]"),
        ("84%", "84%"),
        ("84% [70-92]", "84% [70-92]"),
        ("0.25", "0.25"),
    ],
)
def test_on_a_page(text, typeset_text):
    assert typeset(text) == typeset_text
