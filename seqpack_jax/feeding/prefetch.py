"""Asking the kernel for what will be read from a token file, before it is waited for."""

from __future__ import annotations

import os
import threading
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

    Nothing is asked of other sources, nor where the system has no `posix_fadvise`.  What is in
    memory already costs a call per sequence far off, in a thread of its own.

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
        self._stretches: list[tuple[int, int]] = []  # what was read whole, in bytes of the file
        if isinstance(sequences, FlatSequences) and hasattr(os, "posix_fadvise"):
            found = to_portable(sequences.tokens)
            if isinstance(found, MappedArray):
                self._mapped, self._offsets = found, sequences.offsets
                memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
                # Twice the even share: what is wider has rows of two zones, or no stretch at all.
                self._large = sequences.tokens.nbytes * _SHARE > memory
                self._widest = min(memory // _SHARE, 2 * sequences.tokens.nbytes // zones)

    def ask(
        self, bins: Bins, last: int = 0, epoch: Epoch | None = None, row: int = 0
    ) -> threading.Thread | None:
        """Ask for the tokens of the sequences in bins.

        Time: O(k log k) in a thread of its own, and a system call per sequence or 256 kB.

        Args:
            bins: what is read next, in that order; ids that the source does not have are left out.
            last: the first of those bins that show where the stretch is: those of one batch, which
                are in one zone as a rule, are enough.  The number of bins if there is none because
                items are read in no order; then nothing is asked of files that memory holds.
            epoch: which they are of; None if nothing is known of a next zone.
            row: the last row of the epoch that they have.

        Returns:
            The thread that asks, to be waited for in tests; None if nothing is asked.
        """
        if self._mapped is None or not len(bins.ids):
            return None
        if last == len(bins) and not self._large:
            return None
        arguments = (self._mapped, bins, last, epoch, row)
        thread = threading.Thread(target=self._ask, args=arguments, daemon=True)
        thread.start()
        return thread

    def _ask(
        self, mapped: MappedArray, bins: Bins, last: int, epoch: Epoch | None, row: int
    ) -> None:
        try:
            file = os.open(mapped.path, os.O_RDONLY)
        except OSError:  # it was moved or removed; who has it mapped reads on
            return
        try:
            new = self._read_stretch(file, *self._bytes_of(mapped, bins[last:]))
            begin, end = self._bytes_of(mapped, bins)
            for low, high in self._stretches:
                far = (end <= low) | (begin >= high)
                begin, end = begin[far], end[far]
            apart = np.flatnonzero(begin[1:] > end[:-1] + _NEAR) + 1
            if len(begin):
                begin, end = begin[np.append(0, apart)], end[np.append(apart, len(end)) - 1]
            for start, stop in zip(begin.tolist(), end.tolist(), strict=True):
                _advise(file, start, stop)
            if new or epoch is None or epoch.zones is None:
                return
            start = epoch.zones.next_start(row, epoch.key, shuffle=epoch.shuffle)
            sample = epoch[start : start + _SAMPLE]  # nothing behind the last zone
            self._read_stretch(file, *self._bytes_of(mapped, sample))
        finally:
            os.close(file)

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

    def _read_stretch(self, file: int, begin: Int64, end: Int64) -> bool:
        """Read the stretch that holds most of these slices, if there is one that was not read."""
        edge = len(begin) // _EDGE
        low, high = (int(begin[edge]), int(end[-1 - edge])) if len(begin) else (0, 0)
        known = self._stretches
        read = any(2 * (min(high, b) - max(low, a)) > high - low for a, b in known)
        if read or high <= low or high - low > self._widest:
            return False
        self._stretches = [*known[-2:], (low, high)]  # at once: no other thread need do the same
        for start in range(low, high, _PIECE):
            _advise(file, start, min(start + _PIECE, high))
        return True


def _advise(file: int, start: int, stop: int) -> None:
    with suppress(OSError, OverflowError):  # damaged offsets; a file system that takes no advice
        os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_WILLNEED)
