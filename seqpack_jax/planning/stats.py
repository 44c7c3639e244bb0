"""How full a packing is, from a plan or from bins alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from seqpack_jax.arrays import part_sums
from seqpack_jax.errors import check_int, check_lengths, fail
from seqpack_jax.planning.bounds import volume_bound
from seqpack_jax.planning.histogram import Int64
from seqpack_jax.planning.plan import Bins, PackingPlan

__all__ = ["PackingStats"]


@dataclass(frozen=True)
class PackingStats:
    """Figures of one packing; `print` shows them as a small table.

    Attributes:
        num_bins: bins, the rows of one epoch.
        num_sequences: sequences over all bins.
        num_tokens: tokens over all sequences.
        max_seq_len: capacity of a bin in tokens.
        lower_bound: no packing of these sequences has fewer bins.
        max_segments: the most sequences in one bin.
        fullness_p50: half of the bins are at most this full, in `[0, 1]`; a value that occurs,
            never an interpolated one, so that both constructors agree.
        fullness_p90: the same for nine bins in ten.
        fullness_p99: the same for 99 bins in a hundred.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> print(PackingStats.from_plan(pack_length_histogram({5: 5, 3: 3, 7: 1}, 10)))
        PackingStats(
          bins:        5 (lower bound 5)
          sequences:   9 (avg 1.80/bin, max 2)
          tokens:      41 / 50 capacity
          efficiency:  82.00%
          padding:     9 (18.00%)
          fullness:    p50=100.0%  p90=100.0%  p99=100.0%
        )
    """

    num_bins: int
    num_sequences: int
    num_tokens: int
    max_seq_len: int
    lower_bound: int
    max_segments: int
    fullness_p50: float
    fullness_p90: float
    fullness_p99: float

    @classmethod
    def from_plan(cls, plan: PackingPlan) -> PackingStats:
        """Take the figures of a plan.  Time: O(size of the plan).

        With a tolerance, fullness counts tokens as they were planned.
        """
        bound = -(-plan.num_tokens // plan.max_seq_len)
        if plan.certificate is not None:
            bound = max(bound, plan.certificate.lower_bound)
        return cls._make(
            plan.fills, plan.multiplicity, plan.sizes, plan.num_tokens, plan.max_seq_len, bound
        )

    @classmethod
    def from_bins(cls, bins: Bins, lengths: ArrayLike, max_seq_len: int) -> PackingStats:
        """Take the figures of bins of ids; `lengths[id]` in tokens.  Time: O(n).

        Raises:
            SeqpackError: the bins do not hold each sequence exactly once, or one overflows.
        """
        max_seq_len = check_int("PackingStats.from_bins", "max_seq_len", max_seq_len, 1)
        array = check_lengths("PackingStats.from_bins", lengths, max_seq_len).astype(np.int64)
        if max_seq_len != bins.max_seq_len:
            fail(
                "PackingStats.from_bins",
                f"max_seq_len = {max_seq_len}, but the bins were packed for {bins.max_seq_len}",
                "pass the max_seq_len of the packing",
            )
        bins.check(array)
        fills = part_sums(array[bins.ids], bins.offsets)
        bound = volume_bound(np.bincount(array), max_seq_len)
        ones = np.ones(len(bins), np.int64)
        sizes = np.diff(bins.offsets)
        return cls._make(fills, ones, sizes, int(array.sum()), max_seq_len, bound)

    @classmethod
    def _make(
        cls, fills: Int64, weights: Int64, sizes: Int64, tokens: int, max_seq_len: int, bound: int
    ) -> PackingStats:
        order = np.argsort(fills, kind="stable")
        reached = np.cumsum(weights[order])
        bins = int(reached[-1]) if len(reached) else 0
        ranks = [-(-bins * percent // 100) for percent in (50, 90, 99)]
        at = [fills[order[np.searchsorted(reached, rank)]] if bins else 0 for rank in ranks]
        fullness = [float(fill) / max_seq_len for fill in at]
        most = int(sizes.max(initial=0))
        return cls(bins, int(sizes @ weights), tokens, max_seq_len, bound, most, *fullness)

    @property
    def capacity(self) -> int:
        """Tokens that all bins could hold."""
        return self.num_bins * self.max_seq_len

    @property
    def efficiency(self) -> float:
        """Tokens / capacity, in `[0, 1]`; 1.0 without bins."""
        return self.num_tokens / self.capacity if self.capacity else 1.0

    @property
    def padding_ratio(self) -> float:
        """The share of the capacity that is padding."""
        return 1.0 - self.efficiency

    def __str__(self) -> str:
        mean = self.num_sequences / max(1, self.num_bins)
        p50, p90, p99 = self.fullness_p50, self.fullness_p90, self.fullness_p99
        return (
            "PackingStats(\n"
            f"  bins:        {self.num_bins:,} (lower bound {self.lower_bound:,})\n"
            f"  sequences:   {self.num_sequences:,} (avg {mean:.2f}/bin, max {self.max_segments})\n"
            f"  tokens:      {self.num_tokens:,} / {self.capacity:,} capacity\n"
            f"  efficiency:  {self.efficiency:.2%}\n"
            f"  padding:     {self.capacity - self.num_tokens:,} ({self.padding_ratio:.2%})\n"
            f"  fullness:    p50={p50:.1%}  p90={p90:.1%}  p99={p99:.1%}\n"
            ")"
        )
