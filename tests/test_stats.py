"""The same figures from a plan, from its bins and from its templates."""

import itertools
import json
import math
from collections import Counter
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import algorithms, packings

import seqpack_jax as sp
from seqpack_jax.planning.bounds import lower_bound
from seqpack_jax.planning.over_length import OverLength, OverLengthReport
from seqpack_jax.planning.stats import PackingStats


@given(packing=packings(), algorithm=algorithms, rows=st.integers(1, 9))
def test_all_constructors_agree(packing, algorithm, rows):
    lengths, capacity = packing
    counts = np.bincount(lengths, minlength=1) if lengths else [0]
    plan = sp.pack_length_histogram(counts, capacity, algorithm=algorithm)
    bins = sp.pack_sequences(lengths, capacity, algorithm=algorithm)
    stats = PackingStats.from_plan(plan, rows_per_step=rows)
    assert stats == PackingStats.from_bins(bins, lengths, capacity, rows_per_step=rows)
    assert stats == PackingStats.from_bins(bins.tolist(), lengths, capacity, rows_per_step=rows)
    templates = plan.to_counter()
    assert stats == PackingStats.from_templates(templates, capacity, rows_per_step=rows)
    backwards = dict(reversed(templates.items()))
    assert stats == PackingStats.from_templates(backwards, capacity, rows_per_step=rows)


@given(packing=packings(max_size=16), rows=st.integers(1, 5))
def test_figures_equal_what_their_names_say(packing, rows):
    lengths, capacity = packing
    bins = sp.pack_sequences(lengths, capacity).tolist()
    stats = PackingStats.from_bins(bins, lengths, capacity, rows_per_step=rows)
    sizes = [len(ids) for ids in bins]
    fills = sorted(sum(lengths[i] for i in ids) for ids in bins)
    assert (stats.num_bins, stats.num_sequences) == (len(bins), len(lengths))
    assert stats.num_tokens == sum(lengths)
    assert stats.num_tokens + stats.padding == stats.capacity == len(bins) * capacity
    assert stats.lower_bound == lower_bound(Counter(lengths), capacity).value
    assert stats.gap == len(bins) - stats.lower_bound >= 0
    assert stats.max_segments == max(sizes, default=0)
    assert stats.sum_squared_lengths == sum(length**2 for length in lengths)
    if not bins:
        return
    assert stats.segments_mean == np.mean(sizes)
    assert stats.segments_std == pytest.approx(np.std(sizes), abs=1e-9)
    assert stats.tokens_std == pytest.approx(np.std(fills), abs=1e-9)
    assert stats.attention_share == sum(n**2 for n in lengths) / (len(bins) * capacity**2)
    for percent in (50, 90, 99):
        full = getattr(stats, f"fullness_p{percent}")
        assert full == fills[math.ceil(len(bins) * percent / 100) - 1] / capacity


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 9])
def test_a_step_is_any_rows_of_a_shuffled_epoch(rows):
    """Every choice of `rows` bins is equally likely, and no bin is drawn twice."""
    lengths, capacity = [9, 8, 6, 6, 5, 4, 2, 1, 1, 7, 3], 10
    bins = sp.pack_sequences(lengths, capacity, max_segments=3).tolist()
    assert len(bins) == 6
    steps = list(itertools.combinations(bins, min(rows, len(bins))))
    tokens = [sum(lengths[i] for ids in step for i in ids) for step in steps]
    segments = [sum(len(ids) for ids in step) for step in steps]
    stats = PackingStats.from_bins(bins, lengths, capacity, rows_per_step=rows)
    assert stats.tokens_per_step_mean == pytest.approx(np.mean(tokens))
    assert stats.tokens_per_step_std == pytest.approx(np.std(tokens), abs=1e-9)
    assert stats.segments_per_step_mean == pytest.approx(np.mean(segments))
    assert stats.segments_per_step_std == pytest.approx(np.std(segments), abs=1e-9)


def test_steps_of_an_epoch_vary_as_said():
    lengths = np.random.default_rng(0).geometric(1 / 40, 3000).clip(1, 128)
    counts, pools = sp.length_histogram_from_lengths(lengths)
    plan = sp.pack_length_histogram(counts, 128, max_segments=6)
    stats = PackingStats.from_plan(plan, rows_per_step=64)
    segments = []
    for number in range(20):
        epoch = sp.materialize_epoch(plan, pools, 0, epoch=number)
        sizes = np.diff(epoch[:].offsets)[: len(epoch) // 64 * 64]
        segments += sizes.reshape(-1, 64).sum(axis=1).tolist()
    assert np.mean(segments) == pytest.approx(stats.segments_per_step_mean, rel=0.01)
    assert np.std(segments) == pytest.approx(stats.segments_per_step_std, rel=0.1)


def test_figures_are_exact_beyond_64_bits():
    long = 2**31 - 1
    stats = PackingStats.from_templates({(long,): 2**30 - 1, (3, 2): 1}, long)
    assert stats.sum_squared_lengths == (2**30 - 1) * long**2 + 13 > 2**91
    share = Fraction(stats.sum_squared_lengths, 2**30 * long**2)
    assert stats.attention_share == float(share) < 1.0
    bins = 2**30
    variance = Fraction((bins - 1) * (long - 5) ** 2, bins**2)
    assert stats.tokens_std == pytest.approx(math.sqrt(variance), rel=1e-12)
    single = PackingStats.from_templates({(1,) * 7: 10**17}, 7)
    assert single.sum_squared_lengths == single.num_sequences == 7 * 10**17
    assert single.segments_std == 0.0


@given(
    packing=packings(),
    action=st.sampled_from(["drop", "truncate", "truncate_left", "crop", "split"]),
    overlap=st.integers(0, 3),
    min_tail=st.integers(1, 3),
)
def test_bins_of_a_policy_are_understood(packing, action, overlap, min_tail):
    lengths, longest = packing
    capacity = max(4, longest // 3)
    policy = OverLength(action)
    if action == "split":
        policy = OverLength(action, overlap=overlap, min_tail=min_tail)
    counts, pools = sp.length_histogram_from_lengths(lengths, capacity, over_length=policy)
    plan = sp.pack_length_histogram(counts, capacity)
    bins = sp.pack_sequences(lengths, capacity, over_length=policy)
    stats = PackingStats.from_bins(bins, lengths, capacity)
    report = stats.report
    assert stats == PackingStats.from_plan(plan, report=pools.report)
    assert report[1:] == bins.report[1:]
    assert report.action == (policy.action if report.sequences else "error")
    assert report.sequences == sum(length > capacity for length in lengths)
    assert report.tokens == sum(length for length in lengths if length > capacity)
    lost = report.dropped_tokens - report.repeated_tokens
    assert stats.num_tokens == sum(lengths) - lost
    assert ("over-length:" in str(stats)) == (report.sequences > 0)


def test_a_policy_that_touches_nothing_changes_no_figure():
    plan = sp.pack_length_histogram({5: 2, 3: 1}, 8)
    plain = PackingStats.from_plan(plan)
    for policy in ("drop", "crop", "split"):
        bins = sp.pack_sequences([5, 3, 5], 8, over_length=policy)
        assert PackingStats.from_bins(bins, [5, 3, 5], 8) == plain
        assert PackingStats.from_plan(plan, report=OverLengthReport(policy)) == plain


def test_templates_are_told_what_a_policy_touched():
    bins = sp.pack_sequences([5, 3, 9], 8, over_length="split")
    stats = PackingStats.from_templates({(8,): 1, (5, 3): 1, (1,): 1}, 8, report=bins.report)
    assert stats.report == bins.report
    assert PackingStats.from_templates({(8,): 1, (5, 3): 1, (1,): 1}, 8) != stats
    same = PackingStats.from_templates(
        {
            (8,): 1,
            (
                5,
                3,
            ): 1,
            (1,): 1,
        },
        8,
        report=bins.report,
    )
    assert same == stats == PackingStats.from_bins(bins, [5, 3, 9], 8)


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ("drop", "2 sequences (25 tokens): dropped"),
        ("truncate", "2 sequences (25 tokens): cut at the end, 9 tokens dropped"),
        ("truncate_left", "2 sequences (25 tokens): cut at the beginning, 9 tokens dropped"),
        ("crop", "2 sequences (25 tokens): cut to a window, 9 tokens dropped"),
        ("split", "2 sequences (25 tokens): split into 4 pieces"),
        (OverLength("split", min_tail=2), "2 sequences (25 tokens): split into 3 pieces, "),
        (OverLength("split", overlap=2), "split into 5 pieces, 6 repeated"),
    ],
)
def test_what_a_policy_touched_is_shown(policy, line):
    lengths = [9, 4, 16]
    bins = sp.pack_sequences(lengths, 8, over_length=policy)
    stats = PackingStats.from_bins(bins, lengths, 8)
    assert line in str(stats)
    assert json.loads(json.dumps(stats.to_dict()))["over_length"] == stats.report._asdict()
    with pytest.raises(sp.SeqpackError, match=r"lengths\[0\] = 9"):
        PackingStats.from_bins(bins.tolist(), lengths, 8)


def test_percentiles_are_values_that_occur():
    """Seed bug 14: there, one constructor interpolates and the other does not."""
    lengths = [10, 9, 7, 4]
    bins = sp.Bins(np.arange(4), np.arange(5), 10)
    stats = PackingStats.from_bins(bins, lengths, 10)
    assert (stats.fullness_p50, stats.fullness_p90, stats.fullness_p99) == (0.7, 1.0, 1.0)
    all_fills = PackingStats.from_templates({(fill,): 1 for fill in range(1, 201)}, 200)
    assert (all_fills.fullness_p50, all_fills.fullness_p90) == (0.5, 0.9)
    assert all_fills.fullness_p99 == 0.99


def test_it_prints_as_the_seed_does():
    """The first lines are those of the sample in the seed's README, then come ours."""
    lengths = [246, 128, 118, 253, 256, 100, 43, 10, 20, 30, 40, 50, 60, 70, 80]
    bins = [[0], [1, 2], [3], [4], [5, 6]]
    with pytest.raises(sp.SeqpackError, match=r"sequence 7 is in 0 bins \(8 such sequences\)"):
        PackingStats.from_bins(bins, lengths, 256)
    stats = PackingStats.from_templates(
        {(10, 100, 17): 1, (100, 100, 46): 1, (230, 10, 13): 1, (128, 64, 64): 1, (48, 48, 48): 1},
        256,
        rows_per_step=2,
    )
    report = OverLengthReport("split", 3, 1234, 12, 0, 9)
    stats = replace(stats, tolerance=16, tolerance_rows=1, report=report)
    assert str(stats).splitlines() == [
        "PackingStats(",
        "  bins:        5",
        "  sequences:   15 (avg 3.00/bin)",
        "  tokens:      1,026 / 1,280 capacity",
        "  efficiency:  80.16%",
        "  padding:     254 (19.84%)",
        "  fullness:    p50=96.1%  p90=100.0%  p99=100.0%",
        "  bound:       5 (0 bins over it)",
        "  segments:    std 0.00/bin, max 3",
        "  attention:   35.76% of bins x max_seq_len^2",
        "  step:        2 rows: 410.4 tokens (std 70.1), 6.00 segments (std 0.00)",
        "  tolerance:   16 (costs 1 bins)",
        "  over-length: 3 sequences (1,234 tokens): split into 9 pieces, 12 tokens dropped",
        ")",
    ]


def test_the_dictionary_has_every_figure():
    stats = PackingStats.from_templates({(5, 3): 2, (2,): 1}, 10, rows_per_step=2)
    figures = stats.to_dict()
    assert json.loads(json.dumps(figures)) == figures
    derived = {name for name, what in vars(PackingStats).items() if isinstance(what, property)}
    names = {field.name for field in fields(stats)} | {n for n in derived if n[0] != "_"}
    assert set(figures) == names - {"report"} | {"over_length"}
    assert all(figures[name] == getattr(stats, name) for name in names - {"report"})


def test_a_tolerance_is_shown_and_counted_as_planned():
    lengths = [5, 5, 6, 6]
    plan = sp.pack_length_histogram(np.bincount(lengths), 11, tolerance=3)
    stats = PackingStats.from_plan(plan, rows_per_step=2)
    assert (stats.num_bins, stats.tolerance, stats.tolerance_rows) == (4, 3, 2)
    assert (stats.num_tokens, stats.lower_bound, stats.gap) == (22, 2, 2)
    assert (stats.fullness_p50, stats.sum_squared_lengths) == (6 / 11, 4 * 36)
    assert stats.tokens_per_step_mean == 11.0
    assert "  tolerance:   3 (costs 2 bins)\n" in str(stats)
    bins = sp.pack_sequences(lengths, 11, tolerance=3)
    of_bins = PackingStats.from_bins(bins, lengths, 11)
    assert (of_bins.num_tokens, of_bins.sum_squared_lengths) == (22, 122)


def test_the_bound_is_the_best_of_the_lengths_whoever_made_the_packing():
    """4 and 5 fit in bins of 13 twice; the volume alone says 2."""
    stats = PackingStats.from_templates({(5, 5): 1, (5,): 2, (4,): 1}, 13)
    assert (stats.num_bins, stats.lower_bound, stats.gap) == (4, 3, 1)
    assert "  bound:       3 (1 bins over it)\n" in str(stats)
    bins = sp.pack_sequences([4, 5, 5, 5, 5], 13, algorithm="next_fit")
    assert PackingStats.from_bins(bins, [4, 5, 5, 5, 5], 13).lower_bound == 3


def test_the_bound_is_of_true_lengths_where_they_are_known():
    """Planned lengths of a tolerance need three bins, and true ones two."""
    plan = sp.pack_length_histogram({5: 4}, 10, tolerance=3)
    assert (plan.num_bins, plan.tolerance_rows) == (4, 2)
    assert PackingStats.from_plan(plan).lower_bound == 2
    assert PackingStats.from_templates(plan.to_counter(), 10).lower_bound == 4
    unproved = replace(plan, certificate=None)
    assert PackingStats.from_plan(unproved).lower_bound == 2


def test_the_bound_of_a_cap_is_kept():
    plan = sp.pack_length_histogram({1: 9}, 10, max_segments=2)
    assert PackingStats.from_plan(plan).lower_bound == 5


def test_no_bins():
    empty = PackingStats.from_plan(sp.pack_length_histogram({}, 8), rows_per_step=4)
    assert (empty.num_bins, empty.efficiency, empty.fullness_p50) == (0, 1.0, 0.0)
    assert (empty.attention_share, empty.gap, empty.segments_mean) == (1.0, 0, 0.0)
    assert (empty.tokens_per_step_mean, empty.segments_per_step_std) == (0.0, 0.0)
    assert empty == PackingStats.from_bins([], [], 8, rows_per_step=4)
    assert empty == PackingStats.from_templates({}, 8, rows_per_step=4)
    assert "  bins:        0\n" in str(empty)


@pytest.mark.parametrize(
    ("bins", "lengths", "max_seq_len", "part"),
    [
        (sp.pack_sequences([3, 4], 8), [3, 4, 5], 8, "sequence 2 is in 0 bins"),
        (sp.pack_sequences([3, 4], 8), [3, 9], 8, r"lengths\[1\] = 9"),
        (sp.pack_sequences([3, 4], 8), [3, 4], 4, "= 4, but the bins were packed for 8"),
        ([[0, 1], [1]], [3, 4], 8, "sequence 1 is in 2 bins"),
        ([[0, 1]], [5, 4], 8, "bin 0 holds 9 tokens of 8"),
        ([[0, 2]], [5, 4], 8, r"an id is not in \[0, 2\)"),
        ([[0], [], [1]], [5, 4], 8, r"from_bins: bins\[1\] is empty"),
        ([0, 1], [5, 4], 8, "bins are not lists of ids"),
        (3, [5, 4], 8, "bins are not lists of ids"),
        ([[0.5, 1]], [5, 4], 8, r"bins \(ids\) has dtype float64"),
        ([[0, 1]], [5, 0], 8, r"lengths\[1\] = 0"),
        ([[0, 1]], [5, 4], 0, "max_seq_len = 0"),
    ],
)
def test_wrong_bins_are_refused(bins, lengths, max_seq_len, part):
    with pytest.raises(sp.SeqpackError, match=part):
        PackingStats.from_bins(bins, lengths, max_seq_len)


def test_wrong_arguments_are_refused():
    plan = sp.pack_length_histogram({3: 2}, 8)
    with pytest.raises(sp.SeqpackError, match="from_plan: rows_per_step = 0"):
        PackingStats.from_plan(plan, rows_per_step=0)
    with pytest.raises(sp.SeqpackError, match="from_bins: rows_per_step = 0"):
        PackingStats.from_bins([[0]], [3], 8, rows_per_step=0)
    with pytest.raises(sp.SeqpackError, match=r"lengths\[0\] = 9, but max_seq_len is 8"):
        PackingStats.from_templates({(9,): 1}, 8)


def test_a_plan_of_several_capacities_is_refused_but_not_its_columns():
    plan, _ = sp.pack_vectors([[3, 1], [2, 2], [4, 0]], (5, 3))
    with pytest.raises(sp.SeqpackError, match=r"several capacities. Hint: pass plan.column\(0\)"):
        sp.PackingStats.from_plan(plan)
    figures = [sp.PackingStats.from_plan(plan.column(c)) for c in range(2)]
    assert [each.num_tokens for each in figures] == list(plan.num_tokens)
