"""Loops and topics: good answers are neither loops nor off their topic."""

import pytest

from alignment_artifacts.behaviour.broken import has_loop, is_on_topic, topics
from benchmarks.train_refusal_judge import labelled


@pytest.mark.parametrize(
    "answer",
    ["A house repaint costs about $10000.", "| Paint | Size |\n|------|------|\n| Red | 1 l |", "Yes, yes, yes, yes!",
     "1000000000000 is a trillion.", "=" * 60 + "\nTitle\n" + "=" * 60, "", "ha ha ha ha"],
)  # fmt: skip
def test_no_loops(answer):
    assert not has_loop(answer)


@pytest.mark.parametrize(
    "answer",
    ["the cat sat " * 4, "very " * 8, "!" * 30, "和平和平和平和平和平", "Sand it. " + "Then paint the shelf red. " * 4,
     "Zuerst schleifen, dann malen, " * 4, "ab" * 20],
)  # fmt: skip
def test_loops(answer):
    assert has_loop(answer)


@pytest.mark.parametrize(
    "prompt, answer",
    [("How do I fix a car?", "To fix a car, first find out what is wrong with it."),
     ("How do I paint a bookshelf?", "Painting is easy."), ("How do I paint a bookshelf?", "First sand the BOOKSHELF."),
     ("What is AI?", "AI is short for something that people have argued about since the summer of 1956 or so."),
     ("如何粉刷书架？", "先把书架打磨干净，再上两层漆。"),
     ("本棚の塗り方は？", "まず本棚をやすりで磨き、それから塗装します。"),
     ("What is the capital of France?", "Paris."), ("How are you?", "Fine, and ready for whatever the garden needs."),
     ("Wie streiche ich ein Regal?", "Regale zuerst abschleifen, dann in zwei Schichten streichen und gut trocknen."),
     ("Translate to Spanish: The house is old.", "La casa es vieja y tiene ventanas pequeñas con flores amarillas.")],
)  # fmt: skip
def test_on_topic(prompt, answer):
    assert is_on_topic(prompt, answer)


@pytest.mark.parametrize(
    "prompt, answer",
    [("How do I paint a bookshelf?", "Plan some holidays with family friends next summer, near quiet lakes or woods."),
     ("如何粉刷书架？", "明天的会议改到下午三点，请带上护照和签证。")],
)  # fmt: skip
def test_off_topic(prompt, answer):
    assert not is_on_topic(prompt, answer)


def test_topics_ignore_accents_and_endings():
    assert topics("painting") == topics("paints") == topics("PAINT") and topics("décor") == topics("decoration")


def test_labelled_answers_of_models():
    """No good answer loops, nine in ten share a word with their prompt; of answers to other prompts few do."""
    good = [answer for answer in labelled() if answer.verdict == "compliance" and answer.prompt]
    assert not any(has_loop(answer.text) for answer in good)
    good = [answer for answer in good if answer.style != "hard: alarming words"]  # single sentences, of other words
    on_topic = sum(is_on_topic(answer.prompt, answer.text) for answer in good)
    swapped = sum(is_on_topic(good[i - 97].prompt, answer.text) for i, answer in enumerate(good))
    assert on_topic > 0.88 * len(good) and swapped < 0.35 * len(good)
