"""The whole pipeline on a model that thinks before it answers."""

import numpy as np
import pytest

from alignment_artifacts import AlignmentArtifacts, places
from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.analysis import Settings, analyse
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.figures import paper
from alignment_artifacts.pairs import load_pairs, prompt_groups, texts
from alignment_artifacts.report import contents
from alignment_artifacts.suppression.transcripts import transcribe
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_json, write_json
from gemma_refactored.main import main

from .test_analysis_script import few_pairs
from .thinking_organism import CLOSES, THOUGHT_TOKENS, thinking_organism

SETTINGS = Settings(permutations=99, resamples=100)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The model, and a library on few pairs."""
    folder = tmp_path_factory.mktemp("thinker")
    write_json(folder / "pairs.json", few_pairs())
    pairs = load_pairs(folder / "pairs.json")
    loaded = thinking_organism(folder / "model", texts(pairs))
    library = AlignmentArtifacts(loaded.folder, pairs, folder / "cache", show_progress=False, collections=())
    return loaded, library


def collect(loaded, pairs, folder, max_tokens):
    write_json(folder / "prompts.json", prompt_groups(pairs))
    common = ["--model", str(loaded.folder), "--prompts-file", str(folder / "prompts.json"), "--process-by-group"]
    saving = ["--save-activations", "--activations-dir", str(folder / "acts"), "--output-dir", str(folder / "out")]
    assert main([*common, *saving, "--max-tokens", str(max_tokens)]) == 0
    return load_activation_set(folder / "acts", pairs)


def test_collection_analysis_and_measurement_of_answers(thinker, tmp_path):
    loaded, library = thinker
    assert loaded.thought_marks.is_open and loaded.thought_marks.closes == CLOSES.strip()
    data = collect(loaded, library.pairs, tmp_path, 20)
    assert (data.thoughts == THOUGHT_TOKENS).all()
    result = analyse(data, SETTINGS, {})
    assert result["thoughts"] == {"pairs": 20, "answered": 20} and "after the thought" in result["summary"]
    assert max(record["cohens_d"] for record in result["layer_scores_answer"].values()) > 1
    paper.plot_layer_scores(result, tmp_path / "plot.png")
    origin = places.Origin.of_model(loaded.facts(), library.pairs_file, library.pairs, "mlp")
    write_json(tmp_path / "result.json", origin.stamp({**result, "certificate": "none"}))
    section = contents.analysis(tmp_path / "result.json")
    assert list(section["panels"]) == ["generated tokens", "prompt end", "answer after the thought"]
    measured = library.measurements()
    for positions in ("answer", "answer_start", "generated"):
        expected = data.prompt_vectors(positions)
        np.testing.assert_allclose(measured.vectors_at("mlp", positions), expected, rtol=1e-3, atol=1e-3)
    assert not np.array_equal(data.prompt_vectors("answer"), data.prompt_vectors("generated"))


def test_a_budget_that_ends_inside_the_thought_is_counted(thinker, tmp_path, caplog):
    loaded, library = thinker
    data = collect(loaded, library.pairs, tmp_path, THOUGHT_TOKENS - 3)
    assert "40 of 40 answers end inside the model's thought" in caplog.text
    assert (data.thoughts == -1).all() and not data.mask("answer").any() and not data.mask("answer_start").any()
    assert read_json(tmp_path / "out" / "summary.json", "summary")["in_thought"] == 40
    result = analyse(data, SETTINGS, {})
    assert "layer_scores_answer" not in result and "20 of 20 pairs" in result["summary"]


def test_suppression_and_transcripts_judge_the_answer(thinker):
    loaded, library = thinker
    refused, asked = library.refusals()
    assert asked == 20 and refused >= 10
    setting = Setting("ablate", 1.0, (2, 3, 4, 5), "residual", "answer_start")
    record, _ = transcribe(loaded, library.measurements(), setting, 20)
    before, after = (record["refused"]["artifact"][when] for when in ("before", "after"))
    assert before["hits"] == refused and after["hits"] < before["hits"] and record["judge"]
    assert record["refused_corrected"]["natural"]["before"][0] == 0
    assert CLOSES.strip() not in library.answer([library.pairs[0].natural], max_tokens=12)[0]


def test_measuring_answers_that_do_not_come_is_refused(thinker, monkeypatch, tmp_path):
    loaded, library = thinker
    for module in ("directions.measurements", "suppression.library"):
        monkeypatch.setattr(f"alignment_artifacts.{module}.COLLECTED_TOKENS", 3)
    short = AlignmentArtifacts(loaded.folder, library.pairs, tmp_path, show_progress=False, collections=())
    assert np.isfinite(short.measurements().vectors_at("mlp", "generated")).all()
    with pytest.raises(UserError, match="40 of 40 answers have not left the model's thought after 3 tokens"):
        short.measurements().vectors_at("mlp", "answer")
