"""Asking the kernel for what will be read from a token file, before it is waited for."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np

from seqpack_jax.arrays import MappedArray, to_portable
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.planning.histogram import Int64

__all__ = ["Prefetch"]

_PIECE = 1 << 18  # bytes; the kernel takes no more of one request than it reads ahead itself
_EDGE = 16  # one of so many sequences lies before the stretch that holds most, and one behind it
_SHARE = 3  # a stretch of at most this part of the memory is read whole
_NEAR = 1 << 14  # bytes between two sequences that are read with them


class Prefetch:
    """Has a memory-mapped token file read in the background, ahead of those who read sequences.

    Sequences that are read next, those of a thousand rows, say, mostly lie in one stretch of the
    file if an epoch has zones.  The stretch is read in order, at the speed of the disk, when it is
    first seen; sequences far off it, of rare lengths, are asked for one by one.  Without zones, or
    if the stretch would not stay in memory, each sequence is asked for.

    Nothing is asked of other sources, nor where the system has no `posix_fadvise`.  What is in
    memory already costs a call per sequence far off, in a thread of its own.

    Args:
        sequences: the source, of which a `FlatSequences` over a memory map is prefetched.

    Example:
        >>> Prefetch([[1, 2], [3]]).ask(np.array([0, 1])) is None
        True
    """

    def __init__(self, sequences: Any) -> None:
        self._mapped: MappedArray | None = None
        self._stretch = (0, 0)  # what was read whole last, in bytes of the file
        if isinstance(sequences, FlatSequences) and hasattr(os, "posix_fadvise"):
            found = to_portable(sequences.tokens)
            if isinstance(found, MappedArray):
                self._mapped, self._offsets = found, sequences.offsets
                self._memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def ask(self, ids: Int64) -> threading.Thread | None:
        """Ask for the tokens of some sequences.

        Time: O(k log k) in a thread of its own, and a system call per sequence or 256 kB.

        Args:
            ids: int64 `[k]`, in any order; those that the source does not have are left out.

        Returns:
            The thread that asks, to be waited for in tests; None if nothing is asked.
        """
        if self._mapped is None or not len(ids):
            return None
        thread = threading.Thread(target=self._ask, args=(self._mapped, ids), daemon=True)
        thread.start()
        return thread

    def _ask(self, mapped: MappedArray, ids: Int64) -> None:
        offsets = self._offsets
        ids = np.sort(ids[(ids >= 0) & (ids < len(offsets) - 1)])
        if not len(ids):
            return
        size = np.dtype(mapped.dtype).itemsize
        begin = np.asarray(offsets[ids], np.int64) * size + mapped.offset
        end = np.asarray(offsets[ids + 1], np.int64) * size + mapped.offset
        try:
            file = os.open(mapped.path, os.O_RDONLY)
        except OSError:  # it was moved or removed; who has it mapped reads on
            return
        try:
            edge = len(ids) // _EDGE
            low, high = int(begin[edge]), int(end[-1 - edge])
            if (high - low) * _SHARE <= self._memory:
                self._read_stretch(file, low, high)
                low, high = self._stretch
                far = (end <= low) | (begin >= high)
                begin, end = begin[far], end[far]
            apart = np.flatnonzero(begin[1:] > end[:-1] + _NEAR) + 1
            if len(begin):
                begin, end = begin[np.append(0, apart)], end[np.append(apart, len(end)) - 1]
            for start, stop in zip(begin.tolist(), end.tolist(), strict=True):
                _advise(file, start, stop)
        finally:
            os.close(file)

    def _read_stretch(self, file: int, low: int, high: int) -> None:
        """Read a stretch, unless most of it was read last."""
        first, last = self._stretch
        if 2 * (min(high, last) - max(low, first)) > high - low:
            return
        self._stretch = (low, high)  # at once: another thread need not do the same
        for start in range(low, high, _PIECE):
            _advise(file, start, min(start + _PIECE, high))


def _advise(file: int, start: int, stop: int) -> None:
    os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_WILLNEED)
