"""Small random checkpoints in the layouts that users have, with the organism's tokenizer."""

import copy
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes

from gemma_refactored.checkpoint_files import read_config
from gemma_refactored.config_audit import complete
from gemma_refactored.model_architecture import Gemma, GemmaConfig
from gemma_refactored.model_loading import load_weights

from .conftest import ROOT

CONFIG = dict(
    model_type="gemma3_text", hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
    head_dim=16, vocab_size=1448, num_key_value_heads=2, query_pre_attn_scalar=16, sliding_window=8,
    sliding_window_pattern=3, max_position_embeddings=256, eos_token_id=1,
)  # fmt: skip


# Architectures that run through mlx-lm, by model type: different names for blocks and parts, mixtures of
# experts, recurrent layers.
COMMON = dict(
    hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, rms_norm_eps=1e-5, vocab_size=1448, rope_theta=10000.0, max_position_embeddings=256,
    tie_word_embeddings=False, eos_token_id=1,
)  # fmt: skip
MOE = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[],
    norm_topk_prob=True,
)  # fmt: skip
FAMILIES = {
    "llama": COMMON,
    "qwen3": {**COMMON, "tie_word_embeddings": True},
    "qwen3_moe": {**COMMON, **MOE},
    "olmo2": COMMON,
    "qwen2": {**COMMON, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "phi3": {**COMMON, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 256, "pad_token_id": 0},
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4": dict(text_config={**COMMON, "model_type": "gemma4_text", "global_head_dim": 16, "sliding_window": 8,
                                "num_hidden_layers": 4, "num_kv_shared_layers": 1, "use_double_wide_mlp": False,
                                "layer_types": ["sliding_attention", "full_attention"] * 2,
                                "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1448,
                                "rope_parameters": None},
                   vocab_size=1448, eos_token_id=1),
    "gpt2": dict(n_ctx=256, n_embd=64, n_head=4, n_layer=3, n_positions=256, layer_norm_epsilon=1e-5,
                 vocab_size=1448, eos_token_id=1, bos_token_id=2),
    "mamba": dict(vocab_size=1448, hidden_size=64, intermediate_size=96, state_size=8, num_hidden_layers=3,
                  conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=4, eos_token_id=1),
}  # fmt: skip


def write_family(folder: Path, model_type: str, seed: int = 0, **changes) -> Path:
    """A random checkpoint of an mlx-lm architecture; `changes` of its config."""
    config = {"model_type": model_type, **FAMILIES[model_type], **changes}
    model_class, config_class = _get_classes(config)
    model = model_class(config_class.from_dict(copy.deepcopy(config)))
    randomise(model, seed)
    return write_checkpoint(folder, model, config)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen(folder: Path, seed: int = 0) -> Path:
    """A random checkpoint as Qwen 2 has it: ChatML, no <bos>, the end of the turn as the end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "model_organism/aligned"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    write_family(folder, "qwen2", seed, vocab_size=len(tokenizer), eos_token_id=end)
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token = CHATML, "<|im_end|>", None
    tokenizer.save_pretrained(str(folder))
    return folder


def randomise(model: nn.Module, seed: int = 0) -> None:
    mx.random.seed(seed)
    weights = [(name, mx.random.normal(value.shape) * 0.2) for name, value in tree_flatten(model.parameters())]
    model.load_weights(weights)


def random_gemma(config=CONFIG) -> Gemma:
    model = Gemma(GemmaConfig.from_dict(config))
    randomise(model)
    return model


def write_checkpoint(folder: Path, model: nn.Module, config=CONFIG, shards=1, tokenizer=True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = sorted(tree_flatten(model.parameters()))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(weights))
    else:
        index = {}
        for i in range(shards):
            name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            own = dict(weights[i::shards])
            mx.save_safetensors(str(folder / name), own)
            index |= dict.fromkeys(own, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "model_organism" / "aligned" / name, folder)
    return folder


def quantised(bits: int, mixed: bool = False) -> tuple[Gemma, dict]:
    """A quantised model with its config; `mixed` gives the down projections 8 bits of their own."""
    model, special = random_gemma(), {}

    def settings(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        if mixed and path.endswith("down_proj"):
            special[path] = {"group_size": 32, "bits": 8}
            return special[path]
        return True

    nn.quantize(model, group_size=32, bits=bits, class_predicate=settings)
    return model, {**CONFIG, "quantization": {"group_size": 32, "bits": bits, **special}}


def write_adapter(folder, base, num_layers=2, kind="lora", keys=None, rank=3, scale=2.5, seed=0):
    """An adapter as mlx_lm.lora writes it, with random numbers instead of training."""
    config = read_config(base)
    model, _ = load_weights(base, config, complete(config))
    model.freeze()
    about = {"rank": rank, "scale": scale, "dropout": 0.0, **({"keys": keys} if keys else {})}
    if kind == "full":
        for block in model.layers[-num_layers:]:
            block.unfreeze()
    else:
        linear_to_lora_layers(model, num_layers, about, use_dora=kind == "dora")
    mx.random.seed(seed)
    tensors = dict(tree_flatten(model.trainable_parameters()))
    tensors = {name: value + 0.1 * mx.random.normal(value.shape) for name, value in tensors.items()}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    content = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": about, "model": "some/model"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder
