"""Linear relaxations of packing: which templates, in what shares, and what each length costs.

The relaxed problem chooses a number of bins, not whole, of each template, so that there are slots
enough.  It has one row per distinct length, so its size does not depend on the number of sequences.
A longer slot may hold a shorter sequence, which takes columns of its own: they keep the prices of
lengths rising with the length, and the solver from wandering.

Of the templates only a few are tried.  The solution prices each length, and a template that is
worth more than the one bin that it costs is added, until there is none (column generation).

A bound is claimed of integers alone: prices are rounded down to integers, and the most valuable
bin is found exactly.  No bin is worth more, so `sum(prices) / most` bins are needed at least,
whatever the prices were.

References:
    P. C. Gilmore, R. E. Gomory, "A linear programming approach to the cutting-stock problem", 1961.
    A. A. Farley, "A note on bounding a class of linear programming problems, including cutting
    stock problems", 1990: the bound before the end.
    J. M. Valerio de Carvalho, "Using extra dual cuts to accelerate column generation", 2005.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import fail
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.knapsack import Contents, best_contents, patterns_of

__all__ = [
    "Problem",
    "Relaxation",
    "Template",
    "UnsolvedError",
    "Work",
    "generate",
    "import_highspy",
    "proved_bound",
    "rounded_up",
]

Template = tuple[int, ...]  # lengths, falling
Float64 = NDArray[np.float64]

_MORE = 1e-9  # templates worth more than 1 + this are added
_COLUMNS = 500  # added in one round at most
_SHARE = 0.25  # of the room between volume and target that a relaxed solution may take up
WHOLE = 1e-6  # a number this little above, or below, an integer counts as that


class Problem(NamedTuple):
    """The sequences to pack."""

    lengths: Int64  # [m], distinct, rising
    demand: Int64  # [m], how many there are of each
    max_seq_len: int
    max_segments: int | None


class Work:
    """What may still be done, counted and not timed, so that every host stops at the same step.

    Its unit is about a second of one core of the machine that it was measured on.
    """

    def __init__(self, budget: float, time_limit: float | None = None) -> None:
        self._budget = self.left = budget
        self._start = time.monotonic()
        self._end = None if time_limit is None else self._start + time_limit

    def spend(self, units: float) -> None:
        """Count some work."""
        self.left -= units

    @property
    def over(self) -> bool:
        """Whether the budget or the time is used up."""
        return self.left <= 0 or (self._end is not None and time.monotonic() > self._end)

    @property
    def done(self) -> float:
        """The share of the budget, or of the time, that is used up, in `[0, 1]`."""
        used = 0.0 if self._budget == math.inf else 1.0 - max(0.0, self.left) / self._budget
        if self._end is None:
            return used
        time_limit = self._end - self._start
        timed = 1.0 if time_limit <= 0 else min(1.0, (time.monotonic() - self._start) / time_limit)
        return max(used, timed)

    def seconds(self) -> float:
        """Return the time that a solver may take: what is left of the limit."""
        return math.inf if self._end is None else max(0.0, self._end - time.monotonic())


class UnsolvedError(RuntimeError):
    """The solver did not come to an end, as when it ran out of digits."""


class Relaxation(NamedTuple):
    """A solution of the relaxed problem over the templates so far."""

    bins: float
    prices: Float64  # [m]
    amounts: Float64  # [templates], bins of each
    bound: float  # bins that are needed at least, up to rounding
    best_prices: Float64  # [m], those that show it


def import_highspy(caller: str) -> Any:
    """Import highspy, or say which extra it takes."""
    try:
        import highspy
    except ImportError:
        problem = "algorithm = 'optimal': the package highspy is not installed"
        fail(caller, problem, "pip install 'seqpack_jax[optimal]'")
    return highspy


class Master:
    """The relaxed problem over some templates, in HiGHS, which starts from its last solution."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.templates: list[Template] = []
        self._known: set[Template] = set()
        rows = len(problem.lengths)
        self._index = np.zeros(int(problem.lengths[-1]) + 1, np.int32)
        self._index[problem.lengths] = np.arange(rows)
        # Below 2**20, the tolerances of the solver are above the steps of floats.
        self._scale = _scale_of(problem.demand)
        self._highspy = import_highspy("Master")
        self._solver = quiet_solver(self._highspy)
        empty = np.zeros(0, np.int32)
        none = np.zeros(rows, np.int32)
        infinite = np.full(rows, self._highspy.kHighsInf)
        self._solver.addRows(
            rows, problem.demand * self._scale, infinite, 0, none, empty, np.zeros(0)
        )
        # One unit of column i turns a slot of the next longer length into one of length i.
        steps = np.arange(rows - 1, dtype=np.int32)
        self._add(
            np.zeros(rows - 1),
            2 * steps,
            np.column_stack([steps, steps + 1]).ravel(),
            np.tile([1.0, -1.0], rows - 1),
        )

    def _add(self, costs: Float64, starts: Any, rows: Any, values: Float64) -> None:
        size = len(costs)
        infinite = np.full(size, self._highspy.kHighsInf)
        self._solver.addCols(size, costs, np.zeros(size), infinite, len(rows), starts, rows, values)

    def add(self, templates: Iterable[Template]) -> int:
        """Add those that are new; return how many that are."""
        new = [each for each in dict.fromkeys(templates) if each not in self._known]
        self._known.update(new)
        self.templates += new
        if new:
            begins = offsets_of([len(each) for each in new])[:-1]
            flat = self._index[np.array([length for each in new for length in each])]
            # Equal lengths stand side by side: one entry each, with their number.
            first = np.diff(flat, prepend=-1) != 0
            first[begins] = True
            at = np.flatnonzero(first)
            values = np.diff(at, append=len(flat)).astype(float)
            starts = (np.cumsum(first) - 1)[begins].astype(np.int32)
            self._add(np.ones(len(new)), starts, flat[at], values)
        return len(new)

    def demand(self, demand: Int64) -> None:
        """Ask for other numbers of the same lengths."""
        before, self._scale = self._scale, _scale_of(demand)
        scaled = demand * self._scale
        changed = (demand != self.problem.demand) | (self._scale != before)
        for row in np.flatnonzero(changed).tolist():
            self._solver.changeRowBounds(row, scaled[row], self._highspy.kHighsInf)
        self.problem = self.problem._replace(demand=demand)

    def solve_whole(self, target: int, nodes: int, work: Work) -> Int64 | None:
        """Return whole numbers of bins `[templates]`, at most `target` in all, if some are found.

        Ends the life of this object: after that its numbers are whole.
        """
        if self._scale < 1:
            return None  # scaled demand does not ask for whole numbers
        rows, size = len(self.problem.lengths), len(self.templates)
        which = np.arange(rows - 1, rows - 1 + size, dtype=np.int32)
        whole = np.full(size, self._highspy.HighsVarType.kInteger)
        self._solver.changeColsIntegrality(size, which, whole)
        self._run(work, {"objective_target": target + 0.5, "mip_max_nodes": nodes})
        info = self._solver.getInfo()
        work.spend(rows * size * (3e-6 + 2.5e-8 * max(0, info.mip_node_count)))
        if not info.objective_function_value <= target + 0.5:
            return None
        numbers = np.array(self._solver.getSolution().col_value[rows - 1 :])
        whole_numbers: Int64 = np.rint(numbers).astype(np.int64)
        return whole_numbers

    def solve(self, work: Work) -> tuple[float, Float64, Float64]:
        """Return the number of bins, the prices of lengths and the bins of each template.

        Ends before the optimum when the work is over, if it has a solution by then.
        """
        step = 2e-5 + 1.3e-8 * len(self.templates)
        steps = int(min(max(1.0, work.left / step), 1e9))
        self._run(work, {"simplex_iteration_limit": steps})
        status, info = self._solver.getModelStatus(), self._solver.getInfo()
        work.spend(info.simplex_iteration_count * step)
        known = self._highspy.HighsModelStatus
        if status == known.kIterationLimit:
            work.spend(max(0.0, work.left))  # less than one step
        feasible = info.primal_solution_status == 2  # kSolutionStatusFeasible
        stopped = status in (known.kIterationLimit, known.kTimeLimit)
        if status != known.kOptimal and not (stopped and feasible):
            raise UnsolvedError(f"HiGHS says {self._solver.modelStatusToString(status)!r}")
        solution, rows = self._solver.getSolution(), len(self.problem.lengths)
        prices = np.maximum(np.array(solution.row_dual), 0.0)
        amounts = np.array(solution.col_value)[rows - 1 :] / self._scale
        return info.objective_function_value / self._scale, prices, np.maximum(amounts, 0.0)

    def _run(self, work: Work, options: dict[str, float]) -> None:
        if work.seconds() < math.inf:
            options["time_limit"] = self._solver.getRunTime() + work.seconds()
        for name, value in options.items():
            self._solver.setOptionValue(name, value)
        self._solver.run()


def rounded_up(bins: float) -> int:
    """Return the whole number of bins that so many of a relaxed solution mean."""
    return math.ceil(bins - WHOLE)


def _scale_of(demand: Int64) -> float:
    return float(0.5 ** max(0, int(demand.max()).bit_length() - 20))


def quiet_solver(highspy: Any) -> Any:
    """A HiGHS that prints nothing and takes the same steps everywhere."""

    class Quiet(highspy.Highs):  # type: ignore[misc]
        def enableCallbacks(self) -> None:  # the constructor calls it; 1.16 prints a header there
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    solver = Quiet()
    options = {"output_flag": False, "threads": 1, "parallel": "off", "random_seed": 0}
    tolerances = "primal_feasibility_tolerance", "dual_feasibility_tolerance"
    for name, value in (options | dict.fromkeys(tolerances, 1e-9)).items():
        solver.setOptionValue(name, value)
    return solver


def generate(
    master: Master,
    work: Work,
    *,
    target: int | None,
    rounds: int | None = None,
    share: float = 1.0,
    told: Callable[[float, Float64], None] | None = None,
) -> Relaxation:
    """Solve the relaxed problem, and add templates until none lowers its number of bins.

    Ends earlier when that number is well below `target`, or when it is proved to round up to a
    number above that; after so many `rounds`; when that `share` of the work is done; or when it is
    over.  `UnsolvedError` means that there is no solution yet.  Each better bound is `told`, with
    the prices that show it.

    Time: a linear program and a knapsack per round; some 5 to 30 rounds.
    """
    problem = master.problem
    # Whole bins need some room for what does not come out even: not all of it is used up here.
    volume = volume_of(problem)
    enough = -math.inf if target is None else volume + _SHARE * (target - volume)
    bound, done = 0.0, 0
    best_prices = np.zeros(len(problem.lengths))
    while True:
        try:
            bins, prices, amounts = master.solve(work)
        except UnsolvedError:
            if not done:
                raise
            break  # what the last round found still holds
        values, contents = worth(problem, prices, work)
        most = float(values.max(initial=0.0))
        shown = value_of(problem, prices) / most if most > 0 else 0.0
        if shown > bound:
            bound, best_prices = shown, prices
        if told is not None:
            told(bound, best_prices)
        settled = target is not None and (rounded_up(bound) >= rounded_up(bins) > target)
        done += 1
        if bins <= enough or most <= 1 + _MORE or settled or done == rounds:
            break
        if work.over or work.done >= share:
            break
        if not master.add(_templates(problem, values, contents)):
            break
    return Relaxation(bins, prices, amounts, bound, best_prices)


def volume_of(problem: Problem) -> float:
    """Return how many bins the tokens, or the sequences, would fill to the last place."""
    volume = float(problem.demand @ problem.lengths) / problem.max_seq_len
    return max(volume, float(problem.demand.sum()) / (problem.max_segments or math.inf))


def value_of(problem: Problem, prices: Float64) -> float:
    """Return what all sequences are worth together: the same to the last digit everywhere."""
    return math.fsum((prices * problem.demand).tolist())


def cost_of_worth(problem: Problem) -> float:
    """Return the work that `worth` takes."""
    capacity, cap = problem.max_seq_len, problem.max_segments
    passes = 1 if cap is None else 2 * (cap - 1).bit_length()
    return passes * capacity * (1.3e-6 + 0.4e-9 * capacity)


def worth(problem: Problem, prices: Any, work: Work) -> tuple[Any, Contents]:
    """Return the worth of the best bin around each length `[m]`, and what else is in such bins."""
    capacity, cap = problem.max_seq_len, problem.max_segments
    at_most = None if cap is None else cap - 1
    work.spend(cost_of_worth(problem))
    by_length = np.full(int(problem.lengths[-1]) + 1, -1, prices.dtype)
    by_length[problem.lengths] = prices
    contents = best_contents(by_length, capacity, at_most)
    return prices + contents.best[capacity - problem.lengths], contents


def _templates(problem: Problem, values: Float64, contents: Contents) -> list[Template]:
    """Return the best template around each length, of those that are worth more than a bin."""
    useful = np.flatnonzero(values > 1 + _MORE)
    useful = useful[np.argsort(-values[useful], kind="stable")][:_COLUMNS]
    first = problem.lengths[useful]
    rest = patterns_of(contents, problem.max_seq_len - first)
    rows = -np.sort(-np.column_stack([first, rest]), axis=1)
    sizes = np.count_nonzero(rows, axis=1).tolist()
    return [tuple(row[:size]) for row, size in zip(rows.tolist(), sizes, strict=True)]


def proved_bound(problem: Problem, prices: Float64, work: Work) -> int:
    """Return a number of bins that any packing needs, by integer arithmetic alone.

    No bin is worth more than `most`, found exactly, so `worth of all sequences / most` are needed.
    """
    values, _ = worth(problem, prices, work)
    most = float(values.max(initial=0.0))
    if not 0 < most < math.inf:
        return 0
    exponent = 60 - math.frexp(most)[1]  # the most valuable bin stays below 2**61
    whole = np.floor(np.ldexp(prices, exponent)).astype(np.int64)
    exact, _ = worth(problem, whole, work)
    total = sum(map(operator.mul, whole.tolist(), problem.demand.tolist()))  # beyond 64 bits
    return int(-(-total // int(exact.max())))
