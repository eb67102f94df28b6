"""Settings described once: what a value may be, however it is given, and that every script follows its dataclass."""

import argparse
import ast
import importlib
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import pytest
from hypothesis import given as given_examples
from hypothesis import strategies as st

from alignment_artifacts import scores
from alignment_artifacts.edits.modes import MODES
from alignment_artifacts.edits.options import Mode, ModeOptions, Setting
from alignment_artifacts.suppression.space import Limits, Space
from gemma_refactored import settings as s
from gemma_refactored.configuration import NAMES, Generation, Sampling, Saving
from gemma_refactored.errors import UserError
from gemma_refactored.settings import Between, Must, Written
from toxicity_steering.config import Config

from .conftest import ROOT, tries


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Between(0, 1)] = 0.5
    """share of
    something"""
    word: Literal["a", "b"] = "a"
    """one of two"""


@dataclass(frozen=True)
class Example:
    count: Annotated[int, Between(1, 10)] = 3
    """how many"""
    lower: Annotated[int, Between(0)] = 0
    """no upper limit"""
    flag: bool = False
    """yes or no"""
    name: str = "x"
    """100 % text"""
    place: Path = Path("here")
    """a folder"""
    layers: Annotated[tuple[Annotated[int, Between(0)], ...], Written("N,N-N")] = (1, 2)
    """blocks"""
    numbers: tuple[float, ...] = (0.5,)
    """several"""
    bias: dict[int, float] = field(default_factory=dict)
    """of tokens"""
    size: Annotated[int, Between(1)] | None = None
    """None: any"""
    pattern: Annotated[str, Must(lambda text: "%" in text, "have % in it")] | None = None
    """a template"""
    inner: Inner = Inner()


def parse(*argv: str, described=Example, names=None):
    parser = argparse.ArgumentParser()
    s.add_options(parser, described, names)
    return s.from_arguments(described, parser.parse_args(argv), names)


def test_without_options_the_defaults_are_taken():
    assert parse() == Example()
    assert parse(described=Example(count=7)).count == 7


def test_every_kind_of_option():
    assert parse(
        "--count", "4", "--flag", "--name", "y", "--place", "a/b", "--layers", "2,4-6", "--numbers=-1,0.5",
        "--bias", "5=-2.5", "--bias", "7=1", "--size", "9", "--pattern", "%d", "--rate", "0.25", "--word", "b",
    ) == Example(
        count=4, flag=True, name="y", place=Path("a/b"), layers=(2, 4, 5, 6), numbers=(-1.0, 0.5),
        bias={5: -2.5, 7: 1.0}, size=9, pattern="%d", inner=Inner(0.25, "b"),
    )  # fmt: skip
    assert parse("--no-flag", "--size", "none").size is None
    assert parse("--how-many", "2", names={"count": "how_many"}).count == 2


@pytest.mark.parametrize(
    "option, text, message",
    [
        ("count", "0", "must be between 1 and 10, not 0"),
        ("count", "2.0", "must be a whole number between 1 and 10, not '2.0'"),
        ("lower", "-1", "must be a whole number of at least 0, not -1"),
        ("lower", "9" * 5000, "must be a whole number"),
        ("name", " ", "must be text, not ' '"),
        ("place", "a\0b", "must be a path, not"),
        ("layers", "x", "'x' must look like 2,4-6"),
        ("layers", "5-4", "names no numbers: 5-4"),
        ("layers", "1-999999999", "names no numbers"),
        ("numbers", "1,nan", "must be a tuple, each item a number"),
        ("bias", "5", "'5' must look like N=X"),
        ("bias", "5=inf", "'5=inf' must look like N=X: 'inf' is not a number"),
        ("size", "0", "must be a whole number of at least 1 or None, not 0"),
        ("pattern", "x", "must have % in it or be None, not 'x'"),
        ("rate", "nan", "must be between 0 and 1, not nan"),
        ("rate", "1e400", "must be between 0 and 1, not inf"),
        ("rate", "half", "must be a number between 0 and 1, not 'half'"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_it_was_given_under(monkeypatch, option, text, message):
    with pytest.raises(UserError) as by_option:
        parse(f"--{option}={text}")
    assert str(by_option.value).startswith(f"--{option} ") and message in str(by_option.value)
    constants = {field.name.upper(): getattr(Example(), field.name) for field in Example.__dataclass_fields__.values()}
    constants |= {"RATE": 0.5, "WORD": "a"}
    del constants["INNER"]
    if "\0" not in text:  # no environment can hold one
        monkeypatch.setenv(option.upper(), text)
        with pytest.raises(UserError) as by_variable:
            s.from_constants(Example, constants, [])
        assert str(by_variable.value) == str(by_option.value).replace(f"--{option}", option.upper(), 1)


NOT = {  # what each field refuses when it is set in Python
    "count": [True, 0, 11, 2.5, "3", None, math.nan, np.bool_(True), [3]],
    "flag": [0, 1, "yes", None],
    "name": ["", " ", 5, None, b"x"],
    "place": ["", 5, None, "a\0b"],
    "layers": [(), [-1], "12", 2.5, (1, True), None],
    "numbers": [(), ("a",), (math.inf,), (math.nan,), (None,)],
    "bias": [5, {"a": 1.0}, {1: math.nan}, {True: 1.0}],
    "size": [0, True, 1.5],
    "pattern": ["x", 5],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NOT.items() for value in values])
def test_instances_made_in_python_are_checked(name, value):
    with pytest.raises(UserError, match=f"^{name} must "):
        s.check(replace(Example(), **{name: value}))
    with pytest.raises(UserError, match="^their_name must "):
        s.check(replace(Example(), **{name: value}), {name: "their_name"})


def test_numbers_of_numpy_lists_and_texts_for_paths_are_fine():
    s.check(
        Example(count=np.int64(3), layers=[np.int32(1)], numbers=np.array([0.5]), place="x", inner=Inner(np.float32(1)))
    )
    s.check_given(Example, {"count": 5, "rate": None})
    with pytest.raises(UserError, match="^rate must be between"):
        s.check_given(Example, {"rate": 2})


VALUES = st.builds(
    Example,
    count=st.integers(1, 10),
    lower=st.integers(0, 10**30),
    flag=st.booleans(),
    name=st.text(min_size=1).filter(str.strip),
    layers=st.lists(st.integers(0, 99), min_size=1).map(tuple),
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1).map(tuple),
    bias=st.dictionaries(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    size=st.none() | st.integers(1),
    inner=st.builds(Inner, rate=st.floats(0, 1), word=st.sampled_from("ab")),
)


@tries(100)
@given_examples(VALUES)
def test_a_record_gives_the_same_settings_back(value):
    s.check(value)
    record = s.record(value, {"count": "how_many"})
    assert record["how_many"] == value.count and record["layers"] == list(value.layers)
    assert s.from_record(Example, record, "m.json", {"count": "how_many"}) == value
    with pytest.raises(UserError, match="m.json has no word"):
        s.from_record(Example, {k: v for k, v in record.items() if k != "word"}, "m.json", {"count": "how_many"})


def test_help_has_docstrings_limits_and_defaults():
    parser = argparse.ArgumentParser()
    s.add_options(parser, Example, omit=["lower"])
    text = " ".join(parser.format_help().split())
    assert "how many (default 3)" in text and "share of something (default 0.5)" in text and "--lower" not in text
    assert "--layers N,N-N blocks (default 1,2)" in text and "100 % text" in text


@dataclass(frozen=True)
class Script:
    num_tries: Annotated[int, Between(1)]
    """how often"""
    folder: Path
    """where to"""
    limits: Limits
    statistics: scores.Settings = scores.Settings()


def script(*argv, **changed):
    constants = {"NUM_TRIES": 5, "FOLDER": "x", "SEED": 4, "LIMITS": Limits(kl=0.3), **changed}
    return s.from_constants(Script, constants, argv, also={"FOLDER": "OLD_NAME"})


def test_option_beats_environment_beats_constant(monkeypatch):
    assert script() == Script(5, Path("x"), Limits(kl=0.3), scores.Settings(seed=4))
    monkeypatch.setenv("OLD_NAME", "old")
    assert script().folder == Path("old")
    monkeypatch.setenv("FOLDER", "new")
    monkeypatch.setenv("NUM_TRIES", "7")
    monkeypatch.setenv("LIMITS_KL", "0.4")
    assert script() == Script(7, Path("new"), Limits(kl=0.4), scores.Settings(seed=4))
    assert script("--num-tries", "9", "--limits-kl", "1").num_tries == 9
    assert script("--folder", "f", "--seed", "6") == Script(7, Path("f"), Limits(0.4), scores.Settings(seed=6))


def test_a_bad_constant_is_named_as_the_script_has_it():
    for constant, value in (("NUM_TRIES", 0), ("FOLDER", None), ("SEED", 1.5), ("LIMITS", Limits(kl=-1))):
        with pytest.raises(UserError, match=f"^{constant}(_KL)? must "):
            script(**{constant: value})


def test_a_field_without_constant_keeps_its_default_and_is_no_option():
    assert script().statistics.permutations == 1000
    with pytest.raises(SystemExit) as error:
        script("--permutations", "5")
    assert error.value.code == 2


SCRIPTS = {
    "analyze_collected_activations": scores.NAMES,
    "compare_models": scores.NAMES,
    "sweep_suppression": {},
    "create_gemma_runner_input": {},
    "toxicity_steering.main": {},
}


def constants_of(module) -> set[str]:
    """Names in capitals that a script assigns at its top level."""
    names = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        for target in node.targets if isinstance(node, ast.Assign) else []:
            names |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if name.isupper()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_constants_of_a_script_are_the_fields_of_its_dataclass(name):
    module = importlib.import_module(name)
    constants = constants_of(module)
    prefixed = [n.lower() for n in constants if isinstance(getattr(module, n), (Limits, Space))]
    settings = s.settings_of(module.Constants, SCRIPTS[name], prefixed)
    fields = {item.path[0].upper() if item.path[0] in prefixed else item.constant for item in settings}
    assert fields - constants <= {"TOP_LAYERS"} and constants <= fields


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_path_of_a_script_may_be_text_or_a_path(name):
    module = importlib.import_module(name)
    paths = [item for item in s.settings_of(module.Constants, SCRIPTS[name]) if item.kind.type is Path]
    assert paths
    for item in paths:
        for value in (Path("some/where"), "some/where"):
            constants = {**vars(module), item.constant: value}
            chosen = s.from_constants(module.Constants, constants, [], SCRIPTS[name])
            assert getattr(chosen, item.path[0]) == Path("some/where"), item.constant


@pytest.mark.parametrize("name", [*SCRIPTS, "run_model", "suppress"])
def test_help_runs_nothing_and_unknown_options_are_refused(name, tmp_path):
    """No MLX, transformers or matplotlib either: help is there at once."""
    heavy = "mlx.core", "transformers", "matplotlib", "sklearn", "torch"
    program = f"""
import sys, {name} as script
code = script.main([sys.argv[1]])
print([m for m in {heavy!r} if m in sys.modules] or "light")
sys.exit(code)
"""
    for option, code in (("--help", 0), ("--no-such-option", 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, option],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and done.stdout.endswith("light\n"), done.stdout + done.stderr
        assert "--" in done.stdout + done.stderr and not list(tmp_path.iterdir())


def test_the_shell_script_names_what_the_runtime_has():
    text = (ROOT / "collect_activations.sh").read_text()
    constants = set(re.findall(r'^([A-Z_]+)="\$\{\1:-', text, re.M))
    settings = [*s.settings_of(Generation), *s.settings_of(Saving)]
    by_variable = {"PAIRS", "SITE"}  # which make the prompts file, the filter and the folder
    others = {"MODEL_NAME", "ADAPTER", "PROMPTS_FILE", "OUTPUT_DIR"}
    assert constants - {item.constant for item in settings} == by_variable | others
    passed = dict(re.findall(r'(--[a-z-]+) "\$([A-Z_]+)"', text))
    flags = {item.flag: item.constant for item in settings}
    flags |= {item.flag: item.constant.replace("TEMP", "TEMPERATURE") for item in s.settings_of(Sampling, NAMES)}
    flags |= {
        "--model": "MODEL_NAME",
        "--adapter": "ADAPTER",
        "--prompts-file": "PROMPTS_FILE",
        "--output-dir": "OUTPUT_DIR",
    }
    assert passed == {flag: constant for flag, constant in flags.items() if constant in constants and flag in passed}
    assert set(passed.values()) == constants - by_variable


@pytest.mark.parametrize(
    "cls", [Sampling, Generation, Saving, scores.Settings, ModeOptions, Setting, Limits, Space, Config]
)
def test_every_setting_says_what_it_is_and_has_a_default_that_can_be(cls):
    for item in s.settings_of(cls):
        assert item.help, item
        if not isinstance(item.default, type(s.MISSING)):
            s.checked(item.default, item.kind, item.name)


def test_the_modes_that_can_be_set_are_those_there_are():
    assert get_args(Mode) == tuple(MODES)


@pytest.mark.parametrize("argv", [["--text=--"], ["--number=--"], ["--many=--"], ["--many=1", "--many=--"]])
def test_two_dashes_are_refused_or_text_but_never_nothing(argv, capsys):
    parser = s.Parser()
    parser.add_argument("--text")
    parser.add_argument("--number", type=int)
    parser.add_argument("--many", action="append")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        assert stop.code == 2 and f"argument {argv[0].partition('=')[0]}: " in capsys.readouterr().err
    else:  # from Python 3.13 on
        assert arguments.text == "--" or arguments.many[-1] == "--"


def test_options_with_values_and_none_are_parsed_as_ever():
    parser = s.Parser()
    parser.add_argument("--text")
    parser.add_argument("--many", nargs="+")
    parser.add_argument("rest", nargs="?")
    assert vars(parser.parse_args(["--many", "a", "--", "b"])) == {"text": None, "many": ["a"], "rest": "b"}
