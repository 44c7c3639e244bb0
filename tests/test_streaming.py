"""The longest prefix of a stream that fits, found the same way every time."""

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import packings

from seqpack_jax.feeding.streaming import longest_prefix


@given(packing=packings(), rows=st.integers(1, 6))
def test_a_prefix_is_packed_by_best_fit(packing, rows):
    lengths, capacity = packing
    packed = longest_prefix(lengths, capacity, rows)
    size = sum(map(len, packed))
    assert sorted(i for row in packed for i in row) == list(range(size))
    assert len(packed) <= rows
    assert all(sum(lengths[i] for i in row) <= capacity for row in packed)
    assert bool(size) == bool(lengths)
    expected = reference.best_fit_decreasing(lengths[:size], capacity)
    assert sorted(sum(lengths[i] for i in row) for row in packed) == sorted(map(sum, expected))
    longest = reference.longest_prefix(lengths, capacity, rows)
    assert size <= longest
    if size < longest:  # best fit is not monotone: more may fit again after one that does not
        assert len(reference.best_fit_decreasing(lengths[: size + 1], capacity)) > rows


@given(packing=packings(), rows=st.integers(1, 6))
def test_what_comes_after_the_volume_bound_does_not_matter(packing, rows):
    lengths, capacity = packing
    volume = rows * capacity
    bound = sum(1 for k in range(len(lengths)) if sum(lengths[: k + 1]) <= volume)
    assert longest_prefix(lengths, capacity, rows) == longest_prefix(
        lengths[:bound], capacity, rows
    )


@pytest.mark.parametrize(
    ("lengths", "rows", "expected"),
    [
        ([], 2, []),
        ([10], 1, [[0]]),
        ([10, 10], 1, [[0]]),
        ([6, 6, 4, 4], 2, [[0, 3], [1, 2]]),
        ([6, 6, 6], 2, [[0], [1]]),
        ([1] * 25, 2, [list(range(10)), list(range(10, 20))]),
    ],
)
def test_small_streams(lengths, rows, expected):
    assert longest_prefix(lengths, 10, rows) == expected
