"""Packing a stream whose lengths are not known beforehand.

A batch takes a *prefix* of the stream: the longest that best fit decreasing places in its rows.  So
no record waits for a later batch, and where the stream stands says all there is to know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import fail
from seqpack_jax.feeding.batch import fill_rows

__all__ = ["PackingIterator", "longest_prefix"]


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


class PackingIterator:
    """One pass over the records of a Grain iterator, packed into batches.

    It also answers for the position of `parent`, which reads ahead: whoever asks `parent` for its
    state gets the one before the first record that is not in a batch yet.

    Args:
        parent: an iterator over `grain.Record`s, with `get_state` and `set_state` inside a loader.
        max_seq_len: tokens per row.
        rows: rows per batch.
        feature: which entry of a record is packed.
        pad_value: the token on padding.
    """

    def __init__(
        self, parent: Any, max_seq_len: int, rows: int, feature: str, pad_value: int
    ) -> None:
        self._parent = parent
        self._max_seq_len, self._rows = max_seq_len, rows
        self._feature, self._pad_value = feature, pad_value
        # Records that are read but in no batch yet: (state before it, record, tokens).
        self._waiting: deque[tuple[Any, Any, NDArray[Any]]] = deque()
        self._tokens_waiting = 0
        # A plain iterator, outside of a loader, has no state to answer for.
        self._reader_state: Callable[[], Any] = getattr(parent, "get_state", lambda: None)
        if hasattr(parent, "set_state"):
            self._set_reader_state = parent.set_state
            parent.get_state, parent.set_state = self._get_state, self._set_state

    def _get_state(self) -> Any:
        return self._waiting[0][0] if self._waiting else self._reader_state()

    def _set_state(self, state: Any) -> None:
        self._waiting.clear()
        self._tokens_waiting = 0
        self._set_reader_state(state)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        rows, max_seq_len = self._rows, self._max_seq_len
        self._read(rows * max_seq_len)
        if not self._waiting:
            raise StopIteration
        packed = longest_prefix([len(tokens) for *_, tokens in self._waiting], max_seq_len, rows)
        size = sum(map(len, packed))
        taken = list(islice(self._waiting, size))
        arrays = [taken[index][2] for row in packed for index in row]
        offsets = offsets_of([len(row) for row in packed])
        batch = fill_rows("PackOperation", arrays, offsets, rows, max_seq_len, self._pad_value)
        for _ in range(size):  # only now: an error above loses nothing
            self._waiting.popleft()
        self._tokens_waiting -= sum(map(len, arrays))
        last = taken[-1][1]
        return replace(last, metadata=last.metadata.remove_record_key(), data=batch.asdict())

    def _read(self, volume: int) -> None:
        """Read on until the records that wait hold more tokens than a batch, or the stream ends."""
        while self._tokens_waiting <= volume:
            state = self._reader_state()
            try:
                record = next(self._parent)
            except StopIteration:
                return
            tokens = self._check(record)
            self._waiting.append((state, record, tokens))
            self._tokens_waiting += len(tokens)

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
        if not 1 <= len(tokens) <= self._max_seq_len:
            fail(
                caller,
                f"{name} has {len(tokens)} tokens, but a length is in [1, {self._max_seq_len}]",
                "filter, cut or split such records before this operation",
            )
        return tokens
