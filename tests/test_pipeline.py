"""The scripts as a user runs them, on the organism, against the planted truth."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import analyze_collected_activations as analyze
from alignment_artifacts import places
from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.analysis import load_run
from alignment_artifacts.pairs import load_pairs, pairs_hash
from gemma_refactored.files import write_json
from model_organism.train import PLANTED_LAYERS

from .conftest import ROOT
from .test_analysis_script import few_pairs
from .tiny_checkpoints import write_qwen

SCRIPTS = ["collect_activations.sh", "create_gemma_runner_input.py", "run_model.py", "analyze_collected_activations.py",
           "suppress.py", "sweep_suppression.py", "compare_models.py", "Makefile",
           "alignment_artifact_prompt_pairs.json"]  # fmt: skip
PACKAGES = ["gemma_refactored", "alignment_artifacts", "model_organism", "toxicity_steering", "examples"]
RESULTS = "results/aligned/alignment_artifact_prompt_pairs"


def shell(command, folder, **environment):
    """Run a command with none of the variables set that the scripts read, except for these."""
    ours = (
        "MODEL_NAME", "ADAPTER", "ACTIVATIONS_DIR", "ALIGNMENT_ARTIFACTS_CACHE", "MODEL_A", "MODEL_B", "TWINS", "PAIRS",
        "SITE", "SCORE", "WISH",
    )  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, env={**inherited, **environment}
    )


def copy_checkout(folder):
    """Scripts and packages, as a clone of the repository has them."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of the repository in which both commands have been run."""
    folder = tmp_path_factory.mktemp("workplace")
    copy_checkout(folder)
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
        "alignment_artifact_analysis_plot.pdf",
        f"{RESULTS}/figures/alignment_artifact_analysis_plot.png",
        f"{RESULTS}/data/alignment_artifacts_by_category.json",
        f"{RESULTS}/data/layer_analysis.json",
        f"{RESULTS}/data/projections.json",
        f"{RESULTS}/figures/projections.pdf",
        f"{RESULTS}/figures/alignment_artifacts_by_category.png",
        f"{RESULTS}/figures/layer_analysis.png",
        "inference_output/results.json",
    ):
        assert (workplace / name).stat().st_size > 1000, name


def test_every_result_file_says_what_it_belongs_to(workplace, result):
    pairs = load_pairs(ROOT / "alignment_artifact_prompt_pairs.json")
    origin = {
        "model": "model_organism/aligned",
        "model_revision": result["collection"]["model_revision"],
        "pairs_file": "alignment_artifact_prompt_pairs.json",
        "pairs_hash": pairs_hash(pairs),
        "behaviour": "refusal",
        "sides": ["natural", "artifact"],
        "site": "mlp",
    }
    about = json.loads((workplace / RESULTS / "about.json").read_text())
    assert about == {**origin, "site": None}  # what is about other sites, or several, may lie there as well
    files = list((workplace / RESULTS / "data").glob("*.json"))
    assert len(files) == 4 and all(json.loads(file.read_text())["origin"] == origin for file in files)
    assert json.loads((workplace / RESULTS / "data/alignment_artifact_analysis_results.json").read_text()) == result
    assert not list(workplace.rglob("*.tmp"))


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
    page = (workplace / RESULTS / "report.html").read_text()
    assert f'<p class="answer">{html.escape(result["summary"])}</p>' in page
    assert "Run <code>python sweep_suppression.py</code>" in page
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
    monkeypatch.setattr(places, "HOME", tmp_path)
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
    for name, path in (("RESULTS_JSON", Path("a.json")), ("PLOT_PNG", "plots/b.png"), ("RESULTS_DIR", "r")):
        monkeypatch.setattr(analyze, name, path)
    monkeypatch.setattr(places, "HOME", tmp_path)
    monkeypatch.setattr(analyze, "RAW_ACTIVATIONS_BASE_DIR", copy)
    monkeypatch.setattr(analyze, "NUM_PERMUTATIONS", 50)
    monkeypatch.setattr(analyze, "NUM_BOOTSTRAP_RESAMPLES", 50)
    assert analyze.main() == 2
    assert "3 of 50 pairs cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(analyze, "MAX_EXCLUDED", 0.1)
    assert analyze.main() == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["excluded"]) == 3
    assert (tmp_path / "plots/b.pdf").exists() and (tmp_path / RESULTS.replace("results", "r", 1) / "data").is_dir()


def test_another_model_is_collected_and_analysed_by_the_two_commands_alone(workplace, tmp_path_factory):
    """From another folder, with a space and a slash in the model's name; nothing of the first model changes."""
    elsewhere = tmp_path_factory.mktemp("some where")
    shutil.copytree(ROOT / "model_organism/base", elsewhere / "my model~")
    before = {path: path.read_bytes() for path in (workplace / RESULTS).rglob("*") if path.is_file()}
    script = workplace / "collect_activations.sh"
    original = script.read_text()
    script.write_text(original.replace("model_organism/aligned}", f"{elsewhere}/my model~/}}"))
    try:
        done = shell(f"bash {script}", elsewhere, PYTHON=sys.executable, MAX_TOKENS="3")
        assert done.returncode == 0 and "collected_activations_my_model" in done.stdout, done.stderr
        printed = shell("make -n -o setup check", workplace).stdout
    finally:
        script.write_text(original)
    assert '--model "$MODEL_NAME"' in printed
    done = shell(f"{sys.executable} {workplace}/analyze_collected_activations.py", elsewhere)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "my model~ (8 layers" in done.stdout.splitlines()[0]
    assert f"Collection: {workplace}/collected_activations_my_model Also collected" in text
    assert f"choose): {workplace}/collected_activations_output (model_organism/aligned)" in text
    assert f"{workplace}/results/my_model/alignment_artifact_prompt_pairs" in text
    last = json.loads((workplace / "alignment_artifact_analysis_results.json").read_text())
    assert last["collection"]["model"].endswith("my model~") and last["results"].startswith("results/my_model/")
    assert {path: path.read_bytes() for path in before} == before

    done = shell(f"{sys.executable} {workplace}/analyze_collected_activations.py", elsewhere, MODEL_NAME="no/such")
    assert done.returncode == 2 and "There is no collection of no/such" in done.stderr
    environment = {"MODEL_NAME": "model_organism/aligned"}  # chooses among what was collected
    done = shell(f"{sys.executable} {workplace}/analyze_collected_activations.py", elsewhere, **environment)
    assert done.returncode == 0 and done.stdout.startswith("Model: model_organism/aligned")


def test_a_model_of_another_family_goes_the_whole_way(tmp_path):
    """Qwen's layout and ChatML, a name with dots and a slash at its end; another checkpoint of it to compare with."""
    copy_checkout(tmp_path)
    write_json(tmp_path / "few.json", few_pairs())
    model, base = write_qwen(tmp_path / "Qwen2.5-0.5B-Instruct"), write_qwen(tmp_path / "Qwen2.5-0.5B", seed=1)
    variables = {
        "MODEL_NAME": f"{model}/", "MODEL_A": str(base), "MODEL_B": f"{model}/", "PAIRS": "few.json",
        "MAX_TOKENS": "3", "NUM_PERMUTATIONS": "10", "NUM_BOOTSTRAP_RESAMPLES": "10", "PYTHON": sys.executable,
    }  # fmt: skip
    python = sys.executable
    for command, line in (
        ("bash collect_activations.sh", "Activations of 3 sites: collected_activations_Qwen2.5-0.5B-Instruct_few"),
        (f"{python} analyze_collected_activations.py", "Qwen2.5-0.5B-Instruct (3 layers, hidden 64), 20 pairs"),
        (f"{python} run_model.py --check --model {model}", "batch = single"),
        (f"{python} suppress.py --all-pairs --model {model} --max-tokens 5", "there is no refusal behaviour here"),
        (f'{python} suppress.py "<|im_end|> Hi" --model {model} --layers 1 --max-tokens 5', "are read as text"),
        (f"{python} suppress.py --explain --model {model}", "layer 2"),
        (f"{python} compare_models.py", "Qwen2.5-0.5B-Instruct"),
        (f"{python} -m alignment_artifacts.report", "results/Qwen2.5-0.5B-Instruct/few/report.html"),
    ):
        done = shell(command, tmp_path, **variables)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert line in " ".join((done.stdout + done.stderr).split()), f"{command}\n{done.stdout}\n{done.stderr}"


def test_a_folder_of_another_model_is_refused_in_a_sentence_with_short_hashes(workplace):
    done = shell(
        "bash collect_activations.sh",
        workplace,
        PYTHON=sys.executable,
        MODEL_NAME="model_organism/base",
        ACTIVATIONS_DIR="collected_activations_output",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "holds activations of model_organism/aligned (sha256:" in done.stderr and "--overwrite" in done.stderr
    assert not re.search("[0-9a-f]{13}", done.stderr)


def test_a_certificate_lies_with_the_model_it_is_about(workplace):
    done = shell(f"{sys.executable} run_model.py --check --model model_organism/base", workplace)
    assert done.returncode == 0, done.stdout
    assert (workplace / "collected_activations_base/certificate.json").exists()
    assert not (workplace / "collected_activations_output/certificate.json").exists()


@pytest.mark.parametrize(
    "variables, command, message",
    [
        ({}, "create_gemma_runner_input.py", "Wrote 100 prompts to {home}/prompts_for_gemma_runner.json"),
        ({}, "run_model.py --prompts Hello --max-tokens 1", "Answers: {home}/inference_output/results.json"),
        ({}, "run_model.py --model model_organism/base --list-sites", "Model: model_organism/base"),
        ({}, "suppress.py Hello --model model_organism/nothing", "'model_organism/nothing'"),
        ({"MODEL_A": "model_organism/aligned"}, "compare_models.py", "have the same weights"),
        ({"MODEL_NAME": "model_organism/nothing"}, "sweep_suppression.py", "'model_organism/nothing'"),
        ({}, "-m toxicity_steering.main --model model_organism/nothing", "'model_organism/nothing'"),
        ({}, "-m alignment_artifacts.report", "Report: file://{home}/results/"),
    ],
)
def test_scripts_run_from_any_directory(workplace, tmp_path, variables, command, message):
    path = command if command.startswith("-m") else f"{workplace}/{command}"
    done = shell(f"{sys.executable} {path}", tmp_path, PYTHONPATH=str(workplace), HF_HUB_OFFLINE="1", **variables)
    assert message.format(home=workplace) in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_typed_path_is_relative_to_where_one_is(workplace, tmp_path):
    command = f"{sys.executable} {workplace}/run_model.py --prompts Hello --max-tokens 1 --output-dir out"
    done = shell(f"{command} --save-activations --activations-dir acts", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/results.json").exists() and (tmp_path / "acts/manifest.json").exists()


@pytest.mark.parametrize("model", [None, "/a b/c/", "model_organism/base"])
def test_make_goes_on_after_a_failed_check_with_the_model_it_was_given(tmp_path, model):
    """With a Python that only writes down what it is asked to do, and fails the check."""
    folder = tmp_path / "a checkout"
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    for name in ("Makefile", "collect_activations.sh", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    python.write_text(
        '#!/bin/sh\necho "$MODEL_NAME: $*" >> log\ncase "$*" in *--check*) exit 1;; *--all-pairs*) exit 2;; esac\n'
    )
    python.chmod(0o755)
    (folder / ".venv/.installed").touch()
    done = shell("make", folder, **({"MODEL_NAME": model} if model else {}))
    assert done.returncode == 0, done.stderr
    name = model or "model_organism/aligned"
    log = (folder / "log").read_text().replace(f"{folder}/", "").splitlines()
    asked = [line.removeprefix(f"{name}: ") for line in log if " -c " not in line]
    compared = [] if model else ["compare_models.py"]
    assert [line for line in asked if not line.startswith("run_model.py --model")] == [
        "create_gemma_runner_input.py", f"run_model.py --check --model {name}", "analyze_collected_activations.py",
        *compared, f"suppress.py --all-pairs --model {name}",
        # The last one reports on the last analysis, whatever the model.
        next(line for line in asked if line.endswith("-m alignment_artifacts.report")),
    ]  # fmt: skip
    assert any(line.startswith(f"run_model.py --model {name} --prompts-file prompts") for line in asked)


def test_importing_the_library_stays_light():
    code = (
        "import sys, alignment_artifacts; print({'matplotlib', 'plotly', 'transformers', 'sklearn'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


QUESTIONS = ("Is seven prime", "Is the sky blue", "Do cats purr", "Does ice float", "Is gold heavy", "Is salt soluble",
             "Are whales mammals", "Can bees see red")  # fmt: skip


def test_an_experiment_of_ones_own_is_named_in_every_output(workplace, tmp_path):
    """Another behaviour, other sides, another site: by two variables, beside what was there."""
    pairs = [{"id": f"q{i}", "neutral": f"{text}?", "opinion": f"I am sure of it. {text} or not?"}
             for i, text in enumerate(QUESTIONS)]  # fmt: skip
    content = {"metadata": {"behaviour": "sycophancy", "sides": ["neutral", "opinion"]},
               "categories": {"facts": {"pairs": pairs}}}  # fmt: skip
    (tmp_path / "agree.json").write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in (workplace / RESULTS).rglob("*") if path.is_file()}
    names = {"PAIRS": str(tmp_path / "agree.json"), "SITE": "residual", "PYTHON": sys.executable, "MAX_TOKENS": "2"}
    done = shell("bash collect_activations.sh", workplace, **names)
    assert done.returncode == 0 and "8 like model.layers.0.output" in done.stdout
    assert (workplace / "collected_activations_aligned_agree_residual/manifest.json").exists()
    done = shell(f"{sys.executable} analyze_collected_activations.py --num-permutations 50", workplace, **names)
    assert done.returncode == 0, done.stderr
    assert "Site: residual stream (model.layers.{layer_idx}.output)" in done.stdout
    assert "neutral" in done.stdout and "opinion above its own partner" in done.stdout
    for word in ("natural", "artifact prompt", "refus", "alignment ", "safety"):
        assert word not in done.stdout, word
    results = workplace / "results/aligned/agree_residual"
    result = json.loads((results / "data/alignment_artifact_analysis_results.json").read_text())
    assert (result["behaviour"], result["sides"]) == ("sycophancy", ["neutral", "opinion"])
    assert result["site"].startswith("residual stream") and "neutral" in result["summary"]
    assert json.loads((results / "data/projections.json").read_text())["sides"] == ["neutral", "opinion"]
    assert shell(f"{sys.executable} -m alignment_artifacts.report", workplace).returncode == 0
    page = (results / "report.html").read_text()
    assert "<h1>Sycophancy in " in page and "Can the activations tell: sycophancy?" in page
    assert {path: path.read_bytes() for path in before} == before
