"""The public planning functions: lengths or their histogram in, a plan or bins of ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import MAX_LENGTH, check_choice, check_int, check_lengths, fail
from seqpack_jax.permutation import permute, seed_from_components
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.counts import Int64, as_counts, coarsen_lengths
from seqpack_jax.planning.heuristics import next_fit_offsets
from seqpack_jax.planning.histogram import group_ids
from seqpack_jax.planning.over_length import (
    REFUSE,
    OverLength,
    PlannedLengths,
    apply_to_counts,
    apply_to_lengths,
    as_policy,
)
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.planners import ALGORITHMS, Effort, check_effort, plan_counts
from seqpack_jax.planning.vector_fit import check_cap, check_vectors
from seqpack_jax.planning.vectors import VectorBins, VectorPlan, plan_vectors

__all__ = [
    "greedy_pack_sequences",
    "heap_pack_sequences",
    "pack_length_histogram",
    "pack_length_histogram_batched",
    "pack_sequences",
    "sort_indices_by_length",
]


def pack_length_histogram(
    counts: ArrayLike | Mapping[int, int],
    max_seq_len: int,
    *,
    algorithm: str = "best_fit_decreasing",
    max_segments: int | None = None,
    tolerance: int = 1,
    over_length: str | OverLength = "error",
    budget: float | None = None,
    progress: bool | None = None,
) -> PackingPlan:
    """Plan which lengths share a bin, from how many sequences have each length.

    The plan is exactly that of packing the sequences one by one, but its cost depends on the number
    of distinct lengths alone: a billion sequences take as long as ten thousand.

    Time: milliseconds for a few thousand distinct lengths; see each algorithm for its order.

    Args:
        counts: int `[max_len + 1]`, how many sequences have each length, or `{length: count}`.
        max_seq_len: capacity of a bin in tokens.
        algorithm: `"best_fit_decreasing"` (dense, and the fastest), `"first_fit_decreasing"` (as
            dense), `"worst_fit_decreasing"` (even fills), or `"optimal"` (the fewest bins, or
            nearly, with a proof; in seconds; needs the extra `optimal`).
        max_segments: the most sequences that a bin may hold, None for no cap.
        tolerance: plan each length as the next multiple of this many tokens, so that sequences of
            nearly equal length mix between epochs; 1 mixes equal lengths only.  What it costs is
            `plan.tolerance_rows`, for which the histogram is planned a second time, with a budget
            of its own.
        over_length: what to do with lengths over `max_seq_len`: the name of an action or an
            `OverLength`, as in `length_histogram_from_lengths`, whose counts need none here.
        budget: how much work `"optimal"` may take to find and prove a better plan, in units of
            about a second; None for 8, and up to 48 if `max_seq_len` is above 2048.  It is
            counted, not timed, so that every host ends at the same plan.
        progress: whether `"optimal"` shows progress on stderr; None to do so on a terminal.

    Returns:
        A `PackingPlan`.  The same arguments give the same plan on any machine, that of `"optimal"`
        with the same version of highspy, on the same kind of processor.  The lower bound
        of its certificate is that of the lengths as they are without a tolerance.  `"optimal"`
        returns the best plan so far on Ctrl-C.

    Raises:
        SeqpackError: a length is over `max_seq_len` without a policy, a count is negative, or an
            argument is out of range.

    Example:
        >>> plan = pack_length_histogram({512: 1_000_000_000}, max_seq_len=2048)
        >>> dict(plan.to_counter())
        {(512, 512, 512, 512): 250000000}
        >>> print(plan.certificate)
        250,000,000 rows; lower bound 250,000,000 (volume): optimal
    """
    caller = "pack_length_histogram"
    check_choice(caller, "algorithm", algorithm, ALGORITHMS)
    max_seq_len, max_segments = _check_limits(caller, max_seq_len, max_segments)
    tolerance = check_int(caller, "tolerance", tolerance, 1)
    policy = as_policy(caller, over_length)
    array = as_counts(caller, counts, max_seq_len if policy == REFUSE else None)
    array = apply_to_counts(caller, policy, array, max_seq_len)[0]
    effort = check_effort(caller, algorithm, Effort(budget, progress=progress))
    return plan_counts(caller, array, max_seq_len, algorithm, max_segments, tolerance, effort)


# The seed library has two functions whose results differ; here both names mean the exact one.
pack_length_histogram_batched = pack_length_histogram


def pack_sequences(
    lengths: ArrayLike,
    max_seq_len: int | Sequence[int],
    *,
    algorithm: str = "best_fit_decreasing",
    max_segments: int | None = None,
    tolerance: int = 1,
    seed: int | None = None,
    over_length: str | OverLength = "error",
) -> Bins:
    """Pack sequences into bins of `max_seq_len` tokens: which sequences share a row.

    For training over several epochs, plan once with `pack_length_histogram` and draw each epoch
    with `materialize_epoch`; this is the one-shot form.

    Time: O(n) after one radix sort of the lengths; for `[n, k]` lengths, that of `pack_vectors`.

    Args:
        lengths: integers `[n]`, in tokens; sequence `i` has the id `i`.  For sequences of several
            features that each have a length, `[n, k]`: a bin holds all of them.
        max_seq_len: capacity of a bin in tokens; for `[n, k]` lengths, a tuple of `k` capacities.
            Then there is but one algorithm, and neither tolerance nor policy.
        algorithm: as in `pack_length_histogram`, or `"next_fit"`, which keeps the input order and
            fills far less.
        max_segments: the most sequences that a bin may hold, None for no cap.
        tolerance: as in `pack_length_histogram`; without effect on `"next_fit"`.
        seed: shuffles which sequences of equal (or equally planned) length go where; None keeps
            them in input order.  Without effect on `"next_fit"`.  It also selects the windows of
            `over_length="crop"`; None keeps the first tokens.
        over_length: what to do with lengths over `max_seq_len`: the name of an action or an
            `OverLength`, as in `length_histogram_from_lengths`.  Pieces of split sequences get
            ids from `n` on, see `bins.pieces`; `bins.report` counts what was touched.

    Returns:
        `Bins`, the ids inside a bin by falling length; `VectorBins` of several capacities.

    Raises:
        SeqpackError: a length is below 1, or over `max_seq_len` without a policy, or an argument is
            out of range.

    Example:
        >>> pack_sequences([128, 64, 32, 16, 200, 80, 50], max_seq_len=256).tolist()
        [[4, 6], [0, 5, 2, 3], [1]]
        >>> pack_sequences([5, 4, 3, 6], max_seq_len=10, algorithm="next_fit").tolist()
        [[0, 1], [2, 3]]
        >>> bins = pack_sequences([3, 9], max_seq_len=4, over_length="split")
        >>> bins.tolist(), bins.pieces.start.tolist(), bins.pieces.stop.tolist()
        ([[2], [3], [0, 4]], [0, 4, 8], [4, 8, 9])
        >>> pack_sequences([[5, 1], [3, 4], [5, 4], [5, 2]], max_seq_len=(10, 6)).tolist()
        [[2, 3], [1, 0]]
    """
    caller = "pack_sequences"
    several = hasattr(max_seq_len, "__iter__") and getattr(max_seq_len, "ndim", 1) > 0
    if several and not isinstance(max_seq_len, str | bytes | Mapping):
        for name, value, only in (
            ("algorithm", algorithm, "best_fit_decreasing"),
            ("tolerance", tolerance, 1),
            ("over_length", over_length, "error"),
        ):
            if value != only:
                problem = f"{name} = {value!r} with several capacities"
                fail(caller, problem, f"leave {name} out: there it is always {only!r}")
        return _pack_vectors(caller, lengths, max_seq_len, max_segments, seed)
    return _pack(
        caller,
        lengths,
        max_seq_len,
        algorithm,
        max_segments,
        tolerance,
        seed,
        over_length,
    )


def _pack(
    caller: str,
    lengths: ArrayLike,
    max_seq_len: Any,
    algorithm: str,
    max_segments: int | None,
    tolerance: int,
    seed: int | None,
    over_length: str | OverLength,
) -> Bins:
    check_choice(caller, "algorithm", algorithm, (*ALGORITHMS, "next_fit"))
    max_seq_len, max_segments = _check_limits(caller, max_seq_len, max_segments)
    tolerance = check_int(caller, "tolerance", tolerance, 1)
    seed = None if seed is None else check_int(caller, "seed", seed)
    policy = as_policy(caller, over_length)
    planned = apply_to_lengths(caller, policy, lengths, max_seq_len)
    own = planned.of_ids
    if algorithm == "next_fit":
        ids = _in_input_order(planned)
        bins = Bins(ids, next_fit_offsets(own[ids], max_seq_len, max_segments), max_seq_len)
    else:
        counts, ids = group_ids(own)
        plan = plan_counts(caller, counts, max_seq_len, algorithm, max_segments, tolerance)
        if tolerance > 1:  # keep input order inside a bucket, as inside a length
            counts, ids = group_ids(coarsen_lengths(own, tolerance, max_seq_len))
        ids = ids if seed is None else _shuffled(counts, ids, seed)
        bins = Bins(*_assign(plan, plan.lengths, ids), max_seq_len)
    key = None if seed is None else seed_from_components(seed)
    return replace(bins, pieces=planned.pieces, over_length=policy, report=planned.report, key=key)


def _pack_vectors(
    caller: str, lengths: ArrayLike, max_seq_len: Any, max_segments: int | None, seed: int | None
) -> VectorBins:
    array, limits = check_vectors(caller, lengths, max_seq_len, "max_seq_len")
    seed = None if seed is None else check_int(caller, "seed", seed)
    plan, pools = plan_vectors(array, limits, check_cap(caller, max_segments))
    ids: Any = pools.ids
    ids = ids if seed is None else _shuffled(pools.counts, ids, seed)
    key = None if seed is None else seed_from_components(seed)
    return VectorBins(*_assign(plan, plan.classes, ids), limits, key=key)


def greedy_pack_sequences(
    lengths: ArrayLike,
    max_seq_len: int,
    tolerance: int = 1,
    seed: int | None = None,
    *,
    over_length: str | OverLength = "error",
) -> Bins:
    """Pack by first fit decreasing: `pack_sequences` under the seed library's name.

    Args:
        lengths: integers `[n]`, in tokens; sequence `i` has the id `i`.
        max_seq_len: capacity of a bin in tokens.
        tolerance: as in `pack_sequences`, like the next two.
        seed: see `pack_sequences`.
        over_length: see `pack_sequences`.

    Returns:
        `Bins`.

    Raises:
        SeqpackError: as `pack_sequences`.

    Example:
        >>> greedy_pack_sequences([5, 3, 4, 2, 1], max_seq_len=8).tolist()
        [[0, 1], [2, 3, 4]]
    """
    caller, algorithm = "greedy_pack_sequences", "first_fit_decreasing"
    return _pack(caller, lengths, max_seq_len, algorithm, None, tolerance, seed, over_length)


def heap_pack_sequences(
    lengths: ArrayLike,
    max_seq_len: int,
    tolerance: int = 1,
    seed: int | None = None,
    *,
    over_length: str | OverLength = "error",
) -> Bins:
    """Pack by worst fit decreasing: `pack_sequences` under the seed library's name.

    Args:
        lengths: integers `[n]`, in tokens; sequence `i` has the id `i`.
        max_seq_len: capacity of a bin in tokens.
        tolerance: as in `pack_sequences`, like the next two.
        seed: see `pack_sequences`.
        over_length: see `pack_sequences`.

    Returns:
        `Bins`.

    Raises:
        SeqpackError: as `pack_sequences`.

    Example:
        >>> heap_pack_sequences([128, 64, 32, 16, 200, 80, 50], max_seq_len=256).tolist()
        [[4], [0, 5], [1, 6, 2, 3]]
    """
    caller, algorithm = "heap_pack_sequences", "worst_fit_decreasing"
    return _pack(caller, lengths, max_seq_len, algorithm, None, tolerance, seed, over_length)


def sort_indices_by_length(
    lengths: ArrayLike, tolerance: int = 1, seed: int | None = None
) -> Int64:
    """Return the indices of sequences by falling length: the order in which packers take them.

    The same on every machine: without a seed, equal lengths keep their input order.

    Time: O(n + longest length), one radix sort.

    Args:
        lengths: integers `[n]`, in tokens.
        tolerance: lengths count as the next multiple of this many tokens.
        seed: shuffles the indices of sequences of equal (or equally planned) length; None keeps
            them in input order.

    Returns:
        int64 `[n]`, a permutation of the indices.

    Raises:
        SeqpackError: a length is not an integer or below 1, or `tolerance` is.

    Example:
        >>> sort_indices_by_length([128, 64, 32, 16, 200, 80, 50]).tolist()
        [4, 0, 5, 1, 6, 2, 3]
        >>> sort_indices_by_length([5, 6, 9, 7, 8], tolerance=4).tolist()
        [2, 0, 1, 3, 4]
    """
    caller = "sort_indices_by_length"
    tolerance = check_int(caller, "tolerance", tolerance, 1)
    seed = None if seed is None else check_int(caller, "seed", seed)
    array = check_lengths(caller, lengths)
    counts, ids = group_ids(coarsen_lengths(array, tolerance, int(array.max(initial=1))))
    if seed is not None:
        ids = _shuffled(counts, ids, seed)
    # Turn the groups around, but not what is inside them.
    ends = np.cumsum(counts)
    falling = np.empty_like(ids)
    falling[np.arange(len(ids)) + np.repeat(len(ids) - 2 * ends + counts, counts)] = ids
    return falling


def _check_limits(
    caller: str, max_seq_len: int, max_segments: int | None
) -> tuple[int, int | None]:
    max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1, MAX_LENGTH)
    if max_segments is not None:
        max_segments = check_int(caller, "max_segments", max_segments, 1)
        # A bin never holds more sequences than tokens.
        max_segments = max_segments if max_segments < max_seq_len else None
    return max_seq_len, max_segments


def _assign(plan: PackingPlan | VectorPlan, pools: Any, ids: Any) -> tuple[Int64, Int64]:
    """Give every slot of the plan one of `ids`, grouped by pool; bins in the plan's own order.

    `pools` says which pool each slot draws from: planned lengths, or classes.

    Slots taken by pool, then in the order of the plan, use up the ids from front to back; so only
    where each id goes has to be computed: `place = first place of its slot + bin * bin size`.
    """
    sizes = np.repeat(plan.sizes, plan.sizes)  # of the bin around each slot
    bins = np.repeat(plan.multiplicity, plan.sizes)
    template_start = np.cumsum(plan.sizes * plan.multiplicity) - plan.sizes * plan.multiplicity
    first = np.repeat(template_start - plan.offsets[:-1], plan.sizes) + np.arange(len(sizes))
    order = np.argsort(pools, kind="stable")
    sizes, bins, first = sizes[order], bins[order], first[order]
    first -= (np.cumsum(bins) - bins) * sizes  # so that the running index gives `bin * size`
    place = np.arange(len(ids))
    place *= np.repeat(sizes, bins)
    place += np.repeat(first, bins)
    assigned = np.empty(len(ids), np.int64)
    assigned[place] = ids
    return assigned, offsets_of(np.repeat(plan.sizes, plan.multiplicity))


def _shuffled(counts: Int64, ids: Int64, seed: int) -> Int64:
    """Shuffle ids, which are grouped by length, inside each length."""
    length = np.repeat(np.arange(len(counts)), counts)
    start = np.repeat(np.cumsum(counts) - counts, counts)
    seeds = np.uint64(seed_from_components(seed)) + length.astype(np.uint64)
    rank = permute(np.arange(len(ids)) - start, counts[length], seeds)
    return ids[start + rank]


def _in_input_order(planned: PlannedLengths) -> Int64:
    """Return the ids of all that is packed, pieces in the place of their sequence."""
    own = planned.of_ids
    order = np.arange(len(own))
    if planned.pieces is not None:
        source = order.copy()
        source[len(planned.lengths) :] = planned.pieces.source_id
        order = np.argsort(source, kind="stable")
    return order[own[order] > 0]
