"""Names of sites and the filters that choose among them."""

import pytest

from gemma_refactored.site_names import described, kind_of, matches


@pytest.mark.parametrize(
    "site, kind",
    [
        ("model.layers.3.mlp.output", "mlp"),
        ("model.layers.{layer_idx}.mlp.output", "mlp"),
        ("transformer.h.11.attn.output", "attention"),
        ("gpt_neox.layers.0.attention.output", "attention"),
        ("language_model.model.layers.7.output", "residual"),
        ("model.layers.0.mlp.down_proj.output", None),
        ("model.layers.0.input_layernorm.output", None),
        ("model.norm.output", None),
    ],
)
def test_the_kind_of_a_site(site, kind):
    assert kind_of(site) == kind
    assert described(site).endswith(site) if kind is None else site in described(site)


SITES = [
    f"model.layers.{layer}.{part}output"
    for layer in (0, 1, 10)
    for part in ("", "mlp.", "mlp.down_proj.", "self_attn.")
] + ["model.norm.output"]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("model.layers.*.output", ["model.layers.0.output", "model.layers.1.output", "model.layers.10.output"]),
        ("layers.[0-1].output", ["model.layers.0.output", "model.layers.1.output"]),
        ("layers.1?.output", ["model.layers.10.output"]),
        ("layers.1.*.output", ["model.layers.1.mlp.output", "model.layers.1.self_attn.output"]),
        ("layers.1.**.output", ["model.layers.1.mlp.output", "model.layers.1.mlp.down_proj.output",
                                "model.layers.1.self_attn.output"]),
        ("layers.[!0].self_attn.output", ["model.layers.1.self_attn.output"]),
        ("norm", ["model.norm.output"]),
        ("layers.1.m", ["model.layers.1.mlp.output", "model.layers.1.mlp.down_proj.output"]),
        ("layers.*.out", []),
    ],
)  # fmt: skip
def test_a_star_stays_between_two_dots_and_two_cross_them(pattern, expected):
    assert [site for site in SITES if matches(site, pattern)] == expected
