"""What words and lengths give, and that strong learners are what they are called."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from alignment_artifacts import separation as st
from alignment_artifacts.analysis import analyse
from alignment_artifacts.baselines import discriminant, held_out_by_fold, held_out_texts
from alignment_artifacts.intervals import robust_sd
from alignment_artifacts.pairs import Pair
from benchmarks.simulated_errors import CASES

from .test_analysis import SETTINGS, simulate


@pytest.mark.parametrize("n, hidden", [(30, 200), (200, 30)])
def test_lda_is_scikit_learns_with_fewer_and_with_more_vectors_than_dimensions(n, hidden):
    rng = np.random.default_rng(0)
    scale = np.linspace(0.1, 3, hidden)
    natural, artifact = rng.normal(size=(2, n, hidden)) * scale
    artifact += 0.3
    labels = np.repeat([0, 1], n)
    # scikit-learn standardises before it shrinks: given its own coordinates it does the same as we do.
    both = np.concatenate([natural, artifact])
    centred = both - np.concatenate([np.tile(side.mean(axis=0), (n, 1)) for side in (natural, artifact)])
    both = both / centred.std(axis=0)
    expected = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(both, labels).coef_[0]
    layer = st.pair_vectors(both[:n], both[n:])
    direction = discriminant(layer, np.ones(n, bool)).sources.mean(axis=0)
    cosine = direction @ expected / np.linalg.norm(direction) / np.linalg.norm(expected)
    assert cosine > 0.999


def test_controls_at_the_layers_of_the_folds_cover_the_truth_and_one_layer_that_saw_all_pairs_would_not():
    """26 equal layers; lengths that say nothing: with and without them d is that of the directions learnt."""
    cases = [CASES["length and LDA, 26 equal layers, d = 2"](np.random.default_rng(i), i) for i in range(7)]
    assert np.mean([case["covers"] for case in cases]) >= 0.7  # seven runs of two controls that go together
    assert abs(np.mean([case["bias nested"] for case in cases])) < 0.25  # it was 0.5


def test_without_anything_else_learnt_a_fold_is_scored_as_a_layer_is():
    vectors, groups = np.random.default_rng(0).normal(size=(30, 2, 3, 8)), np.arange(30)
    folds, signs = st.assign_divisions(np.arange(30) % 5), st.sign_flips(groups, 150)
    layer = st.pair_vectors(vectors[:, 0, 1], vectors[:, 1, 1])
    expected = st.held_out_projections(layer, folds)
    ones = [1] * len(st.each_fold(folds))
    held_out, spread = held_out_by_fold(vectors, folds, ones, groups, signs, lambda layer, training: layer)
    assert held_out.d() == pytest.approx(expected.d()) and held_out.accuracy() == pytest.approx(expected.accuracy())
    assert spread == pytest.approx(robust_sd(st.sign_flip_d(layer, folds, signs)[1:]))


def test_texts_that_differ_in_a_word_are_told_apart_and_equal_ones_are_not():
    groups = np.arange(20)
    folds, signs = st.assign_divisions(np.zeros(20)), st.sign_flips(groups, 50)

    def held_out(texts):
        return held_out_texts(texts, folds, groups, signs)[0]

    assert held_out([(f"grow plant{i}", f"break plant{i}") for i in range(20)]).accuracy() == 1
    same = held_out([(f"grow plant{i}", f"grow plant{i}") for i in range(20)])
    assert np.isnan(same.d()) or abs(same.d()) < 1e-9
    assert held_out([("?", "!")] * 20).auroc() == 0.5  # no words at all


def test_the_spread_of_texts_over_swaps_is_that_of_texts_that_are_learnt_anew():
    rng, groups = np.random.default_rng(0), np.arange(40)
    folds, signs = st.assign_divisions(np.zeros(40)), st.sign_flips(groups, 12)
    texts = [tuple(" ".join(f"w{k}" for k in rng.integers(0, 30, 8)) for _ in range(2)) for _ in range(40)]
    anew = []
    for flip in signs[1:]:
        swapped = [pair[::-1] if sign < 0 else pair for pair, sign in zip(texts, flip, strict=True)]
        anew.append(held_out_texts(swapped, folds, groups, signs[:2])[0].d())
    assert held_out_texts(texts, folds, groups, signs)[1] == pytest.approx(robust_sd(np.array(anew)))


def test_length_that_separates_is_said_first_and_regressed_out():
    data = simulate(effect=0.0)
    rng = np.random.default_rng(0)
    data.prompt_lengths = rng.integers(8, 12, (50, 2)) + np.array([0, 10])
    data.values[..., 0] += data.prompt_lengths[:, :, None, None]  # activations know lengths, and nothing else
    result = analyse(data, SETTINGS, {})
    assert result["summary"].startswith("The number of tokens alone tells the prompts apart")
    assert result["length_baseline"]["cohens_d"] > 3
    control = result["controls"]["prompt_end"]
    assert result["layer_scores_prompt_end"]["2"]["cohens_d"] > 3 > 1 > abs(control["length_regressed"]["cohens_d"])


def test_equal_lengths_are_not_mentioned():
    data = simulate(effect=3.0)
    data.prompt_lengths = np.random.default_rng(0).integers(8, 20, (50, 2))
    result = analyse(data, SETTINGS, {})
    assert "number of tokens" not in result["summary"] and result["length_baseline"]["p_value"] > 0.05


def test_the_strongest_model_of_words_counts():
    data = simulate(effect=3.0)
    data.pairs[:] = [Pair(p.id, p.category, f"grow {p.natural}", f"break {p.artifact}") for p in data.pairs]
    result = analyse(data, SETTINGS, {})
    assert set(result["word_baselines"]) == {"tf-idf", "mean difference", "lda"}
    # Two words without any spread: d is not defined, and nothing can be stronger.
    strongest = result["lexical_baseline"]
    assert strongest["kind"] == "tf-idf" and strongest["cohens_d"] is None and strongest["accuracy"] == 1
    assert "no evidence of anything but words" in result["summary"]
