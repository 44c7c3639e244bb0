"""How far from the fewest rows possible is each packer, and what do the rows that are saved cost?

    python benchmarks/how_far_from_the_optimum.py
    SEQPACK_DATA=/path/to/length/sets python benchmarks/how_far_from_the_optimum.py

Counts of 1e4, 1e6 and 1e9 lengths of three distributions, and triplets that fill rows exactly.
When the folder named by `SEQPACK_DATA` holds them: the lengths of SQuAD 1.1 and of Wikipedia as
tokenised for BERT, of proteins in UniProt, and the 160 instances of Falkenauer (1996) from the
OR-Library, the fewest bins of which are known.

The first table is of `algorithm="optimal"` alone, the second of all packers, the third of all on
Falkenauer's instances.  Yardsticks: the lower bound that `"optimal"` proves, which no packing can
beat; and the peers LightBinPack (C++) and binpacking where they are installed.  What any of them
returns is checked to be a packing.  Seconds are medians of 5 runs, or of as many as fit into 50 s
(`"optimal"`) or 5 s (others); of Falkenauer's instances the slowest of one run each.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import REPEATS, machine_line, show_seconds, show_table
from numpy.typing import NDArray

import seqpack_jax as sp

SIZES = (10**4, 10**6, 10**9)
SECONDS = {1024: 10, 2048: 10, 8192: 60}  # that a plan of generated lengths may take
TRIPLETS = 10_000
PATIENCE = {"optimal": 50.0}  # seconds for all runs of one packer on one set; one is always made
PATIENCE_WITH_OTHERS = 5.0
OURS = ("next fit", "worst fit", "first fit", "best fit", "optimal")
PEERS = {"LightBinPack FFD": "ffd", "LightBinPack BFD": "bfd"}
PACKERS = (*OURS, *PEERS, "binpacking")
MOST = {"next fit": 2 * 10**7, "LightBinPack": 10**6, "binpacking": 2 * 10**4}  # sequences

OPTIMAL_HEADER = (
    *("set", "rows", "lower bound", "gap", "proved by", "seconds"),
    *("first fit decreasing", "saved", "target", "reached"),
)
FALKENAUER_HEADER = (
    *("set", "packer", "rows", "over the optima", "optimal", "most over", "exact bounds"),
    *("slowest", "target", "reached"),
)


class LengthSet(NamedTuple):
    """Counts of lengths to pack, and the target for `algorithm="optimal"`."""

    name: str
    counts: NDArray[np.int64]
    max_seq_len: int
    seconds: int = 10
    rows: int | None = None  # at most so many, else at most one over the lower bound

    @property
    def title(self) -> str:
        """What the lines of a table are called."""
        return f"{self.name}, {int(self.counts.sum()):,} to {self.max_seq_len:,}"


class Result(NamedTuple):
    """What a packer made of a set."""

    rows: int
    seconds: float
    runs: int
    certificate: Any = None

    @property
    def time(self) -> str:
        """The seconds, and of how many runs they are the median where it is not of 5."""
        seconds = show_seconds(self.seconds)
        return seconds if self.runs == REPEATS else f"{seconds} (of {self.runs})"


def generated_sets() -> Iterator[LengthSet]:
    """Yield the sets that need no data."""
    for max_seq_len, seconds in SECONDS.items():
        for name, chances in distributions(max_seq_len).items():
            for n in SIZES:
                counts = np.random.default_rng(0).multinomial(n, chances / chances.sum())
                yield LengthSet(name, counts, max_seq_len, seconds)
    yield LengthSet("triplets", triplet_counts(2048), 2048, 30, TRIPLETS + 1)


def distributions(max_seq_len: int) -> dict[str, NDArray[np.float64]]:
    """Return how likely each length is, `[max_seq_len + 1]`, up to a factor."""
    length = np.arange(max_seq_len + 1)
    low, high = max_seq_len // 4, 5 * max_seq_len // 8
    normal = statistics.NormalDist(np.log(300), 1.0)
    # Of lengths that are rounded, and clipped to 1 and to max_seq_len.
    below = [0.0, *(normal.cdf(x) for x in np.log(length[1:-1] + 0.5).tolist()), 1.0]
    return {
        f"uniform [{low:,}, {high:,}]": ((length >= low) & (length <= high)).astype(float),
        "lognormal(300, 1)": np.diff(below, prepend=0.0),
        f"uniform [1, {max_seq_len:,}]": (length > 0).astype(float),
    }


def triplet_counts(max_seq_len: int) -> NDArray[np.int64]:
    """Draw triplets that fill a row: two of the longest leave no room for any other."""
    rng, least = np.random.default_rng(0), max_seq_len // 4 + 1
    first = rng.integers(3 * max_seq_len // 8 + 1, max_seq_len - 2 * least + 1, TRIPLETS)
    second = rng.integers(least, max_seq_len - first - least + 1)
    return np.bincount(np.concatenate([first, second, max_seq_len - first - second]))


def real_sets(folder: Path) -> Iterator[LengthSet]:
    """Yield the sets of the folder that it holds."""
    if (folder / "packedbert_hist.npz").exists():
        with np.load(folder / "packedbert_hist.npz") as file:
            squad, wikipedia = (
                np.append(0, file[name]) for name in ("squad11_hist", "wikipedia_hist")
            )
        for max_seq_len in (384, 512, 1024, 2048):
            yield LengthSet("SQuAD 1.1", squad, max_seq_len)
        yield LengthSet("Wikipedia", wikipedia, 512)
    if (folder / "wikipedia512_sample200k.npy").exists():
        sample = np.load(folder / "wikipedia512_sample200k.npy")
        yield LengthSet("Wikipedia, a sample", np.bincount(sample), 512)
    if (folder / "protein_uniprot20k.npy").exists():
        lengths = np.load(folder / "protein_uniprot20k.npy")
        for max_seq_len in (1024, 2048, 8192):
            yield LengthSet("UniProt", np.bincount(lengths.clip(1, max_seq_len)), max_seq_len)


def falkenauer_sets(folder: Path, family: str) -> Iterator[tuple[LengthSet, int]]:
    """Yield each instance with the fewest rows possible."""
    with np.load(folder / "bpp_falkenauer.npz") as file:
        for i in np.flatnonzero(file["family"] == f"falkenauer_{family}").tolist():
            start, stop = file["offsets"][i : i + 2].tolist()
            counts = np.bincount(file["lengths"][start:stop])
            name, max_seq_len = str(file["name"][i]), int(file["capacity"][i])
            yield LengthSet(name, counts, max_seq_len), int(file["optimum"][i])


def packers(each: LengthSet, lengths: NDArray[np.int64]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every packer that can pack so many sequences, ready to run."""
    n, max_seq_len = int(each.counts.sum()), each.max_seq_len
    if n <= MOST["next fit"]:
        yield "next fit", lambda: sp.pack_sequences(lengths, max_seq_len, algorithm="next_fit")
    for name in OURS[1:]:
        algorithm = name if name == "optimal" else f"{name.replace(' ', '_')}_decreasing"
        options = {"progress": False} if name == "optimal" else {}
        yield (
            name,
            lambda algorithm=algorithm, options=options: sp.pack_length_histogram(
                each.counts, max_seq_len, algorithm=algorithm, **options
            ),
        )
    if n <= MOST["LightBinPack"] and find_spec("lightbinpack"):
        import lightbinpack

        as_list = lengths.tolist()
        for name, function in PEERS.items():
            run = getattr(lightbinpack, function)
            yield name, lambda run=run: run(as_list, max_seq_len)
    if n <= MOST["binpacking"] and find_spec("binpacking"):
        from binpacking import to_constant_volume

        as_dict = dict(enumerate(lengths.tolist()))
        yield "binpacking", lambda: to_constant_volume(as_dict, max_seq_len)


def measure(each: LengthSet, *, once: bool = False) -> dict[str, Result]:
    """Pack one set with every packer."""
    lengths = np.zeros(0, np.int64)
    if each.counts.sum() <= max(MOST.values()):
        lengths = np.repeat(np.arange(len(each.counts)), each.counts)
        np.random.default_rng(0).shuffle(lengths)
    results = {}
    for name, run in packers(each, lengths):
        patience = PATIENCE.get(name, PATIENCE_WITH_OTHERS)
        packed, taken = run_often(run, 0 if once else patience)
        rows, certificate = check(each, lengths, packed)
        results[name] = Result(rows, statistics.median(taken), len(taken), certificate)
    ours = results["optimal"]
    print(f"{each.title}: {ours.certificate}, {ours.time}", file=sys.stderr)
    bound = ours.certificate.lower_bound
    for name, result in results.items():
        if result.rows < bound:
            raise SystemExit(f"{each.title}: {name} has {result.rows} rows, the bound is {bound}")
    return results


def run_often(run: Callable[[], Any], patience: float) -> tuple[Any, list[float]]:
    """Run up to 5 times; return what came out, and the seconds of each run."""
    taken: list[float] = []
    while not taken or (len(taken) < REPEATS and sum(taken) + taken[-1] < patience):
        start = time.perf_counter()
        packed = run()
        taken.append(time.perf_counter() - start)
    return packed, taken


def check(each: LengthSet, lengths: NDArray[np.int64], packed: Any) -> tuple[int, Any]:
    """Return rows and certificate, once each sequence was found in one row and no row is over."""
    if isinstance(packed, sp.PackingPlan):
        packed.check(each.counts)
        return packed.num_bins, packed.certificate
    if not isinstance(packed, sp.Bins):  # bins of ids
        bins = [row for row in packed if row]
        ids = np.fromiter(chain.from_iterable(bins), np.int64)
        offsets = np.cumsum([0, *map(len, bins)])
        packed = sp.Bins(ids, offsets, each.max_seq_len)
    packed.check(lengths)
    return len(packed), None


def optimal_line(each: LengthSet, results: dict[str, Result]) -> tuple[str, ...]:
    """Return the line of one set in the first table."""
    ours, first_fit = results["optimal"], results["first fit"].rows
    bound, method = ours.certificate.lower_bound, ours.certificate.method
    saved = first_fit - ours.rows
    most = bound + 1 if each.rows is None else each.rows
    target = "gap <= 1" if each.rows is None else f"<= {each.rows:,} rows"
    return (
        each.title,
        *(f"{ours.rows:,}", f"{bound:,}", f"{ours.rows - bound:,}", method, ours.time),
        *(f"{first_fit:,}", f"{saved:,} ({saved / first_fit:.3%})"),
        *(f"{target}, < {each.seconds} s", verdict(ours.rows <= most, ours.seconds, each.seconds)),
    )


def verdict(dense: bool, seconds: float, limit: float) -> str:
    """Say whether a target was reached."""
    return "yes" if dense and seconds < limit else "no"


def packers_line(
    each: LengthSet, results: dict[str, Result], names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the line of one set in the second table."""
    bound = results["optimal"].certificate.lower_bound
    cells = (
        f"{result.rows:,} (+{result.rows - bound:,}), {result.time}" if result else "-"
        for result in map(results.get, names)
    )
    return (each.title, f"{bound:,}", *cells)


def falkenauer_lines(
    folder: Path, family: str, names: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    """Yield a line for each packer, on the 80 instances of one family."""
    pairs = list(falkenauer_sets(folder, family))
    optima = np.array([optimum for _, optimum in pairs])
    measured = [measure(each, once=True) for each, _ in pairs]
    target, seconds, least, most = {
        "u": ("80 optimal, < 2 s each", 2, 80, 0),
        "t": (">= 60 optimal, others 1 over, bounds exact, < 10 s each", 10, 60, 1),
    }[family]
    for name in names:
        results = [of[name] for of in measured]
        over = np.array([result.rows for result in results]) - optima
        slowest = max(result.seconds for result in results)
        optimal, bounds, reached = int(np.count_nonzero(over == 0)), "-", "-"
        if name == "optimal":
            bound = np.array([result.certificate.lower_bound for result in results])
            if (bound > optima).any() or (over < 0).any():
                raise SystemExit(f"{family}: a bound above an optimum, or rows below it")
            bounds = f"{np.count_nonzero(bound == optima)}"
            dense = optimal >= least and int(over.max()) <= most
            dense &= family == "u" or bool((bound == optima).all())
            reached = verdict(dense, slowest, seconds)
        yield (
            f"Falkenauer {family}, {len(pairs)} instances, {optima.sum():,} optimal rows",
            name,
            *(f"{optima.sum() + over.sum():,}", f"{over.sum():,}", f"{optimal}", f"{over.max():,}"),
            *(bounds, show_seconds(slowest), target if name == "optimal" else "-", reached),
        )


def notes() -> str:
    """Say what a saved row is worth, and what the tables leave out."""
    modules = ("lightbinpack", "binpacking")
    absent = [name for name in modules if not find_spec(name)]
    versions = [f"{name} {version(name)}" for name in ("highspy", *modules) if name not in absent]
    limits = ", ".join(f"{name} up to {limit:,}" for name, limit in MOST.items())
    missing = f"  Not installed here: {', '.join(absent)}." if absent else ""
    return (
        "\nSaved: of the rows of first fit decreasing.  A row costs a training step the same "
        "tokens however full it is, so 1% fewer rows are 1% fewer steps and tokens computed in "
        "every epoch.\n\n"
        "Worst, first and best fit take the longest first.  In brackets: rows over the lower bound "
        "that `optimal` proved, and of how many runs the seconds are the median, where not of "
        f"{REPEATS}.\n\n"
        f"With {', '.join(versions)}.{missing}  A dash: these packers take sequences one by one, "
        f"and were run on a limited number: {limits} (its time is quadratic)."
    )


def main() -> None:
    """Measure and print all tables."""
    print(machine_line(), file=sys.stderr)
    warm_up = triplet_counts(64)  # the solver is imported when it is needed first
    sp.pack_length_histogram(warm_up, 64, algorithm="optimal", progress=False)
    folder = Path(os.environ.get("SEQPACK_DATA", "."))
    measured = [(each, measure(each)) for each in chain(generated_sets(), real_sets(folder))]
    show_table(OPTIMAL_HEADER, [optimal_line(*each) for each in measured])
    print()
    names = tuple(name for name in PACKERS if any(name in of for _, of in measured))
    show_table(("set", "lower bound", *names), [packers_line(*each, names) for each in measured])
    if (folder / "bpp_falkenauer.npz").exists():
        print()
        lines = (line for family in "ut" for line in falkenauer_lines(folder, family, names))
        show_table(FALKENAUER_HEADER, list(lines))
    print(notes())


if __name__ == "__main__":
    main()
