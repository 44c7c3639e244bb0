"""A random-access source of packed rows, for Grain or without it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.epoch import materialize_epoch
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.prefetch import Prefetch
from seqpack_jax.feeding.reading import make_ends
from seqpack_jax.feeding.schedule import make_schedule
from seqpack_jax.feeding.sequences import Fetched, Transform, fetch_records, like_others
from seqpack_jax.permutation import PERMUTATION_VERSION, seed_from_components
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.histogram import SequencePools
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.stats import PackingStats
from seqpack_jax.planning.vectors import VectorPlan

__all__ = ["PackedSource"]

_BLOCK_ROWS = 1024  # rows of this process whose bins are drawn at once, when read in order
_RUN = 32  # single rows that are filled at once, when read in order


class _Drawn(NamedTuple):
    """Bins of some consecutive items: item `k` has the bins `firsts[k]` to `firsts[k + 1]`."""

    block: tuple[int, int]  # epoch, and number of the block in it
    bins: Bins
    planned: NDArray[np.int32]
    firsts: list[int]


@dataclass
class _Cache:
    """What was read last; no item depends on it."""

    prefetch: Prefetch
    drawn: _Drawn | None = None  # the last block that was drawn
    touched: tuple[int, int] | None = None  # the block of the item that was drawn last
    runs: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)  # two, of single rows
    touched_run: tuple[int, ...] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class PackedSource:
    """A Grain random-access source of packed rows, or of whole batches, over several epochs.

    Works as `grain.MapDataset.source(...)` and as the `data_source` of a `grain.DataLoader`, with
    or without worker processes, and without Grain as a plain sequence.  Items are pure functions of
    the arguments and the index, so any loader over it resumes exactly; `PackedDataset` also on
    other numbers of processes, and with other batch sizes.

    Rows are dealt to processes step by step: of the `count * batch_size` rows of a step, process
    `index` takes the `index`-th run of `batch_size`, which is the order in which
    `jax.make_array_from_process_local_data` puts them together.

    Args:
        plan: from `pack_length_histogram`, or `pack_vectors` for several capacities.
        pools: the ids of each length, from `length_histogram_from_lengths`, or from `pack_vectors`;
            their over-length policy acts on the records.
        sequences: a `FlatSequences`, or anything whose `[id]` is a 1-D array of integers, or a
            record: a dict, tuple or NamedTuple of arrays.  Ids are those of the pools, any
            integers.  A batch is read in the order of ids, by one call of `__getitems__` if the
            source has it.
        seed: seeds the pairings and the order of the rows; any int.
        epochs: how often each sequence comes; each epoch pairs sequences anew.
        batch_size: rows per item, as arrays `[batch_size, max_seq_len]`; None for single rows,
            `[max_seq_len]`, that a Grain `batch` puts together.
        shard: `(index, count)` of this process, or a `grain.sharding.ShardOptions`.  Shard here,
            not in Grain's sampler, which would deal whole epochs to different processes.
        remainder: `"pad"` fills the last step of an epoch with empty rows, `"drop"` leaves out the
            rows that do not fill a step (other ones each epoch).
        shuffle: False keeps the rows in the order of the plan.
        zones: into how many zones an epoch is cut, each of which reads one stretch of the storage
            (see `materialize_epoch`): for files that are larger than the memory.
        feature: the feature of records with the capacity; or a tuple of those with the capacities,
            in the order of the plan.
        max_segments: width of what comes once per sequence, `[batch_size, max_segments]`; None for
            the most sequences in any row of the plan.
        multiple_of: each sequence starts at a multiple of it in its row.  It must divide the
            planned lengths: plan with it as `tolerance`.
        pad_value: what stands on padding, a number, or numbers by feature.
        meta_features: arrays in records that come once per sequence.
        metadata: add `segment_lengths`, `ids` and `row_valid` to items (see `unpack_by_id`).
        key_style: how arrays are called: `help("seqpack_jax.feeding.key_styles")`.
        transform: `transform(record, rng)` returns the record that is packed in its place, of as
            many tokens as were planned.  It gets a copy of what `sequences` gave (lists as arrays),
            which it may write to, and a `numpy.random.Generator` of seed, epoch and id alone.
        bos_id: a token put before each sequence, once it is transformed, and before an over-length
            one is cut; or tokens by feature.  Features that share its rows have their padding
            there.  The plan must count it (`extra_tokens`).
        eos_id: the same behind each sequence.
        read_threads: how many threads read a batch, unless the source has `__getitems__` or is a
            list, tuple or array.

    Attributes:
        steps_per_epoch: items of a whole epoch.
        empty_records: records without tokens that `pack_dataset` left out.

    Raises:
        SeqpackError: the pools do not fit the plan, an argument is out of range, or `"drop"` would
            leave no step at all.

    Example:
        >>> from seqpack_jax import pack_dataset
        >>> sequences = [np.arange(1, n + 1) for n in (7, 5, 5, 3, 2)]
        >>> source = pack_dataset(sequences, max_seq_len=8, batch_size=2, seed=0, epochs=2)
        >>> len(source), source.steps_per_epoch, source[0]["tokens"].shape
        (4, 2, (2, 8))
    """

    def __init__(
        self,
        plan: PackingPlan | VectorPlan,
        pools: SequencePools,
        sequences: Any,
        *,
        seed: int = 0,
        epochs: int = 1,
        batch_size: int | None = None,
        shard: Any = (0, 1),
        remainder: str = "pad",
        shuffle: bool = True,
        zones: int = 1,
        feature: str | Sequence[str] = "tokens",
        max_segments: int | None = None,
        multiple_of: int = 1,
        pad_value: float | Mapping[str, float] = 0,
        meta_features: Sequence[str] = (),
        metadata: bool = False,
        key_style: str = "default",
        transform: Transform | None = None,
        bos_id: int | Mapping[str, int] | None = None,
        eos_id: int | Mapping[str, int] | None = None,
        read_threads: int = 4,
    ) -> None:
        caller = "PackedSource"
        self.plan, self.pools, self.sequences = plan, pools, sequences
        self.seed = check_int(caller, "seed", seed)
        self.shuffle, self.zones = bool(shuffle), check_int(caller, "zones", zones, 1)
        self.transform, self.empty_records = transform, 0
        self._threads = check_int(caller, "read_threads", read_threads, 1)
        order: Any = {"seed": self.seed, "shuffle": self.shuffle, "zones": self.zones}
        self._first = materialize_epoch(plan, pools, **order)
        if plan.num_bins == 0:
            dropped = pools.report.sequences
            left = f" left: all {dropped} were over-length and dropped" if dropped else ""
            fail(caller, f"there are no sequences{left}", "pass at least one that fits a row")
        if max_segments is not None:
            check_int(caller, "max_segments", max_segments, plan.max_segments)
        self.features = make_features(
            caller,
            _capacities(caller, plan, feature),
            feature=feature if isinstance(feature, str) else feature[0],
            max_segments=max_segments or plan.max_segments,
            multiple_of=multiple_of,
            pad_value=pad_value,
            meta_features=meta_features,
            metadata=metadata,
            key_style=key_style,
        )
        planned = plan.vectors if isinstance(plan, VectorPlan) else plan.lengths
        if (planned % multiple_of).any():
            hint = f"plan with tolerance={multiple_of}, as pack_dataset does"
            fail(caller, f"planned lengths are no multiples of {multiple_of}", hint)
        if isinstance(plan, VectorPlan) and pools.over_length.action in ("crop", "split"):
            problem = f"over_length = {pools.over_length.action!r} with several capacities"
            fail(caller, problem, "choose one of error, drop, truncate, truncate_left")
        self._ends = make_ends(caller, self.features, bos_id, eos_id)
        self._schedule = make_schedule(caller, plan.num_bins, epochs, batch_size, shard, remainder)
        self.epochs, self.batch_size = self._schedule.epochs, self._schedule.batch_size
        self.shard, self.remainder = self._schedule.shard, self._schedule.remainder
        self.steps_per_epoch: int = self._schedule.steps()
        self._digest = plan.digest()
        self._cache = _Cache(Prefetch(self.sequences, self.zones))

    @property
    def rows_per_step(self) -> int:
        """Rows of one item, over all shards."""
        return self._schedule.rows_per_step

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the rows beside plan, pools and seed, as JSON has it.

        What is at its default is left out, so that states outlive options that are added later.
        Batches, shards, the number of epochs and what arrays are called are no part of it: they may
        change when a run goes on.  Of a transform it says only that there is one.
        """
        policy, ends = self.pools.over_length, self._ends
        chosen: dict[str, tuple[Any, Any]] = {
            "shuffle": (self.shuffle, True),
            "zones": (self.zones, 1),
            "bos_id": (ends.bos, {}),
            "eos_id": (ends.eos, {}),
            "transform": (self.transform is not None, False),
        }
        for each in fields(policy):
            chosen[f"over_length.{each.name}"] = (getattr(policy, each.name), each.default)
        return {name: value for name, (value, default) in chosen.items() if value != default}

    @property
    def stats(self) -> PackingStats:
        """Figures of one epoch over all shards.  Time: O(size of the plan).

        Raises:
            SeqpackError: the plan has several capacities.
        """
        if isinstance(self.plan, VectorPlan):
            hint = "take PackingStats.from_plan(source.plan.column(0)), or source.plan.efficiency"
            fail("PackedSource.stats", "the plan has several capacities", hint)
        rows, report = self.rows_per_step, self.pools.report
        return PackingStats.from_plan(self.plan, rows_per_step=rows, report=report)

    def position(self, index: int) -> tuple[int, int]:
        """Return the epoch in which item `index` starts, and its first row there, over all shards.

        Time: O(1).

        Args:
            index: in `[0, len(self)]`; the last is the end, `(epochs, 0)`.

        Example:
            >>> from seqpack_jax import pack_dataset
            >>> source = pack_dataset([[1], [2], [3]], 1, batch_size=2, epochs=2)
            >>> [source.position(index) for index in range(5)]
            [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0)]
        """
        place = check_int("PackedSource.position", "index", index, 0, len(self))
        return self._schedule.position(place)

    def starting_at(self, epoch: int, rows: int) -> PackedSource:
        """Return a copy whose item 0 starts with row `rows` of an epoch, counted over all shards.

        The rest of that epoch follows, then the other epochs.  Rows need be no multiple of a step:
        so a run goes on with the next row in batches of another size.

        Time: O(1).

        Args:
            epoch: in `[0, epochs]`.
            rows: in `[0, plan.num_bins]`; 0 at the end of the last epoch.

        Raises:
            SeqpackError: there is no such row.

        Example:
            >>> from seqpack_jax import pack_dataset
            >>> source = pack_dataset([[1], [2], [3]], 1, batch_size=2, epochs=2)
            >>> rest = source.starting_at(1, 1)
            >>> len(rest), rest.position(0), rest.position(1)
            (1, (1, 1), (2, 0))
        """
        copied = copy.copy(self)
        copied._schedule = self._schedule.starting_at("PackedSource.starting_at", epoch, rows)
        return copied

    def __len__(self) -> int:
        """Items over all epochs, the same for every shard."""
        return len(self._schedule)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return item `index` of this shard: by default `tokens`, `segment_ids`, `positions`."""
        index = check_int("PackedSource", "index", index)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        if self.batch_size is None:
            return self._row(index)
        drawn, item = self._draw(index)
        return self._fill(drawn, item, item + 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _row(self, index: int) -> dict[str, Any]:
        """Return a single row; of those that are read in order, several are filled at once."""
        drawn, item = self._draw(index)
        if len(drawn.firsts) == 2:
            return _row_of(self._fill(drawn, item, item + 1), 0)
        run, inside = divmod(item, _RUN)
        key, cache = (*drawn.block, run), self._cache
        with cache.lock:  # threads that read in order want the same run at the same time
            filled = cache.runs.get(key)
            in_order = cache.touched_run == key or (*drawn.block, run - 1) in cache.runs
            if filled is None and in_order:
                last = min((run + 1) * _RUN, len(drawn.firsts) - 1)
                filled = self._fill(drawn, run * _RUN, last)
                # Late threads may still want the run before.
                cache.runs = dict([*list(cache.runs.items())[-1:], (key, filled)])
            cache.touched_run = key
        if filled is None:
            return _row_of(self._fill(drawn, item, item + 1), 0)
        return _row_of(filled, inside)

    def _fill(self, drawn: _Drawn, first: int, last: int) -> dict[str, Any]:
        """Return items `first` to `last` of those drawn as one batch."""
        begin, end = drawn.firsts[first], drawn.firsts[last]
        offsets = drawn.bins.offsets[begin : end + 1]
        held = slice(offsets[0], offsets[-1])
        ids, planned = drawn.bins.ids[held], drawn.planned[held]
        found = self._fetch(ids, planned, drawn.bins.key)
        return self.features.pack(
            "PackedSource",
            found.columns,
            offsets - offsets[0],
            (last - first) * self._schedule.rows,
            ids=ids,
            first_positions=found.first_positions,
            like=like_others(self.features, found.columns, self._sample),
        )

    def _sample(self, number: int) -> Fetched:
        """Read a record that has tokens of a capacity, or any if none has."""
        bins, planned = self._first.bins_and_lengths([0])
        ids, planned = bins.ids[:1], planned[:1]
        if isinstance(self.plan, VectorPlan):
            classes = self.plan.classes
            if (pool := classes[self.plan.vectors[classes, number] > 0][:1]).size:
                ids, planned = self.pools.lookup(pool, 0), self.plan.vectors[pool]
        return self._fetch(ids, planned, bins.key)

    def _fetch(
        self, ids: NDArray[np.int64], planned: NDArray[np.int32], key: int | None
    ) -> Fetched:
        return fetch_records(
            "PackedSource",
            self.sequences,
            ids,
            planned,
            self.features,
            over_length=self.pools.over_length,
            pieces=self.pools.pieces,
            key=key,
            tolerance=self.plan.tolerance,
            transform=self.transform,
            ends=self._ends,
            threads=self._threads,
        )

    def _draw(self, index: int) -> tuple[_Drawn, int]:
        """Return drawn bins, and which item of them `index` is.

        Drawing a thousand rows costs hardly more than one: the second item that is read of a block
        draws the block.  Items read in no order are drawn one by one.
        """
        cache = self._cache
        epoch, step, first = self._schedule.place(index)
        size = max(1, _BLOCK_ROWS // self._schedule.rows)  # items
        number, item = divmod(step, size)
        drawn = cache.drawn  # one read: other threads may put another block there
        if drawn is not None and drawn.block == (epoch, number):
            return drawn, item
        in_order = drawn is not None and drawn.block == (epoch, number - 1)
        in_order |= cache.touched is None and self.zones > 1  # they are for reading in order
        if cache.touched != (epoch, number) and not in_order:
            cache.touched = (epoch, number)
            return self._draw_steps((epoch, number), range(step, step + 1), first), 0
        cache.touched = (epoch, number)
        last = min((number + 1) * size, self._schedule.steps(first))
        cache.drawn = drawn = self._draw_steps((epoch, number), range(number * size, last), first)
        return drawn, item

    def _draw_steps(self, block: tuple[int, int], steps: range, first: int) -> _Drawn:
        """Draw the bins of this shard for some steps of one epoch, counted from row `first`."""
        rows, held = self._schedule.rows_of(steps, first)
        epoch = replace(self._first, key=seed_from_components(self.seed, block[0]))
        bins, planned = epoch.bins_and_lengths(rows)
        firsts = [0, *np.cumsum(held).tolist()]
        last = len(bins) if len(steps) == 1 and len(bins) < _BLOCK_ROWS else firsts[-2]
        self._cache.prefetch.ask(bins, last, epoch, int(rows.max(initial=0)))
        return _Drawn(block, bins, planned, firsts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = _Cache(Prefetch(self.sequences, self.zones))

    def __repr__(self) -> str:
        """Say what determines the items; Grain compares this when it restores a checkpoint.

        Time: that of `SequencePools.digest`, once.
        """
        facts: dict[str, Any] = {"plan": self._digest, "pools": self.pools.digest()}
        names = ("seed", "epochs", "batch_size", "shard", "remainder")
        facts |= {name: getattr(self, name) for name in names}
        facts |= {"start": self._schedule.start, "permutation": PERMUTATION_VERSION}
        facts |= {"features": self.features} | self.settings
        return f"PackedSource({', '.join(f'{name}={value}' for name, value in facts.items())})"


def _row_of(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """Return one row, copied: a view would keep the other rows in memory."""
    return {
        name: _row_of(array, row) if isinstance(array, dict) else array[row].copy()
        for name, array in batch.items()
    }


def _capacities(caller: str, plan: PackingPlan | VectorPlan, feature: Any) -> Any:
    """Return what `make_features` takes as `max_seq_len`."""
    if isinstance(feature, str) and not isinstance(plan, VectorPlan):
        return plan.max_seq_len
    limits = plan.max_seq_len if isinstance(plan, VectorPlan) else (plan.max_seq_len,)
    names = (feature,) if isinstance(feature, str) else feature
    if len(names) != len(limits):
        problem = f"the plan has {len(limits)} capacities, feature = {feature!r}"
        fail(caller, problem, "name the feature of each capacity, in the order of the plan")
    return dict(zip(names, limits, strict=True))
