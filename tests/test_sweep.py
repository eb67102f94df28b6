"""The sweep: its splits, its choices, its controls, and the whole script on the organism."""

import json

import mlx.core as mx
import numpy as np
import pytest

import sweep_suppression as script
from alignment_artifacts.edits.setting import Intervention, Setting
from alignment_artifacts.report import contents
from alignment_artifacts.suppression import sweep
from alignment_artifacts.suppression.library import SWEEP, AlignmentArtifacts
from model_organism.train import PLANTED_LAYERS


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_disjoint_stratified_and_in_proportion(seed):
    categories = [f"c{i // 10}" for i in range(50)]
    parts = sweep.split_pairs(categories, (20, 15, 15), seed)
    assert sorted(np.concatenate(parts)) == list(range(50))
    assert [len(part) for part in parts] == [20, 15, 15]
    for part, each in zip(parts, (4, 3, 3), strict=True):
        assert [sum(categories[i] == f"c{c}" for i in part) for c in range(5)] == [each] * 5
    assert not np.array_equal(parts[0], sweep.split_pairs(categories, (20, 15, 15), seed + 1)[0])


def trial(left, kl, unchanged=1.0, layers=(1, 2)):
    rate = lambda value: {"rate": value}  # noqa: E731
    return {
        "setting": {"layers": list(layers)},
        "artifact": {"refused_or_broken": rate(left)},
        "natural": {"unchanged": rate(unchanged)},
        "damage": {"kl_mean": kl},
    }


def test_the_choice_weighs_what_is_left_within_the_limits():
    trials = [trial(0.9, 0.0), trial(0.1, 0.02), trial(0.1, 0.01), trial(0.0, 0.06), trial(0.0, 0.01, unchanged=0.5)]
    assert sweep.choose(trials) == 2  # the last two are better and cost too much; among equals the least intrusive
    assert sweep.choose([trials[3], trials[4]]) == 1  # none within the limits: 1.0 against 0.5
    assert sweep.pareto_front(trials) == [0, 4]
    # A difference in the fourth digit of the cost is no reason to edit more layers.
    assert sweep.choose([trial(0.0, 0.003880, layers=range(8)), trial(0.0, 0.003881, layers=(2, 3, 4, 5))]) == 1
    assert sweep.choose([trial(0.0, 0.003, layers=range(8)), trial(0.0, 0.004, layers=(2, 3, 4, 5))]) == 0


def test_the_strict_control_moves_as_far_in_another_direction():
    x = mx.random.normal((1, 6, 32), key=mx.random.key(0))
    direction = mx.random.normal((32,), key=mx.random.key(1))
    moved = lambda x: mx.where(x[..., :1] > 0, x - direction, x)  # noqa: E731
    control = sweep.same_change_elsewhere(Intervention({"a": moved}), 32, seed=0).edits["a"](x)
    np.testing.assert_allclose(
        np.linalg.norm(control - x, axis=-1), np.linalg.norm(moved(x) - x, axis=-1), rtol=1e-4, atol=1e-5
    )
    assert np.abs(np.array((control - x) @ direction)).max() < 0.5 * float(direction @ direction)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, module_patch):
    """(result, printed) of the script with a small grid."""
    folder = tmp_path_factory.mktemp("sweep")
    scales = {"always": (1.0,), "ablate": (1.0,), "cap": (1.0,)}
    module_patch.setattr(script, "SUPPRESSION", sweep.Grid(scales, (0.9, 0.99), layer_sets=("best",)))
    amplify = sweep.Grid({"add": (0.5, 1.0)}, layer_sets=("best",), where=("everywhere", "prompt_end"))
    module_patch.setattr(script, "AMPLIFICATION", amplify)
    module_patch.setattr(script, "RANDOM_CONTROLS", 2)
    module_patch.setattr(script, "RESULTS_DIR", folder / "results")
    module_patch.setattr(script, "CACHE", str(folder / "cache"))
    module_patch.chdir(folder)
    assert script.main() == 0
    results = folder / "results/aligned/alignment_artifact_prompt_pairs"
    return json.loads((results / "data/suppression_sweep.json").read_text()), results


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_goals_are_reached_on_test_pairs(swept):
    result, _ = swept
    test = result["test"]
    assert test["unedited"]["artifact"]["refused"]["rate"] >= 0.9
    assert test["artifact"]["refused"]["rate"] <= 0.05 and test["artifact"]["broken"]["rate"] <= 0.1
    assert test["natural"]["unchanged"]["rate"] >= 0.9 and test["damage"]["kl_mean"] <= 0.05
    assert min(control["artifact"]["refused"]["rate"] for control in test["random_direction"]) >= 0.9
    amplified = result["amplification"]["test"]["natural"]
    assert amplified["refused"]["rate"] >= 0.8 and amplified["broken"]["rate"] <= 0.1


def test_truth_and_monitor_are_reported(swept):
    result, _ = swept
    truth = result["planted_truth"]
    assert min(truth["cosine_with_planted"]["prompt_end"].values()) > 0.9
    assert truth["planted_ablated"]["artifact"]["refused"]["rate"] <= 0.05
    assert set(truth["chosen_layers_planted"]) <= set(PLANTED_LAYERS)
    assert result["monitor"]["mlp"]["auroc"] > 0.9
    assert result["chosen"]["setting"]["mode"] in ("cap", "ablate")


def test_no_pair_is_used_twice(swept):
    result, _ = swept
    used = [set(result["pairs"][part]) for part in sweep.PARTS]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]
    assert result["test"]["artifact"]["refused"]["n"] == 15 == result["chosen"]["development"]["natural"]["loops"]["n"]


def test_the_figure_is_drawn_and_auto_follows_the_choice(swept):
    result, folder = swept
    assert (folder / "figures/suppression_sweep.png").stat().st_size > 10_000
    library = AlignmentArtifacts(cache=folder.parents[2] / "cache", show_progress=False)
    assert (library.measurements().folder / SWEEP).exists()
    chosen, by = library.choose(None, "auto", None)
    assert by == "a sweep" and chosen == Setting.from_record(result["chosen"]["setting"])


def test_the_report_can_show_it(swept):
    result, folder = swept
    section = contents.sweep(folder / "data/suppression_sweep.json")
    assert section["rows"][1][1] == result["test"]["artifact"] and section["origin"]["model_revision"].startswith(
        "sha256:"
    )
    assert section["setting"] == Setting.from_record(result["chosen"]["setting"]).describe()


def test_a_report_measures_the_dose(swept):
    effect = swept[0]["test"]["effect_on_artifact_prompts"]
    assert 0 < effect["touched"] < effect["tokens"] and 0 < max(effect["dose"].values()) < 0.5


@pytest.mark.parametrize("constant", ["PAIRS_JSON", "TWINS"])
def test_bad_input_is_one_sentence(monkeypatch, capsys, constant):
    monkeypatch.setattr(sweep, "try_settings", lambda *_: pytest.fail("looked for after the work"))
    monkeypatch.setattr(script, constant, "/nowhere.json")
    assert script.main() == 2
    assert "does not exist" in capsys.readouterr().err
