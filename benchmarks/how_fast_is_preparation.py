"""How fast, and in how much memory, does a parquet column of lengths become a prepared directory?

    python benchmarks/how_fast_is_preparation.py [--size 100_000_000] [--repeats 5]

Lognormal lengths, int32, in parquet files of up to 16 million rows.  Two worker processes prepare
them for rows of 2,048 tokens; then a fresh process loads the result, makes a source over it, reads
one batch and 10,000 random bins.  Each job runs in a process of its own, which reports the largest
resident set among itself and its workers.  With `--size 1_000_000_000` it needs 12 GB of disk.

Yardstick: one process that reads the same column with pyarrow, row group by row group, and writes
4 bytes per row.

With SEQPACK_SEED=DIR, a folder that holds the `seqpack` package of PyPI's seqpack 1.0.0 unpacked,
its histogram, plan and one epoch are measured too (five minutes and 12 GB at 1e8).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, lognormal_lengths, report, show_seconds, show_times

import seqpack_jax as sp

MAX_SEQ_LEN, WORKERS, ROWS_PER_FILE, RANDOM_BINS = 2048, 2, 15_625_000, 10_000
MOST_TIMES = 3


def write_input(parent: Path, size: int) -> dict[str, Any]:
    """Write the column: files of row groups of a million lengths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = parent / "input"
    folder.mkdir()
    for number, start in enumerate(range(0, size, ROWS_PER_FILE)):
        rows = min(ROWS_PER_FILE, size - start)
        lengths = lognormal_lengths(rows, MAX_SEQ_LEN, number).astype(np.int32)
        table = pa.table({"length": lengths})
        pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=1_000_000)
    return {}


def read_and_write(folder: Path, _: int) -> dict[str, Any]:
    """The yardstick: read the column, write 4 bytes per row."""
    import pyarrow.parquet as pq

    with (folder / "yardstick.bin").open("wb") as out:
        for path in sorted((folder / "input").iterdir()):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["length"]).column("length")
                out.write(column.to_numpy().astype(np.uint32))
    return {}


def prepare(folder: Path, _: int) -> dict[str, Any]:
    """Prepare the column with worker processes."""
    sp.prepare(
        str(folder / "input"),
        str(folder / "prepared"),
        MAX_SEQ_LEN,
        length_column="length",
        workers=WORKERS,
        overwrite=True,
    )
    return {}


def load(folder: Path, _: int) -> dict[str, Any]:
    """Load the directory; make an epoch and a source; read bins at random."""
    start = time.perf_counter()
    prepared = sp.load_prepared(str(folder / "prepared"))
    loaded = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    source = sp.PackedSource(prepared.plan, prepared.pools, range(1), seed=0, batch_size=64)
    pickled = len(pickle.dumps(source))
    epoch = sp.materialize_epoch(prepared.plan, prepared.pools, seed=0)
    start = time.perf_counter()
    first = epoch[0:64]
    batch = time.perf_counter() - start
    index = np.random.default_rng(0).integers(len(epoch), size=RANDOM_BINS)
    start = time.perf_counter()
    bins = epoch.bins(index)
    drawn = time.perf_counter() - start
    disk = sum(p.stat().st_size for p in (folder / "prepared").rglob("*.ids.npy"))
    return {
        "load": loaded,
        "resident": resident,
        "pickle": pickled,
        "batch": batch,
        "bins": drawn,
        "drawn": len(bins.ids) + len(first.ids),
        "rows": len(epoch),
        "bound": prepared.plan.certificate.lower_bound,
        "bytes_per_id": disk / prepared.plan.num_sequences,
    }


def seed_library(folder: Path, _: int) -> dict[str, Any]:
    """The seed's three steps; its module is loaded by path, because its package asks for torch."""
    path = Path(os.environ["SEQPACK_SEED"]) / "seqpack" / "packing.py"
    spec = importlib.util.spec_from_file_location("seed_packing", path)
    packing = importlib.util.module_from_spec(spec)
    sys.modules["seed_packing"] = packing
    spec.loader.exec_module(packing)
    import pyarrow.parquet as pq

    lengths = pq.read_table(folder / "input", columns=["length"]).column("length").to_numpy()
    marks = [time.perf_counter()]
    counts, pools = packing.length_histogram_from_lengths(lengths)
    marks.append(time.perf_counter())
    templates = packing.pack_length_histogram_batched(counts, MAX_SEQ_LEN)
    marks.append(time.perf_counter())
    next(iter(packing.materialize_epoch(templates, pools, seed=0)))
    marks.append(time.perf_counter())
    histogram, plan, epoch = np.diff(marks).tolist()
    return {"histogram": histogram, "plan": plan, "first_bin": epoch}


TASKS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "write": write_input,
    "yardstick": read_and_write,
    "prepare": prepare,
    "load": load,
    "seed": seed_library,
}


def run(task: str, folder: Path, size: int) -> dict[str, Any]:
    """Run one task in a process of its own; return its figures, `seconds` and `peak` (bytes).

    This process stays small: a child starts with the peak of its parent.
    """
    command = [sys.executable, __file__, "--task", task, "--folder", folder, "--size", str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_here(task: str, folder: Path, size: int) -> None:
    """Run one task in this process, and print its figures as JSON."""
    start = time.perf_counter()
    figures = TASKS[task](folder, size)
    seconds = time.perf_counter() - start
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(each.ru_maxrss for each in usage) * 1024
    print(json.dumps(figures | {"seconds": seconds, "peak": peak}))


def measure(size: int, repeats: int, folder: Path) -> list[Row]:
    """Write the input, prepare it, load it."""
    run("write", folder, size)
    run("yardstick", folder, size)  # warms the page cache
    rounds = [
        (run("yardstick", folder, size), run("prepare", folder, size)) for _ in range(repeats)
    ]
    yardstick, ours = (statistics.median(each[k]["seconds"] for each in rounds) for k in range(2))
    peak = max(each[1]["peak"] for each in rounds)
    loaded = run("load", folder, size)
    name, most = f"{size:.0e}".replace("e+0", "e"), 1.0e9 if size < 5e8 else 1.5e9
    peak_yardstick = f"reading alone {max(r[0]['peak'] for r in rounds) / 1e6:,.0f} MB"
    rows = [
        Row(
            f"prepare {name} lengths, {WORKERS} workers",
            f"{show_seconds(ours)} ({size / ours / 1e6:.0f} M/s)",
            f"read + write {show_seconds(yardstick)}",
            show_times(ours, yardstick),
            f"at most {MOST_TIMES}x",
            ours <= MOST_TIMES * yardstick,
        ),
        Row(
            "its largest process",
            f"{peak / 1e6:,.0f} MB",
            peak_yardstick,
            "-",
            f"< {most / 1e6:,.0f} MB",
            peak < most,
        ),
        Row(
            f"load_prepared, {name}",
            show_seconds(loaded["load"]),
            f"prepare {show_seconds(ours)}",
            "-",
            "< 1.00 s",
            loaded["load"] < 1,
        ),
        Row(
            "process that loaded it",
            f"{loaded['resident'] / 1e6:,.0f} MB",
            f"ids {loaded['bytes_per_id'] * size / 1e6:,.0f} MB on disk",
            "-",
            "< 200 MB",
            loaded["resident"] < 200e6,
        ),
        Row(
            "a PackedSource over it, pickled",
            f"{loaded['pickle'] / 1e3:.0f} kB",
            "-",
            "-",
            "< 100 kB",
            loaded["pickle"] < 100_000,
        ),
        Row(
            "ids on disk",
            f"{loaded['bytes_per_id']:.2f} B each",
            "int64 8 B",
            "-",
            "4 B",
            loaded["bytes_per_id"] < 4.01,
        ),
        Row("first 64 bins of an epoch", show_seconds(loaded["batch"]), "-", "-"),
        Row(f"{RANDOM_BINS:,} random bins", show_seconds(loaded["bins"]), "-", "-"),
        Row("rows", f"{loaded['rows']:,}", f"lower bound {loaded['bound']:,}", "-"),
    ]
    if "SEQPACK_SEED" in os.environ:
        rows += seed_rows(name, run("seed", folder, size), ours)
    return rows


def seed_rows(name: str, seed: dict[str, Any], ours: float) -> list[Row]:
    """What the seed library takes for the same lengths, already in memory."""
    total = seed["histogram"] + seed["plan"]
    return [
        Row(
            f"seqpack 1.0.0, {name}: histogram + plan",
            f"{show_seconds(ours)} (all of prepare)",
            f"{show_seconds(seed['histogram'])} + {show_seconds(seed['plan'])}",
            f"{total / ours:.0f}x faster",
        ),
        Row(
            f"seqpack 1.0.0, {name}: first bin of an epoch, peak memory",
            "-",
            f"{show_seconds(seed['first_bin'])}, {seed['peak'] / 1e6:,.0f} MB",
            "-",
        ),
    ]


def main() -> None:
    """Measure, or run one task for a measuring parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=10**8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_here(arguments.task, arguments.folder, arguments.size)
        return
    with tempfile.TemporaryDirectory() as folder:
        report(measure(arguments.size, arguments.repeats, Path(folder)))


if __name__ == "__main__":
    main()
