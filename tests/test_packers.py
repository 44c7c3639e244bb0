"""Sequences -> bins: every sequence in one bin, equal to the plan, the same every time."""

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import algorithms, caps, packings

import seqpack_jax as sp

every_algorithm = algorithms | st.just("next_fit")


@given(
    packing=packings(),
    algorithm=every_algorithm,
    cap=caps,
    tolerance=st.integers(1, 6),
    seed=st.none() | st.integers(0, 5),
)
def test_each_sequence_is_in_one_bin_that_holds_it(packing, algorithm, cap, tolerance, seed):
    lengths, capacity = packing
    bins = sp.pack_sequences(
        lengths,
        capacity,
        algorithm=algorithm,
        max_segments=cap,
        tolerance=tolerance,
        seed=seed,
    )
    bins.check(lengths)
    assert cap is None or all(len(ids) <= cap for ids in bins)


@given(packing=packings(), algorithm=algorithms, cap=caps, seed=st.none() | st.integers(0, 5))
def test_bins_follow_the_plan(packing, algorithm, cap, seed):
    lengths, capacity = packing
    counts, pools = sp.length_histogram_from_lengths(lengths)
    plan = sp.pack_length_histogram(counts, capacity, algorithm=algorithm, max_segments=cap)
    bins = sp.pack_sequences(lengths, capacity, algorithm=algorithm, max_segments=cap, seed=seed)
    templates = np.repeat(np.arange(plan.num_templates), plan.multiplicity)
    for ids, template in zip(bins, templates, strict=True):
        expected = plan.lengths[plan.offsets[template] : plan.offsets[template + 1]]
        assert [lengths[i] for i in ids] == expected.tolist()
    if seed is None:
        epoch = sp.materialize_epoch(plan, pools)
        assert bins.tolist() == epoch[0 : len(epoch)].tolist()


@given(packing=packings())
def test_seed_names(packing):
    lengths, capacity = packing
    greedy = sp.greedy_pack_sequences(lengths, capacity)
    heap = sp.heap_pack_sequences(lengths, capacity)
    assert len(greedy) == len(reference.first_fit_decreasing(lengths, capacity))
    assert len(heap) == len(reference.worst_fit_decreasing(lengths, capacity))


@given(packing=packings())
def test_next_fit_keeps_input_order(packing):
    lengths, capacity = packing
    bins = sp.pack_sequences(lengths, capacity, algorithm="next_fit")
    assert bins.tolist() == reference.next_fit(lengths, capacity)


def test_without_a_seed_equal_lengths_keep_input_order():
    for tolerance in (1, 4):
        lengths = [4] * 30 + [3] * 30
        ids = sp.pack_sequences(lengths, 4, tolerance=tolerance).ids
        assert ids.tolist() == list(range(60))
    # Lengths 3 and 4 are one bucket at tolerance 4, so they interleave as they came.
    assert sp.pack_sequences([3, 4, 3, 4], 4, tolerance=4).ids.tolist() == [0, 1, 2, 3]


def test_a_seed_shuffles_only_what_is_planned_alike():
    lengths = np.repeat([4, 3], 50)
    plain, one, two = (sp.pack_sequences(lengths, 4, seed=s).ids.tolist() for s in (None, 1, 2))
    assert len({tuple(plain), tuple(one), tuple(two)}) == 3
    assert sorted(one[:50]) == sorted(two[:50]) == list(range(50))
    mixed = sp.pack_sequences(lengths, 4, tolerance=4, seed=1).ids[:50].tolist()
    assert not set(mixed) <= set(range(50))
    assert one == sp.pack_sequences(lengths.astype(np.uint8), 4, seed=1).ids.tolist()


def test_the_batched_name_is_the_same_function():
    assert sp.pack_length_histogram_batched is sp.pack_length_histogram


def test_a_cap_above_the_capacity_changes_nothing():
    plan = sp.pack_length_histogram({1: 20, 2: 5}, 8, max_segments=10**9)
    assert plan.digest() == sp.pack_length_histogram({1: 20, 2: 5}, 8).digest()


@pytest.mark.parametrize("algorithm", ["best_fit_decreasing", "next_fit"])
def test_empty_and_single(algorithm):
    assert sp.pack_sequences([], 8, algorithm=algorithm).tolist() == []
    assert sp.pack_sequences([8], 8, algorithm=algorithm).tolist() == [[0]]


def test_tolerance_counts_true_tokens():
    plan = sp.pack_length_histogram({3: 2, 4: 2}, 8, tolerance=4)
    assert plan.num_tokens == 14
    assert dict(plan.to_counter()) == {(4, 4): 2}
    assert plan.efficiency == 14 / 16
    plan.check({3: 2, 4: 2})
