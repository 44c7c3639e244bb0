"""The table of algorithms, what each may be told, and the certificate that all plans get."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import algorithms, caps, histograms

import seqpack_jax as sp
from seqpack_jax.planning import heuristics, planners
from seqpack_jax.planning.bounds import Bound, lower_bound
from seqpack_jax.planning.counts import coarsen_counts
from seqpack_jax.planning.optimal import Proven
from seqpack_jax.planning.planners import ALGORITHMS, Effort, check_effort, plan_counts


def test_the_algorithms():
    assert ALGORITHMS == (
        "best_fit_decreasing",
        "first_fit_decreasing",
        "worst_fit_decreasing",
        "optimal",
    )


@given(histogram=histograms(), algorithm=st.sampled_from(ALGORITHMS[:3]), cap=caps)
def test_a_plan_of_a_heuristic_is_what_the_heuristic_gives(histogram, algorithm, cap):
    counts, capacity = histogram
    plan = plan_counts("test", counts, capacity, algorithm, cap, 1)
    lengths, offsets, multiplicity = getattr(heuristics, algorithm)(counts, capacity, cap)
    assert plan.lengths.tolist() == lengths.tolist()
    assert plan.offsets.tolist() == offsets.tolist()
    assert plan.multiplicity.tolist() == multiplicity.tolist()


@given(histogram=histograms(256), algorithm=algorithms, cap=caps, tolerance=st.integers(1, 20))
def test_what_every_plan_says_of_itself(histogram, algorithm, cap, tolerance):
    counts, capacity = histogram
    effort = Effort(budget=0.05) if algorithm == "optimal" else Effort()
    plan = plan_counts("test", counts, capacity, algorithm, cap, tolerance, effort)
    plan.check(counts)
    assert (plan.max_seq_len, plan.tolerance) == (capacity, tolerance)
    assert plan.num_tokens == sum(n * count for n, count in enumerate(counts.tolist()))
    assert cap is None or plan.max_segments <= cap
    exact = plan_counts("test", counts, capacity, algorithm, cap, 1, effort)
    assert plan.tolerance_rows == plan.num_bins - exact.num_bins
    bins, bound, method, proved = plan.certificate
    assert bins == plan.num_bins
    assert lower_bound(counts, capacity, max_segments=cap).value <= bound <= exact.num_bins
    assert (bound, method) == exact.certificate[1:3]
    assert proved == (bins == bound)


def test_the_bound_is_that_of_the_lengths_as_they_are():
    counts = np.bincount([6, 6, 3, 3, 3])
    for algorithm in ALGORITHMS:
        plan = plan_counts("test", counts, 12, algorithm, None, 4)  # plans 8, 8, 4, 4, 4
        assert plan.certificate == (3, 2, "volume", False)
        assert plan.tolerance_rows == 1


def test_counts_are_checked_for_the_caller():
    for counts, part in [
        ([0, 0, -1], r"counts\[2\] = -1"),
        (np.bincount([9]), r"counts\[9\] = 1, but max_seq_len is 8"),
    ]:
        with pytest.raises(sp.SeqpackError, match=f"^some_function: .*{part}"):
            plan_counts("some_function", counts, 8, "optimal", None, 1)


def test_the_effort_is_handed_on_for_both_plans_of_a_tolerance(monkeypatch):
    calls = []

    def noted(counts, *args, **kwargs):
        calls.append((counts.tolist(), args, kwargs))
        return Proven(heuristics.best_fit_decreasing(counts, *args), Bound(1, "volume"))

    monkeypatch.setattr(planners, "optimal_templates", noted)
    counts, effort = np.bincount([5, 3, 3]), Effort(2.5, 60.0, progress=None)
    plan = plan_counts("test", counts, 12, "optimal", 3, 2, effort)
    options = {"budget": 2.5, "time_limit": 60.0, "progress": None}
    coarse = coarsen_counts(counts, 2, 12).tolist()
    assert calls == [(coarse, (12, 3), options), (counts.tolist(), (12, 3), options)]
    assert plan.certificate == (2, 1, "volume", False)


def test_an_effort_in_plain_floats():
    given_, want = Effort(np.float32(2.5), 3, progress=True), Effort(2.5, 3.0, progress=True)
    checked = check_effort("test", "optimal", given_)
    assert checked == want
    assert [type(value) for value in checked] == [float, float, bool]
    assert check_effort("test", "optimal", Effort()) == Effort(None, None, progress=False)
    endless = Effort(float("inf"), float("inf"))
    assert check_effort("test", "optimal", endless) == endless
    # Whether progress is shown makes no difference to the others.
    for progress in (None, False, True):
        effort = Effort(progress=progress)
        assert check_effort("test", "best_fit_decreasing", effort) == effort


@pytest.mark.parametrize("name", ["budget", "time_limit"])
@pytest.mark.parametrize(
    ("value", "part"),
    [
        (0, "= 0, but it must be above 0"),
        (0.0, "= 0.0, but it must be above 0"),
        (-1, "= -1, but it must be above 0"),
        (float("-inf"), "= -inf, but it must be above 0"),
        (float("nan"), "= nan, but it must be above 0"),
        ("8", "= '8' is not a number"),
        (b"8", "= b'8' is not a number"),
        (True, "= True is not a number"),
        ([8, 9], r"= \[8, 9\] is not a number"),
        (1j, "= 1j is not a number"),
    ],
)
def test_no_such_effort(name, value, part):
    with pytest.raises(sp.SeqpackError, match=f"^prepare: {name} {part}"):
        check_effort("prepare", "optimal", Effort()._replace(**{name: value}))


@pytest.mark.parametrize("algorithm", [*ALGORITHMS[:3], "next_fit"])
@pytest.mark.parametrize("name", ["budget", "time_limit"])
def test_only_the_search_needs_time(algorithm, name):
    part = f"^prepare: {name} = 8 with algorithm = '{algorithm}'"
    with pytest.raises(sp.SeqpackError, match=part) as caught:
        check_effort("prepare", algorithm, Effort()._replace(**{name: 8}))
    assert f"Hint: leave {name} out, or pass algorithm='optimal'" in str(caught.value)
