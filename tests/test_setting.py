"""Settings put into a model: who chooses the mode, what is refused, what the proof says."""

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import _get_classes

from alignment_artifacts.behaviour.answers import write_answer
from alignment_artifacts.directions.estimate import estimate
from alignment_artifacts.edits.modes import MODES, ModeOptions
from alignment_artifacts.edits.options import PROMPT_END, Setting
from alignment_artifacts.edits.proof import Sequences, prove
from alignment_artifacts.edits.setting import NOTHING, auto_mode, intervene
from gemma_refactored.activation_capture import capture, edit
from gemma_refactored.errors import UserError
from gemma_refactored.generation import Sampling
from gemma_refactored.model_architecture import Gemma, GemmaConfig
from gemma_refactored.model_loading import count_parameters, load

from .conftest import relative_error
from .tiny_checkpoints import random_gemma, write_checkpoint

TOKENS = [[2, 9, 300, 44, 1200, 7], [2, 8, 8, 1]]
ANSWERS = [[5, 5, 6], [9, 77]]
GEMMA_1B = dict(model_type="gemma3_text", hidden_size=1152, num_hidden_layers=26, intermediate_size=6912,
                num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144)  # fmt: skip
GEMMA_4B = dict(model_type="gemma3_text", hidden_size=2560, num_hidden_layers=34, intermediate_size=10240,
                num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208)  # fmt: skip
GEMMA_27B = dict(model_type="gemma3_text", hidden_size=5376, num_hidden_layers=62, intermediate_size=21504,
                 num_attention_heads=32, num_key_value_heads=16, head_dim=128, vocab_size=262208)  # fmt: skip
LLAMA_70B = dict(model_type="llama", hidden_size=8192, num_hidden_layers=80, intermediate_size=28672,
                 num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=128256, rms_norm_eps=1e-5,
                 tie_word_embeddings=False)  # fmt: skip


@pytest.fixture
def loaded(tmp_path):
    return load(write_checkpoint(tmp_path / "m", random_gemma()))


def directions(loaded, site="mlp"):
    vectors = np.random.default_rng(0).standard_normal((10, 2, 3, 64)).astype(np.float32)
    vectors[:, 1] += 1
    found = estimate(vectors, {**loaded.facts(), "site": site, "positions": "prompt_end"})
    found.natural_tokens = np.zeros((3, 4), np.float32)
    return found


@pytest.mark.parametrize(
    "config, parameters, mode",
    [(GEMMA_1B, 1e9, "proximity"), (GEMMA_4B, 3.9e9, "adaptive"), (GEMMA_27B, 27e9, "sphere"),
     (LLAMA_70B, 70e9, "subspace")],
)  # fmt: skip
def test_auto_goes_by_the_counted_size(config, parameters, mode):
    is_gemma = config["model_type"] == "gemma3_text"
    model_class, config_class = (Gemma, GemmaConfig) if is_gemma else _get_classes(config)
    counted = count_parameters(model_class(config_class.from_dict(config)))  # lazy: no weight is ever made
    assert counted == pytest.approx(parameters, rel=0.05)
    assert auto_mode(counted) == mode


@pytest.mark.parametrize("site", ["mlp", "residual"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_acts_and_is_undone(loaded, mode, site):
    tokens = mx.array(TOKENS[:1])
    plain = loaded.model(tokens)
    # Thresholds that a random model's activations reach.
    options = ModeOptions(proximity_threshold=-0.1, distance_threshold=1e3, decay_rate=0.01)
    setting = Setting(mode, 1.0, (0, 2), site, options=options)
    edits = intervene(loaded, directions(loaded, site), setting).edits
    with edit(loaded.model, edits):
        assert relative_error(loaded.model(tokens), plain) > 1e-4
    assert np.array_equal(loaded.model(tokens), plain)
    with pytest.raises(RuntimeError), edit(loaded.model, edits):
        raise RuntimeError
    assert np.array_equal(loaded.model(tokens), plain)
    with edit(loaded.model, intervene(loaded, directions(loaded, site), replace(setting, scale=0.0)).edits):
        assert np.array_equal(loaded.model(tokens), plain)


@pytest.mark.parametrize("where", ["everywhere", PROMPT_END])
def test_generating_and_one_pass_see_the_same_edits(loaded, where):
    intervention = intervene(loaded, directions(loaded), Setting("add", 2.0, (0, 1), where=where))
    site, blocks = "model.layers.1.output", {}
    for step in intervention.generate(loaded, [TOKENS[0], TOKENS[1]], 5, sites=[site]):
        blocks[step.index] = (np.array(step.activations[site]), step.tokens)
    for row, prompt in enumerate(TOKENS):
        answer = [int(blocks[i][1][row]) for i in range(5)]
        with (
            edit(loaded.model, intervention.in_one_pass(loaded, [prompt + answer], [len(prompt)])),
            capture(loaded.model, [site]) as seen,
        ):
            loaded.model(mx.array([prompt + answer]))
        whole = np.array(seen[site][0])
        for index, (states, _) in blocks.items():
            assert relative_error(states[row, 0], whole[len(prompt) + index]) < 1e-4, (row, index)


def test_at_the_prompt_end_means_there_only(loaded):
    everywhere, there = (
        prove(
            loaded,
            intervene(loaded, directions(loaded), Setting("add", 1.0, (1,), where=where)),
            Sequences(TOKENS, ANSWERS),
        )
        for where in ("everywhere", PROMPT_END)
    )
    assert (everywhere.tokens, everywhere.touched) == (15, 15) and (there.tokens, there.touched) == (15, 2)
    assert there.dose[1] < everywhere.dose[1]


def test_a_row_is_edited_the_same_alone_and_in_a_batch(loaded):
    edits = intervene(loaded, directions(loaded), Setting("adaptive", 2.0, (0, 1, 2))).edits
    rows = mx.array([TOKENS[0], TOKENS[0][::-1]])
    with edit(loaded.model, edits):
        together = loaded.model(rows)
        alone = loaded.model(rows[1:])
    assert relative_error(together[1:], alone) < 1e-5


@pytest.mark.parametrize("site", ["mlp", "residual"])
def test_the_proof_measures_what_happened(loaded, site):
    found = directions(loaded, site)
    proof = prove(loaded, intervene(loaded, found, Setting("always", 1.0, (1,), site)), Sequences(TOKENS, ANSWERS))
    assert re.search(r"moved by \d[\d.e-]*% after layer 1$", proof.describe())
    assert (proof.tokens, proof.touched) == (15, 15)
    assert proof.change == pytest.approx(np.linalg.norm(found.direction[1]), rel=1e-3)
    assert list(proof.dose) == [1] and proof.dose[1] > 0
    if site == "residual":  # here the dose can be worked out by hand
        with capture(loaded.model, ["model.layers.1.output"]) as seen:
            sizes = []
            for prompt, answer in zip(TOKENS, ANSWERS, strict=True):
                loaded.model(mx.array([prompt + answer]))
                sizes += np.linalg.norm(np.array(seen["model.layers.1.output"][0]), axis=-1).tolist()
        assert proof.dose[1] == pytest.approx(np.mean(np.linalg.norm(found.direction[1]) / sizes), rel=1e-3)
    idle = prove(loaded, intervene(loaded, found, Setting("always", 0.0, (1,), site)), Sequences(TOKENS, ANSWERS))
    assert (idle.touched, idle.change, idle.dose[1]) == (0, 0.0, 0.0)


def test_the_dose_includes_what_earlier_layers_did(loaded):
    found = directions(loaded)
    alone = prove(loaded, intervene(loaded, found, Setting("always", 1.0, (2,))), Sequences(TOKENS, ANSWERS)).dose
    both = prove(loaded, intervene(loaded, found, Setting("always", 1.0, (0, 2))), Sequences(TOKENS, ANSWERS)).dose
    assert list(both) == [0, 2] and both[2] > alone[2] * 1.05


@pytest.mark.parametrize(
    "setting, message",
    [
        (Setting("auto", 1.0, (0,)), "must be one of"),
        (Setting("always", 1.0, (3,)), "no layer 3"),
        (Setting("always", 1.0, (-1,)), "no layer -1"),
        (Setting("always", 1.0, (0,), site="residual"), "site mlp"),
        (Setting("always", 1.0, (0,), where="nowhere"), "everywhere or prompt_end"),
    ],
)
def test_bad_settings_are_refused(loaded, setting, message):
    with pytest.raises(UserError, match=message):
        intervene(loaded, directions(loaded), setting)


@pytest.mark.parametrize("mode", ["cap", "sphere", "subspace"])
def test_an_imported_vector_has_no_statistics(loaded, mode):
    found = directions(loaded)
    found.natural_mean = found.artifact_mean = found.components = found.spread = found.natural_tokens = None
    with pytest.raises(UserError, match="needs statistics"):
        intervene(loaded, found, Setting(mode, 1.0, (0,)))
    intervene(loaded, found, Setting("ablate", 1.0, (0,)))


def test_a_record_gives_the_setting_back():
    setting = Setting("cap", 1.5, (2, 4), "residual", "all", where=PROMPT_END)
    record = setting.record()
    assert Setting.from_record(record) == setting and record["description"] == setting.describe()
    del record["description"]  # a record of an earlier version
    assert Setting.from_record(record) == setting


def test_answers_stream_piece_by_piece(loaded):
    pieces = []
    tokens = write_answer(loaded, TOKENS[0], NOTHING, 12, Sampling(seed=1, temperature=1.0), on_text=pieces.append)
    assert len(tokens) == 12 and len(pieces) > 3
    assert loaded.tokenizer.decode(tokens, skip_special_tokens=True).startswith("".join(pieces))


def test_one_direction_can_serve_all_layers(loaded):
    own = directions(loaded, "residual")
    x = mx.random.normal((1, 3, 64), key=mx.random.key(0))
    for mode in ("ablate", "subspace", "always"):
        setting = Setting(mode, 1.0, (0, 2), "residual", direction_layer=1)
        shared = replace(own, direction=own.direction[[1, 1, 1]], components=own.components[[1, 1, 1]])
        expected = intervene(loaded, shared, replace(setting, direction_layer=None)).edits
        for site, function in intervene(loaded, own, setting).edits.items():
            np.testing.assert_array_equal(function(x), expected[site](x))
        assert "direction of layer 1 from prompt_end" in setting.describe()
    with pytest.raises(UserError, match="The mode cap compares each layer with its own direction"):
        intervene(loaded, own, Setting("cap", 1.0, (0, 2), "residual", direction_layer=1))
    with pytest.raises(UserError, match="no direction for layer 7"):
        intervene(loaded, own, Setting("ablate", 1.0, (0,), "residual", direction_layer=7))
