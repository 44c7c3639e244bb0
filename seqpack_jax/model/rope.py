"""Rotary position embedding for packed rows: every segment turns from its own position 0."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from seqpack_jax.errors import fail

__all__ = ["apply_rope"]


def apply_rope(x: ArrayLike, positions: ArrayLike, *, theta: float = 10_000.0) -> Array:
    """Rotate queries or keys by the position of their token (RoPE; Su et al., 2021).

    Feature `i` is paired with feature `i + H / 2`, the half-split pairing of GPT-NeoX and of Llama
    as Hugging Face stores it, and the pair is turned by `position * theta ** (-2 i / H)`.  Weights
    that pair neighbours (the original RoFormer and Llama files) must be permuted first.

    Scores of rotated queries and keys depend on the difference of their positions alone.  Positions
    that restart in every segment still matter: they keep the angles as small, and as exact, as
    those of a sequence on its own.  The angles are float32 whatever the dtype of `x`: in bfloat16
    the positions above 256 would run together.

    Time and memory: O(size of `x`).

    Args:
        x: floats `[..., L, N, H]`, queries or keys; `H` even.
        positions: integers `[..., L]`, those of `SegmentInfo`.
        theta: static; base of the wavelengths, over 0.

    Returns:
        The rotated `x`, of its shape and dtype.

    Raises:
        SeqpackError: `x` is not floats of rank 3 or more with an even last dimension, `positions`
            not integers of shape `[..., L]`, or `theta` not a number over 0.

    Example:
        >>> positions = jnp.array([0, 1, 2, 0, 1])  # two segments
        >>> x = jnp.tile(jnp.array([1.0, 0.0]), (5, 1, 1))  # one head, one pair of features
        >>> turned = apply_rope(x, positions)[:, 0]
        >>> jnp.arctan2(turned[:, 1], turned[:, 0]).round(3).tolist()  # the angles
        [0.0, 1.0, 2.0, 0.0, 1.0]
    """
    x, positions = jnp.asarray(x), jnp.asarray(positions)
    _check(x, positions)
    rotated: Array = _rotate(x, positions, check_theta("apply_rope", "theta", theta))
    return rotated


@functools.partial(jax.jit, static_argnames=("theta",))
def _rotate(x: Array, positions: Array, theta: float) -> Array:
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.multiply.outer(positions.astype(jnp.float32), frequency)[..., None, :]
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    cos, sin = jnp.cos(angle).astype(wide.dtype), jnp.sin(angle).astype(wide.dtype)
    first, second = wide[..., :half], wide[..., half:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def check_theta(caller: str, name: str, theta: Any) -> float:
    """Return `theta` as a float, if it is a number over 0."""
    is_number = isinstance(theta, numbers.Real) and not isinstance(theta, bool)
    if not (is_number and 0 < theta < math.inf):
        fail(caller, f"{name} = {theta!r}", "pass a number over 0, such as 10_000.0")
    return float(theta)


def _check(x: Array, positions: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 3:
        problem = f"x is {x.dtype} of shape {x.shape}, but it must be floats [..., L, N, H]"
        fail("apply_rope", problem, "pass queries or keys before their heads are merged")
    if x.shape[-1] % 2:
        problem = f"x has {x.shape[-1]} features per head, but they are rotated in pairs"
        fail("apply_rope", problem, "choose an even head_dim")
    if not jnp.issubdtype(positions.dtype, jnp.integer) or positions.shape != x.shape[:-2]:
        found = f"positions are {positions.dtype} of shape {positions.shape}"
        problem = f"{found}, but x of shape {x.shape} needs integers of shape {x.shape[:-2]}"
        fail("apply_rope", problem, "pass the positions of segment_info, one per token")
