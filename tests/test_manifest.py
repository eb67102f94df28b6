"""A manifest is enough to repeat the run that wrote it."""

import json

import pytest

from gemma_refactored.main import main

from .test_main import model_folder, run, tree  # noqa: F401  (fixtures)
from .tiny_checkpoints import random_gemma, write_checkpoint


@pytest.mark.parametrize("group", [True, False])
def test_a_run_is_repeated_to_the_last_bit(run, group, tmp_path):  # noqa: F811
    options = [
        "--temp",
        "0.8",
        "--seed",
        "7",
        "--logit-bias",
        "5=-2.5",
        "--activation-filter",
        "layers.1",
        "--no-chat-mode",
    ]
    assert run(*options, "--activation-dtype", "float16", "--batch-size", "2", group=group) == 0
    manifest = run.folder / "acts" / "manifest.json"
    (run.folder / "prompts.json").unlink()
    places = ["--activations-dir", str(tmp_path / "again"), "--output-dir", str(tmp_path / "texts")]
    assert main(["--from-manifest", str(manifest), *places, "-q"]) == 0
    assert tree(tmp_path / "again") == tree(run.folder / "acts")
    assert (tmp_path / "texts" / "results.json").read_bytes() == (run.folder / "out" / "results.json").read_bytes()
    first, second = (
        json.loads((folder / "manifest.json").read_text()) for folder in (manifest.parent, tmp_path / "again")
    )
    times = ("created", "finished")
    assert {k: v for k, v in first.items() if k not in times} == {k: v for k, v in second.items() if k not in times}


def test_other_weights_or_an_incomplete_manifest_are_refused(run, tmp_path, capsys):  # noqa: F811
    assert run() == 0
    path = run.folder / "acts" / "manifest.json"
    model = random_gemma()
    model.model.norm.weight += 1
    other = write_checkpoint(tmp_path / "other", model)
    assert (
        main(["--from-manifest", str(path), "--model", str(other), "--activations-dir", str(tmp_path / "b"), "-q"]) == 2
    )
    assert "not those that made this manifest" in capsys.readouterr().err
    manifest = json.loads(path.read_text())
    for content, message in (
        ({k: v for k, v in manifest.items() if k != "prompt_groups"}, "has no prompt_groups"),
        ([1, 2], "not the manifest of a run"),
        ({**manifest, "max_tokens": "many"}, "max_tokens must be a whole number between 0 and 1000000, not 'many'"),
        ({**manifest, "max_tokens": -4}, "max_tokens must be between 0 and"),
        ({**manifest, "logit_bias": [5]}, "logit_bias must be a list of texts"),
        ({**manifest, "logit_bias": ["5=nan"]}, "logit_bias '5=nan' must look like TOKEN_ID=BIAS"),
        ({**manifest, "seed": True}, "seed must be a whole number between 0 and 1099511627776, not True"),
        ({**manifest, "activation_dtype": "int8"}, "activation_dtype must be one of float32, float16"),
        ({**manifest, "model_path": "/nowhere/at/all"}, "no model folder"),
        ({**manifest, "prompt_groups": {"../up": {"x": ["y"]}}}, "cannot be a folder name"),
    ):
        (tmp_path / "m.json").write_text(json.dumps(content))
        assert main(["--from-manifest", str(tmp_path / "m.json"), "--activations-dir", str(tmp_path / "c"), "-q"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
