"""Lower bounds on the number of bins: no packing can have fewer.

A *dual feasible function* gives every length a weight, such that the weights in a bin are never
more than 1 together.  So the sum of the weights of all sequences, rounded up, is a lower bound.
Length / max_seq_len is such a weight, and gives the volume bound L1.  Others use that no two
sequences over half of a bin share one, and the like.  Each family is tried with many parameters.

All is exact: weights are quotients of integers, and no sum of them leaves 64 bits.

References:
    S. Martello, P. Toth, "Lower bounds and reduction procedures for the bin packing problem", 1990:
    L1 and L2.
    G. S. Lueker, "Bin packing with items uniformly distributed over intervals [a, b]", 1983: u^(k).
    S. P. Fekete, J. Schepers, "New classes of fast lower bounds for bin packing problems", 2001:
    U^(epsilon), phi^(epsilon), and functions of functions.
    J. Carlier, F. Clautiaux, A. Moukrim, "New reduction procedures and lower bounds for the
    two-dimensional bin packing problem with fixed orientation", 2007: a stronger phi^(epsilon).
    C.-A. Burdet, E. L. Johnson, "A subadditive approach to solve linear integer programs", 1977.
    F. Clautiaux, C. Alves, J. M. Valerio de Carvalho, "A survey of dual-feasible and superadditive
    functions", 2010: all of these, and which of them dominate which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import MAX_LENGTH, check_int
from seqpack_jax.planning.counts import Int64, as_counts

__all__ = ["Bound", "bound_of_lengths", "lower_bound", "volume_bound"]

_DENSE = 2**20  # up to this length tables have an entry for each
_LEVELS = 64  # a bin holds fewer than twice as many steps
_MEMBERS = 32  # of a family that costs O(distinct lengths) for each; fewer when these are many
_WORK = 2**17  # distinct lengths times members


class Bound(NamedTuple):
    """A lower bound, and what proves it.

    Attributes:
        value: no packing has fewer bins than this.
        method: `"volume"`, `"max_segments"`, `"Martello-Toth L2"`, `"dual feasible function"` or,
            of the algorithm `"optimal"`, `"column generation"`.

    Example:
        >>> lower_bound({6: 3}, max_seq_len=10).method
        'Martello-Toth L2'
    """

    value: int
    method: str


def volume_bound(
    counts: ArrayLike | Mapping[int, int], max_seq_len: int, *, max_segments: int | None = None
) -> int:
    """Return the bins that the tokens alone need, L1; with a cap, at least those the cap needs.

    Time: O(max_len).

    Args:
        counts: int `[max_len + 1]`, how many sequences have each length, or `{length: count}`.
        max_seq_len: capacity of a bin in tokens.
        max_segments: the most sequences that a bin may hold, None for no cap.

    Returns:
        `max(ceil(tokens / max_seq_len), ceil(sequences / max_segments))`.

    Raises:
        SeqpackError: a length or a count is out of range.

    Example:
        >>> volume_bound({5: 5, 3: 3, 7: 1}, max_seq_len=10)
        5
        >>> volume_bound({1: 9}, max_seq_len=10, max_segments=2)
        5
    """
    array, max_seq_len, cap = _checked("volume_bound", counts, max_seq_len, max_segments)
    bound = -(-int(array @ np.arange(len(array))) // max_seq_len)
    return bound if cap is None else max(bound, -(-int(array.sum()) // cap))


def lower_bound(
    counts: ArrayLike | Mapping[int, int], max_seq_len: int, *, max_segments: int | None = None
) -> Bound:
    """Return the best bound known here on the number of bins, and the simplest that reaches it.

    It is never below `volume_bound`.  Where long sequences leave rooms that no others fill, it is
    often the fewest bins possible.  The bounds are the volume, the cap, L2 of Martello and Toth
    (1990), and the dual feasible functions of Lueker (1983), Fekete and Schepers (2001), Carlier,
    Clautiaux and Moukrim (2007) and Burdet and Johnson (1977), as in the survey of 2010; with a
    cap also one that counts what fits beside long sequences, by tokens and by number.

    Time: O(max_seq_len) in whole arrays, and no more than O(distinct lengths) beyond 2**20 tokens:
    milliseconds for thousands of distinct lengths, below a second for a million.

    Args:
        counts: int `[max_len + 1]`, how many sequences have each length, or `{length: count}`.
        max_seq_len: capacity of a bin in tokens.
        max_segments: the most sequences that a bin may hold, None for no cap.

    Returns:
        A `Bound`, exact at any size.  The same on every machine.

    Raises:
        SeqpackError: a length or a count is out of range.

    Example:
        >>> lower_bound({6: 3}, max_seq_len=10)
        Bound(value=3, method='Martello-Toth L2')
        >>> lower_bound({4: 9}, max_seq_len=11)
        Bound(value=5, method='dual feasible function')
        >>> lower_bound({1: 9}, max_seq_len=10, max_segments=2)
        Bound(value=5, method='max_segments')
    """
    max_seq_len = check_int("lower_bound", "max_seq_len", max_seq_len, 1, MAX_LENGTH)
    array, max_seq_len, cap = _checked("lower_bound", counts, max_seq_len, max_segments)
    lengths = np.flatnonzero(array)
    return _best(lengths, array[lengths], max_seq_len, cap, None)


def bound_of_lengths(
    lengths: ArrayLike,
    times: ArrayLike,
    max_seq_len: int,
    max_segments: int | None = None,
    enough: int | None = None,
) -> Bound:
    """Return `lower_bound` of lengths as they stand, each with how often it comes, unchecked.

    For templates, whose lengths are long and few, or for bins.  Lengths of 0 need no bin.

    Time: O(n + longest length), or O(n log n) for few long ones, and that of `lower_bound`.

    Args:
        lengths: integers `[n]`, in tokens, in any order; one may come several times.
        times: int64 `[n]`, how many sequences each stands for.
        max_seq_len: capacity of a bin in tokens.
        max_segments: the most sequences that a bin may hold, None for no cap.
        enough: the bins of a packing; a bound that reaches this is not to be improved.

    Example:
        >>> bound_of_lengths([6, 6], [2, 1], 10)
        Bound(value=3, method='Martello-Toth L2')
    """
    values = np.asarray(lengths, np.int64)
    longest = int(values.max(initial=0))
    if longest <= max(len(values), _DENSE):
        distinct = np.arange(longest + 1)
    else:
        distinct, values = np.unique(values, return_inverse=True)
    counts = np.zeros(len(distinct), np.int64)
    np.add.at(counts, values, np.asarray(times, np.int64))
    some = (counts > 0) & (distinct > 0)
    return _best(distinct[some], counts[some], max_seq_len, max_segments, enough)


def _checked(
    caller: str, counts: ArrayLike | Mapping[int, int], max_seq_len: int, max_segments: int | None
) -> tuple[Int64, int, int | None]:
    max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1)
    hint = "count what over_length makes of the lengths, or raise max_seq_len"
    array = as_counts(caller, counts, max_seq_len, hint=hint)
    if max_segments is not None:
        max_segments = check_int(caller, "max_segments", max_segments, 1)
    return array, max_seq_len, max_segments


def _best(
    lengths: Int64, counts: Int64, max_seq_len: int, cap: int | None, enough: int | None
) -> Bound:
    """The best bound, or the first that is `enough`; of equals the simplest."""
    best = Bound(0, "volume")
    for bound in _bounds(lengths, counts, max_seq_len, cap):
        best = bound if bound.value > best.value else best
        if enough is not None and best.value >= enough:
            break
    return best


def _bounds(lengths: Int64, counts: Int64, max_seq_len: int, cap: int | None) -> Iterator[Bound]:
    """Each bound in its turn, the simplest first."""
    if not len(lengths):
        return
    yield Bound(-(-int(lengths @ counts) // max_seq_len), "volume")
    if cap is not None and cap < max_seq_len // int(lengths[0]):  # else it never matters
        yield Bound(-(-int(counts.sum()) // cap), "max_segments")
    else:
        cap = None
    runs = _Runs.of(lengths, counts, max_seq_len)
    yield Bound(_martello_toth(runs), "Martello-Toth L2")
    yield Bound(_dual_feasible(runs), "dual feasible function")
    if cap is not None:
        yield Bound(_beside_long(runs, cap), "dual feasible function")


class _Runs(NamedTuple):
    """Distinct lengths, rising, with the thresholds of U^(epsilon) that can matter.

    U^(epsilon) makes nothing of lengths below epsilon, and a whole bin of what has no room for
    epsilon.  So the best epsilon is a length that it keeps, or half of a bin.
    """

    lengths: Int64  # [k]
    counts: Int64  # [k]
    capacity: int
    below: Int64  # [k + 1], sequences in the runs before
    small: int  # the runs of at most half of a bin: [0, small)
    least: Int64  # [small + 1], epsilon
    full: Int64  # [small + 1], the first run of lengths over capacity - epsilon

    @classmethod
    def of(cls, lengths: Int64, counts: Int64, capacity: int) -> _Runs:
        small = int(np.searchsorted(lengths, capacity // 2, side="right"))
        least = np.append(lengths[:small], (capacity + 1) // 2)
        full = np.searchsorted(lengths, capacity - least, side="right")
        return cls(lengths, counts, capacity, offsets_of(counts), small, least, full)

    @property
    def whole(self) -> Int64:
        """How many sequences are over capacity - epsilon, for each epsilon."""
        number: Int64 = self.below[-1] - self.below[self.full]
        return number

    @property
    def over_half(self) -> int:
        """How many sequences are over half of a bin; no two of them share one."""
        return int(self.below[-1] - self.below[self.small])

    @property
    def room(self) -> _Tail:
        """What is free beside each sequence over half of a bin."""
        long = self.lengths[self.small :][::-1]
        return _Tail.of(self.capacity - long, self.counts[self.small :][::-1])

    @property
    def members(self) -> int:
        """How many members of a family to try, where each costs O(distinct lengths)."""
        return max(4, min(_MEMBERS, _WORK // len(self.lengths)))

    def between(self, weights: Int64) -> Int64:
        """Sum weights of whole runs from epsilon to capacity - epsilon, for each epsilon."""
        sums = offsets_of(weights)
        return sums[self.full] - sums[: len(self.full)]


class _Tail(NamedTuple):
    """How many of some values are at least x, and by how much they are over it."""

    values: Int64  # [k], rising
    counts: Int64  # [k + 1], of these values and those after
    totals: Int64  # [k + 1], their sum
    table: Int64 | None  # the first value that is at least x, for small values

    @classmethod
    def of(cls, values: Int64, counts: Int64) -> _Tail:
        top = int(values.max(initial=0))
        table = np.searchsorted(values, np.arange(top + 2)) if top <= _DENSE else None
        sums, totals = offsets_of(counts), offsets_of(counts * values)
        return cls(values, sums[-1] - sums, totals[-1] - totals, table)

    @property
    def top(self) -> int:
        return int(self.values.max(initial=0))

    def first(self, x: Int64) -> Int64:
        """Index the first value that is at least x, for each x."""
        if self.table is None:
            index: Int64 = np.searchsorted(self.values, x)
        else:
            index = self.table[np.minimum(x, len(self.table) - 1)]
        return index

    def excess(self, x: Int64) -> Int64:
        """Sum of max(value - x, 0), for each x; never above the sum of the values."""
        first = self.first(x)
        return self.totals[first] - x * self.counts[first]

    def floors(self, steps: Int64, most: int) -> Int64:
        """Sum of min(value // step, most), for each step; steps rise.

        A value is at least `level * step` for so many levels.  Tiny steps have too many of them.
        """
        sums = np.zeros(len(steps), np.int64)
        tiny = int(np.searchsorted(steps, self.top // _LEVELS)) if most > _LEVELS else 0
        for i, step in enumerate(steps[:tiny].tolist()):
            sums[i] = -np.minimum(self.values // step, most) @ np.diff(self.counts)
        for level in range(1, most + 1):
            active = int(np.searchsorted(steps, self.top // level, side="right"))
            if active <= tiny:
                break
            sums[tiny:active] += self.counts[self.first(level * steps[tiny:active])]
        return sums


def _martello_toth(runs: _Runs) -> int:
    """L2: U^(epsilon) for every epsilon."""
    tokens = runs.between(runs.lengths * runs.counts)
    return int((runs.whole - (-tokens // runs.capacity)).max())


def _fekete_schepers(runs: _Runs) -> int:
    """u^(k) after U^(epsilon): k + 1 parts of a bin; what is no whole number of them is floored.

    Floored parts count 1 / k, whole numbers of parts 1 / (k + 1).
    """
    best = 0
    for k in range(1, min(runs.members, runs.capacity - 1) + 1):
        parts, rest = np.divmod(runs.lengths * (k + 1), runs.capacity)
        parts *= runs.counts
        exact = runs.between(np.where(rest, 0, parts))
        floored = runs.between(np.where(rest, parts, 0))
        best = max(best, int((runs.whole + _ceil_sum(exact, k + 1, floored, k)).max()))
    return best


def _ceil_sum(a: Int64, b: Int64 | int, c: Int64, d: Int64 | int) -> Int64:
    """Return `ceil(a / b + c / d)`; only remainders are multiplied, so nothing overflows."""
    whole_a, a = np.divmod(a, b)
    whole_c, c = np.divmod(c, d)
    total: Int64 = whole_a + whole_c - (-(a * d + c * b) // (b * d))
    return total


def _steps(runs: _Runs) -> Int64:
    """The steps of the two functions below: each whole number of tokens, or some that matter."""
    low, high = max(1, runs.capacity // _LEVELS), runs.capacity // 2
    if runs.capacity <= _DENSE:
        return np.arange(low, high + 1)
    # A function jumps where a length, or what it leaves free, is a multiple of the step.
    few = _thin(runs.lengths, 512)
    sizes = np.concatenate([few, runs.capacity - few])
    steps = np.unique(sizes // np.arange(1, 9)[:, None])
    steps = np.union1d(steps, steps + 1)
    return steps[(steps >= low) & (steps <= high)]


def _thin(values: Int64, most: int) -> Int64:
    """At most `most` of the values, evenly spread."""
    return values[:: max(1, -(-len(values) // most))]


def _carlier(runs: _Runs, steps: Int64) -> int:
    """The symmetric form of phi^(epsilon): whole steps, of C // step in a bin.

    Over half of a bin, what counts is the steps that are left free.
    """
    small = runs.small
    half = int(small > 0 and 2 * int(runs.lengths[small - 1]) == runs.capacity)
    halves = int(runs.counts[small - 1]) if half else 0
    tail = _Tail.of(runs.lengths[: small - half], runs.counts[: small - half])
    taken = tail.floors(steps, runs.capacity) - runs.room.floors(steps, runs.capacity)
    parts = _ceil_sum(np.full(len(steps), halves), 2, taken, runs.capacity // steps)
    return runs.over_half + int(parts.max(initial=0))


def _burdet_johnson(runs: _Runs, steps: Int64) -> int:
    """Gomory's rounding: whole steps, and of the rest what is over the rest of a bin.

    With C = m * step + rest, a length weighs the sum over j < m of what of it lies in
    [j * step + rest, (j + 1) * step), out of m * (step - rest).  The best steps are tried
    once more, after U^(epsilon).
    """
    tail = _Tail.of(runs.lengths, runs.counts)
    parts, rest = np.divmod(runs.capacity, steps)
    sums = np.zeros(len(steps), np.int64)
    for level in range(int(parts.max(initial=0))):
        active = int(np.searchsorted(steps, runs.capacity // (level + 1), side="right"))
        start = level * steps[:active]
        sums[:active] += tail.excess(start + rest[:active]) - tail.excess(start + steps[:active])
    bounds = -(-sums // (parts * (steps - rest)))
    best = int(bounds.max(initial=0))
    for step in steps[np.argsort(bounds, kind="stable")[: -runs.members - 1 : -1]].tolist():
        number, rest_of = divmod(runs.capacity, step)
        whole, over = np.divmod(runs.lengths, step)
        weights = whole * (step - rest_of) + np.maximum(over - rest_of, 0)
        sums = runs.between(weights * runs.counts)
        best = max(best, int((runs.whole - (-sums // (number * (step - rest_of)))).max()))
    return best


def _dual_feasible(runs: _Runs) -> int:
    steps = _steps(runs)
    return max(_fekete_schepers(runs), _carlier(runs, steps), _burdet_johnson(runs, steps))


def _beside_long(runs: _Runs, cap: int) -> int:
    """phi^(epsilon) with a cap: of sequences of at least epsilon, m = min(cap, C // epsilon) fit.

    Each weighs 1 / m; one over half of a bin weighs 1, less what else of them fits in its room and
    under the cap.  No mean of this and a function of the lengths alone is above both.
    """
    room = runs.room
    tiny = int(np.searchsorted(runs.least, room.top // _LEVELS))  # these cost the most
    kept = np.append(_thin(np.arange(tiny), runs.members), np.arange(tiny, len(runs.least)))
    least = runs.least[kept]
    others = runs.below[runs.small] - runs.below[kept]
    beside = room.floors(least, cap - 1)
    most = np.minimum(cap, np.maximum(runs.capacity // least, 1))
    return runs.over_half + int((-((beside - others) // most)).max())
