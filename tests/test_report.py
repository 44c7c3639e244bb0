"""One picture and one page of a prepared directory: whole, self-contained, and true."""

import base64
import io
import re
import sys
import warnings
import xml.etree.ElementTree
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.image import imread
from prepared_directories import prepare_in_shards, write_lengths
from test_errors import message

import seqpack_jax as sp
from seqpack_jax import __version__, report
from seqpack_jax.planning.plan import Certificate
from seqpack_jax.report import certificate_of, write_picture, write_report

LENGTHS = [7, 5, 5, 5, 5, 5, 3, 3, 3, 27, 12]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, its text, its rows of tables, and what is wrong with its tags."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.wrong, self.rows = [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        self.wrong += [f"{tag} is open" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if len(dict(attributes)) < len(attributes):
            self.wrong.append(f"{tag} has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.wrong.append(f"{tag} ends itself")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{tag} ends, but is not open")

    def handle_data(self, text):
        if "style" in self.open:
            return
        self.text += text
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, name):
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The path of a small prepared data set, with sequences that were split."""
    folder = tmp_path_factory.mktemp("data")
    source = write_lengths(folder / "in", LENGTHS)
    split = sp.OverLength("split", overlap=2)
    prepare_in_shards(source, folder / "small", 10, over_length=split)
    return folder / "small"


@pytest.fixture(scope="module")
def text(prepared, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report(prepared, output)
    return output.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _pyplot_knows_no_figure():
    yield
    assert plt.get_fignums() == []


def wrong_tags(text):
    return Page(text).wrong


# --- the page ---------------------------------------------------------------------------------


def test_the_page_is_whole(text):
    page = Page(text)
    assert page.wrong == []
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert text.endswith("</html>\n")
    assert '<meta charset="utf-8">' in text[:200]
    for tag in ("html", "head", "title", "body", "h1"):
        assert len(page.all(tag)) == 1, tag
    identifiers = [each["id"] for _, each in page.elements if "id" in each]
    assert len(identifiers) == len(set(identifiers))
    assert {len(row) for row in page.rows} == {2, 3, 4}


def test_that_check_can_fail():
    assert wrong_tags("<p><b>text</p></b>")
    assert wrong_tags("<p>")
    assert wrong_tags("</p>")
    assert wrong_tags("<br/>")
    assert wrong_tags('<p id="a" id="b"></p>')
    assert wrong_tags('<p>text<br></p><img src="data:,">') == []


def test_nothing_is_loaded_and_nothing_runs(text):
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), (tag, name)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r'src="[^"]*"', "", text)


def test_the_pictures_are_in_the_page(text):
    images = Page(text).all("img")
    assert len(images) == 3
    for image in images:
        assert image["alt"]
        kind, _, content = image["src"].partition(";base64,")
        content = base64.b64decode(content, validate=True)
        if kind == "data:image/png":
            assert imread(io.BytesIO(content)).ndim == 3
        else:
            assert kind == "data:image/svg+xml"
            root = xml.etree.ElementTree.fromstring(content)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert images[1]["alt"].startswith("9 rows of 10 tokens")


def test_the_figures_are_those_of_the_plan(text, prepared):
    loaded = sp.load_prepared(prepared)
    plan = loaded.plan
    stats = sp.PackingStats.from_plan(plan, report=loaded.pools.report)
    page = Page(text)
    assert page.row("rows")[0] == f"{stats.num_bins:,}"
    assert page.row("sequences")[0] == f"{stats.num_sequences:,}"
    assert page.row("tokens") == [
        f"{stats.num_tokens}",
        f"of {stats.capacity} that the rows can hold",
    ]
    assert page.row("efficiency")[0] == f"{100 * stats.efficiency:.2f} %"
    assert page.row("padding") == [f"{stats.padding}", f"tokens, {100 * stats.padding_ratio:.2f} %"]
    assert page.row("lower bound")[0] == f"{stats.lower_bound}"
    assert page.row("gap")[0] == f"{stats.gap}"
    assert page.row("attention")[0] == f"{100 * stats.attention_share:.2f} %"
    assert str(certificate_of(plan, stats.lower_bound)) in page.text
    assert f"seqpack_jax {__version__}" in page.text


def test_what_was_packed_and_what_was_too_long(text, prepared):
    manifest = sp.load_prepared(prepared).manifest
    page = Page(text)
    assert page.row("max_seq_len") == ["10"]
    assert page.row("length_column") == ["length"]
    assert page.row("over_length") == ["split (overlap 2, min_tail 1, positions restart)"]
    assert page.row("rows of the input") == ["11"]
    assert page.row("digest") == [manifest["digest"]]
    files = {"0.parquet": "4", "1.parquet": "4", "2.parquet": "3"}
    assert {name: page.row(name) for name in files} == {k: [v] for k, v in files.items()}
    assert page.row("over-length sequences") == ["2", "18.18 % of 11 sequences"]
    assert page.row("their tokens")[0] == "39"
    for name in ("dropped tokens", "repeated tokens", "pieces"):
        field = "pieces" if name == "pieces" else name.replace(" ", "_")
        assert page.row(name)[0] == f"{manifest['report'][field]}"
    assert "The policy is “split”." in page.text


def test_the_most_frequent_rows(text, prepared):
    plan = sp.load_prepared(prepared).plan
    page = Page(text)
    start = page.rows.index(["lengths", "tokens", "rows", "share"]) + 1
    most = plan.to_counter().most_common(10)
    found = page.rows[start : start + len(most)]
    assert [int(rows) for _, _, rows, _ in found] == [count for _, count in most]
    for lengths, tokens, rows, share in found:
        template = tuple(int(length) for length in lengths.split(" + "))
        assert plan.to_counter()[template] == int(rows)
        assert int(tokens) == sum(template)
        assert share == f"{100 * int(rows) / plan.num_bins:.2f} %"


def test_text_is_escaped(tmp_path):
    name = 'a<b>&"c"\'$^$'  # the last would be a formula, and a wrong one
    source = write_lengths(tmp_path / "in", [5, 3], files=1)
    (tmp_path / "in" / "0.parquet").rename(tmp_path / "in" / f"{name}.parquet")
    sp.prepare(source, tmp_path / name, 10, length_column="length")
    write_report(tmp_path / name, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.wrong == []
    assert "<b>" not in text
    assert page.row(f"{name}.parquet") == ["2"]
    assert f"Packing report: {name}" in page.text
    assert "No sequence has more than 10 tokens. The policy is “error”." in page.text
    write_picture(tmp_path / name, tmp_path / "picture.svg")
    root = xml.etree.ElementTree.fromstring((tmp_path / "picture.svg").read_bytes())
    assert root.tag.endswith("svg")


def test_the_page_of_a_large_plan_is_small(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 30, 100_000).clip(1, 8192)
    np.save(tmp_path / "lengths.npy", lengths)
    names = {f"{k:03d}.npy": k + 1 for k in range(30)}
    for name, rows in names.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / "in" / name, lengths[:rows])
    sp.prepare(tmp_path / "lengths.npy", tmp_path / "large", 8192, tolerance=4)
    page = Page(_page_of(tmp_path / "large", tmp_path))
    told = [row[1:] for row in page.rows if row[0] == "tolerance"]
    assert told[0][1].startswith("planned as multiples of it; this costs ")
    assert [row[0] for row in told] == ["4", "4"]
    kinds = {image["src"].partition(";")[0] for image in page.all("img")}
    assert kinds == {"data:image/svg+xml", "data:image/png"}  # no SVG of thousands of boxes
    assert len((tmp_path / "page.html").read_bytes()) < 250_000
    true = f"100,000 sequences, {lengths.mean():,.1f} tokens on average; rows of 8,192"
    assert page.all("img")[0]["alt"] == true  # not the lengths as planned
    sp.prepare(tmp_path / "in", tmp_path / "many", 8192)
    page = Page(_page_of(tmp_path / "many", tmp_path))
    listed = [row for row in page.rows if row[0] in names]
    assert listed == [[name, f"{rows}"] for name, rows in list(names.items())[:10]]
    assert "And 20 more files." in page.text


def test_titles_of_pictures_are_escaped(tmp_path):
    np.save(tmp_path / "in.npy", [1])
    sp.prepare(tmp_path / "in.npy", tmp_path / "out", 100_000)
    page = _page_of(tmp_path / "out", tmp_path)
    assert 'alt="1 row of 100,000 tokens, &lt;0.01 % full' in page
    assert Page(page).all("img")[2]["alt"] == "1 row of 100,000 tokens, <0.01 % full"


# Bytes that are no UTF-8, control characters, characters that the fonts lack.
NAMES = {"d\udcff": r"d\udcff", "a\n\x01b": r"a\n\x01b", "数据": "数据", "\u202egnp": r"\u202egnp"}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_bytes(name, tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / f"{name}.npy", [5, 3])
    sp.prepare(tmp_path / "in", tmp_path / name, 10)
    page = Page(_page_of(tmp_path / name, tmp_path))
    assert f"Packing report: {NAMES[name]}" in page.text
    assert page.row(f"{NAMES[name]}.npy") == ["2"]
    for ending in ("png", "pdf", "svg"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_picture(tmp_path / name, tmp_path / f"x.{ending}")
    root = xml.etree.ElementTree.fromstring((tmp_path / "x.svg").read_bytes())
    assert root.tag.endswith("svg")


def test_rows_of_a_file_in_several_shards_are_added(tmp_path):
    np.save(tmp_path / "in.npy", [5] * 12)
    prepared = prepare_in_shards(tmp_path / "in.npy", tmp_path / "out", 10, length_column=None)
    assert len(prepared.manifest["shards"]) == 3
    assert Page(_page_of(tmp_path / "out", tmp_path)).row("in.npy") == ["12"]


def _page_of(directory, folder):
    write_report(directory, folder / "page.html", overwrite=True)
    return (folder / "page.html").read_text()


def test_a_data_set_of_which_nothing_is_left(tmp_path):
    np.save(tmp_path / "lengths.npy", [20, 30])
    sp.prepare(tmp_path / "lengths.npy", tmp_path / "empty", 10, over_length="drop")
    page = Page(_page_of(tmp_path / "empty", tmp_path))
    assert page.wrong == []
    assert page.row("over-length sequences") == ["2", "100.00 % of 2 sequences"]
    assert page.row("over_length") == ["drop"]
    write_picture(tmp_path / "empty", tmp_path / "empty.png")


def test_a_directory_of_the_seed_library(tmp_path):
    folder = tmp_path / "seed"
    (folder / "pools").mkdir(parents=True)
    (folder / "manifest.json").write_text(
        '{"packer": "bfd", "max_seq_len": 10, "n_sequences": 3, "n_bins": 2, "total_tokens": 15}'
    )
    (folder / "counts.json").write_text('{"5": 3}')
    (folder / "templates.json").write_text("[[[5, 5], 1], [[5], 1]]")
    np.save(folder / "pools" / "5.npy", np.arange(3))
    page = Page(_page_of(folder, tmp_path))
    assert page.wrong == []
    assert page.row("packer") == ["bfd"]
    assert page.row("rows") == ["2", "of one epoch"]
    assert "2 rows; lower bound 2 (volume): optimal" in page.text


def luminance(colour):
    """As WCAG 2 defines it."""
    values = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_it_can_be_read_in_the_light_in_the_dark_and_on_paper(text):
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    palettes = re.findall(r"--ink: (#\w{6}); --ground: (#\w{6})", style)
    assert len(palettes) == 3
    for ink, ground in palettes:
        high, low = sorted([luminance(ink), luminance(ground)], reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 7
    assert luminance(palettes[1][1]) < 0.02  # the dark one
    assert luminance(palettes[2][1]) == 1  # paper
    assert "@media (prefers-color-scheme: dark)" in style
    assert "@media print" in style
    assert "background: #ffffff" in re.search(r"\nimg \{.*?\}", style)[0]


# --- both files -------------------------------------------------------------------------------

WRITERS = {write_picture: "x.png", write_report: "x.html"}


@pytest.mark.parametrize("name", ["x.PNG", "x.svg", "x.pdf", "x.html", "x.Htm"])
def test_the_same_bytes_every_time(prepared, tmp_path, name):
    write = write_report if "htm" in name.lower() else write_picture
    output = tmp_path / name
    assert write(prepared, output).plan.num_bins == 9
    first = output.read_bytes()
    write(str(prepared), str(output), overwrite=True)
    assert output.read_bytes() == first
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "htm": b"<!DOC"}
    assert first.startswith(starts[name.lower()[2:5]])
    assert [path.name for path in tmp_path.iterdir()] == [name]


SETTINGS = {
    "font.size": 20,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=["red"]),
    "hatch.linewidth": 5,
    "text.usetex": True,  # for which there may be no LaTeX
}


@pytest.mark.parametrize("write", [write_picture, write_report])
def test_settings_of_the_user_change_nothing(write, prepared, tmp_path):
    output = tmp_path / {write_picture: "x.svg", write_report: "x.html"}[write]
    write(prepared, output)
    wanted = output.read_bytes()
    with matplotlib.rc_context(SETTINGS):
        before = dict(matplotlib.rcParams)
        write(prepared, output, overwrite=True)
        assert dict(matplotlib.rcParams) == before
    assert output.read_bytes() == wanted


def test_the_picture_has_the_true_lengths(tmp_path, monkeypatch):
    drawn = []
    bytes_of = report._bytes_of
    monkeypatch.setattr(report, "_bytes_of", lambda *args: drawn.append(args) or bytes_of(*args))
    np.save(tmp_path / "in.npy", [5, 3, 9])
    sp.prepare(tmp_path / "in.npy", tmp_path / "out", 16, tolerance=4)
    write_picture(tmp_path / "out", tmp_path / "x.png")
    assert drawn[0][0].axes[0].get_title() == "3 sequences, 5.7 tokens on average; rows of 16"


def test_the_panels_are_those_of_plots(prepared, tmp_path, monkeypatch):
    drawn = []
    bytes_of = report._bytes_of
    monkeypatch.setattr(report, "_bytes_of", lambda *args: drawn.append(args) or bytes_of(*args))
    write_picture(prepared, tmp_path / "x.png", rows=3)
    ((figure, kind),) = drawn
    assert kind == "png"
    lengths, fill, plan = figure.axes
    assert lengths.get_title().startswith("15 sequences, ")
    assert fill.get_ylabel() == "rows"
    assert plan.get_ylabel() == "row (3 shown)"
    assert figure.get_suptitle() == "small"


@pytest.mark.parametrize("write", WRITERS)
def test_wrong_outputs(write, prepared, tmp_path):
    name = WRITERS[write]
    taken = tmp_path / name
    taken.write_text("mine")
    (tmp_path / f"folder{taken.suffix}").mkdir()
    link = tmp_path / "link"
    link.symlink_to(prepared)
    inside = "nothing may be added to what is prepared"
    cases = {
        tmp_path / "x.gif": ["x.gif does not end in .", "give it such an ending"],
        tmp_path / "x": ["x does not end in ."],
        tmp_path / "none" / name: [f"the directory {tmp_path}/none of the output does not exist"],
        taken / name: ["does not exist"],
        tmp_path / f"folder{taken.suffix}": ["is a directory"],
        taken: [f"{taken} exists", "choose another output, or pass overwrite=True"],
        prepared / name: ["lies in the prepared directory", inside],
        prepared / "pools" / name: [inside],
        link / name: [inside],
        f"s3://bucket/{name}": ["is no local path"],
        7: ["output = 7 is not a path"],
    }
    for output, parts in cases.items():
        found = message(write, prepared, output)
        assert found.startswith(f"{write.__name__}: ")
        for part in parts:
            assert part in found
    assert taken.read_text() == "mine"
    assert not (prepared / name).exists()
    sp.verify_prepared(prepared)


@pytest.mark.parametrize("write", WRITERS)
def test_what_cannot_be_drawn_or_written(write, prepared, tmp_path, monkeypatch):
    output = tmp_path / WRITERS[write]
    assert message(write, tmp_path / "none", output).startswith("load_prepared: ")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(report, "write_bytes", full)
        found = message(write, prepared, output)
        assert f"{output} cannot be written (No space left on device)" in found
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'seqpack_jax[plots]'" in message(write, prepared, output)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_checked(prepared, tmp_path):
    for rows in (0, 501, 2.5):
        assert "write_picture: rows = " in message(
            write_picture, prepared, tmp_path / "x.png", rows=rows
        )
    assert list(tmp_path.iterdir()) == []


def test_the_certificate_is_the_better_of_two():
    plan = sp.pack_length_histogram({6: 3, 1: 2}, 10)
    assert certificate_of(plan, 2) is plan.certificate
    assert certificate_of(sp.PackingPlan.from_counter({(6,): 3}, 10), 3) == Certificate(
        3, 3, "Martello-Toth L2", True
    )


def test_a_tolerance_hides_the_lengths_from_the_certificate():
    plan = sp.pack_length_histogram({6: 3}, 12, tolerance=4)  # planned as three of 8
    bound = plan.certificate.lower_bound + 1
    assert plan.num_bins == 3
    assert certificate_of(plan, bound) == Certificate(3, bound, "volume", bound == 3)
