"""Batched generation: a row's numbers are its own."""

import mlx.core as mx
import numpy as np
import pytest

from gemma_refactored import generation
from gemma_refactored.activation_capture import capture, weights_of_row
from gemma_refactored.errors import UserError
from gemma_refactored.generation import (
    PREFILL,
    Sampling,
    collect_answers,
    collect_means,
    generate,
    length_sorted_batches,
    predict,
)
from gemma_refactored.model_loading import load

from .conftest import GOLDEN_GEMMAS, load_golden, relative_error
from .test_model_architecture import same_weights_in_mlx_lm
from .tiny_checkpoints import write_family

SITES = [f"model.layers.{i}{part}.output" for i in range(3) for part in ("", ".mlp", ".self_attn")]
# The window of all models but Gemma 1 is 6: some prompts are inside it, some cross it, some do while decoding.
LENGTHS = [1, 2, 4, 6, 7, 13, 20]


def random_prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 97, n).tolist() for n in lengths]


MODELS = ["ours", "mlx-lm", *GOLDEN_GEMMAS]


def model_named(name):
    if name in GOLDEN_GEMMAS:
        return load_golden(name)[0]
    ours, theirs = same_weights_in_mlx_lm()
    return ours if name == "ours" else theirs


@pytest.fixture(params=MODELS)
def model(request):
    return model_named(request.param)


def run(model, prompts, max_tokens=9, **options):
    """(tokens of each row, {(row, step): {site: vector}})."""
    answers, seen = [[] for _ in prompts], {}
    for step in generate(model, prompts, max_tokens, sites=SITES, **options):
        for row in np.flatnonzero(step.active):
            seen[row, step.index] = {site: np.array(a[row]) for site, a in step.activations.items()}
            if step.index != PREFILL:
                answers[row].append(int(step.tokens[row]))
    return answers, seen


def test_a_batch_equals_single_runs(model):
    prompts = random_prompts()
    together, seen_together = run(model, prompts)
    for row, prompt in enumerate(prompts):
        (alone,), seen_alone = run(model, [prompt])
        assert alone == together[row]
        for (_, step), sites in seen_alone.items():
            for site, vector in sites.items():
                assert relative_error(seen_together[row, step][site], vector) < 1e-4, (row, step, site)


def test_cached_decoding_equals_one_uncached_pass(model):
    (prompt,) = random_prompts([11])
    (answer,), seen = run(model, [prompt])
    with capture(model, SITES) as activations:
        model(mx.array([prompt + answer]))
    for step in range(PREFILL, 9):
        for site in SITES:
            whole = activations[site][0, len(prompt) + step][None]
            assert relative_error(seen[0, step][site], whole) < 1e-4, (step, site)


@pytest.mark.parametrize("expand", [False, True], ids=["as stored", "expanded"])
@pytest.mark.parametrize("name", GOLDEN_GEMMAS)
def test_a_padded_batch_agrees_with_transformers(name, expand):
    model, golden = load_golden(name, expand)
    tokens = np.array(golden["tokens"])
    prompts = [tokens[0].tolist(), tokens[1, :9].tolist()]
    prefill = next(generate(model, prompts, 1, sites=SITES))
    for site in SITES:
        assert relative_error(prefill.activations[site][0, 0], golden[site][0, -1]) < 1e-4
        assert relative_error(prefill.activations[site][1, 0], golden[site][1, 8]) < 1e-4


@pytest.mark.parametrize("edited", ["edits", "prompt_end_edits", None])
def test_predictions_along_answers_are_those_of_generation(model, edited):
    """The logits that chose each token, whatever lies behind the answers' ends, under every kind of edit."""
    prompts, edits = random_prompts(), {}
    if edited:
        edits = {edited: {SITES[3]: lambda x: 2 * x}, "spared": [[0]] * len(prompts)}
    answers = collect_answers(generate(model, prompts, 9, **edits))
    cut = [answer[: 1 + 3 * row % 9] for row, answer in enumerate(answers)]
    logits = np.array(predict(model, prompts, cut, **edits).astype(mx.float32))
    assert logits.shape[:2] == (len(prompts), max(map(len, cut)))
    for row, answer in enumerate(cut):
        assert logits[row, : len(answer)].argmax(axis=-1).tolist() == answer
        if not edited:
            whole = np.array(model(mx.array([prompts[row] + answer]))[0, len(prompts[row]) - 1 : -1].astype(mx.float32))
            assert relative_error(logits[row, : len(answer)], whole) < 1e-4


def test_answers_that_fill_a_position_table_are_predicted_apart(tmp_path):
    model = load(write_family(tmp_path, "gpt2")).model  # 256 positions
    prompts, answers = random_prompts([250, 10]), random_prompts([6, 60], seed=1)
    together = np.array(predict(model, prompts, answers))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = np.array(predict(model, [prompt], [answer]))[0]
        assert relative_error(together[row, : len(answer)], alone) < 1e-4
    assert predict(model, prompts, [[], []]).shape[:2] == (2, 1)


@pytest.mark.parametrize("kind", ["heads", "weights"])
def test_edits_of_heads_spare_positions_not_heads(kind):
    """As many rows and positions as heads, so that a mask along a wrong axis would fit."""
    model = load_golden("gemma3")[0]
    number = model.config.num_attention_heads
    prompts, changed = random_prompts([5]) * number, {f"model.layers.1.self_attn.{kind}": lambda x: 0 * x}
    first, several = (
        np.array(predict(model, prompts, [[7] * length] * number, prompt_end_edits=changed)) for length in (1, number)
    )
    assert relative_error(several[:, 0], first[:, 0]) < 1e-5
    assert relative_error(first, np.array(predict(model, prompts, [[7]] * number))) > 1e-3


def test_steps_are_prefill_and_one_for_each_token(model):
    prompts = random_prompts([3, 5])
    steps = list(generate(model, prompts, 4))
    assert [step.name for step in steps] == ["prefill", "0", "1", "2", "3"]
    assert steps[0].tokens.tolist() == [p[-1] for p in prompts] and steps[0].activations == {}
    assert [s.name for s in generate(model, prompts, 0)] == ["prefill"]


def test_a_row_ends_at_its_end_token_and_the_others_go_on(model):
    prompts = random_prompts()
    free, _ = run(model, prompts, 9)
    end = free[2][4]
    stopped, seen = run(model, prompts, 9, end_tokens=[end])
    for row, answer in enumerate(free):
        expected = answer[: answer.index(end)] if end in answer else answer
        assert stopped[row] == expected
        steps = [step for r, step in seen if r == row]
        assert steps == list(range(PREFILL, len(expected)))  # nothing after the end


def test_sampling_depends_on_seed_and_row_not_on_the_batch(model):
    prompts = random_prompts()
    warm = Sampling(temperature=1.5, top_p=0.95, seed=3)
    together = collect_answers(generate(model, prompts, 9, warm))
    alone = [collect_answers(generate(model, [p], 9, warm, row_ids=[i]))[0] for i, p in enumerate(prompts)]
    assert alone == together
    assert together == collect_answers(generate(model, prompts, 9, warm))
    assert together != collect_answers(generate(model, prompts, 9, Sampling(temperature=1.5, seed=4)))
    # The same prompt twice in a batch draws twice.
    twice = collect_answers(generate(model, [prompts[3]] * 2, 9, Sampling(temperature=2.0)))
    assert twice[0] != twice[1]


def test_tiny_top_p_is_greedy(model):
    prompts = random_prompts()
    nearly = Sampling(temperature=1.0, top_p=1e-6)
    assert collect_answers(generate(model, prompts, 9, nearly)) == collect_answers(generate(model, prompts, 9))


def test_logit_bias_bans_and_forces(model):
    prompts = random_prompts()
    answers = collect_answers(generate(model, prompts, 3, Sampling(logit_bias={42: 1e4})))
    assert answers == [[42] * 3] * len(prompts)
    favourite = collect_answers(generate(model, prompts, 1))[0][0]
    banned = collect_answers(generate(model, prompts, 9, Sampling(logit_bias={favourite: -1e4})))
    assert all(favourite not in answer for answer in banned)


def test_repetition_penalty_follows_its_formula_and_ignores_padding(model):
    logits = mx.array([[2.0, -2.0, 1.0, 0.5]])
    penalised = generation.penalise_repetition(logits, mx.array([[0, 1, 1, 0]]), 2.0)
    np.testing.assert_allclose(penalised, [[1.0, -4.0, 1.0, 0.5]])
    prompts = random_prompts()
    strong = Sampling(repetition_penalty=50.0)
    together = collect_answers(generate(model, prompts, 9, strong))
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer == collect_answers(generate(model, [prompt], 9, strong))[0]


def test_length_sorted_batches_cover_every_prompt_once():
    prompts = random_prompts([5, 1, 9, 3, 7])
    batches = length_sorted_batches(prompts, 2)
    assert batches == [[1, 3], [0, 4], [2]]
    equal = length_sorted_batches(random_prompts([5, 1, 5, 5, 1]), 2, equal_lengths=True)
    assert equal == [[1, 4], [0, 2], [3]]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UserError, match="no tokens"):
        next(generate(model, [[1], []], 3))


def test_no_logits_for_prompt_positions(model, monkeypatch):
    """The head is evaluated for one position a row and step, whatever the prompt's length."""
    (prompt,) = random_prompts([20])
    shapes = []
    with capture(model, ["model.norm.output"]) as seen:
        for _ in generate(model, [prompt], 2):
            shapes.append(seen["model.norm.output"].shape)
    assert {shape[:2] for shape in shapes} == {(1, 1)}


def test_running_means_are_those_of_the_steps(model):
    prompts = random_prompts()
    free, _ = run(model, prompts)
    end = free[2][4]
    sites = SITES[::3]  # the residual stream, of one width
    answers, states = run(model, prompts, end_tokens=[end])
    written, means = collect_means(generate(model, prompts, 9, end_tokens=[end], sites=SITES), sites)
    assert written == answers
    for row, answer in enumerate(answers):
        steps = np.stack([[states[row, k][site][0] for site in sites] for k in range(PREFILL, len(answer))])
        np.testing.assert_allclose(means["prompt_end"][row], steps[0], rtol=1e-6)
        np.testing.assert_allclose(means["all"][row], steps.mean(axis=0), rtol=1e-4, atol=1e-5)
        if answer:
            np.testing.assert_allclose(means["generated"][row], steps[1:].mean(axis=0), rtol=1e-4, atol=1e-5)
        else:
            assert np.isnan(means["generated"][row]).all()


@pytest.mark.parametrize("thought", [0, 2, 9, None])
def test_means_over_what_comes_after_a_thought(thought):
    model, prompts, site = same_weights_in_mlx_lm()[0], random_prompts([3, 5]), SITES[0]
    _, states = run(model, prompts)

    def thought_tokens(written):
        """The first row's thought has so many tokens; the second row begins its answer anew with its fourth token."""
        if written[:1] != first[:1]:
            return 0 if len(written) < 4 else 4
        return thought if thought is not None and len(written) >= thought else None

    first = collect_answers(generate(model, prompts[:1], 9))[0]
    _, means = collect_means(generate(model, prompts, 9, sites=SITES), [site], thought_tokens=thought_tokens)

    def expected(row, steps):
        return np.stack([states[row, k][site][0] for k in steps]).mean(axis=0)

    for row, begins in ((0, thought), (1, 4)):
        if begins in (None, 9):
            assert np.isnan(means["answer"][row]).all()
        else:
            np.testing.assert_allclose(means["answer"][row, 0], expected(row, range(begins, 9)), rtol=1e-4, atol=1e-5)
        if begins is None:
            assert np.isnan(means["answer_start"][row]).all()
        else:
            np.testing.assert_allclose(means["answer_start"][row, 0], expected(row, [begins - 1]), rtol=1e-5)


def test_an_edit_at_the_prompts_end_is_made_there_only(model):
    (prompt,) = random_prompts([5])
    where = []
    for edits in ("edits", "prompt_end_edits"):
        lengths = []

        def note(x, lengths=lengths):
            lengths.append(x.shape[1])
            return x

        list(generate(model, [prompt], 3, **{edits: {SITES[0]: note}}))
        where.append(lengths)
    assert where == [[4, 1, 1, 1, 1], [1]]


@pytest.mark.parametrize("name", GOLDEN_GEMMAS)
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[-2:-1], [1, 1]])
def test_attention_weights_are_those_of_a_pass_without_cache(name, lengths):
    """Keys in the order of positions, without padding, also when the cache of a sliding window has wrapped."""
    model = load_golden(name)[0]
    sites, kinds = [f"model.layers.{i}.self_attn.weights" for i in range(len(model.layers))], model.config.layer_types
    windows = [model.config.sliding_window if kind == "sliding_attention" else 1000 for kind in kinds]
    prompts = random_prompts(lengths)
    steps = list(generate(model, prompts, 15, sites=sites))
    for row, prompt in enumerate(prompts):
        text = [*prompt, *(int(step.tokens[row]) for step in steps[1:])]
        with capture(model, sites) as expected:
            model(mx.array([text]))
        for step in steps:
            length = len(prompt) + step.index + 1
            assert step.lengths[row] == length
            for site, window in zip(sites, windows, strict=True):
                weights = weights_of_row(np.array(step.activations[site]), row, length)
                own = np.array(expected[site])[:, :, length - 1 : length, max(0, length - window) : length]
                assert weights.shape == own.shape and np.abs(weights - own).max() < 1e-5, (row, step.index, site)
                np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-4)
