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
from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model

from .adapter_files import Adapter, core_name
from .checks import find_embedding
from .errors import UserError

SCALED_AT_LOAD = ("falcon_h1",)  # mlx-lm multiplies this layout's weights; a change would have to be multiplied too


def fuse(model: nn.Module, adapter: Adapter, model_type: str, dtype: mx.Dtype) -> nn.Module:
    """Add an adapter to a model's weights, in place; quantised ones that it changes are expanded.

    Args:
        dtype: what the sum, made in float32, is kept in.
    Raises:
        UserError: the adapter was trained on another model.
    """
    modules = {core_name(path): (path, module) for path, module in model.named_modules()}
    paths = {id(module): name for name, (_, module) in modules.items()}
    blocks = [paths[id(block)] for block in model.layers]
    changes = {_name_here(name, modules, blocks): change for name, change in adapter.changes.items()}
    adapter = replace(adapter, changes=changes)
    _check_fits(modules, blocks, adapter)
    if adapter.kind.startswith("PEFT"):
        _check_peft_fits(model, modules, adapter, model_type)
    expanded = []
    for name, change in changes.items():
        path, module = modules[name]
        if hasattr(module, "bits"):
            module = _expanded(module)
            expanded.append((path, module))
        for key, value in change.values.items():
            _check_shape(adapter, f"{name}.{key}", value, module.get(key))
            module[key] = value.astype(dtype)
        if (added := change.added()) is not None:
            added = added.T if isinstance(module, nn.Embedding) else added
            _check_shape(adapter, f"{name}.weight", added, module.get("weight"))
            weight = module["weight"].astype(mx.float32) + added
            if (norms := change.magnitude) is not None:
                _check_shape(adapter, f"{name}'s magnitudes", norms, weight[:, 0])
                weight = weight * (norms / mx.linalg.norm(weight, axis=-1))[:, None]
            module["weight"] = weight.astype(dtype)
    for _, module in expanded:
        module.set_dtype(dtype)
    return model.update_modules(tree_unflatten(expanded))


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


def _other_model(adapter: Adapter, what: str) -> UserError:
    trained = f" (its config says {adapter.trained_on})" if adapter.trained_on else ""
    return UserError(f"The adapter {adapter.folder} {what}: it was trained on another model{trained}. Name that one.")


def _name_here(name: str, modules: Mapping[str, object], blocks: Sequence[str]) -> str:
    """A module's name, with the model's own for the list of blocks: mlx-lm has "h.0" for GPT-NeoX's "layers.0"."""
    parts = re.fullmatch(r"\w+\.(\d+)\.(.+)", name)
    if name in modules or not parts or int(parts[1]) >= len(blocks):
        return name
    return f"{blocks[int(parts[1])]}.{parts[2]}"


def _check_fits(modules: Mapping[str, tuple[str, nn.Module]], blocks: Sequence[str], adapter: Adapter) -> None:
    """Raise UserError unless all that is to be changed is there, and all that is there of its kind is to be changed."""
    changed = set(adapter.changes)
    if missing := sorted(changed - modules.keys()):
        raise _other_model(adapter, f"changes {missing[0]}, and this model of {len(blocks)} layers has no such module")
    if adapter.last_layers is not None:
        last = blocks[-adapter.last_layers :]
        parts = {name.removeprefix(f"{block}.") for block in blocks for name in changed if name.startswith(f"{block}.")}
        expected = {f"{block}.{part}" for block in last for part in parts} & modules.keys()
        inside = {name for name in changed if name.startswith(tuple(f"{block}." for block in blocks))}
        if different := sorted(expected ^ inside):
            verb = "leaves out" if different[0] in expected else "changes"
            what = f"num_layers = {adapter.last_layers}" if adapter.last_layers else "all layers"
            raise _other_model(adapter, f"{verb} {different[0]}, though it is for {what} of this model's {len(blocks)}")
    if endings := tuple(f".{target}" for target in adapter.targets):
        tables = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
        same = {name for name, (_, m) in modules.items() if isinstance(m, tables) and f".{name}".endswith(endings)}
        if left := sorted(same - changed):
            raise _other_model(adapter, f"leaves out {left[0]}, which its target_modules name")


def _check_peft_fits(
    model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], adapter: Adapter, model_type: str
) -> None:
    """PEFT changes transformers' weights: what mlx-lm does to those while it reads them is not done to a change."""
    if model_type in SCALED_AT_LOAD:
        raise UserError(f"Adapters of PEFT are not supported for {model_type}, whose weights are scaled at load.")
    embedding = find_embedding(model)
    rows = embedding.weight.shape[0]
    outside = [m for _, m in modules.values() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
    is_tied = not any(linear.weight.shape[0] == rows for linear in outside)
    for name, change in adapter.changes.items():
        module = modules[name][1]
        if module is embedding and is_tied:
            raise UserError(
                f"The adapter {adapter.folder} changes the embedding of a model whose unembedding is the same matrix, "
                "which PEFT changes in one place or in both; merge the adapter with PEFT (merge_and_unload) and name "
                "the merged model."
            )
        is_whole_matrix = "weight" in change.values
        if is_whole_matrix and not (module is embedding or module.get("weight", embedding.weight).shape[0] == rows):
            raise UserError(
                f"The adapter {adapter.folder} has its own {name} (modules_to_save), which is supported for embedding "
                "and unembedding only; merge it with PEFT (merge_and_unload) and name the merged model."
            )
