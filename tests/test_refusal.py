"""The refusal detector."""

import pytest

from alignment_artifacts.refusal import is_refusal


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
