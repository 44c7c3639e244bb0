"""Zones: every id once, each zone from one stretch of every pool, read anywhere."""

import dataclasses
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import packings

import seqpack_jax as sp
from seqpack_jax.feeding import zones as zones_module
from seqpack_jax.feeding.zones import MAX_ZONES, Zones
from seqpack_jax.planning.counts import coarsen_lengths
from seqpack_jax.planning.over_length import OverLength

seeds = st.none() | st.integers(-(10**20), 10**20)
zone_counts = st.integers(1, 12) | st.sampled_from([60, 1000])


def planned(lengths, capacity, **options):
    counts, pools = sp.length_histogram_from_lengths(lengths)
    return sp.pack_length_histogram(counts, capacity, **options), pools


def lognormal(size, seed=0, longest=2048):
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(300), 1, size)), 1, longest).astype(int)


def zones_of(epoch):
    """The indices of each zone's bins in the epoch, by the number of the zone."""
    zone, _, _ = epoch.zones.place(np.arange(len(epoch)), epoch.key, shuffle=epoch.shuffle)
    return {int(z): np.flatnonzero(zone == z) for z in np.unique(zone)}, zone


@given(
    packing=packings(),
    zones=zone_counts,
    tolerance=st.integers(1, 5),
    seed=seeds,
    number=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_every_id_once_in_any_number_of_zones(packing, zones, tolerance, seed, number, shuffle):
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity, tolerance=tolerance)
    epoch = sp.materialize_epoch(plan, pools, seed, epoch=number, shuffle=shuffle, zones=zones)
    assert len(epoch) == plan.num_bins
    epoch[:].check(lengths)
    assert epoch.zones is None or epoch.zones.count == min(zones, plan.num_bins)


@given(
    packing=packings(),
    zones=zone_counts,
    tolerance=st.integers(1, 5),
    seed=seeds,
    data=st.data(),
)
def test_any_bin_can_be_read_alone(packing, zones, tolerance, seed, data):
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity, tolerance=tolerance)
    epoch = sp.materialize_epoch(plan, pools, seed, zones=zones)
    bins = epoch[:].tolist()
    indices = data.draw(st.lists(st.integers(0, len(epoch) - 1), max_size=9)) if bins else []
    again = pickle.loads(pickle.dumps(epoch))
    assert again.bins(indices).tolist() == [bins[i] for i in indices]
    assert [epoch[i].tolist() for i in indices] == [bins[i] for i in indices]
    assert [ids.tolist() for ids in epoch] == bins
    drawn, length = epoch.bins_and_lengths(indices)
    own = [lengths[i] for i in drawn.ids]
    assert length.tolist() == coarsen_lengths(own, tolerance, capacity).tolist()


@given(packing=packings(), tolerance=st.integers(1, 5), seed=seeds, shuffle=st.booleans())
def test_one_zone_is_the_epoch_without_zones(packing, tolerance, seed, shuffle):
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity, tolerance=tolerance)
    plain = sp.materialize_epoch(plan, pools, seed, shuffle=shuffle)
    one = sp.materialize_epoch(plan, pools, seed, shuffle=shuffle, zones=1)
    assert one.zones is None
    assert one[:].tolist() == plain[:].tolist()


@given(
    packing=packings(max_size=200),
    zones=st.integers(2, 9),
    tolerance=st.integers(1, 5),
    seed=seeds,
    shuffle=st.booleans(),
)
def test_each_zone_draws_from_one_stretch_of_every_pool(packing, zones, tolerance, seed, shuffle):
    """Contiguous without a seed; with one, going around the end of the pool.

    That is so of each true length, also where a tolerance plans several as one.
    """
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity, tolerance=tolerance)
    epoch = sp.materialize_epoch(plan, pools, seed, shuffle=shuffle, zones=zones)
    if epoch.zones is None:
        return
    own = np.array(lengths)
    around = 0
    for length in np.flatnonzero(pools.counts):
        pool = pools[int(length)].tolist()
        rank_of = {id: rank for rank, id in enumerate(pool)}
        for here in zones_of(epoch)[0].values():
            ids = epoch.bins(here).ids
            ranks = sorted(rank_of[id] for id in ids[own[ids] == length].tolist())
            gaps = np.diff([*ranks, ranks[0] + len(pool)]) if ranks else []
            assert np.count_nonzero(np.array(gaps) > 1) <= 1
            cut = bool(ranks) and ranks[-1] - ranks[0] >= len(ranks)
            around += cut
            assert not (cut and seed is None)
    assert around <= np.count_nonzero(pools.counts)


def test_bins_of_a_zone_come_one_after_another():
    """A batch is of one zone, or of two where it crosses a border."""
    plan, pools = planned(lognormal(5000), 2048)
    for options in ({"seed": None}, {"seed": 4, "shuffle": False}, {"seed": 4}):
        epoch = sp.materialize_epoch(plan, pools, zones=8, **options)
        own, zone = zones_of(epoch)
        runs = zone[np.flatnonzero(np.diff(zone, prepend=-1))].tolist()
        assert sorted(runs) == list(range(8))
        in_order = options != {"seed": 4}
        assert (runs == list(range(8))) == in_order
        sizes = np.array([len(here) for here in own.values()])
        assert np.abs(sizes / sizes.mean() - 1).max() < 0.1
        if in_order:  # and each zone in the order of the plan
            template = epoch.zones.place(np.arange(len(epoch)), epoch.key, shuffle=False)[1]
            assert all((np.diff(template[here]) >= 0).all() for here in own.values())


@pytest.mark.parametrize(("zones", "tolerance"), [(4, 1), (16, 1), (4, 100), (16, 100)])
def test_a_zone_reads_one_stretch_of_storage(zones, tolerance):
    """Nine in ten sequences of a zone lie in a window that is hardly longer than n / zones."""
    rng = np.random.default_rng(1)
    lengths = rng.choice(rng.integers(1, 1000, 40), 60_000)
    plan, pools = planned(lengths, 2048, tolerance=tolerance)
    for number in range(2):
        epoch = sp.materialize_epoch(plan, pools, 0, epoch=number, zones=zones)
        starts = []
        for here in zones_of(epoch)[0].values():
            ids = np.sort(epoch.bins(here).ids)
            # Turned so that the zone with both ends is in one piece.
            around = np.concatenate([ids, ids + len(lengths)])
            size = int(0.9 * len(ids))
            spans = around[size - 1 : size - 1 + len(ids)] - around[: len(ids)]
            assert spans.min() < 1.3 * len(lengths) / zones
            starts.append(around[spans.argmin()] % len(lengths))
        assert np.diff(np.sort(starts)).min() > 0.5 * len(lengths) / zones


def test_rare_lengths_are_spread_over_the_zones():
    """Templates of one bin each follow one another in a plan, and are not all in one zone."""
    lengths = np.concatenate([np.full(64, 600), np.arange(300, 364)])
    plan, pools = planned(lengths, 1000)
    assert (plan.multiplicity == 1).all()
    epoch = sp.materialize_epoch(plan, pools, zones=8)
    sizes = [len(here) for here in zones_of(epoch)[0].values()]
    assert len(sizes) == 8
    assert {7, 8, 9} >= set(sizes)


def test_epochs_differ_and_repeat():
    plan, pools = planned(np.random.default_rng(0).choice([700, 600, 500, 300], 3000), 2048)
    drawn = [
        sp.materialize_epoch(plan, pools, 7, epoch=number, zones=5)[:].tolist()
        for number in (0, 1, 2, 0)
    ]
    pairs = [{tuple(sorted(ids)) for ids in bins if len(ids) > 1} for bins in drawn]
    assert drawn[0] == drawn[3]
    assert max(len(pairs[0] & pairs[1]), len(pairs[1] & pairs[2])) < 0.05 * len(pairs[0])
    runs = []
    for number in (0, 1):
        epoch = sp.materialize_epoch(plan, pools, 7, epoch=number, zones=5)
        zone = zones_of(epoch)[1]
        runs.append(zone[np.flatnonzero(np.diff(zone, prepend=-1))].tolist())
    assert runs[0] != runs[1]
    # Golden: a saved run must find the same epoch in every later version.
    small, ids = planned([5, 5, 5, 3, 3, 2] * 20, 10)
    epoch = sp.materialize_epoch(small, ids, seed=1, epoch=2, zones=3)
    assert epoch[::12].tolist() == [[26, 25], [14, 19], [2, 98], [65, 47, 59, 53, 71]]


def test_zones_pair_in_ways_of_their_own():
    """The same stretch lengths and bins in each zone, in no two of them in the same order."""
    plan, pools = planned(np.full(256, 8), 16)
    epoch = sp.materialize_epoch(plan, pools, 5, zones=4)
    drawn = set()
    for here in zones_of(epoch)[0].values():
        ids = epoch.bins(here).ids
        assert len(ids) == 64
        # Places inside the stretch of the zone, which may go around the end.
        gap = np.flatnonzero(np.diff(np.sort(ids)) > 1)
        first = int(np.sort(ids)[gap[0] + 1]) if len(gap) else int(ids.min())
        drawn.add(tuple(((ids - first) % 256).tolist()))
    assert len(drawn) == 4
    assert {max(places) for places in drawn} == {63}


def test_borders_between_zones_move_between_epochs():
    """Two neighbours in storage that one epoch parts are together in another."""
    plan, pools = planned(np.full(400, 8), 16)
    parted = set()
    for number in range(8):
        epoch = sp.materialize_epoch(plan, pools, 3, epoch=number, zones=4)
        zone_of = {}
        for zone, here in zones_of(epoch)[0].items():
            zone_of |= dict.fromkeys(epoch.bins(here).ids.tolist(), zone)
        parted.add(frozenset(i for i in range(399) if zone_of[i] != zone_of[i + 1]))
    assert len(parted) > 6
    assert not frozenset.intersection(*parted)


def test_another_key_is_another_epoch():
    """`dataclasses.replace` is how a source draws its other epochs."""
    plan, pools = planned(lognormal(3000), 2048)
    first = sp.materialize_epoch(plan, pools, 7, zones=6)
    first.bins([0, 100])
    second = sp.materialize_epoch(plan, pools, 7, epoch=1, zones=6)
    other = dataclasses.replace(first, key=second.key)
    assert other.zones is first.zones
    for _ in range(2):  # the two share what they keep
        assert other.bins([0, 5, 400]).tolist() == second.bins([0, 5, 400]).tolist()
        assert first[:].tolist() == sp.materialize_epoch(plan, pools, 7, zones=6)[:].tolist()


def test_tables_are_kept_and_forgotten(monkeypatch):
    plan, pools = planned(lognormal(3000), 2048)
    epoch = sp.materialize_epoch(plan, pools, 7, zones=9)
    made = []
    make = Zones._make_table
    monkeypatch.setattr(Zones, "_make_table", lambda self, z: made.append(z) or make(self, z))
    want = epoch[:].tolist()
    assert sorted(made) == list(range(9))
    assert epoch[:].tolist() == want
    assert len(made) == 9
    monkeypatch.setattr(zones_module, "_CACHED_BYTES", 0)
    monkeypatch.setattr(zones_module, "_CACHED_ZONES", 2)
    again = pickle.loads(pickle.dumps(epoch))
    made.clear()
    assert again[:].tolist() == want
    assert len(again.zones.__dict__["_kept"]) == 2
    assert [again[i].tolist() for i in range(0, len(again), 50)] == want[::50]


def test_what_is_pickled_does_not_grow_by_what_was_read():
    plan, pools = planned(lognormal(20_000), 2048)
    plain = sp.materialize_epoch(plan, pools, 7)
    epoch = sp.materialize_epoch(plan, pools, 7, zones=9)
    epoch.bins(np.arange(len(epoch)))
    assert len(pickle.dumps(epoch)) < len(pickle.dumps(plain)) + 500


def test_threads_may_share_an_epoch():
    plan, pools = planned(lognormal(3000), 2048)
    epoch = sp.materialize_epoch(plan, pools, 7, zones=16)
    want = sp.materialize_epoch(plan, pools, 7, zones=16)[:].tolist()
    got = {}

    def read(number):
        order = np.random.default_rng(number).permutation(len(epoch))[:300]
        got[number] = all(epoch[int(i)].tolist() == want[i] for i in order)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == dict.fromkeys(range(4), True)


@given(packing=packings(), zones=st.integers(2, 9), count=st.integers(1, 5), seed=seeds)
def test_shards_part_an_epoch_in_zones(packing, zones, count, seed):
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity)
    epoch = sp.materialize_epoch(plan, pools, seed, zones=zones)
    rows = epoch[:].tolist()
    shards = [[ids.tolist() for ids in epoch.shard(i, count)] for i in range(count)]
    in_turn = [row for step in zip(*shards, strict=True) for row in step]
    assert in_turn[: len(rows)] == rows
    assert in_turn[len(rows) :] == [[]] * (-len(rows) % count)


def test_pools_of_shards_act_as_one():
    lengths = np.random.default_rng(0).integers(1, 33, 900)
    plan, pools = planned(lengths, 32)
    starts = [0, 300, 600]
    parts = [sp.length_histogram_from_lengths(lengths[i : i + 300])[1] for i in starts]
    sharded = sp.SequencePools.from_shards(parts, bases=starts)
    for seed in (None, 4):
        want = sp.materialize_epoch(plan, pools, seed, zones=4)
        assert sp.materialize_epoch(plan, sharded, seed, zones=4)[:].tolist() == want[:].tolist()


@pytest.mark.parametrize("action", ["drop", "truncate", "truncate_left", "crop", "split"])
def test_policies_and_their_pieces_go_through_zones(action):
    lengths = lognormal(300, longest=5000)
    counts, pools = sp.length_histogram_from_lengths(lengths, 512, over_length=OverLength(action))
    epoch = sp.materialize_epoch(sp.pack_length_histogram(counts, 512), pools, 1, zones=4)
    epoch[:].check(lengths)
    assert epoch[1:3].pieces is pools.pieces
    assert epoch[:].key == epoch.key


def test_a_billion_sequences_in_zones_take_no_memory():
    counts = {512: 10**9, 700: 3 * 10**8}
    plan = sp.pack_length_histogram(counts, 2048)
    pools = sp.SequencePools.identity(counts)
    epoch = sp.materialize_epoch(plan, pools, seed=3, zones=1000)
    bins = epoch.bins(np.arange(100_000, 100_064))
    assert len(np.unique(bins.ids)) == len(bins.ids)
    assert np.ptp(bins.ids[bins.ids < 10**9]) < 10**6 < bins.ids.max()
    # Exactly all bins, without listing them.
    assert int(epoch.zones._sizes.sum()) == len(epoch)
    in_order = sp.materialize_epoch(plan, pools, zones=1000)
    assert sorted(in_order[0].tolist())[:2] == [0, 10**9]  # the first of both lengths
    assert in_order[len(epoch) - 1].max() == 10**9 - 1


def test_a_billion_sequences_of_lengths_that_are_planned_alike():
    """A zone takes its share of each true length, and all zones together take all."""
    counts = {512: 10**9, 511: 7, 510: 3 * 10**8 + 1, 700: 5}
    plan = sp.pack_length_histogram(counts, 2048, tolerance=4)
    pools = sp.SequencePools.identity(counts)
    epoch = sp.materialize_epoch(plan, pools, zones=500)
    first = {}
    reached = np.zeros(4, np.int64)
    for zone in range(500):
        table = epoch.zones._table(zone)
        assert table.starts.tolist() == reached.tolist()
        first[zone] = np.diff(table.offsets)
        reached += first[zone]
    assert reached.tolist() == [3 * 10**8 + 1, 7, 10**9, 5]
    share = np.array([first[zone][[0, 2]] for zone in range(500)])
    assert np.abs(share / share.mean(axis=0) - 1).max() < 1e-5


@pytest.mark.parametrize("tolerance", [1, 4])
@pytest.mark.parametrize("zones", [2, 7])
def test_more_sequences_in_a_zone_than_32_bits_count(zones, tolerance):
    """Ids of the right lengths, none of them twice; and all zones together take all."""
    counts = {4: 2**55 + 1, 3: 10**12 + 3, 7: 5}
    plan = sp.pack_length_histogram(counts, 16, tolerance=tolerance)
    pools = sp.SequencePools.identity(counts)
    for seed in (None, 3):
        epoch = sp.materialize_epoch(plan, pools, seed, zones=zones)
        bins, planned_lengths = epoch.bins_and_lengths(np.arange(0, len(epoch), len(epoch) // 99))
        assert len(np.unique(bins.ids)) == len(bins.ids)
        own = np.searchsorted(pools.starts, bins.ids, side="right") - 1
        assert (coarsen_lengths(own, tolerance, 16) == planned_lengths).all()
    reached = np.zeros(3, np.int64)
    for zone in range(zones):
        table = epoch.zones._table(zone)
        assert table.starts.tolist() == reached.tolist()
        reached += np.diff(table.offsets)
    assert reached.tolist() == [10**12 + 3, 2**55 + 1, 5]


def test_phases_are_counted_exactly():
    """Against fractions: the bins of a template below an edge, for multiplicities of all sizes."""
    counts = {6: 10**12 + 7, 5: 3, 4: 1}
    plan = sp.pack_length_histogram(counts, 6)
    for count in (2, 3, 7, MAX_ZONES):
        zones = Zones(plan, count)
        for edge in (0, 1, count // 2, count - 1, count):
            want = []
            for m, u in zip(plan.multiplicity.tolist(), zones._offsets.tolist(), strict=True):
                # ceil(m * edge / count - u / 2**32)
                want.append(-((u * count - m * edge * 2**32) // (count * 2**32)))
            assert zones._below(edge).tolist() == want
        assert zones._below(count).tolist() == plan.multiplicity.tolist()
        assert not zones._below(0).any()


@given(
    multiplicity=st.lists(st.sampled_from([1, 2, 5, 999, 10**6, 10**12]), min_size=1, max_size=30),
    count=st.sampled_from([2, 3, 7, 64, 999]),
)
def test_bins_of_a_zone_are_those_between_its_edges(multiplicity, count):
    """Also where they are counted in several blocks."""
    plan = sp.pack_length_histogram(dict(enumerate(multiplicity, 101)), 200)  # a bin has one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zones_module, "_BLOCK", 500)
        zones = Zones(plan, count)
        edges = [int(zones._below(edge).sum()) for edge in range(count + 1)]
        assert zones._sizes.tolist() == np.diff(edges).tolist()


def test_the_sizes_of_the_most_zones_of_a_rich_plan_are_exact():
    plan = sp.pack_length_histogram({3: 10**12 + 7, 2: 65535, 1: 70001}, 3)
    zones = Zones(plan, MAX_ZONES)
    assert int(zones._sizes.sum()) == plan.num_bins
    for zone in (0, 1, 77, MAX_ZONES - 1):
        assert zones._sizes[zone] == (zones._below(zone + 1) - zones._below(zone)).sum()


def test_opening_many_zones_is_no_pass_over_the_plan_for_each(monkeypatch):
    """It took half a minute with 65,536 zones of 40,000 templates, in every process."""
    plan, pools = planned(lognormal(20_000), 2048)
    passes = []
    below = Zones._below
    monkeypatch.setattr(
        Zones, "_below", lambda self, edge: passes.append(edge) or below(self, edge)
    )
    sp.materialize_epoch(plan, pools, 7, zones=1000)[0]
    assert len(passes) == 2  # of the one zone that was read


@given(zone=st.lists(st.sampled_from([0, 1, 5, 65535]), max_size=30))
def test_parts_list_each_zone_with_its_places(zone):
    parts = zones_module._parts(np.array(zone, np.int64))
    places = [(each, np.arange(len(zone))[here].tolist()) for each, here in parts]
    want = [(z, [i for i, own in enumerate(zone) if own == z]) for z in sorted(set(zone))]
    assert places == want


def test_an_epoch_of_nothing_has_no_zones():
    plan, pools = planned([], 8)
    epoch = sp.materialize_epoch(plan, pools, seed=1, zones=4)
    assert (len(epoch), epoch.zones, epoch[:].tolist()) == (0, None, [])


@pytest.mark.parametrize(
    ("zones", "part"),
    [
        (0, r"zones = 0, but it must be in \[1, 65536\]"),
        (MAX_ZONES + 1, r"zones = 65537, but it must be in"),
        (2.0, "zones = 2.0 is not an integer"),
    ],
)
def test_wrong_zones_are_refused(zones, part):
    plan, pools = planned([5, 5], 8)
    with pytest.raises(sp.SeqpackError, match=f"materialize_epoch: {part}"):
        sp.materialize_epoch(plan, pools, zones=zones)
