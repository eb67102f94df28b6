"""The certificate passes for a sound model and fails for each of the known faults."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from alignment_artifacts.activation_set import certificate_verdict
from gemma_refactored import (
    activation_capture,
    certificate,
    generation,
    model_architecture,
    prompt_cache,
    prompt_processing,
)
from gemma_refactored.activation_capture import block_sites, hooks
from gemma_refactored.certificate import certify, describe, relative_differences
from gemma_refactored.errors import UserError
from gemma_refactored.files import CERTIFICATE
from gemma_refactored.main import main
from gemma_refactored.model_loading import load

from .gguf_checkpoints import write_pair
from .tiny_checkpoints import FAMILIES, quantised, random_gemma, write_checkpoint, write_family

NOT_RUN_WITHOUT_TORCH = set() if find_spec("torch") else {"= transformers"}


@pytest.fixture
def loaded(tmp_path):
    return load(write_checkpoint(tmp_path / "m", random_gemma()))


def outcome(certificate):
    return {check["name"]: check["passed"] for check in certificate["checks"]}


def test_a_sound_model_passes_every_check(loaded):
    result = certify(loaded)
    assert result["verdict"] == "passed", describe(result)
    assert {name for name, passed in outcome(result).items() if passed is None} == NOT_RUN_WITHOUT_TORCH
    (batch,) = [c for c in result["checks"] if c["name"] == "batch = single"]
    assert set(batch["by_layer"]) == set(block_sites(loaded.model))
    assert max(batch["by_layer"].values()) < 1e-5
    assert max(map(len, describe(result).splitlines())) <= 80


def no_padding_mask(monkeypatch, loaded):
    plain = prompt_cache.make_prompt_cache
    monkeypatch.setattr(prompt_cache, "make_batch_cache", lambda model, padding, *_, **__: plain(model))


def missing_embedding_scale(monkeypatch, loaded):
    loaded.model.config.hidden_size = 1


def missing_sliding_mask(monkeypatch, loaded):
    mask = model_architecture.create_attention_mask
    monkeypatch.setattr(model_architecture, "create_attention_mask", lambda x, cache, **window: mask(x, cache))


def no_global_layer(monkeypatch, loaded):
    """The opposite mistake: every layer slides."""
    mask = model_architecture.create_attention_mask
    monkeypatch.setattr(
        model_architecture, "create_attention_mask", lambda x, cache, **window: mask(x, cache, window_size=8)
    )


def doubled_bos(monkeypatch, loaded):
    encode = loaded.tokenizer.encode
    monkeypatch.setattr(loaded.tokenizer, "encode", lambda text, add_special_tokens=True: encode("<bos>" + text))
    monkeypatch.setattr(prompt_processing, "_single_bos", lambda tokenizer, ids: ids)


def wrong_row(monkeypatch, loaded):
    def generate(*args, **kwargs):
        for step in generation.generate(*args, **kwargs):
            step.activations = {site: np.roll(np.array(a), 1, axis=0) for site, a in step.activations.items()}
            step.activations = {site: model_architecture.mx.array(a) for site, a in step.activations.items()}
            yield step

    monkeypatch.setattr(certificate, "generate", generate)


def stale_step(monkeypatch, loaded):
    """Each step shows the activations of the one before."""

    def generate(*args, **kwargs):
        before = None
        for step in generation.generate(*args, **kwargs):
            before, step.activations = step.activations, before or step.activations
            yield step

    monkeypatch.setattr(certificate, "generate", generate)


def post_norm_for_residual(monkeypatch, loaded):
    def capturing(model, sites, activations):
        blocks = block_sites(model)

        def reader(site):
            def read(x):
                activations[site] = model.model.norm(x) if site == blocks[-1] else x
                return x

            return read

        return hooks(model, {site: reader(site) for site in sites})

    monkeypatch.setattr(activation_capture, "capturing", capturing)  # of `capture`
    monkeypatch.setattr(generation, "capturing", capturing)


@pytest.mark.parametrize(
    "fault, check",
    [
        (no_padding_mask, "padded = unpadded"),
        (missing_embedding_scale, "embedding scale"),
        (missing_sliding_mask, "sliding window"),
        (no_global_layer, "sliding window"),
        (doubled_bos, "prompt format"),
        (wrong_row, "batch = single"),
        (stale_step, "cached = uncached"),
        (post_norm_for_residual, "residual is all"),
    ],
)
def test_every_known_fault_fails_the_check_made_for_it(loaded, monkeypatch, fault, check):
    fault(monkeypatch, loaded)
    result = certify(loaded)
    assert result["verdict"] == "failed"
    assert outcome(result)[check] is False, describe(result)
    in_the_pass_itself = (missing_embedding_scale, missing_sliding_mask, no_global_layer, post_norm_for_residual)
    if fault in in_the_pass_itself and not NOT_RUN_WITHOUT_TORCH:
        assert outcome(result)["= transformers"] is False


@pytest.mark.parametrize(
    ("template", "passed"),
    [
        ("{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ bos_token }}{% endfor %}", True),  # SmolLM's way
        (
            "{{ bos_token }}{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
            True,
        ),
        ("{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}", False),
    ],
)
def test_only_a_doubled_bos_at_the_beginning_is_wrong(tmp_path, template, passed):
    folder = write_checkpoint(tmp_path / "m", random_gemma())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    assert certificate.check_prompt_format(load(folder)).passed is passed


@pytest.mark.parametrize("model_type", FAMILIES)
def test_architectures_of_mlx_lm_pass_or_say_what_does_not_apply(tmp_path, model_type):
    result = certify(load(write_family(tmp_path / model_type, model_type)))
    assert result["verdict"] == "passed", describe(result)
    passed = outcome(result)
    assert passed["batch = single"] and passed["cached = uncached"]
    # Each block of Gemma 4 also sees an embedding of its own, and its last blocks the keys of earlier ones.
    assert passed["residual is all"] is (None if model_type == "gemma4" else True)
    # Recurrent layers cannot mask padding; the run then batches equal lengths only, and the certificate says so.
    assert passed["padded = unpadded"] is (None if model_type == "mamba" else True)


@pytest.mark.parametrize("keep_precision", [True, False])
def test_quantised_weights_pass(tmp_path, keep_precision):
    model, config = quantised(4, mixed=True)
    loaded = load(write_checkpoint(tmp_path / "m", model, config), keep_precision)
    assert certify(loaded)["verdict"] == "passed"


def test_differences_are_relative_to_each_position_and_infinite_where_they_cannot_be_taken():
    expected = {"a": np.array([[3.0, 4.0], [300.0, 400.0]])}
    actual = {"a": expected["a"] + [[0.0, 0.5], [0.0, 0.5]]}
    assert relative_differences(actual, expected) == {"a": pytest.approx(0.1)}
    assert relative_differences({"a": np.zeros((1, 2))}, expected) == {"a": float("inf")}
    assert relative_differences({"a": np.full((2, 2), np.nan)}, expected) == {"a": float("inf")}


def test_the_command_saves_it_and_its_verdict_is_found_again(loaded, tmp_path, capsys):
    folder = tmp_path / "acts"
    common = ["--model", str(loaded.folder), "--activations-dir", str(folder)]
    assert main([*common, "--check"]) == 0
    assert "Passed" in capsys.readouterr().out
    collect = ["--prompts", "Hello", "--max-tokens", "1", "--save-activations", "--output-dir", str(tmp_path / "out")]
    assert main([*common, *collect]) == 0  # a folder with only a certificate in it is still free
    manifest = json.loads((folder / "manifest.json").read_text())
    assert certificate_verdict(folder, manifest).startswith("passed on CPU in float32")
    assert "another model" in certificate_verdict(folder, {**manifest, "model_revision": "x"})
    assert "collected in bfloat16" in certificate_verdict(folder, {**manifest, "weights_dtype": "bfloat16"})
    assert certificate_verdict(tmp_path, manifest).startswith("none")
    for content in ("{}", "[]", '{"model_revision": 1, "dtype": "float32", "checks": [0]}'):
        (tmp_path / CERTIFICATE).write_text(content)
        with pytest.raises(UserError, match="is not what run_model.py --check writes"):
            certificate_verdict(tmp_path, {"model_revision": 1, "weights_dtype": "float32"})


def test_a_failed_check_exits_with_1_and_names_what_failed(loaded, tmp_path, monkeypatch, capsys):
    no_padding_mask(monkeypatch, loaded)
    assert main(["--model", str(loaded.folder), "--activations-dir", str(tmp_path), "--check"]) == 1
    assert "Failed: 1 of 8 checks" in capsys.readouterr().out
    assert "padded = unpadded" in certificate_verdict(
        tmp_path, {"model_revision": loaded.revision, "weights_dtype": loaded.dtype}
    )


def test_how_a_gguf_file_is_read_stays_open(tmp_path):
    folder, file = write_pair(tmp_path, "llama")
    checks = [certificate.Check(certificate.TRANSFORMERS, passed=True)]
    assert "GGUF" in certificate._not_compared(load(file), checks)
    assert "GGUF" not in certificate._not_compared(load(folder), checks)
