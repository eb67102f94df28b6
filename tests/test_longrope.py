"""Phi-3/4 layouts agree with transformers on short and long prompts, also mixed in a batch."""

import numpy as np
import pytest

from gemma_refactored import config_audit, model_loading
from gemma_refactored.activation_capture import capture, read
from gemma_refactored.generation import generate
from gemma_refactored.longrope import rope_lengths

from .conftest import load_golden, relative_error

TOLERANCE = 1e-4
SITES = [f"model.layers.{i}{part}.output" for i in range(3) for part in ("", ".mlp", ".self_attn")]


CHECKPOINTS = [("phi", False), ("phi_4bit", False), ("phi_4bit", True)]  # name, expanded to float32?


@pytest.fixture(params=CHECKPOINTS, ids=["float32", "4 bit", "4 bit expanded"])
def checkpoint(request):
    return load_golden(*request.param)


@pytest.fixture
def model(checkpoint):
    return checkpoint[0]


@pytest.fixture
def golden(checkpoint):
    return checkpoint[1]


def test_short_and_long_prompts_agree_with_transformers(model, golden):
    with capture(model, SITES) as activations:
        assert relative_error(model(golden["tokens"]), golden["logits"]) < TOLERANCE
    for site in SITES:
        assert relative_error(activations[site], golden[site]) < TOLERANCE
    short = model(golden["tokens"][:, :12])
    assert relative_error(short, golden["logits_of_first_12"]) < TOLERANCE


def test_mlx_lm_alone_is_wrong_on_short_prompts(monkeypatch):
    """If this fails, mlx-lm has been corrected and longrope.py can go."""
    monkeypatch.setattr(config_audit, "READ_SCALING", ("phi3",))
    monkeypatch.setattr(model_loading, "correct_layout", lambda model, completed: None)
    uncorrected, golden = load_golden("phi")
    short = uncorrected(golden["tokens"][:, :12])
    assert relative_error(short, golden["logits_of_first_12"]) > 0.01


def test_rows_of_a_batch_keep_their_own_factors(model, golden):
    tokens = np.array(golden["tokens"])
    prompts = [tokens[0].tolist(), tokens[1, :12].tolist(), tokens[1, :5].tolist()]

    def run(rows):
        return [
            (s.tokens, {k: np.array(v) for k, v in s.activations.items()})
            for s in generate(model, rows, 6, sites=SITES)
        ]

    together = run(prompts)
    for row, prompt in enumerate(prompts):
        for (tokens_alone, alone), (tokens_together, all_rows) in zip(run([prompt]), together, strict=True):
            assert tokens_alone[0] == tokens_together[row]
            for site in SITES:
                assert relative_error(all_rows[site][row], alone[site][0]) < TOLERANCE
    # The prefill of the long row and of the short one are those of transformers.
    for site in SITES:
        assert relative_error(together[0][1][site][0, 0], golden[site][0, -1]) < TOLERANCE


def test_the_choice_is_undone_after_an_exception(model, golden):
    short = golden["tokens"][:, :12]
    with pytest.raises(RuntimeError), rope_lengths(model, [3, 30]):
        raise RuntimeError
    assert relative_error(model(short), golden["logits_of_first_12"]) < TOLERANCE


def test_two_generations_at_once_keep_their_own_factors(model, golden):
    """One of a long prompt, left half read, does not decide for a short one."""
    tokens = np.array(golden["tokens"])
    long, short = tokens[0].tolist(), tokens[1, :12].tolist()
    alone = [step.tokens.tolist() for step in generate(model, [short], 6)]
    started = generate(model, [long], 6)
    next(started)
    assert [step.tokens.tolist() for step in generate(model, [short], 6)] == alone


def test_texts_read_together_keep_their_own_factors(model, golden):
    tokens = np.array(golden["tokens"])
    texts = [tokens[0].tolist(), tokens[1, :12].tolist()]
    together = dict(read(model, texts, SITES[:1]))
    for i, text in enumerate(texts):
        ((_, alone),) = read(model, [text], SITES[:1])
        assert relative_error(together[i], alone) < TOLERANCE
