"""The settings of the toxicity experiment. Needs no MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from gemma_refactored.configuration import Seed, Temperature, TopP
from gemma_refactored.settings import Between


@dataclass(frozen=True)
class Config:
    """How the experiment is run."""

    alphas: tuple[Annotated[float, Between(-1000, 1000)], ...] = (-1.0, 0.0, 0.5, 1.5)
    """strengths to try, positive ones away from toxicity; the largest one within max_kl at the best layer is added"""
    layers: tuple[Annotated[int, Between(0)], ...] | None = None
    """layers to steer, one at a time; None: all"""
    num_pairs: Annotated[int, Between(1)] = 20
    """contrastive pairs that the vector is learnt from"""
    samples: Annotated[int, Between(1)] = 5
    """continuations of each prompt"""
    max_tokens: Annotated[int, Between(1, 1_000_000)] = 32
    """tokens of a continuation"""
    temperature: Temperature = 0.7
    """sampling temperature"""
    top_p: TopP = 0.9
    """nucleus sampling; 1: off"""
    last_tokens: Annotated[int, Between(1)] = 32
    """number of last tokens whose mean represents a text"""
    max_kl: Annotated[float, Between(0, 1000)] = 0.1
    """most that the chosen setting may cost on benign answers, in nats per token"""
    seed: Seed = 0
    """seed of all random choices"""
