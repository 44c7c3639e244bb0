"""From counts to a plan with its certificate: the table of algorithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seqpack_jax.errors import check_number, fail
from seqpack_jax.planning.bounds import Bound, bound_of_lengths
from seqpack_jax.planning.column_generation import import_highspy
from seqpack_jax.planning.counts import Int64, as_counts, coarsen_counts
from seqpack_jax.planning.heuristics import (
    Templates,
    best_fit_decreasing,
    first_fit_decreasing,
    worst_fit_decreasing,
)
from seqpack_jax.planning.optimal import optimal_templates
from seqpack_jax.planning.plan import Certificate, PackingPlan

__all__ = ["ALGORITHMS", "Effort", "check_effort", "plan_counts"]

_HEURISTICS: dict[str, Callable[[Int64, int, int | None], Templates]] = {
    "best_fit_decreasing": best_fit_decreasing,
    "first_fit_decreasing": first_fit_decreasing,
    "worst_fit_decreasing": worst_fit_decreasing,
}
ALGORITHMS = (*_HEURISTICS, "optimal")


class Effort(NamedTuple):
    """How long the algorithm `"optimal"` may search; the others need no leave.

    Attributes:
        budget: as in `pack_length_histogram`.
        time_limit: as in `prepare`.
        progress: as in `pack_length_histogram`.
    """

    budget: float | None = None
    time_limit: float | None = None
    progress: bool | None = False


_NO_EFFORT = Effort()


def check_effort(caller: str, algorithm: str, effort: Effort) -> Effort:
    """Return the same with plain floats; raise `SeqpackError` for what is no such, or no use."""
    numbers = {"budget": effort.budget, "time_limit": effort.time_limit}
    for name, value in numbers.items():
        if value is None:
            continue
        numbers[name] = check_number(caller, name, value)
        if algorithm != "optimal":
            problem = f"{name} = {value!r} with algorithm = {algorithm!r}"
            fail(caller, problem, f"leave {name} out, or pass algorithm='optimal'")
    return Effort(progress=effort.progress, **numbers)


def plan_counts(
    caller: str,
    counts: Int64,
    max_seq_len: int,
    algorithm: str,
    max_segments: int | None,
    tolerance: int,
    effort: Effort = _NO_EFFORT,
) -> PackingPlan:
    """Plan counts of what the over-length policy made of all sequences."""
    if algorithm == "optimal":
        import_highspy(caller)
    array = as_counts(caller, counts, max_seq_len)
    planned = coarsen_counts(array, tolerance, max_seq_len)
    templates, bound, interrupted = _solve(planned, max_seq_len, algorithm, max_segments, effort)
    bins = int(templates.multiplicity.sum())
    more = 0
    if tolerance > 1:
        again = "best_fit_decreasing" if interrupted else algorithm
        finest, bound, _ = _solve(array, max_seq_len, again, max_segments, effort)
        more = bins - int(finest.multiplicity.sum())
        if algorithm == "optimal":
            more = max(0, more)  # the plan itself is one of the true lengths
    if bound is None:
        lengths = np.flatnonzero(array)
        bound = bound_of_lengths(lengths, array[lengths], max_seq_len, max_segments, bins)
    tokens = int(array @ np.arange(len(array)))
    certificate = Certificate(bins, bound.value, bound.method, bins == bound.value)
    return PackingPlan(max_seq_len, *templates, tokens, tolerance, certificate, more)


def _solve(
    counts: Int64, max_seq_len: int, algorithm: str, max_segments: int | None, effort: Effort
) -> tuple[Templates, Bound | None, bool]:
    if algorithm == "optimal":
        return optimal_templates(counts, max_seq_len, max_segments, **effort._asdict())
    return _HEURISTICS[algorithm](counts, max_seq_len, max_segments), None, False
