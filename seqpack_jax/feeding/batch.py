"""Bins and sequences -> one `PackedBatch` of fixed shape, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import part_sums
from seqpack_jax.errors import check_choice, check_int, check_integers, fail
from seqpack_jax.feeding.sequences import FlatSequences, SequenceSource, fetch_sequences
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.histogram import Int64

__all__ = ["PackedBatch", "fill_rows", "pack_batch", "unpack_batch", "validate_batch"]


class PackedBatch(NamedTuple):
    """Rows of packed sequences; a pytree, on the host (NumPy) as on the device (JAX).

    Attributes:
        tokens: int32 `[B, L]`.
        segment_ids: int32 `[B, L]`, 1, 2, ... in row order, 0 on padding.
        positions: int32 `[B, L]`, from 0 in every segment, 0 on padding; or, in pieces with
            continued positions, from where the piece starts in its sequence.
        features: whatever else was packed beside them, by name.

    Example:
        >>> from seqpack_jax import pack_sequences
        >>> bins = pack_sequences([2, 1], max_seq_len=4)
        >>> batch = pack_batch(bins, [[7, 8], [9]], 4, lengths=[2, 1])
        >>> {name: array.tolist() for name, array in batch.asdict().items()}
        {'tokens': [[7, 8, 9, 0]], 'segment_ids': [[1, 1, 2, 0]], 'positions': [[0, 1, 0, 0]]}
    """

    tokens: NDArray[np.int32]
    segment_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    features: dict[str, Any]

    def asdict(self) -> dict[str, Any]:
        """Return the arrays by name, the form that a Grain pipeline passes on.

        Raises:
            SeqpackError: a feature has the name of one of the three arrays.
        """
        named = {
            "tokens": self.tokens,
            "segment_ids": self.segment_ids,
            "positions": self.positions,
        }
        taken = [name for name in self.features if name in named]
        if taken:
            problem = f"a feature is named {taken[0]!r}, as an array of the batch"
            fail("PackedBatch.asdict", problem, "give the feature another name")
        return named | self.features


def pack_batch(
    bins: Bins,
    sequences: SequenceSource,
    max_seq_len: int,
    *,
    lengths: ArrayLike,
    rows: int | None = None,
    pad_value: int = 0,
) -> PackedBatch:
    """Fill one row per bin with the tokens of its sequences.

    The over-length policy of the bins acts on the tokens: sequences that were planned cut are cut
    here, and pieces are taken out of the sequences that they were split from.  The windows of
    `"crop"` are those of `bins.key`, other ones in each epoch.

    Time: O(rows * max_seq_len), in whole arrays, and a slice per sequence.

    Args:
        bins: which sequences share a row.
        sequences: a `FlatSequences`, or anything whose `[id]` is a 1-D array of integers.
        max_seq_len: tokens per row.
        lengths: integers `[n]`, the tokens that `sequences` really has of each sequence, whatever
            the over-length policy: the lengths given to the planner, plus its `extra_tokens`.
        rows: rows of the batch, at least `len(bins)`; the rest are empty.  None for `len(bins)`.
        pad_value: the token on padding.

    Returns:
        A `PackedBatch` of `[rows, max_seq_len]` arrays.

    Raises:
        SeqpackError: a sequence does not have the length that was planned, is not a 1-D array of
            integers, or has tokens beyond int32; or there are more bins than rows, or a bin
            overflows.

    Example:
        >>> from seqpack_jax import pack_sequences
        >>> sequences = [np.array([5, 6, 7]), np.array([8]), np.array([9, 9])]
        >>> bins = pack_sequences([3, 1, 2], max_seq_len=4)
        >>> batch = pack_batch(bins, sequences, 4, lengths=[3, 1, 2])
        >>> batch.tokens.tolist(), batch.segment_ids.tolist()
        ([[5, 6, 7, 8], [9, 9, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]])
    """
    caller = "pack_batch"
    max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1)
    if not isinstance(bins, Bins):
        fail(caller, f"bins is a {type(bins).__name__}, not Bins", "pass Bins(ids, offsets, ...)")
    rows = check_int(caller, "rows", len(bins) if rows is None else rows, len(bins))
    pad_value = check_int(caller, "pad_value", pad_value, -(2**31), 2**31 - 1)
    ids, planned = _true_lengths(caller, bins, lengths)
    arrays, first_positions = fetch_sequences(
        caller,
        sequences,
        ids,
        planned,
        bins.max_seq_len,
        over_length=bins.over_length,
        pieces=bins.pieces,
        key=bins.key,
        exact=True,
    )
    offsets = bins.offsets
    return fill_rows(caller, arrays, offsets, rows, max_seq_len, pad_value, first_positions)


def _true_lengths(caller: str, bins: Bins, lengths: ArrayLike) -> tuple[Int64, NDArray[Any]]:
    """Return the ids in bins and the true length of each, 0 for that of a piece."""
    known = check_integers(caller, "lengths", lengths)
    ids = check_integers(caller, "bins.ids", bins.ids)
    limits = f"[0, {len(known)})"
    is_piece = np.zeros(len(ids), np.bool_)
    if bins.pieces is not None:
        first, number = bins.pieces.first_id, len(bins.pieces.table)
        is_piece = (ids >= first) & (ids < first + number)
        limits += f", or in [{first}, {first + number}) for pieces"
    wrong = ~is_piece & ((ids < 0) | (ids >= len(known)))
    if wrong.any():
        at = int(wrong.argmax())
        problem = f"bins.ids[{at}] = {ids[at]}, but ids are in {limits}"
        fail(caller, problem, "pass the lengths of all sequences that were planned")
    planned = np.zeros(len(ids), np.int64)
    planned[~is_piece] = known[ids[~is_piece]]
    return ids, planned


def fill_rows(
    caller: str,
    arrays: Sequence[NDArray[Any]],
    offsets: Int64,
    rows: int,
    max_seq_len: int,
    pad_value: int,
    first_positions: Int64 | None = None,
) -> PackedBatch:
    """Lay out `arrays`, cut into bins by `offsets`, as `rows` rows; the last may be empty.

    Positions in `arrays[k]` start at `first_positions[k]`, at 0 without them.
    """
    bins = len(offsets) - 1
    lengths = np.array([len(array) for array in arrays], np.int64)
    room = np.full(rows, max_seq_len)
    room[:bins] -= part_sums(lengths, offsets)
    if bins and int(room.min()) < 0:
        row = int(room.argmin())
        fill = max_seq_len - int(room[row])
        fail(caller, f"bin {row} holds {fill} tokens of {max_seq_len}", "pack the sequences again")
    # A row is a list of runs: its segments, then its padding.
    ends = np.concatenate([offsets[1:], np.full(rows - bins, len(arrays))])
    segment = np.arange(len(arrays)) - np.repeat(offsets[:-1], np.diff(offsets)) + 1
    run_ids = np.insert(segment, ends, 0).astype(np.int32)
    run_lengths = np.insert(lengths, ends, room)
    run_starts = np.cumsum(run_lengths) - run_lengths
    if first_positions is not None:
        run_starts -= np.insert(first_positions, ends, 0)
    segment_ids = np.repeat(run_ids, run_lengths).reshape(rows, max_seq_len)
    positions = np.arange(rows * max_seq_len, dtype=np.int32)
    positions -= np.repeat(run_starts.astype(np.int32), run_lengths)
    positions *= segment_ids.reshape(-1) > 0
    padding = np.full(max_seq_len, pad_value, np.int32)
    runs: list[NDArray[Any]] = []
    for (begin, end), free in zip(pairwise([0, *ends.tolist()]), room.tolist(), strict=True):
        runs += arrays[begin:end]
        runs.append(padding[:free])
    for k, run in enumerate(runs):  # uint64 and signed integers have no common integer dtype
        if run.dtype.kind == "u" and run.dtype.itemsize == 8:
            runs[k] = _as_int32(caller, run)
    tokens = _as_int32(caller, np.concatenate(runs) if runs else padding[:0])
    shape = (rows, max_seq_len)
    return PackedBatch(tokens.reshape(shape), segment_ids, positions.reshape(shape), {})


def _as_int32(caller: str, tokens: NDArray[Any]) -> NDArray[np.int32]:
    if tokens.dtype == np.int32:
        return tokens
    limits = np.iinfo(np.int32)
    for value in (int(tokens.min(initial=0)), int(tokens.max(initial=0))):
        if not limits.min <= value <= limits.max:
            problem = f"a batch holds the token {value}, beyond int32"
            fail(caller, problem, "tokens must fit into int32")
    return tokens.astype(np.int32)


def unpack_batch(batch: PackedBatch | Mapping[str, Any]) -> FlatSequences:
    """Return the segments of a batch, row after row: the inverse of `pack_batch`.

    Time: O(B * L).

    Args:
        batch: a `PackedBatch` or an item of a Grain pipeline, of arrays `[B, L]`; NumPy, or JAX
            arrays, which are copied to the host.

    Returns:
        A `FlatSequences`; its sequence `k` is the one whose id is `bins.ids[k]`.

    Raises:
        SeqpackError: the arrays are not `[B, L]`.

    Example:
        >>> ids = np.array([[1, 1, 2, 0]], np.int32)
        >>> batch = PackedBatch(np.array([[7, 8, 9, 0]], np.int32), ids, ids, {})
        >>> [tokens.tolist() for tokens in unpack_batch(batch)]
        [[7, 8], [9]]
    """
    named = batch if isinstance(batch, Mapping) else batch.asdict()
    segment_ids, tokens = np.asarray(named["segment_ids"]), np.asarray(named["tokens"])
    if segment_ids.ndim != 2 or tokens.shape != segment_ids.shape:
        problem = f"tokens are {tokens.shape}, segment_ids {segment_ids.shape}, not [B, L]"
        fail("unpack_batch", problem, "pass whole batches, or add an axis: array[None]")
    starts = np.diff(segment_ids, axis=1, prepend=0) != 0
    starts[:, :1] = True  # a row never goes on from the row before
    real = segment_ids > 0
    first = np.flatnonzero(starts[real])
    return FlatSequences(tokens[real], np.append(first, np.count_nonzero(real)))


def validate_batch(
    batch: PackedBatch | Mapping[str, Any],
    *,
    max_segments: int | None = None,
    positions: str = "restart",
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

    Raises:
        SeqpackError: with the first wrong row and token, what is there and what should be.

    Example:
        >>> ids = np.array([[1, 1, 2, 0]], np.int32)
        >>> validate_batch(PackedBatch(ids, ids, np.array([[0, 1, 0, 0]], np.int32), {}))
        >>> try:
        ...     validate_batch(PackedBatch(ids, ids, np.array([[0, 1, 2, 0]], np.int32), {}))
        ... except ValueError as error:
        ...     print(error)
        validate_batch: row 0, token 2: position 2, expected 0 (0 more rows are wrong). Hint: \
positions rise by 1 in a segment, from 0, and are 0 on padding; for pieces that go on say \
positions='continue'.
    """
    caller = "validate_batch"
    check_choice(caller, "positions", positions, ("restart", "continue"))
    if max_segments is not None:
        max_segments = check_int(caller, "max_segments", max_segments, 1)
    segment_ids, found = _check_arrays(caller, batch)
    before = np.zeros_like(segment_ids)  # the segment of the token before
    before[:, 1:] = segment_ids[:, :-1]
    goes_on = (segment_ids == before) & (before > 0)
    starts = (segment_ids == before + 1) & (before > 0)
    starts[:, :1] = segment_ids[:, :1] == 1
    wrong = ~(goes_on | starts | (segment_ids == 0))
    if wrong.any():
        row, token = _first(wrong)
        last = int(before[row, token])
        expected = f"{last}, {last + 1} or 0" if last else "0" if token else "0 or 1"
        problem = f"segment id {segment_ids[row, token]}, expected {expected}"
        hint = "segment ids are 1, 2, ... in row order, and 0 only at the end of a row"
        _fail_at(caller, wrong, problem, hint)
    if max_segments is not None and (wrong := segment_ids > max_segments).any():
        problem = f"segment id {segment_ids[_first(wrong)]}, expected at most {max_segments}"
        _fail_at(caller, wrong, problem, "plan with max_segments")
    _check_positions(caller, found, goes_on, starts, positions == "continue")


def _check_arrays(
    caller: str, batch: PackedBatch | Mapping[str, Any]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the segment ids and the positions, once their form and that of the tokens is right."""
    if not isinstance(batch, PackedBatch | Mapping):
        problem = f"batch is a {type(batch).__name__}"
        fail(caller, problem, "pass a PackedBatch, or a dict of its arrays by name")
    named = batch if isinstance(batch, Mapping) else batch.asdict()
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
