"""`suggest_rows`: the sequences in a step of packed rows, counted and drawn."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import packings

import seqpack_jax as sp
from seqpack_jax.planning.changeover import suggest_rows

PLAN = sp.pack_length_histogram({30: 600, 60: 300, 120: 100}, max_seq_len=128)


def by_ratio(one, other):
    return max(Fraction(one) / Fraction(other), Fraction(other) / Fraction(one))


@given(packings(), st.integers(1, 200), st.integers(1, 5))
def test_no_other_multiple_is_nearer_to_the_sequences_of_the_padded_run(packing, wanted, processes):
    lengths, capacity = packing
    assume(lengths)
    plan = sp.pack_length_histogram(np.bincount(lengths), capacity)
    wanted = min(wanted, len(lengths))
    assume(processes <= plan.num_bins)
    found = suggest_rows(plan, sequences_per_step=wanted, process_count=processes)
    per_row = Fraction(plan.num_sequences, plan.num_bins)
    off = by_ratio(found.rows_per_step * per_row, wanted)
    multiples = range(processes, plan.num_bins + 1, processes)
    assert found.rows_per_step in multiples
    assert off == min(by_ratio(rows * per_row, wanted) for rows in multiples)
    assert found.sgd_factor == pytest.approx(float(found.rows_per_step * per_row / wanted))
    assert found.adam_factor == math.sqrt(found.sgd_factor)


def test_a_step_is_what_all_possible_draws_say():
    plan = sp.pack_length_histogram({2: 5, 3: 3, 6: 2, 9: 1}, max_seq_len=10)
    found = suggest_rows(plan, sequences_per_step=4)
    rows = list(plan.to_counter().elements())
    packed = list(itertools.combinations(rows, found.rows_per_step))
    sequences = [sum(map(len, step)) for step in packed]
    tokens = [sum(map(sum, step)) for step in packed]
    assert 1 < found.rows_per_step < plan.num_bins
    assert np.std(sequences) > 0
    assert found.packed.sequences == pytest.approx(np.mean(sequences))
    assert found.packed.sequences_std == pytest.approx(np.std(sequences))
    assert found.packed.tokens == pytest.approx(np.mean(tokens))
    assert found.packed.tokens_std == pytest.approx(np.std(tokens))
    padded = [sum(step) for step in itertools.combinations([x for row in rows for x in row], 4)]
    assert found.padded.tokens == pytest.approx(np.mean(padded))
    assert found.padded.tokens_std == pytest.approx(np.std(padded))
    assert (found.padded.rows, found.padded.sequences, found.padded.sequences_std) == (4, 4, 0)


def test_an_epoch_that_is_really_drawn_has_the_steps_that_were_promised():
    rng = np.random.default_rng(0)
    sequences = [np.ones(n, int) for n in rng.geometric(1 / 30, 3000).clip(1, 128)]
    plan = sp.pack_dataset(sequences, 128, batch_size=1).plan
    found = suggest_rows(plan, sequences_per_step=64)
    source = sp.pack_dataset(sequences, 128, batch_size=found.rows_per_step, seed=1)
    drawn = np.array([source[i]["segment_ids"].max(axis=1).sum() for i in range(len(source))])
    tokens = np.array([np.count_nonzero(source[i]["segment_ids"]) for i in range(len(source))])
    assert len(source) == found.packed.steps_per_epoch
    assert drawn[:-1].mean() == pytest.approx(found.packed.sequences, rel=0.05)
    assert drawn[:-1].std() == pytest.approx(found.packed.sequences_std, rel=0.3)
    assert tokens[:-1].mean() == pytest.approx(found.packed.tokens, rel=0.01)
    assert found.packed.capacity == source[0]["tokens"].size
    assert found.padded.steps_per_epoch == math.ceil(3000 / 64)
    assert found.sgd_factor == pytest.approx(1, rel=0.05)


def test_as_many_rows_as_before_hold_more_and_the_rate_grows():
    found = suggest_rows(PLAN, sequences_per_step=64, process_count=64)
    per_row = PLAN.num_sequences / PLAN.num_bins
    assert found.rows_per_step == 64
    assert found.sgd_factor == pytest.approx(per_row)
    assert found.adam_factor == pytest.approx(per_row**0.5)
    assert found.packed.capacity == found.padded.capacity == 64 * 128


def test_the_whole_data_set_in_one_step():
    found = suggest_rows(PLAN, sequences_per_step=1000)
    assert found.rows_per_step == PLAN.num_bins
    assert found.packed == found.padded._replace(rows=PLAN.num_bins, capacity=PLAN.num_bins * 128)
    assert found.packed.tokens_std == found.padded.tokens_std == 0
    assert (found.adam_factor, found.sgd_factor) == (1, 1)


def test_rows_are_never_more_than_the_plan_has():
    plan = sp.pack_length_histogram({10: 5}, max_seq_len=10)
    assert suggest_rows(plan, sequences_per_step=5, process_count=3).rows_per_step == 3


def test_one_sequence_per_row_changes_nothing():
    plan = sp.pack_length_histogram({10: 50, 9: 50}, max_seq_len=10)
    found = suggest_rows(plan, sequences_per_step=20)
    assert found.packed == found.padded
    assert found.packed.tokens_std > 0
    assert found.sgd_factor == 1


def test_a_billion_sequences_are_exact():
    plan = sp.pack_length_histogram({512: 10**9, 256: 2 * 10**9}, max_seq_len=1024)
    found = suggest_rows(plan, sequences_per_step=3 * 2**20, process_count=8)
    assert found.rows_per_step == 2**20
    assert found.sgd_factor == pytest.approx(1, abs=1e-9)
    assert found.packed.tokens == 2**30
    assert found.padded.tokens == pytest.approx(2**30)
    deviation = math.sqrt(2 / 9) * 256 * math.sqrt(3 * 2**20)
    assert found.padded.tokens_std == pytest.approx(deviation, rel=1e-3)


def test_true_tokens_under_a_tolerance():
    lengths = [5, 7, 9, 13, 3, 3]
    plan = sp.pack_length_histogram(np.bincount(lengths), 16, tolerance=4)
    found = suggest_rows(plan, sequences_per_step=len(lengths))
    assert found.packed.tokens == found.padded.tokens == sum(lengths)


def test_it_prints_as_a_table():
    lines = str(suggest_rows(PLAN, sequences_per_step=64)).splitlines()
    assert (lines[0], lines[-1]) == ("SuggestedRows(", ")")
    assert {line[:15] for line in lines[1:-1]} == {
        f"  {name + ':':12} "
        for name in ("a step", "rows", "sequences", "tokens", "capacity", "steps", "rate")
    }
    assert lines[2].split() == ["rows:", "26", "64"]
    assert {line.find("64") for line in lines[2:4]} == {lines[1].find("padded")}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"sequences_per_step": 0}, "sequences_per_step = 0, but it must be at least 1"),
        ({"sequences_per_step": 2.5}, "sequences_per_step = 2.5 is not an integer"),
        ({"sequences_per_step": 1001}, "sequences_per_step = 1,001, but the plan has 1,000"),
        ({"process_count": 0}, "process_count = 0, but it must be at least 1"),
        ({"process_count": True}, "process_count = True is not an integer"),
        ({"process_count": 401}, "process_count = 401, but the plan has 400 rows"),
        ({"plan": {(3, 2): 4}}, "plan is a dict"),
        ({"plan": sp.pack_vectors([[3, 1]], (8, 8))[0]}, "the plan has several capacities"),
        ({"plan": sp.pack_length_histogram({}, 8)}, "sequences_per_step = 64, but the plan has 0"),
    ],
)
def test_bad_arguments_are_refused(options, problem):
    plan = options.pop("plan", PLAN)
    with pytest.raises(sp.SeqpackError, match=f"suggest_rows: {problem}.*Hint: "):
        suggest_rows(plan, **{"sequences_per_step": 64} | options)


def test_a_column_of_a_vector_plan_is_a_plan():
    plan = sp.pack_vectors([[3, 1], [3, 2], [2, 1]], (8, 8))[0].column(0)
    assert suggest_rows(plan, sequences_per_step=3).rows_per_step == plan.num_bins
