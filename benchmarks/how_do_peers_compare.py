"""How do the packers compare: how dense, how fast, and in how much memory?

    python benchmarks/how_do_peers_compare.py
    SEQPACK_DATA=/path/to/length/sets python benchmarks/how_do_peers_compare.py

Every packer gets the same lengths, in the form that it takes fastest, in a process of its own.
What comes out is checked to be a packing: each sequence once, whole, and no row too full.  Packers
are of three kinds, to be compared with their own kind:

- "ids": from lengths to the ids in every row;
- "templates": from lengths to how often each combination of lengths occurs, `np.bincount` included;
- "tokens": from 1-D arrays of tokens to filled rows, read through Grain without threads or
  workers.  Ours come in batches, those of Grain's packers one by one, both with segment ids and
  positions; padded batches hold tokens alone.  "Bucketed" are batches of 64 sequences of like
  length, as wide as the longest, rounded up to a 16th of the capacity: up to 16 shapes to compile
  for, and no two lengths mixed.

Packers of tokens, and those whose time grows with the square of the number of sequences, get the
first 20,000 or 10,000 of a set.  Efficiency is tokens over the cells of all rows that hold any.
The peak is by how much the resident set grew in the first run, which also warms up; the time is the
median of the runs after it, five unless they would take over 3 s, or else of that run.

Peers that are not installed are named.  The seed, seqpack 1.0.0, is found where it is installed
(`pip install --no-deps seqpack==1.0.0`: the module that packs does without torch), or in the folder
that SEQPACK_SEED names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import (
    lognormal_lengths,
    machine_line,
    peak_growth,
    quiet_grain,
    shared_sets,
    show_table,
    token_records,
)
from numpy.typing import NDArray

import seqpack_jax as sp

SIZE, LARGE, BATCH = 200_000, 1_000_000, 64
FEW, FEWER = 20_000, 10_000  # sequences for packers of tokens, and for quadratic ones
REPEATS, SECONDS = 5, 3.0  # runs after the warm-up, and what they may take in all
HEADER = (
    "set",
    "packer",
    "gives",
    "sequences",
    "rows",
    "efficiency",
    "sequences/s",
    "peak",
    "runs",
)

Lengths = NDArray[np.int32]
Run = Callable[[], Any]


# --- packers of lengths: each is given lengths and a capacity, and returns what to time -----------


def ours(lengths: Lengths, max_seq_len: int, **options: Any) -> Run:
    """`pack_sequences`."""
    return lambda: sp.pack_sequences(lengths, max_seq_len, **options)


def our_plan(lengths: Lengths, max_seq_len: int, algorithm: str) -> Run:
    """`pack_length_histogram`."""
    options: dict[str, Any] = {"algorithm": algorithm}
    if algorithm == "optimal":
        options["progress"] = False
    return lambda: sp.pack_length_histogram(np.bincount(lengths), max_seq_len, **options)


def light(lengths: Lengths, max_seq_len: int, algorithm: str) -> Run:
    """A packer of LightBinPack (C++), which is fastest on a list."""
    import lightbinpack

    pack, given = getattr(lightbinpack, algorithm), lengths.tolist()
    return lambda: pack(given, max_seq_len)


def binpacking(lengths: Lengths, max_seq_len: int, size: int) -> Run:
    """PyPI's binpacking, on chunks of `size` sequences."""
    from binpacking import to_constant_volume

    starts = range(0, len(lengths), size)
    chunks = [dict(enumerate(lengths[at : at + size].tolist(), at)) for at in starts]
    return lambda: [list(row) for each in chunks for row in to_constant_volume(each, max_seq_len)]


def seed_ids(lengths: Lengths, max_seq_len: int, name: str) -> Run:
    """A packer of the seed that returns ids."""
    pack = getattr(seed_module(), name)
    return lambda: pack(lengths, max_seq_len)


def seed_templates(lengths: Lengths, max_seq_len: int, name: str) -> Run:
    """A packer of the seed that takes `{length: count}`."""
    pack = getattr(seed_module(), name)

    def run() -> Any:
        counts = np.bincount(lengths)
        found = np.flatnonzero(counts)
        return pack(dict(zip(found.tolist(), counts[found].tolist(), strict=True)), max_seq_len)

    return run


def seed_path() -> Path | None:
    """Return where the seed's module is, if anywhere; its package itself asks for torch."""
    if folder := os.environ.get("SEQPACK_SEED"):
        return Path(folder) / "seqpack" / "packing.py"
    spec = importlib.util.find_spec("seqpack")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "packing.py"


def seed_module() -> Any:
    """Load the seed's module by its path."""
    spec = importlib.util.spec_from_file_location("seed_packing", seed_path())
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    return packing


# --- packers of tokens: what is returned makes a fresh iterable of rows or batches -------------


def read(source: Any) -> Any:
    """Iterate over a source in this process and thread."""
    import grain

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.source(source).to_iter_dataset(options)


def planned(lengths: Lengths, max_seq_len: int) -> Run:
    """`pack_dataset`: plan, then fill batches; the plan is made anew in each run."""
    tokens = [record["tokens"] for record in token_records(lengths)]
    return lambda: read(sp.pack_dataset(tokens, max_seq_len, batch_size=BATCH))


def streamed(lengths: Lengths, max_seq_len: int, rows: int) -> Run:
    """`PackIterDataset`, in batches of `rows`."""
    records = token_records(lengths)
    return lambda: sp.PackIterDataset(read(records), max_seq_len, rows)


def windowed(lengths: Lengths, max_seq_len: int, name: str, rows: int) -> Run:
    """One of Grain's packers, with `rows` open rows."""
    import grain

    pack, shape = getattr(grain.experimental, name), {"tokens": max_seq_len}
    records = token_records(lengths)
    return lambda: pack(read(records), length_struct=shape, num_packing_bins=rows)


def padded(lengths: Lengths, max_seq_len: int, bucketed: bool) -> Run:
    """Batches of one sequence per row; `bucketed` ones hold sequences of like length."""
    order = np.argsort(lengths, kind="stable") if bucketed else np.arange(len(lengths))
    records = token_records(lengths)
    step = max(1, max_seq_len // 16) if bucketed else max_seq_len

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, len(order), BATCH):
            part = [records[i]["tokens"] for i in order[start : start + BATCH]]
            width = -(-max(map(len, part)) // step) * step
            tokens = np.zeros((len(part), min(width, max_seq_len)), np.int32)
            for row, each in zip(tokens, part, strict=True):
                row[: len(each)] = each
            yield {"tokens": tokens}

    return batches


class Packer(NamedTuple):
    """One line of the table for each set."""

    gives: str
    make: Callable[[Lengths, int], Run]
    package: str = "seqpack_jax"
    most: int = LARGE  # sequences


PACKERS = {
    "best fit": Packer("ids", ours),
    "next fit": Packer("ids", partial(ours, algorithm="next_fit")),
    "LightBinPack OBFD": Packer("ids", partial(light, algorithm="obfd"), "lightbinpack"),
    "LightBinPack OBFDP": Packer("ids", partial(light, algorithm="obfdp"), "lightbinpack"),
    "LightBinPack NF": Packer("ids", partial(light, algorithm="nf"), "lightbinpack"),
    "binpacking": Packer("ids", partial(binpacking, size=FEWER), "binpacking", FEWER),
    "binpacking, 1,000 at once": Packer("ids", partial(binpacking, size=1000), "binpacking", SIZE),
    "seqpack 1.0.0, heap": Packer("ids", partial(seed_ids, name="heap_pack_sequences"), "seqpack"),
    "seqpack 1.0.0, greedy": Packer(
        "ids", partial(seed_ids, name="greedy_pack_sequences"), "seqpack", FEWER
    ),
    "best fit, planned": Packer("templates", partial(our_plan, algorithm="best_fit_decreasing")),
    "optimal": Packer("templates", partial(our_plan, algorithm="optimal"), "highspy"),
    "seqpack 1.0.0, histogram": Packer(
        "templates", partial(seed_templates, name="pack_length_histogram"), "seqpack"
    ),
    "seqpack 1.0.0, batched": Packer(
        "templates", partial(seed_templates, name="pack_length_histogram_batched"), "seqpack"
    ),
    "pack_dataset": Packer("tokens", planned, most=FEW),
    **{
        f"PackIterDataset, {rows:,} rows": Packer(
            "tokens", partial(streamed, rows=rows), "grain", FEW
        )
        for rows in (8, 64, 1024)
    },
    **{
        f"Grain {name}, {rows:,} rows": Packer(
            "tokens", partial(windowed, name=f"{name}PackIterDataset", rows=rows), "grain", FEW
        )
        for name in ("FirstFit", "BestFit")
        for rows in (8, 64, 1024)
    },
    "padded": Packer("tokens", partial(padded, bucketed=False), most=FEW),
    "padded, bucketed": Packer("tokens", partial(padded, bucketed=True), most=FEW),
}


# --- what comes out must be a packing ---------------------------------------------------------


class Packing(NamedTuple):
    """What a packer made, in rows that hold a token."""

    rows: int
    cells: int


def require(holds: bool, problem: str) -> None:
    """Stop unless it holds."""
    if not holds:
        raise SystemExit(f"not a packing: {problem}")


def check_ids(bins: Any, lengths: Lengths, max_seq_len: int) -> Packing:
    """Check lists of ids."""
    if isinstance(bins, sp.Bins):
        ids, sizes = bins.ids, np.diff(bins.offsets)
    else:
        ids = np.fromiter(chain.from_iterable(bins), np.int64)
        sizes = np.fromiter(map(len, bins), np.int64)
    require(np.array_equal(np.sort(ids), np.arange(len(lengths))), "ids are missing or doubled")
    rows = np.repeat(np.arange(len(sizes)), sizes)
    fills = np.bincount(rows, weights=lengths[ids], minlength=len(sizes))
    require(sizes.min() > 0 and fills.max() <= max_seq_len, "a row is empty or too full")
    return Packing(len(sizes), len(sizes) * max_seq_len)


def check_templates(plan: Any, lengths: Lengths, max_seq_len: int) -> Packing:
    """Check combinations of lengths, and how often each occurs."""
    templates = plan.to_counter() if isinstance(plan, sp.PackingPlan) else plan
    held = np.zeros(max_seq_len + 1, np.int64)
    for template, times in templates.items():
        np.add.at(held, list(template), times)
        require(0 < sum(template) <= max_seq_len, "a row is empty or too full")
    counts = np.bincount(lengths, minlength=max_seq_len + 1)
    require(np.array_equal(held, counts), "lengths are missing or doubled")
    rows = sum(templates.values())
    return Packing(rows, rows * max_seq_len)


def check_tokens(items: Iterable[Any], lengths: Lengths, max_seq_len: int) -> Packing:
    """Check rows: the tokens of each sequence count from 1, so that the rows tell its length."""
    rows = cells = 0
    held = np.zeros(max_seq_len + 1, np.int64)
    for item in items:
        tokens = np.atleast_2d(item["tokens"])
        tokens = tokens[tokens.any(axis=1)]
        before, after = np.zeros((2, *tokens.shape), np.int64)
        before[:, 1:], after[:, :-1] = tokens[:, :-1], tokens[:, 1:]
        require(bool(np.all((tokens <= 1) | (before == tokens - 1))), "a sequence is torn")
        ends = tokens[(tokens > 0) & (after != tokens + 1)]
        held += np.bincount(ends, minlength=max_seq_len + 1)
        rows, cells = rows + len(tokens), cells + tokens.size
    counts = np.bincount(lengths, minlength=max_seq_len + 1)
    require(np.array_equal(held, counts), "sequences are missing or doubled")
    return Packing(rows, cells)


# --- measuring -----------------------------------------------------------------------------------


def run_here(name: str, lengths: Lengths, max_seq_len: int) -> dict[str, Any]:
    """Measure one packer in this process."""
    packer = PACKERS[name]
    has_tokens = packer.gives == "tokens"
    if has_tokens:
        quiet_grain()

    def timed(make: Run) -> tuple[float, Any]:
        start = time.perf_counter()
        result = deque(make(), maxlen=0) if has_tokens else make()
        return time.perf_counter() - start, result

    timed(packer.make(lengths[:10], max_seq_len))  # loads what is loaded late
    make, first = packer.make(lengths, max_seq_len), []
    peak = peak_growth(lambda: first.append(timed(make)))
    ((seconds, result),) = first
    check = {"ids": check_ids, "templates": check_templates, "tokens": check_tokens}[packer.gives]
    packing = check(make() if has_tokens else result, lengths, max_seq_len)
    runs = min(REPEATS, int(SECONDS / seconds))
    seconds = statistics.median([timed(make)[0] for _ in range(runs)] or [seconds])
    return {**packing._asdict(), "peak": peak, "seconds": seconds, "runs": max(1, runs)}


def measure(title: str, name: str, file: Path, max_seq_len: int) -> tuple[str, ...]:
    """Measure one packer in a process of its own, and return its line."""
    packer, lengths = PACKERS[name], np.load(file)[: PACKERS[name].most]
    if not is_installed(packer.package):
        return (title, f"{name}: not installed", packer.gives, *("-" * 6))
    command = [sys.executable, __file__, "--packer", name, "--lengths", str(file)]
    command += ["--max-seq-len", str(max_seq_len)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    return (
        title,
        name,
        packer.gives,
        f"{len(lengths):,}",
        f"{figures['rows']:,}",
        f"{int(lengths.sum()) / figures['cells']:.3%}",
        show_rate(len(lengths) / figures["seconds"]),
        f"{figures['peak'] / 1e6:,.1f} MB",
        str(figures["runs"]),
    )


def is_installed(package: str) -> bool:
    """Say whether a peer is there."""
    if package == "seqpack":
        return (path := seed_path()) is not None and path.exists()
    return importlib.util.find_spec(package) is not None


def show_rate(rate: float) -> str:
    """Write sequences per second with three digits."""
    value, unit = (rate / 1e6, " M") if rate >= 1e6 else (rate / 1e3, " k")
    return (f"{value:.0f}" if value >= 100 else f"{value:#.3g}") + unit


def length_sets() -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield the name, the lengths and the capacity of each set."""
    yield from shared_sets(SIZE)
    yield "lognormal", lognormal_lengths(LARGE, 2048), 2048


def compare(name: str, lengths: np.ndarray, max_seq_len: int) -> list[tuple[str, ...]]:
    """Return the lines of one set, the first of which no packing can beat."""
    title = f"{name}, {len(lengths):,} to {max_seq_len:,}"
    bound = sp.lower_bound(np.bincount(lengths), max_seq_len).value
    most = f"{int(lengths.sum()) / (bound * max_seq_len):.3%}"
    lines = [(title, "lower bound", "-", f"{len(lengths):,}", f"{bound:,}", most, "-", "-", "-")]
    packers = [name for name in PACKERS if len(lengths) < LARGE or PACKERS[name].most == LARGE]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lengths.npy"
        np.save(file, lengths.astype(np.int32))
        return lines + [measure(title, each, file, max_seq_len) for each in packers]


def main() -> None:
    """Compare all packers, or run one of them for a comparing parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--packer", choices=PACKERS, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-seq-len", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.packer:
        lengths = np.load(arguments.lengths)[: PACKERS[arguments.packer].most]
        print(json.dumps(run_here(arguments.packer, lengths, arguments.max_seq_len)))
        return
    print(machine_line(), file=sys.stderr)
    show_table(HEADER, [line for each in length_sets() for line in compare(*each)])


if __name__ == "__main__":
    main()
