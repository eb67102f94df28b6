"""What a GGUF file's metadata say of its model, as a config.json.

Written from llama.cpp's convert_hf_to_gguf.py and from what llama.cpp fills in for keys that a file lacks. A key that
is neither translated nor at the value that changes nothing is refused, as `config_audit` does for config.json.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import UserError, shown
from .gguf_files import ROPE_FACTORS, GGUFFile, says_number

NAMES = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
READ = (
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
READ_OF_GEMMA = (
    "attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping",
    "final_logit_softcapping", "rope.freq_base_swa",
)  # fmt: skip
# The values at which other keys change nothing; () where no value does.
NEUTRAL: dict[str, tuple] = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "rope.scaling.attn_factor": (1.0,),
    "logit_scale": (1.0,), "residual_scale": (1.0,), "embedding_scale": (1.0,), "use_parallel_residual": (False,),
    "attention.sliding_window": (0,),
}  # fmt: skip
NO_NUMBERS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Layers of those Gemmas whose attention is scaled by hidden size per head, not by the length of a key.
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


def config_of(file: GGUFFile) -> dict:
    """config.json in transformers' names.

    Raises:
        UserError: a layout that is not read, a key that is missing, or one whose effect would be lost.
    """
    if file.architecture not in LAYOUTS:
        raise UserError(
            f"{file.path}: GGUF files of the layout {file.architecture!r} are not read ({', '.join(LAYOUTS)} are); "
            "give the folder with .safetensors files that it was made from."
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: the tensor token_embd.weight is missing; download it again.")
    _audit(file)
    config = {ours: says_number(file, theirs) for theirs, ours in NAMES.items()}
    heads = config["num_attention_heads"]
    head_dim = says_number(file, "attention.key_length", config["hidden_size"] // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if says_number(file, key, head_dim) != head_dim:
            raise _lost(file, key)
    ends = [file.metadata.get(f"tokenizer.ggml.{key}") for key in END_TOKENS]
    config |= {
        "num_key_value_heads": says_number(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, config["max_position_embeddings"]),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}) or None,
    }
    if any(tensor.kind.name in ("Q4_0", "Q4_1", "Q8_0") for tensor in file.tensors.values()):
        config["quantization"] = {"group_size": 32, "bits": 4}  # of each weight, mlx-lm sees its own from its shape
    return config | LAYOUTS[file.architecture](file, config)


def _llama(file: GGUFFile, config: dict) -> dict:
    biases = {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    return {"model_type": "llama", **biases}


def _qwen2(file: GGUFFile, config: dict) -> dict:
    return {"model_type": "qwen2"}


def _qwen3(file: GGUFFile, config: dict) -> dict:
    return {"model_type": "qwen3", "attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _gemma2(file: GGUFFile, config: dict) -> dict:
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(file, config),
        "sliding_window": says_number(file, "attention.sliding_window", 4096),
        "attn_logit_softcapping": says_number(file, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": says_number(file, "final_logit_softcapping", 30.0),
    }


def _gemma3(file: GGUFFile, config: dict) -> dict:
    if "gemma3.attn_logit_softcapping" in file.metadata:
        raise _lost(file, "attn_logit_softcapping")
    pattern = file.metadata.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        slides = [bool(value) for value in pattern]
    else:
        period = says_number(file, "attention.sliding_window_pattern", 6)
        slides = [(layer + 1) % period != 0 for layer in range(config["num_hidden_layers"])]
    local = {"rope_type": "default", "rope_theta": says_number(file, "rope.freq_base_swa", 10_000.0)}
    result = {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(file, config),
        "sliding_window": says_number(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }
    if "gemma3.final_logit_softcapping" in file.metadata:
        result["final_logit_softcapping"] = says_number(file, "final_logit_softcapping")
    return result


def _query_scalar(file: GGUFFile, config: dict) -> float:
    """No file says it; llama.cpp knows the one size of each that differs by its number of layers."""
    if config["num_hidden_layers"] == LARGEST_GEMMA[file.architecture]:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


LAYOUTS: dict[str, Callable[[GGUFFile, dict], dict]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma2": _gemma2, "gemma3": _gemma3,
}  # fmt: skip


def _rope(file: GGUFFile, context: int) -> dict:
    """RoPE settings of layers that see everything, in transformers' form."""
    settings = {"rope_type": "default", "rope_theta": says_number(file, "rope.freq_base", 10_000.0)}
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    factor = says_number(file, "rope.scaling.factor", says_number(file, "rope.scale_linear", 1.0))
    if kind == "none" and f"{file.architecture}.rope.scale_linear" in file.metadata:
        kind = "linear"
    if ROPE_FACTORS in file.tensors:  # a factor for each frequency, which transformers has in its longrope
        factors = [float(value) for value in file.floats(ROPE_FACTORS)]
        if kind != "none" or not all(np.isfinite(factors)) or min(factors) <= 0:
            raise UserError(f"{file.path}: the RoPE factors in {ROPE_FACTORS} cannot be used (scaling {kind!r}).")
        lists = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        return settings | {"rope_type": "longrope", **lists, "original_max_position_embeddings": context}
    if kind == "linear" and factor not in (0, 1):
        return settings | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = says_number(file, "rope.scaling.original_context_length")
        betas = {
            name: says_number(file, f"rope.scaling.yarn_{name}", usual)
            for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))
        }
        return settings | {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas,
        }  # fmt: skip
    if kind not in ("none", "linear"):
        raise _lost(file, "rope.scaling.type")
    return settings


def _audit(file: GGUFFile) -> None:
    """Refuse keys of the architecture whose effect would be lost."""
    prefix = f"{file.architecture}."
    read = {*NAMES, *READ, *NO_NUMBERS, *(READ_OF_GEMMA if prefix.startswith("gemma") else ())}
    for name, value in file.metadata.items():
        key = name.removeprefix(prefix)
        if name.startswith(prefix) and key not in read and value not in NEUTRAL.get(key, ()):
            raise _lost(file, key)


def _lost(file: GGUFFile, key: str) -> UserError:
    value = file.metadata.get(f"{file.architecture}.{key}")
    return UserError(
        f"{file.path}: {file.architecture}.{key} = {shown(value)} changes the numbers in a way that is not "
        "implemented here, so this model is not run."
    )
