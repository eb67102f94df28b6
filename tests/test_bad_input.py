"""Whatever is in a file the user writes, it is read or refused in one sentence; no traceback, nothing guessed."""

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import analyze_collected_activations as analyze
import compare_models as compare
import create_gemma_runner_input as create
import sweep_suppression as sweep
from alignment_artifacts import places as where
from alignment_artifacts.pairs import load_pairs, prompt_groups
from alignment_artifacts.report.__main__ import main as report
from gemma_refactored.configuration import NAMES, Generation
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.main import Defaults, build_parser, check_bias
from gemma_refactored.manifest import read_manifest
from gemma_refactored.prompt_processing import load_prompts
from gemma_refactored.settings import from_arguments
from toxicity_steering import main as toxicity

from .conftest import tries

TEXT = st.text(max_size=20) | st.sampled_from(["..", "/etc", "a/b", "\x00", "\ud800", "{{ 7 * 7 }}", "x" * 100_000])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
PAIRS = {
    "alignment_artifact_prompt_pairs": {
        "metadata": {},
        "categories": {
            "medical": {
                "description": "",
                "pairs": [{"id": f"m_{i}", "natural": "a", "artifact": "b"} for i in range(2)],
            },
            "social": {"description": "", "pairs": [{"id": "s_1", "natural": "c", "artifact": "d"}]},
        },
    }
}
PROMPTS = {"natural_a": {"prompt_list": ["How do I build a shelf?", "And a boat?"]}, "artifact_a": {"x": ["Hack it."]}}
MANIFEST = {
    "max_tokens": 3, "temp": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "logit_bias": ["5=1"], "seed": 0,
    "chat_mode": True, "ignore_end_tokens": False, "batch_size": 2, "keep_precision": False, "compressed": False,
    "activation_filter": "mlp.output", "activation_dtype": "float32", "model_path": None, "model_revision": "sha256:0",
    "layout": "grouped", "prompt_groups": PROMPTS,
}  # fmt: skip


def places(content, path=()):
    """The paths of all values in a JSON content."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def spoiled(content):
    """The content with one of its values replaced, removed or, in a list, doubled."""

    @st.composite
    def draw_one(draw):
        result = copy.deepcopy(content)
        path = draw(st.sampled_from([path for path in places(content) if path]))
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "remove", "double"]))
        if how == "replace":
            parent[path[-1]] = draw(JSON)
        elif how == "remove":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        return result

    return draw_one()


def reads_or_refuses(read, content: bytes, path) -> bool:
    """True if the content was accepted."""
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and str(path) in str(error)
        return False
    return True


READERS = {
    "pairs": (lambda path: prompt_groups(load_pairs(path)), PAIRS),
    "prompts": (load_prompts, PROMPTS),
    "manifest": (read_manifest, MANIFEST),
}


@pytest.mark.parametrize("kind", READERS)
@tries(150)
@given(data=st.data())
def test_any_content_is_read_or_refused(tmp_path_factory, kind, data):
    read, valid = READERS[kind]
    path = tmp_path_factory.getbasetemp() / f"{kind}.json"
    assert reads_or_refuses(read, json.dumps(valid).encode(), path)
    content = data.draw(JSON | spoiled(valid))
    accepted = reads_or_refuses(read, json.dumps(content).encode(), path)
    if accepted and kind == "prompts":
        for prompt in load_prompts(path):
            folder = (path.parent / prompt.folder).resolve()
            assert folder.is_relative_to(path.parent.resolve()) and prompt.text.strip()


@pytest.mark.parametrize("kind", READERS)
@tries(60)
@given(content=st.binary(max_size=200) | st.sampled_from([b"[" * 100_000, b'{"a": NaN}', b"\xef\xbb\xbf{}", b"null"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, kind, content):
    reads_or_refuses(READERS[kind][0], content, tmp_path_factory.getbasetemp() / f"{kind}.bytes.json")


NUMBERS = ["batch-size", "max-tokens", "temp", "top-p", "repetition-penalty", "seed"]
WORDS = st.sampled_from(["nan", "inf", "-1", "0", "1e400", "99999999999999999999", "", "--", "x", "1_0", "٣"]) | TEXT


@tries(300)
@given(option=st.sampled_from([*NUMBERS, "logit-bias"]), word=WORDS)
def test_any_number_on_the_command_line_is_taken_or_refused(option, word):
    try:
        arguments = build_parser(Defaults()).parse_args(["--prompts", "a", f"--{option}={word}"])
    except SystemExit as stop:  # argparse's own sentence
        assert stop.code == 2 and word == "--"
        return
    try:
        generation = from_arguments(Generation(), arguments, NAMES)
        check_bias(generation.sampling.logit_bias, 100)
    except UserError as error:
        assert str(error).startswith(f"--{option} ")
        return
    sampling = generation.sampling
    values = [generation.batch_size, generation.max_tokens, sampling.temperature, sampling.top_p, sampling.seed]
    assert all(value >= 0 and math.isfinite(value) for value in [*values, sampling.repetition_penalty])
    assert all(0 <= token < 100 and math.isfinite(bias) for token, bias in sampling.logit_bias.items())


CONSTANTS = [
    name
    for name in vars(analyze)
    if name.isupper() and name not in ("RESULTS_JSON", "PLOT_PNG", "RESULTS_DIR", "NAMES", "MIN_PAIRS")
]


@tries(200)
@given(name=st.sampled_from(CONSTANTS), value=JSON)
@example(name="RAW_ACTIVATIONS_BASE_DIR", value="")
@example(name="RAW_ACTIVATIONS_BASE_DIR", value=".")
@example(name="RAW_ACTIVATIONS_BASE_DIR", value="x" * 300)
@example(name="RAW_ACTIVATIONS_BASE_DIR", value="a\x00b")
@example(name="ORIGINAL_PAIRS_JSON_FOR_ITERATION", value="x" * 300)
def test_any_constant_of_the_analysis_is_taken_or_refused_by_name(name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, "HOME", Path("no such place"))
        patch.setattr(analyze, "RAW_ACTIVATIONS_BASE_DIR", "no such folder")  # so that nothing more is done
        patch.setattr(analyze, name, value)
        with pytest.raises(UserError) as error:
            analyze.run(analyze.read_constants([]))
    known = (name, "no such folder", "pairs file", "There is no collection", "holds none of the prompt pairs",
             "The activations folder")  # fmt: skip
    assert any(part in str(error.value) for part in known) and len(str(error.value)) < 1000


PATHS = {
    "a name of 300 letters": lambda folder: folder / ("x" * 300),
    "below a file": lambda folder: folder / "file" / "below",
    "the other kind": lambda folder: folder / ("file" if folder.name.endswith("_DIR") else "folder"),
}
SCRIPTS = {
    create: ["PAIRS_FILE", "OUTPUT_FILE"],
    analyze: ["RAW_ACTIVATIONS_BASE_DIR", "ORIGINAL_PAIRS_JSON_FOR_ITERATION"],
    compare: ["TWINS", "PAIRS_JSON", "RESULTS_DIR"],
    sweep: ["TWINS", "PAIRS_JSON", "RESULTS_DIR"],
    toxicity: ["OUTPUT_DIR"],
}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("script, name", [(script, name) for script, names in SCRIPTS.items() for name in names])
def test_a_path_that_cannot_be_used_is_one_sentence_before_the_work(script, name, kind, tmp_path, monkeypatch, capsys):
    folder = tmp_path / ("_DIR" if name in ("RAW_ACTIVATIONS_BASE_DIR", "RESULTS_DIR", "OUTPUT_DIR") else "_")
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("x")
    monkeypatch.setattr(script, name, PATHS[kind](folder))
    for work in ("measure", "read_pairs"):
        monkeypatch.setattr(f"alignment_artifacts.{WORK[work]}.{work}", None)
    assert script.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1


WORK = {"measure": "directions.measurements", "read_pairs": "comparison.compare"}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("option", ["--folder", "--output"])
def test_so_is_one_that_the_report_cannot_use(option, kind, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    assert report([option, str(PATHS[kind](tmp_path))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1


def test_a_file_that_may_not_be_looked_at_is_one_sentence(capsys):
    """Whoever raises it, and whether or not somebody thought of it."""

    def refuse():
        raise PermissionError(13, "Permission denied", "/etc/some/file")

    assert exit_code(refuse) == 2
    assert capsys.readouterr().err == "Error: '/etc/some/file' cannot be used: Permission denied. Name another.\n"
