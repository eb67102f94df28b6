"""Two models read the same texts: what differs then is how they represent them, not what they have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import write_answers
from alignment_artifacts.edits.setting import NOTHING
from gemma_refactored.activation_capture import capture
from gemma_refactored.generation import length_sorted_batches
from gemma_refactored.model_loading import LoadedModel

BATCH_SIZE = 16


# What both models read after the prompts; "own answers" is free-running generation, each model its own.
CONDITIONS = ("prompt_end", "answers_a", "answers_b", "neutral", "own_answers")


def read_pairs(
    models: Sequence[LoadedModel],
    prompts: Sequence[Sequence[Sequence[int]]],
    neutral: Sequence[int],
    max_tokens: int,
    sites: Sequence[str],
    progress: Callable[[int], object] = lambda texts: None,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Vectors of matched prompts in two models, under every one of CONDITIONS.

    Args:
        prompts: token ids, [pair][natural, artifact].
        neutral: token ids of a text that is the same after every prompt.
        progress: called with numbers of texts; 8 for each prompt in all.
    Returns:
        condition -> vectors of the first and of the second model [pairs, 2, layers, hidden], and the indices
        of the pairs (those with an empty answer are left out where it is read).
    """
    flat = [prompt for pair in prompts for prompt in pair]
    answers = []
    for model in models:
        answers.append(write_answers(model, flat, NOTHING, max_tokens))
        progress(len(flat))
    read = {}  # (text, model) -> vectors of the prompts' ends, and of the text
    texts = {"answers_a": answers[0], "answers_b": answers[1], "neutral": [list(neutral)] * len(flat)}
    for name, text in texts.items():
        for number, model in enumerate(models):
            vectors = read_texts(model, flat, text, sites, progress)
            read[name, number] = [v.reshape(len(prompts), 2, *v.shape[1:]) for v in vectors]
    found = {"prompt_end": [read["neutral", number][0] for number in range(2)]}
    found |= {name: [read[name, number][1] for number in range(2)] for name in texts}
    found["own_answers"] = [read["answers_a", 0][1], read["answers_b", 1][1]]
    result = {}
    for name in CONDITIONS:
        known = np.flatnonzero(np.isfinite(found[name]).all(axis=(0, 2, 3, 4)))
        result[name] = found[name][0][known], found[name][1][known], known
    return result


def read_texts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    sites: Sequence[str],
    progress: Callable[[int], object] = lambda texts: None,
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over each prompt with its continuation.

    Rows are padded on the right, where a causal model does not look. Models that are given the same
    tokens see the same batches, so equal weights give equal numbers to the last bit.

    Args:
        sites: one a layer.
        progress: called with numbers of texts that were read.
    Returns:
        float32 [texts, layers, hidden], of the prompt's last token, and the mean over the continuation
        (NaN where that is empty).
    """
    texts = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    ends = np.full((len(texts), len(sites), loaded.hidden_size), np.nan, np.float32)
    means = ends.copy()
    for batch in length_sorted_batches(texts, BATCH_SIZE):
        width = max(len(texts[i]) for i in batch)
        rows = [texts[i] + [0] * (width - len(texts[i])) for i in batch]
        with capture(loaded.model, sites) as activations:
            loaded.model(mx.array(rows))
            seen = [activations[site].astype(mx.float32) for site in sites]
        mx.eval(seen)
        for layer, values in enumerate(map(np.array, seen)):
            for row, i in enumerate(batch):
                start, end = len(prompts[i]), len(texts[i])
                ends[i, layer] = values[row, start - 1]
                if end > start:
                    means[i, layer] = values[row, start:end].mean(axis=0)
        progress(len(batch))
    return ends, means
