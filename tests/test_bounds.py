"""A lower bound is never above what any packer, or the optimum, needs."""

import itertools

from hypothesis import given, settings
from strategies import caps, histograms, packings

import seqpack_jax as sp


@given(histogram=histograms(), cap=caps)
def test_it_is_the_volume_or_the_cap(histogram, cap):
    counts, capacity = histogram
    tokens = sum(n * int(c) for n, c in enumerate(counts))
    sequences = int(counts.sum())
    expected = max(-(-tokens // capacity), -(-sequences // cap) if cap else 0)
    assert sp.volume_bound(counts, capacity, max_segments=cap) == expected


@settings(max_examples=30)
@given(packing=packings(max_size=6, max_capacity=12), cap=caps)
def test_no_assignment_beats_it(packing, cap):
    lengths, capacity = packing
    counts = {n: lengths.count(n) for n in lengths}
    bound = sp.volume_bound(counts, capacity, max_segments=cap)
    for bins in range(bound):
        for choice in itertools.product(range(bins), repeat=len(lengths)):
            held = [
                [n for n, b in zip(lengths, choice, strict=True) if b == k] for k in range(bins)
            ]
            fits = all(sum(h) <= capacity and (cap is None or len(h) <= cap) for h in held)
            assert not fits
