"""Numbers as text, the same in every table, sentence and report: what is not defined is a dash, zero has no sign."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

UNDEFINED = "-"


def number(value: float | None, digits: int = 2, undefined: str = UNDEFINED) -> str:
    """With so many decimals; `undefined` for None."""
    return undefined if value is None else f"{value:z.{digits}f}"


def interval(ends: Sequence[float | None] | None, digits: int = 2, undefined: str = UNDEFINED) -> str:
    """ "[0.12, 3.40]"; in words that there is none."""
    if ends is None:
        return "(no interval)"
    return f"[{', '.join(number(end, digits, undefined) for end in ends)}]"


def percent(share: float | None, digits: int = 0) -> str:
    """0.84 -> "84%"."""
    return UNDEFINED if share is None else f"{share:z.{digits}%}"


def percents(ends: Sequence[float]) -> str:
    """The interval of a share: [0.7, 0.92] -> "[70-92]"."""
    low, high = (f"{100 * end:z.0f}" for end in ends)
    return f"[{low}-{high}]"


def signed_percent(change: float) -> str:
    """-0.9 -> "-90%", 0.04 -> "+4%"."""
    return f"{change:+.0%}"


def least_to_most(values: Sequence[float], told: Callable[[float], str]) -> str:
    """ "0.53 to 0.69"; one value where both are told the same, nothing of none."""
    return " to ".join(dict.fromkeys(told(least(values)) for least in (min, max))) if values else ""


def rate(record: dict) -> str:
    """A record of `rates.rate`: "84% [70-92]"."""
    return f"{percent(record['rate'])} {percents(record['ci'])}"


def named_range(shares: Sequence[float] | None) -> str:
    """[0.84, 0.96] -> "84% to 96%"; one share where both are the same."""
    if shares is None:
        return UNDEFINED
    low, high = map(percent, shares)
    return low if low == high else f"{low} to {high}"


def described_mean(record: dict) -> str:
    """A record of `rates.mean`: "0.84 [0.70, 0.92]", or "0.84 (no interval)"."""
    return UNDEFINED if record["mean"] is None else f"{number(record['mean'])} {interval(record['ci'])}"


def p_value(p: float | None) -> str:
    """For sentences, two significant digits; tables have `number(p, 3)`."""
    return UNDEFINED if p is None else f"{p:.2g}"


def named_layers(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "layers 0-2, 5"."""
    parts: list[list[int]] = []
    for layer in numbers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    listed = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return f"layer{'s' if len(numbers) > 1 else ''} {listed}"


def typeset(text: str) -> str:
    """The same on a page: a minus sign, and a dash for what is not defined."""
    text = re.sub(r"(?<!\d)-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<!\d)-(?!\d)", "\N{EN DASH}", text)
