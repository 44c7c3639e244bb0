"""Everything that `load_prepared` leaves unread: checksums, and that each id is there once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import ArrayParts
from seqpack_jax.errors import SeqpackError, fail
from seqpack_jax.feeding.manifest import (
    FORMAT,
    PreparationParameters,
    ShardEntry,
    parse_manifest,
    pool_file,
)
from seqpack_jax.feeding.prepared import Prepared, ShardArrays, load_prepared, map_shards_of
from seqpack_jax.feeding.progress import progress_bar
from seqpack_jax.feeding.remote import local_copy
from seqpack_jax.feeding.storage import AGAIN, entry_of
from seqpack_jax.planning.over_length import OverLengthReport, apply_to_lengths

__all__ = ["verify_prepared"]

_CALLER = "verify_prepared"
_BLOCK = 1 << 20  # ids that are read at once
_MOST_IDS = 1 << 25  # that are sorted at once: 256 MB
_BUCKET_BITS = 16  # of the number of ranges whose ids are counted in one pass

Int64 = NDArray[np.int64]


def verify_prepared(
    path: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Prepared:
    """Read a prepared directory in full, and check all that can be.

    Beside what `load_prepared` checks: the checksum of every file, that each row of the input (or
    each id of an id column) is there exactly once, unless the policy dropped it, and that pieces
    cover their sequences as the policy says.

    Time: O(n); with an id column O(n * n / 2**25) if the ids of the shards overlap.  Memory: under
    1 GB, with 3 bytes per piece and 16 per split sequence of the largest shard in it; pages of
    mapped files, which the system takes back at need, are not counted.

    Args:
        path: as for `load_prepared`.
        cache: as for `load_prepared`.
        progress: whether to show progress on stderr; None to do so on a terminal.

    Returns:
        The `Prepared`, opened.

    Raises:
        SeqpackError: something is wrong; the message names the file, or the id.

    Example:
        >>> import tempfile
        >>> from seqpack_jax import prepare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     _ = prepare(f"{folder}/lengths.npy", f"{folder}/prepared", max_seq_len=10)
        ...     verify_prepared(f"{folder}/prepared").manifest["sequences"]
        4
    """
    root = local_copy(_CALLER, path, cache)
    prepared = load_prepared(root)
    if prepared.manifest.get("format") != FORMAT:  # the seed library writes no checksums
        ids = prepared.pools.ids
        parts = ids.parts if isinstance(ids, ArrayParts) else ()
        _check_unique([_Run.of(part, 0) for part in parts if len(part)])
        return prepared
    parameters, shards, files = parse_manifest(_CALLER, prepared.manifest, str(root))
    total = sum(entry.bytes for entry in files.values())
    with progress_bar("bytes", total, progress) as advance:
        for name, entry in files.items():
            if entry_of(_CALLER, root / name) != entry:
                fail(_CALLER, f"{root / name} was changed: it has another checksum", AGAIN)
            advance(entry.bytes)
    runs: list[_Run] = []
    first_row = 0
    arrays = map_shards_of(root, shards, files)
    with progress_bar("rows", sum(shard.rows for shard in shards), progress) as advance:
        for number, (shard, held) in enumerate(zip(shards, arrays, strict=True)):
            sources = _check_pieces(root, number, shard, held, parameters)
            own = [_Run.of(held.whole.ids, held.whole.base), _Run.of(sources, 0)]
            own = [run for run in own if len(run.ids)]
            span = shard.id_range or (first_row, first_row + shard.rows - 1)
            _check_span(root / pool_file(number, "ids"), own, span, shard.rows)
            if shard.id_range is None:
                _check_unique(own)  # no other shard has ids of this range
            else:
                runs += own
            first_row += shard.rows
            advance(shard.rows)
    _check_unique(runs)
    return prepared


def _check_pieces(
    root: Path, number: int, shard: ShardEntry, held: ShardArrays, parameters: PreparationParameters
) -> Int64:
    """Check that pieces cut their sequences as the policy does; return the ids of these."""
    table, pools = np.asarray(held.table), held.cut
    if not len(table):
        return np.zeros(0, np.int64)
    narrow = np.uint16 if parameters.max_seq_len < 1 << 16 else np.int32
    lengths = np.empty(len(table), narrow)
    report = OverLengthReport(shard.report.action)
    sources = []
    for start, stop in _whole_sequences(table):
        cut = _report_of(table[start:stop], parameters)
        if cut is None:
            break
        report = report.plus(cut)
        sources.append(table[start:stop][table[start:stop, 1] == 0, 0])
        lengths[start:stop] = table[start:stop, 2] - table[start:stop, 1]
    if report != shard.report:  # nor is it after a break: fewer pieces were counted
        problem = f"{root / pool_file(number, 'pieces')} does not cut sequences as the policy does"
        fail(_CALLER, problem, AGAIN)
    seen = np.zeros(len(table), bool)
    for start in range(0, len(table), _BLOCK):
        ids = np.asarray(pools.ids[start : start + _BLOCK])
        by_length = np.searchsorted(pools.starts, start + np.arange(len(ids)), side="right") - 1
        if int(ids.max()) >= len(table) or not np.array_equal(lengths[ids], by_length):
            break
        seen[ids] = True
    if not seen.all():  # there are as many ids as pieces
        problem = f"{root / pool_file(number, 'piece_ids')} does not hold each piece by its length"
        fail(_CALLER, problem, AGAIN)
    return np.concatenate(sources)


def _whole_sequences(table: Int64) -> Iterator[tuple[int, int]]:
    """Yield blocks of a table of pieces: all pieces of some sequences, about `_BLOCK` of them."""
    start, size = 0, _BLOCK
    while start < len(table):
        stop = min(len(table), start + size)
        if stop < len(table):
            begins = np.flatnonzero(table[start + 1 : stop, 1] == 0)
            if not len(begins):  # a sequence of more pieces
                size *= 2
                continue
            stop = start + 1 + int(begins[-1])
        yield start, stop
        start, size = stop, _BLOCK


def _report_of(table: Int64, parameters: PreparationParameters) -> OverLengthReport | None:
    """Return what the policy did to the sequences of some pieces; None if it does not cut so."""
    first = np.flatnonzero(table[:, 1] == 0)
    try:
        planned = apply_to_lengths(
            _CALLER, parameters.over_length, table[first, 3], parameters.max_seq_len
        )
    except SeqpackError:  # a length that is none
        return None
    if planned.pieces is None:
        return None
    expected = planned.pieces.table[:]
    same = np.array_equal(table[:, 1:], expected[:, 1:])
    same = same and np.array_equal(table[:, 0], table[first, 0][expected[:, 0]])
    return planned.report if same else None


def _check_span(path: Path, runs: Sequence[_Run], span: tuple[int, int], rows: int) -> None:
    """Check that ids lie in their range, and reach its ends if there is one for every row."""
    if not runs:
        return
    found = min(run.low for run in runs), max(run.high for run in runs)
    all_there = sum(len(run.ids) for run in runs) == rows
    if found[0] < span[0] or found[1] > span[1] or (all_there and found != span):
        problem = f"{path} has ids from {found[0]} to {found[1]}, not from {span[0]} to {span[1]}"
        fail(_CALLER, problem, AGAIN)


# --- each id once -----------------------------------------------------------------------------


class _Run(NamedTuple):
    """Ids, less `base`, and their range."""

    ids: NDArray[Any]
    base: int
    low: int
    high: int

    @classmethod
    def of(cls, ids: NDArray[Any], base: int) -> _Run:
        if not len(ids):
            return cls(ids, base, 0, -1)
        return cls(ids, base, int(ids.min()) + base, int(ids.max()) + base)


def _check_unique(runs: Sequence[_Run]) -> None:
    """Raise if an id is there twice."""
    if runs:
        low, high = min(run.low for run in runs), max(run.high for run in runs)
        _check_range(runs, low, high, sum(len(run.ids) for run in runs))


def _check_range(runs: Sequence[_Run], low: int, high: int, count: int) -> None:
    """Raise if one of the `count` ids from `low` to `high` is there twice.

    A range of too many to be sorted at once is cut: ids are counted by ranges of equal width, and
    neighbours that have few together are taken together.
    """
    if count <= _MOST_IDS:
        span = high - low + 1
        if span <= 8 * count:  # ticking them off is faster than sorting
            seen = np.zeros(span, bool)
            for block in _ids_between(runs, low, high):
                seen[block - low] = True
            if int(np.count_nonzero(seen)) == count:
                return
        ids = np.empty(count, np.int64)
        filled = 0
        for block in _ids_between(runs, low, high):
            ids[filled : filled + len(block)] = block
            filled += len(block)
        ids.sort()
        if (twice := ids[1:] == ids[:-1]).any():
            _fail_twice(int(ids[int(twice.argmax())]))
        return
    shift = max(0, (high - low).bit_length() - _BUCKET_BITS)
    counts = np.zeros(1 << _BUCKET_BITS, np.int64)
    for block in _ids_between(runs, low, high):
        # Without a sign, the difference cannot overflow.
        place = (block.view(np.uint64) - np.uint64(low % 2**64)) >> np.uint64(shift)
        counts += np.bincount(place.astype(np.int64), minlength=len(counts))
    ends = np.cumsum(counts)
    first = done = 0
    while done < count:
        last = max(first + 1, int(np.searchsorted(ends, done + _MOST_IDS, side="right")))
        size = int(ends[last - 1]) - done
        if shift == 0 and size > _MOST_IDS:
            _fail_twice(low + first)
        bounds = low + (first << shift), min(high, low + (last << shift) - 1)
        _check_range(runs, *bounds, size)
        first, done = last, done + size


def _ids_between(runs: Sequence[_Run], low: int, high: int) -> Iterator[Int64]:
    """Read the ids of a range block by block."""
    for run in runs:
        if run.low > high or run.high < low:
            continue
        for start in range(0, len(run.ids), _BLOCK):
            block = run.ids[start : start + _BLOCK].astype(np.int64) + run.base
            inside = low <= run.low and run.high <= high
            yield block if inside else block[(block >= low) & (block <= high)]


def _fail_twice(id_: int) -> None:
    problem = f"the id {id_} is there twice"
    fail(_CALLER, problem, f"ids have to differ; {AGAIN}")
