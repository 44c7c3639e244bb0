"""Slow and obvious: attention and its gradients, each segment on its own, in float64."""

import math

import model_reference
import numpy as np

# Rows that every way of attention is held against: padding before, between and after segments,
# one-token segments, nothing but padding, one full-length segment, as many segments as tokens.
LENGTH = 16
HARD_ROWS = np.array(
    [
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 0, 0],
        [1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5, 5],
        [1, 1, 0, 0, 2, 2, 2, 0, 3, 3, 3, 3, 3, 0, 0, 0],
        [1] * 16,
        [0] * 16,
        list(range(1, 17)),
    ],
    np.int32,
)


def random_qkv(rows, heads=4, kv_heads=2, size=8, seed=0, kv_length=None):
    """Return float32 query `[B, L, heads, size]`, key and value `[B, S, kv_heads, size]`."""
    batch, length = rows.shape
    draw = np.random.default_rng(seed).normal
    kv_shape = (batch, kv_length or length, kv_heads, size)
    shapes = [(batch, length, heads, size), kv_shape, kv_shape]
    return tuple(draw(size=shape).astype(np.float32) for shape in shapes)


def attend_alone(query, key, value, rows, *, causal, window=None, kv_rows=None):
    """Return float64 `[B, L, N, H]`; padding, and segments without a key, give 0."""
    return _run(query, key, value, None, rows, causal, window, kv_rows)[0]


def gradients_alone(query, key, value, cotangent, rows, *, causal, window=None, kv_rows=None):
    """Return the float64 gradients of `sum(output * cotangent)` over real tokens to q, k and v."""
    return _run(query, key, value, cotangent, rows, causal, window, kv_rows)[1]


def _run(query, key, value, cotangent, rows, causal, window, kv_rows):
    query, key, value = (np.asarray(each, np.float64) for each in (query, key, value))
    output, gradients = np.zeros_like(query), [np.zeros_like(each) for each in (query, key, value)]
    heads, size = query.shape[2:]
    group = heads // key.shape[2]
    scale = 1 / math.sqrt(size)
    for b, row in enumerate(rows):
        keys_of = {row[start]: slice(start, stop) for start, stop in model_reference.runs(row)}
        if kv_rows is not None:
            runs = model_reference.runs(kv_rows[b])
            keys_of = {kv_rows[b][start]: slice(start, stop) for start, stop in runs}
        for start, stop in model_reference.runs(row):
            tokens, keys = slice(start, stop), keys_of.get(row[start])
            if keys is None:
                continue
            allowed = _allowed(stop - start, keys.stop - keys.start, causal, window)
            for head in range(heads):
                q, k = query[b, tokens, head], key[b, keys, head // group]
                v = value[b, keys, head // group]
                scores = np.where(allowed, q @ k.T * scale, -np.inf)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                output[b, tokens, head] = weights @ v
                if cotangent is None:
                    continue
                back = np.asarray(cotangent, np.float64)[b, tokens, head]
                of_weights = back @ v.T
                mean = (weights * of_weights).sum(axis=1, keepdims=True)
                of_scores = weights * (of_weights - mean) * scale
                gradients[0][b, tokens, head] += of_scores @ k
                gradients[1][b, keys, head // group] += of_scores.T @ q
                gradients[2][b, keys, head // group] += weights.T @ back
    return output, gradients


def _allowed(queries, keys, causal, window):
    """Which key a query may see, both counted from the start of their segment."""
    allowed = np.zeros((queries, keys), bool)
    for query in range(queries):
        for key in range(keys):
            distance = query - key
            near = window is None or abs(distance) < window
            allowed[query, key] = near and (distance >= 0 or not causal)
    return allowed
