"""Changes that were planted in the weights are found, with their rank and direction; a truth of NumPy for the rest."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

import compare_models as script
from alignment_artifacts.comparison import weights
from alignment_artifacts.comparison.weights import changes_or_reason, num_tensors, weight_changes
from alignment_artifacts.directions.estimate import planted_directions
from alignment_artifacts.report import build
from gemma_refactored.adapter_files import weight_changes as adapter_changes
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_safetensors
from gemma_refactored.model_loading import load
from model_organism.train import PLANTED_LAYERS

from .conftest import ROOT
from .tiny_checkpoints import quantised, random_gemma, write_adapter, write_checkpoint, write_family

RNG = np.random.default_rng(0)
TOPICS = ["bread", "tea", "maps", "boats", "gardens", "music", "clocks", "rain", "stones", "apples"]


def unit(size):
    vector = RNG.standard_normal(size)
    return vector / np.linalg.norm(vector)


def changed_copy(folder, copy, **changes):
    """A checkpoint whose tensors of these endings have something added."""
    shutil.copytree(folder, copy)
    tensors = dict(read_safetensors(folder / "model.safetensors")[0])
    for ending, added in changes.items():
        (name,) = [name for name in tensors if name.endswith(ending.replace("__", "."))]
        tensors[name] = tensors[name] + mx.array(added).astype(tensors[name].dtype)
    mx.save_safetensors(str(copy / "model.safetensors"), tensors)
    return copy


def test_what_an_adapter_added_is_found(tmp_path):
    """The truth is in its tensors: which matrices, and the singular values of scale * B A."""
    base = write_family(tmp_path / "base", "llama")
    both = (
        load(base),
        load(base, adapter=write_adapter(tmp_path / "adapter", base, keys=["self_attn.o_proj", "mlp.up_proj"])),
    )
    truth = {f"model.{name}.weight": np.array(added) for name, added in adapter_changes(both[1].adapter).items()}
    found = {change.name: change for change in weight_changes(*both) if change.norm}
    assert found.keys() == truth.keys() and len(truth) == 4
    for name, change in found.items():
        expected = np.linalg.svd(truth[name], compute_uv=False)[:3]
        assert change.singular_values[:3] == pytest.approx(expected, rel=1e-4) and change.rank_99 <= 3
        assert change.norm == pytest.approx(np.linalg.norm(truth[name]), rel=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
@pytest.mark.parametrize(
    "tensor, stream",
    [("self_attn__o_proj", "writes"), ("mlp__down_proj", "writes"), ("self_attn__q_proj", "reads"),
     ("self_attn__k_proj", "reads"), ("mlp__up_proj", "reads")],
)  # fmt: skip
def test_one_planted_direction_is_found_where_it_is(family, tensor, stream, tmp_path):
    """o_proj and q_proj are square here: their names tell which end is the residual stream's."""
    folder = tmp_path / "a"
    write_checkpoint(folder, random_gemma()) if family == "gemma3" else write_family(folder, family)
    name = f"layers__1__{tensor}__weight"
    shape = next(v.shape for k, v in read_safetensors(folder / "model.safetensors")[0].items()
                 if k.endswith(name.replace("__", ".")))  # fmt: skip
    left, right = unit(shape[0]), unit(shape[1])
    both = load(folder), load(changed_copy(folder, tmp_path / "b", **{name: 0.5 * np.outer(left, right)}))
    changes = weight_changes(*both)
    assert len(changes) == num_tensors(both[0])
    (found,) = [change for change in changes if change.norm]
    assert found.layer == 1 and found.kind == f"{tensor.replace('__', '.')}.weight" and found.stream == stream
    assert found.norm == pytest.approx(0.5, rel=1e-5) and found.rank_99 == 1
    assert found.effective_rank == pytest.approx(1, abs=1e-6)
    planted = left if stream == "writes" else right
    assert abs(found.directions[0] @ planted) > 1 - 1e-6


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (200, 64)])
@pytest.mark.parametrize("stream", ["writes", "reads"])
def test_numbers_are_those_of_a_whole_decomposition(shape, stream, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_NUMBERS", 1000)  # some blocks
    before = RNG.standard_normal(shape).astype(np.float32)
    spectrum = 0.5 ** np.arange(min(shape))
    left, right = (np.linalg.qr(RNG.standard_normal((size, size)))[0][:, : min(shape)] for size in shape)
    after = (before + (left * spectrum) @ right.T).astype(np.float32)
    about = weights.TensorChange("x.weight", 0, "x.weight", shape, stream=stream)
    change = weights._change(about, mx.array(before), mx.array(after), False)
    u, s, vt = np.linalg.svd(after.astype(np.float64) - before)
    np.testing.assert_allclose(change.singular_values, s[: weights.KEPT], rtol=1e-5, atol=1e-7)
    assert change.norm == pytest.approx(np.sqrt((s**2).sum()), rel=1e-9)
    assert change.relative_change == pytest.approx(change.norm / np.linalg.norm(before.astype(np.float64)))
    assert change.effective_rank == pytest.approx((s**2).sum() ** 2 / (s**4).sum())
    assert change.rank_99 == 1 + np.searchsorted(np.cumsum(s**2), 0.99 * (s**2).sum())
    truth = u.T if stream == "writes" else vt
    overlaps = np.abs((change.directions[:4] * truth[:4]).sum(axis=1))
    assert overlaps.min() > 1 - 1e-5
    np.testing.assert_allclose(np.linalg.norm(change.directions, axis=1), 1, rtol=1e-5)


def test_a_change_of_many_directions_has_no_short_list_and_a_vector_no_rank():
    noise = RNG.standard_normal((80, 100)).astype(np.float32)
    change = weights._change(
        weights.TensorChange("x.weight", 0, "x", noise.shape), mx.zeros((80, 100)), mx.array(noise), False
    )
    assert change.relative_change is None and change.rank_99 is None and 40 < change.effective_rank < 50
    vector = weights._change(
        weights.TensorChange("n", 0, "n", (3,)), mx.array([3.0, 0, 4]), mx.array([3.0, 1, 4]), False
    )
    assert vector.relative_change == pytest.approx(0.2) and vector.effective_rank is None is vector.directions
    scalar = weights._change(weights.TensorChange("s", 0, "s", ()), mx.array(2.0), mx.array(3.0), False)
    assert scalar.relative_change == 0.5


def test_the_summary_speaks_of_a_matrix_and_names_what_is_outside_the_blocks(tmp_path):
    write_family(tmp_path / "a", "llama")
    changes = {"model__norm__weight": np.full(64, 0.5), "layers__0__input_layernorm__weight": np.full(64, 0.5),
               "layers__2__mlp__down_proj__weight": 0.1 * np.outer(unit(64), unit(96))}  # fmt: skip
    both = [load(tmp_path / "a"), load(changed_copy(tmp_path / "a", tmp_path / "b", **changes))]
    sites = weights.output_sites(both[0].model)
    vectors = np.ones((len(sites), 64))
    result = weights.compare_weights(both, changes_or_reason(both), sites, vectors, vectors, ("plain", "polite"), {})
    assert "3 of 30 tensors differ, at layers 0, 2; outside the blocks model.norm.weight; most" in result["summary"]
    assert (
        "most model.layers.2.mlp.down_proj.weight" in result["summary"] and "(100% of the change)" in result["summary"]
    )
    assert [t["layer"] for t in result["tensors"]][-1] == 2 and sum("direction" in t for t in result["tensors"]) == 1
    assert weights.compare_weights(both, [], sites, vectors, vectors, ("x", "y"), {})["summary"].startswith("None of")


def test_experts_share_the_residual_stream(tmp_path):
    write_family(tmp_path / "a", "qwen3_moe")
    name = "layers__2__mlp__switch_mlp__down_proj__weight"
    left, right = unit(64), RNG.standard_normal((4, 32))
    added = left[None, :, None] * right[:, None, :]  # all experts write one direction
    both = load(tmp_path / "a"), load(changed_copy(tmp_path / "a", tmp_path / "b", **{name: added}))
    (found,) = [change for change in weight_changes(*both) if change.norm]
    assert found.layer == 2 and found.stream == "writes" and found.shape == (4, 64, 32)
    assert found.effective_rank == pytest.approx(1, abs=1e-5) and abs(found.directions[0] @ left) > 1 - 1e-5


def test_quantised_weights_count_as_what_they_stand_for(tmp_path):
    model, config = quantised(4)
    write_checkpoint(tmp_path / "a", model, config)
    kept = load(tmp_path / "a", keep_precision=True)
    expanded = load(tmp_path / "a")
    assert [change for change in weight_changes(kept, expanded) if change.norm] == []
    other = load(write_checkpoint(tmp_path / "b", random_gemma()))
    changes = weight_changes(other, kept)
    assert len(changes) == num_tensors(other)
    matrices = [c for c in changes if len(c.shape) == 2]
    assert all(0.01 < c.relative_change < 0.3 and c.effective_rank > 10 for c in matrices)
    assert "quantised: what rounding did" in weights.rounding(other, kept, changes)
    assert weights.rounding(other, other, weight_changes(other, other)) is None


@pytest.mark.parametrize("dtype, relative", [(mx.bfloat16, 0.0017), (mx.float16, 0.0002)])
def test_what_rounding_to_sixteen_bits_does_is_estimated(dtype, relative):
    """By the truth: what it does to a matrix with a change of rank one, larger than the spacing of its numbers."""
    before = mx.array(RNG.standard_normal((96, 128)).astype(np.float32)).astype(dtype).astype(mx.float32)
    size = float(mx.linalg.norm(before).item())
    after = before + mx.array(0.1 * size * np.outer(unit(96), unit(128)).astype(np.float32))
    about = weights.TensorChange("x.weight", 0, "x", before.shape)
    exact = weights._change(about, before, after, False)
    rounded = weights._change(about, before, after.astype(dtype).astype(mx.float32), False)
    truth = float(mx.linalg.norm(after.astype(dtype).astype(mx.float32) - after).item())
    assert exact.rounding_norm == 0 and exact.rank_99 == 1
    assert rounded.rounding_norm == pytest.approx(truth, rel=0.1) == pytest.approx(relative * size, rel=0.15)


@pytest.mark.parametrize("share, is_blurred", [(0.3, False), (0.001, True)])
def test_small_changes_of_sixteen_bit_weights_are_said_to_be_rounding_in_part(share, is_blurred, tmp_path):
    model = random_gemma()
    model.set_dtype(mx.bfloat16)
    write_checkpoint(tmp_path / "a", model)
    name = "layers__1__mlp__down_proj__weight"
    weight = model.layers[1].mlp.down_proj.weight.astype(mx.float32)
    added = share * float(mx.linalg.norm(weight).item()) * np.outer(*(unit(size) for size in weight.shape))
    both = [load(tmp_path / "a"), load(changed_copy(tmp_path / "a", tmp_path / "b", **{name: added}))]
    changes = changes_or_reason(both)
    (change,) = [change for change in changes if change.norm]
    assert (change.effective_rank > 1.5) == is_blurred
    result = weights.compare_weights(both, changes, [], np.zeros((0, 64)), np.zeros((0, 64)), ("x", "y"), {})
    note = result["rounding"] or ""
    assert note.startswith("1 of the 1 changed tensors are stored in 16 bits") == is_blurred == bool(note)
    assert result["summary"].endswith(note) and result["tensors"][0]["rounding_norm"] == change.rounding_norm > 0
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "a", keys=["mlp.down_proj"], scale=1e-3)
    fused = load(tmp_path / "a", adapter=adapter)  # in float32: exact
    assert weights.rounding(both[0], fused, weight_changes(both[0], fused)) is None


@pytest.mark.parametrize("family, name", [("gemma3", "model__norm__weight"), ("llama", "model__norm__weight"),
                                          ("gemma3", "layers__1__self_attn__q_norm__weight")])  # fmt: skip
def test_a_norm_changes_by_what_it_multiplies_with(family, name, tmp_path):
    """Rescaled by 1%, which Gemma stores as another w of 1 + w."""
    folder = tmp_path / "a"
    write_checkpoint(folder, random_gemma()) if family == "gemma3" else write_family(folder, family)
    tensors = read_safetensors(folder / "model.safetensors")[0]
    (stored,) = [np.array(value) for key, value in tensors.items() if key.endswith(name.replace("__", "."))]
    used = stored + (family == "gemma3")
    both = load(folder), load(changed_copy(folder, tmp_path / "b", **{name: 0.01 * used}))
    (change,) = [change for change in weight_changes(*both) if change.norm]
    assert change.relative_change == pytest.approx(0.01, rel=1e-4)
    assert change.norm == pytest.approx(0.01 * np.linalg.norm(used), rel=1e-4)


def test_models_of_other_tensors_are_one_sentence(tmp_path):
    gemma = load(write_checkpoint(tmp_path / "a", random_gemma()))
    llama = load(write_family(tmp_path / "b", "llama"))
    with pytest.raises(
        UserError, match=r"not compared: they have different tensors, .* in one of them only \(\d+ such"
    ):
        weight_changes(gemma, llama)
    wider = load(ROOT / "model_organism/base")
    reason = changes_or_reason([gemma, wider])
    assert reason.endswith(" such).") and reason.count("not compared") == 1
    result = weights.compare_weights([gemma, llama], reason, [], np.zeros((0, 64)), np.zeros((0, 64)), ("x", "y"), {})
    assert result["summary"] == reason == result["not_compared"] and result["tensors"] == []


def test_the_organisms_change_is_the_planted_one(organism):
    base, planted = load(ROOT / "model_organism/base"), planted_directions(organism)
    changed = [change for change in weight_changes(base, organism) if change.norm]
    assert [(c.layer, c.kind) for c in changed] == [(layer, "mlp.down_proj.weight") for layer in PLANTED_LAYERS]
    for change in changed:
        assert abs(change.directions[0] @ planted[change.layer]) > 0.9999
        assert change.effective_rank < 1.001 and 0.2 < change.relative_change < 0.8


@pytest.fixture(scope="module")
def planted_llama(tmp_path_factory):
    """compare_models.py on a change in the attention of layer 1, pairs of one's own: (JSON, printed, page, truth)."""
    home = tmp_path_factory.mktemp("planted")
    write_family(home / "a", "llama")
    left, right = unit(64), unit(64)
    changed_copy(home / "a", home / "b", layers__1__self_attn__o_proj__weight=2 * np.outer(left, right))
    pairs = [
        {"id": str(i), "plain": f"Tell me about {topic}.", "polite": f"Would you please tell me about {topic}?"}
        for i, topic in enumerate(TOPICS)
    ]
    content = {
        "metadata": {"behaviour": "politeness", "sides": ["plain", "polite"]},
        "categories": {"all": {"pairs": pairs}},
    }
    (home / "manners.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNMENT_ARTIFACTS_CACHE", str(home / "cache"))
        patch.chdir(home)
        printed = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        options = {"--model-a": "a", "--model-b": "b", "--pairs": "manners.json", "--results-dir": home / "results",
                   "--num-permutations": 19, "--num-bootstrap-resamples": 20, "--max-tokens": 3}  # fmt: skip
        assert script.main([str(x) for option in options.items() for x in option]) == 0
    (path,) = home.glob("results/*/manners/data/model_comparison.json")
    return json.loads(path.read_text()), "\n".join(printed), build(path.parent.parent), left


def test_a_planted_change_is_in_every_output(planted_llama):
    result, printed, page, direction = planted_llama
    (tensor,) = result["weights"]["tensors"]
    assert tensor["name"] == "model.layers.1.self_attn.o_proj.weight" and tensor["stream"] == "writes"
    assert abs(np.array(tensor["direction"]) @ direction) > 0.9999 and tensor["cosine_with_activations"] > 0.999
    name = "model.layers.1.self_attn.o_proj.weight"
    row = next(line for line in printed.splitlines() if line.startswith(name))
    assert row.split()[2:4] == ["1.0", "1.00"] and f"Direction that {name} writes" in printed.replace("\n", " ")
    assert ", ".join(str(x) for x in tensor["direction"]) in page and page.count(name) >= 3
    moved = [record["relative_change"] for record in result["conditions"]["prompt_end"]["layers"]]
    assert moved[0] == 0 < moved[1] and f"{moved[1]:.1%}" in printed
    assert [line for line in printed.splitlines() if len(line) > 80] == []


def test_words_follow_the_pairs_and_nothing_is_said_of_twins_there_are_not(planted_llama):
    result, printed, page, _ = planted_llama
    assert result["num_twins"] == 0 and list(result["transfer"]["b"]) == ["plain/polite -> plain/polite"]
    assert (
        "There are no twins for these pairs" in " ".join(printed.split()) and "Politeness: polite and plain" in printed
    )
    section = page[page.index('<section id="comparison">') :]
    section = section[: section.index("</section>")]
    assert "What did training change?" in section and "There are no twins" in section
    for text in (printed, section):
        for word in ("artifact", "natural", "harmless", "safety", "refus", "alignment"):
            assert word not in text.lower(), word
