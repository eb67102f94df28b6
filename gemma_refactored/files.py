"""Files that are either whole or not there, and what they are called."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from .errors import UserError, shown

# The names inside a folder of activations, for the runtime that writes it and the science that reads it.
MANIFEST, PROMPT_MARKER, BATCH_MARKER = "manifest.json", "prompt.json", "batch.json"
CERTIFICATE = "certificate.json"  # what `run_model.py --check` found, beside the manifest
PROMPT_EMBEDDING = "prompt_embedding.npz"  # mean token embedding of the prompt: the lexical baseline
TEMPORARY = ".tmp"  # the ending of a file that is being written


def step_file(step_name: str) -> str:
    """File of one forward pass: "prefill", or the number of the generated token it read."""
    return f"activations_step_{step_name}.npz"


def write_atomically(path: Path, data: bytes | bytearray) -> None:
    """Write to a temporary name in the same folder, made if need be, then rename: no reader sees half a file.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    # Not named by the process id: another machine's process may have the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        try:
            temporary.write_bytes(data)
        except FileNotFoundError:  # asking first would cost as much as writing
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} could not be written: {error.strerror}. Free some space or choose another folder, "
        "then run the same command again: it continues where it stopped."
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder meanwhile; the lock is gone with the process, however that ends.

    Raises:
        UserError: another run is in there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another run is writing into {folder}; wait for it, or choose another folder.") from None
        yield
    finally:
        os.close(descriptor)


def displayed(path: str | Path) -> str:
    """A path in a message: relative where it lies below the current directory."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def write_json(path: Path, content) -> None:
    """Indented UTF-8 JSON; refuses NaN and infinity, which JSON does not have."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def write_safetensors(path: Path, arrays: dict, metadata: dict[str, str] | None = None) -> None:
    """MLX arrays in one file, which appears whole or not at all."""
    import mlx.core as mx

    path.parent.mkdir(parents=True, exist_ok=True)
    # MLX writes by name, and insists on this ending.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.safetensors")
    mx.save_safetensors(str(temporary), arrays, metadata)
    temporary.replace(path)


def read_json(path: Path, what: str):
    """The content of a JSON file; `what` names it in the error ("prompts file").

    Raises:
        UserError: missing, not UTF-8 or not JSON, or a name occurs twice in an object.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise UserError(f"The {what} {path} does not exist.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"The {what} {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # encoding, syntax, or a duplicate
        raise UserError(f"The {what} {path} is not valid JSON: {error}.") from None


def _without_duplicates(items: list[tuple[str, object]]) -> dict:
    """Of two values with one name JSON would keep the last, and a group of prompts would be gone unnoticed."""
    content = dict(items)
    if len(content) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shown(twice)} occurs twice in one object")
    return content


def jsonable(value):
    """Plain Python values; NaN and infinity become null, which JSON can say."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
