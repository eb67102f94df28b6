"""A folder, a GGUF file or a Hugging Face id -> a model one can run, its tokenizer, and what to write in a manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model

from .adapter_files import Adapter, read_adapter, revision_with
from .adapters import fuse
from .attention_sinks import REFERENCE, find_sinks, ordinary_norms
from .chat_template import ChatFormat, take_chat
from .checkpoint_files import content_hashes, locate, read_config, weight_files, weights_revision
from .checks import embedding_width, find_embedding, position_rows
from .config_audit import audit, complete, in_mlx_lm_names
from .configuration import Chat
from .cpu_kernels import put_in_place, share_rotations
from .distributed import shard
from .errors import UserError
from .files import is_anything, is_file
from .generation import length_sorted_batches
from .gguf_files import WEIGHTS, read_weights
from .layout_corrections import correct_layout, translated_classes
from .linux_cpu import share_work, warn_if_slow
from .model_architecture import Gemma, GemmaConfig
from .prompt_cache import padding_is_harmless
from .prompt_processing import encode_prompts
from .settings import record
from .thoughts import Marks, answer_start, answer_text, find_marks
from .tokenizer_loading import end_tokens, load_tokenizer

CHAT, ADAPTER = "chat", "adapter"  # in a model's hashes
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
    revision: str  # resolved hub commit, or "sha256:..." of the weight files, or of these with an adapter
    num_layers: int
    hidden_size: int
    num_parameters: int
    context_length: int
    dtype: str
    hashes: dict[str, str]  # of what besides the weights decides the numbers: `checkpoint_files.content_hashes`
    chat_format: ChatFormat = field(default_factory=ChatFormat)  # what is written around each prompt
    adapter: Adapter | None = None  # that was added to the weights
    base_revision: str = ""  # `revision` without the adapter
    _sinks: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict, repr=False)  # of texts, by token ids

    @property
    def is_as_published(self) -> bool:
        """False with an adapter, or where prompts are written in another way than the checkpoint does by itself."""
        return not {CHAT, ADAPTER} & self.hashes.keys()

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

    def batches(self, prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
        """`length_sorted_batches`; of prompts of one length where padding would change the model's numbers."""
        return length_sorted_batches(prompts, size, equal_lengths=size > 1 and not self.masks_padding)

    def encode(self, texts: Sequence[str], chat_mode: bool = True) -> list[list[int]]:
        """Token ids of prompts in the model's chat format, or as plain text: `prompt_processing.encode_prompts`."""
        return encode_prompts(self.tokenizer, texts, chat_mode, self.chat_format)

    @cached_property
    def thought_marks(self) -> Marks | None:
        """What this model writes around a thought before its answer; None if it writes none."""
        return find_marks(self.tokenizer, self.chat_format)

    def thought_tokens(self, written: Sequence[int]) -> int | None:
        """How many of the tokens that this model wrote are a thought before its answer; None if that has not ended."""
        return answer_start(self.tokenizer, self.thought_marks, written)

    def answer_text(self, written: Sequence[int]) -> str | None:
        """The text of an answer, without the thought before it; None if that has not ended."""
        return answer_text(self.tokenizer, self.thought_marks, written)

    @cached_property
    def ordinary_norms(self) -> np.ndarray:
        """[layers] what `attention_sinks` compares tokens with."""
        return ordinary_norms(self.model, encode_prompts(self.tokenizer, [REFERENCE], chat_mode=False)[0])

    def sinks(self, texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Positions of each text's attention sinks, found once per text: `attention_sinks.find_sinks`."""
        missing = list(dict.fromkeys(tuple(text) for text in texts if tuple(text) not in self._sinks))
        self._sinks |= zip(missing, find_sinks(self.model, missing, self.ordinary_norms), strict=True)
        return [self._sinks[tuple(text)] for text in texts]

    def identity(self) -> dict[str, str]:
        """Everything that decides which numbers a text gets, as short hashes: results with another are not mixed."""
        return {"weights": self.revision.removeprefix("sha256:")[:12], **self.hashes, "precision": self.dtype}

    def facts(self) -> dict:
        """What identifies the model in a manifest."""
        return {
            "model": self.name,
            "model_revision": self.revision,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_parameters": self.num_parameters,
            "weights_dtype": self.dtype,
            "identity": self.identity(),
            **({ADAPTER: self.adapter.facts(self.base_revision)} if self.adapter else {}),
        }


def display_name(name: str | Path) -> str:
    """How a run calls the model: hub ids as they are, local folders and files by their last parts."""
    if not is_anything(name, "model folder"):
        return str(name)
    path = Path(name).resolve()
    return f"{path.parent.name}/{path.name}"


def load(
    name: str | Path,
    keep_precision: bool = False,
    split: bool = False,
    revision: str | None = None,
    chat: Chat = Chat(),
    adapter: str | Path | None = None,
) -> LoadedModel:
    """Load a model for inference.

    Args:
        name: a local folder or GGUF file (no network is used), or a Hugging Face id.
        keep_precision: run 16-bit and quantised weights as they are. By default they are
            expanded to float32 on a Linux CPU, where MLX's kernels for them are 10 to 30
            times slower; elsewhere they are always kept.
        split: this process holds its part of the model only, see `distributed.shard`.
        revision: a commit of a model on Hugging Face; default the newest.
        chat: what is written around each prompt.
        adapter: folder or Hugging Face id of a LoRA adapter, of mlx-lm or PEFT, that is added to the weights.
    Raises:
        UserError: no such model, missing or damaged files, an unknown architecture, no network,
            a model that cannot be split, a chat template that does not use what `chat` gives it, an adapter of
            another model.
    """
    warn_if_slow()
    added = read_adapter(adapter) if adapter is not None else None
    folder = locate(name, revision)
    config = read_config(folder)
    completed = complete(config)
    audit(config, completed)
    on_linux_cpu = runs_on_linux_cpu()
    if on_linux_cpu:
        put_in_place()  # before the model's functions are compiled
    model, translated = load_weights(folder, config, completed)
    is_expanded = on_linux_cpu and not keep_precision
    if is_expanded:
        model = expanded(model)
    elif isinstance(model, Gemma) and weights_dtype(model) == "float16":
        # The residual stream of Gemma 3 exceeds the range of float16 (65,504); bfloat16 or float32 hold it.
        log.warning("The weights are float16, which Gemma's residual stream can overflow: running in float32.")
        model.set_dtype(mx.float32)
    if added:
        has_effect = fuse(model, added, config["model_type"], getattr(mx, weights_dtype(model)))
        log.info("Adapter: %s", added.describe())
        for note in added.notes(folder, has_effect):
            log.warning("%s", note)
    if is_expanded and isinstance(model, Gemma):
        share_rotations(model)
    num_parameters = count_parameters(model)
    if on_linux_cpu:
        share_work(num_parameters)
    if split:
        shard(model, config["model_type"])
    model.eval()
    mx.eval(model.parameters())
    tokenizer = load_tokenizer(folder)
    chat_format = take_chat(tokenizer, chat)
    text = completed or translated
    text = text.get("text_config") or text
    chat_hashes = chat_hash(chat)
    base_revision = weights_revision(folder, weight_files(folder))
    kinds = [*([added.name] if added else []), *(f"{CHAT} {value[:6]}" for value in chat_hashes.values())]
    return LoadedModel(
        name=" ".join([display_name(name), *(f"({kind})" for kind in kinds)]),
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        config=translated,
        end_tokens=end_tokens(folder, config, tokenizer),
        revision=revision_with(added, base_revision) if added else base_revision,
        num_layers=len(model.layers),
        hidden_size=text.get("hidden_size") or embedding_width(find_embedding(model)),
        num_parameters=num_parameters,
        context_length=text.get("max_position_embeddings") or position_rows(model) or 2**31,
        dtype=weights_dtype(model),
        hashes=content_hashes(folder, tokenizer.chat_template)
        | ({ADAPTER: added.digest[:12]} if added else {})
        | chat_hashes,
        chat_format=chat_format,
        adapter=added,
        base_revision=base_revision,
    )


def chat_hash(chat: Chat) -> dict[str, str]:
    """A short hash of what is written around prompts, for `LoadedModel.identity`; none where nothing is."""
    if chat.is_default:
        return {}
    # A template from a file counts by its content: it is the tokenizer's by now.
    said = {
        name: value
        for name, value in record(chat).items()
        if not (value and name == "chat_template" and is_file(value, name))
    }
    return {CHAT: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]}


def weights_dtype(model: nn.Module) -> str:
    """ "float32", "float16" or "bfloat16"; of a quantised model, the type of what its numbers are scaled by."""
    weights: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    dtypes = (value.dtype for value in weights.values())
    return str(next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))).removeprefix("mlx.core.")


def float32_weights(loaded: LoadedModel) -> dict[str, mx.array]:
    """What the weights on disk stand for: loaded anew, expanded, with the adapter, by name."""
    config = read_config(loaded.folder)
    model = expanded(load_weights(loaded.folder, config, complete(config))[0])
    if loaded.adapter:
        fuse(model, loaded.adapter, config["model_type"], mx.float32)
    return dict(tree_flatten(model.parameters()))


def expanded(model: nn.Module) -> nn.Module:
    """The model in float32, quantised weights as what they stand for."""
    model.set_dtype(mx.float32)  # first, so that a scale times a number is not rounded to 16 bit
    return dequantize_model(model)


def runs_on_linux_cpu() -> bool:
    return platform.system() == "Linux" and mx.default_device() == mx.Device(mx.cpu)


def device_description() -> str:
    if mx.default_device() == mx.Device(mx.cpu):
        return "CPU"
    return f"GPU ({mx.device_info().get('device_name', 'unknown')})"


def load_weights(folder: Path, config: dict, completed: dict | None) -> tuple[nn.Module, dict]:
    """Our own Gemma where it applies, mlx-lm's architectures for the rest; its loader for both.

    Args:
        config: as on disk; `completed`: see `config_audit.complete`.
    Returns:
        The model, weights not read yet, and its config in the names of mlx-lm.
    Raises:
        UserError: missing or damaged files, an unknown architecture, weights of another layout.
    """
    files = weight_files(folder)
    is_gguf = files[0].name == WEIGHTS

    def classes(config: dict):
        own = config["model_type"] in OWN_ARCHITECTURES
        model_class, settings_class = (Gemma, GemmaConfig) if own else translated_classes(config)
        return (with_gguf_weights(model_class, files[0], config) if is_gguf else model_class), settings_class

    # mlx-lm's loader takes every file that is called model*.safetensors, so it is shown those that count.
    with tempfile.TemporaryDirectory() as view:
        for number, path in enumerate(files):
            shard = Path(view) / f"model-{number}.safetensors"
            if is_gguf:
                mx.save_safetensors(str(shard), {})  # it insists on one
            else:
                shard.symlink_to(path.resolve())
        if (extra := folder / "hf_quant_config.json").exists():
            (Path(view) / extra.name).symlink_to(extra.resolve())
        (Path(view) / "config.json").write_text(json.dumps(in_mlx_lm_names(config, completed)))
        try:
            with redirect_stdout(StringIO()) as printed:  # what mlx-lm prints before it gives up
                model, translated = load_model(Path(view), lazy=True, get_model_classes=classes)
        except SystemExit:
            raise UserError(f"{folder}: mlx-lm needs another package: {printed.getvalue().strip()}.") from None
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError) as error:
            raise UserError(_why_not_loaded(folder, config, error)) from error
    if not isinstance(model, Gemma):
        correct_layout(model, completed)
    try:
        model(mx.array([[0, 0]]))  # computes nothing yet, but shapes that do not fit are found
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(_why_not_loaded(folder, config, error)) from error
    return model, translated


def with_gguf_weights(model_class: type, path: Path, config: dict) -> type:
    """A class of models whose weights come from a GGUF file, whatever else the loader found."""

    def sanitize(self, weights):
        return read_weights(path, dict(tree_flatten(self.parameters())), config)

    return type("Model", (model_class,), {"sanitize": sanitize, "__module__": model_class.__module__})


def _why_not_loaded(folder: Path, config: dict, error: BaseException) -> str:
    reason = " ".join(str(error).split())
    what = f"{folder} (model type {config['model_type']!r}) cannot be loaded"
    version = f"the installed mlx-lm ({importlib.metadata.version('mlx-lm')})"
    if "not supported" in reason and reason.startswith("Model type"):
        return f"{what}: {version} does not have this architecture. The files are complete; another mlx-lm may have it."
    return (
        f"{what}: {shorten(reason, 300)} The files are complete; {version} has this architecture in another layout "
        "than this checkpoint's."
    )


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
