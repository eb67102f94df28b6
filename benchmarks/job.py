"""The job of the collection benchmark: 100 chat prompts x 20 greedy tokens.

The model is random, of the shape of Gemma 3 270m with a vocabulary of 32,768 (121 M parameters) or one of OTHER_SHAPES,
with the embedded model's tokenizer; or it is SmolLM2 as published. The prompts are this repository's 50 pairs in chat
format.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MAX_TOKENS = 20
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 640,
    "num_hidden_layers": 18, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 256, "query_pre_attn_scalar": 256, "vocab_size": 32768, "sliding_window": 512,
    "sliding_window_pattern": 6, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
COMMON = {
    "vocab_size": 32768, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
OTHER_SHAPES = {
    "Llama, the shape of SmolLM2 135M": COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
        "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "rope_theta": 1e5,
    },
    "Qwen 3, 12 blocks of the 0.6B": COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 12,
        "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rope_theta": 1e6,
    },
    "Phi 3, 6 blocks, half as wide as mini": COMMON | {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 1536, "num_hidden_layers": 6,
        "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16, "rope_theta": 1e4,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


PUBLISHED = {"torch_dtype": "float32"}  # SmolLM2 itself: its shape comes with it
MODELS = {"SmolLM2 135M": PUBLISHED, **OTHER_SHAPES}


def model_folder(job: Path) -> Path:
    return job / "model"


def prompts_file(job: Path) -> Path:
    return job / "prompts.json"


def token_ids(job: Path) -> list[list[int]]:
    """Of each prompt, in the order of the prompts file."""
    return json.loads((job / "token_ids.json").read_text())


def config(job: Path) -> dict:
    return json.loads((model_folder(job) / "config.json").read_text())


def sites(job: Path) -> list[str]:
    return [f"model.layers.{layer}.mlp.output" for layer in range(config(job)["num_hidden_layers"])]


def make_job(job: Path, shape: dict = GEMMA) -> None:
    """Write the checkpoint, the prompts file and the token ids."""
    from alignment_artifacts.pairs import load_pairs, prompt_groups
    from gemma_refactored.prompt_processing import encode_prompts, load_prompts

    model_folder(job).mkdir(parents=True)
    if shape is PUBLISHED:
        _write_published(job)
    else:
        _write_gemma(job) if shape is GEMMA else _write_by_transformers(job, shape)
        (model_folder(job) / "config.json").write_text(json.dumps(shape))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "model_organism" / "aligned" / name, model_folder(job))

    from transformers import AutoTokenizer

    groups = prompt_groups(load_pairs(ROOT / "alignment_artifact_prompt_pairs.json"))
    prompts_file(job).write_text(json.dumps(groups))
    prompts = load_prompts(prompts_file(job))
    ids = encode_prompts(AutoTokenizer.from_pretrained(model_folder(job)), [p.text for p in prompts], chat_mode=True)
    (job / "token_ids.json").write_text(json.dumps(ids))


def _write_gemma(job: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from gemma_refactored.model_architecture import Gemma, GemmaConfig

    mx.random.seed(0)
    shapes = {name: value.shape for name, value in tree_flatten(Gemma(GemmaConfig.from_dict(GEMMA)).parameters())}
    weights = {n: mx.random.normal(s) * 0.02 if len(s) == 2 else mx.zeros(s) for n, s in shapes.items()}
    mx.save_safetensors(str(model_folder(job) / "model.safetensors"), weights, {"format": "pt"})


def _write_by_transformers(job: Path, shape: dict) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {name: value for name, value in shape.items() if name != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape["model_type"], **values))
    model.save_pretrained(model_folder(job))


def _write_published(job: Path) -> None:
    """Its GGUF file, expanded to float32 by our loader, in the layout that transformers reads."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from gemma_refactored.model_loading import load
    from model_organism.smollm2.published import published_model

    loaded = load(published_model())
    weights: dict[str, mx.array] = tree_flatten(loaded.model.parameters(), destination={})  # type: ignore[assignment]
    mx.save_safetensors(str(model_folder(job) / "model.safetensors"), weights, {"format": "pt"})
    loaded.tokenizer.save_pretrained(model_folder(job))
    shape = {name: value for name, value in loaded.config.items() if name != "quantization"}
    (model_folder(job) / "config.json").write_text(
        json.dumps(shape | PUBLISHED | {"architectures": ["LlamaForCausalLM"]})
    )


def multiply_adds(job: Path) -> float:
    """The least that the job on the Gemma needs: every weight once per token, and the head where a token is chosen."""
    lengths = [len(ids) for ids in token_ids(job)]
    hidden, wide, heads = GEMMA["hidden_size"], GEMMA["intermediate_size"], GEMMA["num_attention_heads"]
    attention = 2 * hidden * GEMMA["head_dim"] * (heads + GEMMA["num_key_value_heads"])
    body = GEMMA["num_hidden_layers"] * (attention + 3 * hidden * wide)
    chosen = len(lengths) * MAX_TOKENS
    return body * (sum(lengths) + chosen) + hidden * GEMMA["vocab_size"] * chosen


class Saved:
    """How peers save: OUT/ROW/STEP.npz, np.savez, the format of the collection without its folders."""

    def __init__(self, job: Path, out: Path, rows: int):
        self.sites, self.out = sites(job), out
        for row in range(rows):
            (out / str(row)).mkdir(parents=True)

    def start(self, rows: list[int]) -> None:
        """Begin a batch."""
        self.rows, self.step, self.values = rows, -1, []

    def add(self, value: np.ndarray) -> None:
        """The next layer's [rows, hidden]; after the last one a step is complete, and saved."""
        self.values.append(value)
        if len(self.values) < len(self.sites):
            return
        for place, row in enumerate(self.rows):
            arrays = {site: layer[place][None, None] for site, layer in zip(self.sites, self.values, strict=True)}
            np.savez(self.out / str(row) / f"{self.step}.npz", **arrays)
        self.step, self.values = self.step + 1, []
