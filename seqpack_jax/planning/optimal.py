"""Provably optimal plans, or plans with a proof of how far from the optimum they are at most.

Best fit decreasing and the bounds of `bounds` often meet at once.  If not, column generation raises
the bound, its solution is rounded to whole bins level by level, and integer programs look for the
last bins that are too many.  All of it works on the histogram: a billion sequences take as long as
a thousand of the same lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from seqpack_jax.planning.bounds import Bound, bound_of_lengths
from seqpack_jax.planning.closing import pack_into
from seqpack_jax.planning.column_generation import (
    Float64,
    Master,
    Problem,
    UnsolvedError,
    Work,
    cost_of_worth,
    generate,
    proved_bound,
    rounded_up,
)
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.heuristics import Templates
from seqpack_jax.planning.rounding import (
    Bins,
    Level,
    added,
    best_fit,
    covers,
    dive,
    num_bins,
    realize,
    with_demand,
)
from seqpack_jax.terminal import is_shown, stderr_console

__all__ = ["Proven", "optimal_templates"]

_LOG = logging.getLogger(__name__)
_BUDGET = 8.0  # units of work, for rows of up to 2048 tokens; in proportion for longer ones,
_LONGEST = 6.0  # but no more than so many times that
_UNTIL = 0.7  # the share of the work after which the relaxed problem is good enough
_SHARES = (0.2, 0.05)  # of the bins left that a level fixes, in the first and the second dive
_BEST_FIT = 1e-5  # work per distinct length
_FEW = 8  # bins that the first integer program is about
_MANY = 400  # and the last one, at most
_GROWTH = 1.5  # from one to the next, at least

Told = Callable[[int, int, float], None]  # of bins, bound, and the share of the work that is done


class Proven(NamedTuple):
    """Bins, and what proves that there must be nearly so many."""

    templates: Templates
    bound: Bound
    interrupted: bool = False  # by Ctrl-C


def optimal_templates(
    counts: Int64,
    max_seq_len: int,
    max_segments: int | None = None,
    *,
    budget: float | None = None,
    time_limit: float | None = None,
    progress: bool | None = False,
) -> Proven:
    """Pack into the fewest bins, or nearly, and prove how few there can be.

    Never more bins than best fit decreasing.  On Ctrl-C, the best found so far is returned.

    Time: `budget` seconds, about, at most; whatever the number of sequences.

    Args:
        counts: int64 `[max_len + 1]`, checked.
        max_seq_len: capacity of a bin in tokens.
        max_segments: the most sequences that a bin may hold, None for no cap.
        budget: units of work, each about a second; None for 8, or up to 48 in proportion to
            `max_seq_len` above 2048.
        time_limit: seconds of time; with it, two runs may give two results.
        progress: whether to show progress on stderr; None to do so on a terminal.

    Example:
        >>> proven = optimal_templates(np.bincount([6, 5, 4, 3, 3, 3]), 12)
        >>> proven.templates.multiplicity.sum(), proven.bound
        (np.int64(2), Bound(value=2, method='volume'))
    """
    lengths = np.flatnonzero(counts)
    if not len(lengths):
        nothing = np.zeros(0, np.int64)
        return Proven(
            Templates(nothing.astype(np.int32), np.zeros(1, np.int64), nothing), Bound(0, "volume")
        )
    if budget is None:
        budget = _BUDGET * min(max(1.0, max_seq_len / 2048), _LONGEST)
    if max_segments is not None and max_segments >= max_seq_len // int(lengths[0]):
        max_segments = None  # no bin can hold more
    problem = Problem(lengths, counts[lengths], max_seq_len, max_segments)
    work = Work(budget, time_limit)
    interrupted = False
    with _shown(progress) as told:
        search = _Search(problem, work, told)
        try:
            try:
                search.run()
            except UnsolvedError as error:
                level = logging.INFO if work.over else logging.WARNING
                _LOG.log(level, "the search for a better plan ended early: %s", error)
                search.prove()
        except KeyboardInterrupt:
            interrupted = True
            with suppress(KeyboardInterrupt):
                search.prove()
            bins, bound = f"{num_bins(search.bins):,}", f"{search.bound.value:,}"
            _LOG.warning("interrupted: the best plan so far has %s rows, bound %s", bins, bound)
    return Proven(realize(problem, search.bins), search.bound, interrupted)


class _Search:
    """The best packing so far, and the best bound."""

    def __init__(self, problem: Problem, work: Work, told: Told) -> None:
        self.problem, self.work, self._told = problem, work, told
        self.bins = best_fit(problem)
        self.bound = bound_of_lengths(*problem, enough=num_bins(self.bins))
        self._relaxed_bound = 0.0  # and the prices that show it
        self._prices = np.zeros(len(problem.lengths))

    @property
    def _settled(self) -> bool:
        return num_bins(self.bins) <= self.bound.value

    def run(self) -> None:
        """Improve both until they meet or the work is over."""
        if self._settled:
            return
        if 4 * cost_of_worth(self.problem) > self.work.left:
            _LOG.info("max_seq_len is so large that the budget is not enough for a better plan")
            return
        master = Master(self.problem)
        master.add(self.bins)
        relaxed = generate(
            master, self.work, target=self.bound.value, share=_UNTIL, told=self._heard
        )
        self.prove()
        for share in _SHARES:
            levels: list[Level] = []
            target = self.bound.value
            for level in dive(
                self.problem, master, relaxed, target=target, share=share, work=self.work
            ):
                levels.append(level)
                self.work.spend(_BEST_FIT * np.count_nonzero(level.left))
                self._complete(level, best_fit(with_demand(self.problem, level.left)))
                if self._settled:
                    return
            self._close(levels)
            if self._settled or self.work.over:
                return

    def _heard(self, bound: float, prices: Float64) -> None:
        self._relaxed_bound, self._prices = bound, prices
        self._tell()

    def prove(self) -> None:
        """Prove the best bound of the relaxed problem, if it is any better."""
        if rounded_up(self._relaxed_bound) > self.bound.value:
            value = proved_bound(self.problem, self._prices, self.work)
            if value > self.bound.value:
                self.bound = Bound(value, "column generation")

    def _close(self, levels: list[Level]) -> None:
        """Pack what is left anew, from the deepest level upwards, into one bin fewer."""
        bins = _FEW / _GROWTH
        for level in [*levels[::-1], Level({}, self.problem.demand)]:
            left = num_bins(self.bins) - num_bins(level.fixed)
            if left > _MANY or self.work.over or self._settled:
                return
            if left < _GROWTH * bins and level.fixed:
                continue
            bins = left
            more = pack_into(with_demand(self.problem, level.left), left - 1, self.work)
            if more is not None:
                self._complete(level, more)

    def _complete(self, level: Level, more: Bins) -> None:
        bins = added(level.fixed, more)
        if num_bins(bins) < num_bins(self.bins) and covers(self.problem, bins):
            self.bins = bins
        self._tell()

    def _tell(self) -> None:
        self._told(num_bins(self.bins), self.bound.value, self.work.done)


@contextmanager
def _shown(show: bool | None) -> Iterator[Told]:
    """Show bins, bound and how much of the budget is used, on stderr, while the block runs."""
    if not is_shown(show):
        yield lambda bins, bound, done: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("optimal plan"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[figures]}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=stderr_console()) as bar:
        task = bar.add_task("", total=1.0, figures="")

        def told(bins: int, bound: int, done: float) -> None:
            figures = f"{bins:,} rows, bound {bound:,}"
            bar.update(task, completed=done, figures=figures)

        yield told
