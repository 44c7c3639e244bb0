"""Bins: a ragged array of ids, and its checks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import algorithms, over_length_packings

import seqpack_jax as sp
from seqpack_jax.planning.over_length import OverLength, OverLengthReport, Pieces


def test_bins_are_a_sequence_of_views():
    bins = sp.Bins(np.arange(6), np.array([0, 2, 3, 6]), 8)
    assert len(bins) == 3
    assert bins[-1].tolist() == [3, 4, 5]
    assert np.shares_memory(bins[0], bins.ids)
    assert bins[1:].tolist() == [[2], [3, 4, 5]]
    assert np.shares_memory(bins[1:].ids, bins.ids)
    assert bins[2:1].tolist() == bins[3:].tolist() == []
    assert [ids.tolist() for ids in bins] == bins.tolist()
    with pytest.raises(IndexError, match="bin 3 of 3"):
        bins[3]
    with pytest.raises(IndexError, match="bin -4 of 3"):
        bins[-4]
    with pytest.raises(sp.SeqpackError, match="step 2"):
        bins[::2]
    for index in (0.5, [0, 1], np.array([0, 1]), None):
        with pytest.raises(sp.SeqpackError, match=r"index = .* is not an integer"):
            bins[index]


def test_bins_without_offsets_are_no_bins():
    bins = sp.Bins(np.zeros(0, np.int64), np.zeros(0, np.int64), 8)
    for part in (bins, bins[:], bins[3:1], bins[0:2][:]):
        assert len(part) == 0
        assert part.tolist() == []


def test_narrow_indices_do_not_wrap():
    bins = sp.Bins(np.arange(600), np.arange(0, 601, 2), 8)
    assert bins[np.uint8(255)].tolist() == [510, 511]
    assert bins[np.int8(-1)].tolist() == [598, 599]


def test_bins_check_sees_damage():
    lengths = [5, 3, 4]
    good = sp.Bins(np.array([0, 1, 2]), np.array([0, 2, 3]), 8)
    good.check(lengths)
    for ids, offsets, part in [
        ([0, 1, 1], [0, 2, 3], "sequence 1 is in 2 bins (2 such sequences)"),
        ([0, 1], [0, 2], "sequence 2 is in 0 bins (1 such sequences)"),
        ([0, 1, 3], [0, 2, 3], "an id is not in [0, 3)"),
        ([0, 2, 1], [0, 2, 3], "bin 0 holds 9 tokens of 8"),
        ([0, 1, 2], [0, 2, 2], "offsets do not cut"),
        ([0, 1, 2], np.array([0, 2, 1, 3], np.uint32), "offsets do not cut"),
        ([0, 1, 2], [], "offsets do not cut"),
        ([0.0, 1.0, 2.0], [0, 2, 3], "ids has dtype float64"),
    ]:
        with pytest.raises(sp.SeqpackError, match="Hint") as caught:
            sp.Bins(np.array(ids), np.array(offsets), 8).check(lengths)
        assert part in str(caught.value)


def test_slices_keep_the_policy():
    pieces = Pieces(3, np.array([[1, 0, 8, 9], [1, 8, 9, 9]]))
    policy, report = OverLength("split"), OverLengthReport("split", 1, 9, 0, 0, 2)
    bins = sp.Bins(np.array([3, 0, 2, 4]), np.array([0, 1, 4]), 8, pieces, policy, report, 7)
    for part in (bins[1:], bins[:0], bins[:]):
        assert part.pieces is pieces
        assert (part.over_length, part.report, part.key) == (policy, report, 7)
    bins.check([5, 9, 2])


@given(
    packing=over_length_packings(),
    algorithm=algorithms | st.just("next_fit"),
    tolerance=st.integers(1, 5),
    seed=st.none() | st.integers(0, 5),
)
def test_check_knows_what_a_policy_packs(packing, algorithm, tolerance, seed):
    lengths, capacity, policy = packing
    bins = sp.pack_sequences(
        lengths, capacity, algorithm=algorithm, tolerance=tolerance, seed=seed, over_length=policy
    )
    bins.check(lengths)
    if len(bins) > 1:
        with pytest.raises(sp.SeqpackError, match=r"is in 0 bins"):
            bins[1:].check(lengths)


def test_check_sees_what_the_policy_does_not_pack():
    bins = sp.Bins(np.array([0, 1]), np.array([0, 1, 2]), 8, over_length=OverLength("drop"))
    with pytest.raises(sp.SeqpackError, match="sequence 1 is in 1 bins, although it is over-leng"):
        bins.check([5, 9])
    bins = sp.pack_sequences([5, 9], 8, over_length="split")
    other = Pieces(2, np.array([[1, 0, 4, 9], [1, 4, 9, 9]]))
    late = bins.pieces._replace(first_id=3)
    for pieces in (None, other, late):
        with pytest.raises(sp.SeqpackError, match="the pieces are not those of these 2 lengths"):
            dataclasses.replace(bins, pieces=pieces).check([5, 9])
    with pytest.raises(sp.SeqpackError, match="the pieces are not those of these 2 lengths"):
        bins.check([5, 8])
    with pytest.raises(
        sp.SeqpackError, match=r"lengths\[1\] = 9, .* Hint: pass the packed lengths"
    ):
        dataclasses.replace(bins, over_length=OverLength()).check([5, 9])


@given(
    packing=over_length_packings(),
    algorithm=algorithms | st.just("next_fit"),
    tolerance=st.integers(1, 5),
)
def test_longest_first_sorts_each_bin(packing, algorithm, tolerance):
    lengths, capacity, policy = packing
    bins = sp.pack_sequences(
        lengths, capacity, algorithm=algorithm, tolerance=tolerance, over_length=policy
    )
    found = bins.longest_first(lengths)
    size = {i: min(length, capacity) for i, length in enumerate(lengths)}
    if bins.pieces is not None:
        table = bins.pieces.table[:].tolist()
        size |= {
            bins.pieces.first_id + k: stop - start for k, (_, _, start, stop) in enumerate(table)
        }
    expected = [sorted(ids, key=size.__getitem__, reverse=True) for ids in bins.tolist()]
    assert found.tolist() == expected  # `sorted` is stable
    found.check(lengths)
    assert found[1:].longest_first(lengths).tolist() == expected[1:]


def test_longest_first_refuses_other_lengths():
    bins = sp.pack_sequences([5, 3, 2], 8)
    with pytest.raises(sp.SeqpackError, match=r"^Bins\.longest_first: an id is not in \[0, 2\)"):
        bins.longest_first([5, 3])
