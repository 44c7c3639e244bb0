"""A lower bound is never above what the optimum needs, and as high as its definition says."""

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import caps, histograms, packings

import seqpack_jax as sp
from seqpack_jax.planning import bounds
from seqpack_jax.planning.bounds import Bound, bound_of_lengths, lower_bound

METHODS = ["volume", "max_segments", "Martello-Toth L2", "dual feasible function"]


def runs_of(counts, capacity):
    lengths = sorted(counts)
    times = np.array([counts[n] for n in lengths], np.int64)
    return bounds._Runs.of(np.array(lengths, np.int64), times, capacity)


def small_of(counts, capacity):
    return [n for n in counts if 2 * n <= capacity]


@given(histogram=histograms(), cap=caps)
def test_the_volume_bound_is_the_volume_or_the_cap(histogram, cap):
    counts, capacity = histogram
    tokens = sum(n * int(c) for n, c in enumerate(counts))
    sequences = int(counts.sum())
    expected = max(-(-tokens // capacity), -(-sequences // cap) if cap else 0)
    assert sp.volume_bound(counts, capacity, max_segments=cap) == expected


@settings(max_examples=30)
@given(packing=packings(max_size=6, max_capacity=12), cap=caps)
def test_the_reference_for_the_fewest_bins_is_right(packing, cap):
    """No assignment of sequences to fewer bins fits, and one to that many does."""
    lengths, capacity = packing
    fewest = reference.fewest_bins(lengths, capacity, cap)
    for bins in range(fewest + 1):
        fits = False
        for choice in itertools.product(range(bins), repeat=len(lengths)):
            held = [
                [n for n, b in zip(lengths, choice, strict=True) if b == k] for k in range(bins)
            ]
            fits |= all(sum(h) <= capacity and (cap is None or len(h) <= cap) for h in held)
        assert fits == (bins == fewest)


@settings(max_examples=300)
@given(packing=packings(max_size=12, max_capacity=40), cap=caps)
def test_it_is_never_above_the_optimum(packing, cap):
    lengths, capacity = packing
    counts = Counter(lengths)
    bound = lower_bound(counts, capacity, max_segments=cap)
    assert bound.value <= reference.fewest_bins(lengths, capacity, cap)
    assert bound.value >= sp.volume_bound(counts, capacity, max_segments=cap)
    assert bound_of_lengths(lengths, np.ones(len(lengths), int), capacity, cap) == bound


@given(histogram=histograms(), cap=caps)
def test_it_is_between_the_volume_and_a_plan(histogram, cap):
    counts, capacity = histogram
    plan = sp.pack_length_histogram(counts, capacity, max_segments=cap)
    bound = lower_bound(counts, capacity, max_segments=cap)
    assert sp.volume_bound(counts, capacity, max_segments=cap) <= bound.value <= plan.num_bins
    assert plan.certificate[1:3] == bound


@pytest.mark.parametrize("capacity", range(1, 13))
def test_every_function_is_dual_feasible(capacity):
    """The weights in a bin are at most 1, for every bin there is."""
    every = reference.all_bins(capacity)
    for weigh in reference.dual_feasible_functions(capacity):
        weights = [0] + [weigh(n, capacity) for n in range(1, capacity + 1)]
        assert min(weights) >= 0
        assert max(sum(weights[n] for n in held) for held in every) <= 1
    for cap in range(1, capacity + 1):
        capped = reference.all_bins(capacity, cap)
        for weigh in reference.capped_functions(capacity, cap):
            weights = [0] + [weigh(n, capacity) for n in range(1, capacity + 1)]
            assert min(weights) >= 0
            assert max(sum(weights[n] for n in held) for held in capped) <= 1


def test_that_check_can_fail():
    assert max(sum(reference.share(n, 8) for n in held) for held in reference.all_bins(9)) > 1
    weigh = reference.beside_long(2, 3)
    weights = [0] + [weigh(n, 9) for n in range(1, 10)]
    assert max(sum(weights[n] for n in held) for held in reference.all_bins(9, 4)) > 1


@given(packing=packings(max_size=200, max_capacity=200))
def test_l2_is_that_of_the_textbook(packing):
    lengths, capacity = packing
    assume(lengths)
    found = bounds._martello_toth(runs_of(Counter(lengths), capacity))
    assert found == reference.martello_toth(lengths, capacity)


@settings(max_examples=60)
@given(packing=packings(max_size=40, max_capacity=32), cap=caps)
def test_value_and_method_are_the_best_of_all_definitions(packing, cap):
    lengths, capacity = packing
    counts = Counter(lengths)
    functions = reference.dual_feasible_functions(capacity)
    values = [
        sp.volume_bound(counts, capacity),
        sp.volume_bound(counts, capacity, max_segments=cap) if cap else 0,
        reference.martello_toth(lengths, capacity),
        reference.weighed(functions, counts, capacity),
    ]
    if cap:
        functions = reference.capped_functions(capacity, cap)
        values[3] = max(values[3], reference.weighed(functions, counts, capacity))
    best = Bound(max(values), METHODS[values.index(max(values))])
    assert lower_bound(counts, capacity, max_segments=cap) == best


@given(histogram=histograms(), cap=st.integers(1, 300))
def test_what_fits_beside_long_sequences_is_as_defined(histogram, cap):
    """Also of long bins with tiny steps, which another loop counts."""
    array, capacity = histogram
    counts = {n: int(array[n]) for n in np.flatnonzero(array).tolist()}
    assume(counts)
    functions = reference.capped_functions(capacity, cap, small_of(counts, capacity))
    expected = reference.weighed(functions, counts, capacity)
    assert bounds._beside_long(runs_of(counts, capacity), cap) == expected


@settings(max_examples=15)
@given(
    capacity=st.sampled_from([499, 2**20 + 7, 2**27, 2**31 - 1]),
    seed=st.integers(0, 2**32),
)
def test_big_numbers_are_as_exact_as_python_integers(capacity, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, (capacity // rng.integers(1, 5, 4)) + 1).tolist()
    most = min(2**42, 2**59 // capacity)
    counts = {n: int(rng.integers(most // 2, most)) for n in lengths}
    runs = runs_of(counts, capacity)
    tokens = sum(n * c for n, c in counts.items())
    small, steps = small_of(counts, capacity), bounds._steps(runs).tolist()
    low, high = (
        reference.weighed(
            reference.dual_feasible_functions(capacity, small, steps, retried), counts, capacity
        )
        for retried in ([], steps)
    )
    cuts = [partial(reference.whole_or_nothing, n, reference.share) for n in small]
    over_half = sum(c for n, c in counts.items() if n not in small)
    l2 = max(reference.weighed(cuts, counts, capacity), over_half)
    found = bound_of_lengths(lengths, [counts[n] for n in lengths], capacity)
    assert max(low, l2, -(-tokens // capacity)) <= found.value
    assert found.value <= max(high, l2, -(-tokens // capacity))
    if capacity <= 2**20 + 7:
        assert lower_bound(counts, capacity) == found
    with_cap = bound_of_lengths(lengths, [counts[n] for n in lengths], capacity, 2)
    capped = reference.capped_functions(capacity, 2, small)
    least = max(-(-sum(counts.values()) // 2), reference.weighed(capped, counts, capacity))
    assert with_cap.value == max(found.value, least) or 2 >= capacity // min(lengths)


@pytest.mark.parametrize(
    ("counts", "capacity", "family"),
    [
        ({4: 3, 9: 4}, 24, "_fekete_schepers"),
        ({6: 3, 15: 2}, 26, "_carlier"),
        ({4: 1, 5: 4}, 13, "_burdet_johnson"),
    ],
)
def test_each_family_reaches_what_no_other_does(counts, capacity, family, monkeypatch):
    bound = lower_bound(counts, capacity)
    assert bound == (3, "dual feasible function")
    assert reference.martello_toth(list(Counter(counts).elements()), capacity) == 2
    assert reference.fewest_bins(list(Counter(counts).elements()), capacity) == 3
    monkeypatch.setattr(bounds, family, lambda *_: 0)
    assert lower_bound(counts, capacity).value == 2


def test_long_sequences_and_a_cap_together_beat_either():
    """20 long sequences fill their bins, so all short ones need bins of their own."""
    counts = {100: 20, 1: 60}
    assert lower_bound(counts, 100) == (21, "volume")
    assert sp.volume_bound(counts, 100, max_segments=3) == 27
    assert lower_bound(counts, 100, max_segments=3) == (40, "dual feasible function")
    assert sp.pack_length_histogram(counts, 100, max_segments=3).num_bins == 40


def test_a_cap_that_cannot_matter_is_ignored():
    counts = {3: 7, 4: 2}
    free = lower_bound(counts, 10)
    assert free == lower_bound(counts, 10, max_segments=3)
    assert free == lower_bound(counts, 10, max_segments=10**30)
    assert lower_bound(counts, 10, max_segments=2) == (5, "max_segments")
    assert lower_bound({7: 5}, 10, max_segments=1) == (5, "Martello-Toth L2")


def test_the_simplest_of_equal_methods_is_named():
    assert lower_bound({}, 5) == lower_bound([0], 5) == (0, "volume")
    assert lower_bound({5: 3}, 5) == (3, "volume")
    assert lower_bound({6: 3}, 10) == (3, "Martello-Toth L2")
    assert lower_bound({1: 6, 2: 1}, 4, max_segments=2) == (4, "max_segments")
    assert lower_bound({2: 4}, 4, max_segments=2) == (2, "volume")
    assert lower_bound({1: 1}, 1) == (1, "volume")


def test_many_lengths_try_fewer_parameters_and_stay_true():
    """Sequences over half of a bin, each beside one that just fits: as many bins as of them."""
    half, many = 2**19, 40_000
    long = np.arange(half + 1, half + 1 + many)
    lengths = np.concatenate([long, 2 * half - long])
    assert runs_of(Counter(lengths.tolist()), 2 * half).members < bounds._MEMBERS
    for cap in (None, 2, 100):
        bound = bound_of_lengths(lengths, np.ones_like(lengths), 2 * half, cap)
        assert bound == (many, "volume")
    fewer = lengths[: many + many // 2]
    bound = bound_of_lengths(fewer, np.ones_like(fewer), 2 * half)
    assert bound == (many, "Martello-Toth L2")


def test_templates_and_bins_are_merged_by_length():
    assert bound_of_lengths([6, 3, 6, 0], [2, 1, 1, 9], 10) == lower_bound({6: 3, 3: 1}, 10)
    assert bound_of_lengths([0, 0], [1, 5], 10) == bound_of_lengths([], [], 10) == (0, "volume")
    long = 2**31 - 1
    assert bound_of_lengths([long, 5, long], [3, 2, 1], long) == (5, "volume")


def test_what_is_enough_is_not_improved():
    counts = {4: 1, 5: 4}
    lengths, times = list(counts), list(counts.values())
    assert bound_of_lengths(lengths, times, 13, None, 2) == (2, "volume")
    assert bound_of_lengths(lengths, times, 13, None, 3) == lower_bound(counts, 13)
    assert bound_of_lengths(lengths, times, 13, None, 9) == lower_bound(counts, 13)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (({9: 7}, 8), r"lower_bound: counts\[9\] = 7, but max_seq_len is 8.*raise max_seq_len"),
        (({3: -1}, 8), r"lower_bound: counts\[3\] = -1"),
        (({3: 1}, 0), "lower_bound: max_seq_len = 0"),
        (({3: 1}, 2**31), "lower_bound: max_seq_len = 2147483648"),
        (({3: 1}, 8, 0), "lower_bound: max_segments = 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, part):
    counts, capacity, *cap = arguments
    with pytest.raises(sp.SeqpackError, match=part):
        lower_bound(counts, capacity, max_segments=cap[0] if cap else None)
