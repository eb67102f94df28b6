"""Tokens with an enormous residual stream are found, left alone, named, and kept out of statistics."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from alignment_artifacts import places
from alignment_artifacts.directions.estimate import estimate, measure_natural_tokens
from alignment_artifacts.directions.measurements import _leave_out_sinks, measure
from alignment_artifacts.edits.options import PROMPT_END, Setting
from alignment_artifacts.edits.proof import Sequences, prove
from alignment_artifacts.edits.setting import intervene
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs
from gemma_refactored.activation_capture import capture, edit, layer_sites
from gemma_refactored.configuration import Chat
from gemma_refactored.model_loading import load

from .conftest import relative_error
from .tiny_checkpoints import random_gemma, write_checkpoint

ORGANISM = places.HOME / "model_organism/aligned"
BOS, DELIMITER = 2, 44  # the sinks of the model below
PROMPTS = [[BOS, 9, 300, DELIMITER, 1200, 7], [BOS, 8, 8, 1], [BOS]]
SINKS = [(0, 3), (0,), (0,)]
ANSWERS = [[5, 5, 6], [9, DELIMITER, 77], [9]]
SITES = ("mlp", "residual")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model = random_gemma()
    weights = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = weights.at[mx.array([BOS, DELIMITER])].multiply(100.0)
    return load(write_checkpoint(tmp_path_factory.mktemp("sinks") / "m", model))


def intervention(loaded, site="residual", mode="always", **changes):
    vectors = np.random.default_rng(0).standard_normal((10, 2, 3, 64)).astype(np.float32)
    directions = estimate(vectors, {**loaded.facts(), "site": site, "positions": "prompt_end"})
    return intervene(loaded, directions, replace(Setting(mode, 1.0, (0, 1), site), **changes))


def test_what_they_are_compared_with_does_not_depend_on_the_chat_format():
    cautious = load(ORGANISM, chat=Chat(system_prompt="You are cautious."))
    assert np.array_equal(cautious.ordinary_norms, load(ORGANISM).ordinary_norms)


def test_they_are_found_wherever_they_stand_and_in_any_company(loaded):
    assert loaded.sinks(PROMPTS) == SINKS
    for prompt, sinks in zip(PROMPTS, SINKS, strict=True):
        assert load(loaded.folder).sinks([prompt]) == [sinks]


def test_the_embedded_model_has_none(organism):
    measured = measure(organism, load_pairs(PAIRS_JSON), places.cache_folder())
    texts = [
        p + a for sides in zip(measured.prompts, measured.answers, strict=True) for p, a in zip(*sides, strict=True)
    ]
    assert len(texts) == 100 and set(organism.sinks(texts)) == {()}


def test_growing_norms_make_no_sink(tmp_path):
    """As in Gemma: the last blocks write much more than the first."""
    model = random_gemma()
    for depth, block in enumerate(model.layers):
        block.post_feedforward_layernorm.weight = block.post_feedforward_layernorm.weight + 30.0 * depth
    assert load(write_checkpoint(tmp_path / "m", model)).sinks([[9, 300, 1200, 7]]) == [()]


@pytest.mark.parametrize("site", SITES)
def test_edits_leave_them_alone_unless_asked(loaded, site):
    texts = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)][:1]
    name = layer_sites(loaded.model, site)[0]  # later blocks also see what became of the other tokens
    states = {}
    for edit_sinks in (None, False, True):
        used = intervention(loaded, site, edit_sinks=bool(edit_sinks))
        edits = {} if edit_sinks is None else used.in_one_pass(loaded, texts, [len(PROMPTS[0])])
        with edit(loaded.model, edits), capture(loaded.model, [name]) as activations:
            loaded.model(mx.array(texts))
        states[edit_sinks] = np.array(activations[name][0])
    moved = {which: np.abs(states[which] - states[None]).max(axis=-1) > 0 for which in (False, True)}
    assert np.flatnonzero(~moved[False]).tolist() == list(SINKS[0]) and moved[True].all()


@pytest.mark.parametrize("where", ["everywhere", PROMPT_END])
@pytest.mark.parametrize("prompts", [PROMPTS[:2], PROMPTS[2:], [[9, 300], [BOS, 7, DELIMITER]]], ids=len)
def test_generating_and_one_pass_leave_the_same_tokens_alone(loaded, where, prompts, monkeypatch):
    """Over left padding, chunks of a long prompt, a prompt of one sink, and a sink at the prompt's end."""
    monkeypatch.setattr("gemma_refactored.prompt_cache.PREFILL_TOKENS", 4)
    used = intervention(loaded, "mlp", "add", where=where)
    site, steps = "model.layers.1.output", {}
    for step in used.generate(loaded, prompts, 4, sites=[site]):
        steps[step.index] = (np.array(step.activations[site]), step.tokens)
    for row, prompt in enumerate(prompts):
        text = prompt + [int(steps[i][1][row]) for i in range(4)]
        with edit(loaded.model, used.in_one_pass(loaded, [text], [len(prompt)])), capture(loaded.model, [site]) as seen:
            loaded.model(mx.array([text]))
        for index, (states, _) in steps.items():
            assert relative_error(states[row, 0], seen[site][0, len(prompt) + index]) < 1e-4, (row, index)


def test_the_proof_names_them_and_keeps_them_out_of_the_dose(loaded):
    proof, everything = (
        prove(loaded, intervention(loaded, edit_sinks=choice), Sequences(PROMPTS, ANSWERS)) for choice in (False, True)
    )
    names = {loaded.tokenizer.decode([BOS]): 3, loaded.tokenizer.decode([DELIMITER]): 1}
    assert proof.sinks == names and "4 attention sinks left alone: " in proof.describe()
    assert (proof.tokens, proof.touched) == (14, 14) and (everything.tokens, everything.touched) == (18, 18)
    assert everything.sinks == {} and proof.dose[0] > 1.1 * everything.dose[0]


@pytest.mark.parametrize("site", SITES)
def test_means_of_answers_and_natural_tokens_omit_them(loaded, site):
    texts = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    names = layer_sites(loaded.model, site)
    states = []
    for text in texts:
        with capture(loaded.model, names) as activations:
            loaded.model(mx.array([text]))
        states.append(np.stack([np.array(activations[name][0]) for name in names], axis=1))
    vectors = {f"{site}.{positions}": np.zeros((3, 3, 64), np.float32) for positions in ("generated", "all")}
    _leave_out_sinks(loaded, PROMPTS, ANSWERS, vectors)
    assert not any(values[[0, 2]].any() for values in vectors.values())  # nothing to correct there
    assert relative_error(vectors[f"{site}.generated"][1], states[1][[4, 6]].mean(axis=0)) < 1e-5
    assert relative_error(vectors[f"{site}.all"][1], states[1][[3, 4, 6]].mean(axis=0)) < 1e-5
    random = np.random.default_rng(0).standard_normal((10, 2, 3, 64)).astype(np.float32)
    directions = estimate(random, {**loaded.facts(), "site": site, "positions": "all"})
    measured = measure_natural_tokens(loaded, directions, texts).natural_tokens
    others = np.concatenate([np.delete(s, sinks, axis=0) for s, sinks in zip(states, loaded.sinks(texts), strict=True)])
    expected = np.sort(np.einsum("plh,lh->lp", others, directions.unit))
    np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-4)


def test_a_record_keeps_the_choice_and_an_earlier_one_edited_all():
    setting = Setting("ablate", 1.0, (1,), edit_sinks=True)
    record = setting.record()
    assert Setting.from_record(record) == setting and "attention sinks too" in record["description"]
    del record["edit_sinks"]
    assert Setting.from_record(record) == setting
