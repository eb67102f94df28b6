"""The cache: made once, continued, made anew when anything changes, safe for two at a time."""

import json
import subprocess
import sys

import numpy as np
import pytest

from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.directions import measurements as ms
from alignment_artifacts.pairs import Pair, prompt_groups
from gemma_refactored.errors import UserError
from gemma_refactored.main import main
from gemma_refactored.model_loading import load

from .conftest import ROOT
from .test_architectures import PAIRS
from .tiny_checkpoints import random_gemma, write_checkpoint, write_family


@pytest.fixture
def loaded(tmp_path):
    return load(write_checkpoint(tmp_path / "model", random_gemma()))


@pytest.fixture
def measured(loaded, tmp_path):
    return ms.measure(loaded, PAIRS, tmp_path / "cache")


def test_it_holds_what_collecting_and_analysing_would_give(loaded, measured, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(prompt_groups(PAIRS)))
    arguments = ["--model", loaded.folder, "--prompts-file", tmp_path / "prompts.json", "--max-tokens", "20", "-q"]
    arguments += ["--save-activations", "--process-by-group", "--activations-dir", tmp_path / "acts"]
    assert main([str(a) for a in [*arguments, "--output-dir", tmp_path / "out"]]) == 0
    data = load_activation_set(tmp_path / "acts", PAIRS)
    for positions in ("prompt_end", "generated", "all"):
        expected = data.prompt_vectors(positions)
        np.testing.assert_allclose(measured.vectors["mlp", positions], expected, rtol=1e-4, atol=1e-4)
    assert measured.vectors["residual", "all"].shape == (len(PAIRS), 2, 3, 64)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    answers = [record["token_ids"] for record in results]
    assert [two[0] for two in measured.answers] + [two[1] for two in measured.answers] == answers
    assert {f.name for f in measured.folder.iterdir()} == {
        "model_config.json", "prompt_vectors.safetensors", "answers.json", "analysis_results.json"
    }  # fmt: skip


def test_the_second_time_nothing_is_collected(loaded, measured, tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("collected again")

    monkeypatch.setattr(ms, "_collect", forbidden)
    again = ms.measure(loaded, PAIRS, tmp_path / "cache")
    assert again.folder == measured.folder
    assert all(np.array_equal(again.vectors[key], measured.vectors[key]) for key in measured.vectors)


def test_other_prompts_and_other_weights_have_a_folder_of_their_own(loaded, measured, tmp_path):
    changed = [*PAIRS[:-1], Pair("5", "topics", "Tell me about two tunes.", PAIRS[-1].artifact)]
    assert ms.measure(loaded, changed, tmp_path / "cache").folder != measured.folder
    other = random_gemma()
    other.model.norm.weight = other.model.norm.weight + 1
    loaded_other = load(write_checkpoint(tmp_path / "b" / "model", other))
    assert ms.measure(loaded_other, PAIRS, tmp_path / "cache").folder != measured.folder


def test_an_interrupted_collection_is_continued(loaded, measured, tmp_path, monkeypatch):
    done, answered = [], ms.answer_prompts

    def stop_before_the_last_batch(job, loaded, batches, *rest):
        answered(job, loaded, batches[:-1], *rest)
        raise KeyboardInterrupt

    def remember(job, *rest):
        done.extend(job.finished)
        return answered(job, *rest)

    monkeypatch.setattr(ms, "BATCH_SIZE", 5)
    monkeypatch.setattr(ms, "answer_prompts", stop_before_the_last_batch)
    with pytest.raises(KeyboardInterrupt):
        ms.measure(loaded, PAIRS, tmp_path / "other")
    monkeypatch.setattr(ms, "answer_prompts", remember)
    again = ms.measure(loaded, PAIRS, tmp_path / "other")
    assert len(done) == 10
    np.testing.assert_allclose(again.vectors["mlp", "all"], measured.vectors["mlp", "all"], rtol=1e-4, atol=1e-4)


def test_two_processes_at_once_share_one_collection(loaded, tmp_path):
    code = f"""
import sys
from pathlib import Path
from alignment_artifacts.directions import measurements as ms
from gemma_refactored.model_loading import load
from tests.test_architectures import PAIRS
collect = ms._collect
def told(*a):
    print("collecting")
    collect(*a)
ms._collect = told
m = ms.measure(load({str(loaded.folder)!r}), PAIRS, Path({str(tmp_path / "cache")!r}))
print(m.vectors["mlp", "all"].sum())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(map(len, outputs)) == [1, 2]  # one collected, both have the numbers
    assert outputs[0][-1] == outputs[1][-1]


def test_a_model_without_mlp_sites_is_measured_on_the_residual_stream(tmp_path):
    mamba = load(write_family(tmp_path / "mamba", "mamba"))
    measured = ms.measure(mamba, PAIRS, tmp_path / "cache")
    assert {site for site, _ in measured.vectors} == {"residual"} == measured.analysis.keys()
    with pytest.raises(UserError, match="one of residual"):
        measured.vectors_at("mlp", "all")


def test_rows_and_layers(measured):
    assert measured.rows(["topics"]).tolist() == list(range(6)) == measured.rows().tolist()
    with pytest.raises(UserError, match="there are topics"):
        measured.rows(["weather"])
    # One layer is far better than the others, by construction.
    vectors = np.random.default_rng(0).standard_normal((6, 2, 3, 64))
    vectors[:, 1, 1] += 3
    measured.vectors["mlp", "all"] = vectors
    assert measured.best_layers("mlp", "all", np.arange(6)) == [1]
    with pytest.raises(UserError, match="at least 4 pairs"):
        measured.best_layers("mlp", "all", np.arange(3))
