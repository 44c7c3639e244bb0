"""Slow and obvious: what the device half must compute, as loops over single tokens."""

import math

import numpy as np


def runs(row):
    """Return `(start, stop)` of each run of equal, non-zero ids."""
    found, start = [], 0
    while start < len(row):
        stop = start
        while stop < len(row) and row[stop] == row[start]:
            stop += 1
        if row[start] != 0:
            found.append((start, stop))
        start = stop
    return found


def positions(row):
    result = [0] * len(row)
    for start, stop in runs(row):
        for token in range(start, stop):
            result[token] = token - start
    return result


def mask(rows, causal):
    length = len(rows[0])
    result = np.zeros((len(rows), 1, length, length), bool)
    for b, row in enumerate(rows):
        for query in range(length):
            for key in range(length):
                allowed = row[query] == row[key] and (key <= query or not causal)
                result[b, 0, query, key] = allowed
    return result


def cu_seqlens(rows, max_segments):
    """Return `(offsets, longest, overflow)` as a list, an int and a bool."""
    lengths = [stop - start for row in rows for start, stop in runs(row)]
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    offsets += [offsets[-1]] * (len(rows) * max_segments - len(lengths))
    overflow = any(len(runs(row)) > max_segments for row in rows)
    return offsets, max(lengths, default=0), overflow


def next_token_labels(tokens, row, ignore_index):
    labels = [ignore_index] * len(row)
    for start, stop in runs(row):
        for token in range(start, stop - 1):
            labels[token] = tokens[token + 1]
    return labels, [float(label != ignore_index) for label in labels]


def seed_cu_seqlens(sequence_ids, attention_mask):
    """Return what seqpack 1.0.0 (torch) does: strip the padding of a row, cut at changes."""
    offsets, longest = [0], 0
    for ids, real in zip(sequence_ids, attention_mask, strict=True):
        row = [i for i, keep in zip(ids, real, strict=True) if keep]
        while row:
            length = 1
            while length < len(row) and row[length] == row[0]:
                length += 1
            offsets.append(offsets[-1] + length)
            longest, row = max(longest, length), row[length:]
    return offsets, longest


def attention_alone(query, key, value, rows, causal):
    """Attend within each segment `[T, H, D]` on its own; padding returns 0."""
    result = np.zeros_like(query)
    heads, size = query.shape[2:]
    for b, row in enumerate(rows):
        for start, stop in runs(row):
            for head in range(heads):
                for token in range(start, stop):
                    end = token + 1 if causal else stop
                    scores = key[b, start:end, head] @ query[b, token, head] / math.sqrt(size)
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    result[b, token, head] = weights @ value[b, start:end, head]
    return result
