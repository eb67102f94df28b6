"""A folder or a Hugging Face id -> a model one can run, its tokenizer, and what to write in a manifest."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, dequantize_model, load_model

from .cpu_kernels import use_cpu_kernels
from .distributed import shard
from .errors import UserError
from .files import is_anything, is_folder
from .generation import padding_is_harmless
from .linux_cpu import warn_if_slow
from .longrope import correct_longrope
from .model_architecture import Gemma, GemmaConfig

FILES_NEEDED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]
OWN_ARCHITECTURES = ("gemma", "gemma2", "gemma3_text", "gemma3")

log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model with everything needed to run it and to say later which one it was."""

    name: str
    folder: Path
    model: nn.Module
    tokenizer: Any  # a transformers tokenizer
    config: dict
    end_tokens: tuple[int, ...]
    revision: str  # resolved hub commit, or "sha256:..." of the weight files
    num_layers: int
    hidden_size: int
    num_parameters: int
    context_length: int
    dtype: str

    @property
    def is_own(self) -> bool:
        """True for our own decoder, false for an architecture of mlx-lm."""
        return isinstance(self.model, Gemma)

    @cached_property
    def masks_padding(self) -> bool:
        """Does a left-padded row get the numbers of the same row alone?

        Our own decoder sees to it (and the tests to that); of others we make sure, once.
        """
        return self.is_own or padding_is_harmless(self.model)

    def facts(self) -> dict:
        """What identifies the model in a manifest."""
        return {
            "model": self.name,
            "model_revision": self.revision,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_parameters": self.num_parameters,
            "weights_dtype": self.dtype,
        }


def display_name(name: str | Path) -> str:
    """How a run calls the model: hub ids as they are, local folders by their last parts."""
    if not is_folder(name, "model folder"):
        return str(name)
    path = Path(name).resolve()
    return f"{path.parent.name}/{path.name}"


def load(
    name: str | Path, keep_precision: bool = False, split: bool = False, revision: str | None = None
) -> LoadedModel:
    """Load a model for inference.

    Args:
        name: a local folder (no network is used) or a Hugging Face id.
        keep_precision: run 16-bit and quantised weights as they are. By default they are
            expanded to float32 on a Linux CPU, where MLX's kernels for them are 10 to 30
            times slower; elsewhere they are always kept.
        split: this process holds its part of the model only, see `distributed.shard`.
        revision: a commit of a model on Hugging Face; default the newest.
    Raises:
        UserError: no such model, missing or damaged files, an unknown architecture, no network,
            a model that cannot be split.
    """
    warn_if_slow()
    folder = locate(name, revision)
    config = _read_config(folder)
    model, config = _load_weights(folder, config)
    if runs_on_linux_cpu() and not keep_precision:
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        if isinstance(model, Gemma):
            use_cpu_kernels(model)
    correct_longrope(model, config)
    num_parameters = count_parameters(model)
    if split:
        shard(model, config["model_type"])
    model.eval()
    mx.eval(model.parameters())
    tokenizer = _load_tokenizer(folder)
    text = config.get("text_config") or config
    weights: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    dtype = str(next(v.dtype for v in weights.values() if mx.issubdtype(v.dtype, mx.floating)))
    return LoadedModel(
        name=display_name(name),
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        config=config,
        end_tokens=_end_tokens(folder, config, tokenizer),
        revision=_revision(folder),
        num_layers=len(model.layers),
        hidden_size=text.get("hidden_size") or find_embedding(model).weight.shape[-1],
        num_parameters=num_parameters,
        context_length=text.get("max_position_embeddings") or 2**31,
        dtype=dtype.removeprefix("mlx.core."),
    )


def float32_weights(loaded: LoadedModel) -> dict[str, mx.array]:
    """What the weights on disk stand for: loaded anew, expanded, by name."""
    model = dequantize_model(_load_weights(loaded.folder, _read_config(loaded.folder))[0])
    model.set_dtype(mx.float32)
    return dict(tree_flatten(model.parameters()))


def runs_on_linux_cpu() -> bool:
    return platform.system() == "Linux" and mx.default_device() == mx.Device(mx.cpu)


def device_description() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return f"GPU ({mx.device_info().get('device_name', 'unknown')})"


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model, downloading it first if `name` is a hub id."""
    folder = Path(name).expanduser()
    if is_folder(folder, "model folder"):
        return folder
    text = str(name)
    if is_anything(folder, "model folder") or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UserError(
            f"There is no model folder {text!r}. Give a folder with config.json and .safetensors files, "
            "or a Hugging Face id such as mlx-community/gemma-3-1b-it-qat-4bit."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=FILES_NEEDED))
    except LocalEntryNotFoundError:
        raise UserError(
            f"The model {text!r} is not on this machine and huggingface.co cannot be reached. "
            "Connect to the network, or give the path of a local model folder."
        ) from None
    except HFValidationError as error:
        raise UserError(f"{text!r} is not a valid Hugging Face id: {error}") from None
    except HfHubHTTPError as error:
        raise UserError(
            f"Hugging Face does not give out {text!r} ({error.response.status_code}). Check the name; for a gated "
            "model accept its licence on the website and run `hf auth login`."
        ) from None


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json, so it is not a model folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the model again.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path} does not say its model_type, so its architecture is unknown.")
    return config


def _load_weights(folder: Path, config: dict) -> tuple[nn.Module, dict]:
    """Our own Gemma where it applies, mlx-lm's architectures for the rest; its loader for both."""

    def classes(config: dict):
        return (Gemma, GemmaConfig) if config["model_type"] in OWN_ARCHITECTURES else _get_classes(config)

    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [shard for shard in shards if not (folder / shard).exists()]:
            raise UserError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(shards)} shards missing).")
    elif not list(folder.glob("model*.safetensors")):
        raise UserError(f"{folder} has no model*.safetensors file; other weight formats are not read.")
    try:
        return load_model(folder, lazy=True, get_model_classes=classes, model_config=_older_rope_names(config))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"{folder} (model type {config['model_type']!r}) cannot be loaded: {reason}. "
            "The files may be incomplete, or the architecture newer than the installed mlx-lm."
        ) from error


def _older_rope_names(config: dict) -> dict:
    """RoPE settings as mlx-lm's architectures read them, from a config that transformers 5 wrote.

    Without this they would fall back to their defaults without a word.
    """
    settings = config.get("rope_parameters")
    if not isinstance(settings, dict) or config["model_type"] in OWN_ARCHITECTURES or "rope_theta" not in settings:
        return {}
    names = {"rope_theta": settings["rope_theta"]}
    if "partial_rotary_factor" in settings:
        names["partial_rotary_factor"] = settings["partial_rotary_factor"]
    rope_type = settings.get("rope_type", "default")
    if rope_type != "default":
        names["rope_scaling"] = {**settings, "type": rope_type}
    return {name: value for name, value in names.items() if name not in config}


def _load_tokenizer(folder: Path):
    # transformers would otherwise tell every user of MLX that PyTorch is missing.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{folder} has no tokenizer that transformers can read: {reason}") from error


def _end_tokens(folder: Path, config: dict, tokenizer) -> tuple[int, ...]:
    """Every token that ends an answer: from the generation config, the config and the chat format."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    ends = set()
    for source in (generation.get("eos_token_id"), config.get("eos_token_id"), tokenizer.eos_token_id):
        ends |= set(source if isinstance(source, list) else [source])
    known = tokenizer.get_vocab()
    ends |= {known.get(token) for token in ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>")}
    return tuple(sorted(ends - {None}))


def _revision(folder: Path) -> str:
    """The hub commit of a downloaded snapshot; else a hash over the weight files."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def count_parameters(model: nn.Module) -> int:
    """Number of weights, counting packed quantised ones by what they stand for."""
    total = 0
    for _, module in model.named_modules():
        for name, value in module.items():
            if not isinstance(value, mx.array) or (name in ("scales", "biases") and hasattr(module, "bits")):
                continue
            packed = hasattr(module, "bits") and name == "weight"
            total += value.size * 32 // module.bits if packed else value.size
    return total


def find_embedding(model: nn.Module) -> nn.Module:
    """The token embedding: the embedding module with most rows (others may hold positions)."""
    found = [
        module
        for path, module in model.named_modules()
        # Gemma 3n and 4 also look up a small second vector of each token for every layer.
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and not path.endswith("_per_layer")
    ]
    if not found:
        raise UserError("This model has no token embedding module.")
    return max(found, key=lambda module: module.weight.shape[0])
