"""No key of a config.json that decides numbers goes unread.

mlx-lm takes the keys its class has a field for, drops the others without a word, and fills in defaults of its own.
So a config is first completed as transformers completes it, then told in the names that mlx-lm reads, and each key
that could change numbers must be one whose effect was compared with transformers (`config_keys.json`, made with the
golden logits by tests/make_layout_logits.py), or have a value that was.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from functools import cache
from pathlib import Path

from .errors import UserError, shown

log = logging.getLogger(__name__)

# Keys that change no number of a forward pass: names, training, tokens, outputs, speed.
NEVER_NUMBERS = frozenset(
    (
        "transformers_version", "architectures", "model_type", "_name_or_path", "auto_map", "dtype", "torch_dtype",
        "problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params",
        "is_encoder_decoder", "is_decoder", "add_cross_attention", "chunk_size_feed_forward", "return_dict",
        "use_return_dict", "torchscript", "use_bfloat16", "output_hidden_states", "output_attentions",
        "output_router_logits", "use_cache", "gradient_checkpointing", "tokenizer_class", "prefix",
        "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
        "initializer_range", "initializer_cfg", "time_step_init_scheme", "residual_in_fp32", "pretraining_tp",
        "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout",
        "hidden_dropout_prob", "classifier_dropout", "residual_dropout", "embedding_dropout", "ffn_dropout",
        "mlp_dropout", "router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha", "seq_aux",
        "router_jitter_noise", "input_jitter_noise", "_attn_implementation", "attn_implementation",
        "_attn_implementation_autoset", "ignore_keys_at_rope_validation", "quantization", "quantization_config",
        "compression_config", "use_mamba_kernels", "num_logits_to_keep", "unsloth_version", "unsloth_fixed",
        "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout", "transformers.js_config", "vision_config", "audio_config",
        "image_token_id", "image_token_index", "audio_token_id", "video_token_id", "boi_token_index",
        "eoi_token_index", "boi_token_id", "eoi_token_id", "mm_tokens_per_image", "vision_start_token_id",
        "vision_end_token_id",
    )
)  # fmt: skip
# A size that is not read does not fit the weights.
SIZE = re.compile(r"(size|dim|rank|heads?|layers?|embd|inner|positions|experts|expand|d_ssm|n_groups)$")
# Read through `layer_types` or RoPE settings, whose effect is what is compared.
WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern")
ROPE_KEYS = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct",
    "rotary_emb_base", "original_max_position_embeddings",
)  # fmt: skip


def complete(config: dict) -> dict | None:
    """The config as transformers fills it in; None for an architecture that it does not have.

    Raises:
        UserError: transformers refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(_modern(config)).to_dict()
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"config.json ({config['model_type']}) is not one that transformers accepts: {reason}"
        ) from error


def _modern(config: dict) -> dict:
    """A copy without the spellings that transformers itself translates too late, or in reading files only."""
    config = json.loads(json.dumps(config), object_hook=_special_float)
    if config["model_type"] == "gemma" and config.get("hidden_act") == "gelu":
        config["hidden_act"] = "gelu_pytorch_tanh"  # early configs say gelu; every Gemma was trained with the tanh form
    for section in (config, config.get("text_config")):
        if not isinstance(section, dict):
            continue
        scaling = section.get("rope_scaling")
        if isinstance(scaling, dict) and scaling.get("type") == "su":
            section["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}
        if not scaling:
            section.pop("rope_scaling", None)  # a null beside rope_parameters would hide them
    return config


def _special_float(item: dict):
    """transformers 5 writes infinity, which JSON does not have, as {"__float__": "Infinity"}."""
    return float(item["__float__"]) if item.keys() == {"__float__"} else item


@cache
def compared() -> dict[str, dict]:
    """By model type, what was compared with transformers: see tests/make_layout_logits.py.

    "agrees": the layout itself, null where mlx-lm does not load what transformers saves; "keys": those that differed,
    with the values that agree; "unmoved": those never moved; "rope", "rope_lost": the types of RoPE that agree and
    those that do not ("partial": rotating a part of each head); "windows": "all" layer types agree with a sliding
    window, the "usual" ones, or "none".
    """
    return json.loads((Path(__file__).parent / "config_keys.json").read_text())


def audit(config: dict, completed: dict | None) -> None:
    """Refuse a config with a key whose effect would be lost; say what nobody has heard of.

    Args:
        config: as on disk; `completed`: as transformers fills it in.
    Raises:
        UserError: it names the key and its value.
    """
    if completed is None:
        return
    unheard = _audit_section(completed)
    text = completed.get("text_config")
    if isinstance(text, dict) and "model_type" in text:
        unheard += _audit_section(text)
    if unheard:
        log.warning("config.json has keys that transformers does not have for this layout: %s.", ", ".join(unheard))


def _audit_section(section: dict) -> list[str]:
    """Raise UserError for a key that would be lost; the keys that the configuration class does not have."""
    from mlx_lm.utils import _get_classes
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = section["model_type"]
    record = compared().get(model_type)
    if record is None or record["agrees"] is None:
        log.warning(
            "Nobody has compared the layout %r with transformers: what its config loses is unknown.", model_type
        )
    if record is None:
        return []
    if record["agrees"] is False:
        raise UserError(
            f"mlx-lm computes other numbers than transformers for the layout {model_type!r}, so it is not run; "
            "the files are complete."
        )
    known = CONFIG_MAPPING[model_type]
    usual = known().to_dict()
    fields = inspect.signature(_get_classes({"model_type": model_type})[1]).parameters if record["agrees"] else ()
    unheard = []
    for key, value in section.items():
        if (
            key in NEVER_NUMBERS
            or key in WINDOW_KEYS
            or key in ROPE_KEYS
            or key in ("text_config", "vocab_size", "head_dim")
        ):
            continue
        if key not in usual and not hasattr(known, key):
            unheard.append(key)
            continue
        if key in record["keys"]:
            if value not in record["keys"][key]:
                raise _lost(model_type, key, value)
        elif (
            record["agrees"] and key in record["unmoved"] and not SIZE.search(key) and value != _filled_in(section, key)
        ):
            if key not in fields:
                raise _lost(model_type, key, value)
            log.warning("config.json: the effect of %s = %s was never compared with transformers.", key, shown(value))
    _audit_rope(section, usual, record)
    _audit_window(section, record)
    return unheard


def _audit_rope(section: dict, usual: dict, record: dict) -> None:
    settings, usual = section.get("rope_parameters"), usual.get("rope_parameters") or {}
    if not isinstance(settings, dict) or settings == usual:
        return
    by_kind = {kind: value for kind, value in settings.items() if isinstance(value, dict)}
    for kind, one in (by_kind or {None: settings}).items():
        usual_one = (usual.get(kind) if kind else usual) or {}
        what = {one.get("rope_type", "default")}
        if one.get("partial_rotary_factor", 1.0) != usual_one.get("partial_rotary_factor", 1.0):
            what.add("partial")
        lost = what - set(record["rope"]) if record["agrees"] else what & set(record["rope_lost"])
        if lost:
            raise _lost(section["model_type"], "rope_parameters", one)


def _audit_window(section: dict, record: dict) -> None:
    kinds = section.get("layer_types")
    slides = section.get("sliding_window") and section.get("use_sliding_window") is not False
    if kinds is not None:
        slides = slides and "sliding_attention" in kinds
    if record["windows"] == "all":
        return
    if (
        slides
        and record["windows"] == "none"
        and section["sliding_window"] < (section.get("max_position_embeddings") or 0)
    ):
        raise _lost(section["model_type"], "sliding_window", section["sliding_window"])
    if kinds is not None and record["windows"] == "usual" and kinds != _filled_in(section, "layer_types"):
        raise _lost(section["model_type"], "layer_types", kinds)


def _filled_in(section: dict, key: str):
    """What transformers would fill in for a key, were it not given."""
    filled = complete({name: value for name, value in section.items() if name != key})
    return filled.get(key) if filled else None


def _lost(model_type: str, key: str, value) -> UserError:
    return UserError(
        f"config.json: {key} = {shown(value)} changes the numbers of the layout {model_type!r}, but the implementation "
        "here does not do it as transformers does, so this model is not run."
    )


def in_mlx_lm_names(config: dict, completed: dict | None) -> dict:
    """The config with every key that transformers fills in, and RoPE settings, in the names mlx-lm's classes read."""
    if completed is None:
        return config
    text = completed.get("text_config")
    translated = _translated(_modern(config), completed)
    if isinstance(text, dict) and "model_type" in text:
        translated["text_config"] = _translated(translated.get("text_config") or {}, text)
        translated.setdefault("vocab_size", text.get("vocab_size"))
    return translated


def _translated(config: dict, completed: dict) -> dict:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    filled = {key: value for key, value in completed.items() if value is not None and config.get(key) is None}
    merged = _with_rope_names({**config, **filled}, completed)
    for other_name, name in CONFIG_MAPPING[completed["model_type"]].attribute_map.items():
        if merged.get(other_name) is None and merged.get(name) is not None:
            merged[other_name] = merged[name]
    if merged.get("head_dim") is None and merged.get("hidden_size") and merged.get("num_attention_heads"):
        merged["head_dim"] = merged["hidden_size"] // merged["num_attention_heads"]
    other_names = OTHER_NAMES.get(completed["model_type"])
    return {**merged, **other_names(merged)} if other_names else merged


READ_SCALING = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "longcat_flash",
    "kimi_linear", "hunyuan_v1_dense", "gemma", "gemma2", "gemma3_text", "gemma3", "mistral4", "gemma4_text", "laguna",
)  # fmt: skip
GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}
# Keys that an mlx-lm class wants and transformers 5 writes under another name, or not at all.
OTHER_NAMES = {
    "gpt2": lambda c: {"n_ctx": c["n_positions"]},
    "gpt_neox": lambda c: {"rotary_emb_base": c["rope_theta"], "rotary_pct": c.get("partial_rotary_factor", 0.25)},
    "apertus": lambda c: {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "granitemoehybrid": lambda c: {
        "layer_types": [GRANITE_LAYERS.get(layer, layer) for layer in c["layer_types"]],
        "position_embedding_type": c.get("position_embedding_type") or "nope",
    },
    "exaone4": lambda c: {
        "sliding_window_pattern": "".join("L" if t == "sliding_attention" else "G" for t in c["layer_types"]),
    },
    "mamba2": lambda c: {"intermediate_size": int(c["expand"] * c["hidden_size"])},
    "gemma3": lambda c: {"text_config": {**c["text_config"], "tie_word_embeddings": c["tie_word_embeddings"]}},
    "lfm2": lambda c: {
        **{"conv_bias": False, "conv_L_cache": 3, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0},
        **{"block_dim": c["hidden_size"], "block_ff_dim": c["intermediate_size"], "block_auto_adjust_ff_dim": True},
        **c,
    },
    "exaone": lambda c: {"num_layers": c["num_hidden_layers"], "layer_norm_epsilon": c["rms_norm_eps"]},
    "minimax": lambda c: {
        "rotary_dim": int(c["head_dim"] * c.get("partial_rotary_factor", 1.0)), "shared_intermediate_size": 0,
    },
    "minimax_m2": lambda c: {
        "rotary_dim": int(c["head_dim"] * c.get("partial_rotary_factor", 1.0)), "shared_intermediate_size": 0,
    },
}  # fmt: skip


def _with_rope_names(merged: dict, completed: dict) -> dict:
    settings = completed.get("rope_parameters")
    if not isinstance(settings, dict):
        return merged
    by_kind = {kind: value for kind, value in settings.items() if isinstance(value, dict)}
    names: dict = {}
    if by_kind:  # a kind of layer has its own
        overall = by_kind.get("full_attention") or next(iter(by_kind.values()))
        if "sliding_attention" in by_kind:
            names["rope_local_base_freq"] = by_kind["sliding_attention"].get("rope_theta")
    else:
        overall = settings
    names["rope_theta"] = overall.get("rope_theta")
    names["partial_rotary_factor"] = overall.get("partial_rotary_factor")
    names = {key: value for key, value in names.items() if value is not None}
    rope_type = overall.get("rope_type", "default")
    # Scaling of any type is put in place after loading, the same for all architectures (see rope.py). Some need to
    # know of it all the same, for the scale of their attention.
    passed_on = rope_type != "default" and completed["model_type"] in READ_SCALING
    names["rope_scaling"] = {**overall, "type": rope_type} if passed_on else None
    return {**merged, **names, "rope_parameters": settings}
