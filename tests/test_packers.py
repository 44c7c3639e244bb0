"""Sequences -> bins: every sequence in one bin, equal to the plan, the same every time."""

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import algorithms, caps, over_length_packings, packings

import seqpack_jax as sp
from seqpack_jax.planning.vectors import pack_vectors

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


@given(packing=over_length_packings(), tolerance=st.integers(1, 5))
def test_seed_names_take_a_policy(packing, tolerance):
    lengths, capacity, policy = packing
    for pack, algorithm in [
        (sp.greedy_pack_sequences, "first_fit_decreasing"),
        (sp.heap_pack_sequences, "worst_fit_decreasing"),
    ]:
        options = {"tolerance": tolerance, "seed": 3, "over_length": policy}
        bins = pack(lengths, capacity, **options)
        want = sp.pack_sequences(lengths, capacity, algorithm=algorithm, **options)
        assert bins.tolist() == want.tolist()
        assert (bins.over_length, bins.report, bins.key) == (policy, want.report, want.key)
        bins.check(lengths)


@pytest.mark.parametrize(
    "pack", [sp.pack_sequences, sp.greedy_pack_sequences, sp.heap_pack_sequences]
)
def test_errors_name_the_function_that_was_called(pack):
    for lengths, options, part in [
        ([9], {}, r"lengths\[0\] = 9, but max_seq_len is 8"),
        ([3], {"tolerance": 0}, "tolerance = 0"),
        ([3], {"seed": "x"}, "seed = 'x'"),
        ([3], {"over_length": "cut"}, "over_length = 'cut'"),
    ]:
        with pytest.raises(sp.SeqpackError, match=f"^{pack.__name__}: {part}"):
            pack(lengths, 8, **options)
    with pytest.raises(sp.SeqpackError, match=f"^{pack.__name__}: max_seq_len = 0"):
        pack([3], 0)


@given(packing=packings())
def test_next_fit_keeps_input_order(packing):
    lengths, capacity = packing
    bins = sp.pack_sequences(lengths, capacity, algorithm="next_fit")
    assert bins.tolist() == reference.next_fit(lengths, capacity)


def triplets(seed=0):
    """300 lengths that fill 100 bins of 300 tokens, and that no greedy packer puts there."""
    rng = np.random.default_rng(seed)
    first = rng.integers(76, 149, 100)
    second = rng.integers(76, np.minimum(150, 300 - first - 75))
    return rng.permutation(np.concatenate([first, second, 300 - first - second]))


@pytest.mark.parametrize("seed", [None, 5])
def test_sequences_in_the_fewest_bins(seed, capfd):
    lengths = triplets()
    bins = sp.pack_sequences(lengths, 300, algorithm="optimal", seed=seed)
    bins.check(lengths)
    assert len(bins) == 100 < len(sp.pack_sequences(lengths, 300))
    assert all(lengths[ids].sum() == 300 for ids in bins)
    assert bins.tolist() == sp.pack_sequences(lengths, 300, algorithm="optimal", seed=seed).tolist()
    assert capfd.readouterr() == ("", "")
    capped = sp.pack_sequences(lengths, 300, algorithm="optimal", max_segments=2, seed=seed)
    capped.check(lengths)
    assert len(capped) == 150
    assert max(map(len, capped)) == 2
    rounded = sp.pack_sequences(lengths, 300, algorithm="optimal", tolerance=5, seed=seed)
    rounded.check(lengths)
    assert len(rounded) >= 100


@pytest.mark.parametrize("action", ["drop", "truncate", "truncate_left", "crop", "split"])
def test_the_fewest_bins_under_every_policy(action):
    lengths = np.append(triplets(), [700, 300, 420])
    counts, _ = sp.length_histogram_from_lengths(lengths, 300, over_length=action)
    plan = sp.pack_length_histogram(counts, 300, algorithm="optimal")
    bins = sp.pack_sequences(lengths, 300, algorithm="optimal", over_length=action)
    bins.check(lengths)
    assert len(bins) == plan.num_bins
    volume = {"drop": 101, "split": 105}.get(action, 103)  # 300, 300 + 100, 300, 300 + 120
    assert plan.certificate == (volume, volume, "volume", True)
    assert bins.report.sequences == 2
    raw = np.bincount(lengths)
    again = sp.pack_length_histogram(raw, 300, algorithm="optimal", over_length=action)
    assert again.digest() == plan.digest()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"budget": 0}, "budget = 0, but it must be above 0"),
        ({"budget": -2.5}, "budget = -2.5, but it must be above 0"),
        ({"budget": float("nan")}, "budget = nan, but it must be above 0"),
        ({"budget": "8"}, "budget = '8' is not a number"),
        ({"budget": 8, "algorithm": "best_fit_decreasing"}, "budget = 8 with algorithm = 'best_"),
        ({"budget": 8, "algorithm": "worst_fit_decreasing"}, "budget = 8 with algorithm = 'wor"),
        ({"algorithm": "optimum"}, "algorithm = 'optimum' is not known"),
        ({"algorithm": "next_fit"}, "algorithm = 'next_fit' is not known"),
    ],
)
def test_bad_orders_are_refused(options, part):
    with pytest.raises(sp.SeqpackError, match=f"^pack_length_histogram: {part}"):
        sp.pack_length_histogram({3: 4}, 8, **{"algorithm": "optimal"} | options)


def test_a_budget_and_progress_reach_the_search(capfd):
    counts = np.bincount(triplets())
    options = {"algorithm": "optimal", "progress": True}
    assert sp.pack_length_histogram(counts, 300, budget=1e-9, **options).num_bins > 100
    assert sp.pack_length_histogram(counts, 300, budget=2, **options).num_bins == 100
    assert "100 rows, bound 100" in capfd.readouterr().err


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


@pytest.mark.parametrize("algorithm", ["best_fit_decreasing", "optimal", "next_fit"])
def test_empty_and_single(algorithm):
    assert sp.pack_sequences([], 8, algorithm=algorithm).tolist() == []
    assert sp.pack_sequences([8], 8, algorithm=algorithm).tolist() == [[0]]


def test_tolerance_counts_true_tokens():
    plan = sp.pack_length_histogram({3: 2, 4: 2}, 8, tolerance=4)
    assert plan.num_tokens == 14
    assert dict(plan.to_counter()) == {(4, 4): 2}
    assert plan.efficiency == 14 / 16
    plan.check({3: 2, 4: 2})


@given(packing=packings(), algorithm=algorithms, cap=caps, tolerance=st.integers(2, 9))
def test_a_tolerance_says_what_it_costs(packing, algorithm, cap, tolerance):
    lengths, capacity = packing
    counts, _ = sp.length_histogram_from_lengths(lengths)
    options = {"algorithm": algorithm, "max_segments": cap}
    exact = sp.pack_length_histogram(counts, capacity, **options)
    plan = sp.pack_length_histogram(counts, capacity, tolerance=tolerance, **options)
    assert exact.tolerance_rows == 0
    assert plan.tolerance_rows == plan.num_bins - exact.num_bins
    assert plan.certificate.lower_bound == exact.certificate.lower_bound
    plan.check(counts)


@given(packing=over_length_packings(), algorithm=algorithms, tolerance=st.integers(1, 5))
def test_a_histogram_is_packed_under_every_policy(packing, algorithm, tolerance):
    lengths, capacity, policy = packing
    options = {"algorithm": algorithm, "tolerance": tolerance}
    raw = np.bincount(lengths, minlength=1)
    plan = sp.pack_length_histogram(raw, capacity, over_length=policy, **options)
    counts, pools = sp.length_histogram_from_lengths(lengths, capacity, over_length=policy)
    assert plan.digest() == sp.pack_length_histogram(counts, capacity, **options).digest()
    named = {length: int(count) for length, count in enumerate(raw) if count}
    again = sp.pack_length_histogram(named, capacity, over_length=policy, **options)
    assert again.digest() == plan.digest()
    assert plan.num_tokens == (
        sum(lengths) - pools.report.dropped_tokens + pools.report.repeated_tokens
    )
    bins = sp.pack_sequences(lengths, capacity, over_length=policy, **options)
    assert len(bins) == plan.num_bins
    assert bins.report == pools.report
    assert bins.over_length == policy
    if pools.pieces is not None:
        assert bins.pieces.table.tolist() == pools.pieces.table.tolist()


@given(packing=over_length_packings())
def test_next_fit_puts_pieces_where_their_sequence_was(packing):
    lengths, capacity, policy = packing
    bins = sp.pack_sequences(lengths, capacity, algorithm="next_fit", over_length=policy)
    packed = reference.over_length_ids(lengths, capacity, policy)
    order = sorted(packed, key=lambda i: packed[i])
    own = [packed[i][2] - packed[i][1] for i in order]
    assert bins.tolist() == [[order[k] for k in held] for held in reference.next_fit(own, capacity)]


def test_pieces_of_too_many_tokens_are_refused():
    counts = {1: 1, 10**6: 2**41}
    policy = sp.planning.over_length.OverLength("split", overlap=99)
    with pytest.raises(sp.SeqpackError, match=r"pack_length_histogram: .* beyond the limit"):
        sp.pack_length_histogram(counts, 100, over_length=policy)


@given(packing=packings(), tolerance=st.integers(1, 9), seed=st.integers(0, 5))
def test_sorting_by_length(packing, tolerance, seed):
    lengths, _ = packing
    rounded = [-(-length // tolerance) for length in lengths]
    order = sp.planning.packers.sort_indices_by_length(lengths, tolerance)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(len(lengths)), key=lambda i: -rounded[i])
    shuffled = sp.planning.packers.sort_indices_by_length(lengths, tolerance, seed)
    assert sorted(shuffled.tolist()) == list(range(len(lengths)))
    assert [rounded[i] for i in shuffled] == sorted(rounded, reverse=True)


def test_sorting_shuffles_as_packing_does():
    lengths = np.repeat([8, 7, 3], 40)
    sort = sp.planning.packers.sort_indices_by_length
    for tolerance in (1, 4):
        one, two = (sort(lengths, tolerance, seed).tolist() for seed in (1, 2))
        assert one != two
        assert one == sort(lengths.astype(np.uint8), tolerance, 1).tolist()
        bins = sp.pack_sequences(lengths, 8, tolerance=tolerance, seed=1, max_segments=1)
        assert bins.ids.tolist() == one
    for options, part in [((0,), "tolerance = 0"), ((1, "x"), "seed = 'x'")]:
        with pytest.raises(sp.SeqpackError, match=f"sort_indices_by_length: {part}"):
            sort(lengths, *options)
    assert sort([]).tolist() == []


@st.composite
def items(draw):
    """`(lengths [n, 2], capacities)`, of few classes and many."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pool = rng.integers(0, [20, 9], (draw(st.integers(1, 20)), 2))
    pool[~pool.any(axis=1)] = 1
    return rng.choice(pool, draw(st.integers(0, 50))), (20, 8)


@given(packing=items(), cap=caps, seed=st.none() | st.integers(0, 5))
def test_items_of_several_columns(packing, cap, seed):
    lengths, capacities = packing
    bins = sp.pack_sequences(lengths, capacities, max_segments=cap, seed=seed)
    bins.check(lengths)
    plan, pools = pack_vectors(lengths, capacities, max_segments=cap)
    vectors = plan.vectors[plan.classes]
    assert len(bins) == plan.num_bins
    templates = np.repeat(np.arange(plan.num_templates), plan.multiplicity)
    for ids, template in zip(bins, templates, strict=True):
        want = vectors[plan.offsets[template] : plan.offsets[template + 1]]
        assert lengths[ids].tolist() == want.tolist()
    if seed is None:
        assert bins.key is None
        assert bins.tolist() == sp.materialize_epoch(plan, pools)[:].tolist()


def test_a_seed_shuffles_items_of_one_class():
    lengths = np.repeat([[4, 1], [3, 2]], 50, axis=0)
    plain, one, two = (sp.pack_sequences(lengths, (4, 2), seed=s) for s in (None, 1, 2))
    assert len({bins.ids.tobytes() for bins in (plain, one, two)}) == 3
    assert plain.ids.tolist() in ([*range(100)], [*range(50, 100), *range(50)])
    assert sorted(one.ids[:50].tolist()) == sorted(plain.ids[:50].tolist())
    assert one.key == sp.pack_sequences([1], 4, seed=1).key


@pytest.mark.parametrize(
    ("lengths", "limits", "options", "part"),
    [
        ([[3, 9]], (4, 8), {}, r"lengths\[0, 1\] = 9, but max_seq_len\[1\] is 8"),
        ([[3, 0], [0, 0]], (4, 8), {}, r"lengths\[1\] is 0 in every column"),
        ([[3, 1]], (4, 8), {"tolerance": 2}, "tolerance = 2 with several capacities"),
        ([[3, 1]], (4, 8), {"over_length": "drop"}, "over_length = 'drop' with several"),
        ([[3, 1]], (4, 8), {"algorithm": "next_fit"}, "algorithm = 'next_fit' with several"),
        ([[3, 1]], (4, 8), {"algorithm": "optimal"}, "algorithm = 'optimal' with several"),
        ([[3, 1]], (4, 8), {"seed": 0.5}, "seed = 0.5 is not an integer"),
        ([[3, 1]], (4, 8), {"max_segments": 0}, "max_segments = 0"),
        ([3, 1], (4, 8), {}, r"lengths has shape \(2,\), and there are 2 capacities"),
        ([[3, 1]], 8, {}, r"lengths has shape \(1, 2\)"),
        ([3, 1], "8", {}, r"max_seq_len = '8' is not an integer"),
        ([3, 1], np.array(8.5), {}, r"max_seq_len = array\(8.5\) is not an integer"),
        ([[3, 1]], {"a": 4, "b": 8}, {}, "max_seq_len = {'a': 4, 'b': 8} is not an integer"),
    ],
)
def test_bad_items_are_refused(lengths, limits, options, part):
    with pytest.raises(sp.SeqpackError, match=f"^pack_sequences: {part}"):
        sp.pack_sequences(lengths, limits, **options)
