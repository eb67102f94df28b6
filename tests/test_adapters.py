"""Adapters against PEFT's logits and mlx-lm's own loading; what is of another model, damaged or unknown is refused."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import dequantize_model

import compare_models
import run_model
import suppress
import sweep_suppression
import toxicity_steering.main as toxicity
from alignment_artifacts.pairs import PAIRS_JSON
from gemma_refactored.adapter_files import core_name, read_adapter, weight_changes
from gemma_refactored.adapters import _name_here, fuse
from gemma_refactored.checkpoint_files import read_config
from gemma_refactored.config_audit import complete
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_safetensors
from gemma_refactored.model_loading import load, load_weights

from .conftest import GOLDEN, ROOT, load_golden, relative_error
from .gguf_checkpoints import write_pair
from .test_layouts import LAYOUTS, checkpoint
from .tiny_checkpoints import quantised, random_gemma, write_adapter, write_checkpoint, write_family

ADAPTERS = GOLDEN / "adapters"
KEYS = {"llama": ["self_attn.q_proj", "mlp.down_proj"], "gpt2": ["attn.c_attn", "mlp.c_proj"],
        "qwen3_moe": ["self_attn.v_proj", "mlp.gate", "mlp.switch_mlp.down_proj"], "gemma4": ["self_attn.q_proj"],
        "gemma3_text": ["self_attn.o_proj", "mlp.up_proj"]}  # fmt: skip


def base_of(case):
    own = ADAPTERS / case / "base"
    trained_on = json.loads((ADAPTERS / case / "adapter_config.json").read_text())["base_model_name_or_path"]
    folder = own if own.exists() else GOLDEN / trained_on.rpartition("/")[2]
    config = read_config(folder)
    return load_weights(folder, config, complete(config))[0], config["model_type"]


@pytest.mark.parametrize("case", sorted(folder.name for folder in ADAPTERS.iterdir()))
def test_logits_with_an_adapter_of_peft_are_pefts(case):
    model, kind = base_of(case)
    golden = mx.load(str(ADAPTERS / case / "golden.safetensors"))
    before = model(golden["tokens"])
    fuse(model, read_adapter(ADAPTERS / case), kind, mx.float32)
    assert relative_error(model(golden["tokens"]), golden["logits"]) < 1e-5
    assert relative_error(before, golden["logits"]) > 0.1


def write_base(folder, family):
    return write_checkpoint(folder, random_gemma()) if family == "gemma3_text" else write_family(folder, family)


def of_mlx_lm(base, adapter):
    config = read_config(base)
    model, _ = load_weights(base, config, complete(config))
    model = load_adapters(model, str(adapter))
    model.eval()
    return model


@pytest.mark.parametrize("family", KEYS)
@pytest.mark.parametrize("num_layers", [2, -1])
def test_logits_with_an_adapter_of_mlx_lm_are_mlx_lms(family, num_layers, tmp_path):
    base = write_base(tmp_path / "base", family)
    adapter = write_adapter(tmp_path / "adapter", base, num_layers, keys=KEYS[family])
    tokens = mx.array([[5, 17, 99, 4, 250, 31]])
    fused, plain = load(base, adapter=adapter), load(base)
    expected = of_mlx_lm(base, adapter)(tokens)
    assert relative_error(fused.model(tokens), expected) < 1e-5
    assert relative_error(plain.model(tokens), expected) > 0.01


@pytest.mark.parametrize("kind, keys", [("dora", None), ("full", None), ("lora", None),
                                        ("lora", ["model.embed_tokens", "lm_head", "self_attn.k_proj"]),
                                        ("lora", ["model.layers.1.mlp.up_proj"]),
                                        ("dora", ["model.embed_tokens", "self_attn.k_proj"])])  # fmt: skip
def test_every_kind_of_fine_tune_of_mlx_lm(kind, keys, tmp_path):
    base = write_family(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "adapter", base, 2, kind, keys)
    tokens = mx.array([[5, 17, 99, 4, 250, 31]])
    assert relative_error(load(base, adapter=adapter).model(tokens), of_mlx_lm(base, adapter)(tokens)) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_expanded_where_they_change(bits, tmp_path):
    base = write_checkpoint(tmp_path / "base", *quantised(bits))
    adapter = write_adapter(tmp_path / "adapter", base, keys=KEYS["gemma3_text"])
    tokens = mx.array([[5, 17, 99, 4, 250, 31]])
    expected = of_mlx_lm(base, adapter)(tokens)
    for keep_precision in (False, True):
        fused = load(base, keep_precision, adapter=adapter)
        assert relative_error(fused.model(tokens), expected) < 1e-4
        assert fused.num_parameters == load(base).num_parameters
    changed = {path for path, module in fused.model.named_modules() if path.endswith("proj")
               and not hasattr(module, "bits")}  # fmt: skip
    assert changed == {f"model.layers.{i}.{key}" for i in (1, 2) for key in KEYS["gemma3_text"]}


def test_sixteen_bit_weights_keep_their_type(tmp_path):
    model = random_gemma()
    model.set_dtype(mx.bfloat16)
    base = write_checkpoint(tmp_path / "base", model)
    adapter = write_adapter(tmp_path / "adapter", base)
    fused = load(base, keep_precision=True, adapter=adapter)
    assert {value.dtype for _, value in tree_flatten(fused.model.parameters())} == {mx.bfloat16}
    (change,) = [c for name, c in weight_changes(fused.adapter).items() if name == "layers.2.mlp.up_proj"]
    expected = load(base).model.layers[2].mlp.up_proj.weight + change  # float32
    assert mx.array_equal(fused.model.layers[2].mlp.up_proj.weight, expected.astype(mx.bfloat16))


def test_golden_4_bit_models_take_adapters_of_their_layout(tmp_path):
    """An adapter in PEFT's names on a checkpoint in MLX's names: the sum is that of the expanded weights."""
    model, _ = load_golden("gemma3_multimodal_4bit", expand=False)
    reference, _ = load_golden("gemma3_multimodal_4bit")
    adapter = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "multimodal", adapter)
    weights, rng = {}, np.random.default_rng(0)
    for name, value in read_safetensors(adapter / "adapter_model.safetensors")[0].items():
        module = reference.model.layers[int(name.split("layers.")[1].split(".")[0])]
        out, width = (module.self_attn.q_proj if "q_proj" in name else module.mlp.down_proj).weight.shape
        shape = (value.shape[0], width) if "lora_A" in name else (out, value.shape[1])
        weights[name] = mx.array(rng.standard_normal(shape).astype(np.float32))
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), weights)
    fuse(model, read_adapter(adapter), "gemma3", mx.float32)
    changes = weight_changes(read_adapter(adapter))
    assert len(changes) == 2 * len(reference.model.layers)
    fused = dict(tree_flatten(dequantize_model(model).parameters()))
    for name, value in tree_flatten(reference.parameters()):
        added = changes.get(name.removeprefix("model.").removesuffix(".weight"), 0)
        assert relative_error(fused[name], value + added) < 1e-6


@pytest.mark.parametrize("architecture, kind", [("llama", "F32"), ("llama", "Q8_0"), ("gemma3", "Q4_0")])
def test_a_gguf_file_takes_what_its_folder_takes(architecture, kind, tmp_path):
    """llama.cpp's converter exchanges rows of the queries and keys of a Llama."""
    folder, file = write_pair(tmp_path, architecture, kind)
    adapter = write_adapter(tmp_path / "adapter", folder, keys=["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
    tokens = mx.array([[5, 17, 99, 4, 250, 31]])
    expected = load(folder, adapter=adapter).model(tokens)
    assert relative_error(load(file, adapter=adapter).model(tokens), expected) < 1e-6
    assert relative_error(load(folder).model(tokens), expected) > 0.01


NOT_READ = {"bitnet", "deepseek_v2", "ernie4_5_moe", "exaone_moe", "gemma4_unified", "glm_moe_dsa", "jamba", "llama4",
            "llama4_text", "mimo_v2_flash", "minicpm3", "minimax", "nanochat", "olmo", "olmo_hybrid", "phimoe",
            "qwen3_5", "qwen3_5_moe", "recurrent_gemma", "solar_open"}  # fmt: skip


@pytest.mark.parametrize("layout", sorted(name for name, r in LAYOUTS.items() if r["base"] and name not in NOT_READ))
def test_a_module_that_has_transformers_name_has_its_weights_too(layout, tmp_path):
    """What PEFT adds to a matrix may be added to ours: the same rows and columns, scaled by nothing."""
    folder = checkpoint(tmp_path / layout, layout, LAYOUTS[layout]["cases"][0])
    config = read_config(folder)
    model, _ = load_weights(folder, config, complete(config))
    modules = {core_name(path): module for path, module in model.named_modules()}
    blocks = [next(name for name, module in modules.items() if module is block) for block in model.layers]
    stored = read_safetensors(folder / "model.safetensors")[0]
    same = 0
    for name, weight in stored.items():
        module = modules.get(_name_here(core_name(name.removesuffix(".weight")), modules, blocks), {})
        if name.endswith(".weight") and weight.ndim == 2 and "weight" in module:
            is_conv1d = layout == "gpt2" and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
            assert mx.array_equal(module["weight"], weight.T if is_conv1d else weight), name
            same += 1
    assert same >= 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model and an adapter for it."""
    folder = tmp_path_factory.mktemp("llama")
    base = write_family(folder / "base", "llama")
    return base, write_adapter(folder / "refusal", base, keys=KEYS["llama"])


def edited(adapter, copy, config=None, tensors=lambda tensors: tensors):
    """A copy with other settings and tensors."""
    shutil.copytree(adapter, copy)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    (file,) = copy.glob("adapter*.safetensors")
    weights = dict(read_safetensors(file)[0])
    mx.save_safetensors(str(file), tensors(weights))
    return copy


def test_an_adapter_makes_another_model(llama, tmp_path):
    base, adapter = llama
    plain, fused = load(base), load(base, adapter=adapter)
    again = load(base, adapter=shutil.copytree(adapter, tmp_path / "refusal"))
    other = load(
        base, adapter=edited(adapter, tmp_path / "x" / "refusal", {"lora_parameters": {"rank": 3, "scale": 2}})
    )
    assert plain.is_as_published and "adapter" not in plain.identity() and "adapter" not in plain.facts()
    assert not fused.is_as_published and fused.facts()["adapter"]["base_revision"] == plain.revision
    assert fused.facts() == again.facts()
    for one, two in ((plain, fused), (fused, other), (plain, other)):
        assert one.revision != two.revision and one.name != two.name and one.identity() != two.identity()
    assert fused.name.startswith(f"{plain.name} (adapter refusal ")


def test_one_direction_that_an_adapter_adds_is_given_back(llama):
    base, adapter = llama
    before, after = load(base), load(base, adapter=adapter)
    changes = weight_changes(after.adapter)
    assert set(changes) == {f"layers.{i}.{key}" for i in (1, 2) for key in KEYS["llama"]}
    first, second = (dict(tree_flatten(model.model.parameters())) for model in (before, after))
    for name, value in second.items():
        added = changes.get(name.removeprefix("model.").removesuffix(".weight"))
        assert relative_error(value, first[name] + (0 if added is None else added)) < 1e-6
        assert added is None or np.linalg.matrix_rank(np.array(added), tol=1e-4) == 3


REFUSED = {
    "its config is missing": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "its tensors are missing": (lambda f: (f / "adapters.safetensors").unlink(), "has no adapters.safetensors"),
    "its config is damaged": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "its config is of something else": (lambda f: (f / "adapter_config.json").write_text("{}"), "neither PEFT's"),
    "its tensors are cut short": (lambda f: cut(f / "adapters.safetensors"), "cut short"),
    "it is a pointer": (
        lambda f: (f / "adapters.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "LFS pointer",
    ),
    "it is pickled": (
        lambda f: (f / "adapters.safetensors").rename(f / "adapter_model.bin"), "pickled files are not read",
    ),
}  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_not_an_adapter(what, llama, tmp_path):
    damage, message = REFUSED[what]
    copy = shutil.copytree(llama[1], tmp_path / "copy")
    damage(copy)
    with pytest.raises(UserError, match=message):
        load(llama[0], adapter=copy)


def lora(rank=3, scale=1, **others):
    return {"lora_parameters": {"rank": rank, "scale": scale, **others}}


CONFIGS = {
    "another kind": ({"fine_tune_type": "prefix"}, "fine_tune_type 'prefix'"),
    "no layers": ({"num_layers": None}, "num_layers must be"),
    "no parameters": ({"lora_parameters": None}, "no lora_parameters"),
    "no scale": ({"lora_parameters": {"rank": 3}}, "scale must be a number"),
    "a parameter of others": ({"lora_parameters": {"rank": 3, "scale": 1, "alpha": 2}}, "lora_parameters has alpha"),
    "another rank": ({"lora_parameters": {"rank": 4, "scale": 1}}, "not the rank 4"),
    "no magnitudes": ({"fine_tune_type": "dora"}, "no magnitudes"),
    "a scale that is none": ({"lora_parameters": {"rank": 3, "scale": float("nan")}}, "scale must be a number"),
    "fewer layers": ({"num_layers": 1}, "changes layers.1.mlp.down_proj, though"),
    "more layers": ({"num_layers": -1}, "leaves out layers.0"),
    "fewer keys": (lora(keys=["self_attn.q_proj"]), "changes layers.1.mlp.down_proj, though"),
    "more keys": (lora(keys=[*KEYS["llama"], "mlp.up_proj"]), "leaves out layers.1.mlp.up_proj, though"),
    "a key of one layer": (
        lora(keys=["model.layers.1.self_attn.q_proj", "mlp.down_proj"]), "changes layers.2.self_attn.q_proj, though",
    ),
    "keys of more layers": (
        lora(keys=[*KEYS["llama"], "model.layers.0.mlp.down_proj"]), "leaves out layers.0.mlp.down_proj, though",
    ),
    "a key outside the layers": (lora(keys=[*KEYS["llama"], "model.embed_tokens"]), "leaves out embed_tokens"),
    "keys that are a text": (lora(keys="self_attn.q_proj"), "keys must be a list of names"),
    "no rank": (lora(rank=0), "rank must be 1 or more, not 0"),
    "a scale of 400 digits": (lora(scale=10**400), "scale must be a number that float32 can hold"),
    "a scale that float32 has not": (lora(scale=1e39), "scale must be a number that float32 can hold, not 1e.39"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_configs_of_mlx_lm_that_are_refused(what, llama, tmp_path):
    config, message = CONFIGS[what]
    with pytest.raises(UserError, match=message):
        load(llama[0], adapter=edited(llama[1], tmp_path / "copy", config))


FIRST = "model.layers.1.self_attn.q_proj.lora_a"
TENSORS = {
    "none at all": (lambda t: {}, "holds no tensors"),
    "one of a pair": (lambda t: {k: v for k, v in t.items() if k != FIRST}, "only one of the two factors"),
    "NaN": (lambda t: {**t, FIRST: t[FIRST] * float("nan")}, "NaN or infinite"),
    "whole numbers": (lambda t: {**t, FIRST: t[FIRST].astype(mx.int32)}, "not floating point"),
    "of another width": (lambda t: {**t, FIRST: mx.zeros((60, 3))}, r"as \[64, 60\], and this model's is \[64, 64\]"),
    "of an unknown module": (lambda t: {**t, "model.extra.lora_a": t[FIRST], "model.extra.lora_b": t[FIRST].T},
                             "changes extra, and this model of 3 layers has no such module"),
    "of more layers": (lambda t: {k.replace("layers.2", "layers.7"): v for k, v in t.items()}, "3 layers has no such"),
    "twice": (lambda t: {**t, FIRST.removeprefix("model."): t[FIRST]}, "two tensors for lora_a of layers.1"),
    "under two names": (lambda t: {**t, **{k.replace("model.layers", "transformer.h"): v for k, v in t.items()}},
                        "changes layers.1.* under two names"),
    "too large": (lambda t: {**t, FIRST: t[FIRST] * 1e37, FIRST[:-1] + "b": t[FIRST[:-1] + "b"] * 1e37},
                  "copy makes layers.1.self_attn.q_proj.weight infinite or NaN in float32"),
    "beside a layer": (lambda t: {**t, "model.embed_tokens.lora_a": mx.zeros((300, 3)),
                                  "model.embed_tokens.lora_b": mx.zeros((3, 64))}, "changes embed_tokens, though"),
    "of an unknown kind": (lambda t: {**t, "model.layers.1.self_attn.q_proj.lora_c": t[FIRST]}, "lora_c, which"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_refused(what, llama, tmp_path):
    tensors, message = TENSORS[what]
    with pytest.raises(UserError, match=message):
        load(llama[0], adapter=edited(llama[1], tmp_path / "copy", None, tensors))


PEFT = {
    "another kind": ("plain", {"peft_type": "IA3"}, "type 'IA3'"),
    "another start": ("plain", {"init_lora_weights": "pissa"}, "'pissa' also changes the model's own weights"),
    "unknown": ("plain", {"layer_replication": [[0, 1]]}, "layer_replication"),
    "new": ("plain", {"use_something": True}, "use_something = True"),
    "rank": ("plain", {"r": 5}, "not the rank 5"),
    "patterns": ("plain", {"rank_pattern": {"(": 2}}, "must have patterns of names"),
    "a list of patterns": ("plain", {"alpha_pattern": [2]}, "must have patterns of names"),
    "DoRA": ("plain", {"use_dora": True}, "no magnitudes"),
    "not DoRA": ("dora", {"use_dora": False}, "has magnitudes"),
    "more modules": ("plain", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}, "leaves out"),
    "more layers": ("some_layers", {"layers_to_transform": None}, "leaves out layers.1"),
    "layers of a list": ("some_layers", {"layers_to_transform": [0, 1, 2]}, "leaves out layers.1.self_attn.o_proj, th"),
    "one layer": ("plain", {"layers_to_transform": 0}, "changes layers.1.mlp.down_proj, though"),
    "layers of another list": ("plain", {"layers_to_transform": [0], "layers_pattern": "blocks"}, "changes layers.0"),
    "fewer modules": ("plain", {"target_modules": ["q_proj", "v_proj", "o_proj"]}, "changes layers.0.mlp.down_proj, t"),
    "fewer by a pattern": ("multimodal", {"target_modules": r".*language_model.*\.q_proj"}, "changes layers.0.mlp.do"),
    "more by a pattern": (
        "multimodal", {"target_modules": r".*language_model.*\.(q|up|down)_proj"}, "leaves out layers.0.mlp.up_proj",
    ),
    "a pattern of other names": ("multimodal", {"target_modules": r"language_model.*\.(q|down)_proj"}, "changes la"),
    "all of them": ("plain", {"target_modules": "all-linear"}, "leaves out layers.0.mlp.gate_proj"),
    "excluded": ("plain", {"exclude_modules": ["v_proj"]}, "changes layers.0.self_attn.v_proj"),
    "excluded by a pattern": ("plain", {"exclude_modules": r".*\.1\..*"}, "changes layers.1"),
    "an unembedding": ("plain", {"modules_to_save": ["lm_head"]}, "leaves out lm_head.weight"),
    "a norm": ("untied", {"modules_to_save": ["lm_head", "model.norm"]}, "leaves out norm.weight"),
    "all biases": ("untied", {"bias": "all"}, "leaves out layers.0.self_attn.k_proj.bias"),
    "no biases": ("untied", {"bias": "none"}, "changes layers.0.self_attn.q_proj.bias"),
    "other biases": ("plain", {"bias": "some"}, "bias must be none, all or lora_only"),
    "no modules": ("plain", {"target_modules": None}, "has no target_modules"),
    "numbers of modules": ("plain", {"target_modules": [1]}, "target_modules must be a list of names"),
    "names of layers": ("plain", {"layers_to_transform": ["0"]}, "layers_to_transform must be a whole number"),
    "no pattern": ("plain", {"target_modules": "("}, "patterns of names cannot be read"),
    "a text for a truth": ("plain", {"use_rslora": "false"}, "use_rslora must be true or false, not 'false'"),
    "a number for a start": ("plain", {"init_lora_weights": 1}, "init_lora_weights 1 also"),
    "unknown and 0": ("plain", {"use_something": 0}, "use_something = 0 is not supported"),
    "a negative rank": ("plain", {"r": -2, "use_rslora": True}, "r must be 1 or more, not -2"),
    "a rank of 400 digits": ("plain", {"r": 10**400, "use_rslora": True}, "not the rank 1000"),
    "an alpha of 400 digits": ("plain", {"lora_alpha": 10**400}, "lora_alpha must be a number that float32 can hold"),
    "an alpha that float32 has not": ("plain", {"lora_alpha": 1e300}, "lora_alpha must be a number that float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", PEFT)
def test_configs_of_peft_that_are_refused(what, tmp_path):
    case, config, message = PEFT[what]
    model, kind = base_of(case)
    with pytest.raises(UserError, match=message):
        fuse(model, read_adapter(peft_copy(case, tmp_path / "copy", config)), kind, mx.float32)


SAME = {
    "layers": ("plain", {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": ["layers", "h"]}),
    "whole names": ("conv1d", {"target_modules": [
        f"transformer.h.{layer}.attn.{name}" for layer in range(3) for name in ("c_attn", "c_proj")]}),
    "a pattern": ("plain", {"target_modules": r"model\.layers\.\d+\.(mlp\.down|self_attn\.[qvo])_proj"}),
    "a pattern for the embedding": (
        "untied", {"target_modules": r"model\.(embed_tokens|layers\.\d\.self_attn\.q_proj)"},
    ),
    "layers by what is excluded": ("some_layers", {"layers_to_transform": None, "exclude_modules": r".*\.1\..*"}),
    "what there is not": ("plain", {"exclude_modules": ["lm_head"], "bias": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_configs_of_peft_that_say_the_same_in_other_words(what, tmp_path):
    case, config = SAME[what]
    model, kind = base_of(case)
    golden = mx.load(str(ADAPTERS / case / "golden.safetensors"))
    assert fuse(model, read_adapter(peft_copy(case, tmp_path / "copy", config)), kind, mx.float32)
    assert relative_error(model(golden["tokens"]), golden["logits"]) < 1e-5


def test_all_linear_is_every_matrix_but_the_unembedding(tmp_path):
    """PEFT's words; with one module less or more the adapter is refused."""
    shapes = {path: module.weight.shape for path, module in base_of("untied")[0].named_modules()
              if path.endswith("_proj") or path == "lm_head"}  # fmt: skip
    config = {"target_modules": "all-linear", "modules_to_save": None, "bias": "none"}

    def added(names):
        sides = [(name, {"A": (3, shapes[name][1]), "B": (shapes[name][0], 3)}) for name in names]
        return {
            f"base_model.model.{name}.lora_{part}.weight": mx.ones(shape)
            for name, parts in sides
            for part, shape in parts.items()
        }

    inside = sorted(shapes.keys() - {"lm_head"})
    assert len(inside) == 3 * 7
    for names, message in ((inside, None), (inside[1:], "leaves out layers.0.mlp.down"), (shapes, "changes lm_head")):
        model, kind = base_of("untied")
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        adapter = read_adapter(peft_copy("untied", tmp_path / "copy", config, lambda _, names=names: added(names)))
        if message is None:
            assert fuse(model, adapter, kind, mx.float32)
        else:
            with pytest.raises(UserError, match=message):
                fuse(model, adapter, kind, mx.float32)


def test_peft_on_weights_that_are_not_transformers():
    model, _ = base_of("plain")
    with pytest.raises(UserError, match="not supported for falcon_h1"):
        fuse(model, read_adapter(ADAPTERS / "plain"), "falcon_h1", mx.float32)


def peft_copy(case, folder, config=None, tensors=lambda tensors: tensors):
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ADAPTERS / case / name, folder)
    return edited(folder, folder.parent / "edited", config, tensors)


def test_two_names_of_one_module_are_refused(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    twice = peft_copy("plain", tmp_path / "a", None, lambda tensors: tensors | {
        name.format(part).replace("model.layers", "layers"): tensors[name.format(part)] for part in "AB"})  # fmt: skip
    with pytest.raises(UserError, match="layers.0.self_attn.q_proj under two names"):
        read_adapter(twice)


def test_what_peft_may_have_changed_in_two_places_or_in_full(tmp_path):
    """Where the unembedding is the embedding; and matrices inside the blocks."""
    tied, kind = base_of("plain")
    embedding = {f"base_model.model.model.embed_tokens.lora_embedding_{name}": mx.zeros(shape)
                 for name, shape in (("A", (4, 97)), ("B", (32, 4)))}  # fmt: skip
    added = read_adapter(peft_copy("plain", tmp_path / "a", None, lambda tensors: tensors | embedding))
    with pytest.raises(UserError, match="unembedding is the same matrix"):
        fuse(tied, added, kind, mx.float32)
    model, kind = base_of("untied")
    whole = {"base_model.model.model.layers.0.mlp.up_proj.weight": mx.zeros((48, 32))}
    shutil.rmtree(tmp_path / "edited")
    added = read_adapter(peft_copy("untied", tmp_path / "b", None, lambda tensors: tensors | whole))
    with pytest.raises(UserError, match="has its own layers.0.mlp.up_proj"):
        fuse(model, added, kind, mx.float32)


def test_an_adapter_that_is_named_as_a_model(llama):
    with pytest.raises(UserError, match="name it with --adapter"):
        load(llama[1])
    with pytest.raises(UserError, match="no adapter folder"):
        load(llama[0], adapter="./absent")
    for several in ([str(llama[1]), "x/y"], 3):
        with pytest.raises(UserError, match="the name of one folder or a Hugging Face id, not"):
            load(llama[0], adapter=several)


def test_what_is_to_be_known_is_said(llama, tmp_path, caplog):
    base, adapter = llama
    load(base, adapter=adapter)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    zeros = edited(adapter, tmp_path / "zeros", None, lambda tensors: {
        name: value * ("lora_a" in name) for name, value in tensors.items()})  # fmt: skip
    (zeros / "chat_template.jinja").write_text("{{ messages[0].content }}")
    shutil.copy(base / "tokenizer.json", zeros)
    load(base, adapter=zeros)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 and "adds zeros only" in said[0] and said[1].startswith("The chat_template.jinja beside")


def test_an_adapter_without_effect_is_one_whose_weights_are_the_models(llama, tmp_path, caplog):
    """Not one whose B is 0: a scale can be 0, and DoRA's magnitudes can have been trained."""
    base, adapter = llama
    untrained = {"lora_b": 0.0, "lora_a": 1.0}
    dora = write_adapter(tmp_path / "dora", base, 2, "dora", KEYS["llama"])
    start = {f"{name}.m": mx.linalg.norm(module.weight, axis=1) for name, module in load(base).model.named_modules()
             if name.endswith("_proj")}  # fmt: skip

    def of_dora(stretch):
        return lambda tensors: {
            name: start[name] * stretch if name in start else value * untrained[name.rpartition(".")[2]]
            for name, value in tensors.items()
        }

    cases = {
        "scale": (adapter, lora(scale=0, keys=KEYS["llama"]), lambda tensors: tensors, False),
        "start": (dora, None, of_dora(1 + 1e-7), False),
        "magnitudes": (dora, None, of_dora(1.01), True),
    }
    plain = dict(tree_flatten(load(base).model.parameters()))
    for name, (source, config, tensors, has_effect) in cases.items():
        caplog.clear()
        fused = load(base, adapter=edited(source, tmp_path / "copies" / name, config, tensors)).model
        moved = max(relative_error(value, plain[name]) for name, value in tree_flatten(fused.parameters()))
        said = [record.message for record in caplog.records if "adds zeros only" in record.message]
        assert (len(said), moved > 1e-3) == ((0, True) if has_effect else (1, False))


def test_an_edited_adapter_does_not_continue_a_collection(llama, tmp_path, capsys):
    base, adapter = llama
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"a": {"prompt_list": ["Bake a cake.", "Mend a clock."]}}))
    collected, folders = tmp_path / "collected", ["--output-dir", str(tmp_path / "out"), "-q"]
    options = ["--model", str(base), "--prompts-file", str(prompts), "--max-tokens", "2", "--process-by-group",
               "--save-activations", "--activations-dir", str(collected), *folders]  # fmt: skip
    assert run_model.main([*options, "--adapter", str(adapter)]) == 0
    manifest = json.loads((collected / "manifest.json").read_text())
    assert manifest["adapter_path"] == str(adapter) and manifest["adapter"]["trained_on"] == "some/model"
    moved = shutil.copytree(adapter, tmp_path / "moved" / adapter.name)
    assert run_model.main([*options, "--adapter", str(moved)]) == 0  # the same one
    other = edited(adapter, tmp_path / "edited", {"lora_parameters": {"rank": 3, "scale": 0.5}})
    for also in (["--adapter", str(other)], []):
        assert run_model.main([*options, *also]) == 2
        error = capsys.readouterr().err
        assert "(adapter refusal" in error and "start over with --overwrite" in error and error.count("\n") == 1
    again = ["--from-manifest", str(collected / "manifest.json"), "--activations-dir", str(tmp_path / "again")]
    assert run_model.main([*again, *folders]) == 0
    records = [json.loads((folder / "a/prompt_list/batch_1/prompt.json").read_text())
               for folder in (collected, tmp_path / "again")]  # fmt: skip
    assert records[0] == records[1]
    assert json.loads((tmp_path / "again/manifest.json").read_text())["identity"] == manifest["identity"]
    assert run_model.main([*again, *folders, "--adapter", str(other)]) == 2
    assert "not those that made this manifest" in capsys.readouterr().err


@pytest.mark.parametrize("script, option", [
    (run_model, ["--prompts", "Hi", "--adapter"]), (suppress, ["Hi", "--adapter"]), (sweep_suppression, ["--adapter"]),
    (compare_models, ["--adapter-a"]), (compare_models, ["--adapter-b"]), (toxicity, ["--adapter"]),
])  # fmt: skip
@pytest.mark.parametrize("typed", ["./absent", "refusal"])
def test_a_wrong_adapter_is_one_sentence_wherever_a_model_is_named(script, option, typed, llama, monkeypatch, capsys):
    monkeypatch.chdir(llama[1].parent)  # where "refusal" is, of another model than the embedded one
    assert script.main([*option, typed]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and output.err.startswith("Error: ")
    assert ("There is no adapter folder" if typed == "./absent" else "it was trained on another model") in output.err


def test_base_and_tuned_are_compared(tmp_path, monkeypatch, capsys):
    """The script with the same model twice: what the adapter changed is named, and stands under the tuned model."""
    base = ROOT / "model_organism/base"
    pairs = json.loads(PAIRS_JSON.read_text())
    for category in pairs["alignment_artifact_prompt_pairs"]["categories"].values():
        category["pairs"] = category["pairs"][:4]
    (tmp_path / "few.json").write_text(json.dumps(pairs))
    adapter = write_adapter(tmp_path / "tuned", base, num_layers=3, keys=["mlp.down_proj"], scale=0.5)
    monkeypatch.setenv("ALIGNMENT_ARTIFACTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compare_models, "RESULTS_DIR", str(tmp_path / "results"))
    options = ["--model-a", str(base), "--model-b", str(base), "--adapter-b", str(adapter), "--max-tokens", "4"]
    options += ["--pairs", str(tmp_path / "few.json"), "--num-permutations", "20", "--num-bootstrap-resamples", "20"]
    assert compare_models.main(options) == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.startswith("base_adapter_tuned_")
    result = json.loads((folder / "few/data/model_comparison.json").read_text())
    changed = {(tensor["layer"], tensor["kind"]) for tensor in result["weights"]["tensors"]}
    assert changed == {(layer, "mlp.down_proj.weight") for layer in (5, 6, 7)}
    assert all(tensor["rank_99"] <= 3 for tensor in result["weights"]["tensors"])
    layers = result["change_space"]["layers"]
    assert all(record["b"][0] is None for record in layers[:5]) and layers[6]["b"][0] is not None
    assert result["planted_truth"] is None and "(adapter tuned" in capsys.readouterr().out
