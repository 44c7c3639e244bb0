"""Packed rows as files, in training order: for trainers that read files, and for slow storage.

    epoch-00000-00000-of-00096.parquet    the first rows of the first epoch
    epoch-00000-00001-of-00096.parquet    ...
    export.json                           parameters, and rows, bytes and checksum of each file

The names sort in training order.  Nothing depends on the machine, the time, or the workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.feeding.finding import find_files
from seqpack_jax.feeding.formats import Columns, kind_of
from seqpack_jax.feeding.inputs import Shard
from seqpack_jax.feeding.manifest import canonical
from seqpack_jax.feeding.pipeline import PackedSource
from seqpack_jax.feeding.prepared import Prepared, load_prepared
from seqpack_jax.feeding.progress import progress_bar
from seqpack_jax.feeding.row_files import (
    FEATURES,
    ROW_FORMATS,
    ExportedFile,
    ExportManifest,
    ExportPlace,
    writer_of,
)
from seqpack_jax.feeding.sequences import FlatSequences, SequenceSource
from seqpack_jax.feeding.storage import FileEntry, entry_of, write_bytes
from seqpack_jax.feeding.token_store import fingerprint_of, is_store, open_files
from seqpack_jax.feeding.workers import local_map, making
from seqpack_jax.permutation import PERMUTATION_VERSION

__all__ = ["export_rows"]

_BLOCK_BYTES = 1 << 24  # of rows that are made, and in parquet stored, together
_FILE_BYTES = 1 << 28  # of the rows of a file, before compression


def export_rows(
    prepared: Prepared | str | os.PathLike[str],
    sequences: SequenceSource | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    to: str = "arrayrecord",
    epochs: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    pad_value: int = 0,
    rows_per_file: int | None = None,
    tokens_column: str | None = None,
    id_column: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool | None = None,
) -> ExportManifest:
    """Write the packed rows of some epochs to files, in training order.

    The rows are those of `PackedSource` with the same plan, pools, sequences and arguments.  An
    export that was killed goes on when it is run again: finished files are kept, unless a parameter
    or the tokens changed.  Whether tokens changed is known of token stores, files and
    `FlatSequences`; an export of other sources (lists, objects of your own) starts anew.  Until all
    is done it is in a directory `.NAME.partial` beside the output.  If the same export is there
    already, and its first file comes out the same again, it is returned.

    ArrayRecord is read at random, one record per row, each decoded by `decode_row`:

        source = grain.sources.ArrayRecordDataSource(manifest.paths)
        dataset = grain.MapDataset.source(source).map(sp.decode_row)

    Parquet has the columns `tokens`, `segment_ids` and `positions`, lists of `max_seq_len` int32.
    Grain reads it in order, file by file:

        files = [grain.experimental.ParquetIterDataset(path) for path in manifest.paths]
        dataset = grain.experimental.InterleaveIterDataset(files, cycle_length=1)

    Time: O(epochs * rows * max_seq_len).  Memory: about 250 MB per worker.

    Args:
        prepared: from `load_prepared` or `prepare`, or the path of a prepared directory.
        sequences: where the tokens are: anything whose `[id]` is a 1-D array of integers, or paths
            for `open_sequences`.  They must have the lengths that were prepared, so the extra
            tokens of `prepare(..., extra_tokens=)` too.  Files that are found by row number have to
            be those that were prepared, by names and rows.
        output: the directory to be made.
        to: `"arrayrecord"` or `"parquet"`.
        epochs: how often each sequence comes.
        seed: as in `PackedSource`.
        shuffle: as in `PackedSource`.
        pad_value: the token on padding.
        rows_per_file: None for about 256 MB, before compression.
        tokens_column: of parquet files in `sequences`; None for that of the preparation.
        id_column: the same for the ids.
        work_dir: where `open_sequences` keeps the tokens of parquet or FASTA files; None to remove
            them at the end.
        workers: processes that write.  They are sent `sequences`, unless those are memory-mapped.
        overwrite: whether an earlier export at `output` may be replaced, if nothing else is in it.
        progress: whether to show a progress bar; None to do so on a terminal.

    Returns:
        An `ExportManifest`, which is also written to `export.json`.

    Raises:
        SeqpackError: an argument is out of range, a library is missing, `output` holds something
            else or cannot be made, another process writes there, the files of `sequences` are not
            those that were prepared, or a sequence is missing or not of its planned length.

    Example:
        >>> import tempfile
        >>> from seqpack_jax.feeding.preparation import prepare
        >>> sequences = [np.arange(1, n + 1) for n in (7, 5, 5, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     prepared = prepare(f"{folder}/lengths.npy", f"{folder}/prepared", 10)
        ...     rows = export_rows(prepared, sequences, f"{folder}/rows", to="parquet", epochs=2)
        >>> [(file.name, file.rows) for file in rows.files]
        [('epoch-00000-00000-of-00001.parquet', 2), ('epoch-00001-00000-of-00001.parquet', 2)]
    """
    caller = "export_rows"
    check_choice(caller, "to", to, ROW_FORMATS)
    for name, value in (("epochs", epochs), ("workers", workers), ("rows_per_file", rows_per_file)):
        if value is not None:
            check_int(caller, name, value, 1)
    seed = check_int(caller, "seed", seed)
    pad_value = check_int(caller, "pad_value", pad_value, -(2**31), 2**31 - 1)
    writer_of(caller, to)  # a missing library is told before any work is done
    if isinstance(prepared, str | os.PathLike):
        prepared = load_prepared(prepared)
    if not isinstance(prepared, Prepared):
        problem = f"prepared is a {type(prepared).__name__}"
        fail(caller, problem, "pass what load_prepared returns, or the path of what prepare wrote")
    plan, max_seq_len = prepared.plan, prepared.plan.max_seq_len
    if rows_per_file is None:
        rows_per_file = _power_of_two(_FILE_BYTES, max_seq_len)
    parameters = {
        "prepared": prepared.manifest.get("digest") or plan.digest(),
        "to": to,
        "epochs": int(epochs),
        "seed": seed,
        "shuffle": bool(shuffle),
        "pad_value": pad_value,
        "rows_per_file": int(rows_per_file),
        "permutation": PERMUTATION_VERSION,
    }
    place, tokens = ExportPlace(caller, output), cast(Any, sequences)
    place.check_output(parameters, overwrite)
    with place.locked():
        there = place.check_output(parameters, overwrite)  # another process may have finished it
        if _are_paths(tokens):
            columns = _columns_of(prepared, tokens, tokens_column, id_column)
            store = place.work / "tokens" if work_dir is None else work_dir
            tokens = _open(tokens, prepared, columns, store)
        source = None
        if plan.num_bins:
            source = PackedSource(
                plan,
                prepared.pools,
                tokens,
                seed=seed,
                epochs=epochs,
                batch_size=min(_power_of_two(_BLOCK_BYTES, max_seq_len), 1024, rows_per_file),
                shuffle=shuffle,
                pad_value=pad_value,
            )
        tasks = _tasks(plan.num_bins, rows_per_file, parameters)
        if there is not None:
            _check_same(_Job(source, to, place), tasks, there)
            place.clear()
            return there
        place.choose(parameters, fingerprint_of(tokens))
        files = _write_all(_Job(source, to, place), tasks, workers, progress)
        manifest = ExportManifest(place.target, parameters, max_seq_len, plan.num_bins, files)
        place.publish(manifest)
    return manifest


# Opening files of tokens.


def _are_paths(sequences: Any) -> bool:
    if isinstance(sequences, list | tuple) and sequences:
        return all(isinstance(each, str | os.PathLike) for each in sequences)
    return isinstance(sequences, str | os.PathLike)


def _columns_of(
    prepared: Prepared, sequences: Any, tokens_column: str | None, id_column: str | None
) -> Columns:
    """Return the columns of the preparation, unless others are given."""
    known = prepared.manifest.get("parameters", {})
    if is_store(sequences):
        return Columns(tokens=tokens_column, id=id_column)
    if extra := known.get("extra_tokens", 0):
        fail(
            "export_rows",
            f"the data set was prepared with {extra} extra tokens, which no file has",
            "pass sequences that have them: an object whose [id] adds them, or a token store",
        )
    tokens_column = tokens_column or known.get("tokens_column")
    if tokens_column is None:
        first = find_files("export_rows", sequences)[0]
        if kind_of(first.path) == "parquet":
            problem = f"no tokens column is given, and {first.name} is a parquet file"
            fail("export_rows", problem, "name the column of its tokens, tokens_column")
    return Columns(tokens=tokens_column, id=id_column or known.get("id_column"))


def _open(
    sequences: Any, prepared: Prepared, columns: Columns, work_dir: str | os.PathLike[str]
) -> SequenceSource:
    """Open the tokens; if they are found by row number, they have to be what was prepared."""
    caller, manifest = "export_rows", prepared.manifest
    by_number = columns.id is None and manifest.get("parameters", {}).get("id_column") is None
    expected = [part for shard in manifest.get("shards", []) for part in shard["input"]]
    hint = "pass the paths that were prepared, or, if the rows are the same, what open_sequences "
    hint += "returns"

    def check(shards: Sequence[Shard]) -> None:
        found = [[part.name, part.first_row, part.rows] for s in shards for part in s.parts]
        if not by_number or "shards" not in manifest:
            return
        one, two = _rows_by_name(expected), _rows_by_name(found)
        kinds = {kind_of(name) for name in (*one, *two)}
        if len(kinds) > 1:  # lengths were prepared, of another format
            one, two = {"all files": sum(one.values())}, {"all files": sum(two.values())}
        for name in sorted(one.keys() | two.keys()):
            if one.get(name) != two.get(name):
                rows = [f"{each[name]} rows" if name in each else "none" for each in (one, two)]
                problem = f"of {name}, {rows[0]} were prepared, but the sequences have {rows[1]}"
                fail(caller, problem, hint)

    opened = open_files(caller, sequences, columns, work_dir, check)
    rows = manifest.get("rows")
    flat = isinstance(opened, FlatSequences) and by_number
    if is_store(sequences) and flat and rows is not None and len(opened) != rows:
        problem = f"{rows} sequences were prepared, but the token store has {len(opened)}"
        fail(caller, problem, "pass the token store of the data set that was prepared")
    return opened


def _rows_by_name(parts: Sequence[Sequence[Any]]) -> dict[str, int]:
    """Return how many rows each file has."""
    rows: dict[str, int] = {}
    for name, _, count in parts:
        rows[name] = rows.get(name, 0) + count
    return rows


def _power_of_two(size: int, max_seq_len: int) -> int:
    """Return how many rows of `max_seq_len` tokens take about `size` bytes."""
    rows = size // (np.dtype(np.int32).itemsize * len(FEATURES) * max_seq_len)
    return 1 << max(0, rows.bit_length() - 1)


# Writing.


class _Job(NamedTuple):
    source: PackedSource | None  # an item is a block of rows; None if there are none
    to: str
    place: ExportPlace


class _Task(NamedTuple):
    """Rows of one epoch that make one file."""

    name: str
    epoch: int
    first_row: int
    rows: int


def _tasks(bins: int, rows_per_file: int, parameters: dict[str, Any]) -> list[_Task]:
    count = -(-bins // rows_per_file)
    width = max(5, len(str(count)))
    return [
        _Task(
            f"epoch-{epoch:05d}-{number:0{width}d}-of-{count:0{width}d}.{parameters['to']}",
            epoch,
            number * rows_per_file,
            min(rows_per_file, bins - number * rows_per_file),
        )
        for epoch in range(parameters["epochs"])
        for number in range(count)
    ]


def _write_all(
    job: _Job, tasks: list[_Task], workers: int, progress: bool | None
) -> tuple[ExportedFile, ...]:
    files = {}
    write: Any = partial(_write_file, job)
    rows = sum(task.rows for task in tasks)
    with progress_bar("exporting rows", rows, progress) as advance:
        for file in local_map(workers)(write, tasks):
            files[file.name] = file
            advance(file.rows)
    return tuple(files[task.name] for task in tasks)


def _check_same(job: _Job, tasks: list[_Task], there: ExportManifest) -> None:
    """Make the first file again: a finished export of other tokens is not what was asked for."""
    place = job.place
    for task, file in zip(tasks[:1], there.files, strict=False):
        scratch = place.work / f"{task.name}.tmp"
        try:
            writer_of(place.caller, job.to)(scratch, _blocks(job.source, task))
            entry = entry_of(place.caller, scratch)
        finally:
            scratch.unlink(missing_ok=True)
        if entry != FileEntry(file.bytes, file.sha256):
            place.refuse("is a finished export, of other tokens or by other versions of libraries")


def _write_file(job: _Job, task: _Task) -> ExportedFile:
    """Write a file, unless an earlier run did."""
    place = job.place
    path, record = place.data / task.name, place.records / f"{task.name}.json"
    try:
        known = ExportedFile(**json.loads(record.read_text()))
        if entry_of(place.caller, path) == FileEntry(known.bytes, known.sha256):
            return known
    except (OSError, TypeError, ValueError):  # there is none, or it is damaged
        pass
    # Half-written files lie where no published directory can hold them.
    scratch = place.records / f"{task.name}.{os.getpid()}.tmp"
    try:
        writer_of(place.caller, job.to)(scratch, _blocks(job.source, task))
        entry = entry_of(place.caller, scratch)
        file = ExportedFile(task.name, task.rows, entry.bytes, entry.sha256)
        with making(place.caller, path):
            os.replace(scratch, path)
            write_bytes(record, canonical(file._asdict()).encode())
    finally:
        scratch.unlink(missing_ok=True)
    return file


def _blocks(source: PackedSource | None, task: _Task) -> Iterator[NDArray[np.int32]]:
    """Make the rows of a task in order: int32 `[rows, 3, max_seq_len]`."""
    if source is None:
        return
    size = source.batch_size or 1
    stop = task.first_row + task.rows
    for item in range(task.first_row // size, -(-stop // size)):
        batch = source[task.epoch * source.steps_per_epoch + item]
        begin = item * size
        rows = slice(max(task.first_row - begin, 0), stop - begin)
        yield np.stack([batch[name][rows] for name in FEATURES], axis=1)
