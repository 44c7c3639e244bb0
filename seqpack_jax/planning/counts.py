"""Histograms of lengths in their canonical form, and the lengths that a tolerance makes of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.errors import MAX_LENGTH, MAX_TOTAL, OVER_LENGTH_HINT, check_integers, fail

__all__ = ["Int64", "as_counts", "coarsen_counts", "coarsen_lengths", "plain_integers"]

Int64 = NDArray[np.int64]


def plain_integers(values: Iterable[Any]) -> list[Any]:
    """Return `values`, those of NumPy's integer types as `int`: of two types, it makes floats.

    Example:
        >>> np.asarray([np.uint64(1), np.int64(2)]).dtype
        dtype('float64')
        >>> plain_integers([np.uint64(1), np.int64(2), "3"])
        [1, 2, '3']
    """
    return [operator.index(each) if isinstance(each, np.integer) else each for each in values]


def as_counts(
    caller: str,
    counts: ArrayLike | Mapping[int, int],
    max_seq_len: int | None = None,
    *,
    hint: str = OVER_LENGTH_HINT,
) -> Int64:
    """Return a histogram in its canonical form, int64 `[max_len + 1]`, after checking it.

    Args:
        caller: the public function that an error shall name.
        counts: how many sequences have each length, indexed by length, or `{length: count}`, where
            lengths of count 0 are left out, whatever they are.
        max_seq_len: the largest length that may have a count, in tokens.
        hint: what to do about longer ones.

    Raises:
        SeqpackError: a count is negative or not an integer, or a length is not in
            `[1, max_seq_len]`.
    """
    if isinstance(counts, Mapping):
        keys = check_integers(caller, "counts (keys)", plain_integers(counts.keys()))
        values = check_integers(caller, "counts (values)", plain_integers(counts.values()))
        keys, values = keys[values != 0], values[values != 0]
        if keys.size and (low := int(keys.min())) < 0:
            fail(caller, f"counts has the length {low}", "a length is at least 1 token")
        _check_longest(caller, int(keys.max(initial=0)), counts, max_seq_len, hint)
        given = np.zeros(int(keys.max(initial=0)) + 1, values.dtype)
        given[keys] = values
    else:
        given = check_integers(caller, "counts", counts)
        given = given if given.size else np.zeros(1, np.int64)
    if int(given.min()) < 0:
        length = int((given < 0).argmax())
        fail(caller, f"counts[{length}] = {given[length]}", "a count is at least 0")
    # In floats, which cannot wrap.
    tokens = float(np.arange(len(given), dtype=float) @ given.astype(float))
    if max(tokens, float(given.max())) >= MAX_TOTAL:
        fail(
            caller,
            f"counts are of {tokens:.3g} tokens, beyond the limit of 2**62",
            "check what computes counts",
        )
    array = given.astype(np.int64, copy=False)
    if array[0]:
        fail(
            caller,
            f"counts[0] = {array[0]}, but a length is at least 1 token",
            "remove empty sequences before planning",
        )
    if max_seq_len is not None and array[max_seq_len + 1 :].any():
        _check_longest(caller, int(np.flatnonzero(array)[-1]), array, max_seq_len, hint)
    return array


def _check_longest(
    caller: str, length: int, counts: Any, max_seq_len: int | None, hint: str
) -> None:
    limit, what = max_seq_len, "max_seq_len is"
    if limit is None:
        limit, what, hint = MAX_LENGTH, "a length is at most", "check what computes counts"
    if length > limit:
        fail(caller, f"counts[{length}] = {counts[length]}, but {what} {limit}", hint)


def coarsen_lengths(lengths: ArrayLike, tolerance: int, max_seq_len: int) -> Int64:
    """Return what lengths are planned as: the next multiple of `tolerance`, or `max_seq_len`.

    A tolerance above 1 lets sequences of nearly equal length take each other's slots, so that
    epochs mix more, for some padding.  Any member of a bucket fits any slot of the bucket.

    Example:
        >>> coarsen_lengths([1, 4, 5, 9, 10], tolerance=4, max_seq_len=10).tolist()
        [4, 4, 8, 10, 10]
    """
    tolerance = min(tolerance, max_seq_len)
    planned = -(-np.asarray(lengths, np.int64) // tolerance) * tolerance
    return np.minimum(planned, max_seq_len)


def coarsen_counts(counts: Int64, tolerance: int, max_seq_len: int) -> Int64:
    """Return the histogram of the planned lengths.  Time: O(max_len)."""
    if tolerance == 1:
        return counts
    planned = coarsen_lengths(np.arange(len(counts)), tolerance, max_seq_len)
    coarse = np.zeros(int(planned[-1]) + 1, np.int64)
    np.add.at(coarse, planned, counts)
    return coarse
