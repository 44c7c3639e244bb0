"""What `prepare` reads: input files, cut into shards of bounded size, and the blocks of a shard.

Files are sorted by name and their rows numbered through.  How they are cut into shards depends on
the input alone, so that every run, on any machine and in any order, makes the same shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.finding import Source, find_files
from seqpack_jax.feeding.formats import (
    Columns,
    InputFile,
    Part,
    TokenBlock,
    fasta_tokens,
    filesystem,
    kind_of,
    naming,
    npy_lengths,
    npy_rows,
    write_fasta_lengths,
)
from seqpack_jax.feeding.parquet import parquet_lengths, parquet_tokens, row_groups
from seqpack_jax.feeding.progress import progress_bar

__all__ = [
    "Columns",
    "InputFile",
    "Part",
    "Shard",
    "Source",
    "TokenBlock",
    "list_shards",
    "read_shard",
    "read_token_blocks",
    "read_tokens",
]

_FINGERPRINT_VERSION = 2  # of what is hashed, and of how shards are cut
_THREADS = 32  # that read footers: most of the time they wait

Array: TypeAlias = NDArray[Any]


class Shard(NamedTuple):
    """Some consecutive rows of the input, which are prepared at once, anywhere.

    Attributes:
        number: 0, 1, ... in the order of the rows.
        first_row: the number of its first row in the whole input.
        parts: where its rows are.
        fingerprint: 64 hex digits that change when one of its files, its rows, or the columns do.
    """

    number: int
    first_row: int
    parts: tuple[Part, ...]
    fingerprint: str

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(part.rows for part in self.parts)


class _Counted(NamedTuple):
    file: InputFile
    key: str  # changes with the file
    units: list[int]  # the rows that are kept together, as far as they fit into a shard
    lengths: str | None = None  # see `Part`


def list_shards(
    source: Source,
    columns: Columns = Columns(),  # noqa: B008 (a NamedTuple is immutable)
    *,
    max_rows: int = 16_000_000,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    caller: str = "list_shards",
) -> list[Shard]:
    """Find the input files, number their rows, and cut them into shards.

    Whole row groups (whole files, for `.npy` and FASTA) go together as long as they fit; larger
    ones are cut.  Reading from the middle of a row group decodes what is before it, so row groups
    far above `max_rows` cost time, but never memory.

    Time: O(files + row groups): only footers and headers are read, by many threads at a time.
    FASTA files, which have neither, are read once: O(size of the files).

    Args:
        source: a path, a glob, a directory, a list of such, each also as a URL of fsspec
            (`gs://bucket/data/*.parquet`).  In directories (at any depth) and globs, files of other
            kinds are passed over, and so are names that begin with `_` or `.`, unless the glob
            spells such a name out.  A file that two paths of a list lead to, also over links, is
            read once; links inside a directory are files of their own.
        columns: which columns of parquet files to read; `Columns()` for other files.
        max_rows: the most rows in a shard.
        work_dir: a local directory for the lengths of FASTA files; they are found there again when
            nothing changed.
        progress: whether to show progress on stderr while FASTA files are read; None to do so on a
            terminal.
        caller: the public function that an error shall name.

    Returns:
        The shards in the order of their rows; none if there are no rows.

    Raises:
        SeqpackError: there is no input file, a directory cannot be listed, they are of several
            kinds, one cannot be read, lacks a column or has it with a type that is not integers
            (lists, for tokens).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "ab":
        ...         np.save(f"{folder}/{name}.npy", np.arange(1, 6))
        ...     shards = list_shards(folder, max_rows=7)
        ...     blocks = [lengths.tolist() for lengths, _ in read_shard(shards[1], Columns())]
        >>> [(shard.first_row, [part.name for part in shard.parts]) for shard in shards]
        [(0, ['a.npy']), (5, ['b.npy'])]
        >>> blocks
        [[1, 2, 3, 4, 5]]
    """
    max_rows = check_int(caller, "max_rows", max_rows, 1)
    files = find_files(caller, source)
    kind = str(kind_of(files[0].path))
    _check_columns(caller, kind, columns)
    if kind == "fasta":
        return _cut(_count_fasta(caller, files, work_dir, progress), columns, max_rows)
    return _cut(_count_all(caller, files, columns), columns, max_rows)


def read_shard(
    shard: Shard, columns: Columns, *, caller: str = "prepare"
) -> Iterator[tuple[Array, NDArray[np.int64] | None]]:
    """Read a shard in blocks of consecutive rows, in bounded memory.

    Time: O(rows), for integers about that of pyarrow alone.

    Args:
        shard: from `list_shards`.
        columns: the same as there.
        caller: the public function that an error shall name.

    Yields:
        Lengths, int32 or int64 `[k]` and perhaps read-only, which may be zero or negative; and the
        ids, int64 `[k]`, or None without an id column (then they are the numbers of the rows).
        `k` is at most about a quarter million.

    Raises:
        SeqpackError: a value is null or over int64, or a file is damaged or was changed.
    """
    number = shard.first_row
    for part in shard.parts:
        if kind_of(part.file.path) == "parquet":
            yield from parquet_lengths(caller, part, number, columns)
        else:
            if part.lengths is not None:
                part = part._replace(file=InputFile(part.lengths, part.lengths, part.name))
            for lengths in npy_lengths(caller, part, number):
                yield lengths, None
        number += part.rows


def read_tokens(caller: str, shard: Shard, columns: Columns) -> Iterator[TokenBlock]:
    """Read the tokens of a shard of parquet or FASTA files in blocks of consecutive rows.

    A block holds about four million tokens, more if a single sequence does.

    Args:
        caller: the public function that an error shall name.
        shard: from `list_shards`.
        columns: the same as there; of parquet files the tokens, and perhaps the ids.

    Raises:
        SeqpackError: as `read_shard`, or the input holds lengths, or tokens that are not integers.
    """
    number = shard.first_row
    for part in shard.parts:
        if part.lengths is not None:
            yield from fasta_tokens(caller, part)
        elif columns.tokens is not None:
            yield from parquet_tokens(caller, part, number, columns)
        else:
            hint = "pass the tokens column of parquet files, or FASTA files"
            fail(caller, f"{part.name} is read for lengths, it gives no tokens", hint)
        number += part.rows


def read_token_blocks(
    caller: str, shards: Sequence[Shard], columns: Columns
) -> Iterator[TokenBlock]:
    r"""Read the tokens of consecutive shards, each file in one go.

    What `read_tokens` gives shard by shard; but FASTA files, and row groups, that shards cut are
    read once, not once per shard from their beginning.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open(f"{folder}/a.fasta", "w") as file:
        ...         _ = file.write(">one\nMK\nV\n>two\nM\n")
        ...     shards = list_shards(folder, max_rows=1, work_dir=folder)
        ...     blocks = list(read_token_blocks("example", shards, Columns()))
        >>> len(shards), bytes(blocks[0].tokens), blocks[0].sizes.tolist()
        (2, b'MKVM', [3, 1])
    """
    parts: list[Part] = []
    for part in (part for shard in shards for part in shard.parts):
        _append(parts, part)
    whole = [shards[0]._replace(parts=tuple(parts))] if shards else []
    return (block for shard in whole for block in read_tokens(caller, shard, columns))


def _check_columns(caller: str, kind: str, columns: Columns) -> None:
    if kind != "parquet":
        given = [column for column in columns if column is not None]
        if given:
            hint = "leave the columns out: the ids are the numbers of the rows"
            fail(caller, f"{kind} files have no columns, but {given[0]!r} is asked for", hint)
    elif (columns.length is None) == (columns.tokens is None):
        has = "neither is" if columns.length is None else "both are"
        fail(
            caller,
            f"parquet files are read by a length column or a tokens column, but {has} given",
            "name exactly one of them",
        )


# Counting and cutting.


def _key(caller: str, file: InputFile) -> str:
    with naming(caller, file.name):
        fs = filesystem(caller, file.url)[0]
        return hashlib.sha256(f"{fs.ukey(file.path)} {fs.size(file.path)}".encode()).hexdigest()


def _count_all(caller: str, files: list[InputFile], columns: Columns) -> list[_Counted]:
    """Read key and rows of parquet or `.npy` files, by many threads at a time."""

    def count(file: InputFile) -> _Counted:
        if kind_of(file.path) == "parquet":
            units = row_groups(caller, file, columns)
        else:
            units = [npy_rows(caller, file)]
        return _Counted(file, _key(caller, file), units)

    pool = ThreadPoolExecutor(min(_THREADS, len(files)))
    try:
        return list(pool.map(count, files))
    finally:
        pool.shutdown(cancel_futures=True)  # the first error is enough


def _count_fasta(
    caller: str,
    files: list[InputFile],
    work_dir: str | os.PathLike[str] | None,
    progress: bool | None,
) -> list[_Counted]:
    """Count FASTA files, of which those are read whose lengths are not in `work_dir` yet."""
    if work_dir is None:
        fail(caller, "FASTA files need work_dir, for their lengths", "pass a local directory")
    try:
        os.makedirs(work_dir, exist_ok=True)
    except (OSError, ValueError) as error:
        fail(caller, f"{work_dir} cannot be made ({error})", "pass a local directory")
    fs = filesystem(caller, files[0].url)[0]
    sizes = []
    for file in files:
        with naming(caller, file.name):
            sizes.append(fs.size(file.path) or 0)
    with progress_bar("bytes of FASTA files", sum(sizes), progress) as advance:
        return [
            _count_fasta_file(caller, file, size, os.path.abspath(work_dir), advance)
            for file, size in zip(files, sizes, strict=True)
        ]


def _count_fasta_file(
    caller: str, file: InputFile, size: int, folder: str, advance: Callable[[int], None]
) -> _Counted:
    key = _key(caller, file)
    digest = hashlib.sha256(repr((_FINGERPRINT_VERSION, file.name, key)).encode()).hexdigest()
    lengths = os.path.join(folder, f"{digest[:32]}.npy")
    if os.path.exists(lengths):
        advance(size)
    else:
        write_fasta_lengths(caller, file, lengths, advance)
    rows = npy_rows(caller, InputFile(lengths, lengths, file.name))
    return _Counted(file, key, [rows], lengths)


def _cut(files: list[_Counted], columns: Columns, max_rows: int) -> list[Shard]:
    """Fill shards with whole units in order; a unit of more than `max_rows` is cut first."""
    keys = {counted.file.name: counted.key for counted in files}
    shards: list[Shard] = []
    parts: list[Part] = []
    first_row = held = 0

    def close() -> None:
        content = [(part.name, keys[part.name], part.first_row, part.rows) for part in parts]
        text = repr((_FINGERPRINT_VERSION, tuple(columns), first_row, content))
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        shards.append(Shard(len(shards), first_row, tuple(parts), fingerprint))

    for unit in _units(files, max_rows):
        if held + unit.rows > max_rows:
            close()
            parts, first_row, held = [], first_row + held, 0
        _append(parts, unit)
        held += unit.rows
    if parts:
        close()
    return shards


def _append(parts: list[Part], part: Part) -> None:
    """Append consecutive rows, as one part if they are of the same file."""
    if parts and parts[-1].file == part.file:
        parts[-1] = parts[-1]._replace(rows=parts[-1].rows + part.rows)
    else:
        parts.append(part)


def _units(files: list[_Counted], max_rows: int) -> Iterator[Part]:
    for counted in files:
        start = 0
        for size in counted.units:
            for low in range(0, size, max_rows):
                rows = min(max_rows, size - low)
                yield Part(counted.file, start + low, rows, counted.lengths)
            start += size
