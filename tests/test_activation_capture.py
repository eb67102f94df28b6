"""Capture and edit by name, and filters."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gemma_refactored.activation_capture import capture, edit, modules_by_site, select_sites, site_shapes
from gemma_refactored.errors import UserError

from .conftest import load_golden
from .test_model_architecture import same_weights_in_mlx_lm

TOKENS = mx.array([[5, 6, 7, 8]])


@pytest.fixture(params=["ours", "mlx-lm"])
def model(request):
    ours, theirs = same_weights_in_mlx_lm()
    return ours if request.param == "ours" else theirs


def state(model):
    return [type(m) for _, m in model.named_modules()], [name for name, _ in tree_flatten(model.parameters())]


def test_capture_sees_what_the_module_returned_and_leaves_no_trace(model):
    before, logits = state(model), model(TOKENS)
    with capture(model, ["model.layers.1.mlp.output", "model.layers.1.output"]) as activations:
        assert np.array_equal(model(TOKENS), logits)
    assert activations["model.layers.1.mlp.output"].shape == (1, 4, 64)
    block = model.layers[1]
    added = block.post_feedforward_layernorm(activations["model.layers.1.mlp.output"])
    assert np.isfinite(np.array(added)).all()
    assert state(model) == before


def test_edit_changes_later_layers_only_and_is_undone_after_an_exception(model):
    before, logits = state(model), model(TOKENS)
    sites = [f"model.layers.{i}.output" for i in range(7)]
    with capture(model, sites) as plain:
        model(TOKENS)
        plain = {site: np.array(value) for site, value in plain.items()}
    with edit(model, {sites[3]: lambda x: x + 1}), capture(model, sites) as edited:
        assert not np.allclose(model(TOKENS), logits)
        edited = {site: np.array(value) for site, value in edited.items()}
    assert all(np.array_equal(plain[s], edited[s]) for s in sites[:3])
    # The capture was opened inside the edit, so it sees the edited value.
    np.testing.assert_allclose(edited[sites[3]], plain[sites[3]] + 1, rtol=1e-6)
    with pytest.raises(RuntimeError, match="on purpose"), edit(model, {sites[0]: lambda x: x * 2}):
        raise RuntimeError("on purpose")
    assert state(model) == before
    assert np.array_equal(model(TOKENS), logits)


def test_edit_must_keep_shape_and_dtype(model):
    with edit(model, {"model.layers.0.output": lambda x: x[:, :1]}), pytest.raises(ValueError, match="turned"):
        model(TOKENS)
    with edit(model, {"model.layers.0.output": lambda x: x.astype(mx.float16)}), pytest.raises(ValueError):
        model(TOKENS)


def test_unknown_site_names_some_that_exist(model):
    before = state(model)
    with pytest.raises(UserError, match=r"no site 'nonsense'.*model\.layers\.0"), capture(model, ["nonsense"]):
        pass
    assert state(model) == before


def test_a_module_that_returns_a_tuple_is_hooked_at_its_first_element():
    class Pair(nn.Module):
        def __call__(self, x):
            return x * 2, "cache"

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def __call__(self, x):
            return self.pair(x)

    model = Outer()
    with edit(model, {"pair.output": lambda x: x + 1}), capture(model, ["pair.output"]) as seen:
        assert model(mx.array([1.0]))[0].item() == 3
    assert model(mx.array([1.0]))[1] == "cache" and seen["pair.output"].item() == 3


def test_own_model_has_the_hook_points_of_the_paper_figure():
    model, _ = load_golden("gemma3")
    shapes = site_shapes(model)
    assert shapes["model.layers.0.self_attn.weights"] == (1, 4, 3, 3)
    assert shapes["model.layers.0.self_attn.heads"] == (1, 3, 4, 12)
    assert shapes["model.layers.0.mlp.neurons"] == (1, 3, 48)
    for site in ("resid_pre", "resid_mid", "output"):
        assert shapes[f"model.layers.3.{site}"] == (1, 3, 32)
    with capture(model, ["model.embed_tokens.output", "model.layers.0.resid_pre"]) as seen:
        model(TOKENS)
    scaled = np.array(seen["model.embed_tokens.output"]) * np.float32(32**0.5)
    np.testing.assert_allclose(scaled, seen["model.layers.0.resid_pre"], rtol=1e-6)


def test_filters():
    model, _ = load_golden("gemma3")
    assert select_sites(model) == [f"model.layers.{i}.mlp.output" for i in range(4)]
    assert select_sites(model, "layers.[01].output, neurons") == [
        "model.layers.0.mlp.neurons", "model.layers.0.output",
        "model.layers.1.mlp.neurons", "model.layers.1.output",
        "model.layers.2.mlp.neurons", "model.layers.3.mlp.neurons",
    ]  # fmt: skip
    everything = select_sites(model, "all")
    assert set(everything) < set(modules_by_site(model)) and "model.layers.2.self_attn.output" in everything
    assert not any(site.endswith("weights") for site in everything)  # not one vector a position
    with pytest.raises(UserError, match="'mpl' matches no site.*mlp.output"):
        select_sites(model, "mlp.output,mpl")
    with pytest.raises(UserError, match="empty"):
        select_sites(model, " , ")
