"""Our Gemma on a Linux CPU: the same functions, written from what is fast there.

MLX's CPU backend computes tanh, exp, sin and cos one number at a time (9 to 22 ns each, where a product takes
0.3) and has no fused attention. `model_loading.load` puts these in place, once, for float32 on a Linux CPU only;
Metal and CUDA have good kernels for all of this. Measured by benchmarks/collection_speed.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .model_architecture import Gemma

# tanh(x) ~ x P(x^2) / Q(x^2) for |x| <= 7.9, where float32 tanh is 1: coefficients of Eigen and XLA, highest first.
TANH_LIMIT = 7.90531110763549805
TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def use_cpu_kernels(model: Gemma) -> None:
    """Replace what is slow on a CPU in every block of a float32 model."""
    rotations: dict[tuple[float, float], Rotation] = {}
    for block in model.layers:
        attention = block.self_attn
        attention.has_fused_kernel = False
        rope = attention.rope
        attention.rope = SharedRoPE(rotations.setdefault((rope.base, rope.scale), Rotation(rope)))
        block.mlp.gelu = gelu_tanh


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form, the tanh by products and one quotient; within 1e-6 of the exact one."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + rational_tanh(inner))


def rational_tanh(x: mx.array) -> mx.array:
    x = mx.clip(x, -TANH_LIMIT, TANH_LIMIT)
    square = x * x
    return x * _polynomial(TANH_P, square) / _polynomial(TANH_Q, square)


def _polynomial(coefficients: tuple[float, ...], x: mx.array) -> mx.array:
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


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
