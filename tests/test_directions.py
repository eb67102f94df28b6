"""Directions: estimated rightly, refused on other models, the same after a trip through a file."""

import json

import mlx.core as mx
import numpy as np
import pytest

from alignment_artifacts.directions import estimate as d
from alignment_artifacts.directions.files import PARTS, load_directions, save_directions, write_gguf
from alignment_artifacts.edits.modes import ModeOptions
from alignment_artifacts.edits.setting import site_direction
from gemma_refactored.activation_capture import capture, layer_sites
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import load

from .conftest import no_file_larger_than
from .tiny_checkpoints import random_gemma, write_checkpoint, write_family

PAIRS, LAYERS, HIDDEN = 12, 3, 64


@pytest.fixture
def loaded(tmp_path):
    return load(write_checkpoint(tmp_path / "m", random_gemma()))


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    planted = rng.standard_normal((LAYERS, HIDDEN)) * 2
    values = rng.standard_normal((PAIRS, 2, LAYERS, HIDDEN))
    values[:, 1] += planted
    return values.astype(np.float32)


def facts(loaded, site="residual"):
    return {**loaded.facts(), "model_type": "gemma3_text", "site": site, "positions": "prompt_end"}


def test_estimates_follow_their_definitions(vectors):
    found = d.estimate(vectors, {})
    natural, artifact = vectors[:, 0].astype(np.float64), vectors[:, 1].astype(np.float64)
    np.testing.assert_allclose(found.direction, artifact.mean(0) - natural.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.unit, axis=-1), 1, rtol=1e-5)
    for layer in range(LAYERS):
        deviations = [*(natural[:, layer] - natural.mean(0)[layer]), *(artifact[:, layer] - artifact.mean(0)[layer])]
        assert found.spread[layer] == pytest.approx(np.sqrt(np.mean([v @ v for v in deviations])), rel=1e-5)
        basis = found.components[layer]
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)
    # Not centred: the first component is close to the mean difference itself.
    assert np.abs((found.components[:, 0] * found.unit).sum(-1)).min() > 0.9


def test_no_pairs_are_refused():
    with pytest.raises(UserError, match="no pairs"):
        d.estimate(np.zeros((0, 2, LAYERS, HIDDEN)), {})


def test_natural_tokens_are_all_tokens_projected(loaded, vectors):
    found = d.estimate(vectors, facts(loaded))
    sequences = [[2, 5, 9, 77], [2, 8]]
    measured = d.measure_natural_tokens(loaded, found, sequences)
    assert measured.natural_tokens.shape == (LAYERS, 6)
    sites, expected = layer_sites(loaded.model, "residual"), []
    for tokens in sequences:
        with capture(loaded.model, sites) as activations:
            loaded.model(mx.array([tokens]))
        expected.append(np.array(activations[sites[1]][0]) @ found.unit[1])
    np.testing.assert_allclose(measured.natural_tokens[1], np.sort(np.concatenate(expected)), atol=1e-4)
    assert site_direction(measured, 1, ModeOptions(cap_quantile=1.0)).cap == pytest.approx(
        np.concatenate(expected).max(), rel=1e-4
    )


def test_random_directions_have_the_norms_and_nothing_else(vectors):
    found = d.estimate(vectors, {})
    control = d.random_like(found, 3)
    np.testing.assert_allclose(
        np.linalg.norm(control.direction, axis=-1), np.linalg.norm(found.direction, axis=-1), rtol=1e-5
    )
    assert np.abs((control.unit * found.unit).sum(-1)).max() < 0.5
    np.testing.assert_allclose(np.abs((control.components[:, 0] * control.unit).sum(-1)), 1, rtol=1e-5)
    np.testing.assert_allclose(control.artifact_mean - control.natural_mean, control.direction, atol=1e-5)
    assert np.array_equal(d.random_like(found, 3).direction, control.direction)
    assert not np.array_equal(d.random_like(found, 4).direction, control.direction)


def test_sites_of_other_architectures(tmp_path):
    llama = load(write_family(tmp_path / "llama", "llama"))
    assert layer_sites(llama.model, "mlp")[2] == "model.layers.2.mlp.output"
    mamba = load(write_family(tmp_path / "mamba", "mamba"))
    assert layer_sites(mamba.model, "residual")[0] == "backbone.layers.0.output"
    with pytest.raises(UserError, match="residual"):
        layer_sites(mamba.model, "mlp")
    with pytest.raises(UserError, match="mlp, attention, residual"):
        layer_sites(mamba.model, "neurons")


def test_another_model_is_refused(loaded, vectors, tmp_path):
    found = d.estimate(vectors, facts(loaded))
    d.fit_to(found, loaded)
    changed = random_gemma()
    changed.model.norm.weight = changed.model.norm.weight + 1
    other = load(write_checkpoint(tmp_path / "other", changed))
    with pytest.raises(UserError, match="model_revision"):
        d.fit_to(found, other)
    with pytest.raises(UserError, match="num_layers 9"):
        d.fit_to(d.estimate(vectors, {**facts(loaded), "num_layers": 9}), loaded)


def test_a_file_gives_the_same_back(loaded, vectors, tmp_path):
    found = d.measure_natural_tokens(loaded, d.estimate(vectors, facts(loaded)), [[2, 5, 9]])
    path = tmp_path / "new" / "directions.safetensors"
    save_directions(found, path)
    again = load_directions(path)
    assert again.facts == found.facts and [f.name for f in path.parent.iterdir()] == [path.name]
    for name in PARTS:
        assert np.array_equal(getattr(again, name), getattr(found, name)), name


@pytest.mark.parametrize("content", [b"", b"nonsense" * 40])
@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_damaged_files_get_a_sentence(tmp_path, content, ending):
    path = tmp_path / f"bad.{ending}"
    with pytest.raises(UserError, match="no directions file"):
        load_directions(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a"):
        load_directions(path)


def test_gguf_has_the_layout_of_repeng_and_llama_cpp(loaded, vectors, tmp_path):
    import gguf

    found = d.estimate(vectors, facts(loaded))
    path = tmp_path / "vector.gguf"
    write_gguf(found, path)
    # As repeng's ControlVector.import_gguf reads it.
    reader = gguf.GGUFReader(path)
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"
    assert bytes(reader.get_field("controlvector.model_hint").parts[-1]) == b"gemma3_text"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.2"]  # llama.cpp has no layer 0
    assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 2
    for layer in (1, 2):
        assert np.array_equal(tensors[f"direction.{layer}"], found.direction[layer])
    again = load_directions(path)
    assert again.available == (1, 2) and again.facts == json.loads(json.dumps(found.facts))
    assert np.array_equal(again.direction[1:], found.direction[1:])


def test_a_control_vector_that_cannot_be_written_leaves_nothing(loaded, vectors, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for name in ("folder.gguf", "x" * 300 + ".gguf"):
        with pytest.raises(UserError, match="could not be written"):
            write_gguf(d.estimate(vectors, facts(loaded)), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.gguf", "m"]  # and the model


@pytest.mark.parametrize("missing", [1, 100, 600, 4000])
def test_a_control_vector_is_whole_or_not_there_where_the_disk_fills_up(loaded, vectors, tmp_path, missing):
    directions = d.estimate(vectors, facts(loaded))
    write_gguf(directions, tmp_path / "whole.gguf")
    size = (tmp_path / "whole.gguf").stat().st_size
    with no_file_larger_than(max(size - missing, 0)), pytest.raises(UserError, match="could not be written"):
        write_gguf(directions, tmp_path / "cut.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "whole.gguf"]


def control_vector(path, vectors, hint="gemma3", dtype=np.float32):
    """A file as llama.cpp or repeng would write it."""
    import gguf

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for name, values in vectors.items():
        writer.add_tensor(f"direction.{name}", np.asarray(values, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_vector_made_by_another_program_can_be_used(loaded, tmp_path, layer, dtype):
    """Layers that it leaves out, the last ones too, have no direction."""
    path = control_vector(tmp_path / "theirs.gguf", {layer: np.ones(HIDDEN)}, dtype=dtype)
    found = d.fit_to(load_directions(path), loaded)
    assert found.direction.shape == (LAYERS, HIDDEN)
    assert found.available == (layer,) and np.array_equal(found.direction[layer], np.ones(HIDDEN))
    assert np.isnan(site_direction(found, layer, ModeOptions()).cap)


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({1: np.full(HIDDEN, np.nan)}, "direction.1 is NaN or infinite"),
        ({1: np.ones(HIDDEN), 2: np.full(HIDDEN, np.inf)}, "direction.2 is NaN or infinite"),
        ({1: np.ones(HIDDEN), 2: np.ones(HIDDEN + 1)}, "different widths"),
        ({1: np.ones((2, HIDDEN))}, "direction.1 is not a vector"),
        ({"last": np.ones(HIDDEN)}, "the number of a layer"),
    ],
)
def test_control_vectors_that_are_none_are_refused(tmp_path, vectors, message):
    with pytest.raises(UserError, match=message):
        load_directions(control_vector(tmp_path / "bad.gguf", vectors))


@pytest.mark.parametrize(
    "vectors, hint, message",
    [
        ({1: np.ones(HIDDEN)}, "mistral", "type 'mistral'"),
        ({1: np.ones(HIDDEN + 4)}, "gemma3_text", f"width {HIDDEN + 4}"),
        ({LAYERS: np.ones(HIDDEN)}, "gemma3_text", f"{LAYERS + 1} layers"),
    ],
)
def test_control_vectors_of_other_models_are_refused(loaded, tmp_path, vectors, hint, message):
    directions = load_directions(control_vector(tmp_path / "other.gguf", vectors, hint))
    with pytest.raises(UserError, match=message):
        d.fit_to(directions, loaded)


@pytest.mark.parametrize("name, spoil", [
    ("direction", lambda x: x * np.nan), ("spread", lambda x: x[:-1]), ("natural_mean", lambda x: x[:, :3]),
    ("direction", lambda x: x[0]), ("components", lambda x: x[0]),
])  # fmt: skip
def test_spoiled_directions_are_refused(loaded, vectors, tmp_path, name, spoil):
    found = d.estimate(vectors, facts(loaded))
    setattr(found, name, spoil(getattr(found, name)))
    save_directions(found, tmp_path / "spoiled.safetensors")
    with pytest.raises(UserError, match=name):
        load_directions(tmp_path / "spoiled.safetensors")


def test_mlp_directions_are_no_control_vector(loaded, vectors, tmp_path):
    with pytest.raises(UserError, match="residual"):
        write_gguf(d.estimate(vectors, facts(loaded, "mlp")), tmp_path / "x.gguf")
