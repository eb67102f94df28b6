"""The analysis on simulated collections: every record, and what the sentence says."""

import json

import numpy as np
import pytest

from alignment_artifacts.activation_set import ActivationSet
from alignment_artifacts.analysis import (
    Settings,
    analyse,
    analyse_categories,
    analyse_layers_and_steps,
    project_prompts,
)
from alignment_artifacts.figures import paper
from alignment_artifacts.pairs import Pair, PromptPairs
from gemma_refactored.files import jsonable

SETTINGS = Settings(permutations=199, resamples=200)
RECORD = {
    "cohens_d", "cohens_d_ci", "accuracy", "accuracy_ci", "auroc", "p_value", "null_95", "cohens_d_in_sample",
    "mean_shift_ratio", "direction_norm", "mean_separation_on_axis", "num_natural_samples", "num_artifact_samples",
    "num_pairs", "pair_accuracy", "auroc_ci", "p_floor", "num_groups",
}  # fmt: skip


def simulate(effect, lexical=0.0, pairs=50, steps=6, layers=4, hidden=16, seed=0):
    """`effect` is added to artifact prompts along axis 0 of layer 2; steps of a prompt are correlated."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(pairs, 2, 1, layers, hidden)) + rng.normal(size=(pairs, 2, steps, layers, hidden)) * 0.5
    values[:, 1, :, 2, 0] += effect
    valid = np.ones((pairs, 2, steps), bool)
    valid[3, 0, 4:] = False
    embeddings = rng.normal(size=(pairs, 2, hidden))
    embeddings[:, 1, 0] += lexical
    names = [Pair(f"p_{i}", f"category_{i % 5}", f"n{i}", f"a{i}") for i in range(pairs)]
    data = values.astype(np.float32) * valid[..., None, None]
    return ActivationSet(PromptPairs(names), data, valid, embeddings.astype(np.float32), [], {"model": "simulated"})


def test_the_result_has_every_record_and_finds_the_layer():
    data = simulate(effect=3.0)
    result = analyse(data, SETTINGS, {"NUM_LAYERS": 4})
    json.dumps(result, allow_nan=False)
    assert set(result) >= {
        "layer_scores", "layer_scores_prompt_end", "lexical_baseline", "top_layers_by_cohens_d", "excluded", "config",
        "collection",
    }  # fmt: skip
    for scores in (result["layer_scores"], result["layer_scores_prompt_end"]):
        assert list(scores) == ["0", "1", "2", "3"] and all(set(r) == RECORD for r in scores.values())
    record = result["layer_scores"]["2"]
    assert result["top_layers_by_cohens_d"][0] == 2 and record["p_value"] == 1 / 200
    assert record["cohens_d_ci"][0] < record["cohens_d"] < record["cohens_d_ci"][1]
    assert result["best_layer_nested"]["layer_chosen_in_each_fold"] == [2] * 5
    assert (record["num_natural_samples"], record["num_artifact_samples"], record["num_pairs"]) == (5 * 50 - 2, 250, 50)
    assert result["layer_scores_prompt_end"]["2"]["num_natural_samples"] == 50
    direction = data.prompt_vectors("generated")[:, :, 2].mean(axis=0)
    assert record["direction_norm"] == pytest.approx(np.linalg.norm(direction[1] - direction[0]), rel=1e-5)
    nested = result["best_layer_nested"]
    low, high = nested["cohens_d_ci"]
    assert f"d = {nested['cohens_d']:.1f} [{low:.1f}, {high:.1f}]" in result["summary"]
    assert "separated at 1 of 4 layers" in result["summary"] and "Words alone give" in result["summary"]
    assert all(r["p_value"] > 0.05 for name, r in result["layer_scores"].items() if name != "2")


def test_noise_is_called_chance():
    result = analyse(simulate(effect=0.0, seed=1), SETTINGS, {})
    assert "no layer separates" in result["summary"]


def test_words_that_separate_as_well_are_named():
    result = analyse(simulate(effect=1.5, lexical=3.0), SETTINGS, {})
    assert "no evidence of anything but words" in result["summary"]


def test_prompts_collected_without_answers_are_analysed_at_the_prompt_end():
    result = analyse(simulate(effect=3.0, steps=1), SETTINGS, {})
    assert result["layer_scores"] == result["layer_scores_prompt_end"]


def test_categories_and_steps():
    data = simulate(effect=4.0)
    categories = analyse_categories(data, SETTINGS)["categories"]
    assert len(categories) == 5 and all(c["layer_scores"]["2"]["num_pairs"] == 10 for c in categories.values())
    pattern = analyse_layers_and_steps(data, analyse(data, SETTINGS, {}), SETTINGS)
    assert (pattern["first_significant_layer"], pattern["peak_layer"], pattern["significant_layers"]) == (2, 2, [2])
    assert [s["step"] for s in pattern["steps"]] == ["prefill", 0, 1, 2, 3, 4]
    assert [s["num_pairs"] for s in pattern["steps"]] == [50, 50, 50, 50, 49, 49]
    assert all(np.argmax(s["cohens_d"]) == 2 for s in pattern["steps"])


def test_prompts_in_two_dimensions_agree_with_the_accuracy():
    data = simulate(effect=2.0)
    result, projected = analyse(data, SETTINGS, {}), project_prompts(data, SETTINGS)
    assert projected["pairs"][3] == {
        "id": "p_3",
        "category": "category_3",
        "natural": "n3",
        "artifact": "a3",
        "block": None,
    }
    for positions, key in (("generated", "layer_scores"), ("prompt_end", "layer_scores_prompt_end")):
        for layer, shown in enumerate(projected["positions"][positions]):
            natural, artifact = np.array(shown["direction"]).T
            right = (natural < 0).sum() + (artifact > 0).sum()
            assert right / 100 == pytest.approx(result[key][str(layer)]["accuracy"])
            assert np.shape(shown["orthogonal"]) == (50, 2)


def test_a_category_with_too_few_pairs_says_so():
    data = simulate(effect=1.0, pairs=12)  # 3 or 2 pairs a category
    assert all("pairs, 4 needed" in c["reason"] for c in analyse_categories(data, SETTINGS)["categories"].values())


def test_zero_spread_ends_as_null_not_as_nan():
    data = simulate(effect=0.0)
    data.values[:, 0], data.values[:, 1] = 0.0, 1.0
    result = analyse(data, SETTINGS, {})
    json.dumps(result, allow_nan=False)
    assert result["layer_scores"]["0"]["cohens_d"] is None and result["layer_scores"]["0"]["accuracy"] == 1


def no_numbers(data):
    data.values[:] = 0


def one_feature_is_constant(data):
    data.values[..., 0] = 7


def natural_prompts_are_all_alike(data):
    data.values[:, 0] = data.values[0, 0, 0]


def all_pairs_are_alike(data):
    data.values[:] = data.values[:1]


def huge(data):
    data.values[:] *= 1e18


def tiny(data):
    data.values[:] *= 1e-30


@pytest.mark.parametrize(
    "spoil", [no_numbers, one_feature_is_constant, natural_prompts_are_all_alike, all_pairs_are_alike, huge, tiny]
)
@pytest.mark.parametrize("pairs, hidden", [(4, 16), (9, 1), (50, 1), (50, 16)])
def test_degenerate_data_give_defined_results_or_null(spoil, pairs, hidden):
    data = simulate(effect=1.0, pairs=pairs, hidden=hidden)
    spoil(data)
    result = analyse(data, SETTINGS, {})
    everything = [result, analyse_categories(data, SETTINGS), analyse_layers_and_steps(data, result, SETTINGS)]
    everything.append(project_prompts(data, SETTINGS))
    json.dumps(everything, allow_nan=False)
    for record in result["layer_scores"].values():
        assert (record["p_value"] is None) == (record["cohens_d"] is None)
        assert 0 <= record["accuracy"] <= 1 and 0 <= record["auroc"] <= 1
    assert result["summary"]


def test_jsonable_maps_numpy_and_nan():
    assert jsonable({"a": [np.float32(1.5), np.nan, np.int64(2), (np.inf, None)]}) == {
        "a": [1.5, None, 2, [None, None]]
    }


@pytest.mark.parametrize("effect, pairs", [(0.0, 50), (3.0, 50), (3.0, 4)])
def test_figures_are_drawn_for_significant_for_no_effects_and_for_few_pairs(tmp_path, effect, pairs):
    data = simulate(effect, pairs=pairs)
    result = analyse(data, SETTINGS, {})
    paper.plot_layer_scores(result, tmp_path / "deep" / "a.png")
    paper.plot_categories(analyse_categories(data, SETTINGS), tmp_path / "b.png")
    paper.plot_layer_pattern(analyse_layers_and_steps(data, result, SETTINGS), tmp_path / "c.png")
    paper.plot_projections(project_prompts(data, SETTINGS), tmp_path / "d.png")
    for name in ("deep/a", "b", "c", "d") if pairs == 50 else ("deep/a", "c", "d"):  # no category has enough pairs
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_answers_behind_thoughts_are_analysed_beside_everything_generated_and_missing_ones_counted():
    assert analyse(simulate(effect=3.0), SETTINGS, {})["thoughts"] is None
    data = simulate(effect=3.0)
    thoughts = np.full((50, 2), 2)
    data.values[:, :, 3:, 1, 1] += np.array([0.0, 6.0])[None, :, None]  # only answers tell the sides apart there
    data.thoughts = thoughts.copy()
    data.thoughts[:4, 1] = -1
    result = analyse(data, SETTINGS, {})
    assert result["thoughts"] == {"pairs": 50, "answered": 46}
    assert result["layer_scores_answer"]["1"]["num_pairs"] == 46 and result["layer_scores"]["1"]["num_pairs"] == 50
    assert result["layer_scores_answer"]["1"]["cohens_d"] > result["layer_scores"]["1"]["cohens_d"] > 1
    assert "after the thought" in result["summary"] and "4 of 50 pairs have an answer that ends" in result["summary"]
    data.thoughts[:] = -1
    data.thoughts[0] = 2
    result = analyse(data, SETTINGS, {})
    assert "layer_scores_answer" not in result and "49 of 50 pairs" in result["summary"]
