"""Which files of a folder are the model, and one sentence for those that are not what they seem."""

import json

import mlx.core as mx
import numpy as np
import pytest

from gemma_refactored.checkpoint_files import LFS_POINTER, read_checkpoint_json
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import load

from .tiny_checkpoints import random_gemma, write_checkpoint, write_family

TOKENS = mx.array([[3, 1, 4, 1, 5, 9]])


@pytest.fixture(params=[1, 3])
def folder(request, tmp_path):
    return write_checkpoint(tmp_path / "m", random_gemma(), shards=request.param)


def other_weights(path):
    weights = mx.load(str(next(path.parent.glob("model*.safetensors"))))
    mx.save_safetensors(str(path), {name: value * 0 for name, value in weights.items()})


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00001-of-00009.safetensors", "models.safetensors"])
def test_other_files_beside_the_weights_change_nothing(folder, name):
    before = load(folder)
    other_weights(folder / name)
    after = load(folder)
    assert after.revision == before.revision
    assert np.array_equal(after.model(TOKENS), before.model(TOKENS))


def test_a_single_file_goes_before_an_index(tmp_path):
    folder = write_checkpoint(tmp_path / "m", random_gemma(), shards=3)
    other_weights(folder / "model-00001-of-00003.safetensors")
    expected = random_gemma()(TOKENS)
    write_checkpoint(folder, random_gemma())
    np.testing.assert_allclose(load(folder).model(TOKENS), expected, rtol=1e-4, atol=1e-4)


def edit_index(change):
    def spoil(folder):
        path = folder / "model.safetensors.index.json"
        path.write_text(change(json.loads(path.read_text())))

    return spoil


def move_a_tensor(index):
    places = index["weight_map"]
    first = next(iter(places))
    places[first] = next(file for file in places.values() if file != places[first])
    return json.dumps(index)


def pointer(name):
    return lambda folder: (folder / name).write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 9\n")


SHARD = "model-00002-of-00003.safetensors"
SPOILT = {
    "index cut short": (edit_index(lambda index: "{"), "index.json is not valid JSON"),
    "index without a map": (edit_index(lambda index: "{}"), "no weight_map"),
    "index of PyTorch files": (
        edit_index(lambda i: json.dumps({"weight_map": dict.fromkeys(i["weight_map"], "pytorch_model-00001.bin")})),
        "names 'pytorch_model-00001.bin'",
    ),
    "index that leaves the folder": (
        edit_index(lambda i: json.dumps({"weight_map": dict.fromkeys(i["weight_map"], "../model.safetensors")})),
        "same folder",
    ),
    "index of another model": (edit_index(move_a_tensor), "as the index says"),
    "pointer for a shard": (pointer(SHARD), f"{SHARD} is a Git LFS pointer"),
    "pointer for the index": (pointer("model.safetensors.index.json"), "index.json is a Git LFS pointer"),
    "pointer for the tokenizer": (pointer("tokenizer.json"), "tokenizer.json is a Git LFS pointer"),
    "pointer for the config": (pointer("config.json"), "config.json is a Git LFS pointer"),
    "empty shard": (lambda folder: (folder / SHARD).write_bytes(b""), "cut short"),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer: it lacks"),
    "one tensor twice": (
        lambda folder: (folder / SHARD).write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes()),
        "both",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_no_model_gets_one_sentence(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m", random_gemma(), shards=3)
    spoil, message = SPOILT[name]
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_unexpected_weights_are_named(tmp_path):
    folder = write_family(tmp_path / "m", "llama")
    path = str(folder / "model.safetensors")
    mx.save_safetensors(path, {**mx.load(path), "model.layers.0.extra.weight": mx.zeros(3)})
    with pytest.raises(UserError, match=r"model\.layers\.0\.extra\.weight.*files are complete"):
        load(folder)


@pytest.mark.parametrize(
    "text, content",
    [
        ('{"eos_token_id": [1, 5,],}', {"eos_token_id": [1, 5]}),
        ('\ufeff{"a": 1}', {"a": 1}),
        ('{"a": "x, ]", "b": "\\",}", }', {"a": "x, ]", "b": '",}'}),
    ],
)
def test_json_of_published_checkpoints(tmp_path, text, content):
    (tmp_path / "f.json").write_text(text)
    assert read_checkpoint_json(tmp_path / "f.json") == content


@pytest.mark.parametrize(
    "eos, ends",
    [(5, (1, 5)), ([1, 7], (1, 7)), ("<end_of_turn>", (1, 5)), (["<end_of_turn>", 9], (1, 5, 9)), ([], (1,))],
)
def test_end_tokens_are_the_checkpoints(tmp_path, eos, ends):
    folder = write_checkpoint(tmp_path / "m", random_gemma())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert load(folder).end_tokens == ends


@pytest.mark.parametrize("eos", [[[1]], {"a": 1}, "no such token", -1, 1.5, True])
def test_end_tokens_that_are_none(tmp_path, eos):
    folder = write_checkpoint(tmp_path / "m", random_gemma())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match="eos_token_id must be a token id"):
        load(folder)


def test_a_token_that_is_only_in_the_vocabulary_ends_nothing(tmp_path):
    folder = write_family(tmp_path / "m", "llama")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {"id": 1448, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load(folder).end_tokens == (1, 5)  # what the chat template closes an answer with is 5
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert load(folder).end_tokens == (1,)


def test_the_width_of_a_quantised_gpt2(tmp_path):
    import mlx.nn as nn

    folder = write_family(tmp_path / "m", "gpt2")
    model = load(folder).model
    nn.quantize(model, group_size=32, bits=4)
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, model, {**config, "quantization": {"group_size": 32, "bits": 4}})
    assert load(folder, keep_precision=True).hidden_size == 64
