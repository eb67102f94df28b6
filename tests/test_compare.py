"""Base against aligned organism, where the truth is known; and what cannot be compared."""

import json
import shlex
import shutil
from copy import deepcopy
from dataclasses import asdict, replace

import pytest

import compare_models as script
from alignment_artifacts.comparison.compare import check_comparable, compare, short_names, summarise
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs
from alignment_artifacts.report import contents, repeat
from alignment_artifacts.scores import Settings
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import load
from model_organism.train import PLANTED_LAYERS

from .conftest import ROOT
from .tiny_checkpoints import write_family

UNTOUCHED = (0, 1)
SAME_TOKENS = ("prompt_end", "answers_a", "answers_b", "neutral")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(result, printed, folder) of the script."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "RESULTS_DIR", str(folder / "results"))
        patch.setattr(script, "NUM_PERMUTATIONS", 499)
        patch.setenv("ALIGNMENT_ARTIFACTS_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        printed = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        assert script.main() == 0
    results = folder / "results/aligned/alignment_artifact_prompt_pairs"
    return json.loads((results / "data/model_comparison.json").read_text()), "\n".join(printed), results


def test_on_the_same_tokens_the_untouched_layers_differ_by_exactly_nothing(compared):
    for condition in SAME_TOKENS:
        layers = compared[0]["conditions"][condition]["layers"]
        for layer in UNTOUCHED:
            record = layers[layer]
            assert record["largest_change"] == 0 == record["difference"] and record["difference_ci"] == [0, 0]
            assert record["p_value"] == 1 and record["cosine"] == pytest.approx(1)
        assert all(record["largest_change"] > 0.1 for record in layers[2:])


def test_the_planted_layers_are_found(compared):
    layers = compared[0]["conditions"]["prompt_end"]["layers"]
    for layer in PLANTED_LAYERS:
        record = layers[layer]
        assert record["p_value"] <= 0.01 and record["difference_ci"][0] > 0.5
        assert record["d_b"] > record["d_a"] > record["a_on_b"] - 0.1
    assert max(range(8), key=lambda i: layers[i]["difference"]) in PLANTED_LAYERS


def test_the_change_of_direction_is_the_planted_one(compared):
    cosines = compared[0]["planted_truth"]
    assert list(map(int, cosines)) == sorted(PLANTED_LAYERS) and min(map(abs, cosines.values())) >= 0.95


def test_what_is_written_is_told_from_how_it_is_represented(compared):
    conditions = compared[0]["conditions"]
    free = [record["difference"] for record in conditions["own_answers"]["layers"]]
    forced = [record["difference"] for record in conditions["neutral"]["layers"]]
    assert min(free) > 2 > 1 > max(map(abs, forced))  # answers differ, also at layers that training left alone


def test_the_aligned_direction_knows_more_than_words(compared):
    result = compared[0]
    for learnt, tested in (("natural", "twin"), ("twin", "natural")):
        cell = f"{learnt}/artifact -> {tested}/artifact"
        d = {source: result["transfer"][source][cell]["cohens_d"] for source in ("a", "b", "words")}
        assert d["b"] > 2 and d["b"] > max(d["a"], d["words"]) + 0.5
        assert result["transfer"]["b"][cell]["beyond_words"]["difference_ci"][0] > 0
        assert f"word choice ({result['transfer']['words'][cell]['kind']})" in result["transfer_summary"]
    assert result["transfer_summary"].count("which words do not explain") == 2
    assert len(result["transfer"]["b"]) == 4 + 5


def test_the_weights_that_training_changed_are_the_planted_ones(compared):
    changes, printed = compared[0]["weights"], compared[1]
    assert changes["not_compared"] is None and changes["num_tensors"] > 100
    assert {(t["layer"], t["kind"]) for t in changes["tensors"]} == {
        (i, "mlp.down_proj.weight") for i in PLANTED_LAYERS
    }
    for tensor in changes["tensors"]:
        assert tensor["effective_rank"] == pytest.approx(1, abs=1e-3) and tensor["rank_99"] == 1
        assert abs(tensor["cosine_with_planted"]) > 0.999 and tensor["cosine_with_contrast"] > 0.9
        assert tensor["cosine_with_activations"] > 0.9 and len(tensor["direction"]) == 128
    assert "The weights: 4 of 106 tensors differ" in printed and "4 of 106 tensors differ, at layers 2-5" in printed
    moved = [record["relative_change"] for record in compared[0]["conditions"]["prompt_end"]["layers"]]
    assert max(moved[:2]) == 0 and min(moved[2:]) > 0.3


def test_the_terminal_and_the_figure(compared):
    result, printed, folder = compared
    assert [line for line in printed.splitlines() if len(line) > 80] == []
    assert "intervals are pointwise" in printed and "(pointwise, the largest of 8 layers; p = " in result["summary"]
    assert "B - A on generated tokens" in printed and "others -> medical_ethics" in printed
    for name in (f"{stem}.{ending}" for stem in ("model_comparison", "weight_changes") for ending in ("png", "pdf")):
        assert (folder / "figures" / name).stat().st_size > 10_000
    section = contents.comparison(folder / "data/model_comparison.json")
    assert section["layers"] == result["conditions"]["prompt_end"]["layers"]
    assert section["figures"]["transfer"]["data"][0]["z"][1] == [
        result["transfer"][source]["natural/artifact -> twin/artifact"]["cohens_d"] for source in ("a", "b", "words")
    ]


def test_what_is_not_defined_is_a_dash(compared, capsys):
    result = deepcopy(compared[0])
    result["conditions"]["prompt_end"]["layers"][3] |= {"p_value": None, "d_a": None, "difference_ci": [None, None]}
    script.print_tables(result)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("    3"))
    assert row.split()[1] == "-" and "[-, -]" in row and row.split()[6] == "-"


def test_models_that_cannot_be_compared_are_refused(organism, tmp_path):
    base, pairs = load(ROOT / "model_organism" / "base"), load_pairs(PAIRS_JSON)
    check_comparable(base, organism, pairs, pairs)
    with pytest.raises(UserError, match="same weights"):
        check_comparable(organism, organism, pairs, pairs)
    one_twin = [replace(pair, natural="Is it?") for pair in pairs]  # whose artifact prompts are those of all pairs
    with pytest.raises(UserError, match="at least 8 independent groups of pairs; there are 1"):
        check_comparable(base, organism, pairs, one_twin)
    five = [replace(pair, block=f"g{i % 5}") for i, pair in enumerate(pairs)]
    with pytest.raises(UserError, match="at least 8 independent groups of pairs; there are 5"):
        check_comparable(base, organism, five, [])
    with pytest.raises(UserError, match="has 7 layers"):
        check_comparable(replace(base, num_layers=7), organism, pairs, pairs)
    with pytest.raises(UserError, match="has 64 hidden dimensions"):
        check_comparable(replace(base, hidden_size=64), organism, pairs, pairs)

    class OtherTokenizer:
        def get_vocab(self):
            return {**organism.tokenizer.get_vocab(), "new": 99}

    with pytest.raises(UserError, match=r"tokenizers of .* differ \(1 entries\)"):
        check_comparable(replace(base, tokenizer=OtherTokenizer()), organism, pairs, pairs)


def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path):
    for name in ("MODEL_A", "MODEL_B", "PAIRS_JSON"):
        monkeypatch.setattr(script, name, str(ROOT / getattr(script, name)))
    write_family(tmp_path / "llama", "llama")
    few = {"benign_twins": {"categories": {"a": {"pairs": [{"id": "1", "twin": "x", "artifact": "y"}]}}}}
    (tmp_path / "few.json").write_text(json.dumps(few))
    for name, value, message in (
        ("TWINS", "/nowhere.json", "does not exist"),
        ("TWINS", str(tmp_path / "few.json"), "at least 8 twins; there are 1"),
        ("MODEL_A", str(tmp_path / "llama"), "only models of one shape"),
        ("SITE", "attention", "SITE must be one of"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(script, name, value)
            assert script.main() == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_no_pair_left_to_read_is_one_sentence(organism):
    base, pairs = load(ROOT / "model_organism" / "base"), load_pairs(PAIRS_JSON)[:10]
    with pytest.raises(UserError, match="Only 0 of 10 pairs have text to read under the condition 'answers_a'"):
        compare([base, organism], pairs, pairs, "Thanks.", 3, "mlp", Settings(permutations=1, resamples=10), known=(
            lambda prompt, tokens: [], lambda prompt, tokens: [5]))  # fmt: skip


def test_a_comparison_without_a_difference_says_so():
    record = {"p_value": 0.4, "largest_change": 0.5}
    text = summarise([record, {**record, "largest_change": 0}], ("x", "y"))
    rest = "no better or worse than x at any layer. At layer 1 they are identical."
    assert text == f"On the same tokens y separates artifact from natural prompts {rest}"


def test_the_command_on_the_page_asks_for_the_same_comparison(compared, monkeypatch):
    """Whatever is set on top of the script or in the environment."""
    asked = []
    monkeypatch.setattr(script, "run", asked.append)
    monkeypatch.setattr(script, "NUM_PERMUTATIONS", 499)
    monkeypatch.chdir(ROOT)
    options = ["--model-a", "./model_organism/base/", "--adapter-b", "who/adapter", "--neutral-text", "It's 'so'.",
               "--twins", "model_organism/benign_twins.json", "--system-prompt", "Be brief."]  # fmt: skip
    assert script.main() == script.main([*options, "--seed", "3"]) == 0
    for constants, result in zip(asked[:2], (compared[0], None), strict=True):
        named = {name: getattr(constants, name) for name in ("site", "max_tokens", "neutral_text")}
        typed, config = script.typed(constants), {**named, **asdict(constants.statistics)}
        if result:
            assert (typed, config) == (result["typed"], {name: result["config"][name] for name in config})
        nothing = {"available": False}
        section = {"available": True, "repeat": {"typed": typed, "config": config}}
        sections = {"analysis": nothing, "comparison": section, "vocabulary": nothing}
        first, _ = repeat.commands(repeat.Experiment(), sections, {"transcripts": [], "sweep": []})
        python, name, *options = shlex.split(first)
        with monkeypatch.context() as patch:
            patch.setattr(script, "NUM_PERMUTATIONS", 1000)  # as published
            assert (python, name, script.main(options)) == ("python", "compare_models.py", 0)
        again = asked.pop()
        assert script.typed(again) == typed and again.statistics == constants.statistics
        assert {name: getattr(again, name) for name in named} == named


def test_a_comparison_with_another_first_model_is_kept(compared, tmp_path):
    shutil.copytree(compared[2], tmp_path / "copy")
    names = sorted(path.name for path in (tmp_path / "copy").glob("*/*"))
    revision = compared[0]["models"]["a"]["model_revision"]
    script.keep_earlier(tmp_path / "copy", revision)
    assert sorted(path.name for path in (tmp_path / "copy").glob("*/*")) == names
    script.keep_earlier(tmp_path / "copy", "sha256:another")
    kept = sorted(path.name for path in (tmp_path / "copy").glob("*/*"))
    assert len(kept) == 5 and all("_with_base_" in name for name in kept)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"models": []}', '{"models": {"a": {}}}', ""])
def test_what_is_no_comparison_is_refused_before_the_work(content, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script.places, "results_folder", lambda *_: tmp_path)
    monkeypatch.setattr("alignment_artifacts.directions.measurements.measure", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model_comparison.json").write_text(content)
    assert script.main() == 2
    error = capsys.readouterr().err
    assert "model_comparison.json is not" in error and error.count("\n") == 1


def test_models_are_told_by_the_last_part_of_their_names_where_it_tells_them_apart():
    assert short_names("some/where/base", "else/where/aligned") == ("base", "aligned")
    assert short_names("a/m.gguf", "a/m.gguf (adapter x 12)") == ("m.gguf", "m.gguf (adapter x 12)")
    assert short_names("a/model", "b/model") == ("a/model", "b/model")
