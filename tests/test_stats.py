"""The same figures from a plan and from its bins."""

import numpy as np
import pytest
from hypothesis import given
from strategies import algorithms, packings

import seqpack_jax as sp


@given(packing=packings(), algorithm=algorithms)
def test_both_constructors_agree(packing, algorithm):
    lengths, capacity = packing
    counts = np.bincount(lengths, minlength=1) if lengths else [0]
    plan = sp.pack_length_histogram(counts, capacity, algorithm=algorithm)
    bins = sp.pack_sequences(lengths, capacity, algorithm=algorithm)
    assert sp.PackingStats.from_plan(plan) == sp.PackingStats.from_bins(bins, lengths, capacity)


def test_percentiles_are_values_that_occur():
    """Seed bug 14: there, one constructor interpolates and the other does not."""
    lengths = [10, 9, 7, 4]
    bins = sp.Bins(np.arange(4), np.arange(5), 10)
    stats = sp.PackingStats.from_bins(bins, lengths, 10)
    assert (stats.fullness_p50, stats.fullness_p90, stats.fullness_p99) == (0.7, 1.0, 1.0)


def test_figures():
    lengths = [128, 64, 32, 16, 200, 80, 50]
    stats = sp.PackingStats.from_bins(sp.pack_sequences(lengths, 256), lengths, 256)
    assert (stats.num_bins, stats.num_sequences, stats.num_tokens) == (3, 7, 570)
    assert stats.capacity == 768
    assert stats.efficiency == 570 / 768
    assert stats.efficiency + stats.padding_ratio == 1.0
    assert stats.lower_bound == 3
    assert stats.max_segments == 4
    assert "efficiency:  74.22%" in str(stats)


def test_the_bound_of_a_cap_is_kept():
    plan = sp.pack_length_histogram({1: 9}, 10, max_segments=2)
    assert sp.PackingStats.from_plan(plan).lower_bound == 5


def test_no_bins_and_wrong_bins():
    empty = sp.PackingStats.from_plan(sp.pack_length_histogram({}, 8))
    assert (empty.num_bins, empty.efficiency, empty.fullness_p50) == (0, 1.0, 0.0)
    bins = sp.pack_sequences([3, 4], 8)
    with pytest.raises(sp.SeqpackError, match="sequence 2 is in 0 bins"):
        sp.PackingStats.from_bins(bins, [3, 4, 5], 8)
    with pytest.raises(sp.SeqpackError, match=r"lengths\[1\] = 9"):
        sp.PackingStats.from_bins(bins, [3, 9], 8)
    with pytest.raises(sp.SeqpackError, match="max_seq_len = 4, but the bins were packed for 8"):
        sp.PackingStats.from_bins(bins, [3, 4], 4)
