"""Sequence lengths -> the histogram that is packed, and the pools that give its counts names.

Sequences of one length are interchangeable for a packer.  So a data set is `counts`, how many
sequences have each length, which is all that planning needs, and `SequencePools`, the ids of the
sequences of each length, which an epoch draws from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import from_portable, offsets_of, to_portable
from seqpack_jax.errors import (
    MAX_LENGTH,
    MAX_TOTAL,
    check_choice,
    check_int,
    check_integers,
    check_lengths,
    fail,
)

__all__ = [
    "Pieces",
    "SequencePools",
    "as_counts",
    "coarsen_counts",
    "coarsen_lengths",
    "length_histogram_from_lengths",
]

Int64 = NDArray[np.int64]


class Pieces(NamedTuple):
    """Where the pieces of split sequences come from; kept for over-length sequences only.

    Ids below `num_sequences` are whole sequences.  Piece `k`, tokens `start[k]:stop[k]` of sequence
    `source_id[k]`, has the id `num_sequences + k`.

    Example:
        >>> _, pools = length_histogram_from_lengths([3, 9], 4, over_length="split")
        >>> pieces = pools.pieces
        >>> list(zip(pieces.source_id.tolist(), pieces.start.tolist(), pieces.stop.tolist()))
        [(1, 0, 4), (1, 4, 8), (1, 8, 9)]
    """

    num_sequences: int
    source_id: Int64  # [p]
    start: Int64  # [p], tokens
    stop: Int64  # [p], tokens


@dataclass(frozen=True, eq=False)
class SequencePools:
    """The ids of all sequences, grouped by length.

    Attributes:
        ids: integers `[n]`, the ids by increasing length, in input order inside a length; or None
            when the sequences are numbered that way already (`identity`), which takes no memory.
        starts: int64 `[max_len + 2]`; the ids of length `l` are `ids[starts[l]:starts[l + 1]]`.
        pieces: what the ids of split sequences mean, None when nothing was split.

    Example:
        >>> _, pools = length_histogram_from_lengths([7, 5, 5, 3, 5])
        >>> pools[5].tolist(), pools.lookup(5, 2).tolist()
        ([1, 2, 4], 4)
    """

    ids: NDArray[Any] | None
    starts: Int64
    pieces: Pieces | None = None

    @classmethod
    def identity(cls, counts: ArrayLike | Mapping[int, int]) -> SequencePools:
        """Pools of sequences that are numbered by increasing length.  Time: O(max_len)."""
        return cls(None, offsets_of(as_counts("SequencePools.identity", counts)))

    @property
    def counts(self) -> Int64:
        """int64 `[max_len + 1]`: how many sequences have each length."""
        return np.diff(self.starts)

    @property
    def num_sequences(self) -> int:
        """How many ids there are, over all lengths."""
        return int(self.starts[-1])

    def __post_init__(self) -> None:
        if self.ids is not None and len(self.ids) != int(self.starts[-1]):
            fail(
                "SequencePools",
                f"there are {len(self.ids)} ids, but starts end at {self.starts[-1]}",
                "pass the ids of all lengths, and starts from their counts",
            )

    def __getitem__(self, length: int) -> NDArray[Any]:
        """Return the ids of all sequences of one length: a view."""
        length = check_int("SequencePools", "length", length)
        if not 0 <= length < len(self.starts) - 1:
            return np.zeros(0, np.int64)
        start, stop = self.starts[length : length + 2].tolist()
        return np.arange(start, stop) if self.ids is None else self.ids[start:stop]

    def lookup(self, length: ArrayLike, rank: ArrayLike) -> Int64:
        """Return the ids at `rank` of the pools of `length`; both broadcast.

        Ranks are not checked: they are in `[0, counts[length])`.  Time: O(result).
        """
        place = self.starts[np.asarray(length)] + np.asarray(rank)
        return place if self.ids is None else np.asarray(self.ids[place], np.int64)

    def coarsen(self, tolerance: int, max_seq_len: int) -> SequencePools:
        """Merge the pools of lengths that are planned alike (see `coarsen_lengths`).

        Buckets are ranges of lengths and ids are stored by length, so no id moves.

        Time: O(max_len).
        """
        if tolerance == 1:
            return self
        counts = coarsen_counts(self.counts, tolerance, max_seq_len)
        return SequencePools(self.ids, offsets_of(counts), self.pieces)

    def __getstate__(self) -> dict[str, Any]:
        ids = None if self.ids is None else to_portable(self.ids)
        pieces = None
        if self.pieces is not None:
            pieces = self.pieces._replace(**_each_array(to_portable, self.pieces))
        return {"ids": ids, "starts": to_portable(self.starts), "pieces": pieces}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ids, pieces = state["ids"], state["pieces"]
        if pieces is not None:
            pieces = pieces._replace(**_each_array(from_portable, pieces))
        object.__setattr__(self, "ids", None if ids is None else from_portable(ids))
        object.__setattr__(self, "starts", from_portable(state["starts"]))
        object.__setattr__(self, "pieces", pieces)


def _each_array(function: Callable[[Any], Any], pieces: Pieces) -> dict[str, Any]:
    return {name: function(getattr(pieces, name)) for name in ("source_id", "start", "stop")}


def as_counts(
    caller: str, counts: ArrayLike | Mapping[int, int], max_seq_len: int | None = None
) -> Int64:
    """Return a histogram in its canonical form, int64 `[max_len + 1]`, after checking it.

    Args:
        caller: the public function that an error shall name.
        counts: how many sequences have each length, indexed by length, or `{length: count}`.
        max_seq_len: the largest length that may have a count, in tokens.

    Raises:
        SeqpackError: a count is negative or not an integer, or a length is not in
            `[1, max_seq_len]`.
    """
    if isinstance(counts, Mapping):
        keys = check_integers(caller, "counts (keys)", list(counts.keys()))
        values = check_integers(caller, "counts (values)", list(counts.values()))
        if keys.size and (low := int(keys.min())) < 0:
            fail(caller, f"counts has the length {low}", "a length is at least 1 token")
        if max_seq_len is not None and keys.size and int(keys.max()) > max_seq_len:
            _fail_over(caller, int(keys.max()), counts[int(keys.max())], max_seq_len)
        if keys.size and int(keys.max()) > MAX_LENGTH:
            _fail_over(caller, int(keys.max()), counts[int(keys.max())], MAX_LENGTH)
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
        length = int(np.flatnonzero(array)[-1])
        _fail_over(caller, length, int(array[length]), max_seq_len)
    return array


def _fail_over(caller: str, length: int, count: int, max_seq_len: int) -> None:
    fail(
        caller,
        f"counts[{length}] = {count}, but max_seq_len is {max_seq_len}",
        "split or drop over-length sequences first, or raise max_seq_len",
    )


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


def length_histogram_from_lengths(
    lengths: ArrayLike, max_seq_len: int | None = None, *, over_length: str = "error"
) -> tuple[Int64, SequencePools]:
    """Count the sequences of each length and group their ids by length.

    One counting pass and one stable radix sort, whatever the number of distinct lengths.

    Time: O(n + max_len).  Memory: 8 bytes per sequence beside the input.

    Args:
        lengths: integers `[n]`, in tokens; sequence `i` has the id `i`.
        max_seq_len: the capacity of a row in tokens; None for no limit.
        over_length: `"error"` refuses lengths over `max_seq_len`; `"split"` cuts such sequences
            into pieces of `max_seq_len` tokens and a remainder.  Pieces get ids from `n` on, and
            `pools.pieces` says where they come from.

    Returns:
        `counts`, int64 `[max_len + 1]`, and the `SequencePools`.

    Raises:
        SeqpackError: a length is not an integer, below 1, or over `max_seq_len` without a policy.

    Example:
        >>> counts, pools = length_histogram_from_lengths([7, 5, 5, 5, 5, 5, 3, 3, 3])
        >>> {l: int(c) for l, c in enumerate(counts) if c}
        {3: 3, 5: 5, 7: 1}
        >>> counts, pools = length_histogram_from_lengths([3, 9], 4, over_length="split")
        >>> pools.ids.tolist(), pools.pieces.start.tolist()
        ([4, 0, 2, 3], [0, 4, 8])
    """
    caller = "length_histogram_from_lengths"
    check_choice(caller, "over_length", over_length, ("error", "split"))
    if max_seq_len is not None:
        max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1)
    limit = max_seq_len if over_length == "error" else None
    array = check_lengths(caller, lengths, limit).astype(np.int64, copy=False)
    if max_seq_len is None or array.size == 0 or int(array.max()) <= max_seq_len:
        return _group(array, None)
    pieces = _split(array, max_seq_len)
    # An over-length sequence is no sequence any more: length 0 keeps its id out of the pools.
    whole = np.where(array > max_seq_len, 0, array)
    return _group(np.concatenate([whole, pieces.stop - pieces.start]), pieces)


def _split(lengths: Int64, max_seq_len: int) -> Pieces:
    over = np.flatnonzero(lengths > max_seq_len)
    num_pieces = -(-lengths[over] // max_seq_len)
    first = np.cumsum(num_pieces) - num_pieces
    source_id = np.repeat(over, num_pieces)
    start = (np.arange(len(source_id)) - np.repeat(first, num_pieces)) * max_seq_len
    stop = np.minimum(start + max_seq_len, lengths[source_id])
    return Pieces(len(lengths), source_id, start, stop)


def _group(lengths: Int64, pieces: Pieces | None) -> tuple[Int64, SequencePools]:
    counts = np.bincount(lengths, minlength=1)
    keys = lengths
    if len(counts) > 1 << 16:  # rank the distinct lengths, to sort by 16 bits all the same
        keys = (np.cumsum(counts > 0) - 1)[lengths]
    if keys.size and int(keys.max()) < 1 << 16:
        keys = keys.astype(np.uint16)  # NumPy's stable sort of 16 bits is a radix sort
    ids = np.argsort(keys, kind="stable")[counts[0] :]
    counts[0] = 0
    return counts, SequencePools(ids, offsets_of(counts), pieces)
