"""Exact attention inside segments that never builds `[L, L]`, in plain JAX.

The scores are computed in tiles of `block_q` queries by `block_kv` keys, and only in tiles that
hold a key that some query of theirs may see.  So time follows the segments rather than the rows,
and memory the tokens.  Nothing here needs an accelerator or a kernel language.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from seqpack_jax.errors import check_int, fail
from seqpack_jax.model.key_bounds import block_bounds
from seqpack_jax.model.segments import SegmentInfo

__all__ = ["blocked_attention"]

_BLOCK = 128

# The score of a hidden key: finite, because -inf - -inf is NaN.  A query whose first tiles hide
# all their keys counts them by mistake, until a visible one multiplies that sum by exp(-1e30) = 0.
_HIDDEN = -1e30


class _Blocks(NamedTuple):
    """The rows of a batch, end to end and cut into blocks, as matrices.

    Attributes:
        query: `[q blocks, K, G * block_q, H]`; the `G` heads that share keys are rows of one
            matrix.
        key: `[kv blocks, K, block_kv, H]`.
        value: as `key`.
    """

    query: Array
    key: Array
    value: Array


class _Bounds(NamedTuple):
    """Which keys a query may see, and which blocks of them a block of queries visits.

    Attributes:
        start: int32 `[q blocks, G * block_q]`, the first key.
        stop: int32 of the same shape, the key behind the last; equal to `start` without any.
        low: int32 `[q blocks]`, the first block.
        high: int32 of the same shape, the block behind the last.
    """

    start: Array
    stop: Array
    low: Array
    high: Array


@functools.partial(jax.jit, static_argnames=("scale", "block_q", "block_kv"))
def blocked_attention(
    query: Array,
    key: Array,
    value: Array,
    info: SegmentInfo,
    *,
    scale: float | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
) -> Array:
    """Attend inside each segment, in time and memory that do not grow with the square of a row.

    The softmax is computed as its keys come by (Milakov and Gimelshein, 2018; Rabe and Staats,
    2021), forward and backward in tiles (FlashAttention; Dao et al., 2022): the backward pass
    computes the scores again.  Loops run over the rows and their blocks of queries, one after the
    other, and over the blocks of keys that `block_bounds` leaves.

    Padding gives 0, and nothing that stands there reaches a real token or its gradient, NaN
    included; so does a query whose segment has no key.  NaN in a *real* token may spoil the other
    segments of its tiles, as it spoils the whole row in dense attention.

    Sums are float32 (float64 for float64), and weights are rounded to the dtype of `value`, as in
    `jax.nn.dot_product_attention`.  For reverse mode only: no `jax.jvp`.  `jax.vmap` runs one
    element after the other.  On several devices call it under `jax.shard_map`, rows and heads
    split: XLA cannot split its loops.

    Time: O(H N L (n + block_q + block_kv)) a row of segments of n tokens, min(n, window) in place
    of n.  Memory: O(B L N H), and N block_q block_kv numbers for a tile.

    Args:
        query: floats `[B, L, N, H]`, any `L`.
        key: `[B, S, K, H]` of the same dtype, `K` dividing `N`; query head `n` uses key head
            `n // (N / K)`.  `S = L` unless `info` has `kv_segment_ids`.
        value: as `key`.
        info: of the rows, ids `[B, L]` (and `[B, S]`), contiguous.
        scale: static; factor of the scores, `1 / sqrt(H)` when None.
        block_q: static; queries in a tile, 128 when None.
        block_kv: static; keys in a tile, 128 when None.

    Returns:
        `[B, L, N, H]` of the dtype of `query`.

    Raises:
        SeqpackError: shapes or dtypes do not fit, `info` is not contiguous, or a block size is not
            an integer of at least 1.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 2, 0]]))
        >>> query = key = jnp.zeros((1, 4, 1, 2))  # equal scores: the mean of what a token sees
        >>> value = jnp.array([2.0, 4.0, 8.0, jnp.nan]).reshape(1, 4, 1, 1) + key
        >>> blocked_attention(query, key, value, info)[0, :, 0, 0].tolist()
        [2.0, 3.0, 8.0, 0.0]
    """
    kv_ids = check_arrays("blocked_attention", query, key, value, info)
    sizes = _block_sizes(block_q, block_kv, query.shape[1], key.shape[1])
    if query.size == 0 or key.size == 0:
        return jnp.zeros_like(query)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    k_start, k_end = info.kv_bounds(pad="empty")
    # A weight of 0 does not hide NaN.  Selecting here also selects among the cotangents.
    query = keep_tokens(k_start < k_end, query)
    key, value = keep_tokens(kv_ids != 0, key), keep_tokens(kv_ids != 0, value)
    blocks = _Blocks(
        _matrices(query, sizes[0], key.shape[2]),
        _matrices(key, sizes[1], key.shape[2]),
        _matrices(value, sizes[1], key.shape[2]),
    )
    group = query.shape[2] // key.shape[2]
    bounds = _end_to_end(k_start, k_end, sizes, group, key.shape[1])
    output = _attend(scale, *_vary_alike(blocks, bounds))
    return keep_tokens(k_start < k_end, _rows(output, query.shape, sizes[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, blocks: _Blocks, bounds: _Bounds) -> Any:
    """Return the output in the form of `blocks.query`."""
    return _one_by_one(_forward, scale)(blocks, bounds)[0]


def _attend_forward(scale: float, blocks: _Blocks, bounds: _Bounds) -> tuple[Array, Any]:
    output, log_sums = _one_by_one(_forward, scale)(blocks, bounds)
    return output, (blocks, bounds, output, log_sums)


def _attend_backward(scale: float, kept: Any, cotangent: Array) -> tuple[_Blocks, None]:
    return _one_by_one(_backward, scale)(*kept, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _one_by_one(function: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """Have `jax.vmap` loop over calls: side by side, all would loop as often as the longest."""

    def call(*arrays: Any) -> Any:
        return function(scale, *arrays)

    looping: Callable[..., Any] = sequential_vmap(call)  # type: ignore[no-untyped-call]
    return looping


def _forward(scale: float, blocks: _Blocks, bounds: _Bounds) -> tuple[Array, Array]:
    """Return the output, and of each query the logarithm of the sum of its weights."""
    dtype = jnp.float64 if blocks.query.dtype == jnp.float64 else jnp.float32

    def of_queries(carry: None, block: Any) -> tuple[None, tuple[Array, Array]]:
        query, (start, stop, low, high) = block

        def of_keys(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, weighted = sums
            key, value = blocks.key[j], blocks.value[j]
            scores = _scores(scale, query, key, j, start, stop, dtype)
            new_top = jnp.maximum(top, scores.max(axis=2))
            weights, fade = jnp.exp(scores - new_top[:, :, None]), jnp.exp(top - new_top)
            total = total * fade + weights.sum(axis=2)
            added = _dot(weights.astype(value.dtype), value, 2, 1, dtype)
            return new_top, total, weighted * fade[:, :, None] + added

        zeros = jnp.zeros_like(query, dtype=dtype)
        sums = jnp.full_like(zeros[:, :, 0], _HIDDEN), zeros[:, :, 0], zeros
        top, total, weighted = lax.fori_loop(low, high, of_keys, sums)
        has_key = (start < stop)[None, :]
        total = jnp.where(has_key, total, 1)
        output = (weighted / total[:, :, None]).astype(query.dtype)
        return carry, (output, jnp.where(has_key, top + jnp.log(total), 0))

    _, (output, log_sums) = lax.scan(of_queries, None, (blocks.query, bounds))
    return output, log_sums


def _backward(
    scale: float,
    blocks: _Blocks,
    bounds: _Bounds,
    output: Array,
    log_sums: Array,
    cotangent: Array,
) -> _Blocks:
    """Return the gradients; those of keys and values are summed up in place, block by block."""
    dtype = log_sums.dtype
    # Of each query, the mean of the gradients of its weights, by the weights.
    means = (cotangent.astype(dtype) * output.astype(dtype)).sum(axis=3)

    def of_queries(of_all: tuple[Array, Array], block: Any) -> tuple[tuple[Array, Array], Array]:
        query, back, mean, log_sum, (start, stop, low, high) = block

        def of_keys(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            of_query, of_key, of_value = sums
            key, value = blocks.key[j], blocks.value[j]
            scores = _scores(scale, query, key, j, start, stop, dtype)
            weights = jnp.exp(scores - log_sum[:, :, None])
            of_weights = _dot(back, value, 2, 2, dtype)
            of_scores = (weights * (of_weights - mean[:, :, None])).astype(key.dtype)
            of_query = of_query + _dot(of_scores, key, 2, 1, dtype)
            of_key = of_key.at[j].add(_dot(of_scores, query, 1, 1, dtype))
            of_value = of_value.at[j].add(_dot(weights.astype(back.dtype), back, 1, 1, dtype))
            return of_query, of_key, of_value

        sums = jnp.zeros_like(query, dtype=dtype), *of_all
        of_query, of_key, of_value = lax.fori_loop(low, high, of_keys, sums)
        return (of_key, of_value), (of_query * scale).astype(query.dtype)

    of_all = jnp.zeros_like(blocks.key, dtype=dtype), jnp.zeros_like(blocks.value, dtype=dtype)
    each_block = (blocks.query, cotangent, means, log_sums, bounds)
    (of_key, of_value), of_query = lax.scan(of_queries, of_all, each_block)
    dtype = of_query.dtype
    return _Blocks(of_query, (of_key * scale).astype(dtype), of_value.astype(dtype))


def _scores(
    scale: float, query: Array, key: Array, j: Array, start: Array, stop: Array, dtype: Any
) -> Array:
    """Return the scores `[K, G * block_q, block_kv]` of a tile; those of hidden keys are -1e30."""
    scores = _dot(query, key, 2, 2, dtype) * scale
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 2) + j * scores.shape[2]
    visible = (start[None, :, None] <= index) & (index < stop[None, :, None])
    return jnp.where(visible, scores, _HIDDEN)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int, dtype: Any) -> Array:
    """Multiply the matrices of each head, summing over one axis of either."""
    axes = (((left_axis,), (right_axis,)), ((0,), (0,)))
    return lax.dot_general(left, right, axes, preferred_element_type=dtype)


def _end_to_end(
    k_start: Array, k_end: Array, sizes: tuple[int, int], group: int, kv_length: int
) -> _Bounds:
    """Turn bounds `[B, L]`, that count the keys of their row, into those of rows end to end."""
    block_q, block_kv = sizes
    row = jnp.arange(k_start.shape[0], dtype=jnp.int32)[:, None] * -(-kv_length // block_kv)
    low, high = (each + row for each in block_bounds(k_start, k_end, block_q, block_kv))
    start, stop = (
        jnp.tile(_cut(each, block_q) + row[:, :, None] * block_kv, (1, 1, group))
        for each in (k_start, k_end)
    )
    tiled = -1, group * block_q
    return _Bounds(start.reshape(tiled), stop.reshape(tiled), low.ravel(), high.ravel())


def _cut(rows: Array, block: int) -> Array:
    """Cut `[B, L, ...]` into `[B, blocks, block, ...]`, padded with 0."""
    batch, length, *rest = rows.shape
    padded = jnp.pad(rows, [(0, 0), (0, -length % block)] + [(0, 0)] * len(rest))
    return padded.reshape(batch, -1, block, *rest)


def _matrices(rows: Array, block: int, kv_heads: int) -> Array:
    """Turn `[B, L, K * G, H]` into `[B * blocks, K, G * block, H]`."""
    heads, size = rows.shape[2:]
    blocks = _cut(rows, block)
    split = blocks.reshape(*blocks.shape[:3], kv_heads, heads // kv_heads, size)
    return split.transpose(0, 1, 3, 4, 2, 5).reshape(-1, kv_heads, heads // kv_heads * block, size)


def _rows(matrices: Array, shape: tuple[int, ...], block: int) -> Array:
    """Turn what `_matrices` made of an array of `shape` back into it."""
    batch, length, heads, size = shape
    kv_heads = matrices.shape[1]
    split = matrices.reshape(batch, -1, kv_heads, heads // kv_heads, block, size)
    return split.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, size)[:, :length]


def keep_tokens(where: Array, values: Array) -> Array:
    """Return `values` `[B, L, N, H]` where the token is kept `[B, L]`, else 0."""
    return jnp.where(where[:, :, None, None], values, 0)


def _vary_alike(*trees: Any) -> Any:
    """Under `jax.shard_map`, have all arrays vary over the same mesh axes, as loops need it.

    Where one did not, keys that the heads of all devices share say, JAX then adds up the gradients.
    """
    leaves = jax.tree.leaves(trees)
    # The sum of nothing varies as what it was taken from; JAX has no name for that of all versions.
    zero = sum(lax.stop_gradient(each).ravel()[:0].sum().astype(jnp.int32) for each in leaves)
    return jax.tree.map(lambda array: array + zero.astype(array.dtype), trees)


def _block_sizes(
    block_q: int | None, block_kv: int | None, length: int, kv_length: int
) -> tuple[int, int]:
    sizes = {"block_q": (block_q, length), "block_kv": (block_kv, kv_length)}
    found = []
    for name, (size, limit) in sizes.items():
        size = _BLOCK if size is None else check_int("blocked_attention", name, size, 1, 2**31 - 1)
        found.append(max(1, min(size, limit)))
    return found[0], found[1]


def check_arrays(caller: str, query: Array, key: Array, value: Array, info: SegmentInfo) -> Array:
    """Return the ids of the keys, if shapes and dtypes fit each other."""
    if not isinstance(info, SegmentInfo):
        fail(caller, f"info is a {type(info).__name__}", "pass what segment_info returns")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.floating):
            problem = f"{name} is {array.dtype} of shape {array.shape}"
            hint = "pass [batch, length, heads, features], and jax.vmap over further dimensions"
            fail(caller, f"{problem}, but it must be floats of rank 4", hint)
    if not query.dtype == key.dtype == value.dtype:
        problem = f"query is {query.dtype}, key {key.dtype}, value {value.dtype}"
        fail(caller, problem, "cast them to one dtype")
    batch, _, heads, size = query.shape
    kv_heads = key.shape[2]
    fits = key.shape == value.shape and key.shape[::3] == (batch, size)
    if not fits or (heads % kv_heads if kv_heads else heads):
        problem = f"query {query.shape}, key {key.shape}, value {value.shape} do not fit"
        fail(caller, problem, "pass [B, L, N, H] and twice [B, S, K, H], K dividing N")
    kv_ids = info.segment_ids if info.kv_segment_ids is None else info.kv_segment_ids
    for name, array, ids in (("query", query, info.segment_ids), ("key", key, kv_ids)):
        if ids.shape != array.shape[:2]:
            problem = f"{name} has shape {array.shape}, but its segment ids {ids.shape}"
            fail(caller, problem, "pass one id per token, [batch, length]")
    return kv_ids
