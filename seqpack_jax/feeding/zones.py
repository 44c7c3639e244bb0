"""Zones: an epoch in parts that each read one stretch of storage.

A shuffled epoch reads sequences from everywhere at once.  Cut into `k` zones, it reads one `k`-th
of every pool after another, in an order of its own, and is shuffled inside of each.

A bin belongs to a zone by its *phase*, where it stands among all bins of its template: bin `i` of
`m` has the phase `(i + u) / m` in `[0, 1)`, and zone `z` those from `z / k` to `(z + 1) / k`.  The
offset `u` is that of template `t` in the golden-ratio sequence, which spreads any run of templates
evenly, so that templates of one bin each, which rare lengths have, are spread too.  The ids of a
length, as storage has them, are dealt to the zones in stretches: the first ids to zone 0, as many
as it has slots of that length, and so on.  Where each stretch starts is a sum over the plan, a pass
of whole arrays when a zone is first read.  Lengths that a tolerance plans alike share slots; there,
a zone gets its share of each, in proportion.

A stretch of a pool is a stretch of storage as far as the sequences of that length are spread evenly
over it.  Of `c` sequences in random order, one is about `0.5 / sqrt(c)` of all storage away from
its even place, whatever the number of zones: zones narrower than that of the lengths which have
most of the tokens gain little, and a pool of fewer sequences than there are zones has no stretches.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.permutation import permute, seed_from_components
from seqpack_jax.planning.counts import Int64, coarsen_lengths
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.vectors import VectorPlan

__all__ = ["MAX_ZONES", "Zones", "pools_of_slots"]

MAX_ZONES = 1 << 16
_CACHED_BYTES = 1 << 25  # of tables of zones
_CACHED_ZONES = 4  # at least
_BLOCK = 1 << 18  # bins whose zones are computed at once
_GOLDEN = np.uint64(0x9E3779B9)  # 2**32 / golden ratio
# With the key of an epoch, they seed what concerns all zones; a zone is seeded by key and number.
_ORDER, _TURN = -1, -2


def pools_of_slots(plan: PackingPlan | VectorPlan) -> NDArray[np.int32]:
    """Return int32 `[s]`, the pool that each slot draws from: its length, or its class."""
    return plan.classes if isinstance(plan, VectorPlan) else plan.lengths


class _Slots(NamedTuple):
    """The slots of a plan by planned length, of which there are `d`, and the pools of true lengths.

    The same for all zones.
    """

    order: Int64  # [s], slots by rising planned length
    template: Int64  # [s], of the slots in that order
    firsts: Int64  # [d + 1], where the slots of each planned length start there
    group: Int64  # [s], which of the d planned lengths a slot has
    pools: Int64  # [d + 1], where the pools of each planned length start among all p of them
    counts: Int64  # [p], ids in each pool
    starts: Int64  # [p], where its ids start among those of its planned length


class _Table(NamedTuple):
    """The bins of one zone, and what they take from the pools."""

    bin_starts: Int64  # [t + 1], as those of the plan, of the bins of the zone alone
    ranks: NDArray[Any]  # [s], where each slot starts in what its planned length has in the zone
    sizes: Int64  # [d], how much that is
    starts: Int64  # [p], where the stretch of the zone starts in each pool
    offsets: Int64  # [p + 1], where it starts among the stretches of all pools


@dataclass(frozen=True, eq=False)
class Zones:
    """How the bins of a plan and the ids of its pools are dealt to zones, in any epoch.

    Tables of a few zones are kept, of all in small plans; they do not depend on the epoch.  Threads
    may share them.

    Attributes:
        plan: whose bins are dealt.
        count: how many zones there are, at most `MAX_ZONES`; some may be empty.
        pool_counts: int64 `[max_len + 1]`, how many sequences have each true length; None if the
            plan has no tolerance.
    """

    plan: PackingPlan | VectorPlan
    count: int
    pool_counts: Int64 | None = None

    def __getstate__(self) -> dict[str, Any]:
        counts = self.pool_counts
        squeezed = None if counts is None else zlib.compress(counts.astype("<i8").tobytes())
        return {"plan": self.plan, "count": self.count, "pool_counts": squeezed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["pool_counts"] is not None:
            state["pool_counts"] = np.frombuffer(zlib.decompress(state["pool_counts"]), "<i8")
        self.__dict__.update(state)

    def place(self, index: Int64, key: int | None, *, shuffle: bool) -> tuple[Int64, Int64, Int64]:
        """Return where bins are: zone, template, and number among the bins of both; each `[b]`.

        Time: O(result + zones), and O(size of the plan) for each zone that was not read lately;
        once, at most O(zones * templates), less where templates have fewer bins than zones.

        Args:
            index: int64 `[b]`, in the order of the epoch.
            key: that of the epoch, None for no order but that of the plan.
            shuffle: whether zones, and bins inside of each, come in an order of their own.
        """
        order, starts = self._order(key if shuffle else None)
        turn = np.searchsorted(starts, index, side="right") - 1
        zone, number = order[turn], index - starts[turn]
        if key is not None and shuffle:
            number = permute(number, starts[turn + 1] - starts[turn], self._keys(key, zone))
        template = np.empty_like(zone)
        for each, here in _parts(zone):
            bin_starts = self._table(each).bin_starts
            template[here] = np.searchsorted(bin_starts, number[here], side="right") - 1
            number[here] -= bin_starts[template[here]]
        return zone, template, number

    def next_start(self, index: int, key: int | None, *, shuffle: bool) -> int:
        """Return the first bin, in the order of the epoch, of the zone behind that of a bin.

        Time: O(log zones), once O(zones).
        """
        _, starts = self._order(key if shuffle else None)
        return int(starts[np.searchsorted(starts, index, side="right")])

    def ranks(
        self, zone: Int64, number: Int64, slot: Int64, owner: Int64, key: int | None
    ) -> Int64:
        """Return the rank, in its pool, of what fills each slot: int64 `[n]`.

        In each epoch anew, all pools are turned by the same part of a zone, or sequences on the two
        sides of a border between zones would never meet.  So one zone has both ends of each pool.

        Time: O(result), and as `place` for a zone that was not read lately.

        Args:
            zone: int64 `[b]`, of each bin.
            number: int64 `[b]`, among the bins of its zone and template.
            slot: int64 `[n]`, the slots of these bins, in the plan.
            owner: int64 `[n]`, which of the bins each of them is in.
            key: that of the epoch, None to leave all in order.
        """
        slots, of_slot = self._slots, zone[owner]
        group = slots.group[slot]
        size, start, pool = np.empty((3, len(slot)), np.int64)
        rank = number[owner]
        tables = [(self._table(each), here) for each, here in _parts(of_slot)]
        for table, here in tables:
            rank[here] += table.ranks[slot[here]].astype(np.int64)
            size[here] = table.sizes[group[here]]
        if key is not None:
            planned = pools_of_slots(self.plan)[slot].astype(np.uint64)
            rank = permute(rank, size, self._keys(key, zone)[owner] + planned)
        for table, here in tables:
            own = group[here]
            if self.pool_counts is not None:  # which of the lengths that are planned as this one
                place = rank[here] + table.offsets[slots.pools[own]]
                own = np.searchsorted(table.offsets, place, side="right") - 1
                rank[here] = place - table.offsets[own]
            start[here], pool[here] = table.starts[own], own
        rank += start
        if key is not None:
            turn = seed_from_components(key, _TURN) / 2.0**64 / self.count
            rank += (slots.counts * turn).astype(np.int64)[pool]
            rank %= slots.counts[pool]
        return rank + slots.starts[pool]

    def _keys(self, key: int, zone: Int64) -> NDArray[np.uint64]:
        """Return the seed of each of these zones."""
        distinct, places = np.unique(zone, return_inverse=True)
        keys = [seed_from_components(key, each) for each in distinct.tolist()]
        return np.array(keys, np.uint64)[places]

    def _below(self, edge: int) -> Int64:
        """Return how many bins of each template are in the zones below `edge`: int64 `[t]`.

        Those with `(i + u) / m < edge / k` are the first `ceil(m * edge / k - u)`; in integers.
        """
        whole, rest = divmod(self.plan.multiplicity, self.count)
        more, rest = divmod(rest * edge, self.count)
        beyond = rest.astype(np.uint64) << np.uint64(32) > self._offsets * np.uint64(self.count)
        return np.asarray(whole * edge + more + beyond)

    @cached_property
    def _offsets(self) -> NDArray[np.uint64]:
        """The offset `u` of each template, times 2**32: uint64 `[t]`."""
        numbers = np.arange(self.plan.num_templates, dtype=np.uint64)
        return (numbers * _GOLDEN + np.uint64(1 << 31)) & np.uint64(2**32 - 1)

    @cached_property
    def _sizes(self) -> Int64:
        """How many bins each zone has: int64 `[zones]`.

        All have `m // k` bins of a template.  Of the rest, `r = m % k`, bin `j` is in the zone
        `floor((j + u) * k / r)`; these are counted some templates at a time.
        """
        whole, rest = divmod(self.plan.multiplicity, self.count)
        sizes = np.full(self.count, whole.sum())
        some = np.flatnonzero(rest)
        starts = offsets_of(rest[some])
        first = 0
        while first < len(some):
            last = int(np.searchsorted(starts, starts[first] + _BLOCK))
            of = some[first:last]
            owner = np.repeat(np.arange(len(of)), rest[of])
            bins = (np.arange(len(owner)) + starts[first] - starts[first:last][owner]).astype("u8")
            # In units of 2**-32, which are below 2**48, times the zones: below 2**64.
            phase = (bins << np.uint64(32)) + self._offsets[of][owner]
            zone = phase * np.uint64(self.count) // (rest[of].astype("u8") << np.uint64(32))[owner]
            sizes += np.bincount(zone.astype(np.int64), minlength=self.count)
            first = last
        return sizes

    @cached_property
    def _slots(self) -> _Slots:
        plan = self.plan
        planned = pools_of_slots(plan)
        order = np.argsort(planned, kind="stable")
        new = np.diff(planned[order], prepend=-1) > 0
        group = np.empty(len(order), np.int64)
        group[order] = np.cumsum(new) - 1
        template = np.repeat(np.arange(plan.num_templates), plan.sizes)[order]
        firsts = np.append(np.flatnonzero(new), len(order))
        pools = np.arange(len(firsts))
        counts = np.add.reduceat(plan.multiplicity[template], firsts[:-1])
        if self.pool_counts is not None and isinstance(plan, PackingPlan):
            lengths = np.flatnonzero(self.pool_counts)
            counts = self.pool_counts[lengths]
            coarse = coarsen_lengths(lengths, plan.tolerance, plan.max_seq_len)
            pools = np.append(np.searchsorted(coarse, planned[order][new]), len(lengths))
        starts = offsets_of(counts)[:-1]
        starts -= np.repeat(starts[pools[:-1]], np.diff(pools))
        return _Slots(order, template, firsts, group, pools, counts, starts)

    def _order(self, key: int | None) -> tuple[Int64, Int64]:
        """Return the order of the zones, and where each starts in the epoch."""
        known = self.__dict__.get("_last_order")
        if known is None or known[0] != key:
            order = np.arange(self.count)
            if key is not None:
                order = permute(order, self.count, seed_from_components(key, _ORDER))
            known = key, order, offsets_of(self._sizes[order])
            self.__dict__["_last_order"] = known
        return known[1], known[2]

    def _table(self, zone: int) -> _Table:
        """Return the table of a zone, from those that were kept if it is there."""
        kept: dict[int, _Table] = self.__dict__.get("_kept", {})
        table = kept.get(zone)
        if table is None:
            table = self._make_table(zone)
            most = max(_CACHED_ZONES, _CACHED_BYTES // sum(part.nbytes for part in table))
            newest = list(kept.items())[1 - most :]
            # In one step: of two threads that do so, one has its table to make again.
            self.__dict__["_kept"] = dict([*newest, (zone, table)])
        return table

    def _make_table(self, zone: int) -> _Table:
        slots = self._slots
        before, after = self._below(zone), self._below(zone + 1)
        sums = offsets_of((after - before)[slots.template])
        starts = np.add.reduceat(before[slots.template], slots.firsts[:-1])
        sizes = np.diff(sums[slots.firsts])
        ranks = np.empty(len(slots.order), np.min_scalar_type(int(sizes.max(initial=0))))
        ranks[slots.order] = sums[:-1] - np.repeat(sums[slots.firsts[:-1]], np.diff(slots.firsts))
        low, high = _shares(slots, starts), _shares(slots, starts + sizes)
        return _Table(offsets_of(after - before), ranks, sizes, low, offsets_of(high - low))


def _shares(slots: _Slots, totals: Int64) -> Int64:
    """Part the first `totals` ids of each planned length among its pools, in proportion: `[p]`.

    Id `i` of a pool of `c` stands at `(i + 1/2) / c`, in cells of `2**-40`; ids of all pools of a
    planned length are taken by cell, inside a cell by pool.  So larger totals hold smaller ones.
    """
    pools, counts = slots.pools, slots.counts
    if len(counts) == len(totals):
        return totals
    group = np.repeat(np.arange(len(totals)), np.diff(pools))

    def ids_below(cell: Int64) -> Int64:
        below = (counts * (cell / 2.0**40)[group] + 0.5).astype(np.int64)
        # Not by a float in the end, which cannot tell 2**53 from the next.
        return np.where((cell < 2**40)[group], np.minimum(below, counts), counts)

    low, high = np.zeros(len(totals), np.int64), np.full(len(totals), 2**40 + 1)
    while (high - low > 1).any():  # the last cell that begins inside the totals
        middle = (low + high) // 2
        inside = np.add.reduceat(ids_below(middle), pools[:-1]) <= totals
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    shares = ids_below(low)
    rest = totals - np.add.reduceat(shares, pools[:-1])
    more = ids_below(low + 1) - shares  # of a cell: one, unless there are over 2**40 ids
    before = offsets_of(more)[:-1]
    before -= before[pools[:-1]][group]
    return np.asarray(shares + np.clip(rest[group] - before, 0, more))


def _parts(zone: Int64) -> list[tuple[int, Any]]:
    """Return each zone that occurs, and where."""
    if not len(zone):
        return []
    if (zone == zone[0]).all():
        return [(int(zone[0]), slice(None))]
    order = np.argsort(zone.astype(np.uint16), kind="stable")  # a radix sort
    starts = np.flatnonzero(np.diff(zone[order], prepend=-1))
    return list(zip(zone[order[starts]].tolist(), np.split(order, starts[1:]), strict=True))
