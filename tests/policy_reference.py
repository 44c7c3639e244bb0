"""What the over-length policy makes of sequences, one by one: batches must hold just that."""

import numpy as np
from hypothesis import strategies as st

import seqpack_jax as sp
from seqpack_jax.feeding.batch import validate_batch
from seqpack_jax.planning.over_length import OverLength

CAPACITY = 16
CUTS = ("truncate", "truncate_left", "crop")


@st.composite
def policies(draw, actions=("drop", *CUTS, "split")):
    action = draw(st.sampled_from(actions))
    if action != "split":
        return OverLength(action)
    return OverLength(
        "split",
        overlap=draw(st.integers(0, CAPACITY - 1)),
        min_tail=draw(st.integers(1, CAPACITY)),
        positions=draw(st.sampled_from(["restart", "continue"])),
    )


def coded(lengths):
    """Token `t` of sequence `i` is `1000 * i + t`: a token says where it comes from."""
    return [1000 * i + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]


def kept(policy, tokens, start=None):
    """The segments that a policy makes of one sequence; `start` of the window of a crop."""
    tokens, limit = list(tokens), CAPACITY
    if len(tokens) <= limit:
        return [tokens]
    if policy.action == "drop":
        return []
    if policy.action == "truncate":
        return [tokens[:limit]]
    if policy.action == "truncate_left":
        return [tokens[-limit:]]
    if policy.action == "crop":
        return [tokens[start : start + limit]]
    pieces = [tokens[:limit]]
    place = limit
    while place < len(tokens):  # each piece but the first repeats some tokens and brings new ones
        begin = place - policy.overlap
        pieces.append(tokens[begin : begin + limit])
        place = begin + limit
    if len(pieces[-1]) < policy.min_tail:
        pieces.pop()
    return pieces


def check_segments(policy, lengths, batches):
    """Compare all segments of an epoch with `kept`, and their positions with the policy.

    Returns: `{sequence: start of its window}`, where one was cropped.
    """
    found, windows = [], {}
    for batch in batches:
        validate_batch(batch, positions=policy.positions)
        segments = sp.unpack_batch(batch)
        positions = np.asarray(batch["positions"])[batch["segment_ids"] > 0]
        for tokens, begin in zip(segments, segments.offsets.tolist(), strict=False):
            found.append(tokens.tolist())
            source, start = divmod(int(tokens[0]), 1000)
            first = start if policy.positions == "continue" else 0
            assert positions[begin : begin + len(tokens)].tolist() == list(
                range(first, first + len(tokens))
            )
            if policy.action == "crop" and lengths[source] > CAPACITY:
                windows[source] = start
    expected = [
        segment
        for source, tokens in enumerate(coded(lengths))
        for segment in kept(policy, tokens.tolist(), windows.get(source))
    ]
    assert sorted(found) == sorted(expected)
    return windows


def check_report(policy, lengths, batches, report):
    """Tokens in = tokens out + dropped - repeated, and each of these is true by itself."""
    out = np.concatenate([sp.unpack_batch(batch).tokens for batch in batches])
    assert sum(lengths) == out.size + report.dropped_tokens - report.repeated_tokens
    assert report.dropped_tokens == sum(lengths) - np.unique(out).size
    assert report.repeated_tokens == out.size - np.unique(out).size
    over = [n for n in lengths if n > CAPACITY]
    assert (report.sequences, report.tokens) == (len(over), sum(over))
    assert report.action == policy.action
