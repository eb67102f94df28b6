"""Where a thinking model's answer begins, with templates in the manner of Qwen 3, DeepSeek R1 and gpt-oss."""

import pytest

from gemma_refactored.chat_template import ChatFormat
from gemma_refactored.prompt_processing import encode_prompts
from gemma_refactored.thoughts import Marks, answer_start, answer_text, find_marks

QWEN = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{% if m.reasoning_content is string %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEEPSEEK = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>{{ m.role }}<|channel|>final<|message|>{{ m.content }}<|return|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TEMPLATES = {"qwen": QWEN, "deepseek": DEEPSEEK, "gpt-oss": GPT_OSS}


@pytest.fixture
def tokenizer(organism, monkeypatch):
    def with_template(name):
        monkeypatch.setattr(organism.tokenizer, "chat_template", TEMPLATES[name])
        return organism.tokenizer

    return with_template


def test_marks_come_from_the_template(tokenizer, organism):
    assert find_marks(organism.tokenizer, ChatFormat()) is None and organism.thought_marks is None
    assert find_marks(tokenizer("qwen"), ChatFormat()) == Marks("<think>", "</think>", False)
    assert find_marks(tokenizer("deepseek"), ChatFormat()) == Marks("<think>", "</think>", True)
    marks = find_marks(tokenizer("gpt-oss"), ChatFormat())
    assert (
        marks.opens.endswith("analysis<|message|>") and marks.closes.endswith("final<|message|>") and not marks.is_open
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_begins_after_the_thought(tokenizer, name):
    tokenizer = tokenizer(name)
    marks = find_marks(tokenizer, ChatFormat())
    opens = "" if marks.is_open else marks.opens
    thought = f"{opens}\nI can't see the shelf, but general steps will do.\n{marks.closes}\n\n"
    written = tokenizer.encode(thought + "Sand it, then paint it.", add_special_tokens=False)
    assert answer_text(tokenizer, marks, written) == "Sand it, then paint it."
    start = answer_start(tokenizer, marks, written)
    assert tokenizer.decode(written[:start]).rstrip().endswith(marks.closes)
    for end in range(len(tokenizer.encode(opens + " I", add_special_tokens=False)), start - 3):
        assert answer_text(tokenizer, marks, written[:end]) is None


def test_without_a_thought_everything_is_answer(tokenizer):
    ids = tokenizer("qwen").encode("Sand it.", add_special_tokens=False)
    assert answer_start(tokenizer("qwen"), find_marks(tokenizer("qwen"), ChatFormat()), ids) == 0
    assert answer_start(tokenizer("qwen"), None, ids) == 0
    assert answer_start(tokenizer("deepseek"), find_marks(tokenizer("deepseek"), ChatFormat()), ids) is None


def test_thinking_turned_off_closes_the_thought_in_the_prompt(tokenizer):
    off = ChatFormat(arguments={"enable_thinking": False})
    qwen = tokenizer("qwen")
    assert qwen.decode(encode_prompts(qwen, ["Hi"], chat_format=off)[0]).endswith("</think>\n\n")
    assert not find_marks(qwen, off).is_open


def test_a_prompt_that_speaks_of_thoughts_opens_none(tokenizer):
    qwen = tokenizer("qwen")
    ids = qwen.encode("It marks a thought.", add_special_tokens=False)
    assert (
        encode_prompts(qwen, ["What does <think> mean?"])
        and answer_start(qwen, find_marks(qwen, ChatFormat()), ids) == 0
    )
