"""The statistics on simulated collections whose truth is known."""

import numpy as np
import pytest

from alignment_artifacts import separation as st
from alignment_artifacts.intervals import Uncertainty, robust_sd

CATEGORIES = np.repeat(np.arange(5), 10)


def simulate(rng, d, hidden, pairs=50, steps=1, noise=0.3):
    """Prompt vectors with within-class standard deviation 1 along axis 0 and `noise` along the others.

    Half of the variance is shared by the two prompts of a pair. The true d of axis 0 is `d`.
    """
    scale = np.r_[1.0, np.full(hidden - 1, noise)] * np.sqrt(0.5)
    shared = rng.normal(size=(pairs, hidden)) * scale
    natural, artifact = (shared + rng.normal(size=(pairs, hidden)) * scale for _ in range(2))
    artifact[:, 0] += d
    return natural, artifact


def true_d_of_learnt_directions(natural, artifact, folds, d, noise=0.3):
    """The population d along the direction of each fold, averaged as `cohens_d` is."""
    variances = np.r_[1.0, np.full(natural.shape[1] - 1, noise**2)]
    scores = []
    for fold in np.unique(folds):
        w = (artifact - natural)[folds != fold].mean(axis=0)
        scores.append(d * w[0] / np.sqrt((w**2 * variances).sum()))
    return np.mean(scores)


@pytest.mark.parametrize("hidden", [4, 256, 1152])
@pytest.mark.parametrize("d", [0.8, 2.0, 4.0])
def test_known_d_is_recovered_without_bias_and_within_its_interval(d, hidden):
    rng = np.random.default_rng(int(10 * d) + hidden)
    runs, covered, errors = 60, 0, []
    for run in range(runs):
        natural, artifact = simulate(rng, d, hidden)
        folds = st.assign_folds(CATEGORIES, run)
        held_out = st.held_out_projections(st.pair_vectors(natural, artifact), folds)
        truth = true_d_of_learnt_directions(natural, artifact, folds, d)
        signs = st.sign_flips(np.arange(50), 200, run)
        null_sd = robust_sd(st.sign_flip_d(st.pair_vectors(natural, artifact), folds, signs)[1:])
        low, high = Uncertainty(np.arange(50)).intervals(held_out, null_sd)["cohens_d_ci"]
        covered += low <= truth <= high
        errors.append(held_out.d() - truth)
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(runs)
    assert covered / runs > 0.92 - 3 * np.sqrt(0.92 * 0.08 / runs)
    if hidden == 4:  # hardly anything to overfit: the learnt direction is the true one
        assert abs(truth - d) < 0.1 * d


def test_in_sample_scores_flatter_and_held_out_scores_do_not():
    """The comparison in docs/reading-the-numbers.md: pure noise, 20 correlated steps per prompt, 256 dimensions."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(2, 50, 1, 256))
    natural, artifact = (p + rng.normal(size=(50, 20, 256)) for p in prompts)
    d_in_sample, ratio, _ = st.in_sample_scores(lambda: [(natural.reshape(-1, 256), artifact.reshape(-1, 256))])
    held_out = st.held_out_projections(st.pair_vectors(natural.mean(1), artifact.mean(1)), st.assign_folds(CATEGORIES))
    assert d_in_sample > 1 and ratio > 1 and abs(held_out.d()) < 0.6


def test_in_sample_scores_do_not_depend_on_the_parts_they_are_read_in():
    rng = np.random.default_rng(0)
    natural, artifact = rng.normal(size=(2, 60, 5)) + [[[1e4]], [[1e4 + 0.7]]]
    direction = artifact.mean(0) - natural.mean(0)
    spread = np.mean([side.std(0, ddof=1).mean() for side in (natural, artifact)])
    expected = st.hedges_d(natural @ direction, artifact @ direction), np.linalg.norm(direction) / np.sqrt(spread)
    for parts in (1, 4):
        blocks = list(zip(np.split(natural, parts), np.split(artifact, parts), strict=True))
        *scores, counts = st.in_sample_scores(lambda blocks=blocks: blocks)
        np.testing.assert_allclose(scores, expected, rtol=1e-9)
        assert counts == (60, 60)


@pytest.mark.parametrize("hidden", [20, 80])
def test_few_and_many_dimensions_give_what_the_definition_gives(hidden):
    """40 pairs: products of [pairs, pairs] or of [pairs, hidden], whichever is cheaper."""
    rng = np.random.default_rng(0)
    natural, artifact = rng.normal(size=(2, 40, hidden)) + [[[0.0]], [[0.3]]]
    signs = rng.choice([-1.0, 1.0], (3, 40))
    training = np.arange(40) % 5 != 0
    layer = st.pair_vectors(natural, artifact)
    assert (layer.inner is None) == (hidden < 40)
    centre = (natural + artifact).mean(axis=0) / 2
    for sign, *projections in zip(signs, *st.project(layer, training, signs, np.flatnonzero(~training)), strict=True):
        swapped = [np.where(sign[:, None] > 0, *sides) for sides in ((natural, artifact), (artifact, natural))]
        direction = (swapped[1] - swapped[0])[training].mean(axis=0)
        for side, projection in zip(swapped, projections, strict=True):
            np.testing.assert_allclose(projection, (side[~training] - centre) @ direction, atol=1e-12)


def test_pure_noise_is_significant_at_the_stated_rate_layer_choice_included():
    rng = np.random.default_rng(0)
    collections = 400
    p_values, accuracies = [], []
    for run in range(collections):
        layers = [st.pair_vectors(*rng.normal(size=(2, 50, 32))) for _ in range(6)]
        folds = st.assign_folds(CATEGORIES, run)
        signs = st.sign_flips(np.arange(50), 199, seed=run)
        null = st.best_of([st.sign_flip_d(layer, folds, signs) for layer in layers])
        p_values.append(st.p_value(max(st.held_out_d(g, folds) for g in layers), null))
        if run < 100:
            held_out = [st.held_out_projections(layer, folds) for layer in layers]
            best, _ = st.nested_best_layer(
                held_out, [st.inner_scores(layer, st.inner_folds(folds)) for layer in layers]
            )
            accuracies.append(best.accuracy())
    share = np.mean(np.array(p_values) <= 0.05)
    assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / collections)
    # Uniform: a Kolmogorov-Smirnov distance beyond 1.95 / sqrt(n) has probability 0.001.
    ordered = np.sort(p_values)
    distance = np.abs(ordered - np.arange(1, collections + 1) / collections).max()
    assert distance < 1.95 / np.sqrt(collections)
    # The best layer, chosen inside the folds, is no better than chance.
    assert abs(np.mean(accuracies) - 0.5) < 0.02


def test_gram_projections_equal_the_direct_computation():
    rng = np.random.default_rng(1)
    natural, artifact = rng.normal(size=(2, 20, 7)) + 3
    folds = st.assign_folds(np.zeros(20), 0)
    held_out = st.held_out_projections(st.pair_vectors(natural, artifact), folds)
    signs = rng.choice([-1.0, 1.0], 20)
    for fold in np.unique(folds):
        held = folds == fold
        w = (artifact - natural)[~held].mean(axis=0)
        unit = w / np.linalg.norm(w)
        expected = (artifact[held] - natural[held]) @ unit
        np.testing.assert_allclose(held_out.artifact[held] - held_out.natural[held], expected)
        threshold = ((natural[~held] @ unit).mean() + (artifact[~held] @ unit).mean()) / 2
        np.testing.assert_allclose(held_out.thresholds[held] - held_out.natural[held], threshold - natural[held] @ unit)
        # Flipped signs: the same as computing with the two prompts of those pairs exchanged.
        swap = signs[:, None] < 0
        swapped = st.pair_vectors(np.where(swap, artifact, natural), np.where(swap, natural, artifact))
        for a, b in zip(
            st.project(st.pair_vectors(natural, artifact), ~held, signs), st.project(swapped, ~held), strict=True
        ):
            np.testing.assert_allclose(a, b)


def test_hedges_d_and_auroc_against_their_definitions():
    rng = np.random.default_rng(2)
    natural, artifact = rng.normal(size=12), rng.normal(size=12) + 1
    pooled = np.sqrt((natural.var(ddof=1) + artifact.var(ddof=1)) / 2)
    cohen = (artifact.mean() - natural.mean()) / pooled
    assert st.hedges_d(natural, artifact) == pytest.approx(cohen * (1 - 3 / (4 * 22 - 1)))
    wins = sum((a > n) + 0.5 * (a == n) for a in artifact for n in natural)
    assert st.auroc(natural, artifact) == pytest.approx(wins / 144)
    assert st.auroc(np.zeros(3), np.zeros(4)) == 0.5


def test_scores_do_not_depend_on_scale_shift_or_rotation():
    rng = np.random.default_rng(3)
    natural, artifact = simulate(rng, 1.5, 16)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    folds = st.assign_folds(CATEGORIES)
    plain = st.held_out_projections(st.pair_vectors(natural, artifact), folds)
    moved = st.held_out_projections(st.pair_vectors(5 * natural @ rotation + 100, 5 * artifact @ rotation + 100), folds)
    assert moved.d() == pytest.approx(plain.d())
    assert (moved.accuracy(), moved.auroc()) == (plain.accuracy(), plain.auroc())
    assert moved.separation() == pytest.approx(5 * plain.separation())


def test_folds_never_split_a_pair_and_spread_the_categories():
    folds = st.assign_folds(CATEGORIES, 3)
    for fold in range(5):
        assert np.bincount(CATEGORIES[folds == fold]).tolist() == [2] * 5
    assert len(np.unique(st.assign_folds(np.zeros(10)))) == 2
    with pytest.raises(ValueError, match="at least 4 pairs"):
        st.assign_folds(np.zeros(3))


@pytest.mark.parametrize("hidden", [1, 3])
def test_degenerate_data_gives_defined_results(hidden):
    same = np.ones((10, hidden))
    folds = st.assign_folds(np.zeros(10))
    identical = st.held_out_projections(st.pair_vectors(same, same), folds)
    assert np.isnan(identical.d()) and identical.auroc() == 0.5
    shifted = st.held_out_projections(st.pair_vectors(same, same + 1), folds)
    assert shifted.accuracy() == 1 and shifted.auroc() == 1  # d is not defined: no spread at all
    assert np.isnan(shifted.d()) and np.isnan(Uncertainty(np.arange(10)).intervals(shifted)["cohens_d_ci"]).all()


def test_p_value_counts_itself_and_ties():
    assert st.p_value(5.0, np.r_[5.0, np.zeros(99)]) == 0.01
    assert st.p_value(0.3, np.r_[0.1 + 0.2, 0.3, np.zeros(2)]) == 0.5  # 0.1 + 0.2 > 0.3 in the last bit


@pytest.mark.parametrize("pairs", [4, 6, 9, 10])
def test_p_is_that_of_all_different_flips_and_never_below_its_floor(pairs):
    groups, floor = np.arange(pairs), 2.0 ** -(pairs - 1)
    signs = st.sign_flips(groups, 1000)
    assert len(signs) == 2 ** (pairs - 1) and (signs[0] == 1).all()
    up_to_a_global_swap = {tuple(row * row[-1]) for row in signs}
    assert len(up_to_a_global_swap) == len(signs) and st.smallest_p(groups, 1000) == floor
    rng = np.random.default_rng(pairs)
    natural, artifact = rng.normal(size=(2, pairs, 6)) + np.array([0.0, 30.0])[:, None, None]
    layer, folds = st.pair_vectors(natural, artifact), st.assign_divisions(np.zeros(pairs))
    null = st.sign_flip_d(layer, folds, signs)
    assert st.p_value(null[0], null) == pytest.approx(floor)
    everything_swapped = st.sign_flip_d(layer, folds, -signs)
    np.testing.assert_allclose(everything_swapped, null, rtol=1e-9)


def test_groups_are_never_split_and_swap_together():
    groups = np.repeat(np.arange(12), [5, 1, 1, 3, 1, 1, 2, 1, 1, 1, 4, 1])
    folds = st.assign_divisions(np.zeros(len(groups)), 1, groups)
    assert folds.shape == (10, len(groups))  # fewer than 40 groups: ten divisions
    for division in folds:
        assert all(len(set(division[groups == g])) == 1 for g in range(12))
        assert np.ptp(np.bincount([division[groups == g][0] for g in range(12)])) <= 1
    signs = st.sign_flips(groups, 100)
    assert all((np.ptp(signs[:, groups == g], axis=1) == 0).all() for g in range(12))
    with pytest.raises(ValueError, match="4 independent groups of pairs, there are 3"):
        st.assign_folds(np.zeros(30), groups=np.arange(30) % 3)


def test_copied_noise_separates_no_more_often_than_stated():
    """Ten pairs of noise, each five times: without groups d = 1.8 and p = 0.001."""
    rng, runs, found, groups = np.random.default_rng(0), 100, 0, np.arange(50) % 10
    for run in range(runs):
        layer = st.pair_vectors(*np.tile(rng.normal(size=(2, 10, 16)), (1, 5, 1)))
        folds, signs = st.assign_divisions(np.zeros(50), run, groups), st.sign_flips(groups, 200, run)
        null = st.sign_flip_d(layer, folds, signs)
        found += st.p_value(null[0], null) <= 0.05
    assert found <= 12  # at a rate of 5% more come about once in 500


def test_one_prompt_far_from_all_others_is_named():
    rng = np.random.default_rng(0)
    natural, artifact = rng.normal(size=(2, 50, 64))
    assert st.outlying_prompts(natural, artifact) == []
    artifact[7] *= 100
    (outlier,) = st.outlying_prompts(natural, artifact)
    assert (outlier["pair"], outlier["side"]) == (7, "artifact") and outlier["deviations"] > 100


@pytest.mark.parametrize("pairs, hidden", [(30, 8), (6, 40)])
def test_the_leading_orthogonal_component_is_that_of_an_svd(pairs, hidden):
    rng = np.random.default_rng(0)
    natural, artifact = rng.normal(size=(2, pairs, hidden))
    artifact[:, 0] += 5
    found = st.leading_orthogonal_component(natural, artifact)
    stacked = np.concatenate([natural, artifact])
    direction = artifact.mean(axis=0) - natural.mean(axis=0)
    direction /= np.linalg.norm(direction)
    rest = stacked - stacked.mean(axis=0)
    rest -= np.outer(rest @ direction, direction)
    leading = np.linalg.svd(rest)[2][0]
    expected = (rest @ leading).reshape(2, pairs).T
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    assert abs(found[:, 0].mean() - found[:, 1].mean()) < 1e-8  # nothing of the mean difference is left in it
    assert (st.leading_orthogonal_component(np.ones((3, 2)), np.ones((3, 2))) == 0).all()


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_variance_of_groups_is_not_too_small(correlation):
    """Unequal groups whose members are alike: the plain variance is too small, this one and the share are right."""
    rng, groups = np.random.default_rng(0), np.repeat([0, 1, 2, 3, 4, 5], [9, 5, 3, 1, 1, 1])
    x = np.sqrt(correlation) * rng.normal(size=(4000, 6))[:, groups]
    x += np.sqrt(1 - correlation) * rng.normal(size=(4000, 20))
    x -= x.mean(axis=1, keepdims=True)
    variance, freedom, share = st.variance([x], groups)
    # Around a mean that large groups draw to themselves a sixth is missing at the most.
    assert variance.mean() == pytest.approx(1, abs=0.17) and variance.mean() >= x.var(axis=1, ddof=1).mean() - 0.01
    assert abs(np.median(share) - correlation) < 0.2 and freedom.min() >= 1 and freedom.max() <= 19.01
    singles, plain, none = st.variance([x], np.arange(20))
    assert singles == pytest.approx(x.var(axis=1, ddof=1)) and (plain, none) == (19, 0)
