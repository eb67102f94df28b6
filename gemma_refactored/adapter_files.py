"""LoRA adapters on disk, as mlx-lm and PEFT write them: which modules they change, and by what.

Whatever an adapter's config asks for is done or refused, nothing is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoint_files import ADAPTER_CONFIG as CONFIG
from .checkpoint_files import ADAPTER_MLX_LM as OF_MLX_LM
from .checkpoint_files import ADAPTER_PEFT as OF_PEFT
from .checkpoint_files import BESIDE_ADAPTER, locate_adapter, read_checkpoint_json, tensor_names
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
LARGEST = 3.4028235e38  # of float32


@dataclass(frozen=True)
class Change:
    """What an adapter does to one module.

    Attributes:
        a, b: [.., rank, in] and [.., out, rank]; of an embedding, in are its rows. None: no low-rank change.
        magnitude: the norm that each row of the sum gets (DoRA); None: as it comes.
        values: parameters that take the place of the model's, by name.
        name: the module's in PEFT's file, which is transformers'.
    """

    a: mx.array | None = None
    b: mx.array | None = None
    scale: float = 1.0
    magnitude: mx.array | None = None
    values: Mapping[str, mx.array] = field(default_factory=dict)
    name: str = ""

    def added(self) -> mx.array | None:
        """[.., out, in] scale * B A, float32."""
        return None if self.a is None or self.b is None else self.scale * self.b @ self.a


@dataclass(frozen=True)
class Adapter:
    """An adapter that has been read.

    Attributes:
        label: the last part of its name.
        digest: hash of its tensors and its config.
        config: as on disk, its keys checked; `adapters.must_change` says what it asks for of a model.
        changes: by the module's name, without CONTAINERS.
        trained_on: the model that its config names.
    """

    folder: Path
    kind: str
    digest: str
    config: dict
    changes: dict[str, Change]
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

    def changed(self) -> set[str]:
        """The modules that it adds to ("layers.0.mlp.up_proj") and parameters that it replaces ("lm_head.weight")."""
        added = {name for name, change in self.changes.items() if change.a is not None}
        return added | {f"{name}.{key}" for name, change in self.changes.items() for key in change.values}

    def notes(self, base: Path, has_effect: bool) -> list[str]:
        """What to know before its numbers are believed, in sentences.

        Args:
            base: folder of the model that it is added to.
            has_effect: whether a weight differs with it, of `adapters.fuse`.
        """
        notes = []
        if not has_effect:
            notes.append(
                f"The adapter {self.folder} adds zeros only, as before any training, or no more than rounding the "
                "weights would."
            )
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
    if not isinstance(name, str | Path):
        raise UserError(f"An adapter is the name of one folder or a Hugging Face id, not {shown(name)}.")
    folder = locate_adapter(name)
    config, path = _config_and_file(folder)
    tensors = _read_tensors(path)
    read = _read_mlx_lm if path.name == OF_MLX_LM else _read_peft
    is_local = is_folder(name, "adapter")
    label = folder.resolve().name if is_local else str(name).rpartition("/")[2]
    return replace(read(folder, config, tensors), digest=_digest(config, path), label=label)


def adapter_hash(name: str | Path) -> str:
    """`Adapter.digest`, without reading the tensors."""
    return _digest(*_config_and_file(locate_adapter(name)))


def _digest(config: dict, path: Path) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _config_and_file(folder: Path) -> tuple[dict, Path]:
    """An adapter's config, and the file that its tensors are in."""
    if not is_file(folder / CONFIG, "adapter's config"):
        raise UserError(f"{folder} has no {CONFIG}, so it is not an adapter of mlx-lm or PEFT.")
    config = read_checkpoint_json(folder / CONFIG)
    is_peft = "peft_type" in config
    if not is_peft and not {"fine_tune_type", "lora_parameters"} & set(config):
        raise UserError(f"{folder / CONFIG} has neither PEFT's peft_type nor mlx-lm's fine_tune_type.")
    path = folder / (OF_PEFT if is_peft else OF_MLX_LM)
    if not is_file(path, "adapter"):
        if pickled := sorted(file.name for file in path.parent.glob("*.bin")):
            raise UserError(
                f"{path.parent} has {pickled[0]} and no {path.name}; pickled files are not read, since reading one can "
                "run code. Save the adapter again with PEFT's save_pretrained(.., safe_serialization=True)."
            )
        raise UserError(f"{path.parent} has no {path.name}.")
    return config, path


def _read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a file, float32."""
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


def core_name(name: str) -> str:
    """A module's name without what contains it: "base_model.model.model.layers.0.mlp" -> "layers.0.mlp"."""
    parts = name.split(".")
    while parts and parts[0] in CONTAINERS:
        parts = parts[1:]
    return ".".join(parts)


def _whole_number(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where} must be a whole number, not {shown(value)}.")
    return value


def _rank(value: Any, where: str) -> int:
    if _whole_number(value, where) < 1:
        raise UserError(f"{where} must be 1 or more, not {shown(value)}.")
    return value


def _number(value: Any, where: str) -> float:
    """Also refused is what float32, in which it is multiplied, makes infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST:
        raise UserError(f"{where} must be a number that float32 can hold, not {shown(value)}.")
    return float(value)


def _names(config: Mapping, key: str, where: str) -> list[str]:
    """A list of names in a config; empty where there is none."""
    names = config.get(key)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{where}: {key} must be a list of names, not {shown(names)}.")
    return names or []


def _low_rank(path: Path, name: str, a: mx.array | None, b: mx.array | None, rank: int) -> Change:
    """A change of scale 1 from the two factors [.., rank, in] and [.., out, rank] of a module."""
    if a is None or b is None:
        raise UserError(f"{path} has only one of the two factors of {name}; download it again.")
    if a.ndim != b.ndim or a.ndim < 2 or not a.shape[-2] == b.shape[-1] == rank:
        raise UserError(
            f"{path}: the factors of {name} are {list(b.shape)} and {list(a.shape)}, which is not the rank "
            f"{shown(rank)} that {CONFIG} says; the two files do not belong together."
        )
    return Change(a, b)


def _read_mlx_lm(folder: Path, config: dict, tensors: dict[str, mx.array]) -> Adapter:
    """`mlx_lm.tuner.utils.load_adapters` and the modules of mlx_lm.tuner.lora and dora are the definition."""
    path, where = folder / OF_MLX_LM, folder / CONFIG
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise UserError(f"{where}: fine_tune_type {shown(kind)} is not known here; lora, dora and full are.")
    _whole_number(config.get("num_layers"), f"{where}: num_layers")
    trained_on = config.get("model")
    adapter = Adapter(
        folder, {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tune"}[kind], "", config, {},
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
    rank = _rank(about.get("rank"), f"{where}: rank")
    scale = _number(about.get("scale"), f"{where}: scale")
    _names(about, "keys", str(where))
    changes = {}
    for module, values in parts.items():
        expected = {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}
        if unknown := sorted(values.keys() - expected):
            raise UserError(f"{path} has {module}.{unknown[0]}, which a {adapter.kind} adapter of mlx-lm has not.")
        a, b = values.get("lora_a"), values.get("lora_b")
        if a is not None and a.ndim == 2:  # of experts, side by side, both are kept as they are multiplied
            a, b = a.T, b if b is None else b.T
        change = _low_rank(path, module, a, b, rank)
        if kind == "dora" and "m" not in values:
            raise UserError(f"{path} has no magnitudes for {module}, and {CONFIG} says dora.")
        changes[module] = replace(change, scale=scale, magnitude=values.get("m"))
    return replace(adapter, changes=changes)


def _by_module(tensors: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    parts: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        _put(parts, core_name(module), key, tensor)
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
        module, key = _peft_name(name.removeprefix("base_model.model."))
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
            rank = _rank(_of_pattern(config, "rank_pattern", module, config.get("r")), f"{where}: r")
            alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
            change = _low_rank(path, module, found.get("a"), found.get("b"), rank)
            scale = _number(alpha, f"{where}: lora_alpha") / (rank**0.5 if config.get("use_rslora") else rank)
            change = replace(change, scale=scale, values=values)
            if is_dora != ("magnitude" in found):
                state = "has no magnitudes for" if is_dora else "has magnitudes for"
                raise UserError(f"{path} {state} {module}, and {CONFIG} says use_dora = {is_dora}.")
            change = replace(change, magnitude=found.get("magnitude"))
        if core_name(module) in changes:
            raise UserError(f"{path} changes {core_name(module)} under two names; it was put together from several.")
        changes[core_name(module)] = replace(change, name=module)
    trained_on = config.get("base_model_name_or_path")
    return Adapter(
        folder,
        "PEFT DoRA" if is_dora else "PEFT LoRA",
        "",
        config,
        changes,
        trained_on=trained_on if isinstance(trained_on, str) and trained_on else None,
    )


def _check_peft(where: Path, config: dict) -> None:
    if config["peft_type"] != "LORA":
        raise UserError(f"{where}: adapters of the type {shown(config['peft_type'])} are not supported; LORA is.")
    start = config.get("init_lora_weights", True)
    if not _is_one_of(start, PEFT_STARTS):
        raise UserError(
            f"{where}: init_lora_weights {shown(start)} also changes the model's own weights; convert the adapter to a "
            "plain one (PEFT's save_pretrained(.., path_initial_model_for_weight_conversion=..))."
        )
    if unknown := [key for key, value in config.items() if key not in PEFT_KEYS and not _is_one_of(value, EMPTY)]:
        raise UserError(f"{where}: {unknown[0]} = {shown(config[unknown[0]])} is not supported.")
    for key in ("use_dora", "use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise UserError(f"{where}: {key} must be true or false, not {shown(config[key])}.")
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise UserError(f"{where}: bias must be none, all or lora_only, not {shown(config['bias'])}.")
    if config.get("target_modules") is None:
        raise UserError(f"{where} has no target_modules; save the adapter again with PEFT, which writes them.")
    _names(config, "modules_to_save", str(where))
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if not isinstance(config.get(key), str):
            _names(config, key, str(where))
    for number in _listed(config.get("layers_to_transform")):
        _whole_number(number, f"{where}: layers_to_transform")
    try:
        is_peft_target(config, "")
    except re.error as error:
        raise UserError(f"{where}: its patterns of names cannot be read ({error}); mend them.") from None


def _is_one_of(value: Any, values: tuple) -> bool:
    """`in`, for which 0 is False and 1 is True."""
    return any(type(value) is type(other) and value == other for other in values)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def is_peft_target(config: Mapping, name: str) -> bool:
    """Does PEFT add to the module that transformers calls so? Its `check_target_module_exists` is the definition."""

    def is_named(names: str | list[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        return any(f".{name}".endswith(f".{end}") for end in names)

    targets, layers = config["target_modules"], _listed(config.get("layers_to_transform"))
    is_saved = any([re.match(rf"(^|.*\.){part}($|\..*)", name) for part in config.get("modules_to_save") or []])
    is_excluded, is_target = is_named(config.get("exclude_modules") or []), is_named(targets)
    named = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in _listed(config.get("layers_pattern"))]
    numbers = [re.match(pattern, name) for pattern in named or [r".*?\.[^.]*\.(\d+)\."]]
    if is_excluded or is_saved or not is_target:
        return False
    if not layers or isinstance(targets, str) or name in targets:
        return True
    return next((int(number[1]) in layers for number in numbers if number), False)


def _peft_name(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and which of its parts it is."""
    keys = {
        ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b",
        ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    }  # fmt: skip
    for ending, key in keys.items():
        if name.endswith(ending):
            return name.removesuffix(ending), key
    module, _, key = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".").rpartition(".")
    return module, name if "lora_" in name else key


def _of_pattern(config: dict, key: str, module: str, otherwise: Any) -> Any:
    """A module's own value, of the first pattern that is the end of its name, as PEFT matches them."""
    patterns = config.get(key) or {}
    try:
        return next((value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", module)), otherwise)
    except (re.error, AttributeError):
        raise UserError(f"{CONFIG}: {key} must have patterns of names, not {shown(patterns)}.") from None
