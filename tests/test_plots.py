"""Pictures: what is drawn is what the plan, the counts, the mask or the figures hold."""

import io
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from test_errors import message

import seqpack_jax as sp
from seqpack_jax import drawing, plots
from seqpack_jax.model.segments import segment_mask

matplotlib.use("Agg")

OKABE_ITO = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #000000".split()
LENGTHS = [7, 5, 5, 5, 5, 5, 3, 3, 3]
PLAN = sp.pack_length_histogram(np.bincount(LENGTHS), 10)
EMPTY = sp.pack_length_histogram({}, 10)
FULL = sp.pack_length_histogram({8: 1}, 8)
SKEWED = np.random.default_rng(0).geometric(0.02, 5000).clip(1, 512)
STATS = sp.PackingStats.from_plan(PLAN)

DRAW = {
    "plot_plan": lambda **options: plots.plot_plan(PLAN, **options),
    "plot_fill": lambda **options: plots.plot_fill(PLAN, **options),
    "plot_lengths": lambda **options: plots.plot_lengths({5: 5, 12: 1}, 10, **options),
    "plot_mask": lambda **options: plots.plot_mask([1, 1, 2, 0], **options),
    "plot_comparison": lambda **options: plots.plot_comparison({"a": STATS}, **options),
}


def new_axes():
    return Figure().subplots()


@pytest.fixture(autouse=True)
def _no_figure_is_left_over():
    assert plt.get_fignums() == []
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert left == []


def brightness(colour):
    return float(np.dot(to_rgb(colour), [0.299, 0.587, 0.114]))


def boxes(axes, label):
    """`(row, start, stop)` of the boxes of a collection, from left to right and top to bottom."""
    collection = next(each for each in axes.collections if each.get_label() == label)
    found = []
    for path in collection.get_paths():
        (x0, y0), (x1, y1) = path.get_extents().get_points()
        assert y1 - y0 == pytest.approx(0.8)
        found.append((round((y0 + y1) / 2), x0, x1))
    return found


def bars(axes):
    """`(first value, last value, height)` of the bars of a histogram."""
    found = []
    for bar in axes.containers:
        for patch in bar:
            low, high = patch.get_x() + 0.5, patch.get_x() + patch.get_width() - 0.5
            assert (low, high) == (round(low), round(high))
            found.append((round(low), round(high), int(patch.get_height())))
    return sorted(found)


def counted(values, found):
    """The bars that these values should have had."""
    values = np.asarray(values)
    return [(low, high, int(((values >= low) & (values <= high)).sum())) for low, high, _ in found]


def expanded(plan):
    """The lengths of every row of a plan, in its order."""
    return [template for template, times in plan.to_counter().items() for _ in range(times)]


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAW)
def test_axes_are_drawn_on_or_made(name, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("shown"))
    given = new_axes()
    assert DRAW[name](ax=given) is given
    assert plt.get_fignums() == []
    made = DRAW[name]()
    assert plt.get_fignums() == [made.figure.number]
    assert made.figure.axes == [made]
    assert made.get_title() == given.get_title() != ""
    assert made.get_xlabel() == given.get_xlabel() != ""
    assert "tokens" in made.get_xlabel()
    plt.close(made.figure)


@pytest.mark.parametrize("name", DRAW)
def test_what_is_no_axes(name):
    for ax in (Figure(), plt, [new_axes()], np.array([new_axes()])):
        assert f"{name}: ax is a {type(ax).__name__}" in message(DRAW[name], ax=ax)


@pytest.mark.parametrize("name", DRAW)
def test_without_matplotlib(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = message(DRAW[name])
    assert text == (
        f"{name}: the package matplotlib is not installed. Hint: pip install 'seqpack_jax[plots]'."
    )


@pytest.mark.parametrize(
    ("draw", "parts"),
    [
        (lambda: plots.plot_plan([[1]]), ["plot_plan: plan is a list", "PackingPlan"]),
        (
            lambda: plots.plot_plan(sp.pack_vectors([[5, 1]], (10, 6))[0]),
            ["plot_plan: the plan has several capacities", "plan.column(0)"],
        ),
        (lambda: plots.plot_plan(PLAN, rows=0), ["rows = 0, but it must be in [1, 500]"]),
        (lambda: plots.plot_plan(PLAN, rows=501), ["rows = 501"]),
        (lambda: plots.plot_fill(None), ["plot_fill: plan is a NoneType"]),
        (lambda: plots.plot_fill(PLAN, lengths=LENGTHS), ["a plan knows them"]),
        (lambda: plots.plot_fill(sp.pack_sequences(LENGTHS, 10)), ["lengths are missing"]),
        (
            lambda: plots.plot_fill(sp.pack_sequences(LENGTHS, 10), lengths=[5]),
            ["Bins.check: an id is not in [0, 1)"],
        ),
        (lambda: plots.plot_lengths([0, 1.5], 10), ["plot_lengths: counts has dtype float64"]),
        (lambda: plots.plot_lengths([0, float("nan")], 10), ["counts[1] = nan"]),
        (lambda: plots.plot_lengths([0, -1], 10), ["counts[1] = -1"]),
        (lambda: plots.plot_lengths([1], 10), ["counts[0] = 1"]),
        (lambda: plots.plot_lengths({4: 2, 3: -1}, 10), ["counts[3] = -1"]),
        (lambda: plots.plot_lengths({3: float("nan")}, 10), ["counts (values)[0] = nan"]),
        (lambda: plots.plot_lengths({"3": 1}, 10), ["counts (keys) has dtype <U1"]),
        (lambda: plots.plot_lengths({0: 1}, 10), ["counts (keys)[0] = 0"]),
        (lambda: plots.plot_lengths({2**31: 1}, 10), ["a length is at most 2147483647"]),
        (lambda: plots.plot_lengths({2**30: 2**33}, 10), ["2**62 tokens or more"]),
        (lambda: plots.plot_lengths({3: 1}, 0), ["plot_lengths: max_seq_len = 0"]),
        (lambda: plots.plot_mask([[1, 2]]), ["shape (1, 2)", "segment_ids[0]"]),
        (
            lambda: plots.plot_mask([[1], [1, 2]]),
            ["segment_ids is ragged", "pass one row"],
        ),
        (lambda: plots.plot_mask([]), ["the row has 0 tokens"]),
        (lambda: plots.plot_mask(np.ones(2049, int)), ["2,049 tokens", "segment_ids[:2048]"]),
        (lambda: plots.plot_mask([1.0]), ["plot_mask: segment_ids has dtype float64"]),
        (lambda: plots.plot_mask([1, -2]), ["segment_ids[1] = -2, below 0"]),
        (lambda: plots.plot_comparison([STATS]), ["stats is a list", "{name: PackingStats}"]),
        (lambda: plots.plot_comparison({}), ["stats is empty"]),
        (lambda: plots.plot_comparison({"a": PLAN}), ["stats['a'] is a PackingPlan"]),
    ],
)
def test_bad_input_is_refused_before_a_figure_is_made(draw, parts):
    text = message(draw)
    for part in parts:
        assert part in text


def test_matplotlib_is_loaded_when_something_is_drawn():
    code = (
        "import sys, seqpack_jax.plots as plots, seqpack_jax.report\n"
        "print({'matplotlib', 'jax', 'grain'} & set(sys.modules))\n"
        "plots.plot_mask([1, 0])\n"
        "print({'matplotlib', 'jax', 'grain'} & set(sys.modules))\n"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed == "set()\n{'matplotlib'}\n"


@pytest.mark.parametrize("setting", ["MPLBACKEND", "MATPLOTLIBRC"])
def test_settings_that_matplotlib_refuses(setting, tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"font.family: \xff")
    value = {"MPLBACKEND": "bogus", "MATPLOTLIBRC": str(tmp_path)}[setting]
    code = "import seqpack_jax.plots as plots\nplots.plot_mask([1, 0])"
    command, environment = [sys.executable, "-c", code], {**os.environ, setting: value}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    last = done.stderr.splitlines()[-1]
    assert "SeqpackError: plot_mask: matplotlib cannot be loaded (" in last
    assert last.endswith("Hint: check MPLBACKEND and matplotlibrc.")


def test_neighbours_differ_in_brightness():
    colours = drawing.SEGMENT_COLOURS
    assert set(colours) <= set(OKABE_ITO)
    assert len(set(colours)) == len(colours) == 6
    for one, next_one in zip(colours, [*colours[1:], colours[0]], strict=True):
        assert abs(brightness(one) - brightness(next_one)) >= 0.15, (one, next_one)


def test_neighbours_differ_in_what_is_printed_in_grey():
    """In the pixels: of the middle of each segment, but for its number."""
    plan = sp.PackingPlan.from_counter({(10,) * 8: 1}, 90)
    axes = plots.plot_plan(plan)
    for text in axes.texts:
        text.set_visible(False)
    canvas = axes.figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] @ [0.299, 0.587, 0.114] / 255
    places = axes.transData.transform([(start, 0) for start in range(5, 85, 10)])
    shades = np.array([pixels[int(pixels.shape[0] - y), int(x)] for x, y in places])
    assert (np.abs(np.diff(shades)) >= 0.14).all(), shades
    assert (shades < 0.9).all()  # none is taken for paper
    plt.close(axes.figure)


# --- plot_plan --------------------------------------------------------------------------------


def expected_boxes(rows, max_seq_len):
    segments, padding = [], []
    for y, lengths in enumerate(rows):
        stops = np.cumsum(lengths)
        segments += [(y, stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]
        if stops[-1] < max_seq_len:
            padding.append((y, stops[-1], max_seq_len))
    return segments, padding


def test_every_segment_of_a_plan_is_a_box():
    axes = plots.plot_plan(PLAN, ax=new_axes())
    rows = expanded(PLAN)
    assert rows == [(7, 3), (5, 5), (5, 5), (5, 3), (3,)]
    assert (boxes(axes, "segments"), boxes(axes, "padding")) == expected_boxes(rows, 10)
    assert axes.get_title() == "5 rows of 10 tokens, 82.00 % full"
    assert axes.get_xlabel() == "tokens (hatched: padding)"
    assert axes.get_ylabel() == "row"
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 10), (4.5, -0.5))
    assert axes.get_yticks().tolist() == [0, 1, 2, 3, 4]
    told = [(text.get_text(), *text.get_position()) for text in axes.texts]
    middles = [(str(round(b - a)), (a + b) / 2, y) for y, a, b in boxes(axes, "segments")]
    assert told == middles


def test_padding_is_hatched_and_colours_go_by_place():
    axes = plots.plot_plan(sp.PackingPlan.from_counter({(2,) * 8: 1, (3, 1): 1}, 20), ax=new_axes())
    segments, padding = (
        next(each for each in axes.collections if each.get_label() == label)
        for label in ("segments", "padding")
    )
    assert padding.get_hatch() is not None
    assert segments.get_hatch() is None
    colours = [to_rgb(colour[:3]) for colour in segments.get_facecolors()]
    wanted = [to_rgb(colour) for colour in drawing.SEGMENT_COLOURS]
    assert colours == [*wanted[:2], *wanted, *wanted[:2]]
    assert to_rgb(padding.get_facecolors()[0][:3]) not in wanted


def test_rows_are_spread_over_the_plan():
    plan = sp.pack_length_histogram(np.bincount(SKEWED), 512)
    every = expanded(plan)
    for rows in (1, 2, 7, 40, 500):
        axes = plots.plot_plan(plan, rows=rows, ax=new_axes())
        count = min(rows, len(every))
        chosen = [i * (len(every) - 1) // max(1, count - 1) for i in range(count)]
        assert chosen[0] == 0
        assert count == 1 or chosen[-1] == len(every) - 1
        found = boxes(axes, "segments"), boxes(axes, "padding")
        assert found == expected_boxes([every[i] for i in chosen], 512)
        ticks = [int(tick) for tick in axes.get_yticks()]
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [f"{chosen[tick]:,}" for tick in ticks]
        assert axes.get_ylabel() == ("row" if count == len(every) else f"row ({rows} shown)")
        assert bool(axes.texts) == (count <= 16)


def test_rows_of_many_segments_end_in_one_grey_box():
    plan = sp.pack_length_histogram({1: 3000, 3: 2}, 2048)
    axes = plots.plot_plan(plan, ax=new_axes())
    found = boxes(axes, "segments")
    assert [sum(y == row for row, _, _ in found) for y in (0, 1)] == [257, 257]
    last = [box for box in found if box[2] == max(b for y, _, b in found if y == box[0])]
    assert last == [(0, 260, 2048), (1, 256, 958)]
    colours = next(each for each in axes.collections if each.get_label() == "segments")
    grey = to_rgb(colours.get_facecolors()[256][:3])
    assert len(set(grey)) == 1
    assert "grey: all behind 256 segments" in axes.get_xlabel()
    assert boxes(axes, "padding") == [(1, 958, 2048)]


def test_a_trillion_rows_are_as_many_boxes():
    counts = {300: 7, 200: 9, 100: 4}
    small = sp.pack_length_histogram(counts, 512)
    large = sp.pack_length_histogram({n: k * 10**12 for n, k in counts.items()}, 512)
    axes = [plots.plot_plan(plan, ax=new_axes()) for plan in (small, large)]
    drawn = [len(boxes(each, "segments")) for each in axes]
    assert drawn[0] == small.num_sequences
    assert drawn[1] < 40 * large.max_segments + 1
    assert axes[1].get_title().startswith(f"{large.num_bins:,} rows of 512 tokens")
    assert sum(height for _, _, height in bars(plots.plot_fill(large, ax=new_axes()))) == (
        large.num_bins
    )


def test_plans_of_one_bin_or_none():
    axes = plots.plot_plan(FULL, ax=new_axes())
    assert boxes(axes, "segments") == [(0, 0, 8)]
    assert boxes(axes, "padding") == []
    assert axes.get_title() == "1 row of 8 tokens, 100.00 % full"
    axes = plots.plot_plan(EMPTY, ax=new_axes())
    assert boxes(axes, "segments") == boxes(axes, "padding") == []
    assert axes.get_title() == "0 rows of 10 tokens"
    assert list(axes.get_yticks()) == []


def test_a_tolerance_is_told():
    plan = sp.pack_length_histogram(np.bincount(SKEWED), 512, tolerance=16)
    axes = plots.plot_plan(plan, ax=new_axes())
    assert axes.get_xlabel() == "tokens, planned as multiples of 16 (hatched: padding)"
    assert axes.get_title().endswith(f"{100 * plan.efficiency:.2f} % full")
    fill = plots.plot_fill(plan, ax=new_axes())
    assert "as planned with a tolerance of 16" in fill.get_xlabel()
    assert fill.get_title() == axes.get_title()


def test_columns_of_vector_plans_are_drawn():
    plan = sp.pack_vectors([[5, 1], [3, 4], [5, 4], [5, 1]], (10, 6))[0].column(0)
    axes = plots.plot_plan(plan, ax=new_axes())
    assert boxes(axes, "segments") == expected_boxes(expanded(plan), 10)[0]


# --- plot_fill --------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [512, 640, 5000, 64, 65])
def test_bars_count_the_rows(capacity):
    lengths = SKEWED.clip(1, capacity)
    packing = sp.pack_sequences(lengths, capacity, algorithm="next_fit")
    fills = [int(lengths[ids].sum()) for ids in packing]
    axes = plots.plot_fill(packing, lengths=lengths, ax=new_axes())
    found = bars(axes)
    assert found == counted(fills, found)
    assert sum(height for *_, height in found) == len(packing)
    assert len(found) <= 64
    assert len({high - low for low, high, _ in found[1:]}) == 1  # the first starts at 1
    assert (capacity - found[-1][1]) % -(-capacity // 64) == 0
    assert axes.get_xlim()[1] > found[-1][1] + 0.5 <= capacity + 0.5
    mean = [line.get_xdata()[0] for line in axes.lines]
    assert mean == [pytest.approx(np.mean(fills))]
    assert f"{np.mean(fills):,.1f}" in axes.get_xlabel()
    full = 100 * np.mean(np.array(fills) == capacity)
    percent = 100 * lengths.sum() / (len(packing) * capacity)
    assert axes.get_title() == (
        f"{len(packing):,} rows of {capacity:,} tokens, {percent:.2f} % full; "
        f"{full:.2f} % of them to the brim"
    )


def test_a_plan_and_its_bins_have_the_same_bars():
    lengths = SKEWED
    plan = sp.pack_length_histogram(np.bincount(lengths), 512)
    packing = sp.pack_sequences(lengths, 512)
    of_plan = plots.plot_fill(plan, ax=new_axes())
    of_bins = plots.plot_fill(packing, lengths=lengths, ax=new_axes())
    assert bars(of_plan) == bars(of_bins)
    assert of_plan.get_title() == of_bins.get_title()


def test_bins_of_split_sequences():
    lengths = [25, 3, 4]  # pieces of 10, 10 and 5
    packing = sp.pack_sequences(lengths, 10, over_length="split")
    axes = plots.plot_fill(packing, lengths=lengths, ax=new_axes())
    assert bars(axes) == [(3, 3, 1), (9, 9, 1), (10, 10, 2)]


@pytest.mark.parametrize(("times", "scale"), [(99, "linear"), (100, "log"), (10**9, "log")])
def test_the_scale_is_logarithmic_where_bars_would_vanish(times, scale):
    plan = sp.PackingPlan.from_counter({(10,): times, (4,): 1}, 10)
    axes = plots.plot_fill(plan, ax=new_axes())
    assert axes.get_yscale() == scale
    assert ("log scale" in axes.get_ylabel()) == (scale == "log")
    assert bars(axes) == [(4, 4, 1), (10, 10, times)]
    low, high = axes.get_ylim()
    assert low < 1
    assert high > times


def test_the_scale_is_linear_where_all_bars_are_high():
    plan = sp.PackingPlan.from_counter({(10,): 500, (4,): 200}, 10)
    assert plots.plot_fill(plan, ax=new_axes()).get_yscale() == "linear"


def test_axes_that_were_logarithmic_become_linear_again():
    axes = new_axes()
    axes.set(yscale="log", ylim=(0.5, 2))
    plots.plot_fill(sp.PackingPlan.from_counter({(10,): 30, (4,): 1}, 10), ax=axes)
    assert (axes.get_yscale(), axes.get_ylabel()) == ("linear", "rows")
    low, high = axes.get_ylim()
    assert low == 0
    assert 30 < high < 40


def test_fills_of_one_bin_or_none():
    axes = plots.plot_fill(FULL, ax=new_axes())
    assert bars(axes) == [(8, 8, 1)]
    axes = plots.plot_fill(EMPTY, ax=new_axes())
    assert bars(axes) == []
    assert axes.get_title() == "0 rows of 10 tokens"
    nothing = sp.pack_sequences([], 10)
    assert bars(plots.plot_fill(nothing, lengths=[], ax=new_axes())) == []


# --- plot_lengths -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 128, 511, 512, 600, 10**6])
def test_bars_count_the_lengths(limit):
    axes = plots.plot_lengths(np.bincount(SKEWED), limit, ax=new_axes())
    found = bars(axes)
    top = limit + max(1, limit // 2)
    assert found == counted(np.minimum(SKEWED, top), found)
    assert sum(height for *_, height in found) == len(SKEWED)
    assert len(found) <= 64
    assert not [bar for bar in found if bar[0] <= limit < bar[1]]
    hatched = {
        round(patch.get_x() + 0.5): patch.get_hatch() is not None
        for bar in axes.containers
        for patch in bar
    }
    assert all(hatch == (low > limit) for low, hatch in hatched.items())
    assert (axes.get_legend() is None) == (SKEWED.max() <= limit)
    mean = f"{len(SKEWED):,} sequences, {SKEWED.mean():,.1f} tokens on average"
    assert axes.get_title() == f"{mean}; rows of {limit:,}"


def test_the_legend_tells_the_share_that_is_over_length():
    axes = plots.plot_lengths(np.bincount(SKEWED), 100, ax=new_axes())
    over = SKEWED > 100
    text = axes.get_legend().get_texts()[0].get_text()
    assert text.startswith("over 100 tokens: ")
    assert f"{100 * over.mean():.2f} % of the sequences" in text
    assert f"{100 * SKEWED[over].sum() / SKEWED.sum():.2f} % of the tokens" in text
    last = bars(axes)[-1]
    assert text.endswith(f"(last bar: from {last[0]} up to {SKEWED.max()})")
    assert last[2] == (SKEWED >= last[0]).sum() > 0
    lines = [line.get_xdata()[0] for line in axes.lines]
    assert lines == [100.5]


def test_a_mapping_may_have_any_lengths():
    counts = {30: 10**9, 700: 10**6, 5: 0, 2_000_000_000: 3}
    axes = plots.plot_lengths(counts, 500, ax=new_axes())
    assert sum(height for *_, height in bars(axes)) == sum(counts.values())
    assert "up to 2,000,000,000" in axes.get_legend().get_texts()[0].get_text()
    assert axes.get_xlim()[1] < 800
    few = {5: 5, 3: 3, 12: 1}
    array = np.zeros(13, int)
    array[list(few)] = list(few.values())
    drawn = [plots.plot_lengths(each, 10, ax=new_axes()) for each in (few, array)]
    assert bars(drawn[0]) == bars(drawn[1]) == [(3, 3, 3), (5, 5, 5), (12, 12, 1)]


def test_as_long_as_a_row_is_not_too_long():
    axes = plots.plot_lengths({9: 1, 10: 2, 11: 3}, 10, ax=new_axes())
    drawn = [patch for bar in axes.containers for patch in bar]
    hatched = {patch.get_height(): patch.get_hatch() is not None for patch in drawn}
    assert hatched == {1: False, 2: False, 3: True}
    assert axes.get_xlabel() == "length of a sequence in tokens (dashed: max_seq_len)"


def test_no_lengths_and_short_ones():
    for nothing in ({}, [], [0, 0], {7: 0}):
        axes = plots.plot_lengths(nothing, 10, ax=new_axes())
        assert bars(axes) == []
        assert axes.get_title() == "0 sequences; rows of 10"
    axes = plots.plot_lengths({3: 1}, 1000, ax=new_axes())
    assert bars(axes) == [(3, 3, 1)]
    assert axes.get_xlim()[1] < 5  # max_seq_len is told, not drawn
    assert axes.get_xlabel() == "length of a sequence in tokens"
    assert len(axes.lines) == 0
    assert axes.get_title() == "1 sequence, 3.0 tokens on average; rows of 1,000"


# --- plot_mask --------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_the_image_is_the_mask(causal):
    rows = [[1, 1, 2, 0], [0], [5, 5, 1], [1, 2, 1, 0, 2], [*range(1, 9), 0, 0]]
    rows.append(np.repeat([1, 2, 3, 0], [9, 1, 30, 5]).tolist())
    for row in rows:
        axes = plots.plot_mask(np.array(row), causal=causal, ax=new_axes())
        image = np.asarray(axes.images[0].get_array())
        mask = np.asarray(segment_mask(np.array([row]), causal=causal))[0, 0]
        assert np.array_equal(image > 0, mask)
        colour = [7 if segment == 0 else (segment - 1) % 6 + 1 for segment in row]
        assert all((line[line > 0] == own).all() for line, own in zip(image, colour, strict=True))
        assert f"{100 * mask.mean():.2f} % of the pairs" in axes.get_xlabel()
        assert ("causal" in axes.get_xlabel()) == causal


def test_colours_and_words_of_a_mask():
    row = [1, 1, 2, 0]
    axes = plots.plot_mask(row, ax=new_axes())
    image = axes.images[0]
    colours = [to_rgb(image.cmap(image.norm(value))[:3]) for value in range(8)]
    assert colours[0] == (1, 1, 1)
    assert colours[1:7] == [to_rgb(colour) for colour in drawing.SEGMENT_COLOURS]
    assert len(set(colours[7])) == 1  # grey
    assert axes.get_title() == "2 segments in 4 tokens, 1 of padding"
    assert "query" in axes.get_ylabel()
    assert "key" in axes.get_xlabel()
    assert axes.yaxis_inverted()
    assert plots.plot_mask([1], ax=new_axes()).get_title() == "1 segment in 1 token"
    assert len(plots.plot_mask(np.ones(2048, int), ax=new_axes()).images[0].get_array()) == 2048


def test_ids_of_any_integers():
    import jax.numpy as jnp

    wanted = plots.plot_mask([1, 1, 2, 0], ax=new_axes()).images[0].get_array()
    for ids in (jnp.array([1, 1, 2, 0]), np.array([1, 1, 2, 0], np.uint8)):
        found = plots.plot_mask(ids, ax=new_axes()).images[0].get_array()
        assert np.array_equal(found, wanted)


# --- plot_comparison --------------------------------------------------------------------------


def stats_of(*algorithms, lengths=SKEWED, capacity=512):
    found = {}
    for name in algorithms:
        packing = sp.pack_sequences(lengths, capacity, algorithm=name)
        found[name] = sp.PackingStats.from_bins(packing, lengths, capacity)
    return found


def test_bars_are_efficiencies_and_the_line_is_the_bound():
    stats = stats_of("next_fit", "best_fit_decreasing", "worst_fit_decreasing")
    stats["padded"] = sp.PackingStats.from_bins([[i] for i in range(len(SKEWED))], SKEWED, 512)
    axes = plots.plot_comparison(stats, ax=new_axes())
    widths = [patch.get_width() for patch in axes.containers[0]]
    assert widths == [100 * each.efficiency for each in stats.values()]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(stats)
    assert [text.get_text() for text in axes.texts] == [
        f"{each.num_bins:,} rows, {100 * each.efficiency:.2f} %" for each in stats.values()
    ]
    assert axes.yaxis_inverted()
    assert axes.get_xlim()[0] == 0
    bound = stats["next_fit"].lower_bound
    (line,) = axes.lines
    assert line.get_xdata()[0] == pytest.approx(100 * SKEWED.sum() / (bound * 512))
    assert f"the lower bound of {bound:,} rows" in axes.get_title()
    for text, width in zip(axes.texts, widths, strict=True):  # in the bar, or behind it
        inside = text.get_position()[0] < width
        assert inside == (width > 50)
        assert text.get_color() == ("white" if inside else "black")


def test_no_line_where_packings_are_of_different_sequences():
    stats = stats_of("best_fit_decreasing")
    other = stats_of("next_fit", lengths=SKEWED[:4000])
    axes = plots.plot_comparison({**stats, **other}, ax=new_axes())
    assert len(axes.lines) == 0
    assert "bound" not in axes.get_title()
    nothing = sp.PackingStats.from_plan(EMPTY)
    axes = plots.plot_comparison({"$^$": nothing}, ax=new_axes())  # no formula
    axes.figure.savefig(io.BytesIO())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$^$"]
    assert [text.get_text() for text in axes.texts] == ["0 rows, 100.00 %"]
    assert len(axes.lines) == 0


# --- can it be read? --------------------------------------------------------------------------


def overlaps(boxes_):
    return [
        (one, other)
        for k, one in enumerate(boxes_)
        for other in boxes_[:k]
        if one.overlaps(other) and min(one.width, other.width) > 0
    ]


@pytest.mark.parametrize(
    "draw",
    [
        *DRAW.values(),
        lambda: plots.plot_plan(sp.pack_length_histogram({300: 10**9, 7: 10**9}, 512)),
        lambda: plots.plot_plan(sp.pack_length_histogram(np.bincount(SKEWED), 131072), rows=12),
        lambda: plots.plot_fill(sp.pack_length_histogram({300: 10**9, 7: 10**9}, 131072)),
        lambda: plots.plot_lengths(np.bincount(SKEWED), 40),
        lambda: plots.plot_lengths({100_000: 10**9, 131072: 3 * 10**8}, 131072),
        lambda: plots.plot_lengths({100: 10**9, 700: 3 * 10**8, 1000: 10**9}, 512),
        lambda: plots.plot_mask(np.repeat(np.arange(40), 50)),
        lambda: plots.plot_comparison({f"packer {k}": STATS for k in range(40)}),
    ],
)
def test_nothing_lies_over_a_text(draw):
    axes = draw()
    axes.figure.canvas.draw()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert overlaps([label.get_window_extent() for label in labels]) == []
    frame = axes.figure.bbox
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        if not text.get_text():
            continue
        box = text.get_window_extent()
        assert frame.x0 <= box.x0, text
        assert frame.y0 <= box.y0, text
        assert box.x1 <= frame.x1, text
        assert box.y1 <= frame.y1, text
    if (legend := axes.get_legend()) is not None:
        place = legend.get_window_extent()
        drawn = [patch for bar in axes.containers for patch in bar]
        assert not [patch for patch in drawn if patch.get_window_extent().overlaps(place)]
    plt.close(axes.figure)
