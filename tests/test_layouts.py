"""Every layout that transformers and mlx-lm both know, each key of its config moved: equal logits, or a refusal.

The logits are transformers' own, see make_layout_logits.py.
"""

import copy
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from gemma_refactored.checkpoint_files import read_config
from gemma_refactored.config_audit import NEVER_NUMBERS, audit, compared, complete
from gemma_refactored.cpu_kernels import put_in_place
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import load, load_weights, runs_on_linux_cpu

from .conftest import GOLDEN, ROOT
from .layouts import ENTRIES, POSITIONS, TOKENS, documented, write_layout
from .tiny_checkpoints import FAMILIES, write_checkpoint, write_family

LAYOUTS = json.loads((GOLDEN / "layouts.json").read_text())
TOLERANCE = 1e-4


def checkpoint(folder, model_type, case):
    """The folder of a case: the base's config and shapes, with what the case changes."""
    base = LAYOUTS[model_type]["base"]
    config, shapes = copy.deepcopy(base["config"]), dict(base["shapes"])
    for target, changes in ((config, case["config"]), (shapes, case.get("shapes", {}))):
        for key, value in changes.items():
            target[key] = value
            if value in ("ABSENT", None) and (value == "ABSENT" or target is shapes):
                del target[key]
    return write_layout(folder, config, shapes)


def logits(folder, nudged=0):
    """The chosen logits; `nudged`, with every weight moved at random by three parts in a million."""
    config = read_config(folder)
    completed = complete(config)
    audit(config, completed)
    if runs_on_linux_cpu():
        put_in_place()  # as `load` does
    model, _ = load_weights(folder, config, completed)
    if nudged:
        mx.random.seed(nudged)
        model.update(tree_map(lambda x: x * (1 + 3e-6 * mx.random.normal(x.shape)), model.parameters()))
    return np.array(model(mx.array([TOKENS]))[0][mx.array(POSITIONS)][:, mx.array(ENTRIES)])


def equal(actual, expected):
    return np.abs(actual - expected).max() <= 10 * TOLERANCE * np.abs(expected).max()


def agrees(case):
    return case.get("difference", 1.0) <= TOLERANCE


@pytest.mark.parametrize("model_type", [name for name, record in LAYOUTS.items() if record["base"]])
def test_no_layout_is_silently_wrong(tmp_path, model_type):
    wrong, refused, cases = [], [], LAYOUTS[model_type]["cases"]
    for number, case in enumerate(cases):
        if "logits" not in case:
            continue
        expected = np.array(case["logits"])
        try:
            folder = checkpoint(tmp_path / str(number), model_type, case)
            actual = logits(folder)
        except UserError as error:
            assert "\n" not in str(error)
            if agrees(case) and all(map(agrees, (c for c in cases if c["change"].keys() == case["change"].keys()))):
                refused.append((case["change"], str(error)))
            continue
        # Two experts can be so close that rounding chooses: then one of a few nudges chooses as the golden run did.
        if not equal(actual, expected) and not any(equal(logits(folder, nudge), expected) for nudge in range(1, 9)):
            wrong.append(case["change"])
    assert not wrong
    assert not refused or compared()[model_type]["agrees"] is False, refused


def test_the_layouts_that_agree_stay():
    agreeing = {name for name, record in compared().items() if record["agrees"]}
    assert len(agreeing) >= 60
    names = (
        "llama mistral mixtral qwen2 qwen3 qwen3_moe gpt2 gpt_neox olmo3 exaone4 lfm2 apertus gpt_oss phi3 starcoder2"
    )
    assert {*names.split(), "glm", "gemma", "gemma2", "gemma3_text"} <= agreeing


def test_the_documented_table_is_the_one_the_audit_reads():
    assert documented(compared()) in (ROOT / "docs" / "models.md").read_text()


def test_a_head_of_its_own_is_kept_where_the_config_does_not_say(tmp_path):
    config = json.loads((write_family(tmp_path / "a", "llama") / "config.json").read_text())
    expected = load(tmp_path / "a").model(mx.array([TOKENS]))
    del config["tie_word_embeddings"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert np.array_equal(load(tmp_path / "a").model(mx.array([TOKENS])), expected)


def edited(folder, **changes):
    path = write_family(folder, "llama") / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "ABSENT"}))
    return folder


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None, "rope_theta": "ABSENT", "rope_parameters": {**LINEAR, "rope_theta": 5e4}},
        {"rope_theta": 5e4, "rope_parameters": LINEAR},
        {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
)
def test_rope_settings_are_read_wherever_they_stand(tmp_path, changes):
    rope = load(edited(tmp_path, **changes)).model.layers[0].self_attn.rope
    assert (rope.scale, rope.base) == (0.25, 5e4)


def test_dynamic_scaling_runs_in_padded_batches(tmp_path):
    from gemma_refactored.generation import generate

    model = load(edited(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})).model
    assert [step.index for step in generate(model, [[3, 1, 4], [1, 5, 9, 2, 6]], 2)] == [-1, 0, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not one of"),
        ({"hidden_size": "many"}, "Field 'hidden_size' expected int"),
        (
            {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
            "rope_parameters = .*proportional",
        ),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load(edited(tmp_path, **changes))


def test_a_key_nobody_has_heard_of_is_said_in_one_line(tmp_path, caplog):
    load(edited(tmp_path, flux_capacitor=3))
    assert caplog.text.count("flux_capacitor") == 1


def test_gemma_refuses_what_it_does_not_do(tmp_path):
    from .tiny_checkpoints import CONFIG, random_gemma

    folder = write_checkpoint(tmp_path, random_gemma(), {**CONFIG, "use_bidirectional_attention": True})
    with pytest.raises(UserError, match="use_bidirectional_attention = True"):
        load(folder)


def test_the_tests_own_families_are_run(tmp_path):
    for model_type in FAMILIES:
        load(write_family(tmp_path / model_type, model_type))


def test_no_key_of_training_is_said_to_decide_numbers():
    assert not {"hidden_size", "rope_theta", "sliding_window", "hidden_act", "tie_word_embeddings"} & NEVER_NUMBERS
