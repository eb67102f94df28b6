"""Indices stay within their tables, and logits are numbers."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_refactored.checks import mark_not_finite, refuse_beyond_tables
from gemma_refactored.errors import UserError
from gemma_refactored.generation import Sampling, generate
from gemma_refactored.model_loading import load

from .tiny_checkpoints import random_gemma, write_family


@pytest.mark.parametrize("token", [1448, 100_000, -1])
def test_a_token_beyond_the_embedding_is_refused(token):
    with pytest.raises(UserError, match=f"token {token}, but this model's embedding ends at 1447"):
        next(generate(random_gemma(), [[2, 5], [2, token]], 2))


def test_positions_end_with_their_table(tmp_path):
    model = load(write_family(tmp_path / "m", "gpt2")).model
    refuse_beyond_tables(model, [[1] * 250], 6)
    with pytest.raises(UserError, match="256 positions"):
        next(generate(model, [[1] * 250], 7))
    refuse_beyond_tables(random_gemma(), [[1] * 5000], 7)  # rotary embeddings have no table


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_that_are_no_numbers_are_marked(dtype):
    logits = mx.array([[0.0, 1, 2], [0, float("nan"), 2], [0, 1, float("inf")], [-float("inf"), 1, 2]]).astype(dtype)
    marked = mark_not_finite(mx.array([2, 2, 2, 2], mx.uint32), logits)
    assert np.array(marked).tolist() == [2, -1, -1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_no_numbers_writes_nothing(value, temperature):
    model = random_gemma()
    model.model.norm.weight = mx.concatenate([model.model.norm.weight[:-1], mx.array([value])])
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        list(generate(model, [[2, 5, 9]], 3, Sampling(temperature=temperature)))
