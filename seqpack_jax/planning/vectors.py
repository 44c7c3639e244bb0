"""Plans for several capacities at once: items whose lengths form vectors.

An item, say a question with its answer, has a length in each of `k` columns, and a bin a capacity
for each.  Items of equal vectors form a *class*, which takes the place that a length has elsewhere:
a plan says which classes share a bin, and pools hold the ids of each class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import narrow, offsets_of, part_sums
from seqpack_jax.errors import check_integers, check_offsets, fail
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.heuristics import Templates
from seqpack_jax.planning.histogram import SequencePools, group_ids
from seqpack_jax.planning.plan import Certificate, PackingPlan
from seqpack_jax.planning.vector_fit import (
    NO_CAP,
    best_fit_vectors,
    check_cap,
    check_vectors,
    falling,
    place_classes,
    volume_of,
    weights_of,
)

__all__ = ["VectorBins", "VectorPlan", "best_fit_vectors", "pack_vectors", "plan_vectors"]

_FORMAT = 1  # of the digest
_MOST_WORK = 10**9  # bins * classes, for the heuristic that is slow on large sets: some 30 s
_ARRAYS = {"vectors": np.int32, "classes": np.int32, "offsets": np.int64, "multiplicity": np.int64}


@dataclass(frozen=True, eq=False)
class VectorPlan:
    """Which classes of items share a bin of several capacities; made by `pack_vectors`.

    As a `PackingPlan`, but items are told apart by their class, which stands for one vector of
    lengths.  `materialize_epoch` draws the ids from the pools of the classes, anew every epoch.

    Attributes:
        max_seq_len: capacities of a bin in tokens, one per column.
        vectors: int32 `[c + 1, k]`, the lengths of each class in tokens.  Classes are numbered from
            1, from small to large; the vector of class 0, which has no items, is zero.
        classes: int32 `[s]`, the templates one after another, each in descending order.
        offsets: int64 `[t + 1]`; template `i` is `classes[offsets[i]:offsets[i + 1]]`.
        multiplicity: int64 `[t]`, the number of bins of each template.
        certificate: what is known of the fewest bins possible, if anything.

    Example:
        >>> plan, pools = pack_vectors([[5, 1], [3, 4], [5, 4], [5, 1]], (10, 6))
        >>> plan.num_bins, plan.num_sequences, plan.num_tokens, plan.efficiency
        (2, 4, (18, 10), (0.9, 0.8333333333333334))
        >>> plan.vectors[plan.classes].tolist()
        [[5, 4], [5, 1], [3, 4], [5, 1]]
    """

    max_seq_len: tuple[int, ...]
    vectors: NDArray[np.int32]
    classes: NDArray[np.int32]
    offsets: Int64
    multiplicity: Int64
    certificate: Certificate | None = None

    tolerance = 1  # as of a `PackingPlan`: items are planned as they are

    def __getstate__(self) -> dict[str, Any]:
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        return state | {name: narrow(state[name]) for name in _ARRAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, dtype in _ARRAYS.items():
            state[name] = state[name].astype(dtype, copy=False)
        self.__dict__.update(state)

    @cached_property
    def _templates(self) -> PackingPlan:
        """The templates as those of a plan whose lengths are classes; it is never checked."""
        return PackingPlan(1, self.classes, self.offsets, self.multiplicity, 0)

    def column(self, number: int) -> PackingPlan:
        """Return what one column sees of the plan, for `PackingStats.from_plan`.

        Lengths may be 0 there, and in any order, which other uses of a `PackingPlan` refuse.
        """
        lengths = np.ascontiguousarray(self.vectors[self.classes, number])
        tokens = self.num_tokens[number]
        capacity = self.max_seq_len[number]
        return PackingPlan(capacity, lengths, self.offsets, self.multiplicity, tokens)

    @property
    def num_templates(self) -> int:
        """How many different bins there are."""
        return len(self.multiplicity)

    @property
    def sizes(self) -> Int64:
        """int64 `[t]`: items per bin of each template."""
        return self._templates.sizes

    @cached_property
    def fills(self) -> Int64:
        """int64 `[t, k]`: tokens per bin of each template, in each column."""
        columns = self.vectors[self.classes].T
        return np.stack([part_sums(each, self.offsets) for each in columns], axis=1)

    @property
    def bin_starts(self) -> Int64:
        """int64 `[t + 1]`: bins `bin_starts[i]` to `bin_starts[i + 1]` follow template `i`."""
        return self._templates.bin_starts

    @property
    def slot_starts(self) -> Int64:
        """int64 `[s]`: bin `b` of a template fills slot `j` with rank `slot_starts[j] + b`."""
        return self._templates.slot_starts

    @property
    def num_bins(self) -> int:
        """Bins over all templates: the rows of one epoch."""
        return self._templates.num_bins

    @property
    def num_sequences(self) -> int:
        """Items over all bins."""
        return self._templates.num_sequences

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of all items, in each column."""
        return tuple((self.multiplicity @ self.fills).tolist())

    @property
    def max_segments(self) -> int:
        """The most items that any bin holds."""
        return self._templates.max_segments

    @property
    def efficiency(self) -> tuple[float, ...]:
        """Tokens / capacity over all bins, in `[0, 1]`, of each column; 1.0 for an empty plan."""
        bins = self.num_bins
        pairs = zip(self.num_tokens, self.max_seq_len, strict=True)
        return tuple(tokens / (bins * limit) if bins else 1.0 for tokens, limit in pairs)

    @property
    def counts(self) -> Int64:
        """int64 `[c + 1]`: how many slots of each class there are."""
        slots = np.repeat(self.multiplicity, self.sizes)
        counts = np.zeros(len(self.vectors), np.int64)
        np.add.at(counts, self.classes, slots)
        return counts

    def digest(self) -> str:
        """Return 32 hexadecimal digits that differ whenever the bins of an epoch could differ."""
        head = ("vectors", _FORMAT, self.max_seq_len, self.vectors.shape, self.num_templates)
        digest = hashlib.blake2b(repr(head).encode(), digest_size=16)
        digest.update(self.vectors.astype("<i4").tobytes())
        digest.update(self.classes.astype("<i4").tobytes())
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.multiplicity.astype("<i8").tobytes())
        return digest.hexdigest()

    def check(self, lengths: ArrayLike | None = None) -> None:
        """Raise `SeqpackError` unless the plan is whole and, if given, packs exactly `lengths`.

        Time: O(size of the plan); O(n log n) with the `[n, k]` lengths.
        """
        caller, hint = "VectorPlan.check", "the plan is damaged; make it again"
        check_vectors(caller, self.vectors[1:], self.max_seq_len, "max_seq_len")
        for name in ("classes", "offsets", "multiplicity"):
            check_integers(caller, name, getattr(self, name))
        check_offsets(caller, self.offsets, len(self.classes), len(self.multiplicity), hint)
        if len(self.multiplicity) and int(self.multiplicity.min()) < 1:
            i = int(self.multiplicity.argmin())
            fail(caller, f"multiplicity[{i}] = {self.multiplicity[i]}, below 1", hint)
        outside = (self.classes < 1) | (self.classes >= len(self.vectors))
        if outside.any():
            j = int(outside.argmax())
            fail(caller, f"classes[{j}] = {self.classes[j]} of {len(self.vectors) - 1}", hint)
        over = self.fills > np.array(self.max_seq_len)
        if over.any():
            i, c = map(int, np.argwhere(over)[0])
            problem = f"template {i} holds {self.fills[i, c]} tokens of {self.max_seq_len[c]}"
            fail(caller, f"{problem} in column {c}", hint)
        if lengths is not None:
            self._check_lengths(caller, lengths)

    def _check_lengths(self, caller: str, lengths: ArrayLike) -> None:
        given, _ = check_vectors(caller, lengths, self.max_seq_len, "max_seq_len")
        hint = "make the plan from these very lengths"
        if len(given) != self.num_sequences:
            problem = f"the plan has {self.num_sequences} slots for {len(given)} items"
            fail(caller, problem, hint)
        slots = np.repeat(self.vectors, self.counts, axis=0)
        have, want = (np.lexsort(each.T) for each in (slots, given))
        differ = (slots[have] != given[want]).any(axis=1)
        if differ.any():
            item = int(want[differ.argmax()])
            problem = f"the plan has other slots than item {item} of lengths {given[item].tolist()}"
            fail(caller, problem, hint)


@dataclass(frozen=True, eq=False)
class VectorBins(Bins):
    """`Bins` of several capacities; `max_seq_len` is the tuple of them.

    Example:
        >>> bins = VectorBins(np.array([2, 0, 1]), np.array([0, 2, 3]), (10, 6))
        >>> bins.check([[5, 1], [3, 4], [5, 4]])
        >>> bins[0].tolist(), bins.max_seq_len
        ([2, 0], (10, 6))
    """

    max_seq_len: tuple[int, ...]  # type: ignore[assignment]

    def check(self, lengths: ArrayLike) -> None:
        """Raise `SeqpackError` unless each item is in exactly one bin and no bin overflows.

        Args:
            lengths: integers `[n, k]`, in tokens.

        Time: O(n).
        """
        caller, hint = "VectorBins.check", "pack the items again"
        array, limits = check_vectors(caller, lengths, self.max_seq_len, "max_seq_len")
        check_integers(caller, "ids", self.ids)
        check_offsets(caller, self.offsets, len(self.ids), len(self), hint)
        if len(self.ids) and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < len(array):
            fail(caller, f"an id is not in [0, {len(array)})", hint)
        uses = np.bincount(self.ids, minlength=len(array))
        if (uses != 1).any():
            item, wrong = int((uses != 1).argmax()), int(np.count_nonzero(uses != 1))
            fail(caller, f"item {item} is in {uses[item]} bins ({wrong} such items)", hint)
        for column, limit in enumerate(limits):
            fills = part_sums(array[self.ids, column], self.offsets)
            if int(fills.max(initial=0)) > limit:
                index = int(fills.argmax())
                problem = f"bin {index} holds {fills[index]} tokens of {limit} in column {column}"
                fail(caller, problem, hint)


def pack_vectors(
    lengths: ArrayLike, capacities: Sequence[int], *, max_segments: int | None = None
) -> tuple[VectorPlan, SequencePools]:
    """Plan items that have a length in each of several columns: bins must hold all of them.

    Best fit decreasing, by the sum of the shares of the capacities, and by the largest; then bin by
    bin what is most like the room left, unless `bins * classes` is over 10**9.  The plan with the
    fewest bins is kept.

    Time: O(classes * bins), in whole arrays, after a sort of the n items.

    Args:
        lengths: integers `[n, k]`, in tokens; item `i` has the id `i`.  An item may have a length
            of 0 in some columns, but not in all.
        capacities: of a bin, in tokens, one per column.
        max_segments: the most items that a bin may hold, None for no cap.

    Returns:
        A `VectorPlan`, and the pools of its classes: `pools[c]` is the ids of the items of lengths
        `plan.vectors[c]`.

    Raises:
        SeqpackError: an item does not fit a bin or is empty, or an argument is out of range.

    Example:
        >>> plan, pools = pack_vectors([[5, 1], [3, 4], [5, 4], [5, 1]], (10, 6))
        >>> print(plan.certificate)
        2 rows; lower bound 2 (volume): optimal
        >>> [(vector.tolist(), pools[c].tolist()) for c, vector in enumerate(plan.vectors) if c]
        [([5, 1], [0, 3]), ([3, 4], [1]), ([5, 4], [2])]
    """
    caller = "pack_vectors"
    array, limits = check_vectors(caller, lengths, capacities)
    return plan_vectors(array, limits, check_cap(caller, max_segments))


def plan_vectors(
    array: Int64, limits: tuple[int, ...], cap: int = NO_CAP
) -> tuple[VectorPlan, SequencePools]:
    """Do what `pack_vectors` does, of arguments that were checked."""
    by_vector = np.lexsort(array.T)
    in_order = array[by_vector]
    first = np.ones(len(array), np.bool_)
    first[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    classes = np.empty(len(array), np.int64)
    classes[by_vector] = np.cumsum(first) - 1
    vectors = in_order[first]
    counts = np.bincount(classes, minlength=len(vectors))
    bound = volume_of(array.sum(axis=0), len(array), limits, cap)
    order, templates = _fewest_bins(vectors, counts, limits, cap, bound)
    bins = int(templates.multiplicity.sum())
    number = np.empty(len(vectors), np.int64)
    number[order] = np.arange(len(order), 0, -1)
    numbered = np.zeros((len(vectors) + 1, len(limits)), np.int32)
    numbered[number] = vectors
    certificate = Certificate(bins, bound, "volume", bins == bound)
    sizes, ids = group_ids(number[classes])
    plan = VectorPlan(limits, numbered, *templates, certificate)
    return plan, SequencePools(ids, offsets_of(sizes))


def _fewest_bins(
    vectors: Int64, counts: Int64, limits: tuple[int, ...], cap: int, bound: int
) -> tuple[Int64, Templates]:
    """Try one heuristic after another, until the bound is met; return the order of the classes."""
    weights = weights_of((vectors * counts[:, None]).sum(axis=0), limits)
    best: tuple[int, Int64, Templates] | None = None
    for by, size in (("bins", "sum"), ("bins", "max"), ("one by one", "sum")):
        if best is not None and best[0] == bound:
            break
        order = falling(vectors, limits, size)
        if by == "bins":
            templates = place_classes(vectors[order], counts[order], limits, weights, cap)
        elif best is None or best[0] * len(vectors) > _MOST_WORK:
            break
        else:
            templates = fill_bins(vectors[order], counts[order], limits, cap)
        bins = int(templates.multiplicity.sum())
        if best is None or bins < best[0]:
            best = bins, order, templates
    assert best is not None
    return best[1], best[2]


def fill_bins(vectors: Int64, counts: Int64, limits: tuple[int, ...], cap: int) -> Templates:
    """Fill one bin after another with the items that are most like the room that is left.

    The next item has the largest product of its shares with the room, summed over columns, weighed
    by demand.  A bin is made as often as there are items for it.  Denser than best fit where items
    differ in their columns, and slower.

    Time: O(bins * classes) at most, in whole arrays; each class comes into fewer bins as it gets
    rare.  Classes are numbered as in `place_classes`.
    """
    scale = np.array(limits, float)
    place, left = np.arange(len(vectors)), counts.copy()  # of the classes that are left
    values = np.ascontiguousarray(vectors.T, float)  # they are multiplied by floats, exactly
    tokens = (vectors * left[:, None]).sum(axis=0)
    flat: list[int] = []
    sizes: list[int] = []
    multiplicity: list[int] = []
    used_up = 0
    while used_up < len(place):
        weights = weights_of(tokens, limits) / scale
        picked = _fill_bin(values, left, limits, weights.tolist(), cap)
        classes, uses = np.unique(picked, return_counts=True)
        times = int((left[classes] // uses).min())
        left[classes] -= times * uses
        tokens -= times * (vectors[place[classes]] * uses[:, None]).sum(axis=0)
        flat += (len(vectors) - place[np.array(sorted(picked))]).tolist()
        sizes.append(len(picked))
        multiplicity.append(times)
        used_up += int(np.count_nonzero(left[classes] == 0))
        if 8 * used_up > len(place):
            kept, used_up = np.flatnonzero(left), 0
            place, left, values = place[kept], left[kept], values[:, kept]
    return Templates(np.array(flat, np.int32), offsets_of(sizes), np.array(multiplicity, np.int64))


def _fill_bin(
    values: NDArray[np.float64],
    left: Int64,
    limits: tuple[int, ...],
    weights: list[float],
    cap: int,
) -> list[int]:
    """Return the columns of `values` that fill a new bin, one per item."""
    room: list[float] = list(limits)
    some, index, rest = values, np.arange(values.shape[1]), left
    picked: list[int] = []
    while len(index):
        score = np.zeros(len(index))
        for row, each, weight in zip(some, room, weights, strict=True):
            score += row * (each * weight)
        if not picked:
            score[left == 0] = -1.0
        best = int(score.argmax())
        picked.append(int(index[best]))
        room = [each - length for each, length in zip(room, some[:, best].tolist(), strict=True)]
        if len(picked) == cap:
            break
        fits = rest > 0
        for row, each in zip(some, room, strict=True):
            fits &= row <= each
        fits[best] &= rest[best] > picked.count(picked[-1])
        kept = np.flatnonzero(fits)
        some, index, rest = some[:, kept], index[kept], rest[kept]
    return picked
