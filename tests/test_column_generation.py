"""The relaxed problem is solved over all templates, and a bound that is claimed is true."""

import math
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import highspy
import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import caps, packings

from seqpack_jax.errors import SeqpackError
from seqpack_jax.planning import column_generation
from seqpack_jax.planning.column_generation import (
    Master,
    Problem,
    UnsolvedError,
    Work,
    cost_of_worth,
    generate,
    import_highspy,
    proved_bound,
    value_of,
    volume_of,
    worth,
)
from seqpack_jax.planning.rounding import best_fit


def problem_of(lengths, capacity, cap=None, times=1):
    counts = Counter(lengths)
    distinct = sorted(counts)
    demand = np.array([counts[n] * times for n in distinct], np.int64)
    return Problem(np.array(distinct, np.int64), demand, capacity, cap)


def uniform(seed, low, high, size, capacity, cap=None):
    lengths = np.random.default_rng(seed).integers(low, high + 1, size)
    return problem_of(lengths.tolist(), capacity, cap)


HARD = 2, 15, 70, 50, 175  # twelve rounds, or so, to the end


def templates_of(problem):
    """Every template of these lengths."""
    known = set(problem.lengths.tolist())
    every = reference.all_bins(problem.max_seq_len, problem.max_segments, max(known))
    return [held for held in every if held and known.issuperset(held)]


def linear_program(problem, demand=None):
    """The fewest bins, not whole, of all templates, by one call of the solver."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("presolve", "off")
    demand = (problem.demand if demand is None else demand).astype(float)
    size, empty = len(demand), np.zeros(0, np.int32)
    infinite = np.full(size, highspy.kHighsInf)
    solver.addRows(size, demand, infinite, 0, np.zeros(size, np.int32), empty, np.zeros(0))
    place = {n: row for row, n in enumerate(problem.lengths.tolist())}
    for held in templates_of(problem):
        rows = Counter(place[n] for n in held)
        where = np.array(list(rows), np.int32)
        many = np.array(list(rows.values()), float)
        solver.addCol(1.0, 0.0, highspy.kHighsInf, len(where), where, many)
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return solver.getInfo().objective_function_value


def started(problem, templates=None):
    """A master that knows the templates of best fit."""
    master = Master(problem)
    master.add(best_fit(problem) if templates is None else templates)
    return master


def counted(problem, **options):
    """What `generate` finds, and in how many rounds."""
    rounds = []
    relaxed = generate(
        started(problem),
        Work(1e6),
        told=lambda *_: rounds.append(None),
        **{"target": None, **options},
    )
    return relaxed, len(rounds)


# What is worth what


@given(packing=packings(max_size=20, max_capacity=14), cap=caps, seed=st.integers(0, 2**32))
def test_the_worth_is_that_of_the_best_bin_around_each_length(packing, cap, seed):
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    prices = np.random.default_rng(seed).integers(0, 100, len(problem.lengths))
    by_length = dict(zip(problem.lengths.tolist(), prices.tolist(), strict=True))
    values, _ = worth(problem, prices, Work(1.0))
    bins = templates_of(problem)
    assert values.tolist() == [
        max(sum(by_length[n] for n in held) for held in bins if length in held)
        for length in problem.lengths.tolist()
    ]


def test_the_volume_is_of_tokens_or_of_sequences():
    assert volume_of(problem_of([3, 3, 4], 20)) == 0.5
    assert volume_of(problem_of([3, 3, 4], 20, 2)) == 1.5
    assert volume_of(problem_of([10, 10, 10], 10, 2)) == 3.0


# A bound that is claimed is true


@settings(max_examples=300)
@given(
    packing=packings(max_size=12, max_capacity=40),
    cap=caps,
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["uniform", "like lengths", "near shares", "some free", "wide"]),
)
def test_no_prices_prove_more_than_the_optimum(packing, cap, seed, kind):
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    rng = np.random.default_rng(seed)
    size = len(problem.lengths)
    prices = {
        "uniform": rng.random(size),
        "like lengths": problem.lengths / capacity + rng.normal(0, 1e-12, size).clip(0),
        "near shares": 1 / np.maximum(1, capacity // problem.lengths),
        "some free": rng.random(size) * (rng.random(size) < 0.5),
        "wide": 10.0 ** rng.integers(-300, 300, size),
    }[kind]
    fewest = reference.fewest_bins(lengths, capacity, cap)
    assert proved_bound(problem, prices, Work(1.0)) <= fewest


@settings(max_examples=150)
@given(packing=packings(max_size=12, max_capacity=24), cap=caps)
def test_the_relaxation_is_that_over_all_templates_and_its_bound_is_true(packing, cap):
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    relaxed, _ = counted(problem)
    exact = linear_program(problem)
    assert relaxed.bins == pytest.approx(exact, rel=1e-7)
    assert relaxed.bound == pytest.approx(exact, rel=1e-6)
    proved = proved_bound(problem, relaxed.best_prices, Work(1.0))
    assert proved <= reference.fewest_bins(lengths, capacity, cap)
    assert proved >= math.ceil(exact - 1e-6)


@settings(max_examples=60)
@given(
    packing=packings(max_size=12, max_capacity=40),
    cap=caps,
    budget=st.sampled_from([1e-9, 1e-4, 3e-4, 1e-3]),
)
def test_a_search_that_ends_early_still_has_a_true_bound(packing, cap, budget):
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    try:
        relaxed = generate(started(problem), Work(budget), target=None)
    except UnsolvedError:
        return
    proved = proved_bound(problem, relaxed.best_prices, Work(1.0))
    assert proved <= reference.fewest_bins(lengths, capacity, cap)


def test_it_ends_early_at_a_solution_or_without_one():
    problem = uniform(*HARD)
    with pytest.raises(UnsolvedError, match="HiGHS says 'Iteration limit reached'"):
        generate(started(problem), Work(1e-9), target=None)
    work = Work(6e-3)
    relaxed = generate(started(problem), work, target=None)
    assert work.over
    finished, rounds = counted(problem)
    assert rounds > 5
    assert relaxed.bins > finished.bins + 1e-6
    assert 0 < relaxed.bound < finished.bound
    proved = proved_bound(problem, relaxed.best_prices, Work(1.0))
    assert 0 < proved <= proved_bound(problem, finished.best_prices, Work(1.0))


@pytest.mark.parametrize("times", [1, 2**40, 10**15])
@settings(max_examples=60)
@given(packing=packings(max_size=12, max_capacity=20), cap=caps, seed=st.integers(0, 2**32))
def test_the_bound_is_that_of_fractions_whatever_the_demand(times, packing, cap, seed):
    """Prices that are exact in floats: the bound is their worth, over that of the best bin."""
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap, times)
    numbers = np.random.default_rng(seed).integers(0, 1000, len(problem.lengths)).tolist()
    by_length = dict(zip(problem.lengths.tolist(), numbers, strict=True))
    most = max(sum(by_length[n] for n in held) for held in templates_of(problem))
    total = sum(by_length[n] * times for n in lengths)
    expected = math.ceil(Fraction(total, most)) if most else 0
    for unit in (1.0, 2.0**-40, 2.0**900):
        assert proved_bound(problem, np.array(numbers) * unit, Work(1.0)) == expected


@pytest.mark.parametrize("times", [2**40, 10**15])
@settings(max_examples=60)
@given(packing=packings(max_size=12, max_capacity=20), cap=caps)
def test_a_huge_demand_has_a_true_bound_close_to_its_relaxation(times, packing, cap):
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap, times)
    relaxed, _ = counted(problem)
    proved = proved_bound(problem, relaxed.best_prices, Work(1.0))
    assert proved <= times * reference.fewest_bins(lengths, capacity, cap)
    exact = times * linear_program(problem_of(lengths, capacity, cap))
    assert relaxed.bins == pytest.approx(exact, rel=1e-7)
    assert proved == pytest.approx(exact, rel=1e-6)


def test_one_sequence_more_than_fits_proves_one_bin_more():
    """In floats, 10**15 bins and that many and a third are hard to tell apart at a price of 1/3."""
    full = Problem(np.array([3]), np.array([3 * 10**15]), 9, None)
    thirds = np.array([1 / 3])
    assert proved_bound(full, thirds, Work(1.0)) == 10**15
    more = full._replace(demand=full.demand + 1)
    assert proved_bound(more, thirds, Work(1.0)) == 10**15 + 1
    most = full._replace(demand=np.array([2**60 - 1]))  # beyond the digits of a float
    assert proved_bound(most, thirds, Work(1.0)) == -(-(2**60 - 1) // 3)


def test_a_bound_of_a_trillion_bins_is_sharp():
    """A third and a half: prices of 30 bits would lose a thousand bins."""
    problem = Problem(np.array([3, 5]), np.array([3 * 10**12, 2 * 10**12]), 10, None)
    assert proved_bound(problem, np.array([1 / 3, 1 / 2]), Work(1.0)) == 2 * 10**12


def test_prices_too_high_by_the_last_digit_prove_nothing_false():
    """100 triples of a third each, which a float rounds up: exactly 100 bins, and not 101."""
    lengths = [30, 34, 36] * 100
    problem = problem_of(lengths, 100)
    for prices in ([0.30, 0.34, 0.36], [0.1 + 0.2, 0.34, 0.36], np.nextafter([0.3, 0.34, 0.36], 1)):
        assert proved_bound(problem, np.array(prices), Work(1.0)) <= 100


@pytest.mark.parametrize("price", [0.0, math.inf, math.nan])
def test_prices_that_are_no_use_prove_nothing(price):
    problem = problem_of([3, 4], 9)
    with np.errstate(invalid="ignore"):
        assert proved_bound(problem, np.array([price, price]), Work(1.0)) == 0
    assert proved_bound(problem, np.array([5e-324, 0.0]), Work(1.0)) == 1


def test_no_bin_of_one_sequence_holds_more():
    """With a cap of 1 nothing stands beside a sequence."""
    problem = problem_of([3, 3, 4], 9, 1)
    assert proved_bound(problem, np.array([0.5, 0.5]), Work(1.0)) == 3
    assert counted(problem)[0].bins == pytest.approx(3)


# The master


def test_templates_are_added_once():
    master = Master(problem_of([2, 3, 3, 5], 10))
    assert master.add([(5, 5), (3, 3, 3), (5, 5)]) == 2
    assert master.add([(3, 3, 3), (2, 2, 2, 2, 2)]) == 1
    assert master.add([(5, 5), (2, 2, 2, 2, 2)]) == master.add([]) == 0
    assert master.templates == [(5, 5), (3, 3, 3), (2, 2, 2, 2, 2)]
    bins, prices, amounts = master.solve(Work(1.0))
    assert len(amounts) == 3
    assert bins == pytest.approx(amounts.sum())
    assert bins == pytest.approx(0.5 + 2 / 3 + 0.2)
    assert prices.tolist() == pytest.approx([1 / 5, 1 / 3, 1 / 2])


def test_a_longer_slot_serves_a_shorter_length():
    """There is no template of the length 2."""
    master = Master(problem_of([2, 2, 3, 5], 10))
    master.add([(5, 5), (3, 3, 3)])
    bins, prices, amounts = master.solve(Work(1.0))
    assert bins == pytest.approx(0.5 + 3 / 3)
    assert amounts.tolist() == pytest.approx([0.5, 1])
    assert prices.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 2])


@settings(max_examples=50)
@given(packing=packings(max_size=30, max_capacity=40), seed=st.integers(0, 2**32))
def test_another_demand_is_that_of_a_new_master(packing, seed):
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity)
    master = started(problem)
    master.solve(Work(1.0))
    demand = np.random.default_rng(seed).integers(0, 9, len(problem.lengths))
    demand[-1] += 1
    master.demand(demand)
    assert master.problem.demand is demand
    other = started(problem._replace(demand=demand), master.templates)
    assert master.solve(Work(1.0))[0] == pytest.approx(other.solve(Work(1.0))[0])
    demand_left = np.zeros_like(demand)
    master.demand(demand_left)
    bins, _, amounts = master.solve(Work(1.0))
    assert bins == 0
    assert not amounts.any()


@settings(max_examples=50)
@given(packing=packings(max_size=12, max_capacity=16), cap=caps)
def test_whole_numbers_are_found_exactly_when_there_are_some(packing, cap):
    """Of all templates: `reference.fewest_bins`, and none of one bin fewer."""
    lengths, capacity = packing
    assume(lengths)
    problem = problem_of(lengths, capacity, cap)
    fewest = reference.fewest_bins(lengths, capacity, cap)
    master = Master(problem)
    master.add(templates_of(problem))
    numbers = master.solve_whole(fewest, 1000, Work(1.0))
    assert numbers.dtype == np.int64
    assert 0 <= numbers.min()
    assert numbers.sum() == fewest
    slots = sorted(
        (
            n
            for held, many in zip(master.templates, numbers.tolist(), strict=True)
            for n in held * many
        ),
        reverse=True,
    )
    assert len(slots) >= len(lengths)
    assert all(a >= b for a, b in zip(slots, sorted(lengths, reverse=True), strict=False))
    other = Master(problem)
    other.add(templates_of(problem))
    assert other.solve_whole(fewest - 1, 1000, Work(1.0)) is None


def test_whole_numbers_of_scaled_demand_are_not_looked_for():
    problem = Problem(np.array([4]), np.array([2**30 + 1]), 8, None)
    master = Master(problem)
    master.add([(4, 4)])
    assert master.solve_whole(2**29 + 1, 1000, Work(1.0)) is None


# When it stops


def test_it_stops_when_its_share_of_the_work_is_done():
    problem = uniform(*HARD)
    whole, half = Work(0.1), Work(0.1)
    finished = generate(started(problem), whole, target=None)
    earlier = generate(started(problem), half, target=None, share=whole.done / 2)
    assert whole.done / 2 <= half.done < whole.done < 1
    assert finished.bins < earlier.bins


def test_each_better_bound_is_told_with_its_prices():
    problem = uniform(*HARD)
    told = []
    relaxed = generate(
        started(problem), Work(1.0), target=None, told=lambda *pair: told.append(pair)
    )
    bounds = [bound for bound, _ in told]
    assert bounds == sorted(bounds)
    assert bounds[-1] == relaxed.bound
    assert told[-1][1] is relaxed.best_prices


def test_the_value_of_all_sequences_is_exact_to_the_last_digit():
    problem = Problem(np.array([1, 2, 3]), np.array([1, 1, 1]), 8, None)
    assert value_of(problem, np.array([1e16, 1.0, 1.0])) == 1e16 + 2


def test_time_is_counted_from_where_the_solver_is():
    class Solver:
        def __init__(self):
            self.options = {}

        def getRunTime(self):
            return 100.0

        def setOptionValue(self, name, value):
            self.options[name] = value

        def run(self):
            pass

    master = started(uniform(*HARD))
    master._solver = solver = Solver()
    master._run(Work(1.0, time_limit=1e6), {"simplex_iteration_limit": 7})
    assert solver.options.pop("time_limit") == pytest.approx(1e6 + 100, abs=10)
    assert solver.options == {"simplex_iteration_limit": 7}
    master._run(Work(1.0), {})
    assert solver.options == {"simplex_iteration_limit": 7}


def test_a_solution_at_the_end_of_the_time_is_taken():
    problem = uniform(*HARD)
    master = started(problem)
    bins, prices, _ = master.solve(Work(1.0))
    values, contents = worth(problem, prices, Work(1.0))
    assert master.add(column_generation._templates(problem, values, contents))
    work = Work(1.0, time_limit=0.0)
    assert master.solve(work)[0] == pytest.approx(bins)
    assert master._solver.getModelStatus() == highspy.HighsModelStatus.kTimeLimit


def test_a_solver_that_has_no_time_left_says_so():
    problem = uniform(*HARD)
    with pytest.raises(UnsolvedError, match="HiGHS says 'Time limit reached'"):
        started(problem).solve(Work(1.0, time_limit=0.0))


def test_it_stops_after_so_many_rounds():
    problem = uniform(*HARD)
    finished, most = counted(problem)
    for rounds in (1, 2, 5):
        relaxed, told = counted(problem, rounds=rounds)
        assert told == rounds < most
        assert relaxed.bins > finished.bins
    assert counted(problem, rounds=most + 7)[1] == most


def test_it_stops_well_below_the_target():
    problem = uniform(0, 10, 120, 500, 300)
    volume = volume_of(problem)
    finished, most = counted(problem)
    target = math.ceil(finished.bins)
    relaxed, rounds = counted(problem, target=target)
    assert rounds < most
    assert finished.bins < relaxed.bins <= volume + (target - volume) / 4
    assert counted(problem, target=target + 50)[1] == 1


def test_it_stops_when_the_target_is_proved_out_of_reach():
    problem = uniform(*HARD)
    finished, most = counted(problem)
    target = math.ceil(finished.bins) - 1
    relaxed, rounds = counted(problem, target=target)
    assert rounds < most
    assert relaxed.bound < finished.bound
    assert math.ceil(relaxed.bound) == math.ceil(relaxed.bins) == target + 1
    assert proved_bound(problem, relaxed.best_prices, Work(1.0)) == target + 1


def test_it_stops_when_the_solver_finds_no_new_template(monkeypatch):
    """Prices that promise more than the templates keep must not go on for ever."""
    problem = problem_of([3, 4, 5], 9)
    monkeypatch.setattr(column_generation, "_MORE", -1.0)  # what is worth nothing is added
    assert counted(problem)[0].bins == pytest.approx(linear_program(problem))


def test_amounts_cover_the_demand():
    problem = uniform(4, 10, 60, 300, 100, 4)
    master = started(problem)
    relaxed = generate(master, Work(1e6), target=None)
    slots = np.zeros(101)
    for template, amount in zip(master.templates, relaxed.amounts, strict=True):
        assert sum(template) <= 100
        assert len(template) <= 4
        assert list(template) == sorted(template, reverse=True)
        for length in template:
            slots[length] += amount
    for k, length in enumerate(problem.lengths.tolist()):
        assert slots[length:].sum() >= problem.demand[k:].sum() - 1e-6
    assert relaxed.amounts.sum() == pytest.approx(relaxed.bins)


def test_the_same_problem_is_solved_in_the_same_steps():
    problem = uniform(*HARD)
    masters = started(problem), started(problem)
    first, second = (generate(each, Work(1e6), target=None) for each in masters)
    assert masters[0].templates == masters[1].templates
    assert first.amounts.tobytes() == second.amounts.tobytes()
    assert first.best_prices.tobytes() == second.best_prices.tobytes()


# Work


def test_work_is_over_when_it_is_spent():
    work = Work(2.0)
    assert not work.over
    assert work.done == 0.0
    work.spend(0.5)
    assert work.done == 0.25
    work.spend(1.5)
    assert work.over
    work.spend(1.0)
    assert work.left == -1.0
    assert work.done == 1.0
    assert work.seconds() == math.inf


def test_work_without_end():
    work = Work(math.inf)
    work.spend(1e12)
    assert not work.over
    assert work.done == 0.0


def test_work_is_over_when_its_time_is(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    work = Work(1.0, time_limit=5.0)
    assert not work.over
    assert work.seconds() == 5.0
    assert work.done == 0.0
    now = 104.0
    assert not work.over
    assert work.seconds() == 1.0
    assert work.done == 0.8
    work.spend(0.9)
    assert work.done == pytest.approx(0.9)
    now = 105.5
    assert work.over
    assert work.seconds() == 0.0
    assert work.done == 1.0
    assert Work(1.0, time_limit=0.0).done == 1.0


def test_what_is_done_is_counted():
    problem = uniform(*HARD)
    work = Work(1e6)
    worth(problem, np.ones(len(problem.lengths)), work)
    assert 1e6 - work.left == pytest.approx(cost_of_worth(problem), rel=1e-3)
    capped = problem._replace(max_segments=5)
    assert cost_of_worth(capped) > cost_of_worth(problem)
    longer = problem._replace(max_seq_len=10 * problem.max_seq_len)
    assert cost_of_worth(longer) > 10 * cost_of_worth(problem)
    work, master = Work(1e6), started(problem)
    master.solve(work)
    spent = 1e6 - work.left
    assert spent > 0
    master.solve(work)  # starts from its last solution: nothing to do
    assert 1e6 - work.left == spent


# Without the solver


def test_a_missing_highspy_is_an_error_that_names_the_extra(monkeypatch):
    assert import_highspy("caller") is highspy
    monkeypatch.setitem(sys.modules, "highspy", None)
    text = "highspy is not installed.*pip install 'seqpack_jax\\[optimal\\]'"
    with pytest.raises(SeqpackError, match=f"(?s){text}"):
        import_highspy("caller")


def test_the_solver_prints_nothing():
    """Not its name either, as 1.16 does once in a process, before it can be told."""
    program = (
        "import highspy\n"
        "from seqpack_jax.planning.column_generation import quiet_solver\n"
        "assert quiet_solver(highspy).run() == highspy.HighsStatus.kOk\n"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
