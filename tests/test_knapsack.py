"""The best contents of a room are the best of all that fit."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpack_jax.planning.knapsack import best_contents, patterns_of

room_caps = st.none() | st.integers(0, 9)


@st.composite
def priced_rooms(draw, max_capacity=14):
    """`(prices, capacity)`: some lengths absent, some free, some of one price per token."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    capacity = draw(st.integers(1, max_capacity))
    longest = draw(st.integers(1, capacity))
    highest = draw(st.sampled_from([1, 3, 100]))
    prices = rng.integers(0, highest + 1, longest + 1)
    if draw(st.booleans()):
        prices = np.arange(longest + 1) * highest
    prices[rng.random(longest + 1) < draw(st.sampled_from([0.0, 0.4, 0.9]))] = -1
    prices[0] = -1
    if draw(st.booleans()):
        return prices / 64, capacity  # sums of these are exact
    return prices * draw(st.sampled_from([1, 2**50])), capacity


def contents_within(prices, capacity, cap):
    """All multisets of the lengths that there are."""
    return [
        held
        for held in reference.all_bins(capacity, cap, len(prices) - 1)
        if all(prices[n] >= 0 for n in held)
    ]


@settings(max_examples=300)
@given(priced=priced_rooms(), cap=room_caps)
def test_the_best_is_the_best_of_all_multisets(priced, cap):
    prices, capacity = priced
    contents = best_contents(prices, capacity, cap)
    expected = np.zeros(capacity + 1, prices.dtype)
    for held in contents_within(prices, capacity, cap):
        worth = sum(prices[n] for n in held)
        expected[sum(held) :] = np.maximum(expected[sum(held) :], worth)
    assert contents.best.dtype == prices.dtype
    np.testing.assert_array_equal(contents.best, expected)


@settings(max_examples=300)
@given(priced=priced_rooms(max_capacity=60), cap=st.none() | st.integers(0, 70))
def test_patterns_fit_and_are_worth_the_best(priced, cap):
    prices, capacity = priced
    contents = best_contents(prices, capacity, cap)
    rooms = np.arange(capacity + 1)[::-1]
    patterns = patterns_of(contents, rooms)
    assert len(patterns) == len(rooms)
    for room, row in zip(rooms.tolist(), patterns.tolist(), strict=True):
        held = [n for n in row if n]
        assert all(0 < n < len(prices) and prices[n] >= 0 for n in held)
        assert sum(held) <= room
        assert cap is None or len(held) <= cap
        assert sum(prices[n] for n in held) == contents.best[room]


@given(priced=priced_rooms(max_capacity=40), cap=room_caps)
def test_the_same_prices_in_integers_and_floats_give_the_same_choices(priced, cap):
    prices, capacity = priced
    small = np.where(prices < 0, -1, prices * 64 if prices.dtype == float else prices % 2**50)
    rooms = np.arange(capacity + 1)
    whole, real = (best_contents(small.astype(kind), capacity, cap) for kind in (int, float))
    assert whole.best.dtype == np.int64
    assert real.best.dtype == np.float64
    np.testing.assert_array_equal(whole.best, real.best)
    np.testing.assert_array_equal(patterns_of(whole, rooms), patterns_of(real, rooms))


@pytest.mark.parametrize("cap", [None, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_nothing_to_put_in(cap, dtype):
    """No lengths at all, none that is there, and none that is worth anything."""
    for prices in ([], [-1], [-1, -1, -1], [-1, 0, -1, 0]):
        contents = best_contents(np.array(prices, dtype), 5, cap)
        assert contents.best.dtype == dtype
        assert contents.best.tolist() == [0] * 6
        assert not patterns_of(contents, np.arange(6)).any()


@pytest.mark.parametrize("cap", [None, 0, 1, 2, 5])
def test_no_rooms_have_no_patterns(cap):
    contents = best_contents(np.array([-1, 2, 3]), 6, cap)
    assert patterns_of(contents, np.zeros(0, np.int64)).shape[0] == 0


def test_rooms_of_one_and_none():
    contents = best_contents(np.array([-1, 7]), 1)
    assert contents.best.tolist() == [0, 7]
    assert patterns_of(contents, np.array([0, 1, 1])).tolist() == [[0], [1], [1]]
    assert best_contents(np.array([-1]), 0).best.tolist() == [0]
    assert best_contents(np.array([-1, 7]), 3, 0).best.tolist() == [0, 0, 0, 0]


def test_integers_are_exact_where_floats_are_not():
    """Beyond 2**53 floats cannot tell these apart."""
    prices = np.array([-1, -1, 2**60, 2**60 + 1])
    contents = best_contents(prices, 3)
    assert int(contents.best[3]) - int(contents.best[2]) == 1
    assert patterns_of(contents, np.array([3])).tolist() == [[3]]
    real = best_contents(prices.astype(float), 3)
    assert real.best[3] == real.best[2]


def test_a_big_room_equals_a_textbook_program_over_items():
    """One length at a time, room by room, in Python integers; and with a cap by layers."""
    rng = np.random.default_rng(5)
    capacity, cap = 700, 6
    prices = np.full(351, -1)
    lengths = np.unique(rng.integers(20, 351, 40))
    prices[lengths] = lengths * 1000 + rng.integers(0, 9000, len(lengths))
    layers = [[0] * (capacity + 1)]
    while len(layers) < 2 or layers[-1] != layers[-2]:
        before = layers[-1]
        layers.append(
            [
                max([before[r], *(int(prices[n]) + before[r - n] for n in lengths if n <= r)])
                for r in range(capacity + 1)
            ]
        )
    assert len(layers) > cap + 2  # so the cap matters
    assert best_contents(prices, capacity).best.tolist() == layers[-1]
    assert best_contents(prices, capacity, cap).best.tolist() == layers[cap]
