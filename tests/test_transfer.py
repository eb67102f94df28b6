"""Cross-decoding on simulated contrasts: what transfers, what does not, and what is said of it."""

import numpy as np
import pytest

from alignment_artifacts.comparison.transfer import contrasts_of, cross_decoding, decode, summarise
from alignment_artifacts.pairs import SIDES
from alignment_artifacts.scores import Settings, score_layers

PAIRS, TWINS = contrasts_of(SIDES)
SETTINGS = Settings(permutations=99, resamples=200)
CATEGORIES, TWIN_CATEGORIES = np.array([f"c{i % 5}" for i in range(50)]), np.array([f"c{i % 5}" for i in range(25)])
NAMES = {"a": "before", "b": "after", "words": "word embeddings"}


def simulate(alignment, words, seed=0, layers=3, hidden=16):
    """Pairs differ along axis 0 (alignment) and axis 1 (words), twins along axis 0 alone; at layer 1."""
    rng = np.random.default_rng(seed)
    pairs, twins = rng.normal(size=(50, 2, layers, hidden)), rng.normal(size=(25, 2, layers, hidden))
    pairs[:, 1, 1, 0] += alignment
    twins[:, 1, 1, 0] += alignment
    pairs[:, 1, 1, 1] += words
    return cross_decoding(pairs, twins, CATEGORIES, TWIN_CATEGORIES, SETTINGS)


def test_alignment_transfers_and_words_do_not():
    aligned, wordy = simulate(3, 0), simulate(0, 3)
    for cell in (f"{PAIRS} -> {TWINS}", f"{TWINS} -> {PAIRS}", f"{PAIRS} -> {PAIRS}", f"{TWINS} -> {TWINS}"):
        low, high = aligned[cell]["cohens_d_ci"]
        assert low > 1.2 and low < aligned[cell]["cohens_d"] < high and aligned[cell]["accuracy"] > 0.8
        assert set(aligned[cell]["layers"]) == {1}
    assert wordy[f"{PAIRS} -> {PAIRS}"]["cohens_d"] > 2
    assert abs(wordy[f"{PAIRS} -> {TWINS}"]["cohens_d"]) < 0.8
    assert abs(wordy[f"{TWINS} -> {PAIRS}"]["cohens_d"]) < 1.5  # learnt from noise
    both = {"a": wordy, "b": aligned, "words": wordy}
    assert summarise(both, NAMES).count("which words do not explain") == 2
    assert summarise({**both, "words": aligned}, NAMES).count("it may only know words") == 2
    text = summarise({**both, "b": wordy}, NAMES)
    assert text.startswith("Learnt on natural/artifact pairs, after's") and "it does not carry over;" in text


def test_within_one_set_it_is_the_analysis_s_best_layer():
    rng = np.random.default_rng(2)
    pairs = rng.normal(size=(50, 2, 3, 16))
    pairs[:, 1, 1, 0] += 2
    own = cross_decoding(pairs, pairs[:25], CATEGORIES, TWIN_CATEGORIES, SETTINGS)[f"{PAIRS} -> {PAIRS}"]
    best = score_layers(pairs, CATEGORIES, SETTINGS).best_layer
    assert best.pop("layer_chosen_in_each_fold") == own["layers"] and best == {name: own[name] for name in best}


def test_an_effect_of_one_category_fails_on_it_alone():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(50, 2, 2, 8))
    for number in range(5):  # every category has an axis of its own; the last has nothing else
        pairs[f"c{number}" == CATEGORIES, 1, 0, number] += 4
    pairs[CATEGORIES != "c4", 1, 0, 6] += 4
    records = cross_decoding(pairs, pairs[:25], CATEGORIES, TWIN_CATEGORIES, SETTINGS)
    d = {name: records[f"others -> c{name}"]["cohens_d"] for name in range(5)}
    assert min(d[i] for i in range(4)) > 1.5 and abs(d[4]) < 1.2
    assert all(records[f"others -> c{i}"]["num_pairs"] == 10 for i in range(5))


def test_layer_direction_and_threshold_come_from_what_was_learnt_on():
    rng = np.random.default_rng(1)
    training, tested = rng.normal(size=(2, 40, 2, 3, 8))
    training[:, 1, 2] += 2.0
    tested[:, 1, 0] += 5.0  # a better layer for what is tested, which must not matter
    projected, layers = decode(training, np.arange(40) % 4, tested, np.arange(len(tested)))
    assert layers == [2] and abs(projected.d()) < 1
    direction = (training[:, 1, 2] - training[:, 0, 2]).mean(axis=0)
    direction /= np.linalg.norm(direction)
    np.testing.assert_allclose(projected.natural, tested[:, 0, 2] @ direction)
    assert projected.thresholds[0] == pytest.approx((training[:, :, 2] @ direction).mean())


def test_a_category_with_one_pair_is_not_tested():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(21, 2, 1, 4))
    categories = np.array(["a", "b"] * 10 + ["single"])
    records = cross_decoding(pairs, pairs[:10], categories, categories[:10], SETTINGS)
    assert "others -> a" in records and "others -> single" not in records
