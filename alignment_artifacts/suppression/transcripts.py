"""Every prompt pair answered before and after suppression, each token with its score at every layer.

The directions that a pair meets come from other pairs (five folds), for the edit and for the scores.
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
from alignment_artifacts.behaviour.answers import write_answers
from alignment_artifacts.behaviour.monitor import score_tokens_by_layer
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.directions.estimate import Directions, measure_natural_tokens
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.edits.proof import Proof, prove
from alignment_artifacts.edits.setting import NOTHING, Intervention, Setting, intervene
from alignment_artifacts.pairs import SIDES
from alignment_artifacts.rates import rate
from alignment_artifacts.separation import layer_separation
from gemma_refactored.activation_capture import edit
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_json, write_atomically, write_json
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.npz_files import DAMAGE

TRANSCRIPTS, SCORES = "transcripts.json", "transcripts.npz"


def transcribe(
    loaded: LoadedModel,
    measured: Measurements,
    setting: Setting,
    max_tokens: int = 100,
    progress: Callable[[int], object] = lambda pairs: None,
) -> tuple[dict, np.ndarray]:
    """Answer every pair without and with suppression.

    Args:
        progress: called with numbers of pairs that add up to twice the number of pairs.
    Returns:
        The record, and the scores [tokens, layers] in its order.
    Raises:
        UserError: a setting that changes nothing, or one that needs what the pairs do not give.
    """
    folds = st.assign_folds(np.array([pair.category for pair in measured.pairs]))
    records: list[dict] = [{} for _ in measured.pairs]
    scores: list[list[np.ndarray]] = [[] for _ in measured.pairs]
    effect = None
    for fold in np.unique(folds):
        held_out = np.flatnonzero(folds == fold)
        directions = _directions(loaded, measured, setting, np.flatnonzero(folds != fold))
        intervention = intervene(loaded, directions, setting)
        answers = _answers(loaded, measured, intervention, held_out, max_tokens)
        progress(len(held_out))
        for i, own in zip(held_out, answers, strict=True):
            pair = measured.pairs[i]
            records[i] = {"id": pair.id, "category": pair.category}
            for side, prompt, two in zip(SIDES, measured.prompts[i], own, strict=True):
                records[i][side] = _record(loaded, getattr(pair, side), prompt, two)
                scores[i] += _scores(loaded, directions, intervention, prompt, two)
            progress(1)
        if effect is None:
            effect = _effect(loaded, setting, intervention, [records[i]["artifact"] for i in held_out])
    refused = {
        side: {when: rate([r[side][when]["refused"] for r in records]) for when in ("before", "after")}
        for side in SIDES
    }
    vectors = measured.vectors_at(setting.site, setting.positions)
    separation = layer_separation(vectors, [pair.category for pair in measured.pairs])
    result = {
        "model": {name: measured.facts[name] for name in ("model", "model_revision")},
        "setting": setting.record(),
        "max_tokens": max_tokens,
        "num_layers": loaded.num_layers,
        "best_layer": max(setting.layers, key=lambda layer: separation[layer]),
        "effect_on_artifact_prompts": asdict(effect),
        "refused": refused,
        "pieces": _pieces(loaded, records),
        "pairs": records,
    }
    return result, np.concatenate([part for own in scores for part in own]).astype(np.float16)


def _directions(loaded: LoadedModel, measured: Measurements, setting: Setting, rows: np.ndarray) -> Directions:
    directions = measured.estimate(setting.site, setting.positions, rows)
    if setting.mode == "cap":
        directions = measure_natural_tokens(loaded, directions, measured.natural_sequences(rows))
    return directions


def _answers(
    loaded: LoadedModel, measured: Measurements, intervention: Intervention, rows: np.ndarray, max_tokens: int
) -> list[list[dict[str, list[int]]]]:
    """Token ids [pair][side] "before" and "after"."""
    prompts = [prompt for i in rows for prompt in measured.prompts[i]]
    both = [write_answers(loaded, prompts, used, max_tokens) for used in (NOTHING, intervention)]
    pairs = [dict(zip(("before", "after"), two, strict=True)) for two in zip(*both, strict=True)]
    return [pairs[i : i + 2] for i in range(0, len(pairs), 2)]


def _effect(loaded: LoadedModel, setting: Setting, intervention: Intervention, artifacts: list[dict]) -> Proof:
    """What the intervention does along artifact prompts and the answers without it."""
    prompts, answers = [a["prompt_tokens"] for a in artifacts], [a["before"]["tokens"] for a in artifacts]
    effect = prove(loaded, intervention, prompts, answers)
    if effect.touched == 0 and setting.scale != 0:
        raise UserError(
            f"This setting ({setting.describe()}) changes nothing on artifact prompts. "
            "Use another mode, other layers or another threshold."
        )
    return effect


def _record(loaded: LoadedModel, text: str, prompt: list[int], answers: dict[str, list[int]]) -> dict:
    record: dict = {"prompt": text, "prompt_tokens": prompt}
    for when, tokens in answers.items():
        answer = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        record[when] = {"text": answer, "tokens": tokens, "refused": is_refusal(answer)}
    return record


def _scores(
    loaded: LoadedModel,
    directions: Directions,
    intervention: Intervention,
    prompt: list[int],
    answers: dict[str, list[int]],
) -> list[np.ndarray]:
    """[tokens, layers] of the prompt and answer before, and of the answer after."""
    before = score_tokens_by_layer(loaded, directions, prompt + answers["before"])
    with edit(loaded.model, intervention.in_one_pass(len(prompt))):
        after = score_tokens_by_layer(loaded, directions, prompt + answers["after"])
    return [before, after[len(prompt) :]]


def _pieces(loaded: LoadedModel, records: list[dict]) -> dict[str, str]:
    """The text of every token that occurs, by its id."""
    ids = set()
    for record in records:
        for side in SIDES:
            ids.update(record[side]["prompt_tokens"])
            for when in ("before", "after"):
                ids.update(record[side][when]["tokens"])
    return {str(token): loaded.tokenizer.decode([token]) for token in sorted(ids)}


def save_transcripts(folder: Path, result: dict, scores: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, scores=scores)
    write_atomically(folder / SCORES, buffer.getvalue())
    write_json(folder / TRANSCRIPTS, result)


def load_transcripts(folder: Path) -> tuple[dict, np.ndarray]:
    """What `save_transcripts` wrote.

    Raises:
        UserError: a file is missing, damaged, or not of the same run as the other.
    """
    result = read_json(folder / TRANSCRIPTS, "transcripts file")
    try:
        with np.load(folder / SCORES, allow_pickle=False) as file:
            scores = file["scores"]
    except DAMAGE as error:
        raise UserError(f"{folder / SCORES} cannot be read ({error}); run `python suppress.py --all-pairs`.") from None
    tokens = sum(
        len(pair[side]["prompt_tokens"]) + len(pair[side]["before"]["tokens"]) + len(pair[side]["after"]["tokens"])
        for pair in result["pairs"]
        for side in SIDES
    )
    if scores.shape != (tokens, result["num_layers"]):
        raise UserError(f"{SCORES} and {TRANSCRIPTS} in {folder} do not belong together; run "
                        "`python suppress.py --all-pairs` again.")  # fmt: skip
    return result, scores
