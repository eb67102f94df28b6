"""LongRoPE (Phi-3, Phi-4-mini): the factors of a sequence depend on its length.

LongRoPE (arXiv 2402.13753) has two sets of frequency factors. transformers takes the short ones for
sequences of up to `original_max_position_embeddings` and the long ones beyond; mlx-lm takes the
long ones always, which moves the logits of a short prompt by some 20%.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .rope import ScaledRoPE


class _Rows(threading.local):
    """Of this thread's pass: id of a LongRoPE -> which factors each row ([batch, 1, 1, 1] bool) or all (a bool) use."""

    def __init__(self):
        self.is_long: dict[int, bool | mx.array] = {}


_ROWS = _Rows()


class LongRoPE(ScaledRoPE):
    """Rotary embedding that chooses its factors by the length of the sequence.

    Inside of `rope_lengths` each row uses the factors for its prompt's length; elsewhere the length of the
    pass at hand decides, which is right for one pass over a whole sequence.

    Args:
        settings: `rope_parameters` of the config; `context` is its max_position_embeddings.
    """

    def __init__(self, dims: int, traditional: bool, settings: dict, context: int):
        wavelengths = settings["rope_theta"] ** (np.arange(0, dims, 2) / dims)
        limit = settings["original_max_position_embeddings"]
        for name in ("short_factor", "long_factor"):
            if len(settings[name]) != dims // 2:
                raise ValueError(f"{name} must have {dims // 2} entries, not {len(settings[name])}")
        factor = settings.get("factor") or context / limit
        mscale = settings.get("attention_factor")
        if mscale is None:
            mscale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(limit))
        super().__init__(dims, traditional, wavelengths * np.array(settings["short_factor"]), mscale)
        self.limit = limit
        self._long = mx.array((wavelengths * np.array(settings["long_factor"])).astype(np.float32))

    def rotate(self, x: mx.array, offset: int | mx.array, wavelengths: mx.array) -> mx.array:
        is_long = _ROWS.is_long.get(id(self), x.shape[-2] > self.limit)
        if isinstance(is_long, bool):
            return super().rotate(x, offset, self._long if is_long else wavelengths)
        return mx.where(is_long, super().rotate(x, offset, self._long), super().rotate(x, offset, wavelengths))


class rope_lengths:
    """While it lasts (in this thread) each row uses the factors for its own length; can be entered for each pass."""

    def __init__(self, model: nn.Module, lengths: Sequence[int]):
        self._is_long = {}
        for rope in (module for module in model.modules() if isinstance(module, LongRoPE)):
            rows = [length > rope.limit for length in lengths]
            uniform = all(rows) or not any(rows)
            self._is_long[id(rope)] = rows[0] if uniform else mx.array(rows)[:, None, None, None]

    @property
    def is_uniform(self) -> bool:
        """Do all rows use the same factors?"""
        return all(isinstance(is_long, bool) for is_long in self._is_long.values())

    def __enter__(self) -> None:
        self._outer, _ROWS.is_long = _ROWS.is_long, {**_ROWS.is_long, **self._is_long}

    def __exit__(self, *_) -> None:
        _ROWS.is_long = self._outer
