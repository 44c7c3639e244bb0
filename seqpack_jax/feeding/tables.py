"""Sequences in columns of lists: Arrow tables and files, and Hugging Face data sets."""

from __future__ import annotations

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import add, getitem
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import fail
from seqpack_jax.feeding.formats import Columns
from seqpack_jax.feeding.list_columns import (
    CALLER,
    Names,
    View,
    check_columns,
    copy_columns,
    list_sizes,
    map_table,
    names_of,
    record_at,
    views_of,
)
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.feeding.token_files import kept_file, list_files
from seqpack_jax.feeding.token_store import KeyedSequences, open_files
from seqpack_jax.feeding.upstream import places_of

__all__ = ["DatasetSequences", "TableSequences", "open_table"]

_PARQUET = (".parquet", ".pq")
_BLOCK_ROWS = 1 << 16  # rows of a Hugging Face data set whose lengths are read at once

Int64 = NDArray[np.int64]


def open_table(
    source: Any, columns: Names, *, work_dir: str | os.PathLike[str] | None = None
) -> TableSequences | DatasetSequences | FlatSequences | KeyedSequences:
    """Open columns of lists as sequences, one per row, without a copy where there can be none.

    Lists (`list`, `large_list` or `fixed_size_list`) become arrays of the dtype of their column,
    lists of `fixed_size_list[d]` arrays `[T, d]`, plain columns scalars; numbers and booleans all.

    Time: O(batches of the table).  Parquet, which cannot be mapped, is written once as an Arrow
    file into `work_dir`, or as a token store for one column (see `open_sequences`), in bounded
    memory, and found there again as long as it is unchanged.

    Args:
        source: a `pyarrow.Table`, a record batch or a list of them, or another table with the Arrow
            interface; an Arrow file (IPC file or stream; mapped unless it is compressed) or a
            parquet file, a glob, or a list of files, all of one kind; or a `datasets.Dataset`.
        columns: one column, for arrays; several, for dicts; or `{feature: column}`, for dicts with
            other names.  The first is a column of lists, whose sizes are the lengths.
        work_dir: where the copy of parquet files is kept.

    Returns:
        Sequences with `len()`, `[id]` for the number of the row, `__getitems__` and `lengths`.
        Files and data sets on disk are pickled by path; tables in memory with their data.

    Raises:
        SeqpackError: a file or a column is missing or of a wrong type, or a row is null.

    Example:
        >>> import pyarrow as pa
        >>> table = pa.table({"tokens": [[7, 8], [9]], "mask": [[True, False], [True]]})
        >>> sequences = open_table(table, ["tokens", "mask"])
        >>> sequences.lengths.tolist(), sequences[0]["mask"].tolist()
        ([2, 1], [True, False])
    """
    try:
        import pyarrow as pa
    except ImportError:
        fail(CALLER, "pyarrow is not installed", "pip install 'seqpack_jax[prepare]'")
    names = names_of(columns)
    if hasattr(source, "with_format") and hasattr(source, "select_columns"):
        return DatasetSequences(source, columns)
    if isinstance(source, pa.RecordBatch):
        source = [source]
    if isinstance(source, Sequence) and source and isinstance(source[0], pa.RecordBatch):
        source = pa.Table.from_batches(source)
    if hasattr(source, "__arrow_c_stream__"):
        return TableSequences(source if isinstance(source, pa.Table) else pa.table(source), columns)
    files = list_files(CALLER, source)
    parquet = [file for file in files if file.suffix in _PARQUET]
    if not parquet:
        return TableSequences(files, columns)
    if len(parquet) < len(files):
        other = next(file for file in files if file not in parquet)
        fail(CALLER, f"{parquet[0]} and {other} are of different kinds", "pass files of one kind")
    if work_dir is None:
        hint = "pass work_dir=..., where a copy of its columns is kept that can be"
        fail(CALLER, f"the parquet file {parquet[0]} cannot be mapped", hint)
    if isinstance(columns, str):
        paths = [str(file) for file in files]
        return open_files(CALLER, paths, Columns(tokens=columns), work_dir)
    wanted = list(dict.fromkeys(names.values()))
    copies = [
        kept_file(
            CALLER, work_dir, file, "table", ".arrow", wanted, partial(copy_columns, file, wanted)
        )
        for file in files
    ]
    return TableSequences(copies, columns)


class TableSequences:
    """The rows of an Arrow table as sequences: views of its buffers.

    Made by `open_table`, which says what columns are allowed.

    Time: O(log batches) to find a row.

    Args:
        origin: a `pyarrow.Table`, or paths of Arrow files.
        columns: as for `open_table`.

    Example:
        >>> import pyarrow as pa
        >>> sequences = open_table(pa.table({"ids": [[7, 8], [9]]}), {"tokens": "ids"})
        >>> [record["tokens"].tolist() for record in sequences.__getitems__([1, 0])]
        [[9], [7, 8]]
    """

    def __init__(self, origin: Any, columns: Names) -> None:
        self.columns = columns if isinstance(columns, str | Mapping) else tuple(columns)
        self._files: list[tuple[str, int, int]] = []  # path, size, time of change
        if isinstance(origin, list):
            states = [(os.path.abspath(path), path.stat()) for path in origin]
            self._files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
        self._table = None if self._files else origin
        self._set_views()

    def _set_views(self) -> None:
        names = names_of(self.columns)
        tables: Iterable[tuple[str, Any]] = [("the table", self._table)]
        if self._files:
            tables = ((name, map_table(name)) for name, *_ in self._files)
        self._views: list[dict[str, View]] = []
        starts = [0]
        for what, table in tables:
            check_columns(table.column_names, names, what)
            for batch in table.select(list(dict.fromkeys(names.values()))).to_batches():
                if batch.num_rows:
                    self._views.append(views_of(batch, names, partial(add, starts[-1])))
                    starts.append(starts[-1] + batch.num_rows)
        self._starts = starts
        self._lead = next(iter(names))

    @property
    def lengths(self) -> Int64:
        """int64 `[n]`: entries of the first column.  Time: O(n), without reading what is in it."""
        sizes = [np.zeros(0, np.int64)]
        rows = np.diff(self._starts).tolist()
        sizes += [view[self._lead].sizes(n) for view, n in zip(self._views, rows, strict=True)]
        return np.concatenate(sizes)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        """Return a row: an array, or a dict of arrays and scalars."""
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Return the rows of these ids, in their order."""
        found = []
        for place in places_of("TableSequences", ids, len(self)).tolist():
            batch = bisect_right(self._starts, place) - 1
            found.append(record_at(self._views[batch], place - self._starts[batch], self.columns))
        return found

    def __getstate__(self) -> dict[str, Any]:
        files = zlib.compress(json.dumps(self._files).encode())
        return {"columns": self.columns, "table": self._table, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.columns, self._table = state["columns"], state["table"]
        self._files = [tuple(file) for file in json.loads(zlib.decompress(state["files"]))]
        for name, size, changed in self._files:
            now = os.stat(name)
            if (now.st_size, now.st_mtime_ns) != (size, changed):
                fail(CALLER, f"{name} was changed since it was opened", "open it again")
        self._set_views()

    def __repr__(self) -> str:
        return f"TableSequences({len(self)} rows, columns={self.columns!r})"


class DatasetSequences:
    """The rows of a Hugging Face `datasets.Dataset`, also of one that was shuffled or selected.

    Made by `open_table`.  Reads through the data set's own Arrow format, many rows in one call; the
    data set is pickled as it pickles itself, by path where it is on disk.

    Args:
        dataset: a `datasets.Dataset`, or what has its `select_columns`, `with_format`, `len()` and
            `[ids]`.
        columns: as for `open_table`.

    Example:
        >>> import pyarrow as pa
        >>> class Dataset:  # stands for datasets.Dataset
        ...     table, column_names = pa.table({"tokens": [[7, 8], [9]]}), ["tokens"]
        ...     select_columns = with_format = lambda self, _: self
        ...     __len__ = lambda self: 2
        ...     def __getitem__(self, ids):
        ...         return self.table[ids] if isinstance(ids, slice) else self.table.take(ids)
        >>> sequences = open_table(Dataset(), "tokens")
        >>> sequences.lengths.tolist(), sequences[1].tolist()
        ([2, 1], [9])
    """

    def __init__(self, dataset: Any, columns: Names) -> None:
        self.columns = columns if isinstance(columns, str | Mapping) else tuple(columns)
        names = names_of(columns)
        if not isinstance(dataset.column_names, list) or not hasattr(dataset, "__len__"):
            problem = f"a {type(dataset).__name__} is no datasets.Dataset of known length"
            fail(CALLER, problem, "name a split of a DatasetDict; PackIterDataset takes streams")
        check_columns(dataset.column_names, names)
        wanted = list(dict.fromkeys(names.values()))
        self._rows = dataset.select_columns(wanted).with_format("arrow")
        self._lengths: Int64 | None = None

    @property
    def lengths(self) -> Int64:
        """int64 `[n]`: entries of the first column.  Time: O(n); of a shuffled one, it is read."""
        if self._lengths is None:
            column = next(iter(names_of(self.columns).values()))
            rows = self._rows.select_columns([column])
            found = [np.zeros(0, np.int64)]
            for start in range(0, len(self), _BLOCK_ROWS):
                table = rows[start : start + _BLOCK_ROWS]
                found.append(list_sizes(column, table.column(column), partial(add, start)))
            self._lengths = np.concatenate(found)
        return self._lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        """Return a row: an array, or a dict of arrays and scalars."""
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Return the rows of these ids, in their order, read in the order of storage."""
        places = places_of("DatasetSequences", ids, len(self))
        rising, order = np.unique(places, return_inverse=True)
        # One chunk of all rows: looking into many of one row each takes longer than this copy.
        table, names = self._rows[rising.tolist()].combine_chunks(), names_of(self.columns)
        read: list[Any] = []
        for batch in table.to_batches():
            if batch.num_rows:
                views = views_of(batch, names, partial(getitem, rising[len(read) :]))
                read += [record_at(views, k, self.columns) for k in range(batch.num_rows)]
        return [read[k] for k in order.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lengths": None}  # who reads needs no lengths

    def __repr__(self) -> str:
        return f"DatasetSequences({len(self)} rows, columns={self.columns!r})"
