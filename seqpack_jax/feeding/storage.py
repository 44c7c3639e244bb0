"""Files that are written whole or not at all, with their checksums, and mapped again unread."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import fail

__all__ = [
    "FileEntry",
    "entry_of",
    "map_array",
    "map_int64",
    "npy_header",
    "write_array",
    "write_bytes",
]

INT64, UINT32 = "<i8", "<u4"
AGAIN = "prepare the data set again"
_HEADER = 128  # bytes
_CHUNK = 1 << 18  # bytes that are written at once, and are still in the cache to be digested


class FileEntry(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the 128 bytes before the data in the `.npy` files that are written here.

    They are spelled out, as every NumPy reads them but not every version writes the same.
    """
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + _padded(text)


def _padded(text: str) -> bytes:
    return text.encode().ljust(_HEADER - 11) + b"\n"


def write_bytes(path: Path, *chunks: Any) -> FileEntry:
    """Write a file, whole or not at all, and return its entry."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                size += view.nbytes
                while view.nbytes:
                    # A raw file may take a part.
                    written = file.write(view[:_CHUNK])
                    digest.update(view[:written])
                    view = view[written:]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return FileEntry(size, digest.hexdigest())


def write_array(path: Path, array: NDArray[Any], dtype: str) -> FileEntry:
    """Write a `.npy` file of `dtype`, whole or not at all, and return its entry."""
    array = np.ascontiguousarray(array, dtype)
    header = npy_header(dtype, array.shape)
    # An empty view cannot be cast to bytes.
    return write_bytes(path, header, array.data if array.size else b"")


def map_array(caller: str, path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map what `write_array` wrote, read-only, if it is of that dtype and shape.

    Raises:
        SeqpackError: the file is missing, or its header or its size is another.
    """
    expected = _HEADER + int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(_HEADER)
    except OSError as error:
        fail(caller, f"{path} cannot be read ({error.strerror})", AGAIN)
    if size != expected:
        fail(caller, f"{path} has {size} bytes, not {expected}", AGAIN)
    if header != npy_header(dtype, shape):
        fail(caller, f"{path} is not the .npy file of {dtype} {list(shape)} that it was", AGAIN)
    if 0 in shape:  # an empty file range cannot be mapped
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", _HEADER, shape)


def map_int64(caller: str, path: Path, entry: FileEntry) -> NDArray[np.int64]:
    """Map an int64 `[k]` that `write_array` wrote; the size of its file tells `k`."""
    return map_array(caller, path, INT64, (max(0, entry.bytes - _HEADER) // 8,))


def entry_of(caller: str, path: Path) -> FileEntry:
    """Read a file for its entry.  Time: O(size)."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return FileEntry(file.tell(), digest.hexdigest())
    except OSError as error:
        fail(caller, f"{path} cannot be read ({error.strerror})", AGAIN)
