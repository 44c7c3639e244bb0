"""Grain: a dataset that packs the records of another one as they come."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from copy import deepcopy
from hashlib import blake2b
from typing import Any, NamedTuple

import grain
import numpy as np

from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.streaming import Group, StreamPacker, StreamSettings, check_policy
from seqpack_jax.planning.over_length import OverLength, OverLengthReport, as_policy

__all__ = ["PackIterDataset", "PackIterator", "as_stream"]

_LOG = logging.getLogger(__name__)
_FORMAT, _VERSION = "seqpack_jax.stream", 1
_PLACE = ("settings", "parent", "records", "skip", "counts", "group", "batches")
_GROUP_ROWS = 256  # of a group at least, unless a window says otherwise
_BLOCK_RECORDS = 256  # the parent is asked for its state at most once in so many records
_BLOCK_ROWS = 64  # single rows are filled this many at a time
_NO_RECORD = object()


class PackIterDataset(grain.IterDataset):  # type: ignore[misc]
    """A `grain.IterDataset` that packs the records of its parent as they come, into batches.

    A group of `window` batches takes the longest prefix of the stream that best fit decreasing
    places in its rows.  Its rows are then shuffled, so that long sequences do not come first.  No
    record waits for a later group: a record moves by less than a group from its place in the
    stream, and the order of a curriculum or the shares of a mixture survive at that scale.

    Every batch has the same shape: the last one has empty rows where the stream ends.  What a
    batch holds is as in a `PackedSource`; `ids` are the places of records in the stream.  Records
    without tokens are skipped, and counted, as is what the over-length policy touches; the end of
    the stream logs it, at level INFO.

    Resuming is exact at every step.  The state is JSON: that of the parent where a block of records
    begins, how many records, groups and batches came since, counts, and a digest of the settings.
    Restoring takes the parent's own time, and reading about one group again.

    In worker processes (`mp_prefetch`) each worker packs its own part of the stream, so that
    batches depend on the number of workers.  To pack on top of workers, put this dataset after
    `mp_prefetch`.

    Attributes:
        settings: a `StreamSettings`, all that decides what becomes of the stream.

    Args:
        parent: a `grain.IterDataset` of records; or a `grain.MapDataset`, which is then read with a
            small buffer.
        max_seq_len: tokens per row; or `{feature: tokens per row}` for features of different
            lengths, where a row must hold all of each record.
        batch_size: rows per batch `[batch_size, max_seq_len]`; None for single rows
            `[max_seq_len]`.
        window: batches (or single rows) in a group; None for as many as make 256 rows.  The more
            rows, the less padding, and the further records move.
        seed: of the order of rows, and of the windows of `"crop"`.  Workers and processes of one
            seed shuffle unlike each other, for what they read counts too.
        shuffle: whether the rows of a group are shuffled.
        over_length: an `OverLength`, or the name of its action, for records that are over a
            capacity.  With `"split"`, the pieces of a record stay in one group.  With several
            capacities, each feature that is over its own is cut by itself, and there is no
            `"crop"` or `"split"`.
        feature: which entry of a record has the capacity, if `max_seq_len` is one number.
        max_segments: the most segments in a row, and the width of metadata.
        multiple_of: every segment starts at a multiple of it.
        pad_value: the number on padding, or `{feature: number}`.
        meta_features: arrays that come once per sequence.
        metadata: add `segment_lengths`, `ids` and `row_valid` to batches.
        key_style: how the arrays of a batch are called (`help("seqpack_jax.feeding.key_styles")`).

    Raises:
        SeqpackError: an argument is out of range; when iterating, a record cannot be packed, or is
            over a capacity without a policy.

    Example:
        >>> import numpy as np
        >>> records = [{"tokens": np.full(n, n)} for n in (5, 3, 4, 4, 6)]
        >>> stream = grain.MapDataset.source(records).to_iter_dataset()
        >>> batches = PackIterDataset(stream, max_seq_len=8, batch_size=2, shuffle=False, window=1)
        >>> [batch["tokens"][:, [0, -1]].tolist() for batch in batches]
        [[[5, 3], [4, 4]], [[6, 0], [0, 0]]]
    """

    def __init__(
        self,
        parent: Any,
        max_seq_len: int | Mapping[str, int],
        batch_size: int | None,
        *,
        window: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        over_length: str | OverLength = "error",
        feature: str = "tokens",
        max_segments: int | None = None,
        multiple_of: int = 1,
        pad_value: float | Mapping[str, float] = 0,
        meta_features: Iterable[str] = (),
        metadata: bool = False,
        key_style: str = "default",
    ) -> None:
        caller = "PackIterDataset"
        super().__init__(as_stream(caller, parent))
        features = make_features(
            caller,
            max_seq_len,
            feature=feature,
            max_segments=max_segments,
            multiple_of=multiple_of,
            pad_value=pad_value,
            meta_features=meta_features,
            metadata=metadata,
            key_style=key_style,
        )
        if batch_size is not None:
            batch_size = check_int(caller, "batch_size", batch_size, 1)
        if window is None:
            window = -(-_GROUP_ROWS // (batch_size or 1))
        policy = as_policy(caller, over_length)
        check_policy(caller, policy, features.capacities)
        self.settings = StreamSettings(
            caller,
            features,
            check_int(caller, "window", window, 1) * (batch_size or 1),
            batch_size,
            policy,
            check_int(caller, "seed", seed),
            bool(shuffle),
            features.max_segments,
            (features.multiple_of,) * len(features.capacities),
        )

    def __iter__(self) -> PackIterator:
        """Return an iterator from the start of the stream; it shares nothing with others."""
        return PackIterator(iter(self._parent), self.settings)

    def __str__(self) -> str:
        return f"{self.settings.caller}({self.settings})"


def as_stream(caller: str, parent: Any) -> Any:
    """Return a dataset as an `IterDataset`."""
    if isinstance(parent, grain.MapDataset):
        return parent.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    if not isinstance(parent, grain.IterDataset):
        problem = f"parent is a {type(parent).__name__}, not a grain.IterDataset"
        fail(caller, problem, "pass grain.MapDataset.source(records).to_iter_dataset()")
    return parent


class _Mark(NamedTuple):
    """Where a block of records begins."""

    state: Any  # of the parent
    records: int  # before it
    counts: tuple[int, ...]  # of the packer


class PackIterator(grain.DatasetIterator):  # type: ignore[misc]
    """One pass over a stream: what iterating a `PackIterDataset` returns.

    It reads records, in blocks, until they are more than a group holds.  Where a block begins it
    asks the parent for its state, once; to come back to a record inside, it reads the block again.

    Args:
        parent: the iterator of the records.
        settings: what becomes of them.
    """

    def __init__(self, parent: Any, settings: StreamSettings) -> None:
        super().__init__(parent)
        self._settings = settings
        self._digest = blake2b(repr(settings).encode(), digest_size=8).hexdigest()
        self._start(StreamPacker(settings))

    def _start(self, packer: StreamPacker) -> None:
        self._packer = packer
        self._marks: list[_Mark] = []
        self._records = 0  # read so far, with those that wait
        self._skip_to = 0  # the records before this one were in groups that are given
        self._pending = _NO_RECORD  # a record that raised an error: it is not skipped
        self._ended = self._said = False
        self._group: Group | None = None
        self._number = 0  # of the group
        self._given = 0  # batches of it
        self._block: dict[str, Any] = {}  # single rows that are filled, from row:
        self._block_start = -1

    @property
    def report(self) -> OverLengthReport:
        """What the over-length policy touched in all records read, before a restore too."""
        return self._packer.report

    @property
    def empty_records(self) -> int:
        """How many records without tokens were skipped, before a restore too."""
        return self._packer.counts[0]

    def __next__(self) -> dict[str, Any]:
        group = self._group or self._next_group()
        rows, size = len(group.rows), self._settings.batch_size
        number = rows if size is None else -(-rows // size)
        if self._given >= number:
            problem = f"the state is {self._given} batches into a group of {number}"
            fail(self._settings.caller, problem, "restore it over the records that it was saved on")
        item = self._fill(group, self._given, size)
        self._given += 1
        if self._given == number:
            self._packer.drop(len(group.ids))
            self._group, self._number, self._given = None, self._number + 1, 0
            self._block, self._block_start = {}, -1
        return item

    def _fill(self, group: Group, place: int, size: int | None) -> dict[str, Any]:
        """Return the batch, or the single row, at a place of the group."""
        if size is not None:
            return group.fill(self._settings, place * size, (place + 1) * size, size)
        start = place - place % _BLOCK_ROWS
        if start != self._block_start:
            stop = min(start + _BLOCK_ROWS, len(group.rows))
            self._block = group.fill(self._settings, start, stop, stop - start)
            self._block_start = start
        return _row(self._block, place - start)

    def _next_group(self) -> Group:
        self._read()
        group = self._packer.take_group(self._number)
        if not group.rows:
            self._say_counts()
            raise StopIteration
        while len(self._marks) > 1 and self._marks[1].records <= group.ids[0]:
            del self._marks[0]
        self._group = group
        return group

    def _read(self) -> None:
        """Read on until more records wait than a group holds, or the stream ends."""
        packer = self._packer
        if self._records < self._skip_to:
            self._add_records(self._skip_to, skipping=True)
            if self._records < self._skip_to:
                fail(
                    self._settings.caller,
                    f"the stream ended after {self._records} records, but the state is "
                    f"{self._skip_to} records into it",
                    "restore it over the records that it was saved on",
                )
            packer.drop(len(packer.ids))
        while not (packer.full or self._ended):
            if self._pending is _NO_RECORD:
                self._mark()
            self._add_records(self._records + _BLOCK_RECORDS)

    def _add_records(self, stop: int, *, skipping: bool = False) -> None:
        """Add records to the packer until `stop` are read, it is full, or the stream ends."""
        packer, parent, record = self._packer, self._parent, self._pending
        try:
            while self._records < stop and (skipping or not packer.full):
                if record is _NO_RECORD:
                    record = next(parent)
                packer.add(record, self._records)
                record = _NO_RECORD
                self._records += 1
        except StopIteration:
            self._ended = True
        finally:
            self._pending = record

    def _mark(self) -> None:
        if not self._marks or self._marks[-1].records < self._records:
            state = deepcopy(self._parent.get_state())  # it may be one that lives on
            self._marks.append(_Mark(state, self._records, tuple(self._packer.counts)))

    def get_state(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON."""
        if not self._marks:
            self._mark()
        first = self._records  # of those that no whole group has taken
        if first < self._skip_to:
            first = self._skip_to
        elif self._packer.ids:
            first = self._packer.ids[0]
        mark = next(mark for mark in reversed(self._marks) if mark.records <= first)
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self._digest,
            "parent": deepcopy(mark.state),
            "records": mark.records,
            "skip": first - mark.records,
            "counts": list(mark.counts),
            "group": self._number,
            "batches": self._given,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where a stream of the same settings stood.

        Raises:
            SeqpackError: the state is of another format, not whole, or of other settings.
        """
        caller = self._settings.caller
        form = (state.get("format"), state.get("version")) if isinstance(state, dict) else None
        if form != (_FORMAT, _VERSION):
            problem = f"the state has the format {form}, expected {(_FORMAT, _VERSION)}"
            fail(caller, problem, "pass what get_state of such an iterator returned")
        lacking = [name for name in _PLACE if name not in state]
        if lacking:
            fail(caller, f"the state has no {lacking[0]!r}", "pass all that get_state returned")
        if state["settings"] != self._digest:
            fail(
                caller,
                f"the state is of a packer with settings {state['settings']}, but this one has "
                f"{self._digest}: {self._settings}",
                "restore it with the arguments that it was saved with",
            )
        self._parent.set_state(deepcopy(state["parent"]))  # it may go on to change what it gets
        self._start(StreamPacker(self._settings, state["counts"]))
        self._records = state["records"]
        self._skip_to = self._records + state["skip"]
        self._marks = [_Mark(deepcopy(state["parent"]), self._records, tuple(state["counts"]))]
        self._number, self._given = state["group"], state["batches"]

    def _say_counts(self) -> None:
        if not self._said and any(self._packer.counts):
            caller, empty = self._settings.caller, self.empty_records
            _LOG.info("%s: %s empty records skipped, %s", caller, empty, self.report)
        self._said = True


def _row(block: dict[str, Any], place: int) -> dict[str, Any]:
    """Return one row of a batch as copies, so that holding it holds nothing else."""
    row: dict[str, Any] = {}
    for name, values in block.items():
        if isinstance(values, dict):
            row[name] = _row(values, place)
        else:
            row[name] = np.array(values[place]) if isinstance(values, np.ndarray) else values[place]
    return row
