"""Rows of segment ids for tests: by hand and at random, all of one shape (one compilation)."""

import numpy as np
from hypothesis import strategies as st

LENGTH = 12

# Rows that random ones rarely hit: padding before, between and after, one-token segments, one
# full-length segment, nothing but padding.
HAND_ROWS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3],
        [0, 1, 1, 0, 0, 2, 3, 3, 0, 4, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    ],
    np.int32,
)


@st.composite
def packed_rows(draw, rows=6, length=LENGTH):
    """Segment ids `[rows, length]`: segments in order, padding anywhere between them."""
    result = np.zeros((rows, length), np.int32)
    for row in result:
        pieces = draw(st.lists(st.tuples(st.integers(1, length), st.booleans()), max_size=length))
        start = segment = 0
        for size, real in pieces:
            segment += real
            row[start : start + size] = segment if real else 0
            start += size
            if start >= length:
                break
    return result
