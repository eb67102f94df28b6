"""Shared by all tests."""

import resource
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from mlx_lm.utils import dequantize_model

from gemma_refactored.checkpoint_files import read_config
from gemma_refactored.config_audit import complete
from gemma_refactored.model_loading import load_weights

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_GEMMAS = sorted(folder.name for folder in GOLDEN.glob("gemma*"))


# `make test` tries the same examples every time; `make fuzz` new ones, ten times as many.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("fuzz", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


def tries(count: int) -> settings:
    """Decorates a property test that tries `count` examples, and ten times as many under `make fuzz`."""
    return settings(max_examples=count * settings.default.max_examples // 100)


@contextmanager
def no_file_larger_than(size: int):
    """What `ulimit -f` does, which is what a full disk does too: writing fails in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def relative_error(actual, expected) -> float:
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def load_golden(name: str, expand: bool = True):
    """A checkpoint of tests/golden through the real loader, and what transformers made of it."""
    folder = GOLDEN / name
    config = read_config(folder)
    model, _ = load_weights(folder, config, complete(config))
    if expand:
        model = dequantize_model(model)
    return model, mx.load(str(folder / "golden.safetensors"))


@pytest.fixture(scope="session")
def organism():
    from alignment_artifacts.default_model import DEFAULT_MODEL
    from gemma_refactored.model_loading import load

    return load(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library on the organism, measured once."""
    from alignment_artifacts import AlignmentArtifacts

    return AlignmentArtifacts(cache=tmp_path_factory.mktemp("cache"), show_progress=False, collections=())
