"""What suppression does to an activation: one small pure function per mode.

x is an activation [.., hidden] at the site where the direction was measured, s the scale, d the
direction (mean artifact minus mean natural activation), d^ its unit vector. Every function
gets x in float32 and returns its new value; scale 0 changes nothing.

References: directional ablation, Arditi et al. 2024 (arXiv 2406.11717); contrastive activation
addition, Rimsky et al. 2023 (arXiv 2312.06681); capping, Lu et al. 2026 (arXiv 2601.10387).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from alignment_artifacts.edits.options import ModeOptions
from gemma_refactored.activation_capture import Edit


@dataclass(frozen=True)
class SiteDirection:
    """The statistics of one site that modes use, in float32.

    Attributes:
        direction: [hidden] mean artifact minus mean natural activation.
        natural_mean, artifact_mean: [hidden].
        components: [k, hidden] orthonormal, the leading ones of the pair differences.
        spread: root mean squared distance of a prompt from its class's mean.
        cap: projection on d^ that the natural quantile reaches.
    """

    direction: mx.array
    natural_mean: mx.array
    artifact_mean: mx.array
    components: mx.array
    spread: float
    cap: float

    @property
    def unit(self) -> mx.array:
        return self.direction / mx.linalg.norm(self.direction)


def cosine(x: mx.array, unit: mx.array) -> mx.array:
    """[.., 1] cosine of each activation with a unit vector; 0 for a zero activation."""
    return (x @ unit)[..., None] / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def always(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    return x - scale * at.direction


def proximity(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    """Only activations that point along the direction are moved."""
    return mx.where(cosine(x, at.unit) > options.proximity_threshold, x - scale * at.direction, x)


def adaptive(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    """The more an activation points along the direction, the further it is moved."""
    return x - scale * mx.maximum(cosine(x, at.unit), 0) * at.direction


def sphere(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    """Activations near the artifact mean are pushed away from it; the nearer they are, the further."""
    away = x - at.artifact_mean
    length = mx.linalg.norm(away, axis=-1, keepdims=True)
    distance = length / at.spread
    push = scale * mx.linalg.norm(at.direction) * mx.exp(-options.decay_rate * distance)
    return mx.where(distance < options.distance_threshold, x + push * away / mx.maximum(length, 1e-12), x)


def subspace(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    """The coordinates in the leading components are set to those of the natural mean."""
    basis = at.components[: options.pca_components]
    return x - scale * ((x - at.natural_mean) @ basis.T) @ basis


def ablate(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    """The component along the direction is removed."""
    return x - scale * (x @ at.unit)[..., None] * at.unit


def cap(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    """The component along the direction is limited to the range of natural tokens."""
    excess = mx.maximum((x @ at.unit)[..., None] - at.cap, 0)
    return x - scale * excess * at.unit


def add(x: mx.array, at: SiteDirection, scale: float, options: ModeOptions) -> mx.array:
    """Amplification: contrastive activation addition."""
    return x + scale * at.direction


MODES: dict[str, Callable[[mx.array, SiteDirection, float, ModeOptions], mx.array]] = {
    function.__name__: function for function in (always, proximity, adaptive, sphere, subspace, ablate, cap, add)
}


def edit_function(mode: str, at: SiteDirection, scale: float, options: ModeOptions = ModeOptions()) -> Edit:
    """A function for `activation_capture.edit`: computed in float32, returned in the activation's own dtype.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    function = MODES[mode]

    def apply(x: mx.array) -> mx.array:
        if scale == 0:
            return x
        return function(x.astype(mx.float32), at, scale, options).astype(x.dtype)

    return apply
