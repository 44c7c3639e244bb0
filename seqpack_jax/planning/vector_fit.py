"""Best fit decreasing by several capacities at once: an item must fit in every column.

An item has a length in each of `k` columns, and a bin a capacity.  What is large, and which bin is
full, is said by sums over columns: shares of the capacities to sort items, room weighed by demand
to choose among bins.

References:
    R. Panigrahy, K. Talwar, L. Uyeda, U. Wieder, "Heuristics for vector bin packing", 2011.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import MAX_LENGTH, check_int, fail
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.heuristics import Templates, Tree

__all__ = [
    "NO_CAP",
    "best_fit_vectors",
    "check_cap",
    "check_vectors",
    "falling",
    "place_classes",
    "volume_of",
    "weights_of",
]

NO_CAP = 2**62  # segments
_FEW = 8  # items of a class that are placed one group at a time
_Floats = NDArray[np.float64]


def best_fit_vectors(
    lengths: ArrayLike,
    capacities: Sequence[int],
    *,
    max_bins: int | None = None,
    max_segments: int | None = None,
) -> list[list[int]] | None:
    """Pack items one by one, each into the fullest bin that has room for it in every column.

    For groups of a stream; `pack_vectors` is for whole data sets.  Items come by falling sum of
    their shares of the capacities.  Deterministic, and the same on every machine.

    Time: O(items * open bins), in whole arrays per item.

    Args:
        lengths: integers `[m, k]`, in tokens; 0 in some columns, but not in all, is allowed.
        capacities: of a bin, in tokens, one per column.
        max_bins: how many bins there are, None for as many as it takes.
        max_segments: the most items that a bin may hold, None for no cap.

    Returns:
        The indices of the items in each bin; None if `max_bins` are not enough.

    Raises:
        SeqpackError: an item does not fit a bin or is empty, or an argument is out of range.

    Example:
        >>> best_fit_vectors([[5, 1], [3, 4], [5, 4], [5, 2]], (10, 6))
        [[2, 3], [1, 0]]
        >>> best_fit_vectors([[5, 1], [3, 4], [5, 4], [5, 2]], (10, 6), max_bins=1) is None
        True
    """
    caller = "best_fit_vectors"
    array, limits = check_vectors(caller, lengths, capacities)
    most = len(array) if max_bins is None else check_int(caller, "max_bins", max_bins, 0)
    cap = check_cap(caller, max_segments)
    if volume_of(array.sum(axis=0), len(array), limits, cap) > most:
        return None
    weights = weights_of(array.sum(axis=0), limits)
    order = falling(array, limits, "sum")
    return _place(array, order.tolist(), limits, weights.tolist(), most, cap)


def _place(
    array: Int64,
    order: list[int],
    limits: tuple[int, ...],
    weights: list[float],
    most: int,
    cap: int,
) -> list[list[int]] | None:
    """Place items in this order.  A bin with no room for any item that follows is closed."""
    smallest = array.min(axis=0).tolist() if len(array) else []
    vectors = array.tolist()
    bins: list[list[int]] = []
    size = min(most, len(order))
    rooms = [np.empty(size, np.int64) for _ in limits]
    number = np.empty(size, np.int64)
    # Of a closed bin infinite, so that it is never chosen.
    scores, masked = np.empty(size), np.empty(size)
    fits, fits_column = np.empty(size, np.bool_), np.empty(size, np.bool_)
    used = closed = 0
    for item in order:
        vector = vectors[item]
        here, also = fits[:used], fits_column[:used]
        np.greater_equal(rooms[0][:used], vector[0], out=here)
        for room, length in zip(rooms[1:], vector[1:], strict=True):
            np.greater_equal(room[:used], length, out=also)
            np.logical_and(here, also, out=here)
        chosen = used
        if used:
            ranked = masked[:used]
            ranked.fill(np.inf)
            np.copyto(ranked, scores[:used], where=here)
            chosen = int(ranked.argmin())
            chosen = chosen if ranked[chosen] < np.inf else used
        if chosen == used:
            if len(bins) == most:
                return None
            for room, limit in zip(rooms, limits, strict=True):
                room[used] = limit
            number[used] = len(bins)
            bins.append([])
            used += 1
        held = bins[number[chosen]]
        held.append(item)
        score, is_open = 0.0, len(held) < cap
        for room, length, weight, least in zip(rooms, vector, weights, smallest, strict=True):
            left = int(room[chosen]) - length
            room[chosen] = left
            score += left * weight
            is_open = is_open and left >= least
        scores[chosen] = score if is_open else np.inf
        closed += not is_open
        if closed > 32 and 2 * closed > used:
            kept = np.flatnonzero(scores[:used] < np.inf)
            used, closed = len(kept), 0
            for each in (*rooms, number, scores):
                each[:used] = each[kept]
    return bins


def check_vectors(
    caller: str, lengths: Any, capacities: Any, name: str = "capacities"
) -> tuple[Int64, tuple[int, ...]]:
    """Return `lengths` as int64 `[n, k]` and `capacities` as ints, if every item fits a bin.

    Time: O(n * k).
    """
    several = hasattr(capacities, "__iter__") and getattr(capacities, "ndim", 1) > 0
    if isinstance(capacities, str | bytes | Mapping) or not several:
        fail(caller, f"{name} = {capacities!r}", "pass one capacity per column of lengths")
    limits = tuple(
        check_int(caller, f"{name}[{column}]", limit, 1, MAX_LENGTH)
        for column, limit in enumerate(capacities)
    )
    hint = f"pass lengths as integers [n, {len(limits)}], one column per capacity"
    try:
        array = np.asarray(lengths)
    except ValueError:
        fail(caller, "lengths is ragged", hint)
    if limits and array.shape in ((0,), (0, len(limits))):
        return np.zeros((0, len(limits)), np.int64), limits
    if array.ndim != 2 or array.shape[1] != len(limits) or not limits:
        problem = f"lengths has shape {array.shape}, and there are {len(limits)} capacities"
        fail(caller, problem, hint)
    if array.dtype.kind not in "iu":
        fail(caller, f"lengths has dtype {array.dtype}, not an integer dtype", hint)
    _refuse(caller, array, array < 0, ["a length is at least 0"] * len(limits), name)
    told = [f"{name}[{column}] is {limit}" for column, limit in enumerate(limits)]
    _refuse(caller, array, array > np.array(limits), told, name)
    empty = ~array.any(axis=1)
    if empty.any():
        more = f"{np.count_nonzero(empty)} of {len(array)} items"
        problem = f"lengths[{int(empty.argmax())}] is 0 in every column ({more})"
        fail(caller, problem, "remove empty items before planning")
    return array.astype(np.int64, copy=False), limits


def _refuse(
    caller: str, array: NDArray[Any], wrong: NDArray[np.bool_], told: list[str], name: str
) -> None:
    """Refuse the first of the lengths that are wrong, and count the items that have such."""
    if wrong.any():
        item, column = map(int, np.argwhere(wrong)[0])
        more = f"{np.count_nonzero(wrong.any(axis=1))} of {len(array)} items"
        problem = f"lengths[{item}, {column}] = {array[item, column]}, but {told[column]} ({more})"
        fail(caller, problem, f"drop, cut or mend such items first, or raise {name}")


def check_cap(caller: str, max_segments: int | None) -> int:
    """Return how many items a bin may hold, `NO_CAP` for any number."""
    if max_segments is None:
        return NO_CAP
    return min(NO_CAP, check_int(caller, "max_segments", max_segments, 1))


def volume_of(tokens: Int64, items: int, limits: tuple[int, ...], cap: int) -> int:
    """Return the bins that the tokens of one column need, or the cap, whichever needs the most.

    No packing has fewer.
    """
    pairs = zip(tokens.tolist(), limits, strict=True)
    needed: list[int] = [-(-each // limit) for each, limit in pairs]
    return max([*needed, -(-items // cap)])


def weights_of(tokens: Int64, limits: tuple[int, ...]) -> _Floats:
    """Return what a token of room counts in each column: the more, the more of it is wanted."""
    load = tokens / np.array(limits, float)
    return np.asarray(load / max(load.sum(), 1.0) / np.array(limits, float))


def falling(vectors: Int64, limits: tuple[int, ...], size: str) -> Int64:
    """Return the indices of vectors by falling size; equal sizes by the other one, then by vector.

    In elementwise arithmetic alone: the last bits of a matrix product differ between machines.

    Args:
        vectors: int64 `[n, k]`, in tokens.
        limits: capacities, one per column.
        size: `"sum"` or `"max"`, of the shares of the capacities.
    """
    shares = vectors / np.array(limits, float)
    total, largest = np.zeros(len(vectors)), np.zeros(len(vectors))
    for share in shares.T:
        total += share
        largest = np.maximum(largest, share)
    sizes = (-largest, -total) if size == "sum" else (-total, -largest)
    return np.lexsort((*-vectors.T[::-1], *sizes))


class _Groups:
    """Groups of bins that hold the same, as parallel arrays that grow in place.

    The first `in_order` of them are sorted, the fullest first, so that the search for one stops
    early.  What changes moves to the end, and now and then all are sorted again.  A group that can
    take nothing more, or has no bins left, has a room of -1.
    """

    def __init__(self, limits: tuple[int, ...], weights: _Floats, cap: int) -> None:
        self.tree = Tree()
        self.limits, self.weights, self.cap = limits, weights.tolist(), cap
        self.size = self.in_order = 0
        self.node, self.bins, self.more = np.zeros((3, 64), np.int64)
        self.room = np.zeros((len(limits), 64), np.int64)
        self.score = np.zeros(64)
        self.closed: list[tuple[Int64, Int64]] = []  # nodes and bins

    def place(self, vector: list[int], number: int, count: int) -> None:
        """Put `count` items of one class into the fullest bins with room, and into new ones.

        An item leaves its bin the fullest that has room, so a class fills one bin after another.
        """
        while 0 < count <= _FEW and (group := self._first(vector)) >= 0:
            count -= self._fill(group, vector, number, count)
        if count > _FEW:
            index = self._fullest(vector, count)
            fit = self.more[index]
            for room, length in zip(self.room, vector, strict=True):
                if length:
                    fit = np.minimum(fit, room[index] // length)
            taken = offsets_of(fit * self.bins[index])
            filled = int(np.searchsorted(taken, count, side="right")) - 1  # groups, of all bins
            self._add(index[:filled], vector, number, fit[:filled])
            count -= int(taken[filled])
            if count and filled < len(index):
                count -= self._fill(int(index[filled]), vector, number, count)
        if count:
            pairs = zip(self.limits, vector, strict=True)
            fit_new = min(self.cap, *(limit // length for limit, length in pairs if length))
            new = self._append(0, -(-count // fit_new), self.cap, list(self.limits))
            self._fill(new, vector, number, count)

    def _first(self, vector: list[int]) -> int:
        """Return the first group with room for the class, as `_fullest` orders them, or -1."""
        least = 0.0  # no bin with room for the class has a lower score, not even by rounding
        for length, weight in zip(vector, self.weights, strict=True):
            least += length * weight
        start = int(self.score[: self.in_order].searchsorted(least))
        step = 128
        found: list[int] = []
        while start < self.in_order and not found:
            fits = self._fits(vector, start, min(start + step, self.in_order))
            at = int(fits.argmax())
            if fits[at]:
                found.append(start + at)
            start, step = start + step, 4 * step
        index = self._fits(vector, self.in_order, self.size).nonzero()[0] + self.in_order
        if len(index):
            score = self.score[index]
            found += index[score == score.min()].tolist()
        if len(found) < 2:
            return found[0] if found else -1
        ranks = [(self.score[i], *self.room[:, i].tolist(), self.more[i]) for i in found]
        return found[ranks.index(min(ranks))]

    def _fits(self, vector: list[int], start: int, stop: int) -> NDArray[np.bool_]:
        fits: NDArray[np.bool_] = self.room[0, start:stop] >= vector[0]
        for room, length in zip(self.room[1:], vector[1:], strict=True):
            fits &= room[start:stop] >= length
        return fits

    def _fullest(self, vector: list[int], count: int) -> Int64:
        """Return groups with room for the class, the fullest first; at least enough of them."""
        index = np.flatnonzero(self._fits(vector, 0, self.size))
        score = self.score[index]
        if len(index) > count:
            some = score <= np.partition(score, count - 1)[count - 1]
            index, score = index[some], score[some]
        # Among equal scores by what there is room for, so that the age of a group does not matter.
        return index[np.lexsort((self.more[index], *self.room[::-1, index], score))]

    def _fill(self, group: int, vector: list[int], number: int, count: int) -> int:
        """Fill bins of one group, one after another; return how many items they take."""
        room = self.room[:, group].tolist()
        pairs = zip(room, vector, strict=True)
        fit = min(int(self.more[group]), *(each // length for each, length in pairs if length))
        count = min(count, fit * int(self.bins[group]))
        node, more = int(self.node[group]), int(self.more[group])
        whole, rest = divmod(count, fit)
        for bins, repeat in ((whole, fit), (1, rest)):
            if not bins or not repeat:
                continue
            left = self.bins[group] = int(self.bins[group]) - bins
            if not left:
                self.room[:, group] = -1
            self.tree.parents.append(node)
            self.tree.lengths.append(number)
            self.tree.repeats.append(repeat)
            roomy = [each - length * repeat for each, length in zip(room, vector, strict=True)]
            at = group if not left and group >= self.in_order else -1
            self._append(len(self.tree.parents) - 1, bins, more - repeat, roomy, at)
        return count

    def _append(self, node: int, bins: int, more: int, room: list[int], at: int = -1) -> int:
        """Write a new group to the end, or over group `at`."""
        if at < 0:
            self._grow(1)
            at = self.size
            self.size += 1
        self.node[at], self.bins[at], self.more[at] = node, bins, more
        score = 0.0
        for column, (each, weight) in enumerate(zip(room, self.weights, strict=True)):
            self.room[column, at] = each if more else -1
            score += each * weight
        self.score[at] = score
        return at

    def _grow(self, groups: int) -> None:
        if (extra := self.size + groups - len(self.node)) > 0:
            extra = max(extra, len(self.node))
            self.node, self.bins, self.more = (
                np.pad(each, (0, extra)) for each in (self.node, self.bins, self.more)
            )
            self.score = np.pad(self.score, (0, extra))
            self.room = np.pad(self.room, ((0, 0), (0, extra)))

    def _add(self, index: Int64, vector: list[int], number: int, repeats: Int64) -> None:
        """Put items into all bins of the groups at `index`, and move them to the end."""
        self._grow(len(index))
        moved = slice(self.size, self.size + len(index))
        self.size += len(index)
        self.node[moved] = self.tree.extend(self.node[index], number, repeats)
        self.bins[moved], self.bins[index] = self.bins[index], 0
        more = self.more[moved] = self.more[index] - repeats
        score = np.zeros(len(index))
        for room, length, weight in zip(self.room, vector, self.weights, strict=True):
            left = room[index] - length * repeats
            score += left * weight
            room[moved] = np.where(more > 0, left, -1)
        self.score[moved] = score
        self.room[:, index] = -1

    def close(self, smallest: Int64) -> None:
        """Now and then, set aside the groups without room for what follows, and sort the others.

        The more groups there are, the later, as that takes longer than to look through the end.
        """
        if (self.size - self.in_order - 64) ** 2 < 25 * self.size or self.size < 64:
            return
        size = self.size
        room, score, bins = self.room[:, :size], self.score[:size], self.bins[:size]
        useful = (room >= smallest[:, None]).all(axis=0) & (bins > 0)
        shut, kept = np.flatnonzero(~useful & (bins > 0)), np.flatnonzero(useful)
        self.closed.append((self.node[shut], bins[shut]))
        kept = kept[np.lexsort((self.more[kept], *room[::-1, kept], score[kept]))]
        for each in (self.node, self.bins, self.more, self.score):
            each[: len(kept)] = each[kept]
        self.room[:, : len(kept)] = room[:, kept]
        self.size = self.in_order = len(kept)

    def templates(self) -> Templates:
        """Write out what all groups hold, the largest numbers first."""
        groups = [*self.closed, (self.node[: self.size], self.bins[: self.size])]
        node, bins = (np.concatenate(part) for part in zip(*groups, strict=True))
        held = np.flatnonzero(bins)
        return self.tree.templates(node[held], bins[held])


def place_classes(
    vectors: Int64, counts: Int64, limits: tuple[int, ...], weights: _Floats, cap: int
) -> Templates:
    """Pack classes in the order given; the first has the largest number."""
    groups = _Groups(limits, weights, cap)
    smallest = np.minimum.accumulate(vectors[::-1])[::-1]
    for place, (vector, count) in enumerate(zip(vectors.tolist(), counts.tolist(), strict=True)):
        groups.close(smallest[place])
        groups.place(vector, len(vectors) - place, count)
    return groups.templates()
