"""What an intervention does to a model's behaviour: to refusals, and to everything it must not change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import Behaviour, write_answers
from alignment_artifacts.behaviour.broken import has_loop, is_on_topic
from alignment_artifacts.behaviour.refusal import can_read, corrected, is_refusal, verdict
from alignment_artifacts.behaviour.score import Score
from alignment_artifacts.edits.setting import NOTHING, Intervention
from alignment_artifacts.rates import log_mean, paired_rates, rate
from gemma_refactored.activation_capture import TEXTS_AT_ONCE
from gemma_refactored.errors import UserError, shown
from gemma_refactored.generation import Sampling
from gemma_refactored.model_loading import LoadedModel

LOGIT_BYTES = 1 << 28  # of the logits of one pass
LENGTHS = (32, 128, 512)  # tokens: refusals within the first so many of them, if answers are that long


@dataclass
class Outcome:
    """What an intervention has made of some sets of prompts, prompt by prompt.

    Attributes:
        behaviours: set -> what the unedited model answers; answers: set -> token ids under the intervention.
        damage: along the unedited natural answers; None without such a set.
    """

    behaviours: dict[str, Behaviour]
    answers: dict[str, list[list[int]]]
    damage: Damage | None


@dataclass
class Damage:
    """Per natural prompt with an answer, along all of them: KL(unedited || edited) [tokens] in nats, both losses
    [2, tokens], and the number of the prompt (of the first that is the same) in its set."""

    kl: list[np.ndarray]
    losses: list[np.ndarray]
    rows: list[int]

    def record(self, groups: Sequence[int] | None = None) -> dict:
        """The mean KL (with an interval over prompts, None where `rates.log_mean` has none) and its 95th percentile
        over all tokens, in nats per token, and the perplexity of the unedited answers without and with the edit.

        Args:
            groups: of the set's prompts; those of one group vary together. None: each by itself.
        """
        everything, by_group = np.concatenate(self.kl), defaultdict[int, list[np.ndarray]](list)
        for row, kl in zip(self.rows, self.kl, strict=True):
            by_group[row if groups is None else groups[row]].append(kl)
        unedited, edited = np.exp(np.concatenate(self.losses, axis=1).mean(axis=1))
        return {
            "kl_mean": float(everything.mean()),
            "kl_mean_ci": log_mean([np.concatenate(together) for together in by_group.values()]),
            "kl_95": float(np.quantile(everything, 0.95)),
            "perplexity_unedited": float(unedited),
            "perplexity_edited": float(edited),
            "tokens": len(everything),
        }


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Several interventions, each on prompts of its own (the folds of a cross-fit), as if they were one."""
    first = outcomes[0]

    def together(behaviours: list[Behaviour]) -> Behaviour:
        return Behaviour(
            [text for b in behaviours for text in b.texts],
            [ids for b in behaviours for ids in b.token_ids],
            [answer for b in behaviours for answer in b.answers],
            behaviours[0].marks,
        )

    sizes = [len(next(iter(outcome.behaviours.values())).texts) for outcome in outcomes]  # every set has as many
    starts = np.cumsum([0, *sizes[:-1]])
    damages = [(int(start), outcome.damage) for start, outcome in zip(starts, outcomes, strict=True) if outcome.damage]
    return Outcome(
        {name: together([o.behaviours[name] for o in outcomes]) for name in first.behaviours},
        {name: [answer for o in outcomes for answer in o.answers[name]] for name in first.answers},
        Damage(
            [x for _, d in damages for x in d.kl],
            [x for _, d in damages for x in d.losses],
            [start + row for start, d in damages for row in d.rows],
        )
        if damages
        else None,
    )


def judge(
    loaded: LoadedModel,
    behaviour: Behaviour,
    answers: list[list[int]],
    score: Score | None = None,
    clusters: Sequence[Sequence[int]] = (),
    beside: list[list[int]] | None = None,
) -> dict:
    """Refusals, broken text, loops and changes of some answers; each a rate with its interval.

    With a score, its mean ("score") and mean change ("moved") take the place of refusals and what is broken.
    "broken" is neither a refusal nor on topic, or caught in a loop: suppression has not succeeded there.
    "refused_corrected" is the range of shares that "refused" may stand for, given the judge's own errors.
    "partial" are answers that decline a part. "refused_within_N" judges the first N tokens by themselves: where fewer
    are refused in the whole answer, refusals come early and are taken back; where more, they come late.
    Thoughts before an answer are not judged. "in_thought" counts answers of which there is nothing else, before or
    after the edit; the other rates omit them. "unreadable" is in a language that the judge of refusals does not know.

    Args:
        clusters: of the prompts, see `rates.design_effect`; each a label per prompt.
        beside: answers under another setting; "against_setting" is how these compare with them, prompt by prompt.
    """
    unedited = [behaviour.answer_text(loaded.tokenizer, tokens) for tokens in behaviour.answers]
    texts = [behaviour.answer_text(loaded.tokenizer, tokens) for tokens in answers]
    others = texts if beside is None else [behaviour.answer_text(loaded.tokenizer, tokens) for tokens in beside]
    judged = [i for i, all_ in enumerate(zip(unedited, texts, others, strict=True)) if None not in all_]
    within = [[labels[i] for i in judged] for labels in clusters]
    prompts = [behaviour.texts[i] for i in judged]
    before, after, other = ([str(of_all[i]) for i in judged] for of_all in (unedited, texts, others))
    on_topic = [is_on_topic(prompt, text) for prompt, text in zip(prompts, after, strict=True)]
    loops = [has_loop(text) for text in after]
    quality = {
        "on_topic": rate(on_topic, *within),
        "loops": rate(loops, *within),
        "unchanged": rate([a == b for a, b in zip(answers, behaviour.answers, strict=True)], *clusters),
        "in_thought": rate([None in both for both in zip(unedited, texts, strict=True)], *clusters),
    }
    if score:
        if beside is not None:
            quality["against_setting"] = score.compared(prompts, other, after, *within)["moved"]
        return {**score.compared(prompts, before, after, *within), **quality}
    verdicts = [verdict(text, prompt) for text, prompt in zip(after, prompts, strict=True)]
    refused = [said == "refusal" for said in verdicts]
    broken = [loop or not (r or on) for loop, r, on in zip(loops, refused, on_topic, strict=True)]
    result = {
        "refused": rate(refused, *within),
        "refused_corrected": corrected(rate(refused)["rate"]),
        "refused_against_unedited": paired_rates(list(map(is_refusal, before, prompts)), refused, *within),
        "partial": rate([said == "partial" for said in verdicts], *within),
        "broken": rate(broken, *within),
        "refused_or_broken": rate([r or b for r, b in zip(refused, broken, strict=True)], *within),
        "unreadable": rate([not can_read(text) for text in after], *within),
        **quality,
    }
    if beside is not None:
        result["against_setting"] = paired_rates(list(map(is_refusal, other, prompts)), refused, *within)
    longest = max(map(len, [*answers, *behaviour.answers]), default=0)
    for length in [n for n in LENGTHS if n <= longest]:
        cut = [behaviour.answer_text(loaded.tokenizer, answers[i][:length]) for i in judged]
        begun = {k: text for k, text in enumerate(cut) if text is not None}
        result[f"refused_within_{length}"] = rate(
            [is_refusal(text, prompts[k]) for k, text in begun.items()], *([of[k] for k in begun] for of in within)
        )
    return {**result, "refused_within_full": result["refused"]}


def token_damage(loaded: LoadedModel, behaviour: Behaviour, intervention: Intervention) -> dict:
    """How far the edited model's predictions are from the unedited ones along the unedited answers: `Damage.record`."""
    return measure_damage(loaded, behaviour, intervention).record()


def measure_damage(loaded: LoadedModel, behaviour: Behaviour, intervention: Intervention) -> Damage:
    """The same, prompt by prompt.

    Raises:
        UserError: every answer is empty.
    """
    if not any(behaviour.answers):
        raise UserError(
            f"{loaded.name} answers none of these {len(behaviour.answers)} prompts with a single token (the first is "
            f"{shown(behaviour.texts[0])}), so what an edit costs cannot be measured; use other prompts."
        )
    kl: dict[int, np.ndarray] = {}
    losses: dict[int, np.ndarray] = {}
    for rows, plain, edited in log_probabilities(loaded, behaviour, intervention):
        targets = mx.array([token for row in rows for token in behaviour.answers[row]])[:, None]
        divergence = np.array((mx.exp(plain) * (plain - edited)).sum(axis=-1))
        loss = np.array([-mx.take_along_axis(p, targets, axis=-1)[:, 0] for p in (plain, edited)])
        ends = np.cumsum([len(behaviour.answers[row]) for row in rows])[:-1]
        kl |= dict(zip(rows, np.split(divergence, ends), strict=True))
        losses |= dict(zip(rows, np.split(loss, ends, axis=1), strict=True))
    by_prompt: dict[tuple[int, ...], list[int]] = {}  # several answers of one prompt vary together
    for row in sorted(kl):
        by_prompt.setdefault(tuple(behaviour.token_ids[row]), []).append(row)
    return Damage(
        [np.concatenate([kl[row] for row in rows]) for rows in by_prompt.values()],
        [np.concatenate([losses[row] for row in rows], axis=1) for rows in by_prompt.values()],
        [rows[0] for rows in by_prompt.values()],
    )


def log_probabilities(
    loaded: LoadedModel, behaviour: Behaviour, intervention: Intervention
) -> Iterator[tuple[tuple[int, ...], mx.array, mx.array]]:
    """Of every token that could follow, along the unedited answers: without and under an intervention.

    Yields:
        the numbers of some prompts with an answer, and twice [answer tokens of all these, vocabulary].
    """
    answered = [i for i, answer in enumerate(behaviour.answers) if answer]
    longest = max(map(len, behaviour.answers), default=1)
    size = int(np.clip(LOGIT_BYTES // (4 * longest * len(loaded.tokenizer)), 1, TEXTS_AT_ONCE))
    prompts = [behaviour.token_ids[i] for i in answered]
    for batch in loaded.batches(prompts, size):
        rows = tuple(answered[i] for i in batch)
        compute = partial(_log_probabilities, loaded, behaviour, rows)
        plain = behaviour.sequences.keep(("logits", rows), partial(compute, NOTHING))
        yield rows, plain, compute(intervention) if intervention.edits else plain


def _log_probabilities(
    loaded: LoadedModel, behaviour: Behaviour, rows: Sequence[int], intervention: Intervention
) -> mx.array:
    """[answer tokens of all rows, vocabulary]"""
    prompts, answers = ([of_all[row] for row in rows] for of_all in (behaviour.token_ids, behaviour.answers))
    logits = intervention.predict(loaded, prompts, answers)
    places = [(row, k) for row, answer in enumerate(answers) for k in range(len(answer))]
    numbers, positions = mx.array(places).T
    logits = logits[numbers, positions].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def outcome_of(
    loaded: LoadedModel,
    intervention: Intervention,
    sets: dict[str, Behaviour],
    max_tokens: int,
    sampling: Sampling = Sampling(),
) -> Outcome:
    """What becomes of every set of prompts under an intervention; for the set "natural" also the damage to its tokens.

    Args:
        sets: name -> unedited behaviour, for example artifact, natural, twins.
    """
    together = [ids for behaviour in sets.values() for ids in behaviour.token_ids]
    if intervention.edits:
        written = iter(write_answers(loaded, together, intervention, max_tokens, sampling))
    else:
        written = iter([answer for behaviour in sets.values() for answer in behaviour.answers])
    answers = {name: [next(written) for _ in behaviour.token_ids] for name, behaviour in sets.items()}
    damage = measure_damage(loaded, sets["natural"], intervention) if "natural" in sets else None
    return Outcome(sets, answers, damage)


def judge_outcome(
    loaded: LoadedModel,
    outcome: Outcome,
    score: Score | None = None,
    clusters: Sequence[Sequence[int]] = (),
    beside: Outcome | None = None,
) -> dict:
    """`judge` of every set, and "damage"; other arguments as there. The interval of KL takes the last clusters."""
    result = {
        name: judge(loaded, behaviour, outcome.answers[name], score, clusters, beside.answers[name] if beside else None)
        for name, behaviour in outcome.behaviours.items()
    }
    return {**result, "damage": outcome.damage.record(*clusters[-1:])} if outcome.damage else result
