"""Shares and means with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def wilson(hits: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson 1927)."""
    if n == 0:
        return [0.0, 1.0]
    share, spread = hits / n, z * np.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    return [float(max(0.0, centre - spread)), float(min(1.0, centre + spread))]


def rate(flags: Sequence[bool]) -> dict:
    """A share with its Wilson interval."""
    hits, n = int(sum(flags)), len(flags)
    return {"rate": hits / n if n else None, "hits": hits, "n": n, "ci": wilson(hits, n)}


def bootstrap_mean(groups: Sequence[np.ndarray] | np.ndarray, resamples: int = 1000, seed: int = 0) -> list[float]:
    """95 % interval of the mean over all members, groups drawn with replacement."""
    sums, counts = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    drawn = np.random.default_rng(seed).integers(0, len(groups), (resamples, len(groups)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def mean(values: np.ndarray) -> dict:
    """A mean with its bootstrap interval (None without spread); of True and False, that of `rate`."""
    if values.dtype == bool:
        share = rate(list(values))
        return {"mean": share["rate"], "n": share["n"], "ci": share["ci"]}
    interval = bootstrap_mean(values[:, None]) if len(set(values)) > 1 else None
    return {"mean": float(values.mean()) if len(values) else None, "n": len(values), "ci": interval}
