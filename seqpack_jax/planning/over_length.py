"""The over-length policy: what becomes of sequences that are longer than a row.

One object, `OverLength`, says it, for planning (which lengths are packed, and under which ids) and
for feeding (which of the tokens go into the row) alike.  What a policy touched is counted in an
`OverLengthReport`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import ArrayParts, from_portable, to_portable
from seqpack_jax.errors import OVER_LENGTH_HINT, check_choice, check_int, check_lengths, fail
from seqpack_jax.permutation import random_below, seed_from_components

__all__ = [
    "NOTHING_TOUCHED",
    "REFUSE",
    "OverLength",
    "OverLengthReport",
    "Pieces",
    "PlannedLengths",
    "apply_to_counts",
    "apply_to_lengths",
    "as_policy",
    "window_starts",
]

ACTIONS = ("error", "drop", "truncate", "truncate_left", "crop", "split")
_POSITIONS = ("restart", "continue")
_CROP = 0x63726F70  # keeps the windows of an epoch apart from its pairings


@dataclass(frozen=True)
class OverLength:
    """What to do with sequences of more than `max_seq_len` tokens.

    Wherever an `over_length=` argument is, the name of an action is enough, unless `"split"` needs
    its options.

    Attributes:
        action: `"error"` refuses them; `"drop"` leaves them out; `"truncate"` cuts off their end,
            `"truncate_left"` their beginning; `"crop"` keeps a window of `max_seq_len` tokens, a
            random one in each epoch; `"split"` cuts them into pieces of at most `max_seq_len`.
        overlap: for `"split"`: tokens of a piece that its successor begins with.
        min_tail: for `"split"`: a last piece of fewer tokens than this is left out.
        positions: for `"split"`: those of a piece `"restart"` at 0, or `"continue"` from where the
            piece starts in its sequence.  Masks go by segment ids in both cases: a piece never
            attends to another.

    Raises:
        SeqpackError: an action is unknown, or an option does not belong to it.

    Example:
        >>> OverLength("split", overlap=64, min_tail=16)
        OverLength(action='split', overlap=64, min_tail=16, positions='restart')
    """

    action: str = "error"
    overlap: int = 0
    min_tail: int = 1
    positions: str = "restart"

    def __post_init__(self) -> None:
        caller = "OverLength"
        # As plain Python values, whatever was given: they are printed, saved and computed with.
        plain_fields = {
            "action": _plain(check_choice(caller, "action", self.action, ACTIONS), ACTIONS),
            "overlap": check_int(caller, "overlap", self.overlap, 0),
            "min_tail": check_int(caller, "min_tail", self.min_tail, 1),
            "positions": _plain(
                check_choice(caller, "positions", self.positions, _POSITIONS), _POSITIONS
            ),
        }
        for name, value in plain_fields.items():
            object.__setattr__(self, name, value)
        plain = (self.overlap, self.min_tail, self.positions) == (0, 1, "restart")
        if self.action != "split" and not plain:
            fail(
                caller,
                f"action {self.action!r} takes no overlap, min_tail or positions",
                "they belong to 'split'",
            )

    def check(self, caller: str, max_seq_len: int | None) -> None:
        """Raise `SeqpackError` unless the options suit rows of `max_seq_len` tokens."""
        if self.action == "error":
            return
        if max_seq_len is None:
            problem = f"over_length is {self.action!r}, but there is no max_seq_len"
            fail(caller, problem, "pass max_seq_len, the tokens of a row")
        for name in ("overlap", "min_tail"):
            value, limit = getattr(self, name), max_seq_len - (name == "overlap")
            if value > limit:
                problem = f"{name} = {value}, but max_seq_len is {max_seq_len}"
                fail(caller, problem, f"pass {name} of at most {limit}")


def _plain(value: str, choices: tuple[str, ...]) -> str:
    """Return the choice that equals `value`, which may be an enum or a NumPy string."""
    return choices[choices.index(value)]


class OverLengthReport(NamedTuple):
    """How many sequences and tokens an over-length policy touched.

    Tokens in all rows of an epoch are those of all sequences, less `dropped_tokens`, plus
    `repeated_tokens`.

    Attributes:
        action: that of the policy.
        sequences: how many sequences were over-length.
        tokens: how many tokens they have.
        dropped_tokens: how many of these no row of an epoch holds.
        repeated_tokens: how many stand in two rows, by the overlap of pieces.
        pieces: into how many pieces they were cut.

    Example:
        >>> OverLengthReport("drop", 1, 9, 9).plus(OverLengthReport("drop", 2, 20, 20))
        OverLengthReport(action='drop', sequences=3, tokens=29, dropped_tokens=29, \
repeated_tokens=0, pieces=0)
    """

    action: str = "error"
    sequences: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    repeated_tokens: int = 0
    pieces: int = 0

    def plus(self, other: OverLengthReport) -> OverLengthReport:
        """Return the report on both, say on two shards."""
        return OverLengthReport(
            self.action, *(a + b for a, b in zip(self[1:], other[1:], strict=True))
        )


REFUSE = OverLength()
NOTHING_TOUCHED = OverLengthReport()


class Pieces(NamedTuple):
    """Where the pieces of split sequences come from; kept for over-length sequences only.

    Ids below `first_id` are whole sequences.  Piece `k` has the id `first_id + k`; pieces are
    numbered by sequence, and inside one from front to back.

    Attributes:
        first_id: the id of piece 0; above that of every sequence.
        table: int64 `[p, 4]`, the columns below side by side; `table[ids - first_id]` is the rows
            of some pieces.

    Example:
        >>> pieces = Pieces(2, np.array([[1, 0, 4, 9], [1, 4, 8, 9], [1, 8, 9, 9]]))
        >>> list(zip(pieces.source_id.tolist(), pieces.start.tolist(), pieces.stop.tolist()))
        [(1, 0, 4), (1, 4, 8), (1, 8, 9)]
    """

    first_id: int
    table: NDArray[np.int64] | ArrayParts

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a memory-mapped table by its path."""
        table = self.table
        return _reopened, (
            self.first_id,
            table if isinstance(table, ArrayParts) else to_portable(table),
        )

    def _column(self, number: int) -> NDArray[np.int64]:
        return self.table[:][:, number]

    @property
    def source_id(self) -> NDArray[np.int64]:
        """int64 `[p]`: the sequence that each piece was cut from."""
        return self._column(0)

    @property
    def start(self) -> NDArray[np.int64]:
        """int64 `[p]`: where it starts there, in tokens."""
        return self._column(1)

    @property
    def stop(self) -> NDArray[np.int64]:
        """int64 `[p]`: where it ends there, in tokens."""
        return self._column(2)

    @property
    def source_length(self) -> NDArray[np.int64]:
        """int64 `[p]`: tokens of that whole sequence."""
        return self._column(3)


def _reopened(first_id: int, table: Any) -> Pieces:
    return Pieces(first_id, from_portable(table))


class PlannedLengths(NamedTuple):
    """What a policy makes of lengths.

    Attributes:
        lengths: int64 `[n]`, as they are planned; 0 for a sequence that is not packed under its own
            id, because it was dropped or split.
        pieces: of split sequences, their `source_id` an index into `lengths` and their ids from `n`
            on; None when nothing was split.
        report: what the policy touched.
    """

    lengths: NDArray[np.int64]
    pieces: Pieces | None
    report: OverLengthReport

    @property
    def of_ids(self) -> NDArray[np.int64]:
        """int64 `[n + p]`: the lengths of sequences, then those of pieces.  Time: O(n + p)."""
        if self.pieces is None:
            return self.lengths
        table = self.pieces.table[:]
        return np.concatenate([self.lengths, table[:, 2] - table[:, 1]])


def as_policy(caller: str, over_length: Any) -> OverLength:
    """Return the policy that an `over_length` argument names."""
    if isinstance(over_length, OverLength):
        return over_length
    check_choice(caller, "over_length", over_length, ACTIONS)
    return OverLength(over_length)


def apply_to_lengths(
    caller: str,
    policy: OverLength,
    lengths: Any,
    max_seq_len: int | None,
    *,
    extra_tokens: int = 0,
    hint: str = OVER_LENGTH_HINT,
) -> PlannedLengths:
    """Check lengths, add `extra_tokens` to each, and plan those over `max_seq_len` by the policy.

    Time: O(n + pieces).

    Example:
        >>> planned = apply_to_lengths("docs", OverLength("truncate"), [3, 9], 4)
        >>> planned.lengths.tolist(), planned.report.dropped_tokens
        ([3, 4], 5)
    """
    policy.check(caller, max_seq_len)
    limit = max_seq_len if policy.action == "error" else None
    name = "lengths"
    if extra_tokens:
        lengths = check_lengths(caller, lengths).astype(np.int64) + extra_tokens
        name = f"(lengths + {extra_tokens})"
    array = check_lengths(caller, lengths, limit, name=name, hint=hint)
    array = array.astype(np.int64, copy=False)
    nothing = OverLengthReport(policy.action)
    if max_seq_len is None or array.size == 0 or int(array.max()) <= max_seq_len:
        return PlannedLengths(array, None, nothing)
    over = array > max_seq_len
    which = np.flatnonzero(over)
    report = _report(policy, array[which], np.ones(len(which), np.int64), max_seq_len)
    if policy.action not in ("drop", "split"):
        return PlannedLengths(np.minimum(array, max_seq_len), None, report)
    pieces = None
    if policy.action == "split":
        pieces = Pieces(len(array), _cut(policy, which, array[which], max_seq_len))
    return PlannedLengths(np.where(over, 0, array), pieces, report)


def _pieces_of(
    policy: OverLength, long: NDArray[np.int64], max_seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of pieces of sequences of `long` tokens, and the tokens of the last."""
    stride = max_seq_len - policy.overlap
    number = 1 - (-(long - max_seq_len) // stride)  # each piece but the first brings new tokens
    last = long - (number - 1) * stride
    short = last < policy.min_tail
    return number - short, np.where(short, max_seq_len, last)


def _cut(
    policy: OverLength, which: NDArray[np.int64], long: NDArray[np.int64], max_seq_len: int
) -> NDArray[np.int64]:
    """Return the table of `Pieces` of sequences `which`, of `long` tokens each."""
    number, last = _pieces_of(policy, long, max_seq_len)
    ends = np.cumsum(number)
    table = np.empty((int(number.sum()), 4), np.int64)
    table[:, 0] = np.repeat(which, number)
    table[:, 1] = np.arange(len(table)) - np.repeat(ends - number, number)
    table[:, 1] *= max_seq_len - policy.overlap
    table[:, 2] = table[:, 1] + max_seq_len
    table[ends - 1, 2] += last - max_seq_len
    table[:, 3] = np.repeat(long, number)
    return table


def _report(
    policy: OverLength, long: NDArray[np.int64], times: NDArray[np.int64], max_seq_len: int
) -> OverLengthReport:
    """Report on `times[i]` sequences of `long[i]` tokens each, all of them over-length."""
    sequences, tokens = int(times.sum()), int(long @ times)
    kept, again, pieces = 0, 0, 0
    if policy.action == "split":
        number, last = _pieces_of(policy, long, max_seq_len)
        kept = int(((number - 1) * (max_seq_len - policy.overlap) + last) @ times)
        pieces = int(number @ times)
        again = policy.overlap * (pieces - sequences)
    elif policy.action != "drop":
        kept = max_seq_len * sequences
    return OverLengthReport(policy.action, sequences, tokens, tokens - kept, again, pieces)


def apply_to_counts(
    caller: str, policy: OverLength, counts: NDArray[np.int64], max_seq_len: int
) -> tuple[NDArray[np.int64], OverLengthReport]:
    """Plan the over-length part of a histogram as `apply_to_lengths` does that of its sequences.

    Time: O(max_len).

    Example:
        >>> counts = np.bincount([3, 9, 9])
        >>> apply_to_counts("docs", OverLength("split"), counts, 4)[0].tolist()
        [0, 2, 0, 1, 4]
    """
    policy.check(caller, max_seq_len)
    long = max_seq_len + 1 + np.flatnonzero(counts[max_seq_len + 1 :])
    if policy.action == "error" or not long.size:
        return counts, OverLengthReport(policy.action)
    times = counts[long]
    kept = counts[: max_seq_len + 1].copy()
    if policy.action == "split":
        number, last = _pieces_of(policy, long, max_seq_len)
        np.add.at(kept, last, times)
        kept[max_seq_len] += int((number - 1) @ times)
    elif policy.action != "drop":
        kept[max_seq_len] += int(times.sum())
    return kept, _report(policy, long, times, max_seq_len)


def window_starts(
    policy: OverLength,
    lengths: NDArray[np.int64],
    max_seq_len: int,
    ids: NDArray[np.int64],
    key: int | None,
) -> NDArray[np.int64]:
    """Return where the tokens that are kept of each sequence start: int64 `[k]`.

    Where `lengths[i] <= max_seq_len`, and for policies that cut nothing off the front, it is 0.

    Args:
        policy: says which tokens are kept.
        lengths: int64 `[k]`, tokens of each sequence as it was read.
        max_seq_len: tokens that are kept at most.
        ids: int64 `[k]`; the window of `"crop"` depends on `(key, id, length)` alone.
        key: that of the epoch (`Epoch.key`); None keeps the first tokens.
    """
    spare = np.maximum(lengths - max_seq_len, 0)
    if policy.action == "truncate_left":
        return spare
    starts = np.zeros_like(spare)
    cut = np.flatnonzero(spare)
    if policy.action != "crop" or key is None or not cut.size:
        return starts
    starts[cut] = random_below(spare[cut] + 1, ids[cut], seed_from_components(key, _CROP))
    return starts
