"""Reading a collection: what is taken, what is left out and said, what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from alignment_artifacts import activation_set
from alignment_artifacts.activation_set import load_activation_set, refuse_excluded
from alignment_artifacts.pairs import SIDES, Pair, PromptPairs
from gemma_refactored.errors import UserError

PAIRS = [Pair(f"t_{i}", "cat", f"n{i}", f"a{i}") for i in range(6)]
LAYERS, HIDDEN, STEPS = 3, 5, 4


def value(pair, side, step, layer):
    return np.arange(HIDDEN, dtype=np.float32) + 1000 * pair + 100 * side + 10 * step + layer


def write_prompt(folder, i, side, answer_length=STEPS):
    place = folder / PAIRS[i].group(SIDES[side]) / "prompt_list" / "batch_1"
    place.mkdir(parents=True)
    for step in range(answer_length + 1):
        arrays = {f"model.layers.{k}.mlp.output": value(i, side, step, k)[None, None] for k in range(LAYERS)}
        np.savez(place / f"activations_step_{step - 1 if step else 'prefill'}.npz", **arrays)
    np.savez(place / "prompt_embedding.npz", prompt_embedding=value(i, side, 99, 0)[None, None])
    (place / "prompt.json").write_text(
        json.dumps({"token_ids": [7] * answer_length, "prompt": getattr(PAIRS[i], SIDES[side])})
    )
    return place


@pytest.fixture
def folder(tmp_path):
    for i in range(len(PAIRS)):
        for side in range(2):
            write_prompt(tmp_path, i, side, answer_length=2 if (i, side) == (1, 1) else STEPS)
    sites = [f"model.layers.{k}.mlp.output" for k in range(LAYERS)]
    (tmp_path / "manifest.json").write_text(json.dumps({"sites": sites, "max_tokens": STEPS, "model": "m"}))
    return tmp_path


def place(folder, i, side):
    return folder / PAIRS[i].group(SIDES[side]) / "prompt_list" / "batch_1"


def test_every_number_lands_in_its_place(folder):
    data = load_activation_set(folder, PAIRS)
    assert data.values.shape == (6, 2, STEPS + 1, LAYERS, HIDDEN) and data.excluded == []
    for i in range(6):
        for side in range(2):
            for step in range(STEPS + 1):
                there = step <= (2 if (i, side) == (1, 1) else STEPS)
                assert data.valid[i, side, step] == there
                for k in range(LAYERS):
                    expected = value(i, side, step, k) if there else np.zeros(HIDDEN)
                    assert np.array_equal(data.values[i, side, step, k], expected)
            assert np.array_equal(data.prompt_embeddings[i, side], value(i, side, 99, 0))


def test_prompt_vectors_average_the_valid_positions_only(folder, monkeypatch):
    data = load_activation_set(folder, PAIRS)
    for positions, steps in {"prompt_end": [0], "generated": [1, 2], "all": [0, 1, 2]}.items():
        expected = np.mean([value(1, 1, step, 2) for step in steps], axis=0)
        np.testing.assert_allclose(data.prompt_vectors(positions)[1, 1, 2], expected)
    monkeypatch.setattr(activation_set, "PAIRS_AT_ONCE", 4)
    blocks = list(data.step_vectors("generated", 0))
    assert [len(natural) for natural, _ in blocks] == [4 * STEPS, 2 * STEPS]
    assert [len(artifact) for _, artifact in blocks] == [4 * STEPS - 2, 2 * STEPS]
    with pytest.raises(ValueError, match="positions"):
        data.mask("somewhere")


def test_what_does_not_fit_in_memory_goes_to_a_temporary_file(folder, monkeypatch):
    in_memory = load_activation_set(folder, PAIRS)
    files = sorted(folder.rglob("*"))
    monkeypatch.setattr(activation_set, "IN_MEMORY", 0)
    on_disk = load_activation_set(folder, PAIRS)
    assert isinstance(on_disk.values, np.memmap) and isinstance(on_disk.prompt_vectors("all"), np.memmap)
    assert np.array_equal(on_disk.values, in_memory.values)
    assert np.array_equal(on_disk.prompt_vectors("all"), in_memory.prompt_vectors("all"))
    assert sorted(folder.rglob("*")) == files  # it has no name
    monkeypatch.setattr(activation_set.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="free disk"):
        load_activation_set(folder, PAIRS)


def test_settings_may_be_given_but_not_contradict_the_files(folder):
    data = load_activation_set(folder, PAIRS, num_layers=3, num_steps=2, hidden_size=5)
    assert data.values.shape[2] == 3
    for option in ({"num_layers": 4}, {"hidden_size": 6}, {"num_steps": 9}, {"key_pattern": "x.{layer_idx}"}):
        with pytest.raises(UserError, match="NUM_LAYERS|EXPECTED_HIDDEN_DIM|NUM_TOKEN_STEPS|KEY_PATTERN"):
            load_activation_set(folder, PAIRS, **option)


def test_without_a_manifest_the_files_speak(folder):
    for file in ("manifest.json", *(f"{p.group(s)}/prompt_list/batch_1/prompt.json" for p in PAIRS for s in SIDES)):
        (folder / file).unlink()
    data = load_activation_set(folder, PAIRS)
    assert data.values.shape == (6, 2, STEPS + 1, LAYERS, HIDDEN) and data.manifest == {}
    assert data.model == "model and prompts unknown"


def test_incomplete_pairs_are_left_out_and_named(folder):
    (place(folder, 2, 0) / "activations_step_prefill.npz").unlink()
    (place(folder, 4, 1) / "activations_step_1.npz").unlink()
    data = load_activation_set(folder, PAIRS)
    assert [p.id for p in data.pairs] == ["t_0", "t_1", "t_3", "t_5"]
    assert [(e["pair"], e["reason"].split(":")[0]) for e in data.excluded] == [
        ("t_2", "not collected"), ("t_4", "a step is missing"),
    ]  # fmt: skip
    assert len(data.values) == len(data.valid) == len(data.prompt_embeddings) == 4
    for row, pair in enumerate((0, 1, 3, 5)):
        assert np.array_equal(data.values[row, 0, 1, 2], value(pair, 0, 1, 2)) and data.valid[row, 0].all()


def test_a_prompt_that_was_interrupted_is_not_taken_for_a_short_one(folder):
    (place(folder, 2, 0) / "prompt.json").unlink()
    (place(folder, 2, 0) / "activations_step_3.npz").unlink()
    excluded = load_activation_set(folder, PAIRS).excluded
    assert [(e["pair"], e["reason"].split(":")[0]) for e in excluded] == [("t_2", "not complete")]


def test_an_empty_answer_excludes_its_pair(folder):
    for path in place(folder, 3, 0).glob("activations_step_[0-9]*"):
        path.unlink()
    (place(folder, 3, 0) / "prompt.json").write_text('{"token_ids": []}')
    assert [e["pair"] for e in load_activation_set(folder, PAIRS).excluded] == ["t_3"]


def save_all_layers(path, array):
    np.savez(path, **{f"model.layers.{k}.mlp.output": array for k in range(LAYERS)})


def spoil_bytes(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "damaged"),
        (spoil_bytes, "damaged"),
        (lambda p: p.write_bytes(b""), "damaged"),
        (lambda p: np.savez(p, other=np.zeros((1, 1, HIDDEN))), "no array"),
        (lambda p: save_all_layers(p, np.zeros((1, 1, 2))), "shape"),
        (lambda p: save_all_layers(p, np.full((1, 1, 5), np.nan)), "NaN"),
        (lambda p: save_all_layers(p, np.array([{}] * 5)), "damaged"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(folder, spoil, message):
    path = place(folder, 2, 1) / "activations_step_2.npz"
    spoil(path)
    with pytest.raises(UserError, match=message) as error:
        load_activation_set(folder, PAIRS)
    assert str(path) in str(error.value)


def test_any_flipped_bit_is_refused_or_without_effect(folder):
    """Every byte of a file, one bit of each: never other numbers, never a traceback."""
    expected = load_activation_set(folder, PAIRS[:1], num_steps=0).values
    path = place(folder, 0, 0) / "activations_step_prefill.npz"
    content = path.read_bytes()
    refused = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            assert np.array_equal(load_activation_set(folder, PAIRS[:1], num_steps=0).values, expected), position
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(content) / 2


def test_no_collection(tmp_path):
    with pytest.raises(UserError, match="collect_activations.sh"):
        load_activation_set(tmp_path / "nothing", PAIRS)
    with pytest.raises(UserError, match="none of the prompt pairs"):
        load_activation_set(tmp_path, PAIRS)


def test_a_foreign_folder_without_the_prompts_ends_is_told_which_file_is_missing(folder):
    for file in [folder / "manifest.json", *folder.rglob("prompt.json"), *folder.rglob("*_prefill.npz")]:
        file.unlink()
    with pytest.raises(UserError, match=r"batch_1 has no activations_step_prefill\.npz"):
        load_activation_set(folder, PAIRS)


def test_pairs_whose_texts_were_edited_after_the_collection_are_excluded_by_name(folder):
    swapped = replace(PAIRS[1], natural=PAIRS[1].artifact, artifact=PAIRS[1].natural)
    edited = [PAIRS[0], swapped, replace(PAIRS[2], artifact="other words"), *PAIRS[3:]]
    data = load_activation_set(folder, edited)
    assert [pair.id for pair in data.pairs] == ["t_0", "t_3", "t_4", "t_5"] and data.model == "m"
    assert np.array_equal(data.values, load_activation_set(folder, [PAIRS[0], *PAIRS[3:]]).values)
    reasons = {item["pair"]: item["reason"] for item in data.excluded}
    assert reasons["t_1"] == "its two sides were swapped in the pairs file after the collection"
    assert "'a2'" in reasons["t_2"] and "'other words'" in reasons["t_2"] and "natural" not in reasons["t_2"]
    with pytest.raises(UserError, match="2 of 6 pairs cannot be used.*swapped"):
        refuse_excluded(data)
    refuse_excluded(data, limit=0.5)


def test_collections_that_do_not_say_their_prompts_are_labelled(folder):
    for marker in folder.rglob("prompt.json"):
        marker.write_text('{"token_ids": [7, 7]}')
    data = load_activation_set(folder, PAIRS)
    assert data.model == "m (prompts unknown)" and data.valid.sum() == 6 * 2 * 3
    (folder / "manifest.json").unlink()
    assert load_activation_set(folder, PAIRS).model == "model and prompts unknown"


def test_names_of_arrays_are_found_without_a_manifest(tmp_path):
    for i, pair in enumerate(PAIRS):
        for side in SIDES:
            place = tmp_path / pair.group(side) / "prompt_list" / "batch_1"
            place.mkdir(parents=True)
            for step in ("prefill", 0, 1, 2)[: 2 + i % 3]:  # answers of different lengths
                np.savez(place / f"activations_step_{step}.npz", **{f"blocks.{k}.out": np.ones(4) for k in range(2)})
    data = load_activation_set(tmp_path, PAIRS)
    assert data.values.shape == (6, 2, 4, 2, 4) and data.valid.sum() == 2 * (2 + 3 + 4) * 2


@pytest.mark.parametrize("pattern", ["model.layers.{layer}.mlp.output", "model.layers.{layer_idx}.mlp.output"])
def test_a_layer_may_be_called_layer(folder, pattern):
    expected = load_activation_set(folder, PAIRS).values
    assert np.array_equal(load_activation_set(folder, PAIRS, key_pattern=pattern).values, expected)
    for wrong in ("model.layers.0.mlp.output", f"{pattern}.{{layer}}"):
        with pytest.raises(UserError, match="layer_idx"):
            load_activation_set(folder, PAIRS, key_pattern=wrong)


def as_flat(grouped, folder, rows_per_batch=5):
    """The same collection in the other layout; zeros where a prompt has ended."""
    prompts = [(i, side) for i in range(len(PAIRS)) for side in range(2)][::-1]
    for number, start in enumerate(range(0, len(prompts), rows_per_batch), 1):
        batch = prompts[start : start + rows_per_batch]
        (folder / f"batch_{number}").mkdir(parents=True)
        for step in range(STEPS + 1):
            name = f"activations_step_{step - 1 if step else 'prefill'}.npz"
            files = [place(grouped, *prompt) / name for prompt in batch]
            rows = [np.load(file) if file.exists() else None for file in files]
            arrays = {
                f"model.layers.{k}.mlp.output": np.concatenate(
                    [np.zeros((1, 1, HIDDEN)) if row is None else row[f"model.layers.{k}.mlp.output"] for row in rows]
                )
                for k in range(LAYERS)
            }
            np.savez(folder / f"batch_{number}" / name, **arrays)
        embeddings = [np.load(place(grouped, *prompt) / "prompt_embedding.npz")["prompt_embedding"] for prompt in batch]
        np.savez(folder / f"batch_{number}" / "prompt_embedding.npz", prompt_embedding=np.concatenate(embeddings))
        rows = [
            {
                "group": PAIRS[i].group(SIDES[side]), "subcategory": "prompt_list", "number": 1,
                "prompt": getattr(PAIRS[i], SIDES[side]), "valid_steps": 2 if (i, side) == (1, 1) else STEPS,
            }
            for i, side in batch
        ]  # fmt: skip
        (folder / f"batch_{number}" / "batch.json").write_text(json.dumps({"rows": rows}))
    manifest = json.loads((grouped / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "layout": "flat"}))
    return folder


def test_a_flat_collection_gives_the_numbers_of_the_grouped_one(folder, tmp_path_factory):
    expected, flat = load_activation_set(folder, PAIRS), as_flat(folder, tmp_path_factory.mktemp("flat"))
    data = load_activation_set(flat, PAIRS)
    assert np.array_equal(data.values, expected.values) and np.array_equal(data.valid, expected.valid)
    assert np.array_equal(data.prompt_embeddings, expected.prompt_embeddings) and data.model == "m"
    edited = [replace(PAIRS[0], natural="other words"), *PAIRS[1:]]
    assert [item["pair"] for item in load_activation_set(flat, edited).excluded] == ["t_0"]


def test_an_unfinished_or_damaged_batch_is_said(folder, tmp_path_factory):
    flat = as_flat(folder, tmp_path_factory.mktemp("flat"))
    (flat / "batch_1" / "batch.json").unlink()  # its rows are the last pairs
    data = load_activation_set(flat, PAIRS)
    assert [item["pair"] for item in data.excluded] == ["t_3", "t_4", "t_5"]
    assert "batch.json" in data.excluded[0]["reason"]
    for damaged in ("{}", "[]", '{"rows": [{}]}', '{"rows": [{"group": 1}]}', '{"rows": 3}', '{"rows": ["text"]}'):
        (flat / "batch_1" / "batch.json").write_text(damaged)
        with pytest.raises(UserError, match="batch_1/batch.json"):
            load_activation_set(flat, PAIRS)


def test_of_several_sites_one_must_be_named(folder):
    """Silently taking one of them would make two runs that differ in nothing but their numbers."""
    for path in folder.rglob("activations_step_*.npz"):
        with np.load(path) as arrays:
            mlp = dict(arrays)
        residual = {name.replace(".mlp.", "."): values + 0.5 for name, values in mlp.items()}
        np.savez(path, **mlp, **residual)
    sites = [f"model.layers.{k}.{part}output" for k in range(LAYERS) for part in ("", "mlp.")]
    (folder / "manifest.json").write_text(json.dumps({"sites": sites, "max_tokens": STEPS, "model": "m"}))
    with pytest.raises(UserError, match="2 sites in each layer.*SITE to one of mlp, residual"):
        load_activation_set(folder, PAIRS)
    mlp, residual = (load_activation_set(folder, PAIRS, site=site) for site in ("mlp", "residual"))
    assert residual.site == "model.layers.{layer_idx}.output" and mlp.site == "model.layers.{layer_idx}.mlp.output"
    np.testing.assert_allclose(residual.values, mlp.values + 0.5 * mlp.valid[..., None, None])
    assert load_activation_set(folder, PAIRS, key_pattern=residual.site).site == residual.site
    with pytest.raises(UserError, match="holds no site attention, but site mlp, residual"):
        load_activation_set(folder, PAIRS, site="attention")


def test_the_only_site_there_is_is_read(folder):
    assert load_activation_set(folder, PAIRS).site == "model.layers.{layer_idx}.mlp.output"
    with pytest.raises(UserError, match="holds no site residual, but site mlp"):
        load_activation_set(folder, PAIRS, site="residual")


def test_a_changed_text_is_named_by_the_side_of_the_pairs(folder):
    pairs = PromptPairs(PAIRS, "sycophancy", ("neutral", "opinion"))
    pairs[0] = replace(pairs[0], artifact="I am sure of another text.")
    (excluded,) = load_activation_set(folder, pairs).excluded
    assert "its opinion prompt was collected as" in excluded["reason"]


def test_the_answer_begins_behind_the_thought(folder):
    marker = place(folder, 0, 0) / "prompt.json"
    record = json.loads(marker.read_text())
    without = load_activation_set(folder, PAIRS)
    assert without.thoughts is None
    for positions, same in (("answer", "generated"), ("answer_start", "prompt_end")):
        assert np.array_equal(without.mask(positions), without.mask(same))
        assert np.array_equal(without.prompt_vectors(positions), without.prompt_vectors(same))
    for thought, answer, start in ((2, [3, 4], [2]), (0, [1, 2, 3, 4], [0]), (STEPS, [], [STEPS]), (None, [], [])):
        marker.write_text(json.dumps({**record, "thought_tokens": thought}))
        other = place(folder, 1, 1) / "prompt.json"
        other.write_text(json.dumps({**json.loads(other.read_text()), "thought_tokens": 1}))
        data = load_activation_set(folder, PAIRS)
        assert np.flatnonzero(data.mask("answer")[0, 0]).tolist() == answer
        assert np.flatnonzero(data.mask("answer_start")[0, 0]).tolist() == start
        vectors = data.prompt_vectors("answer")
        assert np.isnan(vectors[0, 0]).all() == (not answer) and np.isfinite(vectors[2:]).all()
        if answer:
            np.testing.assert_allclose(vectors[0, 0], data.values[0, 0, answer].mean(axis=0))
        np.testing.assert_allclose(vectors[1, 1], data.values[1, 1, 2])
