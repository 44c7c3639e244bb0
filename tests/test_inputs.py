"""Input files: every row once, in shards that depend on the input alone, in bounded memory."""

import itertools
import os
import pickle
import zipfile
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from input_files import (
    LENGTH,
    TOKENS,
    blocks_of,
    empty_memory,
    lengths_in,
    list_in,
    names_in,
    refused,
    text_of,
    write,
)
from pyarrow import parquet as pq

from seqpack_jax.feeding import parquet
from seqpack_jax.feeding.inputs import Columns, read_shard, read_token_blocks, read_tokens


@pytest.fixture
def memory():
    yield empty_memory()
    empty_memory()


# Every row once, in order.


@st.composite
def parquet_inputs(draw):
    """`(tables, row group sizes, columns)`: some files, each with lengths or tokens, and ids."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    integer = draw(st.sampled_from([pa.int8(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64()]))
    kind = draw(st.sampled_from(["integers", "list", "large_list", "fixed_size_list"]))
    has_ids = draw(st.booleans())
    tables = []
    for rows in draw(st.lists(st.integers(0, 40), min_size=1, max_size=5)):
        lengths = rng.integers(1, 9, rows)
        if kind == "integers":
            values = pa.array(lengths, integer)
        elif kind == "fixed_size_list":
            values = pa.array([rng.integers(0, 99, 3) for _ in lengths], pa.list_(integer, 3))
        else:
            lists = pa.list_ if kind == "list" else pa.large_list
            values = pa.array([rng.integers(0, 99, n) for n in lengths], lists(integer))
        ids = pa.array(rng.integers(0, 100, rows), integer)
        tables.append(pa.table({"other": np.zeros(rows), "value": values, "id": ids}))
    sizes = [draw(st.integers(1, 17)) for _ in tables]
    role = "length" if kind == "integers" else "tokens"
    return tables, sizes, Columns(**{role: "value"}, id="id" if has_ids else None)


@given(
    content=parquet_inputs(),
    max_rows=st.sampled_from([*range(1, 20), 10**6]),
    block_rows=st.sampled_from([1, 2, 3, 7, 1000]),
)
def test_blocks_of_parquet_files_are_their_rows(content, max_rows, block_rows):
    tables, sizes, columns = content
    fs = empty_memory()
    for k, (table, size) in enumerate(zip(tables, sizes, strict=True)):
        with fs.open(f"/in/{k}.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=size)
    expected = pa.concat_tables(tables)
    values, ids = expected["value"].to_pylist(), expected["id"].to_pylist()
    with mock.patch.object(parquet, "BLOCK_ROWS", block_rows):
        shards = list_in("memory://in", columns, max_rows=max_rows)
        blocks = [[*read_shard(shard, columns)] for shard in shards]
        if columns.tokens is not None:
            by_shard = [block for shard in shards for block in read_tokens("test", shard, columns)]
            in_one_go = [*read_token_blocks("test", shards, columns)]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert all(0 < shard.rows <= max_rows for shard in shards)
    starts = np.cumsum([0, *(shard.rows for shard in shards)])
    assert [shard.first_row for shard in shards] == starts[:-1].tolist()
    assert starts[-1] == len(values)
    for shard, read in zip(shards, blocks, strict=True):
        assert sum(len(lengths) for lengths, _ in read) == shard.rows
        assert all(0 < len(lengths) <= block_rows for lengths, _ in read)
    flat = [block for read in blocks for block in read]
    assert all(lengths.dtype in (np.int32, np.int64) for lengths, _ in flat)
    lengths = values if columns.tokens is None else [len(tokens) for tokens in values]
    assert [n for given, _ in flat for n in given.tolist()] == lengths
    if columns.id is None:
        assert all(given is None for _, given in flat)
    else:
        assert all(given.dtype == np.int64 for _, given in flat)
        assert [i for _, given in flat for i in given.tolist()] == ids
    if columns.tokens is not None:
        for read in (by_shard, in_one_go):
            assert [t for block in read for t in block.tokens.tolist()] == [
                *itertools.chain(*values)
            ]
            assert [n for block in read for n in block.sizes.tolist()] == lengths
            assert all(block.tokens.dtype.kind in "iu" for block in read)
            if columns.id is not None:
                assert [i for block in read for i in block.ids.tolist()] == ids


@given(
    files=st.lists(st.lists(st.integers(0, 12), max_size=5), min_size=1, max_size=6),
    max_rows=st.integers(1, 15),
)
def test_shards_are_filled_with_whole_row_groups(files, max_rows):
    fs = empty_memory()
    schema = pa.schema([("length", pa.int32())])
    for k, groups in enumerate(files):
        with fs.open(f"/in/{k}.parquet", "wb") as file, pq.ParquetWriter(file, schema) as writer:
            for rows in groups:
                writer.write_table(pa.table({"length": range(rows)}, schema), max(rows, 1))
    shards = list_in("memory://in", max_rows=max_rows)
    # The rows at which a cut is allowed: the ends of row groups, and every max_rows in large ones.
    allowed, row = {0}, 0
    for rows in (rows for groups in files for rows in groups):
        allowed |= {row + low for low in range(0, rows, max_rows)} | {row + rows}
        row += rows
    ends = [shard.first_row + shard.rows for shard in shards]
    assert set(ends) <= allowed
    assert (ends[-1] if ends else 0) == row
    for shard, end in zip(shards, ends, strict=True):
        longer = [cut for cut in allowed if end < cut <= shard.first_row + max_rows]
        assert not longer, "the next rows would fit as well"


def test_small_files_share_a_shard_and_a_giant_row_group_is_cut(tmp_path):
    for k in range(6):
        write(tmp_path / f"small/{k}.parquet", [k])
    write(tmp_path / "giant.parquet", range(25))
    giant, small, *rest = list_in(tmp_path, max_rows=10)[1:]
    assert [(part.name, part.first_row, part.rows) for part in giant.parts] == [
        ("giant.parquet", 10, 10)
    ]
    assert [(part.name, part.first_row, part.rows) for part in small.parts] == [
        ("giant.parquet", 20, 5),
        *((f"small/{k}.parquet", 0, 1) for k in range(5)),
    ]
    assert [part.name for shard in rest for part in shard.parts] == ["small/5.parquet"]
    assert lengths_in(tmp_path, max_rows=10) == [*range(25), *range(6)]


def test_a_part_reads_no_row_group_beside_it(tmp_path):
    path = write(tmp_path / "a.parquet", range(40), row_group_size=10)
    shard = list_in(path, max_rows=10)[2]
    with mock.patch.object(pq.ParquetFile, "iter_batches", autospec=True) as read:
        read.side_effect = lambda self, *args, **options: iter(())
        assert list(read_shard(shard, LENGTH)) == []
    assert list(read.call_args.kwargs["row_groups"]) == [2]
    assert read.call_args.kwargs["columns"] == ["length"]


def test_long_lists_make_short_blocks(tmp_path):
    rows = [[1]] * 20 + [[2] * 100] * 20
    path = write(tmp_path / "a.parquet", range(40), 20, tokens=rows, tokens2=[[]] * 40)
    with (
        mock.patch.object(parquet, "BLOCK_TOKENS", 300),
        mock.patch.object(pq.ParquetFile, "iter_batches", autospec=True) as read,
    ):
        read.side_effect = lambda self, *args, **options: iter(())
        for columns, size in ((TOKENS, 3), (Columns(tokens="tokens2"), 128)):
            assert blocks_of(path, columns) == []
            assert read.call_args.args[1] == size
    assert max(len(lengths) for lengths, _ in blocks_of(path, Columns(tokens="tokens2"))) == 40


@pytest.mark.parametrize("has_ids", [False, True])
def test_a_few_giant_lists_among_many_short_ones(tmp_path, has_ids):
    """What a block holds does not follow from the average."""
    sizes = [1] * 500 + [40] * 20 + [0, 250, 1, 99, 1, 1]
    tokens = pa.array([[k % 100] * n for k, n in enumerate(sizes)], pa.list_(pa.int32()))
    path = write(tmp_path / "a.parquet", range(len(sizes)), tokens=tokens)
    columns = Columns(tokens="tokens", id="length" if has_ids else None)
    shard = list_in(path, columns)[0]
    with (
        mock.patch.object(parquet, "BLOCK_TOKENS", 100),
        mock.patch.object(parquet, "_LIST_ROWS", 8),
    ):
        blocks = list(read_tokens("test", shard, columns))
        ((lengths, ids),) = read_shard(shard, columns)
    assert all(len(block.tokens) <= 100 or len(block.sizes) == 1 for block in blocks)
    assert np.concatenate([block.tokens for block in blocks]).tolist() == (
        tokens.flatten().to_pylist()
    )
    assert np.concatenate([block.sizes for block in blocks]).tolist() == sizes
    assert max(len(block.sizes) for block in blocks) > 90, "short ones come together"
    assert lengths.tolist() == sizes, "lengths alone take little room"
    if has_ids:
        assert np.concatenate([block.ids for block in blocks]).tolist() == ids.tolist()
        assert ids.tolist() == list(range(len(sizes)))


def test_shards_travel_as_pickles(tmp_path, memory):
    with memory.open("/in/a.npy", "wb") as file:
        np.save(file, [4, 5])
    shards = pickle.loads(pickle.dumps(list_in("memory://in", Columns())))
    assert [lengths.tolist() for lengths, _ in read_shard(shards[0], Columns())] == [[4, 5]]


def test_no_rows_at_all(tmp_path):
    write(tmp_path / "a.parquet", [])
    write(tmp_path / "b.parquet", [])
    assert list_in(tmp_path) == []
    assert list(read_token_blocks("test", [], TOKENS)) == []
    write(tmp_path / "c.parquet", [7])
    assert lengths_in(tmp_path) == [7]


def test_integers_are_not_copied(tmp_path):
    path = write(tmp_path / "a.parquet", [3, 4])
    ((lengths, _),) = blocks_of(path)
    assert lengths.dtype == np.int32
    assert not lengths.flags.writeable, "it is a view of pyarrow's memory"


# Which files.


@pytest.fixture
def tree(tmp_path):
    """Files of one row, with the lengths 1, 2, 3; and what must not be read."""
    for name, row in [("b/x.parquet", 3), ("a.PQ", 1), ("a/deep/y.pq", 2)]:
        write(tmp_path / name, [row])
    for name in ["_tmp/z.parquet", "_tmp/_z.pq", "a/.hidden.parquet", "_x.parquet", ".git/w.pq"]:
        write(tmp_path / name, [99])
    (tmp_path / "a/readme.txt").write_text("no input")
    (tmp_path / "_SUCCESS").touch()
    return tmp_path


def test_directories_are_read_recursively_without_hidden_names(tree):
    assert names_in(tree) == ["a.PQ", "a/deep/y.pq", "b/x.parquet"]
    assert lengths_in(tree) == [1, 2, 3]
    assert names_in(str(tree) + "/") == names_in(tree)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["a.PQ", "a/deep/y.pq", "b/x.parquet"]),
        ("*/*", ["a/deep/y.pq", "b/x.parquet"]),
        ("**/*.p*q*", ["a/deep/y.pq", "b/x.parquet"]),
        ("?/x.parquet", ["b/x.parquet"]),
        ("[ab]/", ["a/deep/y.pq", "b/x.parquet"]),
        ("_*", ["_tmp/z.parquet", "_x.parquet"]),
        ("a/../b", ["x.parquet"]),
        ("_tmp", ["z.parquet"]),
        ("_x.parquet", ["_x.parquet"]),
    ],
)
def test_globs_and_names_that_are_spelled_out(tree, pattern, names):
    assert names_in(tree / pattern if not pattern.endswith("/") else f"{tree}/{pattern}") == names


def test_a_glob_below_a_relative_path(tree, monkeypatch):
    monkeypatch.chdir(tree)
    shards = list_in("b/*.parquet")
    monkeypatch.chdir("/")
    assert [n.tolist() for shard in shards for n, _ in read_shard(shard, LENGTH)] == [[3]]


def test_a_list_of_paths_is_sorted_and_read_once(tree):
    both = [tree / "b/x.parquet", str(tree / "a.PQ"), tree / "b", f"{tree}/b/*"]
    assert names_in(both) == names_in(tuple(reversed(both))) == ["a.PQ", "b/x.parquet"]
    assert lengths_in(both) == [1, 3]


def test_the_order_of_the_directory_does_not_matter(tmp_path):
    for folder, order in [("one", range(12)), ("two", reversed(range(12)))]:
        for k in order:
            write(tmp_path / folder / f"{k}.parquet", [k] * 3)
    assert (
        names_in(tmp_path / "one")
        == names_in(tmp_path / "two")
        == sorted(f"{k}.parquet" for k in range(12))
    )
    before = list_in(tmp_path / "one", max_rows=7)
    ls = LocalFileSystem.ls

    def in_other_order(self, *args, **options):
        return ls(self, *args, **options)[::-1]

    with mock.patch.object(LocalFileSystem, "ls", in_other_order):
        assert list_in(tmp_path / "one", max_rows=7) == before


def test_a_name_with_a_bracket_is_a_name(tmp_path):
    path = write(tmp_path / "we[i]rd.parquet", [5])
    assert lengths_in(path) == [5]
    assert lengths_in(tmp_path / "*") == [5]


def test_links_to_directories_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere/x.parquet", [5])
    write(tmp_path / "in/a.parquet", [4])
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/file.parquet").symlink_to(tmp_path / "elsewhere/x.parquet")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    assert names_in(tmp_path / "in") == ["a.parquet", "file.parquet", "link/x.parquet"]
    assert lengths_in(tmp_path / "in") == [4, 5, 5]
    assert names_in(tmp_path / "in/l*") == ["link/x.parquet"]


def without_rights(*names):
    """Let no directory of such a name be listed."""
    ls = LocalFileSystem.ls

    def refuse(self, path, *args, **options):
        if os.path.basename(path) in names:
            raise PermissionError(13, "Permission denied", path)
        return ls(self, path, *args, **options)

    return mock.patch.object(LocalFileSystem, "ls", refuse)


@pytest.mark.parametrize("pattern", ["", "*", "a", "a*/*", "**/*.pq", "a/**"])
@pytest.mark.parametrize("name", ["a", "deep"])
def test_a_directory_that_cannot_be_listed_is_an_error(tree, pattern, name):
    folder = tree / "a" if name == "a" else tree / "a/deep"
    if pattern == "a*/*" and name == "deep":
        assert names_in(tree / pattern) == ["a/deep/y.pq"]
    with without_rights(name), refused(f"{folder} cannot be listed: ", "Permission", "your rights"):
        list_in(tree / pattern)


def test_directories_that_cannot_match_are_not_listed(tree):
    with without_rights("a", "_tmp", ".git"):
        assert names_in(tree / "b*/*") == ["b/x.parquet"]
        assert names_in(tree / "b") == ["x.parquet"]
        assert names_in(tree / "*.PQ") == ["a.PQ"]


def test_a_file_that_is_named_in_several_ways_is_read_once(tree, monkeypatch):
    (tree / "link").symlink_to(tree / "b")
    (tree / "again.parquet").symlink_to(tree / "b/x.parquet")
    monkeypatch.chdir(tree)
    ways = [
        "b/x.parquet",
        "b/../b/x.parquet",
        f"/{tree}/b//x.parquet",
        f"file://{tree}/b/./x.parquet",
        "link/x.parquet",
        "link/../b",
        "again.parquet",
    ]
    for way in ways:
        assert lengths_in([way, *ways]) == lengths_in([*ways, way]) == [3]
        assert names_in([way, tree]) == names_in([tree, way])
    assert lengths_in([tree, tree / "link/."]) == lengths_in(tree)
    assert names_in(f"{tree}/b/.") == names_in(f"{tree}/./b/") == names_in("b") == ["x.parquet"]


def test_the_parent_of_a_link_is_that_of_its_target(tree):
    (tree / "b/link").symlink_to(tree / "a/deep")
    assert names_in(tree / "b/link/..") == names_in(tree / "a") == ["deep/y.pq"]
    assert names_in(tree / "b/link/../d*") == ["deep/y.pq"]


@pytest.mark.parametrize(
    "url",
    ["memory://in", "memory://in/*.parquet", "simplecache::memory://in"],
)
def test_urls_of_fsspec(memory, url):
    for k in (2, 1):
        with memory.open(f"/in/{k}.parquet", "wb") as file:
            pq.write_table(pa.table({"length": [k] * k}), file)
    assert names_in(url) == ["1.parquet", "2.parquet"]
    assert lengths_in(url) == [1, 2, 2]


def test_file_urls_and_archives(tree):
    assert lengths_in(f"file://{tree}/b") == lengths_in(f"local://{tree}/b/*") == [3]
    with zipfile.ZipFile(tree / "c.zip", "w") as archive:
        archive.write(tree / "b/x.parquet", "in/x.parquet")
    url = f"zip://in/*.parquet::file://{tree}/c.zip"
    assert names_in(url) == ["x.parquet"]
    assert lengths_in(url) == [3]


def test_a_new_file_is_seen_at_once(tmp_path):
    for k in (1, 2):
        write(tmp_path / f"{k}.parquet", [k])
        assert lengths_in(tmp_path) == list(range(1, k + 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "none.parquet", ["none.parquet does not exist"]),
        (lambda d: d / "no/*.parquet", ["no input file in", "(0 files of other kinds)"]),
        (lambda d: d / "a", ["no input file in", "(1 files of other kinds)", ".fasta"]),
        (lambda d: d / "a/readme.txt", ["the kind of", "readme.txt is unknown", ".npy"]),
        (lambda d: [], ["no input file in []"]),
        (lambda d: 3, ["3 is not a path"]),
        (lambda d: [d, 3.5], ["3.5 is not a path"]),
        (lambda d: f"{d}/a\0b", ["is no path: it has a zero byte"]),
        (lambda d: "nope://x", ["nope://x cannot be opened", "nope"]),
        (lambda d: [d / "b", "memory://in"], ["are on different file systems"]),
        (lambda d: [d / "b", d / "c.npy"], ["b/x.parquet and c.npy are of different kinds"]),
    ],
)
def test_sources_that_are_no_input(tmp_path, make, words):
    write(tmp_path / "b/x.parquet")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/readme.txt").touch()
    np.save(tmp_path / "c.npy", [1])
    with refused(*words):
        list_in(make(tmp_path))


def test_what_a_file_system_raises_is_reported(tmp_path):
    with mock.patch.object(LocalFileSystem, "isfile", side_effect=RuntimeError("no token")):
        with refused("cannot be listed: no token"):
            list_in(tmp_path)


@pytest.mark.parametrize("max_rows", [0, 1.5])
def test_max_rows_is_checked(tmp_path, max_rows):
    with refused("max_rows"):
        list_in(write(tmp_path / "a.parquet"), max_rows=max_rows)


# Fingerprints.


def fingerprints(source, columns=LENGTH, **options):
    return [shard.fingerprint for shard in list_in(source, columns, **options)]


def test_fingerprints_stay_and_change_with_the_input(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.parquet", [1] * 4, other=[2] * 4)
    before = fingerprints(tmp_path, max_rows=4)
    assert len(set(before)) == 3
    assert fingerprints(tmp_path, max_rows=4) == before
    assert fingerprints(tmp_path, Columns("other"), max_rows=4) != before
    assert fingerprints(tmp_path, Columns("length", id="other"), max_rows=4) != before
    assert not set(fingerprints(tmp_path, max_rows=2)) & set(before)
    write(tmp_path / "1.parquet", [1] * 4, other=[3] * 4)
    after = fingerprints(tmp_path, max_rows=4)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    write(tmp_path / "1.parquet", [1] * 3, other=[3] * 3)
    after = fingerprints(tmp_path, max_rows=4)
    assert after[0] == before[0]
    assert after[2] != before[2], "its rows have other numbers"


def test_fingerprints_of_npy_and_fasta(tmp_path):
    np.save(tmp_path / "a.npy", [1, 2])
    text_of(tmp_path / "a.fa", b">one\nMKV\n")
    for name in ("a.npy", "a.fa"):
        before = fingerprints(tmp_path / name, Columns(), work_dir=tmp_path)
        elsewhere = fingerprints(tmp_path / name, Columns(), work_dir=tmp_path / "other")
        assert before == elsewhere
        os.utime(tmp_path / name, (1, 1))
        assert fingerprints(tmp_path / name, Columns(), work_dir=tmp_path) != before
