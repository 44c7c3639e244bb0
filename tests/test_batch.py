"""Sequences in, fixed shapes out, and back; what does not fit the plan is refused."""

import re

import model_reference
import numpy as np
import pytest
import reference
from attention_reference import HARD_ROWS
from hypothesis import given
from hypothesis import strategies as st
from strategies import over_length_packings, packings, random_sequences

import seqpack_jax as sp
from seqpack_jax.feeding.batch import unpack_by_id, validate_batch
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.key_styles import KEY_STYLES


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
    with pytest.raises(sp.SeqpackError, match="sequence 2 is missing"):
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


# --- records ----------------------------------------------------------------------------------


def records_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(1, 1000, length),
            "mask": rng.integers(0, 2, length) > 0,
            "vectors": rng.random((length, 2), np.float32),
            "score": 0.5 * index,
            "image": rng.integers(0, 255, (2, 2), np.uint8),
        }
        for index, length in enumerate(lengths)
    ]


@given(
    packing=over_length_packings(max_size=12, max_capacity=12),
    multiple_of=st.sampled_from([1, 2, 3]),
    by_id=st.booleans(),
)
def test_records_come_back_whole_or_as_the_policy_cuts_them(packing, multiple_of, by_id):
    lengths, capacity, policy = packing
    capacity = -(-capacity // multiple_of) * multiple_of
    bins = sp.pack_sequences(lengths, capacity, tolerance=multiple_of, over_length=policy, seed=3)
    records = records_of(lengths)
    width = max([len(held) for held in bins], default=1)
    batch = sp.pack_batch(
        bins,
        dict(enumerate(records)) if by_id else records,
        capacity,
        lengths=lengths,
        rows=len(bins) + 1,
        multiple_of=multiple_of,
        max_segments=width,
        meta_features=["image"],
        metadata=True,
        pad_value={"tokens": -1, "vectors": 0.5},
    )
    alone = sp.pack_batch(
        bins,
        [record["tokens"] for record in records],
        capacity,
        lengths=lengths,
        rows=len(bins) + 1,
        multiple_of=multiple_of,
        pad_value=-1,
    )
    for array, expected in zip(batch[:3], alone[:3], strict=True):
        np.testing.assert_array_equal(array, expected)
    continues = policy.positions if policy.action == "split" else "restart"
    validate_batch(batch, max_segments=width, positions=continues, multiple_of=multiple_of)
    if not len(bins):
        metadata = ["ids", "row_valid", "segment_lengths"]  # and, known by sequence 0, the others
        others = ["image", "mask", "score", "vectors"] if records else []
        assert sorted(batch.features) == sorted(metadata + others)
        return
    named = batch.asdict()
    padding = batch.segment_ids == 0
    assert (batch.tokens[padding] == -1).all()
    assert (batch.features["vectors"][padding] == 0.5).all()
    assert not batch.features["mask"][padding].any()
    kept = {name: unpack_by_id(named, name) for name in ("tokens", "mask", "vectors")}
    once = {name: unpack_by_id(named, name, once=True) for name in ("score", "image")}
    assert sorted(kept["tokens"]) == sorted(bins.ids.tolist())
    for index, tokens in kept["tokens"].items():
        source, start = index, 0
        if bins.pieces is not None and index >= bins.pieces.first_id:
            source, start = bins.pieces.table[index - bins.pieces.first_id][:2].tolist()
        elif len(tokens) < lengths[index]:
            whole = records[index]["tokens"].tolist()
            starts = range(lengths[index] - len(tokens) + 1)
            matches = [k for k in starts if whole[k : k + len(tokens)] == tokens.tolist()]
            if policy.action == "truncate":
                assert 0 in matches
            elif policy.action == "truncate_left":
                assert starts[-1] in matches
            vectors = records[index]["vectors"]
            found = kept["vectors"][index].tolist()
            start = next(k for k in matches if vectors[k : k + len(tokens)].tolist() == found)
        stop = start + len(tokens)
        for name in kept:
            expected = records[source][name][start:stop]
            assert kept[name][index].tolist() == expected.tolist()
        assert once["score"][index] == records[source]["score"]
        assert once["image"][index].tolist() == records[source]["image"].tolist()
    lengths_of = unpack_by_id(named, "segment_lengths", once=True)
    assert lengths_of == {index: len(tokens) for index, tokens in kept["tokens"].items()}


def test_nested_records_have_nested_features():
    bins = sp.pack_sequences([2, 1], 4)
    records = [
        {"x": {"ids": [1, 2], "y": ([0.5, 1.5], [True, False])}},
        {"x": {"ids": [3], "y": ([2.5], [True])}},
    ]
    batch = sp.pack_batch(bins, records, 4, lengths=[2, 1], feature="x/ids")
    assert batch.tokens.tolist() == [[1, 2, 3, 0]]
    named = batch.asdict()
    assert sorted(named) == ["positions", "segment_ids", "tokens", "x"]
    assert named["x"]["y"]["0"].tolist() == [[0.5, 1.5, 2.5, 0]]
    assert [array.tolist() for array in sp.unpack_batch(named, "x/y/1")] == [[True, False], [True]]
    assert list(batch.asdict("grain")["x"]["y"]) == [
        f"{name}{end}" for name in "01" for end in ("", "_segment_ids", "_positions")
    ]


def test_bad_records_are_refused():
    bins = sp.pack_sequences([2, 1], 4)
    good = [{"tokens": [1, 2]}, {"tokens": [3]}]
    for records, options, part in [
        ([good[0], {"tokens": [3], "x": [1]}], {}, "sequence 1 has a feature 'x', sequence 0 has"),
        ([good[0], [3, 4]], {}, "sequence 1 has 2 tokens, but 1 were planned"),
        (good[:1], {}, "sequence 1 is missing (IndexError"),
        ([good[0], {"text": [3]}], {}, "sequence 1 has no feature 'tokens'"),
        ([good[0], {"tokens": [3], "x": [1, 2]}], {}, "feature 'x' of sequence 1 has 2 entries"),
        (good, {"metadata": True}, "metadata without max_segments"),
        (good, {"max_segments": 1}, "bin 0 holds 2 segments of 1"),
        (good, {"multiple_of": 3}, "max_seq_len = 4 of 'tokens' is no multiple of 3"),
        (good, {"multiple_of": 4}, "bin 0 holds 8 tokens of 4"),
    ]:
        with pytest.raises(sp.SeqpackError, match=f"^pack_batch: {re.escape(part)}.*Hint: "):
            sp.pack_batch(bins, records, 4, lengths=[2, 1], **options)


@pytest.mark.parametrize("style", KEY_STYLES)
def test_a_packed_batch_has_the_key_styles_too(style):
    lengths = [5, 3, 2, 6, 1]
    records = [
        {name: record[name] for name in ("tokens", "mask", "vectors", "score")}
        for record in records_of(lengths)
    ]
    bins = sp.pack_sequences(lengths, 8)
    options = {"max_segments": 3, "metadata": True}
    batch = sp.pack_batch(bins, records, 8, lengths=lengths, **options)
    features = make_features("test", 8, key_style=style, **options)
    read = [features.read("test", "record", records[i]) for i in bins.ids]
    expected = features.pack(
        "test", features.columns("test", read), bins.offsets, len(bins), ids=bins.ids
    )
    found = batch.asdict(style)
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_an_unknown_style_is_refused():
    batch = sp.pack_batch(sp.pack_sequences([2], 3), [[1, 2]], 3, lengths=[2])
    with pytest.raises(sp.SeqpackError, match=r"^PackedBatch\.asdict: key_style = 'flax' is not"):
        batch.asdict("flax")


# --- results ----------------------------------------------------------------------------------


@given(packing=packings(max_size=20, max_capacity=16), size=st.integers(1, 3))
def test_results_come_back_in_input_order(packing, size):
    lengths, capacity = packing
    sequences = random_sequences(lengths)
    bins = sp.pack_sequences(lengths, capacity)
    found, totals = {}, {}
    for start in range(0, len(bins), size):
        batch = sp.pack_batch(
            bins[start : start + size],
            sequences,
            capacity,
            lengths=lengths,
            rows=size,
            max_segments=len(lengths),
            metadata=True,
        )
        found |= unpack_by_id(batch, values=batch.tokens * 0.5)  # a number per token
        sums = np.zeros((size, len(lengths)))
        for row, segment_ids in enumerate(batch.segment_ids):
            for segment in range(1, segment_ids.max() + 1):
                sums[row, segment - 1] = batch.tokens[row][segment_ids == segment].sum()
        totals |= unpack_by_id(batch, values=sums, once=True)  # a number per sequence
        assert list(unpack_by_id(batch)) == [i for held in bins[start : start + size] for i in held]
    assert [totals[i] for i in sorted(totals)] == [tokens.sum() for tokens in sequences]
    assert len(found) == len(sequences)
    for i, tokens in enumerate(sequences):
        assert found[i].tolist() == (tokens * 0.5).tolist()


def test_what_cannot_be_unpacked_is_refused():
    batch = sp.pack_batch(
        sp.pack_sequences([2, 1], 4),
        [[1, 2], [3]],
        4,
        lengths=[2, 1],
        metadata=True,
        max_segments=2,
    ).asdict()
    assert [found.tolist() for found in sp.unpack_batch(batch, "positions")] == [[0, 1], [0]]
    deep = np.arange(8).reshape(1, 4, 2)
    assert [array.tolist() for array in sp.unpack_batch(batch, values=deep)] == [
        [[0, 1], [2, 3]],
        [[4, 5]],
    ]
    for change, arguments, part in [
        ({}, {"feature": "labels"}, "unpack_by_id: the batch has no 'labels'. Hint: name one of"),
        ({}, {"values": np.zeros((1, 3))}, "values are (1, 3), segment_ids (1, 4), not [B, L]"),
        ({}, {"values": np.zeros((1, 3)), "once": True}, "values are (1, 3), ids (1, 2)"),
        ({"ids": np.array([[0, -1]])}, {}, "the batch has 2 segments and 1 ids"),
        ({"ids": np.array([[5, 5]])}, {}, "the id 5 is in the batch twice"),
    ]:
        with pytest.raises(sp.SeqpackError, match=f"{re.escape(part)}.*Hint: |{re.escape(part)}"):
            unpack_by_id(batch | change, **arguments)
    del batch["ids"]
    with pytest.raises(sp.SeqpackError, match=r"^unpack_by_id: the batch has no ids\. Hint: pack"):
        unpack_by_id(batch)
    with pytest.raises(sp.SeqpackError, match="the batch has no 'segment_ids'"):
        sp.unpack_batch({"tokens": np.zeros((1, 2))})
    with pytest.raises(sp.SeqpackError, match=r"tokens are \(1, 4, 2\), not \[B, L\]"):
        sp.unpack_batch(batch | {"tokens": deep})


def test_results_on_a_device_come_back():
    import jax

    batch = sp.pack_batch(
        sp.pack_sequences([2, 1], 4),
        [[1, 2], [3]],
        4,
        lengths=[2, 1],
        metadata=True,
        max_segments=2,
    )
    values = jax.numpy.asarray(batch.tokens) * 2
    found = unpack_by_id(batch, values=values)
    assert {i: array.tolist() for i, array in found.items()} == {0: [2, 4], 1: [6]}


# --- validate_batch ---------------------------------------------------------------------------


def first_wrong(segment_ids, positions, max_segments, continues, multiple_of=1, gaps=False):
    """Token by token: `(row, token, what)` of the first thing that is wrong, else None."""

    def wrong_segment(row, token):
        held = segment_ids[row][token]
        if token == 0:
            return held not in (0, 1)
        if gaps:
            so_far = max(0, *segment_ids[row][:token])
            goes_on = held == segment_ids[row][token - 1]
            starts = held == so_far + 1 and token % multiple_of == 0
            return held != 0 and not goes_on and not starts
        before = segment_ids[row][token - 1]
        if held == 0 or (held == before and before > 0):
            return False
        if multiple_of > 1:  # there may be padding in between
            before = max(0, *segment_ids[row][:token])
        return before <= 0 or held != before + 1 or token % multiple_of > 0

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
    multiple_of=st.sampled_from([1, 1, 2, 3]),
    gaps=st.booleans(),
    data=st.data(),
)
def test_one_changed_entry_is_found_unless_the_batch_stays_valid(
    packing, continues, start, cap, multiple_of, gaps, data
):
    lengths, capacity = packing
    capacity = -(-capacity // multiple_of) * multiple_of
    sequences = random_sequences(lengths)
    bins = sp.pack_sequences(lengths, capacity, max_segments=cap, tolerance=multiple_of)
    first = np.full(len(lengths), start) if continues else None
    columns = {"tokens": [sequences[i] for i in bins.ids]}
    features = make_features("test", capacity, multiple_of=multiple_of)
    batch = features.pack("test", columns, bins.offsets, len(bins) + 1, first_positions=first)
    options = {
        "max_segments": cap,
        "positions": "continue" if continues else "restart",
        "multiple_of": multiple_of,
        "gaps": gaps,
    }
    validate_batch(batch, **options)
    limits = cap, continues, multiple_of, gaps
    lists = batch["segment_ids"].tolist(), batch["positions"].tolist()
    assert first_wrong(*lists, *limits) is None
    changed = {name: array.copy() for name, array in batch.items()}
    array = changed[data.draw(st.sampled_from(["tokens", "segment_ids", "positions"]))]
    row = data.draw(st.integers(0, len(array) - 1))
    token = data.draw(st.integers(0, capacity - 1))
    near = st.integers(int(array[row, token]) - 2, int(array[row, token]) + 2)
    ends = st.sampled_from([-(2**31), -1, 0, 1, 2**31 - 1])
    array[row, token] = data.draw(near | ends)
    lists = changed["segment_ids"].tolist(), changed["positions"].tolist()
    wrong = first_wrong(*lists, *limits)
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
        ([[1, 0, 2, 0]], [[0] * 4], {}, "token 2: segment id 2, expected 0 (0"),
        ([[1, 2, 0, 0]], [[0] * 4], {"multiple_of": 2}, "token 1: segment id 2, expected 1 or 0"),
        ([[1, 0, 3, 0]], [[0] * 4], {"multiple_of": 2}, "token 2: segment id 3, expected 0 or 2"),
        ([[1, 0, 0, 2]], [[0] * 4], {"multiple_of": 2}, "token 3: segment id 2, expected 0 (0"),
        ([[0, 0, 1, 0]], [[0] * 4], {"multiple_of": 2}, "token 2: segment id 1, expected 0 (0"),
        ([[0, 0, 2]], [[0] * 3], {"gaps": True}, "token 2: segment id 2, expected 0 or 1"),
        ([[1, 0, 1]], [[0] * 3], {"gaps": True}, "token 2: segment id 1, expected 0 or 2"),
        ([[1, 2, 1]], [[0] * 3], {"gaps": True}, "token 2: segment id 1, expected 2, 3 or 0"),
        ([[1, 0, 2, 0]], [[0, 1, 0, 0]], {"multiple_of": 2}, "token 1: position 1, expected 0"),
    ],
)
def test_what_breaks_the_conventions_is_named(segment_ids, positions, options, part):
    with pytest.raises(sp.SeqpackError, match=re.escape(part)):
        validate_batch(rows(segment_ids, positions), **options)


def test_rows_for_the_device_half_have_padding_anywhere():
    positions = [model_reference.positions(row) for row in HARD_ROWS]
    validate_batch(rows(HARD_ROWS, positions), gaps=True, max_segments=16)
    ahead = rows([[0, 1, 1, 0, 2]], [[0, 0, 1, 0, 0]])
    validate_batch(ahead, gaps=True)
    with pytest.raises(sp.SeqpackError, match=r"token 1: segment id 1, expected 0 .*gaps=True"):
        validate_batch(ahead)


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
        ({"multiple_of": 0}, "multiple_of = 0"),
    ]:
        with pytest.raises(sp.SeqpackError, match=part):
            validate_batch(good, **options)


def test_batches_on_a_device_are_validated_too():
    import jax

    good = rows([[1, 2, 0]], [[0, 0, 0]])
    validate_batch(jax.tree.map(jax.numpy.asarray, good))
    with pytest.raises(sp.SeqpackError, match="position 1, expected 0"):
        validate_batch(jax.tree.map(jax.numpy.asarray, rows([[1, 2, 0]], [[0, 1, 0]])))


def in_grain_style(records, max_seq_len=8, style="grain"):
    features = make_features("t", max_seq_len, max_segments=3, metadata=True, key_style=style)
    columns = features.columns("t", [features.read("t", "r", record) for record in records])
    ids = np.arange(len(records)) + 5
    return features.pack("t", columns, np.array([0, len(records)]), 1, ids=ids)


def test_batches_in_the_grain_style_are_unpacked():
    # Features may be called as ids of others are.
    batch = in_grain_style(
        [
            {"tokens": [1, 2], "x": [0.5, 1.5], "my_segment_ids": [7, 9]},
            {"tokens": [3], "x": [2.5], "my_segment_ids": [4]},
        ]
    )
    assert [tokens.tolist() for tokens in sp.unpack_batch(batch)] == [[1, 2], [3]]
    assert [x.tolist() for x in sp.unpack_batch(batch, "x")] == [[0.5, 1.5], [2.5]]
    assert [x.tolist() for x in sp.unpack_batch(batch, values=batch["x"] * 2)] == [[1, 3], [5]]
    assert [x.tolist() for x in sp.unpack_batch(batch, "my_segment_ids")] == [[7, 9], [4]]
    assert {k: v.tolist() for k, v in unpack_by_id(batch).items()} == {5: [1, 2], 6: [3]}
    batch = in_grain_style(
        [{"x": [1, 2], "x_segment_ids": [7, 9], "tokens": [5, 6]}], style="default"
    )
    assert [x.tolist() for x in sp.unpack_batch(batch, "x")] == [[1, 2]]
    batch = in_grain_style(
        [{"tokens": [1], "b": []}, {"tokens": [], "b": [2]}], {"tokens": 2, "b": 2}
    )
    assert [tokens.tolist() for tokens in sp.unpack_batch(batch)] == [[1], []]
    assert {k: v.tolist() for k, v in unpack_by_id(batch, "b").items()} == {5: [], 6: [2]}


@pytest.mark.parametrize("style", ["maxtext", "t5x", "levanter", "hf"])
@pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3]])
def test_batches_in_other_styles_are_not_unpacked_wrongly(style, tokens):
    batch = in_grain_style([{"tokens": tokens, "x": tokens}], 3, style)
    for arguments in ({}, {"feature": "x"}, {"values": batch["x"]}):
        with pytest.raises(sp.SeqpackError, match=r"^unpack_batch: .*in the key style 'default'"):
            sp.unpack_batch(batch, **arguments)


def test_what_is_nothing_to_unpack_is_named():
    batch = in_grain_style([{"tokens": [1, 2, 3]}], 3)  # [B, L] is [B, max_segments]
    with pytest.raises(sp.SeqpackError, match=r"^unpack_by_id: once=True of the tokens\. Hint: "):
        unpack_by_id(batch, once=True)
    for function in (sp.unpack_batch, unpack_by_id, validate_batch):
        with pytest.raises(sp.SeqpackError, match=f"^{function.__name__}: batch is a list. Hint: "):
            function([1, 2])


def test_a_batch_without_bins_has_the_features_of_the_others():
    records = [{"tokens": [1, 2], "mask": [True, False], "score": np.float32(0.5)}]
    bins, options = sp.pack_sequences([2], 4), {"lengths": [2], "rows": 2, "max_segments": 3}
    full = sp.pack_batch(bins, records, 4, **options).asdict()
    empty = sp.pack_batch(bins[:0], records, 4, **options).asdict()
    assert list(full) == list(empty)
    for name, array in empty.items():
        assert (array.dtype, array.shape) == (full[name].dtype, full[name].shape)
        assert not array.any()
    assert sp.pack_batch(sp.pack_sequences([], 4), [], 4, lengths=[], rows=2).features == {}


def test_masked_tokens_are_refused():
    bins = sp.pack_sequences([2], 4)
    masked = np.ma.array([1, 2], mask=[False, True], dtype=np.int32)
    with pytest.raises(sp.SeqpackError, match=r"^pack_batch: .*masked entries"):
        sp.pack_batch(bins, [masked], 4, lengths=[2])
