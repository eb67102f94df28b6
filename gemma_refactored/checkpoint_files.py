"""The files of a checkpoint: where they are, which of them count, and what they hash to."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from .errors import UserError, shown
from .files import is_anything, is_file, is_folder
from .gguf_files import SUFFIX, WEIGHTS
from .gguf_folder import as_folder

FILES_NEEDED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.tiktoken"]
# What decides how text becomes token ids, besides tokenizer_config.json, which holds the chat template too.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "*.tiktoken",
)  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_MLX_LM, ADAPTER_PEFT = (
    "adapter_config.json",
    "adapters.safetensors",
    "adapter_model.safetensors",
)
BESIDE_ADAPTER = ("tokenizer.json", "chat_template.jinja")  # which make it a model of its own, if they differ
ADAPTER_FILES = [ADAPTER_CONFIG, ADAPTER_MLX_LM, ADAPTER_PEFT, *BESIDE_ADAPTER]
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model, downloading it first if `name` is a hub id, and made for a GGUF file."""
    path, text = Path(os.path.expanduser(name)), str(name)
    if is_folder(path, "model folder"):
        return path
    if path.suffix.lower() == SUFFIX and is_file(path, "model"):
        refuse_lfs_pointer(path)
        return as_folder(path)
    if is_anything(path, "model folder") or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UserError(
            f"There is no model folder or GGUF file {text!r}. Give a folder with config.json and .safetensors files, "
            "a .gguf file, or a Hugging Face id such as mlx-community/gemma-3-1b-it-qat-4bit."
        )
    return _downloaded(text, revision, "model", FILES_NEEDED)


def locate_adapter(name: str | Path) -> Path:
    """The local folder of an adapter, downloading it first if `name` is a hub id."""
    path, text = Path(os.path.expanduser(name)), str(name)
    if text.strip() and is_folder(path, "adapter"):
        return path
    if is_anything(path, "adapter") or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UserError(
            f"There is no adapter folder {text!r}. Give a folder with adapter_config.json and adapters.safetensors "
            "(mlx-lm) or adapter_model.safetensors (PEFT), or a Hugging Face id."
        )
    return _downloaded(text, None, "adapter", ADAPTER_FILES)


def _downloaded(text: str, revision: str | None, what: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=files))
    except LocalEntryNotFoundError:
        raise UserError(
            f"The {what} {text!r} is not on this machine and huggingface.co cannot be reached. "
            f"Connect to the network, or give the path of a local {what} folder."
        ) from None
    except HFValidationError as error:
        raise UserError(f"{text!r} is not a valid Hugging Face id: {error}") from None
    except HfHubHTTPError as error:
        raise UserError(
            f"Hugging Face does not give out {text!r} ({error.response.status_code}). Check the name; for a gated "
            "model accept its licence on the website and run `hf auth login`."
        ) from None


def refuse_lfs_pointer(path: Path) -> None:
    """A clone without Git LFS has a few lines of text in place of each large file."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, "
                "or download the model with `hf download`."
            )


def read_checkpoint_json(path: Path) -> dict:
    """The object in a JSON file of a checkpoint; a byte order mark and trailing commas are read over.

    Raises:
        UserError: not JSON, not an object, or a Git LFS pointer.
    """
    refuse_lfs_pointer(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        try:
            content = json.loads(text)
        except json.JSONDecodeError:  # published files have a comma after their last entry; strings keep theirs
            content = json.loads(re.sub(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', lambda match: match[1] or "", text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the model again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {shown(content)}.")
    return content


def read_config(folder: Path) -> dict:
    """config.json as it is on disk.

    Raises:
        UserError: there is none, or it does not say its architecture.
    """
    path = folder / "config.json"
    if not path.exists():
        inside = next((f"; name its file {one.name} instead" for one in sorted(folder.glob(f"*{SUFFIX}"))), "")
        if (folder / ADAPTER_CONFIG).exists():
            inside = " but an adapter: name it with --adapter, and the model that it was trained on with --model"
        raise UserError(f"{folder} has no config.json, so it is not a model folder{inside}.")
    config = read_checkpoint_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} does not say its model_type, so its architecture is unknown.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: model.safetensors, else what the index names, whatever else lies there.

    In a folder that stands for a GGUF file it is that file.

    Raises:
        UserError: there are none, some are missing or cut short, or the index is not one of .safetensors files.
    """
    if (folder / WEIGHTS).is_symlink():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        refuse_lfs_pointer(folder / INDEX)  # the rest of such a folder is not to be trusted either
    if (folder / SINGLE).exists():
        files = [folder / SINGLE]
    elif (folder / INDEX).exists():
        files = _indexed_files(folder)
    else:
        files = _numbered_files(folder)
    for path in files:
        tensor_names(path)
    return files


def _indexed_files(folder: Path) -> list[Path]:
    path = folder / INDEX
    places = read_checkpoint_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{path} has no weight_map from names to files; download the model again.")
    names = sorted(set(places.values()))
    if foreign := [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]:
        raise UserError(f"{path} names {shown(foreign[0])}; only .safetensors files in the same folder are read.")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UserError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} shards missing).")
    holders: dict[str, str] = {}
    for name in names:
        for tensor in tensor_names(folder / name):
            if tensor in holders:
                raise UserError(f"{folder}: both {holders[tensor]} and {name} hold {tensor}; download the model again.")
            holders[tensor] = name
    if lost := [tensor for tensor, name in places.items() if holders.get(tensor) != name]:
        raise UserError(
            f"{folder}: {places[lost[0]]} does not hold {lost[0]}, as the index says; it is of another model."
        )
    return [folder / name for name in names]


def _numbered_files(folder: Path) -> list[Path]:
    """Shards 1 to n of n without an index say themselves that they are complete."""
    shards = sorted(folder.glob("model-?????-of-?????.safetensors"))
    if shards and len(shards) == int(shards[0].stem[-5:]) and len({path.stem[-5:] for path in shards}) == 1:
        return shards
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    also = f" (there is {others[0]}; if that is all of it, name it {SINGLE})" if others else ""
    raise UserError(f"{folder} has no {SINGLE} and no {INDEX}{also}; other weight formats are not read.")


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a .safetensors file, by its header.

    Raises:
        UserError: not such a file, or shorter than its header says.
    """
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < 2**30 else None
        except ValueError:
            header = None
    size = path.stat().st_size
    if not isinstance(header, dict):
        raise UserError(f"{path} ({size} bytes) is damaged or cut short; download it again.")
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size < end:
        raise UserError(f"{path} is cut short: {size} of {end} bytes; download it again.")
    return list(header)


def weights_revision(folder: Path, files: list[Path]) -> str:
    """The hub commit of a downloaded snapshot; else a hash over the weight files."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def local_revision(path: Path) -> str:
    """`weights_revision` of a model folder, or of a GGUF file, which is not translated to find out."""
    return weights_revision(path, weight_files(path)) if path.is_dir() else weights_revision(Path(), [path])


def content_hashes(folder: Path, chat_template: str | dict | None) -> dict[str, str]:
    """Short hashes of config.json, generation_config.json, the tokenizer's files and the chat template.

    JSON counts by its content, not by its layout; a file that is not there is "none".
    """

    def json_content(name: str, without: str = "") -> bytes:
        path = folder / name
        if not path.exists():
            return b""
        content = {key: value for key, value in read_checkpoint_json(path).items() if key != without}
        return json.dumps(content, sort_keys=True).encode()

    files = sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    contents = {
        "config": json_content("config.json"),
        "generation_config": json_content("generation_config.json"),
        "tokenizer": json_content("tokenizer_config.json", without="chat_template")
        + b"".join(path.name.encode() + path.read_bytes() for path in files),
        "chat_template": json.dumps(chat_template, sort_keys=True).encode() if chat_template else b"",
    }
    return {name: hashlib.sha256(data).hexdigest()[:12] if data else "none" for name, data in contents.items()}
