"""Files that are either whole or absent, and their names."""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, shown

if TYPE_CHECKING:
    import mlx.core as mx

# The names inside a folder of activations, for the runtime that writes it and the science that reads it.
MANIFEST, PROMPT_MARKER, BATCH_MARKER = "manifest.json", "prompt.json", "batch.json"
CERTIFICATE = "certificate.json"  # what `run_model.py --check` found, beside the manifest
PROMPT_EMBEDDING = "prompt_embedding.npz"  # mean token embedding of the prompt's text
TEMPORARY = ".tmp"  # the ending of a file that is being written
LOCK = ".lock"  # hidden, in a folder that a run is writing into


def step_file(step_name: str) -> str:
    """File of one forward pass: "prefill", or the number of the generated token it read."""
    return f"activations_step_{step_name}.npz"


def is_folder(path: str | Path, what: str) -> bool:
    """Is there a folder? Here, and in `is_file`, is the one place that looks at paths which people give.

    Args:
        what: names it in the error ("model folder").
    Raises:
        UserError: it cannot be accessed: its name is too long or has a NUL in it, no permission, a circle of links.
    """
    return stat.S_ISDIR(_mode(path, what))


def is_file(path: str | Path, what: str) -> bool:
    """Is there a file? See `is_folder`."""
    return stat.S_ISREG(_mode(path, what))


def is_anything(path: str | Path, what: str) -> bool:
    """Is there a file, a folder or something else? See `is_folder`."""
    return _mode(path, what) != 0


def _mode(path: str | Path, what: str) -> int:
    """0 if nothing is there."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:
        raise UserError(f"The {what} {shown(str(path))} cannot be accessed: {reason(error)}. Name another.") from None


def reason(error: Exception) -> str:
    """The system's description of an error, without the path and the full stop."""
    return (getattr(error, "strerror", None) or str(error)).removesuffix(".")


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
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> UserError:
    name = str(path)
    return UserError(
        f"{name if len(name) < 500 else shown(name)} could not be written: {reason(error)}. Free some space or choose "
        "another folder, then run the same command again: it continues where it stopped."
    )


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder meanwhile; the lock disappears with the process, however that ends.

    Args:
        wait: for another run to finish, instead of being refused.
    Raises:
        UserError: another run is using it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, blocking=wait, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"Another run is writing into {folder}; wait for it, or choose another folder.") from None
    except (OSError, ValueError, NotImplementedError) as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (
                folder / LOCK
            ).unlink()  # while it is held: a waiting process sees that its file is gone, and makes another
        lock.release()


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

    # MLX writes by name, and insists on this ending.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(temporary), arrays, metadata)
        temporary.replace(path)
    except (OSError, ValueError, RuntimeError) as error:  # the last is MLX's, for a file that it cannot open
        with suppress(OSError, ValueError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def read_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """MLX arrays and the metadata of one file.

    Raises:
        RuntimeError, ValueError: MLX's, for a file that it cannot read.
    """
    import mlx.core as mx

    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    return arrays, metadata  # type: ignore[return-value]  # its stub covers every format at once


def read_bytes(path: str | Path, what: str) -> bytes:
    """The content of a file that the user names; `what` describes it in the error.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"The {what} {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"The {what} {shown(str(path))} cannot be read: {reason(error)}.") from None


def decoded(data: bytes, path: str | Path, what: str) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark, or in UTF-16 with one.

    Raises:
        UserError: it is neither.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} {path} is not text in UTF-8: {error}. Save it as UTF-8.") from None


def read_json(path: Path, what: str):
    """The content of a JSON file; `what` names it in the error ("prompts file").

    Raises:
        UserError: missing, not UTF-8 or not JSON, or a name occurs twice in an object.
    """
    return json_content(decoded(read_bytes(path, what), path, what), f"The {what} {path}")


def json_content(text: str, name: str):
    """What a text in JSON says; `name` begins the error.

    Raises:
        UserError: it is not JSON, or a name occurs twice in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # syntax, or a duplicate
        raise UserError(f"{name} is not valid JSON: {error}.") from None


def _without_duplicates(items: list[tuple[str, object]]) -> dict:
    """Of two values with one name JSON would keep the last, and a group of prompts would be gone unnoticed."""
    content = dict(items)
    if len(content) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shown(twice)} occurs twice in one object")
    return content


def jsonable(value):
    """Plain Python values; NaN and infinity become null, which JSON can express."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "dtype"):  # a number of NumPy's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
