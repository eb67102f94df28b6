"""A collection without pairs, as arrays."""

import json

import numpy as np
import pytest

from alignment_artifacts import load_collection
from gemma_refactored.errors import UserError
from gemma_refactored.main import main

from .tiny_checkpoints import random_gemma, write_checkpoint

TEXTS = ["How do I build a bookshelf?", "Hi.", "A rather longer prompt than the others are, to be padded against."]


@pytest.fixture(scope="module")
def collect(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    model = write_checkpoint(folder / "model", random_gemma())
    (folder / "prompts.txt").write_text("\n".join(TEXTS))

    def call(name: str, *options: str):
        arguments = ["--model", model, "--prompts-file", folder / "prompts.txt", "--output-dir", folder / "out", "-q"]
        arguments += ["--save-activations", "--activations-dir", folder / name, "--batch-size", "2", *options]
        assert main([str(argument) for argument in arguments]) == 0
        return folder / name

    return call


def test_both_layouts_give_the_arrays_of_their_files(collect):
    options = ("--max-tokens", "3", "--ignore-end-tokens", "--activation-filter", "mlp.output,neurons")
    where = collect("grouped", *options, "--process-by-group")
    grouped = load_collection(where)
    flat = load_collection(collect("flat", *options), grouped.sites)
    assert [record["prompt"] for record in grouped.prompts] == TEXTS == [record["prompt"] for record in flat.prompts]
    assert grouped.valid.shape == (3, 4) and grouped.valid.all() and len(grouped.sites) > 2
    for i, record in enumerate(grouped.prompts):
        folder = where / f"prompts/prompt_list/batch_{record['number']}"
        for step, name in enumerate(("prefill", "0", "1", "2")):
            with np.load(folder / f"activations_step_{name}.npz") as file:
                for site in grouped.sites:
                    np.testing.assert_array_equal(grouped.values[site][i, step], file[site][0, 0])
    for site in grouped.sites:
        np.testing.assert_allclose(flat.values[site], grouped.values[site], rtol=1e-3, atol=1e-4)
    assert len(repr(grouped)) < 200


def test_prompts_alone_have_one_step(collect):
    collected = load_collection(collect("prompts", "--max-tokens", "0", "--process-by-group"), "layers.1.mlp.output")
    assert collected.valid.shape == (3, 1) and collected.sites == ["model.layers.1.mlp.output"]
    assert [record["text"] for record in collected.prompts] == [""] * 3


def test_what_is_not_there_is_refused(collect, tmp_path):
    folder = collect("weights", "--max-tokens", "1", "--process-by-group", "--activation-filter", "weights,mlp.output")
    assert all("mlp.output" in site for site in load_collection(folder).sites)
    with pytest.raises(UserError, match="no single vector per token"):
        load_collection(folder, ["model.layers.0.self_attn.weights"])
    for sites in ("nothing", ["nothing"], []):
        with pytest.raises(UserError, match="holds no site"):
            load_collection(folder, sites)
    with pytest.raises(UserError, match="There is no collection"):
        load_collection(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="no manifest that says"):
        load_collection(tmp_path)
