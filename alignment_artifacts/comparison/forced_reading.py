"""Two models read the same texts, so that only their representations differ, not what they have written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import BATCH_SIZE, KnownAnswer, nothing_known, unedited_answers
from gemma_refactored.activation_capture import TEXTS_AT_ONCE, read
from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import read_json, read_safetensors, write_json, write_safetensors
from gemma_refactored.generation import length_sorted_batches
from gemma_refactored.model_loading import LoadedModel

# What both models read after the prompts; "own answers" is free-running generation, where each reads what it wrote.
CONDITIONS = ("prompt_end", "answers_a", "answers_b", "neutral", "own_answers")


def read_pairs(
    models: Sequence[LoadedModel],
    prompts: Sequence[Sequence[Sequence[int]]],
    neutral: Sequence[int],
    max_tokens: int,
    sites: Sequence[str],
    progress: Callable[..., object] = lambda texts, kept=False: None,
    known: Sequence[KnownAnswer] = (nothing_known, nothing_known),
    cache: Path | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Vectors of matched prompts in two models, under every one of CONDITIONS.

    Args:
        prompts: token ids, [pair][natural, artifact].
        neutral: token ids of a text that is the same after every prompt.
        progress: called with numbers of texts, 8 per prompt in total; with kept=True where they were kept.
        known: for each model, a source of answers that have already been generated.
        cache: folder where what has been read is kept; None: nowhere.
    Returns:
        condition -> vectors of the first and of the second model [pairs, 2, layers, hidden], and the indices
        of the pairs (those with an empty answer are omitted where that answer is read).
    """
    flat = [prompt for pair in prompts for prompt in pair]
    answers = []
    for model, known_answer in zip(models, known, strict=True):
        answers.append(_answers(model, flat, max_tokens, known_answer, progress, cache))
    texts = {"answers_a": answers[0], "answers_b": answers[1], "neutral": [list(neutral)] * len(flat)}
    ends: dict[str, list[np.ndarray]] = {}  # of the prompts, before each text, in both models
    vectors: dict[str, list[np.ndarray]] = {}
    for name, text in texts.items():
        both = [read_texts(model, flat, text, sites, progress, cache) for model in models]
        ends[name], vectors[name] = (
            [values.reshape(len(prompts), 2, *values.shape[1:]) for values in kind] for kind in zip(*both, strict=True)
        )
    vectors["prompt_end"] = ends["neutral"]
    vectors["own_answers"] = [vectors["answers_a"][0], vectors["answers_b"][1]]
    result = {}
    for name in CONDITIONS:
        first, second = vectors[name]
        answered = np.flatnonzero(np.isfinite(vectors[name]).all(axis=(0, 2, 3, 4)))
        result[name] = first[answered], second[answered], answered
    return result


def _kept_in(cache: Path | None, what: str, loaded: LoadedModel, made_from: list, ending: str) -> Path | None:
    """The file for what these weights make of something; None without a cache."""
    key = json.dumps([{**loaded.facts(), "model": None}, made_from])
    return cache / f"{what}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.{ending}" if cache else None


def _answers(
    loaded: LoadedModel,
    prompts: list,
    max_tokens: int,
    known: KnownAnswer,
    progress: Callable[..., object],
    cache: Path | None,
) -> list[list[int]]:
    """Unedited answers, batch by batch: those that are known or in the cache, the others written now."""
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in loaded.batches(prompts, BATCH_SIZE):
        written, is_kept = _answers_of_batch(loaded, [prompts[i] for i in batch], max_tokens, known, cache)
        for i, answer in zip(batch, written, strict=True):
            answers[i] = answer
        progress(len(batch), kept=is_kept)
    return answers


def _answers_of_batch(
    loaded: LoadedModel, prompts: list, max_tokens: int, known: KnownAnswer, cache: Path | None
) -> tuple[list[list[int]], bool]:
    """The answers, and whether none had to be written."""
    path = _kept_in(cache, "answers", loaded, [prompts, max_tokens, list(loaded.end_tokens)], "json")
    if not (path and path.exists()):
        answers = unedited_answers(loaded, prompts, max_tokens, known)
        if path:
            write_json(path, answers)
        return answers, all(known(prompt, max_tokens) is not None for prompt in prompts)
    answers, vocabulary = read_json(path, "cache file"), len(loaded.tokenizer)
    try:
        is_whole = len(answers) == len(prompts) and all(
            isinstance(token, int) and 0 <= token < vocabulary for answer in answers for token in answer
        )
    except TypeError:
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} holds no answers to these prompts. Delete its folder; they are written anew.")
    return answers, True


def read_texts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    sites: Sequence[str],
    progress: Callable[..., object] = lambda texts, kept=False: None,
    cache: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over each prompt with its continuation.

    Args:
        sites: one per layer.
        progress: called with numbers of texts that were read; with kept=True where the cache has them.
        cache: folder where each batch is kept, and looked for first; None: nowhere.
    Returns:
        float32 [texts, layers, hidden], of the prompt's last token, and the mean over the continuation
        (NaN where that is empty).
    Raises:
        UserError: what is kept in the cache is damaged.
    """
    texts = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    ends = np.zeros((len(prompts), len(sites), loaded.hidden_size), np.float32)
    means = ends.copy()
    for batch in length_sorted_batches(texts, TEXTS_AT_ONCE):  # as `read` makes them; who stops it loses one
        starts = [len(prompts[i]) for i in batch]
        ends[batch], means[batch], is_kept = _read_batch(loaded, [texts[i] for i in batch], starts, sites, cache)
        progress(len(batch), kept=is_kept)
    return ends, means


def _read_batch(
    loaded: LoadedModel, texts: list[list[int]], starts: list[int], sites: Sequence[str], cache: Path | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """What `read_texts` returns, of a pass over texts with continuations from `starts` on; and whether it was kept."""
    path = _kept_in(cache, "read", loaded, [list(sites), texts, starts], "safetensors")
    shape = (len(texts), len(sites), loaded.hidden_size)
    if path and path.exists():
        return *_load(path, shape), True
    ends = np.full(shape, np.nan, np.float32)
    means = ends.copy()
    for i, states in read(loaded.model, texts, sites):
        ends[i] = states[starts[i] - 1]
        if len(states) > starts[i]:
            means[i] = states[starts[i] :].mean(axis=0)
    if path:
        write_safetensors(path, {"ends": mx.array(ends), "means": mx.array(means)})
    return ends, means, False


def _load(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    try:
        arrays, _ = read_safetensors(path)
        ends, means = (np.array(arrays[name]) for name in ("ends", "means"))
        if not ends.shape == means.shape == shape or not np.isfinite(ends).all():
            raise ValueError(f"it holds arrays of the shape {ends.shape}, or NaN")
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({shown(str(error))}). Delete its folder; it is read anew.") from None
    return ends, means
