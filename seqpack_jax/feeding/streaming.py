"""Packing a stream whose lengths are not known beforehand.

A batch takes a *prefix* of the stream: the longest that best fit decreasing places in its rows.  So
no record waits for a later batch, and where the stream stands says all there is to know.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import fail
from seqpack_jax.feeding.batch import PackedBatch, fill_rows
from seqpack_jax.feeding.sequences import CUTTING, cut_windows
from seqpack_jax.planning.over_length import (
    OverLength,
    OverLengthReport,
    apply_to_lengths,
)

__all__ = ["PackingIterator", "longest_prefix"]

_LOG = logging.getLogger(__name__)


def longest_prefix(
    lengths: Sequence[int], max_seq_len: int, rows: int, ends: Sequence[int] | None = None
) -> list[list[int]]:
    """Pack the longest prefix of a stream that best fit decreasing places in `rows` rows.

    The search starts at the volume bound (the most segments whose tokens fit at all), doubles its
    steps down to a prefix that fits, and bisects between.  It is deterministic.

    Time: O(r log r) for `r` segments, a few times over.

    Args:
        lengths: tokens of the next segments, each in `[1, max_seq_len]`.
        max_seq_len: tokens per row.
        rows: rows of a batch, at least 1.
        ends: where a prefix may end, rising, each the number of segments before it: what lies
            between two of them, the pieces of one record, stays together.  None for anywhere.

    Returns:
        At most `rows` rows, each the indices of its segments, longest first.  Together they are the
        first `sum(map(len, result))` segments; none only if there are none, or if those up to the
        first of `ends` do not fit.

    Example:
        >>> longest_prefix([6, 3, 5, 4, 4, 9], max_seq_len=10, rows=2)
        [[0, 3], [2, 1]]
        >>> longest_prefix([6, 3, 5, 4, 4, 9], max_seq_len=10, rows=2, ends=[2, 3, 5, 6])
        [[0, 1], [2]]
    """
    totals = list(accumulate(lengths))
    sizes = [0, *(range(1, len(lengths) + 1) if ends is None else ends)]
    # Prefixes are counted by their place in `sizes`.
    best = bisect_right(sizes, rows * max_seq_len, 1, key=lambda size: totals[size - 1]) - 1
    step, fails = 1, best + 1
    packed = _best_fit(lengths, sizes[best], max_seq_len, rows)
    while packed is None:
        fails, best = best, max(0, best - step)
        packed, step = _best_fit(lengths, sizes[best], max_seq_len, rows), 2 * step
    while fails - best > 1:
        middle = (best + fails) // 2
        attempt = _best_fit(lengths, sizes[middle], max_seq_len, rows)
        if attempt is None:
            fails = middle
        else:
            best, packed = middle, attempt
    return packed


def _best_fit(
    lengths: Sequence[int], size: int, max_seq_len: int, rows: int
) -> list[list[int]] | None:
    """Best fit decreasing of `lengths[:size]`, None when it needs more than `rows` rows."""
    packed: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}  # tokens of room -> rows with that room
    in_use = 0  # bit mask of the rooms
    for index in sorted(range(size), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        fitting = in_use >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            group = by_room[room]
            row = group.pop()
            row.append(index)
            if not group:
                in_use ^= 1 << room
        elif len(packed) == rows:
            return None
        else:
            room = max_seq_len
            row = [index]
            packed.append(row)
        room -= length
        by_room.setdefault(room, []).append(row)
        in_use |= 1 << room
    return packed


class PackingIterator:
    """One pass over the records of a Grain iterator, packed into batches.

    It also answers for the position of `parent`, which reads ahead: whoever asks `parent` for its
    state gets the one before the first record that is not in a batch yet.

    Attributes:
        report: what the over-length policy touched in the records that were read, since the start
            or the last `set_state`.

    Args:
        parent: an iterator over `grain.Record`s, with `get_state` and `set_state` inside a loader.
        max_seq_len: tokens per row.
        rows: rows per batch.
        feature: which entry of a record is packed.
        pad_value: the token on padding.
        over_length: the policy for records of more than `max_seq_len` tokens.
        seed: with the index of a record, selects the window of `"crop"`.
    """

    def __init__(
        self,
        parent: Any,
        max_seq_len: int,
        rows: int,
        feature: str,
        pad_value: int,
        over_length: OverLength,
        seed: int,
    ) -> None:
        self._parent = parent
        self._max_seq_len, self._rows = max_seq_len, rows
        self._feature, self._pad_value = feature, pad_value
        self._over_length, self._seed = over_length, seed
        self._start_over()
        # A plain iterator, outside of a loader, has no state to answer for.
        self._reader_state: Callable[[], Any] = getattr(parent, "get_state", lambda: None)
        if hasattr(parent, "set_state"):
            self._set_reader_state = parent.set_state
            parent.get_state, parent.set_state = self._get_state, self._set_state

    def _start_over(self) -> None:
        # What is read but in no batch yet, one entry per segment: state before its record, record,
        # tokens of the record, where the segment starts and stops in them (or in their window).
        self._waiting: deque[tuple[Any, Any, NDArray[Any], int, int]] = deque()
        self._tokens_waiting = 0
        self._said = False  # whether the end was logged
        self.report = OverLengthReport(self._over_length.action)

    def _get_state(self) -> Any:
        return self._waiting[0][0] if self._waiting else self._reader_state()

    def _set_state(self, state: Any) -> None:
        self._start_over()
        self._set_reader_state(state)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        rows, max_seq_len = self._rows, self._max_seq_len
        self._read(rows * max_seq_len)
        if not self._waiting:
            self._say_report()
            raise StopIteration
        lengths = [stop - start for _, _, _, start, stop in self._waiting]
        ends = None
        if self._over_length.action == "split":  # a batch ends between records
            firsts = [k for k, entry in enumerate(self._waiting) if entry[3] == 0]
            ends = [*firsts[1:], len(lengths)]
        packed = longest_prefix(lengths, max_seq_len, rows, ends)
        size = sum(map(len, packed))
        taken = list(islice(self._waiting, size))
        batch = self._fill(taken, packed)
        for _ in range(size):  # only now: an error above loses nothing
            self._waiting.popleft()
        self._tokens_waiting -= sum(lengths[:size])
        last = taken[-1][1]
        return replace(last, metadata=last.metadata.remove_record_key(), data=batch.asdict())

    def _fill(self, taken: list[Any], packed: list[list[int]]) -> PackedBatch:
        """Lay out segments in rows, and do to their tokens what the policy says."""
        policy, first_positions = self._over_length, None
        order = [index for row in packed for index in row]
        arrays = [entry[2] for entry in taken]
        if policy.action in CUTTING:
            have = np.array(list(map(len, arrays)), np.int64)
            index = np.array([record.metadata.index for _, record, *_ in taken], np.int64)
            cut_windows(policy, arrays, have, self._max_seq_len, index, self._seed)
        elif policy.action == "split":
            arrays = [tokens[start:stop] for _, _, tokens, start, stop in taken]
            if policy.positions == "continue":
                first_positions = np.array([taken[index][3] for index in order], np.int64)
        return fill_rows(
            "PackOperation",
            [arrays[index] for index in order],
            offsets_of([len(row) for row in packed]),
            self._rows,
            self._max_seq_len,
            self._pad_value,
            first_positions,
        )

    def _read(self, volume: int) -> None:
        """Read on until the records that wait hold more tokens than a batch, or the stream ends."""
        while self._tokens_waiting <= volume:
            state = self._reader_state()
            try:
                record = next(self._parent)
            except StopIteration:
                return
            tokens = self._check(record)
            segments = [(0, len(tokens))]
            if len(tokens) > self._max_seq_len:
                segments = self._plan(record, len(tokens))
            for start, stop in segments:
                self._waiting.append((state, record, tokens, start, stop))
                self._tokens_waiting += stop - start

    def _check(self, record: Any) -> NDArray[Any]:
        caller = "PackOperation"
        name = f"record {record.metadata.index}"
        if not isinstance(record.data, dict) or self._feature not in record.data:
            fail(
                caller,
                f"{name} has no feature {self._feature!r}",
                "name the entry of the records that holds their tokens: feature=...",
            )
        tokens = np.asarray(record.data[self._feature])
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            fail(
                caller,
                f"{name} has shape {tokens.shape} and dtype {tokens.dtype}",
                "pack 1-D arrays of integers",
            )
        if len(tokens) == 0:
            problem = f"{name} has 0 tokens, but a length is in [1, {self._max_seq_len}]"
            fail(caller, problem, "filter empty records before this operation")
        return tokens

    def _plan(self, record: Any, length: int) -> list[tuple[int, int]]:
        """Return the segments of an over-length record, none if it is dropped; count it."""
        caller, policy, limit = "PackOperation", self._over_length, self._max_seq_len
        name = f"record {record.metadata.index} has {length} tokens"
        if policy.action == "error":
            hint = "pass over_length='drop', 'truncate', 'truncate_left', 'crop' or 'split'"
            fail(caller, f"{name}, but a length is in [1, {limit}]", hint)
        planned = apply_to_lengths(caller, policy, [length], limit)
        segments = [(0, int(planned.lengths[0]))] if planned.lengths[0] else []
        if planned.pieces is not None:
            table = planned.pieces.table[:]
            segments = [(start, stop) for start, stop in table[:, 1:3].tolist()]
        if len(segments) > self._rows:
            fail(
                caller,
                f"{name}, {len(segments)} pieces, but a batch of whole records has {self._rows} "
                "rows",
                "raise batch_size or max_seq_len, or split such records before this operation",
            )
        self.report = self.report.plus(planned.report)
        return segments

    def _say_report(self) -> None:
        if not self._said and self.report.sequences:
            _LOG.info("PackOperation: %s", self.report)
        self._said = True
