"""Capture and edit by name, and filters."""

import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gemma_refactored import activation_capture
from gemma_refactored.activation_capture import (
    block_sites,
    capture,
    describe_sites,
    edit,
    modules_by_site,
    read,
    select_sites,
    site_shapes,
)
from gemma_refactored.errors import UserError
from gemma_refactored.generation import collect_answers, generate

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
    assert not any(site.endswith("weights") for site in everything)  # not one vector per position
    assert select_sites(model, "self_attn.weights") == [f"model.layers.{i}.self_attn.weights" for i in range(4)]
    assert select_sites(model, "self_attn.heads,mlp.output")[:2] == [
        "model.layers.0.mlp.output",
        "model.layers.0.self_attn.heads",
    ]
    assert not any("weights" in site or "heads" in site for site in select_sites(model, "self_attn"))
    with pytest.raises(UserError, match="'mpl' matches no site.*mlp.output"):
        select_sites(model, "mlp.output,mpl")
    with pytest.raises(UserError, match="empty"):
        select_sites(model, " , ")


def double(x):
    return x * 2


def test_a_generation_left_half_read_leaves_no_edit_behind_and_meets_none(model):
    site, before, logits = block_sites(model)[-1], state(model), np.array(model(TOKENS))
    prompt = TOKENS.tolist()
    plain, edited = (collect_answers(generate(model, prompt, 6, edits=e)) for e in ({}, {site: mx.negative}))
    assert plain != edited
    left = generate(model, prompt, 6, edits={site: mx.negative}, sites=[site])
    next(left)
    assert state(model) == before and np.array_equal(model(TOKENS), logits)
    assert collect_answers(generate(model, prompt, 6)) == plain
    # Two that take turns keep to their own, too, and the first is not disturbed by what came in between.
    turns = [list(pair) for pair in zip(left, generate(model, prompt, 6), strict=False)]
    assert [int(first.tokens[0]) for first, _ in turns] == edited[0]
    assert [int(second.tokens[0]) for _, second in turns[1:]] == plain[0][:-1]


def test_an_exception_or_ctrl_c_in_an_edit_leaves_nothing_behind(model):
    before, logits = state(model), np.array(model(TOKENS))
    for error in (RuntimeError, KeyboardInterrupt):

        def fails(x, error=error):
            raise error

        with pytest.raises(error):
            list(generate(model, TOKENS.tolist(), 3, edits={"model.layers.2.output": fails}))
        assert state(model) == before and np.array_equal(model(TOKENS), logits)


def test_ctrl_c_while_hooks_are_put_in_place_takes_them_out_again(model, monkeypatch):
    before, attach, calls = state(model), activation_capture._attach, []

    def interrupted(module, hook):
        attach(module, hook)
        calls.append(hook)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(activation_capture, "_attach", interrupted)
    sites = [f"model.layers.{i}.output" for i in range(3)]
    with pytest.raises(KeyboardInterrupt), edit(model, dict.fromkeys(sites, double)):
        raise AssertionError("never gets here")
    assert state(model) == before and not activation_capture._HOOKS.of


def test_another_thread_meets_no_edit_and_leaves_none(model):
    """The class of a hooked module is shared by all threads, what happens in it is not."""
    site, before = "model.layers.0.output", state(model)
    module = modules_by_site(model)[site]
    is_hooked = {}

    def other_thread():
        is_hooked["without its own"] = getattr(module, "is_hooked", False)
        with edit(model, {site: double}):
            is_hooked["with its own"] = [hook.function for hook in activation_capture._HOOKS.of[id(module)]]

    with edit(model, {site: lambda x: x + 1}):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert len(activation_capture._HOOKS.of[id(module)]) == 1 and module.is_hooked
    assert not is_hooked["without its own"] and len(is_hooked["with its own"]) == 1
    assert state(model) == before


def test_contexts_may_end_in_any_order(model):
    site, before, logits = "model.layers.0.output", state(model), np.array(model(TOKENS))
    first, second = edit(model, {site: double}), edit(model, {site: lambda x: x + 1})
    with first:
        once = np.array(model(TOKENS))
    first.__enter__()
    second.__enter__()
    second_only = first.__exit__()
    second.__exit__()
    assert second_only is None and state(model) == before and np.array_equal(model(TOKENS), logits)
    with second, first:
        both = np.array(model(TOKENS))
    assert not np.allclose(once, both)


def test_reading_texts_gives_every_token_its_own_vectors(model):
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 97, n).tolist() for n in rng.integers(1, 30, 40)]
    sites = [f"model.layers.{i}.output" for i in range(3)]
    read_together = dict(read(model, texts, sites))
    assert sorted(read_together) == list(range(40))
    for i in (0, 7, 39):
        with capture(model, sites) as activations:
            model(mx.array([texts[i]]))
            alone = np.stack([activations[site][0] for site in sites], axis=1)
        np.testing.assert_allclose(read_together[i], alone, atol=1e-4, rtol=1e-4)
    edited = dict(read(model, texts, sites, lambda batch: {sites[1]: double}))
    np.testing.assert_array_equal(edited[3][:, 0], read_together[3][:, 0])
    np.testing.assert_allclose(edited[3][:, 1], 2 * read_together[3][:, 1], rtol=1e-5)


def test_words_for_a_site_of_every_layer(caplog):
    model, _ = load_golden("gemma3")
    attention = [f"model.layers.{i}.self_attn.output" for i in range(4)]
    assert select_sites(model, "attention") == attention
    both = select_sites(model, "mlp.output,attention")
    assert set(both) == {*attention, *(f"model.layers.{i}.mlp.output" for i in range(4))} and not caplog.text
    assert select_sites(model, "residual") == [f"model.layers.{i}.output" for i in range(4)]
    assert describe_sites(both) == "4 like model.layers.0.mlp.output, 4 like model.layers.0.self_attn.output"
    assert all("norm" in site for site in select_sites(model, "post_attention"))
    assert "'post_attention' matches nothing but norms: 4 like model.layers.0.post_attention_layernorm" in caplog.text
    caplog.clear()
    select_sites(model, "post_attention_layernorm")  # that is what it says
    assert not caplog.text
