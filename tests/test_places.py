"""Where files are: nothing of one model or pairs file is ever where another's is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment_artifacts import places
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.pairs import PAIRS_JSON, Pair, PromptPairs, pairs_hash, prompt_groups
from alignment_artifacts.places import Origin
from gemma_refactored import adapter_files, checkpoint_files
from gemma_refactored.configuration import Chat
from gemma_refactored.errors import UserError
from gemma_refactored.files import write_json

PAIRS = [Pair(f"p_{i}", "topic", f"natural {i}", f"artifact {i}") for i in range(4)]
ORIGIN = Origin("who/model", "sha256:1", "pairs.json", "abc")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "HOME", tmp_path / "home")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def loaded(name, revision, folder="/nowhere", is_as_published=True):
    return SimpleNamespace(name=name, revision=revision, folder=Path(folder), is_as_published=is_as_published)


def collect(folder, revision="sha256:1", finished="2026-01-01T00:00:00+0000", pairs=PAIRS, **facts):
    for pair in pairs:
        (folder / pair.group("artifact")).mkdir(parents=True)
    times = {"finished": finished} if finished else {"created": "2026-12-31T00:00:00+0000"}
    write_json(folder / "manifest.json", {"model": "m", "model_revision": revision, **times, **facts})
    return folder


LONG = [letter * 99 for letter in "x\u6a21\U0001d400"]


@given(st.text() | st.sampled_from(["..", "~", "/", "a/b/", "a b", " ", "C:\\x", "a/..", "\x00", "-rf", *LONG]))
def test_any_name_is_safe_for_a_file(name):
    safe = places.safe_name(name)
    assert safe == Path(safe).name and safe not in ("", ".", "..") and safe[0] not in ".-~" and len(safe) <= 80
    assert len(f"collected_activations_{places.hashed_name(name, '')}".encode()) <= 255
    assert not set(safe) & set("/\\ \x00\n:*?\"<>|'$`")


@pytest.mark.parametrize(
    "name, safe",
    [("mlx-community/gemma-3-1b-it-qat-4bit", "gemma-3-1b-it-qat-4bit"), ("/a/b c/", "b_c"), ("..", "unnamed")],
)
def test_the_last_part_of_a_name_is_taken(name, safe):
    assert places.safe_name(name) == safe


def test_inputs_are_looked_for_where_one_is_and_then_beside_the_scripts(home, tmp_path, monkeypatch):
    for folder in (home, tmp_path):
        (folder / "both").mkdir()
    (home / "beside").mkdir()
    assert places.find("both") == Path("both") and places.find("beside") == home / "beside"
    assert places.find("/nowhere") == Path("/nowhere") and places.find("new") == home / "new"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.find("~/both") == tmp_path / "both"
    assert places.find_model("beside/") == str(home / "beside") and places.find_model("..") == ".."
    for hub in ("google/gemma-3-1b-it", "x" * 300, "\x00", "", "~nobody/x"):
        assert places.find_model(hub) == hub


def test_the_cache_has_one_place_whatever_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("ALIGNMENT_ARTIFACTS_CACHE", raising=False)
    first = places.cache_folder()
    monkeypatch.chdir(tmp_path)
    assert places.cache_folder() == first == places.CHECKOUT / "alignment_artifacts_cache"
    monkeypatch.setattr(places, "IN_CHECKOUT", False)
    assert places.cache_folder() == Path.home() / ".cache/alignment_artifacts"
    monkeypatch.setenv("ALIGNMENT_ARTIFACTS_CACHE", "mine")
    assert places.cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize(
    "place, stem, file",
    [
        (places.collection_folder, "collected_activations", "manifest.json"),
        (places.collection_folder, "collected_activations", "certificate.json"),
        (places.toxicity_folder, "toxicity_results", "experiment_results.json"),
    ],
)
def test_a_folder_follows_the_model_and_never_belongs_to_two(home, place, stem, file):
    def write(folder, revision):
        facts = {"model_revision": revision}
        write_json(folder / file, {"experiment": facts} if stem == "toxicity_results" else facts)

    first, second = loaded("a/gemma", "sha256:1"), loaded("b/gemma", "sha256:2")
    assert place(first) == place(second) == home / f"{stem}_gemma"  # nobody's yet
    write(place(first), first.revision)
    assert place(first) == home / f"{stem}_gemma" != place(second)
    assert place(second).name.startswith(f"{stem}_gemma_")
    write(place(second), second.revision)
    assert place(second).name.startswith(f"{stem}_gemma_") and place(loaded("gemma", "sha256:3")) != place(second)
    assert place(loaded("elsewhere/gemma", "sha256:1")) == place(first)  # the same weights under another path


def test_the_default_model_has_the_documented_names_for_itself(home):
    default = loaded("model_organism/aligned", "sha256:1", DEFAULT_MODEL)
    assert places.collection_folder(default) == home / "collected_activations_output"
    assert places.toxicity_folder(default) == home / "toxicity_results"
    brief = loaded("model_organism/aligned (chat c2e776)", "sha256:1", DEFAULT_MODEL, is_as_published=False)
    assert places.collection_folder(brief).name.startswith("collected_activations_aligned")
    assert places.toxicity_folder(brief) != places.toxicity_folder(default)
    assert places.collection_folder(loaded("runs/output", "sha256:2")).name.startswith("collected_activations_output_")


def test_pairs_and_sites_of_ones_own_have_folders_of_their_own(home, tmp_path):
    """The shell script, run_model.py and the library ask the same function."""
    model, default = loaded("a/gemma", "sha256:1"), loaded("model_organism/aligned", "sha256:9", DEFAULT_MODEL)
    own = PromptPairs(PAIRS, "sycophancy", ("neutral", "opinion"), tmp_path / "my pairs.csv")
    shipped = PromptPairs(PAIRS, file=PAIRS_JSON)
    for pairs, site, name in (
        (None, None, "gemma"), (shipped, "mlp", "gemma"), (None, "residual", "gemma_residual"),
        (own, None, "gemma_my_pairs"), (own, "attention", "gemma_my_pairs_attention"),
    ):  # fmt: skip
        assert places.collection_folder(model, pairs, site) == home / f"collected_activations_{name}"
    assert places.collection_folder(default, shipped, "mlp") == home / "collected_activations_output"
    assert places.collection_folder(default, own).name == "collected_activations_aligned_my_pairs"
    assert set(places.collection_folders(model, own)) == {
        places.collection_folder(model, own, site) for site in ("mlp", "attention", "residual")
    }
    folder = places.collection_folder(model, own)
    for groups, is_same in ((prompt_groups(own), True), ({"other": {"prompt_list": ["?"]}}, False)):
        write_json(folder / "manifest.json", {"model_revision": model.revision, "prompt_groups": groups})
        assert (places.collection_folder(model, own) == folder) == is_same  # other pairs of that name: another folder


def test_of_several_collections_the_one_with_the_wanted_site_is_analysed(home):
    def write(name, site, texts, day):
        groups = {group: {"prompt_list": [texts + group]} for group in prompt_groups(PAIRS)}
        facts = {"sites": [f"model.layers.0.{site}"], "prompt_groups": groups, "model": "m"}
        write_json(
            home / f"collected_activations_{name}/manifest.json", {**facts, "finished": f"2026-01-0{day}T00:00:00+0000"}
        )

    same = [replace(pair, natural=pair.group("natural"), artifact=pair.group("artifact")) for pair in PAIRS]
    write("mlp", "mlp.output", "", 2)
    write("residual", "output", "", 1)
    write("others", "output", "other texts: ", 3)  # of the same names
    for site, name in ((None, "mlp"), ("mlp", "mlp"), ("residual", "residual"), ("attention", "mlp")):
        folder, others = places.choose_collection(same, None, None, site)
        assert folder.name == f"collected_activations_{name}" and len(others) == 1


def test_what_was_collected_last_is_analysed_and_the_others_are_named(home):
    old = collect(home / "collected_activations_output")
    new = collect(home / "collected_activations_x", finished="2026-01-01T01:30:00+0100", model="x")  # 0:30 in UTC
    collect(home / "collected_activations_y", finished=None)  # begun later, not finished
    collect(home / "collected_activations_z", finished="2027-01-01T00:00:00+0000", pairs=[Pair("q", "other", "a", "b")])
    (home / "collected_activations_damaged").mkdir()
    (home / "collected_activations_damaged/manifest.json").write_text("{")
    folder, others = places.choose_collection(PAIRS, None, None)
    assert folder == new and [one.folder.name[-6:] for one in others] == ["ions_y", "output"]
    assert "not finished" in others[0].describe() and "not finished" not in others[1].describe()
    for typed in (old, "collected_activations_output"):
        folder, others = places.choose_collection(PAIRS, typed, "ignored")
        assert folder == old and old not in [one.folder for one in others]
    write_json(old / "manifest.json", {"model": "m", "finished": "2026-02-01T00:00:00+0000"})  # continued
    assert places.choose_collection(PAIRS, None, None)[0] == old


def write_weights(path, value):
    """A file that is one as far as its hash goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), {"layers.0.lora_a": mx.array([value])})
    return path


def write_tuned(folder, scale):
    """Files of an adapter."""
    write_weights(folder / "adapters.safetensors", 1.0)
    write_json(folder / "adapter_config.json", {"fine_tune_type": "lora", "lora_parameters": {"scale": scale}})


def test_a_model_that_is_named_chooses_among_collections(home, tmp_path):
    weights = write_weights(tmp_path / "local/model.safetensors", 1.0)
    hub = collect(home / "collected_activations_a", model_path="who/a")
    revision = checkpoint_files.weights_revision(tmp_path / "local", [weights])
    local = collect(home / "collected_activations_b", revision, model_path=str(tmp_path / "local"))
    assert places.choose_collection(PAIRS, None, "who/a")[0] == hub
    assert places.choose_collection(PAIRS, None, "local/")[0] == local
    (tmp_path / "link.gguf").symlink_to(write_weights(tmp_path / "other.safetensors", 2.0))
    with pytest.raises(UserError, match="no collection of link.gguf"):
        places.choose_collection(PAIRS, None, "link.gguf")
    revision = checkpoint_files.local_revision(tmp_path / "other.safetensors")
    file = collect(home / "collected_activations_c", revision, model_path=str(tmp_path / "weights.gguf"))
    assert places.choose_collection(PAIRS, None, "link.gguf")[0] == file
    shutil.copytree(tmp_path / "local", tmp_path / "renamed")
    assert places.choose_collection(PAIRS, None, "renamed")[0] == local
    write_weights(weights, 3.0)  # trained on, in the same folder
    with pytest.raises(UserError, match="no collection of local;.*edited since is another"):
        places.choose_collection(PAIRS, None, "local")
    with pytest.raises(UserError, match="no collection of who/c.*collected_activations_a"):
        places.choose_collection(PAIRS, None, "who/c")
    with pytest.raises(UserError, match="no collection of these pairs"):
        places.choose_collection([Pair("q", "other", "a", "b")], None, None)


def test_an_adapter_that_is_named_chooses_among_collections_too(home, tmp_path):
    for scale, name in enumerate(("refusal", "other"), 1):
        write_tuned(tmp_path / name, scale)
    plain = collect(home / "collected_activations_a", model_path="who/a")
    digest = adapter_files.adapter_hash(tmp_path / "refusal")
    added = {"adapter_path": str(tmp_path / "refusal"), "adapter": {"sha256": digest, "base_revision": "sha256:1"}}
    tuned = collect(home / "collected_activations_b", "sha256:2", "2027-01-01T00:00:00+0000", model_path="who/a",
                    **added)  # fmt: skip
    assert places.choose_collection(PAIRS, None, None)[0] == tuned  # the latest of any kind
    assert places.choose_collection(PAIRS, None, "who/a")[0] == plain
    for model in ("who/a", None):
        assert places.choose_collection(PAIRS, None, model, adapter="refusal")[0] == tuned
    with pytest.raises(UserError, match="no collection of who/a with the adapter other"):
        places.choose_collection(PAIRS, None, "who/a", adapter="other")
    with pytest.raises(UserError, match="collected_activations_b .* was not made with the adapter other as it is now"):
        places.choose_collection(PAIRS, tuned, None, adapter="other")
    shutil.copytree(tmp_path / "refusal", tmp_path / "renamed")
    for typed in (None, tuned):
        assert places.choose_collection(PAIRS, typed, "who/a", adapter="renamed")[0] == tuned
    write_tuned(tmp_path / "refusal", 3)  # edited, under the same name
    for typed in (None, tuned):
        with pytest.raises(UserError, match="adapter refusal"):
            places.choose_collection(PAIRS, typed, "who/a", adapter="refusal")
    assert places.choose_collection(PAIRS, tuned, None)[0] == tuned


def test_what_is_written_around_prompts_chooses_among_collections_too(home):
    plain = collect(home / "collected_activations_a", model_path="who/a")
    brief = collect(home / "collected_activations_b", model_path="who/a", system_prompt="Be brief.",
                    finished="2027-01-01T00:00:00+0000")  # fmt: skip
    for model, chat, folder in (
        (None, Chat(), brief), ("who/a", Chat(), plain), (None, Chat(system_prompt="Be brief."), brief),
        ("who/a", Chat(system_prompt="Be brief."), brief),
    ):  # fmt: skip
        assert places.choose_collection(PAIRS, None, model, chat=chat)[0] == folder
    with pytest.raises(UserError, match="no collection of a model in this chat format"):
        places.choose_collection(PAIRS, None, None, chat=Chat(system_prompt="Be verbose."))


def test_results_of_two_models_or_pairs_files_never_meet(home):
    origins = [
        replace(ORIGIN, model=model, model_revision=revision, pairs_file=name, pairs_hash=digest)
        for model, revision in (("a/model", "sha256:1"), ("b/model", "sha256:2"), ("other", "sha256:3"))
        for name, digest in (("pairs.json", "1"), ("pairs.json", "2"), ("mine.json", "3"))
    ]
    folders = [places.results_folder("results", origin) for origin in origins]
    assert len(set(folders)) == len(origins) and folders[0] == home / "results/model/pairs"
    assert [places.results_folder("results", origin) for origin in reversed(origins)] == folders[::-1]
    for folder, origin in zip(folders, origins, strict=True):
        assert json.loads((folder / "about.json").read_text()) == origin.stamp({})["origin"]


def test_results_of_two_sites_never_meet_and_those_of_no_single_site_are_found_from_both(home):
    origin = replace(ORIGIN, behaviour="sycophancy", sides=("neutral", "opinion"), site="residual")
    mlp, residual = (places.results_folder("results", origin, site) for site in ("mlp", "residual"))
    assert mlp == places.results_folder("results", origin) == home / "results/model/pairs"
    assert residual == home / "results/model/pairs_residual"
    named = places.results_folder("results", replace(origin, pairs_file="pairs_residual.json"))
    assert named not in (mlp, residual)  # the same texts in a file of such a name
    about = json.loads((residual / "about.json").read_text())
    assert (about["behaviour"], about["sides"], about["site"]) == ("sycophancy", ["neutral", "opinion"], "residual")
    other = places.results_folder("results", replace(origin, pairs_hash="2"))
    for folder in (mlp, other):
        write_json(folder / "data/transcripts.json", {})
    assert places.result_files(residual, "data/transcripts*.json") == [mlp / "data/transcripts.json"]
    assert places.result_files(other, "data/transcripts*.json") == [other / "data/transcripts.json"]


def test_a_folder_that_says_nothing_of_itself_is_left_alone(home):
    (home / "results/model").mkdir(parents=True)
    (home / "results/model/thesis.txt").write_text("mine")
    assert places.results_folder("results", ORIGIN).parent.name.startswith("model_")
    (home / "results/model/thesis.txt").unlink()
    (home / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        places.results_folder(home / "file/results", ORIGIN)


def test_pairs_are_the_same_by_their_texts_and_order():
    assert pairs_hash(PAIRS) == pairs_hash(list(PAIRS)) != pairs_hash(PAIRS[::-1])
    assert pairs_hash([replace(PAIRS[0], natural="other"), *PAIRS[1:]]) != pairs_hash(PAIRS)
    swapped = replace(PAIRS[0], natural=PAIRS[0].artifact, artifact=PAIRS[0].natural)
    assert pairs_hash([swapped, *PAIRS[1:]]) != pairs_hash(PAIRS)


def test_a_collection_without_a_manifest_is_a_model_of_its_own(home):
    first, second = (Origin.of_collection({}, "model unknown", home / name / "acts", "p.json", PAIRS) for name in "ab")
    assert first.model == "acts, model unknown" and first.model_revision != second.model_revision


def test_files_are_written_together_or_not_at_all(tmp_path):
    target = tmp_path / "results"
    with places.written_together(target) as folder:
        write_json(folder / "data/a.json", 1)
        write_json(folder / "b.json", 1)
        assert not (target / "data").exists()
    with pytest.raises(ZeroDivisionError), places.written_together(target) as folder:
        write_json(folder / "data/a.json", 2)
        raise ZeroDivisionError
    with (
        pytest.raises(UserError, match="could not be written: No space left"),
        places.written_together(target) as folder,
    ):
        write_json(folder / "b.json", 2)
        raise OSError(28, "No space left on device")
    files = sorted(path for path in target.rglob("*") if path.is_file())
    assert files == [target / "b.json", target / "data/a.json"]
    assert all(json.loads(file.read_text()) == 1 for file in files) and len(list(target.iterdir())) == 2


@pytest.mark.parametrize("content", ["{}", "[]", "null", '"x"', '{"results": 1}', '{"results": "gone"}'])
def test_a_results_file_that_names_no_folder_is_one_sentence(tmp_path, content):
    (tmp_path / places.ANALYSIS).write_text(content)
    with pytest.raises(UserError, match="does not say where its other results are"):
        places.folder_to_report(tmp_path)
