"""The sweep: its splits, its choices, its controls, and the whole script on the organism."""

import contextlib
import io
import json

import mlx.core as mx
import numpy as np
import pytest

import sweep_suppression as script
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.edits.setting import Intervention
from alignment_artifacts.pairs import Pair
from alignment_artifacts.report import contents
from alignment_artifacts.suppression import sweep
from alignment_artifacts.suppression.library import SWEEP, AlignmentArtifacts
from gemma_refactored.errors import UserError
from model_organism.train import PLANTED_LAYERS


def made_up(number, shared=()):
    """Pairs of five categories; those in `shared` are declared to depend on each other."""
    return [Pair(str(i), f"c{i % 5}", f"natural {i}", f"artifact {i}", "x" if i in shared else None)
            for i in range(number)]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_disjoint_stratified_and_in_proportion(seed):
    pairs = made_up(50)
    rows = sweep.split_pairs(pairs, (20, 15, 15), seed)
    assert list(rows) == list(sweep.PARTS)
    parts = list(rows.values())
    assert sorted(np.concatenate(parts)) == list(range(50))
    assert [len(part) for part in parts] == [20, 15, 15]
    for part, each in zip(parts, (4, 3, 3), strict=True):
        assert [sum(pairs[i].category == f"c{c}" for i in part) for c in range(5)] == [each] * 5
    assert not np.array_equal(parts[0], sweep.split_pairs(pairs, (20, 15, 15), seed + 1)["training"])


def test_every_pair_is_tested_in_one_fold_and_dependent_pairs_stay_together():
    pairs = made_up(50, shared=(0, 1, 7, 13))
    folds = sweep.fold_rows(pairs, 5, (20, 15, 15))
    assert sorted(np.concatenate([rows["test"] for rows in folds])) == list(range(50))
    for rows in folds:
        assert sorted(np.concatenate(list(rows.values()))) == list(range(50))
        for part in rows.values():
            assert len({0, 1, 7, 13} & set(part)) in (0, 4)
    whole, same = sweep.divide(pairs, 5, (20, 15, 15))
    assert sorted([*whole["training"], *whole["development"]]) == list(whole["test"]) == list(range(50))
    assert all(np.array_equal(one["test"], other["test"]) for one, other in zip(folds, same, strict=True))
    with pytest.raises(UserError, match="50 folds need as many independent pairs, and there are 47"):
        sweep.fold_rows(pairs, 50, (20, 15, 15))


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
    limits = sweep.Limits(changed=0.1)
    assert sweep.choose(trials, limits) == 2  # the last two are better and cost too much; of equals the least intrusive
    assert sweep.choose([trials[3], trials[4]], limits) == 1  # none within the limits: 1.0 against 0.5
    assert sweep.choose(trials) == 4  # any answer may change
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
    """(result, printed) of the script with a small space, on one split."""
    folder = tmp_path_factory.mktemp("sweep")
    scales = {"always": (0.5, 1.0), "ablate": (0.5, 2.0), "cap": (0.5, 3.0)}
    module_patch.setattr(script, "SUPPRESSION", sweep.Space(scales, trials=24, generated=4))
    amplify = sweep.Space({"add": (0.1, 2.0)}, where=("prompt_end", "everywhere"), trials=8, generated=2)
    module_patch.setattr(script, "AMPLIFICATION", amplify)
    module_patch.setattr(script, "FOLDS", 0)
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
    monitor = result["monitor"]["mlp"]
    assert monitor["auroc"] > 0.9
    refused = result["test"]["unedited"]["twins"]["refused"]
    assert monitor["twins"]["refused"] == refused["hits"]
    assert monitor["twins"]["answered"] == refused["n"] - refused["hits"]
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
    (effect,) = swept[0]["test"]["effect_on_artifact_prompts"]
    assert 0 < effect["touched"] <= effect["tokens"] and 0 < max(effect["dose"].values()) < 0.5


def scored_trial(moved, kl, unchanged=1.0, natural_moved=0.0, loops=0.0):
    record = trial(0.0, kl, unchanged)
    record["artifact"] = {"moved": {"mean": moved}}
    record["natural"] |= {"moved": {"mean": natural_moved}, "loops": {"rate": loops}}
    return record


def test_a_wish_decides_where_the_mean_is_to_go():
    trials = [scored_trial(-2, 0.01), scored_trial(3, 0.02), scored_trial(-9, 0.06), scored_trial(-9, 0, unchanged=0.5)]
    limits = sweep.Limits(changed=0.1)
    assert sweep.choose(trials, limits, "lower") == 0 and sweep.choose(trials, limits, "higher") == 1
    assert sweep.choose(trials[2:], limits, "lower") == 1  # both over budget: 0.5 changed against all of the KL
    assert sweep.pareto_front(trials[:3], "lower") == [0, 2] and sweep.pareto_front(trials[:2], "higher") == [0, 1]
    louder = [scored_trial(0, 0.1, natural_moved=m, loops=share) for m, share in ((1, 0), (5, 0.05), (9, 0.5), (-4, 0))]
    assert sweep.choose_amplification(louder, "lower") == 1
    assert sweep.choose_amplification(louder, "higher") == 3


@pytest.fixture(scope="module")
def swept_by_score(tmp_path_factory):
    """(result, printed, library's choice) of a sweep that is to make answers say "I" and "Sorry" less often."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "openings.py").write_text(
        "def openings(prompt, answer):\n    'Words that refusals begin with.'\n"
        "    return sum(word in ('I', 'Sorry') for word in answer.replace(',', ' ').replace(\"'\", ' ').split())\n"
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(script, "FOLDS", None)
        space = sweep.Space({"ablate": (0.5, 2.0), "cap": (0.5, 2.0)}, trials=8, generated=3)
        patch.setattr(script, "SUPPRESSION", space)
        space = sweep.Space({"add": (1.0,)}, where=("prompt_end",), trials=3, generated=1)
        patch.setattr(script, "AMPLIFICATION", space)
        patch.setattr(script, "RANDOM_CONTROLS", 2)
        patch.setattr(script, "RESULTS_DIR", folder / "results")
        patch.setattr(script, "CACHE", str(folder / "cache"))
        assert script.main(["--score", f"{folder}/openings.py:openings"]) == 0
    (path,) = (folder / "results").rglob("data/suppression_sweep_openings_*_lower.json")
    library = AlignmentArtifacts(cache=folder / "cache", show_progress=False, score=f"{folder}/openings.py:openings")
    return json.loads(path.read_text()), printed.getvalue(), library


def test_a_sweep_with_a_score_has_the_same_controls(swept_by_score):
    result, printed, _ = swept_by_score
    test = result["test"]
    assert result["score"]["name"] == "openings" and result["wish"] == "lower"
    assert test["unedited"]["artifact"]["moved"]["mean"] == 0 < test["unedited"]["artifact"]["score"]["mean"]
    moved = test["artifact"]["moved"]
    assert moved["ci"][1] < 0 and moved["n"] == 15
    difference = test["artifact"]["score"]["mean"] - test["unedited"]["artifact"]["score"]["mean"]
    assert moved["mean"] == pytest.approx(difference)
    for control in ("random_direction", "same_change_elsewhere"):
        assert len(test[control]) == 2
        assert all(abs(judged["artifact"]["moved"]["mean"]) < abs(moved["mean"]) / 2 for judged in test[control])
    assert result["amplification"]["test"]["natural"]["moved"]["ci"][0] > 0
    assert "efus" not in json.dumps({**result, "score": None, "origin": None}) and "efused" not in printed
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 80


def test_auto_follows_the_sweep_of_its_score_alone(swept_by_score):
    result, _, library = swept_by_score
    chosen, by = library.choose(None, "auto", None)
    assert by == "a sweep" and chosen == Setting.from_record(result["chosen"]["setting"])
    for score, wish in (("refusal", "lower"), (library.score, "higher"), ("words:sorry", "lower")):
        other = AlignmentArtifacts(cache=library.cache, show_progress=False, score=score, wish=wish)
        assert other.choose(None, "auto", None)[1] == "model size"


@pytest.mark.parametrize("option, message", [("--score=no", "no score 'no'"), ("--wish=up", "--wish")])
def test_bad_scores_and_wishes_are_refused_before_the_work(option, message, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "split_pairs", lambda *_: pytest.fail("looked at after the work"))
    assert script.main([option]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("constant", ["PAIRS_JSON", "TWINS"])
def test_bad_input_is_one_sentence(monkeypatch, capsys, constant):
    monkeypatch.setattr(sweep, "choose_settings", lambda *_: pytest.fail("looked for after the work"))
    monkeypatch.setattr(script, constant, "/nowhere.json")
    assert script.main() == 2
    assert "does not exist" in capsys.readouterr().err
