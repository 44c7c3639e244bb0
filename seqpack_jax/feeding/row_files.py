"""Files of packed rows: what writes and decodes them, where, and the manifest that lists them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import fail
from seqpack_jax.feeding.manifest import canonical, digest_of
from seqpack_jax.feeding.prepared import check_outside
from seqpack_jax.feeding.storage import write_bytes
from seqpack_jax.feeding.workers import file_lock, local_path, making

__all__ = ["ExportManifest", "ExportPlace", "ExportedFile", "decode_row", "writer_of"]

FORMAT = "seqpack_jax.export"
VERSION = 1
MANIFEST = "export.json"
FEATURES = ("tokens", "segment_ids", "positions")
ROW_FORMATS = ("arrayrecord", "parquet")

Blocks: TypeAlias = Iterator[NDArray[np.int32]]  # [rows, 3, max_seq_len]


class ExportedFile(NamedTuple):
    """One file of an export.

    Attributes:
        name: inside the output directory.
        rows: how many rows it holds.
        bytes: its size.
        sha256: its checksum, in hex digits.
    """

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportManifest:
    """What `export_rows` wrote.

    Attributes:
        directory: where it is.
        parameters: what it was made with, as `export.json` says.
        max_seq_len: tokens per row.
        rows_per_epoch: rows of each epoch.
        files: in training order.
    """

    directory: Path
    parameters: dict[str, Any]
    max_seq_len: int
    rows_per_epoch: int
    files: tuple[ExportedFile, ...]

    @property
    def rows(self) -> int:
        """Rows of all epochs."""
        return sum(file.rows for file in self.files)

    @property
    def paths(self) -> list[str]:
        """The files in training order, as Grain's sources take them."""
        return [str(self.directory / file.name) for file in self.files]

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `export.json`."""
        manifest = {
            "format": FORMAT,
            "format_version": VERSION,
            "parameters": self.parameters,
            "max_seq_len": self.max_seq_len,
            "rows_per_epoch": self.rows_per_epoch,
            "rows": self.rows,
            "files": [file._asdict() for file in self.files],
        }
        return {**manifest, "digest": digest_of(manifest)}

    @classmethod
    def read(cls, directory: Path) -> ExportManifest | None:
        """Return what `export.json` says; None if it is none of this format, or was changed."""
        try:
            saved = json.loads((directory / MANIFEST).read_bytes())
            files = tuple(ExportedFile(**file) for file in saved["files"])
            parameters, rows = saved["parameters"], saved["rows_per_epoch"]
            manifest = cls(directory, parameters, saved["max_seq_len"], rows, files)
            return manifest if manifest.to_dict() == saved else None
        except (OSError, LookupError, RecursionError, TypeError, ValueError):
            return None


def decode_row(record: bytes) -> dict[str, NDArray[np.int32]]:
    """Return the row that a record of an exported ArrayRecord file holds.

    For `grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths)).map(decode_row)`.

    Time: O(max_seq_len).

    Args:
        record: int32, little-endian, `[3, max_seq_len]`.

    Returns:
        `tokens`, `segment_ids` and `positions`, int32 `[max_seq_len]`.

    Raises:
        SeqpackError: the record is not of such a size.

    Example:
        >>> row = decode_row(np.array([[7, 8, 0], [1, 1, 0], [0, 1, 0]], "<i4").tobytes())
        >>> row["tokens"].tolist(), row["segment_ids"].tolist(), row["positions"].tolist()
        ([7, 8, 0], [1, 1, 0], [0, 1, 0])
    """
    if not isinstance(record, bytes) or len(record) % 12 or not record:
        size = f" of {len(record)} bytes" if isinstance(record, bytes) else ""
        problem = f"the record is a {type(record).__name__}{size}, not the bytes of a row"
        fail("decode_row", problem, "pass records of what export_rows(..., to='arrayrecord') wrote")
    arrays = np.frombuffer(record, "<i4").reshape(len(FEATURES), -1).astype(np.int32)
    return dict(zip(FEATURES, arrays, strict=True))


def writer_of(caller: str, to: str) -> Callable[[Path, Blocks], None]:
    """Return the function that writes a file of one of the `ROW_FORMATS`.

    Its bytes depend on the blocks, and on the versions of the libraries, alone.  It raises
    `SeqpackError` if the file cannot be written.

    Raises:
        SeqpackError: the library that writes the format is not installed.
    """
    try:
        if to == "parquet":
            import pyarrow.parquet  # noqa: F401

            return partial(_write_parquet, caller)
        from array_record.python import array_record_module  # noqa: F401

        return partial(_write_array_record, caller)
    except ImportError:
        name = "pyarrow" if to == "parquet" else "array_record"
        hint = "pip install 'seqpack_jax[prepare]'" if to == "parquet" else f"pip install {name}"
        fail(caller, f"{name} is not installed", hint)


@contextlib.contextmanager
def _writing(caller: str, path: Path) -> Iterator[None]:
    """Turn what a library raises while it writes a file into the error of `caller`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises the latter
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        hint = "make room and run it again: finished files are kept"
        fail(caller, f"{path} cannot be written ({reason})", hint)


def _write_array_record(caller: str, path: Path, blocks: Blocks) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    # Grain reads single records, hence groups of one; a higher level hardly shrinks token ids.
    with _writing(caller, path):
        writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1,max_parallelism:1")
    try:
        for block in blocks:
            with _writing(caller, path):
                for row in block.astype("<i4", copy=False):
                    writer.write(row.tobytes())
    finally:
        with _writing(caller, path):
            writer.close()


def _write_parquet(caller: str, path: Path, blocks: Blocks) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    try:
        for block in blocks:
            max_seq_len = block.shape[2]
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(block[:, k].reshape(-1)), max_seq_len)
                for k in range(len(FEATURES))
            ]
            table = pa.table(dict(zip(FEATURES, columns, strict=True)))
            with _writing(caller, path):
                # No dictionaries or statistics: of tokens they are of no use, and take time.
                writer = writer or parquet.ParquetWriter(
                    path,
                    table.schema,
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=False,
                    write_statistics=False,
                )
                writer.write_table(table, row_group_size=len(block))
    finally:
        if writer is not None:
            with _writing(caller, path):
                writer.close()


class ExportPlace:
    """The output of an export, and the directory beside it in which it is made.

    `.NAME.partial/KEY` holds finished files and `KEY.records` what is known of them, where KEY
    stands for the parameters; a process that a killed run left behind writes below its own key.
    """

    def __init__(self, caller: str, output: str | os.PathLike[str]) -> None:
        self.caller = caller
        # What is behind a link is replaced, not the link.
        self.target = Path(os.path.realpath(local_path(caller, "output", output)))
        if not self.target.name:
            fail(caller, f"{self.target} cannot be replaced", "choose another output")
        check_outside(caller, self.target)
        self.work = self.target.with_name(f".{self.target.name}.partial")
        self.key = ""
        self.resumable = True

    @property
    def data(self) -> Path:
        """Where finished files are."""
        return self.work / self.key

    @property
    def records(self) -> Path:
        """Where the records of finished files are."""
        return self.work / f"{self.key}.records"

    def check_output(self, parameters: dict[str, Any], overwrite: bool) -> ExportManifest | None:
        """Return the finished export of these parameters, if it is there and shall stay.

        Raises:
            SeqpackError: something is there that must not be replaced.
        """
        try:
            names = set(os.listdir(self.target))
        except FileNotFoundError:
            return None
        except OSError as error:
            fail(self.caller, f"{self.target}: {error.strerror}", "choose another output")
        if not names:
            return None
        manifest = ExportManifest.read(self.target)
        if manifest is None:
            problem = f"{self.target} exists, and is no export (it has no {MANIFEST} of this format"
            fail(self.caller, f"{problem})", "choose another output")
        sizes = {file.name: file.bytes for file in manifest.files}
        if extra := sorted(names - {*sizes, MANIFEST}):
            problem = f"{self.target} holds {extra[0]}, which is no file of the export there"
            fail(self.caller, problem, "move it away, or choose another output")
        if overwrite:
            return None
        with making(self.caller, self.target):
            found = {name: (self.target / name).stat().st_size for name in names - {MANIFEST}}
        if manifest.parameters != parameters or found != sizes:
            self.refuse("is a finished export")
        return manifest

    def refuse(self, what: str) -> NoReturn:
        """Raise the error on an export that must not be replaced."""
        hint = "choose another output, or replace it with overwrite=True"
        fail(self.caller, f"{self.target} exists, and {what}", hint)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the work directory; remove it if nothing can go on there."""
        busy = f"another process exports to {self.target}", "wait for it, or choose another output"
        with file_lock(self.caller, self.work / "lock", busy):
            try:
                yield
            finally:
                if not self.resumable or not any(self.work.glob("*.records/*.json")):
                    self.clear()

    def clear(self) -> None:
        """Remove the work directory."""
        with contextlib.suppress(OSError):  # it was removed already, or is not ours to remove
            for path in self.work.iterdir():
                if path.name != "lock":
                    _remove(path)
            (self.work / "lock").unlink(missing_ok=True)
            self.work.rmdir()  # unless another process has just put its lock there

    def choose(self, parameters: dict[str, Any], fingerprint: Any) -> None:
        """Work below the key of these parameters, and remove what is below others.

        Without a fingerprint nobody knows whether files of earlier runs hold the same tokens.
        """
        self.resumable = fingerprint is not None
        facts = [FORMAT, VERSION, parameters, fingerprint or uuid.uuid4().hex]
        self.key = hashlib.sha256(canonical(facts).encode()).hexdigest()[:32]
        kept = {self.data.name, self.records.name, "tokens", "lock"}
        with making(self.caller, self.work):
            for path in self.work.iterdir():
                if path.name not in kept:
                    _remove(path)
            self.data.mkdir(exist_ok=True)
            self.records.mkdir(exist_ok=True)

    def publish(self, manifest: ExportManifest) -> None:
        """Turn the finished files into the output."""
        known = {file.name for file in manifest.files}
        with making(self.caller, self.target):
            for path in self.data.iterdir():
                if path.name not in known:
                    _remove(path)
            write_bytes(self.data / MANIFEST, canonical(manifest.to_dict()).encode())
            if self.target.exists():
                self.target.rename(self.work / "replaced")
            self.data.rename(self.target)
        self.clear()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
