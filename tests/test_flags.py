"""Any combination of flags of run_model.py ends in exit code 0, or in 2 with one sentence."""

import json
import shutil
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

import run_model
from gemma_refactored import model_loading

from .conftest import tries
from .test_analysis_script import ends_well, outcome
from .tiny_checkpoints import random_gemma, write_checkpoint

VALUES = {
    "--activation-filter": ["all", "attention", "residual", "self_attn.weights", "self_attn.heads,mlp.output", "norm"],
    "--activation-dtype": ["float16", "float32"],
    "--max-tokens": ["0", "1", "3"],
    "--batch-size": ["1", "2", "100"],
    "--temp": ["0", "0.7"],
    "--top-p": ["0.5", "1"],
    "--repetition-penalty": ["1.3"],
    "--seed": ["3"],
    "--logit-bias": ["5=2"],
    "--date": ["2025-01-31"],
}
WRONG = {
    "--activation-filter": ["nothing", "", " , "], "--activation-dtype": ["int8"], "--max-tokens": ["-1", "x", "1000"],
    "--batch-size": ["0", "1.5"], "--temp": ["nan", "-1"], "--top-p": ["0", "2"], "--repetition-penalty": ["0", "inf"],
    "--seed": ["-3"], "--logit-bias": ["5=-inf", "99999=1", "x"], "--date": ["today"], "--chat-template": ["tool"],
    "--adapter": ["nowhere", "FOLDER/model"],
}  # fmt: skip
SWITCHES = [
    "--process-by-group", "--overwrite", "--compress-activations", "--no-chat-mode", "--ignore-end-tokens", "--dry-run",
    "--list-sites", "--control-tokens", "--keep-precision", "-v", "-q",
]  # fmt: skip
PROMPTS = {"a": {"prompt_list": ["How do I paint a bookshelf?", "Bake a cake."]}, "b": {"prompt_list": ["Hi"]}}
SOURCES = [
    [], ["--prompts", "Bake a cake.", "Hi"], ["--prompts-file", "FOLDER/prompts.json"],
    ["--from-manifest", "FOLDER/collected/manifest.json"],
]  # fmt: skip
WRONG_SOURCES = [
    ["--prompts", " "], ["--prompts-file", "FOLDER/model/config.json"], ["--prompts-file", "nowhere.json"],
    ["--from-manifest", "FOLDER/prompts.json"], ["--prompts", "Hi", "--prompts-file", "FOLDER/prompts.json"],
    ["--prompts", "Hi", "--shard"],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, prompts, and what was collected of them."""
    folder = tmp_path_factory.mktemp("flags")
    model = write_checkpoint(folder / "model", random_gemma())
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    command = ["--model", str(model), "--prompts-file", str(folder / "prompts.json"), "--max-tokens", "2", "-q"]
    folders = ["--activations-dir", str(folder / "collected"), "--output-dir", str(folder / "out")]
    assert run_model.main([*command, *folders, "--save-activations", "--process-by-group"]) == 0
    return folder


@st.composite
def flags(draw) -> list[str]:
    """A few that go, and in every third command one that does not."""
    chosen = list(draw(st.sampled_from(SOURCES)))
    for name in sorted(draw(st.sets(st.sampled_from(sorted(VALUES)), max_size=4))):
        chosen.append(f"{name}={draw(st.sampled_from(VALUES[name]))}")
    wrong = draw(st.sampled_from(["nothing", "nothing", "nothing", "nothing", "option", "source"]))
    if wrong == "option":
        name = draw(st.sampled_from(sorted(WRONG)))
        chosen.append(f"{name}={draw(st.sampled_from(WRONG[name]))}")
    elif wrong == "source":
        chosen = list(draw(st.sampled_from(WRONG_SOURCES)))
    return chosen + sorted(draw(st.sets(st.sampled_from(SWITCHES), max_size=4)))


@tries(30)
@given(options=flags(), saves=st.booleans(), place=st.sampled_from(["new/deep", "collected", "prompts.json", "model"]))
def test_any_flags_end_well(folder, tmp_path_factory, options, saves, place):
    """Saved beside nothing, into a collection, where a file is, and into a folder of something else."""
    scratch = tmp_path_factory.mktemp("scratch")
    target = scratch / place
    if place != "new/deep":
        (shutil.copytree if (folder / place).is_dir() else shutil.copy)(folder / place, target)
    command = ["--model", str(folder / "model"), "--output-dir", str(scratch / "out"), "--max-tokens", "2"]
    options = [option.replace("FOLDER", str(folder)) for option in options]
    if saves:
        options += ["--save-activations", "--activations-dir", str(target)]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_loading, "load", loaded_once)
        code, errors = outcome(lambda: run_model.main([*command, *options]))
    assert ends_well(code, errors), (options, place, code, errors)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


loaded_once = lru_cache(model_loading.load)
