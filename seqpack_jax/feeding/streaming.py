"""Packing a stream whose lengths are not known beforehand.

A batch takes a *prefix* of the stream: the longest that best fit decreasing places in its rows.  So
no record waits for a later batch, and where the stream stands says all there is to know.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["longest_prefix"]


def longest_prefix(lengths: Sequence[int], max_seq_len: int, rows: int) -> list[list[int]]:
    """Pack the longest prefix of a stream that best fit decreasing places in `rows` rows.

    The search starts at the volume bound (the most records whose tokens fit at all), doubles its
    steps down to a prefix that fits, and bisects between.  It is deterministic.

    Time: O(r log r) for `r` records, a few times over.

    Args:
        lengths: tokens of the next records, each in `[1, max_seq_len]`.
        max_seq_len: tokens per row.
        rows: rows of a batch, at least 1.

    Returns:
        At most `rows` rows, each the indices of its records, longest first.  Together they are the
        first `sum(map(len, result))` records; at least one, if there is any.

    Example:
        >>> longest_prefix([6, 3, 5, 4, 4, 9], max_seq_len=10, rows=2)
        [[0, 3], [2, 1]]
    """
    volume, bound = rows * max_seq_len, 0
    for length in lengths:
        volume -= length
        if volume < 0:
            break
        bound += 1
    size, step, fails = bound, 1, bound + 1
    packed = _best_fit(lengths, size, max_seq_len, rows)
    while packed is None:
        fails, size = size, max(1, size - step)
        packed, step = _best_fit(lengths, size, max_seq_len, rows), 2 * step
    while fails - size > 1:
        middle = (size + fails) // 2
        attempt = _best_fit(lengths, middle, max_seq_len, rows)
        if attempt is None:
            fails = middle
        else:
            size, packed = middle, attempt
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
