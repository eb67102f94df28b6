"""What transformers computes for every layout that both it and mlx-lm know, each key of its config moved once.

    pip install torch==2.13.0 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
    python -m tests.make_layout_logits [MODEL_TYPE ..]
    python -m tests.make_layout_logits --pairs 40 [MODEL_TYPE ..]   # only says how two changes at once compare

Writes tests/golden/layouts.json: configs as transformers saves them, names and shapes of the weights (their
values come from a seed, see layouts.py), and some of the logits in float32.
"""

import itertools
import json
import pathlib
import random
import sys
import tempfile
import warnings
from contextlib import suppress

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
import transformers
from mlx_lm.utils import MODEL_REMAPPING
from safetensors import safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gemma_refactored.checkpoint_files import read_config
from gemma_refactored.config_audit import NEVER_NUMBERS, audit, complete
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import load_weights

from .layouts import ENTRIES, POSITIONS, TOKENS, write_layout

KEYS = pathlib.Path(__file__).parent.parent / "gemma_refactored" / "config_keys.json"
ROUNDING = 5e-3  # of the largest logit, at most, between float32 and float64 in transformers itself
TOLERANCE = 1e-4  # of the largest logit; what agrees differs by 1e-7 to 3e-5
FILE = pathlib.Path(__file__).parent / "golden" / "layouts.json"
LAYERS = 4
# Small sizes by the name of the key, for whichever of them a configuration has.
SMALL = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, n_positions=256, n_ctx=256, n_embd=32,
    n_layer=LAYERS, n_head=4, n_inner=48, rotary_dim=4, num_experts=4, num_local_experts=4, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, n_shared_experts=1,
    q_lora_rank=12, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1,
    first_k_dense_replace=1, sliding_window=None, state_size=8, time_step_rank=4, n_groups=1, num_heads=4,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_num_heads=4, mamba_head_dim=16,
    ssm_state_size=8, mamba_dt_rank=4, expert_ffn_hidden_size=16, ffn_hidden_size=48, d_model=32, n_heads=4,
    n_layers=LAYERS, max_seq_len=256, original_max_position_embeddings=256, pad_token_id=0, bos_token_id=2,
    eos_token_id=1, lru_width=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128, num_kv_shared_layers=0,
    global_head_dim=8, conv_dim=32, block_ff_dim=48, conv_hidden_size=32, intermediate_size_mlp=48, index_head_dim=8,
    index_n_heads=2, index_topk=64, zero_expert_num=2, query_pre_attn_scalar=10, moe_topk=2,
    shared_intermediate_size=16,
    mamba_intermediate=32, mamba_d_ssm=64, mamba_chunk_size=16, chunk_size=16, dim_model_base=32,
    attn_temperature_tuning=False, moe_shared_expert_intermediate_size=16, laurel_rank=4, altup_num_inputs=2,
    attention_chunk_size=64, num_key_value_groups=2, num_mtp_modules=0, global_num_key_value_heads=2,
    moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
)  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.5, 2.0, 4.0, 8.0]}
ROPES = [
    dict(rope_type="linear", factor=4.0),
    dict(rope_type="dynamic", factor=2.0),  # beyond the context of the variant with a short one
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, attention_factor=1.0),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, truncate=False),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.5),
    dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0),
    dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0,
         high_freq_factor=4.0),
    dict(rope_type="longrope", original_max_position_embeddings=16, factor=16.0, **FACTORS),
    dict(rope_type="longrope", original_max_position_embeddings=128, factor=2.0, **FACTORS),
    dict(partial_rotary_factor=0.5),
    dict(rope_theta=123.0),
]  # fmt: skip
WINDOWS = [
    dict(sliding_window=6),
    dict(sliding_window=None),
    dict(sliding_window=6, use_sliding_window=True, max_window_layers=2),
    dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2),
    dict(sliding_window=6, layer_types=["sliding_attention"] * LAYERS),
    dict(sliding_window=6, layer_types=["full_attention"] * LAYERS),
]
COMBINATIONS = [
    dict(n_group=2, topk_group=1),
    dict(qk_norm=True),
    dict(use_qk_norm=True),
    dict(n_group=4, topk_group=2, n_routed_experts=8),
]
TEXTS = {
    "sigmoid": "softmax",
    "softmax": "sigmoid",
    "greedy": "group_limited_greedy",
    "rope": "nope",
    "silu": "gelu",
    "swish": "gelu",
    "gelu": "relu",
    "gelu_pytorch_tanh": "relu",
    "gelu_new": "relu",
}


def small(config) -> dict:
    """Small values for what this configuration has, its nested text configuration included."""
    content = config.to_dict()
    changes = {key: SMALL[key] for key in content if key in SMALL}
    if content.get("sliding_window") is not None:
        changes["sliding_window"] = 128  # further than the prompt reaches
    if "qk_rope_head_dim" in content:
        changes.pop("head_dim", None)
        changes["num_key_value_heads"] = SMALL["num_attention_heads"]
    if "text_config" in content:
        changes["text_config"] = small(config.text_config)
    return changes


def moved(key: str, value) -> list:
    """Other values for a key, as far as its value tells."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2] if value else [1]
    if isinstance(value, float):
        return [value * 1.7 if value else 0.3]
    if isinstance(value, str):
        return [TEXTS[value]] if value in TEXTS else []
    if value is None:
        return [True, 3, 0.3, "relu"]  # whichever the class takes
    if isinstance(value, list) and value == []:
        return [[1]]
    if isinstance(value, (list, tuple)) and value[::-1] != value:
        return [list(value[::-1])]
    return []


def variants(config) -> list[dict]:
    content = config.to_dict()
    changes = []
    for key, value in content.items():
        if key in NEVER_NUMBERS or key in ("layer_types", "rope_parameters", "sliding_window", "text_config"):
            continue
        changes += [{key: other} for other in moved(key, value)]
    changes += [change for change in COMBINATIONS if change.keys() <= content.keys()]
    kinds = content.get("layer_types")
    if kinds and "sliding_attention" not in kinds:
        changes.append({"layer_types": kinds[::-1]})
    if isinstance(content.get("rope_parameters"), dict):
        if "rope_theta" in content["rope_parameters"]:
            changes += [{"rope_parameters": {**content["rope_parameters"], **rope}} for rope in ROPES]
            rope = {**content["rope_parameters"], "rope_type": "dynamic", "factor": 2.0}
            changes.append({"max_position_embeddings": 16, "rope_parameters": rope})
        else:
            for kind, settings in content["rope_parameters"].items():
                if isinstance(settings, dict):
                    for rope in ROPES:
                        new = {**content["rope_parameters"], kind: {**settings, **rope}}
                        changes.append({"rope_parameters": new})
    if "sliding_window" in content:
        changes += [w for w in WINDOWS if w.keys() <= content.keys()]
    return changes


def build(model_type: str, changes: dict, folder: pathlib.Path):
    """Save a model of these settings as transformers does, fill it by seed, read it back; config, shapes, logits."""
    config = CONFIG_MAPPING[model_type]
    plain = config()
    settings = small(plain)
    settings = {**settings, **special(model_type), **changes}
    config = config(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    del model
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "numpy") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)
    content = json.loads((folder / "config.json").read_text())
    write_layout(folder, content, shapes)
    return content, shapes, logits_of(folder, torch.float32)


def logits_of(folder: pathlib.Path, dtype: torch.dtype) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), use_cache=False).logits[0].float().numpy()


def special(model_type: str) -> dict:
    """What the sizes above do not say."""
    return SPECIAL.get(model_type, {})


SPECIAL: dict[str, dict] = {
    "bailing_hybrid": dict(layer_group_size=2, group_norm_size=2),
    "cohere2": dict(layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]),
    "gpt_neox": dict(intermediate_size=128),
    "gptj": dict(n_inner=128),
    "gpt2": dict(n_inner=None),
    "exaone4": dict(sliding_window_pattern=2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "mamba2": dict(num_heads=4, head_dim=16, expand=2),
}


def model_types() -> list[str]:
    known = {path.stem for path in (pathlib.Path(mlx_lm.__file__).parent / "models").glob("*.py")}
    return sorted(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if MODEL_REMAPPING.get(t, t) in known)


def ours(folder: pathlib.Path, audited: bool = False) -> np.ndarray | str:
    """Our logits, or why there are none. The sweep is of the loader without its audit, which it is for."""
    config = read_config(folder)
    try:
        completed = complete(config)
        if audited:
            audit(config, completed)
        model, _ = load_weights(folder, config, completed)
        return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))
    except (UserError, ValueError) as error:
        return str(error).replace(str(folder), "FOLDER")


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max()) if actual.shape == expected.shape else 99.0


def kept(logits: np.ndarray) -> list:
    return [[float(f"{logits[p, e]:.7g}") for e in ENTRIES] for p in POSITIONS]


def sweep(model_type: str) -> dict:
    """Every variant of a layout: what was changed, in config and shapes, transformers' logits, and how ours compare."""
    cases = []
    try:
        base = attempt(model_type, {})
    except Exception as error:  # noqa: BLE001  (transformers' own, of any kind)
        return {"base": None, "why": f"{type(error).__name__}: {str(error)[:100]}", "cases": []}
    config = CONFIG_MAPPING[model_type]
    settings = config(**{**small(config()), **special(model_type)})
    for change in [{}, *variants(settings)]:
        try:
            content, shapes, logits, result = attempt(model_type, change)
        except Exception:  # noqa: BLE001  (transformers does not take this value)
            continue
        if not np.isfinite(logits).all():
            continue
        case = {"change": change, "moved": difference(logits, base[2]) > 1e-5}
        if isinstance(result, str):
            case["refused"] = result
        else:
            case["difference"] = difference(result, logits)
        case["config"] = {
            k: content.get(k, "ABSENT")
            for k in {**base[0], **content}
            if content.get(k, "ABSENT") != base[0].get(k, "ABSENT")
        }
        if shapes != base[1]:
            case["shapes"] = {k: shapes.get(k) for k in {**base[1], **shapes} if shapes.get(k) != base[1].get(k)}
        is_small = len(case.get("shapes", ())) <= 8  # changes of size are told by the shapes, and fill the file
        if is_small and (case["moved"] or not change):
            case["logits"] = kept(logits)
        else:
            case.pop("shapes", None)
            del case["config"]
        cases.append(case)
    return {"base": {"config": base[0], "shapes": base[1]}, "cases": cases}


def sweep_pairs(model_type: str, count: int) -> None:
    """Print how many of so many pairs of changes, as users meet them, agree, are refused, or are wrong unnoticed."""
    config = CONFIG_MAPPING[model_type]
    settings = config(**{**small(config()), **special(model_type)})
    changes = [change for change in variants(settings) if not is_size(change)]
    pairs = [(a, b) for a, b in itertools.combinations(changes, 2) if not a.keys() & b.keys()]
    outcomes: dict[str, list] = {"agree": [], "refused": [], "wrong": []}
    for one, other in random.Random(0).sample(pairs, min(count, len(pairs))):
        try:
            _, _, logits, result = attempt(model_type, {**one, **other}, audited=True)
        except Exception:  # noqa: BLE001  (transformers does not take these values)
            continue
        if np.isfinite(logits).all():
            agrees = isinstance(result, str) or difference(result, logits) <= TOLERANCE
            outcome = "wrong" if not agrees else "refused" if isinstance(result, str) else "agree"
            outcomes[outcome].append((one, other))
    print(model_type, {name: len(items) for name, items in outcomes.items()}, outcomes["wrong"], flush=True)


def is_size(change: dict) -> bool:
    """What moves the shapes of weights, and is told by them."""
    (value, *more) = change.values()
    return not more and isinstance(value, int) and not isinstance(value, bool) and "sliding_window" not in change


def attempt(model_type: str, change: dict, audited: bool = False):
    with tempfile.TemporaryDirectory() as folder:
        content, shapes, logits = build(model_type, change, pathlib.Path(folder))
        result = ours(pathlib.Path(folder), audited)
        if not isinstance(result, str) and difference(result, logits) > TOLERANCE:
            # Some random networks amplify rounding: then the arbiter is transformers in float64.
            with suppress(RuntimeError):  # not every layout runs in float64
                exact = logits_of(pathlib.Path(folder), torch.float64)
                rounding = difference(logits, exact)
                if rounding < ROUNDING and difference(result, exact) < 3 * rounding:
                    logits = result = exact
        return content, shapes, logits, result


def summary(record: dict) -> dict | None:
    """What config_audit needs to know of a layout."""
    if record["base"] is None:
        return None
    by_keys: dict[str, list] = {}
    for case in record["cases"]:
        by_keys.setdefault(",".join(sorted(case["change"])), []).append(case)
    differs = lambda case: case.get("difference", 0.0) > TOLERANCE  # noqa: E731
    base = by_keys[""][0]
    parameters = record["base"]["config"].get("rope_parameters") or {}
    keys, rope, windows = {}, {"default", *_rope_types(parameters)}, "all"
    bad_rope = set()
    for name, cases in by_keys.items():
        change = cases[0]["change"]
        if "rope_parameters" in change:
            for case in cases:
                settings = case["change"]["rope_parameters"]
                kinds = _rope_types(settings)
                if _partial_factors(settings) != _partial_factors(parameters):
                    kinds = kinds | {"partial"}
                if not case["moved"] and not differs(case):
                    continue
                if differs(case):
                    bad_rope |= kinds - ({"default"} if kinds != {"default"} else set())
                else:
                    rope |= kinds
        elif "sliding_window" in change or "layer_types" in change:
            if any(map(differs, cases)):
                windows = "none" if set(change) == {"sliding_window"} else windows if windows == "none" else "usual"
        elif len(change) == 1 and any(map(differs, cases)):
            values = [case["change"][name] for case in cases if not differs(case) and "difference" in case]
            keys[name] = values
        elif len(change) > 1 and any(map(differs, cases)):
            for part in change:
                keys.setdefault(part, [])
    usual = complete(record["base"]["config"])
    moved_keys = {key for case in record["cases"] for key in case["change"]}
    return {
        "agrees": None if "refused" in base else not differs(base),
        "keys": {k: [*v, *([usual[k]] if k in usual else [])] for k, v in sorted(keys.items())},
        "unmoved": sorted(
            k for k in usual if k not in moved_keys and k not in NEVER_NUMBERS and not isinstance(usual[k], dict)
        ),
        "rope": sorted(rope - bad_rope),
        "rope_lost": sorted(bad_rope),
        "windows": windows,
        **({"refused": base["refused"]} if "refused" in base else {}),
    }


def _partial_factors(settings: dict) -> list:
    return [
        one.get("partial_rotary_factor") for one in [v for v in settings.values() if isinstance(v, dict)] or [settings]
    ]


def _rope_types(settings: dict) -> set[str]:
    """Of one setting for all layers, or of one for each kind of layer."""
    return {
        one.get("rope_type", "default") for one in [v for v in settings.values() if isinstance(v, dict)] or [settings]
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    records = json.loads(FILE.read_text()) if FILE.exists() else {}
    table = json.loads(KEYS.read_text()) if KEYS.exists() else {}
    if sys.argv[1:] == ["--table"]:  # anew from the file of logits
        save(records, {name: summary(record) for name, record in records.items()})
        return
    if sys.argv[1:2] == ["--pairs"]:
        for model_type in sys.argv[3:] or [name for name, record in table.items() if record["agrees"]]:
            sweep_pairs(model_type, int(sys.argv[2]))
        return
    for model_type in sys.argv[1:] or model_types():
        records[model_type] = record = sweep(model_type)
        table[model_type] = summary(record)
        differing = [case["change"] for case in record["cases"] if case.get("difference", 0) > TOLERANCE]
        print(
            model_type,
            len(record["cases"]),
            "cases;",
            record.get("why", ""),
            "differ:",
            json.dumps(differing)[:600],
            flush=True,
        )
        save(records, table)


def save(records: dict, table: dict) -> None:
    lines = [
        f"{json.dumps(name)}:{json.dumps(record, separators=(',', ':'))}" for name, record in sorted(records.items())
    ]
    FILE.write_text("{" + ",\n".join(lines) + "}\n")
    KEYS.write_text(json.dumps({k: v for k, v in sorted(table.items()) if v}, indent=1) + "\n")


if __name__ == "__main__":
    main()
