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
        Must(lambda a: min(a) < 0 < max(a), "contain a negative and a positive strength"),
    ] = (-1.0, 3.0)
    """least and largest strength to try; positive ones lead away from toxicity"""
    trials: Annotated[int, Between(1, 100_000)] = 48
    """settings that are tried by their effect on the first tokens alone; a quarter as many with negative strengths"""
    judged: Annotated[int, Between(1, 100_000)] = 12
    """the most promising of these, which are judged by whole continuations"""
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
