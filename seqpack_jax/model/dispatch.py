"""One call for attention inside segments, whatever computes it."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from seqpack_jax.errors import check_choice, fail
from seqpack_jax.model.adapters import splash_mask, to_jax_nn, to_splash
from seqpack_jax.model.blocked import blocked_attention, check_arrays, keep_tokens
from seqpack_jax.model.kernel_adapters import to_tokamax_mask
from seqpack_jax.model.segments import SegmentInfo

__all__ = ["BLOCKED_FROM", "IMPLEMENTATIONS", "choose_implementation", "packed_attention"]

# Where no kernel serves, 'dense' below this many tokens in a row (of queries or keys, whichever is
# longer) and 'blocked' from it on.  Measured on CPU, forward and backward: 'blocked' is even at
# 128, 1.2 times as fast at 256 and twice at 512, while the compiler splits 'dense' over devices.
BLOCKED_FROM = 512
_BLOCKED_FROM_ELSEWHERE = 2048  # not measured: a guard of the memory, as loops are slow there

IMPLEMENTATIONS = ("dense", "blocked", "splash", "cudnn", "tokamax")

# Those that take a mask of any form; the others take intervals of keys, or ids in row order.
_TAKE_ANY_MASK = ("dense", "cudnn")


class _Typed(Protocol):
    """What `choose_implementation` reads of an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def packed_attention(
    query: Array,
    key: Array,
    value: Array,
    info: SegmentInfo,
    *,
    implementation: str | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Array:
    """Attend inside each segment: scaled dot-product attention (Vaswani et al., 2017) on rows.

    Who sees whom is what `info` says: segments, `causal`, `window`, keys of other rows.  Heads may
    share keys and values (grouped queries; Ainslie et al., 2023): query head `n` uses key head
    `n // (N / K)`.

    Padding gives 0, and so does a query whose segment has no key (encoder-decoder).  What stands at
    padding, even NaN, reaches neither a real token nor a gradient.

    | implementation | what runs | time | memory | it needs |
    | --- | --- | --- | --- | --- |
    | `'dense'` | `jax.nn.dot_product_attention`, bias built inside | O(L S) | O(L S) | nothing |
    | `'blocked'` | `blocked_attention` | the tiles that hold a segment | O(L + S) | contiguous |
    | `'splash'` | Pallas kernel of JAX for TPU | causal tiles | O(L + S) | lengths of n x 128 |
    | `'cudnn'` | `jax.nn`'s cuDNN form, bool mask | O(L S) | O(L S) | bfloat16 or float16 |
    | `'tokamax'` | the first of tokamax's kernels that can | its tiles | see below | tokamax |

    Of tokamax that is, on a GPU, its Mosaic kernel, in O(L + S) memory; else its Triton kernel,
    whose backward pass builds a bool mask `[B, 1, L, S]`; else, and on a CPU, its XLA form, which
    builds that mask too, but no scores of its size.

    "Contiguous" is `info.contiguous`, and neither `causal` nor `window` between different rows;
    splash and tokamax need it too.  On several devices, rows split: plain jit does for `'dense'`;
    call the others under `jax.shard_map`, since XLA can split neither loops nor kernels (with
    `check_vma=False` for splash, whose kernel does not say how its result varies).

    What has run where: `'dense'` and `'blocked'` on the CPU, `'splash'` there in interpret mode,
    `'tokamax'` there through its XLA form.  Nothing here has run on a GPU or a TPU.

    `'dense'` has its softmax in float32, also for float64, and under strict dtype promotion
    computes everything in float32.  `'tokamax'` needs JAX's default promotion of dtypes and ranks.

    Call it inside jit, so that XLA fuses the bias and the selection of real tokens.

    Args:
        query: floats `[B, L, N, H]`.
        key: `[B, S, K, H]` of the same dtype, `K` dividing `N`; `S = L` unless `info` has
            `kv_segment_ids`.
        value: as `key`.
        info: of the rows, ids `[B, L]` (and `[B, S]`).
        implementation: static; None takes `choose_implementation`.
        scale: static; factor of the scores, `1 / sqrt(H)` when None.
        interpret: static; run the Pallas kernel of `'splash'` without a TPU, slowly, to test it.

    Returns:
        `[B, L, N, H]` of the dtype of `query`.

    Raises:
        SeqpackError: shapes or dtypes do not fit, the implementation is not known, cannot serve
            these shapes, this dtype or this `info`, or is not installed.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 2, 0]]))
        >>> query = key = jnp.zeros((1, 4, 1, 2))  # equal scores: the mean of what a token sees
        >>> value = jnp.array([2.0, 4.0, 8.0, jnp.nan]).reshape(1, 4, 1, 1) + key
        >>> packed_attention(query, key, value, info)[0, :, 0, 0].tolist()
        [2.0, 3.0, 8.0, 0.0]
    """
    kv_ids = check_arrays("packed_attention", query, key, value, info)
    if implementation is None:
        implementation = choose_implementation(query, key, info)
    else:
        check_choice("packed_attention", "implementation", implementation, IMPLEMENTATIONS)
        obstacle = _obstacle(implementation, query, key, info)
        if obstacle:
            hint = "pass implementation=None, which chooses one that can"
            fail("packed_attention", f"implementation {implementation!r} {obstacle}", hint)
    if query.size == 0 or key.size == 0:
        return jnp.zeros_like(query)  # which not all kernels take
    output: Array
    if implementation == "blocked":
        output = blocked_attention(query, key, value, info, scale=scale)
        return output  # it treats padding as below
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    # A weight of 0 does not hide NaN.  Selecting here also selects among the cotangents.
    has_key, is_key = _has_key(info), kv_ids != 0
    query, key, value = (
        keep_tokens(has_key, query),
        keep_tokens(is_key, key),
        keep_tokens(is_key, value),
    )
    if implementation == "splash":
        output = _splash(query, key, value, info, scale, interpret)
    elif implementation == "tokamax":
        output = _tokamax(query, key, value, info, scale)
    else:
        form = "cudnn" if implementation == "cudnn" else "xla"
        output = _jax_nn(query, key, value, info, scale, form)
    return keep_tokens(has_key, output)


def choose_implementation(query: _Typed, key: _Typed, info: SegmentInfo) -> str:
    """Return the implementation that `packed_attention` takes when it is told none.

    It is chosen while tracing, by `jax.default_backend()`: on a TPU `'splash'`; on a GPU
    `'tokamax'` if it can be imported, else `'cudnn'`; each if it can serve the shapes, the dtype
    and `info`.  Otherwise `'blocked'` for rows of `BLOCKED_FROM` tokens or more (2,048 where the
    backend is not the CPU), where `info` lets it, and `'dense'`.  To override it, pass
    `implementation` to `packed_attention` or `PackedSelfAttention`: for instance when a computation
    is put on the CPU of a GPU host.

    Args:
        query: array, or `jax.ShapeDtypeStruct`, of shape `[B, L, N, H]`.
        key: likewise `[B, S, K, H]`.
        info: of the rows.

    Returns:
        One of `IMPLEMENTATIONS`.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.ones((1, 2048), jnp.int32))
        >>> query = jax.ShapeDtypeStruct((1, 2048, 8, 64), jnp.bfloat16)
        >>> choose_implementation(query, query, info)  # on CPU
        'blocked'
    """
    backend = jax.default_backend()
    preferred = ["splash"] if backend == "tpu" else []
    if backend == "gpu":
        preferred = ["tokamax"] if _has_tokamax() else []
        # cuDNN takes wider heads from Hopper on alone.
        preferred += ["cudnn"] if query.shape[-1] <= 128 else []
    least = BLOCKED_FROM if backend == "cpu" else _BLOCKED_FROM_ELSEWHERE
    if max(query.shape[1], key.shape[1]) >= least:
        preferred.append("blocked")
    return next((name for name in preferred if not _obstacle(name, query, key, info)), "dense")


def _obstacle(implementation: str, query: _Typed, key: _Typed, info: SegmentInfo) -> str | None:
    """Say why `implementation` cannot serve, or return None."""
    length, kv_length, size = query.shape[1], key.shape[1], query.shape[-1]
    if implementation not in _TAKE_ANY_MASK:
        if not info.contiguous:
            return "needs contiguous segments, but info.contiguous is False"
        if info.kv_segment_ids is not None and (info.causal or info.window is not None):
            return "cannot mask by position between queries and keys of different rows"
    if implementation == "splash" and (length % 128 or kv_length % 128):
        return f"needs lengths that are multiples of 128, but they are {length} and {kv_length}"
    if implementation == "splash" and query.dtype == jnp.float64:
        return "computes in float32, but query is float64"
    if implementation == "cudnn":
        if query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"needs bfloat16 or float16, but query is {query.dtype}"
        if size % 8 or size > 256 or length % 2 or kv_length % 2:
            needs = "needs even lengths and heads of 8, 16, ... 256 features"
            return f"{needs}, but the lengths are {length} and {kv_length}, and heads have {size}"
    if implementation == "tokamax":
        if not _has_tokamax():
            return "needs tokamax, which cannot be imported"
        if _is_strict("dtype", "strict") or _is_strict("rank", "raise"):
            return "needs the default jax_numpy_dtype_promotion and jax_numpy_rank_promotion"
    return None


def _is_strict(kind: str, setting: str) -> bool:
    """Say whether JAX's promotion of dtypes or ranks is set to refuse."""
    found: str = getattr(jax.config, f"jax_numpy_{kind}_promotion")
    return found == setting


def _jax_nn(
    query: Array, key: Array, value: Array, info: SegmentInfo, scale: float, form: str
) -> Array:
    dtype = query.dtype
    # JAX mixes its float32 softmax with other dtypes, which strict promotion refuses; and it cannot
    # compile the gradient of float16 on a CPU.
    is_half_on_cpu = dtype == jnp.float16 and jax.default_backend() == "cpu"
    if form == "xla" and (is_half_on_cpu or _is_strict("dtype", "strict")):
        query, key, value = (each.astype(jnp.float32) for each in (query, key, value))
    arguments: dict[str, Any] = {"implementation": form, **to_jax_nn(info, form)}
    output: Array = jax.nn.dot_product_attention(query, key, value, scale=scale, **arguments)
    return output.astype(dtype)


def _splash(
    query: Array, key: Array, value: Array, info: SegmentInfo, scale: float, interpret: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # Tiles of 512 are MaxText's default; the kernel's own default of 128 is slow on a TPU.
    block = next(b for b in (512, 256, 128) if not (query.shape[1] % b or key.shape[1] % b))
    kernel = splash.make_splash_mha(
        splash_mask(info, query.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The kernel knows no scale; in float32, since 1 / sqrt(128) is not a bfloat16.
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    heads_first = (each.transpose(0, 2, 1, 3) for each in (query, key, value))
    output: Array = jax.vmap(kernel)(*heads_first, to_splash(info))
    return output.transpose(0, 2, 1, 3)


def _has_tokamax() -> bool:
    """Say whether tokamax, with the private modules that are used here, can be imported."""
    try:
        import tokamax._src.ops.attention.api  # type: ignore[import-not-found,import-untyped]
        import tokamax._src.ops.attention.base  # noqa: F401
    except (ImportError, AttributeError):  # the latter where JAX is too new or too old for it
        return False
    return True


def _tokamax(query: Array, key: Array, value: Array, info: SegmentInfo, scale: float) -> Array:
    mask = to_tokamax_mask(info)
    # Private as is the mask, whose version was checked: the public function takes no key ranges.
    from tokamax._src.ops.attention.api import (  # type: ignore[import-not-found,import-untyped]
        IMPLEMENTATIONS as operations,
    )

    def attend(name: str) -> Array:
        output: Array = operations[name](query, key, value, mask=mask, logits_scale=scale)
        return output

    for name in ("mosaic_gpu", "triton") if jax.default_backend() == "gpu" else ():
        if name in operations:
            with contextlib.suppress(NotImplementedError):  # not its GPU, dtype or shape
                return attend(name)
    return attend("xla_chunked")


def _has_key(info: SegmentInfo) -> Array:
    """Mark the real tokens that may attend to anything: bool `[B, L]`."""
    real = info.segment_ids != 0
    if info.kv_segment_ids is None:
        return real
    if info.contiguous and not info.causal and info.window is None:
        bounds = info.kv_bounds()
        return real & (bounds.k_end > bounds.k_start)
    return real & jnp.any(info.mask(pad="empty")[:, 0], axis=-1)
