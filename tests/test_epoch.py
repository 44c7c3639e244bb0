"""An epoch is a bijection between slots and ids that can be read anywhere."""

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import algorithms, packings

import seqpack_jax as sp
from seqpack_jax.feeding.epoch import EpochShard, shuffle_bins
from seqpack_jax.planning.over_length import OverLength


def planned(lengths, capacity, **options):
    counts, pools = sp.length_histogram_from_lengths(lengths)
    return sp.pack_length_histogram(counts, capacity, **options), pools


@given(
    packing=packings(),
    algorithm=algorithms,
    tolerance=st.integers(1, 5),
    seed=st.none() | st.integers(-(10**20), 10**20),
    number=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_id_once_and_no_bin_overflows(packing, algorithm, tolerance, seed, number, shuffle):
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity, algorithm=algorithm, tolerance=tolerance)
    epoch = sp.materialize_epoch(plan, pools, seed=seed, epoch=number, shuffle=shuffle)
    assert len(epoch) == plan.num_bins
    epoch[0 : len(epoch)].check(lengths)


@given(packing=packings(), seed=st.none() | st.integers(0, 9), data=st.data())
def test_any_bin_can_be_read_alone(packing, seed, data):
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity)
    epoch = sp.materialize_epoch(plan, pools, seed=seed)
    bins = [ids.tolist() for ids in epoch]
    assert epoch[0 : len(epoch)].tolist() == bins
    indices = data.draw(st.lists(st.integers(0, len(epoch) - 1), max_size=9)) if bins else []
    assert epoch.bins(indices).tolist() == [bins[i] for i in indices]
    for i in indices:
        assert epoch[i].tolist() == epoch[i - len(epoch)].tolist() == bins[i]
    assert epoch[::-2].tolist() == bins[::-2]
    drawn, length = epoch.bins_and_lengths(indices)
    assert length.tolist() == [lengths[i] for i in drawn.ids]


def test_epochs_differ_in_pairings_and_in_order():
    lengths = np.repeat([5, 3, 2], 100)
    plan, pools = planned(lengths, 10)
    drawn = [sp.materialize_epoch(plan, pools, seed=7, epoch=e)[0:150] for e in range(3)]
    assert len({bins.ids.tobytes() for bins in drawn}) == 3
    pairs = [{tuple(sorted(ids)) for ids in bins.tolist()} for bins in drawn]
    assert len(pairs[0] & pairs[1]) < 5
    orders = [[tuple(sorted(lengths[i] for i in ids)) for ids in bins] for bins in drawn]
    assert orders[0] != orders[1] != orders[2]


def test_seed_and_epoch_decide_alone():
    plan, pools = planned([5, 5, 5, 3, 3, 2] * 20, 10)
    again_plan, again_pools = planned([5, 5, 5, 3, 3, 2] * 20, 10)
    one = sp.materialize_epoch(plan, pools, seed=1, epoch=2)
    two = sp.materialize_epoch(again_plan, again_pools, seed=1, epoch=2)
    assert one[0 : len(one)].tolist() == two[0 : len(two)].tolist()
    # Golden: a saved run must find the same epoch in every later version.
    assert one[0:4].tolist() == [[78, 92], [96, 102], [90, 0], [106, 105, 52]]


def test_without_shuffle_the_bins_follow_the_plan():
    lengths = np.repeat([5, 3, 2], 40)
    plan, pools = planned(lengths, 10)
    epoch = sp.materialize_epoch(plan, pools, seed=1, shuffle=False)
    fixed = sp.materialize_epoch(plan, pools)
    assert [lengths[i].tolist() for i in epoch] == [lengths[i].tolist() for i in fixed]
    assert epoch[0:40].tolist() != fixed[0:40].tolist()


def test_a_billion_sequences_take_no_memory():
    counts = {512: 10**9, 700: 3 * 10**8}
    plan = sp.pack_length_histogram(counts, 2048)
    epoch = sp.materialize_epoch(plan, sp.SequencePools.identity(counts), seed=3)
    bins = epoch.bins(np.linspace(0, len(epoch) - 1, 64).astype(int))
    assert len(np.unique(bins.ids)) == len(bins.ids)
    assert bins.ids.max() > 10**9


def test_bad_indices():
    plan, pools = planned([5, 5], 8)
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    with pytest.raises(sp.SeqpackError, match=r"indices\[1\] = 2, but there are 2 bins"):
        epoch.bins([0, 2])
    with pytest.raises(sp.SeqpackError, match="dtype float64"):
        epoch.bins([0.5])
    for index in (2, -3):
        with pytest.raises(IndexError, match="of 2"):
            epoch[index]
    for index in (0.5, [0, 1], None):
        with pytest.raises(sp.SeqpackError, match=r"index = .* is not an integer"):
            epoch[index]
    with pytest.raises(sp.SeqpackError, match="epoch = -1"):
        sp.materialize_epoch(plan, pools, epoch=-1)
    with pytest.raises(sp.SeqpackError, match=r"materialize_epoch: seed = 1.5 is not an integer"):
        sp.materialize_epoch(plan, pools, seed=1.5)


@pytest.mark.parametrize(
    ("lengths", "part"),
    [
        ([5, 5, 3, 3], "hold 2 sequences of planned length 3, the plan has 1 slots"),
        ([5, 5], "hold 0 sequences of planned length 3, the plan has 1 slots"),
        ([5, 5, 3, 6], "hold 1 sequences of planned length 6, the plan has 0 slots"),
        ([5, 5, 3, 9, 9], r"hold 2 sequences of planned length 9, .* 0 slots of it \(5 seq"),
    ],
)
def test_a_plan_of_other_sequences_is_refused(lengths, part):
    plan, _ = planned([5, 5, 3], 10)
    _, pools = sp.length_histogram_from_lengths(lengths)
    with pytest.raises(sp.SeqpackError, match=part):
        sp.materialize_epoch(plan, pools)
    with pytest.raises(sp.SeqpackError, match=part):
        sp.materialize_epoch(plan.to_counter(), mapping(pools))


@pytest.mark.parametrize("tolerance", [1, 3, 8])
def test_pools_of_longer_sequences_are_refused(tolerance):
    """With a tolerance, they would pass for sequences of `max_seq_len` tokens."""
    _, pools = sp.length_histogram_from_lengths([3, 9, 9, 12])
    plan = sp.pack_length_histogram(pools.counts, 8, tolerance=tolerance, over_length="truncate")
    message = (
        r"hold 2 sequences of length 9, but the max_seq_len of the plan is 8 \(3 sequences .* "
        "Hint: use the same max_seq_len and over_length policy"
    )
    with pytest.raises(sp.SeqpackError, match=message):
        sp.materialize_epoch(plan, pools)
    with pytest.raises(sp.SeqpackError, match=message):
        sp.PackedSource(plan, pools, [np.arange(n) for n in (3, 9, 9, 12)], batch_size=1)


def test_bins_carry_the_key_of_their_epoch():
    plan, pools = planned([5, 5, 3], 8)
    epochs = [sp.materialize_epoch(plan, pools, 4, epoch=number) for number in (0, 1)]
    assert epochs[0].key != epochs[1].key
    for epoch in (*epochs, sp.materialize_epoch(plan, pools)):
        for bins in (epoch[:], epoch[1:2][:], epoch.bins([1]), epoch.shard(1, 3)[:]):
            assert bins.key == epoch.key


def mapping(pools):
    """The pools in the seed's form."""
    return {int(length): pools[length] for length in np.flatnonzero(pools.counts)}


@given(
    packing=packings(),
    algorithm=algorithms,
    seed=st.none() | st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
def test_the_forms_of_the_seed_give_the_same_epoch(packing, algorithm, seed, order):
    """Seed bug 9: there, the order of the dictionary decides, which is that of a directory."""
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity, algorithm=algorithm)
    counter, ids = plan.to_counter(), mapping(pools)
    falling = sp.PackingPlan.from_counter(dict(sorted(counter.items(), reverse=True)), capacity)
    want = sp.materialize_epoch(falling, pools, seed, epoch=1)[:].tolist()
    for _ in range(2):
        keys, sizes = list(counter), list(ids)
        order.shuffle(keys)
        order.shuffle(sizes)
        templates = Counter({key: counter[key] for key in keys})
        epoch = sp.materialize_epoch(templates, {size: ids[size] for size in sizes}, seed, epoch=1)
        assert epoch[:].tolist() == want
    assert epoch.plan.max_seq_len == max((sum(template) for template in counter), default=1)
    for zones in (1, 3):
        assert sp.materialize_epoch(plan, ids, seed, zones=zones)[:].tolist() == (
            sp.materialize_epoch(plan, pools, seed=seed, epoch=0, zones=zones)[:].tolist()
        )


def test_pools_that_are_memory_maps_stay_such(tmp_path):
    """Seed bug 18: there, an epoch reads and permutes every pool up front."""
    lengths = np.repeat([5, 3], 20_000)
    plan, pools = planned(lengths, 10)
    for length, ids in mapping(pools).items():
        np.save(tmp_path / f"{length}.npy", ids)
    maps = {length: np.load(tmp_path / f"{length}.npy", mmap_mode="r") for length in (5, 3)}
    epoch = sp.materialize_epoch(plan, maps, 3)
    again = pickle.loads(pickle.dumps(epoch))
    assert len(pickle.dumps(epoch)) < 10_000
    want = sp.materialize_epoch(plan, pools, 3)[100:200].tolist()
    assert epoch[100:200].tolist() == again[100:200].tolist() == want


def test_pools_of_shards_act_as_one():
    lengths = np.random.default_rng(0).integers(1, 33, 900)
    plan, pools = planned(lengths, 32)
    starts = [0, 300, 600]
    parts = [sp.length_histogram_from_lengths(lengths[i : i + 300])[1] for i in starts]
    sharded = sp.SequencePools.from_shards(parts, bases=starts)
    for seed in (None, 4):
        want = sp.materialize_epoch(plan, pools, seed)
        epoch = sp.materialize_epoch(plan, sharded, seed)
        assert epoch[:].tolist() == want[:].tolist()
        assert epoch.bins([7, 0, 7]).tolist() == want.bins([7, 0, 7]).tolist()


@pytest.mark.parametrize("action", ["drop", "truncate", "truncate_left", "crop", "split"])
def test_an_over_length_policy_goes_with_the_bins(action):
    lengths = [5, 20, 3, 8, 9, 2, 40]
    policy = OverLength(action)
    counts, pools = sp.length_histogram_from_lengths(lengths, 8, over_length=policy)
    epoch = sp.materialize_epoch(sp.pack_length_histogram(counts, 8), pools, seed=1)
    epoch[:].check(lengths)
    for bins in (epoch[:], epoch[1:3], epoch.shard(1, 2)[:]):
        assert bins.over_length == policy
        assert bins.report == pools.report
        assert bins.pieces is pools.pieces
    assert pools.report.sequences == 3


@pytest.mark.parametrize(
    ("templates", "pools", "part"),
    [
        ({(5, 3): 1}, {5: [0]}, "hold 0 sequences of planned length 3, the plan has 1 slots"),
        ({(5, 3): 1}, {5: [0], 3: [1, 2]}, "hold 2 sequences of planned length 3, the plan has 1"),
        ([(5, 3)], {5: [0], 3: [1]}, "templates is a list, not a plan"),
        ({(5, 3): 1}, [0, 1], "pools is a list, not pools"),
        ({5: 1}, {5: [0]}, "5 is not a template"),
        ({(5, 0): 1}, {5: [0]}, r"lengths\[1\] = 0"),
        ({(2**30, 2**30): 1}, {2**30: [0, 1]}, "holds 2147483648 tokens of 2147483647"),
    ],
)
def test_wrong_forms_are_refused(templates, pools, part):
    with pytest.raises(sp.SeqpackError, match=part):
        sp.materialize_epoch(templates, pools)


@given(
    packing=packings(),
    count=st.integers(1, 8),
    seed=st.none() | st.integers(0, 9),
    shuffle=st.booleans(),
)
def test_shards_part_an_epoch(packing, count, seed, shuffle):
    """Seed bug 8: there, each rank shuffles the whole data set with a seed of its own."""
    lengths, capacity = packing
    plan, pools = planned(lengths, capacity)
    epoch = sp.materialize_epoch(plan, pools, seed, shuffle=shuffle)
    rows = [ids.tolist() for ids in epoch]
    padded = [[ids.tolist() for ids in epoch.shard(i, count)] for i in range(count)]
    assert {len(shard) for shard in padded} == {-(-len(rows) // count)}
    in_turn = [row for step in zip(*padded, strict=True) for row in step]
    assert in_turn[: len(rows)] == rows
    assert in_turn[len(rows) :] == [[]] * (-len(rows) % count)
    assert sorted(i for row in in_turn for i in row) == list(range(len(lengths)))
    kept = [epoch.shard(i, count, remainder="drop")[:].tolist() for i in range(count)]
    steps = len(rows) // count
    assert kept == [shard[:steps] for shard in padded]
    assert len(rows) - steps * count < count


def test_a_shard_reads_as_an_epoch_does():
    plan, pools = planned([8] * 11, 8)
    epoch = sp.materialize_epoch(plan, pools, 5)
    shard = epoch.shard(2, 3)
    rows = [*epoch[2::3].tolist(), []]
    assert (len(shard), shard.index, shard.count, shard.remainder) == (4, 2, 3, "pad")
    assert [ids.tolist() for ids in shard] == shard[:].tolist() == rows
    assert [shard[i].tolist() for i in (0, 3, -1, -4)] == [rows[i] for i in (0, 3, -1, -4)]
    assert shard[1:3].tolist() == rows[1:3]
    assert shard[::-1].tolist() == rows[::-1]
    assert shard.bins([3, 1, 3, 3, 0]).tolist() == [rows[i] for i in (3, 1, 3, 3, 0)]
    assert shard.bins([]).tolist() == shard[4:].tolist() == []
    again = pickle.loads(pickle.dumps(shard))
    assert again[:].tolist() == rows


def test_drop_leaves_out_other_rows_each_epoch():
    plan, pools = planned([8] * 103, 8)
    left_out = set()
    for number in range(5):
        epoch = sp.materialize_epoch(plan, pools, 0, epoch=number)
        seen = {
            int(id) for i in range(4) for ids in epoch.shard(i, 4, remainder="drop") for id in ids
        }
        assert len(seen) == 100
        left_out.add(frozenset(range(103)) - seen)
    assert len(left_out) == 5


def test_shards_of_a_billion_sequences_are_read_anywhere():
    counts = {512: 10**9 + 1}
    plan = sp.pack_length_histogram(counts, 2048)
    epoch = sp.materialize_epoch(plan, sp.SequencePools.identity(counts), seed=3)
    shard = epoch.shard(1000, 1024)
    assert (len(epoch), len(shard)) == (250_000_001, 244_141)
    assert shard[123_456].tolist() == epoch[123_456 * 1024 + 1000].tolist()
    assert [len(ids) for ids in shard[-2:]] == [4, 0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((2, 2), r"Epoch.shard: index = 2, but it must be in \[0, 1\]"),
        ((-1, 2), r"index = -1, but it must be in \[0, 1\]"),
        ((0, 0), "count = 0, but it must be at least 1"),
        ((0.5, 2), "index = 0.5 is not an integer"),
        ((0, 2, "keep"), "remainder = 'keep' is not known. Hint: choose one of pad, drop"),
    ],
)
def test_wrong_shards_are_refused(arguments, part):
    plan, pools = planned([5, 5], 8)
    epoch = sp.materialize_epoch(plan, pools)
    options = {"remainder": arguments[2]} if len(arguments) > 2 else {}
    with pytest.raises(sp.SeqpackError, match=part):
        epoch.shard(*arguments[:2], **options)


def test_bad_indices_into_a_shard():
    plan, pools = planned([5, 5, 5], 8)
    shard = sp.materialize_epoch(plan, pools).shard(0, 2)
    assert isinstance(shard, EpochShard)
    with pytest.raises(sp.SeqpackError, match=r"EpochShard.bins: .*= 2, but there are 2"):
        shard.bins([0, 2])
    for index in (2, -3):
        with pytest.raises(IndexError, match="of 2"):
            shard[index]
    with pytest.raises(sp.SeqpackError, match="EpochShard: index = '0' is not an integer"):
        shard["0"]


@given(size=st.integers(0, 80), seed=st.integers(-(10**20), 10**20))
def test_shuffled_bins(size, seed):
    given = list(range(100, 100 + size))
    result = shuffle_bins(given, seed)
    assert given == list(range(100, 100 + size)), "the argument was changed"
    assert sorted(result) == given
    assert result == shuffle_bins(given, seed=seed)
    array = shuffle_bins(np.array(given, np.uint16), seed)
    assert (array.tolist(), array.dtype) == (result, np.uint16 if size else np.int64)
    bins = [[i] for i in given]
    assert shuffle_bins(bins, seed) == [[i] for i in result]


def test_bins_keep_their_order_without_a_seed():
    given = [3, 1, 2]
    assert shuffle_bins(given) == given
    assert shuffle_bins(given) is not given
    array = np.array(given)
    assert shuffle_bins(array).tolist() == given
    assert not np.shares_memory(shuffle_bins(array), array)
    orders = {tuple(shuffle_bins(given, seed)) for seed in range(60)}
    assert len(orders) == 6
    # Golden: the order of a saved run must not change.
    assert shuffle_bins(list(range(40)), seed=7)[:6] == [26, 36, 30, 13, 14, 28]


@pytest.mark.parametrize(
    ("bin_indices", "seed", "part"),
    [
        ([1, 2], 0.5, "shuffle_bins: seed = 0.5 is not an integer"),
        ([], 0.5, "seed = 0.5 is not an integer"),
        (np.zeros((2, 2), int), 0, r"bin_indices has shape \(2, 2\)"),
        (np.zeros(2), 0, "bin_indices has dtype float64"),
    ],
)
def test_wrong_bins_to_shuffle_are_refused(bin_indices, seed, part):
    with pytest.raises(sp.SeqpackError, match=part):
        shuffle_bins(bin_indices, seed)


def test_an_empty_epoch():
    plan, pools = planned([], 8)
    epoch = sp.materialize_epoch(plan, pools, seed=1)
    assert len(epoch) == 0
    assert list(epoch) == []
    assert epoch[0:0].tolist() == []
    assert epoch.shard(1, 3)[:].tolist() == []
    assert len(sp.materialize_epoch({}, {}, 1).shard(0, 2, remainder="drop")) == 0


def test_pairings_do_not_repeat_between_epochs():
    """Seed bug 12: there, 27 % of the pairs of one epoch come again in the next."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(300), 1, 20_000)), 1, 2048).astype(int)
    plan, pools = planned(lengths, 2048, tolerance=16)
    pairs = []
    for number in range(2):
        epoch = sp.materialize_epoch(plan, pools, seed=0, epoch=number)
        pairs.append({(int(a), int(b)) for ids in epoch for a in ids for b in ids if a < b})
    assert len(pairs[0] & pairs[1]) / len(pairs[0]) < 0.05


def test_epoch_is_a_frozen_record():
    plan, pools = planned([5, 5, 3], 10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sp.materialize_epoch(plan, pools).key = 3
