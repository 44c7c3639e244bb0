"""Columns of Arrow as arrays without a copy, and the files that hold them."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import fail

__all__ = [
    "CALLER",
    "Names",
    "View",
    "check_columns",
    "copy_columns",
    "list_sizes",
    "map_table",
    "names_of",
    "record_at",
    "views_of",
]

CALLER = "open_table"  # whose errors these are
_BATCH_ROWS = 1024  # of what parquet files are turned into

Int64 = NDArray[np.int64]
Names: TypeAlias = str | Sequence[str] | Mapping[str, str]


def names_of(columns: Any) -> dict[str, str]:
    """Return the column of each feature."""
    if isinstance(columns, str):
        return {columns: columns}
    names = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    if not names or not all(isinstance(each, str) for pair in names.items() for each in pair):
        fail(CALLER, f"columns = {columns!r}", "pass a name, some names, or {feature: column}")
    return names


# --- columns ------------------------------------------------------------------------------------


class View(NamedTuple):
    """A column of some rows: row `k` is `values[offsets[k]:offsets[k + 1]]`.

    Without `offsets`, it is the `k`-th run of `width` values; without `width` too, the value `k`.
    """

    values: Any
    offsets: NDArray[Any] | None = None
    width: int | None = None

    def row(self, k: int) -> Any:
        """Return row `k`: an array, or a scalar."""
        if self.offsets is not None:
            return self.values[self.offsets[k] : self.offsets[k + 1]]
        if self.width is None:
            return self.values[k]
        return self.values[k * self.width : (k + 1) * self.width]

    def sizes(self, rows: int) -> Int64:
        """Return how many values each of the rows has: int64 `[rows]`."""
        if self.offsets is not None:
            return np.diff(self.offsets).astype(np.int64, copy=False)
        return np.full(rows, self.width, np.int64)


class _Bits:
    """Booleans of Arrow, eight in a byte: made an array when they are read."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return np.bool_(self._array[index].as_py())
        start, stop, _ = index.indices(len(self._array))
        return self._array.slice(start, stop - start).to_numpy(zero_copy_only=False)


def record_at(views: dict[str, View], row: int, columns: Names) -> Any:
    """Return a row as `columns` ask for it: an array, or a dict of features."""
    if isinstance(columns, str):
        return views[columns].row(row)
    return {name: view.row(row) for name, view in views.items()}


def check_columns(known: list[str], names: dict[str, str], what: str = "the table") -> None:
    """Raise unless each column that is named is there, once."""
    for column in names.values():
        if known.count(column) != 1:
            has = "has no column" if column not in known else "has several columns"
            listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            hint = "name one of them that it has once"
            fail(CALLER, f"{what} {has} {column!r}; its columns are {listed or 'none'}", hint)


def views_of(batch: Any, names: dict[str, str], row_of: Callable[[int], Any]) -> dict[str, View]:
    """Return views of the columns of a record batch, once it is sure that nothing in it is null.

    Args:
        batch: has at least one row.
        names: the column of each feature; the first shall hold lists.
        row_of: what an error shall call row `k` of the batch.
    """
    views: dict[str, View] = {}
    for name, column in names.items():
        array = batch.column(column)
        if not views and not _is_list(array.type):
            _fail_no_list(column, array.type)
        views[name] = _view(column, array, row_of)
    return views


def list_sizes(column: str, lists: Any, row_of: Callable[[int], Any]) -> Int64:
    """Return the sizes of lists in however many chunks, without looking into them: int64 `[n]`."""
    from pyarrow import compute

    _refuse_null(f"column {column!r} is null in", lists, row_of)
    kind = lists.type
    if not _is_list(kind):
        _fail_no_list(column, kind)
    sizes: Int64 = compute.list_value_length(lists).to_numpy().astype(np.int64, copy=False)
    return sizes


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _fail_no_list(column: str, kind: Any) -> NoReturn:
    problem = f"column {column!r} has the type {kind}, not lists"
    fail(CALLER, problem, "name a column of lists first: those of tokens")


def _view(column: str, array: Any, row_of: Callable[[int], Any]) -> View:
    from pyarrow import types

    _refuse_null(f"column {column!r} is null in", array, row_of)
    kind = array.type
    if types.is_list(kind) or types.is_large_list(kind):
        offsets = array.offsets.to_numpy()  # of a slice, its own
        first, last = int(offsets[0]), int(offsets[-1])
        held = array.values.slice(first, last - first)

        def row(k: int) -> Any:
            return row_of(int(np.searchsorted(offsets, first + k, side="right")) - 1)

        values = _dense(column, kind, held, row)
        return View(values, offsets - offsets.dtype.type(first) if first else offsets)
    if types.is_fixed_size_list(kind):
        width = kind.list_size
        values = _dense(column, kind, array.flatten(), lambda k: row_of(k // width))
        return View(values, None, width)
    return View(_dense(column, kind, array, row_of))


def _dense(column: str, kind: Any, array: Any, row_of: Callable[[int], Any]) -> Any:
    """Return values as an array `[n]`, and lists of equal size as `[n, d]`, `[n, d, e]`, ..."""
    from pyarrow import types

    _refuse_null(f"column {column!r} has a null token in", array, row_of)
    if types.is_fixed_size_list(array.type):
        width = array.type.list_size
        inner = _dense(column, kind, array.flatten(), lambda k: row_of(k // width))
        if isinstance(inner, _Bits):
            inner = inner[:]
        return inner.reshape(-1, width, *inner.shape[1:])
    if types.is_boolean(array.type):
        return _Bits(array)
    if not (types.is_integer(array.type) or types.is_floating(array.type)):
        problem = f"column {column!r} has the type {kind}"
        fail(CALLER, problem, "columns are numbers, booleans, and lists of them: tokenise texts")
    return array.to_numpy(zero_copy_only=True)


def _refuse_null(problem: str, array: Any, row_of: Callable[[int], Any]) -> None:
    if array.null_count:
        k = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        fail(CALLER, f"{problem} row {row_of(k)}", "leave such rows out, or fill them")


# --- files --------------------------------------------------------------------------------------


def map_table(path: str) -> Any:
    """Map an Arrow file or stream; buffers that are compressed are read."""
    import pyarrow as pa

    try:
        with pa.memory_map(path) as source:
            stream = source.read(6) != b"ARROW1"
            source.seek(0)
            return (pa.ipc.open_stream if stream else pa.ipc.open_file)(source).read_all()
    except (OSError, pa.ArrowException) as error:
        text = str(error).splitlines()[0].rstrip(". ")
        hint = "pass Arrow files, as pyarrow.ipc and `save_to_disk` write them, or parquet files"
        fail(CALLER, f"{path} cannot be read ({text})", hint)


def copy_columns(path: Path, columns: list[str], target: Path) -> None:
    """Write columns of a parquet file as an Arrow file, whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        # With `pre_buffer`, pyarrow would hold all row groups at once.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            check_columns(file.schema_arrow.names, {name: name for name in columns}, str(path))
            schema = pa.schema([file.schema_arrow.field(name) for name in columns])
            with pa.ipc.new_file(temporary, schema) as writer:
                for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                    writer.write_batch(batch.select(columns))
        os.replace(temporary, target)
    except pa.ArrowException as error:
        text = str(error).splitlines()[0].rstrip(". ")
        fail(CALLER, f"{path} cannot be read ({text})", "it may be damaged: write it again")
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
