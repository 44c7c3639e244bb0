"""An epoch is arithmetic: which sequences fill bin `i` is a function of (plan, seed, epoch, i).

Nothing is shuffled in memory.  The order of the bins and the pairing of sequences inside a pool are
stateless bijections, evaluated where they are asked for, so any host or worker can draw any bin of
any epoch, and a run that stops goes on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import check_int, check_integers, fail
from seqpack_jax.permutation import permute, seed_from_components
from seqpack_jax.planning.histogram import Int64, SequencePools
from seqpack_jax.planning.plan import Bins, PackingPlan

__all__ = ["Epoch", "materialize_epoch"]

_CHUNK = 1 << 14  # bins that iteration draws at once


@dataclass(frozen=True, eq=False)
class Epoch:
    """One assignment of the ids to the bins of a plan, and one order of the bins.

    Made by `materialize_epoch`.  `len(epoch)` is the number of bins; `epoch[i]` is the ids in bin
    `i`; `epoch[a:b]` and `epoch.bins(indices)` are `Bins`; iteration goes over all bins.

    Time: O(result) to read.  Memory: nothing but the plan and the pools.

    Attributes:
        plan: which lengths share a bin.
        pools: the ids of each planned length.
        key: seeds the pairings (plus the length, for each pool) and, plus 0, the order of the bins;
            None for pools and bins in their own order.
        shuffle: whether the bins come in an order of their own.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> counts = {512: 10**9}
        >>> plan = pack_length_histogram(counts, max_seq_len=2048)
        >>> epoch = materialize_epoch(plan, SequencePools.identity(counts), seed=0)
        >>> len(epoch), len(epoch[123_456_789]), len(epoch.bins([3, 200_000_000]))
        (250000000, 4, 2)
    """

    plan: PackingPlan
    pools: SequencePools
    key: int | None
    shuffle: bool

    def __len__(self) -> int:
        return self.plan.num_bins

    @overload
    def __getitem__(self, index: int) -> Int64: ...
    @overload
    def __getitem__(self, index: slice) -> Bins: ...
    def __getitem__(self, index: int | slice) -> Int64 | Bins:
        """Return the ids in one bin, or the `Bins` of a slice."""
        if isinstance(index, slice):
            return self.bins(np.arange(*index.indices(len(self))))
        place = check_int("Epoch", "index", index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"bin {place} of {len(self)}")
        return self.bins([place % len(self)]).ids

    def __iter__(self) -> Iterator[Int64]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def bins(self, indices: ArrayLike) -> Bins:
        """Return the bins at `indices`, in that order.

        Time: O(sequences in those bins).

        Args:
            indices: integers `[b]` in `[0, len(epoch))`.

        Raises:
            SeqpackError: an index is out of range.
        """
        return self.bins_and_lengths(indices)[0]

    def bins_and_lengths(self, indices: ArrayLike) -> tuple[Bins, NDArray[np.int32]]:
        """Return the bins at `indices`, and the planned length of each of their ids in tokens."""
        plan = self.plan
        index = check_integers("Epoch.bins", "indices", indices).astype(np.int64)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            at = int(((index < 0) | (index >= len(self))).argmax())
            fail(
                "Epoch.bins",
                f"indices[{at}] = {index[at]}, but the epoch has {len(self)} bins",
                "take indices in [0, len(epoch))",
            )
        if self.key is not None and self.shuffle:
            index = permute(index, max(1, len(self)), self.key)
        template = np.searchsorted(plan.bin_starts, index, side="right") - 1
        sizes = plan.sizes[template]
        offsets = offsets_of(sizes)
        # Of every slot: where it is in the plan, and which bin of its template it belongs to.
        slot = np.arange(offsets[-1]) + np.repeat(plan.offsets[template] - offsets[:-1], sizes)
        bin_of_template = np.repeat(index - plan.bin_starts[template], sizes)
        length = plan.lengths[slot]
        rank = plan.slot_starts[slot] + bin_of_template
        if self.key is not None:
            count = self.pools.starts[length + 1] - self.pools.starts[length]
            rank = permute(rank, count, np.uint64(self.key) + length.astype(np.uint64))
        return Bins(self.pools.lookup(length, rank), offsets, plan.max_seq_len), length


def materialize_epoch(
    plan: PackingPlan,
    pools: SequencePools,
    *,
    seed: int | None = None,
    epoch: int = 0,
    shuffle: bool = True,
) -> Epoch:
    """Assign ids to the bins of a plan for one epoch, without writing any of it out.

    Every epoch uses each id exactly once, pairs sequences of each length anew, and takes the bins
    in a new order.  Any bin can be read at once; see `Epoch`.

    Time: O(size of the plan + max_len), whatever the number of sequences.

    Args:
        plan: from `pack_length_histogram`.
        pools: the ids of each length, from `length_histogram_from_lengths`, of the same sequences.
        seed: any int; with `epoch` it determines the result.  None keeps pools and plan in order.
        epoch: the number of the epoch, from 0.
        shuffle: False keeps the order of the bins and still pairs sequences anew.

    Returns:
        An `Epoch` of `plan.num_bins` bins.

    Raises:
        SeqpackError: the pools do not hold the sequences that were planned.

    Example:
        >>> from seqpack_jax import length_histogram_from_lengths, pack_length_histogram
        >>> counts, pools = length_histogram_from_lengths([7, 5, 5, 5, 5, 5, 3, 3, 3])
        >>> plan = pack_length_histogram(counts, max_seq_len=10)
        >>> materialize_epoch(plan, pools)[0:5].tolist()
        [[0, 6], [1, 3], [2, 4], [5, 7], [8]]
        >>> epoch = materialize_epoch(plan, pools, seed=0, epoch=1)
        >>> sorted(epoch[0:5].ids.tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """
    caller = "materialize_epoch"
    epoch = check_int(caller, "epoch", epoch, 0)
    seed = None if seed is None else check_int(caller, "seed", seed)
    planned = pools.coarsen(plan.tolerance, plan.max_seq_len)
    counts, slots = planned.counts, plan.counts
    size = min(len(counts), len(slots))
    differ = counts[:size] != slots[:size]
    if differ.any() or counts[size:].any() or slots[size:].any():
        length = int(differ.argmax()) if differ.any() else size
        have = int(counts[length]) if length < len(counts) else 0
        want = int(slots[length]) if length < len(slots) else 0
        fail(
            caller,
            f"the pools hold {have} sequences of planned length {length}, the plan has {want} "
            f"slots of it ({pools.num_sequences} sequences, {plan.num_sequences} slots in all)",
            "plan the counts of these pools: pack_length_histogram(pools.counts, max_seq_len)",
        )
    key = None if seed is None else seed_from_components(seed, epoch)
    return Epoch(plan, planned, key, shuffle)
