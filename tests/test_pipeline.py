"""The scripts as a user runs them, on the organism, against the planted truth."""

import html
import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import analyze_collected_activations as analyze
from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.analysis import load_run
from alignment_artifacts.pairs import load_pairs
from model_organism.train import PLANTED_LAYERS

from .conftest import ROOT

SCRIPTS = ["collect_activations.sh", "create_gemma_runner_input.py", "run_model.py", "analyze_collected_activations.py",
           "alignment_artifact_prompt_pairs.json"]  # fmt: skip
PACKAGES = ["gemma_refactored", "alignment_artifacts", "model_organism"]


def shell(command, folder, **environment):
    return subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of the repository in which both commands have been run."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for command in ("bash collect_activations.sh", f"{sys.executable} analyze_collected_activations.py"):
        done = shell(command, folder, PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        (folder / f"{command.split()[-1]}.log").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def result(workplace):
    return json.loads((workplace / "alignment_artifact_analysis_results.json").read_text())


def test_everything_is_written(workplace):
    collected = workplace / "collected_activations_output"
    assert len(list(collected.glob("*_*/prompt_list/batch_1/activations_step_prefill.npz"))) == 100
    assert len(json.loads((collected / "manifest.json").read_text())["complete"]) == 100
    for name in (
        "alignment_artifact_analysis_plot.png",
        "results/data/alignment_artifacts_by_category.json",
        "results/data/layer_analysis.json",
        "results/data/projections.json",
        "results/figures/projections.pdf",
        "results/figures/alignment_artifacts_by_category.png",
        "results/figures/layer_analysis.png",
        "inference_output/results.json",
    ):
        assert (workplace / name).stat().st_size > 1000, name


def test_output_fits_80_columns_and_names_the_model_first(workplace):
    for log in workplace.glob("*.log"):
        lines = [line for line in log.read_text().splitlines() if "Wrote" not in line]
        assert lines[0].startswith("Model: model_organism/aligned")
        assert [line for line in lines if len(line) > 80] == []


def test_the_planted_layers_are_found(result):
    assert set(result["top_layers_by_cohens_d"]) & set(PLANTED_LAYERS)
    for layer in PLANTED_LAYERS:
        assert result["layer_scores_prompt_end"][str(layer)]["p_value"] <= 0.01
    best_planted = max(result["layer_scores_prompt_end"][str(i)]["cohens_d"] for i in PLANTED_LAYERS)
    assert best_planted > result["lexical_baseline"]["cohens_d"]
    assert result["excluded"] == [] and result["collection"]["model"] == "model_organism/aligned"


def test_the_direction_points_along_the_planted_one(workplace):
    pairs = load_pairs(ROOT / "alignment_artifact_prompt_pairs.json")
    data = load_activation_set(workplace / "collected_activations_output", pairs)
    truth = mx.load(str(ROOT / "model_organism" / "planted_directions.safetensors"))
    vectors = data.prompt_vectors("prompt_end")
    directions = (vectors[:, 1] - vectors[:, 0]).mean(axis=0)
    cosines = {}
    for layer in PLANTED_LAYERS:
        b = np.array(truth[f"model.layers.{layer}.mlp.output"])
        cosines[layer] = b @ directions[layer] / np.linalg.norm(b) / np.linalg.norm(directions[layer])
    assert max(cosines.values()) >= 0.95, cosines


def test_analysis_is_reproducible(workplace, result):
    done = shell(f"{sys.executable} analyze_collected_activations.py", workplace)
    assert done.returncode == 0
    assert json.loads((workplace / "alignment_artifact_analysis_results.json").read_text()) == result


def test_a_notebook_gets_the_same_numbers(workplace, result):
    run = load_run(workplace / "collected_activations_output", workplace / "alignment_artifact_prompt_pairs.json")
    assert run.results["layer_scores"] == result["layer_scores"] and run.results["summary"] == result["summary"]


def test_the_report_is_written_last(workplace, result):
    done = shell(f"{sys.executable} -m alignment_artifacts.report", workplace)
    assert done.returncode == 0 and done.stdout.startswith("Report: file:///")
    page = (workplace / "results/report.html").read_text()
    assert f'<p class="answer">{html.escape(result["summary"])}</p>' in page
    assert "<code>python sweep_suppression.py</code> makes it" in page
    assert "--from-manifest manifest.json" in page


def test_a_second_collection_repeats_nothing(workplace):
    done = shell("bash collect_activations.sh", workplace, PYTHON=sys.executable)
    assert "100 of 100 prompts are complete already" in done.stdout


def test_constants_come_from_the_environment(workplace, tmp_path):
    places = {"ACTIVATIONS_DIR": str(tmp_path / "a"), "OUTPUT_DIR": str(tmp_path / "o"), "PYTHON": sys.executable}
    done = shell(
        "bash collect_activations.sh -q", workplace, MAX_TOKENS="2", MODEL_NAME="model_organism/base", **places
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["model"] == "model_organism/base" and manifest["max_tokens"] == 2


def test_nothing_installed_says_what_to_run(workplace):
    done = shell("bash collect_activations.sh", workplace, PYTHON="false")
    assert done.returncode == 2 and "Run `make`" in done.stderr


def test_the_analysis_says_what_is_wrong(workplace, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        analyze, "ORIGINAL_PAIRS_JSON_FOR_ITERATION", str(ROOT / "alignment_artifact_prompt_pairs.json")
    )
    assert analyze.main() == 2
    assert "collect_activations.sh" in capsys.readouterr().err
    monkeypatch.setattr(analyze, "RAW_ACTIVATIONS_BASE_DIR", str(workplace / "collected_activations_output"))
    monkeypatch.setattr(analyze, "NUM_LAYERS", 26)
    assert analyze.main() == 2
    assert "NUM_LAYERS is 26" in capsys.readouterr().err


def test_too_many_missing_pairs_stop_the_analysis(workplace, monkeypatch, tmp_path, capsys):
    copy = tmp_path / "acts"
    shutil.copytree(workplace / "collected_activations_output", copy)
    for i in range(1, 4):
        shutil.rmtree(copy / f"natural_technical_dangerous_tech_{i}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        analyze, "ORIGINAL_PAIRS_JSON_FOR_ITERATION", str(ROOT / "alignment_artifact_prompt_pairs.json")
    )
    monkeypatch.setattr(analyze, "RAW_ACTIVATIONS_BASE_DIR", str(copy))
    monkeypatch.setattr(analyze, "NUM_PERMUTATIONS", 50)
    monkeypatch.setattr(analyze, "NUM_BOOTSTRAP_RESAMPLES", 50)
    assert analyze.main() == 2
    assert "3 of 50 pairs cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(analyze, "MAX_EXCLUDED", 0.1)
    assert analyze.main() == 0
    assert len(json.loads((tmp_path / "alignment_artifact_analysis_results.json").read_text())["excluded"]) == 3


def test_importing_the_library_stays_light():
    code = (
        "import sys, alignment_artifacts; print({'matplotlib', 'plotly', 'transformers', 'sklearn'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"
