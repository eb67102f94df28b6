"""Shared by all tests. Importing gemma_refactored first loads OpenBLAS where there is one."""

from pathlib import Path

import numpy as np
import pytest

import gemma_refactored  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"


def relative_error(actual, expected) -> float:
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="session")
def organism():
    from gemma_refactored.model_loading import load

    return load()
