"""What a record is: which of its features share rows, which come once per sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import MAX_LENGTH, check_choice, check_int, fail
from seqpack_jax.feeding.key_styles import KEY_STYLES, PackedFeatures, fail_at_name, in_style
from seqpack_jax.feeding.layout import (
    Layout,
    as_numbers,
    check_pads,
    entries_of,
    fill_once,
    flatten_into,
    lay_out,
    round_up,
)
from seqpack_jax.planning.histogram import Int64

__all__ = ["Features", "make_features"]

_LIST_IT = "list it in max_seq_len={feature: capacity} or in meta_features"


@dataclass(frozen=True)
class Features:
    """What is packed of a record, and how; made by `make_features`.

    Its repr is stable: it says all that decides how a batch looks.

    Attributes:
        capacities: tokens per row of each feature that has a capacity, in the order given.
        tokens_only: whether the one feature with a capacity must be 1-D integers.
        max_segments: the most segments in a row, and the width of metadata; None for no cap.
        multiple_of: every segment starts at a multiple of it.
        pad_value: what stands on padding, by feature; 0 in features that are not in it.
        meta_features: arrays that come once per sequence.
        metadata: whether batches have `segment_lengths`, `ids` and `row_valid`.
        key_style: how the arrays of a batch are called (see `feeding.key_styles`).
    """

    capacities: dict[str, int]
    tokens_only: bool
    max_segments: int | None
    multiple_of: int
    pad_value: dict[str, float]
    meta_features: tuple[str, ...]
    metadata: bool
    key_style: str

    @property
    def names(self) -> tuple[str, ...]:
        """The features with a capacity, in the order given."""
        return tuple(self.capacities)

    @property
    def single(self) -> bool:
        """Whether there is one capacity, so that all features with tokens share their rows."""
        return len(self.capacities) == 1

    def planned(self, lengths: Any) -> Any:
        """Return lengths, an int or integers of any shape, as they count in a row."""
        return lengths if self.multiple_of == 1 else round_up(lengths, self.multiple_of)

    def read(self, caller: str, what: str, record: Any) -> dict[str, NDArray[Any]]:
        """Check one record, and return its features as arrays, by name; nested ones as "a/b".

        Time: O(features); a microsecond or two.

        Args:
            caller: the public function that an error shall name.
            what: names the record in errors, say "record 7".
            record: a 1-D array of integers, which is the one feature with a capacity; or features
                by name: a dict, tuple or NamedTuple, or such in each other.

        Raises:
            SeqpackError: a feature is missing, has another length than the features that it shares
                rows with, belongs to no capacity, or is not of numbers.

        Example:
            >>> features = make_features("f", 8)
            >>> features.read("f", "record 0", {"tokens": [5, 6], "loss_mask": [False, True]})
            {'tokens': array([5, 6]), 'loss_mask': array([False,  True])}
        """
        items = record if type(record) is dict else self._as_dict(caller, what, record)
        flat: dict[str, NDArray[Any]] = {}
        for name, value in items.items():
            fast = type(value) is np.ndarray and type(name) is str
            if fast and value.dtype.kind in "biufc" and "/" not in name:
                flat[name] = value
            else:
                flatten_into(flat, caller, what, {name: value})
        self._check(caller, what, flat)
        return flat

    def _as_dict(self, caller: str, what: str, record: Any) -> Mapping[Any, Any]:
        entries = entries_of(record)
        if entries is not None:
            return entries
        array = as_numbers(caller, what, record)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            problem = f"{what} has shape {array.shape} and dtype {array.dtype}"
            fail(caller, problem, "pack 1-D arrays of integers, or dicts of features")
        if not self.single:
            problem = f"{what} is one array, but {', '.join(self.names)} have capacities"
            fail(caller, problem, "pass records as dicts of features")
        return {self.names[0]: array}

    def _check(self, caller: str, what: str, flat: dict[str, NDArray[Any]]) -> None:
        """Raise unless each feature has tokens of a capacity, or comes once per sequence."""
        capacities, meta_features = self.capacities, self.meta_features
        for name in capacities:
            array = flat.get(name)
            if array is None or array.ndim == 0:
                self._fail_at_capacity(caller, what, flat, name)
            if self.tokens_only and (array.ndim != 1 or array.dtype.kind not in "iu"):
                if array.ndim != 1 or array.size:
                    self._fail_at_capacity(caller, what, flat, name)
                flat[name] = array.astype(np.int64)  # nothing has no dtype: np.array([])
        if len(flat) == len(capacities):
            return
        single = len(capacities) == 1
        shared = len(flat[next(iter(capacities))]) if single else -1
        for name, array in flat.items():
            if name in capacities:
                continue
            if array.ndim == 0 or name in meta_features:
                if self.max_segments is None:
                    problem = f"feature {name!r} of {what} comes once per sequence"
                    hint = "pass max_segments, the width of its array [B, max_segments]"
                    fail(caller, f"{problem}, but max_segments is None", hint)
            elif len(array) != shared:
                but = f"but {self.names[0]!r} has {shared}" if single else "and no capacity"
                problem = f"feature {name!r} of {what} has {len(array)} entries, {but}"
                fail(caller, problem, _LIST_IT)

    def _fail_at_capacity(
        self, caller: str, what: str, flat: Mapping[str, NDArray[Any]], name: str
    ) -> NoReturn:
        if name not in flat:
            hint = "name the entry of the records that holds their tokens: feature=..."
            if not self.tokens_only:
                hint = "name features of the records in max_seq_len={feature: capacity}"
            fail(caller, f"{what} has no feature {name!r}", hint)
        array = flat[name]
        problem = f"feature {name!r} of {what} has shape {array.shape} and dtype {array.dtype}"
        hint = "pack 1-D arrays of integers; say max_seq_len={feature: capacity} for other arrays"
        if array.ndim == 0:
            hint = "a feature with a capacity has an axis of tokens"
        fail(caller, problem, hint)

    def lengths(self, record: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
        """Return how many tokens a record that was `read` has of each capacity, in order."""
        return tuple([len(record[name]) for name in self.capacities])

    def is_metadata(self, name: str, array: NDArray[Any]) -> bool:
        """Tell whether a feature that was `read` comes once per sequence."""
        return name not in self.capacities and (array.ndim == 0 or name in self.meta_features)

    def window(
        self, record: Mapping[str, NDArray[Any]], starts: Sequence[int], stops: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """Return a record that was `read`, cut to tokens `[start, stop)` of each capacity: views.

        Features that share rows are cut alike; what comes once per sequence stays whole.

        Example:
            >>> features = make_features("f", 8, max_segments=2)
            >>> record = features.read("f", "record 0", {"tokens": np.arange(5), "weight": 0.5})
            >>> features.window(record, (1,), (3,))
            {'tokens': array([1, 2]), 'weight': array(0.5)}
        """
        if self.single:
            cut = slice(starts[0], stops[0])
            return {
                name: array if self.is_metadata(name, array) else array[cut]
                for name, array in record.items()
            }
        cuts = dict(zip(self.names, map(slice, starts, stops), strict=True))
        return {name: array[cuts.get(name, ...)] for name, array in record.items()}

    def columns(
        self,
        caller: str,
        records: Sequence[Mapping[str, NDArray[Any]]],
        name_of: Callable[[int], str] = "segment {} of the batch".format,
    ) -> dict[str, list[NDArray[Any]]]:
        """Turn records that were `read` into the columns that `pack` takes.

        Args:
            caller: the public function that an error shall name.
            records: of each segment, row after row.
            name_of: names a record in errors, by its place in `records`.

        Raises:
            SeqpackError: records have different features.
        """
        if not records:
            return {name: [] for name in self.capacities}
        names = records[0].keys()
        for k, record in enumerate(records):
            if record.keys() != names:
                name = sorted(record.keys() ^ names)[0]
                has, lacks = (k, 0) if name in record else (0, k)
                problem = f"{name_of(has)} has a feature {name!r}, {name_of(lacks)} has none"
                fail(caller, problem, "give all records the same features")
        return {name: [record[name] for record in records] for name in names}

    def pack(
        self,
        caller: str,
        columns: Mapping[str, Sequence[NDArray[Any]]],
        offsets: Int64,
        rows: int,
        *,
        ids: Int64 | None = None,
        first_positions: Int64 | None = None,
        like: Mapping[str, NDArray[Any]] | None = None,
    ) -> dict[str, Any]:
        """Lay out segments in rows, and return the batch by name, in its key style.

        Time: O(rows * max_seq_len) per feature, a copy of the tokens and about 1 us per segment.

        Args:
            caller: the public function that an error shall name.
            columns: of every feature, the arrays of all segments, row after row.
            offsets: int64 `[b + 1]`; bin, and row, `i` holds segments `offsets[i]:offsets[i + 1]`.
            rows: at least `b`; those beyond are empty.
            ids: int64 `[k]`, of the sequence of each segment, if known.
            first_positions: int64 `[k]`, the position of the first token of each segment, for a
                single capacity; None for 0.
            like: a record that was `read`, of which a batch without any segments takes the
                features, and one without any tokens of a feature its dtype and shape.  Without it
                a batch without segments has the features with a capacity, as int32.

        Raises:
            SeqpackError: a bin holds more than its row or `max_segments`, a feature has several
                dtypes, an integer is beyond int32, or a pad value is for a feature without padding.

        Example:
            >>> features = make_features("f", 4)
            >>> columns = {"tokens": [np.array([7, 8]), np.array([9])]}
            >>> batch = features.pack("f", columns, np.array([0, 2]), rows=1)
            >>> {name: array.tolist() for name, array in batch.items()}
            {'tokens': [[7, 8, 9, 0]], 'segment_ids': [[1, 1, 2, 0]], 'positions': [[0, 1, 0, 0]]}
        """
        packed = self.pack_features(
            caller, columns, offsets, rows, ids=ids, first_positions=first_positions, like=like
        )
        return in_style(caller, self.key_style, packed)

    def pack_features(
        self,
        caller: str,
        columns: Mapping[str, Sequence[NDArray[Any]]],
        offsets: Int64,
        rows: int,
        *,
        ids: Int64 | None = None,
        first_positions: Int64 | None = None,
        like: Mapping[str, NDArray[Any]] | None = None,
    ) -> PackedFeatures:
        """Lay out segments as `pack` does, and return what is in the batch in no style yet."""
        sizes = np.diff(offsets)
        if self.max_segments is not None and int(sizes.max(initial=0)) > self.max_segments:
            row = int(sizes.argmax())
            problem = f"bin {row} holds {sizes[row]} segments of {self.max_segments}"
            fail(caller, problem, "plan with max_segments, or raise it")
        layouts = {
            name: lay_out(
                caller,
                np.array(list(map(len, columns[name])), np.int64),
                offsets,
                rows,
                capacity,
                multiple_of=self.multiple_of,
                first_positions=first_positions,
            )
            for name, capacity in self.capacities.items()
        }
        tokens: dict[str, NDArray[Any]] = {}
        once: dict[str, NDArray[Any]] = {}
        layout_of: dict[str, str] = {}
        lead = self.names[0]
        shape = (rows, self.max_segments or 0)  # `read` saw to it that there is a width
        if len(columns[lead]):
            samples = {name: arrays[0] for name, arrays in columns.items()}
        else:
            nothing = dict.fromkeys(self.names, np.zeros(0, np.int32))
            samples, columns = dict(like or nothing), {}
        for name, like_this in samples.items():
            arrays = columns.get(name, ())
            if self.is_metadata(name, like_this):
                once[name] = fill_once(caller, name, arrays, sizes, shape, like=like_this)
                continue
            layout_of[name] = name if name in layouts else lead
            tokens[name] = layouts[layout_of[name]].fill(
                caller,
                name,
                arrays,
                self.pad_value.get(name, 0),
                as_int32=name in layouts,
                like=(like or samples).get(name),
            )
        if self.metadata:
            for name, array in self._metadata(caller, layouts, sizes, shape, ids).items():
                if name in once:
                    fail_at_name(caller, name)
                once[name] = array
        ids_of = {name: layout.segment_ids for name, layout in layouts.items()}
        positions = {name: layout.positions for name, layout in layouts.items()}
        packed = PackedFeatures(tokens, layout_of, ids_of, positions, once)
        packed.check_pads(caller, self.pad_value if columns or like else ())
        return packed

    def _metadata(
        self,
        caller: str,
        layouts: Mapping[str, Layout],
        sizes: Int64,
        shape: tuple[int, int],
        ids: Int64 | None,
    ) -> dict[str, NDArray[Any]]:
        """Return what `metadata=True` adds to a batch."""
        found: dict[str, NDArray[Any]] = {}
        for name, layout in layouts.items():
            key = "segment_lengths" if self.single else f"{name}_segment_lengths"
            found[key] = fill_once(caller, key, layout.lengths.astype(np.int32), sizes, shape)
        if ids is not None:
            found["ids"] = fill_once(caller, "ids", ids, sizes, shape, empty=-1)
        found["row_valid"] = np.zeros(shape[0], np.bool_)
        found["row_valid"][: len(sizes)] = sizes > 0
        return found


def make_features(
    caller: str,
    max_seq_len: int | Mapping[str, int],
    *,
    feature: str = "tokens",
    max_segments: int | None = None,
    multiple_of: int = 1,
    pad_value: float | Mapping[str, float] = 0,
    meta_features: Iterable[str] = (),
    metadata: bool = False,
    key_style: str = "default",
) -> Features:
    """Check what is asked for, and describe how records are packed.

    With one capacity, every array of a record shares the rows of the feature that has it, and must
    be as long.  With several, each feature with tokens has its own, and a row must hold all of
    each.  Values without an axis, and `meta_features`, come once per sequence.

    Integers of a feature with a capacity become int32; every other feature keeps its dtype.

    Args:
        caller: the public function that an error shall name.
        max_seq_len: tokens per row of `feature`, 1-D integers; or of each feature with a capacity,
            which may be any arrays of numbers `[tokens, ...]`.
        feature: which feature has the capacity, if `max_seq_len` is one number.
        max_segments: the most segments in a row, and the width of what comes once per sequence.
        multiple_of: every segment starts at a multiple of it; it divides all capacities.
        pad_value: what stands on padding: a number for the features with a capacity, or numbers by
            feature, any with tokens.  0 (False) in all other features.
        meta_features: arrays of one shape that come once per sequence.
        metadata: add `segment_lengths`, `ids` (where they are known) and `row_valid` to batches.
        key_style: how the arrays of a batch are called; `help("seqpack_jax.feeding.key_styles")`.

    Raises:
        SeqpackError: an argument is out of range, or metadata has no width.
    """
    if isinstance(max_seq_len, Mapping):
        capacities = {}
        for name, capacity in max_seq_len.items():
            what = f"max_seq_len[{_check_name(caller, 'max_seq_len', name)!r}]"
            capacities[name] = check_int(caller, what, capacity, 1, MAX_LENGTH)
        if not capacities:
            fail(caller, "max_seq_len is empty", "give at least one feature its tokens per row")
    else:
        capacity = check_int(caller, "max_seq_len", max_seq_len, 1, MAX_LENGTH)
        capacities = {_check_name(caller, "feature", feature): capacity}
    if isinstance(meta_features, str):
        fail(caller, f"meta_features = {meta_features!r}", "pass a tuple of names")
    once = tuple(_check_name(caller, "meta_features", name) for name in meta_features)
    both = [name for name in once if name in capacities]
    if both:
        hint = "a feature has tokens or comes once per sequence"
        fail(caller, f"feature {both[0]!r} has a capacity and is in meta_features", hint)
    if max_segments is not None:
        max_segments = check_int(caller, "max_segments", max_segments, 1)
    elif once or metadata:
        what = "meta_features" if once else "metadata"
        fail(caller, f"{what} without max_segments", "pass max_segments, the width of its arrays")
    multiple_of = check_int(caller, "multiple_of", multiple_of, 1)
    for name, capacity in capacities.items():
        if capacity % multiple_of:
            problem = f"max_seq_len = {capacity} of {name!r} is no multiple of {multiple_of}"
            fail(caller, problem, "round max_seq_len to a multiple of multiple_of")
    return Features(
        capacities,
        not isinstance(max_seq_len, Mapping),
        max_segments,
        multiple_of,
        check_pads(caller, pad_value, capacities, not isinstance(max_seq_len, Mapping)),
        once,
        bool(metadata),
        check_choice(caller, "key_style", key_style, KEY_STYLES),
    )


def _check_name(caller: str, what: str, name: Any) -> str:
    if not isinstance(name, str) or not name:
        fail(caller, f"{what} names a feature {name!r}", "name features by strings")
    return name
