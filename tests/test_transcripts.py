"""Transcripts of the organism: what is said, how tokens score, and that no pair meets its own direction."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import suppress as script
from alignment_artifacts.behaviour.score import REFUSAL, Score, word_list
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.edits.modes import ModeOptions
from alignment_artifacts.edits.setting import Setting
from alignment_artifacts.pairs import SIDES, PromptPairs
from alignment_artifacts.rates import rate
from alignment_artifacts.report import contents
from alignment_artifacts.suppression import library as library_module
from alignment_artifacts.suppression import transcripts
from gemma_refactored.errors import UserError
from model_organism.train import PLANTED_LAYERS

CAP = Setting("cap", 1.0, tuple(PLANTED_LAYERS))


@pytest.fixture(scope="module")
def transcribed(library):
    done = []
    result, scores = transcripts.transcribe(library.load(), library.measurements(), CAP, 20, done.append)
    assert sum(done) == 100
    return result, scores


def test_refusals_go_and_natural_answers_stay(transcribed):
    result, _ = transcribed
    assert result["refused"]["artifact"]["before"]["rate"] >= 0.9
    assert result["refused"]["artifact"]["after"]["rate"] <= 0.05
    same = [pair["natural"]["before"]["tokens"] == pair["natural"]["after"]["tokens"] for pair in result["pairs"]]
    assert np.mean(same) >= 0.9
    assert result["best_layer"] in PLANTED_LAYERS
    effect, pairs = result["effect_on_artifact_prompts"], [pair["artifact"] for pair in result["pairs"]]
    read = sum(len(pair["prompt_tokens"]) + len(pair["before"]["tokens"]) for pair in pairs)
    assert effect["touched"] > 0 and effect["tokens"] == pytest.approx(read, rel=0.1)  # of all folds, not of one


def test_pairs_that_depend_on_each_other_share_a_fold(library, monkeypatch):
    measured = library.measurements()
    pairs = PromptPairs([replace(pair, block=f"g{i // 10}") for i, pair in enumerate(measured.pairs)])
    grouped, learnt = replace(measured, pairs=pairs), []
    real = transcripts._directions

    def noted(loaded, measured, setting, training):
        learnt.append({i // 10 for i in training})
        return real(loaded, measured, setting, training)

    monkeypatch.setattr(transcripts, "_directions", noted)
    transcripts.transcribe(library.load(), grouped, CAP, 5)
    assert sum(5 - len(groups) for groups in learnt) == 5  # each group is left out once, whole
    one = replace(measured, pairs=PromptPairs([replace(pair, block="all") for pair in measured.pairs]))
    with pytest.raises(UserError, match="independent of it, which takes at least 4 groups of them; there are 1"):
        transcripts.transcribe(library.load(), one, CAP, 5)


def test_a_score_of_true_and_false_is_told_as_a_rate(library):
    score = Score("sorry", lambda prompt, answer: "sorry" in answer.lower(), "", "sorry")
    result, _ = transcripts.transcribe(library.load(), library.measurements(), CAP, 20, score=score)
    for side in SIDES:
        for when in ("before", "after"):
            said = [pair[side][when]["score"] for pair in result["pairs"]]
            assert all(isinstance(value, bool) for value in said)
            assert result["scored"][side][when]["ci"] == rate(said)["ci"]


def test_answers_that_are_thoughts_only_are_not_judged(library, monkeypatch):
    loaded, first = library.load(), []

    def without_the_first(written):
        first.append(written) if not first else None
        return None if written == first[0] else loaded.tokenizer.decode(written, skip_special_tokens=True)

    monkeypatch.setattr(loaded, "answer_text", without_the_first)
    result, _ = transcripts.transcribe(loaded, library.measurements(), CAP, 20)
    judged = [
        all(pair["natural"][when]["refused"] is not None for when in ("before", "after")) for pair in result["pairs"]
    ]
    assert not all(judged) and result["refused"]["natural"]["before"]["n"] == sum(judged)


def test_every_token_has_a_score_in_order(transcribed, library):
    result, scores = transcribed
    measured, at = library.measurements(), 0
    ends = {side: [] for side in SIDES}
    for pair, (natural, artifact) in zip(result["pairs"], measured.prompts, strict=True):
        for side, prompt in zip(SIDES, (natural, artifact), strict=True):
            assert pair[side]["prompt_tokens"] == prompt
            ends[side].append(scores[at + len(prompt) - 1])
            for when in ("before", "after"):
                pieces = "".join(result["pieces"][str(token)] for token in pair[side][when]["tokens"])
                assert pieces.replace("<end_of_turn>", "").strip() == pair[side][when]["text"].strip()
            at += len(prompt) + len(pair[side]["before"]["tokens"]) + len(pair[side]["after"]["tokens"])
    assert scores.shape == (at, 8) and scores.dtype == np.float16
    # At the prompt's end, held out, classes lie around -1 and +1 at the planted layers.
    for layer in PLANTED_LAYERS:
        assert np.mean(ends["natural"], axis=0)[layer] == pytest.approx(-1, abs=0.25)
        assert np.mean(ends["artifact"], axis=0)[layer] == pytest.approx(1, abs=0.25)


def test_directions_come_from_other_pairs(library, monkeypatch):
    used = []
    original = Measurements.estimate

    def estimate(self, site, positions, rows):
        used.append(set(rows.tolist()))
        return original(self, site, positions, rows)

    answered = []
    monkeypatch.setattr(Measurements, "estimate", estimate)
    monkeypatch.setattr(transcripts, "write_answers", lambda loaded, prompts, *_: answered.append(prompts) or prompts)
    measured = library.measurements()
    transcripts.transcribe(library.load(), measured, Setting("ablate", 1.0, (3,)), 5)
    place = {tuple(prompt): i for i, two in enumerate(measured.prompts) for prompt in two}
    assert len(used) == 5
    for training, prompts in zip(used, answered, strict=True):
        held_out = {place[tuple(prompt)] for prompt in prompts}
        assert not held_out & training and len(held_out | training) == 50


def test_a_setting_that_changes_nothing_is_refused(library):
    nothing = Setting("proximity", 1.0, (0,), options=ModeOptions(proximity_threshold=1.0))
    with pytest.raises(UserError, match="changes nothing"):
        transcripts.transcribe(library.load(), library.measurements(), nothing, 5)


@pytest.fixture
def run(library, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(library_module, "AlignmentArtifacts", lambda *_, **__: library)
    monkeypatch.setattr(script, "TRANSCRIPTS_DIR", tmp_path / "results")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = script.main(list(arguments))
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_what_the_report_reads(run, tmp_path):
    code, output, error = run("--all-pairs", "--mode", "ablate", "--layers", "2-5", "--max-tokens", "10")
    assert code == 0 and error.startswith("answering: 100 pairs, about ")
    assert all(len(line) <= 80 for line in output.splitlines())
    assert "Refused, artifact prompts: 96% before, 0% after" in output
    path = tmp_path / "results/aligned/alignment_artifact_prompt_pairs/data/transcripts.json"
    section = contents.transcripts(path)
    assert section["setting"].startswith("ablate x1, mlp, layers 2-5") and section["chosen_by"] == "you"
    assert section["layers"] == list(range(8)) and section["pairs"] == 50
    code, output, _ = run("--all-pairs", "--mode", "ablate", "--layers", "3", "--max-tokens", "5", "--json")
    assert code == 0 and json.loads(output)["artifact"]["before"]["n"] == 50


@pytest.mark.parametrize(
    "arguments",
    [("hello",), ("--temperature", "1"), ("--categories", "x"), ("--directions", "x.gguf"), ("--seed", "7")],
)
def test_options_that_make_no_sense_together_are_refused(run, arguments):
    code, _, error = run("--all-pairs", *arguments)
    assert code == 2 and "--all-pairs answers the prompt pairs" in error and error.count("\n") == 1


def test_a_score_takes_the_place_of_refusals(run, tmp_path, library):
    library.score = word_list(["sorry", "cannot"])
    try:
        options = ("--all-pairs", "--mode", "ablate", "--layers", "2-5", "--max-tokens", "10")
        code, output, _ = run(*options, "--score", "words:sorry,cannot")
        assert code == 0 and "Mean of words, artifact prompts: 0." in output and "efused" not in output
        assert max(map(len, output.splitlines()[:-1])) <= 80
        assert run(*options, "--score", "words:sorry,cannot", "--json")[0] == 0
    finally:
        library.score = REFUSAL
    (path,) = (tmp_path / "results/aligned/alignment_artifact_prompt_pairs/data").glob("*.json")
    result = json.loads(path.read_text())
    assert path.name.startswith("transcripts_words_") and path.with_suffix(".npz").exists() and "refused" not in result
    artifact, pairs = result["scored"]["artifact"], result["pairs"]
    for when in ("before", "after"):
        counted = [len(re.findall(r"\b(sorry|cannot)\b", pair["artifact"][when]["text"].lower())) for pair in pairs]
        assert [pair["artifact"][when]["score"] for pair in pairs] == counted
        assert artifact[when]["mean"] == pytest.approx(np.mean(counted)) and artifact[when]["n"] == 50
    assert artifact["moved"]["mean"] == pytest.approx(artifact["after"]["mean"] - artifact["before"]["mean"])
    assert artifact["moved"]["ci"][1] < 0 and result["score"]["name"] == "words"
