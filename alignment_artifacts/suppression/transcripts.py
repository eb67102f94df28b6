"""Every prompt pair answered before and after suppression, each token with its score at every layer.

The directions used on a pair, for the edit and for the scores, are learnt from other pairs (five folds).
Written as transcripts.json (texts, token ids) and transcripts.npz ("scores" float16 [tokens, layers],
for each pair and side in order: prompt, answer before, answer after).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.behaviour import refusal
from alignment_artifacts.behaviour.answers import unedited_answers, write_answers
from alignment_artifacts.behaviour.monitor import score_texts
from alignment_artifacts.behaviour.refusal import corrected
from alignment_artifacts.behaviour.score import REFUSAL, Score
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.directions.estimate import Directions, measure_natural_tokens
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.edits.proof import Sequences, pool, prove
from alignment_artifacts.edits.setting import Intervention, Setting, intervene
from alignment_artifacts.pairs import SIDES
from alignment_artifacts.rates import mean, rate
from alignment_artifacts.suppression.result import WHEN
from gemma_refactored.activation_capture import Edit
from gemma_refactored.conversation import readable
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_json, write_atomically, write_json
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.npz_files import DAMAGE

TRANSCRIPTS = "transcripts"  # name of the files, before that of the score


def transcribe(
    loaded: LoadedModel,
    measured: Measurements,
    setting: Setting,
    max_tokens: int = 100,
    progress: Callable[[int], object] = lambda pairs: None,
    score: Score | None = None,
) -> tuple[dict, np.ndarray]:
    """Answer every pair without and with suppression.

    Args:
        progress: called with numbers of pairs, twice the number of pairs in total.
        score: of answers, instead of refusals: each record then has "score" for "refused", and the whole has "score"
            (name, meaning, hash of the source) and "scored": side -> "before", "after" and "moved", records of
            `rates.mean`, for "refused".
    Returns:
        The record, and the scores [tokens, layers] in its order.
    Raises:
        UserError: the setting changes nothing, or needs statistics that the pairs do not provide.
    """
    groups = independent_groups(measured.pairs)
    if (independent := int(groups.max(initial=-1)) + 1) < st.MIN_PAIRS:
        raise UserError(
            f"Each pair meets directions from pairs independent of it, which takes at least {st.MIN_PAIRS} groups of "
            f"them; there are {independent}. Answer single prompts instead, without --all-pairs."
        )
    folds = st.assign_folds(np.array(measured.categories), groups=groups)
    before = _unedited_answers(loaded, measured, max_tokens)
    progress(len(measured.pairs))
    records: list[dict] = [{} for _ in measured.pairs]
    scores: list[list[np.ndarray]] = [[] for _ in measured.pairs]
    effects = []
    for fold in np.unique(folds):
        held_out = np.flatnonzero(folds == fold)
        directions = _directions(loaded, measured, setting, np.flatnonzero(folds != fold))
        intervention = intervene(loaded, directions, setting)
        prompts = [prompt for i in held_out for prompt in measured.prompts[i]]
        after = write_answers(loaded, prompts, intervention, max_tokens)
        texts = [answer for i in held_out for answer in before[i]]
        scored = iter(_scores(loaded, directions, intervention, prompts, texts, after))
        answers = iter(after)
        for i in held_out:
            pair = measured.pairs[i]
            records[i] = {"id": pair.id, "category": pair.category}
            for side, prompt, unedited in zip(SIDES, measured.prompts[i], before[i], strict=True):
                both = {"before": unedited, "after": next(answers)}
                records[i][side] = _record(loaded, getattr(pair, side), prompt, both, score)
                scores[i] += next(scored)
        progress(len(held_out))
        artifacts = Sequences([measured.prompts[i][1] for i in held_out], [before[i][1] for i in held_out])
        effects.append(prove(loaded, intervention, artifacts))
    effect = pool(effects)
    if effect.touched == 0 and setting.scale != 0:
        raise UserError(
            f"This setting ({setting.describe()}) changes nothing on {measured.pairs.sides[1]} prompts. "
            "Use another mode, other layers or another threshold."
        )
    separation = st.layer_separation(measured.vectors_at(setting.site, setting.positions), measured.categories, groups)
    result = {
        "model": {name: measured.facts[name] for name in ("model", "model_revision")},
        "setting": setting.record(),
        "max_tokens": max_tokens,
        "num_layers": loaded.num_layers,
        "best_layer": max(setting.layers, key=lambda layer: separation[layer]),
        "effect_on_artifact_prompts": asdict(effect),
        **_summary(records, score),
        "pieces": _pieces(loaded, records),
        "pairs": records,
    }
    return result, np.concatenate([part for of_pair in scores for part in of_pair]).astype(np.float16)


def _directions(loaded: LoadedModel, measured: Measurements, setting: Setting, rows: np.ndarray) -> Directions:
    directions = measured.estimate(setting.site, setting.positions, rows)
    if setting.mode == "cap":
        directions = measure_natural_tokens(loaded, directions, measured.natural_sequences(rows))
    return directions


def _unedited_answers(loaded: LoadedModel, measured: Measurements, max_tokens: int) -> list[list[list[int]]]:
    """Token ids [pair][side]."""
    prompts = [prompt for sides in measured.prompts for prompt in sides]
    answers = unedited_answers(loaded, prompts, max_tokens, measured.known_answer)
    return [answers[i : i + 2] for i in range(0, len(answers), 2)]


def _summary(records: list[dict], score: Score | None) -> dict:
    by_side = {}
    for side in SIDES:
        both = [[_value(r[side], when) for when in WHEN] for r in records]
        judged = [values for values in both if None not in values]
        by_side[side] = dict(zip(WHEN, np.array(judged).reshape(-1, 2).T, strict=True))
    if score is None:
        refused = {side: {when: rate(list(v)) for when, v in both.items()} for side, both in by_side.items()}
        shares = {side: {when: r["rate"] for when, r in both.items()} for side, both in refused.items()}
        ranges = {side: {when: corrected(share) for when, share in both.items()} for side, both in shares.items()}
        return {"judge": refusal.NAME, "refused": refused, "refused_corrected": ranges}
    scored = {}
    for side, values in by_side.items():
        moved = values["after"].astype(float) - values["before"]
        scored[side] = {**{when: mean(of_all) for when, of_all in values.items()}, "moved": mean(moved)}
    return {"score": score.record(), "scored": scored}


def _value(record: dict, when: str) -> float | bool | None:
    """What an answer scored; None where it has not come out of the model's thought."""
    return record[when].get("refused", record[when].get("score"))


def _record(
    loaded: LoadedModel, text: str, prompt: list[int], answers: dict[str, list[int]], score: Score | None
) -> dict:
    record: dict = {"prompt": readable(text), "prompt_tokens": prompt}
    for when, tokens in answers.items():
        answer = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        (value,) = (score or REFUSAL).each([text], [loaded.answer_text(tokens)])
        record[when] = {"text": answer, "tokens": tokens, "score" if score else "refused": value}
    return record


def _scores(
    loaded: LoadedModel,
    directions: Directions,
    intervention: Intervention,
    prompts: list[list[int]],
    before: list[list[int]],
    after: list[list[int]],
) -> list[list[np.ndarray]]:
    """For each prompt [tokens, layers] of the prompt and the answer before, and of the answer after."""

    def edits(batch: list[int]) -> dict[str, Edit]:
        texts = [prompts[i] + after[i] for i in batch]
        return intervention.in_one_pass(loaded, texts, [len(prompts[i]) for i in batch])

    unedited = score_texts(loaded, directions, [p + answer for p, answer in zip(prompts, before, strict=True)])
    edited = score_texts(loaded, directions, [p + answer for p, answer in zip(prompts, after, strict=True)], edits)
    return [[u, e[len(prompt) :]] for prompt, u, e in zip(prompts, unedited, edited, strict=True)]


def _pieces(loaded: LoadedModel, records: list[dict]) -> dict[str, str]:
    """The text of every token that occurs, by its id."""
    ids = set()
    for record in records:
        for side in SIDES:
            ids.update(record[side]["prompt_tokens"])
            for when in WHEN:
                ids.update(record[side][when]["tokens"])
    return {str(token): loaded.tokenizer.decode([token]) for token in sorted(ids)}


def save_transcripts(folder: str | Path, result: dict, scores: np.ndarray, score: Score | None = None) -> Path:
    """The file of texts, named after the score if there is one; the projections are beside it."""
    name = score.file_name(TRANSCRIPTS) if score else TRANSCRIPTS
    path = Path(folder) / f"{name}.json"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scores=scores)
    write_atomically(path.with_suffix(".npz"), buffer.getvalue())
    write_json(path, result)
    return path


def load_transcripts(path: str | Path) -> tuple[dict, np.ndarray]:
    """What `save_transcripts` wrote.

    Raises:
        UserError: a file is missing, damaged, or not of the same run as the other.
    """
    path = Path(path)
    result, projections = read_json(path, "transcripts file"), path.with_suffix(".npz")
    try:
        with np.load(projections, allow_pickle=False) as file:
            scores = file["scores"]
    except DAMAGE as error:
        raise UserError(f"{projections} cannot be read ({error}); run `python suppress.py --all-pairs`.") from None
    tokens = sum(
        len(pair[side]["prompt_tokens"]) + len(pair[side]["before"]["tokens"]) + len(pair[side]["after"]["tokens"])
        for pair in result["pairs"]
        for side in SIDES
    )
    if scores.shape != (tokens, result["num_layers"]):
        raise UserError(f"{projections.name} and {path.name} in {path.parent} are not from the same run; run "
                        "`python suppress.py --all-pairs` again.")  # fmt: skip
    return result, scores
