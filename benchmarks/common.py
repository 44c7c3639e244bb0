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
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

REPEATS = 5
FILES = {
    "SQuAD 1.1": ("squad11_384.npy", 384),
    "Wikipedia": ("wikipedia512_sample200k.npy", 512),
    "UniProt": ("protein_uniprot20k.npy", 1024),
}
PACKAGES = (
    "seqpack_jax",
    "numpy",
    "jax",
    "flax",
    "grain",
    "pyarrow",
    "highspy",
    "lightbinpack",
    "binpacking",
    "seqpack",
)


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


def lognormal_lengths(
    n: int, max_seq_len: int, seed: int = 0, *, median: float = 300, sigma: float = 1.0
) -> NDArray[np.int64]:
    """Draw lengths clipped to `max_seq_len`; those of web documents unless told otherwise."""
    draws = np.random.default_rng(seed).lognormal(np.log(median), sigma, n)
    return np.clip(np.rint(draws), 1, max_seq_len).astype(np.int64)


def uniform_lengths(n: int, max_seq_len: int, seed: int = 0) -> NDArray[np.int64]:
    """Draw lengths from `[1, max_seq_len]`, all equally likely."""
    return np.random.default_rng(seed).integers(1, max_seq_len + 1, n)


def shared_sets(n: int) -> Iterator[tuple[str, NDArray[Any], int]]:
    """Yield name, lengths and capacity of two drawn sets of `n`, and of those in SEQPACK_DATA."""
    yield "lognormal", lognormal_lengths(n, 2048), 2048
    yield "uniform", uniform_lengths(n, 2048), 2048
    folder = Path(os.environ.get("SEQPACK_DATA", "."))
    for name, (file, max_seq_len) in FILES.items():
        if (folder / file).exists():
            yield name, np.load(folder / file).clip(1, max_seq_len), max_seq_len


def billion_counts(lengths: NDArray[np.int64], seed: int = 0) -> NDArray[np.int64]:
    """Draw the counts of 1e9 sequences with the length distribution of `lengths`."""
    counts = np.bincount(lengths)
    return np.random.default_rng(seed).multinomial(10**9, counts / len(lengths))


def token_records(lengths: NDArray[np.int64]) -> list[dict[str, NDArray[np.int32]]]:
    """Make records in memory, of the tokens 1, 2, 3 and so on."""
    return [{"tokens": np.arange(1, length + 1, dtype=np.int32)} for length in lengths]


class CutTokens:
    """Sequences of the lengths of a prepared set, cut out of one file; pickled by their folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._lengths = np.load(f"{folder}/lengths.npy", mmap_mode="r")
        self._tokens = np.asarray(np.load(f"{folder}/tokens.npy", mmap_mode="r"))

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitems__(self, ids: list[int]) -> list[NDArray[np.int32]]:
        """Return several sequences at once."""
        index = np.asarray(ids, np.int64)
        lengths = np.asarray(self._lengths[index], np.int64)
        starts = index * 2_654_435_761 % (len(self._tokens) - lengths)
        pairs = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        return [self._tokens[start:stop] for start, stop in pairs]

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self.__getitems__([index])[0]

    def __reduce__(self) -> tuple[type[CutTokens], tuple[str]]:
        return CutTokens, (self.folder,)


def prepare_synthetic(folder: Path, size: int, max_seq_len: int) -> Path:
    """Make a folder with lognormal lengths, `prepared` from them, and 256 MB for `CutTokens`."""
    from seqpack_jax import prepare

    folder.mkdir()
    lengths = np.lib.format.open_memmap(folder / "lengths.npy", "w+", np.int32, (size,))
    for number, start in enumerate(range(0, size, 10**7)):
        part = lengths[start : start + 10**7]
        part[:] = lognormal_lengths(len(part), max_seq_len, number)
    lengths.flush()
    prepare(str(folder / "lengths.npy"), str(folder / "prepared"), max_seq_len, workers=2)
    tokens = np.random.default_rng(0).integers(1, 50_000, 1 << 26, np.int32)
    np.save(folder / "tokens.npy", tokens)
    return folder


def quiet_grain() -> None:
    """Get ready for Grain: it reads absl flags that no one has parsed here, and logs a lot."""
    from absl import flags, logging

    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.FATAL)


class Packed(NamedTuple):
    """What came out of a pipeline that packs: real tokens, all rows, and those with a token."""

    tokens: int
    rows: int
    used_rows: int


def count_packed(items: Iterable[Any]) -> Packed:
    """Drain a pipeline of rows or batches, ours or Grain's, and count."""
    counted = np.zeros(3, np.int64)
    for item in items:
        if isinstance(item, tuple):  # of Grain's PackAndBatchOperation
            (segment_ids,) = item[1].values()
        else:
            names = ("segment_ids", "tokens_segment_ids")
            segment_ids = next(item[name] for name in names if name in item)
        segment_ids = np.atleast_2d(segment_ids)
        real = segment_ids > 0
        counted += (np.count_nonzero(real), len(segment_ids), np.count_nonzero(real.any(axis=1)))
    return Packed(*counted.tolist())


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
