"""What words and lengths give, and that strong learners are what they are called."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from alignment_artifacts import separation as st
from alignment_artifacts.analysis import analyse
from alignment_artifacts.baselines import held_out_along, held_out_texts, lda_direction, mean_difference
from alignment_artifacts.pairs import Pair

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
    direction = lda_direction(both[:n], both[n:])
    cosine = direction @ expected / np.linalg.norm(direction) / np.linalg.norm(expected)
    assert cosine > 0.999


def test_the_mean_difference_is_what_layers_are_scored_with():
    vectors = np.random.default_rng(0).normal(size=(30, 2, 8))
    folds = st.assign_divisions(np.arange(30) % 5)
    expected = st.held_out_projections(st.pair_vectors(vectors[:, 0], vectors[:, 1]), folds)
    along = held_out_along(vectors, folds, mean_difference)
    assert along.d() == pytest.approx(expected.d()) and along.accuracy() == pytest.approx(expected.accuracy())


def test_texts_that_differ_in_a_word_are_told_apart_and_equal_ones_are_not():
    folds = st.assign_divisions(np.zeros(20))
    assert held_out_texts([(f"grow plant{i}", f"break plant{i}") for i in range(20)], folds).accuracy() == 1
    same = held_out_texts([(f"grow plant{i}", f"grow plant{i}") for i in range(20)], folds)
    assert np.isnan(same.d()) or abs(same.d()) < 1e-9
    assert held_out_texts([("?", "!")] * 20, folds).auroc() == 0.5  # no words at all


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
