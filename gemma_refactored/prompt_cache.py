"""The cache of a batch of prompts: left-padded rows, filled before the first token is chosen.

What all prompts begin with (a system message, the marks of a turn) is read once, and its keys and values are handed to
every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from .errors import UserError
from .longrope import rope_lengths

PREFILL_TOKENS = 1024  # prompt tokens (rows x positions) processed at once: keeps the machine busy, and memory bounded
SHARED_TOKENS = 64  # (rows x positions) that a common beginning has to save to be worth a pass of its own

KeysAndValues = list[tuple[mx.array, mx.array]]  # of each layer, [1, heads, positions, width] each


def read_prompts(
    model: nn.Module,
    tokens: np.ndarray,
    lengths: Sequence[int],
    growth: int,
    on_pass: Callable[[slice, slice], object],
    spared: np.ndarray,
) -> list:
    """A cache with all but the last prompt token of each row; no logits are ever computed here.

    Args:
        tokens: [rows, positions], left-padded.
        lengths: of the prompts; where they differ, neighbouring rows are filled together, padded to the longest
            of them only, and their caches joined. (Sorted rows need little padding.)
        on_pass: called before each pass with the rows and positions that it reads.
        spared: [rows, positions, 1] what edits leave alone; beginnings are common only if they agree in this, too.
    """
    rows, longest = tokens.shape
    padding = [longest + 1 - length for length in lengths]
    at_once = max(1, PREFILL_TOKENS // max(1, longest)) if any(padding) else rows
    ids = mx.array(tokens)
    common = _common_length(tokens, padding, spared)
    beginning = _read_beginning(model, ids, lengths, padding[0], common, on_pass)
    caches = []
    for first in range(0, rows, at_once):
        group = slice(first, first + at_once)
        shared = min(padding[group])
        extra = [pad - shared for pad in padding[group]]
        cache = make_batch_cache(model, extra, growth, always_padded=any(padding))
        if beginning:
            _begin(cache, beginning, extra)
        with rope_lengths(model, lengths[group]):
            positions = max(1, PREFILL_TOKENS // len(lengths[group]))
            for start in range(shared + (common if beginning else 0), longest, positions):
                part = slice(start, min(start + positions, longest))
                on_pass(group, part)
                model(ids[group, part], cache=cache)
                mx.eval([c.state for c in cache])
        caches.append(cache)
    return _join(caches)


def _common_length(tokens: np.ndarray, padding: Sequence[int], spared: np.ndarray) -> int:
    """How many first tokens all rows have in common."""
    both = [list(zip(t[pad:], s[pad:, 0], strict=True)) for t, s, pad in zip(tokens, spared, padding, strict=True)]
    return next((i for i, of_rows in enumerate(zip(*both, strict=False)) if len(set(of_rows)) > 1), min(map(len, both)))


def _read_beginning(
    model: nn.Module,
    tokens: mx.array,
    lengths: Sequence[int],
    start: int,
    common: int,
    on_pass: Callable[[slice, slice], object],
) -> KeysAndValues | None:
    """Keys and values of the first `common` tokens, read once from the first row, where they begin at `start`.

    None where that saves little, or where a layer keeps something else than one key and value for each position.
    """
    if (len(lengths) - 1) * common < SHARED_TOKENS:
        return None
    cache, rope = make_prompt_cache(model), rope_lengths(model, lengths)
    is_plain = all(
        type(c) is KVCache or (type(c) is RotatingKVCache and c.keep == 0 and c.max_size >= common) for c in cache
    )
    if not is_plain or not rope.is_uniform:
        return None
    with rope:
        for first in range(start, start + common, PREFILL_TOKENS):
            part = slice(first, min(first + PREFILL_TOKENS, start + common))
            on_pass(slice(0, 1), part)
            model(tokens[:1, part], cache=cache)
            mx.eval([c.state for c in cache])
    return [(c.keys[..., :common, :], c.values[..., :common, :]) for c in cache]


def _begin(cache: list, beginning: KeysAndValues, padding: list[int]) -> None:
    """Fill empty caches of left-padded rows as a pass over their first positions would, as many as the beginning has.

    Rows with padding get fewer of its tokens, and read the others again.
    """
    length = beginning[0][0].shape[2]
    places = mx.maximum(mx.arange(length) - mx.array(padding)[:, None], 0)  # of padding any, it is masked
    for layer, both in zip(cache, beginning, strict=True):
        layer.update_and_fetch(*(mx.moveaxis(x[0][:, places], 0, 1) for x in both))
    mx.eval([c.state for c in cache])


def _join(caches: list[list]) -> list:
    """One cache of the rows of all, in pairs, so that no row is copied often."""
    while len(caches) > 1:
        for left, right in zip(caches[::2], caches[1::2], strict=False):  # the last may be without a partner
            for layer, more in zip(left, right, strict=True):
                layer.extend(more)
        caches = caches[::2]
    return caches[0]


def padding_is_harmless(model: nn.Module, tolerance: float = 1e-2) -> bool:
    """Does a left-padded row get the same logits as the same row alone?

    Some architectures of mlx-lm ignore the padding mask (MiniCPM3, phixtral), and recurrent layers
    cannot mask at all. Tried on two short rows; the tolerance leaves room for 16-bit rounding.
    """
    short, long = [3, 1, 2], [2, 3, 1, 2, 0, 1, 3, 2, 1]

    def last_logits(rows: list[list[int]], padding: list[int]) -> mx.array:
        cache = make_batch_cache(model, padding)
        tokens = mx.array([[row[0]] * pad + row for row, pad in zip(rows, padding, strict=True)])
        model(tokens[:, :-1], cache=cache)
        return model(tokens[:, -1:], cache=cache)[:, -1].astype(mx.float32)

    try:
        padded = last_logits([short, long], [len(long) - len(short), 0])[0]
    except (UserError, ValueError, TypeError):  # a cache that cannot be padded, or positions that are no plain number
        return False
    alone = last_logits([short], [0])[0]
    return bool((mx.abs(padded - alone).max() <= tolerance * mx.abs(alone).max()).item())


def make_batch_cache(model: nn.Module, padding: Sequence[int], growth: int = 256, always_padded: bool = False) -> list:
    """The model's KV cache for left-padded rows; the plain one where nothing is padded.

    Args:
        growth: tokens that are still to come; room is made for so many at a time, at most 256.
        always_padded: take the kind of cache that can be padded even so.
    Raises:
        UserError: the model uses a kind of cache that cannot mask padding.
    """
    cache = make_prompt_cache(model)
    if any(padding) or always_padded:
        cache = [padded(single, padding) for single in cache]
    for single in cache:
        if hasattr(single, "step"):
            single.step = min(single.step, growth)
    return cache


def padded(single, padding: Sequence[int]):
    """One layer's cache for left-padded rows."""
    if type(single) is KVCache:
        return BatchKVCache(list(padding))
    if type(single) is RotatingKVCache and single.keep == 0:
        return BatchRotatingKVCache(single.max_size, list(padding))
    if type(single) is ArraysCache:
        return ArraysCache(len(single.cache), left_padding=list(padding))
    if type(single) is CacheList:
        return CacheList(*(padded(inner, padding) for inner in single.caches))
    raise UserError(f"This model's cache ({type(single).__name__}) cannot mask padding; use --batch-size 1.")
