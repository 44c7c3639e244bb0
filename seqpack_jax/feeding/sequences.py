"""Where tokens come from: reading sequences, and the over-length policy on what was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import from_portable, to_portable
from seqpack_jax.errors import check_int, check_integers, fail
from seqpack_jax.feeding.features import Features
from seqpack_jax.feeding.reading import NO_ENDS, Ends, read_records
from seqpack_jax.permutation import seed_from_components
from seqpack_jax.planning.histogram import Int64, coarsen_lengths
from seqpack_jax.planning.over_length import OverLength, Pieces, window_starts

__all__ = [
    "Fetched",
    "FlatSequences",
    "SequenceSource",
    "Transform",
    "fetch_records",
    "like_others",
]

_CUTTING = ("truncate", "truncate_left", "crop")  # policies that keep a window of a sequence
Transform = Callable[[Any, np.random.Generator], Any]
"""`transform(record, rng) -> record`."""

_NO_ROWS = np.zeros((0, 4), np.int64)
_KIND = attrgetter("ndim", "dtype")
_TRANSFORM = 0x7472616E  # keeps the generators of an epoch apart from its pairings


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

    def __getitems__(self, indices: ArrayLike) -> list[NDArray[Any]]:
        """Return the tokens of several sequences: views."""
        index = np.asarray(indices, np.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            wrong = index[(index < 0) | (index >= len(self))][0]
            raise IndexError(f"sequence {wrong} of {len(self)}")
        tokens = np.asarray(self.tokens)  # slices of a memmap object are slow to make
        starts, stops = self.offsets[index], self.offsets[index + 1]
        return [tokens[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": to_portable(self.tokens), "offsets": to_portable(self.offsets)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, from_portable(value))


class Fetched(NamedTuple):
    """Records as they go into rows.

    Attributes:
        columns: of each feature, the arrays of all segments.
        first_positions: int64 `[k]`, the position that each segment starts with; None for 0.
        ids: int64 `[k]`, of the sequence that each segment is, or was cut from.
    """

    columns: dict[str, list[NDArray[Any]]]
    first_positions: Int64 | None
    ids: Int64


def fetch_records(
    caller: str,
    sequences: Any,
    ids: Int64,
    planned: NDArray[Any],
    features: Features,
    *,
    over_length: OverLength,
    pieces: Pieces | None,
    key: int | None,
    tolerance: int = 1,
    exact: bool = False,
    transform: Transform | None = None,
    ends: Ends = NO_ENDS,
    threads: int = 1,
) -> Fetched:
    """Return what the policy keeps of the records of `ids`, if they are those that were planned.

    Each record is read once, transformed, and gets its BOS and EOS; then it must have the tokens
    that were planned, or with a tolerance be of the bucket that was planned.  Under a policy that
    cuts, one that was planned at its capacity may have more, and a window of it is kept.  The
    record of a piece must have the tokens that it was split with.

    Time: O(k) and a read per sequence, in whole arrays otherwise; O(k log k) for other sources than
    `FlatSequences`, or with pieces.

    Args:
        caller: the public function that an error shall name.
        sequences: where the records are.
        ids: int64 `[k]`, of whole sequences and of pieces, any integers; not below 0 for a list,
            tuple or array, which would count from its end.
        planned: integers `[k]`, or `[k, c]` for `c` capacities: what each of `ids` was planned as,
            in tokens; not read where an id is that of a piece.
        features: what the records hold, and the capacities of the plan.
        over_length: the policy of the plan.
        pieces: what the ids of pieces mean.
        key: that of the epoch (see `window_starts`).
        tolerance: that of the plan.
        exact: `planned` are true lengths, before any policy; a sequence must have just that many
            tokens.
        transform: gets a copy of each record, and a generator of `(key, id)` alone.
        ends: what goes around each sequence.
        threads: see `read_records`.

    Raises:
        SeqpackError: a sequence differs from its plan, is missing or no record of `features`.
    """
    source, want = ids, np.asarray(planned, np.int64)
    want = want[:, None] if want.ndim == 1 else want
    own, table = ids[:0], _NO_ROWS  # which of `ids` are pieces, and their rows in the table
    if pieces is not None:
        own = np.flatnonzero(ids >= pieces.first_id)
        table = pieces.table[ids[own] - pieces.first_id]
        source, want = ids.copy(), want.copy()
        source[own], want[own, 0] = table[:, 0], table[:, 3]
    flat = isinstance(sequences, FlatSequences)
    if not own.size and (flat or isinstance(sequences, list | tuple | np.ndarray)):
        records = _read(caller, sequences, source, threads)
        records = _prepare(caller, features, records, source, transform, ends, key, flat)
    else:
        distinct, places = np.unique(source, return_inverse=True)
        read = _read(caller, sequences, distinct, threads)
        read = _prepare(caller, features, read, distinct, transform, ends, key, flat)
        records = [read[k] for k in places.tolist()]
    have = _lengths_of(features, records)
    limits = np.array(list(features.capacities.values()), np.int64)
    expected = have
    if over_length.action in _CUTTING and not exact:
        expected = np.minimum(have, limits)
    if not exact:
        expected = _as_planned(features, expected, tolerance, own)
    wrong = expected != want
    if wrong.any():
        _fail_at_length(caller, features, source, have, want, wrong, ends)
    if over_length.action in _CUTTING:
        over = np.flatnonzero((have > limits).any(axis=1))
        starts = [
            window_starts(over_length, have[over, c], limit, ids[over], key)
            for c, limit in enumerate(limits.tolist())
        ]
        for k, first in zip(over.tolist(), np.stack(starts, 1).tolist(), strict=True):
            stop = (np.array(first) + np.minimum(have[k], limits)).tolist()
            records[k] = _window(features, records[k], first, stop)
    for k, (start, stop) in zip(own.tolist(), table[:, 1:3].tolist(), strict=True):
        records[k] = _window(features, records[k], [start], [stop])
    first_positions = None
    if own.size and over_length.positions == "continue":
        first_positions = np.zeros(len(ids), np.int64)
        first_positions[own] = table[:, 1]
    return Fetched(_columns(caller, features, records, source), first_positions, source)


def like_others(
    features: Features,
    columns: Mapping[str, Sequence[NDArray[Any]]],
    sample: Callable[[int], Fetched],
) -> dict[str, NDArray[Any]]:
    """Return what a batch takes dtypes and shapes from, where it has no tokens of a capacity.

    So all batches are alike: nothing, such as `np.array([])`, has no dtype and shape of its own.

    Args:
        features: those of the records.
        columns: of each feature, the arrays of all segments in the batch.
        sample: reads a record that has tokens of the capacity of this number.

    Returns:
        Features of records, as `Features.pack` takes them; none if the batch has tokens of all.
    """
    like: dict[str, NDArray[Any]] = {}
    for number, name in enumerate(features.names):
        if not any(map(len, columns[name])):
            found = {key: column[0] for key, column in sample(number).columns.items()}
            like = found | like | {name: found[name]}
    return like


def _read(caller: str, sequences: Any, ids: Int64, threads: int) -> list[Any]:
    if isinstance(sequences, FlatSequences):
        with suppress(IndexError):  # below, the error gets a name
            return sequences.__getitems__(ids)
    return read_records(caller, sequences, ids, threads)


def _prepare(
    caller: str,
    features: Features,
    records: list[Any],
    ids: Int64,
    transform: Transform | None,
    ends: Ends,
    key: int | None,
    flat: bool,
) -> list[Any]:
    """Transform and check records: arrays if all are bare arrays, else dicts of arrays."""
    names = ids.tolist()
    if transform is not None:
        records = [
            _transformed(caller, transform, record, index, key)
            for record, index in zip(records, names, strict=True)
        ]
    types = set(map(type, records))
    bare = features.tokens_only and all(issubclass(each, np.ndarray) for each in types)
    bare = bare and np.ma.MaskedArray not in types
    known = flat and transform is None
    kinds = set(map(_KIND, records)) if bare and not known else set()
    if not bare or any(ndim != 1 or dtype.kind not in "iu" for ndim, dtype in kinds):
        pairs = zip(records, names, strict=True)  # `read` refuses arrays that are no tokens
        records = [features.read(caller, f"sequence {index}", record) for record, index in pairs]
    if ends != NO_ENDS:
        lead = features.names[0]
        records = [
            ends.around(caller, features, {lead: record})[lead]
            if bare
            else ends.around(caller, features, record)
            for record in records
        ]
    return records


def _transformed(
    caller: str, transform: Transform, record: Any, index: int, key: int | None
) -> Any:
    record = np.array(record) if isinstance(record, list) else _own(record)
    seed = seed_from_components(_TRANSFORM, 0 if key is None else key, index)
    try:
        return transform(record, np.random.Generator(np.random.PCG64(seed)))
    except Exception as error:
        error.add_note(f"{caller}: while sequence {index} was transformed")
        raise


def _own(record: Any) -> Any:
    """Copy the arrays of a record, so that a transform may write to it, not to the source."""
    if isinstance(record, np.ndarray | list):
        return record.copy()
    if isinstance(record, dict):
        copied = record.copy()
        copied.update((name, _own(value)) for name, value in record.items())
        return copied
    if isinstance(record, tuple):
        values = map(_own, record)
        return type(record)(*values) if hasattr(record, "_fields") else tuple(values)
    return record


def _lengths_of(features: Features, records: list[Any]) -> Int64:
    """Return the tokens of each record in each capacity: int64 `[k, c]`."""
    if not records:
        return np.zeros((0, len(features.names)), np.int64)
    if isinstance(records[0], dict):
        return np.array([features.lengths(record) for record in records], np.int64)
    return np.fromiter(map(len, records), np.int64, len(records))[:, None]


def _window(features: Features, record: Any, starts: list[int], stops: list[int]) -> Any:
    if isinstance(record, dict):
        return features.window(record, starts, stops)
    return record[starts[0] : stops[0]]


def _columns(
    caller: str, features: Features, records: list[Any], ids: Int64
) -> dict[str, list[NDArray[Any]]]:
    if records and isinstance(records[0], dict):
        return features.columns(caller, records, lambda k: f"sequence {ids[k]}")
    return dict.fromkeys(features.names, records)


def _as_planned(features: Features, lengths: Int64, tolerance: int, own: Int64) -> Int64:
    """Return how lengths `[k, c]` were planned; those of pieces, at `own`, as they are."""
    if not features.single:
        return np.asarray(features.planned(lengths))
    if tolerance == 1:
        return lengths
    (max_seq_len,) = features.capacities.values()
    as_is = lengths > max_seq_len
    as_is[own] = True
    return np.where(as_is, lengths, coarsen_lengths(lengths, tolerance, max_seq_len))


def _fail_at_length(
    caller: str,
    features: Features,
    ids: Int64,
    have: Int64,
    want: Int64,
    wrong: NDArray[np.bool_],
    ends: Ends,
) -> NoReturn:
    k, c = map(int, np.argwhere(wrong)[0])
    of = "" if features.single else f" of {features.names[c]!r}"
    hint = "plan the lengths of the tokens as they are fed, special tokens such as BOS and EOS "
    extra = ends.extra(features)[c]
    if extra:
        hint = f"bos_id and eos_id add {extra}: plan with extra_tokens={extra}; "
    fail(
        caller,
        f"sequence {ids[k]} has {have[k, c]} tokens{of}, but {want[k, c]} were planned "
        f"({np.count_nonzero(wrong.any(axis=1))} of {len(have)} sequences here differ)",
        f"{hint}included" if not extra else f"{hint}a transform must keep the planned length",
    )
