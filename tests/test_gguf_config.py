"""What a GGUF file's metadata say becomes a config.json with the same numbers, or a refusal that names the key."""

import gguf
import mlx.core as mx
import numpy as np
import pytest

from gemma_refactored.errors import UserError
from gemma_refactored.gguf_config import config_of
from gemma_refactored.model_loading import load
from gemma_refactored.rope import _llama3, _wavelengths

from .conftest import relative_error
from .gguf_checkpoints import HEAD_DIM, write_pair
from .test_gguf_files import IDS, assert_equal

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("architecture", "more", "config"),
    [
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_scaling": LINEAR}),
        ("llama", {"rope.scale_linear": 4.0}, {"rope_scaling": LINEAR}),
        ("llama", {"attention.key_length": None, "attention.value_length": None}, {}),
        ("llama", {"rope.freq_base": None}, {"rope_theta": 10000.0}),
        ("llama", {"expert_count": 0, "rope.dimension_count": HEAD_DIM, "vocab_size": 320}, {}),
        (
            "qwen2",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            {"rope_scaling": YARN},
        ),
        ("qwen3", {"attention.layer_norm_rms_epsilon": 1e-3}, {"rms_norm_eps": 1e-3}),
        ("gemma2", {"attention.sliding_window": 20}, {"sliding_window": 20}),
        ("gemma3", {"rope.freq_base_swa": 500.0}, {"rope_local_base_freq": 500.0}),
        ("gemma3", {"attention.sliding_window_pattern": [True, False, False]},
         {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
        ("gemma3", {"attention.sliding_window_pattern": None}, {"sliding_window_pattern": 6}),
        ("gemma3", {"rope.scaling.type": None, "rope.scaling.factor": None}, {"rope_scaling": None}),
        ("gemma3", {"final_logit_softcapping": 2.0}, {"final_logit_softcapping": 2.0}),
    ],
)  # fmt: skip
def test_a_key_moves_the_numbers_as_in_config_json(tmp_path, architecture, more, config):
    assert_equal(*write_pair(tmp_path, architecture, more=more, config=config))


@pytest.mark.parametrize("biases", [("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias")])
def test_biases_of_a_llama(tmp_path, biases):
    assert_equal(*write_pair(tmp_path, "llama", "Q8_0", config=dict.fromkeys(biases, True)))


def test_heads_are_tied_where_the_file_has_none_of_its_own(tmp_path):
    assert_equal(*write_pair(tmp_path / "tied", "llama", config={"tie_word_embeddings": True}))
    assert_equal(*write_pair(tmp_path / "untied", "qwen3", config={"tie_word_embeddings": False}))


def test_rope_factors_are_those_of_llama_3(tmp_path):
    settings = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    wavelengths = _wavelengths(HEAD_DIM, 50000.0)
    factors = (_llama3(wavelengths, settings) / wavelengths).astype(np.float32)
    assert np.unique(factors).size > 1
    pair = write_pair(tmp_path, "llama", config={"rope_scaling": settings}, tensors={"rope_freqs.weight": factors})
    assert_equal(*pair)


def test_the_scale_of_attention_in_the_largest_gemmas():
    metadata = {
        "general.architecture": "gemma2", "gemma2.block_count": 46, "gemma2.context_length": 8192,
        "gemma2.embedding_length": 4608, "gemma2.feed_forward_length": 36864, "gemma2.attention.head_count": 32,
        "gemma2.attention.key_length": 128, "gemma2.attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    embedding = gguf_tensor((256000, 4608))
    file = read_like(metadata, {"token_embd.weight": embedding})
    assert config_of(file)["query_pre_attn_scalar"] == 144
    assert config_of(read_like({**metadata, "gemma2.block_count": 42}, file.tensors))["query_pre_attn_scalar"] == 128


def gguf_tensor(shape):
    from gemma_refactored.gguf_files import Tensor

    return Tensor(shape, gguf.GGMLQuantizationType.F32, 0, 0)


def read_like(metadata, tensors):
    from gemma_refactored.gguf_files import GGUFFile

    return GGUFFile("large.gguf", metadata, tensors, None)


@pytest.mark.parametrize(
    ("architecture", "more", "message"),
    [
        ("llama", {"expert_count": 8}, "llama.expert_count = 8"),
        ("llama", {"attention.sliding_window": 64}, "llama.attention.sliding_window = 64"),
        ("llama", {"logit_scale": 2.0}, "logit_scale = 2.0"),
        ("llama", {"something_new": 2}, "something_new = 2"),
        ("llama", {"rope.dimension_count": 32}, "rope.dimension_count = 32"),
        ("llama", {"attention.value_length": 32}, "attention.value_length = 32"),
        ("llama", {"rope.scaling.type": "longrope"}, "rope.scaling.type = 'longrope'"),
        ("llama", {"embedding_length": None}, "llama.embedding_length must be a number, not None"),
        ("llama", {"block_count": "three"}, "llama.block_count must be a number, not 'three'"),
        ("llama", {"attention.head_count": [4, 4, 2]}, "head_count must be a number"),
        ("llama", {"block_count": 4}, "is missing"),
        ("llama", {"block_count": 2}, "nothing reads the tensor blk.2"),
        ("llama", {"embedding_length": 128}, "cannot be loaded"),
        ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "original_context_length must be"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3", {"attention.sliding_window": None}, "sliding_window must be a number"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(tmp_path, architecture, more, message):
    with pytest.raises(UserError, match=message):
        load(write_pair(tmp_path, architecture, more=more)[1])


@pytest.mark.parametrize(
    ("architecture", "key", "value", "message"),
    [
        *((name, "split.count", 1, f"layout '{name}' are not read") for name in ("phi3", "gemma", "falcon", "clip")),
        ("llama", "split.count", 2, "one of 2 parts"),
        ("llama", "general.type", "adapter", "holds a GGUF adapter"),
    ],
)
def test_other_layouts_parts_and_what_is_no_model(tmp_path, architecture, key, value, message):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    (writer.add_uint16 if isinstance(value, int) else writer.add_string)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x.gguf")


def test_the_scaled_positions_of_a_gemma_matter(tmp_path):
    """The comparison above is one that can fail."""
    folder, _ = write_pair(tmp_path / "a", "gemma3")
    _, file = write_pair(tmp_path / "b", "gemma3", more={"rope.scaling.factor": 2.0})
    assert relative_error(load(file).model(IDS), load(folder).model(mx.array(IDS))) > 1e-3
