"""The last bins: an integer program over the templates that a better plan can be made of.

A plan of `target` bins can only hold templates that are worth nearly a bin at the prices of the
relaxed problem: none may fall short by more than the relaxed solution leaves of `target`.
If those are few, all of them are listed, and HiGHS looks for whole numbers of them.

References:
    G. B. Dantzig, "Linear programming and extensions", 1963: fixing variables by reduced cost.
"""

from __future__ import annotations

import numpy as np

from seqpack_jax.planning.column_generation import (
    Float64,
    Master,
    Problem,
    Template,
    Work,
    generate,
    rounded_up,
    value_of,
    worth,
)
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.rounding import Bins, best_fit, num_bins

__all__ = ["pack_into"]

_TEMPLATES = 5_000  # in one integer program, at most
_SIZE = 1_000_000  # templates times lengths
_CELLS = 1 << 21  # partial templates times lengths that are looked at together
_NODES = 500  # of one integer program


def pack_into(problem: Problem, target: int, work: Work) -> Bins | None:
    """Look for a packing of at most `target` bins; None if none is found.

    Time: that of column generation, and of at most 500 nodes of branch and bound.
    """
    first = best_fit(problem)
    if num_bins(first) <= target:
        return first
    if target < 1:
        return None
    master = Master(problem)
    master.add(first)
    relaxed = generate(master, work, target=None)
    if rounded_up(relaxed.bins) > target or work.over:
        return None
    templates = _of_use(problem, relaxed.prices, target, work)
    if templates is None or len(templates) * len(problem.lengths) > _SIZE:
        return None
    program = Master(problem)
    program.add(templates)
    numbers = program.solve_whole(target, _NODES, work)
    if numbers is None:
        return None
    chosen = np.flatnonzero(numbers)
    return {program.templates[i]: int(numbers[i]) for i in chosen.tolist()}


def _of_use(problem: Problem, prices: Float64, target: int, work: Work) -> list[Template] | None:
    """List all templates that a packing into `target` bins can hold; None if they are too many.

    With prices at which no bin is worth more than 1, all bins together fall short of 1 each by
    `target - worth of all sequences`; so no bin alone falls short by more.  Templates grow by one
    sequence at a time, the longest first; what cannot become worth enough is left out.
    """
    values, contents = worth(problem, prices, work)
    prices, best = prices / values.max(), contents.best / values.max()
    least = 1 - (target - value_of(problem, prices)) - 1e-6
    held = np.zeros((1, 0), np.int64)  # indices of lengths, falling
    found: list[Template] = []
    while len(held) and held.shape[1] < (problem.max_segments or problem.max_seq_len):
        cells = len(prices) + held.shape[1]  # of each
        size = max(1, _CELLS // cells)
        work.spend(2e-8 * len(held) * cells)
        chunks: list[Int64] = []
        for start in range(0, len(held), size):
            chunks.append(_grown(problem, prices, best, least, held[start : start + size]))
            if sum(map(len, chunks)) > 10 * _TEMPLATES:
                return None
        held = np.concatenate(chunks)
        full = prices[held].sum(axis=1) >= least
        found += [tuple(row) for row in problem.lengths[held[full]].tolist()]
        if len(found) > _TEMPLATES or held.size > 2 * _CELLS or work.over:
            return None
    return found


def _grown(problem: Problem, prices: Float64, best: Float64, least: float, held: Int64) -> Int64:
    """Add each sequence, no longer than those before, that leaves `least` within reach."""
    lengths, every = problem.lengths, np.arange(len(prices))
    last = held[:, -1:] if held.shape[1] else np.full((1, 1), len(prices))
    room = problem.max_seq_len - lengths[held].sum(axis=1, keepdims=True) - lengths
    value = prices[held].sum(axis=1, keepdims=True) + prices
    # Of lengths, falling, only the last can be used up: none shorter has been taken.
    used_up = (held == last).sum(axis=1, keepdims=True) >= np.append(problem.demand, 1)[last]
    good = (room >= 0) & ((every < last) | ((every == last) & ~used_up))
    good &= value + best[np.maximum(room, 0)] >= least
    part, more = np.nonzero(good)
    return np.column_stack([held[part], more])
