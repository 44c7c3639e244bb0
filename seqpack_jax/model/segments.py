"""From segment ids to positions, masks and offsets, on the device.

Segment ids are integers `[B, L]`, `B` rows of `L` tokens: 1, 2, ... in row order and 0 on padding.
A segment is a run of equal, non-zero ids in a row; padding may stand between segments, not inside.

All functions are pure and jitted.  Shapes and dtypes are checked while tracing, values are not, so
one compilation serves every batch of a shape.  Call them inside the jitted training step: XLA then
fuses the dense forms into the attention instead of storing them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from seqpack_jax.errors import check_choice, check_int, fail

__all__ = [
    "CuSeqlens",
    "build_packing_attention_bias",
    "build_packing_cu_seqlens",
    "from_seed_ids",
    "positions_from_segment_ids",
    "segment_mask",
]

# Added to a score these stay finite, and exp() of the sum is exactly 0; -inf and finfo.min give NaN
# once a row is fully masked or two biases meet.  JAX's own cuDNN attention uses the same values.
_MASK_VALUES = dict.fromkeys(("bfloat16", "float32", "float64"), -(2.0**41))
_MASK_VALUES["float16"] = -(2.0**15)


class CuSeqlens(NamedTuple):
    """Where each segment starts in the stream of a batch's tokens without padding.

    Attributes:
        cu_seqlens: int32 `[B * max_segments + 1]`; segment `i`, counted row after row, is
            `[cu_seqlens[i], cu_seqlens[i + 1])`; the end of the last segment is repeated.
        max_seqlen: int32 scalar, the tokens in the longest segment; 0 without any.
        overflow: bool scalar, True when some row holds more than `max_segments` segments: then
            some may be missing, and the other two fields must not be used.

    Example:
        >>> segment_ids = jnp.array([[1, 1, 1, 2, 0, 0]])
        >>> offsets = build_packing_cu_seqlens(segment_ids, max_segments=3)
        >>> offsets.cu_seqlens.tolist(), int(offsets.max_seqlen), bool(offsets.overflow)
        ([0, 3, 4, 4], 3, False)
    """

    cu_seqlens: Array
    max_seqlen: Array
    overflow: Array


@jax.jit
def positions_from_segment_ids(segment_ids: ArrayLike) -> Array:
    """Count the tokens of each segment from 0, for rotary or learned position embeddings.

    Time and memory: O(B L).  For contiguous segments only: where context parallelism reorders the
    tokens, compute positions before and reorder them along.

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions.

    Returns:
        int32 `[..., L]`: 0, 1, 2, ... in each segment, 0 on padding.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more.

    Example:
        >>> positions_from_segment_ids(jnp.array([1, 1, 1, 2, 2, 0])).tolist()
        [0, 1, 2, 0, 1, 0]
    """
    ids = check_ids("positions_from_segment_ids", "segment_ids", segment_ids)
    index = jax.lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    start = jax.lax.cummax(jnp.where(_run_starts(ids), index, 0), axis=ids.ndim - 1)
    return jnp.where(ids != 0, index - start, 0)


@functools.partial(jax.jit, static_argnames=("causal",))
def segment_mask(segment_ids: ArrayLike, *, causal: bool = False) -> Array:
    """Tell which tokens may attend to which: those of their own segment.

    This is the `mask` of `jax.nn.dot_product_attention` and of Flax.  Padding attends to padding,
    so that no row of it is empty.  Time: O(B L^2).  Memory: B L^2 bytes, or none where XLA fuses it
    into the attention.

    Args:
        segment_ids: integers `[B, L]`, or `[L]` for one row.
        causal: static; whether tokens attend only to themselves and to earlier tokens.

    Returns:
        bool `[B, 1, L, L]`: row, 1 for all heads, query, key; True = may attend.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or 2.

    Example:
        >>> segment_mask(jnp.array([[1, 1, 2, 0]]), causal=True)[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """
    ids = jnp.atleast_2d(check_ids("segment_mask", "segment_ids", segment_ids, max_rank=2))
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    return jnp.tril(mask) if causal else mask


@functools.partial(jax.jit, static_argnames=("dtype", "causal"))
def build_packing_attention_bias(
    segment_ids: ArrayLike, dtype: DTypeLike = jnp.float32, *, causal: bool = False
) -> Array:
    """Build the additive form of `segment_mask`, to be added to the attention scores.

    Blocked pairs get a large finite value, never -inf: -2^41, or -2^15 in float16.  Their weight is
    exactly 0 after the softmax, which hides finite garbage at padding, but not NaN: 0 x NaN is NaN
    in any dense attention.  Combine masks as booleans: two float16 biases add up to -inf.

    Time: O(B L^2).  Memory: B L^2 floats, or none where XLA fuses it into the attention.

    Args:
        segment_ids: integers `[B, L]`, or `[L]` for one row.
        dtype: static; float16, bfloat16, float32, or float64 where `jax_enable_x64` is set.
        causal: static; whether tokens attend only to themselves and to earlier tokens.

    Returns:
        `dtype` `[B, 1, L, L]`: 0 where `segment_mask` is True, else the large negative value.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or 2, or `dtype` is another one.

    Example:
        >>> build_packing_attention_bias(jnp.array([1, 1, 2]), jnp.float16)[0, 0].tolist()
        [[0.0, 0.0, -32768.0], [0.0, 0.0, -32768.0], [-32768.0, -32768.0, 0.0]]
    """
    caller = "build_packing_attention_bias"
    ids = check_ids(caller, "segment_ids", segment_ids, max_rank=2)
    try:
        found = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        found = str(dtype)
    name = check_choice(caller, "dtype", found, tuple(_MASK_VALUES))
    allowed, blocked = jnp.zeros((), dtype), jnp.array(_MASK_VALUES[name], dtype)
    return jnp.where(segment_mask(ids, causal=causal), allowed, blocked)


@functools.partial(jax.jit, static_argnames=("max_segments",))
def build_packing_cu_seqlens(
    segment_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, max_segments: int
) -> CuSeqlens:
    """Find the offsets of all segments in the stream of real tokens, for varlen attention.

    Kernels that take `cu_seqlens` (FlashAttention and its kin) read the rows end to end, without
    padding.  Rows on several devices are several streams: call this under `jax.shard_map`.  No
    value can raise inside jit: keep to `max_segments` where rows are packed, and watch `overflow`.

    Time: O(B L + B max_segments log(B L)).  Memory: O(B L + B max_segments).

    Args:
        segment_ids: integers `[B, L]`, or `[L]` for one row.
        attention_mask: bool or integers of the same shape; 0 marks padding, as an id of 0 does.  A
            token masked out inside a segment cuts it in two.
        max_segments: static; the most segments in any *row*, in `[1, 2**20]`.

    Returns:
        A `CuSeqlens`.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or 2, `attention_mask` not bool or
            integers of its shape, or `max_segments` not an integer of at least 1.

    Example:
        >>> segment_ids = jnp.array([[1, 1, 2, 2, 2, 0], [1, 0, 2, 2, 2, 2]])
        >>> build_packing_cu_seqlens(segment_ids, max_segments=3).cu_seqlens.tolist()
        [0, 2, 5, 6, 10, 10, 10]
    """
    caller = "build_packing_cu_seqlens"
    ids = check_ids(caller, "segment_ids", segment_ids, max_rank=2)
    max_segments = check_int(caller, "max_segments", max_segments, 1, 2**20)
    ids = jnp.atleast_2d(jnp.where(_real_tokens(caller, ids, attention_mask), ids, 0))
    real = ids != 0
    starts = _run_starts(ids) & real
    overflow = jnp.any(jnp.sum(starts, axis=-1, dtype=jnp.int32) > max_segments)
    real_before = jnp.pad(jnp.cumsum(real.ravel(), dtype=jnp.int32), (1, 0))  # [B * L + 1]
    starts_so_far = jnp.cumsum(starts.ravel(), dtype=jnp.int32)  # [B * L]
    # A segment that does not exist is found behind the last token, so the tail repeats itself.
    segment = jnp.arange(1, ids.shape[0] * max_segments + 2, dtype=jnp.int32)
    cu_seqlens = real_before[jnp.searchsorted(starts_so_far, segment)]
    return CuSeqlens(cu_seqlens, jnp.max(jnp.diff(cu_seqlens), initial=0), overflow)


@jax.jit
def from_seed_ids(sequence_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> Array:
    """Convert the `sequence_ids` of the seed (the torch library seqpack) to segment ids.

    The seed counts from 0 and gives padding the id of the last sequence.  Here 0 *is* padding: a
    seed batch used as it stands loses the first sequence of every row and attends to its padding.
    Time and memory: O(B L).

    Args:
        sequence_ids: integers `[..., L]`; a run of equal ids is a sequence.
        attention_mask: bool or integers of the same shape, 0 on padding.  Without it, no token is
            padding.  A token masked out inside a sequence cuts it in two.

    Returns:
        int32 `[..., L]`: 1, 2, ... in row order, 0 on padding.

    Raises:
        SeqpackError: `sequence_ids` is not integers of rank 1 or more, or `attention_mask` not
            bool or integers of the same shape.

    Example:
        >>> sequence_ids, attention_mask = jnp.array([0, 0, 1, 1, 1]), jnp.array([1, 1, 1, 0, 0])
        >>> from_seed_ids(sequence_ids, attention_mask).tolist()
        [1, 1, 2, 0, 0]
    """
    ids = check_ids("from_seed_ids", "sequence_ids", sequence_ids)
    real = _real_tokens("from_seed_ids", ids, attention_mask)
    starts = (_run_starts(ids) | _run_starts(real)) & real
    return jnp.where(real, jnp.cumsum(starts, axis=-1, dtype=jnp.int32), 0)


def check_ids(caller: str, name: str, ids: ArrayLike, max_rank: int | None = None) -> Array:
    """Return `ids` as an array of an integer dtype and of rank 1 to `max_rank`."""
    array = jnp.asarray(ids)
    has_rank = 1 <= array.ndim <= (max_rank or array.ndim)
    if not (has_rank and jnp.issubdtype(array.dtype, jnp.integer)):
        shape = "[B, L] or [L]" if max_rank else "[..., L]"
        problem = f"{name} is {array.dtype} of shape {array.shape}, but it must be integers {shape}"
        fail(caller, problem, "pass rows of int32, and jax.vmap over further leading dimensions")
    return array


def _real_tokens(caller: str, ids: Array, attention_mask: ArrayLike | None) -> Array:
    """Return `attention_mask` as bool, all True when it is None."""
    if attention_mask is None:
        return jnp.ones(ids.shape, bool)
    mask = jnp.asarray(attention_mask)
    is_mask = mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)
    if not is_mask or mask.shape != ids.shape:
        found = f"attention_mask is {mask.dtype} of shape {mask.shape}"
        problem = f"{found}, but it must be bool or integers of shape {ids.shape}"
        fail(caller, problem, "pass 1 for real tokens and 0 for padding, not an additive bias")
    return mask.astype(bool)


def _run_starts(values: Array) -> Array:
    """Mark the first of each run of equal values along the last axis."""
    first = jnp.ones_like(values[..., :1], dtype=bool)
    return jnp.concatenate([first, values[..., 1:] != values[..., :-1]], axis=-1)
