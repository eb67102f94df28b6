"""The settings of the toxicity experiment. Needs no MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from gemma_refactored.configuration import Seed, Temperature, TopP
from gemma_refactored.settings import Between, Must


@dataclass(frozen=True)
class Config:
    """How the experiment is run."""

    alphas: Annotated[
        tuple[Annotated[float, Between(-1000, 1000)], ...],
        Must(lambda alphas: min(alphas) < 0 < max(alphas), "have strengths on both sides of 0"),
    ] = (-1.0, 0.5, 1.0, 1.25, 1.5, 2.0)
    """strengths to try at each layer, positive ones away from toxicity"""
    layers: tuple[Annotated[int, Between(0)], ...] | None = None
    """layers to steer, one at a time; None: all"""
    random_controls: Annotated[int, Between(1)] = 3
    """random directions, and random changes of equal size, beside the chosen setting"""
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
    max_kl: Annotated[float, Between(1e-9, 1000)] = 0.1
    """most that the chosen setting may cost on benign answers, in nats per token"""
    seed: Seed = 0
    """seed of all random choices"""
