"""Lengths -> counts and pools, under every policy; merging buckets."""

import collections
import pickle

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import over_length_packings

import seqpack_jax as sp
from seqpack_jax.planning.counts import as_counts, coarsen_counts, coarsen_lengths
from seqpack_jax.planning.over_length import ACTIONS

lengths_strategy = st.lists(st.integers(1, 40), max_size=60)


@given(lengths=lengths_strategy)
def test_counts_and_pools(lengths):
    counts, pools = sp.length_histogram_from_lengths(lengths)
    assert pools.num_sequences == len(lengths)
    assert pools.counts.tolist() == counts.tolist()
    for length in range(45):
        expected = [i for i, n in enumerate(lengths) if n == length]
        assert pools[length].tolist() == expected, "stable: input order inside a length"
        if length < len(counts):
            assert counts[length] == len(expected)
            ranks = np.arange(len(expected))
            assert pools.lookup(length, ranks).tolist() == expected


@pytest.mark.parametrize("longest", [10, 2**16 - 1, 2**16, 10**6])
def test_long_lengths_group_the_same_way(longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 500)
    _, pools = sp.length_histogram_from_lengths(lengths)
    assert pools.ids.tolist() == sorted(range(500), key=lengths.__getitem__)


def test_more_than_65536_distinct_lengths():
    lengths = np.random.default_rng(0).permutation(70_000) + 1
    _, pools = sp.length_histogram_from_lengths(lengths)
    assert pools.ids.tolist() == np.argsort(lengths).tolist()


def test_pools_are_views():
    _, pools = sp.length_histogram_from_lengths([2, 2, 1])
    assert np.shares_memory(pools[2], pools.ids)


@given(lengths=lengths_strategy)
def test_identity_pools_number_sequences_by_length(lengths):
    counts, pools = sp.length_histogram_from_lengths(sorted(lengths))
    identity = sp.SequencePools.identity(counts)
    assert identity.ids is None
    assert identity.num_sequences == len(lengths)
    for length in range(len(counts)):
        assert identity[length].tolist() == pools[length].tolist()
        assert identity.lookup(length, np.arange(counts[length])).tolist() == pools[length].tolist()


@given(lengths=lengths_strategy, tolerance=st.integers(1, 12), extra=st.integers(0, 7))
def test_coarsening_merges_the_pools_of_a_bucket(lengths, tolerance, extra):
    capacity = max(lengths, default=1) + extra
    counts, pools = sp.length_histogram_from_lengths(lengths)
    planned = [min(-(-n // tolerance) * tolerance, capacity) for n in lengths]
    assert coarsen_lengths(lengths, tolerance, capacity).tolist() == planned
    coarse = pools.coarsen(tolerance, capacity)
    assert coarse.num_sequences == len(lengths)
    assert coarsen_counts(counts, tolerance, capacity).tolist() == coarse.counts.tolist()
    for length in set(planned):
        assert set(coarse[length].tolist()) == {i for i, n in enumerate(planned) if n == length}


@given(packing=over_length_packings(actions=ACTIONS), extra=st.integers(0, 2))
def test_pools_under_every_policy(packing, extra):
    lengths, capacity, policy = packing
    true = [length + extra for length in lengths]
    if policy.action == "error":
        capacity = max([capacity, *true])
    counts, pools = sp.length_histogram_from_lengths(
        lengths, capacity, over_length=policy, extra_tokens=extra
    )
    packed = reference.over_length_ids(true, capacity, policy)
    assert len(counts) <= capacity + 1
    assert pools.counts.tolist() == counts.tolist()
    for length in range(capacity + 1):
        own = [i for i, (_, start, stop) in packed.items() if stop - start == length]
        assert pools[length].tolist() == sorted(own)
    assert pools.over_length == policy
    assert pools.report == reference.over_length_report(true, capacity, policy)
    assert pools.coarsen(3, capacity).report == pools.report


def test_split_cuts_full_pieces_and_a_remainder():
    _, pools = sp.length_histogram_from_lengths([3, 9, 8], 4, over_length="split")
    pieces = pools.pieces
    assert pieces.first_id == 3
    assert pieces.source_id.tolist() == [1, 1, 1, 2, 2]
    assert pieces.start.tolist() == [0, 4, 8, 0, 4]
    assert pieces.stop.tolist() == [4, 8, 9, 4, 8]
    assert pieces.source_length.tolist() == [9, 9, 9, 8, 8]


def test_over_length_is_an_error_by_default():
    with pytest.raises(sp.SeqpackError, match=r"lengths\[1\] = 9, but max_seq_len is 4"):
        sp.length_histogram_from_lengths([3, 9], 4)
    with pytest.raises(sp.SeqpackError, match="choose one of error, drop, truncate"):
        sp.length_histogram_from_lengths([3, 9], 4, over_length="cut")
    with pytest.raises(sp.SeqpackError, match="over_length is 'drop', but there is no max_seq_len"):
        sp.length_histogram_from_lengths([3, 9], over_length="drop")
    with pytest.raises(sp.SeqpackError, match="extra_tokens = -1"):
        sp.length_histogram_from_lengths([3, 9], extra_tokens=-1)


def test_counts_forms_agree():
    array = as_counts("f", [0, 0, 3, 1])
    assert as_counts("f", {3: 1, 2: 3}).tolist() == array.tolist()
    assert as_counts("f", {}).tolist() == [0]
    assert as_counts("f", {np.uint64(3): np.int64(1), np.int64(2): np.uint64(3)}).tolist() == [
        0,
        0,
        3,
        1,
    ]


def test_lengths_that_no_sequence_has_are_left_out():
    counter = collections.Counter({3: 1, 2: 3, 99: 2, 0: 1, -4: 1})
    counter.subtract({99: 2, 0: 1, -4: 1})
    assert as_counts("f", counter, 3).tolist() == [0, 0, 3, 1]
    assert as_counts("f", {7: 0}).tolist() == [0]
    with pytest.raises(sp.SeqpackError, match=r"counts \(keys\) has dtype <U1"):
        as_counts("f", {"7": 0})


def test_no_counts():
    assert as_counts("f", []).tolist() == [0]


def test_empty_input():
    counts, pools = sp.length_histogram_from_lengths([])
    assert counts.tolist() == [0]
    assert pools.num_sequences == 0


def test_pools_need_an_id_per_place():
    with pytest.raises(sp.SeqpackError, match="there are 2 ids, but starts end at 3"):
        sp.SequencePools(np.arange(2), np.array([0, 0, 3]))
    _, pools = sp.length_histogram_from_lengths([255] * 3)
    assert pools[np.uint8(255)].tolist() == [0, 1, 2]
    assert sp.SequencePools.identity({255: 3})[np.uint8(255)].tolist() == [0, 1, 2]
    with pytest.raises(sp.SeqpackError, match=r"length = 2.5 is not an integer"):
        pools[2.5]


def test_split_pools_pickle_whole():
    _, pools = sp.length_histogram_from_lengths([3, 9, 8], 4, over_length="split")
    again = pickle.loads(pickle.dumps(pools))
    assert again.pieces.first_id == 3
    assert again.pieces.start.tolist() == pools.pieces.start.tolist()
    assert again.over_length == pools.over_length
    assert again.report == pools.report
    assert again.starts.tolist() == pools.starts.tolist()
    assert again.ids.tolist() == pools.ids.tolist()


def test_memory_mapped_pools_pickle_by_path(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100_000))
    ids = np.load(tmp_path / "ids.npy", mmap_mode="r")
    pools = sp.SequencePools(ids, np.array([0, 0, 40_000, 100_000]))
    data = pickle.dumps(pools)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again[2].tolist() == pools[2].tolist()
    assert again.lookup([1, 2], [5, 7]).tolist() == [5, 40_007]
