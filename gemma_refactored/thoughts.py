"""Where a thinking model's answer begins: after its thought, whatever the marks are that end it.

The marks come from the chat template: it is given a conversation with a thought in it, and what it writes around that
thought is looked at (Qwen 3, Gemma 4, gpt-oss). Templates that leave thoughts out name their marks nevertheless.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .chat_template import PROBE, ChatFormat, render_messages
from .errors import UserError

THOUGHT_PROBE = "xjq5 thought xjq5"  # a text that no template writes by itself
FIELDS = ("reasoning_content", "reasoning", "thinking")  # of an assistant's message, as templates call it
TAG = re.compile(r"<(think|thinking|thought|reasoning|reflection|seed:think)>")


@dataclass(frozen=True)
class Marks:
    """What a model writes before and after a thought.

    Attributes:
        is_open: the prompt itself begins a thought, so that what the model writes first belongs to it.
    """

    opens: str
    closes: str
    is_open: bool = False


def find_marks(tokenizer, chat_format: ChatFormat) -> Marks | None:
    """The marks of thoughts in a model's chat format; None for a model that does not think."""
    if not tokenizer.chat_template:
        return None
    marks = _written_marks(tokenizer, chat_format) or _named_marks(tokenizer)
    if marks is None:
        return None
    try:
        tail = render_messages(tokenizer, [{"role": "user", "content": PROBE}], chat_format).rpartition(PROBE)[2]
    except UserError:
        return marks
    return replace(marks, is_open=tail.rfind(marks.opens or tail) > tail.rfind(marks.closes))


def _written_marks(tokenizer, chat_format: ChatFormat) -> Marks | None:
    thinking = {"role": "assistant", "content": PROBE, **dict.fromkeys(FIELDS, THOUGHT_PROBE)}
    user = {"role": "user", "content": "Hello"}
    try:
        whole = render_messages(tokenizer, [user, thinking], chat_format, add_generation_prompt=False)
        prompt = render_messages(tokenizer, [user], chat_format)
    except UserError:  # prompts will tell what is wrong with it
        return None
    before, thought, after = whole.partition(THOUGHT_PROBE)
    closes, answer, _ = after.partition(PROBE)
    if not (thought and answer and closes.strip()):
        return None
    opens = before[len(os.path.commonprefix([before, prompt])) :]
    return Marks(opens.strip(), closes.strip())


def _named_marks(tokenizer) -> Marks | None:
    """<think> and </think>, if the template or the vocabulary has both."""
    template = tokenizer.chat_template
    sources = list(template.values()) if isinstance(template, dict) else [template]
    names = [name for text in [*tokenizer.get_added_vocab(), *sources] for name in TAG.findall(text)]
    known = "\n".join([*tokenizer.get_added_vocab(), *sources])
    return next((Marks(f"<{name}>", f"</{name}>") for name in names if f"</{name}>" in known), None)


def answer_text(tokenizer, marks: Marks | None, written: Sequence[int]) -> str | None:
    """The text of an answer without the thought before it; None if the thought did not end."""
    start = answer_start(tokenizer, marks, written)
    return None if start is None else tokenizer.decode(list(written)[start:], skip_special_tokens=True)


def answer_start(tokenizer, marks: Marks | None, written: Sequence[int]) -> int | None:
    """How many of the tokens that a model wrote belong to its thought; None if the thought did not end."""
    if marks is None:
        return 0
    written = list(written)

    def has_closed(count: int, times: int) -> bool:
        return tokenizer.decode(written[:count]).count(marks.closes) >= times

    whole = tokenizer.decode(written)
    if closed := whole.count(marks.closes):
        low, high = 0, len(written)  # fewest tokens with the last closing mark among them
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if has_closed(middle, closed) else (middle + 1, high)
        while low < len(written) and not tokenizer.decode([written[low]]).strip():
            low += 1
        return low
    is_open = marks.is_open or (bool(marks.opens) and whole.lstrip().startswith(marks.opens))
    return None if is_open else 0
