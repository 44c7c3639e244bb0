"""How fast is a plan, from counts of lengths to templates, whatever the number of sequences?

    python benchmarks/how_fast_is_a_plan.py

Counts of 1e4, 1e6 and 1e9 sequences, with up to 2,048 or 8,192 distinct lengths.  The plan packs
the sequences exactly as one by one, templates written out.

Yardsticks, on 1e6 lengths of the same distribution whatever our n: LightBinPack's OBFD (C++), which
also returns ids (see `how_fast_is_pack_sequences.py` for that comparison), and one `np.bincount` of
the lengths, which is what it takes to look at each of them once.
"""

from __future__ import annotations

from collections.abc import Iterator

import lightbinpack
import numpy as np
from common import (
    Row,
    billion_counts,
    lognormal_lengths,
    medians,
    report,
    show_seconds,
    show_speedup,
    show_times,
    uniform_lengths,
)
from numpy.typing import NDArray

import seqpack_jax as sp

TARGETS = {2048: 0.010, 8192: 0.060}  # seconds, for best fit
DISTRIBUTIONS = {"lognormal": lognormal_lengths, "uniform": uniform_lengths}
ALGORITHMS = ("best_fit_decreasing", "first_fit_decreasing", "worst_fit_decreasing")


def measure(name: str, max_seq_len: int) -> Iterator[Row]:
    """Time every algorithm on every n, for one distribution and one capacity."""
    draw = DISTRIBUTIONS[name]
    million = draw(10**6, max_seq_len)
    as_list = million.tolist()
    bincount, obfd = medians(
        lambda: np.bincount(million), lambda: lightbinpack.obfd(as_list, max_seq_len)
    )
    counts = {
        "1e4": np.bincount(draw(10**4, max_seq_len)),
        "1e6": np.bincount(million),
        "1e9": billion_counts(million),
    }
    for algorithm in ALGORITHMS:
        for n, histogram in counts.items():
            seconds = plan_seconds(histogram, max_seq_len, algorithm)
            target = TARGETS[max_seq_len] if algorithm == ALGORITHMS[0] else None
            distinct = np.count_nonzero(histogram)
            fit = algorithm.removesuffix("_decreasing").replace("_", " ")
            yield Row(
                f"{fit}, {name} up to {max_seq_len:,}, n = {n} ({distinct:,} lengths)",
                show_seconds(seconds),
                f"OBFD {show_seconds(obfd)}, bincount {show_seconds(bincount)}",
                f"{show_speedup(seconds, obfd)}, {show_times(seconds, bincount)}",
                f"< {show_seconds(target)}" if target else "-",
                seconds < target if target else None,
            )


def plan_seconds(counts: NDArray[np.int64], max_seq_len: int, algorithm: str) -> float:
    """Return the median seconds of one plan."""
    (seconds,) = medians(lambda: sp.pack_length_histogram(counts, max_seq_len, algorithm=algorithm))
    return seconds


if __name__ == "__main__":
    report([row for size in TARGETS for name in DISTRIBUTIONS for row in measure(name, size)])
