"""Bins and sequences -> one `PackedBatch` of fixed shape, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import from_portable, part_sums, to_portable
from seqpack_jax.errors import check_int, check_integers, fail
from seqpack_jax.planning.histogram import Int64, Pieces, coarsen_lengths
from seqpack_jax.planning.plan import Bins

__all__ = [
    "FlatSequences",
    "PackedBatch",
    "SequenceSource",
    "fetch_sequences",
    "fill_rows",
    "pack_batch",
    "unpack_batch",
]


class SequenceSource(Protocol):
    """Anything that returns the tokens of sequence `id`, a 1-D array of integers."""

    def __getitem__(self, index: int, /) -> ArrayLike: ...


class PackedBatch(NamedTuple):
    """Rows of packed sequences; a pytree, on the host (NumPy) as on the device (JAX).

    Attributes:
        tokens: int32 `[B, L]`.
        segment_ids: int32 `[B, L]`, 1, 2, ... in row order, 0 on padding.
        positions: int32 `[B, L]`, from 0 in every segment, 0 on padding.
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
        """Return the arrays by name, the form that a Grain pipeline passes on."""
        named = {
            "tokens": self.tokens,
            "segment_ids": self.segment_ids,
            "positions": self.positions,
        }
        return named | self.features


@dataclass(frozen=True, eq=False)
class FlatSequences:
    """Sequences in one flat token array, which may be memory-mapped.

    Attributes:
        tokens: integers `[t]`, all sequences one after another.
        offsets: integers `[n + 1]`, rising from 0 to `t`; sequence `i` is
            `tokens[offsets[i]:offsets[i + 1]]`.

    Example:
        >>> sequences = FlatSequences(np.array([7, 8, 9, 4, 5]), np.array([0, 3, 5]))
        >>> len(sequences), sequences[1].tolist(), sequences.lengths.tolist()
        (2, [4, 5], [3, 2])
    """

    tokens: NDArray[Any]
    offsets: NDArray[Any]

    def __post_init__(self) -> None:
        caller = "FlatSequences"
        tokens = check_integers(caller, "tokens", self.tokens)
        offsets = check_integers(caller, "offsets", self.offsets)
        if len(offsets) == 0 or offsets[0] != 0 or int(offsets[-1]) != len(tokens):
            ends = f"run from {offsets[0]} to {offsets[-1]}" if len(offsets) else "are empty"
            fail(
                caller,
                f"offsets {ends}, but there are {len(tokens)} tokens",
                "pass n + 1 rising offsets, the first 0 and the last the number of tokens",
            )
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "offsets", offsets)

    @property
    def lengths(self) -> Int64:
        """int64 `[n]`: tokens of each sequence.  Time: O(n)."""
        offsets: Int64 = self.offsets.astype(np.int64, copy=False)
        return offsets[1:] - offsets[:-1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the tokens of one sequence: a view."""
        index = check_int("FlatSequences", "index", index)
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": to_portable(self.tokens), "offsets": to_portable(self.offsets)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, from_portable(value))


def pack_batch(
    bins: Bins,
    sequences: SequenceSource,
    max_seq_len: int,
    *,
    lengths: ArrayLike,
    pieces: Pieces | None = None,
    rows: int | None = None,
    pad_value: int = 0,
) -> PackedBatch:
    """Fill one row per bin with the tokens of its sequences.

    Time: O(rows * max_seq_len), in whole arrays, and a slice per sequence.

    Args:
        bins: which sequences share a row.
        sequences: a `FlatSequences`, or anything whose `[id]` is a 1-D array of integers.
        max_seq_len: tokens per row.
        lengths: integers `[n]`, the length that was planned for each sequence, in tokens.
        pieces: what the ids of split sequences mean (`pools.pieces`).
        rows: rows of the batch, at least `len(bins)`; the rest are empty.  None for `len(bins)`.
        pad_value: the token on padding.

    Returns:
        A `PackedBatch` of `[rows, max_seq_len]` arrays.

    Raises:
        SeqpackError: a sequence does not have its planned length, is not a 1-D array of integers,
            or has tokens beyond int32; or there are more bins than rows, or a bin overflows.

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
    planned = check_integers(caller, "lengths", lengths)
    ids, known = check_integers(caller, "bins.ids", bins.ids), len(planned)
    if pieces is not None:
        if known != pieces.num_sequences:
            problem = f"there are {known} lengths, but {pieces.num_sequences} sequences were split"
            fail(caller, problem, "pass the lengths that were planned")
        planned = np.concatenate([planned, pieces.stop - pieces.start])
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(planned):
        at = int(((ids < 0) | (ids >= len(planned))).argmax())
        problem = f"bins.ids[{at}] = {ids[at]}, but ids are in [0, {len(planned)})"
        fail(caller, problem, "pass the lengths that were planned")
    arrays = fetch_sequences(
        caller, sequences, ids, planned[ids], pieces=pieces, max_seq_len=max_seq_len
    )
    return fill_rows(caller, arrays, bins.offsets, rows, max_seq_len, pad_value)


def fetch_sequences(
    caller: str,
    sequences: SequenceSource,
    ids: Int64,
    planned: NDArray[Any],
    *,
    pieces: Pieces | None,
    max_seq_len: int,
    tolerance: int = 1,
) -> list[NDArray[Any]]:
    """Return the tokens of `ids`, once it is sure that they have the lengths that were planned.

    `planned[k]` is the planned length of `ids[k]`; it is not read where `ids[k]` is a piece.
    """
    source, start, stop = ids, np.zeros_like(ids), np.asarray(planned, np.int64).copy()
    want = stop  # the planned length of the whole source sequence
    is_piece = np.zeros(len(ids), bool)
    if pieces is not None:
        is_piece = ids >= pieces.num_sequences
        piece = ids[is_piece] - pieces.num_sequences
        source, want = ids.copy(), stop.copy()
        source[is_piece] = pieces.source_id[piece]
        start[is_piece], stop[is_piece] = pieces.start[piece], pieces.stop[piece]
        last = np.searchsorted(pieces.source_id, source[is_piece], side="right") - 1
        want[is_piece] = pieces.stop[last]
    arrays = _read(caller, sequences, source)
    have = np.array([len(array) for array in arrays], np.int64)
    expected = have
    if tolerance > 1:
        as_is = is_piece | (have > max_seq_len)
        expected = np.where(as_is, have, coarsen_lengths(have, tolerance, max_seq_len))
    wrong = expected != want
    if wrong.any():
        k = int(wrong.argmax())
        fail(
            caller,
            f"sequence {source[k]} has {have[k]} tokens, but {want[k]} were planned "
            f"({np.count_nonzero(wrong)} of {len(ids)} sequences here differ)",
            "plan the lengths of the tokens as they are fed, special tokens such as BOS and EOS "
            "included",
        )
    for k in np.flatnonzero(is_piece).tolist():
        arrays[k] = arrays[k][start[k] : stop[k]]
    return arrays


def _read(caller: str, sequences: SequenceSource, ids: Int64) -> list[NDArray[Any]]:
    if isinstance(sequences, FlatSequences):
        tokens = np.asarray(sequences.tokens)  # slices of a memmap object are slow to make
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(sequences):
            fail(caller, f"an id is not in [0, {len(sequences)})", "pass the sequences planned")
        starts, stops = sequences.offsets[ids].tolist(), sequences.offsets[ids + 1].tolist()
        return [tokens[start:stop] for start, stop in zip(starts, stops, strict=True)]
    arrays = []
    for index in ids.tolist():
        try:
            arrays.append(np.asarray(sequences[index]))
        except (IndexError, KeyError) as error:
            fail(caller, f"sequence {index} is missing ({error!r})", "pass the sequences planned")
        except ValueError as error:
            fail(caller, f"sequence {index} is no array ({error})", "return 1-D arrays of integers")
    for array, index in zip(arrays, ids.tolist(), strict=True):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            fail(
                caller,
                f"sequence {index} has shape {array.shape} and dtype {array.dtype}",
                "sequences[id] must return a 1-D array of integers",
            )
    return arrays


def fill_rows(
    caller: str,
    arrays: Sequence[NDArray[Any]],
    offsets: Int64,
    rows: int,
    max_seq_len: int,
    pad_value: int,
) -> PackedBatch:
    """Lay out `arrays`, cut into bins by `offsets`, as `rows` rows; the last may be empty."""
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
    run_starts = (np.cumsum(run_lengths) - run_lengths).astype(np.int32)
    segment_ids = np.repeat(run_ids, run_lengths).reshape(rows, max_seq_len)
    positions = np.arange(rows * max_seq_len, dtype=np.int32)
    positions -= np.repeat(run_starts, run_lengths)
    positions *= segment_ids.reshape(-1) > 0
    padding = np.full(max_seq_len, pad_value, np.int32)
    runs: list[NDArray[Any]] = []
    for (begin, end), free in zip(pairwise([0, *ends.tolist()]), room.tolist(), strict=True):
        runs += arrays[begin:end]
        runs.append(padding[:free])
    tokens = _as_int32(caller, np.concatenate(runs) if runs else padding[:0])
    shape = (rows, max_seq_len)
    return PackedBatch(tokens.reshape(shape), segment_ids, positions.reshape(shape), {})


def _as_int32(caller: str, tokens: NDArray[Any]) -> NDArray[np.int32]:
    if tokens.dtype == np.int32:
        return tokens
    hint = "tokens must fit into int32"
    if tokens.dtype.kind not in "iu":
        problem = f"the tokens of a batch have the common dtype {tokens.dtype}"
        fail(caller, problem, "uint64 and signed integers have no common dtype: use int64")
    limits = np.iinfo(np.int32)
    for value in (int(tokens.min()), int(tokens.max())):
        if not limits.min <= value <= limits.max:
            fail(caller, f"a batch holds the token {value}, beyond int32", hint)
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
