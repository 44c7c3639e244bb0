"""Sequences in, fixed shapes out, and back; what does not fit the plan is refused."""

import re

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import packings, random_sequences

import seqpack_jax as sp
from seqpack_jax.feeding.batch import fill_rows, validate_batch


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


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, ">u8", np.uint64]
)
def test_integer_dtypes_come_out_as_int32(dtype):
    sequences = random_sequences([3, 2], vocabulary=100)
    batch = sp.pack_batch(
        sp.pack_sequences([3, 2], 5), [s.astype(dtype) for s in sequences], 5, lengths=[3, 2]
    )
    assert batch.tokens.dtype == np.int32
    assert batch.tokens.tolist() == [[*sequences[0].tolist(), *sequences[1].tolist()]]


def test_uint64_goes_with_signed_integers():
    sequences = [np.array([1, 2, 2**31 - 1], np.uint64), np.array([-4, 5])]
    batch = sp.pack_batch(sp.pack_sequences([3, 2], 6), sequences, 6, lengths=[3, 2])
    assert batch.tokens.tolist() == [[1, 2, 2**31 - 1, -4, 5, 0]]


@pytest.mark.parametrize(
    ("sequences", "part"),
    [
        ([[1, 2, 2**31], [4, 5]], "the token 2147483648, beyond int32"),
        ([[1, 2, -(2**31) - 1], [4, 5]], "the token -2147483649, beyond int32"),
        ([np.array([1.0, 2, 3]), [4, 5]], "sequence 0 has shape (3,) and dtype float64"),
        ([[[1, 2, 3]], [4, 5]], "sequence 0 has shape (1, 3)"),
        ([[1, 2, 3], [4, 5, 6]], "sequence 1 has 3 tokens, but 2 were planned (1 of 2"),
        ([[1, 2, 3, 9], [4]], "sequence 0 has 4 tokens, but 3 were planned (2 of 2"),
        (
            [np.array([1, 2, 2**31], np.uint64), np.array([4, 5])],
            "the token 2147483648, beyond int",
        ),
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


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=15), capacity=st.integers(2, 12))
def test_split_sequences_come_back_whole(lengths, capacity):
    sequences = random_sequences(lengths)
    counts, pools = sp.length_histogram_from_lengths(lengths, capacity, over_length="split")
    plan = sp.pack_length_histogram(counts, capacity)
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    bins = epoch[0 : len(epoch)]
    batch = sp.pack_batch(bins, flat(sequences), capacity, lengths=lengths)
    found = dict(zip(bins.ids.tolist(), map(list, sp.unpack_batch(batch)), strict=True))
    for index, sequence in enumerate(sequences):
        if lengths[index] <= capacity:
            assert found[index] == sequence.tolist()
        else:
            own = np.flatnonzero(pools.pieces.source_id == index)
            parts = [found[pools.pieces.first_id + k] for k in own]
            assert np.concatenate(parts).tolist() == sequence.tolist()


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


@pytest.mark.parametrize("name", ["tokens", "segment_ids", "positions"])
def test_a_feature_takes_no_name_of_an_array(name):
    batch = sp.pack_batch(sp.pack_sequences([2], 3), [[1, 2]], 3, lengths=[2])
    weights = np.ones((1, 3))
    assert batch._replace(features={"weights": weights}).asdict()["weights"] is weights
    with pytest.raises(sp.SeqpackError, match=f"asdict: a feature is named '{name}'"):
        batch._replace(features={"weights": weights, name: weights}).asdict()


# --- validate_batch ---------------------------------------------------------------------------


def first_wrong(segment_ids, positions, max_segments, continues):
    """Token by token: `(row, token, what)` of the first thing that is wrong, else None."""

    def wrong_segment(row, token):
        held = segment_ids[row][token]
        if token == 0:
            return held not in (0, 1)
        before = segment_ids[row][token - 1]
        return held not in ((before, before + 1, 0) if before > 0 else (0,))

    def wrong_position(row, token):
        held, segment = positions[row][token], segment_ids[row][token]
        if segment == 0:
            return held != 0
        if token and segment_ids[row][token - 1] == segment:
            return held != positions[row][token - 1] + 1
        return held < 0 if continues else held != 0

    def too_many(row, token):
        return max_segments is not None and segment_ids[row][token] > max_segments

    places = [(row, token) for row, held in enumerate(segment_ids) for token in range(len(held))]
    for what, check in [("segment", wrong_segment), ("most", too_many), ("place", wrong_position)]:
        found = [place for place in places if check(*place)]
        if found:
            return *found[0], what, len({row for row, _ in found}) - 1
    return None


@given(
    packing=packings(max_size=20, max_capacity=16),
    continues=st.booleans(),
    start=st.integers(0, 5) | st.just(2**31 - 20),
    cap=st.none() | st.integers(1, 4),
    data=st.data(),
)
def test_one_changed_entry_is_found_unless_the_batch_stays_valid(
    packing, continues, start, cap, data
):
    lengths, capacity = packing
    sequences = random_sequences(lengths)
    bins = sp.pack_sequences(lengths, capacity, max_segments=cap)
    first = np.full(len(lengths), start) if continues else None
    arrays = [sequences[i] for i in bins.ids]
    batch = fill_rows("test", arrays, bins.offsets, len(bins) + 1, capacity, 0, first)
    options = {"max_segments": cap, "positions": "continue" if continues else "restart"}
    validate_batch(batch, **options)
    assert first_wrong(batch.segment_ids.tolist(), batch.positions.tolist(), cap, continues) is None
    changed = {name: array.copy() for name, array in batch.asdict().items()}
    array = changed[data.draw(st.sampled_from(["tokens", "segment_ids", "positions"]))]
    row = data.draw(st.integers(0, len(array) - 1))
    token = data.draw(st.integers(0, capacity - 1))
    near = st.integers(int(array[row, token]) - 2, int(array[row, token]) + 2)
    ends = st.sampled_from([-(2**31), -1, 0, 1, 2**31 - 1])
    array[row, token] = data.draw(near | ends)
    lists = changed["segment_ids"].tolist(), changed["positions"].tolist()
    wrong = first_wrong(*lists, cap, continues)
    if wrong is None:
        validate_batch(changed, **options)
        return
    with pytest.raises(sp.SeqpackError, match="Hint") as caught:
        validate_batch(changed, **options)
    row, token, what, more = wrong
    held = lists[what == "place"][row][token]
    kind = "position" if what == "place" else "segment id"
    message = str(caught.value)
    assert f"row {row}, token {token}: {kind} {held}, expected " in message
    assert ("expected at most" in message) == (what == "most")
    assert f"({more} more row" in message


def rows(segment_ids, positions, tokens=None):
    arrays = [np.array(array, np.int32) for array in (segment_ids, positions)]
    tokens = np.zeros_like(arrays[0]) if tokens is None else tokens
    return {"tokens": tokens, "segment_ids": arrays[0], "positions": arrays[1]}


@pytest.mark.parametrize(
    ("segment_ids", "positions", "options", "part"),
    [
        ([[2, 2]], [[0, 1]], {}, "row 0, token 0: segment id 2, expected 0 or 1 (0 more rows are"),
        ([[1, 3]], [[0, 0]], {}, "row 0, token 1: segment id 3, expected 1, 2 or 0"),
        ([[1, 2, 1]], [[0, 0, 0]], {}, "row 0, token 2: segment id 1, expected 2, 3 or 0"),
        ([[1], [0], [1]], [[0], [3], [4]], {}, "row 1, token 0: position 3, expected 0 (1 more ro"),
        ([[0, 1]] * 3, [[0, 0]] * 3, {}, "token 1: segment id 1, expected 0 (2 more rows are wro"),
        ([[-1, 0]], [[0, 0]], {}, "row 0, token 0: segment id -1, expected 0 or 1"),
        ([[1, 2]], [[0, 0]], {"max_segments": 1}, "token 1: segment id 2, expected at most 1"),
        ([[1, 1, 2]], [[0, 1, 2]], {}, "row 0, token 2: position 2, expected 0"),
        ([[1, 1]], [[7, 9]], {"positions": "continue"}, "token 1: position 9, expected 8"),
        ([[1, 1]], [[-1, 0]], {"positions": "continue"}, "position -1, expected at least 0"),
        ([[1, 0]], [[4, 5]], {"positions": "continue"}, "token 1: position 5, expected 0"),
        ([[1, 1]], [[2**31 - 1, -(2**31)]], {"positions": "continue"}, "expected 2147483648"),
    ],
)
def test_what_breaks_the_conventions_is_named(segment_ids, positions, options, part):
    with pytest.raises(sp.SeqpackError, match=re.escape(part)):
        validate_batch(rows(segment_ids, positions), **options)


def test_arrays_of_a_wrong_form_are_refused():
    good = rows([[1, 1, 0]], [[0, 1, 0]])
    validate_batch(good)
    validate_batch(sp.PackedBatch(*good.values(), {}))
    validate_batch(good | {"weights": np.zeros(7)}, max_segments=1)
    validate_batch(rows(np.zeros((0, 3)), np.zeros((0, 3))))
    validate_batch(rows(np.zeros((2, 0)), np.zeros((2, 0))))
    for change, part in [
        ({"segment_ids": np.ones((1, 4), np.int32)}, "segment_ids has shape (1, 4), tokens (1, 3)"),
        ({"positions": good["positions"][0]}, "positions has shape (3,), tokens (1, 3)"),
        ({"tokens": good["tokens"].astype(np.int64)}, "tokens has dtype int64, expected int32"),
        ({"segment_ids": good["segment_ids"].astype(bool)}, "segment_ids has dtype bool"),
    ]:
        with pytest.raises(sp.SeqpackError, match=re.escape(part)):
            validate_batch(good | change)
    row = {name: array[0] for name, array in good.items()}
    with pytest.raises(sp.SeqpackError, match=r"tokens has shape \(3,\).*add an axis"):
        validate_batch(row)
    del row["positions"]
    with pytest.raises(sp.SeqpackError, match="batch has no positions"):
        validate_batch({name: array[None] for name, array in row.items()})
    with pytest.raises(sp.SeqpackError, match="batch is a list"):
        validate_batch([1])
    for options, part in [
        ({"positions": "any"}, "choose one of restart, continue"),
        ({"max_segments": 0}, "max_segments = 0"),
    ]:
        with pytest.raises(sp.SeqpackError, match=part):
            validate_batch(good, **options)


def test_batches_on_a_device_are_validated_too():
    import jax

    good = rows([[1, 2, 0]], [[0, 0, 0]])
    validate_batch(jax.tree.map(jax.numpy.asarray, good))
    with pytest.raises(sp.SeqpackError, match="position 1, expected 0"):
        validate_batch(jax.tree.map(jax.numpy.asarray, rows([[1, 2, 0]], [[0, 1, 0]])))
