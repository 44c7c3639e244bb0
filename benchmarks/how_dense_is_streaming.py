"""How full are the rows that are packed from a stream of unknown lengths?

    python benchmarks/how_dense_is_streaming.py
    SEQPACK_DATA=/path/to/length/sets python benchmarks/how_dense_is_streaming.py

20,000 records each of four mixes of lengths, and, when the folder named by `SEQPACK_DATA` holds
them, of the lengths of SQuAD 1.1.  Efficiency is real tokens over the capacity of the rows that
hold any: the empty rows that fill up the last batch of a stream come once, and are not counted.

Yardstick: `grain.experimental.BestFitPackIterDataset` with as many bins as our batches have rows,
the densest of Grain's packers.  Nothing is timed, and the same comes out each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from common import (
    Packed,
    Row,
    count_packed,
    lognormal_lengths,
    quiet_grain,
    report,
    token_records,
)

import seqpack_jax as sp

SIZE, ROWS = 20_000, (8, 64, 1024)
GROUP_ROWS, GROUP_WINDOW, LEAST = 8, 29, 0.995  # 232 rows of the first mix: about 1,030 records
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class LengthSet(NamedTuple):
    """Lengths to pack."""

    name: str
    lengths: np.ndarray
    max_seq_len: int


def length_sets() -> Iterator[LengthSet]:
    """Yield the mixes, and real lengths if they are there."""
    for median, sigma, limit in ((300, 1.0, 2048), (1000, 0.8, 2048), (3000, 0.7, 8192)):
        lengths = lognormal_lengths(SIZE, limit, median=median, sigma=sigma)
        yield LengthSet(f"lognormal({median:,}, {sigma:g}) to {limit:,}", lengths, limit)
    lengths = np.random.default_rng(0).integers(int(0.2 * 2048), int(0.7 * 2048) + 1, SIZE)
    yield LengthSet("uniform(0.2, 0.7) of 2,048", lengths, 2048)
    file = Path(os.environ.get("SEQPACK_DATA", ".")) / "squad11_384.npy"
    if file.exists():
        yield LengthSet("SQuAD 1.1 to 512", np.load(file)[:SIZE].astype(np.int64), 512)


def pack(lengths: LengthSet, rows: int, **options: Any) -> float:
    """Pack a stream as we do, and return how full the rows are."""
    read = grain.MapDataset.source(token_records(lengths.lengths)).to_iter_dataset(READ)
    dataset = sp.PackIterDataset(read, lengths.max_seq_len, rows, **options)
    return efficiency(lengths, count_packed(dataset))


def best_fit(lengths: LengthSet, rows: int) -> float:
    """Pack it as Grain does."""
    read = grain.MapDataset.source(token_records(lengths.lengths)).to_iter_dataset(READ)
    shape = {"tokens": lengths.max_seq_len}
    dataset = grain.experimental.BestFitPackIterDataset(
        read, length_struct=shape, num_packing_bins=rows
    )
    return efficiency(lengths, count_packed(dataset))


def efficiency(lengths: LengthSet, packed: Packed) -> float:
    """Return real tokens over the capacity of the rows in use, once all tokens were found."""
    if packed.tokens != (total := int(lengths.lengths.sum())):
        raise SystemExit(f"{lengths.name}: {packed.tokens} tokens of {total} came out")
    return packed.tokens / (packed.used_rows * lengths.max_seq_len)


def compare(what: str, ours: float, peer: float, least: float | None = None) -> Row:
    """Return one line; the target is to be denser, or to reach `least`."""
    target, reached = "higher", ours > peer
    if least is not None:
        target, reached = f"at least {least:.1%}", ours >= least
    return Row(what, f"{ours:.2%}", f"BestFit {peer:.2%}", f"{ours / peer:.4f}", target, reached)


def measure() -> Iterator[Row]:
    """Pack every set in every number of rows, then the first one in groups of 1,024 records."""
    sets = list(length_sets())
    for lengths in sets:
        for rows in ROWS:
            what = f"{lengths.name}, {rows:,} rows"
            yield compare(what, pack(lengths, rows), best_fit(lengths, rows))
    rows = GROUP_ROWS * GROUP_WINDOW
    yield compare(
        f"{sets[0].name}, groups of {GROUP_WINDOW} batches of {GROUP_ROWS} rows",
        pack(sets[0], GROUP_ROWS, window=GROUP_WINDOW),
        best_fit(sets[0], rows),
        LEAST,
    )


if __name__ == "__main__":
    quiet_grain()
    report(list(measure()))
