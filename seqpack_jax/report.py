"""A prepared directory for the eye: one picture, or one page of HTML that needs nothing else.

The same directory gives the same bytes with the same versions of matplotlib and this package.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seqpack_jax import __version__
from seqpack_jax.drawing import (
    check_matplotlib,
    default_style,
    fullness,
    numbered,
    percent,
    printable,
)
from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.prepared import Prepared, check_outside, load_prepared
from seqpack_jax.feeding.storage import write_bytes
from seqpack_jax.feeding.workers import local_path, way_out
from seqpack_jax.planning.bounds import lower_bound
from seqpack_jax.planning.plan import Certificate, PackingPlan
from seqpack_jax.planning.stats import PackingStats
from seqpack_jax.plots import MOST_ROWS, plot_fill, plot_lengths, plot_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["certificate_of", "write_picture", "write_report"]

_PICTURES = (".png", ".svg", ".pdf")
_PAGES = (".html", ".htm")
_LARGEST_SVG = 100_000  # bytes; pictures of more are put into the page as pixels
_MOST_FILES = 10  # of the input that are named one by one
_MOST_TEMPLATES = 10
_MOST_LENGTHS = 12  # of a template
_LONG = 24  # characters of what may be broken into lines
# Without the time, and with the same names inside in every run.
_METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def write_picture(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rows: int = 40,
    overwrite: bool = False,
) -> Prepared:
    """Draw a prepared directory: its lengths, how full its rows are, and rows of its plan.

    The panels are `plot_lengths`, `plot_fill` and `plot_plan`.  No display is needed.

    Args:
        directory: what `prepare` wrote, a path or a URL.
        output: the file, which ends in `.png`, `.svg` or `.pdf`.
        rows: how many rows of the plan are drawn at most, in `[1, 500]`.
        overwrite: replace the file if it is there.

    Returns:
        What was drawn, a `Prepared`.

    Raises:
        SeqpackError: the output has another ending, exists, lies in `directory` or cannot be
            written; `directory` is none that `prepare` wrote; `rows` is out of range; or
            matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from seqpack_jax import prepare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     _ = prepare(f"{folder}/lengths.npy", f"{folder}/prepared", 10)
        ...     _ = write_picture(f"{folder}/prepared", f"{folder}/plan.png")
        ...     Path(f"{folder}/plan.png").read_bytes()[1:4]
        b'PNG'
    """
    caller = "write_picture"
    check_matplotlib(caller)
    rows = check_int(caller, "rows", rows, 1, MOST_ROWS)
    path = _check_output(caller, output, _PICTURES, overwrite)
    prepared = load_prepared(directory)
    with default_style():
        figure = _new_figure(9.0, 11.0)
        figure.suptitle(printable(_name_of(directory)), fontweight="bold", parse_math=False)
        panels = figure.subplots(3, 1, height_ratios=[1, 1, 1.8])
        plot_lengths(prepared.counts, prepared.plan.max_seq_len, ax=panels[0])
        plot_fill(prepared.plan, ax=panels[1])
        plot_plan(prepared.plan, rows=rows, ax=panels[2])
        content = _bytes_of(figure, path.suffix[1:].lower())
    _write(caller, path, content)
    return prepared


def write_report(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Prepared:
    """Write a page of HTML on a prepared directory: what was packed, how well, and pictures of it.

    The page is one file without scripts, and loads nothing: it may be sent by mail, read without a
    network, in the dark, or printed.  It has no more than about 200 kB, whatever the data.

    Args:
        directory: what `prepare` wrote, a path or a URL.
        output: the file, which ends in `.html` or `.htm`.
        overwrite: replace the file if it is there.

    Returns:
        What the page is on, a `Prepared`.

    Raises:
        SeqpackError: as `write_picture`.

    Example:
        >>> import tempfile
        >>> from seqpack_jax import prepare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     _ = prepare(f"{folder}/lengths.npy", f"{folder}/prepared", 10)
        ...     _ = write_report(f"{folder}/prepared", f"{folder}/report.html")
        ...     Path(f"{folder}/report.html").read_text()[:15]
        '<!DOCTYPE html>'
    """
    caller = "write_report"
    check_matplotlib(caller)
    path = _check_output(caller, output, _PAGES, overwrite)
    prepared = load_prepared(directory)
    with default_style():
        page = _page(_name_of(directory), prepared)
    _write(caller, path, page.encode())
    return prepared


def certificate_of(plan: PackingPlan, bound: int) -> Certificate:
    """Return the certificate of a plan, or one for the better bound that its statistics have.

    Plans of earlier releases know no bound but the volume, and those of the seed library none.

    Args:
        plan: a `PackingPlan`.
        bound: the `lower_bound` of its `PackingStats`.

    Example:
        >>> plan = PackingPlan.from_counter({(6,): 3}, max_seq_len=10)
        >>> print(plan.certificate, certificate_of(plan, 3))
        None 3 rows; lower bound 3 (Martello-Toth L2): optimal
    """
    saved = plan.certificate
    if saved is not None and saved.lower_bound >= bound:
        return saved
    method = "volume"  # with a tolerance, a plan does not hold the true lengths
    if plan.tolerance == 1:
        method = lower_bound(plan.counts, plan.max_seq_len).method
    return Certificate(plan.num_bins, bound, method, bound == plan.num_bins)


# --- the output -------------------------------------------------------------------------------


def _check_output(caller: str, output: Any, suffixes: tuple[str, ...], overwrite: bool) -> Path:
    """Return the path of the file to be written, or raise before anything is read."""
    path = local_path(caller, "output", output)
    if path.suffix.lower() not in suffixes:
        *most, last = suffixes
        endings = f"{', '.join(most)} or {last}"
        fail(caller, f"the output {path} does not end in {endings}", "give it such an ending")
    place = Path(os.path.realpath(path)).parent
    if not place.is_dir():
        fail(caller, f"the directory {path.parent} of the output does not exist", "make it first")
    if path.is_dir():
        fail(caller, f"the output {path} is a directory", "pass the name of a file")
    if path.exists() and not overwrite:
        fail(caller, f"{path} exists", "choose another output, or pass overwrite=True")
    check_outside(caller, path)
    return path


def _write(caller: str, path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        problem = f"{path} cannot be written ({error.strerror})"
        fail(caller, problem, way_out(error, "output"))


def _name_of(directory: str | os.PathLike[str]) -> str:
    """Return the last part of a path or URL."""
    text = os.fspath(directory)
    return os.path.basename(text.rstrip("/")) or os.path.basename(os.path.abspath(text)) or text


# --- pictures ---------------------------------------------------------------------------------


def _new_figure(width: float, height: float) -> Figure:
    """Return a figure of so many inches that pyplot does not know, and so never shows or keeps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bytes_of(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120, metadata=_METADATA.get(kind))
    return buffer.getvalue()


def _image(figure: Figure, alt: str) -> str:
    """Return a figure as an element of HTML that holds it."""
    kind, content = "svg+xml", _bytes_of(figure, "svg")
    if len(content) > _LARGEST_SVG:
        kind, content = "png", _bytes_of(figure, "png")
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}">'


def _pictures(prepared: Prepared) -> Iterator[str]:
    """Return the figures of the page."""
    plan = prepared.plan
    figure = _new_figure(8.0, 3.2)
    title = plot_lengths(prepared.counts, plan.max_seq_len, ax=figure.subplots()).get_title()
    yield _figure(figure, title, "How long the sequences are, as they are packed.")
    figure = _new_figure(8.0, 3.2)
    title = plot_fill(plan, ax=figure.subplots()).get_title()
    yield _figure(figure, title, "How many tokens the rows hold.")
    shown = min(40, plan.num_bins)
    figure = _new_figure(8.0, 1.2 + 0.14 * max(shown, 8))
    title = plot_plan(plan, ax=figure.subplots()).get_title()
    yield _figure(figure, title, f"{numbered(shown, 'row')} of the plan, spread evenly over it.")


def _figure(figure: Figure, alt: str, caption: str) -> str:
    return f"<figure>{_image(figure, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


# --- the page ---------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --ground: #ffffff; --line: #c8c8c8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --ground: #16181c; --line: #4a4d52; }
}
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--ground); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; background: #ffffff; padding: 0.5rem; box-sizing: border-box; }
@media print {
  :root { color-scheme: light; --ink: #000000; --ground: #ffffff; --line: #999999; }
  body { max-width: none; margin: 0; font-size: 11pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def _page(name: str, prepared: Prepared) -> str:
    plan, report = prepared.plan, prepared.pools.report
    stats = PackingStats.from_plan(plan, report=report)
    proof = certificate_of(plan, stats.lower_bound)
    lead = f"{numbered(plan.num_sequences, 'sequence')} in "
    lead += fullness(plan.num_bins, plan.max_seq_len, plan.efficiency)
    title = _shown(f"Packing report: {name}")
    body = [
        f"<h1>{title}</h1>",
        f"<p><strong>{escape(lead)}.</strong> {escape(f'Certificate: {proof}')}.</p>",
        "<h2>How full the rows are</h2>",
        _table(("figure", "value", "what it means"), _figures_of(stats)),
        "<h2>Pictures</h2>",
        *_pictures(prepared),
        "<h2>Over-length sequences</h2>",
        *_over_length(prepared),
        "<h2>The most frequent rows</h2>",
        _table(("lengths", "tokens", "rows", "share"), _templates_of(plan)),
        "<h2>What was packed</h2>",
        _table(("parameter", "value"), _parameters_of(prepared.manifest)),
        *_inputs_of(prepared.manifest),
        f"<footer><p>Made by seqpack_jax {__version__}.</p></footer>",
    ]
    head = f'<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>'
    head += '\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    text = "\n".join(body)
    start = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>'
    return f"{start}\n<body>\n{text}\n</body>\n</html>\n"


def _shown(value: object) -> str:
    """Return a name or another value as HTML; a name may hold bytes that are no UTF-8."""
    return escape(printable(str(value)))


def _table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; the first cell of a row names it, the second one is most often a number."""
    head = "".join(f'<th scope="col">{_shown(name)}</th>' for name in names)
    body = []
    for first, second, *others in rows:
        cells = f'<th scope="row">{_shown(first)}</th>'
        kind = ' class="number"' if len(str(second)) < _LONG else ""
        cells += f"<td{kind}>{_shown(second)}</td>"
        body.append(cells + "".join(f"<td>{_shown(other)}</td>" for other in others))
    lines = "".join(f"<tr>{cells}</tr>\n" for cells in body)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>"


def _figures_of(stats: PackingStats) -> Iterator[tuple[str, str, str]]:
    """Return name, value and meaning of the figures of a plan."""
    yield "rows", f"{stats.num_bins:,}", "of one epoch"
    pieces = "in these rows, pieces of split ones among them" if stats.report.pieces else ""
    yield "sequences", f"{stats.num_sequences:,}", pieces or "in these rows"
    mean = f"{stats.segments_mean:.2f} (std {stats.segments_std:.2f})"
    yield "sequences in a row", mean, f"on average; {stats.max_segments:,} at most"
    yield "tokens", f"{stats.num_tokens:,}", f"of {stats.capacity:,} that the rows can hold"
    yield "efficiency", percent(stats.efficiency), "tokens / capacity"
    yield "padding", f"{stats.padding:,}", f"tokens, {percent(stats.padding_ratio)}"
    points = (stats.fullness_p50, stats.fullness_p90, stats.fullness_p99)
    fullest = " / ".join(percent(point) for point in points)
    yield "fullness", fullest, "half / nine in ten / 99 in a hundred rows are at most this full"
    yield "lower bound", f"{stats.lower_bound:,}", "no packing has fewer rows"
    yield "gap", f"{stats.gap:,}", "rows over the lower bound"
    share = percent(stats.attention_share)
    yield "attention", share, "of the pairs of tokens in a row are of one sequence"
    if stats.tolerance > 1:
        cost = f"planned as multiples of it; this costs {numbered(stats.tolerance_rows, 'row')}"
        yield "tolerance", f"{stats.tolerance:,}", cost


def _over_length(prepared: Prepared) -> Iterator[str]:
    """Return what the policy touched."""
    report, limit = prepared.pools.report, f"{prepared.plan.max_seq_len:,}"
    policy = f"The policy is “{_shown(report.action)}”."
    if not report.sequences:
        yield f"<p>No sequence has more than {limit} tokens. {policy}</p>"
        return
    total = prepared.manifest["rows"]  # directories of the seed library know no policy
    share = percent(report.sequences / total)
    yield f"<p>{policy}</p>"
    rows = [
        ("over-length sequences", f"{report.sequences:,}", f"{share} of {total:,} sequences"),
        ("their tokens", f"{report.tokens:,}", f"each has more than {limit}"),
        ("dropped tokens", f"{report.dropped_tokens:,}", "in no row of an epoch"),
        ("repeated tokens", f"{report.repeated_tokens:,}", "in two rows, where pieces overlap"),
        ("pieces", f"{report.pieces:,}", "that they were cut into"),
    ]
    yield _table(("figure", "value", "what it means"), rows)


def _templates_of(plan: PackingPlan) -> Iterator[tuple[str, str, str, str]]:
    """Return lengths, tokens, rows and share of the templates of most rows."""
    most = np.argsort(-plan.multiplicity, kind="stable")[:_MOST_TEMPLATES]
    for i in most.tolist():
        lengths = plan.lengths[plan.offsets[i] : plan.offsets[i + 1]]
        text = " + ".join(f"{length:,}" for length in lengths[:_MOST_LENGTHS].tolist())
        if (more := len(lengths) - _MOST_LENGTHS) > 0:
            text += f" + {more:,} more"
        rows = int(plan.multiplicity[i])
        yield text, f"{int(plan.fills[i]):,}", f"{rows:,}", percent(rows / plan.num_bins)


def _parameters_of(manifest: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Return the parameters of `prepare`; of the seed library, what its manifest says."""
    for name, value in manifest.get("parameters", manifest).items():
        if isinstance(value, dict):  # the policy, whose options belong to split
            value = value["action"] if value.get("action") != "split" else _options(value)
        if value is not None and not isinstance(value, dict | list):
            yield name, f"{value:,}" if type(value) is int else value
    if "rows" in manifest:
        yield "rows of the input", f"{manifest['rows']:,}"
    if "digest" in manifest:
        yield "digest", manifest["digest"]


def _options(policy: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name} {policy[name]}" for name in ("overlap", "min_tail", "positions"))
    return f"split ({options})"


def _inputs_of(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Return a table of the files of the input, with how many of their rows were read."""
    rows: Counter[str] = Counter()
    for shard in manifest.get("shards", ()):
        for name, _, number in shard["input"]:
            rows[name] += number
    if rows:
        listed = [(name, f"{number:,}") for name, number in list(rows.items())[:_MOST_FILES]]
        yield _table(("file of the input", "rows"), listed)
    if (more := len(rows) - _MOST_FILES) > 0:
        yield f"<p>And {numbered(more, 'more file')}.</p>"
