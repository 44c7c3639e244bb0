"""How long do many processes take to their first batch, and does their memory multiply?

    python benchmarks/how_heavy_are_processes.py [--size 100_000_000] [--repeats 3]

A prepared set of 1e8 lognormal lengths; 1, 2 and 8 processes with 2 workers each (3, 6 and 24
processes in all) feed their shards of it with `PackedDataset`, batches `[64, 2048]`.  Tokens are
cut out of a mapped file of 256 MB; how many, a mapped array of all lengths tells.  Preparing is
not timed.  Linux only.

* Time to the first batch: from when all processes have their imports behind them, until the last
  one has loaded the set, started its workers, which import the same, and got a batch.
* Memory of the set: each process then reads 400 batches, enough for its workers to touch nearly
  every page.  Of all processes, the proportional set sizes (PSS: a page that k processes map counts
  1/k in each) of the mapped files of the set, its plan, pools, lengths, tokens, and of temporary
  files; and what they hold in private memory beyond the same processes over a set of 1e5 lengths.

Yardsticks: as many Pythons as there are workers, started at once, that import Grain and end, which
is what Grain's workers begin with; and the part of the set that the largest single process maps,
which is nearly all of it.  Times are medians of `--repeats` runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import grain  # noqa: F401  (a part of the imports that are not timed)
from common import (
    CutTokens,
    Row,
    prepare_synthetic,
    quiet_grain,
    report,
    show_seconds,
    show_times,
)

import seqpack_jax as sp

MAX_SEQ_LEN, ROWS, WORKERS, BATCHES = 2048, 64, 2, 400
SMALL = 10**5
PROCESSES, MOST_SECONDS, MOST_TIMES = (1, 2, 8), 10, 1.3


def feed(folder: str, index: int, count: int) -> None:
    """Feed one shard, as told by the lines of stdin, and say on stdout how far it is."""
    quiet_grain()
    _say("imported")
    _, _, plan, pools = sp.load_prepared(f"{folder}/prepared")
    source = sp.PackedSource(
        plan, pools, CutTokens(folder), seed=0, epochs=1000, batch_size=ROWS, shard=(index, count)
    )
    batches = iter(sp.PackedDataset(source, num_workers=WORKERS))
    next(batches)
    _say("first")
    for _ in range(BATCHES):
        next(batches)
    _say("read")
    batches.close()


def _say(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


class Figures(NamedTuple):
    """What some processes took; bytes."""

    seconds: float
    shared: int  # PSS of mapped files of the set, over all processes
    largest: int  # resident part of these files in the process that has most of them
    private: int  # anonymous memory, over all processes
    total: int  # PSS of everything


def run(folder: Path, count: int) -> Figures:
    """Start processes, let them feed, and weigh them."""
    environment = os.environ | {"TMPDIR": str(folder)}  # temporary files count as files of the set
    command = [sys.executable, __file__, "--feed", str(folder)]
    children = [
        subprocess.Popen(
            [*command, str(index), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        _wait(children, "imported")
        start = time.perf_counter()
        _release(children)
        _wait(children, "first")
        seconds = time.perf_counter() - start
        _release(children)
        _wait(children, "read")
        weights = [weigh(pid, folder) for pid in family([child.pid for child in children])]
        if len(weights) < count * (1 + WORKERS):
            raise SystemExit(f"{len(weights)} processes were found, not {count} x {1 + WORKERS}")
        _release(children)
    finally:
        for child in children:
            child.communicate()
    shared, resident, private, total = zip(*weights, strict=True)
    return Figures(seconds, sum(shared), max(resident), sum(private), sum(total))


def import_grain(count: int) -> float:
    """Return the seconds in which processes, started at once, import Grain and end."""
    start = time.perf_counter()
    children = [subprocess.Popen([sys.executable, "-c", "import grain"]) for _ in range(count)]
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit("a process could not import grain")
    return time.perf_counter() - start


def _wait(children: list[subprocess.Popen[str]], word: str) -> None:
    for child in children:
        if (line := child.stdout.readline().strip()) != word:
            raise SystemExit(f"a process said {line!r}, not {word!r}")


def _release(children: list[subprocess.Popen[str]]) -> None:
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()


def family(pids: list[int]) -> list[int]:
    """Return processes and all their descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):  # it ended meanwhile
            continue
    found = list(pids)
    for pid in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def weigh(pid: int, folder: Path) -> tuple[int, int, int, int]:
    """Return PSS and resident bytes of files of the set, private bytes, and PSS, of one process."""
    shared = resident = private = total = 0
    root, ours = f"{folder}/", False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:  # the head of a mapping
            ours = root in line
        elif name == "Pss":
            shared += ours * int(value.split()[0])
            total += int(value.split()[0])
        elif name == "Rss":
            resident += ours * int(value.split()[0])
        elif name == "Anonymous":
            private += int(value.split()[0])
    return tuple(kilobytes * 1024 for kilobytes in (shared, resident, private, total))


def measure(folder: Path, size: int, repeats: int) -> list[Row]:
    """Prepare both sets, and weigh all numbers of processes over them."""
    large = prepare_synthetic(folder / "large", size, MAX_SEQ_LEN)
    small = prepare_synthetic(folder / "small", SMALL, MAX_SEQ_LEN)
    rows = []
    for count in PROCESSES:
        base = run(small, count)
        rounds = [(import_grain(count * WORKERS), run(large, count)) for _ in range(repeats)]
        importing = statistics.median(seconds for seconds, _ in rounds)
        ours = Figures(*map(statistics.median, zip(*(each for _, each in rounds), strict=True)))
        what = f"{count} x {WORKERS} workers over {size:.0e}".replace("e+0", "e")
        grown = max(0, ours.private - base.private)
        weight = ours.shared + grown
        rows += [
            Row(
                f"time to first batch, {what}",
                show_seconds(ours.seconds),
                f"{count * WORKERS} x import grain {show_seconds(importing)}",
                show_times(ours.seconds, importing),
                f"< {MOST_SECONDS} s",
                ours.seconds < MOST_SECONDS,
            ),
            Row(
                f"memory of the set, {what}",
                f"{weight / 1e6:,.0f} MB ({grown / 1e6:,.0f} private; "
                f"with Python {ours.total / 1e6:,.0f})",
                f"largest part of one process {ours.largest / 1e6:,.0f} MB",
                f"{weight / ours.largest:.2f}x",
                f"< {MOST_TIMES}x",
                weight < MOST_TIMES * ours.largest,
            ),
        ]
    return rows


def main() -> None:
    """Measure, or feed for a measuring parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=10**8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--feed", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.feed:
        path, index, count = arguments.feed
        feed(path, int(index), int(count))
        return
    with tempfile.TemporaryDirectory() as folder:
        report(measure(Path(folder), arguments.size, arguments.repeats))


if __name__ == "__main__":
    main()
