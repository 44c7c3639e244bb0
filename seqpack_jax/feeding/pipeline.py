"""From records to a source of packed rows in one call: their lengths, a plan, a `PackedSource`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import MAX_LENGTH, OVER_LENGTH_HINT, check_int, fail
from seqpack_jax.feeding.features import Features, make_features
from seqpack_jax.feeding.packed_source import PackedSource
from seqpack_jax.feeding.reading import make_ends, read_records
from seqpack_jax.planning.column_generation import import_highspy
from seqpack_jax.planning.histogram import Int64, SequencePools, group_ids
from seqpack_jax.planning.over_length import (
    OverLength,
    OverLengthReport,
    apply_to_lengths,
    as_policy,
)
from seqpack_jax.planning.packers import pack_length_histogram
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.planners import ALGORITHMS, Effort, check_effort
from seqpack_jax.planning.vectors import VectorPlan, pack_vectors

__all__ = ["PackedSource", "pack_dataset"]

_BLOCK = 1 << 12  # records that are read at once to ask for their lengths


def pack_dataset(
    sequences: Any,
    max_seq_len: int | Mapping[str, int],
    *,
    lengths: ArrayLike | Callable[[Any], Any] | None = None,
    batch_size: int | None,
    algorithm: str = "best_fit_decreasing",
    max_segments: int | None = None,
    tolerance: int = 1,
    budget: float | None = None,
    over_length: str | OverLength = "error",
    feature: str = "tokens",
    **options: Any,
) -> PackedSource:
    """Plan a data set and return a Grain source of its packed batches: the one-call form.

    Records without tokens are left out, and counted in `source.empty_records`.

    Time: O(n) once; nothing is packed until an item is read.

    Args:
        sequences: a `FlatSequences`, or anything with `len()` whose `[id]` is a 1-D array of
            integers: a list of arrays, a memory map, a table; or a record of several features.
        max_seq_len: tokens per row; or `{feature: tokens per row}` for several features with
            lengths of their own, of which a row must hold all.
        lengths: integers `[n]`, tokens of each sequence, or `[n, k]` for `k` capacities; a function
            of a record that returns them; None to ask each sequence for its `len`.
        batch_size: rows per batch of this process; None for single rows.
        algorithm: see `pack_length_histogram`; `pack_vectors` plans several capacities.
        max_segments: the most sequences in a row, None for no cap.
        tolerance: see `pack_length_histogram`.
        budget: see `pack_length_histogram`.
        over_length: what becomes of sequences over `max_seq_len`: an `OverLength`, or the name of
            its action: `"error"`, `"drop"`, `"truncate"`, `"truncate_left"`, `"crop"` (a random
            window per epoch) or `"split"`; the last two for a single capacity.
        feature: the feature of records that `max_seq_len` is of, if it is one number.
        **options: those of `PackedSource`: `seed`, `epochs`, `shard`, `remainder`, `shuffle`,
            `zones`, `multiple_of`, `pad_value`, `meta_features`, `metadata`, `key_style`,
            `transform`, `bos_id`, `eos_id`, `read_threads`.  The plan counts BOS and EOS.

    Returns:
        A `PackedSource`.

    Raises:
        SeqpackError: a length is out of range or does not match its sequence.

    Example:
        >>> sequences = [np.full(n, n) for n in (3, 6, 2)]
        >>> source = pack_dataset(sequences, 4, batch_size=3, over_length="split", shuffle=False)
        >>> source[0]["segment_ids"].tolist()
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 2, 2]]

        A transform gets a generator of the sequence, whatever row it comes in:

        >>> def mask(record, rng):
        ...     masked = rng.random(len(record["tokens"])) < 0.5
        ...     return {"tokens": np.where(masked, 0, record["tokens"]), "labels": record["tokens"]}
        >>> records = [{"tokens": np.arange(1, 5)}, {"tokens": np.arange(5, 8)}]
        >>> source = pack_dataset(records, 8, batch_size=1, transform=mask, eos_id=9)
        >>> source[0]["tokens"].tolist(), source[0]["labels"].tolist()
        ([[5, 0, 7, 9, 0, 0, 0, 0]], [[5, 6, 7, 0, 0, 0, 0, 0]])
    """
    caller = "pack_dataset"
    names = {name: options[name] for name in ("multiple_of", "pad_value") if name in options}
    features = make_features(
        caller, max_seq_len, feature=feature, max_segments=max_segments, **names
    )
    extra = make_ends(caller, features, options.get("bos_id"), options.get("eos_id")).extra(
        features
    )
    threads = check_int(caller, "read_threads", options.get("read_threads", 4), 1)
    tolerance = check_int(caller, "tolerance", tolerance, 1)
    _check_planner(caller, features, algorithm, tolerance, budget)
    # Of what comes once per sequence, the width is known when there is a plan.
    once: Any = {"max_segments": 1, "meta_features": tuple(options.get("meta_features", ()))}
    plan, pools, empty = _plan(
        caller,
        _lengths_of(caller, sequences, replace(features, **once), lengths, threads),
        features,
        extra=extra,
        policy=as_policy(caller, over_length),
        algorithm=algorithm,
        tolerance=tolerance,
        budget=budget,
    )
    source = PackedSource(
        plan,
        pools,
        sequences,
        batch_size=batch_size,
        feature=feature if features.tokens_only else features.names,
        max_segments=max_segments,
        **options,
    )
    source.empty_records = empty
    return source


def _check_planner(
    caller: str, features: Features, algorithm: str, tolerance: int, budget: float | None
) -> None:
    """Raise before any record is read if there is no such planner."""
    if algorithm not in ALGORITHMS:
        problem = f"algorithm = {algorithm!r} is not a planner"
        hint = f"choose one of {', '.join(ALGORITHMS)}; pack_sequences has next_fit"
        fail(caller, problem, hint)
    if not features.single and (algorithm, tolerance, budget) != ("best_fit_decreasing", 1, None):
        more = "" if budget is None else f", budget = {budget!r}"
        problem = f"several capacities, with algorithm = {algorithm!r}, tolerance = {tolerance}"
        fail(caller, problem + more, "leave them out: they are for a single capacity")
    check_effort(caller, algorithm, Effort(budget))
    if algorithm == "optimal":
        import_highspy(caller)


class _Planned(NamedTuple):
    """A plan of records, the pools of their ids, and how many records were empty."""

    plan: PackingPlan | VectorPlan
    pools: SequencePools
    empty: int


def _lengths_of(
    caller: str, records: Any, features: Features, lengths: Any, threads: int = 1
) -> Int64:
    """Return the tokens of each record in each capacity: int64 `[n, c]`.

    Time: O(n); each record is read once, unless lengths are given as an array.

    Args:
        caller: the public function that an error shall name.
        records: of `features`, or bare arrays.
        features: which of them have a capacity.
        lengths: integers `[n]` or `[n, c]`; a function of a record that returns an int or a tuple;
            None for what the records say themselves.
        threads: see `read_records`.
    """
    if lengths is not None and not callable(lengths):
        return _given(caller, records, features, lengths)
    if lengths is None and features.single:
        lengths = getattr(records, "lengths", None)  # of FlatSequences, or what `open_table` gives
        if isinstance(lengths, np.ndarray):
            return _given(caller, records, features, lengths)
        lengths = None
    try:
        size = len(records)
        measure = lengths or _measure_of(caller, features, records[0] if size else ())
        if isinstance(records, list | tuple):
            found = list(map(measure, records))
        else:
            blocks = (np.arange(a, min(a + _BLOCK, size)) for a in range(0, size, _BLOCK))
            read = (read_records(caller, records, block, threads) for block in blocks)
            found = [length for block in read for length in map(measure, block)]
    except (TypeError, KeyError) as error:
        problem = f"the lengths of sequences cannot be counted ({error!r})"
        fail(caller, problem, "pass a list of arrays or of records, FlatSequences, or lengths=...")
    return _given(caller, records, features, found)


def _measure_of(caller: str, features: Features, first: Any) -> Callable[[Any], Any]:
    """Return a function that counts the tokens of records that are like the first one."""
    named = isinstance(first, Mapping) or hasattr(first, "_fields")
    nested = isinstance(first, tuple) and any(np.ndim(entry) for entry in first)
    if features.tokens_only and not named and not nested:
        return len
    return lambda record: features.lengths(features.read(caller, "a record", record))


def _given(caller: str, records: Any, features: Features, lengths: Any) -> Int64:
    columns = len(features.names)
    hint = "pass integers [n]" if columns == 1 else f"pass integers [n, {columns}]"
    try:
        array = np.asarray(lengths)
    except ValueError:
        fail(caller, "lengths is ragged", hint)
    if array.ndim == 1 and (columns == 1 or not array.size):
        array = array.reshape(-1, columns)
    if array.ndim != 2 or (array.shape[1] != columns and array.size):
        problem = f"lengths has shape {array.shape} for {columns} capacities"
        fail(caller, problem, f"{hint}: the tokens of each sequence in {', '.join(features.names)}")
    if hasattr(records, "__len__") and len(records) != len(array):
        problem = f"there are {len(array)} lengths, but {len(records)} sequences"
        fail(caller, problem, "pass one length per sequence")
    if array.size and array.dtype.kind not in "iu":
        fail(caller, f"lengths has dtype {array.dtype}, not an integer dtype", hint)
    if array.size and int(array.min()) < 0:
        at = tuple(int(i) for i in np.argwhere(array < 0)[0])
        fail(caller, f"lengths[{at[0]}] = {array[at]}, but a length is at least 0", hint)
    if array.size and int(array.max()) > MAX_LENGTH:
        at = tuple(int(i) for i in np.argwhere(array > MAX_LENGTH)[0])
        problem = f"lengths[{at[0]}] = {array[at]}, but a length is at most {MAX_LENGTH}"
        fail(caller, problem, "check what computes lengths")
    return array.astype(np.int64, copy=False).reshape(-1, columns)


def _plan(
    caller: str,
    lengths: Int64,
    features: Features,
    *,
    extra: tuple[int, ...],
    policy: OverLength,
    algorithm: str,
    tolerance: int,
    budget: float | None,
) -> _Planned:
    """Plan records of these lengths, less those that are empty.

    Time: O(n), and that of the planner.

    Args:
        caller: the public function that an error shall name.
        lengths: int64 `[n, c]`, the tokens of each record in each capacity.
        features: their capacities, and the most segments of a row.
        extra: tokens that each sequence gets beside its own, in each capacity.
        policy: what becomes of those over a capacity.
        algorithm: of `pack_length_histogram`, for a single capacity.
        tolerance: see `pack_length_histogram`.
        budget: see `pack_length_histogram`.
    """
    for (name, limit), more in zip(features.capacities.items(), extra, strict=True):
        if more >= limit:
            problem = f"max_seq_len = {limit} of {name!r} leaves no room beside {more} tokens"
            fail(caller, f"{problem} of bos_id and eos_id", "raise max_seq_len")
    empty: NDArray[np.bool_] = np.logical_not(lengths.any(axis=1))
    if not features.single:
        return _plan_vectors(caller, lengths + np.array(extra), empty, features, policy)
    (max_seq_len,) = features.capacities.values()
    only = lengths[:, 0]
    if empty.any():
        only = np.where(empty, 1, only)
    planned = apply_to_lengths(caller, policy, only, max_seq_len, extra_tokens=extra[0])
    if empty.any():
        planned.lengths[empty] = 0
    counts, ids = group_ids(planned.of_ids)
    pools = SequencePools(ids, offsets_of(counts), planned.pieces, policy, planned.report)
    # Lengths that are planned as multiples of the alignment leave room for the gaps.
    tolerance = features.planned(tolerance)
    plan = pack_length_histogram(
        counts,
        max_seq_len,
        algorithm=algorithm,
        max_segments=features.max_segments,
        tolerance=tolerance,
        budget=budget,
    )
    return _Planned(plan, pools, int(np.count_nonzero(empty)))


def _plan_vectors(
    caller: str,
    lengths: Int64,
    empty: NDArray[np.bool_],
    features: Features,
    policy: OverLength,
) -> _Planned:
    limits = np.array(list(features.capacities.values()))
    over = (lengths > limits) & ~empty[:, None]
    long = np.logical_or.reduce(over, axis=1)
    report = OverLengthReport(policy.action)
    keep, cut = ~empty, np.minimum(lengths, limits)
    if policy.action in ("crop", "split"):
        problem = f"over_length = {policy.action!r} with several capacities"
        fail(caller, problem, "choose one of error, drop, truncate, truncate_left")
    if policy.action == "error" and long.any():
        i, c = map(int, np.argwhere(over)[0])
        problem = f"lengths[{i}] = {lengths[i, c]} of {features.names[c]!r}, but max_seq_len is"
        more = f"{np.count_nonzero(long)} of {len(long)} records are over it"
        hint = OVER_LENGTH_HINT.replace(", 'truncate', 'crop' or 'split'", " or 'truncate'")
        fail(caller, f"{problem} {limits[c]} ({more})", hint)
    if long.any():
        tokens, kept = int(lengths[long].sum()), 0
        if policy.action == "drop":
            keep &= ~long
        else:
            kept = int(cut[long].sum())
        report = OverLengthReport(
            policy.action, int(np.count_nonzero(long)), tokens, dropped_tokens=tokens - kept
        )
    ids = np.flatnonzero(keep)
    plan, pools = pack_vectors(
        features.planned(cut[ids]),
        limits.tolist(),
        max_segments=features.max_segments,
    )
    pools = replace(pools, ids=ids[np.asarray(pools.ids)], over_length=policy, report=report)
    return _Planned(plan, pools, int(np.count_nonzero(empty)))
