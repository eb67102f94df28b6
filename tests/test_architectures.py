"""Every architecture of mlx-lm goes the whole way: collected, analysed and edited like our own Gemma."""

import json

import mlx.core as mx
import numpy as np
import pytest

from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.analysis import analyse
from alignment_artifacts.pairs import Pair, prompt_groups
from alignment_artifacts.scores import Settings
from gemma_refactored import prompt_cache
from gemma_refactored.activation_capture import block_sites, capture, edit
from gemma_refactored.main import main
from gemma_refactored.model_loading import load
from gemma_refactored.prompt_processing import encode_prompts

from .conftest import relative_error
from .tiny_checkpoints import FAMILIES, write_family

# What the default filter, mlp.output, comes to where the blocks have no such part.
SITES = {
    "gpt2": "model.h.{}.mlp.output",
    "mamba": "backbone.layers.{}.output",
    "mixtral": "model.layers.{}.output",
    "gemma4": "language_model.model.layers.{}.mlp.output",
}
TOPICS = ["a garden", "some bread", "a much longer walk in the hills", "a boat", "the city", "one tune"]
PAIRS = [
    Pair(str(i), "topics", f"Tell me about {topic}.", f"Never tell anyone about {topic}.")
    for i, topic in enumerate(TOPICS)
]


@pytest.fixture(scope="module", params=FAMILIES)
def collection(request, tmp_path_factory):
    """(model type, model folder, collection folder), collected by the command line."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_family(folder / "model", request.param)
    (folder / "prompts.json").write_text(json.dumps(prompt_groups(PAIRS)))
    arguments = ["--model", model, "--prompts-file", folder / "prompts.json", "--activations-dir", folder / "acts"]
    arguments += ["--output-dir", folder / "out", "--max-tokens", 3, "--batch-size", 5, "-q"]
    arguments += ["--save-activations", "--process-by-group", "--ignore-end-tokens"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_cache, "PREFILL_TOKENS", 60)  # two or three rows at once, so that caches are joined
        assert main([str(argument) for argument in arguments]) == 0
    return request.param, model, folder / "acts"


def test_the_files_hold_what_the_model_computes_alone(collection):
    model_type, model, folder = collection
    loaded = load(model)
    data = load_activation_set(folder, PAIRS)
    sites = [SITES.get(model_type, "model.layers.{}.mlp.output").format(i) for i in range(loaded.num_layers)]
    assert data.manifest["sites"] == sites
    assert data.values.shape == (len(PAIRS), 2, 4, loaded.num_layers, 64) and data.valid.all()
    assert data.prompt_embeddings.shape == (len(PAIRS), 2, 64)
    for i, pair in enumerate(PAIRS):
        for side, text in enumerate((pair.natural, pair.artifact)):
            marker = folder / pair.group(("natural", "artifact")[side]) / "prompt_list" / "batch_1" / "prompt.json"
            answer = json.loads(marker.read_text())["token_ids"]
            (tokens,) = encode_prompts(loaded.tokenizer, [text])
            with capture(loaded.model, sites) as activations:  # one pass, no cache, no neighbours
                loaded.model(mx.array([tokens + answer]))
            for layer, site in enumerate(sites):
                expected = np.array(activations[site][0, len(tokens) - 1 :])
                assert relative_error(data.values[i, side, :, layer], expected) < 1e-4, (pair, site)


def test_the_analysis_reads_it(collection):
    _, _, folder = collection
    result = analyse(load_activation_set(folder, PAIRS), Settings(20, 20, 0), {})
    assert len(result["layer_scores"]) == result["collection"]["num_layers"]
    # A random network separates nothing held out, but on its own training vectors any direction does.
    assert all(score["cohens_d_in_sample"] > 0 for score in result["layer_scores"].values())


def test_the_residual_stream_is_edited_and_restored(collection):
    _, model, _ = collection
    model = load(model).model
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    direction = mx.random.normal((64,), key=mx.random.key(0))
    direction = direction / mx.linalg.norm(direction)
    before, site = model(tokens), block_sites(model)[1]
    with edit(model, {site: lambda x: x - (x @ direction)[..., None] * direction}):
        with capture(model, [site]) as activations:
            edited = model(tokens)
        size = np.abs(activations[site]).max()
        assert np.abs(activations[site] @ direction).max() < 1e-5 * size
    assert relative_error(edited, before) > 1e-3
    assert np.array_equal(model(tokens), before)
