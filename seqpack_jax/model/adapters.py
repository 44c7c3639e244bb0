"""From a `SegmentInfo` to the attention of Flax, of `jax.nn` and to the Pallas kernels of JAX.

Every function returns what its consumer calls `mask`, `bias` or `segment_ids`, with the arguments
that belong to it.  Call them inside the jitted step: XLA then fuses the dense forms into the
attention instead of storing them.

What they share:

- Padding attends to padding, so that no row of a mask is empty.  Its output means nothing: leave it
  out of the loss.  The same holds for a query whose segment has no key (cross attention): it gets a
  mean over keys of other segments, which receive its gradient if the loss has it.
- What stands at padding must be finite: weights of 0 do not hide NaN, since 0 x NaN is NaN.
- The Pallas kernels compare tokens by index.  They refuse `causal` and `window` where the index
  says nothing: after a reorder (`info.contiguous` False), and between different rows.

`packed_attention` gives 0 in the first case, hides what stands at padding, and by itself chooses
an implementation that can serve.

What has run where: Flax and `jax.nn` on the CPU; the Pallas kernels on the CPU, in interpret mode;
cuDNN's form on the CPU by XLA, and translated for a GPU but not run there.  Nothing has run on a
GPU or a TPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.model.segments import SegmentInfo

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import MultiHeadMask, SegmentIds

__all__ = [
    "splash_mask",
    "to_flax_mask",
    "to_jax_nn",
    "to_pallas_gpu",
    "to_splash",
    "to_tpu_flash",
]

_DENSE = "use to_flax_mask or to_jax_nn"

# Of the Pallas attention for GPU, by default.
_GRADIENT_TILE = 32


def to_flax_mask(info: SegmentInfo) -> Array:
    """Build the `mask` of attention in Flax.

    It serves `MultiHeadDotProductAttention` and `dot_product_attention` of linen,
    `MultiHeadAttention` and `dot_product_attention` of nnx:

        output = layer(inputs, mask=to_flax_mask(info))

    The mask holds causality and window too: leave `is_causal` alone.  It has 4 dimensions because
    Flax takes `[B, L, L]` for one mask per head, silently where `B` is the number of heads; and it
    is bool because Flax takes a bias given as `mask` for its opposite.

    Time: O(B L S).  Memory: B L S bytes, or none where XLA fuses it into the attention.

    Args:
        info: ids `[B, L]`, or `[L]` for one row.

    Returns:
        bool `[B, 1, L, S]`: row, 1 for all heads, query, key; True = may attend.  `S` is `L`, or
        the length of `info.kv_segment_ids`.

    Raises:
        SeqpackError: `info` is not a `SegmentInfo`, or has ids of rank 3 or more.

    Example:
        >>> from flax import nnx
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 2, 2, 0, 0]]))
        >>> layer = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
        >>> inputs = jnp.ones((1, 6, 4))
        >>> output = layer(inputs, mask=to_flax_mask(info))
        >>> changed = layer(inputs.at[0, 0].set(7), mask=to_flax_mask(info))  # the first token
        >>> (output != changed).any(-1)[0].tolist()
        [True, True, False, False, False, False]
    """
    _check("to_flax_mask", info, (1, 2))
    return info.mask()


def to_jax_nn(info: SegmentInfo, implementation: str = "xla") -> dict[str, Array]:
    """Build the `bias` or the `mask` of `jax.nn.dot_product_attention`.

    XLA gets a bias, on the CPU the leaner of the two.  cuDNN gets a mask, since it would compute
    the gradient of a bias; and the whole of it, since it broadcasts neither queries nor keys:

        jax.nn.dot_product_attention(query, key, value, **to_jax_nn(info))
        jax.nn.dot_product_attention(
            query, key, value, implementation="cudnn", **to_jax_nn(info, "cudnn")
        )

    Both forms hold causality and window: leave `is_causal` and `local_window_size` alone.

    Time: O(B L S).  Memory: 4 B L S bytes (mask: B L S), or none where XLA fuses it into the
    attention; cuDNN stores it.  `to_jax_cudnn` describes the segments to cuDNN in O(B) bytes.

    Args:
        info: ids `[B, L]`, or `[L]` for one row.
        implementation: static; `"xla"` or `"cudnn"`, the same as in the call.

    Returns:
        `{"bias": float32 [B, 1, L, S]}`, or for cuDNN `{"mask": bool [B, 1, L, S]}`; `S` is `L`,
        or the length of `info.kv_segment_ids`.

    Raises:
        SeqpackError: `info` is not a `SegmentInfo`, or has ids of rank 3 or more;
            `implementation` is another one.

    Example:
        >>> import jax
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 2, 2]]))
        >>> query = key = jnp.zeros((1, 4, 1, 2))  # equal scores: the mean of what a token sees
        >>> value = jnp.array([2.0, 4.0, 8.0, 16.0]).reshape(1, 4, 1, 1) + key
        >>> output = jax.nn.dot_product_attention(query, key, value, **to_jax_nn(info))
        >>> output[0, :, 0, 0].tolist()
        [2.0, 3.0, 8.0, 12.0]
    """
    _check("to_jax_nn", info, (1, 2))
    check_choice("to_jax_nn", "implementation", implementation, ("xla", "cudnn"))
    return {"mask": info.mask()} if implementation == "cudnn" else {"bias": info.bias(jnp.float32)}


def to_splash(info: SegmentInfo) -> SegmentIds:
    """Build the `segment_ids` of splash attention, the Pallas kernel of JAX for TPU.

    The kernel takes one row at a time, heads first, and knows no scale; grouped queries it knows:

        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        kernel = splash.make_splash_mha(splash_mask(info, heads), head_shards=1, q_seq_shards=1)
        output = jax.vmap(kernel)(  # [B, N, L, H]
            query * scale, key, value, to_splash(info)
        )

    It skips the tiles that `splash_mask` rules out, and compares ids inside the others.  The ids
    never fall along a row, padding included, so that the splash of tokamax, which takes the same
    ids in a `SegmentIds` of its own and prunes tiles by their range, skips more.  Those of
    reordered rows stay as they are.

    Time and memory: O(B L).

    Args:
        info: ids `[B, L]`, or `[L]` for one row without `jax.vmap`.

    Returns:
        `SegmentIds(q, kv)`, int32 `[B, L]` and `[B, S]`.

    Raises:
        SeqpackError: `info` is not a `SegmentInfo`, has ids of rank 3 or more, or is `causal` or
            has a `window` where the index of a token says nothing (see the module).  That `L` and
            `S` are multiples of the tiles, these of 128, is checked by the kernel.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 1, 2, 0, 0]]))
        >>> to_splash(info).kv.tolist()
        [[1, 1, 1, 2, 3, 4]]
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _check_index("to_splash", info, (1, 2))
    if info.contiguous:
        return SegmentIds(info.monotone_ids(), info.kv_monotone_ids())
    return SegmentIds(*_ids(info))


def splash_mask(info: SegmentInfo, heads: int) -> MultiHeadMask:
    """Build the static mask of splash attention, which goes with the ids of `to_splash`.

    It says what `info` says whatever the segments are: causality and window, by index.  Nothing of
    it depends on values, so it may be built under jit.  Time: O(L); the kernel then visits every
    tile once, on the host while tracing.

    Args:
        info: ids `[B, L]`, or `[L]`.
        heads: heads of the query.

    Returns:
        `MultiHeadMask` of shape `(heads, L, S)`: for every head a `CausalMask`, with a window a
        `LocalMask`, and without either a `FullMask`.

    Raises:
        SeqpackError: as in `to_splash`, or `heads` is not an integer of at least 1.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.ones((2, 4), jnp.int32), window=2)
        >>> mask = splash_mask(info, heads=8)
        >>> print(mask.shape, type(mask.masks[0]).__name__, mask.masks[0].window_size)
        (8, 4, 4) LocalMask (1, 0)
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _check_index("splash_mask", info, (1, 2))
    check_int("splash_mask", "heads", heads, 1)
    q_ids, kv_ids = _ids(info)
    shape = (q_ids.shape[-1], kv_ids.shape[-1])
    mask: Any
    if info.window is not None:
        reach = info.window - 1
        mask = splash.LocalMask(shape, (reach, 0 if info.causal else reach), offset=0)
    else:
        mask = splash.CausalMask(shape) if info.causal else splash.FullMask(shape)
    return splash.MultiHeadMask([mask] * heads)


def to_tpu_flash(info: SegmentInfo) -> dict[str, Any]:
    """Build the arguments of flash attention, the older Pallas kernel of JAX for TPU.

    It takes `[B, N, L, H]`, a scale that is 1 by default, and as many heads of keys as of queries:

        from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

        output = flash_attention(query, key, value, sm_scale=scale, **to_tpu_flash(info))

    It skips tiles by causality alone.  Splash attention is newer, and knows windows and grouped
    queries.

    Time and memory: O(1), ids are passed on.

    Args:
        info: ids `[B, L]`.

    Returns:
        `{"segment_ids": SegmentIds(q, kv), "causal": bool}`.

    Raises:
        SeqpackError: `info` is not a `SegmentInfo`, has ids of another rank or a `window`, or is
            `causal` where the index of a token says nothing (see the module).  That `L` and `S`
            are multiples of the tiles is checked by the kernel.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> arguments = to_tpu_flash(segment_info(jnp.array([[1, 1, 2, 0]])))
        >>> arguments["segment_ids"].q.tolist(), arguments["causal"]
        ([[1, 1, 2, 0]], True)
    """
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds

    _check_index("to_tpu_flash", info, (2,))
    if info.window is not None:
        fail("to_tpu_flash", "the kernel knows no window", f"use to_splash, or {_DENSE[4:]}")
    return {"segment_ids": SegmentIds(*_ids(info)), "causal": info.causal}


def to_pallas_gpu(info: SegmentInfo) -> dict[str, Any]:
    """Build the arguments of `mha`, the Pallas attention of JAX for GPU (Triton).

    It takes `[B, L, N, H]`, a scale that is 1 by default, as many heads of keys as of queries, and
    one array of ids for both sides:

        from jax.experimental.pallas.ops.gpu.attention import mha

        output = mha(query, key, value, sm_scale=scale, **to_pallas_gpu(info))

    It skips tiles by causality alone.  JAX deprecates it in favour of tokamax (`to_tokamax_mask`),
    and 0.12 warns on import.

    It checks its tiles of 128 tokens, but not those of 32 that the gradients take: what would be
    left over would spoil them, so such rows are refused.

    Time and memory: O(1), ids are passed on.

    Args:
        info: ids `[B, L]`.

    Returns:
        `{"segment_ids": int32 [B, L], "causal": bool}`.

    Raises:
        SeqpackError: `info` is not a `SegmentInfo`, has ids of another rank, a `window`, or other
            rows of keys; or is `causal` and reordered; or `L` is over 32 and no multiple of 32.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> arguments = to_pallas_gpu(segment_info(jnp.array([[1, 1, 2, 0]]), causal=False))
        >>> arguments["segment_ids"].tolist(), arguments["causal"]
        ([[1, 1, 2, 0]], False)
    """
    caller = "to_pallas_gpu"
    _check(caller, info, (2,))
    if info.kv_segment_ids is not None:
        fail(caller, "the kernel takes one array of ids for queries and keys alike", _DENSE)
    _check_index(caller, info, (2,))
    if info.window is not None:
        fail(caller, "the kernel knows no window", f"use to_tokamax_mask, or {_DENSE[4:]}")
    length = info.segment_ids.shape[1]
    if length > _GRADIENT_TILE and length % _GRADIENT_TILE:
        problem = f"info has rows of {length} tokens, but the gradients take tiles of"
        fail(caller, f"{problem} {_GRADIENT_TILE}", f"pad the rows to a multiple, or {_DENSE}")
    return {"segment_ids": info.segment_ids, "causal": info.causal}


def _ids(info: SegmentInfo) -> tuple[Array, Array]:
    """Return the ids of queries and of keys."""
    kv_ids = info.segment_ids if info.kv_segment_ids is None else info.kv_segment_ids
    return info.segment_ids, kv_ids


def _check(caller: str, info: SegmentInfo, ranks: tuple[int, ...]) -> None:
    if not isinstance(info, SegmentInfo):
        fail(caller, f"info is a {type(info).__name__}", "pass what segment_info returns")
    shape = info.segment_ids.shape
    if len(shape) not in ranks:
        expected = "[B, L]" if ranks == (2,) else "[B, L] or [L]"
        problem = f"info has segment ids of shape {shape}, but they must be {expected}"
        fail(caller, problem, "jax.vmap over further leading dimensions")


def _check_index(caller: str, info: SegmentInfo, ranks: tuple[int, ...]) -> None:
    """Raise unless `causal` and `window` may go by the index of a token."""
    _check(caller, info, ranks)
    if not info.causal and info.window is None:
        return
    setting = "causal=True" if info.causal else f"window={info.window}"
    hint = f"{_DENSE}, which go by position"
    if not info.contiguous:
        problem = f"info has {setting} after a reorder (contiguous=False)"
        fail(caller, f"{problem}, but the kernel masks by index", hint)
    if info.kv_segment_ids is not None:
        problem = f"info has {setting} between different rows"
        fail(caller, f"{problem}, but the kernel masks by index", hint)
