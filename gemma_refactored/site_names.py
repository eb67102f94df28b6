"""How places in a model are named, and the filters that choose among them. Needs no MLX."""

from __future__ import annotations

import re

# What architectures call the parts of a block.
MODULE_NAMES = {"mlp": ("mlp",), "attention": ("self_attn", "attention", "attn")}
KIND_WORDS = {"mlp": "MLP output", "attention": "attention output", "residual": "residual stream"}
SITE_KINDS = (*MODULE_NAMES, "residual")  # that every layer has one of


def kind_of(site: str) -> str | None:
    """Which of SITE_KINDS a site of one layer is, whatever stands for the layer's number; None: another one.

    "model.layers.3.mlp.output" is "mlp"; "model.layers.{layer_idx}.output", after the whole block, "residual".
    """
    *_, last = re.split(r"\.(?:\d+|\{layer(?:_idx)?\})\.", site)
    if last == "output":
        return "residual"
    return next((kind for kind, names in MODULE_NAMES.items() if last in [f"{name}.output" for name in names]), None)


def pattern_of(site: str) -> str:
    """ "model.layers.0.mlp.output" -> "model.layers.{layer_idx}.mlp.output"; a site of no layer stays as it is."""
    return re.sub(r"\.\d+\.", ".{layer_idx}.", site, count=1)


def described(pattern: str) -> str:
    """A site of every layer in words: "MLP output (model.layers.{layer_idx}.mlp.output)"."""
    kind = kind_of(pattern)
    return f"{KIND_WORDS[kind]} ({pattern})" if kind else pattern


def matches(site: str, pattern: str) -> bool:
    """Is `pattern` a part of the site's name, or a glob of its end?

    In a glob * and ? stay within one component of the name, between two dots, and ** crosses them.
    """
    if not any(character in pattern for character in "*?["):
        return pattern in site
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]*\])", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    regex = "".join(
        wild.get(p) or (_character_class(p) if p.startswith("[") and p.endswith("]") else re.escape(p)) for p in parts
    )
    return re.fullmatch(rf".*{regex}", site) is not None


def _character_class(text: str) -> str:
    """[0-3] and [!0-3] as regular expressions write them."""
    inside = text[1:-1].replace("\\", r"\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
