"""Tokens on disk that are read at random: flat memory-mapped arrays, made from files if need be.

A token store is a directory of `.npy` files, none of which is ever unpickled:

* `tokens.npy`: integers `[t]`, all sequences one after another;
* `offsets.npy`: int64 `[n + 1]`, where each sequence starts, and where the last ends;
* `ids.npy`: int64 `[n]`, rising: the ids of the sequences; without it they are the row numbers;
* `rows.npy`: integers `[n]`, the row of each of these ids; without it id `k` is that of row `k`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import MappedArray, from_portable, to_portable
from seqpack_jax.errors import SeqpackError, check_int, check_integers, fail
from seqpack_jax.feeding.formats import Columns, TokenBlock
from seqpack_jax.feeding.inputs import list_shards, read_token_blocks
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.feeding.storage import npy_header

__all__ = ["KeyedSequences", "fingerprint_of", "is_store", "open_sequences", "write_flat"]

_STORE_VERSION = 1  # of the files above; part of the name of a store
_DAMAGED = "it may be cut short, or not have been written by numpy.save: make it again"


@dataclass(frozen=True, eq=False)
class KeyedSequences:
    """Flat sequences whose ids are not their row numbers; all of it may be memory-mapped.

    Time: O(log n) to find a sequence.

    Attributes:
        flat: the sequences, by row.
        ids: int64 `[n]`, rising.
        rows: integers `[n]`, the row of each id; None where id `k` is that of row `k`.

    Example:
        >>> flat = FlatSequences(np.array([7, 8, 9]), np.array([0, 2, 3]))
        >>> sequences = KeyedSequences(flat, ids=np.array([40, 50]), rows=np.array([1, 0]))
        >>> sequences[50].tolist(), sequences[40].tolist()
        ([7, 8], [9])
    """

    flat: FlatSequences
    ids: NDArray[Any]
    rows: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "rows"):
            array = getattr(self, name)
            if array is None:
                continue
            # A plain array: looking something up in a memmap object takes several times longer.
            array = np.asarray(check_integers("KeyedSequences", name, array))
            if len(array) != len(self.flat):
                problem = f"there are {len(array)} {name}, but {len(self.flat)} sequences"
                fail("KeyedSequences", problem, f"pass {name} of shape [{len(self.flat)}]")
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the tokens of the sequence whose id is `index`: a view."""
        index = check_int("KeyedSequences", "index", index)
        place = int(self.ids.searchsorted(index))
        if place == len(self.ids) or self.ids[place] != index:
            raise KeyError(index)
        return self.flat[place if self.rows is None else int(self.rows[place])]

    def __getstate__(self) -> dict[str, Any]:
        rows = None if self.rows is None else to_portable(self.rows)
        return {"flat": self.flat, "ids": to_portable(self.ids), "rows": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "flat", state["flat"])
        for name in ("ids", "rows"):
            value = state[name]
            object.__setattr__(
                self, name, None if value is None else np.asarray(from_portable(value))
            )


def open_sequences(
    path: str | os.PathLike[str],
    *,
    tokens_column: str | None = None,
    id_column: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
) -> FlatSequences | KeyedSequences:
    """Open the tokens of a data set for random access by id.

    A token store (a directory with `tokens.npy` and `offsets.npy`, from `write_flat` or your own)
    is memory-mapped.  Parquet and FASTA are streamed once, in bounded memory, into a store inside
    `work_dir`, which is kept and found again as long as the input is unchanged.  It takes as many
    bytes as the tokens, in the dtype of their column, at most int32; residues are uint8 codes of
    their letters.

    Time: O(1) for a store, O(tokens) for other files.  Memory: a block; with ids in no order, 16
    bytes per sequence while they are sorted.

    Args:
        path: a directory with a token store; or parquet or FASTA files: one, a directory or a glob,
            in whatever fsspec opens, as for `prepare`.
        tokens_column: of the parquet files, lists of integers.
        id_column: of the parquet files, integers; None for the number of the row, as in `prepare`.
        work_dir: where the store of other files is kept.  It need not exist.

    Returns:
        A `FlatSequences`, or a `KeyedSequences` where ids are not row numbers.

    Raises:
        SeqpackError: the files cannot be read, an array or a column is missing or is not of
            integers, an id comes twice, a token is beyond int32, or `work_dir` is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_flat([(np.array([7, 8, 9], np.uint16), [2, 1])], f"{folder}/tokens")
        ...     sequences = open_sequences(f"{folder}/tokens")
        ...     sequences[0].tolist(), sequences.tokens.dtype.name
        ([7, 8], 'uint16')
    """
    caller = "open_sequences"
    if is_store(path):
        if tokens_column is not None or id_column is not None:
            problem = f"{path} holds a token store, which has no columns"
            fail(caller, problem, "leave tokens_column and id_column out")
        return _open_store(caller, Path(path))
    if work_dir is None:
        problem = f"{path} is no token store (a directory with tokens.npy and offsets.npy)"
        fail(caller, problem, "pass work_dir=..., where one is made of parquet or FASTA files")
    work = Path(work_dir)
    work.mkdir(parents=True, exist_ok=True)
    columns = Columns(tokens=tokens_column, id=id_column)
    source = os.fspath(path)
    shards = list_shards(source, columns, work_dir=work, caller=caller)
    facts = [_STORE_VERSION, columns, [shard.fingerprint for shard in shards]]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    store = work / f"tokens-{digest}"
    with _locked(caller, work / f".{store.name}.lock"):
        if not store.exists():
            _write_store(caller, read_token_blocks(caller, shards, columns), store)
    return _open_store(caller, store)


def is_store(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is that of a token store, and not of files to make one of."""
    return (Path(path) / "tokens.npy").exists()


def write_flat(blocks: Iterable[tuple[Any, ...]], directory: str | os.PathLike[str]) -> None:
    """Write a token store, block by block, in bounded memory.

    Use it to store what a tokeniser returns, once, for `open_sequences`.  The directory appears
    when it is complete.

    Time: O(tokens).  Memory: a block; with ids in no order, 16 bytes per sequence.

    Args:
        blocks: pairs `(tokens, sizes)` of integers `[sum(sizes)]` and `[k]`: the tokens of `k`
            sequences one after another, and how many each has; or triples `(tokens, sizes, ids)`.
            Tokens are stored in the dtype of the first block, at most int32.
        directory: to be made; its parents too.

    Raises:
        SeqpackError: the directory exists, a block is not of that form, an id comes twice, or a
            token does not fit the dtype.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     blocks = [([7, 8, 9], [2, 1], [50, 40]), ([1], [1], [60])]
        ...     write_flat(blocks, f"{folder}/tokens")
        ...     open_sequences(f"{folder}/tokens")[40].tolist()
        [9]
    """
    caller = "write_flat"
    target = Path(directory)
    if target.exists():
        fail(caller, f"{directory} exists", "pass another directory, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    _write_store(caller, _checked(caller, blocks), target)


def _checked(caller: str, blocks: Iterable[tuple[Any, ...]]) -> Iterator[TokenBlock]:
    """Return blocks as arrays that fit each other."""
    for number, block in enumerate(blocks):
        if not isinstance(block, tuple) or len(block) not in (2, 3):
            problem = f"block {number} is a {type(block).__name__}, not (tokens, sizes)"
            fail(caller, problem, "pass pairs (tokens, sizes) or triples (tokens, sizes, ids)")
        names = ("tokens", "sizes", "ids")[: len(block)]
        arrays = [
            None if array is None else check_integers(caller, f"{name} of block {number}", array)
            for name, array in zip(names, block, strict=True)
        ]
        tokens, sizes, ids = (*arrays, None)[:3]
        if tokens is None or sizes is None or (len(sizes) and int(sizes.min()) < 0):
            fail(caller, f"sizes of block {number} are not sizes", "pass integers from 0 on")
        sizes = sizes.astype(np.int64)
        if int(sizes.sum()) != len(tokens) or (ids is not None and len(ids) != len(sizes)):
            held = "" if ids is None else f" and {len(ids)} ids"
            problem = f"block {number} has {len(tokens)} tokens{held}, but {len(sizes)} sizes of"
            fail(caller, f"{problem} {int(sizes.sum())} in all", "pass the size of each sequence")
        yield TokenBlock(tokens, sizes, ids if ids is None else ids.astype(np.int64))


def fingerprint_of(sequences: Any) -> Any:
    """Return what changes with the tokens, as JSON has it: of known sources only, else None.

    Time: O(1) for memory-mapped arrays, which go by size and time of change of their files; others
    are read.
    """
    if isinstance(sequences, KeyedSequences):
        arrays = [sequences.flat.tokens, sequences.flat.offsets, sequences.ids, sequences.rows]
    elif isinstance(sequences, FlatSequences):
        arrays = [sequences.tokens, sequences.offsets]
    else:
        return None
    found: list[Any] = []
    for array in arrays:
        portable = None if array is None else to_portable(array)
        if isinstance(portable, MappedArray):
            status = os.stat(portable.path)
            found.append([*portable[1:], status.st_size, status.st_mtime_ns])
        elif portable is not None:
            content = hashlib.sha256(np.ascontiguousarray(portable).data)
            found.append([portable.dtype.str, content.hexdigest()])
    return found


# Writing.


class _NpyStream:
    """A `.npy` file of a 1-D array that grows, block by block."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.rows = np.dtype(dtype).newbyteorder("<"), 0
        self.file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        self.file.write(npy_header(self.dtype.str, (self.rows,)))

    def append(self, array: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(array, self.dtype).data)
        self.rows += len(array)

    def close(self) -> None:
        if not self.file.closed:
            self.file.seek(0)  # all headers are of one size
            self._write_header()
            self.file.close()


class _StoreWriter:
    """Writes the arrays of a store, block by block."""

    def __init__(self, caller: str, directory: Path) -> None:
        self.caller, self.directory = caller, directory
        self.streams: dict[str, _NpyStream] = {}
        self.rows, self.end, self.last_id = 0, 0, 0
        self.rising = self.numbered = True  # the ids: as they came, and are row numbers
        self._append("offsets", np.zeros(1, np.int64), np.int64)

    def _append(self, name: str, array: NDArray[Any], dtype: Any) -> None:
        if name not in self.streams:
            self.streams[name] = _NpyStream(self.directory / f"{name}.npy", dtype)
        self.streams[name].append(array)

    def add(self, block: TokenBlock) -> None:
        if len(block.tokens):
            known, dtype = self.streams.get("tokens"), block.tokens.dtype
            dtype = known.dtype if known else dtype if dtype.itemsize < 4 else np.dtype(np.int32)
            self._check_tokens(block, dtype)
            self._append("tokens", block.tokens, dtype)
        if self.rows and ("ids" in self.streams) != (block.ids is not None):
            problem = f"ids come with some blocks, but not with all (row {self.rows})"
            fail(self.caller, problem, "pass ids with every block, or with none")
        ends = self.end + np.cumsum(block.sizes)
        self._append("offsets", ends, np.int64)
        if block.ids is not None and len(block.ids):
            self._append("ids", block.ids, np.int64)
            first = self.rows == 0 or int(block.ids[0]) > self.last_id
            self.rising &= first and bool((block.ids[1:] > block.ids[:-1]).all())
            rows = np.arange(self.rows, self.rows + len(ends))
            self.numbered &= bool((block.ids == rows).all())
            self.last_id = int(block.ids[-1])
        self.rows += len(ends)
        self.end = int(ends[-1]) if len(ends) else self.end

    def _check_tokens(self, block: TokenBlock, dtype: np.dtype[Any]) -> None:
        """Refuse tokens beyond the dtype of the store."""
        tokens, limits = block.tokens, np.iinfo(dtype)
        if np.can_cast(tokens.dtype, dtype):
            return
        for at in (int(tokens.argmin()), int(tokens.argmax())):
            if not limits.min <= int(tokens[at]) <= limits.max:
                row = self.rows + int(np.searchsorted(np.cumsum(block.sizes), at, side="right"))
                problem = f"row {row} holds the token {tokens[at]}, beyond {dtype.name}"
                hint = "tokens fit into int32, and all blocks into the dtype of the first"
                fail(self.caller, problem, hint)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()

    def finish(self) -> None:
        """Complete the store: sort its ids, unless they are row numbers."""
        if "tokens" not in self.streams:
            self._append("tokens", np.zeros(0, np.int32), np.int32)
        self.close()
        if "ids" not in self.streams:
            return
        path = self.directory / "ids.npy"
        if self.numbered:
            path.unlink()
        elif not self.rising:
            ids = np.load(path)
            order = np.argsort(ids, kind="stable")
            ids = ids[order]
            again = np.flatnonzero(ids[1:] == ids[:-1])
            if again.size:
                k = int(again[0])
                problem = f"id {ids[k]} comes twice, in rows {order[k]} and {order[k + 1]}"
                fail(
                    self.caller,
                    f"{problem} ({again.size} ids repeat an earlier one)",
                    "name a column of distinct ids, or none for row numbers",
                )
            np.save(path, ids)
            np.save(path.with_name("rows.npy"), order.astype(np.min_scalar_type(len(order))))


def _write_store(caller: str, blocks: Iterable[TokenBlock], store: Path) -> None:
    """Write a store beside its place, and move it there."""
    partial = store.with_name(f".{store.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        with contextlib.closing(_StoreWriter(caller, partial)) as writer:
            for block in blocks:
                writer.add(block)
            writer.finish()
        os.rename(partial, store)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(caller: str, path: Path) -> Iterator[None]:
    """Wait until no other process makes the same store."""
    try:
        from filelock import FileLock
    except ImportError:
        fail(caller, "filelock is not installed", "pip install 'seqpack_jax[prepare]'")
    with FileLock(path):
        yield


# Reading.


def _open_store(caller: str, directory: Path) -> FlatSequences | KeyedSequences:
    tokens, offsets = (_map(caller, directory / f"{name}.npy") for name in ("tokens", "offsets"))
    try:
        flat = FlatSequences(tokens, offsets)
        if not (directory / "ids.npy").exists():
            return flat
        rows = directory / "rows.npy"
        rows_array = _map(caller, rows) if rows.exists() else None
        return KeyedSequences(flat, _map(caller, directory / "ids.npy"), rows_array)
    except SeqpackError as error:
        problem = str(error).partition(": ")[2].partition(". Hint:")[0]
        fail(caller, f"{directory} is damaged: {problem}", _DAMAGED)


def _map(caller: str, path: Path) -> NDArray[Any]:
    """Map a `.npy` file of integers; one of objects is refused, never unpickled."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        text = str(error).splitlines()[0].rstrip(". ") if str(error) else repr(error)
        fail(caller, f"{path} cannot be read: {text}", _DAMAGED)
    return array
