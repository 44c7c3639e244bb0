"""What worker processes receive of a source: under 100 kB, whatever the sizes.

Pickling an array copies it to every worker.  Here large arrays in memory are written to a file
once, which workers map, so that they share it; memory maps go by path.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import warnings
import weakref
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import MappedArray, to_portable
from seqpack_jax.errors import fail
from seqpack_jax.feeding.packed_source import PackedSource

__all__ = ["Parcel", "SentSource", "end_with_parent"]

_LARGE = 1 << 16  # bytes of what workers are not sent but find in a file
_MUCH_TO_UNPICKLE = 10**8  # bytes, by every worker
_ALIGNMENT = 64


class Parcel:
    """A pickled source, of which large arrays, and the rest if it is large too, are in files.

    Attributes:
        folder: a temporary directory of its own, removed with this object; None without files.
        content: the pickle, or nothing if it is in a file.
    """

    def __init__(self, source: PackedSource) -> None:
        self.folder: str | None = None
        buffers: list[memoryview] = []
        self.content = _pickle(source, buffers)
        if len(self.content) > _MUCH_TO_UNPICKLE:
            warnings.warn(
                f"PackedDataset: each worker unpickles {len(self.content) / 1e6:.1f} MB of what is "
                "no large array. Hint: keep sequences in FlatSequences or in memory-mapped files.",
                stacklevel=2,
            )
        if not buffers and len(self.content) <= _LARGE:
            return
        self.folder = tempfile.mkdtemp(prefix="seqpack_jax-")
        weakref.finalize(self, _remove, self.folder, os.getpid())
        try:
            self._write(self.folder, buffers)
        except OSError as error:
            size = sum(buffer.nbytes for buffer in buffers) + len(self.content)
            problem = f"{size / 1e6:.1f} MB cannot be written to {self.folder} ({error})"
            fail("PackedDataset", problem, "set TMPDIR to where there is room, or use memory maps")
        self.content = b""

    def _write(self, folder: str, buffers: list[memoryview]) -> None:
        spans = []
        with open(f"{folder}/arrays", "xb") as file:
            for buffer in buffers:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                spans.append((file.tell(), buffer.nbytes))
                file.write(buffer)
        with open(f"{folder}/source", "xb") as file:
            pickle.dump(spans, file)
            file.write(self.content)


class SentSource:
    """A `PackedSource` that is pickled as its place in a parcel."""

    def __init__(self, source: PackedSource, parcel: Parcel, position: tuple[int, int]) -> None:
        self._source, self._parcel, self._position = source, parcel, position

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def __repr__(self) -> str:
        return repr(self._source)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self._parcel.folder, self._parcel.content, self._position)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not when a forked process ends
        shutil.rmtree(folder, ignore_errors=True)


def _pickle(source: PackedSource, buffers: list[memoryview]) -> bytes:
    """Pickle a source; large arrays in memory go to `buffers`, maps by path."""
    import cloudpickle  # type: ignore[import-untyped]

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, np.ndarray):
                portable = to_portable(value)
                if isinstance(portable, MappedArray):
                    return _view, tuple(portable)
            return super().reducer_override(value)

    def keep(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _LARGE:
            return True  # with the rest
        buffers.append(view)
        return False

    file = io.BytesIO()
    try:
        Pickler(file, protocol=5, buffer_callback=keep).dump(source)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        problem = f"the source cannot be pickled for worker processes ({error})"
        fail("PackedDataset", problem, "pass num_workers=0, or sequences that can be pickled")
    return file.getvalue()


def _unpack(folder: str | None, content: bytes, position: tuple[int, int]) -> PackedSource:
    """Return the source in a parcel, in a worker process."""
    if folder is None:
        source: PackedSource = pickle.loads(content)
    else:
        with open(f"{folder}/source", "rb") as file:
            spans = pickle.load(file)
            arrays = _map(f"{folder}/arrays").data if spans else memoryview(b"")
            source = pickle.load(file, buffers=[arrays[at : at + size] for at, size in spans])
    return source.starting_at(*position)


@lru_cache(maxsize=64)
def _map(path: str) -> NDArray[np.uint8]:
    return np.memmap(path, np.uint8, "r")


def _view(path: str, dtype: str, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    """Return an array in a file: any number of them share one map."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return np.asarray(_map(path))[offset : offset + size].view(kind).reshape(shape)


def end_with_parent(folder: str | None, index: int, count: int) -> None:
    """Make a worker process end when the one that started it is killed, and clean up after it.

    Grain calls it in each worker; its own workers would wait for their parent forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends workers
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
