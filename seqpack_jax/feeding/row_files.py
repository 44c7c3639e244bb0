"""Files of packed rows: what writes and decodes them, and the manifest that lists them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import fail
from seqpack_jax.feeding.manifest import digest_of

__all__ = ["ExportManifest", "ExportedFile", "decode_row", "writer_of"]

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

    Its bytes depend on the blocks, and on the versions of the libraries, alone.

    Raises:
        SeqpackError: the library that writes the format is not installed.
    """
    try:
        if to == "parquet":
            import pyarrow.parquet  # noqa: F401

            return _write_parquet
        from array_record.python import array_record_module  # noqa: F401

        return _write_array_record
    except ImportError:
        name = "pyarrow" if to == "parquet" else "array_record"
        hint = "pip install 'seqpack_jax[prepare]'" if to == "parquet" else f"pip install {name}"
        fail(caller, f"{name} is not installed", hint)


def _write_array_record(path: Path, blocks: Blocks) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    # Grain reads single records, hence groups of one; a higher level hardly shrinks token ids.
    writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1,max_parallelism:1")
    try:
        for block in blocks:
            for row in block.astype("<i4", copy=False):
                writer.write(row.tobytes())
    finally:
        writer.close()


def _write_parquet(path: Path, blocks: Blocks) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with contextlib.ExitStack() as stack:
        writer = None
        for block in blocks:
            max_seq_len = block.shape[2]
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(block[:, k].reshape(-1)), max_seq_len)
                for k in range(len(FEATURES))
            ]
            table = pa.table(dict(zip(FEATURES, columns, strict=True)))
            if writer is None:
                # No dictionaries or statistics: of tokens they are of no use, and take time.
                writer = stack.enter_context(
                    parquet.ParquetWriter(
                        path,
                        table.schema,
                        compression="zstd",
                        compression_level=1,
                        use_dictionary=False,
                        write_statistics=False,
                    )
                )
            writer.write_table(table, row_group_size=len(block))
