"""Files that are written whole or not at all, with their checksums, and mapped again unread."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import fail

__all__ = [
    "FileEntry",
    "RowsFile",
    "allow_open_files",
    "entry_of",
    "map_array",
    "map_int64",
    "npy_header",
    "reading",
    "write_array",
    "write_bytes",
    "writing",
]

INT64, UINT32 = "<i8", "<u4"
AGAIN = "prepare the data set again"
_HEADER = 128  # bytes
_CHUNK = 1 << 18  # bytes that are written at once, and are still in the cache to be digested
_SPARE_FILES = 64  # that a process may open beside those it maps


class FileEntry(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


# --- what the system refuses ------------------------------------------------------------------


@contextmanager
def reading(caller: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an `OSError` while a file is opened, read or mapped into a `SeqpackError`."""
    try:
        yield
    except OSError as error:
        hint = AGAIN
        if error.errno in (errno.EMFILE, errno.ENFILE):  # every map keeps its file open
            hint = "raise `ulimit -n`"
        elif error.errno == errno.ENOMEM:
            hint = "raise the system's limit of memory maps, vm.max_map_count"
        fail(caller, f"{os.fspath(path)} cannot be read ({error.strerror})", hint)


@contextmanager
def writing(caller: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an `OSError` while `path` is written into a `SeqpackError`."""
    try:
        yield
    except OSError as error:
        hint = "make room and run it again: finished shards are kept"
        problem = f"{error.filename or os.fspath(path)} cannot be written ({error.strerror})"
        fail(caller, problem, hint)


def allow_open_files(number: int) -> None:
    """Raise the soft limit of open files, up to the hard one, so that `number` more can be mapped.

    Every map keeps its file open.  Child processes inherit the limit.
    """
    try:
        import resource
    except ImportError:  # on Windows, which has no such limit
        return
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:
        used = _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = used + number + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with suppress(OSError, ValueError):  # then mapping says what is wrong
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- files ------------------------------------------------------------------------------------


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


class RowsFile:
    """A `.npy` file of int64 `[n, columns]` that grows block by block, whole or not at all.

    Attributes:
        rows: how many were appended.
        entry: of the file, after the `with` block; None without rows, when there is no file.
    """

    def __init__(self, path: Path, columns: int) -> None:
        self._path, self._columns = path, columns
        self._temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        self.rows = 0
        self.entry: FileEntry | None = None

    def __enter__(self) -> RowsFile:
        self._file = self._temporary.open("wb")
        self._file.write(bytes(_HEADER))
        return self

    def append(self, rows: NDArray[np.int64]) -> None:
        """Append int64 `[k, columns]`."""
        if len(rows):
            self._file.write(np.ascontiguousarray(rows, INT64).data)
            self.rows += len(rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                if kind is None and self.rows:  # only now is the shape known
                    self._file.seek(0)
                    self._file.write(npy_header(INT64, (self.rows, self._columns)))
            if kind is None and self.rows:
                with self._temporary.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
                    self.entry = FileEntry(file.tell(), digest.hexdigest())
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def map_array(caller: str, path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map what `write_array` wrote, read-only, if it is of that dtype and shape.

    Raises:
        SeqpackError: the file is missing, or its header or its size is another.
    """
    expected = _HEADER + int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    with reading(caller, path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(_HEADER)
    if size != expected:
        fail(caller, f"{path} has {size} bytes, not {expected}", AGAIN)
    if header != npy_header(dtype, shape):
        fail(caller, f"{path} is not the .npy file of {dtype} {list(shape)} that it was", AGAIN)
    if 0 in shape:  # an empty file range cannot be mapped
        return np.zeros(shape, dtype)
    with reading(caller, path):
        return np.memmap(path, dtype, "r", _HEADER, shape)


def map_int64(caller: str, path: Path, entry: FileEntry) -> NDArray[np.int64]:
    """Map an int64 `[k]` that `write_array` wrote; the size of its file tells `k`."""
    return map_array(caller, path, INT64, (max(0, entry.bytes - _HEADER) // 8,))


def entry_of(caller: str, path: Path) -> FileEntry:
    """Read a file for its entry.  Time: O(size)."""
    with reading(caller, path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(file.tell(), digest.hexdigest())
