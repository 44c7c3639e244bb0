"""Sequences of other tools: flat files, Megatron, Arrow, Hugging Face, ArrayRecord."""

import os
import pickle
import struct
import threading
from itertools import chain, pairwise

import grain
import numpy as np
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from seqpack_jax import SeqpackError
from seqpack_jax.feeding import list_columns, token_files
from seqpack_jax.feeding.pipeline import pack_dataset
from seqpack_jax.feeding.row_files import decode_row
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.feeding.tables import DatasetSequences, TableSequences, open_table
from seqpack_jax.feeding.token_files import open_flat, open_megatron
from seqpack_jax.feeding.upstream import JoinedSequences, RecordSequences

DOCS = [[5, 6, 0], [7, 0], [0], [8, 9, 10, 0]]  # each ends with 0


def split_slowly(tokens, separator, at):
    """Cut a list after (or before) each separator; nothing is empty."""
    docs = [[]]
    for token in tokens:
        if at == "start" and token == separator:
            docs.append([])
        docs[-1].append(token)
        if at == "end" and token == separator:
            docs.append([])
    return [doc for doc in docs if doc]


def lists(sequences):
    return [np.asarray(sequences[k]).tolist() for k in range(len(sequences))]


def check_source(sequences, expected, limit=100_000):
    """Check all that a source of one feature can do, and again after it was pickled."""
    for source in (sequences, pickle.loads(pickle.dumps(sequences))):
        assert lists(source) == expected
        assert source.lengths.tolist() == [len(each) for each in expected]
        assert source.lengths.dtype == np.int64
        assert len(source) == len(expected)
        if hasattr(source, "__getitems__"):
            ids = [k for k in (2, 0, 2, 1) if k < len(expected)]
            assert [np.asarray(a).tolist() for a in source.__getitems__(ids)] == [
                expected[k] for k in ids
            ]
        for wrong in (-1, len(expected)):
            with pytest.raises(IndexError):
                source[wrong]
    assert len(pickle.dumps(sequences)) < limit


def tokens_by_packing(sequences, max_seq_len=16):
    """Return the sequences that come out of one epoch, sorted."""
    source = pack_dataset(
        sequences, max_seq_len, lengths=sequences.lengths, batch_size=2, seed=1, epochs=1
    )
    found = []
    for batch in source:
        for row, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            found += [row[ids == k].tolist() for k in range(1, ids.max() + 1)]
    return sorted(found)


# Flat files.


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=30).filter(lambda t: 0 in t),
    at=st.sampled_from(["start", "end"]),
    block=st.integers(1, 7),
    dtype=st.sampled_from(["uint8", "uint16", "uint32", ">i4", "int64"]),
)
def test_flat_files_are_cut_at_separators(tokens, at, block, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    np.array(tokens, dtype).tofile(folder / "x.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_BLOCK_TOKENS", block)
        found = open_flat(
            folder / "x.bin", dtype=dtype, separator=0, separator_at=at, work_dir=folder / "w"
        )
    assert isinstance(found, FlatSequences)
    assert found.tokens.dtype == dtype
    check_source(found, split_slowly(tokens, 0, at))


def test_offsets_are_found_once_and_again_for_a_changed_file(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    np.concatenate(DOCS).astype(np.uint16).tofile(path)
    options = {"dtype": np.uint16, "separator": 0, "work_dir": tmp_path / "deep" / "work"}
    assert lists(open_flat(path, **options)) == DOCS
    calls = []
    monkeypatch.setattr(token_files, "_cut", lambda *a: calls.append(a) or np.array([0, 10]))
    assert lists(open_flat(path, **options)) == DOCS
    assert calls == []
    os.utime(path, ns=(1, 1))
    assert lists(open_flat(path, **options)) == [list(chain(*DOCS))]
    assert len(calls) == 1
    open_flat(path, **options | {"separator_at": "start"})
    assert len(calls) == 2


def test_pickles_stay_small_at_any_size_and_parts_do_too(tmp_path):
    tokens = np.tile(np.array([1, 2, 0], np.uint16), 100_000)
    for k in range(300):
        tokens[: 300_000 if k == 0 else 3000].tofile(tmp_path / f"train_{k:06}.bin")
    options = {"dtype": np.uint16, "separator": 0, "work_dir": tmp_path / "work"}
    one = open_flat(tmp_path / "train_000000.bin", **options)
    assert len(one) == 100_000
    assert len(pickle.dumps(one)) < 1000
    joined = open_flat(tmp_path / "train_*.bin", **options)
    assert isinstance(joined, JoinedSequences)
    assert len(joined) == 100_000 + 299 * 1000
    assert len(pickle.dumps(joined)) < 20_000
    again = pickle.loads(pickle.dumps(joined))
    assert again[399 * 1000 - 1].tolist() == [1, 2, 0]
    assert again.lengths.sum() == 300_000 + 299 * 3000


def test_given_offsets_by_array_and_by_file(tmp_path):
    np.concatenate(DOCS).astype(np.uint32).tofile(tmp_path / "x.bin")
    offsets = np.cumsum([0] + [len(doc) for doc in DOCS])
    np.save(tmp_path / "offsets.npy", offsets)
    for known in (
        offsets,
        offsets.tolist(),
        tmp_path / "offsets.npy",
        str(tmp_path / "offsets.npy"),
    ):
        check_source(open_flat(tmp_path / "x.bin", dtype=np.uint32, offsets=known), DOCS)
    assert tokens_by_packing(open_flat(tmp_path / "x.bin", dtype="u4", offsets=offsets)) == sorted(
        DOCS
    )


def llmc_file(path, tokens, magic=20240520, version=1, dtype=np.uint16, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, dtype).tobytes())


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)]
)
def test_files_of_llmc_say_what_they_hold(tmp_path, magic, version, dtype):
    tokens = [0, 5, 6, 0, 7, 0, 0, 8]
    llmc_file(tmp_path / "x.bin", tokens, magic, version, dtype)
    found = open_flat(tmp_path / "x.bin", separator=0, work_dir=tmp_path)
    assert found.tokens.dtype == dtype
    check_source(found, [[0, 5, 6], [0, 7], [0], [0, 8]])
    same = open_flat(tmp_path / "x.bin", dtype=dtype, separator=0, work_dir=tmp_path)
    assert lists(same) == lists(found)
    with pytest.raises(SeqpackError, match=r"file of llm\.c with .*, not int64.*leave dtype out"):
        open_flat(tmp_path / "x.bin", dtype=np.int64, separator=0, work_dir=tmp_path)


def test_tokens_that_look_like_a_header_are_tokens(tmp_path):
    tokens = np.array([20240520, 1, 3, 0], np.int32)
    tokens.tofile(tmp_path / "x.bin")
    found = open_flat(tmp_path / "x.bin", dtype=np.int32, separator=0, work_dir=tmp_path)
    assert lists(found) == [tokens.tolist()]


def test_a_file_of_several_may_be_the_inside_of_one_document(tmp_path):
    parts = [[5, 6, 0, 7], [8, 8], [], [0], [9, 9, 0]]
    for k, part in enumerate(parts):
        np.array(part, np.uint16).tofile(tmp_path / f"{k}.bin")
    options = {"dtype": np.uint16, "separator": 0, "work_dir": tmp_path / "work"}
    expected = [[5, 6, 0], [7], [8, 8], [0], [9, 9, 0]]
    for _ in range(2):  # found, and found again
        check_source(open_flat(tmp_path / "*.bin", **options), expected)
    with pytest.raises(SeqpackError, match=r"token 3 occurs nowhere in .*0\.bin and 4 more"):
        open_flat(tmp_path / "*.bin", **options | {"separator": 3})
    for k in (3, 4):  # the only separator is at the edge of the only document
        assert lists(open_flat(tmp_path / f"{k}.bin", **options)) == [parts[k]]


def test_damaged_offsets_and_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    path, work = tmp_path / "x.bin", tmp_path / "work"
    np.concatenate(DOCS).astype(np.uint16).tofile(path)
    options = {"dtype": np.uint16, "separator": 0, "work_dir": work}

    def cut_and_append(*arguments, cut=token_files._cut):
        with path.open("ab") as file:
            file.write(bytes(2))
        return cut(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_cut", cut_and_append)
        with pytest.raises(SeqpackError, match=r"x\.bin was changed while it was read"):
            open_flat(path, **options)
    assert lists(open_flat(path, **options)) == [*DOCS, [0]]
    (kept,) = work.glob("offsets*.npy")
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(SeqpackError, match=r"offsets.*delete it, so that it is made again"):
        open_flat(path, **options)
    kept.unlink()
    assert len(open_flat(path, **options)) == 5


def test_an_empty_file_holds_no_sequences(tmp_path):
    (tmp_path / "x.bin").touch()
    found = open_flat(tmp_path / "x.bin", dtype=np.uint16, separator=0, work_dir=tmp_path)
    assert len(found) == 0
    assert len(pickle.loads(pickle.dumps(found))) == 0


def test_bad_flat_files(tmp_path):
    path, work = tmp_path / "x.bin", tmp_path / "work"
    np.array([5, 6, 0, 7, 0, 1], np.uint8).tofile(path)
    cases = [
        ({"dtype": "u1"}, "offsets and separator are both missing"),
        ({"dtype": "u1", "separator": 0, "offsets": [0, 6]}, "both given"),
        ({"dtype": "u1", "separator": 0}, r"has to be found first\. Hint: pass work_dir"),
        ({"separator": 0}, r"no header of llm\.c.*pass dtype=np\.uint16"),
        ({"dtype": "f4", "separator": 0}, "float32 is no integer dtype"),
        ({"dtype": "u4", "separator": 0}, "6 bytes, which is no multiple of 4"),
        ({"dtype": "u1", "separator": 99, "work_dir": work}, "token 99 occurs nowhere in .*uint8"),
        ({"dtype": "u1", "separator": 300, "work_dir": work}, "token 300 occurs nowhere"),
        ({"dtype": "u1", "separator": 0, "separator_at": "mid", "work_dir": work}, "start, end"),
        ({"dtype": "u1", "offsets": [0, 4, 3, 6]}, "offsets fall from 4 to 3"),
        ({"dtype": "u1", "offsets": [0, 5]}, "run from 0 to 5, but there are 6 tokens"),
        ({"dtype": "u1", "offsets": tmp_path / "none.npy"}, "none.npy cannot be read"),
    ]
    for options, message in cases:
        with pytest.raises(SeqpackError, match=message):
            open_flat(path, **options)
    with pytest.raises(SeqpackError, match="2 files, and offsets of one"):
        open_flat([path, path], dtype="u1", offsets=[0, 6])
    for missing, message in [
        (tmp_path / "no.bin", "no.bin does not exist"),
        (tmp_path, "is a directory"),
        (tmp_path / "*.nothing", "no file at"),
        ([], "no file at"),
    ]:
        with pytest.raises(SeqpackError, match=message):
            open_flat(missing, dtype="u1", separator=0, work_dir=work)


def test_damaged_files_of_llmc(tmp_path):
    llmc_file(tmp_path / "x.bin", [1, 2, 0], count=5)
    with pytest.raises(SeqpackError, match="1030 bytes, but its header says 5 tokens of u2"):
        open_flat(tmp_path / "x.bin", separator=0, work_dir=tmp_path)
    llmc_file(tmp_path / "y.bin", [1, 2, 0], magic=20240522)
    with pytest.raises(SeqpackError, match=r"evaluation file of llm\.c"):
        open_flat(tmp_path / "y.bin", separator=0, work_dir=tmp_path)


# Megatron.


def write_megatron(base, docs, code=8, dtype=np.uint16, modes=False):
    """Write documents, each a list of sequences, as Megatron's IndexedDatasetBuilder does."""
    sequences = [sequence for doc in docs for sequence in doc]
    sizes = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * np.dtype(dtype).itemsize
    stops = np.cumsum([0] + [len(doc) for doc in docs], dtype=np.int64)
    np.array(list(chain(*sequences)), dtype).tofile(f"{base}.bin")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(stops))
    tail = bytes(len(sizes)) if modes else b""
    with open(f"{base}.idx", "wb") as file:
        file.write(header + sizes.tobytes() + pointers.tobytes() + stops.tobytes() + tail)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "uint8"), (2, "int8"), (3, "int16"), (4, "int32"), (5, "int64"), (8, "uint16")],
)
def test_megatron(tmp_path, code, dtype):
    docs = [[[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9, 9]]]
    write_megatron(tmp_path / "d.text", docs, code, dtype, modes=code == 1)
    work = tmp_path / "work"
    found = open_megatron(tmp_path / "d.text", work_dir=work)
    assert isinstance(found, FlatSequences)
    assert found.tokens.dtype == dtype
    check_source(found, [sequence for doc in docs for sequence in doc], limit=1000)
    whole = open_megatron(tmp_path / "d.text.idx", documents=True, work_dir=work)
    check_source(whole, [list(chain(*doc)) for doc in docs], limit=1000)
    assert lists(open_megatron(str(tmp_path / "d.text.bin"), work_dir=work)) == lists(found)


def test_bad_megatron_files(tmp_path):
    base, docs = tmp_path / "d", [[[1, 2], [3]], [[4]]]

    def check(message, **options):
        with pytest.raises(SeqpackError, match=message):
            open_megatron(base, work_dir=tmp_path / "work", **options)

    check("d.idx does not exist")
    write_megatron(base, docs, code=7, dtype=np.float32)
    check("holds float32")
    write_megatron(base, docs, code=9)
    check("version 1 and dtype 9")
    write_megatron(base, docs)
    index = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(index[:-1])
    check("93 bytes, but 3 sequences take 94")
    (tmp_path / "d.idx").write_bytes(b"TNTIDX\x00\x00" + index[8:])
    check("old format TNTIDX")
    (tmp_path / "d.idx").write_bytes(index[:20])
    check("does not begin with MMIDIDX")
    (tmp_path / "d.idx").write_bytes(index[:46] + np.int64([0, 4, 2]).tobytes() + index[70:])
    check("do not follow one another")
    (tmp_path / "d.idx").write_bytes(index[:-8] + np.int64([2]).tobytes())
    check("the documents of .* do not cover its 3 sequences", documents=True)
    (tmp_path / "d.idx").write_bytes(index)
    np.array([1, 2, 3], np.uint16).tofile(tmp_path / "d.bin")
    check("3 tokens, but by its index 4")
    (tmp_path / "d.bin").write_bytes(b"1")
    check("1 bytes of uint16")


# Joined sources.


def test_joined_sources_read_each_part_once(tmp_path):
    calls = []

    class Part:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("one by one")

        def __getitems__(self, ids):
            calls.append(ids)
            return [np.array([100 + i]) for i in ids]

    joined = JoinedSequences([[np.array([1]), np.array([2, 2])], Part()])
    assert [a.tolist() for a in joined.__getitems__(np.array([4, 1, 2, 4]))] == [
        [102],
        [2, 2],
        [100],
        [102],
    ]
    assert calls == [[0, 2, 2]]
    check_source(JoinedSequences([[[1], [2, 2]], [[3]], []]), [[1], [2, 2], [3]])
    with pytest.raises(SeqpackError, match="there are no parts"):
        JoinedSequences([])


def test_joined_records_are_counted_by_their_tokens():
    parts = [[{"tokens": np.arange(n), "mask": np.ones(n, bool)} for n in (5, 7)], [np.arange(3)]]
    assert JoinedSequences(parts).lengths.tolist() == [5, 7, 3]
    with pytest.raises(
        SeqpackError,
        match=r"JoinedSequences: record 0 has no feature 'tokens', but \['ids'\].*feature=",
    ):
        _ = JoinedSequences([[{"ids": np.arange(3)}]]).lengths
    counted = RecordSequences([{"ids": np.arange(3)}], feature="ids")
    assert JoinedSequences([counted, [[7]]]).lengths.tolist() == [3, 1]


def test_a_part_that_returns_too_few_is_refused_and_one_without_getitems_read_by_threads():
    class Few(list):
        def __getitems__(self, ids):
            return [self[i] for i in ids[1:]]

    with pytest.raises(SeqpackError, match="of 2 ids returned 1 records"):
        JoinedSequences([Few([[1], [2]])]).__getitems__([0, 1])
    both = threading.Barrier(2, timeout=20)

    class Slow:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            both.wait()
            return np.array([index])

    assert [a.tolist() for a in JoinedSequences([Slow()]).__getitems__([1, 0])] == [[1], [0]]


# Arrow tables.

LISTS = [[1, 2, 3], [], [4], [5, 6], [7, 8, 9, 10]]


@settings(max_examples=60)
@given(data=st.data())
def test_tables_of_any_list_type_chunks_and_slices(data):
    rows = data.draw(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=9))
    kind = data.draw(st.sampled_from([pa.list_, pa.large_list]))
    item = data.draw(st.sampled_from([pa.uint8(), pa.int32(), pa.int64(), pa.uint16()]))
    table = pa.table({"t": pa.array(rows, kind(item)), "k": pa.array(range(len(rows)))})
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    edges = [0, *cuts, len(rows)]
    parts = [table.slice(a, b - a) for a, b in pairwise(edges)]
    table = pa.concat_tables(parts)
    start = data.draw(st.integers(0, len(rows)))
    table, rows = table.slice(start), rows[start:]
    found = open_table(table, "t")
    assert isinstance(found, TableSequences)
    check_source(found, rows)
    assert all(array.dtype == str(item) for array in found.__getitems__(range(len(rows))))
    records = open_table(table, {"tokens": "t", "number": "k"})
    assert records.lengths.tolist() == [len(row) for row in rows]
    assert [
        (r["tokens"].tolist(), int(r["number"])) for r in map(records.__getitem__, range(len(rows)))
    ] == [(row, start + k) for k, row in enumerate(rows)]


def test_tables_are_views():
    flat = np.arange(10, dtype=np.int32)
    lists_ = pa.ListArray.from_arrays(pa.array([0, 3, 3, 4, 6, 10], pa.int32()), pa.array(flat))
    found = open_table(pa.table({"t": lists_}), "t")
    assert np.shares_memory(found[4], flat)
    batches = pa.table({"t": lists_}).to_batches(max_chunksize=2)
    assert np.shares_memory(open_table(batches, "t")[4], flat)
    assert np.shares_memory(open_table(batches[0], "t")[0], flat)


def test_columns_of_a_record():
    table = pa.table(
        {
            "t": pa.array(LISTS, pa.list_(pa.int32())),
            "mask": pa.array([[k % 2 == 0 for k in row] for row in LISTS], pa.list_(pa.bool_())),
            "vectors": pa.array(
                [[[k, k + 0.5] for k in row] for row in LISTS], pa.list_(pa.list_(pa.float32(), 2))
            ),
            "bits": pa.array([[True, False]] * 5, pa.list_(pa.bool_(), 2)),
            "pair": pa.array([[k, k] for k in range(5)], pa.list_(pa.int16(), 2)),
            "score": pa.array(np.arange(5) / 2),
            "good": pa.array([True, False, True, False, True]),
        }
    ).slice(1)
    found = open_table(table, table.column_names)
    assert found.lengths.tolist() == [0, 1, 2, 4]
    record = found[3]
    assert list(record) == table.column_names
    assert record["t"].tolist() == [7, 8, 9, 10]
    assert record["mask"].tolist() == [False, True, False, True]
    assert record["mask"].dtype == bool
    assert record["vectors"].tolist() == [[7, 7.5], [8, 8.5], [9, 9.5], [10, 10.5]]
    assert record["vectors"].dtype == np.float32
    assert record["bits"].tolist() == [True, False]
    assert record["pair"].tolist() == [4, 4]
    assert record["score"] == 2.0
    assert record["good"] == True  # noqa: E712
    assert record["good"].dtype == bool
    assert found[0]["vectors"].shape == (0, 2)


def test_a_row_of_booleans_of_equal_size_is_all_that_is_read(monkeypatch):
    bits = pa.FixedSizeListArray.from_arrays(pa.array([True, False] * 3000), 6)
    found, sizes = open_table(pa.table({"t": bits}).slice(1), "t"), []

    def counted(self, index, read=list_columns._Bits.__getitem__):
        sizes.append(read(self, index).size)
        return read(self, index)

    monkeypatch.setattr(list_columns._Bits, "__getitem__", counted)
    assert [found[k].tolist() for k in (0, 998)] == [[True, False] * 3] * 2
    assert sizes == [6, 6]


def test_bad_tables(tmp_path):
    def check(message, table, columns, **options):
        with pytest.raises(SeqpackError, match=message):
            open_table(table, columns, **options)

    table = pa.table({"t": [[1], None, [2]], "x": ["a", "b", "c"], "n": [1, 2, 3]})
    check(r"open_table: column 't' is null in row 1\. Hint: leave such rows out", table, "t")
    nulls = pa.concat_tables([pa.table({"t": [[1, 2], [3]]}), pa.table({"t": [[4], [5, None]]})])
    check("column 't' has a null token in row 3", nulls, "t")
    check("column 't' has a null token in row 2", nulls.slice(1), "t")
    fixed = pa.table({"t": pa.array([[1, 2], [3, None]], pa.list_(pa.int32(), 2))})
    check("column 't' has a null token in row 1", fixed, "t")
    check("has no column 'tokens'; its columns are t, x, n", table, "tokens")
    twice = pa.table([pa.array([[1]]), pa.array([[2]])], names=["t", "t"])
    check("has several columns 't'", twice, "t")
    check("column 'n' has the type int64, not lists", table, "n")
    check("column 'x' has the type string.*tokenise", table.slice(0, 1), ["t", "x"])
    check("column 't' has the type list<item: string>", pa.table({"t": [["a"]]}), "t")
    check("column 't' has the type list<item: list<item: int64>>", pa.table({"t": [[[1]]]}), "t")
    check(r"columns = \[\]", table, [])
    check(r"columns = \[1\]", table, [1])
    check("path = 7 is not a path", 7, "t")
    (tmp_path / "x.arrow").write_bytes(b"not arrow at all")
    check("x.arrow cannot be read", tmp_path / "x.arrow", "t")
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    check(r"cannot be mapped\. Hint: pass work_dir", tmp_path / "x.parquet", "t")
    check("x.parquet cannot be read", tmp_path / "x.parquet", ["t"], work_dir=tmp_path / "w")
    assert not list((tmp_path / "w").glob("*.arrow*tmp"))
    check("of different kinds", [tmp_path / "x.parquet", tmp_path / "x.arrow"], "t")


def arrow_file(path, table, stream, **options):
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_files_are_mapped(tmp_path, stream):
    table = pa.table({"t": pa.array(LISTS, pa.list_(pa.uint16()))})
    arrow_file(tmp_path / "a.arrow", table, stream)
    arrow_file(tmp_path / "b.arrow", table, stream, compression="lz4")
    before = pa.total_allocated_bytes()
    found = open_table(tmp_path / "a.arrow", "t")
    assert pa.total_allocated_bytes() == before
    check_source(found, LISTS, limit=1000)
    with pytest.raises(SeqpackError, match=r"a\.arrow has no column 'u'; its columns are t"):
        open_table(tmp_path / "a.arrow", "u")
    both = open_table(str(tmp_path / "*.arrow"), "t")
    check_source(both, LISTS * 2, limit=1000)
    state = pickle.dumps(found)
    os.utime(tmp_path / "a.arrow", ns=(1, 1))
    with pytest.raises(SeqpackError, match=r"a\.arrow was changed since it was opened"):
        pickle.loads(state)


def test_many_arrow_files_pickle_small(tmp_path):
    table = pa.table({"t": pa.array(LISTS, pa.list_(pa.uint16()))})
    for k in range(500):
        arrow_file(tmp_path / f"data-{k:05}-of-00500.arrow", table, True)
    found = open_table(tmp_path / "*.arrow", "t")
    assert len(found) == 2500
    assert len(pickle.dumps(found)) < 30_000


def test_parquet_files_are_copied_once(tmp_path, monkeypatch):
    table = pa.table(
        {"t": pa.array(LISTS, pa.list_(pa.int64())), "u": pa.array(LISTS), "x": ["a"] * 5}
    )
    for name in ("a", "b"):
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    work = tmp_path / "work"
    records = open_table(tmp_path / "*.parquet", {"tokens": "t", "labels": "u"}, work_dir=work)
    assert [records[k]["labels"].tolist() for k in range(10)] == LISTS * 2
    assert records.lengths.tolist() == [len(row) for row in LISTS] * 2
    assert len(pickle.dumps(records)) < 1000
    with pytest.raises(SeqpackError, match=r"a\.parquet has no column 'y'"):
        open_table(tmp_path / "a.parquet", ["t", "y"], work_dir=work)
    monkeypatch.setattr("seqpack_jax.feeding.tables.copy_columns", lambda *_: 1 / 0)
    again = open_table(tmp_path / "*.parquet", {"tokens": "t", "labels": "u"}, work_dir=work)
    assert lists([again[k]["tokens"] for k in range(10)]) == LISTS * 2
    # One column: the token store that open_sequences makes.
    single = open_table(tmp_path / "*.parquet", "t", work_dir=work)
    assert isinstance(single, FlatSequences)
    assert lists(single) == LISTS * 2


def test_other_tables_with_the_arrow_interface():
    class Frame:
        def __arrow_c_stream__(self, requested_schema=None):
            return pa.table({"t": LISTS}).__arrow_c_stream__(requested_schema)

    check_source(open_table(pa.RecordBatchReader.from_stream(Frame()), "t"), LISTS)


# Hugging Face.


class Dataset:
    """What of `datasets.Dataset` is used, with its behaviour: rows are gathered, or a slice."""

    def __init__(self, table, indices=None):
        self.table, self.indices = table, indices

    @property
    def column_names(self):
        return self.table.column_names

    def select_columns(self, names):
        assert isinstance(names, list)
        return Dataset(self.table.select(names), self.indices)

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def __len__(self):
        return self.table.num_rows if self.indices is None else len(self.indices)

    def __getitem__(self, key):
        if isinstance(key, slice):
            key = list(range(len(self))[key])
        assert all(type(k) is int for k in key)
        places = key if self.indices is None else [self.indices[k] for k in key]
        # One chunk per row, as `datasets` gathers them.
        return pa.concat_tables(
            [self.table.slice(k, 1) for k in places] or [self.table.slice(0, 0)]
        )


def test_datasets_of_hugging_face():
    table = pa.table({"input_ids": LISTS, "n": range(5), "text": ["a"] * 5})
    found = open_table(Dataset(table), "input_ids")
    assert isinstance(found, DatasetSequences)
    check_source(found, LISTS)
    order = [4, 0, 2, 0]
    check_source(open_table(Dataset(table, order), "input_ids"), [LISTS[k] for k in order])
    records = open_table(Dataset(table, order), {"tokens": "input_ids", "n": "n"})
    assert records.lengths.tolist() == [4, 3, 1, 3]
    assert records.__getitems__([]) == []
    assert [(r["tokens"].tolist(), int(r["n"])) for r in records.__getitems__([3, 0])] == [
        ([1, 2, 3], 0),
        ([7, 8, 9, 10], 4),
    ]
    assert tokens_by_packing(open_table(Dataset(table, [4, 0, 2]), "input_ids")) == [
        [1, 2, 3],
        [4],
        [7, 8, 9, 10],
    ]


def test_lists_of_hugging_face_that_are_bad_or_of_equal_size():
    table = pa.table({"t": [[1], [2], [3, None], [4]], "n": range(4)})
    with pytest.raises(
        SeqpackError, match="the table has no column 'tokens'; its columns are t, n"
    ):
        open_table(Dataset(table), "tokens")
    found = open_table(Dataset(table, [0, 1, 3, 2]), "t")
    assert found[2].tolist() == [4]
    with pytest.raises(SeqpackError, match="column 't' has a null token in row 3"):
        found.__getitems__([3, 0])
    absent = pa.table({"t": [[1], None]})
    with pytest.raises(SeqpackError, match="column 't' is null in row 2"):
        _ = open_table(Dataset(absent, [0, 0, 1]), "t").lengths
    with pytest.raises(SeqpackError, match="column 'n' has the type int64, not lists"):
        _ = open_table(Dataset(table), "n").lengths
    splits = type("DatasetDict", (Dataset,), {"column_names": {"train": ["t"]}})(table)
    stream = type("IterableDataset", (Dataset,), {"column_names": None})(table)
    for wrong in (splits, stream):
        with pytest.raises(SeqpackError, match=r"a \w+ is no datasets.Dataset of known length"):
            open_table(wrong, "t")
    fixed = pa.table({"t": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2))})
    check_source(open_table(Dataset(fixed, [1, 0]), "t"), [[3, 4], [1, 2]])


# Records.


def decode(record):
    return np.frombuffer(record, "<i4")


def decode_dict(record):
    return {"tokens": decode(record), "size": np.int64(len(record))}


def size_of(record):
    return len(record) // 4


def array_record(path, sequences):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for sequence in sequences:
        writer.write(np.array(sequence, "<i4").tobytes())
    writer.close()


def test_array_record_files(tmp_path):
    docs = [[k] * (k % 5 + 1) for k in range(23)]
    array_record(tmp_path / "a.array_record", docs[:10])
    array_record(tmp_path / "b.array_record", docs[10:])
    paths = [str(tmp_path / f"{name}.array_record") for name in "ab"]
    with grain.sources.ArrayRecordDataSource(paths) as source:
        found = RecordSequences(source, decode)
        check_source(found, docs, limit=2000)
        assert RecordSequences(source, decode, length_of=size_of).lengths.tolist() == [
            len(doc) for doc in docs
        ]
        assert tokens_by_packing(found) == sorted(docs)
        records = RecordSequences(source, decode_dict)
        assert records.lengths.tolist() == [len(doc) for doc in docs]
        assert int(records.__getitems__([22, 3])[1]["size"]) == 16


def test_rows_that_were_exported_are_records_too(tmp_path):
    rows = np.arange(24, dtype="<i4").reshape(2, 3, 4)
    source = RecordSequences([row.tobytes() for row in rows], decode_row)
    assert source[1]["tokens"].tolist() == [12, 13, 14, 15]
    assert source.lengths.tolist() == [4, 4]


def test_records_are_read_in_the_order_of_storage_and_lengths_in_one_pass():
    calls = []

    class Source:
        def __len__(self):
            return 10_000

        def __getitem__(self, index):
            raise AssertionError("one by one")

        def __getitems__(self, ids):
            calls.append(list(ids))
            return [np.full(i % 7 + 1, i) for i in ids]

    found = RecordSequences(Source())
    assert [a[0] for a in found.__getitems__([9, 2, 9999, 2])] == [9, 2, 9999, 2]
    assert calls == [[2, 2, 9, 9999]]
    calls.clear()
    assert found.lengths.tolist() == [i % 7 + 1 for i in range(10_000)]
    assert sorted(chain(*calls)) == list(range(10_000))
    assert found.lengths is found.lengths
    assert len(calls) == 3
    given = RecordSequences(Source(), lengths=np.ones(10_000, np.int32))
    assert given.lengths.sum() == 10_000
    assert len(calls) == 3


def test_nested_records_and_tuples_are_counted_by_the_path_of_their_feature():
    nested = [{"text": {"ids": np.arange(n)}, "id": "x"} for n in (4, 0)]
    assert RecordSequences(nested, feature="text/ids").lengths.tolist() == [4, 0]
    pairs = [(np.arange(n), np.arange(2)) for n in (4, 1)]
    assert RecordSequences(pairs, feature="0").lengths.tolist() == [4, 1]
    assert RecordSequences([(7, 8, 9)]).lengths.tolist() == [3]  # a tuple of numbers is an array


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ((np.arange(4), np.arange(4)), {}, r"record 0 has no feature 'tokens', but \['0', '1'\]"),
        (b"12345678", {}, "record 0 is a bytes, not an array of tokens"),  # decode was forgotten
        (None, {}, "record 0 is a NoneType, not"),
        (np.array(5), {}, "record 0 is a ndarray, not"),
        ({"tokens": {"a": [1]}}, {}, "record 0 is a dict, not"),
        (b"123456", {"length_of": lambda r: len(r) / 4}, r"length_of\(record 0\) = 1\.5 is not"),
        (b"123456", {"length_of": lambda r: -1}, r"length_of\(record 0\) = -1, but .* at least 0"),
    ],
)
def test_what_cannot_be_counted_is_named(record, options, message):
    with pytest.raises(SeqpackError, match=f"RecordSequences: {message}"):
        _ = RecordSequences([record], **options).lengths


def test_lengths_do_not_travel():
    found = RecordSequences([np.zeros(1)] * 100, lengths=[1] * 100)
    small = RecordSequences([np.zeros(1)] * 100)
    assert len(pickle.dumps(found)) == len(pickle.dumps(small))


def test_bad_records():
    with pytest.raises(SeqpackError, match="there are 2 lengths, but 1 records"):
        RecordSequences([[1]], lengths=[1, 1])
    with pytest.raises(
        SeqpackError, match=r"record 0 has no feature 'ids', but \['size', 'tokens'\]"
    ):
        _ = RecordSequences([b""], decode_dict, feature="ids").lengths
    with pytest.raises(SeqpackError, match="threads = 0"):
        RecordSequences([], threads=0)
    with pytest.raises(ValueError, match="buffer size must be a multiple") as caught:
        RecordSequences([b"1234", b"12345"], decode).__getitems__([0, 1])
    assert caught.value.__notes__ == ["RecordSequences: while record 1 was decoded"]
    with pytest.raises(IndexError, match="sequence 1 of 1"):
        RecordSequences([[1]]).__getitems__([0, 1])
