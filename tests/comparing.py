"""Batches of one run beside those of another."""

import numpy as np


def equal(one, two):
    """The same batches: keys, dtypes and every entry."""
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
