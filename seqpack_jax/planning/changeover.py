"""Changing a run over from padded to packed rows: how many rows hold as many sequences.

What a training step learns depends on the sequences in it, not on the rows they stand in.  So a
padded run is changed over by asking for as many sequences per step as it had, in fewer rows; then
its learning rate and its other settings stay as they are, and its loss curve is that of before.
Krell et al. (2021) do the same.

Where the rows cannot be chosen so, the learning rate follows the number of sequences: linearly for
SGD (Goyal et al., 2017), by the square root for Adam and its kin (Malladi et al., 2022).

References:
    M. M. Krell, M. Kosec, S. P. Perez, A. Fitzgibbon, "Efficient sequence packing without
    cross-contamination", 2021.
    P. Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017.
    S. Malladi, K. Lyu, A. Panigrahi, S. Arora, "On the SDEs and scaling rules for adaptive gradient
    algorithms", 2022.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from seqpack_jax.errors import check_int, fail
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.stats import PackingStats

__all__ = ["StepFigures", "SuggestedRows", "suggest_rows"]


class StepFigures(NamedTuple):
    """What one step holds, packed or padded, over all processes.

    Means and standard deviations are of rows that are drawn from an epoch, none of them twice; the
    last step of an epoch may hold less.

    Attributes:
        rows: rows of `max_seq_len` tokens.
        sequences: sequences in a step, on average; a piece of a split one counts as one.
        sequences_std: standard deviation of that between steps; 0 when padded.
        tokens: tokens in a step without padding, on average.
        tokens_std: standard deviation of that; with a tolerance, of the planned tokens.
        capacity: tokens that the rows could hold: what the step costs.
        steps_per_epoch: steps until every sequence was used once, the last one filled up with
            padding.

    Example:
        >>> step = StepFigures(2, 4.0, 0.5, 16.0, 1.0, capacity=20, steps_per_epoch=3)
        >>> step.tokens / step.capacity
        0.8
    """

    rows: int
    sequences: float
    sequences_std: float
    tokens: float
    tokens_std: float
    capacity: int
    steps_per_epoch: int


class SuggestedRows(NamedTuple):
    """What `suggest_rows` found; `print` shows it as a small table.

    Attributes:
        packed: a step of packed rows.
        padded: the step of the padded run: one sequence per row.
        adam_factor: by what to multiply the learning rate of Adam, AdamW, LAMB and the like: the
            square root of the packed sequences per padded one.
        sgd_factor: the same for SGD, with momentum or without: that ratio itself.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> plan = pack_length_histogram({30: 600, 60: 300, 120: 100}, max_seq_len=128)
        >>> suggest_rows(plan, sequences_per_step=64).rows_per_step
        26
    """

    packed: StepFigures
    padded: StepFigures
    adam_factor: float
    sgd_factor: float

    @property
    def rows_per_step(self) -> int:
        """Packed rows in one global batch; each process takes `rows_per_step / process_count`."""
        return self.packed.rows

    def __str__(self) -> str:
        both = (self.packed, self.padded)
        table = {
            "rows": [f"{s.rows:,}" for s in both],
            "sequences": [f"{s.sequences:,.2f} (std {s.sequences_std:,.2f})" for s in both],
            "tokens": [f"{s.tokens:,.1f} (std {s.tokens_std:,.1f})" for s in both],
            "capacity": [f"{s.capacity:,}" for s in both],
            "steps": [f"{s.steps_per_epoch:,} per epoch" for s in both],
        }
        width = 2 + max(len(packed) for packed, _ in table.values())
        lines = [f"  {'a step:':12} {'packed':{width}} padded\n"]
        lines += [f"  {name + ':':12} {one:{width}} {two}\n" for name, (one, two) in table.items()]
        factors = f"x {self.adam_factor:.3f} for Adam, x {self.sgd_factor:.3f} for SGD"
        return f"SuggestedRows(\n{''.join(lines)}  {'rate:':12} {factors}\n)"


def suggest_rows(
    plan: PackingPlan, *, sequences_per_step: int, process_count: int = 1
) -> SuggestedRows:
    """Say how many packed rows a step needs to learn from as many sequences as a padded one did.

    With the rows found here, and the same optimizer, learning rate and schedule by steps, a packed
    run has the loss curve of the padded one, if the loss weighs tokens (or sequences) and not rows:
    see `losses.loss_weights`.  Rows come in whole numbers, so the sequences per step are met on
    average, and not always exactly; the factors say what to do about the rest, and within a few
    percent it is nothing.

    To keep the rows of the padded run, and have fewer and larger steps, ask for a multiple of so
    many rows: `process_count=sequences_per_step`.  The factors then say how the learning rate
    grows, a rule that holds as long as steps are not too large.

    Time: O(size of the plan), whatever the number of sequences.

    Args:
        plan: the plan of the packed run; of a `VectorPlan`, a column of it.
        sequences_per_step: sequences in one step of the padded run, over all processes and
            micro-batches of an accumulated gradient.
        process_count: the rows will be a multiple of this.  Beside the number of processes it may
            count their devices, or their micro-batches.

    Returns:
        A `SuggestedRows`.  Of the two multiples of `process_count` around the exact number of rows,
        it is the one that is nearer by ratio, and never more than the plan has.

    Raises:
        SeqpackError: `plan` is no `PackingPlan`, or an empty one; there are fewer sequences than
            `sequences_per_step`, or fewer rows than `process_count`.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> plan = pack_length_histogram({30: 600, 60: 300, 120: 100}, max_seq_len=128)
        >>> print(suggest_rows(plan, sequences_per_step=64, process_count=4))
        SuggestedRows(
          a step:      packed              padded
          rows:        24                  64
          sequences:   60.00 (std 5.82)    64.00 (std 0.00)
          tokens:      2,880.0 (std 0.0)   3,072.0 (std 212.9)
          capacity:    3,072               8,192
          steps:       17 per epoch        16 per epoch
          rate:        x 0.968 for Adam, x 0.938 for SGD
        )
    """
    caller = "suggest_rows"
    if isinstance(getattr(plan, "max_seq_len", None), tuple):
        fail(caller, "the plan has several capacities", "pass plan.column(0), or another one")
    if not isinstance(plan, PackingPlan):
        fail(caller, f"plan is a {type(plan).__name__}", "pass a PackingPlan, such as source.plan")
    sequences_per_step = check_int(caller, "sequences_per_step", sequences_per_step, 1)
    process_count = check_int(caller, "process_count", process_count, 1)
    sequences, bins = plan.num_sequences, plan.num_bins
    if sequences_per_step > sequences:
        problem = f"sequences_per_step = {sequences_per_step:,}, but the plan has {sequences:,}"
        fail(caller, problem, "pass the sequences in one step of the padded run")
    if process_count > bins:
        problem = f"process_count = {process_count:,}, but the plan has {bins:,} rows"
        fail(caller, problem, "use fewer processes, or more data")
    rows = process_count * _nearest(
        sequences_per_step * bins, sequences * process_count, most=bins // process_count
    )
    stats = PackingStats.from_plan(plan, rows_per_step=rows)
    packed = StepFigures(
        rows=rows,
        sequences=stats.segments_per_step_mean,
        sequences_std=stats.segments_per_step_std,
        tokens=stats.tokens_per_step_mean,
        tokens_std=stats.tokens_per_step_std,
        capacity=rows * plan.max_seq_len,
        steps_per_epoch=-(-bins // rows),
    )
    ratio = packed.sequences / sequences_per_step
    padded = _padded_step(stats, plan, sequences_per_step)
    return SuggestedRows(packed, padded, adam_factor=math.sqrt(ratio), sgd_factor=ratio)


def _nearest(numerator: int, denominator: int, *, most: int) -> int:
    """Return the whole number in `[1, most]` that is nearest to a quotient, by ratio."""
    low = numerator // denominator  # in Python's integers: a plan may have 2**62 rows
    # The quotient is nearer to `low` if it is below the geometric mean of `low` and `low + 1`.
    nearer_low = numerator**2 <= low * (low + 1) * denominator**2
    return min(most, max(1, low if nearer_low else low + 1))


def _padded_step(stats: PackingStats, plan: PackingPlan, rows: int) -> StepFigures:
    """Return the figures of `rows` sequences that are drawn from all, one per row."""
    number, planned = stats.num_sequences, int(plan.fills @ plan.multiplicity)
    # In integers up to the root, as `PackingStats` has it.
    variance = number * stats.sum_squared_lengths - planned**2  # times number**2
    drawn = rows * (number - rows) / max(1, number - 1)
    return StepFigures(
        rows=rows,
        sequences=float(rows),
        sequences_std=0.0,
        tokens=rows * (plan.num_tokens / number),
        tokens_std=math.sqrt(variance) / number * math.sqrt(drawn),
        capacity=rows * plan.max_seq_len,
        steps_per_epoch=-(-number // rows),
    )
