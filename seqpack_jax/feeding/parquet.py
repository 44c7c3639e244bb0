"""Parquet files: their row groups, and their lengths or tokens in blocks of bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import fail
from seqpack_jax.feeding.formats import (
    BLOCK_ROWS,
    BLOCK_TOKENS,
    Columns,
    InputFile,
    Part,
    Place,
    TokenBlock,
    as_int32_or_int64,
    fail_changed,
    filesystem,
    naming,
)

__all__ = ["parquet_lengths", "parquet_tokens", "row_groups"]

_BUFFER_BYTES = 1 << 23  # read at once of a column, which may be far longer than memory
_LIST_ROWS = 128  # lists decoded at once: some of them may be far above the average

Array = NDArray[Any]
Int64 = NDArray[np.int64]


def row_groups(caller: str, file: InputFile, columns: Columns) -> list[int]:
    """Return the rows of each row group, from the footer, after checking the columns.

    Time: O(size of the footer).

    Raises:
        SeqpackError: the file is no parquet file, lacks a column, or has it with a wrong type.
    """
    with _parquet_file(caller, file) as parquet:
        _check_schema(caller, file.name, parquet.schema_arrow, columns)
        metadata = parquet.metadata
        return [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]


def parquet_lengths(
    caller: str, part: Part, number: int, columns: Columns
) -> Iterator[tuple[Array, Int64 | None]]:
    """Read the lengths (int32 or int64 `[k]`) and ids (int64 `[k]`) of a part, block by block.

    Plain integer columns are not copied: the arrays are read-only views of pyarrow's.

    Time: O(rows of the part + rows before it in its first row group).

    Args:
        caller: the public function that an error shall name.
        part: rows of a parquet file.
        number: the row of its first row in the whole input.
        columns: which columns to read.

    Raises:
        SeqpackError: the file is damaged or was changed, a row is null, or a value is over int64.
    """
    if columns.tokens is not None:
        for block in _gather(_sizes(caller, part, number, columns)):
            yield block.sizes, block.ids
        return
    for place, batch in _batches(caller, part, number, columns):
        yield _integers(place, batch, str(columns.length)), _ids(place, batch, columns)


def parquet_tokens(caller: str, part: Part, number: int, columns: Columns) -> Iterator[TokenBlock]:
    """Read the tokens and ids of a part, block by block; arguments as for `parquet_lengths`.

    Raises:
        SeqpackError: as `parquet_lengths`, or the lists do not hold integers.
    """
    for block in _gather(_tokens(caller, part, number, columns)):
        yield TokenBlock(block.flat, block.sizes.astype(np.int64, copy=False), block.ids)


class _Lists(NamedTuple):
    """Some consecutive lists: their values one after another, and how many each of them has."""

    flat: Array
    sizes: Array
    ids: Int64 | None


def _sizes(caller: str, part: Part, number: int, columns: Columns) -> Iterator[_Lists]:
    """Read the sizes of lists, without keeping what is in them."""
    for place, batch in _batches(caller, part, number, columns):
        sizes = _lists(place, batch, str(columns.tokens))[1]
        yield _Lists(np.zeros(0, np.int8), sizes, _ids(place, batch, columns))


def _tokens(caller: str, part: Part, number: int, columns: Columns) -> Iterator[_Lists]:
    """Read lists, a few rows at once; those of more than `BLOCK_TOKENS` are cut between rows."""
    for place, batch in _batches(caller, part, number, columns):
        values, sizes = _lists(place, batch, str(columns.tokens))
        flat, ids = values.to_numpy(zero_copy_only=False), _ids(place, batch, columns)
        if flat.dtype.kind not in "iu":
            problem = f"column {columns.tokens!r} of {part.name} has lists of {values.type}"
            fail(caller, problem, "tokens are integers: tokenise the texts first")
        offsets = offsets_of(sizes)
        row = 0
        while row < len(sizes):
            stop = int(np.searchsorted(offsets, offsets[row] + BLOCK_TOKENS, side="right")) - 1
            rows = slice(row, max(stop, row + 1))
            tokens = flat[offsets[rows.start] : offsets[rows.stop]]
            yield _Lists(tokens, sizes[rows], None if ids is None else ids[rows])
            row = rows.stop


def _gather(batches: Iterator[_Lists]) -> Iterator[_Lists]:
    """Put consecutive small batches together, up to `BLOCK_ROWS` rows and `BLOCK_TOKENS` values."""
    held: list[_Lists] = []
    rows = values = 0
    for batch in batches:
        rows, values = rows + len(batch.sizes), values + len(batch.flat)
        if held and (rows > BLOCK_ROWS or values > BLOCK_TOKENS):
            yield _joined(held)
            held, rows, values = [], len(batch.sizes), len(batch.flat)
        held.append(batch)
    if held:
        yield _joined(held)


def _joined(held: list[_Lists]) -> _Lists:
    flat, sizes, ids = zip(*held, strict=True)
    joined = None if ids[0] is None else np.concatenate(ids)
    return _Lists(np.concatenate(flat), np.concatenate(sizes), joined)


@contextlib.contextmanager
def _parquet_file(caller: str, file: InputFile) -> Iterator[Any]:
    fs = filesystem(caller, file.url)[0]
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        fail(caller, "pyarrow is not installed", "pip install 'seqpack_jax[prepare]'")
    from fsspec.implementations.local import LocalFileSystem

    with naming(caller, file.name), contextlib.ExitStack() as stack:
        if isinstance(fs, LocalFileSystem):
            source = stack.enter_context(pa.OSFile(file.path))  # reads without the GIL
        else:
            source = stack.enter_context(fs.open(file.path, "rb", cache_type="none"))
        # With `pre_buffer`, pyarrow would hold all row groups of a part, however large they are.
        yield parquet.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _check_schema(caller: str, name: str, schema: Any, columns: Columns) -> None:
    from pyarrow import types

    for role, column in zip(Columns._fields, columns, strict=True):
        if column is None:
            continue
        found = schema.get_all_field_indices(column)
        if len(found) != 1:
            has = f"{len(found)} columns" if found else "no column"
            known = ", ".join(schema.names[:20]) + (", ..." if len(schema.names) > 20 else "")
            problem = f"{name} has {has} {column!r}; its columns are {known or 'none at all'}"
            fail(caller, problem, "name one of them that it has once")
        kind = schema.field(found[0]).type
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        problem = f"column {column!r} of {name} has the type {kind}"
        if role == "tokens":
            if not is_list:
                hint = "name a list column, or pass a column of lengths as the length column"
                fail(caller, f"{problem}, not a list of tokens", hint)
        elif not types.is_integer(kind):
            hint = "write the column as integers"
            if is_list and role == "length":
                hint = "pass it as the tokens column"
            fail(caller, f"{problem}, not an integer type", hint)


def _batches(caller: str, part: Part, number: int, columns: Columns) -> Iterator[tuple[Place, Any]]:
    """Read the rows of a part, and no others, in record batches of bounded size."""
    with _parquet_file(caller, part.file) as file:
        _check_schema(caller, part.name, file.schema_arrow, columns)
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        starts = offsets_of([group.num_rows for group in groups])
        stop = part.first_row + part.rows
        if stop > starts[-1]:
            fail_changed(caller, part, int(starts[-1]))
        first = int(np.searchsorted(starts, part.first_row, side="right")) - 1
        last = int(np.searchsorted(starts, stop))
        row = int(starts[first])  # of the next batch: pyarrow begins at whole row groups
        for batch in file.iter_batches(
            _batch_rows(groups[first:last], columns.tokens),
            row_groups=range(first, last),
            columns=[name for name in columns if name is not None],
        ):
            begin, end = max(part.first_row, row), min(stop, row + batch.num_rows)
            if begin < end:
                place = Place(caller, part.name, begin, number + begin - part.first_row)
                yield place, batch.slice(begin - row, end - begin)
            row += batch.num_rows
            if row >= stop:
                break


def _batch_rows(groups: list[Any], tokens: str | None) -> int:
    """Rows per batch: fewer if they hold lists, by the row group of the longest lists.

    By their mean: where a few lists of a row group are far longer than the others and lie together,
    a batch is larger by as much.
    """
    if tokens is None:
        return BLOCK_ROWS
    num_columns = groups[0].num_columns
    leaves = [groups[0].column(k).path_in_schema for k in range(num_columns)]
    lists = [k for k, leaf in enumerate(leaves) if leaf.startswith(f"{tokens}.")]
    values: list[int] = [
        group.column(k).num_values // max(group.num_rows, 1) for group in groups for k in lists
    ]
    return max(1, min(BLOCK_ROWS, _LIST_ROWS, BLOCK_TOKENS // max(1, *values)))


def _integers(place: Place, batch: Any, column: str) -> Array:
    values = batch.column(column)
    _refuse_nulls(place, values, column)
    return as_int32_or_int64(place, f"column {column!r}", values.to_numpy())  # without a copy


def _ids(place: Place, batch: Any, columns: Columns) -> Int64 | None:
    if columns.id is None:
        return None
    return _integers(place, batch, columns.id).astype(np.int64, copy=False)


def _lists(place: Place, batch: Any, column: str) -> tuple[Any, Array]:
    """Return the flat values of a list column, and how many of them each row has."""
    from pyarrow import compute

    lists = batch.column(column)
    _refuse_nulls(place, lists, column)
    sizes = compute.list_value_length(lists).to_numpy()
    flat = lists.flatten()
    if flat.null_count:
        index = int(np.searchsorted(offsets_of(sizes), _first_null(flat), side="right")) - 1
        place.fail(index, f"column {column!r} has a null token", "leave such tokens out first")
    return flat, sizes


def _refuse_nulls(place: Place, values: Any, column: str) -> None:
    if values.null_count:
        problem = f"column {column!r} is null"
        place.fail(_first_null(values), problem, "leave such rows out, or fill them")


def _first_null(values: Any) -> int:
    return int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
