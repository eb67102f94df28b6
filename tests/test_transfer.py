"""Cross-decoding on simulated contrasts: what transfers, what does not, and what is said of it."""

from copy import deepcopy

import numpy as np
import pytest

from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.comparison.transfer import WORDS, contrasts_of, cross_decoding, decode, summarise
from alignment_artifacts.pairs import SIDES, Pair
from alignment_artifacts.scores import Settings, score_layers

PAIRS, TWINS = contrasts_of(SIDES)
THERE, BACK = f"{PAIRS} -> {TWINS}", f"{TWINS} -> {PAIRS}"
SETTINGS = Settings(permutations=99, resamples=200)
CATEGORIES = np.array([f"c{i % 5}" for i in range(50)])
NAMES = {"a": "before", "b": "after", "words": WORDS}


def prompts(kind, number, words=("?", "!"), categories=5):
    """Pairs that share no prompt and no word but these."""
    return [
        Pair(f"{kind}{i}", f"c{i % categories}", f"{kind}{i}n {words[0]}", f"{kind}{i}a {words[1]}")
        for i in range(number)
    ]


def decoded(pairs, twins, models, embeddings=None, settings=SETTINGS):
    embeddings = np.random.default_rng(9).normal(size=(*models["b"].shape[:2], 4)) if embeddings is None else embeddings
    return cross_decoding(models, embeddings, pairs, twins, settings)


def simulate(alignment, words, seed=0, layers=3, hidden=16):
    """Pairs differ along axis 0 (alignment) and axis 1 (words), twins along axis 0 alone; at layer 1."""
    values = np.random.default_rng(seed).normal(size=(90, 2, layers, hidden))
    values[:, 1, 1, 0] += alignment
    values[:50, 1, 1, 1] += words
    return values


def test_alignment_transfers_and_words_do_not():
    sources = decoded(prompts("p", 50), prompts("t", 40), {"a": simulate(0, 3), "b": simulate(3, 0)})
    wordy, aligned = sources["a"], sources["b"]
    for cell in (THERE, BACK, f"{PAIRS} -> {PAIRS}", f"{TWINS} -> {TWINS}"):
        low, high = aligned[cell]["cohens_d_ci"]
        assert low > 1.2 and low < aligned[cell]["cohens_d"] < high and aligned[cell]["accuracy"] > 0.8
        assert set(aligned[cell]["layers"]) == {1}
    assert wordy[f"{PAIRS} -> {PAIRS}"]["cohens_d"] > 2
    assert abs(wordy[THERE]["cohens_d"]) < 0.8
    assert abs(wordy[BACK]["cohens_d"]) < 1.5  # learnt from noise
    assert summarise(sources, NAMES).count("which words do not explain") == 2
    text = summarise({**sources, "b": wordy}, NAMES)
    assert text.startswith("Learnt on natural/artifact pairs, after's") and "it does not carry over;" in text


def test_words_that_tell_as_much_may_be_all_that_a_direction_knows():
    """A verdict needs the paired difference: of a d and a lower end of nearly its size it would be luck."""
    aligned = simulate(3, 0)
    noisy = 0.9 * aligned[:, :, 1] + 0.1 * np.random.default_rng(1).normal(size=aligned[:, :, 1].shape)
    sources = decoded(prompts("p", 50), prompts("t", 40), {"a": aligned, "b": aligned}, noisy)
    for cell in (THERE, BACK):
        beyond = sources["b"][cell]["beyond_words"]
        assert abs(beyond["difference"]) < 0.5 and beyond["difference_ci"][0] < 0 < beyond["difference_ci"][1]
    assert summarise(sources, NAMES).count("it may only know words") == 2
    weaker = deepcopy(sources)
    weaker["words"][THERE]["cohens_d"] = 0.1  # what stands beside it is not what decides
    assert summarise(weaker, NAMES).count("it may only know words") == 2


def test_the_strongest_model_of_words_counts_and_is_named():
    """Verbs that mean embeddings cannot see; and an axis of embeddings among louder ones, which only LDA finds."""
    values = simulate(1, 0)
    verbs = [prompts(kind, number, ("grow", "break")) for kind, number in (("p", 50), ("t", 40))]
    by_words = decoded(*verbs, {"b": values})["words"]
    assert {by_words[cell]["kind"] for cell in (THERE, BACK, f"{PAIRS} -> {PAIRS}")} == {"tf-idf"}
    assert min(by_words[cell]["accuracy"] for cell in (THERE, BACK)) == 1
    embeddings = np.random.default_rng(0).normal(size=(90, 2, 4)) * [3, 3, 3, 0.5]
    embeddings[:, 1, 3] += 1
    sources = decoded(prompts("p", 50), prompts("t", 40), {"a": values, "b": values}, embeddings)
    words = sources["words"][THERE]
    assert words["kind"] == "lda" and words["cohens_d"] > 1
    assert f"{WORDS} (lda) {words['cohens_d']:.1f}" in summarise(sources, NAMES)


QUICK = Settings(permutations=9, resamples=20)


def test_what_is_tested_was_never_learnt_from():
    """Pure noise; every twin's artifact prompt is that of a pair, in other letters."""
    pairs = prompts("p", 60)
    twins = [Pair(f"t{i}", pair.category, f"t{i}n", pair.artifact.upper() + ".") for i, pair in enumerate(pairs[:40])]
    found = []
    for seed in range(4):
        values = np.random.default_rng(seed).normal(size=(100, 2, 2, 200))
        values[60:, 1] = values[:40, 1]
        records = decoded(pairs, twins, {"b": values}, settings=QUICK)["b"]
        found += [records[cell] for cell in (THERE, BACK)]
    assert abs(np.mean([r["cohens_d"] for r in found])) < 0.25  # learnt from what is tested: about 1
    assert sum(r["cohens_d_ci"][0] <= 0 <= r["cohens_d_ci"][1] for r in found) >= 7


def test_a_category_is_not_learnt_from_pairs_that_share_its_prompts():
    """Pure noise; five artifact prompts, one a category, for each natural prompt."""
    pairs = [Pair(f"{i}", f"c{i % 5}", f"n{i // 5}", f"a{i}") for i in range(200)]
    values = np.random.default_rng(0).normal(size=(200, 2, 1, 400))
    values[:, 0] = values[np.arange(200) // 5 * 5, 0]
    records = decoded(pairs, [], {"b": values}, settings=QUICK)["b"]
    d = [records[f"others -> c{i}"]["cohens_d"] for i in range(5)]
    assert abs(np.mean(d)) < 0.3  # learnt from the same natural prompts: above 1


def test_prompts_shared_by_way_of_others_are_not_learnt_from_either():
    """a-b-c: the first pair and the last twin have no prompt in common, but each shares one with the second pair."""
    rows = {"learnt": [], "asked": []}
    pairs = [Pair("1", "c", "x", "y"), Pair("2", "c", "z", "y"), *prompts("p", 20)]
    twins = [Pair("3", "c", "z", "w"), *prompts("t", 10)]
    groups = independent_groups([*pairs, *twins])

    def learn(known, asked):
        rows["learnt"].append(known)
        rows["asked"].append(asked)
        return np.zeros((len(asked), 2)), 0.0

    decode(learn, np.arange(22), np.arange(22, 33), np.arange(11) % 2, groups)
    for known, asked in zip(rows["learnt"], rows["asked"], strict=True):
        assert ({0, 1} <= set(known)) == (22 not in asked) and ({0, 1} & set(known) == set()) == (22 in asked)
    assert sorted(np.concatenate(rows["asked"])) == list(range(22, 33))


def test_within_one_set_it_is_the_analysis_s_best_layer():
    values = np.random.default_rng(2).normal(size=(90, 2, 3, 16))
    values[:, 1, 1, 0] += 2
    own = decoded(prompts("p", 50), prompts("t", 40), {"b": values})["b"][f"{PAIRS} -> {PAIRS}"]
    best = score_layers(values[:50], CATEGORIES, SETTINGS).best_layer
    assert best.pop("layer_chosen_in_each_fold") == own["layers"] and best == {name: own[name] for name in best}


def test_an_effect_of_one_category_fails_on_it_alone():
    values = np.random.default_rng(0).normal(size=(50, 2, 2, 8))
    for number in range(5):  # every category has an axis of its own; the last has nothing else
        values[f"c{number}" == CATEGORIES, 1, 0, number] += 4
    values[CATEGORIES != "c4", 1, 0, 6] += 4
    records = decoded(prompts("p", 50), [], {"b": values})["b"]
    d = {name: records[f"others -> c{name}"]["cohens_d"] for name in range(5)}
    assert min(d[i] for i in range(4)) > 1.5 and abs(d[4]) < 1.2
    assert all(records[f"others -> c{i}"]["num_pairs"] == 10 for i in range(5))


def test_layer_direction_and_threshold_come_from_what_was_learnt_on():
    values = np.random.default_rng(1).normal(size=(80, 2, 3, 8))
    values[:40, 1, 2] += 2.0
    values[40:, 1, 0] += 5.0  # a better layer for what is tested, which must not matter
    values[40:, :, 2] += 9.0  # beyond the threshold of the others
    record = decoded(prompts("p", 40), prompts("t", 40), {"b": values})["b"][THERE]
    assert record["layers"] == [2] and abs(record["cohens_d"]) < 1 and record["accuracy"] == 0.5
    direction = (values[:40, 1, 2] - values[:40, 0, 2]).mean(axis=0)
    shift = ((values[40:, 1, 2] - values[40:, 0, 2]) @ direction).mean()
    assert record["mean_separation_on_axis"] == pytest.approx(shift / (values[:40, :, 2] @ direction).std(0).mean())


def test_folds_may_choose_layers_of_different_scale():
    pairs = prompts("p", 50)
    twins = [Pair(f"t{i}", pair.category, f"t{i}n", pair.artifact) for i, pair in enumerate(pairs[:40])]
    values = np.random.default_rng(3).normal(size=(90, 2, 2, 16))
    values[:, 1, :, 0] += 2
    values[:, :, 1] *= 1000
    record = decoded(pairs, twins, {"b": values}, settings=QUICK)["b"][BACK]
    assert set(record["layers"]) == {0, 1}
    assert record["cohens_d_ci"][0] + 0.3 < record["cohens_d"] < record["cohens_d_ci"][1] - 0.3


def test_a_category_with_one_pair_is_not_tested():
    pairs = [*prompts("p", 20, categories=2), Pair("single", "single", "x", "y")]
    values = np.random.default_rng(0).normal(size=(21, 2, 1, 4))
    records = decoded(pairs, [], {"b": values})["b"]
    assert "others -> c0" in records and "others -> single" not in records
