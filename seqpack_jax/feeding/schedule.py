"""Which rows of which epoch an item holds, on each process: arithmetic, without any sequences."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from seqpack_jax.errors import MAX_TOTAL, check_choice, check_int, fail
from seqpack_jax.planning.counts import Int64

__all__ = ["Schedule", "make_schedule"]


@dataclass(frozen=True)
class Schedule:
    """How the rows of some epochs are dealt to items, and to the processes of each.

    Of the `count * batch_size` rows of a step, process `index` takes the `index`-th run of
    `batch_size`.  A step never has rows of two epochs.

    Attributes:
        num_rows: of one epoch.
        epochs: how many there are.
        batch_size: rows per item of one process; None for one, without an axis of its own.
        shard: `(index, count)` of this process.
        remainder: what becomes of rows that do not fill a step: `"pad"` or `"drop"`.
        start: the epoch, and the row in there, that item 0 starts with.

    Example:
        >>> schedule = make_schedule("docs", 5, epochs=2, batch_size=2)
        >>> len(schedule), [schedule.position(index) for index in range(4)]
        (6, [(0, 0), (0, 2), (0, 4), (1, 0)])
        >>> rest = schedule.starting_at("docs", 0, 3)
        >>> len(rest), [rest.position(index) for index in range(4)]
        (4, [(0, 3), (1, 0), (1, 2), (1, 4)])
    """

    num_rows: int
    epochs: int
    batch_size: int | None
    shard: tuple[int, int]
    remainder: str
    start: tuple[int, int] = (0, 0)

    @property
    def rows(self) -> int:
        """Rows of one item of one process."""
        return self.batch_size or 1

    @property
    def rows_per_step(self) -> int:
        """Rows of one item, over all processes."""
        return self.shard[1] * self.rows

    def steps(self, first: int = 0) -> int:
        """Return how many items are made of the rows of one epoch, from row `first` on."""
        whole, rest = divmod(self.num_rows - first, self.rows_per_step)
        return whole + (rest > 0 and self.remainder == "pad")

    def __len__(self) -> int:
        epoch, first = self.start
        if epoch == self.epochs:
            return 0
        return self.steps(first) + (self.epochs - epoch - 1) * self.steps()

    def place(self, index: int) -> tuple[int, int, int]:
        """Return the epoch of an item, its number in there, and the row that item 0 of it has."""
        epoch, first = self.start
        later = index - self.steps(first)
        if later < 0:
            return epoch, index, first
        return epoch + 1 + later // self.steps(), later % self.steps(), 0

    def position(self, index: int) -> tuple[int, int]:
        """Return the epoch in which an item starts, and its first row there; the end is an item."""
        if index == len(self):
            return self.epochs, 0
        epoch, step, first = self.place(index)
        return epoch, first + step * self.rows_per_step

    def starting_at(self, caller: str, epoch: int, rows: int) -> Schedule:
        """Return the same schedule from a row of an epoch on; see `PackedSource.starting_at`."""
        epoch = check_int(caller, "epoch", epoch, 0, self.epochs)
        limit = self.num_rows if epoch < self.epochs else 0
        return replace(self, start=(epoch, check_int(caller, "rows", rows, 0, limit)))

    def rows_of(self, steps: range, first: int) -> tuple[Int64, Int64]:
        """Return the rows of some items of one epoch on this process, and how many each has.

        Rows beyond the end of the epoch are left out, so the last item may have fewer.

        Args:
            steps: numbers of items inside the epoch.
            first: the row that item 0 of the epoch starts with.
        """
        rows, (shard, count) = self.rows, self.shard
        starts = first + (np.array(steps) * count + shard) * rows
        index = (starts[:, None] + np.arange(rows)).reshape(-1)
        return index[index < self.num_rows], np.clip(self.num_rows - starts, 0, rows)


def make_schedule(
    caller: str,
    num_rows: int,
    epochs: int = 1,
    batch_size: int | None = None,
    shard: Any = (0, 1),
    remainder: str = "pad",
) -> Schedule:
    """Check what is asked for, and return the schedule from the first row on.

    Raises:
        SeqpackError: an argument is out of range, `"drop"` would leave no step at all, or there
            are more items than can be counted.
    """
    schedule = Schedule(
        num_rows,
        check_int(caller, "epochs", epochs, 1),
        None if batch_size is None else check_int(caller, "batch_size", batch_size, 1),
        _check_shard(caller, shard),
        check_choice(caller, "remainder", remainder, ("pad", "drop")),
    )
    if schedule.rows_per_step > MAX_TOTAL:
        problem = f"a step takes {schedule.rows_per_step} rows, at most 2**62 can be counted"
        fail(caller, problem, "lower batch_size")
    if (items := schedule.epochs * schedule.steps()) > sys.maxsize:
        problem = f"{schedule.epochs} epochs are {items} items, more than Python's len() returns"
        fail(caller, problem, "lower epochs")
    if schedule.steps() == 0:
        problem = f"the plan has {num_rows} rows, a step takes {schedule.rows_per_step}"
        hint = "lower batch_size, or use remainder='pad'"
        fail(caller, f"{problem}: no step is left", hint)
    return schedule


def _check_shard(caller: str, shard: Any) -> tuple[int, int]:
    if hasattr(shard, "shard_index"):  # grain.sharding.ShardOptions
        shard = (shard.shard_index, shard.shard_count)
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        fail(caller, f"shard = {shard!r}", "pass shard=(index of this process, processes)")
    count = check_int(caller, "shard[1]", shard[1], 1)
    return check_int(caller, "shard[0]", shard[0], 0, count - 1), count
