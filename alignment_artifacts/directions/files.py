"""Directions on disk: `directions.safetensors`, or a GGUF control vector as llama.cpp and repeng use it."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from alignment_artifacts.directions.estimate import Directions
from gemma_refactored.errors import UserError, shown
from gemma_refactored.files import cannot_write, is_file, read_safetensors, write_atomically, write_safetensors

PARTS = ("direction", "natural_mean", "artifact_mean", "components", "spread", "natural_tokens")


def save_directions(directions: Directions, path: str | Path) -> None:
    """Write `directions.safetensors`; the facts are its metadata."""
    arrays = {name: mx.array(getattr(directions, name)) for name in PARTS if getattr(directions, name) is not None}
    write_safetensors(Path(path), arrays, {"facts": json.dumps(directions.facts)})


def load_directions(path: str | Path) -> Directions:
    """Read a file of `save_directions`, or a GGUF control vector.

    Raises:
        UserError: missing, damaged, or not a file of directions.
    """
    path = Path(path)
    if not is_file(path, "directions file"):
        raise UserError(f"There is no directions file {path}.")
    if path.suffix == ".gguf":
        return read_gguf(path)
    try:
        arrays, metadata = read_safetensors(path)
        parts = {name: np.array(value) for name, value in arrays.items()}
        directions = Directions(json.loads(metadata["facts"]), **parts)
        directions.facts["site"], directions.facts["positions"]
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of directions ({str(error).splitlines()[0]}).") from None
    if problem := _problem(directions):
        raise UserError(f"{path} cannot be used: {problem}.")
    return directions


def _problem(directions: Directions) -> str | None:
    """What is wrong with the facts or arrays of a file, if anything is."""
    ends = directions.facts.get("ends")
    if ends is not None and not (
        isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, str) for end in ends)
    ):
        return f"its ends must be two texts, what its directions point from and to, not {shown(ends)}"
    if directions.direction.ndim != 2:
        return f"its direction has the shape {directions.direction.shape}, not [layers, hidden]"
    layers, hidden = directions.direction.shape
    shapes = {
        "direction": (layers, hidden), "natural_mean": (layers, hidden), "artifact_mean": (layers, hidden),
        "components": (layers, None, hidden), "spread": (layers,), "natural_tokens": (layers, None),
    }  # fmt: skip
    for name, expected in shapes.items():
        array = getattr(directions, name)
        if array is None:
            continue
        if len(array.shape) != len(expected) or any(
            e not in (None, s) for s, e in zip(array.shape, expected, strict=True)
        ):
            return f"{name} has the shape {array.shape}, which does not fit {layers} layers of width {hidden}"
        if not np.isfinite(array).all():
            return f"{name} holds NaN or infinite values"
    return None


def write_gguf(directions: Directions, path: str | Path) -> None:
    """Export residual-stream directions as a control vector (llama.cpp, repeng).

    Tensor `direction.N` belongs to the residual stream after block N, blocks counted from 0, in both
    programs; llama.cpp has none for block 0, so that one is omitted. Adding the vector amplifies.

    Raises:
        UserError: MLP directions (neither program can apply them), or no file can be written there.
    """
    if directions.facts["site"] != "residual":
        raise UserError("A GGUF control vector acts on the residual stream; export directions of the site residual.")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "control_vector.gguf"
            _write_gguf(directions, file)
            content = file.read_bytes()
    except OSError as error:
        raise cannot_write(Path(path), error) from error
    write_atomically(Path(path), content)


def _write_gguf(directions: Directions, file: Path) -> None:
    import gguf

    layers = [layer for layer in directions.available if layer > 0]
    writer = gguf.GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", directions.facts.get("model_type", "unknown"))
    writer.add_uint32("controlvector.layer_count", len(layers))
    # For ourselves; other programs ignore it.
    writer.add_string("alignment_artifacts.facts", json.dumps(directions.facts))
    for layer in layers:
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(directions.direction[layer]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        read_gguf(file)
    except UserError:  # NumPy, which writes the tensors, does not tell when the disk is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def read_gguf(path: str | Path) -> Directions:
    """Import a control vector: residual-stream directions without further statistics.

    Raises:
        UserError: not a control vector.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{path} is not a GGUF file ({error}).") from None

    def text(name: str) -> str | None:
        field = reader.get_field(name)
        return bytes(field.parts[-1]).decode() if field else None

    if text("general.architecture") != "controlvector":
        raise UserError(f"{path} is a GGUF file of {text('general.architecture')!r}, not a control vector.")
    tensors = {t.name.removeprefix("direction."): t for t in reader.tensors if t.name.startswith("direction.")}
    if not tensors or not all(name.isdecimal() for name in tensors):
        raise UserError(f"{path} holds no direction.N with N the number of a layer; its tensors are {_names(reader)}.")
    vectors = {}
    for name, tensor in tensors.items():
        vector = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).squeeze()
        if vector.ndim != 1 or not np.isfinite(vector).all():
            what = "not a vector" if vector.ndim != 1 else "NaN or infinite"
            raise UserError(f"{path} cannot be used: direction.{name} is {what}.")
        vectors[int(name)] = vector
    widths = sorted({len(vector) for vector in vectors.values()})
    if len(widths) > 1:
        raise UserError(f"{path} cannot be used: its directions have different widths ({widths[0]} and {widths[-1]}).")
    exported = text("alignment_artifacts.facts")
    facts: dict = (
        json.loads(exported) if exported else {"model_type": text("controlvector.model_hint"), "site": "residual"}
    )
    direction = np.zeros((max(max(vectors) + 1, facts.get("num_layers") or 0), widths[0]), np.float32)
    for layer, vector in vectors.items():
        direction[layer] = vector
    return Directions(facts, direction)


def _names(reader) -> str:
    return ", ".join(tensor.name for tensor in reader.tensors[:4]) or "none"
