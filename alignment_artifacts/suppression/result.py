"""Prompts answered without and with suppression, and what is known about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment_artifacts.behaviour import monitor
from alignment_artifacts.behaviour.score import Score
from alignment_artifacts.directions.estimate import Directions
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.edits.proof import Proof
from alignment_artifacts.edits.setting import where_it_leads
from gemma_refactored.model_loading import LoadedModel

WHEN = ("before", "after")


@dataclass
class SuppressionResult:
    """A prompt answered without and with suppression.

    Attributes:
        before, after: the texts; before is None if no comparison was requested.
        before_tokens, after_tokens: their token ids; prompt_tokens: the prompt in the chat format.
        chosen_by: who chose the mode: "you", "a sweep" or "model size".
        proof: what the edits did along the prompt and the answer generated under them.
        prompt_score: of the monitor, -1 like natural, +1 like artifact prompts; None for imported vectors.
        score: of the answers, "name" and "meaning", "before" (None without comparison) and "after"; None also where
            the model has not come to its answer.
        directions: those that were used.
        leads: of directions that were given, what they point from and to, and which way the setting moves.
        lacks: of directions that were given, what is not known about them, because no pairs were measured.
        transferred_from: "model" and "model_revision" of the relative that the directions were measured on; None: of
            this model.
    """

    prompt: str
    before: str | None
    after: str
    prompt_tokens: list[int] = field(repr=False)
    before_tokens: list[int] | None = field(repr=False)
    after_tokens: list[int] = field(repr=False)
    setting: Setting
    chosen_by: str
    proof: Proof
    prompt_score: float | None
    score: dict
    directions: Directions = field(repr=False)
    leads: str | None = None
    lacks: str | None = None
    transferred_from: dict | None = None

    def __str__(self) -> str:
        before = "" if self.before is None else f"Before: {self.before}\n"
        return f"{before}After: {self.after}\n({self.about()})"

    def about(self) -> str:
        """What was done, and what it did."""
        return "; ".join(filter(None, (self.setting.describe(), self.proof.describe(), self.leads)))


def results_of(
    loaded: LoadedModel,
    prompts: Sequence[str],
    token_ids: Sequence[list[int]],
    answers: Mapping[str, Sequence[list[int]] | None],
    setting: Setting,
    proofs: Sequence[Proof],
    directions: Directions,
    score: Score,
    is_own: bool,
) -> list[SuppressionResult]:
    """One for each prompt.

    Args:
        answers: "before" (None without comparison) and "after": token ids.
        is_own: the directions are the model's own; otherwise they were given, and what is said of them is more.
    """
    about: dict[str, Any] = {} if is_own else {
        "leads": where_it_leads(directions, setting),
        "lacks": _lacking(directions),
        "transferred_from": directions.facts.get("transferred_from"),
    }  # fmt: skip
    monitored: list[float | None] = [None] * len(prompts)
    if directions.natural_mean is not None:
        scored = monitor.score_texts(loaded, directions, token_ids)
        monitored = [float(scores[-1, list(setting.layers)].mean()) for scores in scored]
    texts = {when: loaded.tokenizer.batch_decode(both, skip_special_tokens=True) if both else None
             for when, both in answers.items()}  # fmt: skip
    scores = {
        when: score.each(prompts, [loaded.answer_text(answer) for answer in both]) if both else None
        for when, both in answers.items()
    }

    def at(values: Mapping[str, Sequence | None], when: str, number: int):
        column = values[when]
        return None if column is None else column[number]

    return [
        SuppressionResult(
            prompt=prompt,
            before=at(texts, "before", number),
            after=at(texts, "after", number),
            prompt_tokens=token_ids[number],
            before_tokens=at(answers, "before", number),
            after_tokens=at(answers, "after", number),
            setting=setting,
            chosen_by="you",
            proof=proofs[number],
            prompt_score=monitored[number],
            score={"name": score.name, "meaning": score.meaning, **{when: at(scores, when, number) for when in WHEN}},
            directions=directions,
            **about,
        )
        for number, prompt in enumerate(prompts)
    ]


def _lacking(directions: Directions) -> str:
    """What is not known of directions that were given."""
    no_monitor = "" if directions.natural_mean is not None else "; without class means there is no monitor either"
    return (
        f"How well directions from a file separate the pairs, and at which layers best, was not measured{no_monitor}."
    )
