"""What directions say, against the organism's refusals and against NumPy."""

import json
import re

import numpy as np
import pytest

import suppress
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.behaviour.vocabulary import explain, lens
from alignment_artifacts.directions.files import save_directions
from alignment_artifacts.suppression import library as library_module
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import load

from .tiny_checkpoints import write_family

OPENINGS = ["I", "Sorry"]  # the first words of the organism's refusals


@pytest.fixture(scope="module")
def explained(library):
    result = library.explain(random_directions=5)
    return {record["layer"]: record for record in result["layers"]}


def leading(records: list[dict]) -> list[str]:
    return [record["token"] for record in records[: len(OPENINGS)]]


def test_refusals_begin_with_what_the_direction_promotes_in_late_layers(explained, library):
    refused = [texts[1] for texts in library.measurements().texts if is_refusal(texts[1])]
    assert {re.match(r"\w+", text).group() for text in refused} == set(OPENINGS)
    for layer in (5, 6, 7):
        assert leading(explained[layer]["promoted"]) == OPENINGS and explained[layer]["agreement"] > 0.9
    # The lens omits the blocks that follow: at early layers it does not see what they make of the direction.
    for layer in (2, 3):
        assert not set(OPENINGS) & set(leading(explained[layer]["promoted"])) and explained[layer]["agreement"] < 0.9
    assert all(set(leading(record["steered"])) == set(OPENINGS) for record in explained.values())


def test_random_directions_never_say_it(explained):
    for record in explained.values():
        assert len(record["random"]) == 5
        for drawn in record["random"]:
            assert not set(OPENINGS) & set(leading(drawn["promoted"]))
            assert drawn["steered"][0]["steered"] < 0.9 * record["steered"][1]["steered"]


def test_demoted_is_promoted_by_the_opposite(library):
    directions = library.measurements().estimate("residual", "prompt_end", np.arange(50))
    prompts = [sides[0] for sides in library.measurements().prompts]
    one = explain(library.load(), directions, prompts, [6], random_directions=0)["layers"][0]
    directions.direction = -directions.direction
    other = explain(library.load(), directions, prompts, [6], random_directions=0)["layers"][0]
    assert [r["id"] for r in one["demoted"]] == [r["id"] for r in other["promoted"]]
    assert one["promoted"][0]["lens"] == pytest.approx(-other["demoted"][0]["lens"], rel=1e-4)


def test_the_lens_is_norm_and_unembedding(organism):
    vector = np.random.default_rng(0).standard_normal((3, organism.hidden_size))
    vector /= np.linalg.norm(vector, axis=1, keepdims=True)
    decoder = organism.model.model
    weight, table = np.array(decoder.norm.weight, np.float64), np.array(decoder.embed_tokens.weight, np.float64)
    normed = vector / np.sqrt((vector**2).mean(axis=1, keepdims=True)) * (1 + weight)
    expected = normed @ table.T
    np.testing.assert_allclose(lens(organism, vector), expected - expected.mean(axis=1, keepdims=True), atol=2e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_norms_with_a_bias_and_other_heads_have_a_lens_too(family, tmp_path):
    loaded = load(write_family(tmp_path / family, family))
    vectors = np.eye(loaded.hidden_size)[:4]
    upwards, downwards = lens(loaded, vectors), lens(loaded, -vectors)
    np.testing.assert_allclose(upwards, -downwards, rtol=1e-4, atol=1e-5)
    assert np.abs(upwards).max(axis=1).min() > 0


def test_other_sites_and_layers_are_refused(library):
    measured = library.measurements()
    directions, prompts = measured.estimate("mlp", "prompt_end", np.arange(50)), measured.prompts[0]
    with pytest.raises(UserError, match="site mlp"):
        explain(library.load(), directions, prompts)
    with pytest.raises(UserError, match="no direction for layer 8"):
        library.explain(layers=[8])


@pytest.fixture
def run(library, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(library_module, "AlignmentArtifacts", lambda *_, **__: library)
    monkeypatch.setattr(suppress, "TRANSCRIPTS_DIR", tmp_path / "results")

    def call(*arguments):
        code = suppress.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_the_command_prints_a_table_and_keeps_the_numbers(run, tmp_path):
    code, out, _ = run("--explain")
    assert code == 0 and max(map(len, out.splitlines()[:-1])) <= 80  # but the path
    assert "layer 7   promotes   'I'  'Sorry'" in out and out.count("random ") == 8
    path = tmp_path / "results/aligned/alignment_artifact_prompt_pairs/data/vocabulary.json"
    result = json.loads(path.read_text())
    assert [record["layer"] for record in result["layers"]] == list(range(8)) and "origin" in result


def test_directions_of_a_file_are_explained_and_not_kept(run, library, tmp_path):
    measured = library.measurements()
    save_directions(measured.estimate("residual", "generated", np.arange(50)), tmp_path / "d.safetensors")
    code, out, _ = run("--explain", "--directions", tmp_path / "d.safetensors", "--json", "--layers", "6")
    assert code == 0 and json.loads(out)["positions"] == "generated" and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [(["Hello"], "omit the prompt"), (["--all-pairs"], "omit the prompt"), (["--site", "mlp"], "omit --site"),
     (["--mode", "cap"], "--mode"), (["--max-tokens", "3"], "--max-tokens"), (["--cap-quantile", "0.5"], "--cap-quan")],
)  # fmt: skip
def test_options_without_a_meaning_are_refused(run, arguments, message):
    code, _, err = run("--explain", *arguments)
    assert code == 2 and message in err
