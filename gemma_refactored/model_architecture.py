"""The Gemma decoder, written so that one can see into it.

One file covers Gemma 1, 2 and 3 (text): what differs between the generations is data in
`GemmaConfig`, not code. Parameter names are those of the Hugging Face checkpoints, so
weights load without renaming. Places worth looking at that are no module's output
(attention weights, single heads, MLP neurons, the residual stream between sublayers) pass
through a `HookPoint`; see `activation_capture` for how to read or edit them.

References: Gemma (arXiv 2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786);
numbers agree with the implementations in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

SLIDING, GLOBAL = "sliding_attention", "full_attention"


@dataclass
class GemmaConfig:
    """What distinguishes one Gemma from another. Defaults are those of Gemma 3 1B."""

    hidden_size: int = 1152
    num_hidden_layers: int = 26
    intermediate_size: int = 6912
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 262144
    rms_norm_eps: float = 1e-6
    attention_scale: float = 256**-0.5
    sliding_window: int = 512
    layer_types: list[str] = field(default_factory=list)  # SLIDING or GLOBAL, one a layer
    rope_base: dict[str, float] = field(default_factory=lambda: {SLIDING: 1e4, GLOBAL: 1e6})
    rope_scale: dict[str, float] = field(default_factory=lambda: {SLIDING: 1.0, GLOBAL: 1.0})
    has_qk_norm: bool = True  # Gemma 3
    has_post_norms: bool = True  # Gemma 2 and 3: four norms a block instead of two
    attention_softcap: float | None = None  # Gemma 2
    logit_softcap: float | None = None  # Gemma 2
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, config: dict) -> GemmaConfig:
        """Read a Hugging Face `config.json` of model type gemma, gemma2, gemma3_text or gemma3.

        Raises:
            ValueError: an unknown model type, activation function or RoPE scaling.
        """
        model_type = config.get("model_type")
        if model_type == "gemma3":  # multimodal checkpoint: the text tower is what we run
            text = dict(config.get("text_config", {}))
            # The 4B, 12B and 27B configs leave out what equals transformers' defaults.
            defaults = dict(
                hidden_size=2304,
                num_hidden_layers=26,
                intermediate_size=9216,
                num_attention_heads=8,
                num_key_value_heads=4,
                vocab_size=262208,
                sliding_window=4096,
            )
            return cls.from_dict({**defaults, **text, "model_type": "gemma3_text"})
        if model_type not in ("gemma", "gemma2", "gemma3_text"):
            raise ValueError(f"model type {model_type!r} is not a Gemma text model")
        # Gemma 1 configs say "gelu" but every released Gemma was trained with the tanh form.
        activation = config.get("hidden_activation") or "gelu_pytorch_tanh"
        if activation not in ("gelu_pytorch_tanh", "gelu"):
            raise ValueError(f"activation {activation!r} is not supported (gelu_pytorch_tanh is)")

        layers = config["num_hidden_layers"]
        head_dim = config.get("head_dim", 256)
        heads = config["num_attention_heads"]
        query_scalar = config.get("query_pre_attn_scalar", 256) if model_type != "gemma" else head_dim
        # A block is global when its number (from 1) is divisible by the pattern.
        pattern = {"gemma": 1, "gemma2": 2, "gemma3_text": config.get("sliding_window_pattern", 6)}[model_type]
        layer_types = config.get("layer_types") or [SLIDING if (i + 1) % pattern else GLOBAL for i in range(layers)]
        base, scale = _rope_settings(config, model_type)
        return cls(
            hidden_size=config["hidden_size"],
            num_hidden_layers=layers,
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            attention_scale=query_scalar**-0.5,
            sliding_window=config.get("sliding_window") or 4096,
            layer_types=list(layer_types),
            rope_base=base,
            rope_scale=scale,
            has_qk_norm=model_type == "gemma3_text",
            has_post_norms=model_type != "gemma",
            # transformers does not read this key of a Gemma 3.
            attention_softcap=config.get("attn_logit_softcapping", 50.0) if model_type == "gemma2" else None,
            logit_softcap=config.get("final_logit_softcapping", 30.0 if model_type == "gemma2" else None),
            tie_word_embeddings=config.get("tie_word_embeddings", True),
        )


def _rope_settings(config: dict, model_type: str) -> tuple[dict[str, float], dict[str, float]]:
    """RoPE base and position scale for each kind of layer, from old and new style configs."""
    is_gemma3 = model_type == "gemma3_text"
    base = {
        GLOBAL: config.get("rope_theta", 1e6 if is_gemma3 else 1e4),
        SLIDING: config.get("rope_local_base_freq", 1e4) if is_gemma3 else config.get("rope_theta", 1e4),
    }
    per_kind = config.get("rope_parameters") or {}
    if "rope_theta" in per_kind or "rope_type" in per_kind:  # one setting for all layers
        per_kind = {GLOBAL: per_kind, SLIDING: per_kind}
    elif not per_kind and config.get("rope_scaling"):
        # In the older style the scaling was meant for the global layers of Gemma 3 only.
        per_kind = {GLOBAL: config["rope_scaling"]}
    scale = {SLIDING: 1.0, GLOBAL: 1.0}
    for kind, settings in per_kind.items():
        base[kind] = settings.get("rope_theta", base[kind])
        rope_type = settings.get("rope_type") or settings.get("type") or "default"
        if rope_type == "linear":
            scale[kind] = 1.0 / settings["factor"]
        elif rope_type != "default":
            raise ValueError(f"RoPE scaling {rope_type!r} is not one that Gemma uses (default, linear)")
    return base, scale


class HookPoint(nn.Module):
    """Identity with a name: a place where activations can be read or edited.

    `is_hooked` becomes true while somebody does (see `activation_capture.hooks`), for values
    that are only computed on request.
    """

    is_hooked = False

    def __call__(self, x: mx.array) -> mx.array:
        return x


class RMSNorm(nn.Module):
    """Root mean square norm whose weight is stored as its difference from one."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = mx.zeros((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, 1.0 + self.weight, self.eps)


def soft_cap(x: mx.array, cap: float) -> mx.array:
    return mx.tanh(x / cap) * cap


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form, x (1 + tanh u) / 2, written as x sigmoid(2u): the same function,
    with one exponential instead of a tanh (which is scalar code on CPUs)."""
    return x * mx.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


class Attention(nn.Module):
    """Grouped-query attention, over all positions or over a sliding window.

    Hook points: `heads` [batch, positions, heads, head_dim], each head's output before
    `o_proj`; `weights` [batch, heads, positions, keys], attention probabilities. Reading
    `weights` switches this layer from the fused kernel to explicit attention.
    """

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = config.head_dim, config.attention_scale
        self.softcap = config.attention_softcap
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        if config.has_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        kind = config.layer_types[layer]
        self.rope: Any = nn.RoPE(self.head_dim, base=config.rope_base[kind], scale=config.rope_scale[kind])
        self.heads, self.weights = HookPoint(), HookPoint()

    def __call__(self, x: mx.array, mask=None, cache=None, offset: int | mx.array = 0) -> mx.array:
        batch, length, _ = x.shape

        def split_heads(y, heads):
            return y.reshape(batch, length, heads, self.head_dim).transpose(0, 2, 1, 3)

        q = split_heads(self.q_proj(x), self.num_heads)
        k = split_heads(self.k_proj(x), self.num_kv_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if not self.softcap and not self.weights.is_hooked:
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        else:
            out = self.explicit_attention(q, k, v, mask)
        out = self.heads(out.transpose(0, 2, 1, 3))
        return self.o_proj(out.reshape(batch, length, -1))

    def explicit_attention(self, q: mx.array, k: mx.array, v: mx.array, mask) -> mx.array:
        """softmax(q kᵀ) v with the probabilities in the open: soft-caps, and `weights` can be read."""
        batch, heads, length, _ = q.shape
        keys = k.shape[2]
        # All query heads of a key head make one product: more rows instead of more products.
        folded = (batch, self.num_kv_heads, -1)
        scores = (q * self.scale).reshape(*folded, self.head_dim) @ k.swapaxes(-1, -2)
        scores = scores.reshape(batch, heads, length, keys)
        if self.softcap:
            scores = soft_cap(scores, self.softcap)
        if isinstance(mask, str):  # "causal": the fused kernel needs no array, we do
            mask = mx.arange(keys - length, keys)[:, None] >= mx.arange(keys)
        if mask is not None:  # finite, so that rows of padding alone stay numbers
            scores = scores + mx.where(mask, 0, mx.finfo(scores.dtype).min / 2).astype(scores.dtype)
        weights = self.weights(mx.softmax(scores, axis=-1, precise=True))
        out = weights.reshape(*folded, keys) @ v
        return out.reshape(batch, heads, length, -1)


class MLP(nn.Module):
    """Gated GELU. Hook point `neurons` [batch, positions, intermediate]: the input of `down_proj`."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.neurons = HookPoint()

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.neurons(gelu_tanh(self.gate_proj(x)) * self.up_proj(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each added to the residual stream.

    The residual stream [batch, positions, hidden] is visible before the block (`resid_pre`),
    between its halves (`resid_mid`) and after it (the block's own output). With post norms
    (Gemma 2 and 3) what `self_attn` and `mlp` write is normed before it is added.
    """

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        norm_names = ["input_layernorm", "post_attention_layernorm"]
        if config.has_post_norms:
            norm_names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in norm_names:
            setattr(self, name, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.has_post_norms = config.has_post_norms
        self.resid_pre, self.resid_mid = HookPoint(), HookPoint()

    def __call__(self, x: mx.array, mask=None, cache=None, offset: int | mx.array = 0) -> mx.array:
        x = self.resid_pre(x)
        attended = self.self_attn(self.input_layernorm(x), mask, cache, offset)
        if not self.has_post_norms:  # Gemma 1: "post_attention" is the norm before the MLP
            x = self.resid_mid(x + attended)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = self.resid_mid(x + self.post_attention_layernorm(attended))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(nn.Module):
    """Token ids [batch, positions] -> normed residual stream [batch, positions, hidden]."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [TransformerBlock(config, i) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list | None = None) -> mx.array:
        x = self.embed_tokens(tokens)
        x = x * mx.array(self.config.hidden_size**0.5, x.dtype)
        offset = cache[0].offset if cache else 0  # of the first token: an int, or one for each row
        cache = cache or [None] * len(self.layers)
        masks = {}  # one for each kind of layer, shared by all layers of that kind
        for kind, layer_cache in zip(self.config.layer_types, cache, strict=True):
            if kind not in masks:
                window = self.config.sliding_window if kind == SLIDING else None
                masks[kind] = create_attention_mask(x, layer_cache, window_size=window)
        for layer, kind, layer_cache in zip(self.layers, self.config.layer_types, cache, strict=True):
            x = layer(x, masks[kind], layer_cache, offset)
        return self.norm(x)


class Gemma(nn.Module):
    """The language model: token ids [batch, positions] -> logits [batch, positions, vocabulary]."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: list | None = None) -> mx.array:
        x = self.model(tokens, cache)
        logits = self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)
        cap = self.config.logit_softcap
        return soft_cap(logits, cap) if cap else logits

    @property
    def layers(self) -> list[TransformerBlock]:
        return self.model.layers

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Keep what the text decoder needs: multimodal checkpoints carry a vision tower too."""
        kept = {}
        for name, value in weights.items():
            # mlx: "language_model.model.layers..", transformers: "model.language_model.layers.."
            name = name.replace("model.language_model.", "model.").removeprefix("language_model.")
            if name.startswith(("model.", "lm_head.")) and "vision" not in name and "projector" not in name:
                kept[name] = value
        if self.config.tie_word_embeddings:
            kept = {name: value for name, value in kept.items() if not name.startswith("lm_head.")}
        return kept

    def make_cache(self) -> list:
        """An empty KV cache for a single sequence; sliding layers keep their window only."""
        window = self.config.sliding_window
        return [RotatingKVCache(window) if k == SLIDING else KVCache() for k in self.config.layer_types]
