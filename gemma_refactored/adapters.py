"""LoRA adapters, as mlx-lm and PEFT write them: what they change, added to a model's weights once, at load.

    W + scale B A         (Hu et al. 2021, arXiv 2106.09685)
    m (W + scale B A) / |W + scale B A|, by rows         (DoRA, Liu et al. 2024, arXiv 2402.09353)

computed in float32. Whatever an adapter's config asks for is done or refused, nothing is left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model

from .checkpoint_files import ADAPTER_CONFIG as CONFIG
from .checkpoint_files import ADAPTER_MLX_LM as OF_MLX_LM
from .checkpoint_files import ADAPTER_PEFT as OF_PEFT
from .checkpoint_files import BESIDE_ADAPTER, locate_adapter, read_checkpoint_json, tensor_names
from .checks import find_embedding
from .errors import UserError, shown
from .files import is_file, is_folder

# What stands before a module's name: each library wraps the decoder in its own way.
CONTAINERS = ("base_model", "model", "language_model", "text_model", "transformer", "backbone", "gpt_neox", "decoder")
EMPTY: tuple = (None, False, {}, [], "", "none")
# Keys of PEFT's config that are read here, or change no number of a finished adapter.
PEFT_KEYS = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern",
    "modules_to_save", "fan_in_fan_out", "use_dora", "bias", "init_lora_weights", "layers_to_transform",
    "layers_pattern", "lora_dropout", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "auto_mapping", "megatron_core", "peft_version", "runtime_config", "eva_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# The others (PiSSA, OLoRA, LoftQ, ..) also change the weights of the model that the adapter is added to.
PEFT_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
SCALED_AT_LOAD = ("falcon_h1",)  # mlx-lm multiplies this layout's weights; a change would have to be multiplied too


@dataclass(frozen=True)
class Change:
    """What an adapter does to one module.

    Attributes:
        a, b: [.., rank, in] and [.., out, rank]; of an embedding, in are its rows. None: no low-rank change.
        magnitude: the norm that each row of the sum gets (DoRA); None: as it comes.
        values: parameters that take the place of the model's, by name.
    """

    a: mx.array | None = None
    b: mx.array | None = None
    scale: float = 1.0
    magnitude: mx.array | None = None
    values: Mapping[str, mx.array] = field(default_factory=dict)

    def added(self) -> mx.array | None:
        """[.., out, in] scale * B A, float32."""
        return None if self.a is None or self.b is None else self.scale * self.b @ self.a


@dataclass(frozen=True)
class Adapter:
    """An adapter that has been read.

    Attributes:
        label: the last part of its name.
        digest: hash of its tensors and its config.
        changes: by the module's name, without CONTAINERS.
        last_layers: how many of the last blocks it changes, the same modules in each (0: all); None: not said.
        targets: ends of the names of all modules that it changes; None: not said.
        trained_on: the model that its config names.
    """

    folder: Path
    kind: str
    digest: str
    changes: dict[str, Change]
    last_layers: int | None = None
    targets: tuple[str, ...] | None = None
    trained_on: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """How it is called behind a model's name: edited, it is another one."""
        return f"adapter {self.label} {self.digest[:6]}"

    def describe(self) -> str:
        ranks = sorted({change.a.shape[-2] for change in self.changes.values() if change.a is not None})
        rank = f" of rank {'/'.join(map(str, ranks))}" if ranks else ""
        trained = f", trained on {self.trained_on}" if self.trained_on else ""
        return f"{self.folder} ({self.kind}{rank}, {len(self.changes)} modules{trained})"

    def notes(self, base: Path) -> list[str]:
        """What to know before its numbers are believed, in sentences.

        Args:
            base: folder of the model that it is added to.
        """
        notes = []
        if not any(
            change.values or (change.b is not None and mx.any(change.b).item()) for change in self.changes.values()
        ):
            notes.append(f"The adapter {self.folder} adds zeros only, as before any training.")
        for name in BESIDE_ADAPTER:
            mine, theirs = self.folder / name, base / name
            if mine.exists() and not (theirs.exists() and theirs.read_bytes() == mine.read_bytes()):
                notes.append(f"The {name} beside the adapter is not the model's; the model's is used.")
        return notes

    def facts(self, base_revision: str) -> dict:
        """For a manifest: what was added to which weights."""
        return {"sha256": self.digest, "kind": self.kind, "trained_on": self.trained_on, "base_revision": base_revision}


def revision_with(adapter: Adapter, base_revision: str) -> str:
    """What identifies the weights with the adapter added."""
    return f"sha256:{hashlib.sha256(f'{base_revision} {adapter.digest}'.encode()).hexdigest()}"


def weight_changes(adapter: Adapter) -> dict[str, mx.array]:
    """Module -> scale * B A [out, in] (embedding: [width, rows]): what training changed, before DoRA's norms."""
    added = {name: change.added() for name, change in adapter.changes.items()}
    return {name: change for name, change in added.items() if change is not None}


# Reading


def read_adapter(name: str | Path) -> Adapter:
    """An adapter from its folder, or a Hugging Face id.

    Raises:
        UserError: no such folder, missing or damaged files, a kind of adapter or a key of its config that is not known
            here.
    """
    folder = locate_adapter(name)
    if not is_file(folder / CONFIG, "adapter's config"):
        raise UserError(f"{folder} has no {CONFIG}, so it is not an adapter of mlx-lm or PEFT.")
    config = read_checkpoint_json(folder / CONFIG)
    is_peft = "peft_type" in config
    if not is_peft and not {"fine_tune_type", "lora_parameters"} & set(config):
        raise UserError(f"{folder / CONFIG} has neither PEFT's peft_type nor mlx-lm's fine_tune_type.")
    path = folder / (OF_PEFT if is_peft else OF_MLX_LM)
    tensors = _read_tensors(path)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    read = _read_peft if is_peft else _read_mlx_lm
    is_local = is_folder(name, "adapter")
    label = folder.resolve().name if is_local else str(name).rpartition("/")[2]
    return replace(read(folder, config, tensors), digest=digest.hexdigest(), label=label)


def _read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a file, float32."""
    if not is_file(path, "adapter"):
        if pickled := sorted(file.name for file in path.parent.glob("*.bin")):
            raise UserError(
                f"{path.parent} has {pickled[0]} and no {path.name}; pickled files are not read, since reading one can "
                "run code. Save the adapter again with PEFT's save_pretrained(.., safe_serialization=True)."
            )
        raise UserError(f"{path.parent} has no {path.name}.")
    if not tensor_names(path):
        raise UserError(f"{path} holds no tensors; train the adapter again, or download it again.")
    tensors = dict(mx.load(str(path)).items())  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise UserError(f"{path}: {name} holds {tensor.dtype}, not floating point numbers.")
        tensors[name] = tensor.astype(mx.float32)
    for name, tensor in tensors.items():
        if not mx.isfinite(tensor).all().item():
            raise UserError(f"{path}: {name} holds NaN or infinite values; train the adapter again.")
    return tensors


def _core(name: str) -> str:
    """A module's name without what contains it: "base_model.model.model.layers.0.mlp" -> "layers.0.mlp"."""
    parts = name.split(".")
    while parts and parts[0] in CONTAINERS:
        parts = parts[1:]
    return ".".join(parts)


def _whole_number(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where} must be a whole number, not {shown(value)}.")
    return value


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{where} must be a number, not {shown(value)}.")
    return float(value)


def _low_rank(path: Path, name: str, a: mx.array | None, b: mx.array | None, rank: int, scale: float) -> Change:
    """A change from the two factors [.., rank, in] and [.., out, rank] of a module."""
    if a is None or b is None:
        raise UserError(f"{path} has only one of the two factors of {name}; download it again.")
    if a.ndim != b.ndim or a.ndim < 2 or not a.shape[-2] == b.shape[-1] == rank:
        raise UserError(
            f"{path}: the factors of {name} are {list(b.shape)} and {list(a.shape)}, which is not the rank {rank} that "
            f"{CONFIG} says; the two files do not belong together."
        )
    return Change(a, b, scale)


def _read_mlx_lm(folder: Path, config: dict, tensors: dict[str, mx.array]) -> Adapter:
    """`mlx_lm.tuner.utils.load_adapters` and the modules of mlx_lm.tuner.lora and dora are the definition."""
    path, where = folder / OF_MLX_LM, folder / CONFIG
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise UserError(f"{where}: fine_tune_type {shown(kind)} is not known here; lora, dora and full are.")
    last = max(_whole_number(config.get("num_layers"), f"{where}: num_layers"), 0)
    trained_on = config.get("model")
    adapter = Adapter(
        folder, {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tune"}[kind], "", {}, last,
        trained_on=trained_on if isinstance(trained_on, str) else None,
    )  # fmt: skip
    parts = _by_module(tensors)
    if kind == "full":
        return replace(adapter, changes={module: Change(values=values) for module, values in parts.items()})
    about = config.get("lora_parameters")
    if not isinstance(about, dict):
        raise UserError(f"{where} has no lora_parameters with rank and scale.")
    if unknown := [key for key in about if key not in ("rank", "scale", "dropout", "keys")]:
        raise UserError(f"{where}: lora_parameters has {unknown[0]}, which is not known here.")
    rank = _whole_number(about.get("rank"), f"{where}: rank")
    scale = _number(about.get("scale"), f"{where}: scale")
    changes = {}
    for module, values in parts.items():
        expected = {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}
        if unknown := sorted(values.keys() - expected):
            raise UserError(f"{path} has {module}.{unknown[0]}, which a {adapter.kind} adapter of mlx-lm has not.")
        a, b = values.get("lora_a"), values.get("lora_b")
        if a is not None and a.ndim == 2:  # of experts, side by side, both are kept as they are multiplied
            a, b = a.T, b if b is None else b.T
        change = _low_rank(path, module, a, b, rank, scale)
        if kind == "dora" and "m" not in values:
            raise UserError(f"{path} has no magnitudes for {module}, and {CONFIG} says dora.")
        changes[module] = replace(change, magnitude=values.get("m"))
    keys = about.get("keys")
    if isinstance(keys, list) and any(re.search(r"\.\d+\.", str(key)) for key in keys):
        adapter = replace(adapter, last_layers=None)  # modules named one by one
    return replace(adapter, changes=changes)


def _by_module(tensors: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    parts: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        _put(parts, _core(module), key, tensor)
    return parts


def _put(parts: dict[str, dict[str, mx.array]], module: str, key: str, tensor: mx.array) -> None:
    if key in parts.setdefault(module, {}):
        raise UserError(f"The adapter has two tensors for {key} of {module}; it was put together from several.")
    parts[module][key] = tensor


def _read_peft(folder: Path, config: dict, tensors: dict[str, mx.array]) -> Adapter:
    """PEFT's LoraConfig and what `save_pretrained` writes are the definition."""
    path, where = folder / OF_PEFT, folder / CONFIG
    _check_peft(where, config)
    is_dora = bool(config.get("use_dora"))
    parts: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        module, key = _peft_name(name)
        if key not in ("a", "b", "magnitude", "weight", "bias"):
            raise UserError(f"{path} has {name}, which is not known here.")
        if is_dora and "lora_embedding" in name:
            raise UserError(f"{where}: DoRA of an embedding ({module}) is not supported.")
        _put(parts, module, key, tensor)
    changes = {}
    for module, found in parts.items():
        values = {key: value for key, value in found.items() if key in ("weight", "bias")}
        change = Change(values=values)
        if found.keys() - values.keys():
            rank = _whole_number(_of_pattern(config, "rank_pattern", module, config.get("r")), f"{where}: r")
            alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
            scale = _number(alpha, f"{where}: lora_alpha") / max(rank**0.5 if config.get("use_rslora") else rank, 1)
            change = replace(_low_rank(path, module, found.get("a"), found.get("b"), rank, scale), values=values)
            if is_dora != ("magnitude" in found):
                state = "has no magnitudes for" if is_dora else "has magnitudes for"
                raise UserError(f"{path} {state} {module}, and {CONFIG} says use_dora = {is_dora}.")
            change = replace(change, magnitude=found.get("magnitude"))
        changes[module] = change
    targets = config.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    leaves_out = any(config.get(key) not in EMPTY for key in ("layers_to_transform", "exclude_modules"))
    trained_on = config.get("base_model_name_or_path")
    return Adapter(
        folder,
        "PEFT DoRA" if is_dora else "PEFT LoRA",
        "",
        changes,
        targets=tuple(map(_core, targets)) if is_list and not leaves_out else None,
        trained_on=trained_on if isinstance(trained_on, str) and trained_on else None,
    )


def _check_peft(where: Path, config: dict) -> None:
    if config["peft_type"] != "LORA":
        raise UserError(f"{where}: adapters of the type {shown(config['peft_type'])} are not supported; LORA is.")
    start = config.get("init_lora_weights", True)
    if start not in PEFT_STARTS:
        raise UserError(
            f"{where}: init_lora_weights {shown(start)} also changes the model's own weights; convert the adapter to a "
            "plain one (PEFT's save_pretrained(.., path_initial_model_for_weight_conversion=..))."
        )
    if unknown := [key for key, value in config.items() if key not in PEFT_KEYS and value not in EMPTY]:
        raise UserError(f"{where}: {unknown[0]} = {shown(config[unknown[0]])} is not supported.")


def _peft_name(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and which of its parts it is."""
    keys = {
        ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b",
        ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    }  # fmt: skip
    for ending, key in keys.items():
        if name.endswith(ending):
            return _core(name.removesuffix(ending)), key
    module, _, key = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".").rpartition(".")
    return _core(module), name if "lora_" in name else key


def _of_pattern(config: dict, key: str, module: str, otherwise: Any) -> Any:
    """A module's own value, of the first pattern that is the end of its name, as PEFT matches them."""
    name, patterns = f"model.{module}", config.get(key) or {}
    try:
        return next((value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", name)), otherwise)
    except (re.error, AttributeError):
        raise UserError(f"{CONFIG}: {key} must have patterns of names, not {shown(patterns)}.") from None


# Adding


def fuse(model: nn.Module, adapter: Adapter, model_type: str, dtype: mx.Dtype) -> nn.Module:
    """Add an adapter to a model's weights, in place; quantised ones that it changes are expanded.

    Args:
        dtype: what the sum, made in float32, is kept in.
    Raises:
        UserError: the adapter was trained on another model.
    """
    modules = {_core(path): (path, module) for path, module in model.named_modules()}
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
    if adapter.targets is not None:
        endings = tuple(f".{target}" for target in adapter.targets)
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
