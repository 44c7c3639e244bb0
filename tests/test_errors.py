"""Bad input is refused before any work, by one class, with what and where and a hint."""

import numpy as np
import pytest

import seqpack_jax as sp
from seqpack_jax.errors import (
    check_choice,
    check_int,
    check_integers,
    check_lengths,
    check_offsets,
)


def message(function, *args, **kwargs):
    with pytest.raises(sp.SeqpackError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert " Hint: " in text
    assert text.endswith(".")
    return text


def test_it_is_a_value_error():
    assert issubclass(sp.SeqpackError, ValueError)


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([3, 0, 0, 5], ["lengths[1] = 0", "2 of 4 lengths are below it", "remove empty"]),
        ([3, -4], ["lengths[1] = -4", "1 of 2 lengths is below it"]),
        (
            [3, 9, 12],
            [
                "lengths[1] = 9",
                "max_seq_len is 8",
                "2 of 3 lengths are over it",
                "pass over_length='drop', 'truncate', 'crop' or 'split', or raise max_seq_len",
            ],
        ),
        ([3.0, 2.0], ["dtype float64"]),
        ([3.0, float("nan")], ["lengths[1] = nan"]),
        ([True, False], ["dtype bool"]),
        (["a"], ["dtype <U1"]),
        ([[1, 2]], ["shape (1, 2)"]),
        ([[1], [2, 3]], ["ragged"]),
        (5, ["shape ()"]),
        (np.ma.array([1, 2], mask=[0, 1]), ["lengths has masked entries"]),
        ([3, 0, -4], ["lengths[1] = 0", "2 of 3"]),
        (np.array([2**63 + 1], np.uint64), ["lengths[0] = 9223372036854775809"]),
    ],
)
@pytest.mark.parametrize(
    "caller", [sp.pack_sequences, sp.greedy_pack_sequences, sp.heap_pack_sequences]
)
def test_bad_lengths(caller, lengths, parts):
    text = message(caller, lengths, 8)
    assert text.startswith(f"{caller.__name__}: ")
    for part in parts:
        assert part in text


def test_lengths_of_any_integer_dtype_pass():
    for dtype in (np.uint8, np.int16, np.uint32, np.int64, np.uint64):
        assert check_lengths("f", np.array([1, 8], dtype), 8).tolist() == [1, 8]
    assert check_lengths("f", [], 8).dtype == np.int64
    assert check_integers("f", "x", range(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "8"])
def test_bad_max_seq_len(value):
    assert "max_seq_len" in message(sp.pack_sequences, [1], value)
    assert "max_seq_len" in message(sp.pack_length_histogram, {1: 1}, value)
    assert "max_seq_len" in message(sp.volume_bound, {1: 1}, value)


def test_bad_options():
    assert "choose one of" in message(sp.pack_sequences, [1], 8, algorithm="magic")
    assert "choose one of" in message(sp.pack_length_histogram, {1: 1}, 8, algorithm="next_fit")
    assert "max_segments = 0" in message(sp.pack_sequences, [1], 8, max_segments=0)
    assert "tolerance = 0" in message(sp.pack_sequences, [1], 8, tolerance=0)
    assert "tolerance = 0" in message(sp.pack_length_histogram, {1: 1}, 8, tolerance=0)
    assert "in [1, 3]" in message(check_int, "f", "x", 4, 1, 3)
    for options in ({"tolerance": 0}, {"seed": "x"}):
        assert str(next(iter(options))) in message(
            sp.pack_sequences, [1], 8, algorithm="next_fit", **options
        )
    text = message(sp.length_histogram_from_lengths, [10**13])
    assert "lengths[0] = 10000000000000, but a length is at most 2147483647" in text
    assert "over_length" not in text
    assert "x = 3 is not known" in message(check_choice, "f", "x", 3, ("a",))


@pytest.mark.parametrize(
    ("counts", "part"),
    [
        ({0: 2, 3: 1}, "counts[0] = 2"),
        ({-3: 1}, "length -3"),
        ({3: -1}, "counts[3] = -1"),
        ({9: 7}, "counts[9] = 7"),
        ({3: 1.5}, "dtype float64"),
        ({"3": 1}, "dtype <U1"),
        ([1, 2], "counts[0] = 1"),
        ([0] * 9 + [4], "counts[9] = 4"),
        (np.zeros((2, 2), int), "shape (2, 2)"),
        ({1: 2**62, 2: 2**62}, "tokens, beyond the limit of 2**62"),
        (np.array([0, 2**63 + 5], np.uint64), "tokens, beyond the limit of 2**62"),
        ({10**13: 1}, "counts[10000000000000] = 1"),
    ],
)
def test_bad_counts(counts, part):
    text = message(sp.pack_length_histogram, counts, 8)
    assert part in text
    assert text.startswith("pack_length_histogram: ")


def test_hints_for_long_lengths_suit_the_function():
    assert "pass over_length='drop'" in message(sp.pack_length_histogram, {9: 7}, 8)
    assert "raise max_seq_len" in message(sp.volume_bound, {9: 7}, 8)
    assert "pass over_length" not in message(sp.volume_bound, {9: 7}, 8)
    assert "pass over_length" not in message(sp.PackingPlan.from_counter, {(9,): 1}, 8)
    for counts in ({2**31: 1}, {2**31: 7, 3: 1}):
        for policy in ("error", "drop"):
            text = message(sp.pack_length_histogram, counts, 8, over_length=policy)
            assert "counts[2147483648]" in text
    assert "a length is at most 2147483647" in text


def test_offsets_cut_into_parts_that_are_not_empty():
    check_offsets("f", np.array([0, 2, 5]), 5, 2, "look")
    check_offsets("f", np.array([0]), 0, 0, "look")
    for offsets in ([], [0, 5], [0, 5, 5], [1, 2, 5], [0, 2, 4], [0, 2, 5, 5]):
        with pytest.raises(sp.SeqpackError, match="f: offsets do not cut 5 entries into 2 non-em"):
            check_offsets("f", np.array(offsets), 5, 2, "look")
