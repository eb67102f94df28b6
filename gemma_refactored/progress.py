"""How far something long is: a bar on a terminal; where the output goes elsewhere, a line per stage and every 30 s."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

SHARE, SECONDS = 0.05, 10  # an estimate is made after this share of the work, or after this time
EVERY = 30  # seconds between the lines that follow, and before the first, if one piece of work takes so long

T = TypeVar("T")


@contextmanager
def stage(name: str, total: int, unit: str, quiet: bool = False) -> Iterator[Callable[..., object]]:
    """One stage of a run: calls of the function that it gives add up to `total` units.

    What an earlier run has left is told by `kept=True`: it takes no time, so nothing follows from it for the rest.

    Args:
        name: what is being done ("measuring").
        quiet: say nothing.
    """
    from tqdm import tqdm

    has_bar = sys.stderr.isatty() and not quiet
    start, done, is_silent = time.perf_counter(), 0, has_bar or quiet
    told: float | None = None  # when the last line was printed
    warm_up: tuple[float, int] | None = None  # the first call comes late: of its time nothing follows for the rest
    with tqdm(total=total, desc=name, unit=f" {unit}", leave=False, disable=not has_bar) as bar:

        def advance(count: int, kept: bool = False) -> None:
            nonlocal total, done, told, warm_up
            bar.update(count)
            if kept:
                total -= count
                return
            done += count
            seconds = time.perf_counter() - start
            is_first, (first_seconds, first) = warm_up is None, warm_up or (0.0, 0)
            warm_up = warm_up or (seconds, done)
            if told is None:
                # The first call's time has more in it than its share (the prompts before the first token, say).
                is_enough = seconds > SECONDS or done >= SHARE * total
                is_time = done >= total or (is_enough and not is_first) or (is_first and seconds > EVERY)
            else:
                is_time = seconds >= told + EVERY and done < total
            if is_silent or not is_time or (done <= first and done < total):
                return
            left = (seconds - first_seconds) / (done - first) * (total - done) if done < total else 0.0
            text = f"{counted(total, unit)}, about {duration(seconds + left)}"
            if told is not None:
                text = f"{done} of {counted(total, unit)}, about {duration(left)} left"
            if is_first and done < total:
                text = f"{done} of {counted(total, unit)} after {duration(seconds)}"
            else:
                told = seconds
            print(f"{name}: {text}", file=sys.stderr, flush=True)

        yield advance


def each(items: Sequence[T], name: str, unit: str) -> Iterator[T]:
    """The items, one after the other, as a `stage`."""
    with stage(name, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)


def duration(seconds: float) -> str:
    """For people: "45 seconds", "3 minutes"."""
    number, unit = (seconds, "second") if seconds < 90 else (seconds / 60, "minute")
    return counted(round(number), unit)


def counted(number: int, unit: str) -> str:
    """ "1 text", "2 texts"."""
    return f"{number} {unit}{'' if number == 1 else 's'}"
