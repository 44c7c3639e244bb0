"""From values per token to values per segment: sums, means, last tokens, rows of their own.

All functions are pure and jitted, and check shapes and dtypes while tracing.  `[..., L]` is any
number of rows of `L` tokens; `values` may have further axes behind (`[..., L, D]`: vectors).

Slot `i` of a result belongs to segment `i + 1`: results are ordered by id, and batches with
different segments have one shape, `[..., max_segments]`.  Segments with an id over `max_segments`
are dropped in silence, for no value can raise inside jit: keep to it where rows are packed, and
watch `segments.overflow`.  What stands at padding is dropped by `where`, not multiplied by 0, so
that a NaN there reaches neither a result nor a gradient.

Which slots are taken is a reduction, too: `segment_sum(segment_ids > 0, segment_ids, max_segments)`
is the length of every segment, 0 where there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from seqpack_jax.errors import check_int, fail
from seqpack_jax.model.ids import check_ids

__all__ = ["gather_last", "segment_mean", "segment_sum", "unpack_segments"]


@functools.partial(jax.jit, static_argnames=("max_segments",))
def segment_sum(values: ArrayLike, segment_ids: ArrayLike, max_segments: int) -> Array:
    """Add up the values of each segment.

    Goes by id alone, so it also holds where context parallelism has reordered the tokens, and the
    sums of several devices that share a row add up (`jax.lax.psum`).

    Time: O(B L D), a scatter-add.  Memory: O(B L D) for what is added, O(B max_segments D) for the
    result; nothing of size L x max_segments.

    Args:
        values: numbers or bool `[..., L, ...]`.
        segment_ids: integers `[..., L]`, 1, 2, ... and 0 = padding.
        max_segments: static; the most segments in any row, in `[1, 2**20]`.

    Returns:
        `[..., max_segments, ...]`, 0 where there is no such segment, in the dtype of `values`
        (int32 for bool).  float16 and bfloat16 are summed in float32 and rounded once.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more, the shape of `values` does
            not begin with that of `segment_ids`, or `max_segments` is not an integer in its range.

    Example:
        >>> segment_ids = jnp.array([1, 1, 2, 0])
        >>> segment_sum(jnp.array([1.0, 2.0, 5.0, jnp.nan]), segment_ids, max_segments=3).tolist()
        [3.0, 5.0, 0.0]
    """
    numbers, ids, slots = _checked("segment_sum", values, segment_ids, max_segments)
    if numbers.dtype == bool:
        numbers = numbers.astype(jnp.int32)
    return add_up(numbers, ids, slots).astype(numbers.dtype)


@functools.partial(jax.jit, static_argnames=("max_segments",))
def segment_mean(values: ArrayLike, segment_ids: ArrayLike, max_segments: int) -> Array:
    """Average the values of each segment, for instance to one embedding per sequence.

    Time and memory: those of `segment_sum`.  It needs whole rows: where devices share a row, divide
    the `psum` of the sums by the `psum` of the lengths instead.

    Args:
        values: numbers or bool `[..., L, ...]`.
        segment_ids: integers `[..., L]`, 1, 2, ... and 0 = padding.
        max_segments: static; the most segments in any row, in `[1, 2**20]`.

    Returns:
        `[..., max_segments, ...]`, 0 where there is no such segment, in the dtype of `values`
        (float32 for bool and integers).  float16 and bfloat16 are averaged in float32.

    Raises:
        SeqpackError: as `segment_sum`.

    Example:
        >>> segment_ids = jnp.array([1, 1, 2, 0])
        >>> segment_mean(jnp.array([1.0, 2.0, 5.0, jnp.nan]), segment_ids, max_segments=3).tolist()
        [1.5, 5.0, 0.0]
    """
    numbers, ids, slots = _checked("segment_mean", values, segment_ids, max_segments)
    if not jnp.issubdtype(numbers.dtype, jnp.inexact):
        numbers = numbers.astype(jnp.float32)
    sums = add_up(numbers, ids, slots)
    lengths = jnp.maximum(add_up(jnp.ones_like(ids), ids, slots), 1)
    return (sums / _behind(lengths, sums.ndim).astype(sums.dtype)).astype(numbers.dtype)


@functools.partial(jax.jit, static_argnames=("max_segments",))
def gather_last(values: ArrayLike, segment_ids: ArrayLike, max_segments: int) -> Array:
    """Take the value at the last token of each segment: its class, its reward, its final state.

    The last token is the one that stands last in the row, so gather *before* context parallelism
    reorders the tokens, or after the reorder is undone.

    Time: O(B L + B max_segments D).  Memory: O(B L + B max_segments D).

    Args:
        values: numbers or bool `[..., L, ...]`.
        segment_ids: integers `[..., L]`, 1, 2, ... and 0 = padding.
        max_segments: static; the most segments in any row, in `[1, 2**20]`.

    Returns:
        `[..., max_segments, ...]` in the dtype of `values`, 0 where there is no such segment.

    Raises:
        SeqpackError: as `segment_sum`.

    Example:
        >>> segment_ids = jnp.array([1, 1, 2, 0])
        >>> gather_last(jnp.array([1.0, 2.0, 5.0, jnp.nan]), segment_ids, max_segments=3).tolist()
        [2.0, 5.0, 0.0]
    """
    numbers, ids, slots = _checked("gather_last", values, segment_ids, max_segments)

    def of_row(row: Array, row_ids: Array) -> Array:
        last = _edges(jax.ops.segment_max, row_ids, slots)
        return _take(row, last, last >= 0)

    return _over_rows(of_row, ids.ndim - 1)(numbers, ids)


@functools.partial(jax.jit, static_argnames=("max_segments", "max_seq_len"))
def unpack_segments(
    values: ArrayLike, segment_ids: ArrayLike, max_segments: int, max_seq_len: int | None = None
) -> Array:
    """Give each segment a row of its own, zeros behind it: the padded form of a packed batch.

    For layers and metrics that know one sequence per row.  It brings back the padding that packing
    saves: B x max_segments x max_seq_len x D numbers instead of B x L x D, so unpack late, narrow
    values, and with a tight `max_seq_len`.  Needs contiguous segments: unpack before a context-
    parallel reorder.

    Time and memory: O(B L + B max_segments max_seq_len D), a gather.

    Args:
        values: numbers or bool `[..., L, ...]`.
        segment_ids: integers `[..., L]`, 1, 2, ... and 0 = padding.
        max_segments: static; the most segments in any row, in `[1, 2**20]`.
        max_seq_len: static; the length of the new rows, L by default.  The tokens of longer
            segments behind it are dropped.

    Returns:
        `[..., max_segments, max_seq_len, ...]` in the dtype of `values`.

    Raises:
        SeqpackError: as `segment_sum`, or `max_seq_len` is not an integer of at least 1.

    Example:
        >>> segment_ids = jnp.array([1, 1, 2, 0])
        >>> unpack_segments(jnp.array([7, 8, 9, 5]), segment_ids, 3, max_seq_len=2).tolist()
        [[7, 8], [9, 0], [0, 0]]
    """
    caller = "unpack_segments"
    numbers, ids, slots = _checked(caller, values, segment_ids, max_segments)
    length = ids.shape[-1]
    if max_seq_len is not None:
        length = check_int(caller, "max_seq_len", max_seq_len, 1, 2**31 - 1)

    def of_row(row: Array, row_ids: Array) -> Array:
        start = _edges(jax.ops.segment_min, row_ids, slots)[:, None]
        last = _edges(jax.ops.segment_max, row_ids, slots)[:, None]
        offset = jnp.arange(length, dtype=jnp.int32)[None]
        return _take(row, start + offset, (last >= 0) & (offset <= last - start))

    return _over_rows(of_row, ids.ndim - 1)(numbers, ids)


def add_up(numbers: Array, ids: Array, slots: int) -> Array:
    """Return the sums `[..., slots, ...]` of the ids 1 to `slots`, in at least float32."""
    real = (ids > 0) & (ids <= slots)
    dtype = _accumulator(numbers.dtype)
    kept = jnp.where(_behind(real, numbers.ndim), numbers.astype(dtype), jnp.zeros((), dtype))
    slot = jnp.where(real, ids - 1, slots)  # out of range is dropped
    add = functools.partial(jax.ops.segment_sum, num_segments=slots)
    return _over_rows(add, ids.ndim - 1)(kept, slot)


def _checked(caller: str, values: ArrayLike, segment_ids: Any, limit: Any) -> tuple[Any, Any, int]:
    """Return the arguments as arrays and an int, or fail."""
    ids = check_ids(caller, "segment_ids", segment_ids)
    numbers = jnp.asarray(values)
    if numbers.shape[: ids.ndim] != ids.shape:
        problem = f"values has shape {numbers.shape}, but segment_ids has shape {ids.shape}"
        fail(caller, problem, "pass values as [..., L, ...]: one entry per token, features behind")
    return numbers, ids.astype(jnp.int32), check_int(caller, "max_segments", limit, 1, 2**20)


def _over_rows(function: Callable[..., Array], rank: int) -> Callable[..., Array]:
    """Map a function of one row over `rank` leading axes; unlike a reshape, it keeps shardings."""
    for _ in range(rank):
        function = jax.vmap(function)
    return function


def _edges(reduce: Callable[..., Array], row_ids: Array, slots: int) -> Array:
    """Return the first or last index of each segment of a row; the limit of int32 without any."""
    slot = jnp.where((row_ids > 0) & (row_ids <= slots), row_ids - 1, slots)
    return reduce(jnp.arange(len(row_ids), dtype=jnp.int32), slot, num_segments=slots)


def _take(row: Array, index: Array, real: Array) -> Array:
    """Take the tokens at `index` of a row; 0 where not `real`."""
    return row.at[jnp.where(real, index, len(row))].get(mode="fill", fill_value=0)


def _behind(array: Array, rank: int) -> Array:
    """Append axes of size 1, up to `rank`."""
    return array.reshape(array.shape + (1,) * (rank - array.ndim))


def _accumulator(dtype: jnp.dtype) -> DTypeLike:
    """Return the dtype to add up in: float32 for the shorter floats."""
    is_short = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.float32 if is_short else dtype
