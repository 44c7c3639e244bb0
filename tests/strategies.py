"""Hypothesis strategies: lengths, capacities and sequences."""

import numpy as np
from hypothesis import strategies as st

from seqpack_jax.planning.over_length import ACTIONS, OverLength
from seqpack_jax.planning.packers import ALGORITHMS

algorithms = st.sampled_from(sorted(ALGORITHMS))
heuristics = st.sampled_from(sorted(set(ALGORITHMS) - {"optimal"}))
caps = st.none() | st.integers(1, 8)


@st.composite
def packings(draw, max_size=60, max_capacity=64):
    """`(lengths, max_seq_len)`: few distinct lengths as often as many, short and long ones.

    NumPy draws the values from a seed: hypothesis alone draws mostly trivial lists.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    capacity = draw(st.integers(1, max_capacity))
    longest = max(1, int(capacity * draw(st.sampled_from([0.1, 0.3, 0.6, 1.0]))))
    pool = rng.integers(1, longest + 1, draw(st.integers(1, 12)))
    size = draw(st.sampled_from([0, 1, 2, *range(3, max_size + 1)]))
    return rng.choice(pool, size).tolist(), capacity


@st.composite
def over_length_packings(draw, max_size=30, max_capacity=24, actions=ACTIONS[1:]):
    """`(lengths, max_seq_len, policy)`: from no over-length sequences to nothing else."""
    lengths, capacity = draw(packings(max_size, max_capacity))
    stretch = draw(st.sampled_from([1, 2, 5]))
    policy = OverLength(draw(st.sampled_from(actions)))
    if policy.action == "split":
        overlap = draw(st.integers(0, capacity - 1))
        min_tail = draw(st.integers(1, capacity))
        positions = draw(st.sampled_from(["restart", "continue"]))
        policy = OverLength("split", overlap=overlap, min_tail=min_tail, positions=positions)
    return [length * stretch for length in lengths], capacity, policy


@st.composite
def histograms(draw, max_capacity=2048):
    """`(counts, max_seq_len)` with counts up to a billion."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    capacity = draw(st.integers(1, max_capacity))
    counts = np.zeros(capacity + 1, np.int64)
    lengths = rng.integers(1, capacity + 1, draw(st.integers(0, 40)))
    counts[lengths] = rng.integers(1, 10 ** rng.integers(1, 10, len(lengths)))
    return counts, capacity


def random_sequences(lengths, seed=0, vocabulary=1000):
    """One int32 array of tokens per length; token 0 does not occur."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, length, dtype=np.int32) for length in lengths]
