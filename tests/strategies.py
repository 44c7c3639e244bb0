"""Hypothesis strategies: lengths, capacities and sequences."""

import numpy as np
from hypothesis import strategies as st

from seqpack_jax.planning.packers import ALGORITHMS

algorithms = st.sampled_from(sorted(ALGORITHMS))
caps = st.none() | st.integers(1, 8)


@st.composite
def packings(draw, max_size=60, max_capacity=64):
    """`(lengths, max_seq_len)`: few distinct lengths as often as many, short and long ones."""
    capacity = draw(st.integers(1, max_capacity))
    low = draw(st.integers(1, capacity))
    pool = draw(st.lists(st.integers(low, capacity), min_size=1, max_size=12))
    return draw(st.lists(st.sampled_from(pool), max_size=max_size)), capacity


@st.composite
def histograms(draw, max_capacity=2048):
    """`(counts, max_seq_len)` with counts up to a billion."""
    capacity = draw(st.integers(1, max_capacity))
    entries = st.dictionaries(st.integers(1, capacity), st.integers(1, 10**9), max_size=40)
    counts = np.zeros(capacity + 1, np.int64)
    for length, count in draw(entries).items():
        counts[length] = count
    return counts, capacity


def random_sequences(lengths, seed=0, vocabulary=1000):
    """One int32 array of tokens per length; token 0 does not occur."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, length, dtype=np.int32) for length in lengths]
