"""Several processes on one run, as `mlx.launch -n 2 -- python run_model.py ..` starts them.

By default each process holds the whole model and takes its share of the prompts. Started
alone, a process is a team of one, and nothing here costs anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of this run, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True in the one process that talks to the user and writes the summary."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's part of a list that all of them have."""
        return items[self.rank :: self.size]

    def exchange(self, item) -> list:
        """What every process gave (anything JSON can hold), in order of rank. Waits for all of them.

        Raises:
            UserError: one of them has stopped.
        """
        if self.size == 1:
            return [item]
        data = np.frombuffer(json.dumps(item).encode(), np.uint8)
        try:
            lengths = np.array(mx.distributed.all_gather(mx.array([data.size])))
            padded = np.pad(data, (0, max(0, lengths.max() - data.size)))
            everything = np.array(mx.distributed.all_gather(mx.array(padded)[None]))
            # A lost connection is not always an error in MLX: it may leave data that was never received.
            return [json.loads(row[:length].tobytes()) for row, length in zip(everything, lengths, strict=True)]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"Another process of this run has stopped ({error}); see its own message.") from None

    def lead(self, action: Callable[[], T]) -> T:
        """What `action` returns in the first process (as JSON holds it), in all of them; they share its error too."""
        outcome: dict[str, Any] | None = None
        if self.leads:
            try:
                outcome = {"value": action()}
            except UserError as error:
                outcome = {"error": str(error)}
        outcome = self.exchange(outcome)[0]
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["value"]


def join_team() -> Team:
    """Meet the other processes that mlx.launch has started; a team of one without it."""
    group = mx.distributed.init()
    return Team(group.rank(), group.size())


def shard(model: nn.Module, model_type: str) -> None:
    """Split the weights of every block over the team (tensor parallelism), as far as mlx-lm supports it.

    Every process then computes every activation together with the others, and has them whole.

    Raises:
        UserError: there is only one process, or mlx-lm cannot split this architecture, or not over that many.
    """
    group = mx.distributed.init()
    if group.size() == 1:
        raise UserError(
            "--shard splits a model over several processes; start them with "
            "`mlx.launch -n 2 -- python run_model.py --shard ..`."
        )
    if not hasattr(model, "shard"):
        raise UserError(
            f"mlx-lm cannot split the architecture {model_type!r} over processes; "
            "without --shard each process takes the whole model and a share of the prompts."
        )
    try:
        model.shard(group)
    except ValueError as error:
        raise UserError(f"This model cannot be split over {group.size()} processes: {error}") from error
