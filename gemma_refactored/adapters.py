"""LoRA adapters are added to a model's weights once, when it is loaded.

W + scale B A                                   (Hu et al. 2021, arXiv 2106.09685)
m (W + scale B A) / |W + scale B A|, by rows    (DoRA, Liu et al. 2024, arXiv 2402.09353)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model

from .adapter_files import CONFIG, Adapter, Change, core_name, is_peft_target
from .checks import find_embedding
from .errors import UserError

SCALED_AT_LOAD = ("falcon_h1",)  # mlx-lm multiplies this layout's weights; a change would have to be multiplied too
ROUNDING = 1e-6  # of a weight, where DoRA's norms and those of its training differ in the last bit
TABLES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


def fuse(model: nn.Module, adapter: Adapter, model_type: str, dtype: mx.Dtype) -> bool:
    """Add an adapter to a model's weights, in place; quantised ones that it changes are expanded.

    Args:
        dtype: what the sum, made in float32, is kept in.
    Returns:
        Whether that changed a weight by more than rounding.
    Raises:
        UserError: the adapter was trained on another model, its file is not what its config says, or the sum is not
            finite.
    """
    modules = {core_name(path): (path, module) for path, module in model.named_modules()}
    paths = {id(module): name for name, (_, module) in modules.items()}
    blocks = [paths[id(block)] for block in model.layers]
    changes: dict[str, Change] = {}
    for name, change in adapter.changes.items():
        here = _name_here(name, modules, blocks)
        if here in changes:
            raise UserError(f"The adapter {adapter.folder} changes {here} under two names; save one of them alone.")
        changes[here] = change
    adapter = replace(adapter, changes=changes)
    if missing := sorted(changes.keys() - modules.keys()):
        raise _other_model(adapter, f"changes {missing[0]}, and this model of {len(blocks)} layers has no such module")
    if adapter.kind.startswith("PEFT"):
        _check_peft_fits(modules, _ends(model, modules, blocks), adapter, model_type)
    changed, expected = adapter.changed(), must_change(model, modules, blocks, adapter)
    if different := min(expected ^ changed, default=None):
        verb, names = ("leaves out", "names it") if different in expected else ("changes", "does not name it")
        what = f"{verb} {different}, though its {CONFIG} {names} for this model of {len(blocks)} layers"
        raise _other_model(adapter, what, ", or its two files do not belong together")
    expanded = []
    has_effect = False
    for name, change in changes.items():
        path, module = modules[name]
        if hasattr(module, "bits"):
            module = _expanded(module)
            expanded.append((path, module))
        for key, value in change.values.items():
            _check_shape(adapter, f"{name}.{key}", value, module.get(key))
            has_effect |= _put(adapter, name, module, key, value, dtype)
        if (added := change.added()) is not None:
            added = added.T if isinstance(module, nn.Embedding) else added
            _check_shape(adapter, f"{name}.weight", added, module.get("weight"))
            weight = module["weight"].astype(mx.float32) + added
            if (norms := change.magnitude) is not None:
                _check_shape(adapter, f"{name}'s magnitudes", norms, weight[:, 0])
                weight = weight * (norms / mx.linalg.norm(weight, axis=-1))[:, None]
            has_effect |= _put(adapter, name, module, "weight", weight, dtype)
    for _, module in expanded:
        module.set_dtype(dtype)
    model.update_modules(tree_unflatten(expanded))
    return has_effect


def _put(adapter: Adapter, name: str, module: nn.Module, key: str, value: mx.array, dtype: mx.Dtype) -> bool:
    """Replace a parameter; whether it changes by more than rounding."""
    before, after = (x.astype(dtype).astype(mx.float32) for x in (module[key], value))
    if not mx.isfinite(after).all().item():
        raise UserError(
            f"The adapter {adapter.folder} makes {name}.{key} infinite or NaN in {str(dtype).rpartition('.')[2]}; its "
            "scale or its tensors are too large. Train it again, or download it again."
        )
    module[key] = value.astype(dtype)
    return not mx.allclose(after, before, rtol=ROUNDING, atol=0).item()


def _expanded(module: nn.Module) -> nn.Module:
    """A quantised module in float32, as what it stands for."""
    holder = nn.Module()
    holder.inner = module
    holder.set_dtype(mx.float32)  # first, so that a scale times a number is not rounded to 16 bit
    return dequantize_model(holder).inner


def _check_shape(adapter: Adapter, name: str, value: mx.array, weight: mx.array | None) -> None:
    if weight is None:
        raise _other_model(adapter, f"changes {name}, which this model does not have")
    if value.shape != weight.shape:
        raise _other_model(adapter, f"changes {name} as {list(value.shape)}, and this model's is {list(weight.shape)}")


def _other_model(adapter: Adapter, what: str, or_else: str = "") -> UserError:
    trained = f" (its config says {adapter.trained_on})" if adapter.trained_on else ""
    remedy = "Name that model, or save the adapter again." if or_else else "Name that one."
    return UserError(
        f"The adapter {adapter.folder} {what}: it was trained on another model{trained}{or_else}. {remedy}"
    )


def _name_here(name: str, modules: Mapping[str, object], blocks: Sequence[str]) -> str:
    """A module's name, with the model's own for the list of blocks: mlx-lm has "h.0" for GPT-NeoX's "layers.0"."""
    parts = re.fullmatch(r"\w+\.(\d+)\.(.+)", name)
    if name in modules or not parts or int(parts[1]) >= len(blocks):
        return name
    return f"{blocks[int(parts[1])]}.{parts[2]}"


def must_change(
    model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], blocks: Sequence[str], adapter: Adapter
) -> set[str]:
    """What an adapter's config says that it changes of a model, named as in `Adapter.changed`.

    Args:
        modules: name without what contains it -> path and module.
        blocks: names of the blocks.
        adapter: with the names of `modules`.
    """
    if adapter.kind.startswith("PEFT"):
        return _peft_must_change(model, modules, blocks, adapter)
    is_full, changed = adapter.kind.startswith("full"), adapter.changed()
    there = {f"{name}.{key}" for name, (_, module) in modules.items() for key in module} | modules.keys()
    last = blocks[-max(adapter.config["num_layers"], 0) :]
    keys = None if is_full else adapter.config["lora_parameters"].get("keys")
    if keys is not None:
        alone = {_name_here(core_name(key), modules, blocks) for key in keys}
        return ({f"{block}.{key}" for block in last for key in keys} | alone) & there
    # What a block's keys are by default depends on mlx-lm's version: those of the file, the same in each block.
    inside = {name: block for block in blocks for name in changed if name.startswith(f"{block}.")}
    parts = {name.removeprefix(f"{block}.") for name, block in inside.items()}
    expected = {f"{block}.{part}" for block in last for part in parts} & there
    return expected | (changed - inside.keys() if is_full else set())


def _peft_must_change(
    model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], blocks: Sequence[str], adapter: Adapter
) -> set[str]:
    """See `must_change`. PEFT's patterns are of transformers' names, which the adapter's file shows."""
    config, known = adapter.config, {name: change.name for name, change in adapter.changes.items()}
    theirs = _names_in_transformers(modules, blocks, known)
    ends = _ends(model, modules, blocks)
    if str(config["target_modules"]).lower() == "all-linear":
        linear = (nn.Linear, nn.QuantizedLinear)
        targets = {name for name, (_, module) in modules.items() if isinstance(module, linear)} - ends
        config = {**config, "target_modules": [theirs[name] for name in targets]}
    tables = [name for name, (_, module) in modules.items() if isinstance(module, TABLES)]
    expected = {name for name in tables if is_peft_target(config, theirs[name])}
    if config.get("bias") == "lora_only":
        expected |= {f"{name}.bias" for name in expected if "bias" in modules[name][1]}
    if config.get("bias") == "all":
        expected |= {f"{name}.bias" for name, (_, module) in modules.items() if "bias" in module}
    for saved in config.get("modules_to_save") or []:
        of_it = [f"{name}.{key}" for name in modules if theirs[name].endswith(saved)
                 for key in dict(tree_flatten(modules[name][1].parameters()))]  # fmt: skip
        expected |= {name for name in of_it if name.endswith((".weight", ".bias"))} or {f"{saved}.weight"}
    # PEFT writes embeddings of another number of rows, or beside their change, without being asked to.
    return expected | {f"{name}.weight" for name in ends} & adapter.changed()


def _names_in_transformers(
    modules: Mapping[str, tuple[str, nn.Module]], blocks: Sequence[str], known: dict[str, str]
) -> dict[str, str]:
    """Name here -> there, by those that are known; mlx-lm's own where no block is among them."""
    at = next((found[1] for name in known.values() if (found := re.match(r"(.+?)\.\d+\.", name))), None)
    if at is None:
        return {name: path for name, (path, _) in modules.items()} | known
    names, parent, above = {}, modules[blocks[0]][0].removesuffix(blocks[0]), at.removesuffix(at.rpartition(".")[2])
    numbers = {block: number for number, block in enumerate(blocks)}
    for name, (path, _) in modules.items():
        parts = re.fullmatch(r"(\w+\.\d+)\.(.+)", name)
        if parts and parts[1] in numbers:
            names[name] = f"{at}.{numbers[parts[1]]}.{parts[2]}"
        else:
            names[name] = above + name if path.startswith(parent) else name
    return names | known


def _ends(model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], blocks: Sequence[str]) -> set[str]:
    """Names of embedding and unembedding."""
    embedding = find_embedding(model)
    rows = embedding.weight.shape[0]
    inside = tuple(f"{block}." for block in blocks)
    return {
        name
        for name, (_, module) in modules.items()
        if module is embedding
        or (isinstance(module, nn.Linear | nn.QuantizedLinear) and module.weight.shape[0] == rows
            and not name.startswith(inside))
    }  # fmt: skip


def _check_peft_fits(
    modules: Mapping[str, tuple[str, nn.Module]], ends: set[str], adapter: Adapter, model_type: str
) -> None:
    """PEFT changes transformers' weights: what mlx-lm does to those while it reads them is not done to a change."""
    if model_type in SCALED_AT_LOAD:
        raise UserError(f"Adapters of PEFT are not supported for {model_type}, whose weights are scaled at load.")
    for name, change in adapter.changes.items():
        if ends == {name}:
            raise UserError(
                f"The adapter {adapter.folder} changes the embedding of a model whose unembedding is the same matrix, "
                "which PEFT changes in one place or in both; merge the adapter with PEFT (merge_and_unload) and name "
                "the merged model."
            )
        if "weight" in change.values and name not in ends:
            raise UserError(
                f"The adapter {adapter.folder} has its own {name} (modules_to_save), which is supported for embedding "
                "and unembedding only; merge it with PEFT (merge_and_unload) and name the merged model."
            )
