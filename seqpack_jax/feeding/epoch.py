"""An epoch is arithmetic: which sequences fill bin `i` is a function of (plan, seed, epoch, i).

Nothing is shuffled in memory.  The order of the bins and the pairing of sequences inside a pool are
stateless bijections, evaluated where they are asked for, so any host or worker can draw any bin of
any epoch, and a run that stops goes on exactly where it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import MAX_LENGTH, check_choice, check_int, check_integers, fail
from seqpack_jax.feeding.zones import MAX_ZONES, Zones, pools_of_slots
from seqpack_jax.permutation import permute, seed_from_components
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.histogram import Int64, SequencePools
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.vectors import VectorBins, VectorPlan

__all__ = ["Epoch", "EpochShard", "materialize_epoch", "shuffle_bins"]

_CHUNK = 1 << 14  # bins that iteration draws at once
_Item = TypeVar("_Item")


class _RandomAccess(ABC):
    """Items, slices and iteration, of whatever can draw bins."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def bins(self, indices: ArrayLike) -> Bins:
        """Return the bins at `indices`, in that order."""

    @overload
    def __getitem__(self, index: int) -> Int64: ...
    @overload
    def __getitem__(self, index: slice) -> Bins: ...
    def __getitem__(self, index: int | slice) -> Int64 | Bins:
        """Return the ids in one bin, or the `Bins` of a slice."""
        if isinstance(index, slice):
            return self.bins(np.arange(*index.indices(len(self))))
        place = check_int(type(self).__name__, "index", index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"bin {place} of {len(self)}")
        return self.bins([place % len(self)]).ids

    def __iter__(self) -> Iterator[Int64]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def _check(self, indices: ArrayLike) -> Int64:
        name = type(self).__name__
        index = check_integers(f"{name}.bins", "indices", indices).astype(np.int64)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            at = int(((index < 0) | (index >= len(self))).argmax())
            fail(
                f"{name}.bins",
                f"indices[{at}] = {index[at]}, but there are {len(self)} bins",
                f"take indices in [0, {len(self)})",
            )
        return index


@dataclass(frozen=True, eq=False)
class Epoch(_RandomAccess):
    """One assignment of the ids to the bins of a plan, and one order of the bins.

    Made by `materialize_epoch`.  `len(epoch)` is the number of bins; `epoch[i]` is the ids in bin
    `i`; `epoch[a:b]` and `epoch.bins(indices)` are `Bins`; iteration goes over all bins.

    Time: O(result) to read, with zones as in `bins`.  Memory: nothing but the plan and the pools;
    with zones, up to 32 MB of tables (or four tables, of some 5 to 10 bytes per slot of the plan).

    Attributes:
        plan: which lengths share a bin.
        pools: the ids of each planned length.
        key: seeds the pairings (plus the length, for each pool) and, plus 0, the order of the bins;
            None for pools and bins in their own order.  `Bins` carry it to `pack_batch`, where it
            selects the windows of `"crop"`.
        shuffle: whether the bins come in an order of their own.
        zones: how the epoch is cut into zones, None for one whole.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> counts = {512: 10**9}
        >>> plan = pack_length_histogram(counts, max_seq_len=2048)
        >>> epoch = materialize_epoch(plan, SequencePools.identity(counts), seed=0)
        >>> len(epoch), len(epoch[123_456_789]), len(epoch.bins([3, 200_000_000]))
        (250000000, 4, 2)
    """

    plan: PackingPlan | VectorPlan
    pools: SequencePools
    key: int | None
    shuffle: bool
    zones: Zones | None = None

    def __len__(self) -> int:
        return self.plan.num_bins

    def bins(self, indices: ArrayLike) -> Bins:
        """Return the bins at `indices`, in that order.

        Time: O(sequences in those bins).  With zones, also O(size of the plan) for each zone that
        was not read lately, some milliseconds where a plan has 100,000 slots: read zone by zone.

        Args:
            indices: integers `[b]` in `[0, len(epoch))`.

        Raises:
            SeqpackError: an index is out of range.
        """
        return self.bins_and_lengths(indices)[0]

    def bins_and_lengths(self, indices: ArrayLike) -> tuple[Bins, NDArray[np.int32]]:
        """Return the bins at `indices`, and the planned length of each of their ids in tokens.

        Lengths are int32 `[m]`; for a `VectorPlan`, `[m, k]`.
        """
        plan, pools, zones = self.plan, self.pools, self.zones
        index = self._check(indices)
        if zones is not None:
            zone, template, number = zones.place(index, self.key, shuffle=self.shuffle)
        else:
            if self.key is not None and self.shuffle:
                index = permute(index, max(1, len(self)), self.key)
            template = np.searchsorted(plan.bin_starts, index, side="right") - 1
            number = index - plan.bin_starts[template]
        sizes = plan.sizes[template]
        offsets = offsets_of(sizes)
        # Of every slot: where it is in the plan, and which of the bins here has it.
        slot = np.arange(offsets[-1]) + np.repeat(plan.offsets[template] - offsets[:-1], sizes)
        owner = np.repeat(np.arange(len(index)), sizes)
        pool = pools_of_slots(plan)[slot]
        if zones is not None:
            rank = zones.ranks(zone, number, slot, owner, self.key)
        else:
            rank = plan.slot_starts[slot] + number[owner]
            if self.key is not None:
                count = pools.starts[pool + 1] - pools.starts[pool]
                rank = permute(rank, count, np.uint64(self.key) + pool.astype(np.uint64))
        ids = pools.lookup(pool, rank)
        if isinstance(plan, VectorPlan):
            return VectorBins(ids, offsets, plan.max_seq_len, key=self.key), plan.vectors[pool]
        over_length = (pools.pieces, pools.over_length, pools.report)
        return Bins(ids, offsets, plan.max_seq_len, *over_length, key=self.key), pool

    def shard(self, index: int, count: int, *, remainder: str = "pad") -> EpochShard:
        """Return the part of one of `count` ranks, to be read like the epoch itself.

        All ranks pass the same seed and epoch, and each its own `index`: together they see every id
        exactly once, in equally many rows.  A seed per rank would be a data set per rank instead.

        Time: O(1).

        Args:
            index: the number of this rank (process, device or worker), in `[0, count)`.
            count: how many ranks share the epoch.
            remainder: if the rows do not come out even: `"pad"` gives the last ranks an empty row,
                `"drop"` leaves the last rows of the epoch out: fewer than `count`, and other
                sequences in each epoch, because rows are shuffled (if `seed` and `shuffle` say so).

        Raises:
            SeqpackError: an argument is out of range.

        Example:
            >>> from seqpack_jax import pack_length_histogram
            >>> counts = {5: 6, 3: 4}
            >>> plan = pack_length_histogram(counts, max_seq_len=10)
            >>> epoch = materialize_epoch(plan, SequencePools.identity(counts), seed=0)
            >>> [len(epoch.shard(i, 2)) for i in range(2)], len(epoch)
            ([3, 3], 5)
            >>> sorted(id for i in range(2) for ids in epoch.shard(i, 2) for id in ids.tolist())
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        """
        caller = "Epoch.shard"
        count = check_int(caller, "count", count, 1)
        index = check_int(caller, "index", index, 0, count - 1)
        return EpochShard(
            self, index, count, check_choice(caller, "remainder", remainder, ("pad", "drop"))
        )


@dataclass(frozen=True, eq=False)
class EpochShard(_RandomAccess):
    """The rows of an epoch that one of several ranks reads; made by `Epoch.shard`.

    Row `s` of shard `i` is row `s * count + i` of the epoch, so that the ranks together read the
    epoch in its order.  Reads as an `Epoch` does: `shard[s]`, `shard[a:b]`, `shard.bins(indices)`,
    iteration; its `len` is the same for all ranks.  A row beyond the end of the epoch is empty.

    Time: O(result) to read.

    Attributes:
        epoch: the whole.
        index: the number of this rank.
        count: how many ranks there are.
        remainder: `"pad"` or `"drop"`.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> plan = pack_length_histogram({8: 5}, max_seq_len=8)
        >>> epoch = materialize_epoch(plan, SequencePools.identity({8: 5}))
        >>> [epoch.shard(i, 2)[0:3].tolist() for i in range(2)]
        [[[0], [2], [4]], [[1], [3], []]]
        >>> [epoch.shard(i, 2, remainder="drop")[:].tolist() for i in range(2)]
        [[[0], [2]], [[1], [3]]]
    """

    epoch: Epoch
    index: int
    count: int
    remainder: str

    def __len__(self) -> int:
        spare = self.count - 1 if self.remainder == "pad" else 0
        return (len(self.epoch) + spare) // self.count

    def bins(self, indices: ArrayLike) -> Bins:
        """Return the bins in the rows `indices` of this shard, in that order.

        Time: O(rows + sequences in them).

        Args:
            indices: integers `[b]` in `[0, len(shard))`.

        Raises:
            SeqpackError: an index is out of range.
        """
        row = self._check(indices) * self.count + self.index
        held = row < len(self.epoch)
        bins = self.epoch.bins(row[held])
        if held.all():
            return bins
        sizes = np.zeros(len(row), np.int64)
        sizes[held] = np.diff(bins.offsets)
        return replace(bins, offsets=offsets_of(sizes))


def materialize_epoch(
    templates: PackingPlan | VectorPlan | Mapping[tuple[int, ...], int],
    pools: SequencePools | Mapping[int, ArrayLike],
    seed: int | None = None,
    *,
    epoch: int = 0,
    shuffle: bool = True,
    zones: int = 1,
) -> Epoch:
    """Assign ids to the bins of a plan for one epoch, without writing any of it out.

    Every epoch uses each id exactly once, pairs sequences of each length anew, and takes the bins
    in a new order.  Any bin can be read at once; see `Epoch`.

    Time: O(size of the plan + max_len), whatever the number of sequences.

    Args:
        templates: a plan, from `pack_length_histogram` or `pack_vectors`; or `{template: bins}` as
            in the seed library.  The latter is taken in falling order of the templates, so that
            equal mappings give equal epochs; its `max_seq_len` is the fullest template.
        pools: the ids of each length, from `length_histogram_from_lengths`, of the same sequences;
            or `{length: ids}`, where memory maps stay such.
        seed: any int; with `epoch` it determines the result.  None keeps pools and plan in order.
        epoch: the number of the epoch, from 0.
        shuffle: False keeps the order of the bins and still pairs sequences anew.
        zones: into how many zones the epoch is cut, each of which draws from one contiguous stretch
            of every pool, for sequences that are read from a disk.  Zones come in an order of
            their own, so do the bins of each, and stretches shift between epochs; a pool that
            shifted gives its two ends to one zone.  With `shuffle=False`, bins come zone by zone,
            in the order of the plan.  No more zones are made than there are bins; choose no more
            than it takes for the stretches of one to fit in memory.

    Returns:
        An `Epoch` with as many bins as the plan.

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
        >>> materialize_epoch({(5, 3): 2}, {3: [0, 1], 5: [2, 3]})[0:2].tolist()
        [[2, 0], [3, 1]]
    """
    caller = "materialize_epoch"
    epoch = check_int(caller, "epoch", epoch, 0)
    seed = None if seed is None else check_int(caller, "seed", seed)
    plan = _as_plan(caller, templates)
    planned = _as_pools(caller, pools)
    true_counts = None
    if isinstance(plan, PackingPlan):
        true_counts = planned.counts if plan.tolerance > 1 else None
        planned = _coarsened(caller, plan, planned)
    _check_counts(caller, plan, planned)
    key = None if seed is None else seed_from_components(seed, epoch)
    number = min(check_int(caller, "zones", zones, 1, MAX_ZONES), plan.num_bins)
    cut = Zones(plan, number, true_counts) if number > 1 else None
    return Epoch(plan, planned, key, shuffle, cut)


def _coarsened(caller: str, plan: PackingPlan, planned: SequencePools) -> SequencePools:
    """Return the pools of planned lengths, if none is over `max_seq_len`."""
    longer = planned.counts[plan.max_seq_len + 1 :]
    if longer.any():  # coarsening would take them for sequences of max_seq_len tokens
        length = plan.max_seq_len + 1 + int(np.flatnonzero(longer)[0])
        fail(
            caller,
            f"the pools hold {planned.counts[length]} sequences of length {length}, but the "
            f"max_seq_len of the plan is {plan.max_seq_len} ({longer.sum()} sequences are over it)",
            "use the same max_seq_len and over_length policy for the pools and the plan",
        )
    return planned.coarsen(plan.tolerance, plan.max_seq_len)


def _check_counts(caller: str, plan: PackingPlan | VectorPlan, planned: SequencePools) -> None:
    counts, slots = planned.counts, plan.counts
    size = min(len(counts), len(slots))
    differ = counts[:size] != slots[:size]
    if differ.any() or counts[size:].any() or slots[size:].any():
        more = counts[size:] if len(counts) > size else slots[size:]
        length = int(differ.argmax()) if differ.any() else size + int((more > 0).argmax())
        have = int(counts[length]) if length < len(counts) else 0
        want = int(slots[length]) if length < len(slots) else 0
        what, hint = "planned length", "pack_length_histogram(pools.counts, max_seq_len)"
        if isinstance(plan, VectorPlan):
            what, hint = "class", "pack_vectors returns a plan with its pools"
        fail(
            caller,
            f"the pools hold {have} sequences of {what} {length}, the plan has {want} slots"
            f" of it ({planned.num_sequences} sequences, {plan.num_sequences} slots in all)",
            f"plan the counts of these pools: {hint}",
        )


def _as_plan(caller: str, templates: Any) -> PackingPlan | VectorPlan:
    if isinstance(templates, PackingPlan | VectorPlan):
        return templates
    if not isinstance(templates, Mapping):
        problem = f"templates is a {type(templates).__name__}, not a plan"
        fail(caller, problem, "pass a PackingPlan or {template: bins}")
    given = PackingPlan.from_counter(templates, MAX_LENGTH)
    return replace(given, max_seq_len=max(1, int(given.fills.max(initial=0))))


def _as_pools(caller: str, pools: Any) -> SequencePools:
    if isinstance(pools, SequencePools):
        return pools
    if not isinstance(pools, Mapping):
        problem = f"pools is a {type(pools).__name__}, not pools"
        fail(caller, problem, "pass SequencePools or {length: ids}")
    return SequencePools.from_mapping(pools)


@overload
def shuffle_bins(bin_indices: list[_Item], seed: int | None = None) -> list[_Item]: ...
@overload
def shuffle_bins(bin_indices: NDArray[Any], seed: int | None = None) -> NDArray[Any]: ...
def shuffle_bins(
    bin_indices: list[_Item] | NDArray[Any], seed: int | None = None
) -> list[_Item] | NDArray[Any]:
    """Return bin indices (or a list of bins) in another order; the argument stays as it is.

    For bins from `pack_sequences`; those of an `Epoch` are shuffled already.

    Time: O(n).

    Args:
        bin_indices: a list, or a 1-D array of integers.
        seed: any int; the same one gives the same order on every machine.  None leaves the order as
            it is (in the seed library it draws another one each time, which nobody can repeat).

    Returns:
        A new list, or a new array of the same dtype.

    Raises:
        SeqpackError: `bin_indices` is neither, or `seed` is not an integer.

    Example:
        >>> shuffle_bins([0, 1, 2, 3, 4], seed=1)
        [3, 4, 1, 0, 2]
        >>> shuffle_bins(np.arange(5), seed=2).tolist()
        [4, 2, 0, 3, 1]
    """
    caller = "shuffle_bins"
    seed = None if seed is None else check_int(caller, "seed", seed)
    if not isinstance(bin_indices, list):
        bin_indices = check_integers(caller, "bin_indices", bin_indices)
    order = np.arange(len(bin_indices))
    if seed is not None:
        order = permute(order, max(1, len(order)), seed_from_components(seed))
    if isinstance(bin_indices, list):
        return [bin_indices[i] for i in order.tolist()]
    return bin_indices[order]
