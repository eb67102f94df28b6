"""A collection in a notebook: arrays, a table, figures."""

import sys

import plotly.graph_objects as go
import pytest

from alignment_artifacts.analysis import Run, load_run
from alignment_artifacts.pairs import Pair, PromptPairs, prompt_groups
from gemma_refactored.errors import UserError
from gemma_refactored.files import write_json
from gemma_refactored.model_loading import load

from .test_analysis import SETTINGS, simulate
from .test_architectures import PAIRS
from .test_measurements import collect
from .tiny_checkpoints import random_gemma, write_checkpoint


@pytest.fixture(scope="module")
def run():
    return Run(simulate(effect=3.0, pairs=20), SETTINGS)


def test_scores_are_a_table(run):
    frame = run.to_dataframe()
    assert len(frame) == 2 * 4 and list(frame.columns[:3]) == ["layer", "positions", "cohens_d"]
    best = frame.set_index(["positions", "layer"]).loc[("prompt_end", 2)]
    assert best.cohens_d == run.results["layer_scores_prompt_end"]["2"]["cohens_d"]
    assert frame.to_dict("records")[0].keys() == run.scores[0].keys()


def test_without_generated_tokens_no_row_claims_to_be_of_them():
    alone = Run(simulate(effect=3.0, pairs=20, steps=1), SETTINGS)
    assert [(row["layer"], row["positions"]) for row in alone.scores] == [(i, "prompt_end") for i in range(4)]
    names = [trace.name for trace in alone.figures()["layer_scores"].data]
    assert "prompt end" in names and "generated tokens" not in names


def test_pairs_may_be_made_in_python(tmp_path):
    collection = collect(load(write_checkpoint(tmp_path / "model", random_gemma())), tmp_path)
    made = PromptPairs(PAIRS, "discretion", ("open", "secret"))
    run = load_run(str(collection), made)
    assert run.data.pairs == made and run.data.pairs.sides == made.sides
    assert load_run(collection, PAIRS).data.pairs == PAIRS


def test_without_pandas_there_are_plain_rows(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [row["layer"] for row in run.scores] == [0, 1, 2, 3] * 2
    with pytest.raises(ImportError, match="pandas"):
        run.to_dataframe()


def test_figures_are_objects(run):
    figures = run.figures()
    assert list(figures) == ["layer_scores", "categories", "steps", "projections"]
    assert all(isinstance(figure, go.Figure) and figure.data for figure in figures.values())


def test_results_are_computed_once(run):
    assert run.results is run.results and run.projections is run.projections


def test_no_collection_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="bash collect_activations.sh"):
        load_run(tmp_path / "none")


def test_a_collection_of_other_pairs_asks_for_their_file(tmp_path):
    own = PromptPairs([Pair(f"q{i}", "facts", f"Is {i} even?", f"I say {i} is even. Is it?") for i in range(4)])
    write_json(tmp_path / "manifest.json", {"model": "m", "prompt_groups": prompt_groups(own)})
    with pytest.raises(UserError, match=r"other prompts \(the first is 'Is 0 even\?'\).* name that \(pairs= in Python"):
        load_run(tmp_path)
