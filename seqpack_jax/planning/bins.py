"""`Bins`: the ids of the sequences in each bin, as a ragged array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from seqpack_jax.arrays import part_sums
from seqpack_jax.errors import check_int, check_integers, check_offsets, fail
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.over_length import (
    NOTHING_TOUCHED,
    REFUSE,
    OverLength,
    OverLengthReport,
    Pieces,
    PlannedLengths,
    apply_to_lengths,
)

__all__ = ["Bins"]


@dataclass(frozen=True, eq=False)
class Bins:
    """The ids of the sequences in each of a number of bins.

    Attributes:
        ids: int64 `[n]`.
        offsets: int64 `[b + 1]`; bin `i` holds `ids[offsets[i]:offsets[i + 1]]`.
        max_seq_len: capacity of a bin in tokens.
        pieces: what the ids of split sequences mean, None when nothing was split.
        over_length: the policy that says which tokens of an over-length sequence are in its bin.
        report: what that policy touched, in all bins of the packing.
        key: selects the windows of `"crop"`: that of the epoch (`Epoch.key`), or of the seed of
            `pack_sequences`; None keeps the first tokens.

    Example:
        >>> bins = Bins(np.array([4, 1, 0]), np.array([0, 2, 3]), max_seq_len=8)
        >>> len(bins), bins[0].tolist(), bins[1:].tolist()
        (2, [4, 1], [[0]])
    """

    ids: Int64
    offsets: Int64
    max_seq_len: int
    pieces: Pieces | None = None
    over_length: OverLength = REFUSE
    report: OverLengthReport = NOTHING_TOUCHED
    key: int | None = None

    def __len__(self) -> int:
        return max(0, len(self.offsets) - 1)

    @overload
    def __getitem__(self, index: int) -> Int64: ...
    @overload
    def __getitem__(self, index: slice) -> Bins: ...
    def __getitem__(self, index: int | slice) -> Int64 | Bins:
        """Return the ids of one bin (a view), or the `Bins` of a contiguous slice (views)."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                fail("Bins", f"the slice has step {step}", "take slices of step 1")
            offsets = self.offsets[start : max(start, stop) + 1]
            if not len(offsets):  # no bins, and not even the 0 that they start from
                return self
            ids = self.ids[offsets[0] : offsets[-1]]
            return replace(self, ids=ids, offsets=offsets - offsets[0])
        place = check_int("Bins", "index", index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"bin {place} of {len(self)}")
        place %= len(self)
        return self.ids[self.offsets[place] : self.offsets[place + 1]]

    def __iter__(self) -> Iterator[Int64]:
        return (self.ids[a:b] for a, b in pairwise(self.offsets.tolist()))

    def tolist(self) -> list[list[int]]:
        """Return the bins as lists of ids, the form that the seed library returns."""
        return [ids.tolist() for ids in self]

    def check(self, lengths: ArrayLike) -> None:
        """Raise `SeqpackError` unless each sequence is in exactly one bin and no bin overflows.

        What a policy dropped must be in no bin, and of what it split each piece in exactly one.

        Args:
            lengths: integers `[n]`, the length of every sequence before the over-length policy, in
                tokens.

        Time: O(n).
        """
        caller, hint = "Bins.check", "pack the sequences again"
        planned = apply_to_lengths(
            caller, self.over_length, lengths, self.max_seq_len, hint="pass the packed lengths"
        )
        array = self._lengths_of_ids(caller, planned)
        check_integers(caller, "ids", self.ids)
        check_offsets(caller, self.offsets, len(self.ids), len(self), hint)
        self._check_ids(caller, len(array), hint)
        uses = np.bincount(self.ids, minlength=len(array))
        wrong = uses != (array > 0)
        if wrong.any():
            index = int(wrong.argmax())
            what = f"sequence {index} is in {uses[index]} bins"
            if array[index] == 0:
                what += f", although it is over-length and over_length={self.over_length.action!r}"
            more = int(np.count_nonzero(wrong))
            fail(caller, f"{what} ({more} such sequences)", hint)
        fills = part_sums(array[self.ids], self.offsets)
        if len(fills) and int(fills.max()) > self.max_seq_len:
            index = int(fills.argmax())
            fail(caller, f"bin {index} holds {fills[index]} tokens of {self.max_seq_len}", hint)

    def longest_first(self, lengths: ArrayLike) -> Bins:
        """Return the bins with their longest sequences first; equal ones keep their order.

        For kernels in which the rows of a batch share one schedule of tiles, as tokamax's splash
        attention does under `jax.vmap`: fewer tiles may be needed where boundaries lie alike.  Bins
        of plans are in this order already, but for `tolerance`; those of next fit keep the order of
        the input.

        Args:
            lengths: integers `[n]`, as in `check`.

        Time: O(n log n).

        Raises:
            SeqpackError: these are not the lengths that were packed.

        Example:
            >>> bins = Bins(np.array([0, 1, 2]), np.array([0, 2, 3]), max_seq_len=8)
            >>> bins.longest_first([3, 5, 7]).tolist()
            [[1, 0], [2]]
        """
        caller, hint = "Bins.longest_first", "pass the packed lengths"
        planned = apply_to_lengths(caller, self.over_length, lengths, self.max_seq_len, hint=hint)
        array = self._lengths_of_ids(caller, planned)
        self._check_ids(caller, len(array), hint)
        bins = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return replace(self, ids=self.ids[np.lexsort((-array[self.ids], bins))])

    def _check_ids(self, caller: str, count: int, hint: str) -> None:
        if len(self.ids) and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < count:
            fail(caller, f"an id is not in [0, {count})", hint)

    def _lengths_of_ids(self, caller: str, planned: PlannedLengths) -> Int64:
        """Return the tokens of every id, 0 where it is not packed, if the pieces are right."""
        (first_id, have), (want_id, want) = (
            (0, np.zeros((0, 4), np.int64)) if each is None else (each.first_id, each.table[:])
            for each in (self.pieces, planned.pieces)
        )
        if first_id != want_id or not np.array_equal(have, want):
            problem = f"the pieces are not those of these {len(planned.lengths)} lengths"
            fail(caller, problem, "pass the lengths that were packed")
        return planned.of_ids
