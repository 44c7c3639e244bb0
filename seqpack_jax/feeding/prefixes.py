"""The longest prefix of a stream that some rows hold."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.vectors import best_fit_vectors

__all__ = ["longest_prefix", "longest_vector_prefix"]

_NEAR = 6  # the search stops within a 64th of the prefix, and what fits is added then
_Packed = TypeVar("_Packed")


def longest_prefix(
    lengths: Sequence[int],
    max_seq_len: int,
    rows: int,
    ends: Sequence[int] | None = None,
    max_segments: int | None = None,
) -> list[list[int]]:
    """Pack the longest prefix of a stream that best fit decreasing places in `rows` rows.

    It first tries as many segments as have room by volume.  What spills over tells how much is too
    much; so mostly the second prefix fits.  Then the segments that follow are added, each to the
    fullest row with room, until one does not fit.  All of it is deterministic.

    Time: O(r log r) for `r` segments, about twice over.

    Args:
        lengths: tokens of the next segments, each in `[1, max_seq_len]`.
        max_seq_len: tokens per row.
        rows: rows of the group, at least 1.
        ends: where a prefix may end, rising, each the number of segments before it: what lies
            between two of them, the pieces of one record, stays together.  None for anywhere.
        max_segments: the most segments in a row, None for no cap.

    Returns:
        At most `rows` rows, each the indices of its segments.  Together they are the first
        `sum(map(len, result))` segments; none only if there are none, or if those up to the first
        of `ends` do not fit.

    Example:
        >>> longest_prefix([6, 3, 5, 4, 4, 9], max_seq_len=10, rows=2)
        [[0, 3], [2, 1]]
        >>> longest_prefix([6, 3, 5, 4, 4, 9], max_seq_len=10, rows=2, ends=[2, 3, 5, 6])
        [[0, 1], [2]]
    """
    totals = list(accumulate(lengths))
    stops = range(1, len(lengths) + 1) if ends is None else ends
    most = bisect_right(totals, rows * max_seq_len)
    if max_segments is not None:
        most = min(most, rows * max_segments)
    order = sorted(range(most), key=lengths.__getitem__, reverse=True)

    def attempt(count: int) -> tuple[_Rows, int]:
        size = stops[count - 1]
        fitted = _Rows(max_seq_len, rows, max_segments)
        spill = fitted.add(lengths, [k for k in order if k < size] if size < most else order)
        if not spill:
            return fitted, count
        # As much again as spilled over is too much.
        return fitted, bisect_right(stops, bisect_right(totals, totals[size - 1] - spill))

    found = _search(bisect_right(stops, most), attempt, lambda fitted: not fitted.spill)
    if found is None:
        return []
    fitted, count = found
    for stop in stops[count:]:
        if not fitted.add_whole(lengths, range(stops[count - 1], stop)):
            break
        count += 1
    return fitted.rows


class _Rows:
    """Rows being filled, each segment into the fullest row that has room for it."""

    __slots__ = ("by_room", "cap", "free", "in_use", "max_seq_len", "rows", "spill")

    def __init__(self, max_seq_len: int, rows: int, cap: int | None) -> None:
        self.max_seq_len, self.cap = max_seq_len, cap
        self.rows: list[list[int]] = []
        self.free = rows  # rows with nothing in them
        self.by_room: dict[int, list[list[int]]] = {}  # tokens of room -> rows with that room
        self.in_use = 0  # bit mask of the rooms
        self.spill = 0  # tokens that found no room

    def add(self, lengths: Sequence[int], order: Iterable[int]) -> int:
        """Place segments, in an order, and return the tokens of those that found no room."""
        by_room, in_use, free, cap = self.by_room, self.in_use, self.free, self.cap
        for index in order:
            length = lengths[index]
            fitting = in_use >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                group = by_room[room]
                row = group.pop()
                row.append(index)
                if not group:
                    in_use ^= 1 << room
                room -= length
            elif free:
                free -= 1
                row = [index]
                self.rows.append(row)
                room = self.max_seq_len - length
            else:
                self.spill += length
                continue
            if room and len(row) != cap:
                if room in by_room:
                    by_room[room].append(row)
                else:
                    by_room[room] = [row]
                in_use |= 1 << room
        self.in_use, self.free = in_use, free
        return self.spill

    def add_whole(self, lengths: Sequence[int], segments: range) -> bool:
        """Place all of some segments, the last of the stream; if not all fit, none, for good."""
        if not self.add(lengths, segments):
            return True
        for row in self.rows:
            while row and row[-1] >= segments.start:
                row.pop()
        self.rows = [row for row in self.rows if row]
        return False


def _search(
    high: int, attempt: Callable[[int], tuple[_Packed, int]], fits: Callable[[_Packed], bool]
) -> tuple[_Packed, int] | None:
    """Look for the largest count up to `high` that fits, and return it with what it gave.

    `attempt` returns a result and, where that does not fit, a guess of a count that does.
    """
    low, best, step = 0, None, 1
    size = high
    while size > low:
        result, guess = attempt(size)
        if fits(result):
            low, best = size, result
        else:
            high = size
        if best is None:  # down, ever faster, until one fits
            size = max(min(guess, high - step), 1 if high > 1 else 0)
            step *= 2
        elif high - low <= 1 + (high >> _NEAR):
            break
        else:
            size = (low + high) // 2
    return None if best is None else (best, low)


def longest_vector_prefix(
    lengths: Int64,
    capacities: Sequence[int],
    rows: int,
    max_segments: int | None = None,
) -> list[list[int]]:
    """Pack the longest prefix of records with several lengths each that `rows` rows hold.

    A column that another one rules, because no record takes a larger share of its capacity, is left
    out: `inputs` and `targets` of equal lengths are packed as fast as one feature, and as densely.

    Args:
        lengths: int64 `[m, k]`, tokens of each record in each of `k` features.
        capacities: tokens per row of each feature.
        rows: rows of the group, at least 1.
        max_segments: the most segments in a row, None for no cap.

    Returns:
        Rows as of `longest_prefix`.

    Example:
        >>> lengths = np.array([[6, 3], [3, 6], [3, 3], [9, 1]])
        >>> longest_vector_prefix(lengths, (10, 10), rows=2)
        [[0, 1], [2]]
    """
    columns, limits = _ruling(lengths, capacities)
    if len(limits) == 1:
        return longest_prefix(columns[:, 0].tolist(), limits[0], rows, None, max_segments)
    most = int((np.cumsum(columns, axis=0) <= rows * np.array(limits)).all(axis=1).sum())
    if max_segments is not None:
        most = min(most, rows * max_segments)

    def attempt(count: int) -> tuple[list[list[int]], int]:
        packed = best_fit_vectors(columns[:count], limits, max_bins=rows, max_segments=max_segments)
        return packed or [], count - max(1, most >> _NEAR)

    found = _search(most, attempt, bool)
    if found is None:
        return []
    packed, count = found
    _add_vectors(packed, columns, count, np.array(limits), rows, max_segments)
    return packed


def _add_vectors(
    packed: list[list[int]],
    columns: Int64,
    count: int,
    limits: Int64,
    rows: int,
    max_segments: int | None,
) -> None:
    """Add the records from `count` on, each to the fullest row with room, until one has none."""
    room = np.tile(limits, (rows, 1))
    for k, row in enumerate(packed):
        room[k] -= columns[row].sum(axis=0)
        if len(row) == max_segments:
            room[k] = -1
    for index in range(count, len(columns)):
        fitting = np.flatnonzero((room >= columns[index]).all(axis=1))
        if not fitting.size:
            return
        k = int(fitting[(room[fitting] / limits).sum(axis=1).argmin()])
        if k >= len(packed):  # empty rows are all alike
            k = len(packed)
            packed.append([])
        packed[k].append(index)
        room[k] -= columns[index]
        if len(packed[k]) == max_segments:
            room[k] = -1


def _ruling(lengths: Int64, capacities: Sequence[int]) -> tuple[Int64, tuple[int, ...]]:
    """Return the columns that no other column rules, with their capacities."""
    kept = list(range(len(capacities)))
    for c in range(len(capacities) - 1, -1, -1):
        share = lengths[:, c]
        for other in kept:
            if other == c:
                continue
            if (lengths[:, other] * capacities[c] >= share * capacities[other]).all():
                kept.remove(c)
                break
    return lengths[:, kept], tuple(capacities[c] for c in kept)
