"""What the environment names is what every script takes, unless an option says otherwise."""

from dataclasses import replace

import pytest

import compare_models
import run_model
import suppress
import sweep_suppression
from alignment_artifacts import environment
from alignment_artifacts.pairs import PAIRS_JSON
from alignment_artifacts.suppression import library
from gemma_refactored import model_loading
from gemma_refactored.configuration import Chat
from gemma_refactored.errors import UserError
from gemma_refactored.settings import from_environment
from toxicity_steering import main as toxicity

from .conftest import ROOT

CHAT = Chat("plain", "Be brief.", '{"enable_thinking": false}')
VARIABLES = {"MODEL_NAME": "who/model", "ADAPTER": "who/adapter", "SYSTEM_PROMPT": CHAT.system_prompt,
             "CHAT_TEMPLATE": CHAT.chat_template, "CHAT_TEMPLATE_ARGS": CHAT.chat_template_args}  # fmt: skip
SCRIPTS = {
    "run_model": (run_model, ["--prompts", "Hello"], "--model"),
    "suppress": (suppress, ["Hello"], "--model"),
    "sweep": (sweep_suppression, [], "--model-name"),
    "toxicity": (toxicity, [], "--model"),
}


@pytest.fixture(params=SCRIPTS)
def script(request, monkeypatch):
    """Run a script with some variables and options up to the loading of its model: name, adapter, chat."""
    module, argv, flag = SCRIPTS[request.param]

    def run(variables, *options, model=None):
        loaded = []

        def load(name, keep_precision=False, split=False, revision=None, chat=None, adapter=None):
            loaded.append((str(name), adapter, chat))
            raise UserError("that is enough")

        for name in (*VARIABLES, "PAIRS", "SITE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(model_loading, "load", load)
        monkeypatch.setattr(library, "load", load)
        assert module.main([*argv, *options, *([flag, model] if model else [])]) == 2
        return loaded[0]

    return run


def test_every_script_loads_the_model_that_the_environment_names(script):
    assert script(VARIABLES) == ("who/model", "who/adapter", CHAT)
    options = ["--adapter", "my/adapter", "--system-prompt", "Be verbose."]
    expected = ("my/model", "my/adapter", replace(CHAT, system_prompt="Be verbose."))
    assert script(VARIABLES, *options, model="my/model") == expected
    for variables in ({}, dict.fromkeys(VARIABLES, ""), {"ADAPTER": "none", "SYSTEM_PROMPT": "None"}):
        name, adapter, chat = script({**variables, "MODEL_NAME": "model_organism/base"})
        assert name.endswith("model_organism/base") and adapter is None and chat.is_default


def test_a_bad_value_is_named_by_its_variable(script, capsys, monkeypatch):
    with pytest.raises(IndexError):  # nothing was loaded
        script({"CHAT_TEMPLATE_ARGS": "{"})
    error = capsys.readouterr().err
    assert error.startswith("Error: CHAT_TEMPLATE_ARGS must be a JSON object") and error.count("\n") == 1


def test_a_run_that_is_repeated_is_that_of_its_manifest_whatever_is_set(tmp_path, monkeypatch):
    from gemma_refactored.main import build_parser, read_request

    command = ["--model", str(ROOT / "model_organism/base"), "--prompts", "Hello", "--max-tokens", "1", "-q"]
    folders = ["--save-activations", "--activations-dir", str(tmp_path / "acts"), "--output-dir", str(tmp_path / "out")]
    assert run_model.main([*command, *folders, "--system-prompt", "Be calm."]) == 0
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    again = ["--from-manifest", str(tmp_path / "acts/manifest.json"), *folders[1:]]
    defaults = run_model.defaults()
    request = read_request(build_parser(defaults).parse_args(again), defaults)
    assert request.model == str(ROOT / "model_organism/base") and request.adapter is None
    assert request.generation.chat == Chat(system_prompt="Be calm.")


def test_pairs_come_from_the_environment_too(monkeypatch, tmp_path):
    (tmp_path / "mine.json").write_bytes(PAIRS_JSON.read_bytes())
    monkeypatch.setenv("PAIRS", str(tmp_path / "mine.json"))
    assert from_environment(environment.Named()).pairs == tmp_path / "mine.json"


def test_what_is_set_and_not_used_is_said(monkeypatch):
    reasons = {"SITE": "every site is tried", "PAIRS": "it has its own"}
    monkeypatch.delenv("PAIRS", raising=False)
    monkeypatch.setenv("SITE", "residual")
    assert environment.unused(reasons) == ["SITE in the environment is not used here: every site is tried."]


def test_a_comparison_says_that_it_is_about_other_models(monkeypatch):
    captured = []
    monkeypatch.setattr(compare_models, "run", captured.append)
    for name, value in {"MODEL_NAME": "./model_organism/base/", "ADAPTER": "", "MODEL_A": "who/before"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    assert compare_models.main(["--model-b", "model_organism/base"]) == compare_models.main([]) == 0
    assert [len(compare_models.not_compared(constants)) for constants in captured] == [0, 1]
    monkeypatch.setenv("ADAPTER", "who/adapter")
    told = compare_models.not_compared(captured[1])
    assert [sentence.split()[0] for sentence in told] == ["MODEL_NAME", "ADAPTER"]
    assert compare_models.main(["--adapter-b", "who/adapter", "--model-a", "model_organism/base"]) == 0
    assert compare_models.not_compared(captured[2]) == []
