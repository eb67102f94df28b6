"""Loading checkpoints of every layout, and clear words about those that cannot be loaded."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gemma_refactored import model_loading
from gemma_refactored.errors import UserError
from gemma_refactored.model_architecture import Gemma
from gemma_refactored.model_loading import count_parameters, load

from .conftest import relative_error
from .tiny_checkpoints import CONFIG, quantised, random_gemma, write_checkpoint

TOKENS = mx.array([[2, 9, 300, 44, 1200, 7, 7, 81, 5, 99, 100, 101]])  # longer than the window of 8


def same_weights(model, other):
    """To the bit; what computes with them may differ (see cpu_kernels)."""
    ours, theirs = dict(tree_flatten(model.parameters())), dict(tree_flatten(other.parameters()))
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def num_weights(model):
    return sum(value.size for _, value in tree_flatten(model.parameters()))


@pytest.mark.parametrize("shards", [1, 3])
def test_float32_round_trip(tmp_path, shards):
    model = random_gemma()
    loaded = load(write_checkpoint(tmp_path / "m", model, shards=shards))
    assert same_weights(loaded.model, model) and relative_error(loaded.model(TOKENS), model(TOKENS)) < 1e-5
    assert (loaded.num_layers, loaded.hidden_size, loaded.dtype) == (3, 64, "float32")
    assert loaded.num_parameters == num_weights(model)
    assert loaded.end_tokens == (1, 5)  # <eos> and <end_of_turn>
    assert loaded.context_length == 256


def test_a_separate_head(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": False}
    model = random_gemma(config)
    loaded = load(write_checkpoint(tmp_path / "m", model, config))
    assert same_weights(loaded.model, model) and relative_error(loaded.model(TOKENS), model(TOKENS)) < 1e-5
    assert loaded.num_parameters == num_weights(model) == num_weights(random_gemma()) + 1448 * 64
    hidden = model.model(TOKENS)
    assert relative_error(loaded.model(TOKENS), hidden @ model.lm_head.weight.T) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_weights_are_expanded_on_a_linux_cpu_unless_kept(tmp_path, monkeypatch, dtype):
    model = random_gemma()
    model.set_dtype(dtype)
    folder = write_checkpoint(tmp_path / "m", model)
    kept = load(folder, keep_precision=True)
    # A residual stream beyond 65,504 is usual in Gemma 3, and more than float16 holds.
    assert kept.dtype == ("bfloat16" if dtype == mx.bfloat16 else "float32")
    monkeypatch.setattr(model_loading, "runs_on_linux_cpu", lambda: True)
    expanded = load(folder)
    assert expanded.dtype == "float32"
    model.set_dtype(mx.float32)
    assert same_weights(expanded.model, model)


def test_a_residual_stream_beyond_float16_stays_finite(tmp_path):
    model = random_gemma()
    model.model.layers[0].post_feedforward_layernorm.weight = mx.full((64,), 30000.0)
    expected = load(write_checkpoint(tmp_path / "a", model)).model(TOKENS)
    model.set_dtype(mx.float16)
    loaded = load(write_checkpoint(tmp_path / "b", model), keep_precision=True)
    assert relative_error(loaded.model(TOKENS), expected) < 0.1


@pytest.mark.parametrize("bits, mixed", [(4, False), (8, False), (4, True)])
def test_quantised_checkpoints(tmp_path, monkeypatch, bits, mixed):
    model, config = quantised(bits, mixed)
    folder = write_checkpoint(tmp_path / "m", model, config)
    kept = load(folder, keep_precision=True)
    assert kept.model.layers[0].mlp.down_proj.bits == (8 if mixed else bits)
    assert np.array_equal(kept.model(TOKENS), model(TOKENS))
    monkeypatch.setattr(model_loading, "runs_on_linux_cpu", lambda: True)
    expanded = load(folder)
    assert not any(isinstance(m, nn.QuantizedLinear) for m in expanded.model.modules())
    assert relative_error(expanded.model(TOKENS), model(TOKENS)) < 1e-4
    # Packed weights count for what they stand for.
    assert kept.num_parameters == expanded.num_parameters == num_weights(random_gemma())


def test_an_architecture_of_mlx_lm(tmp_path):
    from mlx_lm.models import llama

    config = dict(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4,
        rms_norm_eps=1e-5, vocab_size=1448, tie_word_embeddings=True,
    )  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    loaded = load(write_checkpoint(tmp_path / "m", model, config))
    assert not isinstance(loaded.model, Gemma) and loaded.num_layers == 2
    assert same_weights(loaded.model, model) and relative_error(loaded.model(TOKENS), model(TOKENS)) < 1e-5


def test_the_revision_follows_the_weights(tmp_path):
    first = load(write_checkpoint(tmp_path / "a", random_gemma())).revision
    same = load(write_checkpoint(tmp_path / "b", random_gemma())).revision
    changed = random_gemma()
    changed.model.norm.weight = changed.model.norm.weight + 1
    assert first.startswith("sha256:") and first == same
    assert load(write_checkpoint(tmp_path / "c", changed)).revision != first


def edit_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


CHANGES = {
    "config": lambda f: edit_json(f / "config.json", rms_norm_eps=1e-5),
    "generation_config": lambda f: edit_json(f / "generation_config.json", eos_token_id=[1, 5, 7]),
    "tokenizer": lambda f: edit_json(f / "tokenizer_config.json", bos_token="<eos>"),
    "chat_template": lambda f: edit_json(f / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}!"),
}


@pytest.mark.parametrize("part", CHANGES)
def test_the_identity_names_the_one_part_that_changed(tmp_path, part):
    folder = write_checkpoint(tmp_path / "m", random_gemma())
    before = load(folder).identity()
    assert all(len(value) <= 12 for value in before.values())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))  # another layout of the same content
    assert load(folder).identity() == before
    CHANGES[part](folder)
    after = load(folder).identity()
    assert {name for name in before if before[name] != after[name]} == {part}


@pytest.mark.parametrize("part", CHANGES)
def test_a_collection_is_not_continued_by_another_config_or_template(tmp_path, capsys, part):
    from gemma_refactored.main import main

    folder = write_checkpoint(tmp_path / "m", random_gemma())
    run = ["--model", str(folder), "--prompts", "one river", "--save-activations", "--max-tokens", "2"]
    run += ["--activations-dir", str(tmp_path / "acts"), "--output-dir", str(tmp_path / "out"), "-q"]
    assert main(run) == 0 and main(run) == 0
    CHANGES[part](folder)
    assert main(run) == 2
    assert f"(identity {part}: '" in capsys.readouterr().err


def damage(name):
    """(what to do to a good checkpoint folder, what the error must say)."""

    def cut_short(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])

    def change_config(**changes):
        return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    return {
        "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
        "bad config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        "no model type": (change_config(model_type=None), "does not say its model_type"),
        "unknown architecture": (change_config(model_type="martian"), "'martian'.*cannot be loaded"),
        "wrong shapes": (change_config(hidden_size=32), "cannot be loaded"),
        "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        "weights cut short": (cut_short, "cut short: 5000 of"),
        "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer: it lacks"),
        "code in the checkpoint": (change_config(model_file="evil.py"), "cannot be loaded"),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["no config", "bad config", "no model type", "unknown architecture", "wrong shapes", "no weights",
     "weights cut short", "no tokenizer", "code in the checkpoint"],
)  # fmt: skip
def test_damaged_checkpoints_get_one_clear_sentence(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m", random_gemma())
    spoil, message = damage(name)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "m", random_gemma(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00003.safetensors"):
        load(folder)


def test_missing_folder_and_missing_network(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no model folder"):
        load(tmp_path / "nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached"):
        load("nobody/no-such-model")
    with pytest.raises(UserError, match="not a valid Hugging Face id"):
        load("nobody/..bad..name--")


def test_parameter_count_of_a_plain_module():
    assert count_parameters(nn.Linear(3, 4)) == 16
