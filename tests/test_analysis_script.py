"""analyze_collected_activations.py on what strangers give it: edited pairs, flat and foreign collections, any paths."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import analyze_collected_activations as analyze
from alignment_artifacts import places
from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.analysis import load_run
from alignment_artifacts.figures import paper
from alignment_artifacts.figures.paper import plot_layer_scores
from alignment_artifacts.pairs import PAIRS_JSON, ROOT_KEY, load_pairs, prompt_groups
from alignment_artifacts.report import write_report
from gemma_refactored import main as command_line
from gemma_refactored.errors import UserError
from gemma_refactored.files import BATCH_MARKER, MANIFEST, PROMPT_EMBEDDING, PROMPT_MARKER, read_json, write_json

from .conftest import relative_error, tries
from .tiny_checkpoints import random_gemma, write_checkpoint

NUMBERS = "alignment_artifact_analysis_results.json"


def few_pairs() -> dict:
    """The pairs file, cut to five pairs in each of four categories."""
    content = read_json(PAIRS_JSON, "pairs")
    categories = content[ROOT_KEY]["categories"]
    cut = {name: {"pairs": body["pairs"][:5]} for name, body in list(categories.items())[:4]}
    return {ROOT_KEY: {"categories": cut}}


def edited(content: dict, how_many: int, swap: bool) -> dict:
    """The pairs file after somebody worked on it; ids stay."""
    content = json.loads(json.dumps(content))
    pairs = [pair for body in content[ROOT_KEY]["categories"].values() for pair in body["pairs"]]
    for pair in pairs[:how_many]:
        if swap:
            pair["natural"], pair["artifact"] = pair["artifact"], pair["natural"]
        else:
            pair["artifact"] += " Please."
    return content


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A folder with pairs files, and collections of a tiny model in every form."""
    folder = tmp_path_factory.mktemp("stranger")
    for name, content in {
        "pairs": few_pairs(), "swapped": edited(few_pairs(), 20, True), "one": edited(few_pairs(), 1, False),
        "two": edited(few_pairs(), 2, False),
    }.items():  # fmt: skip
        write_json(folder / f"{name}.json", content)
    model = write_checkpoint(folder / "model", random_gemma())
    write_json(folder / "prompts.json", prompt_groups(load_pairs(folder / "pairs.json")))
    for name, options in {
        "grouped": ["--process-by-group"], "flat": [], "flat by 7": ["--batch-size", "7"],
        "weights": ["--process-by-group", "--activation-filter", "self_attn.weights"],
        "several": ["--process-by-group", "--activation-filter", "layers.[01].output,layers.[01].self_attn.output"],
    }.items():  # fmt: skip
        command = ["--model", str(model), "--prompts-file", str(folder / "prompts.json"), "--max-tokens", "2", "-q"]
        folders = ["--save-activations", "--activations-dir", str(folder / name), "--output-dir", str(folder / "out")]
        assert command_line.main([*command, *folders, "--ignore-end-tokens", *options]) == 0
    shutil.copytree(folder / "grouped", folder / "foreign")
    for file in list((folder / "foreign").rglob("*")):
        if file.name in (MANIFEST, PROMPT_MARKER, PROMPT_EMBEDDING):
            file.unlink()
    return folder


@pytest.fixture
def script(stranger, tmp_path, monkeypatch):
    """Run the script on a collection with some constants changed; returns its exit code."""
    monkeypatch.setattr(places, "HOME", tmp_path)
    skip_figures(monkeypatch)

    def call(collection, **constants):
        for name, value in {
            "RAW_ACTIVATIONS_BASE_DIR": stranger / collection if collection else None,
            "ORIGINAL_PAIRS_JSON_FOR_ITERATION": stranger / "pairs.json", "NUM_PERMUTATIONS": 20,
            "NUM_BOOTSTRAP_RESAMPLES": 20, "RESULTS_JSON": NUMBERS, "PLOT_PNG": "plot.png", "RESULTS_DIR": "results",
            **constants,
        }.items():  # fmt: skip
            monkeypatch.setattr(analyze, name, value)
        return analyze.main()

    call.folder = tmp_path
    return call


def skip_figures(patch):
    """They are tested elsewhere, and take most of the time."""

    def nothing(result, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending in (".png", ".pdf"):
            path.with_suffix(ending).touch()

    for name in ("plot_layer_scores", "plot_categories", "plot_layer_pattern", "plot_projections"):
        patch.setattr(paper, name, nothing)


def numbers(folder: Path) -> dict:
    return read_json(folder / NUMBERS, "results")


def test_a_collection_that_is_named_and_not_of_the_model_in_the_environment(script, stranger, capsys, monkeypatch):
    sentence = "the chat format in the environment are not this collection's"
    for model, said in ((str(stranger / "model"), False), ("who/other", True)):
        monkeypatch.setenv("MODEL_NAME", model)
        assert script("grouped") == 0 and (sentence in capsys.readouterr().out) == said
    monkeypatch.setenv("ADAPTER", "who/adapter")
    assert script("grouped") == 2
    assert "was not made with the adapter who/adapter as it is now; unset ADAPTER" in capsys.readouterr().err


def test_pairs_edited_after_the_collection_are_left_out_by_name(script, stranger, capsys):
    assert script("grouped", ORIGINAL_PAIRS_JSON_FOR_ITERATION=stranger / "swapped.json") == 2
    assert "can be used" in capsys.readouterr().err
    assert script("grouped", ORIGINAL_PAIRS_JSON_FOR_ITERATION=stranger / "two.json") == 2  # 10%
    error = capsys.readouterr().err
    assert "2 of 20 pairs cannot be used" in error and "Please.'" in error and not (script.folder / NUMBERS).exists()
    assert script("grouped", ORIGINAL_PAIRS_JSON_FOR_ITERATION=stranger / "one.json") == 0  # 5%
    (left_out,) = numbers(script.folder)["excluded"]
    assert left_out["pair"] == "tech_1" and "artifact prompt was collected as" in left_out["reason"]
    assert "Excluded technical_dangerous tech_1: its artifact prompt" in capsys.readouterr().err


def test_the_library_refuses_edited_pairs_too(stranger):
    assert load_run(stranger / "grouped", stranger / "one.json").data.excluded[0]["pair"] == "tech_1"
    with pytest.raises(UserError, match="2 of 20 pairs cannot be used"):
        load_run(stranger / "grouped", stranger / "two.json")
    assert len(load_run(stranger / "flat", stranger / "two.json", max_excluded=0.1).data.excluded) == 2


def test_a_flat_collection_is_analysed_like_the_grouped_one(script, stranger):
    results = []
    for collection in ("grouped", "flat"):
        assert script(collection) == 0
        results.append(numbers(script.folder))
    for key in ("layer_scores", "layer_scores_prompt_end", "lexical_baseline", "best_layer_nested", "excluded"):
        assert results[0][key] == results[1][key], key
    pairs = load_pairs(stranger / "pairs.json")
    expected, data = (load_activation_set(stranger / name, pairs) for name in ("grouped", "flat by 7"))
    assert len(list((stranger / "flat by 7").glob(f"batch_*/{BATCH_MARKER}"))) == 6
    assert np.array_equal(data.valid, expected.valid) and relative_error(data.values, expected.values) < 1e-4
    shutil.copytree(stranger / "flat", script.folder / "collected_activations_flat")
    assert script(None) == 0  # it is found, too
    assert numbers(script.folder)["config"]["RAW_ACTIVATIONS_BASE_DIR"] == "collected_activations_flat"


def test_a_foreign_folder_is_labelled_wherever_its_numbers_are(script, capsys, monkeypatch):
    titles, save = [], paper._save
    monkeypatch.setattr(paper, "plot_layer_scores", plot_layer_scores)
    monkeypatch.setattr(paper, "_save", lambda figure, path: titles.append(figure.get_suptitle()) or save(figure, path))
    assert script("foreign", KEY_PATTERN_TEMPLATE="model.layers.{layer}.mlp.output") == 0
    label = "model and prompts unknown"
    assert f"Model: {label} (3 layers" in capsys.readouterr().out
    assert label in titles[0]
    files = [script.folder / NUMBERS, *(script.folder / "results").rglob("data/*.json")]
    assert len(files) == 5
    for file in files:
        assert label in read_json(file, "results")["origin"]["model"], file
    assert numbers(script.folder)["model"] == label
    (about,) = (script.folder / "results").glob("*/*/about.json")
    write_report(about.parent, script.folder / "report.html")
    assert label in (script.folder / "report.html").read_text()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_be_text_or_a_path(script, stranger, kind):
    paths = {"RESULTS_JSON": "a.json", "PLOT_PNG": "plots/b.png", "RESULTS_DIR": "r"}
    inputs = {"ORIGINAL_PAIRS_JSON_FOR_ITERATION": kind(stranger / "pairs.json"),
              "RAW_ACTIVATIONS_BASE_DIR": kind(stranger / "grouped")}  # fmt: skip
    assert script("grouped", **inputs, **{name: kind(path) for name, path in paths.items()}) == 0
    assert read_json(script.folder / "a.json", "results")["config"]["RAW_ACTIVATIONS_BASE_DIR"].endswith("grouped")
    assert (script.folder / "plots/b.pdf").exists() and any((script.folder / "r").iterdir())


def test_attention_weights_are_not_analysed(script, capsys):
    assert script("weights") == 2
    assert "attention weights" in capsys.readouterr().err


def outcome(action) -> tuple[int, str]:
    """Exit code and what is printed as error."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = action()
    return code, errors.getvalue()


def ends_well(code: int, errors: str) -> bool:
    """Exit code 0, or 2 with one sentence."""
    sentences = [line for line in errors.splitlines() if not line.startswith("Excluded ")]
    return code == 0 or (code == 2 and len(sentences) == 1 and sentences[0].startswith("Error: "))


VALUES = {
    "ORIGINAL_PAIRS_JSON_FOR_ITERATION": ["pairs.json", "swapped.json", "one.json", "two.json", "prompts.json", "none"],
    "GEMMA_INPUT_SUBCATEGORY_KEY_IN_PATH": ["prompt_list", "x", "..", ""],
    "NUM_LAYERS": [None, 3, 2, 0, "3"],
    "KEY_PATTERN_TEMPLATE": [None, "model.layers.{layer}.mlp.output", "x{layer}y", ""],
    "NUM_TOKEN_STEPS_TO_COLLECT": [None, 0, 1, 2, 99],
    "EXPECTED_HIDDEN_DIM": [None, 64, 5],
    "NUM_PERMUTATIONS": [1, 20, 0, "x"],
    "NUM_BOOTSTRAP_RESAMPLES": [1, 20, -1],
    "SEED": [0, 7, 1 << 50],
    "MAX_EXCLUDED": [0, 0.05, 1, 2, float("nan")],
    "RESULTS_JSON": [Path("a.json"), "deep/b.json"],
    "RESULTS_DIR": [Path("r"), "results"],
}  # fmt: skip
COLLECTIONS = ["grouped", "flat", "foreign", "several", "weights", "model", "pairs.json", "nowhere"]


@st.composite
def some_constants(draw) -> dict:
    names = draw(st.sets(st.sampled_from(sorted(VALUES)), max_size=4))
    return {name: draw(st.sampled_from(VALUES[name])) for name in sorted(names)}


@tries(30)
@given(collection=st.sampled_from(COLLECTIONS), constants=some_constants(), as_options=st.booleans())
def test_any_constants_and_options_end_well(stranger, tmp_path_factory, collection, constants, as_options):
    constants = {"NUM_PERMUTATIONS": 5, "NUM_BOOTSTRAP_RESAMPLES": 5, **constants}
    if "ORIGINAL_PAIRS_JSON_FOR_ITERATION" not in constants:
        constants["ORIGINAL_PAIRS_JSON_FOR_ITERATION"] = "pairs.json"
    constants["ORIGINAL_PAIRS_JSON_FOR_ITERATION"] = stranger / constants["ORIGINAL_PAIRS_JSON_FOR_ITERATION"]
    constants["RAW_ACTIVATIONS_BASE_DIR"] = stranger / collection
    options = []
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        patch.setattr(places, "HOME", tmp_path_factory.mktemp("home"))
        for name in ("RESULTS_JSON", "PLOT_PNG", "RESULTS_DIR"):
            patch.setattr(analyze, name, name.lower().replace("_", "."))
        for name, value in constants.items():
            if as_options and value is not None:
                options.append(f"--{name.lower().replace('_', '-')}={value}")
            else:
                patch.setattr(analyze, name, value)
        assert ends_well(*outcome(lambda: analyze.main(options))), (collection, constants, as_options)
