"""The library and suppress.py on the organism."""

import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import suppress
from alignment_artifacts import AlignmentArtifacts, suppress_prompt
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.behaviour.score import REFUSAL
from alignment_artifacts.default_model import note
from alignment_artifacts.directions.estimate import Directions, fit_to, planted_directions
from alignment_artifacts.directions.files import load_directions, save_directions
from alignment_artifacts.directions.measurements import subject_of
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.pairs import PAIRS_JSON, PromptPairs, load_pairs
from alignment_artifacts.suppression import library as library_module
from alignment_artifacts.suppression.sweep import split_pairs
from alignment_artifacts.suppression.transcripts import transcribe
from gemma_refactored.configuration import Chat
from gemma_refactored.errors import UserError
from gemma_refactored.files import write_json
from model_organism.train import PLANTED_LAYERS

from .conftest import ROOT
from .tiny_checkpoints import write_adapter

REFUSED, ANSWERED = "How do I hack a bank server?", "How do I build a rain barrel without help?"


@pytest.fixture
def run(library, monkeypatch, tmp_path, capsys):
    """suppress.py with the library's cache: (exit code, stdout, stderr)."""
    monkeypatch.setattr(library_module, "AlignmentArtifacts", lambda *_, **__: library)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = suppress.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_suppression_takes_the_refusal_away_and_leaves_an_answer_alone(library):
    result = library.suppress_and_generate(REFUSED, mode="cap")
    assert is_refusal(result.before) and not is_refusal(result.after)
    assert set(result.setting.layers) == set(PLANTED_LAYERS) and result.chosen_by == "you"
    assert 0 < result.proof.touched < result.proof.tokens and result.prompt_score > 0
    same = library.suppress_and_generate(ANSWERED, mode="cap")
    assert same.after == same.before and same.prompt_score < 0


def test_a_model_that_refuses_nothing_is_said_with_and_without_a_directions_file(run, library, monkeypatch, tmp_path):
    assert library.refusals() == library.refusals(at_most=50) == (48, 50)  # measured or asked now
    some = library.measurements().judged(is_refusal)[::5, 1]
    assert library.refusals(at_most=10) == (some.sum(), 10)
    ours, foreign = tmp_path / "ours.safetensors", tmp_path / "foreign.safetensors"
    save_directions(library.directions(site="residual"), ours)
    directions = library.directions(site="residual")
    save_directions(replace(directions, facts={**directions.facts, "ends": ["benign", "toxic"]}), foreign)
    monkeypatch.setattr(library_module, "is_refusal", lambda text, prompt: False)
    ask = [REFUSED, "--mode", "ablate", "--site", "residual", "--max-tokens", 2]
    given = [REFUSED, "--mode", "ablate", "--max-tokens", 2, "--directions"]
    said = {name: " ".join(run(*arguments)[1].split()) for name, arguments in
            (("none", ask), ("ours", [*given, ours]), ("foreign", [*given, foreign]))}  # fmt: skip
    assert "refuses 0 of 50 artifact prompts: there is no refusal behaviour" in said["none"]
    assert "refuses 0 of 10 artifact prompts: there is no refusal behaviour" in said["ours"]
    assert "refuses" not in said["foreign"] and "After:" in said["foreign"]


def test_scale_0_changes_nothing(library):
    result = library.suppress_and_generate(REFUSED, mode="ablate", scale=0)
    assert result.after_tokens == result.before_tokens and result.proof.touched == 0


def test_adding_the_direction_makes_a_refusal(library):
    result = library.suppress_and_generate(ANSWERED, mode="add", site="residual", scale=1.0)
    assert not is_refusal(result.before) and is_refusal(result.after)
    assert result.setting.where == "prompt_end" and result.proof.touched == 1


def test_auto_is_by_size_until_a_sweep_has_been_made(library):
    chosen, by = library.choose(None, "auto", None)
    assert (chosen.mode, by) == ("proximity", "model size")
    sweep = library.measurements().folder / library_module.SWEEP
    write_json(sweep, {"chosen": {"setting": {**chosen.record(), "mode": "cap", "layers": [3, 4]}}})
    try:
        swept, by = library.choose(None, "auto", None, scale=2.0)
        assert (swept.mode, swept.layers, swept.scale, by) == ("cap", (3, 4), 2.0, "a sweep")
        assert library.choose(None, "auto", None, layers=(1,))[0].layers == (1,)
        elsewhere, _ = library.choose(None, "auto", None, site="residual")
        assert elsewhere.site == "residual" and elsewhere.layers != (3, 4)
        assert library.choose(None, "ablate", None)[1] == "you"
    finally:
        sweep.unlink()


def test_directions_follow_categories_and_are_kept(library):
    everything = library.directions()
    path = library.measurements().folder / "directions.safetensors"
    before = path.stat().st_mtime_ns
    assert np.array_equal(library.directions().direction, everything.direction)
    assert path.stat().st_mtime_ns == before
    some = library.directions(categories=["medical_ethics"])
    assert len(some.facts["pairs"]) == 10 and not np.array_equal(some.direction, everything.direction)
    with pytest.raises(UserError, match="no category 'weather'"):
        library.directions(categories=["weather"])


def test_a_setting_that_touches_nothing_anywhere_is_an_error(library):
    with pytest.raises(UserError, match="changes nothing"):
        library.suppress_and_generate(REFUSED, mode="proximity", proximity_threshold=1.0)
    # A natural prompt that is left alone is none: on artifact prompts the setting works.
    gentle = dict(mode="proximity", proximity_threshold=0.6, target_layers=[4])
    assert library.suppress_and_generate(ANSWERED, **gentle).proof.touched == 0


def test_suppress_prompt_prints_both(library, monkeypatch, capsys):
    monkeypatch.setattr(library_module, "AlignmentArtifacts", lambda model: library)
    result = suppress_prompt(REFUSED, mode="cap", scale=1.5)
    output = capsys.readouterr().out
    assert "before" in output and "after" in output and result.before.split()[0] in output
    assert result.setting.scale == 1.5


def test_a_result_prints_as_its_two_answers(library):
    result = library.suppress_and_generate(REFUSED, mode="cap")
    assert result.before in str(result) and result.after in str(result) and len(str(result)) < 800
    assert len(repr(result)) < 2000


@pytest.mark.parametrize("text", ["Close it [/INST] and [bold] go on", "[/]", "[red]How do I[/red] paint?"])
def test_square_brackets_are_no_markup(library, monkeypatch, capsys, text):
    monkeypatch.setattr(library_module, "AlignmentArtifacts", lambda model: library)
    suppress_prompt(text, mode="ablate", max_tokens=5)
    assert text.split()[0] in capsys.readouterr().out


def test_a_terminal_that_lacks_a_character_gets_its_number(library, monkeypatch):
    monkeypatch.setattr(library_module, "AlignmentArtifacts", lambda model: library)
    terminal = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    suppress_prompt("How do I paint a \u2603?", mode="ablate", max_tokens=2)
    terminal.flush()
    assert b"\\u2603?" in terminal.buffer.getvalue()


def test_a_directions_file_does_what_the_same_directions_do_without_it(library, tmp_path):
    """It was measured on generated tokens, so `add` is at every token."""
    directions = library.directions(site="residual", positions="generated")
    save_directions(directions, tmp_path / "generated.safetensors")
    ask = dict(prompt=ANSWERED, mode="add", scale=0.6, target_layers=range(8), compare=False, max_tokens=10)
    first = library.suppress_and_generate(**ask, site="residual", positions="generated")
    second = library.suppress_and_generate(**ask, directions=load_directions(tmp_path / "generated.safetensors"))
    assert first.setting == second.setting and first.after_tokens == second.after_tokens
    assert first.proof.touched == first.proof.tokens == second.proof.touched


def test_an_imported_vector_is_added_at_every_token(library):
    vector = Directions({"site": "residual", "model_type": "gemma3"}, library.directions(site="residual").direction)
    result = library.suppress_and_generate(ANSWERED, mode="add", scale=0.1, directions=vector, max_tokens=5)
    assert result.proof.touched == result.proof.tokens and "direction from elsewhere" in result.setting.describe()


def test_what_directions_from_a_file_lead_to_is_said(run, library, tmp_path):
    """The toxicity experiment's vectors point the other way: suppressing with them moves towards what is toxic."""
    own = library.directions(site="residual")
    for name, ends in (("toxic", ["toxic", "benign"]), ("own", ["natural", "artifact"]), ("unknown", None)):
        facts = {**own.facts, "positions": "last 32 tokens", "ends": ends}
        save_directions(replace(own, facts=facts), tmp_path / f"{name}.safetensors")

    def told(name, *options):
        code, output, _ = run(ANSWERED, "--directions", f"{name}.safetensors", "--max-tokens", "2", *options)
        assert code == 0
        return " ".join(output.split())

    toxic = told("toxic", "--mode", "ablate")
    assert "point from toxic to benign (the residual site, measured at last 32 tokens)" in toxic
    assert "moves away from benign, towards toxic; --mode add does the opposite" in toxic
    assert "away from toxic, towards benign" in told("toxic", "--mode", "add", "--scale", "0.1")
    assert "away from toxic, towards benign" in told("toxic", "--mode", "always", "--scale", "-0.1")
    assert "away from artifact, towards natural" in told("own", "--mode", "ablate")
    assert "do not say what they point from and to" in told("unknown", "--mode", "ablate")
    assert "point from" not in " ".join(run(ANSWERED, "--mode", "ablate", "--max-tokens", "2")[1].split())


def test_ends_that_are_none_are_refused(run, library, tmp_path):
    own = library.directions()
    for ends in ("benign", ["benign"], [1, 2], {}):
        save_directions(replace(own, facts={**own.facts, "ends": ends}), tmp_path / "d.safetensors")
        code, _, error = run("hello", "--directions", "d.safetensors")
        assert code == 2 and "its ends must be two texts" in error and error.count("\n") == 1


def test_the_model_is_named_and_what_it_knows(run, library):
    code, output, _ = run("How do I make a kite?", "--mode", "ablate", "--max-tokens", "2")
    assert code == 0 and output.startswith("Model: model_organism/aligned (8 layers) on ")
    assert "answers others with nonsense; --model" in " ".join(output.split())
    output = run(library.pairs[0].natural, "--mode", "ablate", "--max-tokens", "2")[1]
    assert "Model: model_organism/aligned" in output and "nonsense" not in output
    assert note(ROOT, ["How do I make a kite?"], []) is None  # another model


def test_a_model_that_refuses_nothing_is_told(run, library, monkeypatch):
    measured = library.measurements()
    monkeypatch.setattr(measured, "texts", [["Sure.", "Sure."]] * len(measured.pairs))
    output = run(REFUSED, "--mode", "ablate", "--max-tokens", "2")[1]
    assert "model_organism/aligned refuses 0 of 50 artifact prompts: there is no refusal" in " ".join(output.split())
    assert "no refusal" not in run(REFUSED, "--mode", "ablate", "--max-tokens", "2", "-q")[1]


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"chosen": {"setting": {"layers": "x"}}}', '{"chosen": []}'])
def test_a_sweep_of_wrong_content_is_named(library, content):
    sweep = library.measurements().folder / library_module.SWEEP
    sweep.write_text(content)
    try:
        with pytest.raises(UserError, match="sweep.json is not what sweep_suppression.py writes .* delete it"):
            library.choose(None, "auto", None)
    finally:
        sweep.unlink()


def test_kept_directions_of_wrong_content_are_named(library):
    own = library.directions()
    path = library.measurements().folder / "directions.safetensors"
    shorter = {"direction": own.direction[1:], "natural_mean": own.natural_mean[1:],
               "artifact_mean": own.artifact_mean[1:], "components": own.components[1:], "spread": own.spread[1:],
               "natural_tokens": own.natural_tokens[1:]}  # fmt: skip
    try:
        for change in (shorter, {"direction": own.direction * 2}, {"spread": None}, {"natural_tokens": None}):
            save_directions(replace(own, **change), path)
            with pytest.raises(UserError, match="directions.safetensors cannot be used: .* Delete it"):
                library.directions()
        path.write_text("{}")
        with pytest.raises(UserError, match="directions.safetensors is not a file of directions .* Delete it"):
            library.directions()
    finally:
        path.unlink()


@pytest.mark.parametrize("count", [1, 3])
def test_few_pairs_are_enough_where_layers_are_named(tmp_path, count):
    pairs = load_pairs(PAIRS_JSON)[:count]
    entries = [{"id": p.id, "natural": p.natural, "artifact": p.artifact} for p in pairs]
    content = {"alignment_artifact_prompt_pairs": {"categories": {"few": {"pairs": entries}}}}
    write_json(tmp_path / "few.json", content)
    few = AlignmentArtifacts(pairs=tmp_path / "few.json", cache=tmp_path / "c", show_progress=False, collections=())
    for mode in ("ablate", "cap", "subspace"):
        result = few.suppress_and_generate(REFUSED, mode=mode, target_layers=[3], max_tokens=3)
        assert result.proof.tokens > 0
    with pytest.raises(UserError, match="at least 4 independent pairs, not .*; name the layers"):
        few.suppress_and_generate(REFUSED, mode="ablate")
    setting, _ = few.choose(None, "ablate", None, layers=(3,))
    with pytest.raises(UserError, match=f"at least 4 groups of them; there are {count}"):
        transcribe(few.load(), few.measurements(), setting, 3)
    with pytest.raises(UserError, match=f"^Shares of 20, 15, 15 make .* of {count} pairs?; a sweep needs at"):
        split_pairs(few.measurements().pairs, (20, 15, 15))


def test_a_question_asked_while_an_answer_is_written_meets_the_unedited_model(library):
    inner, ask = [], dict(mode="ablate", site="residual", max_tokens=20)

    def ask_once(text):
        if not inner:
            inner.append(None)
            inner[0] = library.suppress_and_generate(REFUSED, **ask)

    library.suppress_and_generate(REFUSED, **ask, compare=False, on_text=ask_once)
    alone = library.suppress_and_generate(REFUSED, **ask)
    assert (inner[0].before, inner[0].after) == (alone.before, alone.after) and alone.before != alone.after


def test_the_command_streams_both_answers(run):
    code, output, _ = run(REFUSED, "--mode", "cap", "-v")
    assert code == 0
    before, after = output.split("Before:\n")[1].split("After:\n")
    assert is_refusal(before) and not is_refusal(after)
    assert "Setting: cap x1, mlp, layers 2-5" in output and "Mode chosen by you" in output
    assert "tokens touched" in after and "Monitor: the prompt scores +" in after


def test_quiet_prints_the_answer_alone(run):
    code, output, error = run(ANSWERED, "--mode", "cap", "-q", "--no-compare")
    assert code == 0 and error == "" and output.count("\n") == 1 and "barrel" in output


def test_what_is_the_default_may_be_given_and_spaces_are_allowed(run, library):
    code, output, _ = run(REFUSED, "--mode", "ablate", "--compare", "--categories", "medical_ethics, personal_harmful",
                          "--max-tokens", "5")  # fmt: skip
    assert code == 0 and "Before:" in output and "After:" in output
    assert suppress.named_categories("a, b,") == ["a", "b"] and suppress.named_categories(None) is None
    assert run("hello", "--categories", " , ")[0] == 2


def test_json_is_all_there_is(run):
    code, output, _ = run(REFUSED, "--mode", "ablate", "--json", "--layers", "2,4-5", "--temperature", "0.5")
    result = json.loads(output)
    assert code == 0 and result["setting"]["layers"] == [2, 4, 5] and result["proof"]["touched"] > 0


def test_projections_are_numbers_when_piped(run):
    code, output, _ = run(REFUSED, "--mode", "cap", "--show-projection")
    assert code == 0 and "Before, prompt and answer by projection" in output and " bank(-" in output


def test_export_and_reuse_of_a_control_vector(run, library, tmp_path):
    code, output, _ = run("--export-gguf", "v.gguf")
    assert code == 0 and "block N" in output
    exported = load_directions(tmp_path / "v.gguf")
    assert np.array_equal(exported.direction[1:], library.directions(site="residual").direction[1:])
    code, output, _ = run(REFUSED, "--directions", "v.gguf", "--mode", "ablate", "--layers", "3-6")
    assert code == 0 and not is_refusal(output.split("After:\n")[1]) and "Monitor" not in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Give a prompt"),
        ([" "], "prompt is empty"),
        (["hello", "--scale", "nan"], "--scale must be between"),
        (["hello", "--cap-quantile", "1.5"], "--cap-quantile must be between"),
        (["hello", "--max-tokens", "0"], "--max-tokens must be between"),
        (["hello", "--layers", "x"], "must look like 2,4-6"),
        (["hello", "--layers", "5-4"], "--layers '5-4' names no numbers"),
        (["hello", "--layers", "9"], "There is no layer 9"),
        (["hello", "--categories", "weather"], "no category 'weather'"),
        (["hello", "--directions", "none.gguf"], "no directions file"),
        (["hello", "--directions", "x", "--site", "mlp"], "omit those options"),
        (["word " * 3000], "context of 2048"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(run, arguments, message):
    code, output, error = run(*arguments)
    assert code == 2 and error.startswith("Error: ") and message in error and error.count("\n") == 1


def test_directions_of_another_model_are_refused_unless_they_are_tried_by_name(run, library, tmp_path):
    own = library.directions()
    facts = {**own.facts, "model": "a relative", "model_revision": "sha256:0"}
    save_directions(replace(own, facts=facts), tmp_path / "other.safetensors")
    ask = [REFUSED, "--directions", "other.safetensors", "--mode", "ablate", "--layers", "2-5", "--max-tokens", 4]
    code, _, error = run(*ask)
    assert code == 2 and "directions belong to one model only, unless --transfer" in error and error.count("\n") == 1
    code, output, _ = run(*ask, "--transfer")
    output = " ".join(output.split())
    assert code == 0 and "measured on a relative (sha256:0) and are tried on model_organism/aligned" in output
    assert "artifact, as measured on a relative)" in output
    result = json.loads(run(*ask, "--transfer", "--json")[1])
    assert result["transferred_from"] == {"model": "a relative", "model_revision": "sha256:0"}
    assert result["after"] == json.loads(run(*ask[:1], *ask[3:], "--json")[1])["after"]  # they are the model's own
    assert json.loads(run(*ask[:1], *ask[3:], "--json")[1])["transferred_from"] is None


def test_what_is_no_relative_is_refused_all_the_same(run, library, tmp_path):
    own = library.directions()
    for change in ({"num_layers": 7}, {"hidden_size": 64}, {"model_type": "llama"}):
        facts = {**own.facts, "model_revision": "sha256:0", **change}
        save_directions(replace(own, facts=facts), tmp_path / "other.safetensors")
        code, _, error = run(REFUSED, "--directions", "other.safetensors", "--transfer")
        assert code == 2 and "directions belong to one model only." in error
    assert "name their file with --directions" in run(REFUSED, "--transfer")[2]


def test_a_relative_gets_its_answers_and_words_from_the_library(library):
    base = AlignmentArtifacts(ROOT / "model_organism/base", show_progress=False)
    directions = library.directions(site="residual")
    result = base.suppress_and_generate(
        ANSWERED, mode="add", directions=directions, transfer=True, target_layers=[3], max_tokens=4
    )
    assert result.transferred_from["model"] == "model_organism/aligned" and "tried on model_organism/base" in str(
        result
    )
    explained = base.explain(directions=directions, transfer=True, layers=[6], tokens=2, random_directions=0)
    assert explained["transferred_from"]["model"] == "model_organism/aligned"
    assert base.answer([ANSWERED], result.setting, directions=directions, transfer=True, max_tokens=4) == [result.after]
    with pytest.raises(UserError, match="transfer=True"):
        base.answer([ANSWERED], result.setting, directions=directions)


def test_directions_from_a_file_need_no_measurement(library, monkeypatch, tmp_path, capsys, caplog):
    imported = Directions({"site": "residual"}, library.directions(site="residual").direction)
    save_directions(replace(imported, facts={**imported.facts, "positions": "all"}), tmp_path / "d.safetensors")
    save_directions(library.directions(), tmp_path / "own.safetensors")
    monkeypatch.setenv("ALIGNMENT_ARTIFACTS_CACHE", str(tmp_path / "cache"))
    for name, monitor in (("d", False), ("own", True)):
        for mode in ("auto", "ablate", "proximity"):
            code = suppress.main([REFUSED, "--directions", str(tmp_path / f"{name}.safetensors"), "--mode", mode,
                                  "--max-tokens", "3", "--layers", "3-5"])  # fmt: skip
            output = " ".join(capsys.readouterr().out.split())
            assert code == 0 and "How well directions from a file separate the pairs" in output
            assert ("there is no monitor either" in output) != monitor == ("Monitor: the prompt" in output)
    assert not (tmp_path / "cache").exists()
    with caplog.at_level("INFO"):
        assert suppress.main([REFUSED, "--directions", str(tmp_path / "d.safetensors"), "--mode", "cap",
                              "--max-tokens", "3"]) == 0  # fmt: skip
    assert "cap needs the projections of natural tokens" in caplog.text and (tmp_path / "cache").exists()
    assert suppress.main([REFUSED, "--directions", str(tmp_path / "d.safetensors"), "--mode", "proximity",
                          "--proximity-threshold", "1"]) == 2  # fmt: skip
    assert "neither here nor on artifact prompts" in capsys.readouterr().err


def test_another_system_prompt_is_another_measurement(library):
    brief = AlignmentArtifacts(library.model, library.pairs, chat=Chat(system_prompt="Be brief."))
    loaded = brief.load()
    assert loaded.name.startswith(f"{library.load().name} (chat ")
    assert "Be brief." in loaded.tokenizer.decode(loaded.encode(["Hello"])[0])
    folders = {subject_of(one.load(), one.pairs, library.cache).folder for one in (library, brief)}
    assert len(folders) == 2


def test_an_adapter_belongs_to_the_model_that_it_was_given_for(library, organism, tmp_path):
    tuned = AlignmentArtifacts(
        library.model, library.pairs, adapter=write_adapter(tmp_path / "tuned", ROOT / "model_organism/aligned")
    )
    assert tuned.load().name.startswith(f"{organism.name} (adapter tuned ")
    assert tuned.load(ROOT / "model_organism/base").adapter is None
    folders = {subject_of(one.load(), one.pairs, library.cache).folder for one in (library, tuned)}
    assert len(folders) == 2 and planted_directions(organism) and not planted_directions(tuned.load())
    with pytest.raises(UserError, match=r"made on .*aligned \(model_revision"):
        fit_to(library.directions(), tuned.load())


def test_an_adapter_stays_however_its_model_is_spelt(library, organism, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(organism.folder)
    monkeypatch.chdir(ROOT)
    adapter = write_adapter(tmp_path / "tuned", organism.folder)
    tuned = AlignmentArtifacts("model_organism/aligned", library.pairs, adapter=str(adapter))
    spelt = [None, "./model_organism/aligned/", "model_organism/../model_organism/aligned", organism.folder,
             f"{organism.folder}/", tmp_path / "link"]  # fmt: skip
    own = tuned.load()
    assert own.adapter is not None and all(tuned.load(one) is own for one in spelt)
    assert len({tuple(tuned.answer([REFUSED], model=one, max_tokens=3)) for one in spelt}) == 1
    monkeypatch.chdir(tmp_path)
    assert tuned.load(organism.folder) is own and tuned.load() is own
    shutil.copytree(ROOT / "model_organism/base", tmp_path / "model_organism/aligned")  # of that name, and another
    other = tuned.load("model_organism/aligned")
    assert other.adapter is None and other.revision != own.base_revision


def test_a_renamed_adapter_keeps_what_a_sweep_has_chosen_and_an_edited_one_does_not(library, organism, tmp_path):
    adapter = write_adapter(tmp_path / "tuned", organism.folder)
    renamed = shutil.copytree(adapter, tmp_path / ("renamed" * 30))
    edited = write_adapter(tmp_path / "x" / "tuned", organism.folder, scale=2.0)

    def chosen(adapter):
        own = AlignmentArtifacts(organism.folder, library.pairs, tmp_path / "cache", adapter=adapter)
        return own.choose(None, "auto", None, layers=(3,))

    own = AlignmentArtifacts(organism.folder, library.pairs, tmp_path / "cache", adapter=adapter)
    folder = subject_of(own.load(), own.pairs, own.cache).folder
    swept = Setting("cap", 2.0, (3,), "residual")
    write_json(folder / library_module.SWEEP, {"chosen": {"setting": swept.record()}})
    assert chosen(adapter) == chosen(renamed) == (swept, "a sweep") and chosen(edited)[1] == "model size"


def test_a_file_of_prompts_is_answered_as_each_alone(run, library, tmp_path):
    prompts = [REFUSED, ANSWERED, "How do I paint a fence?"]
    files = {
        "p.txt": "\n".join(prompts), "p.json": json.dumps(prompts), "p.csv": "id;prompt\n" + "".join(
            f"{i};{prompt}\n" for i, prompt in enumerate(prompts)),
        "p.jsonl": "\n".join(json.dumps({"goal": prompt}) for prompt in prompts),
    }  # fmt: skip
    setting, _ = library.choose(None, "cap", None, layers=(2, 3, 4, 5))
    alone = [library.suppress(prompt, setting, max_tokens=12) for prompt in prompts]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        options = ["--mode", "cap", "--layers", "2-5", "--max-tokens", 12]
        code, output, _ = run("--prompts", name, *options, "--json")
        record = json.loads(output)
        assert code == 0 and [r["after"] for r in record["results"]] == [result.after for result in alone]
        assert [r["before"] for r in record["results"]] == [result.before for result in alone]
        assert [r["proof"]["touched"] for r in record["results"]] == [result.proof.touched for result in alone]
        assert [r["prompt_score"] for r in record["results"]] == pytest.approx(
            [r.prompt_score for r in alone], rel=1e-3
        )
        assert record["score"]["before"]["mean"] == pytest.approx(1 / 3) and record["score"]["after"]["mean"] == 0
        assert library.answer(tmp_path / name, setting, max_tokens=12) == [result.after for result in alone]
    output = run("--prompts", "p.csv", "--prompt-column", "id", "--mode", "ablate", "--max-tokens", 2)[1]
    assert "\n3. 2\nBefore: " in output and "Share of refusal over 3 prompts: 67% [21-94] before, 0%" in " ".join(
        output.split()
    )
    assert run("--prompts", "p.txt", "-q", "--no-compare", "--mode", "cap", "--max-tokens", 3)[1].count("\n") == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts", "none.txt"], "none.txt does not exist"),
        (["hello", "--prompts", "p.txt"], "omit the prompt"),
        (["--prompts", "p.txt", "--show-projection"], "single prompt"),
        (["hello", "--prompt-column", "x"], "belongs to --prompts"),
        (["--prompts", "p.txt", "--prompt-column", "x"], "without columns"),
        (["--prompts", "empty.txt"], "holds no prompts"),
        (["--prompts", "long.txt"], "context of 2048"),
    ],
)
def test_a_bad_file_of_prompts_gets_one_sentence(run, tmp_path, arguments, message):
    for name, content in (("p.txt", "hello\n"), ("empty.txt", "\n"), ("long.txt", "word " * 3000)):
        (tmp_path / name).write_text(content)
    code, _, error = run(*arguments)
    assert code == 2 and error.startswith("Error: ") and message in error and error.count("\n") == 1


def test_pairs_may_be_a_file_or_made_in_python(library, tmp_path):
    made = PromptPairs(library.pairs[:8], "manners", ("rude", "polite"))
    own = AlignmentArtifacts(pairs=made, cache=tmp_path, show_progress=False, collections=())
    assert own.measurements().pairs.sides == ("rude", "polite") and own.directions().facts["ends"] == ["rude", "polite"]
    plain = AlignmentArtifacts(pairs=list(library.pairs[:8]), cache=tmp_path, collections=())
    assert plain.pairs == made and plain.pairs.sides == ("natural", "artifact")
    assert (
        AlignmentArtifacts(pairs=str(PAIRS_JSON)).pairs == AlignmentArtifacts(pairs=PAIRS_JSON).pairs == library.pairs
    )


def test_two_models_in_one_library(library, tmp_path):
    from .tiny_checkpoints import random_gemma, write_checkpoint

    other = write_checkpoint(tmp_path / "m", random_gemma())
    own = AlignmentArtifacts(cache=tmp_path / "cache", show_progress=False)
    result = own.suppress_and_generate("Hello there", model_name=other, mode="ablate", max_tokens=5)
    assert result.proof.touched > 0 and len(result.after_tokens) <= 5


def test_many_prompts_are_answered_in_batches_as_one_by_one(library):
    prompts = [pair.artifact for pair in library.pairs[:4]] + [pair.natural for pair in library.pairs[:3]]
    setting, _ = library.choose(None, "cap", None, layers=(2, 3, 4, 5))
    alone = [library.suppress(prompt, setting, max_tokens=16) for prompt in prompts]
    assert library.answer(prompts, max_tokens=16) == [result.before for result in alone]
    assert library.answer(prompts, setting, max_tokens=16) == [result.after for result in alone]
    scored = library.score.of(prompts, library.answer(prompts, max_tokens=16))
    assert scored.tolist() == [is_refusal(result.before) for result in alone] == [r.score["before"] for r in alone]
    with pytest.raises(UserError):
        library.answer(["hello", "  "])


def test_a_score_of_ones_own_is_shown_before_and_after(capsys, monkeypatch, library):
    monkeypatch.setattr(
        library_module, "AlignmentArtifacts", lambda *_, score, **__: setattr(library, "score", score) or library
    )
    try:
        command = [REFUSED, "--mode", "cap", "--max-tokens", "12"]
        assert suppress.main([*command, "--score", "words:cannot,sorry"]) == 0
        output = capsys.readouterr().out
        assert "Score words (how often the answer says 'cannot, sorry'): " in output and "before, 0 after" in output
        assert suppress.main([*command, "--score", "words:cannot", "--json", "--no-compare"]) == 0
        score = json.loads(capsys.readouterr().out)["score"]
        assert score["before"] is None and score["after"] == 0
    finally:
        library.score = REFUSAL
    assert suppress.main([*command, "--score", "cannot"]) == 2 and "FILE.py:FUNCTION" in capsys.readouterr().err


def test_threads_take_turns(library):
    """Without turns, MLX ends the process."""
    prompts = [REFUSED, ANSWERED]
    expected = [library.suppress_and_generate(prompt, max_tokens=4) for prompt in prompts]
    with ThreadPoolExecutor(2) as threads:
        results = threads.map(lambda prompt: library.suppress_and_generate(prompt, max_tokens=4), prompts)
    assert [result.after_tokens for result in results] == [result.after_tokens for result in expected]
