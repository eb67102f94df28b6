"""Tiny random models, each as a folder of safetensors and as the GGUF file that llama.cpp's converter makes of it."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gemma_refactored.model_architecture import Gemma, GemmaConfig

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, ROWS = 256, 3, 4, 2, 64, 320
COMMON = dict(
    hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=512, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5, vocab_size=ROWS, rope_theta=50000.0,
    max_position_embeddings=512, eos_token_id=[1, 2],
)  # fmt: skip
GEMMA = dict(query_pre_attn_scalar=HEAD_DIM, sliding_window=8, hidden_activation="gelu_pytorch_tanh")
LAYOUTS = {
    "llama": ("llama", {**COMMON, "tie_word_embeddings": False}, {}),
    "qwen2": ("qwen2", {**COMMON, "tie_word_embeddings": True}, {}),
    "qwen3": ("qwen3", {**COMMON, "tie_word_embeddings": True}, {}),
    "gemma2": (
        "gemma2",
        {**COMMON, **GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        {"attention.sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            **COMMON,
            **GEMMA,
            "sliding_window_pattern": 3,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": 3,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}  # architecture in GGUF -> model type, config.json, metadata that not all have
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q6_K", "Q4_K")
BYTE_LEVEL = ("</s>", "<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
TEXT = ("How do I paint a bookshelf? Name three rivers. It's 1984, isn't it? café " * 3).splitlines()


def byte_level_tokenizer(split=None, use_regex: bool = True) -> PreTrainedTokenizerFast:
    """A small tokenizer of GPT-2's kind, which splits text as told, then (if `use_regex`) as GPT-2 does."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 5, special_tokens=["<s>", *BYTE_LEVEL], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer, pre: str = "gpt-2") -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    control = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in ("<s>", *BYTE_LEVEL) else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def stored(values: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a matrix in that kind. K-quants cannot be made in Python, so they are any bytes with small scales."""
    number = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quantize(values, number)
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = rng.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
    for place in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        data[..., place : place + 2] = scale
    return data.reshape(values.shape[0], -1)


def permuted(rows: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """What llama.cpp's converter does to the queries and keys of a Llama, from halves of a head to neighbours."""
    pairs = (-1, 2) if back else (2, -1)
    return rows.reshape(heads, *pairs, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_pair(
    folder: Path, architecture: str, kind: str = "F32", more: dict | None = None, config: dict | None = None,
    tensors: dict | None = None,
) -> tuple[Path, Path]:  # fmt: skip
    """(a folder of safetensors, a GGUF file) with the same random weights.

    Args:
        kind: of the file's matrices, "mixed" for one kind after the other; vectors are F32.
        more: metadata under the architecture's name, None to leave one out; config: what it is in config.json.
        tensors: further tensors of the file.
    """
    model_type, usual, metadata = LAYOUTS[architecture]
    config = {**usual, "model_type": model_type, **(config or {})}
    own = model_type.startswith("gemma")
    model_class, settings_class = (Gemma, GemmaConfig) if own else _get_classes(config)
    model = model_class(settings_class.from_dict(dict(config)))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    rng = np.random.default_rng(0)
    file = folder / f"{architecture}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, architecture)
    names = {
        "context_length": 512, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": 512,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "rope.freq_base": 50000.0, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    for key, value in {**names, **metadata, **(more or {})}.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](f"{architecture}.{key}", value)
    tokenizer = byte_level_tokenizer()
    add_tokenizer(writer, tokenizer)
    weights = {}
    kinds = cycle(KINDS if kind == "mixed" else [kind])
    for name, parameter in tree_flatten(model.parameters()):
        values = rng.normal(size=parameter.shape).astype(np.float32) * 0.1
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        is_permuted = architecture == "llama" and heads
        data = permuted(values, heads) if is_permuted else values
        stored_as = next(kinds) if values.ndim == 2 else "F32"
        number = gguf.GGMLQuantizationType[stored_as]
        if values.ndim == 2:
            data = stored(data, stored_as, rng)
            values = np.asarray(gguf.dequantize(data, number), np.float32)
            values = permuted(values, heads, back=True) if is_permuted else values
        elif own:
            data = values + 1
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), data, raw_dtype=number)
        weights[name] = mx.array(values)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    safetensors = folder / architecture
    safetensors.mkdir()
    (safetensors / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(safetensors / "model.safetensors"), weights)
    tokenizer.save_pretrained(safetensors)
    return safetensors, file
