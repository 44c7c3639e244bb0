"""How full a packing is, from a plan, from bins or from templates alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from seqpack_jax.arrays import offsets_of, part_sums
from seqpack_jax.errors import MAX_LENGTH, check_int, check_integers, fail
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.bounds import bound_of_lengths
from seqpack_jax.planning.histogram import Int64
from seqpack_jax.planning.over_length import NOTHING_TOUCHED, OverLengthReport, apply_to_lengths
from seqpack_jax.planning.plan import PackingPlan

__all__ = ["PackingStats"]


@dataclass(frozen=True)
class PackingStats:
    """Figures of one packing; `print` shows them as a small table, `to_dict` is for logs.

    The three constructors give the same figures of the same packing, to the last bit, except for
    what only one of them knows:

    - `lower_bound` is that of the lengths, without a cap; a certificate in a plan may know more.
    - A tolerance is known to `from_plan` alone.  It has the true `num_tokens`, but planned lengths,
      which all that is marked (*) counts; `from_templates` counts planned ones, `from_bins` true.
    - `report`: `from_bins` finds it out by the policy of the bins; the others must be told.

    Attributes:
        num_bins: bins, the rows of one epoch.
        num_sequences: sequences (or pieces of such) over all bins.
        num_tokens: tokens over all bins.
        max_seq_len: capacity of a bin in tokens.
        lower_bound: no packing of these sequences has fewer bins; see the function `lower_bound`.
        max_segments: the most sequences in one bin.
        segments_std: standard deviation of the sequences in a bin.
        tokens_std: standard deviation of the tokens in a bin (*).
        fullness_p50: half of the bins are at most this full (*), in `[0, 1]`; a value that occurs,
            never an interpolated one.
        fullness_p90: the same for nine bins in ten.
        fullness_p99: the same for 99 bins in a hundred.
        sum_squared_lengths: the sum of length² over all sequences (*): how many pairs of tokens
            attend to each other, a Python int, exact at any size.
        rows_per_step: bins in one global batch.
        tolerance: sequences were planned as the next multiple of this many tokens.
        tolerance_rows: bins that this costs.
        report: what the over-length policy touched; where that is nothing, the policy makes no
            difference, and it is `OverLengthReport()`.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> plan = pack_length_histogram({5: 5, 3: 3, 7: 1}, 10)
        >>> print(PackingStats.from_plan(plan, rows_per_step=2))
        PackingStats(
          bins:        5
          sequences:   9 (avg 1.80/bin)
          tokens:      41 / 50 capacity
          efficiency:  82.00%
          padding:     9 (18.00%)
          fullness:    p50=100.0%  p90=100.0%  p99=100.0%
          bound:       5 (0 bins over it)
          segments:    std 0.40/bin, max 2
          attention:   40.20% of bins x max_seq_len^2
          step:        2 rows: 16.4 tokens (std 3.3), 3.60 segments (std 0.49)
        )
    """

    num_bins: int
    num_sequences: int
    num_tokens: int
    max_seq_len: int
    lower_bound: int
    max_segments: int
    segments_std: float
    tokens_std: float
    fullness_p50: float
    fullness_p90: float
    fullness_p99: float
    sum_squared_lengths: int
    rows_per_step: int = 1
    tolerance: int = 1
    tolerance_rows: int = 0
    report: OverLengthReport = NOTHING_TOUCHED

    def __post_init__(self) -> None:
        if not self.report.sequences:  # else equal packings would differ by the name of a policy
            object.__setattr__(self, "report", NOTHING_TOUCHED)

    @classmethod
    def from_plan(
        cls, plan: PackingPlan, *, rows_per_step: int = 1, report: OverLengthReport | None = None
    ) -> PackingStats:
        """Take the figures of a plan.

        Time: O(size of the plan), whatever the number of sequences.

        Args:
            plan: any plan; of a `VectorPlan`, a column of it.
            rows_per_step: bins in one global batch.
            report: what the over-length policy touched, `pools.report`; a plan does not know.

        Raises:
            SeqpackError: `rows_per_step` is below 1, or the plan has several capacities.
        """
        caller = "PackingStats.from_plan"
        if not isinstance(plan.max_seq_len, int):
            fail(caller, "the plan has several capacities", "pass plan.column(0), or another one")
        proved = plan.certificate.lower_bound if plan.certificate else 0
        bound = max(proved, -(-plan.num_tokens // plan.max_seq_len))
        if plan.tolerance == 1 and bound < plan.num_bins:  # else the true lengths are not known
            times = np.repeat(plan.multiplicity, plan.sizes)
            bound = max(bound, bound_of_lengths(plan.lengths, times, plan.max_seq_len).value)
        return cls(
            num_tokens=plan.num_tokens,
            max_seq_len=plan.max_seq_len,
            lower_bound=bound,
            rows_per_step=check_int(caller, "rows_per_step", rows_per_step, 1),
            tolerance=plan.tolerance,
            tolerance_rows=plan.tolerance_rows,
            report=NOTHING_TOUCHED if report is None else report,
            **_figures(plan.lengths, plan.offsets, plan.multiplicity, plan.max_seq_len),
        )

    @classmethod
    def from_templates(
        cls,
        templates: Mapping[tuple[int, ...], int],
        max_seq_len: int,
        *,
        rows_per_step: int = 1,
        report: OverLengthReport | None = None,
    ) -> PackingStats:
        """Take the figures of `{template: bins}`, as the seed library packs histograms.

        Time: O(size of the templates).  The other arguments are those of `from_plan`.

        Raises:
            SeqpackError: a template is empty, over `max_seq_len` or holds a length below 1.

        Example:
            >>> PackingStats.from_templates({(512, 512): 10**9}, 1024).efficiency
            1.0
        """
        plan = PackingPlan.from_counter(templates, max_seq_len)
        return cls.from_plan(plan, rows_per_step=rows_per_step, report=report)

    @classmethod
    def from_bins(
        cls,
        bins: Bins | Sequence[Sequence[int]],
        lengths: ArrayLike,
        max_seq_len: int,
        *,
        rows_per_step: int = 1,
    ) -> PackingStats:
        """Take the figures of bins of ids.

        Time: O(n).

        Args:
            bins: `Bins`, whose over-length policy is followed, or a list of lists of ids.
            lengths: integers `[n]`, the true length of every sequence, in tokens.
            max_seq_len: capacity of a bin in tokens.
            rows_per_step: bins in one global batch.

        Raises:
            SeqpackError: the bins do not hold each sequence exactly once, or one overflows.

        Example:
            >>> PackingStats.from_bins([[0, 2], [1]], [5, 7, 3], 8).efficiency
            0.9375
        """
        caller = "PackingStats.from_bins"
        max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1, MAX_LENGTH)
        rows_per_step = check_int(caller, "rows_per_step", rows_per_step, 1)
        if not isinstance(bins, Bins):
            bins = _as_bins(caller, bins, max_seq_len)
        planned = apply_to_lengths(caller, bins.over_length, lengths, max_seq_len)
        if max_seq_len != bins.max_seq_len:
            fail(
                caller,
                f"max_seq_len = {max_seq_len}, but the bins were packed for {bins.max_seq_len}",
                "pass the max_seq_len of the packing",
            )
        bins.check(lengths)
        sizes = planned.of_ids
        tokens = int(sizes.sum())
        held = sizes[bins.ids]
        return cls(
            num_tokens=tokens,
            max_seq_len=max_seq_len,
            lower_bound=bound_of_lengths(held, np.ones_like(held), max_seq_len).value,
            rows_per_step=rows_per_step,
            report=planned.report,
            **_figures(held, bins.offsets, np.ones(len(bins), np.int64), max_seq_len),
        )

    @property
    def capacity(self) -> int:
        """Tokens that all bins could hold."""
        return self.num_bins * self.max_seq_len

    @property
    def padding(self) -> int:
        """Tokens that they could hold, and do not."""
        return self.capacity - self.num_tokens

    @property
    def efficiency(self) -> float:
        """Tokens / capacity, in `[0, 1]`; 1.0 without bins."""
        return self.num_tokens / self.capacity if self.num_bins else 1.0

    @property
    def padding_ratio(self) -> float:
        """The share of the capacity that is padding."""
        return 1.0 - self.efficiency

    @property
    def gap(self) -> int:
        """Bins over the lower bound: no packing saves more."""
        return self.num_bins - self.lower_bound

    @property
    def segments_mean(self) -> float:
        """Sequences per bin, on average."""
        return self.num_sequences / max(1, self.num_bins)

    @property
    def attention_share(self) -> float:
        """The share of bins x max_seq_len² that is inside sequences (*); 1.0 without bins.

        What is left of the work of attention when a kernel skips all other pairs of tokens.
        """
        square = self.num_bins * self.max_seq_len**2
        return self.sum_squared_lengths / square if square else 1.0

    @property
    def tokens_per_step_mean(self) -> float:
        """Tokens in a step, `rows_per_step` bins of a shuffled epoch or all of them, on average."""
        return self._rows * (self.num_tokens / max(1, self.num_bins))

    @property
    def tokens_per_step_std(self) -> float:
        """Standard deviation of the tokens in a step (*)."""
        return self.tokens_std * self._spread

    @property
    def segments_per_step_mean(self) -> float:
        """Sequences in a step, on average."""
        return self._rows * self.segments_mean

    @property
    def segments_per_step_std(self) -> float:
        """Standard deviation of the sequences in a step."""
        return self.segments_std * self._spread

    @property
    def _rows(self) -> int:
        return min(self.rows_per_step, self.num_bins)

    @property
    def _spread(self) -> float:
        """How much more the sum over a step varies than one bin: a step draws no bin twice."""
        return math.sqrt(self._rows * (self.num_bins - self._rows) / max(1, self.num_bins - 1))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name, fit for JSON; what a policy touched is under `over_length`.

        Example:
            >>> figures = PackingStats.from_templates({(5, 3): 2}, 10).to_dict()
            >>> figures["num_bins"], figures["efficiency"], figures["over_length"]["sequences"]
            (2, 0.8, 0)
        """
        return {name: getattr(self, name) for name in _FIGURES} | {
            "over_length": self.report._asdict()
        }

    def __str__(self) -> str:
        p50, p90, p99 = self.fullness_p50, self.fullness_p90, self.fullness_p99
        rows = {
            "bins": f"{self.num_bins:,}",
            "sequences": f"{self.num_sequences:,} (avg {self.segments_mean:.2f}/bin)",
            "tokens": f"{self.num_tokens:,} / {self.capacity:,} capacity",
            "efficiency": f"{self.efficiency:.2%}",
            "padding": f"{self.padding:,} ({self.padding_ratio:.2%})",
            "fullness": f"p50={p50:.1%}  p90={p90:.1%}  p99={p99:.1%}",
            # So far as the seed library prints; these are ours:
            "bound": f"{self.lower_bound:,} ({self.gap:,} bins over it)",
            "segments": f"std {self.segments_std:.2f}/bin, max {self.max_segments:,}",
            "attention": f"{self.attention_share:.2%} of bins x max_seq_len^2",
        }
        if self.rows_per_step > 1:
            rows["step"] = (
                f"{self.rows_per_step:,} rows: {self.tokens_per_step_mean:,.1f} tokens "
                f"(std {self.tokens_per_step_std:,.1f}), {self.segments_per_step_mean:,.2f} "
                f"segments (std {self.segments_per_step_std:,.2f})"
            )
        if self.tolerance > 1:
            rows["tolerance"] = f"{self.tolerance:,} (costs {self.tolerance_rows:,} bins)"
        if self.report.sequences:
            rows["over-length"] = _told(self.report)
        lines = [f"  {name + ':':12} {value}\n" for name, value in rows.items()]
        return f"PackingStats(\n{''.join(lines)})"


_FIGURES = (
    "num_bins",
    "num_sequences",
    "num_tokens",
    "max_seq_len",
    "capacity",
    "efficiency",
    "padding",
    "padding_ratio",
    "fullness_p50",
    "fullness_p90",
    "fullness_p99",
    "lower_bound",
    "gap",
    "segments_mean",
    "segments_std",
    "max_segments",
    "tokens_std",
    "sum_squared_lengths",
    "attention_share",
    "rows_per_step",
    "tokens_per_step_mean",
    "tokens_per_step_std",
    "segments_per_step_mean",
    "segments_per_step_std",
    "tolerance",
    "tolerance_rows",
)


def _figures(
    lengths: ArrayLike, offsets: Int64, multiplicity: Int64, max_seq_len: int
) -> dict[str, Any]:
    """Return what follows from templates in CSR form; bins are templates of multiplicity 1."""
    values = np.asarray(lengths, np.int64)
    sizes, fills = np.diff(offsets), part_sums(values, offsets)
    order = np.argsort(fills, kind="stable")
    reached = np.cumsum(multiplicity[order])
    bins = int(reached[-1]) if len(reached) else 0
    ranks = [-(-bins * percent // 100) for percent in (50, 90, 99)]
    at = [fills[order[np.searchsorted(reached, rank)]] if bins else 0 for rank in ranks]
    p50, p90, p99 = (float(fill) / max_seq_len for fill in at)
    return {
        "num_bins": bins,
        "num_sequences": int(sizes @ multiplicity),
        "max_segments": int(sizes.max(initial=0)),
        "segments_std": _deviation(sizes, multiplicity),
        "tokens_std": _deviation(fills, multiplicity),
        "fullness_p50": p50,
        "fullness_p90": p90,
        "fullness_p99": p99,
        "sum_squared_lengths": _sum_of_squares(values, np.repeat(multiplicity, sizes)),
    }


def _deviation(values: Int64, weights: Int64) -> float:
    """Return the standard deviation of values, each as often as its weight says.

    In integers up to the root: templates that come twice, or in another order, change no bit.
    """
    number, total = int(weights.sum()), int(values @ weights)
    variance = number * _sum_of_squares(values, weights) - total**2  # times number**2
    return math.sqrt(variance) / max(1, number)


def _sum_of_squares(values: Int64, weights: Int64) -> int:
    """Return the exact sum of `weights * values**2`, which may be beyond 64 bits.

    Values are below 2**31, and the sum of `weights * values` below 2**62.  So half of the bits at a
    time, no product and no sum leaves int64 (for fewer than 2**31 values).
    """
    half, low = 31, 2**31 - 1
    weighted = values * weights
    high = int((weighted >> half) @ values)
    weighted &= low
    weighted *= values
    return ((high + int((weighted >> half).sum())) << half) + int((weighted & low).sum())


def _as_bins(caller: str, bins: Any, max_seq_len: int) -> Bins:
    """Return a list of lists of ids as `Bins`."""
    bins = list(bins) if isinstance(bins, Iterable) else [bins]
    try:
        sizes = np.array([len(ids) for ids in bins], np.int64)
    except TypeError:
        fail(caller, "bins are not lists of ids", "pass Bins, or a list of lists of ids")
    if not sizes.all():
        fail(caller, f"bins[{int(sizes.argmin())}] is empty", "leave empty bins out")
    ids = check_integers(caller, "bins (ids)", list(chain.from_iterable(bins)))
    return Bins(ids.astype(np.int64), offsets_of(sizes), max_seq_len)


def _told(report: OverLengthReport) -> str:
    """Return one line on what an over-length policy touched."""
    done = {
        "drop": "dropped",
        "truncate": "cut at the end",
        "truncate_left": "cut at the beginning",
        "crop": "cut to a window",
        "split": f"split into {report.pieces:,} pieces",
    }.get(report.action, report.action)
    if report.dropped_tokens and report.action != "drop":
        done += f", {report.dropped_tokens:,} tokens dropped"
    if report.repeated_tokens:
        done += f", {report.repeated_tokens:,} repeated"
    plural = "" if report.sequences == 1 else "s"
    return f"{report.sequences:,} sequence{plural} ({report.tokens:,} tokens): {done}"
