"""Parquet, `.npy` and FASTA files: what is read from them, and what is refused, by name and row."""

import gzip
import os
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from fsspec.registry import known_implementations
from input_files import (
    LENGTH,
    TOKENS,
    blocks_of,
    empty_memory,
    lengths_in,
    list_in,
    refused,
    text_of,
    write,
)
from pyarrow import parquet as pq

from seqpack_jax.feeding import formats
from seqpack_jax.feeding.inputs import Columns, read_shard, read_token_blocks, read_tokens


@pytest.fixture
def memory():
    yield empty_memory()
    empty_memory()


# Columns.


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (Columns(), ["a length column or a tokens column, but neither is given"]),
        (Columns("length", "tokens"), ["but both are given"]),
        (Columns("len"), ["a/x.parquet has no column 'len'; its columns are length, tokens"]),
        (Columns("length", id="key"), ["has no column 'key'"]),
        (Columns("tokens"), ["'tokens' of a/x.parquet has the type list<", "as the tokens column"]),
        (Columns("floats"), ["'floats' of a/x.parquet has the type double, not an integer type"]),
        (Columns("texts"), ["'texts' of a/x.parquet has the type string, not an integer type"]),
        (Columns("flags"), ["has the type bool"]),
        (Columns(tokens="length"), ["type int32, not a list of tokens", "as the length column"]),
        (Columns("length", id="texts"), ["'texts' of a/x.parquet has the type string"]),
        (Columns("length", id="tokens"), ["'tokens'", "as integers"]),
        (Columns("twice"), ["has 2 columns 'twice'"]),
    ],
)
def test_columns_are_checked(tmp_path, columns, words):
    two = pa.array([1, 2])
    table = pa.table(
        [two.cast(pa.int32()), [[1], [2]], [1.0, 2.0], ["a", "b"], [True, False], two, two],
        ["length", "tokens", "floats", "texts", "flags", "twice", "twice"],
    )
    (tmp_path / "a").mkdir()
    pq.write_table(table, tmp_path / "a/x.parquet")
    with refused(*words):
        list_in(tmp_path, columns)


def test_the_first_bad_file_is_named(tmp_path):
    for k in range(60):
        write(tmp_path / f"{k:02}.parquet", kind=pa.float32() if k in (17, 40) else pa.int64())
    with refused("column 'length' of 17.parquet has the type float"):
        list_in(tmp_path)


def test_wide_files_list_their_first_columns(tmp_path):
    wide = {f"c{k}": [1] for k in range(30)}
    with refused("its columns are length, c0,", "c18, ..."):
        list_in(write(tmp_path / "a.parquet", [1], **wide), Columns("no"))


@pytest.mark.parametrize("columns", [LENGTH, TOKENS, Columns(id="length")])
@pytest.mark.parametrize("name", ["a.npy", "a.fasta"])
def test_only_parquet_has_columns(tmp_path, name, columns):
    np.save(tmp_path / "a.npy", [1])
    (tmp_path / "a.fasta").write_text(">a\nM\n")
    kind = name.partition(".")[2]
    with refused(f"{kind} files have no columns, but"):
        list_in(tmp_path / name, columns, work_dir=tmp_path)


# Values.


@pytest.mark.parametrize("columns", [LENGTH, TOKENS, Columns("other", id="length")])
@pytest.mark.parametrize("max_rows", [4, 100])
def test_nulls_are_refused_with_their_row(tmp_path, columns, max_rows):
    def rows(null):
        lengths = [None if k == null else k for k in range(6)]
        lists = [None if k == null else [k] for k in range(6)]
        return {"rows": lengths, "tokens": lists, "other": range(6)}

    write(tmp_path / "a.parquet", **rows(None))
    write(tmp_path / "b.parquet", **rows(5), row_group_size=6)
    column = columns.id or columns.length or columns.tokens
    with refused(f"column {column!r} is null in row 11 (row 5 of b.parquet)"):
        for shard in list_in(tmp_path, columns, max_rows=max_rows):
            list(read_shard(shard, columns, caller="test"))


def test_null_tokens_are_refused_with_their_row(tmp_path):
    write(tmp_path / "a.parquet", [1] * 9, tokens=[[1]] * 9)
    write(tmp_path / "b.parquet", [1] * 4, tokens=[[1, 2], [], [3, None], [4]])
    shards = list_in(tmp_path, TOKENS)
    for read in (
        lambda: read_shard(shards[0], TOKENS, caller="test"),
        lambda: read_token_blocks("test", shards, TOKENS),
    ):
        with refused("column 'tokens' has a null token in row 11 (row 2 of b.parquet)"):
            list(read())


@pytest.mark.parametrize("columns", [LENGTH, Columns("other", id="length")])
def test_integers_beyond_int64_are_refused(tmp_path, columns):
    path = write(tmp_path / "a.parquet", [1, 2**63], kind=pa.uint64(), other=[1, 2])
    with refused(f"column 'length' is {2**63}, beyond int64, in row 1 (row 1 of a.parquet)"):
        list(read_shard(list_in(path, columns)[0], columns, caller="test"))
    path = write(tmp_path / "b.parquet", [2**63 - 1, 0], kind=pa.uint64(), other=[1, 2])
    ((lengths, ids),) = blocks_of(path, columns)
    assert (lengths if ids is None else ids).tolist() == [2**63 - 1, 0]


def test_zero_and_negative_lengths_are_for_the_caller_to_judge(tmp_path):
    assert lengths_in(write(tmp_path / "a.parquet", [0, -3])) == [0, -3]


def test_tokens_are_integers(tmp_path):
    path = write(tmp_path / "a.parquet", [1], tokens=[["some", "words"]])
    assert lengths_in(path, TOKENS) == [2]
    with refused("column 'tokens' of a.parquet has lists of string", "tokenise"):
        list(read_tokens("test", list_in(path, TOKENS)[0], TOKENS))


def test_lengths_give_no_tokens(tmp_path):
    np.save(tmp_path / "a.npy", [1])
    for path, columns in [(write(tmp_path / "a.parquet"), LENGTH), (tmp_path / "a.npy", Columns())]:
        with refused("is read for lengths, it gives no tokens"):
            list(read_token_blocks("test", list_in(path, columns), columns))


# Damaged files.


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"PAR1",
        lambda whole: b"x" * 500,
        lambda whole: whole[:-100],
        lambda whole: whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda whole: whole[:-4] + b"PARE",
    ],
)
def test_damaged_footers_name_the_file(tmp_path, damage):
    path = Path(write(tmp_path / "a.parquet", range(1000)))
    path.write_bytes(damage(path.read_bytes()))
    with refused("a.parquet cannot be read: ", "damaged or cut short"):
        list_in(tmp_path)


def test_damaged_pages_name_the_file(tmp_path):
    path = Path(write(tmp_path / "a.parquet", np.random.default_rng(0).integers(0, 9, 100_000)))
    shards = list_in(path)
    content = bytearray(path.read_bytes())
    content[100:20_000] = bytes(19_900)
    path.write_bytes(content)
    with refused("a.parquet cannot be read: ", "damaged or cut short"):
        list(read_shard(shards[0], LENGTH, caller="test"))


def test_files_that_change_while_they_are_read(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "a.npy"]

    def fill(rows):
        write(paths[0], range(rows))
        np.save(paths[1], np.arange(rows))

    fill(50)
    shards = [list_in(paths[0])[0], list_in(paths[1], Columns())[0]]
    fill(20)
    for shard, columns in zip(shards, [LENGTH, Columns()], strict=True):
        with refused("has 20 rows, but it had 50 or more", "was changed while it was read"):
            list(read_shard(shard, columns, caller="test"))
    paths[0].unlink()
    with refused("a.parquet cannot be read: FileNotFoundError"):
        list(read_shard(shards[0], LENGTH, caller="test"))


def test_running_out_of_memory_is_no_damage(tmp_path):
    path = write(tmp_path / "a.parquet")
    with (
        mock.patch.object(pq.ParquetFile, "iter_batches", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        lengths_in(path)


# .npy.


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "u1", "i2", "<u4", ">i8", "<u8", "i8"])
@pytest.mark.parametrize("max_rows", [3, 7, 100])
def test_npy_files_are_read_by_rows(tmp_path, memory, dtype, max_rows):
    values = np.random.default_rng(0).integers(0, 100, 30).astype(dtype)
    for k, part in enumerate(np.split(values, [1, 11, 11, 14])):
        np.save(tmp_path / f"{k}.npy", part)
        with memory.open(f"/in/{k}.npy", "wb") as file:
            np.save(file, part)
    with mock.patch.object(formats, "BLOCK_ROWS", 4):
        for source in (tmp_path, "memory://in"):
            blocks = blocks_of(source, Columns(), max_rows=max_rows)
            assert [n for lengths, _ in blocks for n in lengths.tolist()] == values.tolist()
            assert all(len(lengths) <= min(4, max_rows) and ids is None for lengths, ids in blocks)
            assert all(lengths.dtype in (np.int32, np.int64) for lengths, _ in blocks)
            assert all(lengths.dtype.isnative for lengths, _ in blocks)


def test_headers_are_parsed_one_at_a_time(tmp_path):
    """Python 3.11 raises a SystemError now and then when several threads parse literals."""
    for k in range(8):
        np.save(tmp_path / f"{k}.npy", [k])
    parse, parsing, most = np.lib.format.read_array_header_1_0, [], []

    def note(file):
        parsing.append(file)
        threading.Event().wait(0.01)
        most.append(len(parsing))
        parsing.remove(file)
        return parse(file)

    with mock.patch.object(np.lib.format, "read_array_header_1_0", note):
        assert len(list_in(tmp_path, Columns())[0].parts) == 8
    assert most == [1] * 8


class Trap:
    """Unpickling it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.ones(3), ["shape (3,) and dtype float64, not [n] integers"]),
        (np.ones(3, bool), ["dtype bool"]),
        (np.ones((3, 2), int), ["shape (3, 2)"]),
        (np.int64(3), ["shape ()"]),
        (np.array([Trap()]), ["dtype object"]),
        (np.zeros(2, [("a", "i4")]), ["dtype [('a', '<i4')]"]),
        (np.zeros(1, [("ä" * 3, "i4")]), ["version (3, 0) of .npy"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_npy_files_of_other_arrays_are_refused(tmp_path, monkeypatch, value, words):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", value, allow_pickle=True)
    if words[0].startswith("version"):
        content = (tmp_path / "a.npy").read_bytes()
        text_of(tmp_path / "a.npy", b"\x93NUMPY\x03\x00" + content[8:])
    with refused("a.npy", *words):
        list_in(tmp_path, Columns())
    assert not os.path.exists("trap")


def test_damaged_npy_files_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10))
    whole = path.read_bytes()
    for content, word in [
        (b"", "cannot be read"),
        (b"\x80\x04K\x01.", "cannot be read"),
        (whole[:40], "cannot be read"),
        (whole[:-3], "77 bytes of data, but its header says 10 values of 8 bytes"),
        (whole + b"123", "83 bytes of data"),
    ]:
        path.write_bytes(content)
        with refused("a.npy", word, "damaged or cut short"):
            list_in(path, Columns())
    path.write_bytes(whole[:6] + b"\x09" + whole[7:])
    with refused("a.npy has version (9, 0) of .npy", "numpy.save"):
        list_in(path, Columns())


def test_npy_lengths_beyond_int64_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2]))
    np.save(tmp_path / "b.npy", np.array([1, 2**64 - 1], np.uint64))
    with refused("the length is 18446744073709551615", "row 3 (row 1 of b.npy)"):
        for shard in list_in(tmp_path, Columns()):
            list(read_shard(shard, Columns(), caller="test"))


# FASTA.

FASTA = b">sp|P1 a protein\nMKV\nLA\n\n>two\r\nmk*X-\r\n#comment\n>three\nM\n"


@pytest.fixture(params=["a.fasta", "a.FA", "a.faa.gz", "a.fas.GZ", "memory://in/a.fna.gz"])
def fasta(request, tmp_path, memory):
    content = gzip.compress(FASTA) if request.param.lower().endswith("gz") else FASTA
    if request.param.startswith("memory"):
        memory.pipe("/in/a.fna.gz", content)
        return request.param
    return text_of(tmp_path / request.param, content)


def test_fasta_files_are_counted_in_residues(fasta, tmp_path):
    work = tmp_path / "new/work"
    assert lengths_in(fasta, Columns(), work_dir=work) == [5, 5, 1]
    assert lengths_in(fasta, Columns(), work_dir=work, max_rows=2) == [5, 5, 1]
    shards = list_in(fasta, Columns(), work_dir=work, max_rows=2)
    assert [(shard.first_row, shard.rows) for shard in shards] == [(0, 2), (2, 1)]
    by_shard = [block for shard in shards for block in read_tokens("test", shard, Columns())]
    for blocks in (by_shard, [*read_token_blocks("test", shards, Columns())]):
        assert b"".join(bytes(block.tokens) for block in blocks) == b"MKVLAmk*X-M"
        assert np.concatenate([block.sizes for block in blocks]).tolist() == [5, 5, 1]
        assert all(block.tokens.dtype == np.uint8 and block.ids is None for block in blocks)


def test_fasta_tokens_come_in_blocks(tmp_path):
    path = text_of(tmp_path / "a.fa", b"".join(b">x\n%s\n" % (b"M" * k) for k in range(1, 20)))
    shards = list_in(path, Columns(), work_dir=tmp_path)
    with mock.patch.object(formats, "BLOCK_TOKENS", 15):
        blocks = list(read_token_blocks("test", shards, Columns()))
    assert all(block.sizes.sum() <= 15 or len(block.sizes) == 1 for block in blocks)
    assert [n for block in blocks for n in block.sizes.tolist()] == list(range(1, 20))


def test_fasta_lengths_are_written_in_blocks(tmp_path):
    path = text_of(tmp_path / "a.fa", b"".join(b">x\n%s\n" % (b"M" * k) for k in range(1, 20)))
    with mock.patch.object(formats, "BLOCK_ROWS", 4):
        shards = list_in(path, Columns(), work_dir=tmp_path)
    lengths = np.load(shards[0].parts[0].lengths)
    assert lengths.tolist() == list(range(1, 20))
    assert lengths.dtype == np.int32


def test_several_fasta_files(tmp_path):
    for name, content in [("b.fa", b">b\nMM\n"), ("a.fa", b">a\nM\n"), ("e.fa", b"")]:
        text_of(tmp_path / name, content)
    shards = list_in(tmp_path, Columns(), work_dir=tmp_path / "_work")
    assert [part.name for part in shards[0].parts] == ["a.fa", "b.fa"]
    assert lengths_in(tmp_path, Columns(), work_dir=tmp_path / "_work") == [1, 2]
    blocks = read_token_blocks("test", shards, Columns())
    assert [bytes(block.tokens) for block in blocks] == [b"M", b"MM"]


def test_fasta_lengths_are_kept_until_the_file_changes(tmp_path):
    path = text_of(tmp_path / "a.fa", FASTA)
    work = tmp_path / "work"
    before = list_in(path, Columns(), work_dir=work)
    with mock.patch.object(formats, "_fasta_records", side_effect=AssertionError):
        assert list_in(path, Columns(), work_dir=work) == before
    text_of(path, b">x\nMM\n")
    assert lengths_in(path, Columns(), work_dir=work) == [2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.fa", b">one\nM\n>two x\n>three\nM\n", ["record 1 of a.fa, 'two x', has no residues"]),
        ("a.fa", b">one\nM\n>\n", ["record 1 of a.fa, '', has no residues"]),
        ("a.fa", b">one\nM\n>two\nMKVMKV\n", ["record 1 of a.fa, 'two', has 6 residues", "is 5"]),
        ("a.fa", ">one\nMÄ\n".encode(), ["record 0 of a.fa, 'one', has letters outside of ASCII"]),
        ("a.fa", b"MKV\n", ["a.fa cannot be read: FastaFormatError"]),
        ("a.fa", b">\xff\xfe\nM1\n", ["record 0 of a.fa, '??', has '1' among its residues"]),
        ("a.fa", b">one\n 1 mk\n", ["record 0", "has '1'", "which are letters, * and -"]),
        ("a.fa", b">one\nM\x00K\n", ["record 0", "has '\\x00'"]),
        ("a.fa", b">one\n \t\n", ["record 0", "has no residues"]),
        ("a.fa", b">one\nM\xc2\xa0\n", ["has letters outside of ASCII"]),
        ("a.fa.gz", b">one\nM\n", ["a.fa.gz cannot be read: BadGzipFile"]),
        ("a.fa.gz", gzip.compress(FASTA * 99, mtime=0)[:90], ["a.fa.gz cannot be read: EOFError"]),
    ],
)
def test_bad_fasta_files_are_refused(tmp_path, name, content, words):
    path = text_of(tmp_path / name, content)
    work = tmp_path / "work"
    with mock.patch.object(formats, "MAX_LENGTH", 5), refused(*words):
        list_in(path, Columns(), work_dir=work)
    assert list(work.iterdir()) == [], "nothing that is half written stays"


def test_white_space_is_no_residue(tmp_path):
    content = b">one\nMKV LAA\n\tM*\x0b-\n>two\r\nM K\r\n"
    for name, data in (("a.fa", content), ("a.fa.gz", gzip.compress(content))):
        path = text_of(tmp_path / name, data)
        shards = list_in(path, Columns(), work_dir=tmp_path / "work")
        assert lengths_in(path, Columns(), work_dir=tmp_path / "work") == [9, 2]
        (block,) = read_token_blocks("test", shards, Columns())
        assert bytes(block.tokens) == b"MKVLAAM*-MK"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_titles_may_be_in_any_encoding(tmp_path, encoding):
    path = text_of(tmp_path / "a.fa", ">Schrödinger µ\nMKV\n".encode(encoding))
    shards = list_in(path, Columns(), work_dir=tmp_path / "work")
    (block,) = read_token_blocks("test", shards, Columns())
    assert bytes(block.tokens) == b"MKV"


@pytest.mark.parametrize("zipped", [False, True])
def test_counting_fasta_files_shows_progress(tmp_path, capsys, zipped):
    content = FASTA * 2000
    data = gzip.compress(content) if zipped else content
    path = text_of(tmp_path / ("a.fa.gz" if zipped else "a.fa"), data)
    for _ in range(2):  # read, and found again
        list_in(path, Columns(), work_dir=tmp_path / "work", progress=True)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"{len(data)}/{len(data)}" in printed.err
    list_in(path, Columns(), work_dir=tmp_path / "other")
    assert capsys.readouterr() == ("", "")


def test_a_work_dir_that_cannot_be_made(tmp_path):
    path = text_of(tmp_path / "a.fa", FASTA)
    with refused("a.fa cannot be made"):
        list_in(path, Columns(), work_dir=path)


def test_fasta_needs_a_work_dir(tmp_path):
    with refused("FASTA files need work_dir"):
        list_in(text_of(tmp_path / "a.fa", FASTA), Columns())


# Libraries that are missing.


@pytest.mark.parametrize(
    ("library", "name", "columns", "extra"),
    [
        ("pyarrow", "a.parquet", LENGTH, "prepare"),
        ("fsspec.core", "a.parquet", LENGTH, "prepare"),
        ("dnaio", "a.fa", Columns(), "fasta"),
    ],
)
def test_missing_libraries_are_named(tmp_path, monkeypatch, library, name, columns, extra):
    write(tmp_path / "a.parquet")
    text_of(tmp_path / "a.fa", FASTA)
    monkeypatch.setitem(sys.modules, library, None)
    missing = library.partition(".")[0]
    with refused(f"{missing} is not installed", f"pip install 'seqpack_jax[{extra}]'"):
        list_in(tmp_path / name, columns, work_dir=tmp_path)


def test_a_missing_driver_is_to_be_installed(monkeypatch):
    known = {"class": "no_such_driver.Files", "err": "Install no_such_driver for this"}
    monkeypatch.setitem(known_implementations, "nodriver", known)
    with refused("Install no_such_driver for this. Hint: install what it names"):
        formats.filesystem("test", "nodriver://bucket/a.npy")
