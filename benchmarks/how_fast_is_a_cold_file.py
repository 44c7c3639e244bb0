"""How fast are batches from a token file that is not in the page cache, shuffled or in zones?

    python benchmarks/how_fast_is_a_cold_file.py [--gigabytes 10]

A memory-mapped file of int32 tokens, 0.4 times the memory unless told otherwise: lognormal
sequences, planned for rows of 2,048; batches `[64, 2048]` from `PackedSource`, in one process.
Before every measurement both files are dropped from the page cache, and it is counted that they are
gone (Linux only).  A round reads

* in 8 zones: the first four of them, one after another;
* shuffled over the whole file, `zones=1`: one batch, because what it brings in would not serve the
  next one in a file that is larger than memory.

Yardstick: pre-packed rows read in order, 512 batches: a memory-mapped file that holds the tokens,
segment ids and positions of each row, 12 bytes per token, copied out batch by batch.  Beside it
the plain token file, read in order with nothing made of it.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import REPEATS, Row, lognormal_lengths, report

import seqpack_jax as sp
from seqpack_jax.arrays import offsets_of

MAX_SEQ_LEN, ROWS, ZONES, READ, STEPS = 2048, 64, 8, 4, 512
NAMES = ("tokens", "segment_ids", "positions")
MOST_RESIDENT, LEAST, TOUCHED = 0.01, 0.5, 2 * 10**9


class Data(NamedTuple):
    """Files on disk, and the plan over them."""

    tokens: Path
    rows: Path  # pre-packed, int32 [batches, 3, ROWS, MAX_SEQ_LEN]
    offsets: np.ndarray
    plan: sp.PackingPlan
    pools: sp.SequencePools

    def source(self, zones: int, seed: int) -> sp.PackedSource:
        """Map the tokens anew."""
        tokens = np.memmap(self.tokens, np.int32, "r")
        sequences = sp.FlatSequences(tokens, self.offsets)
        options = {"seed": seed, "batch_size": ROWS, "zones": zones}
        return sp.PackedSource(self.plan, self.pools, sequences, **options)


def write(folder: Path, gigabytes: float) -> Data:
    """Write both files; the rows are the first ones of an epoch."""
    size = int(gigabytes * 1e9) // 4
    lengths = lognormal_lengths(size // 460, MAX_SEQ_LEN)
    counts, pools = sp.length_histogram_from_lengths(lengths, MAX_SEQ_LEN)
    plan = sp.pack_length_histogram(counts, MAX_SEQ_LEN)
    data = Data(folder / "tokens.bin", folder / "rows.bin", offsets_of(lengths), plan, pools)
    rng = np.random.default_rng(0)
    with data.tokens.open("wb") as file:
        for block in np.array_split(np.empty(int(lengths.sum()), np.int8), size // 2**23 + 1):
            rng.integers(1, 50_000, len(block), np.int32).tofile(file)
    source = data.source(ZONES, 0)
    with data.rows.open("wb") as file:
        for step in range(STEPS):
            batch = source[step]
            for name in NAMES:
                batch[name].tofile(file)
    return data


def drop(path: Path) -> None:
    """Drop a file from the page cache, once it is written back; what is mapped would stay."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(10):  # pages that are being read stay, the first time
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(0.1)
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as whole:
            address = ctypes.addressof(anchor := ctypes.c_char.from_buffer(whole))
            pages = np.zeros(-(-len(whole) // mmap.PAGESIZE), np.uint8)
            size, out = ctypes.c_size_t(len(whole)), ctypes.c_void_p(pages.ctypes.data)
            failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), size, out)
            del anchor  # else the map could not be closed
    resident = np.mean(pages & 1)
    if failed or resident > MOST_RESIDENT:
        raise SystemExit(f"{resident:.0%} of {path} are still in the page cache")


def read_source(data: Data, zones: int, seed: int, steps: int) -> Iterator[int]:
    """Read the first batches of a source that is made anew; yield their real tokens."""
    source = data.source(zones, seed)
    for step in range(steps):
        yield int(np.count_nonzero(source[step]["segment_ids"]))


def read_rows(data: Data) -> Iterator[int]:
    """Copy pre-packed batches out of their file, in order."""
    for stored in np.memmap(data.rows, np.int32, "r").reshape(-1, 3, ROWS, MAX_SEQ_LEN):
        batch = dict(zip(NAMES, np.array(stored), strict=True))
        yield int(np.count_nonzero(batch["segment_ids"]))


def read_tokens(data: Data) -> Iterator[int]:
    """Copy as many tokens out of the token file, in order."""
    tokens = np.memmap(data.tokens, np.int32, "r")
    for step in range(STEPS):
        yield np.array(tokens[step * ROWS * MAX_SEQ_LEN :][: ROWS * MAX_SEQ_LEN]).size


def speed(data: Data, run: Iterator[int]) -> float:
    """Run a reader from cold files; return tokens/s."""
    for thread in threading.enumerate():  # those that still ask for the next zone
        if thread is not threading.current_thread():
            thread.join()
    drop(data.tokens)
    drop(data.rows)
    # Where the host takes back the free memory of a virtual machine, getting it again takes longer
    # than reading: so there is some for the page cache of each reader.
    np.ones(TOUCHED, np.uint8)
    start = time.perf_counter()
    return sum(run) / (time.perf_counter() - start)


def measure(data: Data) -> list[Row]:
    """Time all readers in turn."""
    rounds = []
    for number in range(REPEATS + 1):  # the first is the warm-up; every epoch begins elsewhere
        steps = READ * data.plan.num_bins // ZONES // ROWS
        runs = (
            read_source(data, ZONES, number, steps),
            read_source(data, 1, number, 1),
            read_rows(data),
            read_tokens(data),
        )
        rounds.append([speed(data, run) for run in runs])
    zoned, random, rows, tokens = map(statistics.median, zip(*rounds[1:], strict=True))
    return [
        line(f"{ZONES} zones, against pre-packed rows in order", zoned, rows, LEAST),
        line("shuffled over the whole file, against the same", random, rows),
        line(f"{ZONES} zones, against the token file in order, as it is", zoned, tokens),
    ]


def line(what: str, ours: float, yardstick: float, least: float | None = None) -> Row:
    """Return one line of the table, from tokens/s."""
    shown = [f"{each / 1e6:,.1f} M tokens/s" for each in (ours, yardstick)]
    target = "-" if least is None else f"at least {least:g}x"
    reached = None if least is None else ours >= least * yardstick
    return Row(what, *shown, f"{ours / yardstick:#.3g}x", target, reached)


def main() -> None:
    """Write the files, measure, and remove them."""
    parser = argparse.ArgumentParser()
    part = 0.4e-9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parser.add_argument("--gigabytes", type=float, default=round(part, 1))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(measure(write(Path(folder), arguments.gigabytes)))


if __name__ == "__main__":
    main()
