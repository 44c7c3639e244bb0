"""How fast are packed batches through Grain, and how full, against Grain's own packers?

    python benchmarks/how_fast_is_grain.py

50,000 lognormal records of int32 tokens in memory, clipped to 2,048; no workers, and the same
reading options for all (no reader threads, no prefetch: one process, one core).  Tokens/s counts
real tokens; efficiency is real tokens over the capacity of every emitted row.  The time of
`PackedSource` includes planning, anew in every run.

Yardsticks: `grain.experimental.FirstFitPackIterDataset` with 64 bins, which yields rows, and the
same followed by `.batch(64)`, which yields batches, as we do unless `batch_size=None`; and, in a
`DataLoader`, `grain.experimental.PackAndBatchOperation` of 64 rows, and a loader that only reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags, logging
from common import Row, lognormal_lengths, medians, report, show_speedup

import seqpack_jax as sp

MAX_SEQ_LEN, ROWS, SIZE = 2048, 64, 50_000
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
Make = Callable[[], Iterable[Any]]


class Result(NamedTuple):
    """What one way of packing reached."""

    speed: float  # tokens/s
    efficiency: float


def load(source: Any, *operations: Any) -> grain.DataLoader:
    """Return a loader in this process over one epoch."""
    return grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.SequentialSampler(len(source)),
        operations=operations,
        worker_count=0,
        read_options=READ,
    )


def pipelines(records: list[dict[str, np.ndarray]]) -> dict[str, Make]:
    """Return all ways to pack the records, by name."""
    tokens = [record["tokens"] for record in records]
    shape = {"tokens": MAX_SEQ_LEN}

    def packed(batch_size: int | None = ROWS) -> sp.PackedSource:
        return sp.pack_dataset(tokens, MAX_SEQ_LEN, batch_size=batch_size)

    def first_fit() -> Any:
        dataset = grain.MapDataset.source(records).to_iter_dataset(READ)
        return grain.experimental.FirstFitPackIterDataset(
            dataset, length_struct=shape, num_packing_bins=ROWS
        )

    peer = grain.experimental.PackAndBatchOperation
    return {
        "PackedSource (MapDataset)": lambda: grain.MapDataset.source(packed()).to_iter_dataset(
            READ
        ),
        "PackedSource (DataLoader)": lambda: load(packed()),
        "PackedSource, row by row": lambda: grain.MapDataset.source(packed(None)).to_iter_dataset(
            READ
        ),
        "FirstFit, rows": first_fit,
        "FirstFit, batches": lambda: first_fit().batch(ROWS),
        "PackOperation": lambda: load(records, sp.PackOperation(MAX_SEQ_LEN, ROWS)),
        "PackAndBatch": lambda: load(records, peer(length_struct=shape, batch_size=ROWS)),
        "reading": lambda: load(records),
    }


def check(name: str, make: Make, total: int) -> float:
    """Drain a pipeline, count its tokens, and return its efficiency."""
    tokens = capacity = 0
    for item in make():
        names = ("segment_ids", "tokens_segment_ids")
        found = item[1] if isinstance(item, tuple) else [item[key] for key in names if key in item]
        (segment_ids,) = jax.tree.leaves(found)
        tokens += np.count_nonzero(segment_ids)
        capacity += segment_ids.size
    if tokens != total:
        raise SystemExit(f"{name} gave {tokens} tokens of {total}")
    return tokens / capacity


def compare_speed(
    results: dict[str, Result], ours: str, peer: str, target: float | None = None
) -> Row:
    """Return a line on tokens/s."""
    mine, theirs = results[ours].speed, results[peer].speed
    return Row(
        f"speed of {ours}, against {peer}",
        f"{mine / 1e6:.1f} M tokens/s",
        f"{theirs / 1e6:.1f} M tokens/s",
        show_speedup(1 / mine, 1 / theirs),
        f"at least {target}x" if target else "-",
        mine >= target * theirs if target else None,
    )


def compare_efficiency(results: dict[str, Result], ours: str, peer: str) -> Row:
    """Return a line on how full the rows are."""
    mine, theirs = results[ours].efficiency, results[peer].efficiency
    shown = (f"{mine:.2%}", f"{theirs:.2%}", f"{mine / theirs:.4f}")
    return Row(f"efficiency of {ours}, against {peer}", *shown, "higher", mine > theirs)


def measure() -> list[Row]:
    """Check every pipeline once, then time all of them in turn."""
    lengths = lognormal_lengths(SIZE, MAX_SEQ_LEN)
    records = [{"tokens": np.arange(1, length + 1, dtype=np.int32)} for length in lengths]
    ways, total = pipelines(records), int(lengths.sum())
    full = {name: check(name, make, total) for name, make in ways.items() if name != "reading"}
    seconds = medians(*(lambda make=make: deque(make(), maxlen=0) for make in ways.values()))
    results = {
        name: Result(total / one, full.get(name, 1.0))
        for name, one in zip(ways, seconds, strict=True)
    }
    sources, peers = list(ways)[:2], ("FirstFit, rows", "FirstFit, batches")
    return [
        *(compare_speed(results, ours, peer, 10) for ours in sources for peer in peers),
        compare_speed(results, "PackedSource, row by row", peers[0], 5),
        compare_efficiency(results, sources[0], peers[0]),
        compare_speed(results, "PackOperation", "PackAndBatch", 2),
        compare_efficiency(results, "PackOperation", "PackAndBatch"),
        compare_speed(results, "PackOperation", "reading"),
    ]


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which no one has parsed here
    logging.set_verbosity(logging.FATAL)  # PackAndBatchOperation logs that it is deprecated
    report(measure())
