"""The cache of a batch of prompts: filled in parts, with what all begin with read once."""

import numpy as np
import pytest

from gemma_refactored import prompt_cache
from gemma_refactored.activation_capture import block_sites
from gemma_refactored.errors import UserError
from gemma_refactored.generation import generate
from gemma_refactored.model_loading import load
from gemma_refactored.prompt_cache import padding_is_harmless

from .conftest import relative_error
from .test_generation import MODELS, SITES, model_named, random_prompts, run
from .tiny_checkpoints import FAMILIES, write_family

BEGINNING = random_prompts([5], seed=1)[0]  # the tests' sliding windows have 6 and 8
LENGTHS = [7, 1, 20, 13, 2, 6, 4]


@pytest.fixture(params=MODELS)
def model(request):
    return model_named(request.param)


def prompts_that_begin_alike(lengths=LENGTHS):
    return [BEGINNING + rest for rest in random_prompts(lengths)]


def both_ways(monkeypatch, model, prompts, sites, **options):
    """(row, step, site) -> vector, reading the beginning with every row and once; how often caches began with it."""
    seen, begun = [], []
    begin = prompt_cache._begin
    monkeypatch.setattr(prompt_cache, "_begin", lambda *args: begun.append(args) or begin(*args))
    monkeypatch.setattr(prompt_cache, "PREFILL_TOKENS", 60)  # two or three rows at once
    for least in (10**9, 0):
        monkeypatch.setattr(prompt_cache, "SHARED_TOKENS", least)
        seen.append({})
        for step in generate(model, prompts, 4, sites=sites, **options):
            for site, x in step.activations.items():
                seen[-1] |= {(row, step.index, site): np.array(x[row]) for row in np.flatnonzero(step.active)}
        if least:
            assert not begun
    return *seen, len(begun)


def assert_equal(apart, together):
    assert apart.keys() == together.keys()
    for place, vector in apart.items():
        assert relative_error(together[place], vector) < 1e-4, place


def test_a_common_beginning_is_read_once_and_changes_nothing(model, monkeypatch):
    for prompts in (prompts_that_begin_alike(), prompts_that_begin_alike([4] * 20)):
        apart, together, begun = both_ways(monkeypatch, model, prompts, SITES)
        assert begun > 0
        assert_equal(apart, together)
        monkeypatch.undo()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_architecture_begins_with_it_or_reads_all(model_type, tmp_path, monkeypatch):
    loaded = load(write_family(tmp_path, model_type))
    prompts = prompts_that_begin_alike() if loaded.masks_padding else prompts_that_begin_alike([4] * 20)
    apart, together, begun = both_ways(monkeypatch, loaded.model, prompts, block_sites(loaded.model))
    assert (begun > 0) == (model_type != "mamba")
    assert_equal(apart, together)


@pytest.mark.parametrize("spared", [None, [[0]] * 7, [[0], *[[0, 2]] * 6]], ids=["none", "alike", "unlike"])
def test_edits_see_the_beginning(model, monkeypatch, spared):
    edits = {SITES[0]: lambda x: 2 * x}
    plain, _, _ = both_ways(monkeypatch, model, prompts_that_begin_alike(), SITES)
    apart, together, begun = both_ways(
        monkeypatch, model, prompts_that_begin_alike(), SITES, edits=edits, spared=spared
    )
    assert begun > 0
    assert_equal(apart, together)
    assert relative_error(apart[2, 0, SITES[-1]], plain[2, 0, SITES[-1]]) > 1e-2


def test_a_beginning_longer_than_a_window_or_whole_prompts_long(model, monkeypatch):
    long = random_prompts([30], seed=2)[0]
    for prompts in ([long + rest for rest in random_prompts([3, 1, 9])], [long[:3], long, long[:20]], [long] * 3):
        apart, together, _ = both_ways(monkeypatch, model, prompts, SITES)
        assert_equal(apart, together)
        monkeypatch.undo()


def test_rows_that_longrope_treats_differently_begin_apart(tmp_path, monkeypatch):
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    scaling = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5} | factors}
    model = load(write_family(tmp_path, "phi3", **scaling, original_max_position_embeddings=12)).model
    for lengths, shares in (([1, 20, 3], False), ([1, 2, 3], True)):
        apart, together, begun = both_ways(
            monkeypatch, model, prompts_that_begin_alike(lengths), ["model.layers.2.output"]
        )
        assert (begun > 0) == shares
        assert_equal(apart, together)
        monkeypatch.undo()


@pytest.mark.parametrize("tokens", [1, 5, 45])
def test_prefill_in_parts_changes_nothing(model, monkeypatch, tokens):
    """Few at once: every row on its own, in several parts. More: two or three rows together, in any order."""
    prompts = random_prompts([7, 1, 20, 13, 2, 6, 4])
    answers, seen = run(model, prompts)
    monkeypatch.setattr(prompt_cache, "PREFILL_TOKENS", tokens)
    answers_in_parts, seen_in_parts = run(model, prompts)
    assert answers_in_parts == answers
    for place, sites in seen.items():
        for site, vector in sites.items():
            assert relative_error(seen_in_parts[place][site], vector) < 1e-4, (place, site)


def test_a_model_that_ignores_the_padding_mask_is_found_out(model, monkeypatch):
    assert padding_is_harmless(model)
    plain = prompt_cache.make_prompt_cache
    monkeypatch.setattr(prompt_cache, "make_batch_cache", lambda model, padding, *_, **__: plain(model))
    assert not padding_is_harmless(model)

    def no_padding(model, padding, growth=1):
        if any(padding):
            raise UserError("cannot")
        return plain(model)

    monkeypatch.setattr(prompt_cache, "make_batch_cache", no_padding)
    assert not padding_is_harmless(model)


def test_an_unknown_cache_is_refused(model):
    class OddCache:
        pass

    model.make_cache = lambda: [OddCache()]
    with pytest.raises(UserError, match="OddCache"):
        prompt_cache.make_batch_cache(model, [1, 0])
