"""Pictures of lengths, plans, masks and comparisons, drawn with matplotlib (extra `plots`).

Each function draws on the Axes that it is given, or on a new figure of its own, and returns the
Axes; none calls `plt.show()`.  Plans are drawn from their templates and histograms from counts: a
billion sequences take no longer than a thousand.

Colours are those of Okabe and Ito, which colour-blind readers tell apart.  Neighbours also differ
in brightness, and what must not be mixed up is hatched, so that the pictures may be printed grey.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from seqpack_jax.arrays import part_sums
from seqpack_jax.drawing import (
    BLUE,
    DARK,
    GREY,
    MOST_BARS,
    MOST_PLACES,
    PALE,
    RED,
    SEGMENT_COLOURS,
    TOLD_ROWS,
    Bars,
    bars_of,
    boxes_of,
    count_on,
    draw_bars,
    draw_boxes,
    fullness,
    numbered,
    over_length_label,
    own_or_given,
    percent,
)
from seqpack_jax.errors import (
    MAX_LENGTH,
    MAX_TOTAL,
    check_int,
    check_integers,
    check_lengths,
    fail,
)
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.counts import Int64, as_counts, plain_integers
from seqpack_jax.planning.over_length import apply_to_lengths
from seqpack_jax.planning.plan import PackingPlan
from seqpack_jax.planning.stats import PackingStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_comparison", "plot_fill", "plot_lengths", "plot_mask", "plot_plan"]

MOST_ROWS = 500
_LONGEST_MASK = 2048
_LOG_FROM = 100  # the ratio of bars from which their scale is logarithmic


def plot_plan(plan: PackingPlan, *, rows: int = 40, ax: Axes | None = None) -> Axes:
    """Draw rows of a plan as bars: a segment per colour, padding hatched.

    The rows are spread evenly over the plan, in its order, the first and the last among them.
    Colours go by the place in the row and repeat after six.  From the 257th on, the segments of a
    row are drawn as one grey block.  With a tolerance, segments are as long as they were planned.

    Time: O(size of the plan), whatever the number of sequences.

    Args:
        plan: a `PackingPlan`; of a `VectorPlan`, a column of it.
        rows: how many rows at most, in `[1, 500]`; up to 16 rows bear the lengths of their
            segments, in tokens.
        ax: where to draw; None for a new figure.

    Returns:
        The Axes: tokens from left to right, rows from top to bottom.

    Raises:
        SeqpackError: `plan` or `ax` is something else, `rows` is out of range, or matplotlib is
            missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from seqpack_jax import pack_length_histogram
        >>> plan = pack_length_histogram({5: 5, 3: 3, 7: 1}, max_seq_len=10)
        >>> plot_plan(plan, ax=Figure().subplots()).get_title()
        '5 rows of 10 tokens, 82.00 % full'
    """
    caller = "plot_plan"
    _check_plan(caller, plan)
    count = min(check_int(caller, "rows", rows, 1, MOST_ROWS), plan.num_bins)
    # In Python's integers: a plan may have 2**62 rows.
    chosen = [i * (plan.num_bins - 1) // max(1, count - 1) for i in range(count)]
    inches = 0.12 if count > TOLD_ROWS else 0.24  # to a row; more where numbers stand in it
    axes = own_or_given(caller, ax, (8.0, 1.2 + inches * max(count, 4)))
    boxes = boxes_of(plan, np.searchsorted(plan.bin_starts, chosen, side="right") - 1)
    draw_boxes(axes, boxes, count, plan.max_seq_len)
    axes.set_title(fullness(plan.num_bins, plan.max_seq_len, plan.efficiency))
    planned = f", planned as multiples of {plan.tolerance:,}" if plan.tolerance > 1 else ""
    many = (
        f"; grey: all behind {MOST_PLACES} segments" if (boxes.places == MOST_PLACES).any() else ""
    )
    axes.set_xlabel(f"tokens{planned} (hatched: padding{many})")
    axes.set_ylabel("row" if count == plan.num_bins else f"row ({count:,} shown)")
    axes.set(xlim=(0, plan.max_seq_len), ylim=(max(count, 1) - 0.5, -0.5))
    ticks = np.linspace(0, max(0, count - 1), min(count, 6)).astype(int).tolist()
    axes.set_yticks(ticks, [f"{chosen[i]:,}" for i in ticks])
    count_on(axes.xaxis)
    return axes


def plot_fill(
    plan: PackingPlan | Bins, *, lengths: ArrayLike | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how many rows hold how many tokens.

    Bars are at most 64, and as wide as each other; the last ends at `max_seq_len`.  They are drawn
    to a logarithmic scale where the tallest is 100 times the smallest or more, else to a linear
    one.  The dashed line is the mean.  With a tolerance, a row holds what was planned.

    Time: O(size of the plan), or O(n) for `Bins`.

    Args:
        plan: a `PackingPlan`, or `Bins`.
        lengths: for `Bins` only: integers `[n]`, the length of every sequence, in tokens.
        ax: where to draw; None for a new figure.

    Returns:
        The Axes: tokens in a row from left to right, rows upwards.

    Raises:
        SeqpackError: `plan` or `ax` is something else, `lengths` are not those of the bins, or
            matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from seqpack_jax import pack_sequences
        >>> lengths = [5, 5, 3, 7]
        >>> ax = plot_fill(pack_sequences(lengths, 10), lengths=lengths, ax=Figure().subplots())
        >>> [int(bar.get_height()) for bar in ax.patches], ax.get_title()
        ([2], '2 rows of 10 tokens, 100.00 % full; 100.00 % of them to the brim')
    """
    caller = "plot_fill"
    fills, times, tolerance = _fills_of(caller, plan, lengths)
    limit, number = plan.max_seq_len, int(times.sum())
    share = int(fills @ times) / max(1, number * limit)
    if isinstance(plan, PackingPlan):  # which knows the true tokens
        share = plan.efficiency
    axes = own_or_given(caller, ax, (8.0, 3.2))
    bars = bars_of(fills, times, -(-limit // MOST_BARS), limit)
    draw_bars(axes, bars, color=BLUE)
    whole = int(times[fills == limit].sum()) / max(1, number)
    brim = f"; {percent(whole)} of them to the brim" if number and tolerance == 1 else ""
    axes.set_title(fullness(number, limit, share) + brim)
    planned = f", as planned with a tolerance of {tolerance:,}" if tolerance > 1 else ""
    mean = ""
    if number:
        held = int(fills @ times) / number
        axes.axvline(held, color=DARK, linestyle="--", linewidth=1)
        mean = f" (dashed: the mean, {held:,.1f})"
    axes.set_xlabel(f"tokens in a row{planned}{mean}")
    axes.set_xlim(0, 1.01 * limit + 0.5)
    count_on(axes.xaxis)
    if number and int(bars.heights.max()) >= _LOG_FROM * int(bars.heights.min()):
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2 * int(bars.heights.max()))
        axes.set_ylabel("rows (log scale)")
    else:
        axes.set_yscale("linear")  # what was drawn on these axes before may have left another
        axes.autoscale(axis="y")
        count_on(axes.yaxis)
        axes.set_ylabel("rows")
    return axes


def plot_lengths(
    counts: ArrayLike | Mapping[int, int], max_seq_len: int, *, ax: Axes | None = None
) -> Axes:
    """Draw how many sequences have which length, and mark those that no row holds.

    Bars are at most 64, and as wide as each other; none has lengths of both sides of
    `max_seq_len`.  Over-length bars are hatched, on a grey ground, and the legend says their share.
    Where there are lengths over `1.5 * max_seq_len`, the last bar takes all of them.

    Time: O(max_len), or O(number of lengths) for a mapping.

    Args:
        counts: integers `[max_len + 1]`, how many sequences have each length, or
            `{length: count}`, in tokens.
        max_seq_len: capacity of a row in tokens.
        ax: where to draw; None for a new figure.

    Returns:
        The Axes: lengths from left to right, sequences upwards.

    Raises:
        SeqpackError: a length or a count is out of range, `max_seq_len` is below 1, `ax` is none,
            or matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_lengths({5: 5, 3: 3, 12: 1}, max_seq_len=10, ax=Figure().subplots())
        >>> print(ax.get_legend().get_texts()[0].get_text())
        over 10 tokens: 11.11 % of the sequences,
        26.09 % of the tokens
    """
    caller = "plot_lengths"
    limit = check_int(caller, "max_seq_len", max_seq_len, 1, MAX_LENGTH)
    lengths, times = _lengths_of(caller, counts)
    axes = own_or_given(caller, ax, (8.0, 3.2))
    longest = int(lengths.max(initial=1))
    top = min(longest, limit + max(1, limit // 2))  # the last bar takes what is longer
    # Two less: of the first bar and of the last one, a part may be left out.
    bars = bars_of(np.minimum(lengths, top), times, -(-top // (MOST_BARS - 2)), limit)
    over = bars.lows > limit
    draw_bars(axes, Bars(*(part[~over] for part in bars)), color=BLUE)
    end = max(top, limit if 2 * longest > limit else 1) + 0.5
    if over.any():
        end = int(bars.highs[-1]) + 0.5
        label = over_length_label(lengths, times, limit, int(bars.lows[-1]) * (longest > top))
        style = {"color": RED, "hatch": "////", "edgecolor": "black", "label": label}
        draw_bars(axes, Bars(*(part[over] for part in bars)), **style)
        axes.axvspan(limit + 0.5, 1.01 * end, color=PALE, zorder=0)
        axes.set_ylim(0, 1.5 * int(bars.heights.max()))  # room for the legend
        axes.legend(loc="upper right")
    axes.set_xlim(0, 1.01 * end)
    dashed = ""
    if limit < end:
        axes.axvline(limit + 0.5, color=DARK, linestyle="--", linewidth=1)
        dashed = " (dashed: max_seq_len)"
    total = int(times.sum())
    mean = f", {int(lengths @ times) / total:,.1f} tokens on average" if total else ""
    axes.set_title(f"{numbered(total, 'sequence')}{mean}; rows of {limit:,}")
    axes.set_xlabel(f"length of a sequence in tokens{dashed}")
    axes.set_ylabel("sequences")
    for axis in (axes.xaxis, axes.yaxis):
        count_on(axis)
    return axes


def plot_mask(segment_ids: ArrayLike, *, causal: bool = True, ax: Axes | None = None) -> Axes:
    """Draw who may attend to whom in one row: a block per segment, that of padding grey.

    The same pairs as `segment_mask` has under its default `pad`: padding attends to padding.
    Colours go by segment and repeat after six; white pairs are hidden.

    Time: O(L²).

    Args:
        segment_ids: integers `[L]` of one row, 0 = padding; NumPy or JAX; `L` at most 2,048.
        causal: whether keys later than the query are hidden.
        ax: where to draw; None for a new figure.

    Returns:
        The Axes; queries from top to bottom, keys from left to right.  Its one image holds int8
        `[L, L]`: 0 hidden, 1 to 6 the colour of a segment, 7 padding.

    Raises:
        SeqpackError: `segment_ids` is not one row of integers, one is negative, or the row is too
            long to be seen; `ax` is something else, or matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_mask([1, 1, 2, 0], ax=Figure().subplots())
        >>> ax.images[0].get_array().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 7]]
    """
    caller = "plot_mask"
    try:
        given = np.asarray(segment_ids)
    except ValueError:
        fail(caller, "segment_ids is ragged", "pass one row, segment_ids[0]")
    if given.ndim != 1:
        fail(caller, f"segment_ids has shape {given.shape}", "pass one row, segment_ids[0]")
    ids = check_integers(caller, "segment_ids", given)
    if not 1 <= len(ids) <= _LONGEST_MASK:
        problem = f"the row has {len(ids):,} tokens, but 1 to {_LONGEST_MASK:,} can be drawn"
        fail(caller, problem, f"pass a part of it, segment_ids[:{_LONGEST_MASK}]")
    if int(ids.min()) < 0:
        index = int((ids < 0).argmax())
        fail(caller, f"segment_ids[{index}] = {ids[index]}, below 0", "0 is padding, 1 the first")
    axes = own_or_given(caller, ax, (4.6, 4.6))
    from matplotlib.colors import ListedColormap

    number = len(SEGMENT_COLOURS)
    colour = np.where(ids == 0, number + 1, (ids.astype(np.int64) - 1) % number + 1).astype(np.int8)
    image = np.where(ids[:, None] == ids, colour[:, None], np.int8(0))
    if causal:
        image = np.tril(image)
    colours = ListedColormap(["white", *SEGMENT_COLOURS, GREY])
    axes.imshow(image, cmap=colours, vmin=-0.5, vmax=number + 1.5, interpolation="nearest")
    segments = len(np.unique(ids[ids > 0]))
    padding = f", {np.count_nonzero(ids == 0):,} of padding" if not ids.all() else ""
    axes.set_title(f"{numbered(segments, 'segment')} in {numbered(len(ids), 'token')}{padding}")
    shown = np.count_nonzero(image) / image.size
    kind = "causal" if causal else "both directions"
    axes.set_xlabel(f"key, in tokens ({kind}: {percent(shown)} of the pairs)")
    axes.set_ylabel("query, in tokens")
    for axis in (axes.xaxis, axes.yaxis):
        count_on(axis)
    return axes


def plot_comparison(stats: Mapping[str, PackingStats], *, ax: Axes | None = None) -> Axes:
    """Draw how full the rows of several packings are, one bar for each.

    Bars are in the order of `stats`, labelled with rows and percent.  If all packings are of the
    same number of tokens for rows of one length, and know the same lower bound, a dashed line shows
    how full the rows would be at that bound: no packing of these settings is fuller.

    Args:
        stats: `{name: PackingStats}`, at least one.
        ax: where to draw; None for a new figure.

    Returns:
        The Axes: percent from left to right, packings from top to bottom.

    Raises:
        SeqpackError: `stats` is something else or empty, `ax` is none, or matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from seqpack_jax import pack_length_histogram
        >>> plans = {"best fit": pack_length_histogram({5: 5, 3: 3, 7: 1}, max_seq_len=10)}
        >>> stats = {name: PackingStats.from_plan(plan) for name, plan in plans.items()}
        >>> [text.get_text() for text in plot_comparison(stats, ax=Figure().subplots()).texts]
        ['5 rows, 82.00 %']
    """
    caller, hint = "plot_comparison", "pass {name: PackingStats}"
    if not isinstance(stats, Mapping):
        fail(caller, f"stats is a {type(stats).__name__}", hint)
    if not stats:
        fail(caller, "stats is empty", hint)
    for name, each in stats.items():
        if not isinstance(each, PackingStats):
            fail(caller, f"stats[{name!r}] is a {type(each).__name__}", hint)
    axes = own_or_given(caller, ax, (8.0, 1.3 + 0.42 * len(stats)))
    packings = list(stats.values())
    widths = [100 * each.efficiency for each in packings]
    axes.barh(range(len(stats)), widths, 0.7, color=BLUE)
    for place, each in enumerate(packings):
        inside = widths[place] > 50  # the label has its place there, else behind the bar
        axes.text(
            1 if inside else widths[place] + 1,
            place,
            f"{numbered(each.num_bins, 'row')}, {percent(each.efficiency)}",
            va="center",
            color="white" if inside else "black",
        )
    axes.set_yticks(range(len(stats)), [str(name) for name in stats], parse_math=False)
    axes.set(xlim=(0, 102), ylim=(len(stats) - 0.4, -0.6))
    axes.set_xlabel("tokens in percent of the capacity of all rows")
    same = {(each.num_tokens, each.max_seq_len, each.lower_bound) for each in packings}
    if len(same) == 1 and (bound := packings[0].lower_bound):
        tokens, capacity, _ = same.pop()
        axes.axvline(100 * tokens / (bound * capacity), color="black", linestyle="--")
        axes.set_title(
            f"how full rows are (dashed: at the lower bound of {numbered(bound, 'row')})"
        )
    else:
        axes.set_title("how full rows are")
    return axes


def _check_plan(caller: str, plan: object) -> None:
    if isinstance(getattr(plan, "max_seq_len", None), tuple):
        fail(caller, "the plan has several capacities", "pass plan.column(0), or another one")
    if not isinstance(plan, PackingPlan):
        fail(caller, f"plan is a {type(plan).__name__}", "pass a PackingPlan")


def _fills_of(caller: str, plan: PackingPlan | Bins, lengths: ArrayLike | None) -> _Fills:
    """Return the tokens of rows, and how many rows hold that many."""
    if not isinstance(plan, Bins):
        _check_plan(caller, plan)
        if lengths is not None:
            fail(caller, "lengths are given with a plan", "leave lengths out: a plan knows them")
        return _Fills(plan.fills, plan.multiplicity, plan.tolerance)
    if lengths is None:
        fail(caller, "lengths are missing", "pass lengths=, those that were packed")
    plan.check(lengths)
    planned = apply_to_lengths(caller, plan.over_length, lengths, plan.max_seq_len)
    fills = part_sums(planned.of_ids[plan.ids], plan.offsets)
    return _Fills(fills, np.ones_like(fills), 1)


class _Fills(NamedTuple):
    """Of templates or of bins: tokens int64 `[t]`, bins int64 `[t]`, and the tolerance."""

    tokens: Int64
    times: Int64
    tolerance: int


def _lengths_of(caller: str, counts: ArrayLike | Mapping[int, int]) -> tuple[Int64, Int64]:
    """Return the distinct lengths, and how often each comes; a mapping is not made an array."""
    if not isinstance(counts, Mapping):
        array = as_counts(caller, counts)
        lengths = np.flatnonzero(array)
        return lengths, array[lengths]
    keys = check_integers(caller, "counts (keys)", plain_integers(counts.keys()))
    times = check_integers(caller, "counts (values)", plain_integers(counts.values()))
    if times.size and int(times.min()) < 0:
        place = int((times < 0).argmax())
        fail(caller, f"counts[{keys[place]}] = {times[place]}", "a count is at least 0")
    keys, times = keys[times != 0], times[times != 0]
    lengths = check_lengths(caller, keys, name="counts (keys)").astype(np.int64)
    # In floats, which cannot wrap.
    if float(lengths.astype(float) @ times.astype(float)) >= MAX_TOTAL:
        fail(caller, "counts are of 2**62 tokens or more", "check what computes counts")
    return lengths, times.astype(np.int64)
