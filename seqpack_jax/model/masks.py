"""From segment ids to the dense forms: who may attend to whom, as booleans or as a bias.

These are for attention that computes all scores anyway: `jax.nn.dot_product_attention`, Flax, a
plain einsum.  Build them inside the jitted step: XLA fuses them into the attention, or lays them
where its scores will lie, and the step needs no more memory than without segments.  Kernels take
the forms of `key_bounds` and `offsets`, or the segment ids themselves.

All functions are pure and jitted.  Shapes, dtypes and settings are checked while tracing, values
are not, so one compilation serves every batch of a shape.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.model.ids import check_ids

__all__ = ["build_packing_attention_bias", "segment_bias", "segment_mask"]

PAD_POLICIES = ("segment", "self", "empty")

# Added to a score these stay finite, and exp() of the sum is exactly 0; -inf and finfo.min give NaN
# once a row is fully masked or two biases meet.  JAX's own cuDNN attention uses the same values.
_MASK_VALUES = dict.fromkeys(("bfloat16", "float32", "float64"), -(2.0**41))
_MASK_VALUES["float16"] = -(2.0**15)


class _Sides(NamedTuple):
    """Queries and keys; their place in a segment is by position, or by index where it is None."""

    q_ids: Array
    k_ids: Array
    q_place: Array | None
    k_place: Array | None
    keys_are_queries: bool


@functools.partial(jax.jit, static_argnames=("causal", "window", "pad"))
def segment_mask(
    segment_ids: ArrayLike,
    kv_segment_ids: ArrayLike | None = None,
    *,
    q_positions: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    causal: bool = True,
    window: int | None = None,
    pad: str = "segment",
) -> Array:
    """Tell which tokens may attend to which: those of their own segment.

    This is the `mask` of `jax.nn.dot_product_attention` and of Flax.  Real tokens get the same keys
    under every `pad`, and never padding.

    Without positions, "later" and `window` go by the index in the row.  With them they go by
    position inside a segment, which stays exact after any permutation of the tokens, as context
    parallelism makes; it serves pieces that go on from another start just as well.  Padding, all
    at position 0, then attends to all padding under `pad="segment"`, not only to earlier padding.

    Time: O(B Lq Lk).  Memory: B Lq Lk bytes; none on top of the scores inside a jitted step.

    Args:
        segment_ids: integers `[..., Lq]`, any leading dimensions; 0 = padding.
        kv_segment_ids: integers `[..., Lk]` of the keys, where they are not the queries: of the
            encoder in cross attention, or of all devices beside the queries of one.
        q_positions: integers `[..., Lq]`; the position of each query in its segment.
        kv_positions: integers `[..., Lk]`; by default `q_positions`, if the keys are the queries.
        causal: static; whether keys later than the query are hidden.
        window: static; a token sees itself and the `window - 1` tokens before it, and also the
            `window - 1` after it unless `causal`.  None: no limit.
        pad: static; what padding queries attend to: "segment", the padding of the row; "self",
            themselves (nothing, where `kv_segment_ids` is given); "empty", nothing.

    Returns:
        bool `[..., 1, Lq, Lk]`: one row, 1 for all heads, query, key; True = may attend.  Ids of
        rank 1 count as a batch of one row.

    Raises:
        SeqpackError: ids or positions are not integers, or their shapes do not fit; `causal` or
            `window` with `kv_segment_ids` but without both positions; a bad `window` or `pad`.

    Example:
        >>> segment_mask(jnp.array([[1, 1, 2, 0]]))[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]

        Encoder-decoder: each decoder segment sees the encoder segment of its id.

        >>> decoder, encoder = jnp.array([[1, 2, 2]]), jnp.array([[1, 1, 2, 0]])
        >>> segment_mask(decoder, encoder, causal=False)[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    """
    sides = _check_sides(
        "segment_mask", segment_ids, kv_segment_ids, q_positions, kv_positions, causal or window
    )
    return _mask("segment_mask", sides, causal, window, pad)


@functools.partial(jax.jit, static_argnames=("dtype", "mask_value", "causal", "window", "pad"))
def segment_bias(
    segment_ids: ArrayLike,
    dtype: DTypeLike = jnp.float32,
    kv_segment_ids: ArrayLike | None = None,
    *,
    mask_value: float | None = None,
    q_positions: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    causal: bool = True,
    window: int | None = None,
    pad: str = "segment",
) -> Array:
    """Build the additive form of `segment_mask`, to be added to the attention scores.

    Hidden pairs get a large finite value, never -inf.  Their weight is exactly 0 after the softmax,
    which hides finite garbage at padding, but not NaN: 0 x NaN is NaN in any dense attention.
    Combine masks as booleans and make the bias last: two float16 biases add up to -inf.

    Time: O(B Lq Lk).  Memory: B Lq Lk floats; none on top of the scores inside a jitted step.

    Args:
        segment_ids: integers `[..., Lq]`, any leading dimensions; 0 = padding.
        dtype: static; float16, bfloat16, float32, or float64 where `jax_enable_x64` is set.
        kv_segment_ids: as in `segment_mask`, like all arguments that are not named here.
        mask_value: static; negative and finite in `dtype`.  By default -2^41, in float16 -2^15.
        q_positions: see `segment_mask`.
        kv_positions: see `segment_mask`.
        causal: see `segment_mask`.
        window: see `segment_mask`.
        pad: see `segment_mask`.

    Returns:
        `dtype` `[..., 1, Lq, Lk]`: 0 where `segment_mask` is True, else `mask_value`.

    Raises:
        SeqpackError: as `segment_mask`; and `dtype` is another one, or `mask_value` is not
            negative or becomes infinite in it.

    Example:
        >>> segment_bias(jnp.array([[1, 1, 2]]), jnp.bfloat16, mask_value=-1024)[0, 0].tolist()
        [[0.0, -1024.0, -1024.0], [0.0, 0.0, -1024.0], [-1024.0, -1024.0, 0.0]]
    """
    caller = "segment_bias"
    dtype = _check_dtype(caller, dtype)
    value = _check_mask_value(caller, mask_value, dtype)
    sides = _check_sides(
        caller, segment_ids, kv_segment_ids, q_positions, kv_positions, causal or window
    )
    return _bias(_mask(caller, sides, causal, window, pad), value)


@functools.partial(jax.jit, static_argnames=("dtype", "causal"))
def build_packing_attention_bias(
    segment_ids: ArrayLike, dtype: DTypeLike = jnp.float32, *, causal: bool = False
) -> Array:
    """Build the bias under the name that the seed gives it, and like it not causal by default.

    The same as `segment_bias(segment_ids, dtype, causal=causal)`, which can do more.

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions; 0 = padding.
        dtype: static; float16, bfloat16, float32, or float64 where `jax_enable_x64` is set.
        causal: static; whether tokens attend only to themselves and to earlier tokens.

    Returns:
        `dtype` `[..., 1, L, L]`: 0 where `segment_mask` is True, else -2^41, in float16 -2^15.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more, or `dtype` is another one.

    Example:
        >>> build_packing_attention_bias(jnp.array([1, 1, 2]), jnp.float16)[0, 0].tolist()
        [[0.0, 0.0, -32768.0], [0.0, 0.0, -32768.0], [-32768.0, -32768.0, 0.0]]
    """
    caller = "build_packing_attention_bias"
    dtype = _check_dtype(caller, dtype)
    sides = _check_sides(caller, segment_ids, None, None, None, False)
    value = _check_mask_value(caller, None, dtype)
    return _bias(_mask(caller, sides, causal, None, "segment"), value)


def check_window(caller: str, window: int | None) -> int | None:
    """Return `window` as a Python int of at least 1, or None."""
    return None if window is None else check_int(caller, "window", window, 1, 2**31 - 1)


def check_kv_ids(caller: str, ids: Array, kv_segment_ids: ArrayLike) -> tuple[Array, Array]:
    """Return ids of queries and keys in one dtype, if only their lengths differ."""
    kv_ids = check_ids(caller, "kv_segment_ids", kv_segment_ids)
    if kv_ids.shape[:-1] != ids.shape[:-1]:
        problem = f"kv_segment_ids has shape {kv_ids.shape}, but segment_ids has {ids.shape}"
        fail(caller, problem, "pass the same rows on both sides; only their lengths may differ")
    if kv_ids.dtype != ids.dtype:
        ids, kv_ids = ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    return ids, kv_ids


def _check_sides(
    caller: str,
    segment_ids: ArrayLike,
    kv_segment_ids: ArrayLike | None,
    q_positions: ArrayLike | None,
    kv_positions: ArrayLike | None,
    has_order: object,
) -> _Sides:
    """Check what describes queries and keys, and give both sides their final form."""
    q_ids = k_ids = check_ids(caller, "segment_ids", segment_ids)
    keys_are_queries = kv_segment_ids is None
    if kv_segment_ids is not None:
        q_ids, k_ids = check_kv_ids(caller, q_ids, kv_segment_ids)
    elif kv_positions is None:
        kv_positions = q_positions
    if (q_positions is None) != (kv_positions is None):
        missing = "q_positions" if q_positions is None else "kv_positions"
        fail(caller, f"{missing} is missing", "pass the positions of both sides or of neither")
    if q_positions is None and not keys_are_queries and has_order:
        problem = "causal and window compare tokens of different arrays, whose index says nothing"
        fail(caller, problem, "pass causal=False, or both q_positions and kv_positions")
    q_place = _check_positions(caller, "q_positions", q_positions, q_ids)
    k_place = _check_positions(caller, "kv_positions", kv_positions, k_ids)
    return _Sides(q_ids, k_ids, q_place, k_place, keys_are_queries)


def _check_positions(
    caller: str, name: str, positions: ArrayLike | None, ids: Array
) -> Array | None:
    if positions is None:
        return None
    array = check_ids(caller, name, positions)
    if array.shape != ids.shape:
        problem = f"{name} has shape {array.shape}, but its segment ids have shape {ids.shape}"
        fail(caller, problem, "pass one position per token")
    return array.astype(jnp.int32)


# Compares only: every step is elementwise, so that nothing keeps XLA from fusing it.
def _mask(caller: str, sides: _Sides, causal: bool, window: int | None, pad: str) -> Array:
    window = check_window(caller, window)
    check_choice(caller, "pad", pad, PAD_POLICIES)
    q_ids, k_ids = _as_queries(sides.q_ids), _as_keys(sides.k_ids)
    q_index, k_index = _index(q_ids, q_ids.ndim - 2), _index(k_ids, k_ids.ndim - 1)
    q_place = q_index if sides.q_place is None else _as_queries(sides.q_place)
    k_place = k_index if sides.k_place is None else _as_keys(sides.k_place)
    mask = q_ids == k_ids
    if causal:
        mask &= q_place >= k_place
    if window is not None:
        mask &= q_place - k_place < window
    if window is not None and not causal:
        mask &= k_place - q_place < window
    if pad == "segment":
        return mask
    if pad == "self" and sides.keys_are_queries:
        return jnp.where(q_ids != 0, mask, q_index == k_index)
    return mask & (q_ids != 0)


def _as_queries(values: Array) -> Array:
    """Shape `[..., L]` as `[..., 1, L, 1]`, with a batch of one row around rank 1."""
    return jnp.atleast_2d(values)[..., None, :, None]


def _as_keys(values: Array) -> Array:
    """Shape `[..., L]` as `[..., 1, 1, L]`, with a batch of one row around rank 1."""
    return jnp.atleast_2d(values)[..., None, None, :]


def _index(values: Array, axis: int) -> Array:
    """Count along `axis`, with all other dimensions 1."""
    shape = [1] * values.ndim
    shape[axis] = values.shape[axis]
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _bias(mask: Array, value: np.generic) -> Array:
    return jnp.where(mask, jnp.zeros((), value.dtype), jnp.array(value))


def _check_dtype(caller: str, dtype: DTypeLike) -> jnp.dtype:
    try:
        found = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        found = str(dtype)
    checked = jnp.dtype(check_choice(caller, "dtype", found, tuple(_MASK_VALUES)))
    if jax.dtypes.canonicalize_dtype(checked) != checked:
        problem = "dtype = 'float64', but JAX makes it float32 unless jax_enable_x64 is set"
        fail(caller, problem, "pass float32, or set jax_enable_x64")
    return checked


def _check_mask_value(caller: str, mask_value: float | None, dtype: jnp.dtype) -> np.generic:
    """Return `mask_value`, or the default, as a scalar of `dtype`."""
    default = _MASK_VALUES[dtype.name]
    try:
        value = float(default if mask_value is None else mask_value)
    except (TypeError, ValueError, OverflowError):
        problem = f"mask_value = {mask_value!r} is not a number"
        fail(caller, problem, f"leave it out to get {default:.0f}")
    with np.errstate(all="ignore"):  # whatever the caller has set: checked below
        scalar: np.generic = np.float64(value).astype(dtype)
    if not -np.inf < float(scalar) < 0:
        problem = f"mask_value = {value} is {scalar} in {dtype.name}, not finite and negative"
        fail(caller, problem, f"leave it out to get {default:.0f}")
    return scalar
