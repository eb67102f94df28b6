"""Rotary embeddings scaled as transformers scales them, in place of mlx-lm's.

mlx-lm's architectures disagree with transformers on parts of it: YaRN's `attention_factor` and `truncate` are not
read, dynamic NTK scaling fails for batches, longrope takes the long factors always, and many architectures ignore
scaling of any type. Here all types are computed from the `rope_parameters` of the config, once for all.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class ScaledRoPE(nn.Module):
    """Rotates by given wavelengths, after multiplying queries and keys by the attention factor `mscale`."""

    def __init__(self, dims: int, traditional: bool, wavelengths: np.ndarray, mscale: float = 1.0):
        super().__init__()
        self.dims, self.traditional, self.mscale = dims, traditional, mscale
        self._wavelengths = mx.array(wavelengths.astype(np.float32))  # [dims / 2], per 2 pi

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if self.mscale != 1.0:
            x = x.at[..., : self.dims].multiply(self.mscale)
        return self.rotate(x, offset, self._wavelengths)

    def rotate(self, x: mx.array, offset: int | mx.array, wavelengths: mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=wavelengths
        )


class DynamicRoPE(ScaledRoPE):
    """Dynamic NTK: the base grows with a pass that is longer than the context, and with nothing else.

    Runs with a cache stay within the context (`job.check_context`), so they never see the scaling.
    """

    def __init__(self, dims: int, traditional: bool, base: float, factor: float, context: int):
        super().__init__(dims, traditional, _wavelengths(dims, base))
        self.base, self.factor, self.context = base, factor, context

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        length = x.shape[-2] + (offset if isinstance(offset, int) else 0)
        if length <= self.context:
            return self.rotate(x, offset, self._wavelengths)
        growth = self.factor * length / self.context - (self.factor - 1)
        base = self.base * growth ** (self.dims / (self.dims - 2))
        return self.rotate(x, offset, mx.array(_wavelengths(self.dims, base).astype(np.float32)))


def _wavelengths(dims: int, base: float) -> np.ndarray:
    return float(base) ** (np.arange(0, dims, 2) / dims)


def scaled_rope(dims: int, traditional: bool, settings: dict, context: int) -> nn.Module:
    """The module for `rope_parameters` of a type other than default and longrope.

    Raises:
        ValueError: a type that is none of transformers'.
    """
    kind, base = settings["rope_type"], settings["rope_theta"]
    wavelengths = _wavelengths(dims, base)
    if kind == "linear":
        return nn.RoPE(dims, traditional, base, scale=1 / settings["factor"])
    if kind == "dynamic":
        return DynamicRoPE(dims, traditional, base, settings["factor"], context)
    if kind == "llama3":
        return ScaledRoPE(dims, traditional, _llama3(wavelengths, settings))
    if kind == "yarn":
        return ScaledRoPE(
            dims, traditional, _yarn(wavelengths, dims, settings, context), _yarn_scale(settings, context)
        )
    raise ValueError(f"RoPE scaling {kind!r} is not supported")


def _llama3(wavelengths: np.ndarray, settings: dict) -> np.ndarray:
    """Long waves are stretched, short ones kept, those between interpolated."""
    original, factor = settings["original_max_position_embeddings"], settings["factor"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = original / (2 * math.pi * wavelengths)
    smooth = (turns - low) / (high - low)
    frequencies = np.where(turns < low, 1 / factor, np.where(turns > high, 1.0, (1 - smooth) / factor + smooth))
    return wavelengths / frequencies


def _yarn_factor(settings: dict, context: int) -> float:
    return settings.get("factor") or context / settings["original_max_position_embeddings"]


def _yarn(wavelengths: np.ndarray, dims: int, settings: dict, context: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071): a ramp between stretched and kept wavelengths."""

    def dimension(rotations: float) -> float:
        ratio = settings["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dims * math.log(ratio) / (2 * math.log(settings["rope_theta"]))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    stretched = np.clip((np.arange(dims // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return wavelengths / (stretched / _yarn_factor(settings, context) + 1 - stretched)


def _yarn_scale(settings: dict, context: int) -> float:
    if settings.get("attention_factor") is not None:
        return settings["attention_factor"]

    def growth(weight: float = 1.0) -> float:
        factor = _yarn_factor(settings, context)
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return growth(settings["mscale"]) / growth(settings["mscale_all_dim"])
    return growth()
