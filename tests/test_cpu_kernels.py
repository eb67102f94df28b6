"""What replaces slow functions on a Linux CPU gives the same numbers, and is used there only."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from gemma_refactored import cpu_kernels, model_architecture, model_loading
from gemma_refactored.activation_capture import capture, modules_by_site
from gemma_refactored.cpu_kernels import Rotation, SharedRoPE, rational_tanh, use_cpu_kernels
from gemma_refactored.generation import make_batch_cache

from .conftest import GOLDEN_GEMMAS, load_golden, relative_error
from .tiny_checkpoints import random_gemma, write_checkpoint


def test_tanh_and_gelu_are_right_to_a_few_units_in_the_last_place():
    x = np.concatenate([np.linspace(-12, 12, 200_001), [-1e30, -100, 100, 1e30]]).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    assert np.abs(np.array(rational_tanh(mx.array(x))) - exact).max() < 5e-7
    x = x[np.abs(x) <= 100]
    wide = x.astype(np.float64)
    exact = wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) / 2
    for function in (cpu_kernels.gelu_tanh, model_architecture.gelu_tanh):
        error = np.abs(np.array(function(mx.array(x))) - exact)
        assert (error / np.maximum(np.abs(exact), 1)).max() < 1e-6


@pytest.mark.parametrize("offset", [0, 700, mx.array([-3, 0, 650])], ids=["start", "int", "rows"])
@pytest.mark.parametrize("length", [1, 9])
def test_shared_rotation_is_that_of_nn_rope(offset, length):
    rope = nn.RoPE(32, base=1e4, scale=0.125)
    x = mx.random.normal((3, 4, length, 32))
    assert relative_error(SharedRoPE(Rotation(rope))(x, offset), rope(x, offset)) < 2e-5


def test_rotation_is_computed_once_a_pass(monkeypatch):
    model = random_gemma()
    use_cpu_kernels(model)
    calls = []
    cosine = mx.cos
    monkeypatch.setattr(cpu_kernels.mx, "cos", lambda angles: calls.append(angles.shape) or cosine(angles))
    cache = make_batch_cache(model, [2, 0])
    for length in (5, 1, 1):
        model(mx.zeros((2, length), mx.int32), cache=cache)
    # Three passes through three layers of two kinds.
    assert [shape[2] for shape in calls] == [5, 5, 1, 1, 1, 1]


@pytest.mark.parametrize("name", GOLDEN_GEMMAS)
def test_every_site_is_the_same(name):
    """In a padded batch, over chunks and steps that cross the sliding window."""
    plain, fast = load_golden(name)[0], load_golden(name)[0]
    use_cpu_kernels(fast)
    sites = [site for site in modules_by_site(plain) if not site.endswith(".weights")]  # else both are explicit
    caches = [make_batch_cache(model, [4, 0]) for model in (plain, fast)]
    tokens = mx.array(np.random.default_rng(0).integers(3, 97, (2, 20)))
    for chunk in (slice(0, 9), slice(9, 18), slice(18, 19), slice(19, 20)):
        seen = []
        for model, cache in zip((plain, fast), caches, strict=True):
            with capture(model, sites) as activations:
                logits = model(tokens[:, chunk], cache=cache)
            seen.append({"logits": logits, **activations})
        assert seen[0].keys() == seen[1].keys()
        for site, expected in seen[0].items():
            row = expected[1:] if chunk.start == 0 else expected  # the padding of the other row is nobody's
            assert relative_error(seen[1][site][-len(row) :], row) < 2e-5, (chunk, site)


def test_load_uses_them_for_float32_on_a_linux_cpu_only(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", random_gemma())

    def is_replaced(**options):
        block = model_loading.load(folder, **options).model.layers[0]
        return block.mlp.gelu is cpu_kernels.gelu_tanh

    monkeypatch.setattr(model_loading, "runs_on_linux_cpu", lambda: True)
    assert is_replaced() and not is_replaced(keep_precision=True)
    monkeypatch.setattr(model_loading, "runs_on_linux_cpu", lambda: False)
    assert not is_replaced()
