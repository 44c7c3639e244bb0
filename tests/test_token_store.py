"""Token stores: what is written is read, by row and by id; files are converted once."""

import gzip
import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import seqpack_jax as sp
from seqpack_jax.feeding import store_writer, token_store
from seqpack_jax.feeding.token_store import (
    KeyedSequences,
    fingerprint_of,
    open_sequences,
    write_flat,
)


def write_parquet(path, lists, ids=None, dtype="int32", **options):
    columns = {"tokens": pa.array(lists, pa.list_(getattr(pa, dtype)()))}
    if ids is not None:
        columns["id"] = pa.array(ids, pa.int64())
    parquet.write_table(pa.table(columns), path, **options)


def lists_of(sequences, ids):
    return [sequences[int(i)].tolist() for i in ids]


@settings(max_examples=40)
@given(data=st.data())
def test_blocks_come_back_by_id(data, tmp_path_factory):
    n = data.draw(st.integers(0, 12))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    dtype = data.draw(st.sampled_from(["uint8", "int16", "uint16", "int32", "int64", "uint64"]))
    lists = [[(7 * i + j) % 100 for j in range(size)] for i, size in enumerate(sizes)]
    ids = data.draw(
        st.none()
        | st.just(list(range(n)))
        | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n, unique=True)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    blocks = []
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        tokens = np.array([x for each in lists[start:stop] for x in each], dtype)
        block = (tokens, np.array(sizes[start:stop], np.int32))
        blocks.append(block if ids is None else (*block, np.array(ids[start:stop], np.int64)))
    directory = tmp_path_factory.mktemp("store") / "tokens"
    write_flat(iter(blocks), directory)
    sequences = open_sequences(directory)
    assert len(sequences) == n
    assert lists_of(sequences, range(n) if ids is None else ids) == lists
    stored = np.load(directory / "tokens.npy")
    assert stored.dtype == (dtype if np.dtype(dtype).itemsize < 4 and sum(sizes) else "int32")
    again = pickle.loads(pickle.dumps(sequences))
    assert lists_of(again, range(n) if ids is None else ids) == lists
    by_id = ids is not None and ids != list(range(n))
    assert (directory / "ids.npy").exists() == by_id
    assert (directory / "rows.npy").exists() == (by_id and ids != sorted(ids))
    if by_id:
        absent = next(i for i in range(n + 1) if i not in ids)
        with pytest.raises(KeyError):
            sequences[absent]


def test_a_store_is_memory_mapped_and_pickles_by_path(tmp_path):
    tokens = np.zeros(100_000, np.uint16)
    ids = np.arange(50_000)[::-1] * 3
    write_flat([(tokens, np.full(50_000, 2), ids)], tmp_path / "tokens")
    sequences = open_sequences(tmp_path / "tokens")
    assert isinstance(sequences, KeyedSequences)
    assert len(pickle.dumps(sequences)) < 2000
    assert sequences.rows.dtype == np.uint16


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ([[1, 2]], r"block 0 is a list, not \(tokens, sizes\)"),
        ([([1, 2],)], r"block 0 is a tuple, not \(tokens, sizes\)"),
        ([([1, 2], [1, 2])], r"block 0 has 2 tokens, but 2 sizes of 3 in all"),
        ([([1, 2], [3, -1])], r"sizes of block 0"),
        ([([1, 2], [1, 1], [5])], r"block 0 has 2 tokens and 1 ids"),
        ([([1.5], [1])], r"tokens of block 0 has dtype float64"),
        ([([2**31], [1])], r"row 0 holds the token 2147483648, beyond int32"),
        (
            [(np.array([1, 2], np.uint8), [2]), (np.array([7, 300, 9]), [1, 2])],
            r"row 2 holds the token 300, beyond uint8",
        ),
        (
            [([1, 2, -(2**31) - 1], [1, 0, 2])],
            r"row 2 holds the token -2147483649, beyond int32",
        ),
        (
            [([1, 1], [1, 1], np.array([3, 2**63], np.uint64))],
            r"ids of block 0 go up to 9223372036854775808, beyond int64",
        ),
        ([([], np.array([2**63], np.uint64))], r"sizes of block 0 go up to .*, beyond int64"),
        ([([], [2**62] * 4)], r"block 0 has 0 tokens, but a size of 4611686018427387904"),
        ([([1], [1], [4]), ([1], [1])], r"ids come with some blocks, but not with all \(row 1\)"),
        ([([1], [1]), ([1], [1], [4])], r"ids come with some blocks, but not with all \(row 1\)"),
        (
            [([1, 1], [1, 1], [4, 9]), ([1, 1], [1, 1], [9, 4])],
            r"id 4 comes twice, in rows 0 and 3 \(2 ids repeat an earlier one\)",
        ),
    ],
)
def test_bad_blocks_leave_nothing(tmp_path, blocks, problem):
    with pytest.raises(sp.SeqpackError, match=f"write_flat: .*{problem}"):
        write_flat(blocks, tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_written_to(tmp_path):
    with pytest.raises(sp.SeqpackError, match="exists"):
        write_flat([([1], [1])], tmp_path)


LISTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]


def test_parquet_by_row_number(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "b.parquet", LISTS[2:], row_group_size=1)
    write_parquet(folder / "a.parquet", LISTS[:2], dtype="int64")
    sequences = open_sequences(folder, tokens_column="tokens", work_dir=tmp_path / "work")
    assert lists_of(sequences, range(4)) == LISTS
    assert sequences.tokens.dtype == np.int32


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64"])
def test_tokens_keep_the_dtype_of_their_column(tmp_path, dtype):
    write_parquet(tmp_path / "a.parquet", LISTS, dtype=dtype)
    sequences = open_sequences(
        tmp_path / "a.parquet", tokens_column="tokens", work_dir=tmp_path / "work"
    )
    assert lists_of(sequences, range(4)) == LISTS
    assert sequences.tokens.dtype == (dtype if np.dtype(dtype).itemsize < 4 else "int32")


def test_parquet_by_id(tmp_path):
    write_parquet(tmp_path / "a.parquet", LISTS, ids=[30, 10, -5, 20])
    sequences = open_sequences(
        tmp_path / "a.parquet", tokens_column="tokens", id_column="id", work_dir=tmp_path / "work"
    )
    assert lists_of(sequences, [30, 10, -5, 20]) == LISTS
    with pytest.raises(KeyError):
        sequences[0]


def fasta(records):
    return "".join(f">r{i} text\n{text}\n" for i, text in enumerate(records)).encode()


def test_fasta_residues_are_letters(tmp_path):
    (tmp_path / "a.fasta").write_bytes(fasta(["MKV", "A"]))
    with gzip.open(tmp_path / "b.fasta.gz", "wb") as file:
        file.write(fasta(["GG\nG"]))
    sequences = open_sequences(tmp_path, work_dir=tmp_path / ".work")
    assert sequences.tokens.dtype == np.uint8
    assert [bytes(sequences[i]) for i in range(3)] == [b"MKV", b"A", b"GGG"]


def test_a_store_is_made_once(tmp_path, monkeypatch):
    made = []
    write = token_store.write_store
    monkeypatch.setattr(
        token_store,
        "write_store",
        lambda *given, **named: (made.append(given[2]), write(*given, **named)),
    )

    def lists():
        return lists_of(
            open_sequences(path, tokens_column="tokens", work_dir=tmp_path / "work"), range(2)
        )

    path = tmp_path / "a.parquet"
    write_parquet(path, LISTS[:2])
    assert lists() == lists() == LISTS[:2]
    assert len(made) == 1
    write_parquet(path, LISTS[2:])
    os.utime(path, (1, 1))  # whatever the clock of the file system resolves
    assert lists() == LISTS[2:]
    assert len(made) == 2


def test_what_a_killed_run_left_is_made_again(tmp_path):
    path, work = tmp_path / "a.parquet", tmp_path / "work"
    write_parquet(path, LISTS)
    open_sequences(path, tokens_column="tokens", work_dir=work)
    [store] = work.glob("tokens-*")
    whole = {file.name: file.read_bytes() for file in store.iterdir()}
    partial = store.rename(store.with_name(f".{store.name}.partial"))
    (partial / "tokens.npy").write_bytes(b"half")
    (partial / "ids.npy").write_bytes(b"half")
    open_sequences(path, tokens_column="tokens", work_dir=work)
    assert {file.name: file.read_bytes() for file in store.iterdir()} == whole
    assert not partial.exists()


def test_what_is_no_store(tmp_path):
    with pytest.raises(sp.SeqpackError, match=r"is no token store.*pass work_dir"):
        open_sequences(tmp_path)
    np.save(tmp_path / "tokens.npy", np.arange(4))
    with pytest.raises(sp.SeqpackError, match=r"offsets\.npy cannot be read"):
        open_sequences(tmp_path)
    np.save(tmp_path / "offsets.npy", np.array([0, 3]))
    with pytest.raises(sp.SeqpackError, match=r"is damaged: offsets run from 0 to 3, .* 4 tokens"):
        open_sequences(tmp_path)
    np.save(tmp_path / "offsets.npy", np.array([0, 4]))
    np.save(tmp_path / "ids.npy", np.array([7, 8]))
    with pytest.raises(sp.SeqpackError, match="is damaged: there are 2 ids, but 1 sequences"):
        open_sequences(tmp_path)
    with pytest.raises(sp.SeqpackError, match="has no columns"):
        open_sequences(tmp_path, tokens_column="tokens")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("tokens.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.save("offsets.npy", np.array([0, 1]))
    with pytest.raises(sp.SeqpackError, match=r"tokens\.npy cannot be read"):
        open_sequences(tmp_path)
    Path("tokens.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(sp.SeqpackError, match=r"tokens\.npy cannot be read"):
        open_sequences(tmp_path)
    assert not Path("exploded").exists()
    np.load(io.BytesIO(pickle.dumps(Bomb())), allow_pickle=True)  # the test can fail
    assert Path("exploded").exists()


def test_a_truncated_store_is_refused(tmp_path):
    write_flat([(np.arange(100), [60, 40], [5, 3])], tmp_path / "tokens")
    for path in sorted((tmp_path / "tokens").iterdir()):
        whole = path.read_bytes()
        for size in (0, 10, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(sp.SeqpackError, match=path.name):
                open_sequences(tmp_path / "tokens")
        path.write_bytes(whole)
    assert open_sequences(tmp_path / "tokens")[3].tolist() == list(range(60, 100))


def test_a_file_of_lengths_has_no_tokens(tmp_path):
    np.save(tmp_path / "lengths.npy", np.arange(1, 4))
    with pytest.raises(sp.SeqpackError, match="open_sequences"):
        open_sequences(tmp_path / "lengths.npy", work_dir=tmp_path / "work")
    parquet.write_table(pa.table({"length": [1, 2]}), tmp_path / "lengths.parquet")
    with pytest.raises(sp.SeqpackError, match=r"open_sequences.*no column 'tokens'"):
        open_sequences(
            tmp_path / "lengths.parquet", tokens_column="tokens", work_dir=tmp_path / "work"
        )


def test_without_filelock_the_extra_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", LISTS)
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(sp.SeqpackError, match=r"filelock is not installed.*\[prepare\]"):
        open_sequences(tmp_path / "a.parquet", tokens_column="tokens", work_dir=tmp_path / "work")


def test_fingerprints_change_with_the_tokens(tmp_path):
    tokens, offsets = np.array([1, 2, 3]), np.array([0, 1, 3])
    base = fingerprint_of(sp.FlatSequences(tokens, offsets))
    assert base == fingerprint_of(sp.FlatSequences(tokens.copy(), offsets.copy()))
    for changed in ((tokens + 1, offsets), (tokens, np.array([0, 2, 3]))):
        assert fingerprint_of(sp.FlatSequences(*changed)) != base
    assert fingerprint_of([tokens]) is None
    write_flat([(tokens, [1, 2], [8, 7])], tmp_path / "tokens")
    mapped = fingerprint_of(open_sequences(tmp_path / "tokens"))
    assert mapped == fingerprint_of(open_sequences(tmp_path / "tokens"))
    os.utime(tmp_path / "tokens" / "tokens.npy", (1, 1))
    assert fingerprint_of(open_sequences(tmp_path / "tokens")) != mapped


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        (["uint8", "int32"], "int32"),
        (["uint8", "uint16", "int64"], "int32"),
        (["int8", "uint8"], "int16"),
        (["int32", "uint8"], "int32"),
    ],
)
def test_files_of_several_dtypes(tmp_path, monkeypatch, dtypes, stored):
    monkeypatch.setattr(store_writer, "_COPY_TOKENS", 2)
    lists = []
    for name, dtype in zip("abc", dtypes, strict=False):
        top = min(np.iinfo(dtype).max, 2**31 - 1)
        lists += [[1, 2, 3], [top, 5]]
        write_parquet(tmp_path / f"{name}.parquet", lists[-2:], dtype=dtype)
    files = sorted(tmp_path.glob("*.parquet"))  # a list of paths
    sequences = open_sequences(files, tokens_column="tokens", work_dir=tmp_path / "work")
    assert lists_of(sequences, range(len(lists))) == lists
    assert sequences.tokens.dtype == stored
    [store] = (tmp_path / "work").glob("tokens-*")
    assert sorted(os.listdir(store)) == ["offsets.npy", "tokens.npy"]


@pytest.mark.parametrize("place", ["file/store", "/proc/no/store", "a\0b", "", None, "s3://b/x"])
def test_where_no_store_can_be(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    write_parquet("a.parquet", LISTS)
    problem = "cannot be made|is not a path|no local path"
    with pytest.raises(sp.SeqpackError, match=f"write_flat: .*({problem})"):
        write_flat([([1], [1])], place)
    if place is not None:
        with pytest.raises(sp.SeqpackError, match=f"open_sequences: .*({problem})"):
            open_sequences("a.parquet", tokens_column="tokens", work_dir=place)


@pytest.mark.parametrize("path", [3, None, [3], ["a", None], []])
def test_what_is_no_path(tmp_path, path):
    with pytest.raises(sp.SeqpackError, match="open_sequences"):
        open_sequences(path, work_dir=tmp_path)


def test_sources_of_ones_own_have_no_fingerprint():
    class Doubled(sp.FlatSequences):
        def __getitem__(self, index):
            return 2 * super().__getitem__(index)

    assert fingerprint_of(Doubled(np.arange(3), np.array([0, 3]))) is None
