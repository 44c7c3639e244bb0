"""Asking the kernel for what will be read from a token file, before it is waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from seqpack_jax.arrays import MappedArray, to_portable
from seqpack_jax.feeding.epoch import Epoch
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.histogram import Int64

__all__ = ["Prefetch"]

_PIECE = 1 << 18  # bytes; the kernel takes no more of one request than it reads ahead itself
_EDGE = 16  # one of so many sequences lies before the stretch that holds most, and one behind it
_SHARE = 4  # a stretch of at most this part of the memory is read whole
_NEAR = 1 << 14  # bytes between two sequences that are read with them
_SAMPLE = 64  # bins that show where the stretch of the next zone is


class Prefetch:
    """Has a memory-mapped token file read in the background, ahead of those who read sequences.

    Sequences that are read next, those of a thousand rows, say, mostly lie in one stretch of the
    file if an epoch has zones.  The stretch is read in order, at the speed of the disk, when it is
    first seen, and that of the next zone soon after; sequences far off, of rare lengths, are asked
    for one by one.  If the stretch would not stay in memory, as that of a file without zones, each
    sequence is asked for.

    Nothing is asked of other sources, nor where the system has no `posix_fadvise`.

    Args:
        sequences: the source, of which a `FlatSequences` over a memory map is prefetched.
        zones: how many zones the epoch has.

    Example:
        >>> from seqpack_jax import pack_sequences
        >>> Prefetch([[1, 2], [3]]).ask(pack_sequences([2, 1], 4)) is None
        True
    """

    def __init__(self, sequences: Any, zones: int = 1) -> None:
        self._mapped: MappedArray | None = None
        self._following: tuple[int | None, int] | None = None  # the next zone: key, first row
        self._stretches: list[tuple[int, int]] = []  # what was read whole, in bytes of the file
        if isinstance(sequences, FlatSequences) and hasattr(os, "posix_fadvise"):
            found = to_portable(sequences.tokens)
            if isinstance(found, MappedArray):
                self._mapped, self._offsets = found, sequences.offsets
                memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
                self._large = sequences.tokens.nbytes * _SHARE > memory
                # Twice the even share: what is wider has rows of two zones, or no stretch at all.
                self._widest = min(memory // _SHARE, 2 * sequences.tokens.nbytes // zones)

    def ask(
        self, bins: Bins, last: int = 0, epoch: Epoch | None = None, row: int = 0
    ) -> threading.Thread | None:
        """Ask for the tokens of the sequences in bins.

        Time: O(k log k), and a system call per sequence off the stretch; in a thread of its own,
        one per 256 kB of a stretch.

        Args:
            bins: what is read next, in that order; ids that the source does not have are left out.
            last: the first of those bins that show where the stretch is: those of one batch, which
                are in one zone as a rule, are enough.  The number of bins if there is none because
                items are read in no order; then nothing is asked of files that memory holds.
            epoch: which they are of; None if nothing is known of a next zone.
            row: the last row of the epoch that they have.

        Returns:
            The thread that reads a stretch, to be waited for in tests; None if none is read.
        """
        if self._mapped is None or not len(bins.ids):
            return None
        in_order = last < len(bins)
        if not (in_order or self._large):
            return None
        begin, end = self._bytes_of(self._mapped, bins)
        stretch = self._find_stretch(*self._bytes_of(self._mapped, bins[last:]))
        for low, high in self._stretches:
            far = (end <= low) | (begin >= high)
            begin, end = begin[far], end[far]
        apart = np.flatnonzero(begin[1:] > end[:-1] + _NEAR) + 1
        if len(begin):
            begin, end = begin[np.append(0, apart)], end[np.append(apart, len(end)) - 1]
        # At once: who reads these without it has the kernel read much around each, and waits.
        self._advise(zip(begin.tolist(), end.tolist(), strict=True))
        following = None
        if in_order and stretch is None and epoch is not None and epoch.zones is not None:
            start = epoch.zones.next_start(row, epoch.key, shuffle=epoch.shuffle)
            following = (epoch, start) if self._following != (epoch.key, start) else None
            self._following = epoch.key, start
        if stretch is None and following is None:
            return None
        thread = threading.Thread(target=self._read, args=(stretch, following), daemon=True)
        thread.start()
        return thread

    def _read(self, stretch: tuple[int, int] | None, following: tuple[Epoch, int] | None) -> None:
        """Read a stretch, or that of the zone that starts with a row of an epoch."""
        if following is not None and self._mapped is not None:
            epoch, start = following  # behind the last zone there are no bins
            sample = epoch[start : start + _SAMPLE]
            stretch = self._find_stretch(*self._bytes_of(self._mapped, sample))
        if stretch is not None:
            low, high = stretch
            starts = range(low, high, _PIECE)
            self._advise((start, min(start + _PIECE, high)) for start in starts)

    def _bytes_of(self, mapped: MappedArray, bins: Bins) -> tuple[Int64, Int64]:
        """Return where their sequences start and end in the file, in the order of the file."""
        ids, offsets = bins.ids, self._offsets
        if bins.pieces is not None:
            split = np.flatnonzero(ids >= bins.pieces.first_id)
            ids = ids.copy()
            ids[split] = bins.pieces.table[ids[split] - bins.pieces.first_id][:, 0]
        ids = np.sort(ids[(ids >= 0) & (ids < len(offsets) - 1)])
        bounds = np.stack([offsets[ids], offsets[ids + 1]]).astype(np.int64)
        bounds = bounds * np.dtype(mapped.dtype).itemsize + mapped.offset
        return bounds[0], bounds[1]

    def _find_stretch(self, begin: Int64, end: Int64) -> tuple[int, int] | None:
        """Return the stretch that holds most of these slices, if there is one that was not read."""
        edge = len(begin) // _EDGE
        low, high = (int(begin[edge]), int(end[-1 - edge])) if len(begin) else (0, 0)
        known = self._stretches
        read = any(2 * (min(high, b) - max(low, a)) > high - low for a, b in known)
        if read or high <= low or high - low > self._widest:
            return None
        self._stretches = [*known[-2:], (low, high)]  # at once: no other thread need do the same
        return low, high

    def _advise(self, slices: Iterable[tuple[int, int]]) -> None:
        """Ask for slices of the file, in bytes."""
        if self._mapped is None:
            return
        # Without the file, with damaged offsets, or where it takes no advice, readers read on.
        with suppress(OSError, OverflowError), open(self._mapped.path, "rb", buffering=0) as file:
            for start, stop in slices:
                os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)
