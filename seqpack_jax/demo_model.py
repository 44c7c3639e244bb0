"""The model of the demo: a small decoder-only transformer, its training step, and the proof.

The three places where packing meets a model are short: `packed_loss` builds the bias from the
segment ids and takes labels that stay inside a segment, and `apply_rope` reads `positions`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from seqpack_jax.feeding.batch import PackedBatch, unpack_batch
from seqpack_jax.model.losses import loss_weights, next_token_labels, token_mean
from seqpack_jax.model.rope import apply_rope
from seqpack_jax.model.segments import build_packing_attention_bias

__all__ = [
    "Comparison",
    "DemoModel",
    "Trainer",
    "TrainingStep",
    "compare_with_alone",
    "packed_loss",
    "training_steps",
]

VOCABULARY = 259  # PAD, BOS, EOS and 256 bytes


class Block(nnx.Module):  # type: ignore[misc]
    """Causal self-attention and a feed-forward layer, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.query_key_value = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, hidden: Array, positions: Array, bias: Array) -> Array:
        """Map `[B, L, width]` to the same shape."""
        shape = hidden.shape
        mixed = self.query_key_value(self.attention_norm(hidden))
        query, key, value = (
            part.reshape(*shape[:2], self.heads, -1) for part in jnp.split(mixed, 3, axis=-1)
        )
        attended = jax.nn.dot_product_attention(
            apply_rope(query, positions), apply_rope(key, positions), value, bias=bias
        )
        hidden = hidden + self.output(attended.reshape(shape))
        inner = jax.nn.gelu(self.expand(self.feed_forward_norm(hidden)))
        return hidden + self.contract(inner)  # type: ignore[no-any-return]


class DemoModel(nnx.Module):  # type: ignore[misc]
    """A decoder-only transformer over bytes; it knows of packing what `positions` and `bias` say.

    Args:
        rngs: seeds the weights.
        vocabulary: number of tokens.
        width: features of a token.
        heads: attention heads; `width / heads` must be even.
        layers: number of blocks.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        vocabulary: int = VOCABULARY,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array, positions: Array, bias: Array) -> Array:
        """Return logits `[B, L, vocabulary]` of the token after each token.

        Args:
            tokens: int32 `[B, L]`.
            positions: int32 `[B, L]`, from 0 in every sequence.
            bias: float32 `[B, 1, L, L]`, added to the attention scores.
        """
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, positions, bias)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


def packed_loss(model: DemoModel, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return the mean next-token loss of a packed batch, in nats per token, and the logits.

    Call it inside jit: XLA can then fuse the `[B, 1, L, L]` bias into the attention.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    bias = build_packing_attention_bias(segment_ids, jnp.float32, causal=True)
    logits = model(tokens, batch["positions"], bias)
    labels, has_label = next_token_labels(tokens, segment_ids)
    weights, denominator = loss_weights(segment_ids, has_label)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return token_mean(losses, weights, denominator), logits


class Trainer:
    """A model, its optimizer, and one jitted step that counts its own compilations.

    Args:
        seed: seeds the weights.
        layers: of the model.
        learning_rate: of AdamW.

    Attributes:
        model: a `DemoModel`, trained in place.
        compilations: how often the step was compiled; 1 as long as the shapes stay the same.
    """

    def __init__(self, seed: int = 0, *, layers: int = 2, learning_rate: float = 3e-3) -> None:
        self.model = DemoModel(nnx.Rngs(seed), layers=layers)
        self.compilations = 0
        self._optimizer = nnx.Optimizer(self.model, optax.adamw(learning_rate), wrt=nnx.Param)

        def step(
            model: DemoModel, optimizer: nnx.Optimizer, batch: Mapping[str, Array]
        ) -> tuple[Array, Array]:
            # Python runs this body only while JAX traces it, which is once per compilation.
            self.compilations += 1
            (loss, _), gradients = nnx.value_and_grad(packed_loss, has_aux=True)(model, batch)
            # Adam's bias correction mixes dtypes: it fails where a user made promotion strict.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                optimizer.update(model, gradients)
            return loss, jnp.sum(batch["segment_ids"] > 0)

        self._step = nnx.jit(step)

    def step(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """Train on one batch; return its loss before the update, and its tokens without padding."""
        loss, tokens = self._step(self.model, self._optimizer, dict(batch))
        return float(loss), int(tokens)


class TrainingStep(NamedTuple):
    """Where training stands after a step."""

    step: int
    seconds: float  # since the start
    loss: float  # mean over the last steps, nats per token
    tokens_per_second: float  # without padding, and without the first step, which compiles

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"


def training_steps(
    trainer: Trainer, batches: Iterator[Mapping[str, Any]], seconds: float, *, window: int = 25
) -> Iterator[TrainingStep]:
    """Train for at most `seconds`, but two steps at least; `loss` is the mean of the last `window`.

    Args:
        trainer: what to train.
        batches: packed batches, all of one shape.
        seconds: stop before a step as long as the last one would end later.
        window: steps.
    """
    start = now = time.perf_counter()
    duration = compiled = 0.0
    losses: list[float] = []
    tokens = 0
    while len(losses) < 2 or now + duration <= start + seconds:
        loss, fed = trainer.step(next(batches))
        losses.append(loss)
        before, now = now, time.perf_counter()
        duration = now - before
        if len(losses) == 1:
            compiled = now
        else:
            tokens += fed
        rate = tokens / (now - compiled) if tokens else 0.0
        mean = math.fsum(losses[-window:]) / len(losses[-window:])
        yield TrainingStep(len(losses), now - start, mean, rate)


class Comparison(NamedTuple):
    """How far a packed batch is from its sequences alone; each pair is (largest value, difference).

    Attributes:
        rows: rows of the packed batch.
        sequences: sequences in them.
        logits: over all logits of real tokens.
        loss: the mean loss of the batch.
        gradients: over the gradients of all weights.
    """

    rows: int
    sequences: int
    logits: tuple[float, float]
    loss: tuple[float, float]
    gradients: tuple[float, float]

    @property
    def worst(self) -> float:
        """The largest difference; NaN if there is a NaN anywhere."""
        return float(np.max([self.logits[1], self.loss[1], self.gradients[1]]))


def compare_with_alone(model: DemoModel, batch: Mapping[str, NDArray[np.int32]]) -> Comparison:
    """Run a packed batch, then each of its sequences alone, and compare what comes out.

    Args:
        model: any weights.
        batch: `tokens`, `segment_ids` and `positions`, int32 `[B, L]`.

    Returns:
        A `Comparison`.
    """
    packed = PackedBatch(batch["tokens"], batch["segment_ids"], batch["positions"], {})
    sequences = unpack_batch(packed)
    # Without this an accelerator multiplies float32 matrices in fewer bits.
    with jax.default_matmul_precision("highest"):
        gradient = nnx.jit(nnx.value_and_grad(packed_loss, has_aux=True))
        (loss, logits), gradients = gradient(model, dict(batch))
        alone_loss, alone_logits = 0.0, []
        alone_gradients = jax.tree.map(jnp.zeros_like, gradients)
        for one_loss, one_logits, one_gradients in _run_alone(model, sequences, packed):
            alone_loss += one_loss
            alone_logits.append(one_logits)
            alone_gradients = jax.tree.map(jnp.add, alone_gradients, one_gradients)
    real_logits = np.asarray(logits)[packed.segment_ids > 0]
    return Comparison(
        rows=len(packed.tokens),
        sequences=len(sequences),
        logits=_largest(real_logits, np.concatenate(alone_logits)),
        loss=_largest(float(loss), alone_loss),
        gradients=_largest(gradients, alone_gradients),
    )


def _run_alone(
    model: DemoModel, sequences: Any, packed: PackedBatch
) -> Iterator[tuple[float, NDArray[np.float32], Any]]:
    """Yield each sequence's share of the batch's loss, its logits `[n, V]`, and the gradients.

    No mask, label or position of the library takes part: positions count from 0, labels are the
    tokens moved by one, and the mask is the plain causal one.  Each sequence stands at the front
    of a row of its own.  The row is as long as the packed one, so that one compilation serves all
    lengths; what is behind the sequence cannot reach it, since no token of a causal model sees a
    later one.
    """
    size = packed.tokens.shape[1]
    positions = jnp.arange(size)[None, :]
    causal = jnp.tril(jnp.ones((size, size), bool))
    bias = jnp.where(causal, jnp.float32(0), jnp.float32(-1e30))[None, None, :, :]
    total = float(sum(len(tokens) - 1 for tokens in sequences))

    def alone_loss(model: DemoModel, tokens: Array, weights: Array) -> tuple[Array, Array]:
        logits = model(tokens, positions, bias)
        labels = jnp.roll(tokens, -1, axis=1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses * weights) / total, logits

    gradient = nnx.jit(nnx.value_and_grad(alone_loss, has_aux=True))
    for tokens in sequences:
        row = np.zeros((1, size), np.int32)
        row[0, : len(tokens)] = tokens
        weights = (np.arange(size) < len(tokens) - 1).astype(np.float32)[None, :]
        (loss, logits), gradients = gradient(model, row, weights)
        yield float(loss), np.asarray(logits)[0, : len(tokens)], gradients


def _largest(packed: Any, alone: Any) -> tuple[float, float]:
    """Return the largest absolute value of `alone`, and the largest difference, over all leaves."""
    pairs = list(zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True))
    value = max(float(np.max(np.abs(np.asarray(one)))) for _, one in pairs)
    differences = [float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs]
    # `max` would pass over a NaN that does not come first.
    return value, math.nan if any(map(math.isnan, differences)) else max(differences)
