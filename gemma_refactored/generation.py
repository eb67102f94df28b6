"""Batched generation that shows its activations.

`generate` yields one `Step` per forward pass: `prefill` (the pass over the prompt, seen at its
last token), then one for each generated token. Rows are left-padded and masked, so a row's
numbers do not depend on its neighbours; random numbers are drawn per row, so sampling does
not either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchRotatingKVCache, RotatingKVCache
from mlx_lm.sample_utils import apply_top_p

from .activation_capture import ATTENTION_WEIGHTS, Edit, capturing, edit, layer_of
from .checks import mark_not_finite, position_rows, refuse_beyond_tables, refuse_not_finite
from .configuration import Sampling
from .errors import UserError
from .longrope import rope_lengths
from .prompt_cache import read_prompts

PREFILL = -1  # the index of the step over the prompt
REPETITION_CONTEXT = 20  # tokens that the repetition penalty looks back, as in mlx-lm


@dataclass
class Step:
    """One forward pass over a batch.

    Attributes:
        index: PREFILL or k for the k-th generated token.
        tokens: [rows] the token each row read in this pass.
        active: [rows] false for rows that have ended: nothing of theirs is valid any more.
        activations: site -> [rows, 1, width] float32, evaluated; attention weights are [rows, heads, 1, keys], keys
            in the order of their positions, padding first (`weights_of_row` removes it).
        lengths: [rows] tokens that each row has read so far, prompt included.
    """

    index: int
    tokens: np.ndarray
    active: np.ndarray
    activations: dict[str, mx.array]
    lengths: np.ndarray

    @property
    def name(self) -> str:
        return "prefill" if self.index == PREFILL else str(self.index)


def length_sorted_batches(
    prompts: Sequence[Sequence[int]], batch_size: int, equal_lengths: bool = False
) -> list[list[int]]:
    """Indices of the prompts, shortest first, in batches: rows of like length need little padding.

    Args:
        equal_lengths: only prompts of one length share a batch, for models that padding disturbs.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    runs = [list(run) for _, run in groupby(order, key=lambda i: len(prompts[i]))] if equal_lengths else [order]
    return [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    end_tokens: Sequence[int] = (),
    sites: Sequence[str] = (),
    row_ids: Sequence[int] | None = None,
    edits: Mapping[str, Edit] | None = None,
    prompt_end_edits: Mapping[str, Edit] | None = None,
    spared: Sequence[Sequence[int]] | None = None,
) -> Iterator[Step]:
    """Continue each prompt by up to `max_tokens` tokens; yield every forward pass.

    Between its passes the model is as it was: whoever uses it meanwhile meets none of these edits. A pass may be over
    any part of any rows, so an edit has to make of each position's vector what it would make of it alone.

    Args:
        prompts: token ids, one list a row, none empty.
        end_tokens: a row that writes one of these is over; that token is not read any more.
        sites: what `Step.activations` holds.
        row_ids: number of each row's own random stream (default: its position).
        edits: site -> edit of the activations of every token, those of the prompts included.
        prompt_end_edits: the same at the last prompt token only.
        spared: positions of each prompt that no edit changes.
    """
    refuse_beyond_tables(model, prompts, max_tokens)
    batch = _Batch(model, prompts, max_tokens + 1, edits, prompt_end_edits, spared)
    sampler = _Sampler(batch.tokens, sampling, row_ids if row_ids is not None else range(len(prompts)))
    activations: dict[str, mx.array] = {}
    reading = capturing(model, sites, activations)

    def launch(token: mx.array, sample: bool, is_prompt_end: bool = False) -> tuple[mx.array | None, dict]:
        """Queue the forward pass over `token` and the choice of the next one."""
        activations.clear()
        logits = batch.read(token[:, None], is_prompt_end, reading)[:, -1]
        chosen = mark_not_finite(sampler(logits), logits) if sample else None
        states = {site: _in_order(site, x, batch.cache).astype(mx.float32) for site, x in activations.items()}
        # Without a sample, the last pass still has to happen, for its activations.
        mx.async_eval(*states.values(), *([chosen] if sample else []))
        return chosen, states

    prompt_end = mx.array(batch.tokens[:, -1])
    token_read: mx.array | None = prompt_end
    chosen, states = launch(prompt_end, sample=max_tokens > 0, is_prompt_end=True)
    active = np.ones(len(prompts), bool)
    for index in range(PREFILL, max_tokens):
        # The next pass is queued before anybody waits for this one, so the machine never idles.
        following = None
        if chosen is not None and index + 1 < max_tokens:
            following = launch(chosen, sample=index + 2 < max_tokens)
        read = np.array(token_read)
        refuse_not_finite(read)
        if index > PREFILL:
            active = active & ~np.isin(read, list(end_tokens))
            if not active.any():
                return
        mx.eval(states)
        yield Step(index, read, active, states, np.array(batch.lengths) + index + 1)
        if following:
            token_read = chosen
            chosen, states = following


def predict(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    edits: Mapping[str, Edit] | None = None,
    prompt_end_edits: Mapping[str, Edit] | None = None,
    spared: Sequence[Sequence[int]] | None = None,
) -> mx.array:
    """What the model predicts along answers that are given: the logits that `generate` would choose from.

    Args:
        answers: token ids, one list a row; the others as in `generate`.
    Returns:
        [rows, longest answer, vocabulary], lazy: at place k what follows k tokens of the row's answer; behind its end
        they mean nothing.
    """
    read = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    refuse_beyond_tables(model, read, 0)
    longest, positions = max(1, *map(len, answers)), position_rows(model)
    if positions is not None and len(prompts) > 1 and max(map(len, prompts)) + longest - 1 > positions:
        # What fills up the short answer behind a long prompt would leave the table.
        alone = [
            predict(model, [prompt], [answer], edits, prompt_end_edits, None if spared is None else [spared[row]])
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        return mx.concatenate([mx.pad(x, [(0, 0), (0, longest - x.shape[1]), (0, 0)]) for x in alone])
    batch = _Batch(model, prompts, longest, edits, prompt_end_edits, spared)
    following = [[*answer[:-1], *[0] * (longest - max(1, len(answer)))] for answer in answers]
    return batch.read(mx.concatenate([mx.array(batch.tokens[:, -1:]), mx.array(following, mx.int32)], axis=1), True)


class _Batch:
    """Prompts that a model has read but for their last tokens, and what is read next, under edits.

    Attributes:
        tokens: [rows, positions] the prompts, left-padded; lengths: of each.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        growth: int,
        edits: Mapping[str, Edit] | None,
        prompt_end_edits: Mapping[str, Edit] | None,
        spared: Sequence[Sequence[int]] | None,
    ):
        self.lengths = [len(prompt) for prompt in prompts]
        if min(self.lengths) == 0:
            raise UserError("A prompt has no tokens at all; give it some text.")
        padding = [max(self.lengths) - n for n in self.lengths]
        self.tokens = np.array([[prompt[0]] * pad + list(prompt) for prompt, pad in zip(prompts, padding, strict=True)])
        self.model, self.rope = model, rope_lengths(model, self.lengths)
        self.sparing = _Sparing(self.tokens.shape, padding, spared or [()] * len(prompts))
        self.everywhere = edit(model, self.sparing.all(edits or {}))
        self.at_prompt_end = edit(model, self.sparing.all(prompt_end_edits or {}, at_prompt_end=True))
        spared_before_end = self.sparing.spared[:, :-1]
        with self.everywhere:
            self.cache = read_prompts(
                model, self.tokens[:, :-1], self.lengths, growth, self.sparing.look_at, spared_before_end
            )

    def read(
        self, tokens: mx.array, from_prompt_end: bool = False, reading: AbstractContextManager = nullcontext()
    ) -> mx.array:
        """[rows, n, vocabulary] logits of a pass over the next tokens [rows, n]; `reading` sees what the edits made.

        Several at once only in the first such pass: mlx-lm's caches of sliding windows mask wrongly after single ones.
        """
        end = self.tokens.shape[1]
        last = slice(end - 1, end) if from_prompt_end else slice(0, 0)
        self.sparing.look_at(slice(None), last, following=tokens.shape[1] - from_prompt_end)
        with self.rope, self.everywhere, self.at_prompt_end if from_prompt_end else nullcontext(), reading:
            return self.model(tokens, cache=self.cache)


class _Sparing:
    """Edits that leave some positions of the prompts as they are; told before each pass which part it reads."""

    def __init__(self, shape: tuple[int, ...], padding: Sequence[int], positions: Sequence[Sequence[int]]):
        self.spared = np.zeros((*shape, 1), bool)
        for row, (pad, places) in enumerate(zip(padding, positions, strict=True)):
            self.spared[row, [pad + place for place in places]] = True
        # [rows, positions, 1] of this pass, None if nothing is spared in it: by all edits, and by those of the prompt's
        # end alone, which spare what follows it.
        self.now: mx.array | None = None
        self.now_at_end: mx.array | None = None

    def look_at(self, rows: slice, positions: slice, following: int = 0) -> None:
        """`following`: tokens behind the prompt that are read as well."""
        part = self.spared[rows, positions]
        after = np.ones((len(part), following, 1), bool)
        self.now, self.now_at_end = (
            mx.array(mask) if mask.any() else None for mask in (np.hstack([part, ~after]), np.hstack([part, after]))
        )

    def all(self, edits: Mapping[str, Edit], at_prompt_end: bool = False) -> dict[str, Edit]:
        def sparing(site: str, function: Edit) -> Edit:
            def apply(x: mx.array) -> mx.array:
                now = self.now_at_end if at_prompt_end else self.now
                if now is None:
                    return function(x)
                if site.endswith(ATTENTION_WEIGHTS):  # [rows, heads, positions, keys]
                    now = now[:, None]
                elif x.shape[:2] == now.shape[:2]:  # [rows, positions, heads, width] as well
                    now = now.reshape(*now.shape[:2], *[1] * (x.ndim - 2))
                return mx.where(now, x, function(x))

            return apply

        return {site: sparing(site, function) for site, function in edits.items()}


def _in_order(site: str, x: mx.array, cache: list) -> mx.array:
    """Attention weights with keys in the order of their positions, also when a sliding window's cache has wrapped."""
    if not site.endswith(ATTENTION_WEIGHTS):
        return x
    of_layer = cache[layer_of(site)]
    is_window = isinstance(of_layer, (RotatingKVCache, BatchRotatingKVCache))
    return mx.roll(x, -of_layer._idx, -1) if is_window else x  # where the next key will be written is the oldest


class _Sampler:
    """Chooses each row's next token from its own random stream, without waiting for the device."""

    def __init__(self, tokens: np.ndarray, sampling: Sampling, row_ids: Sequence[int]):
        self.sampling = sampling
        keys = [mx.random.key((sampling.seed * 1_000_003 + i) % 2**63) for i in row_ids]
        self.keys = mx.stack(keys)
        # Padding repeats a row's first token, which is in its context anyway or out of reach.
        self.recent = mx.array(tokens[:, -REPETITION_CONTEXT:])
        if sampling.logit_bias:
            self.biased = mx.array(list(sampling.logit_bias))
            self.bias = mx.array(list(sampling.logit_bias.values()))

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits [rows, vocabulary] -> tokens [rows]."""
        settings = self.sampling
        if settings.logit_bias:
            logits = logits.at[:, self.biased].add(self.bias)
        if settings.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, self.recent, settings.repetition_penalty)
        if settings.temperature == 0:
            chosen = mx.argmax(logits, axis=-1)
        else:
            logits = logits.astype(mx.float32)
            if settings.top_p < 1.0:
                logits = apply_top_p(logits - mx.logsumexp(logits, axis=-1, keepdims=True), settings.top_p)
            split = mx.vmap(mx.random.split)(self.keys)
            self.keys = split[:, 0]
            draw = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))
            chosen = draw(logits / settings.temperature, split[:, 1])
        if settings.repetition_penalty != 1.0:
            self.recent = mx.concatenate([self.recent, chosen[:, None]], axis=1)[:, -REPETITION_CONTEXT:]
        return chosen


def penalise_repetition(logits: mx.array, recent: mx.array, penalty: float) -> mx.array:
    """Divide positive and multiply negative logits of recent tokens by `penalty` (CTRL, arXiv 1909.05858).

    Args:
        logits: [rows, vocabulary]; recent: [rows, context] token ids.
    """
    values = mx.take_along_axis(logits, recent, axis=-1)
    values = mx.where(values < 0, values * penalty, values / penalty)
    return mx.put_along_axis(logits, recent, values, axis=-1)


def collect_answers(steps: Iterator[Step], progress: Callable[[int], object] = lambda tokens: None) -> list[list[int]]:
    """Run `generate` to its end; the tokens that each row wrote, end token not included.

    Args:
        progress: called after each step with the number of tokens that it read.
    """
    answers: list[list[int]] = []
    for step in steps:
        if step.index == PREFILL:
            answers = [[] for _ in step.tokens]
            continue
        for row in np.flatnonzero(step.active):
            answers[row].append(int(step.tokens[row]))
        progress(int(step.active.sum()))
    return answers


def collect_means(
    steps: Iterator[Step],
    sites: Sequence[str],
    progress: Callable[[int], object] = lambda tokens: None,
    thought_tokens: Callable[[Sequence[int]], int | None] | None = None,
) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """What `collect_answers` returns, and each row's mean activations, summed up while the model writes.

    Args:
        sites: all of one width, among those that `generate` was asked for.
        thought_tokens: of a model that thinks, how many of the tokens it wrote are a thought (None: all so far).
    Returns:
        What each row wrote; and [rows, sites, width] float32 at the prompt's last token ("prompt_end"), over the tokens
        that were written ("generated", NaN where there are none) and over both ("all"). Of a model that thinks also
        over what it wrote after its thought ("answer") and at the token before that ("answer_start"), NaN for those
        that did not come to it.
    """
    prompt_end, total = np.zeros(0), np.zeros(0)  # float64: twenty steps or twenty thousand, sums stay sums
    after_thought = _AfterThought(thought_tokens) if thought_tokens else None

    def summed(steps: Iterator[Step]) -> Iterator[Step]:
        nonlocal prompt_end, total
        for step in steps:
            states = np.concatenate([np.asarray(step.activations[site]) for site in sites], axis=1, dtype=np.float64)
            if step.index == PREFILL:
                prompt_end, total = states, np.zeros_like(states)
            else:
                total += np.where(step.active[:, None, None], states, 0)
            if after_thought:
                after_thought.add(step, states)
            yield step

    answers = collect_answers(summed(steps), progress)
    lengths = np.array([len(answer) for answer in answers])[:, None, None]
    with np.errstate(invalid="ignore"):
        generated = total / lengths
    means = {"prompt_end": prompt_end, "generated": generated, "all": (prompt_end + total) / (1 + lengths)}
    if after_thought:
        means |= after_thought.means()
    return answers, {positions: values.astype(np.float32) for positions, values in means.items()}


class _AfterThought:
    """Sums up what each row writes after its thought, while nobody knows yet how long that will be."""

    def __init__(self, thought_tokens: Callable[[Sequence[int]], int | None]):
        self.thought_tokens = thought_tokens
        self.written: list[list[int]] = []
        self.start, self.total, self.count = np.zeros(0), np.zeros(0), np.zeros(0)
        self.has_begun = np.zeros(0, bool)

    def add(self, step: Step, states: np.ndarray) -> None:
        if step.index == PREFILL:
            self.written = [[] for _ in step.tokens]
            self.start, self.total, self.count = states.copy(), np.zeros_like(states), np.zeros(len(states))
            self.has_begun = np.array([self.thought_tokens([]) is not None for _ in step.tokens])
            return
        for row in np.flatnonzero(step.active):
            written = self.written[row]
            written.append(int(step.tokens[row]))
            thought = self.thought_tokens(written)
            self.has_begun[row] = thought is not None
            if thought is None or thought == len(written):  # whatever came so far was no answer
                self.start[row], self.total[row], self.count[row] = states[row], 0, 0
            else:
                self.total[row] += states[row]
                self.count[row] += 1

    def means(self) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            answer = self.total / self.count[:, None, None]
        has_begun = self.has_begun[:, None, None]
        return {"answer": np.where(has_begun, answer, np.nan), "answer_start": np.where(has_begun, self.start, np.nan)}
