"""What an intervention does to a model's behaviour: to refusals, and to everything it must not change."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import Behaviour, write_answers
from alignment_artifacts.behaviour.broken import has_loop, is_on_topic
from alignment_artifacts.behaviour.refusal import can_read, corrected, is_refusal, verdict
from alignment_artifacts.behaviour.score import Score
from alignment_artifacts.edits.proof import Batch
from alignment_artifacts.edits.setting import Intervention
from alignment_artifacts.rates import log_mean, paired_rates, rate
from gemma_refactored.activation_capture import TEXTS_AT_ONCE, Edit, forward
from gemma_refactored.errors import UserError, shown
from gemma_refactored.model_loading import LoadedModel

LOGIT_BYTES = 1 << 28  # of the logits of one pass
LENGTHS = (32, 128, 512)  # tokens: refusals within the first so many of them, if answers are that long


def judge(loaded: LoadedModel, behaviour: Behaviour, answers: list[list[int]], score: Score | None = None) -> dict:
    """Refusals, broken text, loops and changes of some answers; each a rate with its interval.

    With a score, its mean ("score") and mean change ("moved") take the place of refusals and what is broken.
    "broken" is neither a refusal nor on topic, or caught in a loop: suppression has not succeeded there.
    "refused_corrected" is the range of shares that "refused" may stand for, given the judge's own errors.
    "partial" are answers that decline a part. "refused_within_N" judges the first N tokens by themselves: where fewer
    are refused in the whole answer, refusals come early and are taken back; where more, they come late.
    Thoughts before an answer are not judged. "in_thought" counts answers of which there is nothing else, before or
    after the edit; the other rates omit them. "unreadable" is in a language that the judge of refusals does not know.
    """
    unedited = [behaviour.answer_text(loaded.tokenizer, tokens) for tokens in behaviour.answers]
    texts = [behaviour.answer_text(loaded.tokenizer, tokens) for tokens in answers]
    judged = [i for i, both in enumerate(zip(unedited, texts, strict=True)) if None not in both]
    prompts = [behaviour.texts[i] for i in judged]
    before, after = ([str(of_all[i]) for i in judged] for of_all in (unedited, texts))
    on_topic = [is_on_topic(prompt, text) for prompt, text in zip(prompts, after, strict=True)]
    loops = [has_loop(text) for text in after]
    quality = {
        "on_topic": rate(on_topic),
        "loops": rate(loops),
        "unchanged": rate([a == b for a, b in zip(answers, behaviour.answers, strict=True)]),
        "in_thought": rate([None in both for both in zip(unedited, texts, strict=True)]),
    }
    if score:
        return {**score.compared(prompts, before, after), **quality}
    verdicts = [verdict(text, prompt) for text, prompt in zip(after, prompts, strict=True)]
    refused = [said == "refusal" for said in verdicts]
    broken = [loop or not (r or on) for loop, r, on in zip(loops, refused, on_topic, strict=True)]
    result = {
        "refused": rate(refused),
        "refused_corrected": corrected(rate(refused)["rate"]),
        "refused_against_unedited": paired_rates(list(map(is_refusal, before, prompts)), refused),
        "partial": rate([said == "partial" for said in verdicts]),
        "broken": rate(broken),
        "refused_or_broken": rate([r or b for r, b in zip(refused, broken, strict=True)]),
        "unreadable": rate([not can_read(text) for text in after]),
        **quality,
    }
    longest = max(map(len, [*answers, *behaviour.answers]), default=0)
    for length in [n for n in LENGTHS if n <= longest]:
        cut = [behaviour.answer_text(loaded.tokenizer, answers[i][:length]) for i in judged]
        result[f"refused_within_{length}"] = rate(
            [is_refusal(text, prompt) for text, prompt in zip(cut, prompts, strict=True) if text is not None]
        )
    return {**result, "refused_within_full": result["refused"]}


def token_damage(loaded: LoadedModel, behaviour: Behaviour, intervention: Intervention) -> dict:
    """How far the edited model's predictions are from the unedited ones along the unedited answers.

    KL(unedited || edited) in nats per token, its mean (with an interval over prompts) and 95th
    percentile over all tokens, and the perplexity of those answers under both.

    Raises:
        UserError: every answer is empty.
    """
    if not any(behaviour.answers):
        raise UserError(
            f"{loaded.name} answers none of these {len(behaviour.answers)} prompts with a single token (the first is "
            f"{shown(behaviour.texts[0])}), so what an edit costs cannot be measured; use other prompts."
        )
    sequences = behaviour.sequences
    kl: dict[int, np.ndarray] = {}  # [tokens] of each prompt
    losses = []  # [2, tokens] of each batch
    longest = max((len(p) + len(a) for p, a in zip(behaviour.token_ids, behaviour.answers, strict=True)), default=1)
    size = int(np.clip(LOGIT_BYTES // (4 * longest * len(loaded.tokenizer)), 1, TEXTS_AT_ONCE))
    for batch in sequences.batches(size, answered=True):
        plain = sequences.keep(("logits", batch.rows), partial(_log_probabilities, loaded, batch, {}))
        edited = plain
        if intervention.edits:
            edits = intervention.in_one_pass(loaded, batch.texts, batch.prompt_lengths)
            edited = _log_probabilities(loaded, batch, edits)
        targets = mx.array([token for row in batch.rows for token in behaviour.answers[row]])[:, None]
        divergence = np.array((mx.exp(plain) * (plain - edited)).sum(axis=-1))
        ends = np.cumsum([len(behaviour.answers[row]) for row in batch.rows])
        kl |= dict(zip(batch.rows, np.split(divergence, ends[:-1]), strict=True))
        losses.append(np.array([-mx.take_along_axis(p, targets, axis=-1)[:, 0] for p in (plain, edited)]))
    everything = np.concatenate([kl[row] for row in sorted(kl)])
    nll = np.concatenate(losses, axis=1).mean(axis=1)
    return {
        "kl_mean": float(everything.mean()),
        "kl_mean_ci": log_mean([kl[row] for row in sorted(kl)]),
        "kl_95": float(np.quantile(everything, 0.95)),
        "perplexity_unedited": float(np.exp(nll[0])),
        "perplexity_edited": float(np.exp(nll[1])),
        "tokens": len(everything),
    }


def _log_probabilities(loaded: LoadedModel, batch: Batch, edits: Mapping[str, Edit]) -> mx.array:
    """[answer tokens of all rows, vocabulary] at the positions that predict the answers."""
    logits, _ = forward(loaded.model, batch.texts, edits=edits)
    places = [
        (row, position)
        for row, (text, start) in enumerate(zip(batch.texts, batch.prompt_lengths, strict=True))
        for position in range(start - 1, len(text) - 1)
    ]
    rows, positions = mx.array(places).T
    logits = logits[rows, positions].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def evaluate(
    loaded: LoadedModel,
    intervention: Intervention,
    sets: dict[str, Behaviour],
    max_tokens: int,
    score: Score | None = None,
) -> dict:
    """Judge every set of prompts under an intervention; for the set "natural" also the damage to its tokens.

    Args:
        sets: name -> unedited behaviour, for example artifact, natural, twins.
        score: instead of refusals, see `judge`.
    """
    if intervention.edits:
        together = [ids for behaviour in sets.values() for ids in behaviour.token_ids]
        answers = iter(write_answers(loaded, together, intervention, max_tokens))
    else:
        answers = iter([answer for behaviour in sets.values() for answer in behaviour.answers])
    result = {}
    for name, behaviour in sets.items():
        result[name] = judge(loaded, behaviour, [next(answers) for _ in behaviour.token_ids], score)
    if "natural" in sets:
        result["damage"] = token_damage(loaded, sets["natural"], intervention)
    return result
