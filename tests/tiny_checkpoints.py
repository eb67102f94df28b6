"""Small random checkpoints in the layouts that users have, with the organism's tokenizer."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gemma_refactored.model_architecture import Gemma, GemmaConfig

from .conftest import ROOT

CONFIG = dict(
    model_type="gemma3_text", hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
    head_dim=16, vocab_size=1448, num_key_value_heads=2, query_pre_attn_scalar=16, sliding_window=8,
    sliding_window_pattern=3, max_position_embeddings=256, eos_token_id=1,
)  # fmt: skip


def random_gemma(config=CONFIG) -> Gemma:
    model = Gemma(GemmaConfig.from_dict(config))
    mx.random.seed(0)
    weights = [(name, mx.random.normal(value.shape) * 0.2) for name, value in tree_flatten(model.parameters())]
    model.load_weights(weights)
    return model


def write_checkpoint(folder: Path, model: Gemma, config=CONFIG, shards=1, tokenizer=True) -> Path:
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
