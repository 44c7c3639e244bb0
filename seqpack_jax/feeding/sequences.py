"""Where tokens come from: reading sequences, and the over-length policy on what was read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import from_portable, to_portable
from seqpack_jax.errors import check_int, check_integers, fail
from seqpack_jax.planning.histogram import Int64, coarsen_lengths
from seqpack_jax.planning.over_length import OverLength, Pieces, window_starts

__all__ = [
    "CUTTING",
    "Fetched",
    "FlatSequences",
    "SequenceSource",
    "cut_windows",
    "fetch_sequences",
]

CUTTING = ("truncate", "truncate_left", "crop")  # policies that keep a window of a sequence
_NO_ROWS = np.zeros((0, 4), np.int64)


class SequenceSource(Protocol):
    """Anything that returns the tokens of sequence `id`, a 1-D array of integers."""

    def __getitem__(self, index: int, /) -> ArrayLike: ...


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


class Fetched(NamedTuple):
    """Tokens as they go into rows.

    Attributes:
        arrays: the tokens of each segment, a 1-D array of integers.
        first_positions: int64 `[k]`, the position that each segment starts with; None for 0.
    """

    arrays: list[NDArray[Any]]
    first_positions: Int64 | None


def fetch_sequences(
    caller: str,
    sequences: SequenceSource,
    ids: Int64,
    planned: NDArray[Any],
    max_seq_len: int,
    *,
    over_length: OverLength,
    pieces: Pieces | None,
    key: int | None,
    tolerance: int = 1,
    exact: bool = False,
) -> Fetched:
    """Return the tokens of `ids` that the policy keeps, once it is sure that the plan knew them.

    A sequence must have the tokens that were planned, or with a tolerance be of the bucket that was
    planned.  Under a policy that cuts, one that was planned at `max_seq_len` may have more, and a
    window of it is kept.  The sequence of a piece must have the tokens that it was split with; of
    several pieces, it is read once.

    Time: O(k) and a read per sequence, in whole arrays otherwise; O(k log k) with pieces.

    Args:
        caller: the public function that an error shall name.
        sequences: where the tokens are.
        ids: int64 `[k]`, of whole sequences and of pieces, any integers; not below 0 for a list,
            tuple or array, which would count from its end.
        planned: integers `[k]`, what each of `ids` was planned as, in tokens; not read where an id
            is that of a piece.
        max_seq_len: tokens per row of the plan.
        over_length: the policy of the plan.
        pieces: what the ids of pieces mean.
        key: that of the epoch (see `window_starts`).
        tolerance: that of the plan.
        exact: `planned` are true lengths, before any policy; a sequence must have just that many
            tokens.

    Raises:
        SeqpackError: a sequence differs from its plan, is missing or no 1-D array of integers.
    """
    source, want = ids, np.asarray(planned, np.int64)
    own, table = ids[:0], _NO_ROWS  # which of `ids` are pieces, and their rows in the table
    if pieces is not None:
        own = np.flatnonzero(ids >= pieces.first_id)
        table = pieces.table[ids[own] - pieces.first_id]
        source, want = ids.copy(), want.copy()
        source[own], want[own] = table[:, 0], table[:, 3]
    if own.size:
        distinct, places = np.unique(source, return_inverse=True)
        read = _read(caller, sequences, distinct)
        arrays = [read[k] for k in places.tolist()]
    else:
        arrays = _read(caller, sequences, source)
    have = np.array([len(array) for array in arrays], np.int64)
    expected = have
    if over_length.action in CUTTING and not exact:
        expected = np.minimum(have, max_seq_len)
    if tolerance > 1:
        as_is = expected > max_seq_len
        as_is[own] = True
        expected = np.where(as_is, expected, coarsen_lengths(expected, tolerance, max_seq_len))
    _check_planned(caller, source, have, want, expected)
    if over_length.action in CUTTING:
        cut_windows(over_length, arrays, have, max_seq_len, ids, key)
    for k, (start, stop) in zip(own.tolist(), table[:, 1:3].tolist(), strict=True):
        arrays[k] = arrays[k][start:stop]
    if not own.size or over_length.positions != "continue":
        return Fetched(arrays, None)
    first_positions = np.zeros(len(ids), np.int64)
    first_positions[own] = table[:, 1]
    return Fetched(arrays, first_positions)


def _check_planned(caller: str, source: Int64, have: Int64, want: Int64, expected: Int64) -> None:
    wrong = expected != want
    if wrong.any():
        k = int(wrong.argmax())
        fail(
            caller,
            f"sequence {source[k]} has {have[k]} tokens, but {want[k]} were planned "
            f"({np.count_nonzero(wrong)} of {len(have)} sequences here differ)",
            "plan the lengths of the tokens as they are fed, special tokens such as BOS and EOS "
            "included",
        )


def cut_windows(
    over_length: OverLength,
    arrays: list[NDArray[Any]],
    lengths: Int64,
    max_seq_len: int,
    ids: Int64,
    key: int | None,
) -> None:
    """Replace arrays of more than `max_seq_len` tokens by the window of them that is kept."""
    over = np.flatnonzero(lengths > max_seq_len)
    if over.size:
        starts = window_starts(over_length, lengths[over], max_seq_len, ids[over], key)
        for k, start in zip(over.tolist(), starts.tolist(), strict=True):
            arrays[k] = arrays[k][start : start + max_seq_len]


def _read(caller: str, sequences: SequenceSource, ids: Int64) -> list[NDArray[Any]]:
    if isinstance(sequences, FlatSequences):
        tokens = np.asarray(sequences.tokens)  # slices of a memmap object are slow to make
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(sequences):
            at = int(((ids < 0) | (ids >= len(sequences))).argmax())
            problem = f"sequence {ids[at]} is missing: an id is not in [0, {len(sequences)})"
            fail(caller, problem, "pass the sequences planned")
        starts, stops = sequences.offsets[ids].tolist(), sequences.offsets[ids + 1].tolist()
        return [tokens[start:stop] for start, stop in zip(starts, stops, strict=True)]
    if isinstance(sequences, Sequence | np.ndarray) and len(ids) and int(ids.min()) < 0:
        problem = f"sequence {ids[ids < 0][0]} is missing: an id is at least 0"
        fail(caller, problem, "pass the sequences planned")
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
