"""float32 on a Linux CPU: MLX's own functions, written from what is fast there.

MLX's CPU backend computes exp, tanh, erf, sin and cos one number at a time (9 to 35 ns each, where a product or a
quotient takes 0.6) and has no fused attention. `put_in_place` replaces the functions of `mlx.core` that all models
share, Gemma and the architectures of mlx-lm alike: SiLU, SwiGLU and every GELU are made of the first three. Called by
`model_loading.load`, once, on a Linux CPU only; Metal and CUDA have good kernels for all of this. Other dtypes than
float32 go to MLX's functions. Measured by benchmarks/collection_speed.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .model_architecture import Gemma

# sigmoid(x) - 1/2 = x (CONSTANT + sum of a / (x^2 + b)) for |x| <= LIMIT, where float32 has 0 and 1: the partial
# fractions of tanh (whose b are the squares of odd multiples of pi), the later ones fitted to stand for all that
# follow. The error is 6e-8 at most.
LIMIT = 16.6
CONSTANT = 0.004579785464868601
FRACTIONS = (
    (1.9999972246503583, 9.86959672430293), (2.014570626054114, 88.95033020068361),
    (2.896798571416482, 273.9846170074143), (11.185955458114671, 1170.4633376446398),
)  # fmt: skip
# erf(x) ~ x P(x^2) / Q(x^2) for |x| <= 4, where float32 erf is 1: coefficients of Eigen and XLA, highest first.
ERF_P = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
    -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
ERF_Q = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02,
)  # fmt: skip

MLX = {"sigmoid": mx.sigmoid, "tanh": mx.tanh, "erf": mx.erf}
MLX_ATTENTION = mx.fast.scaled_dot_product_attention


def put_in_place() -> None:
    """Have everything in this process that calls these functions of `mlx.core` use the ones below."""
    mx.sigmoid, mx.tanh, mx.erf = sigmoid, tanh, erf
    mx.fast.scaled_dot_product_attention = attention


def sigmoid(x: mx.array, **where) -> mx.array:
    return 0.5 + _above_half(x) if _is_float32(x) else MLX["sigmoid"](x, **where)


def tanh(x: mx.array, **where) -> mx.array:
    return 2.0 * _above_half(2.0 * x) if _is_float32(x) else MLX["tanh"](x, **where)


def erf(x: mx.array, **where) -> mx.array:
    if not _is_float32(x):
        return MLX["erf"](x, **where)
    x = mx.clip(x, -4.0, 4.0)
    square = x * x
    return x * _polynomial(ERF_P, square) / _polynomial(ERF_Q, square)


def _is_float32(x) -> bool:
    return isinstance(x, mx.array) and x.dtype == mx.float32


def _above_half(x: mx.array) -> mx.array:
    """sigmoid(x) - 1/2, which keeps the digits of small numbers."""
    x = mx.clip(x, -LIMIT, LIMIT)
    square = x * x
    (a, b), *others = FRACTIONS
    total = a / (square + b)
    for a, b in others:
        total = total + a / (square + b)
    return x * (total + CONSTANT)


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask=None, sinks=None, **where) -> mx.array:
    """`mx.fast.scaled_dot_product_attention` with all query heads of a key head in one product.

    Args:
        q: [batch, heads, positions, width]; k, v: [batch, key heads, keys, ..].
        mask: "causal", or what scores [batch, heads, positions, keys] are masked by (bool) or added to.
    """
    if not _is_float32(q) or sinks is not None:
        return MLX_ATTENTION(q, k, v, scale=scale, mask=mask, sinks=sinks, **where)
    batch, heads, length, width = q.shape
    folded, keys = (batch, k.shape[1], -1), k.shape[2]
    scores = ((q * scale).reshape(*folded, width) @ k.swapaxes(-1, -2)).reshape(batch, heads, length, keys)
    if isinstance(mask, str):
        mask = mx.arange(keys - length, keys)[:, None] >= mx.arange(keys)
    if mask is not None:
        is_bool = mask.dtype == mx.bool_  # finite, so that rows of padding alone stay numbers
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if is_bool else scores + mask
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(*folded, keys)
    return (weights @ v).reshape(batch, heads, length, -1)


def share_rotations(model: Gemma) -> None:
    """Have the layers of a float32 Gemma compute cosines and sines once a pass."""
    rotations: dict[tuple[float, float], Rotation] = {}
    for block in model.layers:
        rope = block.self_attn.rope
        block.self_attn.rope = SharedRoPE(rotations.setdefault((rope.base, rope.scale), Rotation(rope)))


class Rotation:
    """Cosines and sines of a pass, computed for its first layer and kept for the others.

    `Decoder` hands the same `offset` object to every layer, which is how a pass is recognised.
    """

    def __init__(self, rope: nn.RoPE):
        self.frequencies = rope.scale * rope.base ** (-mx.arange(0, rope.dims, 2) / rope.dims)
        self.memo: tuple | None = None  # replaced as a whole, so that two threads never mix their passes

    def at(self, offset: int | mx.array, length: int) -> tuple[mx.array, mx.array]:
        """[rows or 1, 1, length, dims / 2] each."""
        memo = self.memo
        if memo is None or memo[0] is not offset or memo[1] != length:
            positions = mx.expand_dims(mx.array(offset), -1) + mx.arange(length)
            angles = positions.reshape(-1, 1, length, 1) * self.frequencies
            memo = self.memo = (offset, length, mx.cos(angles), mx.sin(angles))
        return memo[2], memo[3]


class SharedRoPE(nn.Module):
    """`nn.RoPE` whose rotation is computed once a pass for all layers with the same base."""

    def __init__(self, rotation: Rotation):
        super().__init__()
        self.rotation = rotation

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """[rows, heads, length, dims], its first token at position `offset` (an int, or one for each row)."""
        cosine, sine = self.rotation.at(offset, x.shape[-2])
        first, second = mx.split(x, 2, axis=-1)
        return mx.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
