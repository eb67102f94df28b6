"""What mlx-lm's architectures leave out of a config, put in place after loading: RoPE, sliding windows, activations.

Each correction is general: it acts on the modules that there are, and only where the config says something else than
what they do. Whether an architecture then agrees with transformers is what tests/golden/layouts.json tells.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import rope_utils
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes

from .errors import UserError
from .longrope import LongRoPE
from .rope import scaled_rope

ROPES = (
    nn.RoPE, rope_utils.SuScaledRoPE, rope_utils.Llama3RoPE, rope_utils.YarnRoPE, rope_utils.ProportionalRoPE,
    rope_utils.DynamicNTKScalingRoPE,
)  # fmt: skip
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "relu": nn.relu,
    "relu2": nn.relu2,
}
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
PARTIAL_ROTARY = ("glm",)  # of mlx-lm, which rotate whole heads where transformers rotates a part
# Architectures of mlx-lm whose attention sees everything, whatever window the config gives.
WITHOUT_WINDOW = (
    "mistral", "mixtral", "ministral3", "phi3", "phimoe", "starcoder2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "dots1", "minimax_m2", "glm4_moe", "solar_open", "seed_oss",
)  # fmt: skip
# Architectures of mlx-lm that compute another activation than the one their config has by default.
OTHER_ACTIVATION = ("starcoder2", "gpt_bigcode", "gpt_neox")


def correct_layout(model: nn.Module, completed: dict | None) -> None:
    """Make an mlx-lm model do what its config says.

    Args:
        completed: the config as transformers fills it in; None if it does not have the architecture.
    Raises:
        UserError: the config asks for what cannot be put in place.
    """
    if completed is None:
        return
    text = completed.get("text_config") or completed
    correct_rope(model, text)
    if text["model_type"] in WITHOUT_WINDOW:
        put_windows_in_place(model, text)
    correct_activation(model, text)
    correct_expert_groups(model)


def correct_expert_groups(model: nn.Module) -> None:
    """Experts of the groups that are not chosen must lose.

    mlx-lm sets their scores to 0, transformers to minus infinity: where a bias makes scores negative, the two choose
    differently. A constant added to all biases changes no choice, and makes every score positive.
    """
    for module in model.modules():
        bias = module.get("e_score_correction_bias") if isinstance(module, nn.Module) else None
        if bias is not None and (getattr(module, "n_group", None) or 1) > 1:
            module.e_score_correction_bias = bias + mx.maximum(1 - bias.min(), 0)


def translated_classes(config: dict) -> tuple[type, type]:
    """mlx-lm's classes for a model and its settings, the model's taking weights in the names of transformers 5 too."""
    model_class, settings_class = _get_classes(config)
    translate = WEIGHTS.get(config["model_type"])
    if translate is None:
        return model_class, settings_class

    def sanitize(self, weights):
        weights = translate(weights)
        return model_class.sanitize(self, weights) if hasattr(model_class, "sanitize") else weights

    return type("Model", (model_class,), {"sanitize": sanitize, "__module__": model_class.__module__}), settings_class


def _gpt2_weights(weights: dict) -> dict:
    return {name.removeprefix("transformer."): value for name, value in weights.items()}


def _gpt_oss_weights(weights: dict) -> dict:
    """Experts in 16 or 32 bit are stored as [experts, in, out]; mlx-lm knows the packed layout, [experts, out, in]."""
    whole = (".experts.gate_up_proj", ".experts.down_proj")
    return {
        f"{name}.weight" if name.endswith(whole) else name: value.swapaxes(-1, -2) if name.endswith(whole) else value
        for name, value in weights.items()
    }


# What mlx-lm's `sanitize` lacks for checkpoints of transformers 5.
WEIGHTS: dict[str, Callable[[dict], dict]] = {"gpt2": _gpt2_weights, "gpt_oss": _gpt_oss_weights}


def correct_rope(model: nn.Module, config: dict) -> None:
    """Replace rotary embeddings by those that `rope_parameters` asks for; what is not scaled stays as it is."""
    settings = config.get("rope_parameters")
    if not isinstance(settings, dict):
        return
    context = config.get("max_position_embeddings")
    for module, rope, number in _rotary_embeddings(model):
        of_layer = _settings_of_layer(settings, config.get("layer_types"), number)
        if not of_layer:
            continue
        dims, traditional = (
            rope.get("dims") or getattr(rope, "dims", None) or rope.dim,
            getattr(rope, "traditional", False),
        )
        if config["model_type"] in PARTIAL_ROTARY:
            dims = rope.dims = int(dims * of_layer.get("partial_rotary_factor", 1.0))
        if dims % 2:
            raise UserError(f"config.json: rotary embeddings turn pairs of dimensions, and {dims} of a head is odd.")
        if of_layer.get("rope_type", "default") in ("default", "proportional"):
            if of_layer is not settings and isinstance(rope, nn.RoPE):  # each kind of layer may have a base of its own
                rope.base = of_layer["rope_theta"]
            continue
        make = LongRoPE if of_layer["rope_type"] == "longrope" else scaled_rope
        try:
            module.rope = make(dims, traditional, of_layer, context)  # type: ignore[arg-type]  # None is a TypeError
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"The RoPE settings {of_layer} cannot be used: {error}.") from None


def _rotary_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, int | None]]:
    """(module, its rotary embedding, number of its layer) for each."""
    for path, module in model.named_modules():
        rope = module.get("rope") if isinstance(module, nn.Module) else None
        if isinstance(rope, ROPES):
            yield module, rope, next((int(part) for part in path.split(".") if part.isdigit()), None)


def _settings_of_layer(settings: dict, layer_types: list | None, number: int | None) -> dict | None:
    """One setting for all layers, or that of the layer's kind."""
    if not any(isinstance(value, dict) for value in settings.values()):
        return settings
    return settings.get(layer_types[number]) if layer_types and number is not None else None


def put_windows_in_place(model: nn.Module, config: dict) -> None:
    """Have the attention of each sliding layer mask what is beyond `sliding_window`."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return
    kinds = config.get("layer_types") or ["sliding_attention"] * len(model.layers)
    for layer, kind in zip(model.layers, kinds, strict=True):
        if kind == "sliding_attention":
            layer.self_attn.__class__ = _windowed(layer.self_attn.__class__, window)


def _windowed(attention: type, window: int) -> type:
    signature = inspect.signature(attention.__call__)

    def call(self, x, *args, **kwargs):
        given = signature.bind(self, x, *args, **kwargs)
        cache = given.arguments.get("cache")
        given.arguments["mask"] = create_attention_mask(x, cache, window_size=window)
        return attention.__call__(*given.args, **given.kwargs)

    return type(attention.__name__, (attention,), {"__call__": call, "__module__": attention.__module__})


def correct_activation(model: nn.Module, config: dict) -> None:
    """Put the config's activation function into every MLP that computes another."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    key = next((key for key in ACTIVATION_KEYS if key in config), None)
    if key is None or not isinstance(config[key], str):
        return
    usual = getattr(CONFIG_MAPPING[config["model_type"]], key, None)
    if config[key] == usual and config["model_type"] not in OTHER_ACTIVATION:
        return
    if config[key] not in ACTIVATIONS:
        raise UserError(f"config.json: {key} {config[key]!r} is not one of {', '.join(ACTIVATIONS)}.")
    activation = ACTIVATIONS[config[key]]
    for module in model.modules():
        if isinstance(module, (SwitchGLU, SwitchMLP)):
            gated = isinstance(module, SwitchGLU)
            module.activation = (lambda x, gate: activation(gate) * x) if gated else activation
        elif call := next((call for parts, call in _MLPS if parts == frozenset(module.children())), None):
            bases = (module.__class__,)
            forward = partial(call, activation=activation)
            module.__class__ = type(
                bases[0].__name__, bases, {"__call__": _method(forward), "__module__": bases[0].__module__}
            )


def _method(function: Callable) -> Callable:
    return lambda self, x: function(self, x)


def _gated(mlp, x, activation):
    return mlp.down_proj(activation(mlp.gate_proj(x)) * mlp.up_proj(x))


def _gated_in_one(mlp, x, activation):
    gate, up = mx.split(mlp.gate_up_proj(x), 2, axis=-1)
    return mlp.down_proj(activation(gate) * up)


def _plain(first: str, second: str) -> Callable:
    return lambda mlp, x, activation: mlp[second](activation(mlp[first](x)))


# MLPs by the names of their parts, and what they compute.
_MLPS: list[tuple[frozenset, Callable]] = [
    (frozenset(("gate_proj", "up_proj", "down_proj")), _gated),
    (frozenset(("gate_up_proj", "down_proj")), _gated_in_one),
    (frozenset(("c_fc", "c_proj")), _plain("c_fc", "c_proj")),
    (frozenset(("fc1", "fc2")), _plain("fc1", "fc2")),
    (frozenset(("up_proj", "down_proj")), _plain("up_proj", "down_proj")),
    (frozenset(("fc_in", "fc_out")), _plain("fc_in", "fc_out")),
    (frozenset(("dense_h_to_4h", "dense_4h_to_h")), _plain("dense_h_to_4h", "dense_4h_to_h")),
]
