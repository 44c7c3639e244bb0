"""From shares of templates to whole bins: fix some, solve again for what is left, and so on.

A relaxed solution uses few templates, and all but less than one bin of each can be fixed at once.
What is left is small, whatever the number of sequences: it is solved anew, with new templates, the
largest shares are fixed, and so on (diving).  At each level best fit decreasing completes the plan.
If the last few bins do not come out, an integer program over templates that can be in a better plan
starts again from an earlier level.

References:
    G. Belov, G. Scheithauer, "A branch-and-cut-and-price algorithm for one-dimensional stock
    cutting and two-dimensional two-stage cutting", 2006.
    R. Sadykov, F. Vanderbeck, "Column generation for extended formulations", 2013: diving.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from seqpack_jax.arrays import offsets_of
from seqpack_jax.planning.column_generation import (
    WHOLE,
    Float64,
    Master,
    Problem,
    Relaxation,
    Template,
    Work,
    generate,
)
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.heuristics import Templates, best_fit_decreasing

__all__ = [
    "Bins",
    "Level",
    "added",
    "best_fit",
    "covers",
    "dive",
    "num_bins",
    "realize",
    "with_demand",
]

_ROUNDS = 10  # of column generation at each level

Bins = dict[Template, int]  # how many bins of each template


class Level(NamedTuple):
    """How far a dive has come."""

    fixed: Bins
    left: Int64  # [m], sequences that `fixed` has no slot for


def num_bins(bins: Bins) -> int:
    """Return how many bins there are of all templates."""
    return sum(bins.values())


def best_fit(problem: Problem) -> Bins:
    """Pack by best fit decreasing."""
    if not len(problem.lengths):
        return {}
    counts = np.zeros(int(problem.lengths[-1]) + 1, np.int64)
    counts[problem.lengths] = problem.demand
    lengths, offsets, multiplicity = best_fit_decreasing(
        counts, problem.max_seq_len, problem.max_segments
    )
    values = lengths.tolist()
    templates = (tuple(values[a:b]) for a, b in pairwise(offsets.tolist()))
    return dict(zip(templates, multiplicity.tolist(), strict=True))


def with_demand(problem: Problem, demand: Int64) -> Problem:
    """Return the problem of fewer sequences, over the lengths that are left."""
    kept = demand > 0
    return problem._replace(lengths=problem.lengths[kept], demand=demand[kept])


def _served(slots: Int64, demand: Int64) -> Int64:
    """Return how many sequences of each length get a slot of theirs or a longer one, `[m]`.

    The longest first.  With `free` the slots that are left when all of a length and longer have
    been served, `free[i] = max(0, free[i + 1] + slots[i] - demand[i])`.
    """
    slots, demand = slots[::-1], demand[::-1]
    surplus = np.cumsum(slots - demand)
    free = surplus - np.minimum.accumulate(np.minimum(surplus, 0))
    before = np.concatenate([[0], free[:-1]])
    return np.minimum(demand, before + slots)[::-1]


def covers(problem: Problem, bins: Bins) -> bool:
    """Return whether every sequence gets a slot."""
    served = _served(_slots_of(problem, bins), problem.demand)
    return bool((served == problem.demand).all())


def _slots_of(problem: Problem, bins: Bins) -> Int64:
    """Return how many slots of each length these bins have, `[m]`."""
    lengths = np.array([length for template in bins for length in template], np.int64)
    numbers = np.repeat(
        np.array(list(bins.values()), np.int64), [len(template) for template in bins]
    )
    slots = np.zeros(len(problem.lengths), np.int64)
    np.add.at(slots, np.searchsorted(problem.lengths, lengths), numbers)
    return slots


def dive(
    problem: Problem,
    master: Master,
    relaxed: Relaxation,
    *,
    target: int,
    share: float,
    work: Work,
) -> Iterator[Level]:
    """Yield levels, with ever more bins fixed, until nothing is left or the work is over.

    At each level more templates are generated, unless those known allow `target` bins in all.  Of
    templates with less than one bin each, that `share` is fixed which has the largest amounts.
    """
    fixed: Bins = {}
    left = problem.demand
    amounts = relaxed.amounts
    while True:
        whole = np.floor(amounts + WHOLE).astype(np.int64)
        chosen = np.flatnonzero(whole)
        if len(chosen):
            new = {master.templates[i]: int(whole[i]) for i in chosen.tolist()}
        else:
            new = _largest(problem, master.templates, amounts, left, share)
        left = left - _served(_slots_of(problem, new), left)
        fixed = added(fixed, new)
        yield Level(fixed, left)
        if not left.any() or work.over:
            return
        master.demand(left)
        target_left = target - num_bins(fixed)
        amounts = generate(master, work, target=target_left, rounds=_ROUNDS).amounts


def added(fixed: Bins, more: Bins) -> Bins:
    """Return the bins of both."""
    return fixed | {template: fixed.get(template, 0) + number for template, number in more.items()}


def _largest(
    problem: Problem, templates: list[Template], amounts: Float64, left: Int64, share: float
) -> Bins:
    """Return one bin of each template with a large amount, of those that still fit together."""
    order = np.argsort(-amounts, kind="stable")
    order = order[amounts[order] > WHOLE]
    large = min(int(np.count_nonzero(amounts[order] > 0.8)), len(order) // 3)
    new: Bins = {}
    for i in order[: max(1, int(len(order) * share), large)].tolist():
        served = _served(_slots_of(problem, {templates[i]: 1}), left)
        if new and served @ problem.lengths < 0.97 * sum(templates[i]):
            continue  # what it holds has gone into others
        left = left - served
        new[templates[i]] = 1
    return new


def realize(problem: Problem, bins: Bins) -> Templates:
    """Write the sequences themselves into slots, which may be longer; they must have one each.

    The longest sequences get the longest slots.  In the order of slots by falling length, the bins
    of one template take a range of slots at each of its places; a template is split wherever one of
    these ranges goes from one length to another.

    Time: O(size of the result), in whole arrays.
    """
    sizes = np.array([len(template) for template in bins], np.int64)
    numbers = np.array(list(bins.values()), np.int64)
    slots = np.array([length for template in bins for length in template], np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)  # the template of each place
    order = np.argsort(-slots, kind="stable")
    starts = np.empty_like(slots)
    starts[order] = np.cumsum(numbers[owner][order]) - numbers[owner][order]
    # Sequence `rank` by falling length is of length `values[searchsorted(ends, rank, "right")]`.
    values = np.append(problem.lengths[::-1], 0)
    ends = np.cumsum(problem.demand[::-1])
    low = np.searchsorted(ends, starts, side="right")
    high = np.searchsorted(ends, starts + numbers[owner])
    changes = np.maximum(high - low, 0)
    at = np.arange(int(changes.sum())) - np.repeat(offsets_of(changes)[:-1], changes)
    cuts = ends[at + np.repeat(low, changes)] - np.repeat(starts, changes)
    begins = np.concatenate([np.arange(len(sizes)), np.repeat(owner, changes)])
    parts = np.unique(np.column_stack([begins, np.append(np.zeros_like(sizes), cuts)]), axis=0)
    template, cut = parts.T
    last = np.append(template[1:] != template[:-1], True)
    many = np.where(last, numbers[template], np.append(cut[1:], 0)) - cut
    part = np.repeat(np.arange(len(parts)), sizes[template])
    place = (
        np.arange(len(part)) - offsets_of(sizes[template])[part] + offsets_of(sizes)[template[part]]
    )
    held = values[np.searchsorted(ends, starts[place] + cut[part], side="right")]
    return _as_templates(part[held > 0], held[held > 0], many)


def _as_templates(part: Int64, held: Int64, many: Int64) -> Templates:
    """Return bins in arrays, falling and each once, so that equal bins give equal plans."""
    held = held[np.lexsort((-held, part))]
    bins: Bins = {}
    values, offsets = held.tolist(), offsets_of(np.bincount(part, minlength=len(many))).tolist()
    for (start, stop), number in zip(pairwise(offsets), many.tolist(), strict=True):
        if template := tuple(values[start:stop]):
            bins[template] = bins.get(template, 0) + number
    ordered = sorted(bins.items(), reverse=True)
    lengths = np.array([length for template, _ in ordered for length in template], np.int32)
    multiplicity = np.array([number for _, number in ordered], np.int64)
    return Templates(lengths, offsets_of([len(template) for template, _ in ordered]), multiplicity)
