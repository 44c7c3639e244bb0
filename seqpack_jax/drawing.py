"""What the pictures of `plots` are made of: colours, bars, boxes, axes and their text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import fail
from seqpack_jax.planning.counts import Int64
from seqpack_jax.planning.plan import PackingPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "Bars",
    "Boxes",
    "bars_of",
    "boxes_of",
    "check_matplotlib",
    "count_on",
    "default_style",
    "draw_bars",
    "draw_boxes",
    "fullness",
    "numbered",
    "over_length_label",
    "own_or_given",
    "percent",
    "printable",
]

# In this order the brightness (0.299 R + 0.587 G + 0.114 B) of neighbours, the last and the first
# among them, differs by 0.15 of white at least.
SEGMENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#F0E442")
BLUE, RED = SEGMENT_COLOURS[0], SEGMENT_COLOURS[4]
PALE, GREY, DARK = "#F2F2F2", "#8C8C8C", "#404040"

MOST_BARS = 64  # of a histogram
MOST_PLACES = 256  # segments of a row that are drawn one by one
TOLD_ROWS = 16  # up to so many rows, segments bear their lengths
_TOLD_SHARE = 0.05  # of a row, which a segment takes at least to bear its length


# --- axes and text ----------------------------------------------------------------------------


def check_matplotlib(caller: str) -> None:
    """Raise, with what helps, where matplotlib is missing or its settings keep it from loading."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        problem = "the package matplotlib is not installed"
        fail(caller, problem, "pip install 'seqpack_jax[plots]'")
    except (ValueError, OSError) as error:  # it reads its settings at once
        fail(caller, f"matplotlib cannot be loaded ({error})", "check MPLBACKEND and matplotlibrc")


@contextmanager
def default_style() -> Iterator[None]:
    """Draw as matplotlib does without settings, the same in every run, whatever the user's are.

    A character that its fonts lack is drawn as a box, without a warning.
    """
    import matplotlib

    with warnings.catch_warnings():
        quiet = r"Glyph \d|Matplotlib currently does not support|.* rcparam was deprecated"
        warnings.filterwarnings("ignore", quiet)
        style: dict[Any, Any] = {
            name: value
            for name, value in matplotlib.rcParamsDefault.items()
            if not name.startswith("backend")  # which may not be set, and draws nothing here
        }
        with matplotlib.rc_context({**style, "svg.hashsalt": "seqpack_jax"}):
            yield


def own_or_given(caller: str, ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax`, or the Axes of a new figure of pyplot, `size` inches wide and high.

    Call it when all else has been checked: what fails leaves no empty figure behind.
    """
    check_matplotlib(caller)
    from matplotlib.axes import Axes

    if ax is None:
        from matplotlib import pyplot

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        fail(caller, f"ax is a {type(ax).__name__}", "pass one Axes, as plt.subplots() returns")
    return ax


def count_on(axis: Axis) -> None:
    """Number an axis in integers, with commas."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def numbered(count: int, noun: str) -> str:
    """Return how many of something there are.

    Example:
        >>> numbered(1, "row"), numbered(2000, "row")
        ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """Return a share in percent; neither all nor nothing, unless it is that.

    Example:
        >>> percent(0.5), percent(1.0), percent(0.999999), percent(1e-9)
        ('50.00 %', '100.00 %', '>99.99 %', '<0.01 %')
    """
    if 0.99995 <= share < 1:
        return ">99.99 %"
    return "<0.01 %" if 0 < share < 0.00005 else f"{100 * share:.2f} %"


def fullness(rows: int, max_seq_len: int, share: float) -> str:
    """Return the title of a picture of rows, such as `5 rows of 10 tokens, 82.00 % full`."""
    title = f"{numbered(rows, 'row')} of {numbered(max_seq_len, 'token')}"
    return f"{title}, {percent(share)} full" if rows else title


def printable(text: str) -> str:
    r"""Return a name with what cannot be printed, or is no UTF-8, as escapes.

    Example:
        >>> printable("d\udcff\n.npy")
        'd\\udcff\\n.npy'
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def over_length_label(lengths: Int64, times: Int64, limit: int, last: int) -> str:
    """Return the text of the legend; `last` is where a bar begins that takes all longer ones."""
    over = lengths > limit
    tokens = int(lengths[over] @ times[over]) / int(lengths @ times)
    sequences = int(times[over].sum()) / int(times.sum())
    text = f"over {numbered(limit, 'token')}: {percent(sequences)} of the sequences,\n"
    rest = f"\n(last bar: from {last:,} up to {int(lengths.max()):,})" if last else ""
    return f"{text}{percent(tokens)} of the tokens{rest}"


# --- bars -------------------------------------------------------------------------------------


class Bars(NamedTuple):
    """A histogram of integers: bar `i` is of `lows[i]` to `highs[i]`, both included.

    All are int64 `[b]`, in rising order, without empty bars.
    """

    lows: Int64
    highs: Int64
    heights: Int64


def bars_of(values: NDArray[Any], times: Int64, width: int, limit: int) -> Bars:
    """Count values in bars of one width, of which one ends at `limit`.

    Args:
        values: integers `[n]`, at least 1.
        times: int64 `[n]`, how often each comes.
        width: integers to a bar; the first, which starts at 1, may have fewer.
        limit: where a bar ends and another begins.

    Example:
        >>> bars = bars_of(np.array([1, 4, 5, 6]), np.array([1, 1, 1, 7]), width=3, limit=5)
        >>> [part.tolist() for part in bars]
        [[1, 3, 6], [2, 5, 8], [1, 2, 7]]
    """
    places, inverse = np.unique((limit - values.astype(np.int64)) // width, return_inverse=True)
    heights = np.zeros(len(places), np.int64)
    np.add.at(heights, inverse, times)
    highs = limit - places * width
    return Bars(*(part[::-1] for part in (np.maximum(highs - width + 1, 1), highs, heights)))


def draw_bars(axes: Axes, bars: Bars, **style: Any) -> None:
    """Draw bars; a value `v` is as wide as from `v - 0.5` to `v + 0.5`."""
    widths = bars.highs - bars.lows + 1
    line = 0.5 if len(widths) else 0.0
    style = {"edgecolor": "white", "linewidth": line, **style}
    axes.bar(bars.lows - 0.5, bars.heights, widths, align="edge", **style)


# --- boxes ------------------------------------------------------------------------------------


class Boxes(NamedTuple):
    """The segments of some rows, all `[s]`.

    Attributes:
        rows: int64, which of the rows each is in.
        places: int64, which of the segments of its row it is; the last may stand for several.
        starts: int64, in tokens.
        stops: int64.
    """

    rows: Int64
    places: Int64
    starts: Int64
    stops: Int64


def boxes_of(plan: PackingPlan, templates: Int64) -> Boxes:
    """Return the segments of rows made after some templates, of each row 257 boxes at most.

    Time: O(size of the plan + templates).
    """
    sizes = plan.sizes[templates]
    drawn = np.minimum(sizes, MOST_PLACES + 1)
    rows = np.repeat(np.arange(len(templates)), drawn)
    places = np.arange(len(rows)) - offsets_of(drawn)[rows]
    before = offsets_of(plan.lengths)  # tokens of the plan before each slot
    first = plan.offsets[templates][rows]
    starts = before[first + places] - before[first]
    stops = before[first + places + 1] - before[first]
    rest = places == MOST_PLACES
    stops[rest] = plan.fills[templates][rows[rest]]
    return Boxes(rows, places, starts, stops)


def draw_boxes(axes: Axes, boxes: Boxes, count: int, max_seq_len: int) -> None:
    """Draw segments in the colours of their places, and behind them the padding of `count` rows."""
    from matplotlib.collections import PolyCollection

    ends = np.zeros(count, np.int64)
    np.maximum.at(ends, boxes.rows, boxes.stops)
    room = np.flatnonzero(ends < max_seq_len)
    padding = _corners(room, ends[room], np.full(len(room), max_seq_len))
    style: dict[str, Any] = {"facecolors": PALE, "edgecolors": GREY, "linewidths": 0}
    axes.add_collection(PolyCollection(padding, hatch="////", label="padding", **style))
    colours = np.array([*SEGMENT_COLOURS, GREY])
    colour = np.where(boxes.places < MOST_PLACES, boxes.places % len(SEGMENT_COLOURS), -1)
    # Lines between segments as fine as these would hide them.
    line = 0.8 if int(boxes.places.max(initial=0)) < MOST_PLACES // 4 else 0.0
    style = {"facecolors": colours[colour], "edgecolors": "white", "linewidths": line}
    corners = _corners(boxes.rows, boxes.starts, boxes.stops)
    axes.add_collection(PolyCollection(corners, label="segments", **style))
    if count <= TOLD_ROWS:
        _tell_lengths(axes, boxes, colour, max_seq_len)


def _corners(rows: Int64, starts: Int64, stops: Int64) -> Any:
    """Return the corners of boxes, float64 `[s, 4, 2]`, which matplotlib draws in one go."""
    x = np.stack([starts, stops, stops, starts], axis=1)
    return np.stack([x, rows[:, None] + np.array([-0.4, -0.4, 0.4, 0.4])], axis=2)


def _tell_lengths(axes: Axes, boxes: Boxes, colour: Int64, max_seq_len: int) -> None:
    """Write the lengths of segments into them, where these are wide enough."""
    widths = boxes.stops - boxes.starts
    wide = (widths >= _TOLD_SHARE * max_seq_len) & (colour >= 0)
    for i in np.flatnonzero(wide).tolist():
        x, y = (int(boxes.starts[i]) + int(boxes.stops[i])) / 2, int(boxes.rows[i])
        ink = "white" if SEGMENT_COLOURS[colour[i]] == BLUE else "black"
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink, "fontsize": 8}
        axes.text(x, y, f"{int(widths[i]):,}", clip_on=True, **style)
