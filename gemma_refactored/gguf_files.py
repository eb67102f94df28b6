"""A GGUF file, as llama.cpp runs it: its metadata, and its weights as the checkpoint had them that it was made from.

`read_weights` undoes what llama.cpp's converter does to weights.

The header is read here, since `mx.load` gives Q4_K and Q6_K in float16 only and refuses a file with one Q5 tensor, and
`gguf.GGUFReader` takes seconds for a vocabulary of 50,000 words.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError, shown

if TYPE_CHECKING:
    import mlx.core as mx

SUFFIX = ".gguf"  # of the files that people name
WEIGHTS = "model.gguf"  # in a folder of `gguf_folder.as_folder`
MAGIC, VERSIONS = b"GGUF", (2, 3)
ROPE_FACTORS = "rope_freqs.weight"  # divides RoPE frequencies (Llama 3.1 and later); no parameter of the model
NUMBERS = "BbHhIif?"  # struct formats of the metadata types 0 to 7; 8: text, 9: array, 10 to 12: "Qqd"
FORMATS = dict(enumerate(NUMBERS)) | {10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file: rows first, as NumPy has it; `kind` is a `gguf.GGMLQuantizationType`."""

    shape: tuple[int, ...]
    kind: Any
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """A file's metadata, its tensors by llama.cpp's names, and its bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    data: mmap.mmap

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def blocks(self, name: str) -> np.ndarray:
        """A tensor's bytes [.., bytes of a row]."""
        tensor = self.tensors[name]
        values = np.frombuffer(self.data, np.uint8, tensor.size, tensor.start)
        return values.reshape(*tensor.shape[:-1], -1)

    def floats(self, name: str) -> np.ndarray:
        """What a tensor stands for, in float32.

        Raises:
            UserError: a kind of quantisation that the gguf package cannot expand.
        """
        from gguf import dequantize

        try:
            return np.asarray(dequantize(self.blocks(name), self.tensors[name].kind), np.float32)
        except NotImplementedError:
            kind = self.tensors[name].kind.name
            raise UserError(f"{self.path}: {name} is of the kind {kind}, which the gguf package cannot read.") from None


@lru_cache(maxsize=4)
def read(path: Path) -> GGUFFile:
    """The header of a file, whose tensors are read when they are asked for.

    Raises:
        UserError: not a whole GGUF file of one part with a model in it.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise UserError(f"{path} does not begin as a GGUF file does; download it again.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        metadata, tensors = _header(data)
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, cut short or of another GGUF version ({error}).") from None
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if len(data) < end:
        raise UserError(f"{path} is cut short: {len(data)} of {end} bytes; download it again.")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path} is one of {metadata['split.count']} parts; join them with llama.cpp's llama-gguf-split --merge."
        )
    if not isinstance(metadata.get("general.architecture"), str):
        raise UserError(f"{path} does not say its architecture (general.architecture).")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{path} holds a GGUF {kind}, not a model.")
    return GGUFFile(path, metadata, tensors, data)


class _Cursor:
    """Reads one value of a file after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def numbers(self, format: str, count: int = 1) -> tuple:
        size = struct.calcsize("<" + format) * count
        if size > len(self.data) - self.position:
            raise ValueError("it ends within its header")
        values = struct.unpack_from(f"<{count}{format}", self.data, self.position)
        self.position += size
        return values

    def number(self, format: str):
        return self.numbers(format)[0]

    def text(self) -> str:
        length = self.number("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise ValueError("it ends within its header")
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int):
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            return [self.text() for _ in range(count)] if item == TEXT else list(self.numbers(FORMATS[item], count))
        return self.number(FORMATS[kind])


def _header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors.

    Raises:
        ValueError, KeyError, struct.error: it is damaged.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data)
    cursor.position = len(MAGIC)
    version, num_tensors, num_keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; {' and '.join(map(str, VERSIONS))} are read, low bytes first")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(num_tensors):
        name, dimensions = cursor.text(), cursor.number("I")
        if dimensions > 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = cursor.numbers("Q", dimensions)[::-1] or (1,)
        entries.append((name, shape, GGMLQuantizationType(cursor.number("I")), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        block, size = GGML_QUANT_SIZES[kind]
        if name in tensors or shape[-1] % block:
            raise ValueError(f"{name} occurs twice or is no whole number of blocks")
        tensors[name] = Tensor(shape, kind, start + offset, prod(shape) // block * size)
    return metadata, tensors


def read_weights(path: Path, names: Iterable[str], config: dict) -> dict[str, mx.array]:
    """A model's weights under the names it has for them; Q4_0, Q4_1 and Q8_0 as MLX's own quantised weights.

    Args:
        names: the model's parameters, in transformers' names.
        config: of `config_of`.
    Raises:
        UserError: tensors are missing, or some are left over.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    file = read(path.resolve())
    (architecture,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = get_tensor_name_map(architecture, config["num_hidden_layers"])
    weights: dict[str, mx.array] = {}
    used = {ROPE_FACTORS}
    for name in names:
        there = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if there not in file.tensors:
            raise UserError(f"{path}: the tensor {there or name} is missing; download it again.")
        used.add(there)
        weights |= _weight(file, there, name, config)
    if left := sorted(file.tensors.keys() - used):
        raise UserError(
            f"{path}: nothing reads the tensor {left[0]} ({len(left)} of {len(file.tensors)} are left over), so this "
            "is another model than its metadata say."
        )
    return weights


def _weight(file: GGUFFile, there: str, name: str, config: dict) -> dict[str, mx.array]:
    import mlx.core as mx
    from gguf import GGMLQuantizationType

    kind, packed = file.tensors[there].kind, {}
    if len(file.tensors[there].shape) == 2 and kind.name in PACKED:
        packed = pack(file.blocks(there), kind.name)
        base = name.removesuffix("weight")
        parts = {base + part: value for part, value in packed.items()}
    elif kind == GGMLQuantizationType.F16:
        parts = {name: file.blocks(there).view(np.float16)}
    else:
        parts = {name: file.floats(there)}
    if file.architecture == "llama" and ".attn_q." in there:
        parts = {part: unpermuted(value, config["num_attention_heads"]) for part, value in parts.items()}
    if file.architecture == "llama" and ".attn_k." in there:
        parts = {part: unpermuted(value, config["num_key_value_heads"]) for part, value in parts.items()}
    if file.architecture.startswith("gemma") and there.endswith("norm.weight"):
        parts = {part: value - 1 for part, value in parts.items()}  # MLX and transformers add the one themselves
    arrays = {part: mx.array(value) for part, value in parts.items()}
    is_bfloat16 = kind == GGMLQuantizationType.BF16  # which NumPy does not have
    return {part: value.astype(mx.bfloat16) for part, value in arrays.items()} if is_bfloat16 else arrays


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, transformers halves: the rows of a head [heads * dims, ..] back in their order."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


# By kind: bytes before the 32 numbers of a block, and its scales and biases in MLX's scale * number + bias, where
# `first` and `second` are the 16-bit numbers that a block begins with. In 32 bit, since llama.cpp computes with those.
PACKED = {
    "Q4_0": (2, lambda first, second: (first, -8 * first)),
    "Q4_1": (4, lambda first, second: (first, second)),
    "Q8_0": (2, lambda first, second: (first, -128 * first)),
}


def pack(blocks: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """llama.cpp's blocks of 32 as MLX's weight, scales and biases, the same numbers bit for bit.

    Args:
        blocks: bytes [rows, bytes of a row].
    """
    before, scaling = PACKED[kind]
    four_bits = kind.startswith("Q4")
    blocks = blocks.reshape(len(blocks), -1, before + (16 if four_bits else 32))
    halves = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
    scales, biases = scaling(halves[..., 0], halves[..., 1])
    numbers = blocks[..., before:]
    if four_bits:  # llama.cpp puts number j beside j + 16, MLX beside j + 1
        numbers = np.concatenate([numbers & 15, numbers >> 4], axis=-1)
        numbers = numbers[..., ::2] | numbers[..., 1::2] << 4
    else:
        numbers = numbers ^ 128  # -128 .. 127 as 0 .. 255
    words = np.ascontiguousarray(numbers.reshape(len(blocks), -1)).view(np.uint32)
    return {"weight": words, "scales": scales, "biases": biases}


def says_number(file: GGUFFile, key: str, default: float | None = None) -> Any:
    """A number of the metadata, under the architecture's name.

    Raises:
        UserError: it is missing, or no single number.
    """
    value = file.metadata.get(f"{file.architecture}.{key}", default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f"{file.path}: {file.architecture}.{key} must be a number, not {shown(value)}.")
    return value
