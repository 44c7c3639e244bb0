"""From shares of templates to whole bins, against versions that place one sequence at a time."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import caps, histograms, packings

from seqpack_jax import pack_length_histogram
from seqpack_jax.planning.column_generation import Master, Problem, Work, generate
from seqpack_jax.planning.rounding import (
    _served,
    added,
    best_fit,
    covers,
    dive,
    num_bins,
    realize,
    with_demand,
)


def problem_of(counts, capacity, cap=None):
    counts = np.asarray(counts, np.int64)
    lengths = np.flatnonzero(counts)
    return Problem(lengths, counts[lengths], capacity, cap)


def contents(templates):
    """`{template: bins}`, in the order of the arrays; each template once."""
    values, multiplicity = templates.lengths.tolist(), templates.multiplicity.tolist()
    each = [tuple(values[a:b]) for a, b in pairwise(templates.offsets.tolist())]
    assert len(set(each)) == len(each)
    return dict(zip(each, multiplicity, strict=True))


def slots_of(bins):
    slots = Counter()
    for template, number in bins.items():
        for length in template:
            slots[length] += number
    return slots


@st.composite
def problems(draw, max_size=60):
    lengths, capacity = draw(packings(max_size).filter(lambda packing: packing[0]))
    return problem_of(np.bincount(lengths), capacity, draw(caps))


@st.composite
def slots_for(draw):
    """`(problem, bins)`: slots for every sequence, some too long and some too many."""
    problem = draw(problems())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    known, capacity = problem.lengths, problem.max_seq_len
    at = np.repeat(np.arange(len(known)), problem.demand)
    longer = rng.integers(0, len(known) + 1, len(at)) * (rng.random(len(at)) < rng.random())
    more = rng.integers(0, len(known), rng.integers(0, 8))
    slots = known[np.append(np.minimum(at + longer, len(known) - 1), more)]
    bins, held = Counter(), []
    for length in [*rng.permutation(slots).tolist(), capacity + 1]:
        if sum(held) + length > capacity or len(held) == problem.max_segments:
            bins[tuple(sorted(held, reverse=True))] += 1
            held = []
        held.append(length)
    del bins[()]
    order = list(bins)
    rng.shuffle(order)
    return problem, {template: bins[template] for template in order}


def realized_one_by_one(problem, bins):
    """Slots of all bins by falling length, then by template, place and bin; sequences likewise."""
    slots, start = [], 0
    for number, (template, many) in enumerate(bins.items()):
        for place, length in enumerate(template):
            slots += [(-length, number, place, start + each) for each in range(many)]
        start += many
    sequences = np.repeat(problem.lengths, problem.demand)[::-1].tolist()
    held = [[] for _ in range(start)]
    for (length, _, _, each), sequence in zip(sorted(slots), sequences, strict=False):
        assert sequence <= -length
        held[each].append(sequence)
    return Counter(tuple(sorted(each, reverse=True)) for each in held if each)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    times=st.sampled_from([1, 10**15]),
)
def test_a_slot_serves_its_own_length_or_a_shorter_one(pairs, times):
    slots, demand = times * np.array(pairs).T
    free, want = 0, []
    for own, wanted in zip(slots[::-1].tolist(), demand[::-1].tolist(), strict=True):
        want.append(min(free + own, wanted))
        free += own - want[-1]
    assert _served(slots, demand).tolist() == want[::-1]


@given(problem=problems(), rows=st.integers(0, 6), seed=st.integers(0, 2**32))
def test_bins_cover_a_problem_or_not(problem, rows, seed):
    rng = np.random.default_rng(seed)
    bins = (
        {tuple(rng.choice(problem.lengths, 2).tolist()): int(rng.integers(1, 20))} if rows else {}
    )
    bins |= dict.fromkeys(list(best_fit(problem))[:rows], rows)
    slots = sorted(slots_of(bins).elements(), reverse=True)
    sequences = np.repeat(problem.lengths, problem.demand)[::-1].tolist()
    enough = len(slots) >= len(sequences)
    fit = all(slot >= sequence for slot, sequence in zip(slots, sequences, strict=False))
    assert covers(problem, bins) == (enough and fit)


@given(packed=slots_for())
def test_sequences_get_the_slots_that_placing_them_one_by_one_gives(packed):
    problem, bins = packed
    assert covers(problem, bins)
    got = contents(realize(problem, bins))
    assert got == realized_one_by_one(problem, bins)
    assert list(got) == sorted(got, reverse=True)


@given(packed=slots_for(), times=st.integers(1, 10**12))
def test_any_number_of_sequences_is_realized_whole(packed, times):
    problem, bins = packed
    problem = problem._replace(demand=problem.demand * times)
    bins = {template: number * times for template, number in bins.items()}
    got = contents(realize(problem, bins))
    assert slots_of(got) == dict(zip(problem.lengths, problem.demand, strict=True))
    assert sum(got.values()) <= num_bins(bins)
    assert min(got.values()) > 0
    assert all(sum(template) <= problem.max_seq_len for template in got)
    assert all(len(template) <= (problem.max_segments or 99) for template in got)


@given(problem=problems())
def test_slots_that_are_just_right_stay_as_they_are(problem):
    bins = best_fit(problem)
    assert contents(realize(problem, bins)) == bins
    backwards = dict(reversed(bins.items()))
    same = zip(realize(problem, bins), realize(problem, backwards), strict=True)
    assert all(np.array_equal(one, other) for one, other in same)


@pytest.mark.parametrize(
    ("counts", "bins", "want"),
    [
        # A template is split where its slots go from one length to another.
        ({5: 3, 4: 4}, {(5, 5): 4}, {(5, 4): 3, (4,): 1}),
        ({5: 3, 4: 5}, {(5, 5): 4}, {(5, 4): 3, (4, 4): 1}),
        # Slots of two templates: the first of them takes the longest sequences.
        ({9: 1, 5: 1, 3: 2}, {(5, 3): 1, (9,): 2}, {(9,): 1, (5,): 1, (3, 3): 1}),
        # A bin that gets nothing is none.
        ({5: 1}, {(5, 5): 7, (5,): 10**9}, {(5,): 1}),
        ({5: 10**12}, {(5, 5): 5 * 10**11}, {(5, 5): 5 * 10**11}),
    ],
)
def test_slots_may_be_longer_and_too_many(counts, bins, want):
    array = np.zeros(10, np.int64)
    array[list(counts)] = list(counts.values())
    assert contents(realize(problem_of(array, 10), bins)) == want


def test_nothing_takes_no_bins():
    nothing = problem_of(np.zeros(3, int), 10)
    assert best_fit(nothing) == {}
    assert contents(realize(nothing, {})) == {}
    assert covers(nothing, {})


@given(histogram=histograms(), cap=caps)
def test_best_fit_is_that_of_the_heuristics(histogram, cap):
    counts, capacity = histogram
    plan = pack_length_histogram(counts, capacity, max_segments=cap)
    assert best_fit(problem_of(counts, capacity, cap)) == plan.to_counter()


def test_adding_bins_adds_their_numbers():
    one, two = {(5,): 1, (3, 2): 2}, {(3, 2): 5, (4,): 1}
    assert added(one, two) == {(5,): 1, (3, 2): 7, (4,): 1}
    assert num_bins(added(one, two)) == num_bins(one) + num_bins(two) == 9
    assert (one, two) == ({(5,): 1, (3, 2): 2}, {(3, 2): 5, (4,): 1})


def levels_of(problem, budget, share=0.2):
    master, work = Master(problem), Work(budget)
    master.add(best_fit(problem))
    relaxed = generate(master, work, target=None)
    target = int(np.ceil(relaxed.bound - 1e-6))
    return list(dive(problem, master, relaxed, target=target, share=share, work=work)), target


def check_levels(problem, levels):
    """What is fixed and what is left always pack all, and a level fixes more than that before."""
    fixed, left = {}, problem.demand
    for level in levels:
        assert (level.left >= 0).all()
        assert (level.left <= left).all()
        assert level.left.sum() < left.sum()
        assert all(level.fixed[template] >= number for template, number in fixed.items())
        assert covers(problem._replace(demand=problem.demand - level.left), level.fixed)
        rest = best_fit(with_demand(problem, level.left))
        assert covers(problem, added(level.fixed, rest))
        for template in level.fixed:
            assert sum(template) <= problem.max_seq_len
            assert len(template) <= (problem.max_segments or 99)
        fixed, left = level


@given(problem=problems(), share=st.sampled_from([0.05, 0.2, 1.0]), times=st.integers(1, 10**9))
def test_a_dive_fixes_bins_until_nothing_is_left(problem, share, times):
    problem = problem._replace(demand=problem.demand * times)
    levels, target = levels_of(problem, 8.0, share)
    check_levels(problem, levels)
    assert not levels[-1].left.any()
    assert num_bins(levels[-1].fixed) >= target


def test_what_is_left_after_the_first_level_does_not_depend_on_the_number_of_sequences():
    rng = np.random.default_rng(0)
    counts = np.bincount(rng.integers(100, 300, 2000))
    for times in (1, 10**6):
        problem = problem_of(counts * times, 512)
        levels, _ = levels_of(problem, 8.0)
        assert len(levels) > 2
        assert levels[0].left.sum() < 3 * len(problem.lengths)  # less than a bin of each template
        check_levels(problem, levels)


def test_a_dive_ends_with_its_budget():
    problem = problem_of(np.bincount(np.random.default_rng(0).integers(100, 300, 2000)), 512)
    whole, _ = levels_of(problem, 8.0)
    cut, _ = levels_of(problem, 0.01)
    assert 1 == len(cut) < len(whole)
    check_levels(problem, cut)
    assert cut[0].left.any()
