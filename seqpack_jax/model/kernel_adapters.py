"""From a `SegmentInfo` to kernels that are private to their package, or that pip does not bring.

Each function looks at what is installed before it hands anything over, and raises a `SeqpackError`
that says what is missing, so that a changed package cannot turn into wrong attention.  Call them
inside the jitted step; they cost O(L) and never build `[L, L]`.

What has run where: tokamax's XLA forms on the CPU, gradients included.  cuDNN (of JAX and of
TransformerEngine) and marin's FlashAttention 4 need a GPU that the tests of this library do not
have: there the arrays go through the steps in front of the kernel, which is emulated.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from seqpack_jax.errors import check_int, fail
from seqpack_jax.model.segments import SegmentInfo

__all__ = [
    "MarinBounds",
    "TeArguments",
    "to_jax_cudnn",
    "to_marin",
    "to_te",
    "to_tokamax_mask",
]

_CUDNN_ARGUMENTS = (
    "q_seqlen",
    "kv_seqlen",
    "q_offsets",
    "kv_offsets",
    "mask_type",
    "sliding_window_length",
    "qkv_layout",
)


class TeArguments(NamedTuple):
    """What TransformerEngine's attention takes beside query, key and value.

    Attributes:
        sequence_descriptor: its `SequenceDescriptor`.
        max_segments_per_seq: int, the most segments in a row.
        attn_mask_type: `"padding_causal"` or `"padding"`.
        window_size: `(left, right)`, tokens that are seen beside the token itself; or None.

    Example:
        >>> arguments = TeArguments(None, 8, "padding_causal", (127, 0))
        >>> 1 + sum(arguments.window_size)  # of window=128
        128
    """

    sequence_descriptor: Any
    max_segments_per_seq: int
    attn_mask_type: str
    window_size: tuple[int, int] | None


class MarinBounds(NamedTuple):
    """What the FlashAttention 4 of marin (the successor of levanter) takes beside q, k and v.

    Attributes:
        lower_bounds: int32 `[B, L]`, the first key that a token sees; `L` on padding.
        valid: bool `[B, L]`, False on padding.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> to_marin(segment_info(jnp.array([[0, 1, 1]]))).lower_bounds.tolist()
        [[3, 1, 1]]
    """

    lower_bounds: Array
    valid: Array


def to_tokamax_mask(info: SegmentInfo) -> Any:
    """Describe the segments to the operations under `tokamax.dot_product_attention`.

    That function itself takes no segments.  Its operations, `IMPLEMENTATIONS` of
    `tokamax._src.ops.attention.api`, take a `Mask` of the first and last key of each token:

        IMPLEMENTATIONS["xla_chunked"](query, key, value, mask=to_tokamax_mask(info))

    `"xla"` and `"xla_chunked"` have run here, on the CPU; the latter builds bool `[B, 1, L, L]`,
    but no scores of that size.  From its source: `"mosaic_gpu"` skips the blocks outside of the
    bounds, `"triton"` does so forward and builds the dense mask backward, `"cudnn"` builds it
    always, and `"mosaic_tpu"` raises: use `to_splash` there.  tokamax promotes dtypes and ranks
    itself, so it does not run where `jax_numpy_dtype_promotion` is "strict".

    A padding token sees itself.  A query without any key (cross attention) gets the mean of all
    values from the XLA forms: leave it out of the loss.

    Time and memory: O(B L).

    Args:
        info: ids `[..., L]`, contiguous.  Cross attention without `causal` and `window` is served.

    Returns:
        A `tokamax._src.ops.attention.base.Mask` with `k_start` int32 `[..., 1, L]`, 1 for all
        heads, and `is_causal`, or with `k_start` and `k_end`.

    Raises:
        SeqpackError: tokamax is not installed or its `Mask` takes other arguments; `info` is no
            `SegmentInfo`, not contiguous, or cross attention with `causal` or `window`.

    Example:
        The `k_start` of the mask, without tokamax:

        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 2, 2, 0, 0]]))
        >>> info.kv_bounds().k_start[:, None].tolist()
        [[[0, 0, 2, 2, 4, 5]]]
    """
    caller = "to_tokamax_mask"
    _check_info(caller, info)
    bounds = info.kv_bounds()
    try:
        import tokamax._src.ops.attention.base as tokamax_base  # type: ignore[import]
    except ImportError as error:
        _fail_to_import(caller, error, "pip install tokamax, or attend with blocked_attention")
    mask = _attribute(caller, tokamax_base, "Mask", ("k_start", "k_end", "is_causal"))
    k_start = bounds.k_start[..., None, :]
    if info.causal:
        return mask(k_start=k_start, is_causal=True)
    return mask(k_start=k_start, k_end=bounds.k_end[..., None, :])


def to_jax_cudnn(info: SegmentInfo, num_heads: int, num_kv_heads: int) -> dict[str, Any]:
    """Describe the segments to the packed cuDNN attention inside of JAX.

    `jax.nn.dot_product_attention` does not expose it.  The call, in half precision, on a GPU of
    compute capability 9.0 or more, heads of a multiple of 8 and at most 256 features:

        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        packed = to_jax_cudnn(info, query.shape[2], key.shape[2])
        cudnn.dot_product_attention(query, key, value, scale=head_dim**-0.5, **packed)

    `scale` is 1 unless it is given.  cuDNN leaves padding as it finds the buffer: select with
    `jnp.where(valid_tokens(segment_ids)[..., None, None], output, 0)`.  Its memory grows with
    `max_segments`.  Segments beyond `max_segments` are left out, and the other rows stay right.

    In cross attention, segments that stand on one side only are left out: cuDNN pairs segments by
    their count over the whole batch.

    Before https://github.com/jax-ml/jax/pull/39521 the offsets of keys are wrong when key heads are
    fewer than query heads.  The installed function is tried on an example; if it fails, grouped
    queries are refused.

    Time: O(B L + B max_segments log L).  Memory: O(B L).

    Args:
        info: ids `[B, L]`, contiguous, with `max_segments` of at least 2 (with 1, JAX ignores the
            offsets).  A `window` must be causal, and cross attention neither.
        num_heads: static; heads of the query, `[B, L, num_heads, H]`.
        num_kv_heads: static; heads of key and value; it divides `num_heads`.

    Returns:
        Keyword arguments: `q_seqlen` and `kv_seqlen` int32 `[B, M]`, `q_offsets` and `kv_offsets`
        int32 `[B, M + 1]`, `mask_type`, `sliding_window_length`, and `qkv_layout` (`"BTNH"`, the
        only one in which JAX computes the offsets right).

    Raises:
        SeqpackError: `info` or the heads are not as above; JAX has no such function, or one with
            other arguments, or one that is wrong for grouped queries.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 2, 2, 2, 0]]), max_segments=3)
        >>> packed = to_jax_cudnn(info, num_heads=8, num_kv_heads=8)
        >>> packed["q_seqlen"].tolist(), packed["q_offsets"].tolist(), packed["mask_type"].name
        ([[2, 3, -1]], [[0, 2, -1, -1]], 'PADDING_CAUSAL')
    """
    caller = "to_jax_cudnn"
    num_heads = check_int(caller, "num_heads", num_heads, 1)
    num_kv_heads = check_int(caller, "num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        problem = f"num_kv_heads = {num_kv_heads} does not divide num_heads = {num_heads}"
        fail(caller, problem, "pass the head counts of query and key")
    _check_rows(caller, info, least_segments=2)
    query, key = info.seqlens_and_offsets(), info.kv_seqlens_and_offsets()
    if info.window is not None and not info.causal:
        problem = f"window = {info.window} without causal=True, but cuDNN has causal windows only"
        fail(caller, problem, "use to_te, to_tokamax_mask or blocked_attention")
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn
    except ImportError as error:
        _fail_to_import(caller, error, "this is a private module of JAX; use to_jax_nn")
    _attribute(caller, cudnn, "dot_product_attention", _CUDNN_ARGUMENTS)
    types = _attribute(caller, cudnn, "MaskType")
    fix = getattr(cudnn, "_fix_seqlen_offsets", None)
    if num_heads != num_kv_heads and not _scales_by_own_heads(fix):
        problem = f"JAX {jax.__version__} reads wrong keys when num_kv_heads < num_heads"
        hint = "update JAX (jax-ml/jax#39521), repeat the key and value heads, or use to_jax_nn"
        fail(caller, problem, hint)
    mask_type = types.PADDING_CAUSAL if info.causal else types.PADDING
    values = (query.seqlens, key.seqlens, query.offsets, key.offsets, mask_type, info.window)
    return dict(zip(_CUDNN_ARGUMENTS, (*values, "BTNH"), strict=True))


def to_te(info: SegmentInfo) -> TeArguments:
    """Describe the segments to the fused attention of TransformerEngine, for NVIDIA GPUs.

    Of its layouts, only the packed ones serve; query, key and value stay `[B, L, heads, H]`:

        from transformer_engine.jax.flax import DotProductAttention

        packed = to_te(info)
        attention = DotProductAttention(head_dim, num_heads, num_kv_heads, dtype=query.dtype,
            qkv_layout="THD_THD_THD", transpose_batch_sequence=False,
            attn_mask_type=packed.attn_mask_type, window_size=packed.window_size,
            max_segments_per_seq=packed.max_segments_per_seq)
        attention.apply({}, query, key, value, packed.sequence_descriptor)

    It asserts that the fused kernel serves: half precision, and NVTE_FUSED_ATTN=1 in the
    environment where the release asks for it.
    With `"BSHD_BSHD_BSHD"` it would add up the segment ids and take the sum for a length.  For
    `transformer_engine.jax.attention.fused_attn`, `canonicalize_attn_mask_type` of the same module
    makes its enum of `attn_mask_type`.

    Contiguous rows are passed as lengths and starts.  Rows that `reorder_context_parallel` has
    reordered (its strategy must be the one TransformerEngine is told) are passed as ids and
    positions, which its own context parallelism asks for.  Then its rule holds: ids are 1, 2, ...
    without gaps, and a row with more than `max_segments` of them spoils *other* rows as well.

    In cross attention, segments that stand on one side only are left out, as by `to_jax_cudnn`,
    and padding stays as the kernel finds the buffer.

    Time: O(B L + B max_segments log L).  Memory: O(B L).

    Args:
        info: ids `[B, L]`, with `max_segments`.  Cross attention without `causal` and `window`.

    Returns:
        A `TeArguments`.

    Raises:
        SeqpackError: `info` is not as above; TransformerEngine is not installed, or its
            `SequenceDescriptor` takes other arguments.

    Example:
        The lengths and starts in the descriptor, without TransformerEngine:

        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 2, 2, 2, 0]]), max_segments=3)
        >>> seqlens, starts = info.seqlens_and_offsets()
        >>> seqlens.tolist(), starts.tolist()
        ([[2, 3, -1]], [[0, 2, -1, -1]])
    """
    caller = "to_te"
    max_segments = _check_rows(caller, info, least_segments=1)
    try:
        import transformer_engine.jax.attention as te_attention  # type: ignore[import]
    except ImportError as error:
        hint = "install transformer_engine with its JAX half, or use to_jax_cudnn or to_jax_nn"
        _fail_to_import(caller, error, hint)
    descriptor = _attribute(caller, te_attention, "SequenceDescriptor")
    mask_type, window = "padding_causal" if info.causal else "padding", None
    if info.window is not None:
        window = (info.window - 1, 0 if info.causal else info.window - 1)
    if info.contiguous:
        query, key = info.seqlens_and_offsets(), info.kv_seqlens_and_offsets()
        asked_for = ("seqlens", "seq_offsets")
        make = _attribute(caller, descriptor, "from_seqlens_and_offsets", asked_for)
        lengths, starts = (query.seqlens, key.seqlens), (query.offsets, key.offsets)
        return TeArguments(make(lengths, starts), max_segments, mask_type, window)
    asked_for = ("segment_ids", "segment_pos")
    make = _attribute(caller, descriptor, "from_segment_ids_and_pos", asked_for)
    kv_ids, kv_positions = info.kv_segment_ids, info.kv_positions
    ids = (info.segment_ids, info.segment_ids if kv_ids is None else kv_ids)
    positions = (info.positions, info.positions if kv_positions is None else kv_positions)
    # Releases 2.12 and 2.13 alone ask for these two.
    taken = inspect.signature(make).parameters
    more = {name: True for name in ("is_thd", "is_segment_ids_reordered") if name in taken}
    return TeArguments(make(ids, positions, **more), max_segments, mask_type, window)


def to_marin(info: SegmentInfo) -> MarinBounds:
    """Describe the segments to the FlashAttention 4 of marin, the successor of levanter.

    Query `i` sees the keys from `lower_bounds[i]` to `i`, and none where it is not valid:

        mask = AttentionMask.causal().with_fa4_bounds(*to_marin(info))
        gpu_fa4_cute_attention(query, key, value, mask)

    both of `levanter.grug.attention`.  Compute it once, outside of the loop over layers.  Marin's
    other implementations read the ids instead: `with_segment_ids(jnp.where(ids > 0, ids, -1))`,
    since levanter marks padding by -1.

    Time and memory: O(B L).

    Args:
        info: ids `[B, L]`, contiguous, causal, without `kv_segment_ids`; `window` is served.

    Returns:
        A `MarinBounds`.

    Raises:
        SeqpackError: `info` is not as above.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> bounds = to_marin(segment_info(jnp.array([[1, 1, 2, 2, 0]]), window=3))
        >>> bounds.lower_bounds.tolist(), bounds.valid.astype(int).tolist()
        ([[0, 0, 2, 2, 5]], [[1, 1, 1, 1, 0]])
    """
    caller = "to_marin"
    _check_rank(caller, info)
    if not info.causal or info.kv_segment_ids is not None:
        what = "cross attention" if info.causal else "causal=False"
        problem = f"info has {what}, but the kernel is causal self-attention"
        fail(caller, problem, "use to_tokamax_mask or blocked_attention")
    valid = info.segment_ids != 0
    length = jnp.int32(info.segment_ids.shape[-1])
    return MarinBounds(jnp.where(valid, info.kv_bounds().k_start, length), valid)


def _check_rows(caller: str, info: SegmentInfo, least_segments: int) -> int:
    _check_rank(caller, info)
    if info.kv_segment_ids is not None and (info.causal or info.window is not None):
        problem = "info is cross attention with causal or window, which the kernel would count"
        hint = "pass causal=False and no window, or use to_flax_mask"
        fail(caller, f"{problem} from the start of each segment", hint)
    if info.max_segments is None:
        problem = "info.max_segments is None, but the kernel's arrays have one place per segment"
        fail(caller, problem, "pass max_segments to segment_info, as to the packer")
    return check_int(caller, "info.max_segments", info.max_segments, least_segments)


def _check_info(caller: str, info: SegmentInfo) -> None:
    if not isinstance(info, SegmentInfo):
        fail(caller, f"info is a {type(info).__name__}", "pass what segment_info returns")


def _check_rank(caller: str, info: SegmentInfo) -> None:
    _check_info(caller, info)
    if info.segment_ids.ndim != 2:
        problem = f"segment_ids has shape {info.segment_ids.shape}, but the kernel takes [B, L]"
        fail(caller, problem, "add a leading dimension of 1, or reshape")


def _fail_to_import(caller: str, error: ImportError, hint: str) -> NoReturn:
    fail(caller, f"{error.name or 'a module'} cannot be imported ({error})", hint)


def _attribute(caller: str, holder: Any, name: str, arguments: Iterable[str] = ()) -> Any:
    """Return what `holder` has under `name`, if it takes all the arguments."""
    hint = "install a release that seqpack_jax is tested with, or use to_jax_nn"
    where = f"{getattr(holder, '__name__', holder)}.{name}"
    found = getattr(holder, name, None)
    if found is None:
        fail(caller, f"{where} does not exist in the installed release", hint)
    taken = inspect.signature(found).parameters if arguments else {}
    missing = [argument for argument in arguments if argument not in taken]
    if missing:
        fail(caller, f"{where} does not take {', '.join(missing)}", hint)
    return found


@functools.cache
def _scales_by_own_heads(fix: Callable[..., Any] | None) -> bool:
    """Try whether JAX scales the offsets of keys by the heads of keys (jax-ml/jax#39521).

    A segment of keys that starts at token 1 is at element 1, if keys have 1 head of 1 feature.
    """
    try:
        with jax.ensure_compile_time_eval():  # it may be called inside jit
            query, key = (jnp.zeros((1, 2, heads, 1), jnp.bfloat16) for heads in (2, 1))
            seqlens = jnp.array([[1, 1]], jnp.int32)
            starts = jnp.array([[0, 1, -1]], jnp.int32)
            fixed = fix(seqlens, seqlens, starts, starts, query, key)  # type: ignore[misc]
        found: list[int] = np.asarray(fixed[3])[0, :2].tolist()
    except (TypeError, ValueError, AttributeError, IndexError):
        return False  # another function than the one known here: do not trust it
    return found == [0, 1]
