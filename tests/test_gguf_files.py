"""A GGUF file gives the numbers of the checkpoint that it was made from, or is refused in a sentence."""

import gguf
import mlx.core as mx
import numpy as np
import pytest

from gemma_refactored.errors import UserError
from gemma_refactored.gguf_files import pack, unpermuted
from gemma_refactored.main import main
from gemma_refactored.model_loading import load

from .conftest import relative_error
from .gguf_checkpoints import LAYOUTS, permuted, write_pair

IDS = mx.array([[7 * i % 300 for i in range(40)]])  # five windows of the Gemmas


def assert_equal(folder, file):
    expected = load(folder)
    loaded = load(file)
    assert relative_error(loaded.model(IDS), expected.model(IDS)) < 1e-6
    return loaded, expected


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1", "mixed"])
@pytest.mark.parametrize("architecture", LAYOUTS)
def test_logits_are_those_of_the_folder_with_the_same_weights(tmp_path, architecture, kind):
    loaded, expected = assert_equal(*write_pair(tmp_path, architecture, kind))
    assert loaded.end_tokens == expected.end_tokens == (1, 2)
    assert loaded.num_parameters == expected.num_parameters and loaded.context_length == 512
    assert loaded.name == f"{tmp_path.name}/{architecture}.gguf"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_what_mlx_can_multiply_stays_quantised(tmp_path, kind):
    folder, file = write_pair(tmp_path, "gemma3", kind)
    kept = load(file, keep_precision=True)
    assert kept.model.layers[0].mlp.up_proj.bits == int(kind[1])
    assert relative_error(kept.model(IDS), load(folder).model(IDS)) < 1e-5


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_packed_blocks_stand_for_the_same_numbers_bit_for_bit(kind):
    values = np.random.default_rng(1).normal(size=(5, 96)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    parts = {name: mx.array(value) for name, value in pack(blocks, kind).items()}
    expanded = mx.dequantize(parts["weight"], parts["scales"], parts["biases"], 32, int(kind[1]))
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(np.array(expanded), expected, rtol=0, atol=1e-6)


def test_unpermuting_undoes_the_converter():
    rows = np.arange(24.0).reshape(12, 2)
    np.testing.assert_array_equal(unpermuted(permuted(rows, 3), 3), rows)
    np.testing.assert_array_equal(unpermuted(permuted(rows[:, 0], 3), 3), rows[:, 0])


def test_a_run_by_the_name_of_the_file(tmp_path, capsys):
    _, file = write_pair(tmp_path, "qwen3", "Q4_0")
    arguments = ["--model", str(file), "--prompts", "How do I paint a bookshelf?", "--max-tokens", "2"]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "results.json").exists()


def test_identity_covers_weights_and_metadata(tmp_path):
    one, other = (
        load(write_pair(tmp_path / name, "llama", more=more)[1])
        for name, more in (("a", {}), ("b", {"tensor_data_layout": "reference"}))
    )
    assert one.revision != other.revision and one.identity() != other.identity()
    again = load(tmp_path / "a" / "llama.gguf")
    assert again.identity() == one.identity()


def spoilt(file, how):
    data = file.read_bytes()
    file.write_bytes(how(data))
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda data: data[:-100], "cut short"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data[:500], "ends within its header"),
        (lambda data: data[:10], "damaged"),
        (lambda data: b"", "does not begin as a GGUF file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (lambda data: b"PK" + data[2:], "does not begin as a GGUF file"),
        (lambda data: data[:4] + b"\x01" + data[5:], "version 1"),
        (lambda data: data[:4] + b"\x00\x00\x00\x03" + data[8:], "version"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "damaged"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "damaged"),
        (lambda data: data[:24] + b"\xff" * 7 + data[31:], "damaged"),
        (lambda data: data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"), "occurs twice"),
        (lambda data: data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_z.weight"), "attn_k.weight is missing"),
        (lambda data: data.replace(b"token_embd", b"token_embe"), "token_embd.weight is missing"),
    ],
)
def test_damaged_files_get_one_sentence(tmp_path, how, message):
    _, file = write_pair(tmp_path, "llama")
    with pytest.raises(UserError, match=message):
        load(spoilt(file, how))


@pytest.mark.parametrize("place", range(24, 4000, 331))
def test_any_damaged_byte_of_the_header_is_a_sentence_or_harmless(tmp_path, place):
    _, file = write_pair(tmp_path, "qwen2")
    try:
        load(spoilt(file, lambda data: data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]))
    except UserError as error:
        assert "\n" not in str(error)


def test_tensors_that_nothing_reads_are_refused(tmp_path):
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(UserError, match="nothing reads the tensor blk.0.attn_sinks.weight"):
        load(write_pair(tmp_path, "qwen3", tensors=extra)[1])


def test_missing_files_and_folders_of_gguf_files(tmp_path):
    _, file = write_pair(tmp_path, "llama")
    with pytest.raises(UserError, match="no model folder or GGUF file"):
        load(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="name its file llama.gguf instead"):
        load(file.parent)


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    write_pair(tmp_path / "a", "llama")
    file = tmp_path / "a" / "llama.gguf"
    before = load(file).revision
    write_pair(tmp_path / "b", "llama", "Q8_0")
    (tmp_path / "b" / "llama.gguf").replace(file)
    assert load(file).revision != before
