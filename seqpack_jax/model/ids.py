"""What the ids of a row tell about each token: its position, its start, its neighbours.

Segment ids are integers `[..., L]`, rows of `L` tokens: 1, 2, ... in row order and 0 on padding.
A segment is a run of equal, non-zero ids in a row; padding may stand between segments, not inside.

All functions are pure and jitted, take any leading dimensions, and check shapes and dtypes while
tracing, not values: one compilation serves every batch of a shape.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from seqpack_jax.errors import check_int, fail

__all__ = [
    "from_seed_ids",
    "monotone_segment_ids",
    "num_segments",
    "overflow",
    "positions_from_segment_ids",
    "segment_starts",
    "shift_mask",
    "valid_tokens",
]


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
    start = jax.lax.cummax(jnp.where(run_starts(ids), index, 0), axis=ids.ndim - 1)
    return jnp.where(ids != 0, index - start, 0)


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
    real = real_tokens("from_seed_ids", ids, attention_mask)
    starts = (run_starts(ids) | run_starts(real)) & real
    return jnp.where(real, jnp.cumsum(starts, axis=-1, dtype=jnp.int32), 0)


@jax.jit
def segment_starts(segment_ids: ArrayLike) -> Array:
    """Mark where a recurrent layer must forget: at the first token of each segment.

    State-space models, linear attention and recurrent networks carry a state along the row.  Set it
    to 0 before each start, and every sequence computes what it computes alone; the example shows
    it for an associative scan.  Two traps: clear the inputs of padding (`valid_tokens`) if they may
    be NaN, since 0 x NaN is NaN; and a scan in logarithms must not add log(0), as infinities
    subtract to NaN: multiply its decays by `segment_mask` instead.

    The state of a row runs on into the padding behind a segment, which no real token sees.  For a
    scan from right to left flip the ids before and the result after.

    Time and memory: O(B L).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions.

    Returns:
        bool `[..., L]`; False on padding, so that the sum of a row counts its segments.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more.

    Example:
        The scan of Mamba, `state = decay * state + value`, over sequences of 3 and of 2 tokens:

        >>> segment_ids = jnp.array([1, 1, 1, 2, 2, 0])
        >>> starts, valid = segment_starts(segment_ids), valid_tokens(segment_ids)
        >>> decay = jnp.where(starts, 0.0, jnp.full(6, 0.5))
        >>> value = jnp.where(valid, jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, jnp.nan]), 0.0)
        >>> def join(left, right):
        ...     return left[0] * right[0], left[1] * right[0] + right[1]
        >>> jax.lax.associative_scan(join, (decay, value))[1][:5].tolist()
        [1.0, 1.5, 1.75, 1.0, 1.5]
    """
    ids = check_ids("segment_starts", "segment_ids", segment_ids)
    return run_starts(ids) & (ids != 0)


@jax.jit
def valid_tokens(segment_ids: ArrayLike) -> Array:
    """Mark the real tokens, for whatever must not see padding.

    Padding that is routed like tokens fills up the experts of a mixture and skews its balance
    loss; padding in a mean or variance over the batch makes it depend on how rows were packed.
    Take this mask, not `tokens != pad_id`: real tokens may have that value.

    Time and memory: O(B L).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions.

    Returns:
        bool `[..., L]`; False on padding.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more.

    Example:
        Two experts with room for two tokens each.  Were padding routed, here to expert 0, no real
        token would reach that expert:

        >>> valid = valid_tokens(jnp.array([0, 0, 1, 1, 2]))
        >>> experts = jnp.array([0, 0, 0, 1, 0])
        >>> chosen = jnp.where(valid[:, None], jax.nn.one_hot(experts, 2, dtype=jnp.int32), 0)
        >>> place = jnp.sum(jnp.cumsum(chosen, axis=0) * chosen, axis=1)
        >>> (valid & (place <= 2)).tolist()
        [False, False, True, True, True]

        Batch statistics over real tokens, cleared first, or a NaN reaches the gradient:

        >>> values = jnp.where(valid, jnp.array([jnp.nan, 9.0, 1.0, 2.0, 3.0]), 0.0)
        >>> float(jnp.mean(values, where=valid)), round(float(jnp.var(values, where=valid)), 3)
        (2.0, 0.667)
    """
    return check_ids("valid_tokens", "segment_ids", segment_ids) != 0


@jax.jit
def num_segments(segment_ids: ArrayLike) -> Array:
    """Count the segments of each row.

    Time: O(B L).  Memory: O(B).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions.

    Returns:
        int32 `[...]`: the runs of equal, non-zero ids.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more.

    Example:
        >>> num_segments(jnp.array([[1, 1, 2, 0, 3], [0, 0, 0, 0, 0]])).tolist()
        [3, 0]
    """
    ids = check_ids("num_segments", "segment_ids", segment_ids)
    return _count_segments(ids)


@functools.partial(jax.jit, static_argnames=("max_segments",))
def overflow(segment_ids: ArrayLike, max_segments: int) -> Array:
    """Tell which rows hold more segments than the offsets have room for.

    Nothing can raise inside jit, and kernels do not notice.  So cap the rows where they are packed
    (`pack_sequences` takes `max_segments`), and report this flag from the training step, or raise
    on it with `jax.experimental.checkify`.

    Time: O(B L).  Memory: O(B).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions.
        max_segments: static; the most segments in any row, in `[1, 2**20]`.

    Returns:
        bool `[...]`.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more, or `max_segments` not an
            integer in its range.

    Example:
        >>> overflow(jnp.array([[1, 1, 2, 3], [1, 1, 1, 2]]), max_segments=2).tolist()
        [True, False]
    """
    ids = check_ids("overflow", "segment_ids", segment_ids)
    max_segments = check_int("overflow", "max_segments", max_segments, 1, 2**20)
    return _count_segments(ids) > max_segments


@jax.jit
def monotone_segment_ids(segment_ids: ArrayLike) -> Array:
    """Number the segments, and each token of padding like a segment of its own, left to right.

    Splash attention of tokamax skips a block when the range of its ids, from the least to the
    greatest, does not meet that of the other side.  A 0 at the end of a row makes this range begin
    at 0, and nothing is skipped.  These ids only rise.  They allow the same pairs of real tokens,
    and padding sees only itself.  For self-attention; `SegmentInfo.monotone_ids` also has a form
    for cross attention, whose two sides must agree.

    Time and memory: O(B L).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions.

    Returns:
        int32 `[..., L]`: 1, 2, ... without a gap.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more.

    Example:
        >>> monotone_segment_ids(jnp.array([1, 1, 0, 0, 2, 2, 0])).tolist()
        [1, 1, 2, 3, 4, 4, 5]
    """
    ids = check_ids("monotone_segment_ids", "segment_ids", segment_ids)
    return jnp.cumsum(run_starts(ids) | (ids == 0), axis=-1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("k",))
def shift_mask(segment_ids: ArrayLike, k: int) -> Array:
    """Tell where the token `k` places back is one of the same segment.

    Causal convolutions (Mamba, Hyena), token shifts (RWKV) and n-gram features reach back over the
    start of a segment.  Where this mask is False, take 0 instead of the shifted value; then every
    sequence computes what it computes alone.

    Time and memory: O(B L).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions; tokens of equal, non-zero ids are
            of one segment.
        k: static; how many places back, an int32.  Negative: places ahead, for convolutions that
            look both ways.  0 is the token itself.

    Returns:
        bool `[..., L]`; False on padding.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more, or `k` not an int32.

    Example:
        A causal convolution of width 4 over sequences of 3 and of 2 tokens:

        >>> values, taps = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), [1.0, 10.0, 100.0, 1000.0]
        >>> segment_ids, result = jnp.array([1, 1, 1, 2, 2]), jnp.zeros(5)
        >>> for k, tap in enumerate(taps):
        ...     shifted = jnp.roll(values, k, axis=-1)  # the mask is False where this wraps around
        ...     result += tap * jnp.where(shift_mask(segment_ids, k), shifted, 0.0)
        >>> result.tolist()
        [1.0, 12.0, 123.0, 4.0, 45.0]
    """
    ids = check_ids("shift_mask", "segment_ids", segment_ids)
    k = check_int("shift_mask", "k", k, -(2**31), 2**31 - 1)
    length = ids.shape[-1]
    count = min(abs(k), length)
    gap = jnp.zeros_like(ids[..., :count])
    parts = [gap, ids[..., : length - count]] if k > 0 else [ids[..., count:], gap]
    return (ids != 0) & (jnp.concatenate(parts, axis=-1) == ids)


def check_ids(caller: str, name: str, ids: ArrayLike, max_rank: int | None = None) -> Array:
    """Return `ids` as an array of an integer dtype and of rank 1 to `max_rank`."""
    array = jnp.asarray(ids)
    has_rank = 1 <= array.ndim <= (max_rank or array.ndim)
    if not (has_rank and jnp.issubdtype(array.dtype, jnp.integer)):
        shape = "[B, L] or [L]" if max_rank else "[..., L]"
        problem = f"{name} is {array.dtype} of shape {array.shape}, but it must be integers {shape}"
        fail(caller, problem, "pass rows of int32, and jax.vmap over further leading dimensions")
    return array


def real_tokens(caller: str, ids: Array, attention_mask: ArrayLike | None) -> Array:
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


def run_starts(values: Array) -> Array:
    """Mark the first of each run of equal values along the last axis."""
    first = jnp.ones_like(values[..., :1], dtype=bool)
    return jnp.concatenate([first, values[..., 1:] != values[..., :-1]], axis=-1)


def _count_segments(ids: Array) -> Array:
    return jnp.sum(run_starts(ids) & (ids != 0), axis=-1, dtype=jnp.int32)
