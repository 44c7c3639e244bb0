"""How fast is random access into an epoch of a billion sequences?

    python benchmarks/how_fast_is_random_access.py

An epoch is arithmetic: it is made without touching its sequences, and any 64 of its bins are read
without reading others.  Made anew from a fresh plan object each time, so that what a plan computes
once is counted, and one batch is read from it.

Yardstick: `np.random.permutation`, the shuffled list that an epoch replaces.  A list of 1e9 ids
(8 GB) is too much for one benchmark: 1e7 ids are shuffled, and the figures scaled linearly.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from common import (
    Row,
    billion_counts,
    lognormal_lengths,
    medians,
    report,
    show_seconds,
    show_speedup,
)

import seqpack_jax as sp

MAX_SEQ_LEN, ROWS = 2048, 64
MOST_TO_READ, MOST_TO_MAKE, MOST_BYTES = 0.001, 0.1, 100 * 10**6
LIST_SIZE, SCALE = 10**7, 100


def make(plan: sp.PackingPlan, counts: np.ndarray) -> sp.Epoch:
    """Make an epoch from nothing computed before, and read its first batch."""
    pools = sp.SequencePools.identity(counts)
    epoch = sp.materialize_epoch(replace(plan), pools, seed=0, epoch=1)
    epoch[:ROWS]
    return epoch


def shuffle() -> np.ndarray:
    """Shuffle a list of ids, a hundredth of what an epoch of 1e9 would need."""
    return np.random.default_rng(0).permutation(LIST_SIZE)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most memory that a run holds at any one time."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure() -> list[Row]:
    """Time reading from one epoch, and making one."""
    counts = billion_counts(lognormal_lengths(10**6, MAX_SEQ_LEN))
    plan = sp.pack_length_histogram(counts, MAX_SEQ_LEN)
    epoch = make(plan, counts)
    rng = np.random.default_rng(0)
    draw = iter([rng.integers(0, len(epoch), ROWS) for _ in range(1200)])
    (reading,) = medians(lambda: epoch.bins(next(draw)), number=200)
    (one,) = medians(lambda: epoch[len(epoch) // 2], number=200)
    making, shuffling = medians(lambda: make(plan, counts), shuffle)
    peak = peak_bytes(lambda: make(plan, counts))
    whole, size = shuffling * SCALE, peak_bytes(shuffle) * SCALE
    shown = f"shuffled list {show_seconds(whole)} (scaled from 1e7)"
    return [
        Row(
            f"{ROWS} random bins of 1e9 sequences",
            show_seconds(reading),
            shown,
            show_speedup(reading, whole),
            f"< {show_seconds(MOST_TO_READ)}",
            reading < MOST_TO_READ,
        ),
        Row("1 bin of 1e9 sequences", show_seconds(one), shown, show_speedup(one, whole)),
        Row(
            "make an epoch of 1e9 sequences, read one batch",
            show_seconds(making),
            shown,
            show_speedup(making, whole),
            f"< {show_seconds(MOST_TO_MAKE)}",
            making < MOST_TO_MAKE,
        ),
        Row(
            "peak memory of that (tracemalloc)",
            f"{peak / 1e6:.2f} MB",
            f"shuffled list {size / 1e6:,.0f} MB (scaled from 1e7)",
            f"{size / peak:,.0f}x smaller",
            f"< {MOST_BYTES / 1e6:.0f} MB",
            peak < MOST_BYTES,
        ),
    ]


if __name__ == "__main__":
    report(measure())
