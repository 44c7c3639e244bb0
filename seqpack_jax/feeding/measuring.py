"""Measuring the lengths of a random-access source, in parallel, going on where a run was killed."""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from seqpack_jax.errors import MAX_LENGTH, check_int, fail
from seqpack_jax.feeding.progress import progress_bar
from seqpack_jax.feeding.workers import file_lock, local_path, making, serve_parent

__all__ = ["measure_lengths"]

_CALLER = "measure_lengths"
_CHUNK = 1 << 14  # items that are measured, and kept, at once
_AHEAD = 4  # chunks in flight per worker

Int64 = NDArray[np.int64]
Chunk = tuple[int, int]  # items [start, stop)


def measure_lengths(
    source: Any,
    length_fn: Callable[[Any], int] = len,
    *,
    workers: int = 1,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Int64:
    """Measure each item of a random-access source: `length_fn(source[i])` for all `i`.

    For sources whose lengths are written nowhere: a Grain source, a Hugging Face dataset, a list of
    texts and a tokeniser.  Run it once, with a cache.

    Time: O(n) calls, over `workers`.  Memory: 8 bytes per item.

    Args:
        source: anything with `len(source)` and `source[i]`.
        length_fn: returns the length of an item in tokens, an int of at least 0.
        workers: processes that measure.  With more than one, `source` and `length_fn` have to
            pickle (a lambda does not), and a script has to call this below
            `if __name__ == "__main__":`.
        cache: an `.npy` file for the lengths.  If it exists, it is returned.  While it is being
            made, finished chunks lie beside it in `CACHE.chunks`, so that a killed run goes on when
            it is run again; other processes that ask for it wait.  Remove both when the source or
            `length_fn` changes: a source of the same size cannot be told from the old one.
        progress: whether to show a progress bar; None to do so when stderr is a terminal.

    Returns:
        int64 `[n]`; with a cache, a read-only memory map of it.

    Raises:
        SeqpackError: an item cannot be measured or its length is not an int of at least 0 (the
            message names the item); the source, or `length_fn`, does not pickle; the cache is of a
            source of another size, no int64 `.npy` file, or cannot be made.

    Example:
        >>> measure_lengths(["some text", "", "more"]).tolist()
        [9, 0, 4]
        >>> measure_lengths(["some text", "", "more"], lambda text: len(text.split())).tolist()
        [2, 0, 1]
    """
    workers = check_int(_CALLER, "workers", workers, 1)
    try:
        size = len(source)
    except TypeError:
        kind = type(source).__name__
        fail(_CALLER, f"the source, of type {kind}, has no len()", "pass a random-access source")
    if cache is None:
        return _measure_missing(source, length_fn, size, workers, None, progress)
    store = _Store(local_path(_CALLER, "cache", cache), size)
    if os.path.exists(store.cache):
        return store.load()
    with making(_CALLER, store.folder):
        store.folder.mkdir(parents=True, exist_ok=True)
    with file_lock(_CALLER, store.folder / "lock"):
        if os.path.exists(store.cache):  # another process has made it meanwhile
            return store.load()
        store.check_chunks()
        return store.finish(_measure_missing(source, length_fn, size, workers, store, progress))


def _measure_missing(
    source: Any,
    length_fn: Callable[[Any], int],
    size: int,
    workers: int,
    store: _Store | None,
    progress: bool | None,
) -> Int64:
    """Measure what the store has no chunk of, and keep it there."""
    lengths = np.zeros(size, np.int64)
    todo: list[Chunk] = []
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        kept = None if store is None else store.chunk(start, stop)
        if kept is None:
            todo.append((start, stop))
        else:
            lengths[start:stop] = kept
    measured = _measure_all(source, length_fn, todo, workers)
    with progress_bar("measuring lengths", size, progress) as advance, closing(measured):
        advance(size - sum(stop - start for start, stop in todo))
        for (start, stop), chunk in measured:
            lengths[start:stop] = chunk
            if store is not None:
                store.keep(start, chunk)
            advance(stop - start)
    return lengths


def _measure_all(
    source: Any, length_fn: Callable[[Any], int], todo: list[Chunk], workers: int
) -> Generator[tuple[Chunk, Int64], None, None]:
    """Measure chunks, in any order."""
    if workers == 1 or len(todo) < 2:
        for chunk in todo:
            yield chunk, _measure(source, length_fn, *chunk)
        return
    try:
        payload = pickle.dumps((source, length_fn))
    except Exception as error:
        hint = "define length_fn at the top of a module, or use workers=1"
        fail(_CALLER, f"the source or length_fn does not pickle: {error}", hint)
    context = get_context("spawn")
    ended = context.RawValue("b", 0)  # workers look at it before each item
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _Worker.start, (payload, ended))
    try:
        waiting = list(reversed(todo))
        running: dict[Future[Int64], Chunk] = {}
        while waiting or running:
            while waiting and len(running) < _AHEAD * workers:
                chunk = waiting.pop()
                running[pool.submit(_Worker.measure, *chunk)] = chunk
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        hint = "it may have run out of memory; scripts need `if __name__ == '__main__':`"
        fail(_CALLER, "a worker process ended without a result", hint)
    finally:
        ended.value = 1  # a chunk may take minutes: Ctrl-C does not wait for those begun
        pool.shutdown(cancel_futures=True)


class _Worker:
    """What a worker process holds: unpickled at its first chunk, where an error is reported."""

    payload: bytes = b""
    ended: Any = None
    unpickled: tuple[Any, Callable[[Any], int]] | None = None

    @classmethod
    def start(cls, payload: bytes, ended: Any) -> None:
        serve_parent()
        cls.payload, cls.ended = payload, ended

    @classmethod
    def measure(cls, start: int, stop: int) -> Int64:
        if cls.unpickled is None:
            try:
                cls.unpickled = pickle.loads(cls.payload)
            except Exception as error:
                hint = "define them in a module that worker processes can import"
                fail(_CALLER, f"a worker cannot unpickle the source or length_fn: {error}", hint)
            cls.payload = b""
        source, length_fn = cls.unpickled
        return _measure(source, length_fn, start, stop, cls.ended)


def _measure(
    source: Any, length_fn: Callable[[Any], int], start: int, stop: int, ended: Any = None
) -> Int64:
    lengths = []
    for item in range(start, stop):
        if ended is not None and ended.value:
            raise CancelledError
        try:
            length = length_fn(source[item])
        except Exception as error:
            problem = f"item {item} cannot be measured: {type(error).__name__}: {error}"
            fail(_CALLER, problem, "try length_fn(source[i]) on this item")
        if type(length) is not int or not 0 <= length <= MAX_LENGTH:
            length = check_int(_CALLER, f"length_fn(source[{item}])", length, 0, MAX_LENGTH)
        lengths.append(length)
    return np.array(lengths, np.int64)


class _Store(NamedTuple):
    """The cache of the lengths of `size` items, and beside it the chunks that are finished."""

    cache: Path
    size: int

    @property
    def folder(self) -> Path:
        return self.cache.with_name(f"{self.cache.name}.chunks")

    def _path(self, start: int) -> Path:
        return self.folder / f"{start}-of-{self.size}.npy"

    def check_chunks(self) -> None:
        """Refuse chunks of another source."""
        for path in self.folder.glob("*-of-*.npy"):
            size = path.stem.rpartition("-")[2]
            if size != str(self.size):
                problem = f"{self.folder} is of {size} items, but the source has {self.size}"
                fail(_CALLER, problem, "remove it, or name another cache")

    def chunk(self, start: int, stop: int) -> Int64 | None:
        """Return a finished chunk; None if there is none, or a crash has damaged it."""
        try:
            chunk: Int64 = open_memmap(self._path(start), mode="r")  # which never unpickles
        except (OSError, ValueError):
            return None
        whole = chunk.dtype == np.int64 and chunk.shape == (stop - start,)
        return chunk if whole else None

    def keep(self, start: int, lengths: Int64) -> None:
        self._write(lengths, self._path(start))

    def finish(self, lengths: Int64) -> Int64:
        """Write the cache, and remove the chunks."""
        self._write(lengths, self.cache)
        return self.load()

    def _write(self, lengths: Int64, path: Path) -> None:
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        with making(_CALLER, path):
            try:
                with open(temporary, "wb") as file:
                    np.save(file, lengths)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def load(self) -> Int64:
        """Map the finished cache, after checking it."""
        hint = "remove it, or name another cache"
        try:
            lengths: Int64 = open_memmap(self.cache, mode="r")
        except (OSError, ValueError) as error:
            fail(_CALLER, f"the cache {self.cache} cannot be read: {error}", hint)
        if lengths.dtype != np.int64 or lengths.ndim != 1:
            fail(_CALLER, f"the cache {self.cache} is no 1-D array of int64", hint)
        if len(lengths) != self.size:
            problem = f"the cache {self.cache} is of {len(lengths)} items, but the source has"
            fail(_CALLER, f"{problem} {self.size}", hint)
        shutil.rmtree(self.folder, ignore_errors=True)
        return lengths
