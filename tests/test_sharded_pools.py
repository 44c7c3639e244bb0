"""Pools in shards are looked up as if they were merged, and travel by path."""

import dataclasses
import os
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import over_length_packings

import seqpack_jax as sp
from seqpack_jax.arrays import ArrayParts, offsets_of
from seqpack_jax.planning.over_length import ACTIONS, OverLength, Pieces


def assert_same(found, expected):
    """All that can be asked of pools has the same answer."""
    assert found.starts.tolist() == expected.starts.tolist()
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.num_sequences == expected.num_sequences
    assert (found.over_length, found.report) == (expected.over_length, expected.report)
    lengths = np.repeat(np.arange(len(expected.counts)), expected.counts)
    ranks = np.arange(len(lengths)) - expected.starts[lengths]
    assert found.lookup(lengths, ranks).tolist() == expected.lookup(lengths, ranks).tolist()
    for length in range(len(expected.counts) + 1):
        assert found[length].tolist() == expected[length].tolist()
    assert (found.pieces is None) == (expected.pieces is None)
    if found.pieces is not None:
        assert found.pieces.first_id == expected.pieces.first_id
        assert found.pieces.table[:].tolist() == expected.pieces.table[:].tolist()


def in_shards(lengths, cuts, *options, **named):
    """The pools of runs of sequences, and the first id of each run."""
    edges = [0, *sorted(cut % (len(lengths) + 1) for cut in cuts), len(lengths)]
    runs = [lengths[a:b] for a, b in pairwise(edges)]
    return [sp.length_histogram_from_lengths(run, *options, **named)[1] for run in runs], edges[:-1]


@given(
    packing=over_length_packings(actions=ACTIONS),
    cuts=st.lists(st.integers(0, 1000), max_size=5),
    tolerance=st.integers(1, 9),
)
def test_shards_of_a_data_set_are_its_pools(packing, cuts, tolerance):
    lengths, capacity, policy = packing
    if policy.action == "error":
        capacity = max([capacity, *lengths])
    _, whole = sp.length_histogram_from_lengths(lengths, capacity, over_length=policy)
    shards, bases = in_shards(lengths, cuts, capacity, over_length=policy)
    joined = sp.SequencePools.from_shards(shards, bases=bases)
    assert_same(joined, whole)
    coarse, coarse_whole = (pools.coarsen(tolerance, capacity) for pools in (joined, whole))
    assert_same(coarse, coarse_whole)
    for pools, expected in ((joined, whole), (coarse, coarse_whole)):
        assert_same(pickle.loads(pickle.dumps(pools)), expected)
        assert_same(dataclasses.replace(pools), expected)
    nested = sp.SequencePools.from_shards(
        [
            sp.SequencePools.from_shards(shards[:2], bases=bases[:2]),
            sp.SequencePools.from_shards(shards[2:], bases=bases[2:]),
        ]
        if len(shards) > 2
        else [joined],
        bases=[0, 0] if len(shards) > 2 else [0],
    )
    assert_same(nested, whole)
    assert_same(sp.SequencePools.from_shards([coarse], bases=[0]), coarse_whole)


def test_no_shards_and_empty_ones():
    empty = sp.length_histogram_from_lengths([])[1]
    for shards in ([], [empty], [empty, empty]):
        assert sp.SequencePools.from_shards(shards, bases=[0] * len(shards)).num_sequences == 0
    some = sp.length_histogram_from_lengths([3, 5, 3])[1]
    assert_same(sp.SequencePools.from_shards([empty, some, empty], bases=[0, 0, 3]), some)


def test_an_epoch_of_shards_is_that_of_the_whole():
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    counts, whole = sp.length_histogram_from_lengths(lengths, 30, over_length="split")
    shards, bases = in_shards(lengths, [100, 200, 450], 30, over_length="split")
    joined = sp.SequencePools.from_shards(shards, bases=bases)
    plan = sp.pack_length_histogram(counts, 30, tolerance=4)
    epochs = [sp.materialize_epoch(plan, pools, seed=3) for pools in (whole, joined)]
    assert epochs[0][: len(epochs[0])].tolist() == epochs[1][: len(epochs[1])].tolist()


def test_shards_are_not_copied():
    shards, bases = in_shards(list(range(1, 50)), [10, 20])
    joined = sp.SequencePools.from_shards(shards, bases=bases)
    for part, shard in zip(joined.ids.parts, shards, strict=True):
        assert np.shares_memory(part, shard.ids)
    identity = [sp.SequencePools.identity({3: 2, 5: 1}) for _ in range(2)]
    joined = sp.SequencePools.from_shards(identity, bases=[0, 3])
    assert joined.lookup([3, 3, 3, 3, 5, 5], [0, 1, 2, 3, 0, 1]).tolist() == [0, 1, 3, 4, 2, 5]


def test_a_billion_numbered_sequences_take_no_memory():
    shards = [sp.SequencePools.identity({3: 10**9, 5: k}) for k in range(4)]
    joined = sp.SequencePools.from_shards(shards, bases=[k * 2 * 10**9 for k in range(4)])
    data = pickle.dumps(joined)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert again.lookup([3, 3, 5], [0, 4 * 10**9 - 1, 1]).tolist() == [
        0,
        7 * 10**9 - 1,
        5 * 10**9,
    ]
    assert again[5].tolist() == [3 * 10**9, *(5 * 10**9 + k for k in (0, 1)), *again[5][3:]]


def test_numbered_shards_with_pieces():
    """Identity pools may hold pieces too; these come after all whole sequences."""
    table = np.array([[0, 0, 5, 7]])
    split = sp.SequencePools(None, np.array([0, 0, 0, 2, 3]), Pieces(2, table))
    joined = sp.SequencePools.from_shards([split, split], bases=[0, 2])
    assert joined[2].tolist() == [0, 1, 2, 3]
    assert joined[3].tolist() == [4, 5]
    assert joined.pieces.source_id.tolist() == [0, 2]


def test_ids_of_their_own():
    """With bases of zero, ids and the sources of pieces are those of the shards."""
    one = sp.SequencePools.from_mapping({3: [70, 50]})
    two = sp.SequencePools.from_mapping({3: [20], 4: [10]})
    joined = sp.SequencePools.from_shards([one, two], bases=[0, 0])
    assert joined[3].tolist() == [70, 50, 20]
    assert joined[4].tolist() == [10]
    table = np.array([[900, 0, 4, 5], [900, 4, 5, 5]])
    split = sp.SequencePools(
        np.array([1001, 7, 1000]), np.array([0, 0, 1, 1, 2, 3]), Pieces(1000, table)
    )
    joined = sp.SequencePools.from_shards([one, split, split], bases=[0, 0, 0])
    assert joined.pieces.first_id == 1000
    assert joined.pieces.table.tolist() == table.tolist() * 2
    assert joined[1].tolist() == [1001, 1003]
    assert joined[3].tolist() == [70, 50, 7, 7]
    assert joined[4].tolist() == [1000, 1002]


def test_shards_that_do_not_go_together():
    shards, _ = in_shards([3, 9], [1], 8, over_length="drop")
    plain = sp.length_histogram_from_lengths([3], 8)[1]
    with pytest.raises(sp.SeqpackError, match=r"from_shards: the shards follow .*'drop'.*'error'"):
        sp.SequencePools.from_shards([*shards, plain], bases=[0, 1, 2])
    with pytest.raises(sp.SeqpackError, match="there are 2 shards, but 3 bases"):
        sp.SequencePools.from_shards(shards, bases=[0, 1, 2])
    with pytest.raises(sp.SeqpackError, match="bases has dtype float64"):
        sp.SequencePools.from_shards(shards, bases=[0, 0.7])
    with pytest.raises(TypeError, match="bases"):
        sp.SequencePools.from_shards(shards)


def test_shards_that_do_not_fit_their_starts():
    ids = ArrayParts([np.arange(3), np.arange(2)])
    shard_starts = [np.array([0, 0, 2, 3]), np.array([0, 0, 2])]
    starts = np.array([0, 0, 4, 5])
    good = sp.SequencePools(ids, starts, shard_starts=shard_starts)
    assert good[1].tolist() == [0, 1, 0, 1]
    assert good[2].tolist() == [2]
    for change, part in [
        ({"ids": np.arange(5)}, "ids are not 2 parts of the sizes that shard_starts end at"),
        ({"shard_starts": shard_starts[:1]}, "ids are not 1 parts"),
        ({"shard_starts": shard_starts[::-1]}, "ids are not 2 parts"),
        ({"shard_starts": [[0, 2, 1, 3], [0, 0, 2]]}, "the starts of part 0 do not rise"),
        ({"shard_starts": [[], [0, 0, 2]]}, "the starts of part 0 do not rise"),
        ({"starts": np.array([0, 0, 3, 5])}, "starts do not count the ids of length 1"),
        ({"starts": np.array([0, 0, 5])}, "starts do not count the ids of length 1"),
        ({"starts": np.array([0, 4, 5])}, "starts do not count the ids of length 0"),
        ({"starts": np.array([0, 0, 6])}, "there are 5 ids, but starts end at 6"),
    ]:
        fields = {"ids": ids, "starts": starts, "shard_starts": shard_starts} | change
        fields["shard_starts"] = [np.array(each, int) for each in fields["shard_starts"]]
        with pytest.raises(sp.SeqpackError) as caught:
            sp.SequencePools(**fields)
        assert part in str(caught.value)
    with pytest.raises(sp.SeqpackError, match="ids are not 1 parts"):
        sp.SequencePools(None, np.array([0, 5]), shard_starts=[np.array([0, 5])])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("number", "limit"), [(64, 20_000), (1000, 100_000)])
def test_pools_of_mapped_shards_travel_small(tmp_path, number, limit, split):
    """As `load_prepared` makes them: files of each shard, ids relative to a base, 8,192 lengths."""
    rng = np.random.default_rng(0)
    max_len, rows, cut = 8192, 40, 3

    def mapped(name, array):
        np.save(tmp_path / f"{name}.npy", array)
        return np.load(tmp_path / f"{name}.npy", mmap_mode="r")

    lengths = np.sort(rng.integers(1, max_len + 1, rows))
    starts = offsets_of(np.bincount(lengths, minlength=max_len + 1))
    np.save(tmp_path / "starts.npy", starts)
    ids, shard_starts, tables, piece_ids, piece_starts = [], [], [], [], []
    for shard in range(number):
        name = f"part-{shard:06d}-of-{number:06d}"
        ids.append(mapped(f"{name}.ids", rng.permutation(rows).astype(np.uint32)))
        os.link(tmp_path / "starts.npy", tmp_path / f"{name}.starts.npy")
        shard_starts.append(np.load(tmp_path / f"{name}.starts.npy", mmap_mode="r"))
        if split:
            table = np.array([[shard * rows, k, k + 1, cut] for k in range(cut)])
            tables.append(mapped(f"{name}.pieces", table))
            piece_ids.append(mapped(f"{name}.piece_ids", np.arange(cut, dtype=np.uint32)))
            piece_starts.append(mapped(f"{name}.piece_starts", np.array([0, 0, cut])))
    first_id = number * rows
    bases = [shard * rows for shard in range(number)]
    bases += [first_id + shard * cut for shard in range(len(tables))]
    counts = np.diff(starts) * number
    counts[1] += cut * len(tables)
    pools = sp.SequencePools(
        ids=ArrayParts(ids + piece_ids, bases),
        starts=offsets_of(counts),
        pieces=Pieces(first_id, ArrayParts(tables)) if split else None,
        over_length=OverLength("split") if split else OverLength(),
        shard_starts=shard_starts + piece_starts,
    )
    pools.lookup(int(lengths[0]), 0)  # derived arrays stay behind
    for sent in (pools, pools.coarsen(16, max_len)):
        data = pickle.dumps(sent)
        assert len(data) < limit
        again = pickle.loads(data)
        assert again.starts.tolist() == sent.starts.tolist()
        place = rng.integers(0, pools.num_sequences, 200)
        length = np.searchsorted(sent.starts, place, side="right") - 1
        rank = place - sent.starts[length]
        found = again.lookup(length, rank)
        assert found.tolist() == sent.lookup(length, rank).tolist()
        assert np.isin(found, pools.ids[:]).all()
        assert len(pickle.dumps(again)) <= len(data)
    if split:
        assert again.pieces.table[[-1]].tolist() == [[(number - 1) * rows, 2, 3, 3]]


def test_pools_of_a_mapping():
    pools = sp.SequencePools.from_mapping({7: [4, 2], np.int64(3): np.array([9], np.uint8), 5: []})
    assert pools.counts.tolist() == [0, 0, 0, 1, 0, 0, 0, 2]
    assert pools[7].tolist() == [4, 2]
    assert pools[3].tolist() == [9]
    assert isinstance(pools.ids, np.ndarray)
    assert sp.SequencePools.from_mapping({}).num_sequences == 0


def test_a_mapping_to_files_stays_in_them(tmp_path):
    """The directory of the seed library: one file for each length."""
    files = {}
    for length in (300, 7, 20):
        np.save(tmp_path / f"{length}.npy", np.arange(length * 100, length * 100 + 5000))
        files[length] = np.load(tmp_path / f"{length}.npy", mmap_mode="r")
    files[8] = np.array([5])
    pools = sp.SequencePools.from_mapping(files)
    data = pickle.dumps(pools)
    assert len(data) < 1500
    for each in (pools, pickle.loads(data), pools.coarsen(1, 300)):
        assert each[20].tolist() == files[20].tolist()
        assert each.lookup([7, 300, 8], [4999, 3, 0]).tolist() == [5699, 30_003, 5]
    joined = sp.SequencePools.from_shards([pools, pools], bases=[0, 10**6])
    assert joined.lookup([7, 7, 8], [4999, 5000, 1]).tolist() == [5699, 1_000_700, 1_000_005]


def test_ids_above_53_bits_stay_exact():
    big = 2**53 + 1
    for ids in (np.array([big, 1], np.uint64), [np.uint64(big), np.int64(1)]):
        pools = sp.SequencePools.from_mapping({np.uint64(3): ids, np.int64(4): [7]})
        assert pools[3].tolist() == [big, 1]
        epoch = sp.materialize_epoch({(4, 3): 1, (3,): 1}, pools, seed=1)
        assert sorted(i for row in epoch[:].tolist() for i in row) == [1, 7, big]


def test_thousands_of_mapped_pools_travel_small(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "7.npy", np.arange(400))
    files = {}
    for length in range(1, 8193):
        name = tmp_path / f"{length}.npy"
        if length != 7:
            os.link(tmp_path / "7.npy", name)
        files[length] = np.load(name, mmap_mode="r")[: int(rng.integers(1, 400))]
    pools = sp.SequencePools.from_mapping(files)
    data = pickle.dumps(pools)
    assert len(data) < 60_000
    again = pickle.loads(data)
    assert isinstance(again.ids.parts[8000], np.memmap)
    assert again.counts.tolist() == pools.counts.tolist()
    assert again[8192].tolist() == files[8192].tolist()


@pytest.mark.parametrize(
    ("mapping", "part"),
    [
        ({0: [1]}, "pools (keys)[0] = 0"),
        ({3: [1], -2: [1]}, "pools (keys)[1] = -2"),
        ({"3": [1]}, "pools (keys) has dtype <U1"),
        ({3: [0.5]}, "pools[3] has dtype float64"),
        ({3: [[1]]}, "pools[3] has shape (1, 1)"),
        ([[1]], "pools is a list"),
        ({5: np.array([2**63, 1], np.uint64)}, "pools[5] holds 9223372036854775808, beyond int64"),
    ],
)
def test_bad_mappings(mapping, part):
    with pytest.raises(sp.SeqpackError, match=r"^SequencePools.from_mapping: ") as caught:
        sp.SequencePools.from_mapping(mapping)
    assert part in str(caught.value)
