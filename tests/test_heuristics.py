"""The histogram packers equal the per-item packers, exactly."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import reference
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import caps, heuristics, histograms, packings

from seqpack_jax import pack_length_histogram
from seqpack_jax.planning.heuristics import next_fit_offsets


def fills_of(plan):
    return Counter(dict(zip(*merged(plan.fills, plan.multiplicity), strict=True)))


def merged(keys, weights):
    unique, where = np.unique(keys, return_inverse=True)
    totals = np.zeros(len(unique), np.int64)
    np.add.at(totals, where, weights)
    return unique.tolist(), totals.tolist()


@given(packing=packings(), algorithm=heuristics, cap=caps)
@example(
    packing=([34] * 22 + [113] * 24 + [137] * 14 + [41] * 38 + [27] * 10, 200),
    algorithm="worst_fit_decreasing",
    cap=None,
)  # seed bug 13: 40 bins per item, 38 batched
def test_equals_the_per_item_packer(packing, algorithm, cap):
    lengths, capacity = packing
    counts = np.bincount(lengths, minlength=1) if lengths else [0]
    plan = pack_length_histogram(counts, capacity, algorithm=algorithm, max_segments=cap)
    bins = getattr(reference, algorithm)(lengths, capacity, cap)
    assert plan.num_bins == len(bins)
    assert fills_of(plan) == Counter(map(sum, bins))
    plan.check(counts)
    assert cap is None or plan.max_segments <= cap


@pytest.mark.parametrize("algorithm", ["best_fit_decreasing", "first_fit_decreasing"])
@given(packing=packings(max_size=40))
def test_best_and_first_fit_hold_the_very_same_bins(algorithm, packing):
    """Without a cap even the contents are determined for first fit; for best fit the fills are."""
    lengths, capacity = packing
    counts = np.bincount(lengths, minlength=1) if lengths else [0]
    plan = pack_length_histogram(counts, capacity, algorithm=algorithm)
    bins = getattr(reference, algorithm)(lengths, capacity)
    if algorithm == "first_fit_decreasing":
        assert plan.to_counter() == Counter(map(tuple, bins))
    else:
        assert fills_of(plan) == Counter(map(sum, bins))


@given(histogram=histograms(), algorithm=heuristics, cap=caps, tolerance=st.integers(1, 9))
def test_any_counts_are_packed_whole(histogram, algorithm, cap, tolerance):
    counts, capacity = histogram
    plan = pack_length_histogram(
        counts, capacity, algorithm=algorithm, max_segments=cap, tolerance=tolerance
    )
    plan.check(counts)
    assert plan.num_sequences == counts.sum()
    assert plan.num_tokens == counts @ np.arange(len(counts))
    assert plan.num_bins >= plan.certificate.lower_bound
    assert cap is None or plan.max_segments <= cap
    assert len(plan.to_counter()) == plan.num_templates, "templates are distinct"


@given(histogram=histograms(), algorithm=heuristics)
def test_plans_scale_with_the_counts(histogram, algorithm):
    """The cost does not depend on n: nor does the size of the plan."""
    counts, capacity = histogram
    small = pack_length_histogram(np.minimum(counts, 1000), capacity, algorithm=algorithm)
    large = pack_length_histogram(counts, capacity, algorithm=algorithm)
    assert large.num_templates <= 4 * np.count_nonzero(counts) + 1
    assert small.num_templates <= 4 * np.count_nonzero(counts) + 1


def test_first_fit_decreasing_worst_case_of_johnson():
    """The classic instance on which first fit decreasing needs 11/9 of the optimum."""
    capacity, n = 1000, 30
    lengths = {501: 6, 252: 6, 251: 6, 248: 12}
    counts = {length: count * n // 6 for length, count in lengths.items()}
    plan = pack_length_histogram(counts, capacity, algorithm="first_fit_decreasing")
    optimum = 9 * n // 6
    assert plan.num_bins == 11 * n // 6
    assert plan.num_bins * 9 == optimum * 11


@pytest.mark.parametrize(
    ("algorithm", "lengths", "capacity"),
    [
        ("best_fit_decreasing", [8, 4, 4, 3, 1, 1], 11),
        ("worst_fit_decreasing", [7, 5, 2, 2, 1, 1], 9),
    ],
)
def test_the_cap_prefers_the_bin_with_the_most_segments(algorithm, lengths, capacity):
    """Instances where the opposite rule for equal rooms needs 3 bins instead of 2."""
    plan = pack_length_histogram(
        np.bincount(lengths), capacity, algorithm=algorithm, max_segments=3
    )
    assert plan.num_bins == len(getattr(reference, algorithm)(lengths, capacity, 3)) == 2


def test_the_strategy_draws_packings_worth_testing():
    """So that the property tests above cannot pass for want of cases."""
    kinds = Counter()

    @given(packing=packings(), cap=caps)
    def look(packing, cap):
        lengths, capacity = packing
        bins = reference.best_fit_decreasing(lengths, capacity)
        kinds["several per bin"] += len(bins) >= 3 and len(lengths) >= 2 * len(bins)
        kinds["many lengths"] += len(set(lengths)) >= 4
        kinds["cap binds"] += cap is not None and any(len(held) > cap for held in bins)

    look()
    assert min(kinds.values()) >= 15, kinds


def test_a_large_cap_costs_nothing():
    """Seconds, and gigabytes, if a cap widened the bit mask."""
    plan = pack_length_histogram({10: 5, 20: 7, 30: 9}, 1_000_000, max_segments=100_000)
    assert plan.num_bins == 1


@given(packing=packings(), cap=caps)
def test_next_fit_keeps_the_input_order(packing, cap):
    lengths, capacity = packing
    offsets = next_fit_offsets(np.array(lengths, np.int64), capacity, cap).tolist()
    bins = [list(range(a, b)) for a, b in pairwise(offsets)]
    assert bins == reference.next_fit(lengths, capacity, cap)
