"""The toxicity experiment: its parts against known values, and the whole of it on two models."""

import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from alignment_artifacts.behaviour.answers import Behaviour
from alignment_artifacts.behaviour.score import Score
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.directions.files import load_directions
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.edits.setting import intervene
from alignment_artifacts.report import contents
from alignment_artifacts.suppression.search import judge_setting
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import load
from gemma_refactored.thoughts import Marks
from toxicity_steering import activation_steering as steering
from toxicity_steering import main as script
from toxicity_steering import test_setup
from toxicity_steering.activation_steering import run_experiment
from toxicity_steering.config import Config
from toxicity_steering.data import ToxicityData, load_organism_prompts, load_real_toxicity_prompts
from toxicity_steering.metrics import distinct_n, toxicity_metrics
from toxicity_steering.plots import summary_statistics
from toxicity_steering.scorers import load_scorer

from .conftest import ROOT, no_file_larger_than
from .tiny_checkpoints import COMMON, write_family

HAS_TORCH = importlib.util.find_spec("torch") is not None


def even_is_toxic(prompt, answer):
    return 0.9 if len(answer) % 2 == 0 else 0.1


EVEN_IS_TOXIC = Score("even lengths", even_is_toxic, "for models that write noise", "")


def test_metrics_are_those_of_real_toxicity_prompts():
    scores = np.array([[0.9, 0.1], [0.2, 0.4], [0.6, 0.6], [0.0, 0.0]])
    metrics = toxicity_metrics(scores, range(4))
    assert metrics["mean_toxicity"] == pytest.approx(0.35)
    assert metrics["expected_max_toxicity"] == pytest.approx((0.9 + 0.4 + 0.6 + 0.0) / 4)
    assert metrics["toxicity_probability"]["hits"] == 2 and metrics["toxicity_probability"]["n"] == 4
    low, high = metrics["mean_toxicity_ci"]
    assert low < 0.35 < high
    doubled = np.repeat(scores, 2, axis=0)  # two prompts about one person say no more than one
    for name in ("mean_toxicity_ci", "expected_max_toxicity_ci"):
        wide, narrow = (toxicity_metrics(doubled, groups)[name] for groups in (np.repeat(range(4), 2), range(8)))
        assert wide == pytest.approx(metrics[name]) and wide[0] < narrow[0] < narrow[1] < wide[1]
    assert toxicity_metrics(scores * 0, range(4))["mean_toxicity_ci"] is None
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4 and distinct_n([[7] * 11], 1) == 1 / 11
    assert distinct_n([[1]], 2) is None


def test_a_bar_without_an_interval_has_no_error_bar():
    of = toxicity_metrics(np.random.default_rng(0).random((6, 2)), range(6))
    controls = {"random_direction": [of], "same_change_elsewhere": [of]}
    kinds = {"baseline": of, "steered": toxicity_metrics(np.zeros((6, 2)), range(6)), **controls}
    drawn = summary_statistics({"summary": {"layer": 1, "alpha": 1.0, "kl_mean": 0.0, **kinds}})
    lines = [bars.errorbar[2][0].get_segments() for bars in drawn.axes[0].containers[1::2]]
    assert [[len(line) for line in of_kind] for of_kind in lines] == [[2, 2, 2], [0, 0, 2]]


def test_the_word_list_counts_rude_words_and_says_what_it_is():
    texts = ["You are a great help.", "You fool.", "Stupid, useless FOOL!"]
    scorer = load_scorer("word-list")
    assert scorer.of(texts, texts).tolist() == [0, 0.5, 0.875]
    assert "organism only" in scorer.name


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is installed")
def test_the_classifier_says_what_it_needs():
    with pytest.raises(UserError, match=r"pip install -e .*toxicity"):
        load_scorer("roberta")


@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
def test_the_classifier_on_a_tiny_random_checkpoint(tmp_path):
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    labels = {0: "toxicity", 1: "insult"}
    config = RobertaConfig(
        vocab_size=1448, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, type_vocab_size=1,
        intermediate_size=32, max_position_embeddings=520, id2label=labels,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    write_family(tmp_path, "llama")  # for its tokenizer; the model is overwritten
    model.save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path))
    texts = ["You are a great help.", "Shut up.", "word " * 800]
    scores = scorer.of(texts, texts)
    assert scores.shape == (3,) and ((scores > 0) & (scores < 1)).all()
    ids = scorer.function.tokenizer(texts[1], return_tensors="pt")
    assert scores[1] == pytest.approx(torch.sigmoid(model(**ids).logits[0, 0]).item(), abs=1e-5)


def test_the_organism_s_prompts_are_disjoint_and_matched():
    data = load_organism_prompts(90)
    assert len({*data.challenging, *data.benign}) == 180 and data.only([3, 1]).benign == [
        data.benign[3],
        data.benign[1],
    ]
    for toxic, benign, about in zip(data.challenging, data.benign, data.groups, strict=True):
        assert toxic.split()[0] == benign.split()[0] and about in toxic
    assert load_organism_prompts(50).challenging == data.challenging[:50]
    with pytest.raises(UserError, match="90 prompts of each kind"):
        load_organism_prompts(91)


def fake_dataset(rows):
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, split: rows
    return module


def test_real_toxicity_prompts_are_drawn_by_the_card_s_thresholds(monkeypatch):
    def row(i, challenging, prompt, continuation):
        sides = {
            "prompt": {"text": f"p{i}", "toxicity": prompt},
            "continuation": {"text": "c", "toxicity": continuation},
        }
        return {"challenging": challenging, **sides}

    rows = [row(i, True, 0.4, 0.9) for i in range(10)] + [row(i, False, 0.1, 0.2) for i in range(10, 20)]
    rows += [row(20, False, 0.6, 0.1), row(21, False, 0.1, 0.6), row(22, False, None, 0.1)]
    monkeypatch.setitem(sys.modules, "datasets", fake_dataset(rows))
    data = load_real_toxicity_prompts(4, seed=0)
    challenging, benign = ({f"p{i}" for i in ids} for ids in (range(10), range(10, 20)))
    assert set(data.challenging) < challenging and set(data.benign) < benign and not data.chat_mode
    assert data.groups == [None] * 4
    assert load_real_toxicity_prompts(4, seed=0) == data != load_real_toxicity_prompts(4, seed=1)
    with pytest.raises(UserError, match="10 prompts of each kind"):
        load_real_toxicity_prompts(11, seed=0)


def test_without_the_datasets_package_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="toxicity"):
        load_real_toxicity_prompts(4, seed=0)


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """(results, folder) of the script on the organism, at its first layer."""
    folder = tmp_path_factory.mktemp("toxicity")
    options = ["--layers", "0", "--samples", "2", "--random-controls", "2"]
    assert script.main(["--output-dir", str(folder), *options]) == 0
    return json.loads((folder / "experiment_results.json").read_text()), folder


def test_the_report_can_show_it(steered):
    results, folder = steered
    section = contents.toxicity(folder / "experiment_results.json")
    labels = [row[0] for row in section["rows"]]
    assert labels[1] == "steered" and labels[3:] == [
        "2 random directions of the same norm", "2 random changes of equal size",
    ]  # fmt: skip
    assert section["origin"]["model_revision"].startswith("sha256:") and len(section["figures"]["toxicity"]["data"]) > 0


def test_steering_the_organism_reaches_the_goals(steered):
    results, _ = steered
    summary, test = results["summary"], results["test"]
    assert summary["baseline"]["mean_toxicity"] > 0.5
    change = summary["steered"]["change"]
    assert change["mean"] <= -0.6 and change["ci"][0] < change["mean"] < change["ci"][1] < -0.2
    assert change["mean"] == pytest.approx(
        summary["steered"]["mean_toxicity"] / summary["baseline"]["mean_toxicity"] - 1
    )
    assert summary["kl_mean"] <= 0.15 and summary["within_kl_limit"]
    assert summary["negative_alpha"]["change"]["mean"] > 0
    assert test["amplified"]["natural"]["moved"]["mean"] > 0.03  # benign prompts get rude answers
    assert summary["steered"]["distinct_2"] >= summary["baseline"]["distinct_2"]  # not collapsed
    for control in (*test["random_direction"], *test["same_change_elsewhere"]):
        assert control["artifact"]["against_setting"]["ci"][0] > 0  # the setting is better on the same prompts
    assert test["artifact"]["score"]["n"] == 2 * results["parts"]["test"]["prompts"]  # two samples of each
    assert test["artifact"]["score"]["mean"] == pytest.approx(summary["steered"]["mean_toxicity"])
    for control in ("random_direction", "same_change_elsewhere"):  # every seed is told
        means = [record["artifact"]["score"]["mean"] for record in test[control]]
        assert [record["mean_toxicity"] for record in summary[control]] == pytest.approx(means) and len(means) == 2


def test_the_terminal_tells_the_interval_of_the_change_and_every_control(steered, capsys):
    results, _ = steered
    script.print_summary(results)
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    change = results["summary"]["steered"]["change"]
    low, high = change["ci"]
    assert f"{change['mean']:+.0%} [{low:+.0%} to {high:+.0%}]" in told
    for label, name in (("random directions", "random_direction"), ("random changes", "same_change_elsewhere")):
        (line,) = (line for line in told.splitlines() if line.startswith(f"2 {label}"))
        for of in (min, max):
            assert f"{of(record['change']['mean'] for record in results['summary'][name]):+.0%}" in line
    assert f"tested on {results['parts']['test']['prompts']} of 8 other groups" in " ".join(told.split())


def test_choice_and_report_share_no_person(steered):
    results, _ = steered
    data = ToxicityData(**results["experiment"]["data"])
    parts = steering.divided(data, results["experiment"]["config"]["seed"])
    for part, sizes in results["parts"].items():
        assert sizes == {"prompts": len(parts[part].challenging), "groups": len(set(parts[part].groups))}
        assert len(results["baseline"][part]["artifact"]["scores"]) == sizes["prompts"]
    assert sum(sizes["groups"] for sizes in results["parts"].values()) == len(set(data.groups))
    tried = 2 * results["parts"]["development"]["prompts"]
    assert [r["artifact"]["score"]["n"] for r in results["sweep"].values()] == [tried] * (6 + steering.FINER)


def test_a_person_is_in_one_part_whatever_the_seed():
    data = load_organism_prompts(90)
    assert len(set(data.groups)) == 20
    for seed in range(20):
        parts = steering.divided(data, seed)
        assert sum(len(part.challenging) for part in parts.values()) == 90
        assert [len(set(part.groups)) for part in parts.values()] == [6, 6, 8]
        for name in set(data.groups):
            assert sum(any(name in text for text in part.challenging) for part in parts.values()) == 1


def test_what_prompts_are_about_is_their_group_else_their_match(tmp_path):
    def write(keys):
        rows = [
            {**keys(i), "challenging": kind, "prompt": {"text": f"{kind} {i}"}}
            for i in range(12)
            for kind in (True, False)
        ]
        path = tmp_path / "prompts.json"
        path.write_text(json.dumps({"prompts": rows}))
        return load_organism_prompts(12, path)

    assert write(lambda i: {"match": i}).groups == [str(i) for i in range(12)]
    assert write(lambda i: {"match": i, "group": "abc"[i % 3]}).groups == list("abc" * 4)
    alone = write(lambda i: {})
    assert alone.groups == [None] * 12
    assert [len(part.benign) for part in steering.divided(alone, 0).values()] == [4, 3, 5]


@pytest.mark.parametrize("groups", [list("abcde" * 4), list("abcdef")])
def test_too_few_people_for_three_parts_are_one_sentence(groups):
    texts = [f"Tell me about {i}." for i in range(len(groups))]
    data = ToxicityData("mine", texts, [f"{text} Please." for text in texts], groups, chat_mode=True)
    told = f"mine has {len(groups)} prompts of each kind about {len(set(groups))} different people or things"
    with pytest.raises(UserError, match=told):
        steering.divided(data, 0)


def test_vectors_are_reported_and_point_away_from_toxicity(steered):
    results, folder = steered
    assert all(vector["norm"] > 0 and vector["held_out_cohens_d"] > 1 for vector in results["vectors"].values())
    assert len(results["pairs"]) == 20
    directions = load_directions(folder / steering.VECTORS)
    assert directions.facts["positions"] == "last 32 tokens" and directions.direction.shape == (8, 128)
    assert directions.facts["ends"] == ["toxic", "benign"]
    np.testing.assert_allclose(directions.artifact_mean - directions.natural_mean, directions.direction, atol=1e-4)
    assert results["experiment"]["scorer"] == "word list (organism only)"


def test_plots_are_drawn_twice_each(steered):
    names = {f.name for f in (steered[1] / "plots").iterdir()}
    stems = ("alpha_sweep_results", "toxicity_heatmaps", "summary_statistics")
    assert names == {f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf")}


def test_plots_that_do_not_fit_the_disk_are_not_left_in_part(steered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steering, "run_experiment", lambda *_, **__: steered[0])
    with no_file_larger_than(20_000):
        assert script.main(["--output-dir", str(tmp_path / "out")]) == 2
    assert "could not be written: File too large" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*"))


@pytest.fixture
def small(tmp_path):
    """An experiment on a random model shaped like Phi-4-mini: partial rotary, longrope, tied embeddings."""
    rope = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    model = write_family(tmp_path / "phi", "phi3")
    config = {**COMMON, "model_type": "phi3", "tie_word_embeddings": False, "partial_rotary_factor": 0.75}
    config |= {"rope_scaling": rope, "original_max_position_embeddings": 32, "pad_token_id": 0}
    (model / "config.json").write_text(json.dumps(config))
    texts = [f"Tell me about number {i}." for i in range(32)]
    data = ToxicityData("small", texts[:16], texts[16:], [None] * 16, chat_mode=True)
    config = Config(alphas=(-1.0, 1.0), layers=(1,), random_controls=1, samples=3, max_tokens=6, num_pairs=5)
    return load(model), data, EVEN_IS_TOXIC, tmp_path / "out", config


def test_a_model_shaped_like_phi_4_mini_goes_the_whole_way(small):
    results = run_experiment(*small)
    assert list(results["sweep"]) == ["layer 1, alpha -1", "layer 1, alpha 1"]
    assert results["sweep"]["layer 1, alpha 1"]["damage"]["kl_mean"] > 0
    assert len(results["pairs"]) == 5 and "same prompt" in results["pairs"][0]
    assert len(results["vectors"]) == 3


@pytest.fixture
def bench(small):
    loaded, data, score, output, config = small
    parts = steering.divided(data, config.seed)
    asked = steering.unsteered(loaded, parts, config, None)
    training = {
        side: steering.measures(loaded, score, b, b.answers, np.arange(5), config)
        for side, b in asked["training"].items()
    }
    return steering.bench_of(loaded, parts, asked, training, output, config, score)


def test_alpha_0_is_the_unsteered_model_to_the_bit(bench):
    sets = bench.behaviour("development")
    still = judge_setting(bench, Setting("always", 0.0, (1,), "residual", "elsewhere"), sets)
    assert still["artifact"]["unchanged"]["rate"] == still["natural"]["unchanged"]["rate"] == 1
    assert still["damage"]["kl_mean"] == 0 and still["artifact"]["moved"]["mean"] == 0
    moved = judge_setting(bench, Setting("always", 3.0, (1,), "residual", "elsewhere"), sets)
    assert moved["damage"]["kl_mean"] > 0 and moved["artifact"]["unchanged"]["rate"] < 1


def test_positive_alphas_add_benign_minus_toxic(bench, small):
    """The edit is the one of the mode "add" with the vector of the file."""
    loaded = small[0]
    away = steering._towards_benign(bench.directions("residual", "elsewhere"), small[4])
    (mine,) = bench.intervention(Setting("always", 1.5, (1,), "residual", "elsewhere")).edits.values()
    (theirs,) = intervene(loaded, away, Setting("add", 1.5, (1,), "residual")).edits.values()
    x = mx.random.normal((1, 2, loaded.hidden_size), key=mx.random.key(0))
    np.testing.assert_allclose(mine(x), theirs(x), atol=1e-5)
    np.testing.assert_allclose(np.array(mine(x) - x)[0, 0], 1.5 * away.direction[1], atol=1e-4)


def test_samples_of_a_prompt_count_as_one(bench):
    """Intervals take the prompts as independent, not their samples; and not prompts about one person."""
    groups = independent_groups(bench.measured.pairs)[bench.rows["test"]]
    assert len(set(groups)) == 6 and len(groups) == 18
    setting = Setting("always", 3.0, (1,), "residual", "elsewhere")
    damage = bench.outcome(bench.intervention(setting), bench.behaviour("test")).damage
    assert len(damage.kl) == 6 and sum(map(len, damage.kl)) > 6 and damage.rows == [0, 3, 6, 9, 12, 15]
    assert damage.record() == damage.record(groups)
    wide, narrow = (damage.record(about)["kl_mean_ci"] for about in ([0] * 9 + [1] * 9, None))
    assert np.log(wide[1] / wide[0]) > np.log(narrow[1] / narrow[0])


def test_an_interrupted_experiment_is_continued_and_gives_the_same(small, monkeypatch):
    loaded, data, score, output, config = small
    whole = run_experiment(loaded, data, score, output.with_name("whole"), config)

    def interrupted(bench, setting, sets):
        if setting.scale == 1:
            raise KeyboardInterrupt
        return judge_setting(bench, setting, sets)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steering, "judge_setting", interrupted)
        run_experiment(*small)
    partial = json.loads((output / steering.PARTIAL).read_text())
    assert list(partial["sweep"]) == ["layer 1, alpha -1"]
    tried = []
    monkeypatch.setattr(steering, "write_answers", lambda *_: pytest.fail("the baseline is there"))
    monkeypatch.setattr(steering, "judge_setting", lambda *given: tried.append(given[1]) or judge_setting(*given))
    again = run_experiment(*small)
    assert [setting.scale for setting in tried] == [1]
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(whole))


def test_wrong_content_of_what_is_continued_is_one_sentence_with_the_file(small):
    path = small[3] / steering.INTERMEDIATE
    whole = run_experiment(*small)
    contents = [[], None, "x", {}, {"experiment": []}, {"experiment": {"config": 1}}]
    contents += [{**whole, part: wrong} for part in ("baseline", "sweep") for wrong in ([1], "x", {"a": 1})]
    for content in contents:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{path} cannot be continued from|holds another experiment"):
            run_experiment(*small)


def test_a_failure_leaves_what_there_was_and_the_error(small, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(steering, "judge_setting", broken)
    with pytest.raises(RuntimeError):
        run_experiment(*small)
    failed = json.loads((small[3] / steering.FAILED).read_text())
    assert failed["error"] == "RuntimeError: out of luck" and "vectors" in failed


def test_another_experiment_in_the_folder_is_refused(small):
    run_experiment(*small)
    before = (small[3] / steering.INTERMEDIATE).read_text()
    other = (*small[:4], replace(small[4], alphas=(-2.0, 2.0), samples=2))
    with pytest.raises(UserError, match=r"another experiment \(other alphas, samples\); name"):
        run_experiment(*other)
    assert (small[3] / steering.INTERMEDIATE).read_text() == before


def test_too_few_toxic_continuations_and_bad_layers(small):
    loaded, data, _, output, config = small
    with pytest.raises(UserError, match="Only 0 of the training prompts"):
        run_experiment(loaded, data, load_scorer("word-list"), output, config)
    with pytest.raises(UserError, match="no layer 7"):
        run_experiment(loaded, data, EVEN_IS_TOXIC, output, replace(config, layers=(7,)))


def test_alphas_lie_on_both_sides_of_0(tmp_path, capsys):
    assert script.main(["--output-dir", str(tmp_path), "--alphas", "0.5,1"]) == 2
    assert "--alphas must have strengths on both sides of 0" in capsys.readouterr().err


def test_the_set_up_check_passes_offline(capsys):
    assert test_setup.main() == 0
    output = capsys.readouterr().out
    assert output.count("ok  ") >= 4 and "MISSING" not in output


@pytest.mark.parametrize("name", ["main.py", "activation_steering.py", "test_setup.py"])
@pytest.mark.parametrize("inside", [False, True])
def test_its_files_run_as_scripts_from_anywhere(name, inside):
    """As far as the model: there is none of that name."""
    folder = ROOT / "toxicity_steering"
    command = [sys.executable, name if inside else f"toxicity_steering/{name}"]
    if name != "test_setup.py":
        command += ["--model", "/nowhere"]
    ended = subprocess.run(command, cwd=folder if inside else ROOT, capture_output=True, text=True)
    if name == "test_setup.py":
        assert ended.returncode == 0 and ended.stdout.count("ok  ") >= 4
    else:
        assert ended.returncode == 2 and "no model folder" in ended.stderr and ended.stderr.count("\n") == 1


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert script.main(["--model", "/nowhere", "--output-dir", str(tmp_path)]) == 2
    assert "no model folder" in capsys.readouterr().err


@pytest.fixture
def stopped(monkeypatch):
    """The script up to where the experiment would begin; what it would run with."""
    given = []

    def stop(loaded, data, score, output, config, quiet):
        given.append((loaded, output))
        raise UserError("stopped")

    monkeypatch.setattr(steering, "run_experiment", stop)
    return given


def test_a_system_prompt_belongs_to_the_identity_of_the_results(stopped, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("alignment_artifacts.places.HOME", tmp_path)
    for options in ([], ["--system-prompt", "Be kind."], ["--system-prompt", "Be rude."]):
        assert script.main(options) == 2
    plain, kind, rude = (loaded.facts()["identity"] for loaded, _ in stopped)
    assert "chat" not in plain and kind["chat"] != rude["chat"]
    assert len({str(output) for _, output in stopped}) == 3
    (ids,) = stopped[1][0].encode(["Hello"])
    assert "Be kind." in stopped[1][0].tokenizer.decode(ids)
    assert script.main(["--chat-template-args", '{"enable_thinking": false}']) == 2
    assert "no variable 'enable_thinking'" in capsys.readouterr().err


def test_plain_text_has_no_system_prompt(stopped, monkeypatch, capsys):
    data = ToxicityData("plain", ["a"], ["b"], [None], chat_mode=False)
    monkeypatch.setattr("toxicity_steering.data.load_organism_prompts", lambda count: data)
    assert script.main(["--system-prompt", "Be kind."]) == 2 and not stopped
    assert "continued as plain text" in capsys.readouterr().err


def test_answers_are_scored_without_thoughts(small):
    loaded, _, score, _, config = small

    def scores(text):
        written = [loaded.tokenizer.encode(text, add_special_tokens=False)]
        behaviour = Behaviour(["x"], [[1]], written, Marks("<think>", "</think>", is_open=True))
        return steering.measures(loaded, score, behaviour, written, [0], replace(config, samples=1))["scores"]

    assert scores("a</think>Sand") == [[0.9]]  # of four letters
    with pytest.raises(UserError, match="1 of 1 completions end inside the model's thought"):
        scores("a")
