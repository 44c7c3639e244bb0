"""What the benchmarks share: timing, the machine line, lengths to pack, and tables in Markdown.

Every script prints one table of `Row`s: what was measured, our figure, the yardstick (a peer or a
physical limit, measured in the same run), their ratio, the target, and whether it was reached.
Tables go to stdout, the line on machine and versions to stderr, so that stdout can be pasted.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

REPEATS = 5
PACKAGES = ("seqpack_jax", "numpy", "jax", "grain", "pyarrow", "lightbinpack")


class Row(NamedTuple):
    """One line of a table; `reached` is None where there is no target."""

    what: str
    ours: str
    yardstick: str
    ratio: str
    target: str = "-"
    reached: bool | None = None


def medians(*runs: Callable[[], Any], number: int = 1) -> list[float]:
    """Return the median seconds of one call of each run, over 5 rounds after a warm-up.

    The runs take turns, so that a machine that slows down slows all of them.  Each round calls a
    run `number` times and counts the mean.
    """
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(REPEATS + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            for _ in range(number):
                run()
            if repeat:
                taken.append((time.perf_counter() - start) / number)
    return [statistics.median(taken) for taken in times]


def lognormal_lengths(n: int, max_seq_len: int, seed: int = 0) -> NDArray[np.int64]:
    """Draw lengths like those of web documents: median 300, sigma 1, clipped to `max_seq_len`."""
    draws = np.random.default_rng(seed).lognormal(np.log(300), 1.0, n)
    return np.clip(np.rint(draws), 1, max_seq_len).astype(np.int64)


def uniform_lengths(n: int, max_seq_len: int, seed: int = 0) -> NDArray[np.int64]:
    """Draw lengths from `[1, max_seq_len]`, all equally likely."""
    return np.random.default_rng(seed).integers(1, max_seq_len + 1, n)


def billion_counts(lengths: NDArray[np.int64], seed: int = 0) -> NDArray[np.int64]:
    """Draw the counts of 1e9 sequences with the length distribution of `lengths`."""
    counts = np.bincount(lengths)
    return np.random.default_rng(seed).multinomial(10**9, counts / len(lengths))


def show_seconds(seconds: float) -> str:
    """Write a duration with three digits, in the unit that suits it."""
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def show_times(ours: float, yardstick: float) -> str:
    """Write how many times as long as the yardstick we take."""
    return f"{_three_digits(ours / yardstick)}x as long"


def show_speedup(ours: float, yardstick: float) -> str:
    """Write how many times faster than the yardstick we are, or slower."""
    if ours > yardstick:
        return f"{_three_digits(ours / yardstick)}x slower"
    return f"{_three_digits(yardstick / ours)}x faster"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"| {' | '.join(padded)} |")


def report(rows: Sequence[Row]) -> None:
    """Print the table of a script, and on stderr where it was measured."""
    print(machine_line(), file=sys.stderr)
    verdicts = {None: "-", True: "yes", False: "no"}
    show_table(Row._fields, [(*row[:-1], verdicts[row.reached]) for row in rows])


def machine_line() -> str:
    """Say on which machine, and with which versions, the figures were measured."""
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}; "
        f"{platform.system()}, Python {platform.python_version()}, {versions}"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def peak_growth(run: Callable[[], Any]) -> int:
    """Return by how many bytes the resident set of this process grew at its peak during `run`.

    Linux only: the kernel is asked to forget the peak so far.  Call it in a process that has not
    freed much memory yet, because freed heap would be used again unseen.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024
