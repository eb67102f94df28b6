"""The cache: made once, continued, made again when anything changes, safe for two at a time."""

import json
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.directions import measurements as ms
from alignment_artifacts.pairs import SIDES, Pair, PromptPairs, prompt_groups
from gemma_refactored.errors import UserError
from gemma_refactored.main import main
from gemma_refactored.model_loading import load
from gemma_refactored.prompt_processing import encode_prompts

from .conftest import ROOT
from .test_architectures import PAIRS
from .tiny_checkpoints import random_gemma, write_checkpoint, write_family


@pytest.fixture
def loaded(tmp_path):
    return load(write_checkpoint(tmp_path / "model", random_gemma()))


@pytest.fixture
def measured(loaded, tmp_path):
    return ms.measure(loaded, PAIRS, tmp_path / "cache")


def test_it_holds_what_collecting_and_analysing_would_give(loaded, measured, tmp_path):
    data = load_activation_set(collect(loaded, tmp_path), PAIRS)
    for positions in ("prompt_end", "generated", "all"):
        expected = data.prompt_vectors(positions)
        np.testing.assert_allclose(measured.vectors["mlp", positions], expected, rtol=1e-4, atol=1e-4)
    assert measured.vectors_at("residual", "all").shape == (len(PAIRS), 2, 3, 64)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    answers = [record["token_ids"] for record in results]
    assert [two[0] for two in measured.answers] + [two[1] for two in measured.answers] == answers
    assert {f.name for f in measured.folder.iterdir()} == {
        "model_config.json", "mlp_residual_1.safetensors"
    }  # fmt: skip


def collect(loaded, folder, *options):
    """The same prompts through run_model.py; its folder of activations."""
    (folder / "prompts.json").write_text(json.dumps(prompt_groups(PAIRS)))
    arguments = ["--model", loaded.folder, "--prompts-file", folder / "prompts.json", "--max-tokens", "20", "-q"]
    arguments += ["--save-activations", "--process-by-group", "--activations-dir", folder / "acts", *options]
    assert main([str(a) for a in [*arguments, "--output-dir", folder / "out"]]) == 0
    return folder / "acts"


def test_a_collection_of_the_same_is_read_instead_of_asking_again(loaded, measured, tmp_path, monkeypatch):
    collection = collect(loaded, tmp_path)

    def forbidden(*_):
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(ms, "_answer", forbidden)
        again = ms.measure(loaded, PAIRS, tmp_path / "b", collections=[tmp_path / "none", collection])
        for positions in ("prompt_end", "generated", "all"):
            expected = measured.vectors["mlp", positions]
            np.testing.assert_allclose(again.vectors_at("mlp", positions), expected, rtol=1e-4, atol=1e-4)
        assert again.answers == measured.answers and again.texts == measured.texts
    # The residual stream was not collected: now the model is asked.
    np.testing.assert_allclose(
        again.vectors_at("residual", "all"), measured.vectors_at("residual", "all"), rtol=1e-4, atol=1e-4
    )


def test_a_collection_of_the_residual_stream_alone_is_enough_until_another_site_is_requested(
    loaded, measured, tmp_path, monkeypatch
):
    collection = collect(loaded, tmp_path, "--activation-filter", "residual")
    with monkeypatch.context() as patch:
        patch.setattr(ms, "_answer", lambda *_: pytest.fail("asked again"))
        again = ms.measure(loaded, PAIRS, str(tmp_path / "b"), collections=[str(collection)])
        expected = measured.vectors_at("residual", "all")
        np.testing.assert_allclose(again.vectors_at("residual", "all"), expected, rtol=1e-4, atol=1e-4)
        assert again.answers == measured.answers and again.sites == measured.sites
    np.testing.assert_allclose(again.vectors_at("mlp", "all"), measured.vectors_at("mlp", "all"), rtol=1e-4, atol=1e-4)


def test_what_pairs_are_about_stays_with_their_measurements(loaded, tmp_path):
    named = PromptPairs(PAIRS, "sycophancy", ("neutral", "opinion"))
    found = ms.measure(loaded, named, tmp_path / "named")
    assert (found.pairs.behaviour, found.pairs.sides) == ("sycophancy", ("neutral", "opinion"))
    assert found.estimate("mlp", "all", found.rows()).facts["ends"] == ["neutral", "opinion"]
    assert ms.activation_set(loaded, found, "mlp").pairs.sides == ("neutral", "opinion")


@pytest.mark.parametrize(
    "options", [["--max-tokens", "19"], ["--temp", "0.5"], ["--no-chat-mode"], ["--activation-dtype", "float16"]]
)
def test_a_collection_with_other_settings_is_not(loaded, tmp_path, options):
    collection = collect(loaded, tmp_path, *options)
    ids = encode_prompts(loaded.tokenizer, [text for side in SIDES for text in (getattr(p, side) for p in PAIRS)])
    assert not ms._matches(collection, loaded, ids, "mlp")


def test_a_collection_of_other_texts_another_model_or_half_a_run_is_not(loaded, tmp_path):
    collection = collect(loaded, tmp_path)
    ids = encode_prompts(loaded.tokenizer, [text for side in SIDES for text in (getattr(p, side) for p in PAIRS)])
    assert ms._matches(collection, loaded, ids, "mlp")
    assert not ms._matches(collection, loaded, [*ids[:-1], ids[0]], "mlp")
    assert not ms._matches(collection, loaded, ids, "residual")
    manifest = json.loads((collection / "manifest.json").read_text())
    for name, value in (("model_revision", "sha256:0"), ("complete", manifest["complete"][1:]), ("sites", [])):
        (collection / "manifest.json").write_text(json.dumps({**manifest, name: value}))
        assert not ms._matches(collection, loaded, ids, "mlp")


def test_answers_are_known_as_far_as_they_were_written(measured):
    prompt, answer = measured.prompts[0][1], measured.answers[0][1]
    assert len(answer) == 20  # this random model never ends
    assert measured.known_answer(prompt, 20) == answer and measured.known_answer(prompt, 3) == answer[:3]
    assert measured.known_answer(prompt, 21) is None and measured.known_answer([1, 2], 3) is None
    ended = replace(measured, answers=[[measured.answers[0][0], answer[:7]], *measured.answers[1:]])
    assert ended.known_answer(prompt, 100) == answer[:7]


def test_the_second_time_nothing_is_measured(loaded, measured, tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(ms, "_answer", forbidden)
    again = ms.measure(loaded, PAIRS, tmp_path / "cache")
    assert again.folder == measured.folder
    assert all(np.array_equal(again.vectors[key], measured.vectors[key]) for key in measured.vectors)


def test_other_prompts_and_other_weights_have_a_folder_of_their_own(loaded, measured, tmp_path):
    changed = [*PAIRS[:-1], Pair("5", "topics", "Tell me about two tunes.", PAIRS[-1].artifact)]
    assert ms.measure(loaded, changed, tmp_path / "cache").folder != measured.folder
    other = random_gemma()
    other.model.norm.weight = other.model.norm.weight + 1
    loaded_other = load(write_checkpoint(tmp_path / "b" / "model", other))
    assert ms.measure(loaded_other, PAIRS, tmp_path / "cache").folder != measured.folder


def test_content_alone_decides_about_the_folder_whatever_a_model_is_called(loaded, measured, tmp_path):
    cache = tmp_path / "cache"
    renamed = replace(loaded, name=f"elsewhere/{'another ' * 99}")
    assert ms.subject_of(renamed, PAIRS, cache).folder == measured.folder
    of_earlier_versions = measured.folder.rename(cache / f"a_b_c_{measured.folder.name[-12:]}")
    (cache / f"a_{measured.folder.name[-12:]}").mkdir()  # made under another name, with less in it
    assert ms.subject_of(loaded, PAIRS, cache).folder == of_earlier_versions
    assert not ms.subject_of(replace(loaded, revision="sha256:0"), PAIRS, cache).folder.exists()
    assert ms.measure(renamed, PAIRS, tmp_path / "new").folder.is_dir()  # a name that no file can have is shortened


def test_an_interrupted_measurement_is_continued(loaded, measured, tmp_path, monkeypatch):
    batches, generated = [], ms.generate

    def stop_at_the_third_batch(model, rows, *rest, **options):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(rows))
        return generated(model, rows, *rest, **options)

    monkeypatch.setattr(ms, "BATCH_SIZE", 5)
    monkeypatch.setattr(ms, "generate", stop_at_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        ms.measure(loaded, PAIRS, tmp_path / "other")
    assert batches == [5, 5]
    batches.clear()
    again = ms.measure(loaded, PAIRS, tmp_path / "other")
    assert batches == [2]
    np.testing.assert_allclose(again.vectors["mlp", "all"], measured.vectors["mlp", "all"], rtol=1e-4, atol=1e-4)


def test_a_damaged_cache_is_named(loaded, measured, tmp_path):
    (part,) = measured.folder.glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(UserError, match="mlp_residual_1.safetensors cannot be used: it is damaged"):
        ms.measure(loaded, PAIRS, tmp_path / "cache")


def rewrite(path, change):
    """The part of a cache with its arrays and answers changed."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    arrays, answers = change(dict(arrays), json.loads(metadata["answers"]))
    mx.save_safetensors(str(path), arrays, {"answers": json.dumps(answers)})


WRONG = {
    "no answers": lambda arrays, answers: (arrays, {}),
    "a list of nothing": lambda arrays, answers: (arrays, []),
    "answers that are texts": lambda arrays, answers: (arrays, ["x"] * len(answers)),
    "rows missing": lambda arrays, answers: ({name: a[1:] for name, a in arrays.items()}, answers[1:]),
    "a site missing": lambda arrays, answers: ({**arrays, "mlp.all": arrays["mlp.all"][1:]}, answers),
    "no such rows": lambda arrays, answers: ({**arrays, "rows": arrays["rows"] + 5}, answers),
    "another width": lambda arrays, answers: ({**arrays, "mlp.all": arrays["mlp.all"][..., 1:]}, answers),
    "another type": lambda arrays, answers: ({**arrays, "mlp.all": arrays["mlp.all"].astype(mx.int32)}, answers),
    "NaN": lambda arrays, answers: ({**arrays, "mlp.all": arrays["mlp.all"] * float("nan")}, answers),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_content_of_the_cache_is_one_sentence_with_the_file(loaded, measured, tmp_path, what):
    (part,) = measured.folder.glob("*.safetensors")
    rewrite(part, WRONG[what])
    with pytest.raises(UserError, match=f"Delete {measured.folder.name}; it is measured anew") as error:
        ms.measure(loaded, PAIRS, tmp_path / "cache")
    assert str(measured.folder) in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"model_revision": "sha256:0"}'])
def test_a_wrong_description_in_the_cache_is_named(loaded, measured, tmp_path, content):
    (measured.folder / "model_config.json").write_text(content)
    with pytest.raises(UserError, match="model_config.json cannot be used: .* it is measured anew"):
        ms.measure(loaded, PAIRS, tmp_path / "cache")


def test_pairs_with_an_empty_answer_are_named_and_stop_it_above_the_limit(caplog):
    pairs = [Pair(str(i), "c", "a", "b") for i in range(100)]
    ms._tell_left_out("m", pairs[:5], 100)
    assert "5 of 100 pairs (c/0, c/1, c/2, c/3, c/4)" in caplog.text
    with pytest.raises(UserError, match="empty answer to 6 of 100 pairs .* more than the 5%"):
        ms._tell_left_out("m", pairs[:6], 100)
    with pytest.raises(UserError, match="every answer is empty"):
        ms._tell_left_out("m", pairs, 100)


def test_two_processes_at_once_share_one_measurement(loaded, tmp_path):
    code = f"""
import sys
from dataclasses import replace
from pathlib import Path
from alignment_artifacts.directions import measurements as ms
from gemma_refactored.model_loading import load
from tests.test_architectures import PAIRS
answer = ms._answer
def told(*a):
    print("asking")
    answer(*a)
ms._answer = told
m = ms.measure(load({str(loaded.folder)!r}), PAIRS, Path({str(tmp_path / "cache")!r}))
print(m.vectors["mlp", "all"].sum())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(map(len, outputs)) == [1, 2]  # one has asked, both have the numbers
    assert outputs[0][-1] == outputs[1][-1]


def test_a_model_without_mlp_sites_is_measured_on_the_residual_stream(tmp_path):
    mamba = load(write_family(tmp_path / "mamba", "mamba"))
    measured = ms.measure(mamba, PAIRS, tmp_path / "cache")
    assert {site for site, _ in measured.vectors} == {"residual"} == set(measured.sites)
    with pytest.raises(UserError, match="one of residual"):
        measured.vectors_at("mlp", "all")


def test_rows_and_layers(measured):
    assert measured.rows(["topics"]).tolist() == list(range(6)) == measured.rows().tolist()
    with pytest.raises(UserError, match="there are topics"):
        measured.rows(["weather"])
    # One layer is far better than the others, by construction.
    vectors = np.random.default_rng(0).standard_normal((6, 2, 3, 64))
    vectors[:, 1, 1] += 3
    measured.vectors["mlp", "all"] = vectors
    assert measured.best_layers("mlp", "all", np.arange(6)) == [1]
    with pytest.raises(UserError, match="at least 4 independent pairs"):
        measured.best_layers("mlp", "all", np.arange(3))
