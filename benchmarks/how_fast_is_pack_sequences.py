"""How fast is `pack_sequences`, from a million lengths to the ids in each bin?

    python benchmarks/how_fast_is_pack_sequences.py

1,000,000 lognormal lengths, int32, to bins of 2,048 tokens; ids come out as a CSR pair.

Yardsticks: one stable argsort of the same lengths as uint16 (a radix sort), because whoever groups
ids by length must move each of them once; and PyPI LightBinPack's OBFD (C++, ids as lists of
lists), given a list, the form it takes fastest.  Both make the same number of bins.
"""

from __future__ import annotations

import lightbinpack
import numpy as np
from common import Row, lognormal_lengths, medians, report, show_seconds, show_speedup, show_times

import seqpack_jax as sp

MAX_SEQ_LEN = 2048
MOST_SORTS, LEAST_SPEEDUP = 4, 5


def measure() -> list[Row]:
    """Compare one call with a sort, with LightBinPack, and the two results with each other."""
    lengths = lognormal_lengths(10**6, MAX_SEQ_LEN).astype(np.int32)
    keys, as_list = lengths.astype(np.uint16), lengths.tolist()
    ours, sort, obfd = medians(
        lambda: sp.pack_sequences(lengths, MAX_SEQ_LEN),
        lambda: np.argsort(keys, kind="stable"),
        lambda: lightbinpack.obfd(as_list, MAX_SEQ_LEN),
    )
    bins = sp.pack_sequences(lengths, MAX_SEQ_LEN)
    bins.check(lengths)
    num_bins, peer_bins = len(bins), len(lightbinpack.obfd(as_list, MAX_SEQ_LEN))
    shown = show_seconds(ours)
    return [
        Row(
            "pack 1e6 sequences, against a stable argsort of uint16",
            shown,
            show_seconds(sort),
            show_times(ours, sort),
            f"at most {MOST_SORTS}x",
            ours <= MOST_SORTS * sort,
        ),
        Row(
            "pack 1e6 sequences, against LightBinPack OBFD",
            shown,
            show_seconds(obfd),
            show_speedup(ours, obfd),
            f"at least {LEAST_SPEEDUP}x",
            obfd >= LEAST_SPEEDUP * ours,
        ),
        Row(
            "bins, against LightBinPack OBFD",
            f"{num_bins:,}",
            f"{peer_bins:,}",
            f"{num_bins / peer_bins:.6f}",
            "the same",
            num_bins == peer_bins,
        ),
        *other_algorithms(lengths, sort),
    ]


def other_algorithms(lengths: np.ndarray, sort: float) -> list[Row]:
    """Time what has no target: the other algorithms, and other forms of input."""
    cases = {
        "first fit decreasing": (lengths, {"algorithm": "first_fit_decreasing"}),
        "worst fit decreasing": (lengths, {"algorithm": "worst_fit_decreasing"}),
        "next fit": (lengths, {"algorithm": "next_fit"}),
        "best fit decreasing, seed=0": (lengths, {"seed": 0}),
        "best fit decreasing, lengths as int64": (lengths.astype(np.int64), {}),
        "best fit decreasing, lengths as a list": (lengths.tolist(), {}),
    }
    seconds = medians(
        *(
            lambda given=given, options=options: sp.pack_sequences(given, MAX_SEQ_LEN, **options)
            for given, options in cases.values()
        )
    )
    return [
        Row(
            f"{name}, against the argsort",
            show_seconds(one),
            show_seconds(sort),
            show_times(one, sort),
        )
        for name, one in zip(cases, seconds, strict=True)
    ]


if __name__ == "__main__":
    report(measure())
