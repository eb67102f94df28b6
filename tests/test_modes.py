"""Each mode against its formula in NumPy, and what holds for all of them."""

import mlx.core as mx
import numpy as np
import pytest

from alignment_artifacts.edits.modes import MODES, ModeOptions, SiteDirection, edit_function

from .conftest import relative_error

HIDDEN = 16
OPTIONS = ModeOptions(proximity_threshold=0.1, distance_threshold=1.2, decay_rate=0.7, pca_components=2)


@pytest.fixture
def at():
    rng = np.random.default_rng(0)
    natural, artifact = rng.standard_normal((2, HIDDEN)).astype(np.float32)
    components = np.linalg.qr(rng.standard_normal((HIDDEN, 3)))[0].T.astype(np.float32)
    return SiteDirection(*map(mx.array, (artifact - natural, natural, artifact, components)), spread=4.0, cap=0.5)


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((3, 40, HIDDEN)).astype(np.float32)


def reference(mode, x, at, s):
    """Section 6 of the design, one activation at a time, in float64."""
    d, natural, artifact = (np.array(v, np.float64) for v in (at.direction, at.natural_mean, at.artifact_mean))
    unit = d / np.linalg.norm(d)
    y = np.array(x, np.float64)
    for v in y.reshape(-1, HIDDEN):  # views: changed in place
        cosine = v @ unit / np.linalg.norm(v)
        if mode == "always":
            v -= s * d
        elif mode == "proximity":
            v -= s * d if cosine > OPTIONS.proximity_threshold else 0
        elif mode == "adaptive":
            v -= s * max(0, cosine) * d
        elif mode == "sphere":
            away = v - artifact
            distance = np.linalg.norm(away) / at.spread
            if distance < OPTIONS.distance_threshold:
                push = s * np.linalg.norm(d) * np.exp(-OPTIONS.decay_rate * distance)
                v += push * away / np.linalg.norm(away)
        elif mode == "subspace":
            for u in np.array(at.components, np.float64)[: OPTIONS.pca_components]:
                v -= s * ((v - natural) @ u) * u
        elif mode == "ablate":
            v -= s * (v @ unit) * unit
        elif mode == "cap":
            v -= s * max(0, v @ unit - at.cap) * unit
        elif mode == "add":
            v += s * d
    return y


@pytest.mark.parametrize("scale", [0.5, 1.0, -2.0])
@pytest.mark.parametrize("mode", MODES)
def test_modes_follow_their_formulas(mode, scale, at, x):
    edited = np.array(edit_function(mode, at, scale, OPTIONS)(mx.array(x)))
    assert relative_error(edited, reference(mode, x, at, scale)) < 1e-5
    assert not np.array_equal(edited, x)


@pytest.mark.parametrize("mode", ["proximity", "sphere", "cap"])
def test_the_gated_modes_leave_some_activations_alone(mode, at, x):
    edited = np.array(edit_function(mode, at, 1.0, OPTIONS)(mx.array(x)))
    untouched = (edited == x).all(axis=-1)
    assert 0.1 < untouched.mean() < 0.9


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_scale_0_is_the_identity_to_the_bit_in_every_dtype(mode, dtype, at, x):
    before = mx.array(x).astype(dtype)
    after = edit_function(mode, at, 0.0, OPTIONS)(before)
    assert after.dtype == dtype and mx.array_equal(after, before)


@pytest.mark.parametrize("mode", MODES)
def test_16_bit_activations_are_computed_in_float32(mode, at, x):
    # Sums of squares of these overflow float16; a mode that did not widen them would give inf or NaN.
    large = mx.array(x * 3e3).astype(mx.float16)
    edited = edit_function(mode, at, 1.0, OPTIONS)(large)
    assert edited.dtype == mx.float16
    expected = reference(mode, np.array(large.astype(mx.float32)), at, 1.0)
    assert relative_error(edited.astype(mx.float32), expected) < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_depend_on_each_other(mode, at, x):
    function = edit_function(mode, at, 1.0, OPTIONS)
    together = np.array(function(mx.array(x)))
    for row in range(len(x)):
        np.testing.assert_allclose(function(mx.array(x[row : row + 1]))[0], together[row], rtol=1e-6, atol=1e-6)


def test_what_ablate_cap_and_subspace_promise(at, x):
    x = mx.array(x)
    assert np.abs(edit_function("ablate", at, 1.0)(x) @ at.unit).max() < 1e-5
    capped = edit_function("cap", at, 1.0)(x)
    assert (capped @ at.unit).max().item() <= at.cap + 1e-5
    below = np.array(x @ at.unit) <= at.cap
    assert np.array_equal(np.array(capped)[below], np.array(x)[below])
    inside = (edit_function("subspace", at, 1.0, OPTIONS)(x) - at.natural_mean) @ at.components[:2].T
    assert np.abs(inside).max() < 1e-5


def test_adding_undoes_always(at, x):
    there = edit_function("always", at, 1.5)(mx.array(x))
    np.testing.assert_allclose(edit_function("add", at, 1.5)(there), x, rtol=1e-5, atol=1e-5)


def test_an_unknown_mode_is_refused(at):
    with pytest.raises(ValueError, match="always, proximity"):
        edit_function("auto", at, 1.0)
