"""Grain: an operation of a `DataLoader` that packs records as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np

from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.streaming import StreamPacker, StreamSettings, check_policy
from seqpack_jax.planning.over_length import OverLength, OverLengthReport, as_policy

__all__ = ["PackOperation"]

_LOG = logging.getLogger(__name__)


class PackOperation:
    """A `grain.python.Operation` that packs the records of a `grain.DataLoader` as they come.

    Each batch holds the next records of the stream, as many as best fit decreasing places in
    `batch_size` rows; the last one may have empty rows.  What a batch holds is as in a
    `PackedSource`; `ids` are indices of records in the stream (`metadata.index`).  Rows stand in
    the order in which best fit opened them, those of the longest sequences first.

    Records without tokens are skipped, and counted.  Records over a capacity follow the over-length
    policy.  With `"split"` the pieces of a record share a batch, which therefore ends between
    records.  What was skipped and touched is logged at the end of the stream, at level INFO.

    Resuming is exact at any step, with any number of workers: Grain stores the position of the
    reader only, which is ahead of the packer, so the reader's `get_state` is made to answer with
    the position of the first record that is not in a batch yet.  Hence one batch per group:
    `PackIterDataset` packs several batches together, with less padding.

    The operation itself keeps no state: it serves any number of passes, at the same time too.

    Args:
        max_seq_len: tokens per row; or `{feature: tokens per row}` for features of different
            lengths, where a row must hold all of each record.
        batch_size: rows per batch.
        feature: which entry of a record has the capacity, if `max_seq_len` is one number.
        pad_value: the number on padding, or `{feature: number}`.
        over_length: an `OverLength`, or the name of its action.  With several capacities, each
            feature that is over its own is cut by itself, and there is no `"crop"` or `"split"`.
        seed: with the index of a record in the stream (`metadata.index`) it selects the window of
            `"crop"`; in a later epoch of the sampler the index, and so the window, is another.
        features: the entries of a record that are packed beside those with a capacity; None for all
            that hold numbers, so that names and other text are left out.
        max_segments: the most segments in a row, and the width of metadata.
        multiple_of: every segment starts at a multiple of it.
        meta_features: arrays that come once per sequence.
        metadata: add `segment_lengths`, `ids` and `row_valid` to batches.
        key_style: how the arrays of a batch are called (`help("seqpack_jax.feeding.key_styles")`).

    Raises:
        SeqpackError: an argument is out of range; when iterating, a record cannot be packed, is
            over a capacity without a policy, or has more pieces than a batch has rows.

    Example:
        >>> import grain
        >>> import numpy as np
        >>> records = [{"tokens": np.full(n, n)} for n in (5, 3, 4, 4, 6)]
        >>> loader = grain.DataLoader(
        ...     data_source=records,
        ...     sampler=grain.samplers.SequentialSampler(len(records)),
        ...     operations=[PackOperation(max_seq_len=8, batch_size=2)],
        ... )
        >>> [batch["tokens"][:, [0, -1]].tolist() for batch in loader]
        [[[5, 3], [4, 4]], [[6, 0], [0, 0]]]
    """

    def __init__(
        self,
        max_seq_len: int | Mapping[str, int],
        batch_size: int,
        feature: str = "tokens",
        *,
        pad_value: float | Mapping[str, float] = 0,
        over_length: str | OverLength = "error",
        seed: int = 0,
        features: Iterable[str] | None = None,
        max_segments: int | None = None,
        multiple_of: int = 1,
        meta_features: Iterable[str] = (),
        metadata: bool = False,
        key_style: str = "default",
    ) -> None:
        caller = "PackOperation"
        described = make_features(
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
        batch_size = check_int(caller, "batch_size", batch_size, 1)
        policy = as_policy(caller, over_length)
        check_policy(caller, policy, described.capacities)
        if isinstance(features, str):
            fail(caller, f"features = {features!r}", "pass a tuple of names")
        self.features = None if features is None else (*described.names, *features)
        self.settings = StreamSettings(
            caller,
            described,
            batch_size,
            batch_size,
            policy,
            check_int(caller, "seed", seed),
            False,
            described.max_segments,
            (described.multiple_of,) * len(described.capacities),
        )

    def __call__(self, input_iterator: Iterator[Any]) -> Iterator[Any]:
        """Return an iterator over packed records; the operation itself keeps no state."""
        return _OperationIterator(input_iterator, self.settings, self.features)

    def __repr__(self) -> str:
        return f"PackOperation({self.settings}, features={self.features})"


class _OperationIterator:
    """One pass over the records of a Grain iterator, packed into batches.

    It also answers for the position of `parent`, which reads ahead: whoever asks `parent` for its
    state gets the one before the first record that is not in a batch yet.

    Args:
        parent: an iterator over `grain.Record`s, with `get_state` and `set_state` inside a loader.
        settings: what becomes of them.
        features: which entries of a record are packed, None for all that hold numbers.
    """

    def __init__(
        self, parent: Any, settings: StreamSettings, features: tuple[str, ...] | None
    ) -> None:
        self._parent, self._settings, self._features = parent, settings, features
        self._start_over()
        # A plain iterator, outside of a loader, has no state to answer for.
        self._reader_state: Callable[[], Any] = getattr(parent, "get_state", lambda: None)
        if hasattr(parent, "set_state"):
            self._set_reader_state = parent.set_state
            parent.get_state, parent.set_state = self._get_state, self._set_state

    def _start_over(self) -> None:
        self._packer = StreamPacker(self._settings)
        # Of each segment that waits: the state before its record, and the metadata of that.
        self._before: list[tuple[Any, Any]] = []
        self._pending: tuple[Any, Any] | None = None  # a record that raised, and the state before
        self._ended = self._said = False

    @property
    def report(self) -> OverLengthReport:
        """What the over-length policy touched since the start, or the last `set_state`."""
        return self._packer.report

    @property
    def empty_records(self) -> int:
        """How many records without tokens were skipped since the start or `set_state`."""
        return self._packer.counts[0]

    def _get_state(self) -> Any:
        if self._before:
            return deepcopy(self._before[0][0])
        return deepcopy(self._pending[0] if self._pending else self._reader_state())

    def _set_state(self, state: Any) -> None:
        self._start_over()
        self._set_reader_state(state)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._read()
        group = self._packer.take_group(0)
        if not group.rows:
            self._say_counts()
            raise StopIteration
        rows = self._settings.rows
        batch = group.fill(self._settings, 0, rows, rows)
        size = len(group.ids)
        metadata = self._before[size - 1][1]
        self._packer.drop(size)  # only now: an error above loses nothing
        del self._before[:size]
        return replace(self._last, metadata=metadata.remove_record_key(), data=batch)

    def _read(self) -> None:
        """Read on until more records wait than a batch can hold, or the stream ends."""
        packer, before = self._packer, self._before
        while not packer.full and not self._ended:
            if self._pending is None:
                state = deepcopy(self._reader_state())  # it may be one that lives on
                try:
                    self._pending = state, next(self._parent)
                except StopIteration:
                    self._ended = True
                    return
            state, record = self._pending
            packer.add(_chosen(record.data, self._features), record.metadata.index)
            before += [(state, record.metadata)] * (len(packer.ids) - len(before))
            self._last, self._pending = record, None

    def _say_counts(self) -> None:
        if not self._said and any(self._packer.counts):
            empty = self.empty_records
            _LOG.info("PackOperation: %s empty records skipped, %s", empty, self.report)
        self._said = True


def _chosen(record: Any, features: tuple[str, ...] | None) -> Any:
    """Return the entries of a record that are packed."""
    if type(record) is not dict:
        return record
    if features is not None:
        return {name: record[name] for name in features if name in record}
    return {name: value for name, value in record.items() if not _is_text(value)}


def _is_text(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind not in "biufc"
    return value is None or isinstance(value, str | bytes)
