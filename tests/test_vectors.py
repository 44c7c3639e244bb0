"""Vector packing: a bin holds every column of its items, and equals the slow packer's."""

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seqpack_jax as sp
from seqpack_jax.planning import vector_fit
from seqpack_jax.planning.vector_fit import (
    NO_CAP,
    _Groups,
    falling,
    place_classes,
    weights_of,
)
from seqpack_jax.planning.vectors import (
    VectorBins,
    VectorPlan,
    best_fit_vectors,
    fill_bins,
    pack_vectors,
)

caps = st.none() | st.integers(1, 6)


@st.composite
def vector_packings(draw, max_size=50, max_columns=4):
    """`(lengths [n, k], capacities)`, with zeros, many equal vectors as often as few."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns = draw(st.integers(1, max_columns))
    capacities = tuple(rng.integers(1, 40, columns).tolist())
    share = draw(st.sampled_from([0.2, 0.5, 1.0]))
    pool = rng.integers(0, np.maximum(1, np.array(capacities) * share) + 1, (30, columns))
    pool = np.minimum(pool, capacities).astype(int)
    pool[~pool.any(axis=1), 0] = 1
    classes = draw(st.integers(1, 30))
    size = draw(st.sampled_from([0, 1, 2, *range(3, max_size + 1)]))
    return pool[rng.integers(0, classes, size)], capacities


def fits(held, vector, capacities):
    return all(
        sum(item[c] for item in held) + vector[c] <= limit for c, limit in enumerate(capacities)
    )


def slow_pack(order, capacities, max_segments, choose):
    """Place vectors one by one; `choose` ranks the bins that have room by what they hold."""
    bins = []
    for vector in order:
        some = [
            held
            for held in bins
            if fits(held, vector, capacities) and (not max_segments or len(held) < max_segments)
        ]
        if some:
            min(some, key=choose).append(vector)
        else:
            bins.append([vector])
    return bins


def room_of(held, capacities):
    return [limit - sum(item[c] for item in held) for c, limit in enumerate(capacities)]


def first_fit_decreasing(lengths, capacities, max_segments=None):
    """By the largest share of a capacity, each into the first bin with room."""
    shares = (np.asarray(lengths) / np.array(capacities)).max(axis=1, initial=0)
    order = [tuple(lengths[i]) for i in np.argsort(-shares, kind="stable")]
    return slow_pack(order, capacities, max_segments, lambda _: 0)


@given(packing=vector_packings(), cap=caps)
def test_streaming_packer_keeps_every_item_and_capacity(packing, cap):
    lengths, capacities = packing
    bins = best_fit_vectors(lengths, capacities, max_segments=cap)
    assert sorted(i for held in bins for i in held) == list(range(len(lengths)))
    for held in bins:
        assert held
        assert fits([], lengths[held].sum(axis=0), capacities)
        assert cap is None or len(held) <= cap
    assert bins == best_fit_vectors(lengths.tolist(), list(capacities), max_segments=cap)


@given(packing=vector_packings(), cap=caps, at=st.integers(0, 12))
def test_too_few_bins_give_none(packing, cap, at):
    lengths, capacities = packing
    bins = best_fit_vectors(lengths, capacities, max_segments=cap)
    limited = best_fit_vectors(lengths, capacities, max_segments=cap, max_bins=at)
    assert limited == (bins if len(bins) <= at else None)


@given(packing=vector_packings(), cap=caps)
def test_items_are_placed_as_the_slow_packer_does(packing, cap):
    """Largest sum of shares first, into the least room, weighed by demand; then the oldest bin."""
    lengths, capacities = packing
    shares = (lengths / np.array(capacities, float)).tolist()
    order = sorted(
        range(len(lengths)), key=lambda i: (-sum(shares[i]), -max(shares[i]), *(-lengths[i]), i)
    )
    load = lengths.sum(axis=0) / np.array(capacities)
    weights = load / max(load.sum(), 1.0) / np.array(capacities)

    def least_room(held):
        return sum(float(r * w) for r, w in zip(room_of(held, capacities), weights, strict=True))

    want = slow_pack([tuple(lengths[i].tolist()) for i in order], capacities, cap, least_room)
    bins = best_fit_vectors(lengths, capacities, max_segments=cap)
    assert [[tuple(lengths[i].tolist()) for i in held] for held in bins] == want


@given(packing=vector_packings(), cap=caps)
def test_classes_are_placed_as_their_items_would_be(packing, cap):
    """Whole runs of a class at once give the fills that the items give one by one.

    Bins of equal room are told apart by nothing else, so which of them gets an item is open.
    """
    lengths, capacities = packing
    vectors, counts = np.unique(lengths, axis=0, return_counts=True)
    order = falling(vectors, capacities, "sum")
    vectors, counts = vectors[order], counts[order]
    weights = weights_of(lengths.sum(axis=0), capacities)

    def least_room(held):
        room = room_of(held, capacities)
        score = 0.0
        for each, weight in zip(room, weights.tolist(), strict=True):
            score += each * weight
        return score, *room, -len(held)

    items = [tuple(vectors[i].tolist()) for i in np.repeat(np.arange(len(counts)), counts)]
    want = Counter(
        (len(held), *room_of(held, capacities))
        for held in slow_pack(items, capacities, cap, least_room)
    )
    for few in (0, 3, 10**9):  # items that are placed one group at a time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vector_fit, "_FEW", few)
            templates = place_classes(vectors, counts, capacities, weights, cap or NO_CAP)
        got = Counter()
        for held, times in counter_of(templates, vectors).items():
            got[(len(held), *room_of(held, capacities))] += times
        assert got == want


def counter_of(templates, vectors):
    """`{template as vectors: bins}`, of classes that are numbered from the last one up."""
    counter = Counter()
    for i, times in enumerate(templates.multiplicity.tolist()):
        numbers = templates.lengths[templates.offsets[i] : templates.offsets[i + 1]]
        counter[tuple(tuple(vectors[-number].tolist()) for number in numbers)] += times
    return counter


@given(packing=vector_packings(), cap=caps)
def test_bins_are_filled_one_by_one_with_what_is_most_like_the_room(packing, cap):
    lengths, capacities = packing
    vectors, counts = np.unique(lengths, axis=0, return_counts=True)
    order = falling(vectors, capacities, "sum")
    vectors, counts = vectors[order], counts[order]
    templates = fill_bins(vectors, counts, capacities, cap or NO_CAP)
    got = counter_of(templates, vectors)
    items = Counter()
    for template, times in got.items():
        assert fits(template[1:], template[0], capacities)
        assert cap is None or len(template) <= cap
        items.update({vector: times * n for vector, n in Counter(template).items()})
    assert items == Counter(map(tuple, lengths.tolist()))
    left = Counter(map(tuple, np.repeat(vectors, counts, axis=0).tolist()))
    for i, times in enumerate(templates.multiplicity.tolist()):
        held = most_like_the_room(left, vectors, capacities, cap)
        numbers = templates.lengths[templates.offsets[i] : templates.offsets[i + 1]]
        assert sorted(held) == sorted(tuple(vectors[-number].tolist()) for number in numbers)
        assert times == min(left[vector] // n for vector, n in Counter(held).items())
        left -= Counter({vector: times * n for vector, n in Counter(held).items()})


def most_like_the_room(left, vectors, capacities, cap):
    """Fill one bin from `left`: the largest product with the room first, weighed by demand."""
    left = left.copy()
    items = np.array(list(left.elements())).reshape(-1, len(capacities))
    load = items.sum(axis=0) / np.array(capacities)
    weights = load / max(load.sum(), 1.0) / np.array(capacities) / np.array(capacities)
    held = []
    while len(held) < (cap or NO_CAP):
        room = room_of(held, capacities)
        ranks = {}
        for place, vector in enumerate(map(tuple, vectors.tolist())):
            if left[vector] and fits(held, vector, capacities):
                product = 0.0
                for length, each, weight in zip(vector, room, weights.tolist(), strict=True):
                    product += length * (each * weight)
                ranks[vector] = (-product, place)
        if not ranks:
            break
        held.append(min(ranks, key=ranks.get))
        left[held[-1]] -= 1
    return held


@given(packing=vector_packings(), cap=caps)
def test_a_plan_packs_every_item_once(packing, cap):
    lengths, capacities = packing
    plan, pools = pack_vectors(lengths, capacities, max_segments=cap)
    plan.check(lengths)
    assert plan.num_sequences == pools.num_sequences == len(lengths)
    assert sorted(pools.ids.tolist()) == list(range(len(lengths)))
    for number in range(len(plan.vectors)):
        ids = pools[number]
        assert (lengths[ids] == plan.vectors[number]).all()
        assert ids.tolist() == sorted(ids)
        assert len(ids) == plan.counts[number]
    assert plan.num_bins == int(plan.multiplicity.sum()) == plan.certificate.bins
    assert cap is None or plan.max_segments <= cap
    bound = max([-(-int(t) // c) for t, c in zip(lengths.sum(axis=0), capacities, strict=True)])
    bound = max(bound, -(-len(lengths) // cap)) if cap else bound
    assert plan.certificate.lower_bound == bound <= plan.num_bins
    assert plan.num_tokens == tuple(lengths.sum(axis=0).tolist())
    assert plan.num_bins <= len(best_fit_vectors(lengths, capacities, max_segments=cap))


@given(packing=vector_packings(max_columns=1), cap=caps)
def test_one_column_is_as_dense_as_best_fit(packing, cap):
    lengths, (capacity,) = packing
    plan, _ = pack_vectors(lengths, (capacity,), max_segments=cap)
    counts = np.bincount(lengths[:, 0], minlength=1)
    want = sp.pack_length_histogram(counts, capacity, max_segments=cap)
    assert plan.num_bins == want.num_bins


def mixes(size, seed):
    rng = np.random.default_rng(seed)
    inputs = np.clip(np.exp(rng.normal(np.log(300), 1, size)), 1, 2048).astype(int)
    targets = np.clip(np.exp(rng.normal(np.log(100), 1, size)), 0, 700).astype(int)
    follows = np.clip(inputs * np.exp(rng.normal(-1.2, 0.4, size)), 1, 512).astype(int)
    total = rng.integers(10, 600, size)
    return {
        "independent": (np.stack([inputs, targets], 1), (2048, 700)),
        "roomy targets": (np.stack([inputs, targets], 1), (2048, 4096)),
        "correlated": (np.stack([inputs, follows], 1), (2048, 512)),
        "opposed": (np.stack([total, 610 - total], 1), (1024, 1024)),
        "three": (rng.integers(1, 200, (size, 3)), (1024, 1024, 512)),
        "few classes": (rng.integers(1, 6, (size, 2)) * 97, (1024, 1500)),
    }


@pytest.mark.parametrize("mix", list(mixes(1, 0)))
@pytest.mark.parametrize("seed", [0, 1])
def test_never_more_bins_than_first_fit_decreasing(mix, seed):
    lengths, capacities = mixes(400, seed)[mix]
    slow = len(first_fit_decreasing(lengths.tolist(), capacities))
    plan, _ = pack_vectors(lengths, capacities)
    assert plan.certificate.lower_bound <= plan.num_bins <= slow
    assert plan.num_bins <= len(best_fit_vectors(lengths, capacities)) <= slow + 1


@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("few", [0, 3, 10**9])
def test_groups_grow_and_close_and_are_sorted(monkeypatch, few, cap):
    """More groups than fit their first arrays, many full before the end; as the slow packer."""
    monkeypatch.setattr(vector_fit, "_FEW", few)
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 60, (900, 2)) * (3, 2)
    plan, _ = pack_vectors(lengths, (300, 150), max_segments=cap)
    plan.check(lengths)
    vectors, counts = np.unique(lengths, axis=0, return_counts=True)
    order = falling(vectors, (300, 150), "sum")
    weights = weights_of(lengths.sum(axis=0), (300, 150))
    classes = vectors[order], counts[order], (300, 150), weights
    bins = int(place_classes(*classes, cap or NO_CAP).multiplicity.sum())
    # Golden: what looking through all groups for each item gives.
    assert bins == {None: 356, 3: 373}[cap]


def test_a_search_for_one_bin_does_not_look_at_all_of_them(monkeypatch):
    """Groups are sorted by score: a few hundred are looked at, and not thousands, per item."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 300, (6000, 2))  # two in a bin
    looked = []
    fits = _Groups._fits
    monkeypatch.setattr(
        _Groups,
        "_fits",
        lambda self, vector, start, stop: (
            looked.append(stop - start) or fits(self, vector, start, stop)
        ),
    )
    vectors, counts = np.unique(lengths, axis=0, return_counts=True)
    weights = weights_of(lengths.sum(axis=0), (500, 500))
    order = falling(vectors, (500, 500), "sum")
    place_classes(vectors[order], counts[order], (500, 500), weights, NO_CAP)
    assert sum(looked) < 400 * len(vectors)  # 1600 if it looked at all


def test_a_plan_does_not_depend_on_the_order_of_items():
    lengths, capacities = mixes(300, 5)["few classes"]
    plan, pools = pack_vectors(lengths, capacities)
    again, others = pack_vectors(lengths[::-1], capacities)
    assert plan.digest() == again.digest()
    assert (pools.starts == others.starts).all()
    # Golden: a saved run must find its plan again in every later version.
    assert plan.digest() == "4cee08280ccdec89ca6c61790e9681df"


def test_digests_tell_plans_apart():
    plan, _ = pack_vectors([[5, 1], [3, 4], [5, 4], [5, 1]], (10, 6))
    others = [
        pack_vectors([[5, 1], [3, 4], [5, 4], [5, 1]], (10, 7))[0],
        pack_vectors([[5, 1], [3, 4], [5, 3], [5, 1]], (10, 6))[0],
        pack_vectors([[5, 1], [3, 4], [5, 4], [5, 1]], (10, 6), max_segments=1)[0],
        pack_vectors([[1, 5], [4, 3], [4, 5], [1, 5]], (6, 10))[0],
    ]
    assert len({each.digest() for each in (plan, *others)}) == 5
    assert pickle.loads(pickle.dumps(plan)).digest() == plan.digest()


def test_a_million_of_few_classes_are_one_template():
    lengths = np.tile([[512, 3], [256, 0]], (200_000, 1))
    plan, pools = pack_vectors(lengths, (1024, 8))
    assert plan.num_bins == 150_000
    assert plan.num_templates <= 3
    assert plan.efficiency == (1.0, 0.5)
    assert len(pickle.dumps(plan)) < 2000
    assert pools[2][:3].tolist() == [0, 2, 4]


def test_figures_of_each_column():
    plan, _ = pack_vectors([[5, 1], [3, 4], [5, 4], [5, 1], [2, 0]], (10, 6))
    assert plan.max_seq_len == (10, 6)
    assert plan.tolerance == 1
    assert plan.efficiency == (20 / 20, 10 / 12)
    for column, (tokens, capacity) in enumerate([(20, 10), (10, 6)]):
        stats = sp.PackingStats.from_plan(plan.column(column))
        assert (stats.num_bins, stats.num_sequences) == (plan.num_bins, 5)
        assert (stats.num_tokens, stats.max_seq_len) == (tokens, capacity)
        assert stats.efficiency == plan.efficiency[column]
    empty, pools = pack_vectors(np.zeros((0, 2), int), (4, 4))
    assert (empty.num_bins, empty.efficiency, empty.num_tokens) == (0, (1.0, 1.0), (0, 0))
    assert (empty.max_segments, pools.num_sequences, empty.certificate.lower_bound) == (0, 0, 0)
    empty.check([])


@pytest.mark.parametrize("pack", [best_fit_vectors, pack_vectors])
@pytest.mark.parametrize(
    ("lengths", "capacities", "part"),
    [
        ([[3, 4], [2, 9]], (5, 8), r"lengths\[1, 1\] = 9, but capacities\[1\] is 8 \(1 of 2 items"),
        ([[3, 4], [-2, 9]], (5, 8), r"lengths\[1, 0\] = -2, but a length is at least 0"),
        ([[3, 4], [0, 0]], (5, 8), r"lengths\[1\] is 0 in every column \(1 of 2 items\)"),
        ([[3, 4, 1]], (5, 8), r"lengths has shape \(1, 3\), and there are 2 capacities"),
        ([3, 4], (5, 8), r"lengths has shape \(2,\), and there are 2"),
        ([[3, 4], [3]], (5, 8), "lengths is ragged"),
        ([[3, 4.5]], (5, 8), "lengths has dtype float64"),
        ([[3, 4]], (5, 0), r"capacities\[1\] = 0, but it must be in"),
        ([[3, 4]], (5, 2.5), r"capacities\[1\] = 2.5 is not an integer"),
        ([[3, 4]], (), r"lengths has shape \(1, 2\), and there are 0"),
        ([[3, 4]], 8, "capacities = 8. Hint: pass one capacity per column"),
        ([[3, 4]], np.array(8), "capacities = array.8.. Hint: pass one capacity per column"),
        ([[3, 4]], {"a": 5, "b": 8}, "capacities = {'a': 5, 'b': 8}. Hint: pass one capacity per"),
    ],
)
def test_bad_vectors_are_refused(pack, lengths, capacities, part):
    with pytest.raises(sp.SeqpackError, match=f"^{pack.__name__}: .*{part}"):
        pack(lengths, capacities)


def test_bad_limits_are_refused():
    with pytest.raises(sp.SeqpackError, match="pack_vectors: max_segments = 0"):
        pack_vectors([[1, 1]], (2, 2), max_segments=0)
    with pytest.raises(sp.SeqpackError, match="best_fit_vectors: max_bins = -1"):
        best_fit_vectors([[1, 1]], (2, 2), max_bins=-1)


def test_columns_of_zeros_and_the_widest_integers():
    lengths = np.array([[3, 0], [4, 0], [2, 0]])
    assert best_fit_vectors(lengths, (5, 1)) == [[1], [0, 2]]
    assert pack_vectors(lengths, (5, 1))[0].num_bins == 2
    big = 2**31 - 1
    plan, _ = pack_vectors(np.array([[big, 1], [1, big]], np.uint64), (big, big))
    assert plan.num_bins == 2
    assert plan.vectors.max() == big


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"classes": np.array([9, 2, 1])}, r"classes\[0\] = 9 of 3"),
        ({"classes": np.array([3, 3, 3])}, "template 0 holds 8 tokens of 6 in column 1"),
        ({"multiplicity": np.array([1, 0])}, r"multiplicity\[1\] = 0, below 1"),
        ({"offsets": np.array([0, 2, 2])}, "offsets do not cut"),
        ({"max_seq_len": (4, 6)}, r"lengths\[\d, 0\] = 5, but max_seq_len\[0\] is 4"),
    ],
)
def test_damage_is_found(change, part):
    lengths = [[5, 1], [3, 4], [5, 4]]
    plan, _ = pack_vectors(lengths, (10, 6))
    assert plan.offsets.tolist() == [0, 2, 3]
    with pytest.raises(sp.SeqpackError, match=f"VectorPlan.check: .*{part}"):
        dataclasses.replace(plan, **change).check(lengths)


def test_a_plan_of_other_items_is_found():
    plan, _ = pack_vectors([[5, 1], [3, 4], [5, 4]], (10, 6))
    with pytest.raises(sp.SeqpackError, match="the plan has 3 slots for 2 items"):
        plan.check([[5, 1], [3, 4]])
    with pytest.raises(sp.SeqpackError, match=r"other slots than item \d of lengths \[5, 2\]"):
        plan.check([[5, 2], [3, 4], [5, 4]])


@given(packing=vector_packings(), seed=st.none() | st.integers(0, 9), number=st.integers(0, 3))
def test_an_epoch_of_vectors(packing, seed, number):
    lengths, capacities = packing
    plan, pools = pack_vectors(lengths, capacities)
    for zones in (1, 3):
        epoch = sp.materialize_epoch(plan, pools, seed, epoch=number, zones=zones)
        bins, planned = epoch.bins_and_lengths(np.arange(len(epoch)))
        bins.check(lengths)
        assert isinstance(bins, VectorBins)
        assert bins.max_seq_len == capacities
        assert (planned.dtype, planned.shape) == (np.int32, (len(lengths), len(capacities)))
        assert (planned == lengths[bins.ids]).all()
        some = list(range(0, len(epoch), 2))
        assert epoch.bins(some).tolist() == [bins[i].tolist() for i in some]


def test_epochs_of_vectors_pair_anew():
    lengths, capacities = mixes(600, 2)["few classes"]
    plan, pools = pack_vectors(lengths, capacities)
    first, second, again = (
        {tuple(sorted(ids)) for ids in sp.materialize_epoch(plan, pools, 1, epoch=e)[:].tolist()}
        for e in (0, 1, 0)
    )
    assert first == again
    assert len(first & second) < 0.05 * len(first)
    other = sp.materialize_epoch(plan, pools, 1, shuffle=False)
    sizes = np.repeat(plan.sizes, plan.multiplicity).tolist()
    assert [len(ids) for ids in other] == sizes


def test_pools_of_other_vectors_are_refused():
    plan, _ = pack_vectors([[5, 1], [3, 4], [5, 4]], (10, 6))
    _, pools = pack_vectors([[5, 1], [5, 1]], (10, 6))
    with pytest.raises(sp.SeqpackError, match="hold 2 sequences of class 1, the plan has 1 slots"):
        sp.materialize_epoch(plan, pools)


def test_bins_of_vectors_are_checked():
    lengths = [[5, 1], [3, 4], [5, 4]]
    bins = sp.pack_sequences(lengths, (10, 6))
    for change, part in [
        ({"ids": np.array([0, 1, 0])}, "item 0 is in 2 bins"),
        ({"ids": np.array([0, 1, 7])}, r"an id is not in \[0, 3\)"),
        ({"offsets": np.array([0, 3])}, "bin 0 holds 13 tokens of 10 in column 0"),
        ({"offsets": np.array([0, 1])}, "offsets do not cut"),
    ]:
        with pytest.raises(sp.SeqpackError, match=f"VectorBins.check: {part}"):
            dataclasses.replace(bins, **change).check(lengths)
    assert isinstance(bins[1:], VectorBins)


def test_plans_are_frozen():
    plan, _ = pack_vectors([[5, 1]], (10, 6))
    assert isinstance(plan, VectorPlan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.classes = plan.classes
