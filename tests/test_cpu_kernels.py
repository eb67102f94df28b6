"""What replaces slow functions on a Linux CPU gives the same numbers, and is used there only."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from scipy import special

from gemma_refactored import cpu_kernels, model_loading
from gemma_refactored.activation_capture import capture, modules_by_site
from gemma_refactored.cpu_kernels import MLX, MLX_ATTENTION, Rotation, SharedRoPE, share_rotations
from gemma_refactored.model_loading import load
from gemma_refactored.prompt_cache import make_batch_cache

from .conftest import GOLDEN_GEMMAS, load_golden, relative_error
from .tiny_checkpoints import FAMILIES, random_gemma, write_checkpoint, write_family

REPLACED = {**{name: (mx, name) for name in MLX}, "attention": (mx.fast, "scaled_dot_product_attention")}


@pytest.fixture(autouse=True)
def use_mlx_functions(monkeypatch):
    """MLX's own functions first, whatever another test has put in place, and nothing compiled with others in it."""

    def use_them():
        for module, name in REPLACED.values():
            monkeypatch.setattr(module, name, {**MLX, "scaled_dot_product_attention": MLX_ATTENTION}[name])

    use_them()
    mx.disable_compile()
    yield use_them
    mx.enable_compile()


@pytest.mark.parametrize("name, exact", [("sigmoid", special.expit), ("tanh", np.tanh), ("erf", special.erf)])
def test_functions_are_right_to_a_few_units_in_the_last_place_of_one(name, exact):
    x = np.concatenate([np.linspace(-20, 20, 200_001), [-1e30, -100, 100, 1e30, np.inf, -np.inf]]).astype(np.float32)
    function = getattr(cpu_kernels, name)
    assert np.abs(np.array(function(mx.array(x))) - exact(x.astype(np.float64))).max() < 5e-7
    assert np.isnan(np.array(function(mx.array([np.nan])))).all()
    small = np.geomspace(1e-12, 1e-2, 100).astype(np.float32)  # odd functions keep their digits
    if name != "sigmoid":
        np.testing.assert_allclose(np.array(function(mx.array(small))), exact(small.astype(np.float64)), rtol=2e-6)


@pytest.mark.parametrize("function", [nn.silu, nn.gelu, nn.gelu_approx, nn.gelu_fast_approx, nn.softplus])
def test_activations_and_their_gradients_agree(function):
    x = mx.linspace(-30, 30, 4001)
    expected = function(x), mx.grad(lambda x: function(x).sum())(x)
    cpu_kernels.put_in_place()
    for mine, theirs in zip((function(x), mx.grad(lambda x: function(x).sum())(x)), expected, strict=True):
        assert mx.abs(mine - theirs).max() < 2e-6 * 30


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_precisions_are_left_to_mlx(dtype):
    x = mx.random.normal((5, 2, 3, 8)).astype(dtype)
    for name, original in MLX.items():
        assert np.array_equal(getattr(cpu_kernels, name)(x).astype(mx.float32), original(x).astype(mx.float32))
    assert cpu_kernels.attention(x, x, x, scale=0.5).dtype == dtype


def masks(batch, length, keys):
    rng = np.random.default_rng(0)
    causal = np.arange(keys - length, keys)[:, None] >= np.arange(keys)
    padded = causal & (np.arange(keys) >= rng.integers(0, keys - length + 1, (batch, 1, 1, 1)))
    return [None, "causal", mx.array(causal), mx.array(padded), mx.array(np.where(padded, 0, -1e4).astype(np.float32))]


@pytest.mark.parametrize("heads, key_heads, value_width", [(6, 2, 16), (4, 4, 16), (4, 1, 8)])
@pytest.mark.parametrize("length, keys", [(1, 9), (9, 9), (4, 11)])
@pytest.mark.parametrize("kind", range(5))
def test_attention_is_that_of_mlx(heads, key_heads, value_width, length, keys, kind):
    mask = masks(3, length, keys)[kind]
    q = mx.random.normal((3, length, heads, 16)).transpose(0, 2, 1, 3)  # as it comes from a projection
    k, v = mx.random.normal((3, key_heads, keys, 16)), mx.random.normal((3, key_heads, keys, value_width))
    expected = MLX_ATTENTION(q, k, v, scale=0.3, mask=mask)
    assert relative_error(cpu_kernels.attention(q, k, v, scale=0.3, mask=mask), expected) < 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_the_logits_of_mlx_lm(tmp_path, model_type, use_mlx_functions):
    """Prompt and step of a batch, padded where the architecture allows it; the tolerance of test_layouts."""
    loaded = load(write_family(tmp_path / "m", model_type), keep_precision=True)
    tokens = mx.array(np.random.default_rng(0).integers(3, 90, (2, 12)))

    def logits():
        cache = make_batch_cache(loaded.model, [3, 0] if loaded.masks_padding else [0, 0])
        return [loaded.model(tokens[:, part], cache=cache)[1] for part in (slice(0, 11), slice(11, 12))]

    fast = logits()
    use_mlx_functions()
    for mine, theirs in zip(fast, logits(), strict=True):
        assert relative_error(mine, theirs) < 1e-4


@pytest.mark.parametrize("offset", [0, 700, mx.array([-3, 0, 650])], ids=["start", "int", "rows"])
@pytest.mark.parametrize("length", [1, 9])
def test_shared_rotation_is_that_of_nn_rope(offset, length):
    rope = nn.RoPE(32, base=1e4, scale=0.125)
    x = mx.random.normal((3, 4, length, 32))
    assert relative_error(SharedRoPE(Rotation(rope))(x, offset), rope(x, offset)) < 2e-5


def test_rotation_is_computed_once_a_pass(monkeypatch):
    model = random_gemma()
    share_rotations(model)
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
    share_rotations(fast)
    sites = [site for site in modules_by_site(plain) if not site.endswith(".weights")]  # else both are explicit
    caches = [make_batch_cache(model, [4, 0]) for model in (plain, fast)]
    tokens = mx.array(np.random.default_rng(0).integers(3, 97, (2, 20)))
    chunks = (slice(0, 9), slice(9, 18), slice(18, 19), slice(19, 20))
    passes: list[list[dict]] = []
    for model, cache in zip((plain, fast), caches, strict=True):
        passes.append([])
        for chunk in chunks:
            with capture(model, sites) as activations:
                logits = model(tokens[:, chunk], cache=cache)
            passes[-1].append({"logits": logits, **activations})
        cpu_kernels.put_in_place()
    for chunk, *seen in zip(chunks, *passes, strict=True):
        assert seen[0].keys() == seen[1].keys()
        for site, expected in seen[0].items():
            row = expected[1:] if chunk.start == 0 else expected  # the padding of the other row is nobody's
            assert relative_error(seen[1][site][-len(row) :], row) < 2e-5, (chunk, site)


def test_load_uses_them_on_a_linux_cpu_only(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", random_gemma())

    def replaced(on_linux_cpu, **options):
        monkeypatch.setattr(model_loading, "runs_on_linux_cpu", lambda: on_linux_cpu)
        rope = model_loading.load(folder, **options).model.layers[0].self_attn.rope
        places = {
            name for name, (module, what) in REPLACED.items() if getattr(module, what) is getattr(cpu_kernels, name)
        }
        return isinstance(rope, SharedRoPE), places

    assert replaced(False) == (False, set())
    assert replaced(True, keep_precision=True) == (False, set(REPLACED))
    assert replaced(True) == (True, set(REPLACED))
