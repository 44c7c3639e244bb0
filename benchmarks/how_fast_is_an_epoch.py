"""How fast is an epoch of ten million sequences, read from its first bin to its last?

    python benchmarks/how_fast_is_an_epoch.py

Lognormal lengths, bins of 2,048 tokens, shuffled and seeded; the pools hold real, shuffled ids.
Memory is measured while a process of its own drains the epoch: it must not grow with what was read.

Yardstick: the list that an epoch replaces, `np.random.permutation` of the 1e7 ids and one gather
from the pools, which holds all of it in memory before the first bin.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from common import (
    Row,
    lognormal_lengths,
    medians,
    peak_growth,
    report,
    show_seconds,
    show_times,
)

import seqpack_jax as sp

MAX_SEQ_LEN, SIZE, SLICE = 2048, 10**7, 4096
LEAST_RATE, MOST_BYTES = 5e6, 100 * 10**6


def make_epoch() -> sp.Epoch:
    """Plan ten million sequences and seed one epoch."""
    counts, pools = sp.length_histogram_from_lengths(lognormal_lengths(SIZE, MAX_SEQ_LEN))
    plan = sp.pack_length_histogram(counts, MAX_SEQ_LEN)
    return sp.materialize_epoch(plan, pools, seed=0, epoch=1)


def drain_slices(epoch: sp.Epoch) -> int:
    """Read all bins, a slice at a time; return how many sequences came."""
    return sum(len(epoch[at : at + SLICE].ids) for at in range(0, len(epoch), SLICE))


def drain_bins(epoch: sp.Epoch) -> None:
    """Read all bins, one at a time, as `for ids in epoch` does."""
    deque(epoch, maxlen=0)


def shuffle(ids: np.ndarray) -> np.ndarray:
    """Write out the whole epoch as a list, the way it is done without a plan."""
    return ids[np.random.default_rng(0).permutation(SIZE)]


def measure_memory(_: int) -> tuple[int, int, int]:
    """Drain an epoch in this process; return the sequences, our growth and the yardstick's."""
    epoch = make_epoch()
    drained: list[int] = []
    growth = peak_growth(lambda: drained.append(drain_slices(epoch)))
    return drained[0], growth, peak_growth(lambda: shuffle(epoch.pools.ids))


def show_rate(seconds: float) -> str:
    """Write how many sequences per second come when all take `seconds`."""
    return f"{SIZE / seconds / 1e6:.1f} M/s ({show_seconds(seconds)})"


def measure() -> list[Row]:
    """Time both ways to drain an epoch, and measure the memory of one."""
    epoch = make_epoch()
    slices, bins, shuffling = medians(
        lambda: drain_slices(epoch),
        lambda: drain_bins(epoch),
        lambda: shuffle(epoch.pools.ids),
    )
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        drained, growth, list_growth = next(executor.map(measure_memory, [0]))
    if drained != SIZE:
        raise SystemExit(f"the epoch gave {drained} sequences of {SIZE}")
    yardstick = f"permutation + gather {show_rate(shuffling)}"
    target = f"at least {LEAST_RATE / 1e6:.0f} M/s"
    names = (f"1e7 sequences, in slices of {SLICE:,} bins", "1e7 sequences, bin by bin")
    return [
        *(
            Row(
                name,
                show_rate(seconds),
                yardstick,
                show_times(seconds, shuffling),
                target,
                SIZE / seconds >= LEAST_RATE,
            )
            for name, seconds in zip(names, (slices, bins), strict=True)
        ),
        Row(
            "growth of the resident set meanwhile",
            f"{growth / 1e6:.1f} MB",
            f"permutation + gather {list_growth / 1e6:.0f} MB",
            f"{list_growth / max(growth, 1):.1f}x smaller",
            f"< {MOST_BYTES / 1e6:.0f} MB",
            growth < MOST_BYTES,
        ),
    ]


if __name__ == "__main__":
    report(measure())
