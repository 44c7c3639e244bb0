"""Packing a stream whose lengths are not known beforehand.

A *group* of rows takes a *prefix* of the stream: the longest that best fit decreasing places in its
rows.  So no record waits for a later group, none moves further than the records of its group reach,
and where the stream stands says all there is to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, NoReturn
from zlib import crc32

import numpy as np

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import fail
from seqpack_jax.feeding.features import Features
from seqpack_jax.feeding.layout import as_numbers, round_up
from seqpack_jax.feeding.prefixes import longest_prefix, longest_vector_prefix
from seqpack_jax.permutation import seed_from_components
from seqpack_jax.planning.over_length import (
    OverLength,
    OverLengthReport,
    apply_to_lengths,
    window_starts,
)

__all__ = ["Group", "StreamPacker", "StreamSettings", "check_policy"]

_SHUFFLE = 0x726F7773  # keeps the order of rows apart from other uses of a seed
_Window = tuple[tuple[int, ...], tuple[int, ...]]  # starts and stops, of each capacity


@dataclass(frozen=True)
class StreamSettings:
    """All that decides what a packer makes of a stream; its repr is stable.

    Attributes:
        caller: the public name, for errors and the log.
        features: what is packed of a record, and how.
        rows: rows of a group.
        batch_size: rows of a batch, None for single rows.
        over_length: the policy for records that are over a capacity.
        seed: selects the windows of `"crop"` and the order of rows.
        shuffle: whether the rows of a group are shuffled.
        max_segments: the most segments in a row, None for no cap.
        multiples: of each capacity, what every segment starts at a multiple of; None for 1.
        group_by: rows are ordered by the mean of the distinct values of this feature in them.
    """

    caller: str
    features: Features
    rows: int
    batch_size: int | None
    over_length: OverLength
    seed: int
    shuffle: bool
    max_segments: int | None
    multiples: tuple[int, ...] | None = None
    group_by: str | None = None


def check_policy(caller: str, policy: OverLength, capacities: Mapping[str, int]) -> None:
    """Raise unless an over-length policy suits features of these capacities."""
    if len(capacities) == 1:
        policy.check(caller, *capacities.values())
    elif policy.action in ("crop", "split"):
        problem = f"over_length is {policy.action!r}, but {len(capacities)} features have their own"
        hint = "choose one of error, drop, truncate, truncate_left, which act on each by itself"
        fail(caller, f"{problem} lengths", hint)


class Group(NamedTuple):
    """The rows of one prefix of the stream.

    Attributes:
        records: of each segment, in the order of the stream.
        ids: of each segment, the index of its record.
        firsts: of each segment, where it starts in its record, if positions go on from there.
        rows: the indices of the segments of each row.
    """

    records: list[dict[str, Any]]
    ids: list[int]
    firsts: list[int] | None
    rows: list[list[int]]

    def fill(self, settings: StreamSettings, start: int, stop: int, rows: int) -> dict[str, Any]:
        """Return rows `[start, stop)` as a batch of `rows` rows, the last of them empty."""
        features, caller = settings.features, settings.caller
        held = self.rows[start:stop]
        order = [index for row in held for index in row]
        ids = firsts = None
        if features.metadata:
            ids = np.array([self.ids[k] for k in order], np.int64)
        if self.firsts is not None:
            firsts = np.array([self.firsts[k] for k in order], np.int64)
        records = [self.records[k] for k in order]
        columns = features.columns(caller, records, lambda k: f"record {self.ids[order[k]]}")
        offsets = offsets_of(list(map(len, held)))
        return features.pack(caller, columns, offsets, rows, ids=ids, first_positions=firsts)


class StreamPacker:
    """Records that are in no batch yet, what the over-length policy did to them, and their rows.

    Attributes:
        ids: of each segment that waits, the index of its record.
        full: whether more segments wait than a group can hold, so that it can be planned.
        counts: of records that were added: how many were empty; then how many were over-length,
            their tokens, and so on, as in `OverLengthReport`.

    Example:
        >>> from seqpack_jax.feeding.features import make_features
        >>> settings = StreamSettings(
        ...     "f", make_features("f", 8), 2, 2, OverLength(), 0, False, None
        ... )
        >>> packer = StreamPacker(settings)
        >>> for index, length in enumerate([5, 3, 0, 4, 6]):
        ...     packer.add(np.arange(length), index)
        >>> packer.full, packer.counts[0], packer.take_group(0).rows
        (True, 1, [[0, 1], [2]])
    """

    def __init__(self, settings: StreamSettings, counts: Sequence[int] = (0,) * 6) -> None:
        self.settings = settings
        self.counts = list(counts)
        self.ids: list[int] = []
        self._records: list[dict[str, Any]] = []
        self._lengths: list[Any] = []  # as they count in a row: ints, or tuples of several
        going_on = settings.over_length.positions == "continue"
        self._firsts: list[int] | None = [] if going_on else None
        self._capacities = tuple(settings.features.capacities.values())
        self._limit = self._capacities[0] if len(self._capacities) == 1 else 0
        self._lead = next(iter(settings.features.capacities))
        multiples = settings.multiples
        self._multiples = multiples if multiples and max(multiples) > 1 else None
        # Up to this length nothing is to be done with records of one length.
        self._plain = 0 if going_on or self._multiples else self._limit
        self._most = settings.rows * settings.max_segments if settings.max_segments else 2**62
        self._key = seed_from_components(settings.seed, _SHUFFLE)
        self._room: list[int] = []  # of a group, less all that waits
        self.drop(0)

    @property
    def report(self) -> OverLengthReport:
        """What the over-length policy touched in the records that were added."""
        return OverLengthReport(self.settings.over_length.action, *self.counts[1:])

    def add(self, record: Any, index: int) -> None:
        """Read the record of an index, and let what the policy makes of it wait.

        Raises:
            SeqpackError: the record cannot be packed.  It is then as if it had not been added.
        """
        settings = self.settings
        entry = settings.features.read(settings.caller, f"record {index}", record)
        if 0 < (length := len(entry[self._lead])) <= self._plain:  # as `_append`, but faster
            self._records.append(entry)
            self._lengths.append(length)
            self.ids.append(index)
            self._room[0] -= length
            if self._room[0] < 0 or len(self.ids) > self._most:
                self.full = True
            return
        lengths = settings.features.lengths(entry)
        if not any(lengths):
            self.counts[0] += 1
        elif any(map(int.__gt__, lengths, self._capacities)):
            for starts, stops in self._windows(lengths, index):
                cut = tuple(map(int.__sub__, stops, starts))
                window = settings.features.window(entry, starts, stops)
                self._append(window, cut, index, starts[0])
        else:
            self._append(entry, lengths, index, 0)

    def _append(self, entry: dict[str, Any], lengths: tuple[int, ...], index: int, at: int) -> None:
        if self._multiples is not None:
            lengths = tuple(map(min, map(round_up, lengths, self._multiples), self._capacities))
        if self._limit:
            self._lengths.append(lengths[0])
        else:
            self._lengths.append(lengths)
        self._records.append(entry)
        self.ids.append(index)
        self._room = list(map(int.__sub__, self._room, lengths))
        self.full = min(self._room) < 0 or len(self.ids) > self._most
        if self._firsts is not None:
            self._firsts.append(at)

    def _windows(self, lengths: tuple[int, ...], index: int) -> list[_Window]:
        """Return what the policy keeps of an over-length record, and count what it does."""
        policy, limits = self.settings.over_length, self._capacities
        if policy.action == "error":
            self._refuse(lengths, index)
        if policy.action == "split":
            return self._pieces(lengths[0], index)
        if policy.action == "drop":
            self._count(OverLengthReport(policy.action, 1, sum(lengths), sum(lengths)))
            return []
        stops = tuple(map(min, lengths, limits))
        starts = (0,) * len(stops)
        if policy.action == "truncate_left":
            starts, stops = tuple(map(int.__sub__, lengths, stops)), lengths
        elif policy.action == "crop":
            have, ids = np.array(lengths, np.int64), np.array([index], np.int64)
            start = int(window_starts(policy, have, limits[0], ids, self.settings.seed)[0])
            starts, stops = (start,), (start + limits[0],)
        dropped = sum(lengths) - sum(stops) + sum(starts)
        self._count(OverLengthReport(policy.action, 1, sum(lengths), dropped))
        return [(starts, stops)]

    def _pieces(self, length: int, index: int) -> list[_Window]:
        caller, rows = self.settings.caller, self.settings.rows
        planned = apply_to_lengths(caller, self.settings.over_length, [length], self._limit)
        pieces: list[_Window] = [((0,), (int(planned.lengths[0]),))]
        if planned.pieces is not None:
            pieces = [
                ((start,), (stop,)) for start, stop in planned.pieces.table[:][:, 1:3].tolist()
            ]
        if len(pieces) > rows:
            fail(
                caller,
                f"record {index} has {length} tokens, {len(pieces)} pieces, but a group of whole "
                f"records has {rows} rows",
                "raise batch_size, window or max_seq_len, or split such records before",
            )
        self._count(planned.report)
        return pieces

    def _refuse(self, lengths: tuple[int, ...], index: int) -> NoReturn:
        for (name, limit), length in zip(
            self.settings.features.capacities.items(), lengths, strict=True
        ):
            if length > limit:
                of = "" if self._limit else f" of {name!r}"
                problem = f"record {index} has {length} tokens{of}, but a length is in [1, {limit}]"
                actions = "'drop', 'truncate', 'truncate_left'"
                more = ", 'crop' or 'split'" if self._limit else ""
                fail(self.settings.caller, problem, f"pass over_length={actions}{more}")
        raise AssertionError("no length is over its capacity")

    def _count(self, report: OverLengthReport) -> None:
        self.counts[1:] = map(int.__add__, self.counts[1:], report[1:])

    def take_group(self, number: int) -> Group:
        """Plan the next group, of a number in the stream; its segments wait until `drop`.

        Returns:
            The group; without rows if nothing waits.
        """
        settings, lengths = self.settings, self._lengths
        rows: list[list[int]] = []
        if lengths and self._limit:
            ends = None
            if settings.over_length.action == "split":  # a group ends between records
                ids = np.array(self.ids)
                ends = [*(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
            rows = longest_prefix(lengths, self._limit, settings.rows, ends, settings.max_segments)
        elif lengths:
            rows = longest_vector_prefix(
                np.array(lengths), self._capacities, settings.rows, settings.max_segments
            )
        size = sum(map(len, rows))
        group = Group(
            self._records[:size],
            self.ids[:size],
            None if self._firsts is None else self._firsts[:size],
            rows,
        )
        if size and settings.shuffle:
            # What is read counts, for the workers and processes of a run mostly share a seed, and
            # rows lie as best fit opened them.  Lengths do, as a place in the group rests on them.
            read = crc32(np.array(lengths[:size], "<i8").tobytes())
            rows = _shuffled(rows, seed_from_components(self._key, number, read))
        if size and settings.group_by is not None:
            rows = _by_feature(settings, group, rows, settings.group_by)
        return group._replace(rows=rows)

    def drop(self, size: int) -> None:
        """Forget the first segments that wait: a group was given."""
        for column in (self._records, self.ids, self._lengths, self._firsts):
            if column is not None:
                del column[:size]
        volumes = [self.settings.rows * capacity for capacity in self._capacities]
        each = [self._lengths] if self._limit else zip(*self._lengths, strict=True)
        self._room = list(map(int.__sub__, volumes, map(sum, each))) if self.ids else volumes
        self.full = min(self._room) < 0 or len(self.ids) > self._most


def _shuffled(rows: list[list[int]], seed: int) -> list[list[int]]:
    # Of all that is random in Python, `Random.random` alone is the same in every version.
    draw = Random(seed).random
    keys = [draw() for _ in rows]
    return [rows[k] for k in sorted(range(len(rows)), key=keys.__getitem__)]


def _by_feature(
    settings: StreamSettings, group: Group, rows: list[list[int]], name: str
) -> list[list[int]]:
    """Return rows in the order of the mean of the distinct values, other than 0, in them."""

    def values(index: int) -> Any:
        what, record = f"record {group.ids[index]}", group.records[index]
        if name not in record:
            fail(settings.caller, f"{what} has no feature {name!r}", "rows are ordered by it")
        return np.ravel(as_numbers(settings.caller, f"feature {name!r} of {what}", record[name]))

    def mean(row: list[int]) -> float:
        distinct = np.unique(np.concatenate([values(index) for index in row]))
        number = np.count_nonzero(distinct)
        return float(distinct.sum()) / number if number else 0.0

    return sorted(rows, key=mean)
