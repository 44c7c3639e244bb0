"""Labels and weights that keep a loss inside its segments, and means over the global batch.

All functions are pure and jitted, and check shapes and dtypes while tracing.  `[..., L]` is any
number of rows of `L` tokens.

A training step composes them, here with one batch per device under `jax.shard_map`:

    losses, weights, denominator = packed_cross_entropy(logits, tokens, segment_ids)
    denominator = jax.lax.psum(denominator, "data")
    loss = jax.lax.psum(token_mean(losses, weights, denominator), "data")

With global arrays under plain `jax.jit` the same lines hold without the two `psum`s.  For another
loss than the cross entropy of the next token, the first line is two:

    labels, weights = next_token_labels(tokens, segment_ids)
    weights, denominator = loss_weights(segment_ids, weights)

Micro-batches of an accumulated gradient are summed in the same way: the denominator is that of all
of them, known before the first from `loss_weights`, which needs no logits.

Labels and weights look at the neighbour of a token and at whole segments.  Compute them from whole
rows, *before* context parallelism reorders or shards the sequence axis, and reorder them along.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.model.ids import check_ids, run_starts
from seqpack_jax.model.reductions import add_up

__all__ = [
    "LossWeights",
    "TokenLosses",
    "loss_weights",
    "next_token_labels",
    "packed_cross_entropy",
    "segment_log_probs",
    "token_mean",
]

_REDUCTIONS = ("token", "segment", "row")


class LossWeights(NamedTuple):
    """The weight of each token in a loss, and the sum that turns the weighted sum into a mean.

    Attributes:
        weights: float32 `[..., L]`, 0 on padding.
        denominator: float32 scalar, what the weights of this batch add up to: 0 for a batch of
            padding, so that the sum over devices is right.  `token_mean` divides by it safely.

    Example:
        >>> weights, denominator = loss_weights(jnp.array([1, 1, 2, 0]))
        >>> weights.tolist(), float(denominator)
        ([1.0, 1.0, 1.0, 0.0], 3.0)
    """

    weights: Array
    denominator: Array


class TokenLosses(NamedTuple):
    """The loss of each token and its weight, in the order in which `token_mean` takes them.

    Attributes:
        losses: float32 `[..., L]`, 0 where the weight is 0.
        weights: float32 `[..., L]`, as in `LossWeights`.
        denominator: float32 scalar, as in `LossWeights`.

    Example:
        >>> logits, tokens = jnp.zeros((3, 4)), jnp.array([1, 2, 3])
        >>> losses = packed_cross_entropy(logits, tokens, jnp.array([1, 1, 0]))
        >>> round(float(token_mean(*losses)), 4)  # log(4)
        1.3863
    """

    losses: Array
    weights: Array
    denominator: Array


@functools.partial(jax.jit, static_argnames=("ignore_index",))
def next_token_labels(
    tokens: ArrayLike, segment_ids: ArrayLike, *, ignore_index: int = -100
) -> tuple[Array, Array]:
    """Shift the tokens left by one for a causal language model, without crossing a boundary.

    A plain shift trains the last token of each segment to predict the first of its neighbour.
    Time and memory: O(B L).

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


@functools.partial(jax.jit, static_argnames=("reduction",))
def loss_weights(
    segment_ids: ArrayLike, weights: ArrayLike | None = None, *, reduction: str = "token"
) -> LossWeights:
    """Weigh the real tokens, and padding by 0: what the mean of a loss is taken over.

    * `token`: every token alike, or by `weights`.  The loss does not depend on how the sequences
      were packed, and long sequences count more.
    * `segment`: every sequence alike: its weights are scaled to add up to 1.  It does not depend on
      the packing either.
    * `row`: every row alike.  For comparison with trainers that average over rows; it *does* depend
      on what shares a row.

    The denominator is this batch's share: add it up over devices (and over the micro-batches of an
    accumulated gradient) *before* dividing; a mean of means would favour the emptier batches.

    Time and memory: O(B L); no bound on the segments is needed.  Segments and rows must be whole.

    Args:
        segment_ids: integers `[..., L]`, 0 = padding.
        weights: bool or numbers `[..., L]`; for instance those of `next_token_labels`.  What stands
            at padding is ignored, even NaN.  Without negative ones in `segment` and `row`, where a
            segment or row of which the weights add up to 0 does not count.
        reduction: static; `token`, `segment` or `row`.

    Returns:
        A `LossWeights`.  Its denominator is the sum of the weights, or the number of segments or of
        rows in which any token has a weight.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more, `weights` has another shape,
            or `reduction` is not known.

    Example:
        >>> segment_ids, weights = jnp.array([1, 1, 2, 0]), jnp.array([1, 3, 2, 9])
        >>> for reduction in ("token", "segment"):
        ...     result = loss_weights(segment_ids, weights, reduction=reduction)
        ...     print(result.weights.tolist(), float(result.denominator))
        [1.0, 3.0, 2.0, 0.0] 6.0
        [0.25, 0.75, 1.0, 0.0] 2.0
    """
    ids = check_ids("loss_weights", "segment_ids", segment_ids)
    check_choice("loss_weights", "reduction", reduction, _REDUCTIONS)
    real = ids != 0
    if weights is None:
        masked = real.astype(jnp.float32)
    else:
        given = jnp.asarray(weights)
        _check_shape("loss_weights", "weights", given, "segment_ids", ids)
        masked = jnp.where(real, given.astype(jnp.float32), 0.0)
    if reduction == "token":
        return LossWeights(masked, jnp.sum(masked))
    if reduction == "row":
        totals = jnp.sum(masked, axis=-1, keepdims=True)
        of_token = totals
    else:  # a slot for every run, those of padding among them: a row has at most L
        run = jnp.cumsum(run_starts(ids), axis=-1, dtype=jnp.int32)
        totals = add_up(masked, run, ids.shape[-1])
        of_token = jnp.take_along_axis(totals, run - 1, axis=-1)
    scaled = masked / jnp.where(of_token != 0, of_token, 1.0)
    return LossWeights(scaled, jnp.sum(totals != 0, dtype=jnp.float32))


@jax.jit
def token_mean(
    values: ArrayLike, weights: ArrayLike, denominator: ArrayLike | None = None
) -> Array:
    """Average a loss (or an accuracy) over the tokens whose weight is not 0.

    Values of weight 0 are dropped, not multiplied by 0: a NaN there reaches neither the mean nor
    the gradient with respect to `values`.  Without any weight the mean is 0, not NaN.

    NaN at a token that counts stays visible.  And what made `values` may still spoil the gradient
    behind it, where a derivative is infinite (`log` of 0 at padding): 0 x inf is NaN.
    Time and memory: O(B L).

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


@functools.partial(jax.jit, static_argnames=("reduction",))
def packed_cross_entropy(
    logits: ArrayLike,
    tokens: ArrayLike,
    segment_ids: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    reduction: str = "token",
) -> TokenLosses:
    """Compute the cross entropy of the next token in each segment, with the weights of its mean.

    `token_mean(*packed_cross_entropy(...))` is the loss on one device; see the top of this module
    for several.  The last token of each segment predicts nothing.  Logits that predict nothing, or
    with weight 0, are dropped: NaN in them reaches neither the losses nor the gradients.  NaN in
    logits that count stays visible.  It needs whole rows; for rows that devices share, see
    `context_parallel`.

    Time: O(B L V).  Memory: one float32 array of the size of the logits beside them, which the
    gradient reuses where the logits are float32; no one-hot labels.

    Args:
        logits: floats `[..., L, V]`, at each token those of the next one; computed in float32.
        tokens: integers `[..., L]` in `[0, V)`; at padding anything.
        segment_ids: integers `[..., L]`, 0 = padding.
        weights: bool or numbers `[..., L]`, how much it counts that a *token* is predicted (at the
            token before it): 0 on the tokens of a prompt, 1 on those of its answer.
        reduction: static; `token`, `segment` or `row`, see `loss_weights`.

    Returns:
        A `TokenLosses`: entry `i` is the prediction of token `i + 1`.

    Raises:
        SeqpackError: `tokens` and `segment_ids` are not integers of one shape and of rank 1 or
            more, `weights` has another shape, `logits` is not floats with one axis more, or
            `reduction` is not known.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]]))
        >>> tokens, segment_ids = jnp.array([0, 1, 1]), jnp.array([1, 1, 1])
        >>> prompt = jnp.array([True, True, False])
        >>> losses, weights, denominator = packed_cross_entropy(
        ...     logits, tokens, segment_ids, ~prompt)
        >>> jnp.exp(-losses).round(3).tolist(), weights.tolist(), float(denominator)
        ([1.0, 0.800000011920929, 1.0], [0.0, 1.0, 0.0], 1.0)
    """
    caller = "packed_cross_entropy"
    losses, ids, counted = _losses(caller, logits, tokens, segment_ids, weights)
    check_choice(caller, "reduction", reduction, _REDUCTIONS)
    return TokenLosses(losses, *loss_weights(ids, counted, reduction=reduction))


@functools.partial(jax.jit, static_argnames=("max_segments",))
def segment_log_probs(
    logits: ArrayLike,
    tokens: ArrayLike,
    segment_ids: ArrayLike,
    max_segments: int,
    weights: ArrayLike | None = None,
) -> Array:
    """Add up the log-probabilities of the tokens of each segment, each given those before it.

    For preference losses, rewards and evaluation of several sequences in one row.  The first token
    of a segment is given, not predicted: begin sequences with a BOS token to score all others.  It
    needs whole rows.

    Time: O(B L V).  Memory: that of `packed_cross_entropy`.  Slots and the limit on segments are
    those of `reductions.segment_sum`.

    Args:
        logits: floats `[..., L, V]`, at each token those of the next one; computed in float32.
        tokens: integers `[..., L]` in `[0, V)`; at padding anything.
        segment_ids: integers `[..., L]`, 1, 2, ... and 0 = padding.
        max_segments: static; the most segments in any row, in `[1, 2**20]`.
        weights: bool or numbers `[..., L]`, by which to multiply the log-probability of each token:
            0 on the tokens of a prompt.

    Returns:
        float32 `[..., max_segments]`; 0 for segments of one token, and where there is none.

    Raises:
        SeqpackError: as `packed_cross_entropy`, or `max_segments` is not an integer in its range.

    Example:
        A DPO loss (Rafailov et al., 2023); in a row, chosen and rejected answers take turns.  Pairs
        that do not exist count 0; on several devices, `psum` both sums.

        >>> from seqpack_jax.model.reductions import segment_sum
        >>> def dpo_loss(logits, reference_logits, tokens, segment_ids, max_segments, answer=None):
        ...     ratios = segment_log_probs(logits, tokens, segment_ids, max_segments, answer)
        ...     ratios -= segment_log_probs(
        ...         reference_logits, tokens, segment_ids, max_segments, answer)
        ...     losses = -jax.nn.log_sigmoid(0.1 * (ratios[..., 0::2] - ratios[..., 1::2]))
        ...     exists = segment_sum(segment_ids > 0, segment_ids, max_segments)[..., 1::2] > 0
        ...     return jnp.sum(jnp.where(exists, losses, 0.0)), jnp.sum(exists)
        >>> tokens, segment_ids = jnp.array([0, 1, 0, 0, 9]), jnp.array([1, 1, 2, 2, 0])
        >>> logits = jnp.zeros((5, 2)).at[:, 1].set(10.0)  # prefers token 1, which was chosen
        >>> total, pairs = dpo_loss(logits, jnp.zeros((5, 2)), tokens, segment_ids, 4)
        >>> round(float(total), 4), int(pairs)  # -log(sigmoid(0.1 * 10))
        (0.3133, 1)
    """
    caller = "segment_log_probs"
    losses, ids, counted = _losses(caller, logits, tokens, segment_ids, weights)
    slots = check_int(caller, "max_segments", max_segments, 1, 2**20)
    return add_up(-losses * counted, ids.astype(jnp.int32), slots)


def _losses(
    caller: str, logits: Any, tokens: Any, segment_ids: Any, weights: Any
) -> tuple[Array, Array, Array]:
    """Return the loss of each token's prediction, the ids, and the weight of each prediction."""
    import optax

    ids = check_ids(caller, "segment_ids", segment_ids)
    targets = check_ids(caller, "tokens", tokens)
    _check_shape(caller, "tokens", targets, "segment_ids", ids)
    scores = jnp.asarray(logits)
    if scores.shape[:-1] != ids.shape or not jnp.issubdtype(scores.dtype, jnp.floating):
        problem = f"logits is {scores.dtype} of shape {scores.shape}, but segment_ids has shape"
        fail(caller, f"{problem} {ids.shape}", "pass logits as floats [..., L, V]")
    labels, counted = next_token_labels(targets, ids)
    if weights is not None:
        given = jnp.asarray(weights)
        _check_shape(caller, "weights", given, "segment_ids", ids)
        counted = jnp.where(counted != 0, _shift_left(given.astype(jnp.float32)), 0.0)
    counts = counted != 0
    # Both the logits and the losses are dropped: a loss of weight 0 would still give the gradient
    # 0 x NaN.  To optax the label -100 is NaN, or a class of a vocabulary of 100 and more.
    scores = jnp.where(counts[..., None], scores.astype(jnp.float32), 0.0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.where(counts, labels, 0))
    return jnp.where(counts, entropy, 0.0), ids, counted


def _shift_left(values: Array) -> Array:
    """Move the values one place to the left along the last axis, with a 0 in the last place."""
    return jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)


def _check_shape(caller: str, name: str, array: Array, other: str, expected: Array) -> None:
    if array.shape != expected.shape:
        problem = f"{name} has shape {array.shape}, but {other} has shape {expected.shape}"
        fail(caller, problem, "pass both as [..., L], one value per token")
