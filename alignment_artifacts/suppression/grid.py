"""The settings that a sweep tries, and what a setting may cost. Needs no MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from alignment_artifacts.edits.options import Mode, Positions, Quantile, Scale, Where
from gemma_refactored.settings import Between


@dataclass(frozen=True)
class Grid:
    """The settings that are tried."""

    scales: dict[Mode, tuple[Scale, ...]]
    """scales of each mode"""
    cap_quantiles: tuple[Quantile, ...] = (0.9,)
    """for the mode cap: shares of natural tokens that stay untouched"""
    positions: tuple[Positions, ...] = ("prompt_end",)
    """where directions are measured"""
    layer_sets: tuple[Literal["best", "all"], ...] = ("best", "all")
    """blocks that are edited: those that separate best, or all"""
    where: tuple[Where, ...] = ("everywhere",)
    """tokens that are edited"""


@dataclass(frozen=True)
class Limits:
    """What a setting may cost."""

    kl: Annotated[float, Between(1e-9, 1000)] = 0.05
    """nats per token along unedited natural answers"""
    changed: Annotated[float, Between(0, 1)] = 0.1
    """share of natural answers that are no longer the same"""
