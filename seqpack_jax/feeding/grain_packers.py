"""Grain's packing datasets, by their names and arguments, on the packer of this library.

Changing over is one import: `from seqpack_jax import BestFitPackIterDataset`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.features import Features, make_features
from seqpack_jax.feeding.layout import Layout, as_numbers, fill_once, lay_out, round_up
from seqpack_jax.feeding.stream_dataset import PackIterator, as_stream
from seqpack_jax.feeding.streaming import StreamSettings
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.over_length import REFUSE

__all__ = ["BestFitPackIterDataset", "FirstFitPackIterDataset"]


@dataclass(frozen=True)
class _GrainFeatures(Features):
    """What Grain packs of a record, and how: each feature for itself, in its own dtype.

    Attributes:
        multiples: what segments of each feature start at a multiple of.
        without_ids: the features that get no segment ids and positions.
        kept: the entries of a record that come once per sequence.
    """

    multiples: tuple[int, ...]
    without_ids: tuple[str, ...]
    kept: tuple[str, ...]

    def read(self, caller: str, what: str, record: Any) -> dict[str, Any]:
        if not isinstance(record, Mapping):
            fail(caller, f"{what} is a {type(record).__name__}", "pack dicts of features")
        entry = {}
        for name in self.capacities:
            value = record.get(name)
            if value is None:
                hint = "name entries of the records in length_struct"
                fail(caller, f"{what} has no feature {name!r}", hint)
            if type(value) is not np.ndarray or value.ndim == 0 or value.dtype.kind not in "biufc":
                value = np.atleast_1d(as_numbers(caller, f"feature {name!r} of {what}", value))
            entry[name] = value
        for name in self.kept:
            if name in record:
                entry[name] = record[name]
        return entry

    def pack(
        self,
        caller: str,
        columns: Mapping[str, Sequence[Any]],
        offsets: Int64,
        rows: int,
        **_: Any,
    ) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        layouts: dict[tuple[int, int], list[Layout]] = {}
        extra: dict[str, NDArray[Any]] = {}
        for (name, capacity), multiple in zip(self.capacities.items(), self.multiples, strict=True):
            arrays = columns[name]
            lengths = np.array(list(map(len, arrays)), np.int64)
            # Features of equal lengths, as inputs and targets mostly are, lie alike.
            alike = layouts.setdefault((capacity, multiple), [])
            layout = next((each for each in alike if (each.lengths == lengths).all()), None)
            if layout is None:
                # What follows the last segment of a row may reach beyond the row.
                wide = round_up(capacity, multiple)
                layout = lay_out(caller, lengths, offsets, rows, wide, multiple_of=multiple)
                alike.append(layout)
            pad = self.pad_value.get(name, 0)
            batch[name] = layout.fill(caller, name, arrays, pad, as_int32=False)[:, :capacity]
            if name not in self.without_ids:
                extra[f"{name}_segment_ids"] = layout.segment_ids[:, :capacity]
                extra[f"{name}_positions"] = layout.positions[:, :capacity]
        for name in self.kept:
            if name in columns:
                batch[name] = self._once(caller, name, columns[name], offsets, rows)
        return batch | extra

    def _once(
        self, caller: str, name: str, values: Sequence[Any], offsets: Int64, rows: int
    ) -> Any:
        if self.max_segments is None:
            return [list(values[a:b]) for a, b in pairwise(offsets.tolist())]
        arrays = [as_numbers(caller, f"feature {name!r}", value) for value in values]
        return fill_once(caller, name, arrays, np.diff(offsets), (rows, self.max_segments))


class FirstFitPackIterDataset(grain.IterDataset):  # type: ignore[misc]
    """Grain's `FirstFitPackIterDataset`, on the packer of `PackIterDataset`.

    The arguments, and the keys, dtypes and shapes of its items, are those of
    `grain.experimental.FirstFitPackIterDataset` (of Grain 0.2.18; it works with older ones too):
    single rows, each a dict of every feature `X` in `length_struct` as `X`, `X_segment_ids` and
    `X_positions`, `[length]`.  Which sequences share a row is another thing: `num_packing_bins`
    rows take the longest prefix of the stream that best fit decreasing places in them.

    Other than in Grain:

    - An entry in `meta_features` that is not in `length_struct` comes as an array
      `[max_sequences_per_bin, ...]` with zeros where no sequence is, which `batch` can stack.
      Without `max_sequences_per_bin` it is a list per row, as in Grain, and `batch` cannot.
    - Records of which all features are empty are skipped and use no segment id.
    - A feature that changes its dtype, from one record to another, is an error.  Grain casts it.
    - Checkpoints of the one do not restore the other.

    Args:
        parent: a `grain.IterDataset`, or a `grain.MapDataset`, of dicts.
        length_struct: tokens per row of each feature that is packed; others are left out.
        num_packing_bins: rows that are packed together.
        seed: of the order of rows.
        shuffle_bins: whether rows that were packed together are shuffled.
        shuffle_bins_group_by_feature: order them by the mean of the distinct values of this feature
            other than 0, after shuffling.
        meta_features: features without segment ids and positions.
        pack_alignment_struct: per feature, what every segment starts at a multiple of.
        padding_struct: per feature, the number on padding.
        max_sequences_per_bin: the most sequences in a row.

    Raises:
        SeqpackError: an argument is out of range; when iterating, a record is longer than its row,
            or lacks a feature.

    Example:
        >>> records = [{"x": np.full(n, n)} for n in (5, 3, 4, 4)]
        >>> rows = FirstFitPackIterDataset(
        ...     grain.MapDataset.source(records),
        ...     length_struct={"x": 8},
        ...     num_packing_bins=2,
        ...     shuffle_bins=False,
        ... )
        >>> [row["x"].tolist() for row in rows]
        [[5, 5, 5, 5, 5, 3, 3, 3], [4, 4, 4, 4, 4, 4, 4, 4]]
        >>> next(iter(rows)).keys()
        dict_keys(['x', 'x_segment_ids', 'x_positions'])
    """

    def __init__(
        self,
        parent: Any,
        *,
        length_struct: Mapping[str, int],
        num_packing_bins: int,
        seed: int = 0,
        shuffle_bins: bool = True,
        shuffle_bins_group_by_feature: str | None = None,
        meta_features: Sequence[str] = (),
        pack_alignment_struct: Mapping[str, int] | None = None,
        padding_struct: Mapping[str, Any] | None = None,
        max_sequences_per_bin: int | None = None,
    ) -> None:
        caller = type(self).__name__
        super().__init__(as_stream(caller, parent))
        if not isinstance(length_struct, Mapping):
            problem = f"length_struct is a {type(length_struct).__name__}"
            fail(caller, problem, "pass {feature: tokens per row}")
        features = _features(
            caller,
            length_struct,
            meta_features,
            pack_alignment_struct or {},
            padding_struct or {},
            max_sequences_per_bin,
        )
        group_by = shuffle_bins_group_by_feature if shuffle_bins else None
        if group_by is not None and group_by not in (*features.names, *features.kept):
            problem = f"shuffle_bins_group_by_feature = {group_by!r} is not packed"
            fail(caller, problem, f"choose one of {', '.join((*features.names, *features.kept))}")
        self.settings = StreamSettings(
            caller,
            features,
            check_int(caller, "num_packing_bins", num_packing_bins, 1),
            None,
            REFUSE,
            check_int(caller, "seed", seed),
            bool(shuffle_bins),
            features.max_segments,
            features.multiples,
            group_by,
        )

    def __iter__(self) -> PackIterator:
        """Return an iterator from the start of the stream; it shares nothing with others."""
        return PackIterator(iter(self._parent), self.settings)

    def __str__(self) -> str:
        return f"{self.settings.caller}({self.settings})"


class BestFitPackIterDataset(FirstFitPackIterDataset):
    """Grain's `BestFitPackIterDataset`: the same as `FirstFitPackIterDataset` here.

    Args:
        parent: as in `FirstFitPackIterDataset`, like all arguments.
        length_struct: see there.
        num_packing_bins: see there.
        seed: see there.
        shuffle_bins: see there.
        shuffle_bins_group_by_feature: see there.
        meta_features: see there.
        pack_alignment_struct: see there.
        padding_struct: see there.
        max_sequences_per_bin: see there.

    Raises:
        SeqpackError: as `FirstFitPackIterDataset`.

    Example:
        >>> records = grain.MapDataset.source([{"x": np.full(n, n)} for n in (2, 3, 1)])
        >>> rows = BestFitPackIterDataset(records, length_struct={"x": 4}, num_packing_bins=2)
        >>> sorted(row["x"].tolist() for row in rows)
        [[2, 2, 0, 0], [3, 3, 3, 1]]
    """


def _features(
    caller: str,
    length_struct: Mapping[str, int],
    meta_features: Iterable[str],
    alignment: Mapping[str, int],
    padding: Mapping[str, Any],
    max_segments: int | None,
) -> _GrainFeatures:
    if isinstance(meta_features, str):
        fail(caller, f"meta_features = {meta_features!r}", "pass a tuple of names")
    pads = {name: pad for name, pad in padding.items() if pad is not None}
    for what, given in (("pack_alignment_struct", alignment), ("padding_struct", pads)):
        unknown = [name for name in given if name not in length_struct]
        if unknown:
            problem = f"{what} names {unknown[0]!r}, which is not in length_struct"
            fail(caller, problem, f"choose from {', '.join(length_struct)}")
    described = make_features(caller, length_struct, pad_value=pads, max_segments=max_segments)
    multiples = tuple(
        check_int(caller, f"pack_alignment_struct[{name!r}]", alignment.get(name, 1), 1)
        for name in length_struct
    )
    once = tuple(meta_features)
    kept = tuple(name for name in once if name not in length_struct)
    return _GrainFeatures(**vars(described), multiples=multiples, without_ids=once, kept=kept)
