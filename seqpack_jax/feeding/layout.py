"""Where the segments of some rows lie, and filling rows with arrays that lie so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import part_sums
from seqpack_jax.errors import check_int, fail
from seqpack_jax.planning.histogram import Int64

__all__ = [
    "Layout",
    "as_numbers",
    "check_pads",
    "checked_int32",
    "entries_of",
    "fill_once",
    "flatten_into",
    "lay_out",
    "round_up",
]

_INT32 = np.iinfo(np.int32)
_DTYPE = attrgetter("dtype")
_INTEGER = int | np.integer
_NUMBER = int | float | complex | np.number | np.bool_
_NOTHING = np.zeros(0, np.int32)


class Layout(NamedTuple):
    """Where the segments of `B` rows of `L` tokens lie; it fills any number of features.

    Attributes:
        segment_ids: int32 `[B, L]`, 1, 2, ... in row order, 0 on padding.
        positions: int32 `[B, L]`, from 0 in every segment (or from its first position), 0 on
            padding.
        lengths: int64 `[k]`, the tokens of each segment, row after row.
        ends: the number of segments up to the end of each row, `B` of them.
        room: tokens of padding at the end of each row, `B` of them.
        gaps: tokens of padding behind each segment, `k` of them; None when all are 0.
    """

    segment_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    lengths: Int64
    ends: list[int]
    room: list[int]
    gaps: list[int] | None

    def fill(
        self,
        caller: str,
        name: str,
        arrays: Sequence[NDArray[Any]],
        pad_value: float,
        *,
        as_int32: bool,
        like: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Return the rows of one feature, `[B, L, ...]`.

        Time: O(B * L) in one `np.concatenate`, and a list entry per segment.

        Args:
            caller: the public function that an error shall name.
            name: of the feature, for errors.
            arrays: of each segment, row after row, `[tokens, ...]` of as many tokens as the layout
                has; of one dtype and one trailing shape, save that integers may differ if
                `as_int32`, and that those without tokens may be anything.
            pad_value: what stands on padding.
            as_int32: make integers int32; one beyond int32 is an error.
            like: an array of which dtype and trailing shape are taken if no array has tokens.

        Raises:
            SeqpackError: arrays have other lengths, no common dtype or shape or masked entries, or
                the pad value is none of their dtype.

        Example:
            >>> layout = lay_out("f", np.array([2, 1]), np.array([0, 2]), 1, 4)
            >>> arrays = [np.array([0.5, 1.5]), np.array([2.5])]
            >>> layout.fill("f", "weights", arrays, -1, as_int32=False).tolist()
            [[0.5, 1.5, 2.5, -1.0]]
        """
        rows, max_seq_len = self.segment_ids.shape
        _check_sizes(caller, name, arrays, self.lengths.tolist())
        # Arrays without tokens, such as np.array([]), have no dtype of their own.
        full = [array for array in arrays if len(array)]
        sample = next(iter([*full[:1], *([] if like is None else [like]), *arrays[:1]]), _NOTHING)
        integers = as_int32 and sample.dtype.kind in "iu"
        dtype = np.dtype(np.int32) if integers else _native(sample.dtype)
        if len(set(map(_DTYPE, full))) > 1:
            _check_dtypes(caller, name, arrays, integers)
        shape = (max_seq_len, *sample.shape[1:])
        padding = np.full(shape, _pad(caller, name, pad_value, dtype), dtype)
        if len(full) < len(arrays):
            arrays = [array if len(array) else padding[:0] for array in arrays]
        runs = self._runs(arrays, padding)
        try:
            filled = np.concatenate(runs) if runs else padding[:0]
        except ValueError:
            _fail_at_shape(caller, name, arrays)
        if type(filled) is not np.ndarray:
            filled = as_numbers(caller, f"feature {name!r} of the batch", _with_masks(filled, runs))
        if integers and filled.dtype.kind not in "iu":
            # uint64 and signed integers have no common integer dtype.
            filled = np.concatenate([checked_int32(caller, name, run) for run in runs])
        if integers:
            filled = checked_int32(caller, name, filled)
        return filled.reshape(rows, *shape)

    def _runs(self, arrays: Sequence[NDArray[Any]], padding: NDArray[Any]) -> list[NDArray[Any]]:
        """Return what stands in the rows, one after another: segments, gaps, ends of rows."""
        each, per_segment = arrays, 1
        if self.gaps is not None:
            each, per_segment = [padding] * (2 * len(arrays)), 2
            each[::2] = arrays
            each[1::2] = [padding[:gap] for gap in self.gaps]
        runs: list[NDArray[Any]] = []
        for (begin, end), free in zip(pairwise([0, *self.ends]), self.room, strict=True):
            runs += each[begin * per_segment : end * per_segment]
            runs.append(padding[:free])
        return runs


def lay_out(
    caller: str,
    lengths: Int64,
    offsets: Int64,
    rows: int,
    max_seq_len: int,
    *,
    multiple_of: int = 1,
    first_positions: Int64 | None = None,
) -> Layout:
    """Lay out segments of `lengths`, cut into bins by `offsets`, in `rows` rows.

    Time: O(rows * max_seq_len), in whole arrays.

    Args:
        caller: the public function that an error shall name.
        lengths: int64 `[k]`, tokens of each segment.
        offsets: int64 `[b + 1]`; bin, and row, `i` holds segments `offsets[i]:offsets[i + 1]`.
        rows: at least `b`; those beyond are empty.
        max_seq_len: tokens per row.
        multiple_of: every segment starts at a multiple of it.
        first_positions: int64 `[k]`, the position of the first token of each segment; None for 0.

    Raises:
        SeqpackError: a bin does not fit in its row.

    Example:
        >>> layout = lay_out("f", np.array([3, 1]), np.array([0, 2]), 1, 8, multiple_of=4)
        >>> layout.segment_ids.tolist(), layout.positions.tolist()
        ([[1, 1, 1, 0, 2, 0, 0, 0]], [[0, 1, 2, 0, 0, 0, 0, 0]])
    """
    bins = len(offsets) - 1
    taken = lengths if multiple_of == 1 else round_up(lengths, multiple_of)
    room = np.full(rows, max_seq_len)
    room[:bins] -= part_sums(taken, offsets)
    if bins and int(room.min()) < 0:
        row = int(room.argmin())
        fill = max_seq_len - int(room[row])
        fail(caller, f"bin {row} holds {fill} tokens of {max_seq_len}", "pack the sequences again")
    # A row is a list of runs: its segments, then its padding.
    ends = np.concatenate([offsets[1:], np.full(rows - bins, len(lengths))])
    segment = np.arange(len(lengths)) - np.repeat(offsets[:-1], np.diff(offsets)) + 1
    run_ids = np.insert(segment, ends, 0).astype(np.int32)
    run_lengths = np.insert(taken, ends, room)
    run_starts = np.cumsum(run_lengths) - run_lengths
    firsts = run_starts
    if first_positions is not None:
        firsts = run_starts - np.insert(first_positions, ends, 0)
    segment_ids = np.repeat(run_ids, run_lengths)
    positions = np.arange(rows * max_seq_len, dtype=np.int32)
    positions -= np.repeat(firsts.astype(np.int32), run_lengths)
    gaps = None
    if multiple_of > 1:
        gaps = (taken - lengths).tolist()
        starts = run_starts[np.insert(np.ones(len(lengths), np.bool_), ends, False)]
        segment_ids[_ranges(starts + lengths, taken - lengths)] = 0
    positions *= segment_ids > 0
    shape = (rows, max_seq_len)
    return Layout(
        segment_ids.reshape(shape),
        positions.reshape(shape),
        lengths,
        ends.tolist(),
        room.tolist(),
        gaps,
    )


def round_up(lengths: Any, multiple_of: int) -> Any:
    """Return lengths, an int or integers of any shape, rounded up to multiples.

    Example:
        >>> round_up(5, 4), round_up(np.array([4, 1]), 4).tolist()
        (8, [4, 4])
    """
    return -(-lengths // multiple_of) * multiple_of


def fill_once(
    caller: str,
    name: str,
    values: Sequence[NDArray[Any]] | NDArray[Any],
    sizes: Int64,
    shape: tuple[int, int],
    *,
    empty: int = 0,
    like: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return what comes once per segment as `[B, S, ...]`, `empty` where there is no segment.

    Args:
        caller: the public function that an error shall name.
        name: of the feature, for errors.
        values: of each segment, row after row; arrays of one dtype and shape.
        sizes: int64 `[b]`, segments of each row, none above `S`.
        shape: `(B, S)`; rows from `b` on are empty.
        empty: what stands where there is no segment.
        like: an array of which dtype and shape are taken if there are no `values`.

    Raises:
        SeqpackError: values have several dtypes or shapes.

    Example:
        >>> fill_once("f", "ids", np.array([7, 8, 9]), np.array([2, 1]), (2, 2), empty=-1).tolist()
        [[7, 8], [9, -1]]
    """
    if isinstance(values, np.ndarray):
        dtype, trailing = values.dtype, values.shape[1:]
    else:
        like = values[0] if len(values) else np.zeros((), np.int64) if like is None else like
        dtype, trailing = like.dtype, like.shape
        for k, value in enumerate(values):
            if value.dtype != dtype or value.shape != trailing:
                first, other = (f"{each.dtype} {list(each.shape)}" for each in (like, value))
                problem = f"feature {name!r} is {first} in one record, {other} in another"
                hint = "give it one dtype and shape in every record: nothing is cast silently"
                fail(caller, f"{problem} (segments 0 and {k} of the batch)", hint)
    filled = np.full((*shape, *trailing), empty, _native(dtype))
    if len(values):
        row = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        filled[row, place] = values
    return filled


def _ranges(starts: Int64, sizes: Int64) -> Int64:
    """Return `starts[0], starts[0] + 1, ...`, `sizes[0]` of them, then those of `starts[1]`, ..."""
    before: Int64 = np.cumsum(sizes) - sizes
    ranges: Int64 = np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)
    return ranges


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype in the byte order of this machine, the only one that JAX takes."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _with_masks(filled: NDArray[Any], runs: Sequence[NDArray[Any]]) -> Any:
    """Return a run with masked entries, if there is one, for `np.concatenate` drops masks."""
    return next((run for run in runs if np.ma.is_masked(run)), filled)


def _check_sizes(
    caller: str, name: str, arrays: Sequence[NDArray[Any]], sizes: Sequence[int]
) -> None:
    try:
        same = list(map(len, arrays)) == sizes
    except TypeError:
        k = next(k for k, array in enumerate(arrays) if not array.ndim)
        problem = f"feature {name!r} has tokens in one record, and is one value in another"
        hint = "give all records the same features"
        fail(caller, f"{problem} (segment {k} of the batch)", hint)
    if not same:
        problem = f"the arrays of feature {name!r} have other lengths than their segments"
        fail(caller, problem, "pass one array per segment")


def _check_dtypes(
    caller: str, name: str, arrays: Sequence[NDArray[Any]], any_integers: bool
) -> None:
    full = [k for k, array in enumerate(arrays) if len(array)]
    first = arrays[full[0]].dtype
    for k in full:
        dtype = arrays[k].dtype
        if dtype != first and not (any_integers and dtype.kind in "iu"):
            problem = f"feature {name!r} has dtype {first} in one record, {dtype} in another"
            hint = "cast it to one dtype before packing: nothing is cast silently"
            fail(caller, f"{problem} (segments {full[0]} and {k} of the batch)", hint)


def _fail_at_shape(caller: str, name: str, arrays: Sequence[NDArray[Any]]) -> NoReturn:
    full = [k for k, array in enumerate(arrays) if len(array)]
    first = list(arrays[full[0]].shape[1:])
    other = next(k for k in full if list(arrays[k].shape[1:]) != first)
    found = list(arrays[other].shape[1:])
    problem = f"feature {name!r} has shape {first} per token in one record, {found} in another"
    hint = "give the feature the same shape per token in every record"
    fail(caller, f"{problem} (segments {full[0]} and {other} of the batch)", hint)


def _pad(caller: str, name: str, pad_value: float, dtype: np.dtype[Any]) -> Any:
    """Return the pad value as `dtype`, if it is one of its values."""
    if pad_value == 0:
        return np.zeros((), dtype)
    try:
        with np.errstate(all="ignore"):
            cast = np.asarray(pad_value).astype(dtype)
        if dtype.kind in "biu" or (dtype.kind == "V" and not np.asarray(0.5).astype(dtype)):  # int4
            same = cast == pad_value
        else:  # floats may round; they may not become infinite
            same = np.isfinite(cast) == np.isfinite(pad_value)
    except (OverflowError, ValueError):
        same = np.False_
    if not same:
        hint = "pass pad_value={feature: number} with a number that the dtype has"
        fail(caller, f"pad_value {pad_value!r} of feature {name!r} is no {dtype}", hint)
    return cast


def check_pads(
    caller: str, pad_value: Any, capacities: Iterable[str], tokens_only: bool
) -> dict[str, float]:
    """Return the pad value of each feature that has one other than 0, in the order of names.

    One number is that of the features with a capacity.  A mask or a weight that shares their rows
    is 0 on padding whatever the token there, unless `pad_value` names it.
    """
    pads = dict.fromkeys(capacities, pad_value)
    names = dict.fromkeys(pads, "pad_value")
    if isinstance(pad_value, Mapping):
        pads, names = dict(pad_value), {name: f"pad_value[{name!r}]" for name in pad_value}
    for name, pad in pads.items():
        if tokens_only and name in capacities:
            pads[name] = check_int(caller, names[name], pad, _INT32.min, _INT32.max)
        elif isinstance(pad, int | float | np.number | np.bool_):
            pads[name] = pad.item() if isinstance(pad, np.generic) else pad
        else:
            fail(caller, f"{names[name]} = {pad!r} is not a number", "pass a number")
    return {str(name): pads[name] for name in sorted(pads, key=str) if pads[name] != 0}


def checked_int32(caller: str, name: str, values: NDArray[Any]) -> NDArray[np.int32]:
    """Return integers of the feature `name` as int32; one beyond int32 is an error."""
    if values.dtype == np.int32:
        return values
    for value in (int(values.min(initial=0)), int(values.max(initial=0))):
        if not _INT32.min <= value <= _INT32.max:
            what = f"token {value}" if name == "tokens" else f"value {value} of feature {name!r}"
            fail(caller, f"a batch holds the {what}, beyond int32", f"{name} must fit into int32")
    return values.astype(np.int32)


def entries_of(value: Any) -> Mapping[Any, Any] | None:
    """Return the entries of a dict, tuple or NamedTuple by name; None for anything else.

    A tuple of numbers alone is an array, as a list is.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            return dict(zip(value._fields, value, strict=True))
        if not all(isinstance(each, _NUMBER) for each in value):  # else it is an array
            return {str(k): each for k, each in enumerate(value)}
    return None


def flatten_into(
    flat: dict[str, NDArray[Any]],
    caller: str,
    what: str,
    entries: Mapping[Any, Any],
    prefix: str = "",
) -> None:
    """Put the entries of a record into `flat`, as arrays; those of entry "a" as "a/b"."""
    for name, value in entries.items():
        if not isinstance(name, str) or "/" in name:
            problem = f"{what} has a feature named {name!r}"
            fail(caller, problem, "name features by strings without '/', which joins nested names")
        inner = entries_of(value)
        if inner is None:
            flat[prefix + name] = as_numbers(caller, f"feature {prefix + name!r} of {what}", value)
        else:
            flatten_into(flat, caller, what, inner, f"{prefix}{name}/")


def as_numbers(caller: str, what: str, value: Any) -> NDArray[Any]:
    """Return an array of numbers; strings, objects and masked values are an error.

    So are integers that only floats hold, such as `[1, 2**63]`, which NumPy would round.
    """
    if np.ma.is_masked(value):
        fail(caller, f"{what} has masked entries", "fill them, or leave them out")
    try:
        array = np.asarray(value)
    except ValueError as error:
        fail(caller, f"{what} is no array ({error})", "pass arrays of numbers")
    if not array.size and isinstance(value, list | tuple):  # nothing has no dtype
        return array.astype(np.int64)
    kind = array.dtype.kind
    if kind == "f" and isinstance(value, list | tuple) and (abs(array) >= 2**63).any():
        if all(isinstance(each, _INTEGER) for each in np.asarray(value, object).flat):
            fail(caller, f"{what} holds integers beyond int64", "give its array a dtype")
    if kind not in "biufc" and (kind != "V" or array.dtype.type is np.void):  # "V": bfloat16
        hint = "map strings and objects to integers"
        fail(caller, f"{what} has dtype {array.dtype}, which is not of numbers", hint)
    return array
