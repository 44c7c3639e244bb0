"""Batches read back: their segments, what was computed of them, and whether they are well made."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NoReturn, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.planning.histogram import Int64

__all__ = ["Batch", "flat_names", "unpack_batch", "unpack_by_id", "validate_batch"]


class Batch(Protocol):
    """A `PackedBatch`, or another object that gives the arrays of a batch by name."""

    def asdict(self) -> dict[str, Any]:
        """Return the arrays by name."""
        ...


@overload
def unpack_batch(batch: Batch | Mapping[str, Any]) -> FlatSequences: ...
@overload
def unpack_batch(
    batch: Batch | Mapping[str, Any], feature: str, *, values: ArrayLike | None = None
) -> list[NDArray[Any]]: ...
@overload
def unpack_batch(
    batch: Batch | Mapping[str, Any], feature: str | None = None, *, values: ArrayLike
) -> list[NDArray[Any]]: ...
def unpack_batch(
    batch: Batch | Mapping[str, Any],
    feature: str | None = None,
    *,
    values: ArrayLike | None = None,
) -> FlatSequences | list[NDArray[Any]]:
    """Return the segments of a batch, row after row: the inverse of `pack_batch`.

    Of the tokens, of another feature, or of what a model computed for each token.

    Time: O(B * L), and a slice per segment unless it is of the tokens.

    Args:
        batch: a `PackedBatch` or an item of a Grain pipeline, of arrays `[B, L]` in the key style
            `"default"` or `"grain"`; NumPy, or JAX arrays, which are copied to the host.
        feature: what to unpack, `[B, L, ...]`; nested ones are called "a/b".
        values: unpack these instead, `[B, L, ...]`, which lie as the tokens do, or as `feature`
            does where features have capacities of their own.

    Returns:
        Without `feature` and `values` a `FlatSequences` of the tokens; its sequence `k` is the one
        whose id is `bins.ids[k]`.  Else the arrays of the segments, `[tokens, ...]`, in that order.

    Raises:
        SeqpackError: there is no such feature, or the arrays are not `[B, L, ...]`.

    Example:
        >>> batch = {"tokens": np.array([[7, 8, 9, 0]]), "segment_ids": np.array([[1, 1, 2, 0]])}
        >>> [tokens.tolist() for tokens in unpack_batch(batch)]
        [[7, 8], [9]]
        >>> [found.tolist() for found in unpack_batch(batch, values=[[0.5, 1.5, 2.5, 0]])]
        [[0.5, 1.5], [2.5]]
    """
    caller = "unpack_batch"
    real, offsets, array = _segments_of(caller, _named(caller, batch), feature, values)
    if feature is None and values is None:
        return FlatSequences(array[real], offsets)
    return _split(array[real], offsets)


def unpack_by_id(
    batch: Batch | Mapping[str, Any],
    feature: str | None = None,
    *,
    values: ArrayLike | None = None,
    once: bool = False,
) -> dict[int, NDArray[Any]]:
    """Return what a batch holds, or what a model made of it, by the id of each sequence.

    So results come back in the order of the input, whatever rows the sequences were in: merge the
    dicts of all batches and read them in the order of ids.  Pieces of split sequences have ids of
    their own; save in a stream (`PackIterDataset`), where they have that of their record, so that
    two of them in one batch are an error here.

    Time: O(B * L), and a slice per segment.

    Args:
        batch: as for `unpack_batch`, with `ids` `[B, max_segments]`: packed with `metadata=True`.
        feature: what to return; None for the tokens.
        values: return these instead.
        once: the feature or the values, one of which must be given, come once per sequence,
            `[B, max_segments, ...]`, and not once per token, `[B, L, ...]`.

    Returns:
        `{id: array}`, `[tokens, ...]` of each sequence, or `[...]` if `once`.

    Raises:
        SeqpackError: the batch has no ids, or not one per segment, or an id twice; or arrays have
            another shape, or there is nothing to return `once`.

    Example:
        >>> batch = {
        ...     "tokens": np.array([[7, 8, 9, 0], [4, 4, 4, 0]]),
        ...     "segment_ids": np.array([[1, 1, 2, 0], [1, 1, 1, 0]]),
        ...     "ids": np.array([[2, 0], [1, -1]]),
        ... }
        >>> losses = np.array([[0.5, 0.25, 0.125, 0], [1, 2, 3, 0]])  # of each token
        >>> found = unpack_by_id(batch, values=losses)
        >>> [found[id].tolist() for id in sorted(found)]
        [[0.125], [1.0, 2.0, 3.0], [0.5, 0.25]]
        >>> unpack_by_id(batch, values=[["b", "a"], ["c", ""]], once=True)[1].item()
        'c'
    """
    caller = "unpack_by_id"
    named = _named(caller, batch)
    if "ids" not in named:
        fail(caller, "the batch has no ids", "pack with metadata=True and max_segments")
    ids = np.asarray(named["ids"])
    known = ids >= 0
    if once:
        if feature is None and values is None:
            fail(caller, "once=True of the tokens", "pass a feature or values of each sequence")
        array = np.asarray(_get(caller, named, feature or "") if values is None else values)
        if array.shape[:2] != ids.shape:
            problem = f"values are {array.shape}, ids {ids.shape}"
            fail(caller, problem, "pass arrays [B, max_segments, ...], or leave out once=True")
        each = list(array[known])
    else:
        real, offsets, array = _segments_of(caller, named, feature, values)
        each = _split(array[real], offsets)
    found = ids[known].tolist()
    if len(found) != len(each):
        problem = f"the batch has {len(each)} segments and {len(found)} ids"
        fail(caller, problem, "pass the batch as it was packed")
    by_id = dict(zip(found, each, strict=True))
    if len(by_id) != len(found):
        twice = next(id for id in found if found.count(id) > 1)
        hint = (
            "unpack one epoch at a time; or use unpack_batch for the pieces of a stream's records"
        )
        fail(caller, f"the id {twice} is in the batch twice", hint)
    return by_id


def flat_names(batch: Any, prefix: str = "") -> dict[str, Any]:
    """Return the arrays of a batch by name, nested ones as "a/b"."""
    flat: dict[str, Any] = {}
    for name, value in (batch if isinstance(batch, Mapping) else batch.asdict()).items():
        inner = isinstance(value, Mapping)
        flat |= flat_names(value, f"{prefix}{name}/") if inner else {f"{prefix}{name}": value}
    return flat


def _named(caller: str, batch: Any) -> dict[str, Any]:
    """Return the arrays of a batch by name, if it is one."""
    if not isinstance(batch, Mapping) and not hasattr(batch, "asdict"):
        problem = f"batch is a {type(batch).__name__}"
        fail(caller, problem, "pass a PackedBatch, or a dict of its arrays by name")
    return flat_names(batch)


def _get(caller: str, named: Mapping[str, Any], name: str) -> Any:
    if name not in named:
        hint = f"name one of {', '.join(named)}"
        fail(caller, f"the batch has no {name!r}", hint)
    return named[name]


def _segments_of(
    caller: str, named: Mapping[str, Any], feature: str | None, values: ArrayLike | None
) -> tuple[NDArray[np.bool_], Int64, NDArray[Any]]:
    """Return which tokens are real, where in those each segment starts, and what to unpack."""
    own = f"{feature or 'tokens'}_segment_ids"
    every = [ids for ids in named if _is_segment_ids(named, ids)]
    if own not in every and "segment_ids" not in named:
        if own not in named:
            hint = "unpack batches in the key style 'default' or 'grain'; or name the feature"
            fail(caller, f"the batch has no 'segment_ids' and no {own!r}", hint)
        every = [own]
    segment_ids = np.asarray(named[own if own in every else "segment_ids"])
    array = np.asarray(_get(caller, named, feature or "tokens") if values is None else values)
    if segment_ids.ndim != 2 or array.shape[:2] != segment_ids.shape:
        what = "values" if values is not None else feature or "tokens"
        problem = f"{what} are {array.shape}, segment_ids {segment_ids.shape}, not [B, L]"
        fail(caller, problem, "pass whole batches, or add an axis: array[None]")
    if feature is None and values is None and array.ndim != 2:
        fail(caller, f"tokens are {array.shape}, not [B, L]", "name the feature: feature='tokens'")
    levanter = {"tokens", "loss_mask", "pos_ids"} <= named.keys() and "positions" not in named
    if levanter or int(segment_ids.min(initial=0)) < 0:
        problem = "segment ids count from 0, as in the key style 'levanter'"
        fail(caller, problem, "unpack batches in the key style 'default' or 'grain'")
    real = segment_ids > 0
    if own in every:
        arrays = [np.asarray(named[name]) for name in every]
        return real, offsets_of(_counted_lengths(segment_ids, arrays)), array
    starts = np.diff(segment_ids, axis=1, prepend=0) != 0
    starts[:, :1] = True  # a row never goes on from the row before
    first = np.flatnonzero(starts[real])
    return real, np.append(first, np.count_nonzero(real)), array


def _is_segment_ids(named: Mapping[str, Any], name: str) -> bool:
    """Tell whether an array is the segment ids of one feature, and no feature called so."""
    feature = name.removesuffix("_segment_ids")
    return name != feature and feature in named and f"{feature}_positions" in named


def _counted_lengths(segment_ids: NDArray[Any], every: list[NDArray[Any]]) -> Int64:
    """Return the tokens of each segment: 0 for one that has tokens in other features only."""
    segments = np.max([ids.max(axis=1, initial=0) for ids in every], axis=0)  # [B]
    width = int(segments.max(initial=0)) + 1
    cell = np.arange(len(segments))[:, None] * width + segment_ids
    counts = np.bincount(cell.reshape(-1), minlength=len(segments) * width)
    counts = counts.reshape(len(segments), width)[:, 1:]
    lengths: Int64 = counts[np.arange(1, width) <= segments[:, None]]
    return lengths


def _split(values: NDArray[Any], offsets: Int64) -> list[NDArray[Any]]:
    return [values[start:stop] for start, stop in pairwise(offsets.tolist())]


def validate_batch(
    batch: Batch | Mapping[str, Any],
    *,
    max_segments: int | None = None,
    positions: str = "restart",
    multiple_of: int = 1,
    gaps: bool = False,
) -> None:
    """Raise `SeqpackError` unless a batch keeps the conventions of packed rows.

    For batches from elsewhere, say a pipeline of your own, before a model sees them.  Checked are
    shapes and dtypes; segment ids, which are 1, 2, ... in row order, each on one run of tokens, the
    first at the start of the row, with padding (0) behind the last only; and positions.  Tokens may
    be anything, on padding too.

    Time: O(B * L), on the host.

    Args:
        batch: a `PackedBatch` or an item of a Grain pipeline, of arrays `[B, L]`; NumPy, or JAX
            arrays, which are copied to the host.
        max_segments: the most segments that a row may have, None for no cap.
        positions: `"restart"`: they rise by 1 from 0 in every segment; `"continue"`: by 1 from any
            start, as in pieces of split sequences.  They are 0 on padding in both cases.
        multiple_of: every segment starts at a multiple of it; if it is above 1, padding may stand
            between segments.
        gaps: padding may stand before and between segments, wherever they start: what the device
            half takes, though no packer here makes it.

    Raises:
        SeqpackError: with the first wrong row and token, what is there and what should be.

    Example:
        >>> ids = np.array([[1, 1, 2, 0]], np.int32)
        >>> batch = {"tokens": ids, "segment_ids": ids, "positions": ids * 0}
        >>> try:
        ...     validate_batch(batch)
        ... except ValueError as error:
        ...     print(error)
        validate_batch: row 0, token 1: position 0, expected 1 (0 more rows are wrong). Hint: \
positions rise by 1 in a segment, from 0, and are 0 on padding; for pieces that go on say \
positions='continue'.
    """
    caller = "validate_batch"
    check_choice(caller, "positions", positions, ("restart", "continue"))
    if max_segments is not None:
        max_segments = check_int(caller, "max_segments", max_segments, 1)
    multiple_of = check_int(caller, "multiple_of", multiple_of, 1)
    segment_ids, found = _check_arrays(caller, batch)
    before = np.zeros_like(segment_ids)  # the segment of the token before
    before[:, 1:] = segment_ids[:, :-1]
    goes_on = (segment_ids == before) & (before > 0)
    # The last segment that may be followed by another: with gaps, the last of the row so far.
    may_skip = gaps or multiple_of > 1
    last = np.maximum.accumulate(before, axis=1) if may_skip else before
    may_start = (last > 0) | gaps
    may_start[:, :1] = True
    may_start[:, np.arange(segment_ids.shape[1]) % multiple_of > 0] = False
    starts = (segment_ids == last + 1) & may_start
    wrong = ~(goes_on | starts | (segment_ids == 0))
    if wrong.any():
        at = _first(wrong)
        held, following = int(before[at]), int(last[at]) + 1
        if held > 0:
            expected = f"{held}, {following} or 0" if may_start[at] else f"{held} or 0"
        else:
            expected = f"0 or {following}" if may_start[at] else "0"
        problem = f"segment id {segment_ids[at]}, expected {expected}"
        hint = (
            "segment ids are 1, 2, ... in row order, and 0 only at the end of a row; for batches "
        )
        hint += "with padding between segments say gaps=True"
        if gaps and multiple_of == 1:
            hint = "segment ids are 1, 2, ... in row order, with padding around segments only"
        if multiple_of > 1:
            hint = f"segment ids are 1, 2, ... in row order, from multiples of {multiple_of}"
        _fail_at(caller, wrong, problem, hint)
    if max_segments is not None and (wrong := segment_ids > max_segments).any():
        problem = f"segment id {segment_ids[_first(wrong)]}, expected at most {max_segments}"
        _fail_at(caller, wrong, problem, "plan with max_segments")
    _check_positions(caller, found, goes_on, starts, positions == "continue")


def _check_arrays(
    caller: str, batch: Batch | Mapping[str, Any]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the segment ids and the positions, once their form and that of the tokens is right."""
    named = _named(caller, batch)
    arrays = {}
    for name in ("tokens", "segment_ids", "positions"):
        if name not in named:
            fail(caller, f"batch has no {name}", "pass tokens, segment_ids and positions")
        arrays[name] = np.asarray(named[name])
    shape = arrays["tokens"].shape
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape != shape:
            problem = f"{name} has shape {array.shape}, tokens {shape}, expected equal [B, L]"
            fail(caller, problem, "pass whole batches, or add an axis: array[None]")
        if array.dtype != np.int32:
            fail(caller, f"{name} has dtype {array.dtype}, expected int32", "cast it to int32")
    return arrays["segment_ids"], arrays["positions"]


def _check_positions(
    caller: str,
    found: NDArray[np.int32],
    goes_on: NDArray[np.bool_],
    starts: NDArray[np.bool_],
    any_start: bool,
) -> None:
    expected = np.zeros(found.shape, np.int64)
    np.add(found[:, :-1], 1, out=expected[:, 1:], dtype=np.int64)
    expected *= goes_on
    wrong = found != expected
    if any_start:
        wrong[starts] = found[starts] < 0
    if wrong.any():
        at = _first(wrong)
        least = "at least " if any_start and starts[at] else ""
        problem = f"position {found[at]}, expected {least}{expected[at]}"
        hint = "positions rise by 1 in a segment, from 0, and are 0 on padding; for pieces that "
        _fail_at(caller, wrong, problem, hint + "go on say positions='continue'")


def _first(wrong: NDArray[np.bool_]) -> tuple[int, int]:
    row, token = divmod(int(wrong.argmax()), wrong.shape[1])
    return row, token


def _fail_at(caller: str, wrong: NDArray[np.bool_], problem: str, hint: str) -> NoReturn:
    row, token = _first(wrong)
    more = int(np.count_nonzero(wrong.any(axis=1))) - 1
    rows = "row is" if more == 1 else "rows are"
    fail(caller, f"row {row}, token {token}: {problem} ({more} more {rows} wrong)", hint)
