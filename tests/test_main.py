"""The command line: files it writes, continuing, refusing."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import run_model
from gemma_refactored import main as command_line
from gemma_refactored.files import locked
from gemma_refactored.main import main
from gemma_refactored.npz_files import NpzReader

from .conftest import ROOT
from .tiny_checkpoints import random_gemma, write_checkpoint

PROMPTS = {
    "natural_a": {"prompt_list": ["How do I build a bookshelf?"]},
    "artifact_a": {"prompt_list": ["Hack it.", "A rather longer prompt than the others are, to be padded against."]},
}
STEPS = ["prefill", "0", "1", "2"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), random_gemma())


@pytest.fixture
def run(tmp_path, model_folder):
    """Run the command line with common options; returns its exit code."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))

    def call(*options, group=True, save=True):
        arguments = ["--model", str(model_folder), "--prompts-file", str(prompts), "--max-tokens", "3"]
        arguments += ["--output-dir", str(tmp_path / "out"), "--ignore-end-tokens", "-q"]
        if save:
            arguments += ["--save-activations", "--activations-dir", str(tmp_path / "acts")]
            arguments += ["--process-by-group"] if group else []
        return main([*arguments, *options])

    call.folder = tmp_path
    return call


def read(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, whose times differ."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_grouped_files_have_the_designed_layout(run):
    assert run() == 0
    acts = run.folder / "acts"
    for place in ("natural_a/prompt_list/batch_1", "artifact_a/prompt_list/batch_1", "artifact_a/prompt_list/batch_2"):
        names = {f.name for f in (acts / place).iterdir()}
        assert names == {f"activations_step_{s}.npz" for s in STEPS} | {"prompt.json", "prompt_embedding.npz"}
        arrays = read(acts / place / "activations_step_prefill.npz")
        assert list(arrays) == [f"model.layers.{i}.mlp.output" for i in range(3)]
        assert all(a.shape == (1, 1, 64) and a.dtype == np.float32 for a in arrays.values())
    manifest = json.loads((acts / "manifest.json").read_text())
    assert manifest["num_layers"] == 3 and manifest["layout"] == "grouped" and manifest["prompts"] == 3
    assert manifest["complete"] == ["artifact_a/prompt_list/1", "artifact_a/prompt_list/2", "natural_a/prompt_list/1"]
    results = json.loads((run.folder / "out" / "results.json").read_text())
    assert [r["prompt"] for r in results] == [p for g in PROMPTS.values() for s in g.values() for p in s]
    assert all(len(r["token_ids"]) == 3 and r["finish_reason"] == "length" for r in results)
    assert {"prompt_metadata.json", "summary.json"} < {f.name for f in (run.folder / "out").iterdir()}


@pytest.mark.parametrize("batch_size", ["1", "2", "100"])
def test_batch_size_changes_no_number(run, tmp_path, batch_size):
    run("--batch-size", "1")
    other = tmp_path / "other"
    run("--batch-size", batch_size, "--activations-dir", str(other))
    mine, theirs = tree(run.folder / "acts"), tree(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        if name.endswith(".npz"):
            a, b = read(run.folder / "acts" / name), read(other / name)
            assert all(np.abs(a[k] - b[k]).max() <= 1e-4 * np.abs(a[k]).max() for k in a)
        else:
            assert mine[name] == theirs[name]


def test_flat_layout_holds_the_same_numbers(run, tmp_path):
    run()
    assert run("--activations-dir", str(tmp_path / "flat"), "--batch-size", "2", group=False) == 0
    seen = 0
    for marker in (tmp_path / "flat").glob("batch_*/batch.json"):
        for i, row in enumerate(json.loads(marker.read_text())["rows"]):
            own = run.folder / "acts" / row["group"] / row["subcategory"] / f"batch_{row['number']}"
            assert row["valid_steps"] == 3
            for step in STEPS:
                flat, grouped = (read(d / f"activations_step_{step}.npz") for d in (marker.parent, own))
                for site in grouped:
                    assert flat[site].shape[1:] == (1, 64)
                    np.testing.assert_allclose(flat[site][i], grouped[site][0], rtol=1e-4, atol=1e-5)
                seen += 1
    assert seen == 3 * len(STEPS)


@pytest.mark.parametrize("batch_size", ["1", "7"])
def test_an_interrupted_run_continues_where_it_stopped(run, batch_size):
    run("--batch-size", batch_size)
    acts = run.folder / "acts"
    whole = tree(acts)
    # As if it had been killed before the last prompt was complete.
    unfinished = acts / "artifact_a" / "prompt_list" / "batch_2"
    (unfinished / "prompt.json").unlink()
    (unfinished / "activations_step_2.npz").unlink()
    (unfinished / ".activations_step_2.npz.0123.tmp").write_bytes(b"half")
    untouched = {f: f.stat().st_mtime_ns for f in (acts / "natural_a").rglob("*.npz")}
    results = (run.folder / "out" / "results.json").read_text()
    assert run("--batch-size", batch_size) == 0
    assert tree(acts) == whole
    assert {f: f.stat().st_mtime_ns for f in untouched} == untouched
    assert (run.folder / "out" / "results.json").read_text() == results


def command(folder: Path, model_folder: Path, *options) -> list[str]:
    arguments = ["--model", model_folder, "--prompts-file", folder / "prompts.json", "--max-tokens", 5, "-q"]
    arguments += ["--output-dir", folder / "out", "--activations-dir", folder / "acts", "--save-activations"]
    return [sys.executable, str(ROOT / "run_model.py"), *map(str, arguments), *options]


@pytest.mark.parametrize("layout", ["grouped", "flat"])
def test_killed_anywhere_a_second_run_makes_what_an_uninterrupted_one_makes(tmp_path, model_folder, layout):
    """SIGKILL, at whatever moment the process has come to when the n-th file appears."""
    options = ["--batch-size", "4", *(["--process-by-group"] if layout == "grouped" else [])]
    groups = {f"g{i}": {"list": [f"Tell me {'more ' * j}about {i}." for j in range(5)]} for i in range(4)}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.json").write_text(json.dumps(groups))
    subprocess.run(command(tmp_path / "whole", model_folder, *options), check=True)
    expected = tree(tmp_path / "whole" / "acts")
    acts = tmp_path / "killed" / "acts"
    for seen_files in (1, len(expected) // 4, len(expected) // 2, len(expected) - 3):
        process = subprocess.Popen(command(tmp_path / "killed", model_folder, *options))
        while process.poll() is None and sum(1 for _ in acts.rglob("*.*")) < seen_files:
            time.sleep(0.001)
        process.kill()
        process.wait()
    markers = {f: f.stat().st_mtime_ns for f in acts.rglob("*.json") if f.name in ("prompt.json", "batch.json")}
    subprocess.run(command(tmp_path / "killed", model_folder, *options), check=True)
    assert tree(acts) == expected
    assert {f: f.stat().st_mtime_ns for f in markers} == markers  # no finished prompt was repeated
    results = [(tmp_path / name / "out" / "results.json").read_bytes() for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_ctrl_c_keeps_what_is_complete_and_says_how_to_continue(tmp_path, model_folder):
    groups = {f"g{i}": {"list": [f"Tell me about {i}.", "And about something else?"]} for i in range(100)}
    (tmp_path / "prompts.json").write_text(json.dumps(groups))
    arguments = command(tmp_path, model_folder, "--process-by-group", "--batch-size", "2", "--max-tokens", "60")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    acts = tmp_path / "acts"
    while not any(acts.rglob("prompt.json")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait() == 130 and "run the same command again to continue" in error and "Traceback" not in error
    assert not list(acts.rglob("*.tmp"))
    complete = len(list(acts.rglob("prompt.json")))
    assert 0 < complete < 200
    for path in acts.rglob("*.npz"):
        read(path)


def test_killed_before_the_first_manifest_was_whole(run):
    (run.folder / "acts").mkdir()
    (run.folder / "acts" / ".manifest.json.0123.tmp").write_text("{")
    assert run() == 0
    assert not list((run.folder / "acts").glob("*.tmp"))


def test_two_runs_on_one_folder_are_refused(run, capsys):
    assert run() == 0
    with locked(run.folder / "acts"):
        assert run() == 2
    assert "Another run is writing into" in capsys.readouterr().err
    assert run() == 0


def test_other_settings_are_refused_with_the_difference_unless_overwritten(run, capsys):
    run()
    before = tree(run.folder / "acts")
    assert run("--seed", "5", "--activation-filter", "self_attn.output") == 2
    error = capsys.readouterr().err
    assert "seed: 0 -> 5" in error and "self_attn" in error and "--overwrite" in error
    assert tree(run.folder / "acts") == before
    assert run("--activation-filter", "self_attn.output", "--overwrite") == 0
    arrays = read(run.folder / "acts/natural_a/prompt_list/batch_1/activations_step_0.npz")
    assert list(arrays)[0] == "model.layers.0.self_attn.output"


def test_a_folder_with_other_things_is_not_touched(run, capsys):
    (run.folder / "acts").mkdir()
    (run.folder / "acts" / "thesis.txt").write_text("precious")
    assert run() == 2 and run("--overwrite") == 2
    assert "not a collection" in capsys.readouterr().err
    assert tree(run.folder / "acts") == {"thesis.txt": b"precious"}


def test_float16_and_compressed_files_hold_the_same_values(run, tmp_path):
    run()
    run("--activation-dtype", "float16", "--compress-activations", "--activations-dir", str(tmp_path / "half"))
    name = "natural_a/prompt_list/batch_1/activations_step_1.npz"
    full, half = read(run.folder / "acts" / name), read(tmp_path / "half" / name)
    for site in full:
        assert half[site].dtype == np.float16
        np.testing.assert_allclose(half[site], full[site], rtol=1e-3, atol=1e-3)


def test_a_model_that_padding_disturbs_runs_in_batches_of_equal_length(run, monkeypatch):
    from gemma_refactored import model_loading, prompt_cache
    from gemma_refactored.model_loading import LoadedModel

    run("--batch-size", "1")
    monkeypatch.setattr(LoadedModel, "is_own", False)
    monkeypatch.setattr(model_loading, "padding_is_harmless", lambda model: False)
    paddings = []
    make = prompt_cache.make_batch_cache
    monkeypatch.setattr(
        prompt_cache,
        "make_batch_cache",
        lambda model, padding, *rest, **options: paddings.append(padding) or make(model, padding, *rest, **options),
    )
    assert run("--activations-dir", str(run.folder / "other")) == 0
    assert paddings and not any(any(padding) for padding in paddings)
    assert tree(run.folder / "other").keys() == tree(run.folder / "acts").keys()


def test_text_only_run_saves_no_activations(run):
    assert run(save=False) == 0
    assert not (run.folder / "acts").exists() and (run.folder / "out" / "results.json").exists()


def test_prompts_on_the_command_line(model_folder, tmp_path, capsys):
    options = ["--model", str(model_folder), "--max-tokens", "2", "--output-dir", str(tmp_path), "-v"]
    assert main([*options, "--prompts", "Hello there", "And you?"]) == 0
    output = capsys.readouterr().out
    assert "> Hello there" in output and "> And you?" in output


def test_list_sites(model_folder, capsys):
    assert main(["--model", str(model_folder), "--list-sites"]) == 0
    assert "model.layers.2.self_attn.weights  [1, 4, 3, 3]" in capsys.readouterr().out


def test_sample_prompts_can_be_read_again(tmp_path, capsys):
    from gemma_refactored.prompt_processing import load_prompts

    for command, count in ((main, 2), (run_model.main, 4)):
        assert command(["--create-sample-prompts", str(tmp_path / "new" / "sample.json")]) == 0
        assert len(load_prompts(tmp_path / "new" / "sample.json")) == count


def test_the_runtime_has_no_model_of_its_own(capsys):
    assert main(["--list-sites"]) == 2
    assert "Name a model" in capsys.readouterr().err
    assert run_model.main(["--list-sites", "-q"]) == 0
    assert "model.layers.7.mlp.output" in capsys.readouterr().out


def test_the_runtime_knows_nothing_of_artifacts():
    for path in (ROOT / "gemma_refactored").glob("*.py"):
        if path.name != "__init__.py":  # which says so
            assert not re.search(r"artifact|lexical|organism|suppression", path.read_text().lower()), path


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--prompts-file"),
        (["--prompts", "a", "--prompts-file", "b"], "Give one of --prompts"),
        (["--prompts", "a", "--process-by-group"], "--save-activations"),
        (["--prompts", "a", "--batch-size", "0"], "--batch-size must be between"),
        (["--prompts", "a", "--top-p", "1.5"], "--top-p must be between"),
        (["--prompts", "a", "--temp", "-1"], "--temp must be between"),
        (["--prompts", "a", "--temp", "nan"], "--temp must be between"),
        (["--prompts", " "], "not empty"),
        (["--prompts-file", "/nowhere.json"], "does not exist"),
        (["--prompts", "a", "--model", "/nowhere"], "no model folder"),
        (["--prompts", "word " * 300], "context of 256"),
        (["--prompts", "a", "--logit-bias", "x=1"], "--logit-bias 'x=1' must look like"),
        (["--prompts", "a", "--batch-size", "x"], "--batch-size must be a whole number between"),
        (["--prompts", "a", "--logit-bias", "99999=1"], "token ids of this model"),
        (["--prompts", "a", "--save-activations", "--activation-filter", "nothing"], "matches no site"),
        (["--save-activations", "--activation-filter", "self_attn.weights"], "add --process-by-group"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(model_folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    if "--model" not in options:
        options = ["--model", str(model_folder), *options]
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_attention_weights_are_collected_and_read_back(run):
    """One array per layer and step; 12 tokens cross the window of 8 in layers 0 and 1."""
    assert run("--activation-filter", "self_attn.weights,mlp.output") == 0
    for place in (run.folder / "acts").glob("*/prompt_list/batch_*"):
        prompt_tokens = json.loads((place / "prompt.json").read_text())["prompt_tokens"]
        for step, name in enumerate(STEPS):
            arrays = NpzReader().read(place / f"activations_step_{name}.npz")
            assert len(arrays) == 6 and arrays["model.layers.2.mlp.output"].shape == (1, 1, 64)
            for layer, most in enumerate((8, 8, 1000)):
                weights = arrays[f"model.layers.{layer}.self_attn.weights"]
                assert weights.shape == (1, 4, 1, min(most, prompt_tokens + step))
                np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    before = tree(run.folder / "acts")
    assert run("--activation-filter", "self_attn.weights,mlp.output", "--overwrite", "--batch-size", "1") == 0
    after = tree(run.folder / "acts")
    assert before.keys() == after.keys() and all(len(before[name]) == len(after[name]) for name in before)
    assert run("--activation-filter", "self_attn.weights,mlp.output", "--dry-run") == 0


def test_single_heads_are_collected_in_both_layouts(run):
    assert run("--activation-filter", "self_attn.heads", group=False) == 0
    arrays = read(run.folder / "acts/batch_1/activations_step_prefill.npz")
    assert {array.shape for array in arrays.values()} == {(3, 1, 4, 16)}
    assert run("--activation-filter", "self_attn.heads", "--overwrite") == 0
    path = run.folder / "acts/natural_a/prompt_list/batch_1/activations_step_prefill.npz"
    assert {array.shape for array in read(path).values()} == {(1, 1, 4, 16)}


def test_without_prompts_the_sample_prompts_are_collected(model_folder, tmp_path):
    command = [
        sys.executable,
        ROOT / "run_model.py",
        "--model",
        model_folder,
        "--save-activations",
        "--max-tokens",
        "1",
    ]
    folders = ["--activations-dir", tmp_path / "acts", "--output-dir", tmp_path / "out"]
    done = subprocess.run([*command, *folders, "--activation-filter", "mlp.output"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "taking the 4 sample prompts" in done.stdout and "Sites: 3 like model.layers.0.mlp.output." in done.stdout
    manifest = json.loads((tmp_path / "acts/manifest.json").read_text())
    assert manifest["prompt_groups"] == run_model.DEFAULTS.sample_prompts and len(manifest["complete"]) == 4


def test_ctrl_c_says_how_to_continue(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "run", interrupt)
    assert main(["--prompts", "a"]) == 130
    assert "run the same command again" in capsys.readouterr().err
