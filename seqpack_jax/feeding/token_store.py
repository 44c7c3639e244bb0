"""Tokens on disk that are read at random: flat memory-mapped arrays, made from files if need be.

A token store is a directory of `.npy` files, none of which is ever unpickled:

* `tokens.npy`: integers `[t]`, all sequences one after another;
* `offsets.npy`: int64 `[n + 1]`, where each sequence starts, and where the last ends;
* `ids.npy`: int64 `[n]`, rising: the ids of the sequences; without it they are the row numbers;
* `rows.npy`: integers `[n]`, the row of each of these ids; without it id `k` is that of row `k`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import MappedArray, from_portable, to_portable
from seqpack_jax.errors import SeqpackError, check_int, check_integers, fail
from seqpack_jax.feeding.formats import Columns, TokenBlock
from seqpack_jax.feeding.inputs import Shard, Source, list_shards, read_token_blocks
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.feeding.store_writer import write_store
from seqpack_jax.feeding.workers import file_lock, local_path, making

__all__ = [
    "KeyedSequences",
    "fingerprint_of",
    "is_store",
    "open_files",
    "open_sequences",
    "write_flat",
]

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
        if not -(2**63) <= index < 2**63:
            raise KeyError(index)
        return self.flat[int(self._rows_of(np.array([index]))[0])]

    def __getitems__(self, indices: ArrayLike) -> list[NDArray[Any]]:
        """Return the tokens of several sequences: views (see `FlatSequences.__getitems__`)."""
        return self.flat.__getitems__(self._rows_of(np.asarray(indices, np.int64)))

    def _rows_of(self, index: NDArray[np.int64]) -> NDArray[Any]:
        # In the dtype of the ids, all of which NumPy would cast otherwise, uint64 to floats.
        places = np.minimum(self.ids.searchsorted(index.astype(self.ids.dtype)), len(self.ids) - 1)
        missing = self.ids[places] != index if len(self.ids) else np.ones(len(index), np.bool_)
        if missing.any():
            raise KeyError(int(index[missing.argmax()]))
        return places if self.rows is None else self.rows[places]

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
    path: Source,
    *,
    tokens_column: str | None = None,
    id_column: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
) -> FlatSequences | KeyedSequences:
    """Open the tokens of a data set for random access by id.

    A token store (a directory with `tokens.npy` and `offsets.npy`, from `write_flat` or your own)
    is memory-mapped.  Parquet and FASTA are streamed once, in bounded memory, into a store inside
    `work_dir`, which is kept and found again as long as the input is unchanged.  It takes as many
    bytes as the tokens, in the dtype of their column (the wider, if files differ), at most int32;
    residues are uint8 codes of
    their letters.

    Time: O(1) for a store, O(tokens) for other files.  Memory: a block; with ids in no order, 16
    bytes per sequence while they are sorted.

    Args:
        path: a directory with a token store; or parquet or FASTA files: one, a directory, a glob,
            or a list of these, in whatever fsspec opens, as for `prepare`.
        tokens_column: of the parquet files, lists of integers.
        id_column: of the parquet files, integers; None for the number of the row, as in `prepare`.
        work_dir: where the store of other files is kept.  It need not exist.

    Returns:
        A `FlatSequences`, or a `KeyedSequences` where ids are not row numbers.

    Raises:
        SeqpackError: the files cannot be read, an array or a column is missing or is not of
            integers, an id comes twice, a token is beyond int32, or `work_dir` is missing or cannot
            be written to.

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
    elif work_dir is None:
        problem = f"{path} is no token store (a directory with tokens.npy and offsets.npy)"
        fail(caller, problem, "pass work_dir=..., where one is made of parquet or FASTA files")
    return open_files(caller, path, Columns(tokens=tokens_column, id=id_column), work_dir)


def open_files(
    caller: str,
    source: Source,
    columns: Columns,
    work_dir: str | os.PathLike[str] | None,
    check: Callable[[list[Shard]], None] | None = None,
) -> FlatSequences | KeyedSequences:
    """Open what `open_sequences` does; `check` may refuse the shards before their tokens are read.

    Args:
        caller: the public function that an error shall name.
        source: a token store, or files.
        columns: of parquet files.
        work_dir: for the store that is made of files.
        check: is not called for a token store.

    Raises:
        SeqpackError: as `open_sequences`, or what `check` raises.
    """
    if (single := _single(source)) is not None and is_store(single):
        return _open_store(caller, Path(os.path.expanduser(single)))
    work = local_path(caller, "work_dir", work_dir)
    with making(caller, work):
        work.mkdir(parents=True, exist_ok=True)
        shards = list_shards(source, columns, work_dir=work, caller=caller)
        if check is not None:
            check(shards)
        facts = [_STORE_VERSION, columns, [shard.fingerprint for shard in shards]]
        digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        store = work / f"tokens-{digest}"
        with file_lock(caller, work / f".{store.name}.lock"):
            if not store.exists():
                blocks = read_token_blocks(caller, shards, columns)
                write_store(caller, blocks, store, widen=True)
    return _open_store(caller, store)


def is_store(source: Any) -> bool:
    """Return whether a path is that of a token store, and not of files to make one of."""
    single = _single(source)
    return single is not None and os.path.exists(
        os.path.join(os.path.expanduser(single), "tokens.npy")
    )


def _single(source: Any) -> str | None:
    """Return the one path that is given, perhaps in a list."""
    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    path = os.fspath(source) if isinstance(source, os.PathLike) else source
    return path if isinstance(path, str) else None


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
        SeqpackError: the directory exists or cannot be made, a block is not of that form, an id
            comes twice or is over int64, or a token does not fit the dtype.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     blocks = [([7, 8, 9], [2, 1], [50, 40]), ([1], [1], [60])]
        ...     write_flat(blocks, f"{folder}/tokens")
        ...     open_sequences(f"{folder}/tokens")[40].tolist()
        [9]
    """
    caller = "write_flat"
    target = local_path(caller, "directory", directory)
    if os.path.lexists(target):
        fail(caller, f"{directory} exists", "pass another directory, or remove it first")
    with making(caller, target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_store(caller, _checked(caller, blocks), target)


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
        for name, array in zip(names[1:], arrays[1:], strict=True):
            if array is not None and int(array.max(initial=0)) >= 2**63:
                problem = f"{name} of block {number} go up to {array.max()}, beyond int64"
                fail(caller, problem, "sizes and ids are int64")
        if (sizes > len(tokens)).any():  # their sum might overflow
            problem = f"block {number} has {len(tokens)} tokens, but a size of {sizes.max()}"
            fail(caller, problem, "pass the size of each sequence")
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
    # Subclasses may read what they like from elsewhere.
    if type(sequences) is KeyedSequences:
        arrays = [sequences.flat.tokens, sequences.flat.offsets, sequences.ids, sequences.rows]
    elif type(sequences) is FlatSequences:
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
