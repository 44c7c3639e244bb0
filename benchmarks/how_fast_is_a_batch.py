"""How fast is a batch: `pack_batch` of 64 rows of 2,048 tokens, from a flat token array?

    python benchmarks/how_fast_is_a_batch.py

Rows of lognormal sequences from a shuffled epoch, another 64 rows each time; tokens in memory as
int32, and in a memory-mapped file as uint16 (cached by the system, as in a second epoch).

Yardstick: `np.full` of three int32 arrays of that shape, allocation included: what it takes to
write tokens, segment ids and positions at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, lognormal_lengths, medians, report, show_seconds, show_times

import seqpack_jax as sp

MAX_SEQ_LEN, ROWS, BATCHES = 2048, 64, 100
MOST_FILLS = 8


def fill() -> list[np.ndarray]:
    """Write three arrays of the shape of a batch."""
    return [np.full((ROWS, MAX_SEQ_LEN), value, np.int32) for value in range(3)]


def make_bins(lengths: np.ndarray, max_segments: int | None = None) -> list[sp.Bins]:
    """Return the ids of some shuffled batches."""
    counts, pools = sp.length_histogram_from_lengths(lengths)
    plan = sp.pack_length_histogram(counts, MAX_SEQ_LEN, max_segments=max_segments)
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    return [epoch[at * ROWS : (at + 1) * ROWS] for at in range(BATCHES)]


def measure(folder: Path) -> list[Row]:
    """Time both kinds of token array, and the whole way of a batch through `PackedSource`."""
    lengths = lognormal_lengths(50_000, MAX_SEQ_LEN)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(1, 50_000, offsets[-1], np.int32)
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    mapped = np.load(folder / "tokens.npy", mmap_mode="r")
    bins = make_bins(lengths)
    source = sp.pack_dataset(sp.FlatSequences(tokens, offsets), MAX_SEQ_LEN, batch_size=ROWS)
    steps = cycle(range(BATCHES))

    def packing(flat: Any) -> Callable[[], Any]:
        sequences, batches = sp.FlatSequences(flat, offsets), cycle(bins)
        return lambda: sp.pack_batch(next(batches), sequences, MAX_SEQ_LEN, lengths=lengths)

    *ours, filling = medians(
        packing(tokens), packing(mapped), lambda: source[next(steps)], fill, number=BATCHES
    )
    names = ("pack_batch, int32 in memory", "pack_batch, uint16 memory-mapped")
    rows = [
        Row(
            f"{name}, [{ROWS}, {MAX_SEQ_LEN}]",
            show_seconds(seconds),
            f"np.full x 3: {show_seconds(filling)}",
            show_times(seconds, filling),
            f"at most {MOST_FILLS}x",
            seconds <= MOST_FILLS * filling,
        )
        for name, seconds in zip(names, ours, strict=False)
    ]
    whole = ours[2]
    name = f"PackedSource[i] (draws the bins too), int32 in memory, [{ROWS}, {MAX_SEQ_LEN}]"
    times = show_times(whole, filling)
    return [*rows, Row(name, show_seconds(whole), f"np.full x 3: {show_seconds(filling)}", times)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report(measure(Path(name)))
