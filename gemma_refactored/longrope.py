"""Correct mlx-lm's longrope (Phi-3, Phi-4-mini): short prompts use the short factors.

LongRoPE (arXiv 2402.13753) has two sets of frequency factors. transformers takes the short ones for
sequences of up to `original_max_position_embeddings` and the long ones beyond; mlx-lm takes the
long ones always, which moves the logits of a short prompt by some 20 %.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import SuScaledRoPE


class _Rows(threading.local):
    """Of this thread's pass: id of a LongRoPE -> which factors each row ([batch, 1, 1, 1] bool) or all (a bool) use."""

    def __init__(self):
        self.is_long: dict[int, bool | mx.array] = {}


_ROWS = _Rows()


class LongRoPE(nn.Module):
    """Rotary embedding that chooses its factors by the length of the sequence.

    Inside of `rope_lengths` each row uses the factors for its prompt's length; elsewhere the length of the
    pass at hand decides, which is right for one pass over a whole sequence.
    """

    def __init__(self, original: SuScaledRoPE, base: float, short_factor: Sequence[float]):
        super().__init__()
        self.dims, self.limit = original.dim, original.original_max_position_embeddings
        self._scale, self._long = original._scale, original._freqs
        exponents = mx.arange(0, self.dims, 2, dtype=mx.float32) / self.dims
        self._short = mx.array(list(short_factor), mx.float32) * base**exponents

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        x = x.at[..., : self.dims].multiply(self._scale)

        def rotate(freqs):
            return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)

        is_long = _ROWS.is_long.get(id(self), x.shape[-2] > self.limit)
        if isinstance(is_long, bool):
            return rotate(self._long if is_long else self._short)
        return mx.where(is_long, rotate(self._long), rotate(self._short))


def correct_longrope(model: nn.Module, config: dict) -> None:
    """Replace every longrope module of an mlx-lm model by `LongRoPE`."""
    scaling = config.get("rope_scaling") or {}
    for module in model.modules():
        rope = module.get("rope")
        if isinstance(rope, SuScaledRoPE) and "short_factor" in scaling:
            module.rope = LongRoPE(rope, config.get("rope_theta", 10000.0), scaling["short_factor"])


class rope_lengths:
    """While it lasts (in this thread) each row uses the factors for its own length; can be entered for each pass."""

    def __init__(self, model: nn.Module, lengths: Sequence[int]):
        self._is_long = {}
        for rope in (module for module in model.modules() if isinstance(module, LongRoPE)):
            rows = [length > rope.limit for length in lengths]
            uniform = all(rows) or not any(rows)
            self._is_long[id(rope)] = rows[0] if uniform else mx.array(rows)[:, None, None, None]

    def __enter__(self) -> None:
        self._outer, _ROWS.is_long = _ROWS.is_long, {**_ROWS.is_long, **self._is_long}

    def __exit__(self, *_) -> None:
        _ROWS.is_long = self._outer
