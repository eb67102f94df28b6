"""Scores of answers: what can be named, what functions of others do, and what is said of them."""

import numpy as np
import pytest

from alignment_artifacts.behaviour.score import REFUSAL, Score, load_score, word_list
from alignment_artifacts.rates import mean
from gemma_refactored.errors import UserError
from toxicity_steering.scorers import rude_words

from .conftest import ROOT

PROMPTS = ["How are you?", "Is it blue?"]


def write(folder, text, name="mine.py"):
    (folder / name).write_text(text)
    return folder / name


def test_refusal_is_built_in_and_a_rate():
    values = load_score("refusal").of(PROMPTS, ["I cannot help with that.", "Yes."])
    assert load_score("refusal") is REFUSAL and values.dtype == bool and values.tolist() == [True, False]


@pytest.mark.parametrize(
    "answer, times",
    [
        ("I agree. You're RIGHT, right?", 3),
        ("disagreement, rights", 0),
        ("", 0),
        ("you’re right", 1),
        ("agree-agree", 2),
    ],
)
def test_words_are_counted_whole(answer, times):
    assert load_score("words:agree, right").of(["?"], [answer]).tolist() == [times]


def test_phrases_win_over_the_words_in_them():
    assert word_list(["you are", "you are right"]).of(["?"], ["You are right"]).tolist() == [1]


def test_a_file_may_import_its_neighbour_and_define_dataclasses(tmp_path):
    write(tmp_path, "WORD = 'blue'", "neighbour_of_a_score.py")
    file = write(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_a_score import WORD\n"
        "@dataclass\nclass A:\n    x: int\n"
        "def blue(prompt, answer):\n    '''Times blue.\n\n    More.'''\n    return A(answer.count(WORD)).x\n",
    )
    score = load_score(f"{file}:blue")
    assert score.of(PROMPTS, ["blue blue", "red"]).tolist() == [2, 0] and score.meaning == "Times blue."


def test_other_text_is_another_score(tmp_path):
    names = set()
    for number in (1, 2):
        file = write(
            tmp_path, f"def one(prompt, answer):\n    return {number}\ndef two(prompt, answer):\n    return 1\n"
        )
        for name in ("one", "two"):
            score = load_score(f"{file}:{name}")
            names.add(score.file_name("sweep", "lower"))
            assert score.file_name("sweep").startswith(f"sweep_{name}_")
    assert len(names) == 4
    assert word_list(["a"]).file_name("x") != word_list(["b"]).file_name("x")


@pytest.mark.parametrize(
    "text, name, message",
    [
        ("def a(p, q): return 1\ndef b(p, q): return 1", ":c", "has no function 'c'; it defines a, b"),
        ("def a(p, q): return 1", "", "needs the name of a function .* it defines a"),
        ("x = 1", ":x", "has no function 'x'; it defines none"),
        ("def a(text): return 1", ":a", "two arguments"),
        ("def a(p, q)\n    return 1", ":a", r"SyntaxError: .*line 1"),
        ("import no_module_of_this_name", ":a", r"ModuleNotFoundError: .*line 1"),
        ("\n\n1 / 0", ":a", r"ZeroDivisionError: .*line 3"),
    ],
)
def test_files_that_hold_no_score_are_refused_in_a_sentence(tmp_path, text, name, message):
    with pytest.raises(UserError, match=message):
        load_score(f"{write(tmp_path, text)}{name}")


def test_toxicity_is_one_of_them():
    texts = ["You stupid worm.", "Hello."]
    for score in (load_score(rude_words), load_score(f"{ROOT}/toxicity_steering/scorers.py:rude_words")):
        assert score.of(PROMPTS, texts).tolist() == [0.75, 0]
    assert "[0, 1]" in load_score("toxicity_steering/scorers.py:toxicity").meaning


@pytest.mark.parametrize("name", ["agreement", "", "file.txt:a", ":a", "words", "/nowhere/mine.py:a"])
def test_names_of_no_score_are_refused(name):
    with pytest.raises(UserError, match="There is no score|cannot be read"):
        load_score(name)
    with pytest.raises(UserError, match="empty"):
        load_score("words: ,")


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), [1.0], 1j])
def test_only_finite_numbers_are_scores(value):
    with pytest.raises(UserError, match=r"of the prompt 'Is it blue\?' is .*finite number"):
        load_score(lambda prompt, answer: value).of(PROMPTS[1:], ["Yes."])


def test_a_function_that_fails_says_where():
    def fails(prompt, answer):
        return {}[answer]

    with pytest.raises(UserError, match=r"score fails fails on the prompt .* KeyError: .*\(line \d+\)"):
        load_score(fails).of(PROMPTS, ["a", "b"])


def test_each_text_is_scored_once_and_numbers_of_numpy_are_numbers():
    calls = []
    score = load_score(lambda prompt, answer: calls.append(answer) or np.float32(len(answer)))
    assert score.of(PROMPTS * 2, ["a", "bb"] * 2).tolist() == [1, 2, 1, 2] and len(calls) == 2
    assert load_score(lambda p, a: np.bool_(a == "a")).of(PROMPTS, ["a", "b"]).dtype == bool


def test_means_and_what_moved():
    score = Score("length", lambda prompt, answer: len(answer), "characters", "")
    compared = score.compared(["?"] * 4, ["aaaa", "aa", "aaa", "a"], ["a", "a", "a", "a"])
    assert compared["score"] == {"mean": 1.0, "n": 4, "ci": None}  # no interval of zero width
    assert compared["moved"]["mean"] == -1.5 and compared["moved"]["ci"][0] < -1.5 < compared["moved"]["ci"][1]


def test_the_mean_of_flags_is_a_rate_and_of_numbers_what_numpy_says():
    assert mean(np.array([True, True]))["ci"][0] < 1 == mean(np.array([True, True]))["mean"]
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = mean(values)["ci"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1) and low < values.mean() < high
    assert mean(np.zeros(0))["mean"] is None
