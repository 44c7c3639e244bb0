"""First, best and worst fit decreasing on a histogram, and next fit in input order.

The decreasing heuristics place the longest sequences first, one at a time, each into the first bin
with room, the fullest bin with room, or the emptiest bin.  All sequences of one length are equal,
so what a heuristic does with a *run* of them follows at once: it fills bins in an order that is
known beforehand.  Bins that hold the same are kept as one group with a count.  The result is
exactly that of the per-item algorithm (the same number of bins, the same fills) in a time that
depends on the number of distinct lengths and not on the number of sequences.

What a bin holds is a path in a tree: each node adds some sequences of one length to its parent, and
a group of bins is a leaf with a count.  A run gives each leaf children that differ in how many
sequences they add, so no two leaves hold the same.

With `max_segments`, bins of equal room are told apart by the sequences they hold, and the bin with
the most of them goes first.

References:
    D. S. Johnson, "Near-optimal bin packing algorithms", PhD thesis, MIT, 1973.
    M. M. Krell, M. Kosec, S. P. Perez, A. Fitzgibbon, "Efficient sequence packing without
    cross-contamination", 2021: packing the histogram of a data set.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.planning.counts import Int64

__all__ = [
    "Templates",
    "best_fit_decreasing",
    "first_fit_decreasing",
    "next_fit_offsets",
    "worst_fit_decreasing",
]


class Templates(NamedTuple):
    """The bins of a plan, as in `PackingPlan`."""

    lengths: NDArray[np.int32]  # [k]
    offsets: Int64  # [t + 1]
    multiplicity: Int64  # [t]


class Tree:
    """What bins hold: node `i` adds `repeats[i]` sequences of `lengths[i]` to `parents[i]`."""

    def __init__(self) -> None:
        self.parents: list[int] = [-1]  # node 0 is the empty bin
        self.lengths: list[int] = [0]
        self.repeats: list[int] = [0]

    def extend(self, parents: Int64, length: int, repeats: Int64) -> Int64:
        """Add one node per parent and return them."""
        first = len(self.parents)
        self.parents.extend(parents.tolist())
        self.lengths.extend([length] * len(parents))
        self.repeats.extend(repeats.tolist())
        return np.arange(first, len(self.parents))

    def templates(self, leaves: Sequence[int] | Int64, counts: Sequence[int] | Int64) -> Templates:
        """Write out the paths to `leaves`, the longest first sequence first.

        Time: O(size of the templates).
        """
        parents, lengths, repeats = map(np.array, (self.parents, self.lengths, self.repeats))
        node, multiplicity = np.asarray(leaves, np.int64), np.asarray(counts, np.int64)
        order = np.argsort(node)
        node, multiplicity = node[order], multiplicity[order]
        owner = np.arange(len(node))
        first = np.zeros(len(node), np.int64)
        levels = []  # from the leaves up: (template, length, repeat) of one node on each path
        while len(node):
            first[owner] = lengths[node]
            levels.append((owner, lengths[node], repeats[node]))
            inner = parents[node] > 0
            node, owner = parents[node][inner], owner[inner]
        if not levels:
            return Templates(np.zeros(0, np.int32), np.zeros(1, np.int64), multiplicity)
        order = np.argsort(-first, kind="stable")
        multiplicity = multiplicity[order]
        owners, values, times = (np.concatenate(part) for part in zip(*levels[::-1], strict=True))
        owners = np.argsort(order)[owners]
        by_template = np.argsort(owners, kind="stable")
        times = times[by_template]
        flat = np.repeat(values[by_template], times).astype(np.int32)
        sizes = np.bincount(np.repeat(owners[by_template], times), minlength=len(multiplicity))
        return Templates(flat, offsets_of(sizes), multiplicity)


def _runs(counts: Int64) -> list[tuple[int, int]]:
    """The `(length, count)` runs, longest first."""
    lengths = np.flatnonzero(counts)[::-1]
    return list(zip(lengths.tolist(), counts[lengths].tolist(), strict=True))


def best_fit_decreasing(
    counts: Int64, max_seq_len: int, max_segments: int | None = None
) -> Templates:
    """Place each sequence into the fullest bin with room: the default, dense and fastest.

    Bins are grouped by room.  When a sequence leaves room for another of its length, that bin is
    now the fullest that fits, so a run fills bins one after another, least room first.  The empty
    bins are the group with the most room, and never run out.

    Time: O(steps * log(rooms in use)), with a step for each group that a run meets; in practice
    the size of the templates.
    """
    tree = Tree()
    parents, lengths, repeats = tree.parents, tree.lengths, tree.repeats  # this is the hot loop
    cap = max_segments or max_seq_len
    # room -> [(sequences held, node, bins), ...], the bins with the most sequences last
    groups: dict[int, list[tuple[int, int, int]]] = {max_seq_len: [(0, 0, int(counts.sum()) + 1)]}
    rooms = [max_seq_len]  # the keys of `groups`, sorted
    full: list[tuple[int, int, int]] = []  # bins with as many sequences as allowed
    for length, run in _runs(counts):
        count = run
        while count:
            at = bisect_left(rooms, length)
            room = rooms[at]
            group = groups[room]
            held, parent, bins = group.pop()
            fit = min(room // length, cap - held)
            if count >= bins * fit:
                count -= bins * fit
                changes = [(fit, bins)]
            else:  # the run ends here: some bins as full as can be, one with the rest, and others
                whole, rest = divmod(count, fit)
                count = 0
                changes = [(fit, whole)] if whole else []
                if rest:
                    changes.append((rest, 1))
                if untouched := bins - whole - (rest > 0):
                    group.append((held, parent, untouched))
            if not group:
                del groups[room], rooms[at]
            for repeat, changed in changes:
                leaf = (held + repeat, len(parents), changed)
                parents.append(parent)
                lengths.append(length)
                repeats.append(repeat)
                left = room - repeat * length
                if held + repeat == cap:
                    full.append(leaf)
                elif left in groups:
                    insort(groups[left], leaf)
                else:
                    groups[left] = [leaf]
                    insort(rooms, left)
    leaves = [leaf for group in groups.values() for leaf in group if leaf[1]] + full
    return tree.templates([node for _, node, _ in leaves], [bins for *_, bins in leaves])


class _Groups(NamedTuple):
    """Groups of equal bins as parallel arrays `[g]`."""

    node: Int64
    bins: Int64
    room: Int64  # tokens
    more: Int64  # sequences that may still be added

    def add(self, tree: Tree, length: int, repeats: Int64) -> _Groups:
        """Put `repeats` sequences of `length` into each bin of each group."""
        changed = np.flatnonzero(repeats)
        node = self.node.copy()
        node[changed] = tree.extend(self.node[changed], length, repeats[changed])
        return _Groups(node, self.bins, self.room - repeats * length, self.more - repeats)

    def take(self, index: Int64, bins: Int64) -> _Groups:
        """The groups at `index` (one may come twice), with new numbers of bins."""
        return _Groups(self.node[index], bins, self.room[index], self.more[index])

    def join(self, other: _Groups) -> _Groups:
        return _Groups(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


class _Workspace:
    """Open and closed groups; the part that first and worst fit share."""

    def __init__(self, counts: Int64, max_seq_len: int, max_segments: int | None) -> None:
        self.tree = Tree()
        self.runs = _runs(counts)
        self.shortest = self.runs[-1][0] if self.runs else 0
        more = max_segments or max_seq_len
        one = (np.array([value]) for value in (0, 1, max_seq_len, more))
        self.empty = _Groups(*one)  # one new bin
        self.open = self.closed = self.empty.take(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def open_bins(self, length: int, count: int) -> None:
        """Fill new bins, one after another, with a run that fits nowhere else."""
        fit = int(min(self.empty.room[0] // length, self.empty.more[0]))
        whole, rest = divmod(count, fit)
        new = [(whole, fit)] * (whole > 0) + [(1, rest)] * (rest > 0)
        bins, repeats = np.array(new).T
        groups = self.empty.take(np.zeros(len(new), np.int64), bins)
        self.open = self.open.join(groups.add(self.tree, length, repeats))

    def close(self) -> None:
        """Set aside the groups that no sequence fits any more, where that is worth a copy."""
        useful = (self.open.room >= self.shortest) & (self.open.more > 0)
        if 4 * np.count_nonzero(useful) < 3 * len(useful):
            for_good = np.flatnonzero(~useful)
            self.closed = self.closed.join(self.open.take(for_good, self.open.bins[for_good]))
            kept = np.flatnonzero(useful)
            self.open = self.open.take(kept, self.open.bins[kept])

    def templates(self) -> Templates:
        groups = self.closed.join(self.open)
        return self.tree.templates(groups.node, groups.bins)


def first_fit_decreasing(
    counts: Int64, max_seq_len: int, max_segments: int | None = None
) -> Templates:
    """Place each sequence into the first bin, by age, with room.

    Groups stay in the order of their bins.  A run fills every bin that it fits, first to last, so
    the running sum of what each group takes says where the run ends; that group is split in three.

    Time: O(distinct lengths * groups), in whole arrays.
    """
    space = _Workspace(counts, max_seq_len, max_segments)
    for length, count in space.runs:
        groups = space.open
        fit = np.minimum(groups.room // length, groups.more)
        taken = np.cumsum(fit * groups.bins)
        total = int(taken[-1]) if len(taken) else 0
        if total > count:
            last = int(np.searchsorted(taken, count))
            left = count - (int(taken[last - 1]) if last else 0)
            whole, rest = divmod(left, int(fit[last]))
            parts = [whole, int(rest > 0), int(groups.bins[last]) - whole - (rest > 0)]
            # The last group becomes: filled bins, one bin with the rest of the run, untouched bins.
            index = np.concatenate([np.arange(last), [last] * 3, np.arange(last + 1, len(fit))])
            bins = np.concatenate([groups.bins[:last], parts, groups.bins[last + 1 :]])
            repeats = np.concatenate([fit[: last + 1], [rest], np.zeros(len(fit) - last, np.int64)])
            kept = np.flatnonzero(bins)
            space.open = groups.take(index[kept], bins[kept]).add(space.tree, length, repeats[kept])
        else:
            space.open = groups.add(space.tree, length, fit)
            if count > total:
                space.open_bins(length, count - total)
        space.close()
    return space.templates()


def worst_fit_decreasing(
    counts: Int64, max_seq_len: int, max_segments: int | None = None
) -> Templates:
    """Place each sequence into the emptiest bin; a new bin only when none has room.

    A bin with room `r` can take a sequence of length `l` when its room is `r`, `r - l`, and so on:
    each is an *event* at that level.  A run takes the events in falling order of level, so a binary
    search finds the level down to which it takes all of them; at that level it takes some.

    Rows come out with similar fills and similar numbers of sequences.

    Time: O(distinct lengths * groups * log max_seq_len), in whole arrays.
    """
    space = _Workspace(counts, max_seq_len, max_segments)
    for length, count in space.runs:
        groups = space.open
        events = _events(groups, length, length)
        total = int(events @ groups.bins)
        if total > count:
            space.open = _level(space.tree, groups, length, count)
        else:
            space.open = groups.add(space.tree, length, events)
            if count > total:
                space.open_bins(length, count - total)
        space.close()
    return space.templates()


def _events(groups: _Groups, length: int, level: int) -> Int64:
    """How many sequences each bin takes at room `level` or more."""
    events: Int64 = np.maximum(groups.room - level + length, 0) // length
    return np.minimum(events, groups.more)


def _level(tree: Tree, groups: _Groups, length: int, count: int) -> _Groups:
    """Give `count` sequences of `length`, fewer than fit, to the emptiest bins."""
    low, high = length, int(groups.room.max()) + 1  # events at low or more > count >= at high
    while high - low > 1:
        middle = (low + high) // 2
        if int(_events(groups, length, middle) @ groups.bins) > count:
            low = middle
        else:
            high = middle
    repeats = _events(groups, length, high)
    left = count - int(repeats @ groups.bins)
    if left == 0:
        return groups.add(tree, length, repeats)
    # Bins with an event at `low` exactly: those with the most sequences (least `more`) first.
    level = np.flatnonzero(_events(groups, length, low) > repeats)
    level = level[np.argsort((groups.more - repeats)[level], kind="stable")]
    ends = np.cumsum(groups.bins[level])
    last = int(np.searchsorted(ends, left))
    repeats[level[: last + 1]] += 1
    untouched = int(ends[last]) - left
    if untouched == 0:
        return groups.add(tree, length, repeats)
    split = level[last]
    bins = groups.bins.copy()
    bins[split] -= untouched
    rest = groups.take(level[last : last + 1], np.array([untouched]))
    rest = rest.add(tree, length, repeats[split : split + 1] - 1)
    return groups._replace(bins=bins).add(tree, length, repeats).join(rest)


def next_fit_offsets(lengths: Int64, max_seq_len: int, max_segments: int | None = None) -> Int64:
    """Cut the input, as it stands, wherever the next sequence does not fit: int64 `[b + 1]`.

    The only choice that keeps sequences in input order, at the price of the emptiest rows.

    Time: O(n log n) in whole arrays, and a step per bin.
    """
    sums = offsets_of(lengths)
    ends = np.searchsorted(sums, sums[:-1] + max_seq_len, side="right") - 1
    if max_segments:
        ends = np.minimum(ends, np.arange(len(lengths)) + max_segments)
    following = ends.tolist()
    offsets = [0]
    while offsets[-1] < len(lengths):
        offsets.append(following[offsets[-1]])
    return np.array(offsets)
