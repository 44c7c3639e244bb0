"""Where segments lie in rows, against a version that goes token by token."""

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seqpack_jax as sp
from seqpack_jax.arrays import offsets_of
from seqpack_jax.feeding.layout import (
    as_numbers,
    check_pads,
    checked_int32,
    entries_of,
    fill_once,
    flatten_into,
    lay_out,
    round_up,
)


def rows_of(bins, rows, capacity, multiple_of, pad):
    """Token by token: lists `[rows, capacity]` of values, segment ids and positions."""
    found = [], [], []
    for segments in [*bins, *[[]] * (rows - len(bins))]:
        row = [], [], []
        for number, (values, first) in enumerate(segments, 1):
            while len(row[0]) % multiple_of:
                for array, padding in zip(row, (pad, 0, 0), strict=True):
                    array.append(padding)
            for k, value in enumerate(values):
                for array, entry in zip(row, (value, number, first + k), strict=True):
                    array.append(entry)
        for array, padding in zip(row, (pad, 0, 0), strict=True):
            array += [padding] * (capacity - len(array))
        for array, each in zip(found, row, strict=True):
            array.append(each)
    return found


@st.composite
def bins_of_lengths(draw, capacity, multiple_of, min_length=1):
    """Lengths of the segments of some bins, each of which fits into a row."""
    bins = []
    for _ in range(draw(st.integers(0, 4))):
        bins.append([])
        room = capacity
        for length in draw(st.lists(st.integers(min_length, capacity), max_size=5)):
            if round_up(length, multiple_of) <= room:
                bins[-1].append(length)
                room -= round_up(length, multiple_of)
    return bins


@given(
    data=st.data(),
    multiple_of=st.sampled_from([1, 1, 2, 3, 4, 8]),
    units=st.integers(1, 6),
    extra=st.integers(0, 2),
    kind=st.sampled_from(["int32", "int64", "float32", "bool", "uint16"]),
    pad=st.integers(0, 1),
    continues=st.booleans(),
)
def test_rows_equal_the_token_by_token_version(
    data, multiple_of, units, extra, kind, pad, continues
):
    capacity = multiple_of * units
    lengths = data.draw(bins_of_lengths(capacity, multiple_of, min_length=0))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = [rng.integers(0, 2, n).astype(kind) for held in lengths for n in held]
    firsts = [int(rng.integers(0, 9)) if continues else 0 for _ in arrays]
    segments = iter(zip((array.tolist() for array in arrays), firsts, strict=True))
    expected = rows_of(
        [[next(segments) for _ in held] for held in lengths],
        len(lengths) + extra,
        capacity,
        multiple_of,
        pad,
    )
    layout = lay_out(
        "test",
        np.array([len(array) for array in arrays], np.int64),
        offsets_of([len(held) for held in lengths]),
        len(lengths) + extra,
        capacity,
        multiple_of=multiple_of,
        first_positions=np.array(firsts, np.int64) if continues else None,
    )
    like = np.zeros(0, kind)
    filled = layout.fill("test", "x", arrays, pad, as_int32=False, like=like)
    assert filled.dtype == np.dtype(kind)
    for array, rows in zip((filled, layout.segment_ids, layout.positions), expected, strict=True):
        assert array.shape == (len(lengths) + extra, capacity)
        assert array.tolist() == rows
    assert layout.segment_ids.dtype == layout.positions.dtype == np.int32
    # The last axes of [tokens, d] are carried along.
    deep = layout.fill(
        "test",
        "x",
        [np.stack([array, np.zeros_like(array)], axis=-1) for array in arrays],
        pad,
        as_int32=True,
        like=np.zeros((0, 2), kind),
    )
    real = layout.segment_ids > 0
    assert (deep[..., 0] == filled).all()
    assert (deep[real][:, 1] == 0).all()
    assert (deep[~real] == pad).all()
    assert deep.dtype == (np.int32 if np.dtype(kind).kind in "iu" else np.dtype(kind))


@given(data=st.data(), multiple_of=st.sampled_from([2, 4]))
def test_the_device_half_reads_rows_with_gaps(data, multiple_of):
    from seqpack_jax.model import segments

    capacity = multiple_of * 4
    lengths = data.draw(bins_of_lengths(capacity, multiple_of))
    flat = [length for held in lengths for length in held]
    rows = 4  # a few shapes only: each is compiled
    layout = lay_out(
        "test",
        np.array(flat, np.int64),
        offsets_of([len(held) for held in lengths]),
        rows,
        capacity,
        multiple_of=multiple_of,
    )
    ids = layout.segment_ids
    assert segments.positions_from_segment_ids(ids).tolist() == layout.positions.tolist()
    offsets = segments.build_packing_cu_seqlens(ids, max_segments=4)
    ends = np.cumsum(flat, dtype=int).tolist()
    assert offsets.cu_seqlens.tolist() == [0, *ends, *[sum(flat)] * (rows * 4 - len(flat))]
    mask = np.asarray(segments.segment_mask(ids, causal=False))[:, 0]
    real = ids > 0
    assert not (mask & real[:, :, None] & ~real[:, None, :]).any()
    assert (mask == (ids[:, :, None] == ids[:, None, :])).all()


def layout_of(*lengths, capacity=4):
    return lay_out("test", np.array(lengths), np.array([0, len(lengths)]), 1, capacity)


def refuses(part):
    return pytest.raises(sp.SeqpackError, match=re.escape(part) + ".*Hint: ")


def test_what_does_not_fit_is_refused():
    with refuses("test: bin 0 holds 5 tokens of 4"):
        layout_of(3, 2)
    with refuses("bin 1 holds 6 tokens of 4"):
        lay_out("test", np.array([1, 3, 2]), np.array([0, 1, 3]), 3, 4, multiple_of=2)
    layout = layout_of(2, 1)
    ones, two = np.ones(2), np.ones(1)
    with refuses("the arrays of feature 'x' have other lengths than their segments"):
        layout.fill("test", "x", [two, ones], 0, as_int32=False)
    with refuses(
        "feature 'x' has dtype float64 in one record, float32 in another (segments 0 and 1 of the"
    ):
        layout.fill("test", "x", [ones, two.astype(np.float32)], 0, as_int32=False)
    with refuses("feature 'x' has dtype bool in one record, int64 in another"):
        layout.fill("test", "x", [ones > 0, np.ones(1, int)], 0, as_int32=True)
    with refuses("feature 'x' has dtype int64 in one record, float64 in another"):
        layout.fill("test", "x", [np.ones(2, int), two], 0, as_int32=True)
    with refuses("feature 'x' has shape [3] per token in one record, [2] in another (segments 0"):
        layout.fill("test", "x", [np.ones((2, 3)), np.ones((1, 2))], 0, as_int32=False)
    with refuses("feature 'x' has shape [] per token in one record, [1] in another"):
        layout.fill("test", "x", [ones, np.ones((1, 1))], 0, as_int32=False)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_integers_beyond_int32_are_refused(value):
    layout = layout_of(2, 1)
    arrays = [np.array([1, value]), np.array([3])]
    with refuses(f"a batch holds the token {value}, beyond int32"):
        layout.fill("test", "tokens", arrays, 0, as_int32=True)
    with refuses(f"a batch holds the value {value} of feature 'x', beyond int32"):
        layout.fill("test", "x", arrays, 0, as_int32=True)
    assert layout.fill("test", "x", arrays, 0, as_int32=False).dtype == np.int64
    most = np.array([2**31 - 1, -(2**31)])
    assert checked_int32("test", "x", most).tolist() == most.tolist()
    with refuses("value 18446744073709551615 of feature 'x'"):
        mixed = [np.array([1, 2**64 - 1], np.uint64), np.array([-3])]
        layout.fill("test", "x", mixed, 0, as_int32=True)


@pytest.mark.parametrize(
    ("pad", "dtype", "fits"),
    [
        (-1, np.int8, True),
        (-1, np.uint8, False),
        (256, np.uint8, False),
        (2**31, np.int32, False),
        (1.5, np.int32, False),
        (2.0, np.int32, True),
        (float("nan"), np.int32, False),
        (float("nan"), np.float32, True),
        (float("inf"), np.float16, True),
        (1e6, np.float16, False),
        (0.1, np.float32, True),
        (True, np.bool_, True),
        (2, np.bool_, False),
        (-1, ml_dtypes.bfloat16, True),
    ],
)
def test_pad_values_are_of_the_dtype(pad, dtype, fits):
    layout, array = layout_of(1, capacity=2), np.ones(1, dtype)
    if not fits:
        with refuses(f"pad_value {pad!r} of feature 'x' is no {np.dtype(dtype)}"):
            layout.fill("test", "x", [array], pad, as_int32=False)
        return
    filled = layout.fill("test", "x", [array], pad, as_int32=False)
    assert filled.dtype == dtype
    np.testing.assert_array_equal(filled[0, 1:], np.array([pad], dtype))


def test_once_per_sequence():
    values = [np.array([1.5, 2]), np.array([3.0, 4]), np.array([5.0, 6])]
    found = fill_once("test", "x", values, np.array([2, 0, 1]), (4, 2))
    expected = [[[1.5, 2], [3, 4]], [[0, 0]] * 2, [[5, 6], [0, 0]], [[0, 0]] * 2]
    assert found.tolist() == expected
    assert fill_once("test", "x", [], np.zeros(0, int), (1, 2), like=values[0] > 0).tolist() == [
        [[False, False]] * 2
    ]
    with refuses("feature 'x' is float64 [2] in one record, float64 [3] in another (segments 0"):
        fill_once("test", "x", [values[0], np.ones(3)], np.array([2]), (1, 2))
    with refuses("feature 'x' is float64 [2] in one record, float32 [2] in another"):
        fill_once("test", "x", [values[0], np.ones(2, np.float32)], np.array([2]), (1, 2))


class Pair(NamedTuple):
    left: object
    right: object


def test_records_are_flattened():
    flat = {}
    record = {
        "a": [1, 2],
        "b": {"c": 1.5, "d": Pair(np.ones(2, np.int8), (np.zeros(1), True))},
        "e": (4, 5, 6),  # integers in a tuple are an array
        "f": (),
    }
    flatten_into(flat, "test", "record 0", record)
    assert {name: array.tolist() for name, array in flat.items()} == {
        "a": [1, 2],
        "b/c": 1.5,
        "b/d/left": [1, 1],
        "b/d/right/0": [0.0],
        "b/d/right/1": True,
        "e": [4, 5, 6],
        "f": [],
    }
    for name in ("a/b", 3, None):
        for entries in ({name: [1]}, {"x": {name: [1]}}):
            with refuses(f"record 0 has a feature named {name!r}"):
                flatten_into({}, "test", "record 0", entries)


def test_only_numbers_are_packed():
    assert as_numbers("test", "x", np.ones(2, ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
    unmasked = np.ma.masked_array([1, 2])
    assert as_numbers("test", "x", unmasked).tolist() == [1, 2]
    for value, dtype in [("cat", "<U3"), (["a"], "<U1"), (b"a", "|S1"), (None, "object")]:
        with refuses(f"x has dtype {dtype}, which is not of numbers"):
            as_numbers("test", "x", value)
    for value in (np.zeros(2, "V3"), np.zeros(1, [("a", int)]), np.zeros(1, "M8[s]")):
        with refuses(f"x has dtype {value.dtype}, which is not of numbers"):
            as_numbers("test", "x", value)
    with refuses("x is no array"):
        as_numbers("test", "x", [[1], [2, 3]])
    with refuses("x has masked entries"):
        as_numbers("test", "x", np.ma.masked_array([1, 2], [False, True]))


def test_pad_values_by_feature():
    assert check_pads("test", 7, ("a", "b"), False) == {"a": 7, "b": 7}
    assert check_pads("test", {"b": np.float32(0.5), "a": 0}, ("a",), False) == {"b": 0.5}
    assert list(check_pads("test", {"b": 1, "a": True}, (), False).items()) == [("a", 1), ("b", 1)]
    with refuses("pad_value['a'] = 0.5 is not an integer"):
        check_pads("test", {"a": 0.5}, ("a",), True)
    with refuses("pad_value = 2147483648, but it must be in"):
        check_pads("test", 2**31, ("a",), True)
    with refuses("pad_value['b'] = None is not a number"):
        check_pads("test", {"b": None}, ("a",), True)


def fill(arrays, *, as_int32=False, like=None, pad=0):
    lengths = np.array([np.size(array) and len(array) for array in arrays], np.int64)
    layout = lay_out("test", lengths, np.array([0, len(lengths)]), 1, 4)
    return layout.fill("test", "x", arrays, pad, as_int32=as_int32, like=like)


def test_arrays_without_tokens_have_no_dtype_or_shape():
    nothing = np.array([])
    pairs = np.array([[1, 2]], np.int8)
    for arrays in ([nothing, pairs], [pairs, nothing, np.zeros((0, 7), np.uint64)]):
        found = fill(arrays)
        assert (found.dtype, found.shape) == (np.int8, (1, 4, 2))
        assert found[0].tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]
    found = fill([nothing, np.array([7])], as_int32=True)
    assert (found.dtype, found.tolist()) == (np.int32, [[7, 0, 0, 0]])
    # If none has tokens, `like` says how the other batches look.
    found = fill([nothing], like=pairs, as_int32=True)
    assert (found.dtype, found.shape) == (np.int32, (1, 4, 2))
    assert fill([nothing]).dtype == np.float64
    with refuses("test: feature 'x' has dtype int8 in one record, int64 in another (segments 1 "):
        fill([nothing, np.ones(1, np.int8), np.ones(1, np.int64)])
    with refuses("test: feature 'x' has shape [2] per token in one record, [] in another (segm"):
        fill([nothing, pairs, np.ones(1, np.int8)])


def test_booleans_are_no_integers():
    for arrays in ([np.array([5]), np.array([True])], [np.array([True]), np.array([5])]):
        with refuses("test: feature 'x' has dtype "):
            fill(arrays, as_int32=True)


def test_a_value_is_no_array_of_tokens():
    with refuses("test: feature 'x' has tokens in one record, and is one value in another (seg"):
        lay_out("test", np.array([2, 1]), np.array([0, 2]), 1, 4).fill(
            "test", "x", [np.ones(2), np.ones(())], 0, as_int32=False
        )


def test_masked_entries_are_refused():
    masked = np.ma.array([1, 2], mask=[False, True])
    for dtype in (np.int32, np.int64):
        with refuses("test: feature 'x' of the batch has masked entries"):
            fill([np.array([5]), masked.astype(dtype)], as_int32=True)
    found = fill([np.ma.array([1, 2])], as_int32=True)
    assert (type(found), found.tolist()) == (np.ndarray, [[1, 2, 0, 0]])


@pytest.mark.parametrize("dtype", [">i2", ">f4", ">c16"])
def test_arrays_get_the_byte_order_of_the_machine(dtype):
    array = np.array([1, 258], dtype)
    assert fill([array]).dtype.isnative
    assert fill([array]).tolist() == [[1, 258, 0, 0]]
    assert (
        lay_out("test", np.zeros(0, np.int64), np.array([0]), 0, 4)
        .fill("test", "x", [], 0, as_int32=False, like=array)
        .dtype.isnative
    )
    once = fill_once("test", "x", list(array), np.array([2]), (1, 3))
    assert once.dtype.isnative
    assert once.tolist() == [[1, 258, 0]]


@pytest.mark.parametrize("pad", [300, 0.5, -9])
def test_pad_values_are_of_small_integers(pad):
    int4 = np.dtype(ml_dtypes.int4)
    assert fill([np.ones(1, int4)], pad=-8).astype(int).tolist() == [[1, -8, -8, -8]]
    with refuses(f"test: pad_value {pad} of feature 'x' is no int4"):
        fill([np.ones(1, int4)], pad=pad)


def test_tuples_of_numbers_are_arrays():
    for value in [(0.5, 1.0), (1, 0.5), (np.True_, np.False_), (np.float32(1), 2j), (1, 2), ()]:
        assert entries_of(value) is None
    assert entries_of((1, [2])) == {"0": 1, "1": [2]}


def test_integers_beyond_int64_do_not_become_floats():
    with refuses("test: x holds integers beyond int64"):
        as_numbers("test", "x", [1, 2**63])
    assert as_numbers("test", "x", [1, 2.0**63]).tolist() == [1, 2.0**63]
    assert as_numbers("test", "x", [0.5, float("inf"), float("nan")])[0] == 0.5
    assert as_numbers("test", "x", [2**63]).dtype == np.uint64
