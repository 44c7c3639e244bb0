"""One shard of an input: its lengths in, its ids grouped by length out, in bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import MAX_LENGTH, OVER_LENGTH_HINT, fail
from seqpack_jax.feeding.inputs import Shard, read_shard
from seqpack_jax.feeding.manifest import (
    POOLS,
    VERSION,
    IdCoding,
    PreparationParameters,
    ShardEntry,
    canonical,
    pool_file,
)
from seqpack_jax.feeding.storage import (
    INT64,
    FileEntry,
    RowsFile,
    entry_of,
    write_array,
    write_bytes,
    writing,
)
from seqpack_jax.planning.over_length import OverLengthReport, apply_to_lengths

__all__ = ["ShardRecord", "WorkDirectory", "prepare_shard", "shard_key"]

_CALLER = "prepare"
_BLOCK = 1 << 19  # lengths that are sorted at once: the work arrays stay in the cache
_LARGEST_BLOCK = 1 << 22  # where there are many lengths, of which each block needs counts
_PIECES = 1 << 20  # about as many are cut at once

Int64 = NDArray[np.int64]


class ShardRecord(NamedTuple):
    """What `prepare_shard` hands to `merge_shards`: a few hundred bytes.

    Attributes:
        number: that of the shard.
        key: a text that differs when its input or the parameters do.
        entry: what the manifest will say of it.
        files: of the arrays that were written, by name.
    """

    number: int
    key: str
    entry: ShardEntry
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        """Return the text that a work directory keeps of the shard."""
        files = {name: entry._asdict() for name, entry in self.files.items()}
        return canonical({**self._asdict(), "entry": self.entry.to_dict(), "files": files})

    @classmethod
    def from_json(cls, action: str, text: str) -> ShardRecord:
        """Return what `to_json` returned.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the text is another.
        """
        saved = json.loads(text)
        files = {name: FileEntry(**entry) for name, entry in saved["files"].items()}
        entry = ShardEntry.from_dict(action, saved["entry"])
        return cls(saved["number"], saved["key"], entry, files)


class WorkDirectory(NamedTuple):
    """Where things are while a data set is prepared."""

    root: Path

    @property
    def data(self) -> Path:
        """What becomes the prepared directory."""
        return self.root / "data"

    @property
    def records(self) -> Path:
        """A file for each finished shard."""
        return self.root / "records"

    @property
    def lengths(self) -> Path:
        """A file for each FASTA file that was counted."""
        return self.root / "lengths"

    @property
    def lock(self) -> Path:
        """What a run holds while it works here."""
        return self.root / "lock"

    def record(self, number: int) -> Path:
        """The file that stands for a finished shard."""
        return self.records / f"{number:05d}.json"


def prepare_shard(
    shard: Shard, parameters: PreparationParameters, directory: str | os.PathLike[str]
) -> ShardRecord:
    """Prepare one shard: read its lengths, and write its ids grouped by length.

    For engines of your own: call it for every shard of `list_shards`, anywhere, in any order, and
    hand the records to `merge_shards`.  A shard that was finished before, of the same input and
    with the same parameters, is kept as it is.

    Time: O(rows of the shard + pieces).  Memory: about 10 bytes per row, 20 with an id column, and
    10 per piece; 0.5 GB for 16 million rows that are cut into two pieces each.

    Args:
        shard: from `list_shards`.
        parameters: those of `prepare`.
        directory: where to work: the same for all shards, on storage that `merge_shards` sees.

    Returns:
        A `ShardRecord`.

    Raises:
        SeqpackError: a length is null, below 1 or over `max_seq_len` without a policy; the message
            names the row and the file.

    Example:
        >>> import tempfile
        >>> from seqpack_jax.feeding.inputs import list_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     parameters = PreparationParameters(max_seq_len=10)
        ...     shards = list_shards(folder)
        ...     record = prepare_shard(shards[0], parameters, f"{folder}/work")
        ...     np.load(f"{folder}/work/data/pools/00000.ids.npy").tolist()
        [3, 1, 2, 0]
    """
    parameters = parameters.checked(_CALLER)
    work = WorkDirectory(Path(directory))
    key = shard_key(shard, parameters)
    if (kept := _finished(work, shard.number, key, parameters)) is not None:
        return kept
    # Input is read inside, but what cannot be read is a SeqpackError already.
    with writing(_CALLER, work.root):
        for folder in (work.data / POOLS, work.records):
            folder.mkdir(parents=True, exist_ok=True)
        entry, files = _write(shard, parameters, work)
        record = ShardRecord(shard.number, key, entry, files)
        # Last: what it stands for is complete then.
        write_bytes(work.record(shard.number), record.to_json().encode())
    return record


def _write(
    shard: Shard, parameters: PreparationParameters, work: WorkDirectory
) -> tuple[ShardEntry, dict[str, FileEntry]]:
    """Write all arrays of a shard."""
    files = {}

    def write_groups(
        prefix: str, lengths: NDArray[Any], ids: Int64 | None, coding: IdCoding
    ) -> int:
        starts, grouped = _group(lengths, ids, coding)
        for kind, array, dtype in (("ids", grouped, coding.dtype), ("starts", starts, INT64)):
            name = pool_file(shard.number, prefix + kind)
            files[name] = write_array(work.data / name, array, dtype)
        return len(grouped)

    name = pool_file(shard.number, "pieces")
    with RowsFile(work.data / name, 4) as table:
        lengths, ids, cut, report = _read(shard, parameters, table)
    span = None if ids is None or not len(ids) else (int(ids.min()), int(ids.max()))
    sequences = write_groups("", lengths, ids, IdCoding.of(span or (0, shard.rows)))
    del lengths, ids
    if table.entry is not None:
        files[name] = table.entry
        write_groups("piece_", cut, None, IdCoding.of((0, len(cut))))
    parts = tuple((part.name, part.first_row, part.rows) for part in shard.parts)
    return ShardEntry(parts, span, sequences, len(cut), report), files


def shard_key(shard: Shard, parameters: PreparationParameters) -> str:
    """Return the `key` of the record of a shard."""
    return canonical([VERSION, shard.number, shard.fingerprint, parameters.for_shards()])


def _finished(
    work: WorkDirectory, number: int, key: str, parameters: PreparationParameters
) -> ShardRecord | None:
    """Return the record of an earlier run, if all that it stands for is there."""
    try:
        text = work.record(number).read_text()
        record = ShardRecord.from_json(parameters.over_length.action, text)
        same = (record.number, record.key, record.to_json()) == (number, key, text)
        whole = same and all(
            entry_of(_CALLER, work.data / name) == entry for name, entry in record.files.items()
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None  # there is none, or it is damaged
    return record if whole else None


class _Read(NamedTuple):
    """What was read of a shard, after its policy.

    `lengths` `[rows]` are 0 for rows that are not packed under their own id; `ids` are None for row
    numbers; `cut` `[pieces]` are the lengths of pieces.
    """

    lengths: NDArray[Any]
    ids: Int64 | None
    cut: NDArray[Any]
    report: OverLengthReport


def _read(shard: Shard, parameters: PreparationParameters, table: RowsFile) -> _Read:
    """Read a shard, and append its pieces to the table of `Pieces`."""
    policy, limit, extra = parameters.over_length, parameters.max_seq_len, parameters.extra_tokens
    lengths = np.zeros(shard.rows, np.uint16 if limit < 1 << 16 else np.int32)
    ids = None if parameters.columns.id is None else np.empty(shard.rows, np.int64)
    report = OverLengthReport(policy.action)
    cut = [lengths[:0]]
    row = 0
    for given, given_ids in read_shard(shard, parameters.columns):
        stop = row + len(given)
        if ids is not None and given_ids is not None:
            ids[row:stop] = given_ids
        longest = _check_block(shard, row, given, parameters)
        if longest <= limit:
            np.add(given, extra, out=lengths[row:stop], casting="unsafe")
            row = stop
            continue
        for part in _parts(given, parameters):
            planned = apply_to_lengths(_CALLER, policy, part, limit, extra_tokens=extra)
            lengths[row : row + len(part)] = planned.lengths
            report = report.plus(planned.report)
            if planned.pieces is not None:
                rows = planned.pieces.table[:]
                cut.append((rows[:, 2] - rows[:, 1]).astype(lengths.dtype))
                rows[:, 0] += row
                rows[:, 0] = rows[:, 0] + shard.first_row if ids is None else ids[rows[:, 0]]
                table.append(rows)
            row += len(part)
    return _Read(lengths, ids, np.concatenate(cut), report)


def _parts(lengths: NDArray[Any], parameters: PreparationParameters) -> Iterator[NDArray[Any]]:
    """Cut a block so that about `_PIECES` pieces, or those of one sequence, are made at once."""
    policy = parameters.over_length
    ends = [len(lengths)]
    if policy.action == "split":
        stride = parameters.max_seq_len - policy.overlap
        most = np.cumsum((lengths.astype(np.int64) + parameters.extra_tokens) // stride + 1)
        ends = [*(np.flatnonzero(np.diff(most // _PIECES)) + 1).tolist(), len(lengths)]
    start = 0
    for end in ends:
        yield lengths[start:end]
        start = end


def _check_block(
    shard: Shard, row: int, lengths: NDArray[Any], parameters: PreparationParameters
) -> int:
    """Raise on the first length of a block that cannot be planned; return the longest one.

    `row` is the first of the block in the shard; extra tokens are counted in what is returned.
    """
    extra, capacity = parameters.extra_tokens, parameters.max_seq_len
    limit = (capacity if parameters.over_length.action == "error" else MAX_LENGTH) - extra
    longest = int(lengths.max(initial=0))
    if longest <= limit and (not lengths.size or int(lengths.min()) >= 1):
        return longest + extra
    wrong = (lengths < 1) | (lengths > limit)
    index = int(wrong.argmax())
    length = int(lengths[index])
    if length < 1:
        bound, hint = "a length is at least 1", "remove empty sequences before planning"
    elif limit == capacity - extra:
        bound, hint = f"max_seq_len is {capacity}", OVER_LENGTH_HINT
    else:
        bound, hint = f"a length is at most {MAX_LENGTH}", "check what computes the lengths"
    more = f" and {extra} extra tokens" if extra else ""
    first = place = row + index
    for part in shard.parts:
        if place < part.rows:
            break
        place -= part.rows
    fail(
        _CALLER,
        f"row {shard.first_row + first} (row {part.first_row + place} of {part.name}) has length "
        f"{length}{more}, but {bound} ({int(np.count_nonzero(wrong))} of the {lengths.size} rows "
        f"from {shard.first_row + row} on are wrong)",
        hint,
    )


def _group(
    lengths: NDArray[Any], ids: Int64 | None, coding: IdCoding
) -> tuple[Int64, NDArray[Any]]:
    """Group ids by length, in input order inside a length; those of length 0 are left out.

    Block by block: a block is sorted, and the ids of each length go behind those of the blocks
    before it.  Sorting all at once takes longer, and more than twice the memory.

    Args:
        lengths: integers `[n]`.
        ids: int64 `[n]`; None for 0 to n - 1.
        coding: how the ids are stored.

    Returns:
        Where those of each length start, int64 `[longest + 2]`, and the ids as they are stored.
    """
    longest = int(lengths.max(initial=0))
    size = max(_BLOCK, min(4 * longest, _LARGEST_BLOCK))
    blocks = [slice(start, start + size) for start in range(0, len(lengths), size)]
    counts = np.zeros(longest + 1, np.int64)
    for block in blocks:
        counts += np.bincount(lengths[block], minlength=longest + 1)
    counts[0] = 0
    starts = offsets_of(counts)
    ends = starts[:-1].copy()  # of what is there yet of each length
    grouped = np.empty(int(starts[-1]), coding.dtype)
    for block in blocks:
        number = np.bincount(lengths[block], minlength=longest + 1)
        order = _stable_argsort(lengths[block])[number[0] :]
        number[0] = 0
        # The ids of a length are moved together, by one distance.
        place = np.repeat(ends - offsets_of(number)[:-1], number)
        place += np.arange(len(place))
        if ids is None:
            stored = order.astype(coding.dtype)
            stored += block.start
        else:
            stored = (ids[block][order] - coding.base).astype(coding.dtype)
        grouped[place] = stored
        ends += number
    return starts, grouped


def _stable_argsort(lengths: NDArray[Any]) -> NDArray[np.uint64]:
    """Sort by 16 bits at a time: pyarrow counts these, thrice as fast as NumPy's radix sort."""
    try:
        from pyarrow import array
        from pyarrow.compute import array_sort_indices
    except ImportError:
        fail(_CALLER, "pyarrow is not installed", "pip install 'seqpack_jax[prepare]'")

    def argsort(keys: NDArray[Any]) -> NDArray[np.uint64]:
        order: NDArray[np.uint64] = array_sort_indices(array(keys)).to_numpy()
        return order

    order = argsort(lengths.astype(np.uint16, copy=False))
    if lengths.itemsize > 2 and int(lengths.max(initial=0)) >= 1 << 16:
        order = order[argsort((lengths >> 16).astype(np.uint16)[order])]
    return order
