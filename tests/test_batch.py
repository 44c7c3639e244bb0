"""Sequences in, fixed shapes out, and back; what does not fit the plan is refused."""

import pickle

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import packings, random_sequences

import seqpack_jax as sp


def flat(sequences, dtype=np.int32):
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
    return sp.FlatSequences(np.concatenate([np.zeros(0, dtype), *sequences]).astype(dtype), offsets)


@given(packing=packings(), extra=st.integers(0, 3), pad=st.integers(-3, 3), as_flat=st.booleans())
def test_equals_the_token_by_token_version(packing, extra, pad, as_flat):
    lengths, capacity = packing
    sequences = random_sequences(lengths)
    bins = sp.pack_sequences(lengths, capacity)
    batch = sp.pack_batch(
        bins,
        flat(sequences) if as_flat else sequences,
        capacity,
        lengths=lengths,
        rows=len(bins) + extra,
        pad_value=pad,
    )
    expected = reference.rows_of([*bins.tolist(), *[[]] * extra], sequences, capacity, pad)
    for array, rows in zip(batch[:3], expected, strict=True):
        assert array.dtype == np.int32
        assert array.shape == (len(bins) + extra, capacity)
        assert array.tolist() == rows
        assert array.flags.owndata or array.base.flags.owndata


@given(packing=packings())
def test_unpack_is_the_inverse(packing):
    lengths, capacity = packing
    sequences = random_sequences(lengths)
    bins = sp.pack_sequences(lengths, capacity)
    batch = sp.pack_batch(bins, sequences, capacity, lengths=lengths, rows=len(bins) + 1)
    unpacked = sp.unpack_batch(batch)
    assert len(unpacked) == len(lengths)
    for tokens, index in zip(unpacked, bins.ids.tolist(), strict=True):
        assert tokens.tolist() == sequences[index].tolist()
    assert len(unpacked.tokens) == sum(lengths)


def test_unpack_separates_rows_and_skips_inner_padding():
    segment_ids = np.array([[1, 1, 0, 2], [0, 2, 2, 0], [2, 1, 1, 1]], np.int32)
    tokens = np.arange(12, dtype=np.int32).reshape(3, 4)
    unpacked = sp.unpack_batch(sp.PackedBatch(tokens, segment_ids, segment_ids, {}))
    assert [t.tolist() for t in unpacked] == [[0, 1], [3], [5, 6], [8], [9, 10, 11]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
def test_integer_dtypes_come_out_as_int32(dtype):
    sequences = random_sequences([3, 2], vocabulary=100)
    batch = sp.pack_batch(
        sp.pack_sequences([3, 2], 5), [s.astype(dtype) for s in sequences], 5, lengths=[3, 2]
    )
    assert batch.tokens.dtype == np.int32
    assert batch.tokens.tolist() == [[*sequences[0].tolist(), *sequences[1].tolist()]]


@pytest.mark.parametrize(
    ("sequences", "part"),
    [
        ([[1, 2, 2**31], [4, 5]], "the token 2147483648, beyond int32"),
        ([[1, 2, -(2**31) - 1], [4, 5]], "the token -2147483649, beyond int32"),
        ([np.array([1.0, 2, 3]), [4, 5]], "sequence 0 has shape (3,) and dtype float64"),
        ([[[1, 2, 3]], [4, 5]], "sequence 0 has shape (1, 3)"),
        ([[1, 2, 3], [4, 5, 6]], "sequence 1 has 3 tokens, but 2 were planned (1 of 2"),
        ([[1, 2, 3, 9], [4]], "sequence 0 has 4 tokens, but 3 were planned (2 of 2"),
        ([np.array([1, 2, 3], np.uint64), np.array([4, 5])], "common dtype float64"),
    ],
)
def test_what_does_not_fit_is_refused(sequences, part):
    bins = sp.pack_sequences([3, 2], 8)
    with pytest.raises(sp.SeqpackError, match="Hint") as caught:
        sp.pack_batch(bins, sequences, 8, lengths=[3, 2])
    assert part in str(caught.value)
    if "planned" in part:
        assert "special tokens" in str(caught.value)


def test_bad_calls():
    bins = sp.pack_sequences([3, 2, 8], 8)
    sequences = random_sequences([3, 2, 8])
    with pytest.raises(sp.SeqpackError, match="rows = 1, but it must be at least 2"):
        sp.pack_batch(bins, sequences, 8, lengths=[3, 2, 8], rows=1)
    with pytest.raises(sp.SeqpackError, match=r"bin 0 holds 8 tokens of 7"):
        sp.pack_batch(bins, sequences, 7, lengths=[3, 2, 8])
    with pytest.raises(sp.SeqpackError, match=r"bins.ids\[0\] = 2, but ids are in \[0, 2\)"):
        sp.pack_batch(bins, sequences, 8, lengths=[3, 2])
    with pytest.raises(sp.SeqpackError, match="sequence 2 is missing"):
        sp.pack_batch(bins, sequences[:2], 8, lengths=[3, 2, 8])
    with pytest.raises(sp.SeqpackError, match="sequence 0 is no array"):
        sp.pack_batch(bins, [[[1], [2, 3]], *sequences[1:]], 8, lengths=[3, 2, 8])
    with pytest.raises(sp.SeqpackError, match="bins is a list, not Bins"):
        sp.pack_batch([[0, 1]], sequences, 8, lengths=[3, 2, 8])
    with pytest.raises(sp.SeqpackError, match=r"bins\.ids has dtype float64"):
        sp.pack_batch(sp.Bins(np.zeros(1), np.arange(2), 8), sequences, 8, lengths=[3, 2, 8])
    for pad in (2**31, None, 1.5, True):
        with pytest.raises(sp.SeqpackError, match="pad_value"):
            sp.pack_batch(bins, sequences, 8, lengths=[3, 2, 8], pad_value=pad)
    with pytest.raises(sp.SeqpackError, match=r"an id is not in \[0, 2\)"):
        sp.pack_batch(bins, flat(sequences[:2]), 8, lengths=[3, 2, 8])


def test_flat_sequences_check_their_ends():
    with pytest.raises(sp.SeqpackError, match="offsets run from 0 to 6, but there are 5 tokens"):
        sp.FlatSequences(np.arange(5), np.array([0, 6]))
    with pytest.raises(sp.SeqpackError, match="offsets run from 3 to 5"):
        sp.FlatSequences(np.arange(5), np.cumsum([3, 2]))  # the leading 0 forgotten
    with pytest.raises(sp.SeqpackError, match="offsets run from 0 to 4, but there are 5 tokens"):
        sp.FlatSequences(np.arange(5), np.array([0, 4]))
    with pytest.raises(sp.SeqpackError, match="offsets are empty"):
        sp.FlatSequences(np.arange(5), np.array([], np.int64))
    with pytest.raises(sp.SeqpackError, match="tokens has dtype float64"):
        sp.FlatSequences(np.zeros(5), np.array([0, 5]))
    sequences = sp.FlatSequences(np.arange(5), np.array([0, 2, 5]))
    assert sequences.lengths.tolist() == [2, 3]
    assert [each.tolist() for each in sequences] == [[0, 1], [2, 3, 4]]
    for index in (2, -1):
        with pytest.raises(IndexError, match="of 2"):
            sequences[index]
    with pytest.raises(sp.SeqpackError, match=r"index = 0.5 is not an integer"):
        sequences[0.5]
    many = sp.FlatSequences(np.arange(300), np.arange(301))
    assert many[np.uint8(255)].tolist() == [255]


def test_memory_mapped_sequences_travel_by_path(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(50_000, dtype=np.uint16))
    np.save(tmp_path / "offsets.npy", np.arange(0, 50_001, 5))
    tokens, offsets = (np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("tokens", "offsets"))
    sequences = sp.FlatSequences(tokens, offsets)
    data = pickle.dumps(sequences)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again[7].tolist() == [35, 36, 37, 38, 39]
    bins = sp.pack_sequences(again.lengths[:6], 10)
    batch = sp.pack_batch(bins, again, 10, lengths=again.lengths)
    assert sorted(batch.tokens.reshape(-1).tolist()) == list(range(30))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=15), capacity=st.integers(2, 12))
def test_split_sequences_come_back_whole(lengths, capacity):
    sequences = random_sequences(lengths)
    counts, pools = sp.length_histogram_from_lengths(lengths, capacity, over_length="split")
    plan = sp.pack_length_histogram(counts, capacity)
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    bins = epoch[0 : len(epoch)]
    batch = sp.pack_batch(bins, flat(sequences), capacity, lengths=lengths, pieces=pools.pieces)
    found = dict(zip(bins.ids.tolist(), map(list, sp.unpack_batch(batch)), strict=True))
    for index, sequence in enumerate(sequences):
        if pools.pieces is None or lengths[index] <= capacity:
            assert found[index] == sequence.tolist()
        else:
            own = np.flatnonzero(pools.pieces.source_id == index)
            parts = [found[pools.pieces.num_sequences + k] for k in own]
            assert np.concatenate(parts).tolist() == sequence.tolist()


@pytest.mark.parametrize("change", [-1, 1, 5])
def test_a_split_sequence_of_another_length_is_refused(change):
    counts, pools = sp.length_histogram_from_lengths([9, 2], 4, over_length="split")
    epoch = sp.materialize_epoch(sp.pack_length_histogram(counts, 4), pools)
    sequences = random_sequences([9 + change, 2])
    for bin_index in range(len(epoch)):
        bins = epoch[bin_index : bin_index + 1]
        if (bins.ids >= 2).any():
            with pytest.raises(sp.SeqpackError, match=f"{9 + change} tokens, but 9 were planned"):
                sp.pack_batch(bins, sequences, 4, lengths=[9, 2], pieces=pools.pieces)


def test_lengths_of_split_sequences_are_those_of_the_sources():
    _, pools = sp.length_histogram_from_lengths([9, 2], 4, over_length="split")
    bins = sp.Bins(np.array([1]), np.array([0, 1]), 4)
    with pytest.raises(sp.SeqpackError, match="there are 3 lengths, but 2 sequences were split"):
        sp.pack_batch(bins, [], 4, lengths=[9, 2, 4], pieces=pools.pieces)
    far = sp.Bins(np.array([77]), np.array([0, 1]), 4)
    with pytest.raises(sp.SeqpackError, match=r"ids are in \[0, 5\)"):
        sp.pack_batch(far, [], 4, lengths=[9, 2], pieces=pools.pieces)


def test_unpack_takes_items_of_a_pipeline():
    bins = sp.pack_sequences([2, 1], 3)
    batch = sp.pack_batch(bins, [[1, 2], [3]], 3, lengths=[2, 1])
    assert sp.unpack_batch(batch.asdict()).tokens.tolist() == [1, 2, 3]
    row = {name: array[0] for name, array in batch.asdict().items()}
    with pytest.raises(sp.SeqpackError, match=r"not \[B, L\]"):
        sp.unpack_batch(row)


def test_a_batch_is_a_pytree():
    import jax

    batch = sp.pack_batch(sp.pack_sequences([2], 3), [[1, 2]], 3, lengths=[2])
    doubled = jax.tree.map(lambda array: array * 2, batch)
    assert type(doubled) is sp.PackedBatch
    assert doubled.tokens.tolist() == [[2, 4, 0]]
    assert set(batch.asdict()) == {"tokens", "segment_ids", "positions"}
