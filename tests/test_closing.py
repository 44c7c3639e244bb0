"""The last bins: a packing of so few bins is found where there is one, and only there."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import caps, packings

from seqpack_jax.planning import closing
from seqpack_jax.planning.closing import pack_into
from seqpack_jax.planning.column_generation import (
    Master,
    Problem,
    UnsolvedError,
    Work,
    generate,
    worth,
)
from seqpack_jax.planning.rounding import best_fit, covers, num_bins

# Best fit needs one bin more than the optimum; with and without a cap.
IMPROVABLE = [
    ([14, 14, 13, 13, 13, 13, 10, 9, 7, 6, 5, 3], 31, None),
    ([12, 10, 9, 8, 6, 6, 5, 4], 20, 3),
    ([12, 10, 9, 7, 7, 5, 4, 1], 19, 3),
    ([13, 8, 8, 3, 3, 2], 21, 3),
]


def problem_of(lengths, capacity, cap=None):
    counts = Counter(lengths)
    distinct = sorted(counts)
    demand = np.array([counts[n] for n in distinct], np.int64)
    return Problem(np.array(distinct, np.int64), demand, capacity, cap)


def triplets(seed, number, capacity):
    """Sequences that fill `number` bins to the last token, three each."""
    rng = np.random.default_rng(seed)
    first = rng.integers(capacity // 4 + 1, capacity // 2, number)
    second = [int(rng.integers(capacity // 4, (capacity - n) // 2 + 1)) for n in first.tolist()]
    third = [capacity - a - b for a, b in zip(first.tolist(), second, strict=True)]
    return [*first.tolist(), *second, *third]


def check_packing(problem, bins, target):
    """Every sequence gets a slot of its length or a longer one, in bins that are allowed."""
    assert 0 < sum(bins.values()) <= target
    assert all(type(number) is int and number > 0 for number in bins.values())
    for template in bins:
        assert 0 < sum(template) <= problem.max_seq_len
        assert problem.max_segments is None or len(template) <= problem.max_segments
        assert list(template) == sorted(template, reverse=True)
        assert set(template) <= set(problem.lengths.tolist())
    slots = sorted((n for held, many in bins.items() for n in held * many), reverse=True)
    wanted = np.repeat(problem.lengths, problem.demand)[::-1].tolist()
    assert len(slots) >= len(wanted)
    assert all(slot >= length for slot, length in zip(slots, wanted, strict=False))
    assert covers(problem, bins)


@st.composite
def tight_packings(draw):
    """`(lengths, max_seq_len, cap)`: at most 12 sequences that leave little room, mostly."""
    lengths, capacity = draw(packings(max_size=12, max_capacity=30))
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        capacity = draw(st.integers(10, 60))
        lengths = triplets(rng, draw(st.integers(1, 4)), capacity)
    return lengths, capacity, draw(caps)


@settings(max_examples=200)
@given(packing=tight_packings())
def test_it_finds_the_optimum_and_nothing_below(packing):
    lengths, capacity, cap = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    fewest = reference.fewest_bins(lengths, capacity, cap)
    check_packing(problem, pack_into(problem, fewest, Work(10.0)), fewest)
    assert pack_into(problem, fewest - 1, Work(10.0)) is None
    check_packing(problem, pack_into(problem, fewest + 1, Work(10.0)), fewest + 1)


@pytest.mark.parametrize(("lengths", "capacity", "cap"), IMPROVABLE)
def test_it_beats_best_fit(lengths, capacity, cap):
    problem = problem_of(lengths, capacity, cap)
    fewest = reference.fewest_bins(lengths, capacity, cap)
    assert num_bins(best_fit(problem)) == fewest + 1
    check_packing(problem, pack_into(problem, fewest, Work(10.0)), fewest)
    assert pack_into(problem, fewest - 1, Work(10.0)) is None


def test_what_best_fit_packs_is_not_searched(monkeypatch):
    monkeypatch.delattr(closing, "Master")
    problem = problem_of([6, 4, 3, 3], 10)
    assert pack_into(problem, 2, Work(1.0)) == best_fit(problem)
    assert pack_into(problem, 5, Work(1.0)) == best_fit(problem)


@pytest.mark.parametrize("target", [0, -1, -7])
def test_targets_that_cannot_be(target):
    assert pack_into(problem_of([3, 4], 9), target, Work(1.0)) is None


def test_nothing_is_packed_into_no_bins():
    nothing = problem_of([], 9)
    assert pack_into(nothing, 0, Work(1.0)) == {}
    assert pack_into(nothing, -1, Work(1.0)) is None


def test_a_target_below_the_relaxation_is_not_searched(monkeypatch):
    monkeypatch.delattr(closing, "_of_use")
    assert pack_into(problem_of([6, 6, 6], 10), 2, Work(1.0)) is None


def test_a_target_between_the_relaxation_and_the_optimum():
    """The relaxed problem takes 3 bins, whole ones are 4: only the integer program can tell."""
    lengths, capacity = [18, 15, 14, 12, 12, 5, 4, 3], 28
    problem = problem_of(lengths, capacity)
    master = Master(problem)
    master.add(best_fit(problem))
    assert generate(master, Work(1.0), target=None).bins <= 3 + 1e-6
    assert reference.fewest_bins(lengths, capacity) == 4
    assert pack_into(problem, 3, Work(10.0)) is None


def test_no_work_left_finds_nothing():
    lengths, capacity, cap = IMPROVABLE[0]
    problem = problem_of(lengths, capacity, cap)
    with pytest.raises(UnsolvedError):
        pack_into(problem, 4, Work(1e-9))
    for budget in (2e-4, 4e-4, 6e-4):
        work = Work(budget)
        assert pack_into(problem, 4, work) is None
        assert work.over


@pytest.mark.parametrize("limit", ["_TEMPLATES", "_SIZE"])
def test_too_many_templates_are_given_up(limit, monkeypatch):
    lengths, capacity, cap = IMPROVABLE[0]
    problem = problem_of(lengths, capacity, cap)
    monkeypatch.setattr(closing, limit, 2)
    assert pack_into(problem, 4, Work(10.0)) is None


def test_dozens_of_triplets():
    """Best fit needs 2 bins more; each bin of a solution must be full."""
    problem = problem_of(triplets(3, 20, 300), 300)
    assert num_bins(best_fit(problem)) > 21
    bins = pack_into(problem, 20, Work(10.0))
    check_packing(problem, bins, 20)
    assert all(sum(template) == 300 for template in bins)
    assert pack_into(problem, 20, Work(10.0)) == bins
    assert pack_into(problem, 19, Work(10.0)) is None


# The templates that are listed


def bins_of(lengths, capacity, cap):
    """Every bin, falling, that these very sequences can fill."""
    most = len(lengths) if cap is None else min(cap, len(lengths))
    return {
        held
        for size in range(1, most + 1)
        for held in combinations(sorted(lengths, reverse=True), size)
        if sum(held) <= capacity
    }


def packings_into(lengths, capacity, cap, target):
    """All packings into at most so many bins, as tuples of bins."""
    every = bins_of(lengths, capacity, cap)

    def fill(left, bins):
        if not left:
            yield bins
        elif len(bins) < target:
            for held in every:
                if held[0] == max(left) and not Counter(held) - left:
                    yield from fill(left - Counter(held), (*bins, held))

    yield from fill(Counter(lengths), ())


@settings(max_examples=60)
@given(packing=tight_packings(), more=st.integers(0, 1))
def test_every_template_of_every_packing_is_listed(packing, more):
    lengths, capacity, cap = packing
    lengths = lengths[:8]
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    target = reference.fewest_bins(lengths, capacity, cap) + more
    master = Master(problem)
    master.add(best_fit(problem))
    prices = generate(master, Work(10.0), target=None).prices
    listed = closing._of_use(problem, prices, target, Work(10.0))
    assert set().union(*packings_into(lengths, capacity, cap, target)) <= set(listed)
    assert len(set(listed)) == len(listed)
    assert set(listed) <= bins_of(lengths, capacity, cap)


@settings(max_examples=100)
@given(packing=tight_packings(), seed=st.integers(0, 2**32), more=st.integers(0, 2))
def test_those_listed_are_all_that_are_worth_enough(packing, seed, more):
    """At prices that are exact in floats, of every bin."""
    lengths, capacity, cap = packing
    lengths = lengths[:10]
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    prices = np.random.default_rng(seed).integers(0, 64, len(problem.lengths)).astype(float)
    prices[-1] += 1
    by_length = dict(zip(problem.lengths.tolist(), prices.tolist(), strict=True))
    most = worth(problem, prices, Work(1.0))[0].max()
    total = sum(by_length[n] for n in lengths)
    target = int(-(-total // most)) + more
    least = most * (1 - target) + total
    enough = {
        held for held in bins_of(lengths, capacity, cap) if sum(by_length[n] for n in held) >= least
    }
    listed = closing._of_use(problem, prices, target, Work(10.0))
    assert set(listed) == enough
    assert len(listed) == len(enough)


def test_the_list_is_whole_or_none(monkeypatch):
    problem = problem_of(triplets(1, 8, 100), 100)
    prices = problem.lengths / 100
    listed = closing._of_use(problem, prices, 8, Work(10.0))
    monkeypatch.setattr(closing, "_TEMPLATES", len(listed))
    assert closing._of_use(problem, prices, 8, Work(10.0)) == listed
    monkeypatch.setattr(closing, "_TEMPLATES", len(listed) - 1)
    assert closing._of_use(problem, prices, 8, Work(10.0)) is None
    monkeypatch.setattr(closing, "_TEMPLATES", len(listed))
    monkeypatch.setattr(closing, "_CELLS", 10)
    assert closing._of_use(problem, prices, 8, Work(10.0)) is None
    assert closing._of_use(problem, prices, 8, Work(1e-9)) is None


def test_the_work_of_deep_bins_is_counted():
    """Few lengths and thousands of sequences in a bin: the list would take minutes."""
    problem = Problem(np.array([2, 3]), np.array([3000, 3000]), 8192, None)
    work = Work(1.0)
    assert closing._of_use(problem, problem.lengths / 8192, 2, work) is None
    assert work.over


def test_chunks_are_one_list(monkeypatch):
    problem = problem_of(triplets(1, 8, 100), 100)
    prices = problem.lengths / 100
    whole = closing._of_use(problem, prices, 9, Work(10.0))
    assert len(whole) > 20
    monkeypatch.setattr(closing, "_CELLS", 400)
    assert closing._of_use(problem, prices, 9, Work(10.0)) == whole
