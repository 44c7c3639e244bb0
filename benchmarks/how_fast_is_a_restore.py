"""How long does a run of a million steps take to go on, at any of them?

    python benchmarks/how_fast_is_a_restore.py

A restore is: an iterator over fresh objects, `set_state` with a state that went through JSON, and
the first batch.  The longest of ten states is shown, each the median of five restores; all reading
is in this thread, without prefetching.

* `PackedDataset` over a prepared set of 1e7 sequences, batches of 64 rows, 29 epochs: 1e6 steps;
  states of random steps.
* `PackIterDataset` over records made on the fly, batches of 64 and of 1,024 rows.  States are those
  of the first steps, but the position of the parent in them is moved to random places of a stream
  of 1e6 steps.

Yardstick, the parent's own: reading the same batch, `source[step]`, from a source as fresh; for the
stream, restoring its parent and reading as many records from it as the restore read.  What comes on
top of that has the target.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from common import (
    REPEATS,
    CutTokens,
    Row,
    lognormal_lengths,
    prepare_synthetic,
    quiet_grain,
    report,
    show_seconds,
    show_times,
)

import seqpack_jax as sp

MAX_SEQ_LEN, STEPS, STATES, MOST = 2048, 10**6, 10, 0.05
SIZE, ROWS = 10**7, 64
STREAM_ROWS, RECORDS_PER_ROW = (64, 1024), 4.5
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Restore(NamedTuple):
    """Seconds of one restore, and of what its parent alone takes."""

    whole: float
    parent: float


def longest(restores: list[Callable[[], Restore]]) -> Restore:
    """Return the restore that takes longest on top of its parent, of medians."""
    found = []
    for restore in restores:
        rounds = [restore() for _ in range(REPEATS + 1)]  # the first is the warm-up
        found.append(Restore(*map(statistics.median, zip(*rounds[1:], strict=True))))
    return max(found, key=lambda restore: restore.whole - restore.parent)


def line(what: str, restores: list[Callable[[], Restore]]) -> Row:
    """Return one line of the table."""
    whole, parent = longest(restores)
    return Row(
        f"restore {what}",
        show_seconds(whole),
        f"parent's own {show_seconds(parent)}",
        show_times(whole, parent),
        f"< {show_seconds(MOST)} more",
        whole - parent < MOST,
    )


# --- PackedDataset ------------------------------------------------------------------------------


def packed_restores(folder: Path, zones: int) -> Iterator[Callable[[], Restore]]:
    """Yield restores of random steps."""

    def fresh() -> sp.PackedSource:
        _, _, plan, pools = sp.load_prepared(folder / "prepared")
        epochs = 1 + STEPS * ROWS // plan.num_bins
        options = {"seed": 0, "epochs": epochs, "batch_size": ROWS, "zones": zones}
        return sp.PackedSource(plan, pools, CutTokens(folder), **options)

    def restore(step: int, text: str) -> Restore:
        source = fresh()
        start = time.perf_counter()
        iterator = iter(sp.PackedDataset(source, read_options=READ))
        iterator.set_state(json.loads(text))
        batch = next(iterator)
        whole = time.perf_counter() - start
        source = fresh()
        start = time.perf_counter()
        wanted = source[step]
        parent = time.perf_counter() - start
        check(batch, wanted)
        return Restore(whole, parent)

    source = fresh()
    state = iter(sp.PackedDataset(source)).get_state()
    for step in np.random.default_rng(0).integers(0, STEPS, STATES).tolist():
        epoch, rows = source.position(step)
        text = json.dumps(state | {"epoch": epoch, "rows": rows})
        yield partial(restore, step, text)


def check(batch: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Stop if two batches differ."""
    if any(not np.array_equal(batch[name], wanted[name]) for name in wanted):
        raise SystemExit("the restore gave another batch")


# --- PackIterDataset ----------------------------------------------------------------------------


class Records:
    """Many records, made where they are read, which is counted."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0
        self.lengths = lognormal_lengths(10**5, MAX_SEQ_LEN).tolist()
        self.tokens = np.arange(1, MAX_SEQ_LEN + 1, dtype=np.int32)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.read += 1
        return {"tokens": self.tokens[: self.lengths[index % len(self.lengths)]]}


def stream_restores(rows: int) -> Iterator[Callable[[], Restore]]:
    """Yield restores of states whose parent was moved to random places."""
    records = Records(int(STEPS * rows * RECORDS_PER_ROW))
    stream = grain.MapDataset.source(records).to_iter_dataset(READ)

    def restore(text: str) -> Restore:
        state, before = json.loads(text), records.read
        start = time.perf_counter()
        iterator = iter(sp.PackIterDataset(stream, MAX_SEQ_LEN, rows))
        iterator.set_state(state)
        next(iterator)
        whole = time.perf_counter() - start
        read = records.read - before
        start = time.perf_counter()
        parent = iter(stream)
        parent.set_state(state["parent"])
        for _ in range(read):
            next(parent)
        return Restore(whole, time.perf_counter() - start)

    iterator = iter(sp.PackIterDataset(stream, MAX_SEQ_LEN, rows))
    rng = np.random.default_rng(0)
    for _ in range(STATES):
        next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))  # a copy
        moved = int(rng.integers(0, int(0.9 * len(records))))
        state["records"] += moved
        state["parent"]["next_index"] += moved
        yield partial(restore, json.dumps(state))


def measure(folder: Path) -> Iterator[Row]:
    """Restore each kind."""
    for zones in (1, 64):
        what = f"a PackedDataset of {SIZE:.0e} sequences, zones={zones}".replace("e+0", "e")
        yield line(what, list(packed_restores(folder, zones)))
    for rows in STREAM_ROWS:
        yield line(f"a PackIterDataset, {rows:,} rows", list(stream_restores(rows)))


if __name__ == "__main__":
    quiet_grain()
    with tempfile.TemporaryDirectory() as path:
        report(list(measure(prepare_synthetic(Path(path) / "set", SIZE, MAX_SEQ_LEN))))
