"""Two models read the same texts, so that only their representations differ, not what they have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from alignment_artifacts.behaviour.answers import KnownAnswer, nothing_known, unedited_answers
from gemma_refactored.activation_capture import read
from gemma_refactored.model_loading import LoadedModel

# What both models read after the prompts; "own answers" is free-running generation, where each reads what it wrote.
CONDITIONS = ("prompt_end", "answers_a", "answers_b", "neutral", "own_answers")


def read_pairs(
    models: Sequence[LoadedModel],
    prompts: Sequence[Sequence[Sequence[int]]],
    neutral: Sequence[int],
    max_tokens: int,
    sites: Sequence[str],
    progress: Callable[[int], object] = lambda texts: None,
    known: Sequence[KnownAnswer] = (nothing_known, nothing_known),
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Vectors of matched prompts in two models, under every one of CONDITIONS.

    Args:
        prompts: token ids, [pair][natural, artifact].
        neutral: token ids of a text that is the same after every prompt.
        progress: called with numbers of texts, 8 per prompt in total.
        known: for each model, a source of answers that have already been generated.
    Returns:
        condition -> vectors of the first and of the second model [pairs, 2, layers, hidden], and the indices
        of the pairs (those with an empty answer are omitted where that answer is read).
    """
    flat = [prompt for pair in prompts for prompt in pair]
    answers = []
    for model, known_answer in zip(models, known, strict=True):
        answers.append(unedited_answers(model, flat, max_tokens, known_answer))
        progress(len(flat))
    texts = {"answers_a": answers[0], "answers_b": answers[1], "neutral": [list(neutral)] * len(flat)}
    ends: dict[str, list[np.ndarray]] = {}  # of the prompts, before each text, in both models
    vectors: dict[str, list[np.ndarray]] = {}
    for name, text in texts.items():
        both = [read_texts(model, flat, text, sites, progress) for model in models]
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


def read_texts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    sites: Sequence[str],
    progress: Callable[[int], object] = lambda texts: None,
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over each prompt with its continuation.

    Args:
        sites: one per layer.
        progress: called with numbers of texts that were read.
    Returns:
        float32 [texts, layers, hidden], of the prompt's last token, and the mean over the continuation
        (NaN where that is empty).
    """
    texts = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    ends = np.full((len(texts), len(sites), loaded.hidden_size), np.nan, np.float32)
    means = ends.copy()
    for i, states in read(loaded.model, texts, sites):
        start = len(prompts[i])
        ends[i] = states[start - 1]
        if len(states) > start:
            means[i] = states[start:].mean(axis=0)
        progress(1)
    return ends, means
