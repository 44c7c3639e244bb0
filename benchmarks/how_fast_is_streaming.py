"""What does packing a stream cost per record, on top of Grain's own iteration?

    python benchmarks/how_fast_is_streaming.py

20,000 lognormal records of int32 tokens in memory, clipped to 2,048; no workers,
and the same reading options for all (no reader threads, no prefetch: one process, one core).  The
cost per record is the time of the whole pipeline less that of reading the same records without
packing them, over the number of records.

Yardsticks: `grain.experimental.FirstFitPackIterDataset` and `BestFitPackIterDataset` with as many
bins as our batches have rows.  They yield rows, and we batches, which they would have to stack.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import grain
import numpy as np
from common import (
    Row,
    count_packed,
    lognormal_lengths,
    medians,
    quiet_grain,
    report,
    show_seconds,
    show_speedup,
    token_records,
)

import seqpack_jax as sp

MAX_SEQ_LEN, SIZE, ROWS, MOST = 2048, 20_000, (8, 64, 1024), 10e-6
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
PEERS = {
    "FirstFit": grain.experimental.FirstFitPackIterDataset,
    "BestFit": grain.experimental.BestFitPackIterDataset,
}
Make = Callable[[], Iterable[Any]]


def pipelines(records: list[dict[str, np.ndarray]], rows: int) -> dict[str, Make]:
    """Return all ways to pack the records, and reading alone, by name."""

    def read() -> Any:
        return grain.MapDataset.source(records).to_iter_dataset(READ)

    def peer(dataset: Any) -> Make:
        shape = {"tokens": MAX_SEQ_LEN}
        return lambda: dataset(read(), length_struct=shape, num_packing_bins=rows)

    return {
        "reading": read,
        "ours": lambda: sp.PackIterDataset(read(), MAX_SEQ_LEN, rows),
        **{name: peer(dataset) for name, dataset in PEERS.items()},
    }


def measure(records: list[dict[str, np.ndarray]], rows: int) -> Row:
    """Check that every way packs all tokens, then time all of them in turn."""
    ways = pipelines(records, rows)
    total = sum(len(record["tokens"]) for record in records)
    for name in ("ours", *PEERS):
        if (found := count_packed(ways[name]()).tokens) != total:
            raise SystemExit(f"{name} gave {found} tokens of {total}")
    times = medians(*(lambda make=make: deque(make(), maxlen=0) for make in ways.values()))
    reading, *packing = (seconds / len(records) for seconds in times)
    ours, *peers = (seconds - reading for seconds in packing)
    return Row(
        f"cost per record, {rows:,} rows (reading alone {show_seconds(reading)})",
        show_seconds(ours),
        ", ".join(f"{name} {show_seconds(one)}" for name, one in zip(PEERS, peers, strict=True)),
        ", ".join(show_speedup(ours, one) for one in peers),
        f"< {show_seconds(MOST)}",
        ours < MOST,
    )


if __name__ == "__main__":
    quiet_grain()
    stream = token_records(lognormal_lengths(SIZE, MAX_SEQ_LEN))
    report([measure(stream, rows) for rows in ROWS])
