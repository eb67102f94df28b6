"""What a model answers, unedited or under an intervention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from alignment_artifacts.edits.proof import Sequences
from alignment_artifacts.edits.setting import NOTHING, Intervention
from gemma_refactored.generation import PREFILL, Sampling, collect_answers
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.thoughts import Marks, answer_text

BATCH_SIZE = 128

# The unedited model's greedy answer to a prompt (token ids) of up to so many tokens, if it has been generated before.
KnownAnswer = Callable[[Sequence[int], int], list[int] | None]


def nothing_known(prompt: Sequence[int], max_tokens: int) -> None:
    """A `KnownAnswer` for a model that has not answered anything yet."""


@dataclass
class Behaviour:
    """A model's unedited answers to some prompts, which edited ones are compared with.

    Attributes:
        texts: the prompts; token_ids: in the chat format.
        answers: token ids, greedy.
        marks: what the model writes around a thought before its answer.
        sequences: prompts and answers for passes over both.
    """

    texts: list[str]
    token_ids: list[list[int]]
    answers: list[list[int]]
    marks: Marks | None = None
    sequences: Sequences = field(init=False, repr=False)

    def __post_init__(self):
        self.sequences = Sequences(self.token_ids, self.answers)

    def answer_text(self, tokenizer, written: Sequence[int]) -> str | None:
        """The text of an answer to one of these prompts without its thought; None if that has not ended."""
        return answer_text(tokenizer, self.marks, written)


def observe(
    loaded: LoadedModel,
    texts: Sequence[str],
    max_tokens: int,
    chat_mode: bool = True,
    known: KnownAnswer = nothing_known,
) -> Behaviour:
    """Ask the unedited model, except where its answer is known."""
    token_ids = loaded.encode(texts, chat_mode)
    answers = unedited_answers(loaded, token_ids, max_tokens, known)
    return Behaviour(list(texts), token_ids, answers, loaded.thought_marks if chat_mode else None)


def unedited_answers(
    loaded: LoadedModel, token_ids: Sequence[Sequence[int]], max_tokens: int, known: KnownAnswer
) -> list[list[int]]:
    """Greedy answers to prompts, in their order; those that are known are not generated again."""
    everything = [known(prompt, max_tokens) for prompt in token_ids]
    answers = {i: answer for i, answer in enumerate(everything) if answer is not None}
    missing = [i for i in range(len(token_ids)) if i not in answers]
    written = write_answers(loaded, [token_ids[i] for i in missing], NOTHING, max_tokens)
    answers |= zip(missing, written, strict=True)
    return [answers[i] for i in range(len(token_ids))]


def write_answers(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    intervention: Intervention,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    end_tokens: Sequence[int] | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[int]]:
    """Token ids of the answers under an intervention, in the order of the prompts.

    Args:
        end_tokens: that end an answer; None: the model's.
        progress: called with numbers of tokens, `max_tokens` per prompt in total.
    """
    ends = loaded.end_tokens if end_tokens is None else end_tokens
    answers: list[list[int]] = [[] for _ in token_ids]
    for batch in loaded.batches(token_ids, BATCH_SIZE):
        rows = [token_ids[i] for i in batch]
        steps = intervention.generate(loaded, rows, max_tokens, sampling, ends, row_ids=batch)
        for i, tokens in zip(batch, collect_answers(steps, progress), strict=True):
            answers[i] = tokens
            progress(max_tokens - len(tokens))  # of an answer that has ended
    return answers


def write_answer(
    loaded: LoadedModel,
    prompt: Sequence[int],
    intervention: Intervention,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    end_tokens: Sequence[int] = (),
    on_text: Callable[[str], object] = lambda text: None,
) -> list[int]:
    """Token ids of one answer under an intervention; `on_text` receives the text piece by piece as it is generated."""
    tokens, printed = [], ""
    for step in intervention.generate(loaded, [list(prompt)], max_tokens, sampling, end_tokens):
        if step.index == PREFILL:
            continue
        tokens.append(int(step.tokens[0]))
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # only part of a character so far
            on_text(text[len(printed) :])
            printed = text
    return tokens
