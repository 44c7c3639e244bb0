"""The most valuable contents of a bin, when each length has a price: what column generation asks.

A dynamic program over the room of a bin.  With `best[r]` the most that lengths inside `r` tokens
are worth, `best[r]` is the largest of `price[l] + best[r - l]` over all lengths `l`, so each room
costs one addition and one maximum of arrays.  A length may be taken any number of times: that more
of it were taken than there are makes prices no less valid, only a bound that they prove weaker.

With at most `max_segments` sequences, bins of `a + b` sequences are the best pairs of a bin of `a`
and one of `b`, split at any room; so the number of passes grows with the logarithm of the cap.

Prices of one dtype give values of it: float64 to search with, int64 to prove with, exactly.

References:
    P. C. Gilmore, R. E. Gomory, "A linear programming approach to the cutting-stock problem", 1961.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.planning.counts import Int64

__all__ = ["Contents", "best_contents", "patterns_of"]

Values = NDArray[Any]  # float64 or int64, as the prices


class Contents(NamedTuple):
    """What rooms are best filled with, by at most so many sequences.

    Attributes:
        best: `[capacity + 1]`, the most that the contents of each room are worth.
        taken: int64 `[capacity + 1]`, the length to take first in each room, 0 for none; or, of a
            pair, the room that `left` gets.
        left: the part of a pair that gets room `taken`; None if this is no pair.
        right: the part that gets the rest.
    """

    best: Values
    taken: Int64
    left: Contents | None = None
    right: Contents | None = None


def best_contents(prices: Values, capacity: int, max_segments: int | None = None) -> Contents:
    """Find the most valuable contents of every room up to `capacity`.

    Time: O(capacity**2) in whole arrays, times 2 * log2(max_segments) with a cap.

    Args:
        prices: float64 or int64 `[longest + 1]`, of each length, at least 0; negative for lengths
            that there are none of.
        capacity: of a bin in tokens, at least the longest length.
        max_segments: the most sequences in a room, at least 0; None for any number.

    Example:
        >>> contents = best_contents(np.array([-1, -1, -1, 4, 0, 5]), 8)
        >>> contents.best.tolist(), patterns_of(contents, np.array([8])).tolist()
        ([0, 0, 0, 4, 4, 5, 8, 8, 9], [[3, 5]])
        >>> best_contents(np.array([-1, -1, -1, 4, 0, 5]), 8, max_segments=1).best.tolist()
        [0, 0, 0, 4, 4, 5, 5, 5, 5]
    """
    if max_segments is None:
        return _any_number(prices, capacity)
    if max_segments == 0:
        return _any_number(prices[:0], capacity)
    if max_segments == 1:
        return _one(prices, capacity)
    half = best_contents(prices, capacity, max_segments // 2)
    pair = _pair(half, half)
    return _pair(pair, _one(prices, capacity)) if max_segments % 2 else pair


def _any_number(prices: Values, capacity: int) -> Contents:
    lengths = np.flatnonzero(prices >= 0)
    best, taken = np.zeros(capacity + 1, prices.dtype), np.zeros(capacity + 1, np.int64)
    if not len(lengths):
        return Contents(best, taken)
    shortest, longest = int(lengths[0]), int(lengths[-1])
    backwards = np.zeros(capacity + 1, prices.dtype)  # best[r] at capacity - r: both run upwards
    sums = np.empty(longest + 1, prices.dtype)
    for room in range(shortest, capacity + 1):
        stop = min(room, longest) + 1
        rest = capacity - room
        values = np.add(
            prices[shortest:stop],
            backwards[rest + shortest : rest + stop],
            out=sums[: stop - shortest],
        )
        at = int(values.argmax())
        if values[at] > best[room - 1]:
            best[room], taken[room] = values[at], at + shortest
        else:
            best[room] = best[room - 1]
        backwards[rest] = best[room]
    return Contents(best, taken)


def _one(prices: Values, capacity: int) -> Contents:
    values = np.zeros(capacity + 1, prices.dtype)
    values[: len(prices)] = np.maximum(prices, 0)
    best = np.maximum.accumulate(values)
    first = np.diff(best, prepend=best[:1]) > 0
    return Contents(best, np.where(first, np.arange(capacity + 1), 0))


def _pair(left: Contents, right: Contents) -> Contents:
    best, taken = np.empty_like(left.best), np.empty_like(left.taken)
    backwards = right.best[::-1].copy()
    capacity = len(best) - 1
    for room in range(capacity + 1):
        values = left.best[: room + 1] + backwards[capacity - room :]
        taken[room] = at = int(values.argmax())
        best[room] = values[at]
    return Contents(best, taken, left, right)


def patterns_of(contents: Contents, rooms: Int64) -> Int64:
    """Return the lengths that fill `rooms` `[k]` best: `[k, most]`, filled up with 0."""
    if contents.left is not None and contents.right is not None:
        given = contents.taken[rooms]
        both = patterns_of(contents.left, given), patterns_of(contents.right, rooms - given)
        return np.concatenate(both, axis=1)
    # The room in which the last length was taken, at or below each room.
    places = np.arange(len(contents.taken))
    used = np.maximum.accumulate(np.where(contents.taken > 0, places, 0))
    columns = []
    room = used[rooms]
    while room.any():
        length = contents.taken[room]
        columns.append(length)
        room = used[room - length]
    return np.column_stack(columns) if columns else np.zeros((len(rooms), 0), np.int64)
