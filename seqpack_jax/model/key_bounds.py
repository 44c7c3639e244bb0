"""From segment ids to the interval of keys that each token, or each block of tokens, attends to.

Segments are contiguous, so the keys of a query are an interval: 8 bytes a token say what a dense
mask says in L bytes.  Kernels that take such bounds skip the blocks outside them.

All functions are pure and jitted, and check shapes and settings while tracing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.model.ids import check_ids, run_starts
from seqpack_jax.model.masks import PAD_POLICIES, check_kv_ids, check_window

__all__ = ["BlockBounds", "KeyBounds", "block_bounds", "kv_bounds"]


class KeyBounds(NamedTuple):
    """The keys of each query: those at `k_start <= index < k_end`.

    Attributes:
        k_start: int32 `[..., L]`.
        k_end: int32 `[..., L]`; equal to `k_start` where there is no key.

    Example:
        >>> bounds = kv_bounds(jnp.array([1, 1, 2, 2, 0]))
        >>> bounds.k_start.tolist(), bounds.k_end.tolist()
        ([0, 0, 2, 2, 4], [1, 2, 3, 4, 5])
    """

    k_start: Array
    k_end: Array


class BlockBounds(NamedTuple):
    """The blocks of keys of each block of queries: those at `lo <= block < hi`.

    Attributes:
        lo: int32 `[..., ceil(L / block_q)]`.
        hi: int32 of the same shape; equal to `lo` where no query of the block has a key.

    Example:
        >>> bounds = kv_bounds(jnp.array([1, 1, 1, 2, 2, 2, 2, 2]))
        >>> blocks = block_bounds(*bounds, block_q=4, block_kv=2)
        >>> blocks.lo.tolist(), blocks.hi.tolist()
        ([0, 1], [2, 4])
    """

    lo: Array
    hi: Array


@functools.partial(jax.jit, static_argnames=("causal", "window", "pad"))
def kv_bounds(
    segment_ids: ArrayLike,
    kv_segment_ids: ArrayLike | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    pad: str = "self",
) -> KeyBounds:
    """Find the interval of keys that each token may attend to.

    For real tokens it is exactly `segment_mask`.  For rows in packed order only: after a
    context-parallel reorder the keys of a token are no interval, and only the mask is exact.

    Time and memory: O(B L); with `kv_segment_ids` time O(B (Lk + Lq log Lk)).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions; 0 = padding.
        kv_segment_ids: integers `[..., Lk]` of the keys in cross attention; like `segment_ids`
            they rise from segment to segment.  A segment without keys gets an empty interval.
        causal: static; whether keys later than the query are hidden.  False in cross attention.
        window: static; a token sees itself and the `window - 1` tokens before it, and also the
            `window - 1` after it unless `causal`.  None: no limit, as in cross attention.
        pad: static; what padding queries attend to: "self", themselves; "segment", their own run
            of padding (the mask joins all padding of a row, which is no interval); "empty",
            nothing.  In cross attention it is nothing under each of them.

    Returns:
        A `KeyBounds`; an empty interval is `[0, 0)`.

    Raises:
        SeqpackError: ids are not integers of rank 1 or more, or their leading dimensions differ;
            `causal` or `window` with `kv_segment_ids`; a bad `window` or `pad`.

    Example:
        >>> bounds = kv_bounds(jnp.array([1, 1, 1, 1, 0]), window=2, pad="empty")
        >>> bounds.k_start.tolist(), bounds.k_end.tolist()
        ([0, 0, 1, 2, 0], [1, 2, 3, 4, 0])
        >>> bounds = kv_bounds(jnp.array([1, 2, 2]), jnp.array([1, 1, 2, 0]), causal=False)
        >>> bounds.k_start.tolist(), bounds.k_end.tolist()
        ([0, 2, 2], [2, 3, 3])
    """
    caller = "kv_bounds"
    ids = check_ids(caller, "segment_ids", segment_ids)
    check_choice(caller, "pad", pad, PAD_POLICIES)
    window = check_window(caller, window)
    if kv_segment_ids is None:
        return _bounds_in_row(ids, causal, window, pad)
    if causal or window is not None:
        problem = "causal and window compare tokens of different arrays, whose index says nothing"
        fail(caller, problem, "pass causal=False and window=None with kv_segment_ids")
    return _bounds_across(*check_kv_ids(caller, ids, kv_segment_ids))


@functools.partial(jax.jit, static_argnames=("block_q", "block_kv"))
def block_bounds(k_start: ArrayLike, k_end: ArrayLike, block_q: int, block_kv: int) -> BlockBounds:
    """Find the blocks of keys that each block of queries must visit.

    No key outside of them is allowed for any query of the block.  Inside them the kernel still
    compares bounds or ids.  An empty interval does not widen those of its block.

    Time and memory: O(B L).

    Args:
        k_start: integers `[..., L]` of `kv_bounds`.
        k_end: integers `[..., L]` of `kv_bounds`.
        block_q: static; queries in a block.  The last block may be cut off by the end of the row.
        block_kv: static; keys in a block.

    Returns:
        A `BlockBounds`; a block without any key gets `[0, 0)`.

    Raises:
        SeqpackError: `k_start` and `k_end` are not integers of one shape and of rank 1 or more, or
            a block size is not an integer of at least 1.

    Example:
        >>> bounds = kv_bounds(jnp.array([1, 1, 2, 2, 2, 0]), causal=False, pad="empty")
        >>> blocks = block_bounds(*bounds, block_q=2, block_kv=2)
        >>> blocks.lo.tolist(), blocks.hi.tolist()
        ([0, 1, 1], [1, 3, 3])
    """
    caller = "block_bounds"
    start, end = (
        check_ids(caller, name, values).astype(jnp.int32)
        for name, values in (("k_start", k_start), ("k_end", k_end))
    )
    if start.shape != end.shape:
        problem = f"k_start has shape {start.shape}, but k_end has shape {end.shape}"
        fail(caller, problem, "pass the two fields of one KeyBounds")
    block_q = check_int(caller, "block_q", block_q, 1, 2**31 - 1)
    block_kv = check_int(caller, "block_kv", block_kv, 1, 2**31 - 1)
    has_key = start < end
    first = _blocks(jnp.where(has_key, start, 2**31 - 1), block_q, 2**31 - 1).min(axis=-1)
    stop = _blocks(jnp.where(has_key, end, 0), block_q, 0).max(axis=-1)
    # For a stop of 0, and only there: no key at all.
    hi = jnp.where(stop > 0, (stop - 1) // block_kv + 1, 0)
    return BlockBounds(jnp.where(stop > 0, first // block_kv, 0), hi)


def _bounds_in_row(ids: Array, causal: bool, window: int | None, pad: str) -> KeyBounds:
    axis, length = ids.ndim - 1, ids.shape[-1]
    # With zeros of the ids, or `where` refuses it beside arrays of an explicit mesh.
    index = jax.lax.broadcasted_iota(jnp.int32, ids.shape, axis) + jnp.zeros_like(ids, jnp.int32)
    starts = run_starts(ids)
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=axis)
    if causal:
        end = index + 1
    else:
        is_last = jnp.concatenate([starts[..., 1:], jnp.ones_like(starts[..., :1])], axis=-1)
        end = jax.lax.cummin(jnp.where(is_last, index + 1, length), axis=axis, reverse=True)
    if window is not None:
        reach = min(window, length)  # more would only risk an overflow
        start, end = jnp.maximum(start, index - reach + 1), jnp.minimum(end, index + reach)
    if pad == "self":
        start, end = jnp.where(ids != 0, start, index), jnp.where(ids != 0, end, index + 1)
    if pad == "empty":
        start, end = jnp.where(ids != 0, start, 0), jnp.where(ids != 0, end, 0)
    return KeyBounds(start, end)


def _bounds_across(ids: Array, kv_ids: Array) -> KeyBounds:
    """Search each id among those of the keys, where padding takes a neighbour's id."""
    ids, kv_ids = ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    axis, top = kv_ids.ndim - 1, 2**31 - 1
    before = jax.lax.cummax(kv_ids, axis=axis)  # so that a first token is the first of its id
    behind = jax.lax.cummin(jnp.where(kv_ids != 0, kv_ids, top), axis=axis, reverse=True)
    # Of the first key and of the one after the last, in one loop.
    start, end = search_rows(jnp.stack([before, behind]), jnp.stack([ids, ids + 1]))
    has_key = (ids != 0) & (start < end)
    return KeyBounds(jnp.where(has_key, start, 0), jnp.where(has_key, end, 0))


def search_rows(rising: Array, targets: Array) -> Array:
    """Find where each row of `rising` first reaches each of its targets, or else its length.

    As `jnp.searchsorted`, whose loop under `vmap` fails on the arrays of an explicit mesh.

    Args:
        rising: int32 `[..., L]`.
        targets: int32 `[..., M]`.

    Returns:
        int32 `[..., M]`, in `[0, L]`.
    """
    length = rising.shape[-1]
    ends = [(0, 0)] * (rising.ndim - 1) + [(0, 1)]
    values = jnp.pad(rising, ends, constant_values=2**31 - 1)
    low = jnp.zeros_like(targets) + jnp.zeros_like(values[..., :1])

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        is_below = jnp.take_along_axis(values, middle, axis=-1) < targets
        return jnp.where(is_below, middle + 1, low), jnp.where(is_below, high, middle)

    found: Array
    found, _ = jax.lax.fori_loop(0, length.bit_length(), halve, (low, low + length))
    return found


def _blocks(values: Array, size: int, fill: int) -> Array:
    """Cut `[..., L]` into `[..., ceil(L / size), size]`, the last block padded with `fill`."""
    length = values.shape[-1]
    size = min(size, max(length, 1))
    missing = -length % size
    widths = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
    padded = jnp.pad(values, widths, constant_values=fill)
    return padded.reshape(*values.shape[:-1], (length + missing) // size, size)
