"""Reading texts: the vectors are those of a model that writes them, and padding is invisible."""

import mlx.core as mx
import numpy as np
import pytest

from alignment_artifacts.comparison import forced_reading
from alignment_artifacts.comparison.forced_reading import CONDITIONS, read_pairs, read_texts
from gemma_refactored.activation_capture import capture, layer_sites
from gemma_refactored.errors import UserError


@pytest.fixture(scope="module")
def prompts(library):
    return library.measurements().prompts[:6]


def test_the_vectors_are_those_of_free_running_generation(library):
    loaded, measured = library.load(), library.measurements()
    prompts = [ids for pair in measured.prompts for ids in pair]
    answers = [ids for pair in measured.answers for ids in pair]
    ends, means = read_texts(loaded, prompts, answers, layer_sites(loaded.model, "mlp"))
    for found, positions in ((ends, "prompt_end"), (means, "generated")):
        expected = measured.vectors_at("mlp", positions)
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=2e-4, rtol=1e-3)


def test_neighbours_and_padding_change_nothing(library, prompts):
    loaded = library.load()
    sites = layer_sites(loaded.model, "residual")
    flat = [ids for pair in prompts for ids in pair]
    texts = [[5] * length for length in range(1, len(flat) + 1)]
    ends, means = read_texts(loaded, flat, texts, sites)
    for i in (0, 7):
        with capture(loaded.model, sites) as activations:
            loaded.model(mx.array([flat[i] + texts[i]]))
            seen = np.array(mx.stack([activations[site][0] for site in sites]))
        np.testing.assert_allclose(ends[i], seen[:, len(flat[i]) - 1], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(means[i], seen[:, len(flat[i]) :].mean(axis=1), atol=1e-4, rtol=1e-4)


def test_conditions_of_one_model_beside_itself_are_the_same(library, prompts, monkeypatch):
    loaded, done = library.load(), []
    sites = layer_sites(loaded.model, "mlp")
    read = read_pairs([loaded, loaded], prompts, [5, 6, 7], 8, sites, lambda count, kept=False: done.append(count))
    assert tuple(read) == CONDITIONS and sum(done) == 8 * 12
    for first, second, known in read.values():
        assert first.shape == (6, 2, 8, 128) and np.array_equal(first, second) and known.tolist() == list(range(6))
    assert not np.array_equal(read["neutral"][0], read["answers_a"][0])


def test_pairs_with_an_empty_answer_are_left_out_where_it_is_read(library, prompts, monkeypatch):
    answers = iter([[[5]] * 12, [[]] + [[5]] * 11])  # the second model has nothing to say to the first prompt
    monkeypatch.setattr(forced_reading, "unedited_answers", lambda *_: next(answers))
    loaded = library.load()
    read = read_pairs([loaded, loaded], prompts, [5], 8, layer_sites(loaded.model, "mlp"))
    assert {name: len(known) for name, (_, _, known) in read.items()} == {
        "prompt_end": 6, "answers_a": 6, "answers_b": 5, "neutral": 6, "own_answers": 5,
    }  # fmt: skip
    assert read["answers_b"][2].tolist() == [1, 2, 3, 4, 5]


def test_what_was_read_is_kept_and_not_read_again(library, prompts, tmp_path, monkeypatch):
    loaded = library.load()
    sites, read, killed = layer_sites(loaded.model, "mlp"), forced_reading.read, []
    ask = dict(models=[loaded, loaded], prompts=prompts, neutral=[5, 6], max_tokens=3, sites=sites)
    expected = read_pairs(**ask)

    def stop_at_the_second(*arguments):
        killed.append(1)
        if len(killed) == 2:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(forced_reading, "read", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        read_pairs(**ask, cache=tmp_path / "kept")
    done = set((tmp_path / "kept").iterdir())
    assert len(done) == 2  # the answers, and what was read; one model stands for both, and is not read twice
    counted = {True: 0, False: 0}

    def count(texts, kept=False):
        counted[kept] += texts

    again = read_pairs(**ask, cache=tmp_path / "kept", progress=count)
    assert sum(counted.values()) == 8 * 2 * len(prompts) and counted[True] > counted[False] > 0
    assert done < set((tmp_path / "kept").iterdir())
    for name in CONDITIONS:
        for mine, theirs in zip(again[name], expected[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    monkeypatch.setattr(forced_reading, "read", lambda *_: pytest.fail("read again"))
    read_pairs(**ask, cache=tmp_path / "kept")
    for content in (b"{}", b"[]", b"[1]", b""):
        for file in (tmp_path / "kept").iterdir():
            kept = file.read_bytes()
            file.write_bytes(content)
            with pytest.raises(UserError, match=file.stem):
                read_pairs(**ask, cache=tmp_path / "kept")
            file.write_bytes(kept)


def test_whoever_stops_it_loses_a_batch(library, prompts, tmp_path, monkeypatch):
    """Of the texts, and of the answers."""
    loaded, cache = library.load(), tmp_path / "kept"
    sites, read, passes = layer_sites(loaded.model, "mlp"), forced_reading.read, []
    flat = [prompt for pair in prompts for prompt in pair]
    expected = read_texts(loaded, flat, [[5, 6]] * 12, sites)
    for name in ("TEXTS_AT_ONCE", "BATCH_SIZE"):
        monkeypatch.setattr(forced_reading, name, 5)

    def stop_in_the_third(model, texts, *arguments):
        passes.append(len(texts))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return read(model, texts, *arguments)

    monkeypatch.setattr(forced_reading, "read", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        read_texts(loaded, flat, [[5, 6]] * 12, sites, cache=cache)
    again = read_texts(loaded, flat, [[5, 6]] * 12, sites, cache=cache)
    assert passes == [5, 5, 2, 2]
    for mine, whole in zip(again, expected, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=1e-5)

    answer, asked = forced_reading.unedited_answers, []

    def stop_in_the_second(loaded, batch, *arguments):
        asked.append(len(batch))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(loaded, batch, *arguments)

    monkeypatch.setattr(forced_reading, "unedited_answers", stop_in_the_second)
    ask = dict(models=[loaded, loaded], prompts=prompts, neutral=[5, 6], max_tokens=3, sites=sites, cache=cache)
    with pytest.raises(KeyboardInterrupt):
        read_pairs(**ask)
    read_pairs(**ask)
    assert asked == [5, 5, 5, 2]
