"""How much faster is training on packed rows, and on packed rows with blocked attention?

    python benchmarks/how_fast_is_training.py

The demo's model (bytes, 2 layers of width 64, 4 heads) on the CPU: forward, backward and AdamW in
one jitted step, compiled before.  2,000 lognormal(300, 1) sequences, clipped to rows of 512 and of
2,048 tokens; a batch has 4,096 cells at most, padded or packed.  "Bucketed" batches hold sequences
of like length, in 8 widths, with the more rows the narrower they are: the strongest form of
padding.  Eight shapes are compiled for it, and lengths are not mixed.

Tokens/s are useful ones: the tokens of an epoch over its number of steps times the time of a step.
That time is the median of 5 rounds, over 1 batch of each shape with dense attention, whose time
does not depend on what is in the batch, and over 8 in all with blocked attention, whose time does.
Loading is not part of it: batches are made before.  That the two kinds of attention give the same
loss, and gradients of the same norm, is checked on a packed batch.

Yardsticks: padded and bucketed rows.  Of rows of one width, and the same attention, packing gains
at most the ratio of the densities, which stands behind "of".  Dense attention, with its
bias built in the step, takes most of the time of this small model, and the more the wider the rows:
a model of large layers gains less from blocked attention, and from narrow rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Row, lognormal_lengths, medians, report
from flax import nnx

import seqpack_jax as sp
from seqpack_jax.demo_model import VOCABULARY, Block, DemoModel, packed_loss
from seqpack_jax.model.dispatch import packed_attention
from seqpack_jax.model.losses import loss_weights, next_token_labels, token_mean
from seqpack_jax.model.rope import apply_rope
from seqpack_jax.model.segments import SegmentInfo, segment_info

SEQUENCES, LENGTHS, CELLS, WIDTHS = 2000, (512, 2048), 4096, 8
BLOCKED_BATCHES = 8  # that are timed
BOUNDED = (("packed", "padded"), ("packed, blocked", "padded, blocked"))
LEAST_OF_DENSITY = 0.9
CLOSE = 1e-4  # loss, and norm of the gradients, of the two kinds of attention, relatively

Batch = dict[str, np.ndarray]
Loss = Callable[[DemoModel, Any], tuple[jax.Array, jax.Array]]


# --- the model, with blocked attention ------------------------------------------------------------


def blocked_block(block: Block, hidden: jax.Array, info: SegmentInfo) -> jax.Array:
    """Do what a block of the demo does, attending block by block inside segments."""
    shape = hidden.shape
    mixed = block.query_key_value(block.attention_norm(hidden))
    query, key, value = (
        part.reshape(*shape[:2], block.heads, -1) for part in jnp.split(mixed, 3, axis=-1)
    )
    query, key = apply_rope(query, info.positions), apply_rope(key, info.positions)
    attended = packed_attention(query, key, value, info, implementation="blocked")
    hidden = hidden + block.output(attended.reshape(shape))
    inner = jax.nn.gelu(block.expand(block.feed_forward_norm(hidden)))
    return hidden + block.contract(inner)


def blocked_loss(model: DemoModel, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Return what the demo's `packed_loss` returns, of the same weights."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    info = segment_info(segment_ids, batch["positions"])
    hidden = model.embed(tokens)
    for block in model.blocks:
        hidden = blocked_block(block, hidden, info)
    logits = model.head(model.norm(hidden))
    labels, has_label = next_token_labels(tokens, segment_ids)
    weights, denominator = loss_weights(segment_ids, has_label)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return token_mean(losses, weights, denominator), logits


class Stepper:
    """Training steps, compiled once for each loss and shape; each starts from the same weights."""

    def __init__(self) -> None:
        model = DemoModel(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
        self._graph, self._state = nnx.split((model, optimizer))
        self._compiled: dict[tuple[Loss, tuple[int, ...]], Any] = {}

    def runner(self, loss: Loss, batches: list[Batch]) -> Callable[[], Any]:
        """Return a function that trains on batches of one shape, one after the other.

        It returns loss and norm of the gradients in the last batch.
        """
        given = [jax.tree.map(jnp.asarray, batch) for batch in batches]
        key = loss, given[0]["tokens"].shape
        if key not in self._compiled:
            self._compiled[key] = self._compile(loss, given[0])
        step = self._compiled[key]

        def run() -> Any:
            state = self._state
            for batch in given:
                state, *told = step(state, batch)
            return [float(each) for each in jax.block_until_ready((state, told))[1]]

        return run

    def _compile(self, loss: Loss, batch: Any) -> Any:
        def step(state: Any, batch: Any) -> Any:
            model, optimizer = nnx.merge(self._graph, state)
            (value, _), gradients = nnx.value_and_grad(loss, has_aux=True)(model, batch)
            optimizer.update(model, gradients)
            return nnx.state((model, optimizer)), value, optax.global_norm(gradients)

        return jax.jit(step).lower(self._state, batch).compile()

    def check_equal(self, batch: Batch) -> None:
        """Stop unless both kinds of attention give the same loss, and norm of the gradients."""
        dense, blocked = (self.runner(loss, [batch])() for loss in (packed_loss, blocked_loss))
        if not np.allclose(dense, blocked, rtol=CLOSE):
            raise SystemExit(f"loss and gradients: {blocked} with blocks, {dense} without")


# --- the batches of an epoch, in three ways -------------------------------------------------------


NAMES = ("tokens", "segment_ids", "positions")


def padded_batch(tokens: list[np.ndarray], width: int) -> Batch:
    """Lay one sequence in each row of `CELLS // width`; the last batch may have empty rows."""
    batch = {name: np.zeros((CELLS // width, width), np.int32) for name in NAMES}
    for row, each in enumerate(tokens):
        batch["tokens"][row, : len(each)] = each
        batch["segment_ids"][row, : len(each)] = 1
        batch["positions"][row, : len(each)] = np.arange(len(each))
    return batch


def in_batches(tokens: list[np.ndarray], width: int) -> list[Batch]:
    """Pad sequences to one width."""
    rows = CELLS // width
    return [padded_batch(tokens[at : at + rows], width) for at in range(0, len(tokens), rows)]


def bucketed(tokens: list[np.ndarray], max_seq_len: int) -> list[Batch]:
    """Pad sequences to the next of the widths."""
    step = max_seq_len // WIDTHS
    widths = np.array([-(-len(each) // step) * step for each in tokens])
    return [
        batch
        for width in np.unique(widths).tolist()
        for batch in in_batches([tokens[i] for i in np.flatnonzero(widths == width)], width)
    ]


def packed(tokens: list[np.ndarray], max_seq_len: int) -> list[Batch]:
    """Pack sequences as the library does."""
    source = sp.pack_dataset(tokens, max_seq_len, batch_size=CELLS // max_seq_len)
    return [{name: source[step][name] for name in NAMES} for step in range(len(source))]


# --- measuring -----------------------------------------------------------------------------------


class Part(NamedTuple):
    """The batches of one shape: how many an epoch has, and those to time."""

    steps: int
    timed: list[Batch]


class Epoch(NamedTuple):
    """An epoch over the sequences in one way."""

    loss: Loss
    density: float
    parts: list[Part]


def sample(batches: list[Batch], loss: Loss, total: int) -> Epoch:
    """Check that an epoch has all tokens, and choose what to time."""
    found = sum(np.count_nonzero(batch["segment_ids"]) for batch in batches)
    if found != total:
        raise SystemExit(f"{found} tokens of {total} are in the batches")
    shapes = dict.fromkeys(batch["tokens"].shape for batch in batches)
    most = max(1, BLOCKED_BATCHES // len(shapes)) if loss is blocked_loss else 1
    parts = []
    for shape in shapes:
        group = [batch for batch in batches if batch["tokens"].shape == shape]
        chosen = np.linspace(0, len(group) - 1, min(most, len(group))).round().astype(int)
        parts.append(Part(len(group), [group[i] for i in chosen]))
    return Epoch(loss, total / sum(batch["tokens"].size for batch in batches), parts)


def speeds(epochs: dict[str, Epoch], total: int) -> dict[str, float]:
    """Return useful tokens/s of each way; all take turns."""
    stepper = Stepper()
    stepper.check_equal(epochs["packed"].parts[0].timed[0])
    runs = [
        stepper.runner(epoch.loss, part.timed) for epoch in epochs.values() for part in epoch.parts
    ]
    times = iter(medians(*runs))
    return {
        name: total / sum(part.steps * next(times) / len(part.timed) for part in epoch.parts)
        for name, epoch in epochs.items()
    }


def measure(max_seq_len: int) -> Iterable[Row]:
    """Train in six ways, and compare them."""
    lengths = lognormal_lengths(SEQUENCES, max_seq_len)
    rng, total = np.random.default_rng(0), int(lengths.sum())
    tokens = [rng.integers(3, VOCABULARY, length, np.int32) for length in lengths]
    ways = {
        "padded": in_batches(tokens, max_seq_len),
        "bucketed": bucketed(tokens, max_seq_len),
        "packed": packed(tokens, max_seq_len),
    }
    epochs = {
        name + kind: sample(batches, loss, total)
        for kind, loss in (("", packed_loss), (", blocked", blocked_loss))
        for name, batches in ways.items()
    }
    found = speeds(epochs, total)
    density = {name: epoch.density for name, epoch in epochs.items()}

    def compare(ours: str, peer: str, least: float | None = None) -> Row:
        ratio, limit = found[ours] / found[peer], density[ours] / density[peer]
        # Rows of one width and one kind of attention: only the density tells them apart.
        bounded = (ours, peer) in BOUNDED
        return Row(
            f"rows of {max_seq_len:,}: {ours}, against {peer}",
            f"{found[ours]:,.0f} tokens/s, {density[ours]:.1%} full",
            f"{found[peer]:,.0f} tokens/s, {density[peer]:.1%} full",
            f"{ratio:.2f}x" + (f" of {limit:.2f}x" if bounded else ""),
            "-" if least is None else f"at least {least * limit:.2f}x",
            None if least is None else ratio >= least * limit,
        )

    return [
        compare("packed", "padded", LEAST_OF_DENSITY),
        compare("packed", "bucketed"),
        compare("packed, blocked", "padded"),
        compare("packed, blocked", "padded, blocked"),
        compare("packed, blocked", "bucketed"),
        compare("packed, blocked", "bucketed, blocked"),
        compare("packed, blocked", "packed"),
        compare("bucketed", "padded"),
        compare("padded, blocked", "padded"),
    ]


if __name__ == "__main__":
    report([row for max_seq_len in LENGTHS for row in measure(max_seq_len)])
