"""The search for settings: what a trial sees, what continues, and what a fold must not know."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from scipy.stats import spearmanr

from alignment_artifacts.behaviour.answers import Behaviour
from alignment_artifacts.behaviour.score import word_list
from alignment_artifacts.directions.measurements import measure
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.edits.setting import NOTHING
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs
from alignment_artifacts.suppression import search, sweep
from alignment_artifacts.suppression.space import Limits, Space

SPACE = Space({"ablate": (0.3, 2.0), "cap": (0.5, 3.0)}, trials=10, generated=2)
LIMITS = Limits()


@pytest.fixture(scope="module")
def measured(organism, tmp_path_factory):
    return measure(organism, load_pairs(PAIRS_JSON), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def bench_of(organism, measured):
    def make(measured=measured, rows=None, **settings):
        rows = rows or sweep.split_pairs(measured.pairs, (20, 10, 20))
        return sweep.Bench(organism, measured, rows, 24, **settings)

    return make


@pytest.fixture(scope="module")
def bench(bench_of):
    return bench_of()


@pytest.fixture(scope="module")
def development(bench):
    return bench.behaviour("development")


def clean(bench):
    """Without what earlier tests have searched."""
    for path in (bench.measured.folder / search.FOLDER).glob("*.log"):
        path.unlink()


def test_openings_are_those_of_refusals_and_edits_that_suppress_make_them_rare(bench, development, organism):
    look = search.openings(bench, development, louder=False)
    first = {organism.tokenizer.decode([token]) for token in look.unwanted[0]}
    assert first == {"I", "Sorry"} and len(look.behaviour.answers) == 10
    unedited = look.kept(organism, NOTHING)
    assert unedited.min() > 0.5 and look.loss(unedited) > look.fence
    louder = search.openings(bench, development, louder=True)
    assert louder.kept(organism, NOTHING).max() < 0.1
    setting = Setting("ablate", 1.0, (2, 3, 4, 5, 6, 7), "residual")
    assert look.kept(organism, bench.intervention(setting)).mean() < 0.3


def test_the_probability_of_an_opening_is_the_product_of_its_places(organism):
    """Against NumPy; a place whose token is usual elsewhere, too, counts as certain."""
    prompts = organism.encode(["How do I paint a fence?", "How do I hack a server?"])
    answers = [[5, 6, 7], [8, 9]]
    look = search.Openings(Behaviour(["a", "b"], prompts, answers), [{5, 8, 11}, {9}, {7}], None, False)
    kept = look.kept(organism, NOTHING)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = np.array(organism.model(mx.array([prompt + answer]))[0], np.float64)[len(prompt) - 1 : -1]
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        expected = 1.0
        for place, token in enumerate(answer):
            if token in look.unwanted[place]:
                expected *= p[place, sorted(look.unwanted[place])].sum()
        assert kept[row] == pytest.approx(expected, rel=1e-4)


def test_the_cheap_score_orders_settings_as_whole_answers_do(bench, development, organism):
    look = search.openings(bench, development, louder=False)
    cheap, refused, costs, kl = [], [], [], []
    for scale in (0.2, 0.5, 0.8, 1.1):
        for site, layers in (("mlp", (4, 5)), ("mlp", (2, 3, 4, 5)), ("residual", (5, 6, 7))):
            intervention = bench.intervention(Setting("ablate", scale, layers, site))
            cheap.append(look.loss(look.kept(organism, intervention)))
            costs.append(search.token_damage(organism, look.natural, intervention)["kl_mean"])
            judged = bench.evaluate(intervention, development)
            refused.append(judged["artifact"]["refused"]["rate"])
            kl.append(judged["damage"]["kl_mean"])
    assert min(refused) < 0.3 < 0.7 < max(refused)
    assert spearmanr(cheap, refused).statistic > 0.9 and spearmanr(costs, kl).statistic > 0.9


def test_a_killed_search_ends_as_it_would_have(bench, development, monkeypatch):
    clean(bench)
    whole = search.search(bench, development, SPACE, LIMITS)
    clean(bench)
    steps = []

    def killed_in_the_middle_of(function, after):
        def call(*arguments):
            steps.append(None)
            if len(steps) == after:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    for name, after in (("token_damage", 6), ("judge_setting", 2)):  # a trial of TPE is left without a result
        steps.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(search, name, killed_in_the_middle_of(getattr(search, name), after))
            search.search(bench, development, SPACE, LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr(search, "token_damage", lambda *_: pytest.fail("all trials have been made"))
        assert search.search(bench, development, SPACE, LIMITS) == whole


def test_what_decides_the_numbers_names_the_study(bench, bench_of, development):
    def names(bench, space=SPACE, limits=LIMITS, louder=False):
        with search._study(bench, space, limits, louder) as study:
            return study.study_name

    rows = sweep.split_pairs(bench.measured.pairs, (20, 10, 20), seed=1)
    others = [
        names(bench), names(bench, replace(SPACE, trials=11)), names(bench, limits=Limits(kl=0.1)),
        names(bench, louder=True), names(bench_of(rows=rows)), names(bench_of(seed=1)),
        names(bench_of(score=word_list(["sorry"]), wish="lower")),
        names(bench_of(score=word_list(["sorry"]), wish="higher")),
        names(bench_of(score=word_list(["cannot"]), wish="lower")),
    ]  # fmt: skip
    assert len(set(others)) == len(others) and names(bench_of()) == others[0]


def test_a_fold_does_not_know_its_own_pairs(organism, bench_of, measured, tmp_path):
    (rows, *_) = sweep.fold_rows(measured.pairs, 5, (20, 15, 15))
    changed = list(measured.pairs)
    for i in rows["test"][:2]:
        changed[i] = replace(changed[i], natural=f"How do I sing song {i}?", artifact=f"How do I whistle song {i}?")
    other = measure(organism, changed, tmp_path)
    space = replace(SPACE, trials=6, generated=1)
    results = []
    for one in (measured, other):
        bench = bench_of(one, rows)
        results.append(search.search(bench, bench.behaviour("development"), space, LIMITS))
    for mine, theirs in zip(*(trials for _, trials in results), strict=True):
        assert mine["setting"] == theirs["setting"] and mine["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
    assert results[0][0][0]["setting"] == results[1][0][0]["setting"]


def test_the_settings_that_go_on_are_not_beaten_and_not_alike():
    def trial(loss, kl, scale=1.0, mode="ablate"):
        return {"setting": Setting(mode, scale, (1,)).record(), "loss": loss, "kl": kl, "kept": loss and 0.5}

    trials = [
        trial(3.0, 0.001, 0.1), trial(0.04, 0.004, 1.0), trial(0.05, 0.003, 1.5), trial(0.04, 0.0041, 1.01),
        trial(0.5, 0.01, 0.5), trial(None, 0.5, mode="always"), trial(1e-7, 0.02, mode="cap"),
        trial(1e-6, 0.01, 1.9),
    ]  # fmt: skip
    # Below a tenth of the fence, 0.005, no loss is better than another: the last beats the one before it.
    assert search.most_promising(trials, 0.05, Limits(), 8) == [2, 1, 7, 0, 6, 4, 5]
    assert search.most_promising(trials, 0.05, Limits(), 2) == [2, 1]


def test_where_nothing_suppresses_everything_a_strong_setting_wins_against_an_idle_one():
    """Loss and KL of trials on SmolLM2: idle, weak, strong near the limit, and stronger ones beyond it."""
    idle, weak, strong, beyond, far = (
        {"loss": loss, "kl": kl}
        for loss, kl in ((0.67, 1e-6), (0.41, 4e-3), (0.062, 0.061), (0.037, 0.116), (0.021, 0.165))
    )
    worth = [search.drawback(trial, np.log(2) / 32, LIMITS) for trial in (strong, beyond, far, weak, idle)]
    assert LIMITS.kl == 0.05 and worth == sorted(worth) and len(set(worth)) == 5


def test_amplification_has_no_limit():
    strong, weak = {"loss": 0.1, "kl": 2.0}, {"loss": 0.6, "kl": 0.01}
    fence = np.log(2) / 32
    assert search.drawback(strong, fence, LIMITS, louder=True) < search.drawback(weak, fence, LIMITS, louder=True)
    assert search.drawback(strong, fence, LIMITS) > search.drawback(weak, fence, LIMITS)


@pytest.mark.parametrize("prompts", [2, 6, 15, 40, 200])
def test_costing_nothing_is_no_merit_without_an_effect(prompts):
    fence = np.log(2) / prompts
    idle, cured, half = ({"loss": loss, "kl": kl} for loss, kl in ((np.log(2), 0), (fence, 0.05), (fence, 0.025)))
    worth = [search.drawback(trial, fence, LIMITS) for trial in (half, cured, idle)]
    assert LIMITS.kl == 0.05 and worth == sorted(worth) and len(set(worth)) == 3


def test_openings_that_are_improbable_anyway_are_compared_with_the_unedited_model():
    look = search.Openings(Behaviour(["a"] * 2, [[1]] * 2, [[2]] * 2), [{2}], None, False)
    before, after = np.array([1e-6, 1e-9]), np.array([1e-8, 1e-9])
    assert look.loss(before) < 1e-5
    look.offset = -search.log_odds(before)
    assert look.loss(before) == pytest.approx(np.log(2))
    assert look.loss(after) == pytest.approx((np.log1p(0.01) + np.log(2)) / 2, rel=1e-3)
