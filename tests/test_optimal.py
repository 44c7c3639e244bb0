"""Optimal plans: whole, never worse than best fit, and their bounds true."""

import logging
import subprocess
import sys
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import caps, histograms, packings

import seqpack_jax as sp
from seqpack_jax.planning import optimal
from seqpack_jax.planning.bounds import bound_of_lengths, lower_bound
from seqpack_jax.planning.column_generation import UnsolvedError, Work, generate, rounded_up
from seqpack_jax.planning.plan import Certificate
from seqpack_jax.planning.rounding import Level


def solved(counts, capacity, **options):
    plan = sp.pack_length_histogram(counts, capacity, algorithm="optimal", **options)
    plan.check(counts)
    assert plan.certificate.bins == plan.num_bins
    proved = plan.num_bins == plan.certificate.lower_bound
    assert plan.certificate.proved_optimal == proved
    assert plan.max_segments <= (options.get("max_segments") or capacity)
    return plan


def triplets(sequences, capacity=1000, seed=0):
    """Counts of sequences that fill `sequences / 3` bins to the last token, by threes."""
    rng = np.random.default_rng(seed)
    first = rng.integers(capacity // 4 + 1, capacity // 2 - 1, sequences // 3)
    rest = capacity - first
    second = rng.integers(capacity // 4 + 1, np.minimum(capacity // 2, rest - capacity // 4))
    return np.bincount(np.concatenate([first, second, rest - second]))


def uniform(sequences=10_000, capacity=1024, seed=0):
    rng = np.random.default_rng(seed)
    return np.bincount(rng.integers(capacity // 4, 5 * capacity // 8 + 1, sequences))


def stubborn():
    """Counts of 100 full bins; two integer programs have to look for the last of them."""
    return triplets(300, capacity=300), 300


@pytest.fixture
def works(monkeypatch):
    """The `Work` of each search that the test starts."""
    started = []

    class Noted(Work):
        def __init__(self, budget, time_limit=None):
            super().__init__(budget, time_limit)
            self.budget = budget
            started.append(self)

    monkeypatch.setattr(optimal, "Work", Noted)
    return started


@st.composite
def dozens(draw):
    """`(lengths, max_seq_len)` of a dozen sequences that leave little room, if any."""
    lengths, capacity = draw(packings(max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()) and capacity > 8:  # four bins, cut in three
        cuts = np.sort(rng.integers(1, capacity, (4, 2)), axis=1)
        edges = np.column_stack([np.zeros(4, int), cuts, np.full(4, capacity)])
        pieces = np.diff(edges, axis=1).ravel()
        lengths = pieces[pieces > 0].tolist()
    return lengths, capacity


@settings(max_examples=300)
@given(packing=dozens(), cap=caps)
def test_no_packing_is_below_the_bound_and_no_claim_is_false(packing, cap):
    lengths, capacity = packing
    plan = solved(np.bincount(lengths, minlength=1), capacity, max_segments=cap)
    fewest = reference.fewest_bins(lengths, capacity, cap) if lengths else 0
    assert plan.certificate.lower_bound <= fewest <= plan.num_bins
    assert plan.num_bins == fewest  # these are small enough for that


@settings(max_examples=60)
@given(histogram=histograms(max_capacity=256), cap=caps)
def test_never_more_bins_than_best_fit_and_never_a_lower_bound(histogram, cap):
    counts, capacity = histogram
    plan = solved(counts, capacity, max_segments=cap, budget=0.1)
    greedy = sp.pack_length_histogram(counts, capacity, max_segments=cap)
    assert plan.num_bins <= greedy.num_bins
    known = lower_bound(counts, capacity, max_segments=cap)
    assert known.value <= plan.certificate.lower_bound <= plan.num_bins
    assert greedy.certificate.lower_bound == known.value


@pytest.mark.parametrize("sequences", [60, 120, 300])
def test_triplets(sequences):
    counts = triplets(sequences)
    assert sp.pack_length_histogram(counts, 1000).num_bins > sequences // 3
    plan = solved(counts, 1000)
    assert plan.certificate == (sequences // 3, sequences // 3, "volume", True)
    assert plan.efficiency == 1


def test_the_bound_of_column_generation_is_needed():
    counts = np.bincount(np.random.default_rng(0).integers(100, 300, 100)) * 10**10
    plan = solved(counts, 512)
    assert plan.num_sequences == 10**12
    assert plan.certificate.method == "column generation"
    assert plan.certificate.proved_optimal
    assert plan.certificate.lower_bound > lower_bound(counts, 512).value


@pytest.mark.parametrize("cap", [None, 2, 3])
def test_the_work_does_not_depend_on_the_number_of_sequences(works, cap):
    counts = uniform()
    few = solved(counts, 1024, max_segments=cap)
    many = solved(counts * 10**5, 1024, max_segments=cap)
    huge = solved(counts * 10**8, 1024, max_segments=cap)
    for plan in (few, many, huge):
        assert plan.num_bins - plan.certificate.lower_bound <= 1
    done = [work.budget - work.left for work in works]
    assert len(done) == 3
    assert max(done[1:]) <= 2 * done[0]


def test_equal_counts_give_equal_plans_in_any_process():
    counts = triplets(60)
    plan = solved(counts, 1000)
    assert solved(counts, 1000).digest() == plan.digest()
    named = {int(length): int(counts[length]) for length in np.flatnonzero(counts)[::-1]}
    assert solved(named, 1000).digest() == plan.digest()
    program = (
        "import sys, seqpack_jax as sp\n"
        f"plan = sp.pack_length_histogram({named}, 1000, algorithm='optimal')\n"
        "print(plan.digest(), *plan.certificate)\n"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(
        command, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [plan.digest(), "20", "20", "volume", "True"]


def test_a_budget_is_kept_and_enough_of_it_finds_the_fewest_bins(works):
    counts, capacity = stubborn()
    greedy = sp.pack_length_histogram(counts, capacity)
    budgets = [1e-9, 0.005, 0.01, 0.02, 0.05, 0.2, 1.0]
    plans = [solved(counts, capacity, budget=budget) for budget in budgets]
    assert plans[0].to_counter() == greedy.to_counter()
    bins = [plan.num_bins for plan in plans]
    assert bins[-2:] == [100, 100]
    assert 100 < bins[4] < bins[1] < bins[0] == greedy.num_bins
    assert {plan.certificate.lower_bound for plan in plans} == {100}
    for work, budget in zip(works, budgets, strict=True):
        assert work.budget == budget
        assert work.left > -0.01  # a step that has begun is brought to its end
    again = solved(counts, capacity, budget=0.02)
    assert again.digest() == plans[3].digest()


def test_the_budget_grows_with_the_rows(works):
    for capacity in (1000, 2048, 4096, 10**6):
        optimal.optimal_templates(np.bincount([capacity // 2 + 1, 3]), capacity)
    assert [work.budget for work in works] == [8, 8, 16, 48]


def test_no_time_left_is_the_plan_of_best_fit_or_better():
    counts = triplets(120)
    best = sp.pack_length_histogram(counts, 1000).num_bins
    templates, bound, _ = optimal.optimal_templates(counts, 1000, time_limit=1e-9)
    assert 40 < templates.multiplicity.sum() <= best
    assert bound == (40, "volume")
    lengths, times = (
        templates.lengths,
        np.repeat(templates.multiplicity, np.diff(templates.offsets)),
    )
    assert np.bincount(lengths, times).tolist() == counts.tolist()
    whole = optimal.optimal_templates(counts, 1000, time_limit=1e9).templates
    assert whole.multiplicity.sum() == 40


def fails_at(name, call, error, monkeypatch):
    """Let a function that the search calls raise at its call of that number, from 1."""
    real, calls = getattr(optimal, name), []

    def broken(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(optimal, name, broken)
    return calls


_PLACES = [
    ("generate", 1),
    ("best_fit", 2),
    ("best_fit", 4),
    ("added", 3),
    ("pack_into", 1),
    ("pack_into", 2),
]


@pytest.mark.parametrize(("name", "call"), _PLACES)
@pytest.mark.parametrize("progress", [False, True])
def test_an_interrupted_search_gives_the_best_plan_so_far(
    name, call, progress, monkeypatch, caplog, capfd
):
    counts, capacity = stubborn()
    greedy = sp.pack_length_histogram(counts, capacity).num_bins
    calls = fails_at(name, call, KeyboardInterrupt, monkeypatch)
    with caplog.at_level(logging.WARNING):
        plan = solved(counts, capacity, progress=progress)
    assert len(calls) == call
    assert 100 < plan.num_bins <= greedy
    assert plan.certificate == (plan.num_bins, 100, "volume", False)
    said = f"interrupted: the best plan so far has {plan.num_bins} rows, bound 100"
    assert caplog.messages == [said]
    assert bool(capfd.readouterr().err) == progress


@pytest.mark.parametrize("error", [KeyboardInterrupt, UnsolvedError("HiGHS says 'Unknown'")])
def test_the_bound_of_an_interrupted_relaxation_is_proved(error, monkeypatch):
    counts = np.bincount(np.random.default_rng(0).integers(100, 300, 100)) * 10**10
    cheap = lower_bound(counts, 512).value
    heard = []

    def interrupted(*args, told, **options):
        def tell(bound, prices):
            told(bound, prices)
            heard.append(rounded_up(bound))
            if heard[-1] > cheap:
                raise error

        return generate(*args, told=tell, **options)

    monkeypatch.setattr(optimal, "generate", interrupted)
    plan = solved(counts, 512)
    assert plan.certificate[1:3] == (heard[-1], "column generation")
    assert heard[-1] > cheap


@pytest.mark.parametrize("error", [KeyboardInterrupt, UnsolvedError("HiGHS says 'Unknown'")])
def test_an_interrupted_proof_keeps_the_plan(error, monkeypatch, caplog):
    counts = np.bincount(np.random.default_rng(0).integers(100, 300, 100)) * 10**10

    def interrupted(*args, told, **options):
        told(1e18, np.ones(np.count_nonzero(counts)))
        raise error

    def proof(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(optimal, "generate", interrupted)
    monkeypatch.setattr(optimal, "proved_bound", proof)
    plan = solved(counts, 512)
    assert plan.certificate.lower_bound == lower_bound(counts, 512).value
    assert "interrupted" in caplog.text


def test_an_interruption_ends_the_search_for_true_lengths_too(monkeypatch):
    counts, capacity = stubborn()
    calls = fails_at("generate", 1, KeyboardInterrupt, monkeypatch)
    plan = sp.pack_length_histogram(counts, capacity, algorithm="optimal", tolerance=3)
    assert len(calls) == 1
    finest = sp.pack_length_histogram(counts, capacity)
    assert plan.tolerance_rows == max(0, plan.num_bins - finest.num_bins)
    assert plan.certificate.lower_bound == finest.certificate.lower_bound


def test_a_tolerance_never_costs_less_than_nothing():
    """Though a search may find less in finer lengths."""
    counts = np.bincount(np.random.default_rng(0).integers(1500, 4800, 3000))
    plan = sp.pack_length_histogram(counts, 8192, algorithm="optimal", tolerance=7, budget=0.5)
    assert plan.tolerance_rows >= 0


def test_a_share_of_the_work_is_left_for_rounding(works, monkeypatch):
    """Of a relaxed problem that does not come to its end."""
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1, 10**5)
    counts = np.bincount(np.clip(np.rint(lengths), 1, 2048).astype(int))
    real, done = optimal.dive, []

    def noted(*args, work, **options):
        done.append(work.done)
        return real(*args, work=work, **options)

    monkeypatch.setattr(optimal, "dive", noted)
    solved(counts, 2048, max_segments=9, budget=1.0)
    assert 0.7 <= done[0] < 0.95


def test_best_fit_of_each_level_is_work(monkeypatch):
    counts, capacity = stubborn()
    levels = fails_at("best_fit", 10**9, KeyboardInterrupt, monkeypatch)
    solved(counts, capacity)
    many = len(levels)
    levels.clear()
    monkeypatch.setattr(optimal, "_BEST_FIT", 1e9)
    solved(counts, capacity)
    assert len(levels) == 2 < many  # the first plan, and one level


@pytest.mark.parametrize(("name", "call", "kept"), [("best_fit", 2, False), ("pack_into", 1, True)])
def test_what_was_found_before_an_interruption_is_kept(name, call, kept, monkeypatch):
    counts, capacity = stubborn()
    fails_at(name, call, KeyboardInterrupt, monkeypatch)
    plan = solved(counts, capacity)
    assert (plan.num_bins < sp.pack_length_histogram(counts, capacity).num_bins) == kept


@pytest.mark.parametrize(("name", "call"), _PLACES)
def test_an_unsolved_program_gives_the_best_plan_so_far(name, call, monkeypatch, caplog):
    calls = fails_at(name, call, UnsolvedError("HiGHS says 'Unknown'"), monkeypatch)
    with caplog.at_level(logging.WARNING):
        plan = solved(*stubborn())
    assert len(calls) == call
    assert plan.certificate.lower_bound == 100
    assert caplog.messages == [
        "the search for a better plan ended early: HiGHS says 'Unknown'",
    ]


def test_a_plan_from_a_dive_that_lost_sequences_is_not_taken(monkeypatch):
    """Should the numbers of the solver be wrong, the plan is still whole."""
    real = optimal.dive

    def wrong(problem, *args, **kwargs):
        for level in real(problem, *args, **kwargs):
            yield level._replace(left=level.left * 0)

    monkeypatch.setattr(optimal, "dive", wrong)
    monkeypatch.setattr(optimal, "pack_into", lambda problem, target, work: {})
    counts, capacity = stubborn()
    plan = solved(counts, capacity)
    assert 100 <= plan.num_bins <= sp.pack_length_histogram(counts, capacity).num_bins


def test_a_worse_plan_is_not_taken(monkeypatch):
    counts, capacity = stubborn()
    greedy = sp.pack_length_histogram(counts, capacity)
    real, calls = optimal.best_fit, []

    def one_by_one(problem):
        calls.append(problem)
        if len(calls) == 1:
            return real(problem)
        numbers = zip(problem.lengths.tolist(), problem.demand.tolist(), strict=True)
        return {(length,): number for length, number in numbers}

    def first_level(problem, *args, **kwargs):
        yield Level({}, problem.demand)

    monkeypatch.setattr(optimal, "dive", first_level)
    monkeypatch.setattr(optimal, "best_fit", one_by_one)
    monkeypatch.setattr(optimal, "pack_into", lambda problem, target, work: None)
    assert solved(counts, capacity).to_counter() == greedy.to_counter()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("counts", "capacity", "programs"), [(uniform(), 1024, 0), (*stubborn(), 2)]
)
def test_the_search_ends_with_the_first_plan_that_meets_the_bound(
    counts, capacity, programs, monkeypatch
):
    found, started = [], []
    added, pack_into = optimal.added, optimal.pack_into
    monkeypatch.setattr(optimal, "added", lambda *bins: found.append(added(*bins)) or found[-1])
    monkeypatch.setattr(optimal, "pack_into", lambda *args: started.append(0) or pack_into(*args))
    plan = solved(counts, capacity)
    assert plan.certificate.proved_optimal
    sizes = [sum(bins.values()) for bins in found]
    assert sizes.index(plan.num_bins) == len(sizes) - 1
    assert len(started) == programs


@pytest.mark.parametrize("progress", [False, None, True])
def test_progress_is_shown_when_asked_for(progress, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    solved(triplets(60), 1000, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    if progress:
        assert "optimal plan" in err
        assert "20 rows, bound 20" in err
    else:
        assert err == ""


def test_progress_is_shown_on_a_terminal_unless_not_wanted(capfd):
    with mock.patch.object(sys.stderr, "isatty", return_value=True):
        solved(triplets(60), 1000)
        assert "20 rows, bound 20" in capfd.readouterr().err
        solved(triplets(60), 1000, progress=False)
        assert capfd.readouterr().err == ""


def test_a_budget_without_end_can_be_shown(capfd):
    plan = solved(triplets(60), 1000, budget=float("inf"), progress=True)
    assert plan.certificate.proved_optimal
    assert "20 rows, bound 20" in capfd.readouterr().err


@pytest.mark.parametrize("lengths", [[], [3], [600, 500, 400] * 9])
def test_without_highspy_the_error_names_the_extra(lengths, monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    part = "algorithm = 'optimal': the package highspy is not installed"
    for caller, call in {
        "pack_length_histogram": lambda: solved(np.bincount(lengths, minlength=1), 1000),
        "pack_sequences": lambda: sp.pack_sequences(lengths, 1000, algorithm="optimal"),
    }.items():
        with pytest.raises(sp.SeqpackError, match=f"{caller}: {part}") as caught:
            call()
        assert "pip install 'seqpack_jax[optimal]'" in str(caught.value)
    sp.pack_sequences(lengths, 1000).check(lengths)  # the others do without


def test_no_sequences():
    for counts in ({}, [0], np.zeros(9, int)):
        plan = solved(counts, 8)
        assert plan.certificate == (0, 0, "volume", True)
        assert plan.digest() == sp.pack_length_histogram(counts, 8).digest()


@pytest.mark.parametrize(
    ("counts", "capacity", "cap", "bins"),
    [
        ({7: 10**12}, 20, None, 5 * 10**11),
        ({7: 9}, 20, 1, 9),
        ({7: 5, 9: 3, 2: 8}, 20, 1, 16),
        ({1: 9}, 1, None, 9),
        ({1: 9}, 1, 1, 9),
        ({20: 4}, 20, None, 4),
        ({11: 10**6, 12: 10**6}, 20, None, 2 * 10**6),
        ({2**31 - 1: 0, 5: 3}, 2**31 - 1, None, 1),
    ],
)
def test_simple_cases(counts, capacity, cap, bins):
    plan = solved(counts, capacity, max_segments=cap)
    assert plan.certificate[:2] == (bins, bins)


def test_rows_too_long_for_the_budget_get_the_plan_of_best_fit(caplog):
    capacity = 3 * 10**6
    counts = triplets(90, capacity)
    greedy = sp.pack_length_histogram(counts, capacity)
    assert not greedy.certificate.proved_optimal
    tracemalloc.start()
    with caplog.at_level(logging.INFO):
        plan = solved(counts, capacity)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.to_counter() == greedy.to_counter()
    assert plan.certificate == greedy.certificate
    assert "max_seq_len is so large" in caplog.text
    assert peak < 20 * counts.nbytes


def test_the_longest_rows():
    counts = {2**20 + 1: 5000, 2**20 - 7: 4000, 2**19 + 3: 1000}
    for cap in (None, 1000):
        tracemalloc.start()
        plan = solved(counts, 2**31 - 1, max_segments=cap)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert plan.num_bins == (10 if cap else 5)
        assert peak < 2**28


@pytest.mark.parametrize("tolerance", [2, 7, 16, 5000])
def test_a_tolerance(tolerance):
    counts = uniform(3000)
    exact = solved(counts, 1024)
    plan = solved(counts, 1024, tolerance=tolerance)
    assert plan.num_tokens == exact.num_tokens
    assert plan.tolerance_rows == plan.num_bins - exact.num_bins >= 0
    assert plan.certificate.lower_bound == exact.certificate.lower_bound
    assert plan.certificate.method == exact.certificate.method
    greedy = sp.pack_length_histogram(counts, 1024, tolerance=tolerance)
    assert plan.num_bins <= greedy.num_bins


@pytest.mark.parametrize("budget", [1e-9, 8.0])
def test_a_certificate_is_saved_with_its_plan(tmp_path, budget):
    counts = np.bincount(np.random.default_rng(0).integers(100, 300, 100)) * 10**10
    plan = solved(counts, 512, budget=budget)
    plan.save(tmp_path / "plan.npz")
    again = sp.PackingPlan.load(tmp_path / "plan.npz")
    assert isinstance(again.certificate, Certificate)
    assert again.certificate == plan.certificate
    assert again.digest() == plan.digest()
    assert again.certificate.proved_optimal == (budget == 8.0)


def test_stats_show_the_bound_of_the_plan():
    counts = np.bincount(np.random.default_rng(0).integers(100, 300, 100)) * 10**10
    plan = solved(counts, 512)
    stats = sp.PackingStats.from_plan(plan)
    lengths = np.flatnonzero(counts)
    assert stats.lower_bound == plan.certificate.lower_bound
    assert stats.lower_bound > bound_of_lengths(lengths, counts[lengths], 512).value
    assert stats.gap == 0
    assert f"bound:       {plan.num_bins:,} (0 bins over it)" in str(stats)


def test_an_epoch_of_an_optimal_plan_uses_each_id_once():
    rng = np.random.default_rng(0)
    counts = triplets(120)
    lengths = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    plan = solved(counts, 1000)
    _, pools = sp.length_histogram_from_lengths(lengths)
    epochs = [sp.materialize_epoch(plan, pools, seed=1, epoch=epoch) for epoch in (0, 1)]
    for epoch in epochs:
        bins = epoch[0 : len(epoch)]
        bins.check(lengths)
        assert len(bins) == 40
        assert sorted(bins.ids.tolist()) == list(range(120))
        assert (np.add.reduceat(lengths[bins.ids], bins.offsets[:-1]) == 1000).all()
    assert epochs[0][:].tolist() != epochs[1][:].tolist()


def test_billions_of_each_length_stay_inside_the_digits_of_the_solver():
    counts = {4: 942744231, 8: 460732666, 17: 516429730, 23: 117585350, 24: 836997441}
    counts |= {26: 867469420, 33: 637110761}
    plan = sp.pack_length_histogram(counts, 337, algorithm="optimal")
    plan.check(counts)
    assert plan.certificate.proved_optimal
    assert plan.num_bins == 245125832
