"""The job of the collection benchmark: 100 chat prompts x 20 greedy tokens on a random Gemma 3.

The shape is that of Gemma 3 270m with a vocabulary of 32,768 (121 M parameters); the prompts are
this repository's 50 pairs in chat format, by the embedded model's tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MAX_TOKENS = 20
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 640,
    "num_hidden_layers": 18, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 256, "query_pre_attn_scalar": 256, "vocab_size": 32768, "sliding_window": 512,
    "sliding_window_pattern": 6, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
SITES = [f"model.layers.{layer}.mlp.output" for layer in range(CONFIG["num_hidden_layers"])]


def model_folder(job: Path) -> Path:
    return job / "model"


def prompts_file(job: Path) -> Path:
    return job / "prompts.json"


def token_ids(job: Path) -> list[list[int]]:
    """Of each prompt, in the order of the prompts file."""
    return json.loads((job / "token_ids.json").read_text())


def make_job(job: Path) -> None:
    """Write the checkpoint, the prompts file and the token ids."""
    # Before MLX, because it loads OpenBLAS.
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from alignment_artifacts.pairs import load_pairs, prompt_groups
    from gemma_refactored.model_architecture import Gemma, GemmaConfig
    from gemma_refactored.prompt_processing import encode_prompts, load_prompts

    model_folder(job).mkdir(parents=True)
    mx.random.seed(0)
    shapes = {name: value.shape for name, value in tree_flatten(Gemma(GemmaConfig.from_dict(CONFIG)).parameters())}
    weights = {n: mx.random.normal(s) * 0.02 if len(s) == 2 else mx.zeros(s) for n, s in shapes.items()}
    mx.save_safetensors(str(model_folder(job) / "model.safetensors"), weights, {"format": "pt"})
    (model_folder(job) / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "model_organism" / "aligned" / name, model_folder(job))

    from transformers import AutoTokenizer

    groups = prompt_groups(load_pairs(ROOT / "alignment_artifact_prompt_pairs.json"))
    prompts_file(job).write_text(json.dumps(groups))
    prompts = load_prompts(prompts_file(job))
    ids = encode_prompts(AutoTokenizer.from_pretrained(model_folder(job)), prompts, chat_mode=True)
    (job / "token_ids.json").write_text(json.dumps(ids))


def multiply_adds(job: Path) -> float:
    """The least that the job needs: every weight once per token, and the head where a token is chosen."""
    lengths = [len(ids) for ids in token_ids(job)]
    hidden, wide, heads = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_attention_heads"]
    attention = 2 * hidden * CONFIG["head_dim"] * (heads + CONFIG["num_key_value_heads"])
    body = CONFIG["num_hidden_layers"] * (attention + 3 * hidden * wide)
    chosen = len(lengths) * MAX_TOKENS
    return body * (sum(lengths) + chosen) + hidden * CONFIG["vocab_size"] * chosen


class Saved:
    """How peers save: OUT/ROW/STEP.npz, np.savez, the format of the collection without its folders."""

    def __init__(self, out: Path, rows: int):
        self.out = out
        for row in range(rows):
            (out / str(row)).mkdir(parents=True)

    def start(self, rows: list[int]) -> None:
        """Begin a batch."""
        self.rows, self.step, self.values = rows, -1, []

    def add(self, value: np.ndarray) -> None:
        """The next layer's [rows, hidden]; after the last one a step is complete, and saved."""
        self.values.append(value)
        if len(self.values) < len(SITES):
            return
        for place, row in enumerate(self.rows):
            arrays = {site: layer[place][None, None] for site, layer in zip(SITES, self.values, strict=True)}
            np.savez(self.out / str(row) / f"{self.step}.npz", **arrays)
        self.step, self.values = self.step + 1, []
