"""Write activations to .npz files off the critical path, each whole or not at all; and read thousands of them."""

from __future__ import annotations

import io
import lzma
import math
import queue
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import write_atomically

LOCAL_HEADER, CENTRAL_HEADER = 30, 46  # sizes of a zip member's two headers, without names and extra fields
LOCAL_CRC, CENTRAL_CRC = 14, 16  # where in them its checksum is
# What zipfile and NumPy raise for files of which some bit is wrong (a name, method or header they do not know, say).
DAMAGE = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, SyntaxError, MemoryError, struct.error, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip


class NpzWriter:
    """Writes .npz files in a background thread, each atomically.

    The queue is bounded, so a slow disk slows the caller down instead of filling the memory.
    An error in the thread is raised in the caller, at the next `put` or on leaving the context.

    Args:
        dtype: "float32" or "float16"; values that float16 cannot hold are refused.
    """

    def __init__(self, dtype: str = "float32", compress: bool = False, queue_size: int = 8):
        self.dtype, self.to_bytes = np.dtype(dtype), compressed_npz if compress else npz
        self.jobs: queue.Queue = queue.Queue(queue_size)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="npz-writer", daemon=True)

    def __enter__(self) -> NpzWriter:
        self.thread.start()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self.jobs.put(None)
        self.thread.join()
        if kind is None:
            self._raise_error()

    def put(self, arrays: Mapping[str, np.ndarray], files: Mapping[Path, slice]) -> None:
        """Queue all files of a forward pass: each gets its rows of every array.

        Args:
            arrays: site -> [rows, ..]; they must not be changed afterwards.
        """
        self.run_after(lambda: self._write(arrays, files))

    def run_after(self, action: Callable[[], None]) -> None:
        """Queue a function that is called when everything queued before it is on disk."""
        self._raise_error()
        self.jobs.put(action)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        while (action := self.jobs.get()) is not None:
            if self.error is not None:
                continue  # only empty the queue, so that nothing waits forever for room in it
            try:
                action()
            except Exception as error:  # noqa: BLE001  (raised in the caller, see _raise_error)
                self.error = error

    def _write(self, arrays: Mapping[str, np.ndarray], files: Mapping[Path, slice]) -> None:
        converted = {site: self._convert(site, array, next(iter(files))) for site, array in arrays.items()}
        for path, rows in files.items():
            write_atomically(path, self.to_bytes({site: array[rows] for site, array in converted.items()}))

    def _convert(self, site: str, array: np.ndarray, path: Path) -> np.ndarray:
        if not np.isfinite(array).all():
            raise UserError(f"{site} has NaN or infinite values (for {path}); the model's numbers overflow.")
        if self.dtype == np.float16 and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
            raise UserError(
                f"{site} reaches {np.abs(array).max():.3g}, more than float16 can hold (65504); "
                "use --activation-dtype float32."
            )
        return array.astype(self.dtype, copy=False)


def compressed_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """What `np.savez_compressed` writes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes an array for allow_pickle
    return buffer.getvalue()


def npz(arrays: Mapping[str, np.ndarray]) -> bytearray:
    """What `np.savez` writes, to the byte, six times faster.

    np.savez spends its time on headers, and those of a collection's files are all alike: so the file is made
    once for arrays of these names, shapes and types, and then only numbers and checksums are filled in.
    """
    layout = _layout(tuple((name, array.shape, array.dtype.str) for name, array in arrays.items()))
    content = bytearray(layout.template)
    for array, place in zip(arrays.values(), layout.places.values(), strict=True):
        data = array.tobytes()
        content[place.data] = data
        checksum = place.checksum(data)
        for part in place.checksums:
            content[part] = checksum
    return content


class NpzReader:
    """Reads .npz files that are mostly alike, as those of a collection are, ten times faster than np.load.

    np.load spends its time on headers. So only the first file of a size is read by it, or the first two if not all
    arrays are wanted: one of a size that does not come again is not read as a whole. Another of that size is
    compared with what `npz` writes for arrays of the same names, shapes and types: if it differs in numbers and
    checksums only, and the checksums are right, the numbers are taken from it. Whatever is otherwise
    (compressed, damaged, written by somebody else) is left to np.load.
    """

    def __init__(self):
        self.layouts: dict[int, _Layout] = {}  # of the first file of each size, in bytes
        self.sizes: set[int] = set()  # of files that were read in part

    def read(self, path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of a file, read only; with `names` those alone, and the others are not decoded.

        Raises:
            UserError: the file is damaged, missing, or has no array of such a name.
        """
        try:
            content = path.read_bytes()
            layout = self.layouts.get(len(content))
            arrays = layout.arrays(content, names) if layout else None
            return self._load(content, names) if arrays is None else arrays
        except _NoArrayError as error:
            raise UserError(f"{path} has no array {error}") from None
        except DAMAGE as error:
            raise UserError(f"{path} is damaged ({error}); delete its folder and run the collection again.") from None

    def _load(self, content: bytes, names: Collection[str] | None) -> dict[str, np.ndarray]:
        """By np.load; a file of a size that was met before is read as a whole, to know the next."""
        file = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        with file:
            names = file.files if names is None else names
            for name in names:
                if name not in file.files:
                    raise _NoArrayError(f"{name!r}; its arrays are {', '.join(file.files[:4])} ..")
            stored = file.zip is not None and all(m.compress_type == zipfile.ZIP_STORED for m in file.zip.infolist())
            is_whole = set(names) >= set(file.files) or len(content) in self.sizes
            is_model = stored and is_whole and len(content) not in self.layouts
            self.sizes.add(len(content))
            arrays = {name: file[name] for name in (file.files if is_model else names)}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is not an array")
        if is_model:
            self.layouts[len(content)] = _layout(tuple((n, a.shape, a.dtype.str) for n, a in arrays.items()))
        return {name: arrays[name] for name in names}


class _NoArrayError(Exception):
    """A file has no array of the name."""


@dataclass(frozen=True)
class _Place:
    """One array in an .npz file: where its numbers and the two copies of its checksum are."""

    shape: tuple[int, ...]
    dtype: str
    data: slice
    checksums: tuple[slice, slice]
    header_checksum: int  # of what comes before the numbers: the .npy header

    def checksum(self, data: bytes) -> bytes:
        return struct.pack("<L", zlib.crc32(data, self.header_checksum))


@dataclass(frozen=True)
class _Layout:
    """What .npz files of arrays of the same names, shapes and types have in common."""

    template: bytes  # the file of zeros
    places: dict[str, _Place]
    fixed: list[tuple[slice, bytes]]  # all that is neither number nor checksum

    def arrays(self, content: bytes, names: Collection[str] | None) -> dict[str, np.ndarray] | None:
        """The arrays of a file; None if that is not made like this, or damaged."""
        if len(content) != len(self.template) or any(content[part] != expected for part, expected in self.fixed):
            return None
        arrays = {}
        for name in self.places if names is None else names:
            place = self.places.get(name)
            if place is None:
                return None
            data = content[place.data]
            first, second = place.checksums
            if not content[first] == content[second] == place.checksum(data):
                return None
            arrays[name] = np.ndarray(place.shape, place.dtype, data)
        return arrays


@lru_cache(maxsize=64)
def _layout(kinds: tuple[tuple[str, tuple[int, ...], str], ...]) -> _Layout:
    """Made from an .npz file of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # as np.savez does, which cannot take an array named "file"
        for name, shape, dtype in kinds:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.zeros(shape, dtype), allow_pickle=False)
        members, central = archive.infolist(), archive.start_dir
    content = buffer.getvalue()
    places = {}
    for entry, (name, shape, dtype) in zip(members, kinds, strict=True):
        local = entry.header_offset
        lengths = struct.unpack_from("<HH", content, local + LOCAL_HEADER - 4)  # of name and extra fields
        npy = local + LOCAL_HEADER + sum(lengths)
        end = npy + entry.file_size
        start = end - math.prod(shape) * np.dtype(dtype).itemsize
        first, second = (slice(at, at + 4) for at in (local + LOCAL_CRC, central + CENTRAL_CRC))
        places[name] = _Place(shape, dtype, slice(start, end), (first, second), zlib.crc32(content[npy:start]))
        central += CENTRAL_HEADER + sum(struct.unpack_from("<HHH", content, central + 28))
    variable = sorted((part.start, part.stop) for p in places.values() for part in (p.data, *p.checksums))
    starts, ends = [0, *(stop for _, stop in variable)], [*(start for start, _ in variable), len(content)]
    fixed = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    return _Layout(content, places, [(part, content[part]) for part in fixed])
