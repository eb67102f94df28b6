"""The job that every contender does: 100 chat prompts x 20 greedy tokens on a random Gemma 3.

The shape is that of Gemma 3 270m with a vocabulary of 32,768 (121 M parameters); the prompts are
this repository's 50 pairs in chat format, in the embedded model's tokenizer.
"""

from __future__ import annotations

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
