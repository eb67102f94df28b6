"""Our Gemma against transformers (golden values) and mlx-lm (live)."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from gemma_refactored.activation_capture import capture
from gemma_refactored.model_architecture import GLOBAL, SLIDING, Gemma, GemmaConfig

from .conftest import GOLDEN_GEMMAS, load_golden, relative_error

TOLERANCE = 1e-4


@pytest.mark.parametrize("expand", [False, True], ids=["as stored", "expanded"])
@pytest.mark.parametrize("name", GOLDEN_GEMMAS)
def test_logits_and_every_site_agree_with_transformers(name, expand):
    model, golden = load_golden(name, expand)
    sites = [site for site in golden if site.startswith("model.")]
    with capture(model, sites) as activations:
        logits = model(golden["tokens"])
    assert relative_error(logits, golden["logits"]) < TOLERANCE
    assert relative_error(model(golden["tokens"][:1]), golden["logits"][:1]) < TOLERANCE
    for site in sites:
        seen = activations[site]
        if site.endswith("self_attn.heads"):  # ours keeps the heads apart
            seen = seen.reshape(*seen.shape[:2], -1)
        assert relative_error(seen, golden[site]) < TOLERANCE, site


@pytest.mark.parametrize("name", GOLDEN_GEMMAS)
def test_reading_attention_weights_changes_nothing_else(name):
    model, golden = load_golden(name)
    site = "model.layers.0.self_attn.weights"
    plain = model(golden["tokens"])
    with capture(model, [site]) as activations:
        explicit = model(golden["tokens"])
    assert relative_error(explicit, plain) < 1e-5
    np.testing.assert_allclose(activations[site].sum(-1), 1, atol=1e-5)
    assert np.array_equal(model(golden["tokens"]), plain)


# Hidden size 64: mlx-lm rounds the embedding scale, its square root, to bfloat16; transformers does not.
MLX_LM_CONFIG = dict(
    model_type="gemma3_text", hidden_size=64, num_hidden_layers=7, intermediate_size=48, num_attention_heads=4,
    head_dim=12, vocab_size=97, num_key_value_heads=2, query_pre_attn_scalar=10, sliding_window=6,
    sliding_window_pattern=3, rope_theta=5e5, rope_local_base_freq=2e4, rms_norm_eps=1e-6,
)  # fmt: skip
MLX_LM_CONFIGS = {
    "gemma3_text": MLX_LM_CONFIG,
    "gemma": {**MLX_LM_CONFIG, "model_type": "gemma"},
    # mlx-lm's Gemma 2 has no sliding window, so they can only agree inside of it.
    "gemma2": {**MLX_LM_CONFIG, "model_type": "gemma2", "sliding_window": 32,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3", "vocab_size": 97, "text_config": MLX_LM_CONFIG},
}  # fmt: skip
PREFIX = {"gemma3": "language_model."}


def same_weights_in_mlx_lm(model_type="gemma3_text"):
    """Our model and mlx-lm's with the same random weights, norm weights included."""
    config = MLX_LM_CONFIGS[model_type]
    ours = Gemma(GemmaConfig.from_dict(config))
    mx.random.seed(0)
    weights = {k: mx.random.normal(v.shape) * 0.2 for k, v in tree_flatten(ours.parameters())}
    ours.load_weights(list(weights.items()))
    model_class, config_class = _get_classes(config)
    theirs = model_class(config_class.from_dict(copy.deepcopy(config)))
    weights = {PREFIX.get(model_type, "") + name: value for name, value in weights.items()}
    sanitize = getattr(theirs, "sanitize", lambda weights: weights)
    theirs.load_weights(list(sanitize(weights).items()))
    return ours, theirs


@pytest.mark.parametrize("model_type", MLX_LM_CONFIGS)
def test_agrees_with_mlx_lm_live_at_every_shared_site(model_type, monkeypatch):
    # mlx-lm runs Gemma 1 with the exact GELU (7e-4 off here); transformers, and we, with the tanh form.
    monkeypatch.setattr(nn, "gelu", nn.gelu_approx)
    ours, theirs = same_weights_in_mlx_lm(model_type)
    prefix = PREFIX.get(model_type, "")
    tokens = mx.array(np.random.default_rng(0).integers(0, 97, (3, 25)))
    sites = [f"model.layers.{i}{s}.output" for i in range(7) for s in ("", ".mlp", ".self_attn")]
    with capture(ours, sites) as a, capture(theirs, [prefix + site for site in sites]) as b:
        assert relative_error(ours(tokens), theirs(tokens)) < TOLERANCE
    for site in sites:
        assert relative_error(a[site], b[prefix + site]) < TOLERANCE, site


def test_config_of_the_released_models():
    one = GemmaConfig.from_dict(
        dict(model_type="gemma3_text", hidden_size=1152, num_hidden_layers=26, intermediate_size=6912,
             num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144, sliding_window=512,
             query_pre_attn_scalar=256)
    )  # fmt: skip
    assert [i for i, kind in enumerate(one.layer_types) if kind == GLOBAL] == [5, 11, 17, 23]
    assert one.rope_base == {SLIDING: 1e4, GLOBAL: 1e6} and one.attention_scale == 1 / 16
    four = GemmaConfig.from_dict(
        {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34,
         "intermediate_size": 10240, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}
    )  # fmt: skip
    assert four.rope_scale == {SLIDING: 1.0, GLOBAL: 0.125} and four.num_attention_heads == 8


@pytest.mark.parametrize(
    "change", [{"model_type": "llama"}, {"hidden_activation": "silu"}, {"rope_scaling": {"rope_type": "yarn"}}]
)
def test_unknown_settings_are_refused(change):
    with pytest.raises(ValueError, match="not"):
        GemmaConfig.from_dict({**MLX_LM_CONFIG, **change})
