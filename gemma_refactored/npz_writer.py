"""Write activations to .npz files off the critical path, each file whole or not at all."""

from __future__ import annotations

import io
import queue
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import write_atomically

LOCAL_HEADER, CENTRAL_HEADER = 30, 46  # sizes of a zip member's two headers, without names and extra fields
LOCAL_CRC, CENTRAL_CRC = 14, 16  # where in them its checksum is


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
                continue  # only empty the queue, so that nobody waits for room in it for ever
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
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npz(arrays: Mapping[str, np.ndarray]) -> bytearray:
    """What `np.savez` writes, to the byte, six times faster.

    np.savez spends its time on headers, and those of a collection's files are all alike: so the file is made
    once for arrays of these names, shapes and types, and then only numbers and checksums are filled in.
    """
    template, places = _template(tuple((name, array.shape, array.dtype.str) for name, array in arrays.items()))
    content = bytearray(template)
    for array, place in zip(arrays.values(), places, strict=True):
        data = array.tobytes()
        content[place.data : place.data + len(data)] = data
        checksum = struct.pack("<L", zlib.crc32(data, place.header_checksum))
        for start in place.checksums:
            content[start : start + 4] = checksum
    return content


@dataclass(frozen=True)
class _Place:
    """Where in an .npz file one array's numbers and the two copies of its checksum are."""

    data: int
    checksums: tuple[int, int]
    header_checksum: int  # of what comes before the numbers: the .npy header


@lru_cache(maxsize=64)
def _template(kinds: tuple[tuple[str, tuple[int, ...], str], ...]) -> tuple[bytes, list[_Place]]:
    """An .npz file of zeros, and where its arrays are."""
    buffer = io.BytesIO()
    zeros = {name: np.zeros(shape, dtype) for name, shape, dtype in kinds}
    np.savez(buffer, **zeros)
    content = buffer.getvalue()
    places = []
    with zipfile.ZipFile(buffer) as archive:
        central = archive.start_dir
        for member, array in zip(archive.infolist(), zeros.values(), strict=True):
            local = member.header_offset
            names = struct.unpack_from("<HH", content, local + LOCAL_HEADER - 4)  # lengths of name and extra fields
            npy = local + LOCAL_HEADER + sum(names)
            data = npy + member.file_size - array.nbytes
            checksums = local + LOCAL_CRC, central + CENTRAL_CRC
            places.append(_Place(data, checksums, zlib.crc32(content[npy:data])))
            central += CENTRAL_HEADER + sum(struct.unpack_from("<HHH", content, central + 28))
    return content, places
