"""Labels and weights that keep a loss inside its segments, and the mean over real tokens.

All functions are pure and jitted, and check shapes and dtypes while tracing.  `[..., L]` is any
number of rows of `L` tokens.

A training step composes them, here with one batch per device under `jax.shard_map`:

    labels, weights = next_token_labels(tokens, segment_ids)
    weights, denominator = loss_weights(segment_ids, weights)
    denominator = jax.lax.psum(denominator, "data")
    loss = jax.lax.psum(token_mean(per_token_loss, weights, denominator), "data")

With global arrays under plain `jax.jit` the same lines hold without the two `psum`s.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from seqpack_jax.errors import check_int, fail
from seqpack_jax.model.segments import check_ids

__all__ = ["LossWeights", "loss_weights", "next_token_labels", "token_mean"]


class LossWeights(NamedTuple):
    """The weight of each token in a loss, and the sum that turns the weighted sum into a mean.

    Attributes:
        weights: float32 `[..., L]`, 0 on padding.
        denominator: float32 scalar, the plain sum of `weights`: 0 for a batch of padding, so that
            the sum over devices is right.  `token_mean` divides by it safely.

    Example:
        >>> weights, denominator = loss_weights(jnp.array([1, 1, 2, 0]))
        >>> weights.tolist(), float(denominator)
        ([1.0, 1.0, 1.0, 0.0], 3.0)
    """

    weights: Array
    denominator: Array


@functools.partial(jax.jit, static_argnames=("ignore_index",))
def next_token_labels(
    tokens: ArrayLike, segment_ids: ArrayLike, *, ignore_index: int = -100
) -> tuple[Array, Array]:
    """Shift the tokens left by one for a causal language model, without crossing a boundary.

    A plain shift trains the last token of each segment to predict the first of its neighbour.

    Args:
        tokens: integers `[..., L]`, within int32.
        segment_ids: integers `[..., L]`, 0 = padding.
        ignore_index: static; the label of tokens that have nothing to predict.  It is no class:
            what a loss function returns for it is garbage or NaN, which `token_mean` drops.

    Returns:
        `(labels, weights)`.  `labels`, int32 `[..., L]`, is the next token of the same segment;
        the last token of each segment and padding get `ignore_index`.  `weights`, float32
        `[..., L]`, is 1 where there is a label, else 0.

    Raises:
        SeqpackError: `tokens` and `segment_ids` are not integers of one shape and of rank 1 or
            more, or `ignore_index` is not an int32.

    Example:
        >>> tokens, segment_ids = jnp.array([7, 8, 9, 4, 5]), jnp.array([1, 1, 1, 2, 0])
        >>> labels, weights = next_token_labels(tokens, segment_ids)
        >>> labels.tolist(), weights.tolist()
        ([8, 9, -100, -100, -100], [1.0, 1.0, 0.0, 0.0, 0.0])
    """
    caller = "next_token_labels"
    ids = check_ids(caller, "segment_ids", segment_ids)
    tokens = check_ids(caller, "tokens", tokens)
    _check_shape(caller, "tokens", tokens, "segment_ids", ids)
    ignore_index = check_int(caller, "ignore_index", ignore_index, -(2**31), 2**31 - 1)
    has_label = (ids != 0) & (_shift_left(ids) == ids)
    labels = jnp.where(has_label, _shift_left(tokens.astype(jnp.int32)), ignore_index)
    return labels, has_label.astype(jnp.float32)


@jax.jit
def loss_weights(segment_ids: ArrayLike, weights: ArrayLike | None = None) -> LossWeights:
    """Weigh every real token alike, or by `weights`, and padding by 0.

    Counting tokens, not rows, makes the loss independent of how the sequences were packed.  The
    denominator is this batch's share: add it up over devices (and over the micro-batches of an
    accumulated gradient) *before* dividing; a mean of means would favour the emptier batches.

    Args:
        segment_ids: integers `[..., L]`, 0 = padding.
        weights: bool or numbers `[..., L]`; for instance those of `next_token_labels`, or 0 on the
            tokens of a prompt.  What stands at padding is ignored, even NaN.

    Returns:
        A `LossWeights`.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more, or `weights` has another
            shape.

    Example:
        >>> weights, denominator = loss_weights(jnp.array([1, 1, 2, 0]), jnp.array([0, 1, 2, 9]))
        >>> weights.tolist(), float(denominator)
        ([0.0, 1.0, 2.0, 0.0], 3.0)
    """
    ids = check_ids("loss_weights", "segment_ids", segment_ids)
    real = ids != 0
    if weights is None:
        masked = real.astype(jnp.float32)
    else:
        given = jnp.asarray(weights)
        _check_shape("loss_weights", "weights", given, "segment_ids", ids)
        masked = jnp.where(real, given.astype(jnp.float32), 0.0)
    return LossWeights(masked, jnp.sum(masked))


@jax.jit
def token_mean(
    values: ArrayLike, weights: ArrayLike, denominator: ArrayLike | None = None
) -> Array:
    """Average a loss (or an accuracy) over the tokens whose weight is not 0.

    Values of weight 0 are dropped, not multiplied by 0: a NaN there reaches neither the mean nor
    the gradient with respect to `values`.  Without any weight the mean is 0, not NaN.

    NaN at a token that counts stays visible.  And what made `values` may still spoil the gradient
    behind it, where a derivative is infinite (`log` of 0 at padding): 0 x inf is NaN.

    Args:
        values: numbers `[..., L]`, for instance the cross entropy of each token.
        weights: float32 `[..., L]` of `loss_weights`.
        denominator: scalar; the sum of the weights of the *global* batch.  The results of all
            devices then add up to the global mean.  Without it, the sum of `weights`.

    Returns:
        float32 scalar.

    Raises:
        SeqpackError: `values` and `weights` differ in shape, or `denominator` is not a scalar.

    Example:
        >>> weights, denominator = loss_weights(jnp.array([1, 1, 2, 0]))
        >>> float(token_mean(jnp.array([1.0, 2.0, 6.0, jnp.nan]), weights, denominator))
        3.0
    """
    values = jnp.asarray(values).astype(jnp.float32)
    weights = jnp.asarray(weights).astype(jnp.float32)
    _check_shape("token_mean", "values", values, "weights", weights)
    total = jnp.sum(weights) if denominator is None else jnp.asarray(denominator, jnp.float32)
    if total.ndim:
        problem = f"denominator has shape {total.shape}, but it must be a scalar"
        fail("token_mean", problem, "pass the sum of all weights")
    weighted_sum = jnp.sum(jnp.where(weights != 0, values, 0.0) * weights)
    return weighted_sum / jnp.where(total != 0, total, 1.0)


def _shift_left(values: Array) -> Array:
    """Move the values one place to the left along the last axis, with a 0 in the last place."""
    return jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)


def _check_shape(caller: str, name: str, array: Array, other: str, expected: Array) -> None:
    if array.shape != expected.shape:
        problem = f"{name} has shape {array.shape}, but {other} has shape {expected.shape}"
        fail(caller, problem, "pass both as [..., L], one value per token")
