"""Packed rows as files, in training order: for trainers that read files, and for slow storage.

    epoch-00000-00000-of-00096.parquet    the first rows of the first epoch
    epoch-00000-00001-of-00096.parquet    ...
    export.json                           parameters, and rows, bytes and checksum of each file

The names sort in training order.  Nothing depends on the machine, the time, or the workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.feeding.manifest import canonical
from seqpack_jax.feeding.pipeline import PackedSource
from seqpack_jax.feeding.workers import local_map
from seqpack_jax.feeding.prepared import Prepared, load_prepared
from seqpack_jax.feeding.progress import progress_bar
from seqpack_jax.feeding.row_files import (
    FEATURES,
    FORMAT,
    MANIFEST,
    ROW_FORMATS,
    VERSION,
    ExportedFile,
    ExportManifest,
    writer_of,
)
from seqpack_jax.feeding.sequences import SequenceSource
from seqpack_jax.feeding.storage import FileEntry, entry_of, write_bytes
from seqpack_jax.feeding.token_store import fingerprint_of, is_store, open_sequences
from seqpack_jax.permutation import PERMUTATION_VERSION

__all__ = ["export_rows"]

_BLOCK_BYTES = 1 << 24  # of rows that are made, and in parquet stored, together
_FILE_BYTES = 1 << 28  # of the rows of a file, before compression


def export_rows(
    prepared: Prepared | str | os.PathLike[str],
    sequences: SequenceSource | str | os.PathLike[str],
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
    or the input changed.  Until then all is in a directory `.NAME.partial` beside the output.

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
        sequences: where the tokens are: anything whose `[id]` is a 1-D array of integers, or a path
            for `open_sequences`.  They must have the lengths that were prepared, so the extra
            tokens of `prepare(..., extra_tokens=)` too.
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
        overwrite: whether an earlier export at `output` may be replaced.
        progress: whether to show a progress bar; None to do so on a terminal.

    Returns:
        An `ExportManifest`, which is also written to `export.json`.

    Raises:
        SeqpackError: an argument is out of range, a library is missing, `output` exists, another
            process writes there, or a sequence is missing or not of its planned length.

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
    check_int(caller, "seed", seed)
    writer_of(caller, to)  # a missing library is told before any work is done
    if isinstance(prepared, str | os.PathLike):
        prepared = load_prepared(prepared)
    place = _Place(caller, output)
    with place.locked(overwrite):
        if isinstance(sequences, str | os.PathLike):
            store = place.work / "tokens" if work_dir is None else Path(work_dir)
            sequences = _open(sequences, prepared, tokens_column, id_column, store)
        max_seq_len = prepared.plan.max_seq_len
        if rows_per_file is None:
            rows_per_file = _power_of_two(_FILE_BYTES, max_seq_len)
        source = PackedSource(
            prepared.plan,
            prepared.pools,
            sequences,
            seed=seed,
            epochs=epochs,
            batch_size=min(_power_of_two(_BLOCK_BYTES, max_seq_len), 1024, rows_per_file),
            shuffle=shuffle,
            pad_value=pad_value,
        )
        parameters = {
            "prepared": prepared.manifest.get("digest") or prepared.plan.digest(),
            "to": to,
            "epochs": source.epochs,
            "seed": source.seed,
            "shuffle": source.shuffle,
            "pad_value": source.pad_value,
            "rows_per_file": int(rows_per_file),
            "permutation": PERMUTATION_VERSION,
        }
        place.choose(parameters, fingerprint_of(sequences))
        files = _write_all(_Job(source, to, place), rows_per_file, workers, progress)
        bins = prepared.plan.num_bins
        manifest = ExportManifest(place.target, parameters, max_seq_len, bins, files)
        place.publish(manifest)
    return manifest


def _open(
    path: str | os.PathLike[str],
    prepared: Prepared,
    tokens_column: str | None,
    id_column: str | None,
    work_dir: Path,
) -> SequenceSource:
    """Open the tokens by the columns of the preparation, unless others are given."""
    if not is_store(path):
        known = prepared.manifest.get("parameters", {})
        tokens_column = tokens_column or known.get("tokens_column")
        id_column = id_column or known.get("id_column")
    return open_sequences(path, tokens_column=tokens_column, id_column=id_column, work_dir=work_dir)


def _power_of_two(size: int, max_seq_len: int) -> int:
    """Return how many rows of `max_seq_len` tokens take about `size` bytes."""
    rows = size // (np.dtype(np.int32).itemsize * len(FEATURES) * max_seq_len)
    return 1 << max(0, rows.bit_length() - 1)


# Where an export lies while it is made.


class _Place:
    """The output, and the directory beside it in which it is made.

    `.NAME.partial/KEY` holds finished files and `KEY.records` what is known of them, where KEY
    stands for the parameters; a process that a killed run left behind writes below its own key.
    """

    def __init__(self, caller: str, output: str | os.PathLike[str]) -> None:
        if "://" in os.fspath(output):
            problem = f"the output {output} is no local path"
            fail(caller, problem, "write to a local or mounted directory, and copy it")
        self.caller = caller
        self.target = Path(os.path.abspath(output))
        self.work = self.target.with_name(f".{self.target.name}.partial")
        self.key = ""

    @property
    def data(self) -> Path:
        return self.work / self.key

    @property
    def records(self) -> Path:
        return self.work / f"{self.key}.records"

    def _check_output(self, overwrite: bool) -> None:
        """Raise unless the output may be made, or replaced."""
        try:
            names = os.listdir(self.target)
        except FileNotFoundError:
            return
        except OSError as error:
            fail(self.caller, f"{self.target}: {error.strerror}", "choose another output")
        if names and MANIFEST not in names:
            problem = f"{self.target} exists, and is no export (it has no {MANIFEST})"
            fail(self.caller, problem, "choose another output")
        if names and not overwrite:
            fail(
                self.caller,
                f"{self.target} exists, and is a finished export",
                "choose another output, or replace it with overwrite=True",
            )

    @contextlib.contextmanager
    def locked(self, overwrite: bool) -> Iterator[None]:
        """Keep other processes out of the work directory."""
        self._check_output(overwrite)
        try:
            from filelock import FileLock, Timeout
        except ImportError:
            fail(self.caller, "filelock is not installed", "pip install 'seqpack_jax[prepare]'")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{self.work} cannot be made ({error.strerror})"
            fail(self.caller, problem, "choose another output")
        lock = FileLock(self.work / "lock", timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):  # it just finished, and removed the directory
            fail(
                self.caller,
                f"another process exports to {self.target}",
                "wait for it, or choose another output",
            )
        try:
            self._check_output(overwrite)  # the other process may have been about to finish
            yield
        finally:
            with contextlib.suppress(OSError):  # unless there is something to go on from
                (self.work / "lock").unlink()
                self.work.rmdir()
            lock.release()

    def choose(self, parameters: dict[str, Any], fingerprint: Any) -> None:
        """Work below the key of these parameters, and remove what is below others."""
        facts = [FORMAT, VERSION, parameters, fingerprint]
        self.key = hashlib.sha256(canonical(facts).encode()).hexdigest()[:32]
        kept = {self.data.name, self.records.name, "tokens", "lock"}
        for path in self.work.iterdir():
            if path.name not in kept:
                _remove(path)
        self.data.mkdir(exist_ok=True)
        self.records.mkdir(exist_ok=True)

    def publish(self, manifest: ExportManifest) -> None:
        """Turn the finished files into the output."""
        known = {file.name for file in manifest.files}
        for path in self.data.iterdir():
            if path.name not in known:
                _remove(path)
        write_bytes(self.data / MANIFEST, canonical(manifest.to_dict()).encode())
        if self.target.exists():
            self.target.rename(self.work / "replaced")
        self.data.rename(self.target)
        shutil.rmtree(self.work)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


# Writing.


class _Job(NamedTuple):
    source: PackedSource  # an item is a block of rows
    to: str
    place: _Place


class _Task(NamedTuple):
    """Rows of one epoch that make one file."""

    name: str
    epoch: int
    first_row: int
    rows: int


def _write_all(
    job: _Job, rows_per_file: int, workers: int, progress: bool | None
) -> tuple[ExportedFile, ...]:
    source = job.source
    bins = source.plan.num_bins
    count = -(-bins // rows_per_file)
    width = max(5, len(str(count)))
    tasks: list[Any] = [
        _Task(
            f"epoch-{epoch:05d}-{number:0{width}d}-of-{count:0{width}d}.{job.to}",
            epoch,
            number * rows_per_file,
            min(rows_per_file, bins - number * rows_per_file),
        )
        for epoch in range(source.epochs)
        for number in range(count)
    ]
    files = {}
    with progress_bar("exporting rows", bins * source.epochs, progress) as advance:
        for file in local_map(workers)(partial(_write_file, job), tasks):
            files[file.name] = file
            advance(file.rows)
    return tuple(files[task.name] for task in tasks)


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
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    file = ExportedFile(task.name, task.rows, entry.bytes, entry.sha256)
    write_bytes(record, canonical(file._asdict()).encode())
    return file


def _blocks(source: PackedSource, task: _Task) -> Iterator[NDArray[np.int32]]:
    """Make the rows of a task in order: int32 `[rows, 3, max_seq_len]`."""
    size = source.batch_size or 1
    stop = task.first_row + task.rows
    for item in range(task.first_row // size, -(-stop // size)):
        batch = source[task.epoch * source.steps_per_epoch + item]
        begin = item * size
        rows = slice(max(task.first_row - begin, 0), stop - begin)
        yield np.stack([batch[name][rows] for name in FEATURES], axis=1)
