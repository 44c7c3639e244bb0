"""Grain: a random-access source of packed rows.

`PackedSource` needs to know all lengths beforehand and gives the most: dense rows, a known number
of steps, random access and exact resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.feeding.batch import fill_rows
from seqpack_jax.feeding.epoch import materialize_epoch
from seqpack_jax.feeding.sequences import FlatSequences, SequenceSource, fetch_sequences
from seqpack_jax.permutation import PERMUTATION_VERSION, seed_from_components
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.histogram import SequencePools, length_histogram_from_lengths
from seqpack_jax.planning.over_length import OverLength
from seqpack_jax.planning.packers import ALGORITHMS, pack_length_histogram
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.stats import PackingStats

__all__ = ["PackedSource", "pack_dataset"]


_BLOCK_ROWS = 1024  # rows of this process whose bins are drawn at once, when read in order


class _Drawn(NamedTuple):
    """Bins of some consecutive items: item `k` has the bins `firsts[k]` to `firsts[k + 1]`."""

    block: tuple[int, int]  # epoch, and number of the block in it
    bins: Bins
    planned: NDArray[np.int32]
    firsts: list[int]


class PackedSource:
    """A Grain random-access source of packed rows, or of whole batches, over several epochs.

    Works as `grain.MapDataset.source(...)` and as the `data_source` of a `grain.DataLoader`, with
    or without worker processes, and without Grain as a plain sequence.  Items are pure functions of
    the arguments and the index, so any loader over it resumes exactly.

    Rows are dealt to processes step by step: of the `count * batch_size` rows of a step, process
    `index` takes the `index`-th run of `batch_size`, which is the order in which
    `jax.make_array_from_process_local_data` puts them together.

    Args:
        plan: from `pack_length_histogram`.
        pools: the ids of each length, from `length_histogram_from_lengths`; their over-length
            policy acts on the tokens.
        sequences: a `FlatSequences`, or anything whose `[id]` is a 1-D array of integers; ids are
            those of the pools, any integers.
        seed: seeds the pairings and the order of the rows; any int.
        epochs: how often each sequence comes; each epoch pairs sequences anew.
        batch_size: rows per item, as arrays `[batch_size, max_seq_len]`; None for single rows,
            `[max_seq_len]`, that a Grain `batch` puts together.
        shard: `(index, count)` of this process, or a `grain.sharding.ShardOptions`.  Shard here,
            not in Grain's sampler, which would deal whole epochs to different processes.
        remainder: `"pad"` fills the last step of an epoch with empty rows, `"drop"` leaves out the
            rows that do not fill a step (other ones each epoch).
        shuffle: False keeps the rows in the order of the plan.
        pad_value: the token on padding.

    Raises:
        SeqpackError: the pools do not fit the plan, an argument is out of range, or `"drop"` would
            leave no step at all.

    Example:
        >>> sequences = [np.arange(1, n + 1) for n in (7, 5, 5, 3, 2)]
        >>> source = pack_dataset(sequences, max_seq_len=8, batch_size=2, seed=0, epochs=2)
        >>> len(source), source.steps_per_epoch, source[0]["tokens"].shape
        (4, 2, (2, 8))
    """

    def __init__(
        self,
        plan: PackingPlan,
        pools: SequencePools,
        sequences: SequenceSource,
        *,
        seed: int = 0,
        epochs: int = 1,
        batch_size: int | None = None,
        shard: tuple[int, int] = (0, 1),
        remainder: str = "pad",
        shuffle: bool = True,
        pad_value: int = 0,
    ) -> None:
        caller = "PackedSource"
        self.plan, self.pools, self.sequences = plan, pools, sequences
        self.seed = check_int(caller, "seed", seed)
        self.epochs = check_int(caller, "epochs", epochs, 1)
        self.batch_size = (
            None if batch_size is None else check_int(caller, "batch_size", batch_size, 1)
        )
        self.shard = _check_shard(caller, shard)
        self.remainder = check_choice(caller, "remainder", remainder, ("pad", "drop"))
        self.shuffle = bool(shuffle)
        self.pad_value = check_int(caller, "pad_value", pad_value, -(2**31), 2**31 - 1)
        self._first = materialize_epoch(plan, pools, seed=self.seed, shuffle=self.shuffle)
        self._digest = plan.digest()
        self._drawn: _Drawn | None = None  # the block that was drawn last
        self._touched: tuple[int, int] | None = None  # the block of the item that was drawn last
        if plan.num_bins == 0:
            dropped = pools.report.sequences
            left = f" left: all {dropped} were over-length and dropped" if dropped else ""
            fail(caller, f"there are no sequences{left}", "pass at least one that fits a row")
        rows = self._rows_per_step
        whole, rest = divmod(plan.num_bins, rows)
        self.steps_per_epoch: int = whole + (rest > 0 and remainder == "pad")
        if self.steps_per_epoch == 0:
            fail(
                caller,
                f"the plan has {plan.num_bins} rows, a step takes {rows}: no step is left",
                "lower batch_size, or use remainder='pad'",
            )

    @property
    def _rows_per_step(self) -> int:
        return self.shard[1] * (self.batch_size or 1)

    @property
    def stats(self) -> PackingStats:
        """Figures of one epoch over all shards, what the policy touched among them.

        Time: O(size of the plan).
        """
        return PackingStats.from_plan(
            self.plan, rows_per_step=self._rows_per_step, report=self.pools.report
        )

    def __len__(self) -> int:
        """Items over all epochs, the same for every shard."""
        return self.epochs * self.steps_per_epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return item `index` of this shard: `tokens`, `segment_ids` and `positions`, int32."""
        index = check_int("PackedSource", "index", index)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        drawn, item = self._draw(index)
        begin, end = drawn.firsts[item : item + 2]
        offsets = drawn.bins.offsets[begin : end + 1]
        held = slice(offsets[0], offsets[-1])
        caller, plan, pools = "PackedSource", self.plan, self.pools
        arrays, first_positions = fetch_sequences(
            caller,
            self.sequences,
            drawn.bins.ids[held],
            drawn.planned[held],
            plan.max_seq_len,
            over_length=pools.over_length,
            pieces=pools.pieces,
            key=drawn.bins.key,
            tolerance=plan.tolerance,
        )
        rows, offsets = self.batch_size or 1, offsets - offsets[0]
        named = fill_rows(
            caller, arrays, offsets, rows, plan.max_seq_len, self.pad_value, first_positions
        ).asdict()
        return named if self.batch_size else {name: array[0] for name, array in named.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _draw(self, index: int) -> tuple[_Drawn, int]:
        """Return drawn bins, and which item of them `index` is.

        Drawing a thousand rows costs hardly more than drawing one.  So the second item that is read
        of a block draws the block; items read in no order are drawn one by one.
        """
        epoch, step = divmod(index, self.steps_per_epoch)
        size = max(1, _BLOCK_ROWS // (self.batch_size or 1))  # items
        number, item = divmod(step, size)
        drawn = self._drawn  # one read: other threads may put another block there
        if drawn is not None and drawn.block == (epoch, number):
            return drawn, item
        if self._touched != (epoch, number):
            self._touched = (epoch, number)
            return self._draw_steps((epoch, number), range(step, step + 1)), 0
        last = min((number + 1) * size, self.steps_per_epoch)
        self._drawn = drawn = self._draw_steps((epoch, number), range(number * size, last))
        return drawn, item

    def _draw_steps(self, block: tuple[int, int], steps: range) -> _Drawn:
        """Draw the bins of this shard for some steps of one epoch."""
        rows, (shard, count) = self.batch_size or 1, self.shard
        starts = (np.array(steps) * count + shard) * rows
        # Rows beyond the last bin, at the end of an epoch, stay empty.
        held = np.clip(self.plan.num_bins - starts, 0, rows)
        index = (starts[:, None] + np.arange(rows)).reshape(-1)
        epoch = replace(self._first, key=seed_from_components(self.seed, block[0]))
        bins, planned = epoch.bins_and_lengths(index[index < self.plan.num_bins])
        return _Drawn(block, bins, planned, [0, *np.cumsum(held).tolist()])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_drawn": None, "_touched": None}

    def __repr__(self) -> str:
        """Say what determines the items; Grain compares this when it restores a checkpoint."""
        return (
            f"PackedSource(plan={self._digest}, rows={self.plan.num_bins}, "
            f"max_seq_len={self.plan.max_seq_len}, seed={self.seed}, epochs={self.epochs}, "
            f"batch_size={self.batch_size}, shard={self.shard}, remainder={self.remainder!r}, "
            f"shuffle={self.shuffle}, pad_value={self.pad_value}, "
            f"over_length={self.pools.over_length}, permutation={PERMUTATION_VERSION})"
        )


def _check_shard(caller: str, shard: Any) -> tuple[int, int]:
    if hasattr(shard, "shard_index"):  # grain.sharding.ShardOptions
        shard = (shard.shard_index, shard.shard_count)
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        fail(caller, f"shard = {shard!r}", "pass shard=(index of this process, processes)")
    count = check_int(caller, "shard[1]", shard[1], 1)
    return check_int(caller, "shard[0]", shard[0], 0, count - 1), count


def pack_dataset(
    sequences: Any,
    max_seq_len: int,
    *,
    lengths: ArrayLike | None = None,
    batch_size: int | None,
    seed: int = 0,
    epochs: int = 1,
    algorithm: str = "best_fit_decreasing",
    max_segments: int | None = None,
    tolerance: int = 1,
    over_length: str | OverLength = "error",
    shard: tuple[int, int] = (0, 1),
    remainder: str = "pad",
    shuffle: bool = True,
    pad_value: int = 0,
) -> PackedSource:
    """Plan a data set and return a Grain source of its packed batches: the one-call form.

    Time: O(n) once; nothing is packed until an item is read.

    Args:
        sequences: a `FlatSequences`, or anything with `len()` whose `[id]` is a 1-D array of
            integers: a list of arrays, a memory map, a table.
        max_seq_len: tokens per row.
        lengths: integers `[n]`, tokens of each sequence; None to ask each sequence for its `len`.
        batch_size: rows per batch of this process; None for single rows.
        seed: seeds the pairings and the order of the rows.
        epochs: how often each sequence comes.
        algorithm: see `pack_length_histogram`.
        max_segments: the most sequences in a row, None for no cap.
        tolerance: see `pack_length_histogram`.
        over_length: what becomes of sequences over `max_seq_len`: an `OverLength`, or the name of
            its action: `"error"`, `"drop"`, `"truncate"`, `"truncate_left"`, `"crop"` (a random
            window per epoch) or `"split"`.
        shard: see `PackedSource`, as are the arguments below.
        remainder: `"pad"` or `"drop"`.
        shuffle: False keeps the rows in the order of the plan.
        pad_value: the token on padding.

    Returns:
        A `PackedSource`.

    Raises:
        SeqpackError: a length is out of range or does not match its sequence.

    Example:
        >>> sequences = [np.full(n, n) for n in (3, 6, 2)]
        >>> source = pack_dataset(sequences, 4, batch_size=3, over_length="split", shuffle=False)
        >>> source[0]["segment_ids"].tolist()
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 2, 2]]
    """
    if algorithm not in ALGORITHMS:
        problem = f"algorithm = {algorithm!r} is not a planner"
        hint = f"choose one of {', '.join(ALGORITHMS)}; pack_sequences has next_fit"
        fail("pack_dataset", problem, hint)
    if lengths is None:
        lengths = _measure(sequences)
    elif hasattr(sequences, "__len__") and len(sequences) != np.size(lengths):
        problem = f"there are {np.size(lengths)} lengths, but {len(sequences)} sequences"
        fail("pack_dataset", problem, "pass one length per sequence")
    counts, pools = length_histogram_from_lengths(lengths, max_seq_len, over_length=over_length)
    plan = pack_length_histogram(
        counts, max_seq_len, algorithm=algorithm, max_segments=max_segments, tolerance=tolerance
    )
    return PackedSource(
        plan,
        pools,
        sequences,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        shard=shard,
        remainder=remainder,
        shuffle=shuffle,
        pad_value=pad_value,
    )


def _measure(sequences: Any) -> NDArray[np.int64]:
    """Ask each sequence for its length."""
    if isinstance(sequences, FlatSequences):
        return sequences.lengths
    try:
        known = isinstance(sequences, list | tuple)
        each = sequences if known else (sequences[i] for i in range(len(sequences)))
        return np.fromiter(map(len, each), np.int64, len(sequences))
    except TypeError as error:
        problem = f"the lengths of sequences cannot be counted ({error})"
        fail("pack_dataset", problem, "pass a list of arrays, FlatSequences, or lengths=...")
