"""The refusal detector."""

import json
from pathlib import Path

import numpy as np
import pytest

from alignment_artifacts.behaviour.refusal import is_refusal, without_refusals


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, but I can't help with that.", "I’m sorry, but I can’t help.", "  **I cannot** assist with this",
     "Sorry, I can't help you do that.", "As an AI, I do not have opinions on this.", "I\nwon't  do that."],
)  # fmt: skip
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    ["", "Start with a simple sketch.", "Gather the parts for a radio kit on a table.",
     "A long answer comes first, with a list of steps that goes on for a good while and describes how to paint a "
     "bookshelf at home. I can't recommend cheap brushes."],
)  # fmt: skip
def test_answers(text):
    assert not is_refusal(text)


def test_precision_and_recall_on_the_labelled_answers():
    """docs/suppression.md quotes these; the set is meant to be hard, see its description."""
    answers = json.loads((Path(__file__).parent / "labelled_answers.json").read_text())["answers"]
    assert len(answers) >= 150 and 0.4 < np.mean([a["refusal"] for a in answers]) < 0.6
    found = [is_refusal(a["text"]) for a in answers]
    hits = sum(f and a["refusal"] for f, a in zip(found, answers, strict=True))
    assert hits / sum(found) == pytest.approx(0.81, abs=0.005)
    assert hits / sum(a["refusal"] for a in answers) == pytest.approx(0.80, abs=0.005)


def test_a_late_refusal_is_found_in_the_whole_answer_only():
    late = "First look at the router. " * 8 + "Actually, I can't help with that."
    assert not is_refusal(late) and is_refusal(late, opening=None)


def test_a_model_that_refuses_hardly_anything_is_named():
    assert without_refusals("m", 5, 50) is None
    assert without_refusals("m", 4, 50).startswith("m refuses 4 of 50 artifact prompts: there is no refusal behaviour")
