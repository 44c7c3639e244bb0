"""Small models in plain JAX, right by default, each with a switch for every way to break it."""

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, VOCABULARY = 8, 13
SIZE = 24
LENGTHS = [7, 4, 11, 3, 9, 5, 6]


def sequences(seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, length) for length in lengths]


def records(seed=0):
    """Sequences that have floats, and a mask, beside their tokens."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": tokens,
            "x": rng.normal(size=(len(tokens), WIDTH)).astype(np.float32),
            "loss_mask": rng.random(len(tokens)) < 0.7,
        }
        for tokens in sequences(seed)
    ]


def weights(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    names = ("query", "key", "value", "out")
    found = {name: matrix(WIDTH, WIDTH) for name in names}
    found["embed"] = matrix(VOCABULARY, WIDTH) * 3
    found["place"] = matrix(64, WIDTH) * 3
    found["taps"] = matrix(3, WIDTH)
    found["head"] = matrix(WIDTH, VOCABULARY)
    return found


def same(batch):
    ids = batch["segment_ids"]
    return ids[:, :, None] == ids[:, None, :]


def embed(w, batch, positions="batch"):
    """`positions`: of the "batch", or of the "row", which is wrong."""
    place = batch["positions"]
    if positions == "row":
        place = jnp.broadcast_to(jnp.arange(place.shape[1]), place.shape)
    return w["embed"][batch["tokens"]] + w["place"][place]


def attend(w, x, batch, mask="segment", causal=True, blocked=-(2.0**41)):
    """`mask`: "segment", or "none", or "padding": only padding is hidden."""
    size = x.shape[1]
    allowed = {
        "segment": same(batch),
        "none": jnp.ones((*x.shape[:2], size), bool),
        "padding": jnp.broadcast_to((batch["segment_ids"] > 0)[:, None, :], (*x.shape[:2], size)),
        "empty": same(batch) & (batch["segment_ids"] > 0)[:, :, None],
    }[mask]
    if causal:
        allowed = jnp.tril(allowed)
    scores = jnp.einsum("bqd,bkd->bqk", x @ w["query"], x @ w["key"]) / float(np.sqrt(WIDTH))
    scores = jnp.where(allowed, scores, jnp.asarray(blocked, scores.dtype))
    return x + jax.nn.softmax(scores, axis=-1) @ (x @ w["value"]) @ w["out"]


def transformer(positions="batch", mask="segment", causal=True, blocked=-(2.0**41), layers=1):
    def apply(w, batch):
        x = embed(w, batch, positions)
        for _ in range(layers):
            x = jnp.tanh(attend(w, x, batch, mask, causal, blocked))
        return x @ w["head"]

    return apply


def by_token(w, batch):
    """No token meets another: what is wrong is the loss."""
    return embed(w, batch) @ w["head"]


def convolution(guarded=True):
    """A causal convolution of 3 taps, then attention that is right."""

    def apply(w, batch):
        x, ids = embed(w, batch), batch["segment_ids"]
        mixed = x * w["taps"][0][None, None]
        for k in (1, 2):
            moved = jnp.pad(x, ((0, 0), (k, 0), (0, 0)))[:, :-k]
            stays = jnp.pad(ids, ((0, 0), (k, 0)))[:, :-k] == ids
            mixed += (
                jnp.where(stays[..., None] | (not guarded), moved, 0) * w["taps"][k][None, None]
            )
        return attend(w, mixed, batch) @ w["head"]

    return apply


def batch_norm(valid_only=False):
    def apply(w, batch):
        x = attend(w, embed(w, batch), batch)
        counts = (batch["segment_ids"] > 0)[..., None] | (not valid_only)
        x_counted = jnp.where(counts, x, 0)
        number = jnp.sum(jnp.broadcast_to(counts, x.shape), axis=(0, 1), keepdims=True)
        number = number.astype(x.dtype)
        mean = jnp.sum(x_counted, axis=(0, 1), keepdims=True) / number
        square = jnp.where(counts, (x - mean) ** 2, 0)
        square = jnp.sum(square, axis=(0, 1), keepdims=True) / number
        return ((x - mean) / jnp.sqrt(square + 1e-3)) @ w["head"]

    return apply


def row_norm(over="row"):
    """Normalise over all tokens of a "row", over the "real" ones, or over each "token"."""

    def apply(w, batch):
        x = attend(w, embed(w, batch), batch)
        real = (batch["segment_ids"] > 0)[..., None]
        if over == "token":
            mean = jnp.mean(x, axis=-1, keepdims=True)
        elif over == "row":
            mean = jnp.mean(x, axis=1, keepdims=True)
        else:
            number = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1).astype(x.dtype)
            mean = jnp.sum(jnp.where(real, x, 0), axis=1, keepdims=True) / number
        return (x - mean) @ w["head"]

    return apply


def padded_mean(w, batch):
    """A mean over each segment, but divided by the tokens of the row."""
    x = embed(w, batch)
    return (x + same(batch).astype(x.dtype) @ x / x.shape[1]) @ w["head"]


def state_space(resets=True, decay=0.5):
    def apply(w, batch):
        x = embed(w, batch)
        starts = batch["positions"] == 0
        keep = jnp.where(starts & resets, 0.0, decay).astype(x.dtype)

        def step(state, at):
            token, kept = at
            state = state * kept[:, None] + token
            return state, state

        by_time = (jnp.swapaxes(x, 0, 1), keep.T)
        _, states = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), by_time)
        return jnp.tanh(jnp.swapaxes(states, 0, 1)) @ w["head"]

    return apply


def of_floats(cleaned=True):
    """A model of float features; the mask is right, but 0 x NaN is NaN."""

    def apply(w, batch):
        x = batch["x"]
        if cleaned:
            x = jnp.where((batch["segment_ids"] > 0)[..., None], x, 0)
        return attend(w, x + w["place"][batch["positions"]], batch) @ w["head"]

    return apply


def slight(size=1e-3):
    """A right model, but that a little of an attention without a mask comes in."""
    right, wrong = transformer(), transformer(mask="none")

    def apply(w, batch):
        return right(w, batch) * (1 - size) + wrong(w, batch) * size

    return apply


def second_row(w, batch):
    leaks = (jnp.arange(len(batch["tokens"])) == 1)[:, None, None]
    return jnp.where(leaks, transformer(mask="none")(w, batch), transformer()(w, batch))


def segment_numbers(w, batch):
    return by_token(w, batch) + w["place"][batch["segment_ids"]] @ w["head"]


def dropout(w, batch):
    x = embed(w, batch)
    kept = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape)
    return jnp.where(kept, x, 0) @ w["head"]


def mean_loss(apply, fault=None):
    """The mean next-token loss; `fault`: "labels", "ids", "rows", "padding", "denominator"."""

    def loss(w, batch):
        ids, tokens = batch["segment_ids"], batch["tokens"]
        logits = apply(w, batch).astype(jnp.float32)
        labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        after = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
        counts = (ids > 0) & (after == ids)
        if fault == "labels":
            counts = (ids > 0) & (after > 0)
        if fault == "padding":
            counts = jnp.ones_like(counts)
        weights = counts.astype(jnp.float32)
        if "loss_mask" in batch:
            weights *= batch["loss_mask"].astype(jnp.float32)
        if fault == "ids":
            weights *= ids.astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        losses = jnp.where(weights > 0, -picked[..., 0], 0) * weights
        if fault == "rows":
            return jnp.mean(jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1))
        total = jnp.sum(losses)
        if fault == "denominator":
            return total / losses.size
        return total / jnp.maximum(jnp.sum(counts.astype(jnp.float32)), 1)

    return loss
