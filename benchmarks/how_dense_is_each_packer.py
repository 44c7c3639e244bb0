"""How dense is each packer: rows, and the gap to the fewest that the tokens alone would need?

    python benchmarks/how_dense_is_each_packer.py
    SEQPACK_DATA=/path/to/length/sets python benchmarks/how_dense_is_each_packer.py

200,000 lognormal and uniform lengths, and, when the folder named by `SEQPACK_DATA` holds them, the
lengths of SQuAD 1.1 and of Wikipedia as tokenised for BERT, and of proteins in UniProt.

Yardsticks: the best lower bound of `lower_bound`, which no packing can beat; and
LightBinPack's OBFD (C++) where it is installed.  Seconds are those of one call from lengths to ids.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from common import (
    machine_line,
    medians,
    shared_sets,
    show_seconds,
    show_table,
)

import seqpack_jax as sp

SIZE = 200_000
ALGORITHMS = ("next_fit", "worst_fit_decreasing", "first_fit_decreasing", "best_fit_decreasing")
HEADER = ("set", "packer", "rows", "lower bound", "over it", "efficiency", "seconds")


def packers(lengths: np.ndarray, max_seq_len: int) -> dict[str, Callable[[], Any]]:
    """Return every packer, ready to run on these lengths."""
    runs: dict[str, Callable[[], Any]] = {
        algorithm.replace("_", " "): lambda algorithm=algorithm: sp.pack_sequences(
            lengths, max_seq_len, algorithm=algorithm
        )
        for algorithm in ALGORITHMS
    }
    if find_spec("lightbinpack"):
        import lightbinpack

        as_list = lengths.tolist()
        runs["LightBinPack OBFD"] = lambda: lightbinpack.obfd(as_list, max_seq_len)
    return runs


def measure(name: str, lengths: np.ndarray, max_seq_len: int) -> list[tuple[str, ...]]:
    """Pack one set with every packer."""
    bound = sp.lower_bound(np.bincount(lengths), max_seq_len).value
    title = f"{name}, {len(lengths):,} to {max_seq_len:,}"
    runs = packers(lengths, max_seq_len)
    table = []
    for (packer, run), seconds in zip(runs.items(), medians(*runs.values()), strict=True):
        rows = len(run())
        cells = (f"{rows:,}", f"{bound:,}", f"{rows / bound - 1:.3%}")
        efficiency = int(lengths.sum()) / (rows * max_seq_len)
        table.append((title, packer, *cells, f"{efficiency:.3%}", show_seconds(seconds)))
    return table


if __name__ == "__main__":
    print(machine_line(), file=sys.stderr)
    sets = ((name, lengths.astype(np.int64), cap) for name, lengths, cap in shared_sets(SIZE))
    show_table(HEADER, [line for each in sets for line in measure(*each)])
