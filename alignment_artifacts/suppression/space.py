"""The settings that a search may try, and what a setting may cost. Needs no MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignment_artifacts.edits.options import Mode, Positions, Quantile, Scale, Where
from gemma_refactored.settings import Between


@dataclass(frozen=True)
class Space:
    """The settings that may be tried: bands of neighbouring blocks, at every site that the model has."""

    scales: dict[Mode, tuple[Scale, ...]]
    """modes, each with its least and largest strength"""
    positions: tuple[Positions, ...] = ("prompt_end",)
    """where directions are measured"""
    where: tuple[Where, ...] = ("everywhere",)
    """tokens that are edited"""
    widths: tuple[Annotated[int, Between(1)], ...] = (1, 1000)
    """least and largest number of neighbouring blocks that are edited"""
    share_direction: bool = True
    """try one direction for all edited blocks, too: that of the block that separates best"""
    cap_quantiles: tuple[Quantile, ...] = (0.5, 0.99)
    """for the mode cap: least and largest share of natural tokens that stay untouched"""
    pca_components: tuple[Annotated[int, Between(1, 32)], ...] = (1, 6)
    """for the mode subspace: least and largest number of directions that are removed"""
    trials: Annotated[int, Between(1, 100_000)] = 64
    """settings that are tried by their effect on the first tokens alone"""
    generated: Annotated[int, Between(1, 100_000)] = 6
    """the most promising of these, which are judged by whole answers"""


@dataclass(frozen=True)
class Limits:
    """What a setting may cost."""

    kl: Annotated[float, Between(1e-9, 1000)] = 0.05
    """nats per token along unedited natural answers"""
    changed: Annotated[float, Between(0, 1)] = 1.0
    """share of natural answers that are no longer the same, word for word; 1: any (an answer of some length changes at
    costs far below a budget of KL that is worth having)"""
