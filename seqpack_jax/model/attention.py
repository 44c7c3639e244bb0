"""The attention layer for packed rows, and every door from segments to an attention kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.model.adapters import (
    splash_mask,
    to_flax_mask,
    to_jax_nn,
    to_pallas_gpu,
    to_splash,
    to_tpu_flash,
)
from seqpack_jax.model.blocked import blocked_attention
from seqpack_jax.model.dispatch import (
    BLOCKED_FROM,
    IMPLEMENTATIONS,
    choose_implementation,
    packed_attention,
)
from seqpack_jax.model.kernel_adapters import (
    MarinBounds,
    TeArguments,
    to_jax_cudnn,
    to_marin,
    to_te,
    to_tokamax_mask,
)
from seqpack_jax.model.rope import apply_rope, check_theta
from seqpack_jax.model.segments import SegmentInfo

__all__ = [
    "BLOCKED_FROM",
    "IMPLEMENTATIONS",
    "MarinBounds",
    "PackedSelfAttention",
    "TeArguments",
    "apply_rope",
    "blocked_attention",
    "choose_implementation",
    "packed_attention",
    "splash_mask",
    "to_flax_mask",
    "to_jax_cudnn",
    "to_jax_nn",
    "to_marin",
    "to_pallas_gpu",
    "to_splash",
    "to_te",
    "to_tokamax_mask",
    "to_tpu_flash",
]

_lecun_normal = nnx.initializers.lecun_normal()
_zeros = nnx.initializers.zeros_init()


class PackedSelfAttention(nnx.Module):  # type: ignore[misc]
    """Multi-head self-attention in which every segment of a row is on its own.

    It projects to queries, keys and values, rotates queries and keys by the positions of their
    segment (`apply_rope`), attends (`packed_attention`) and projects back.  Build the description
    of a batch once per step with `segment_info` and hand it to every layer: it says who sees whom.

    Its submodules `query`, `key`, `value` and `out` have the names and shapes of those of
    `nnx.MultiHeadAttention`, so weights can be moved between the two; that layer cannot rotate by
    packed positions: `input_positions` of flax 0.12.12 raises for every shape.

    It has no dropout of weights, no cache for decoding and no normalisation of queries and keys;
    with those, use the functions that this layer is made of.  It works under `nnx.jit`,
    `nnx.grad`, `nnx.scan`, `nnx.remat` and `jax.shard_map`.  Time and memory:
    those of `packed_attention`, and O(B L in_features num_heads head_dim) for the projections.

    Args:
        num_heads: of the queries.
        in_features: of a token.
        num_kv_heads: of keys and values, dividing `num_heads`; as many when None.
        head_dim: features of a head, even where there is a rotation; `in_features / num_heads`
            when None.
        out_features: of a token in the result; `in_features` when None.
        rope_theta: base of the wavelengths of the rotation; None for no rotation.
        window: where not None, replaces the `window` of `info` in this layer: for models that
            alternate local and global layers, as Gemma does.
        use_bias: whether the projections add a bias.
        dtype: of the computation; None infers it from input and parameters.
        param_dtype: of the parameters.
        kernel_init: of the kernels; `nnx.with_partitioning` around it shards them.
        out_kernel_init: of the kernel of `out`; `kernel_init` when None.
        bias_init: of the biases.
        out_bias_init: of the bias of `out`; `bias_init` when None.
        implementation: as in `packed_attention`; None chooses.
        rngs: seeds the parameters.

    Raises:
        SeqpackError: an argument is out of range, or head counts or features do not divide.

    Example:
        >>> from seqpack_jax.model.segments import segment_info
        >>> info = segment_info(jnp.array([[1, 1, 1, 2, 2, 0]]))
        >>> layer = PackedSelfAttention(4, 32, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 6, 32)), info).shape
        (1, 6, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        rope_theta: float | None = 10_000.0,
        window: int | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Any = _lecun_normal,
        out_kernel_init: Any = None,
        bias_init: Any = _zeros,
        out_bias_init: Any = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        size = _checked_head_dim(num_heads, in_features, kv_heads, head_dim, rope_theta)
        out_features = in_features if out_features is None else out_features
        check_int("PackedSelfAttention", "out_features", out_features, 1)
        if rope_theta is not None:
            rope_theta = check_theta("PackedSelfAttention", "rope_theta", rope_theta)
        if window is not None:
            check_int("PackedSelfAttention", "window", window, 1)
        if implementation is not None:
            check_choice("PackedSelfAttention", "implementation", implementation, IMPLEMENTATIONS)
        self.in_features = in_features
        self.rope_theta = rope_theta
        self.window = window
        self.implementation = implementation
        shared = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inner = {"kernel_init": kernel_init, "bias_init": bias_init, **shared}
        self.query = nnx.LinearGeneral(in_features, (num_heads, size), **inner)
        self.key = nnx.LinearGeneral(in_features, (kv_heads, size), **inner)
        self.value = nnx.LinearGeneral(in_features, (kv_heads, size), **inner)
        self.out = nnx.LinearGeneral(
            (num_heads, size),
            out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            **shared,
        )

    def __call__(self, x: Array, info: SegmentInfo) -> Array:
        """Attend inside each segment.

        Padding gives 0, also where `out` has a bias.  What stands there reaches neither a real
        token nor the gradient of a parameter, be it NaN, in `x` or in the gradient from above.

        Args:
            x: floats `[B, L, in_features]`.
            info: of the same rows, ids and positions `[B, L]`, from `segment_info`.

        Returns:
            `[B, L, out_features]`.

        Raises:
            SeqpackError: `x` and `info` do not fit, `info` is of an encoder-decoder, or
                `implementation` cannot serve it.
        """
        _check_input(x, info, self.in_features)
        if self.window is not None:
            info = dataclasses.replace(info, window=self.window)
        # The gradient of a kernel is a product of what goes in and of the gradient of what comes
        # out: there 0 x NaN would be NaN.
        real = (info.segment_ids != 0)[..., None]
        x = jnp.where(real, x, jnp.zeros((), x.dtype))
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.rope_theta is not None:
            query = apply_rope(query, info.positions, theta=self.rope_theta)
            key = apply_rope(key, info.positions, theta=self.rope_theta)
        attended = packed_attention(query, key, value, info, implementation=self.implementation)
        output: Array = self.out(attended)
        return jnp.where(real, output, jnp.zeros((), output.dtype))


def _checked_head_dim(
    num_heads: int, in_features: int, kv_heads: int, head_dim: int | None, rope_theta: float | None
) -> int:
    """Check the sizes of a layer and return the features of a head."""
    caller = "PackedSelfAttention"
    check_int(caller, "num_heads", num_heads, 1)
    check_int(caller, "in_features", in_features, 1)
    check_int(caller, "num_kv_heads", kv_heads, 1)
    if num_heads % kv_heads:
        problem = f"num_kv_heads = {kv_heads} does not divide num_heads = {num_heads}"
        fail(caller, problem, "let each key head serve the same number of query heads")
    if head_dim is None:
        if in_features % num_heads:
            problem = f"num_heads = {num_heads} does not divide in_features = {in_features}"
            fail(caller, problem, "pass head_dim")
        head_dim = in_features // num_heads
    check_int(caller, "head_dim", head_dim, 1)
    if rope_theta is not None and head_dim % 2:
        problem = f"head_dim = {head_dim} is odd, but features are rotated in pairs"
        fail(caller, problem, "choose an even head_dim, or rope_theta=None")
    return head_dim


def _check_input(x: Array, info: SegmentInfo, in_features: int) -> None:
    caller = "PackedSelfAttention"
    if not isinstance(info, SegmentInfo):
        problem = f"info is a {type(info).__name__}"
        fail(caller, problem, "pass what segment_info returns, built once per step")
    if info.kv_segment_ids is not None:
        problem = "info has kv_segment_ids, but self-attention has keys of the same rows only"
        fail(caller, problem, "use packed_attention for encoder-decoder attention")
    if x.ndim != 3 or x.shape != (*info.segment_ids.shape, in_features):
        expected = (*info.segment_ids.shape, in_features)
        problem = f"x has shape {x.shape}, but info and in_features ask for {expected}"
        fail(caller, problem, "pass [batch, length, in_features]")
