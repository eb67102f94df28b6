"""Attention sinks: tokens that the model itself uses as a place to look at, told by the size of their residual stream.

The first token, and now and then a delimiter or a word without meaning, gets a residual stream that is many times as
long as that of all others (Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762). What a token is
compared with is measured once per model, layer by layer: one norm for all layers would call every late token of Gemma a
sink, and one from the text itself would depend on its length, its padding and on the edits that act on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .activation_capture import TEXTS_AT_ONCE, block_sites, forward
from .generation import length_sorted_batches

# Times the norm of ordinary tokens. On SmolLM2 sinks reach 7 to 172 times it and all others stay below 2.5.
FACTOR = 5.0
REFERENCE = (
    "On a clear morning in early spring, three friends walked along the river to the old mill. They talked about their "
    "work, shared some bread and cheese, and wondered how people had lived here a hundred years before."
)


def ordinary_norms(model: nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """[layers] the median norm of the residual stream over the tokens of a text."""
    return np.median(_norms(model, [tokens])[0], axis=1)


def find_sinks(model: nn.Module, texts: Sequence[Sequence[int]], ordinary: np.ndarray) -> list[tuple[int, ...]]:
    """The positions of each text's sinks: beyond FACTOR times the ordinary norm after at least one block.

    Args:
        texts: token ids, as the unedited model reads them.
        ordinary: see `ordinary_norms`.
    """
    sinks: list[tuple[int, ...]] = [()] * len(texts)
    for batch in length_sorted_batches(texts, TEXTS_AT_ONCE):
        for i, norms in zip(batch, _norms(model, [texts[i] for i in batch]), strict=True):
            sinks[i] = tuple(np.flatnonzero((norms > FACTOR * ordinary[:, None]).any(axis=0)).tolist())
    return sinks


def _norms(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """[layers, tokens] of each text."""
    blocks = block_sites(model)
    _, states = forward(model, texts, blocks)
    norms = mx.stack([mx.linalg.norm(states[block].astype(mx.float32), axis=-1) for block in blocks], axis=1)
    return [row[:, : len(text)] for row, text in zip(np.array(norms), texts, strict=True)]
