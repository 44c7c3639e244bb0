"""Prepared directories: what is read back, what damage gets, copies from afar, the seed's own."""

import contextlib
import copy
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_files import empty_memory, refused
from prepared_directories import (
    assert_same,
    content,
    prepare_in_shards,
    read_manifest,
    seal,
    write_lengths,
)
from seed_library import write_seed_directory
from strategies import packings

import seqpack_jax as sp
from seqpack_jax.cli import main
from seqpack_jax.feeding import verification
from seqpack_jax.feeding.manifest import canonical, digest_of
from seqpack_jax.feeding.preparation import prepare
from seqpack_jax.feeding.prepared import load_prepared
from seqpack_jax.feeding.storage import entry_of, write_array
from seqpack_jax.feeding.verification import verify_prepared
from seqpack_jax.planning.over_length import OverLength

LENGTHS = [7, 5, 5, 19, 5, 5, 3, 3, 30, 9, 1, 1, 8, 2, 10]
SPLIT = OverLength("split", overlap=3)

refused = partial(refused, caller="load_prepared")
refused_by_verify = partial(refused, caller="verify_prepared")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A directory of three shards, with ids and pieces."""
    folder = tmp_path_factory.mktemp("original")
    source = write_lengths(folder / "in", LENGTHS, [100 + 3 * i for i in range(15)])
    prepare_in_shards(source, folder / "out", 10, id_column="key", over_length=SPLIT)
    return folder / "out"


@pytest.fixture
def folder(original, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(original, tmp_path / "out")
    return tmp_path / "out"


def everything(prepared):
    """All that a loaded directory says, to compare it."""
    counts, plan, pools = prepared[1:]
    ids = [pools[length].tolist() for length in range(len(counts))]
    pieces = pools.pieces and (pools.pieces.first_id, pools.pieces.table[:].tolist())
    return counts.tolist(), plan.digest(), plan.certificate, ids, pieces, pools.report


# --- what is there --------------------------------------------------------------------------


def test_it_is_what_prepare_returned(original):
    prepared = load_prepared(original)
    assert everything(prepared) == everything(load_prepared(str(original)))
    assert everything(prepared) == everything(load_prepared(f"file://{original}"))
    assert prepared.manifest == read_manifest(original)
    assert prepared.pools[8].tolist() == [136]
    assert prepared.pools.pieces.source_id.tolist() == [109] * 3 + [124] * 4
    assert prepared.pools.pieces.first_id == 143
    assert set(prepared.manifest) == {
        "bins",
        "bound_method",
        "digest",
        "efficiency",
        "files",
        "first_piece_id",
        "format",
        "format_version",
        "lower_bound",
        "parameters",
        "proved_optimal",
        "report",
        "rows",
        "sequences",
        "shards",
        "templates",
        "tokens",
        "tolerance_rows",
    }


def test_a_manifest_says_all_of_the_proof_or_nothing(folder):
    """Earlier releases did not write the last two."""
    manifest = read_manifest(folder)
    expected = everything(load_prepared(folder))
    for name, value in (("bound_method", "a guess"), ("proved_optimal", False)):
        assert manifest[name] != value
        seal(folder, {**manifest, name: value})
        with refused(f"manifest.json has {name} = {value!r}, the files have {manifest[name]!r}"):
            load_prepared(folder)
        seal(folder, {key: manifest[key] for key in manifest if key != name})
        with refused(f"manifest.json has {name} = None"):
            load_prepared(folder)
    seal(folder, {k: manifest[k] for k in manifest if k not in ("bound_method", "proved_optimal")})
    assert everything(load_prepared(folder)) == expected
    assert everything(verify_prepared(folder)) == expected


def test_it_is_pickled_by_path(original):
    prepared = load_prepared(original)
    again = pickle.loads(pickle.dumps(prepared))
    assert everything(again) == everything(prepared)
    assert again.manifest == prepared.manifest
    assert isinstance(again.counts, np.memmap)


def test_a_large_one_is_small_where_it_is_sent(tmp_path):
    """64 shards of 8,192 lengths each."""
    lengths = np.random.default_rng(0).integers(1, 8193, 64 * 9000, dtype=np.int32)
    np.save(tmp_path / "lengths.npy", lengths)
    source = str(tmp_path / "lengths.npy")
    prepared = prepare_in_shards(source, tmp_path / "out", 8192, 9000, length_column=None)
    assert len(prepared.manifest["shards"]) == 64
    assert len(prepared.counts) == 8193
    assert len(pickle.dumps((prepared.plan, prepared.pools))) < 100_000
    assert len(pickle.dumps(prepared)) < 100_000
    verify_prepared(tmp_path / "out")


# --- damage ---------------------------------------------------------------------------------

FILES = [
    "manifest.json",
    "counts.npy",
    "templates.npz",
    "pools/00000.ids.npy",
    "pools/00000.starts.npy",
    "pools/00000.pieces.npy",
    "pools/00000.piece_ids.npy",
    "pools/00000.piece_starts.npy",
]


def test_these_are_the_files(original):
    assert set(FILES) < set(content(original))
    assert len(content(original)) == 3 + 5 * 2 + 2  # nothing was cut in the last shard


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_of_another_size(name, folder):
    data = (folder / name).read_bytes()
    for damaged in (data[:-1], data + b"!", data[:64], b""):
        (folder / name).write_bytes(damaged)
        with refused(f"{folder / name}"):
            load_prepared(folder)
    (folder / name).unlink()
    with refused(f"{folder / name}"):
        load_prepared(folder)
    (folder / name).mkdir()
    with refused(f"{folder / name}"):
        load_prepared(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere(name, folder, original):
    data = (folder / name).read_bytes()
    large = name.endswith((".ids.npy", ".piece_ids.npy", ".pieces.npy"))
    places = {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        (folder / name).write_bytes(flipped)
        with pytest.raises(sp.SeqpackError, match=name.split("/")[-1].split(".")[0]):
            verify_prepared(folder)
        if not large or place < 128:
            with refused(f"{folder / name}"):
                load_prepared(folder)


def test_files_that_are_not_its_own(folder):
    for name in ("notes.txt", "pools/00000.ids.npy.tmp", "pools/00003.ids.npy"):
        (folder / name).touch()
        with refused(f"{folder / name} is no file of this data set (1 such file)"):
            load_prepared(folder)
        (folder / name).unlink()
    (folder / "pools" / "deeper").mkdir()
    with refused("pools/deeper is no file"):
        load_prepared(folder)


def test_directories_that_are_none(tmp_path):
    for text in ("", "{", "[]", "null", '"format"', '{"format": "other"}', "[" * 100_000, "\0"):
        (tmp_path / "manifest.json").write_text(text)
        with refused("manifest.json"):
            load_prepared(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with refused("manifest.json cannot be read"):
        load_prepared(tmp_path)
    with refused("nowhere/manifest.json cannot be read"):
        load_prepared(tmp_path / "nowhere")


def test_another_version_is_named(folder):
    manifest = read_manifest(folder) | {"format_version": 2}
    seal(folder, manifest)
    with refused("has format version 2, this release reads 1"):
        load_prepared(folder)


def test_an_edited_manifest_is_refused(folder):
    text = (folder / "manifest.json").read_text()
    edits = [
        text.replace('"tokens": ', '"tokens": 1', 1),
        text.replace('"rows": 15', '"rows": 15.0', 1),
        text.replace('"efficiency": 0', '"efficiency": NaN, "was": 0', 1),
        text.replace("\n", "\r\n"),
        text.replace("{", '{"bins": 3,', 1),
        text + " ",
    ]
    for edited in edits:
        assert edited != text
        (folder / "manifest.json").write_text(edited, newline="")
        with refused("manifest.json was changed"):
            load_prepared(folder)


def places_in(value, path=()):
    """The path to everything inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places_in(inner, (*path, key))


def with_change(manifest, path, change):
    """A copy in which `change` was made to the value at a path."""
    changed = copy.deepcopy(manifest)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if change == "remove":
        del holder[path[-1]]
    elif change == "add" and isinstance(holder[path[-1]], dict):
        holder[path[-1]]["more"] = 1
    elif change == "add" and isinstance(holder[path[-1]], list):
        holder[path[-1]].append(holder[path[-1]][0])
    elif isinstance(change, int) and isinstance(holder[path[-1]], int):
        holder[path[-1]] += change
    else:
        holder[path[-1]] = change
    return changed


CHANGES = ["remove", "add", 1, -1, 2**31, -(2**40), 2**63, None, "x", 1.5, True, [], {}, [1, 2]]


def test_a_changed_manifest_is_refused_or_means_the_same(folder):
    """Every field, in many ways, with a digest that is right for the change."""
    manifest = read_manifest(folder)
    expected = everything(load_prepared(folder))
    accepted = set()
    for path in list(places_in(manifest))[1:]:
        another_shard = path[1:2] in ((1,), (2,)) or "/0000" in str(path[1:2]).replace("/00000", "")
        if path == ("digest",) or another_shard:
            continue
        for change in CHANGES:
            changed = with_change(manifest, path, change)
            if changed == manifest:
                continue
            seal(folder, changed)
            try:
                prepared = load_prepared(folder)
            except sp.SeqpackError:
                continue
            accepted.add(path[2] if path[0] in ("shards", "files") else path[1])
            if accepted & {"id_range", "sha256"} & {*path}:
                with refused_by_verify("0"):
                    verify_prepared(folder)
            else:
                assert everything(prepared) == expected, (path, change)
    # What the small files do not tell: names, what is used up, and what only `verify` reads.
    names = {"input", "length_column", "tokens_column", "id_column"}
    used = {"extra_tokens", "algorithm", "max_segments", "over_length"}
    assert accepted <= names | used | {"id_range", "sha256"}
    assert {"input", "extra_tokens", "id_range", "sha256"} <= accepted


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_no_manifest_breaks_the_loader(data, original):
    """Any values anywhere: an error, never another exception."""
    changed = manifest = read_manifest(original)
    paths = list(places_in(manifest))[1:]
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
        with contextlib.suppress(KeyError, IndexError, TypeError):  # a change took it away
            changed = with_change(changed, path, data.draw(JSON))
    digest = digest_of(changed) if data.draw(st.booleans()) else manifest["digest"]
    text = canonical({**changed, "digest": digest}).encode()
    with mock.patch.object(Path, "read_bytes", return_value=text):
        try:
            prepared = load_prepared(original)
        except sp.SeqpackError:
            return
    assert prepared.plan.digest() == load_prepared(original).plan.digest()


# --- forged ---------------------------------------------------------------------------------


def forge(folder, name, change):
    """Change an array, and everything in the manifest that tells on it."""
    array = np.load(folder / name)
    entry = write_array(folder / name, np.array(change(array.copy())), array.dtype.str)
    manifest = read_manifest(folder)
    manifest["files"][name] = entry._asdict()
    seal(folder, manifest)


def put(place, value):
    def change(array):
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("counts.npy", put(5, 0), "counts.npy does not count what the pools hold"),
        ("counts.npy", lambda counts: counts[:-1], "counts.npy does not count"),
        ("counts.npy", lambda counts: [*counts, 0], "counts.npy does not count"),
        ("pools/00000.starts.npy", put(0, 1), "00000.starts.npy does not rise from 0"),
        ("pools/00000.starts.npy", put(1, 1), "00000.starts.npy does not rise from 0"),
        ("pools/00000.starts.npy", put(-1, 9), "00000.starts.npy does not rise from 0"),
        ("pools/00000.starts.npy", put(5, 4), "00000.starts.npy does not rise from 0"),
        ("pools/00000.starts.npy", put(5, 1), "counts.npy does not count what the pools hold"),
        ("pools/00000.starts.npy", lambda starts: starts[:0], "does not rise"),
        ("pools/00000.piece_starts.npy", put(-2, 5), "piece_starts.npy does not rise"),
        ("pools/00000.ids.npy", lambda ids: ids[:-1], "00000.ids.npy has 140 bytes, not 144"),
        ("pools/00000.ids.npy", lambda ids: ids[:, None], "is not the .npy file of <u4 [4]"),
    ],
)
def test_arrays_that_do_not_fit(name, change, words, folder):
    forge(folder, name, change)
    with refused(words):
        load_prepared(folder)


def test_a_plan_that_does_not_fit(folder):
    prepared = load_prepared(folder)

    def plan_again(counts, capacity=10, **options):
        sp.pack_length_histogram(counts, capacity, **options).save(folder / "templates.npz")
        manifest = read_manifest(folder)
        entry = entry_of("test", folder / "templates.npz")
        manifest["files"]["templates.npz"] = entry._asdict()
        seal(folder, manifest)
        return refused(str(folder))

    counts = prepared.counts.copy()
    with plan_again(counts + np.eye(1, 11, 5, dtype=np.int64)[0]):
        load_prepared(folder)
    with plan_again(counts, 11):
        load_prepared(folder)
    with plan_again(counts, tolerance=2):
        load_prepared(folder)
    with plan_again(counts, max_segments=1) as caught:
        load_prepared(folder)
    assert "manifest.json has bins = " in str(caught.value)
    plan_again(counts)
    assert everything(load_prepared(folder)) == everything(prepared)


def test_nothing_is_unpickled(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    for name in ("counts.npy", "pools/00000.ids.npy"):
        np.save(folder / name, np.array([Bomb()]), allow_pickle=True)
        manifest = read_manifest(folder)
        manifest["files"][name] = entry_of("test", folder / name)._asdict()
        seal(folder, manifest)
        with refused(name):
            load_prepared(folder)
    assert not (folder / "exploded").exists()


# --- verify ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("ids", put(0, 0), "the id 100 is there twice"),
        ("ids", put(0, 100), "ids.npy has ids from 100 to 200, not from 100 to 112"),
        ("pieces", put((0, 0), 103), "pieces.npy does not cut sequences as the policy does"),
        ("pieces", put((1, 1), 6), "pieces.npy does not cut sequences as the policy does"),
        ("pieces", put((0, 3), -1), "pieces.npy does not cut sequences as the policy does"),
        ("pieces", put((slice(None), 0), 100), "the id 100 is there twice"),
        ("piece_ids", put(0, 1), "piece_ids.npy does not hold each piece by its length"),
        ("piece_ids", put(0, 2**31), "piece_ids.npy does not hold each piece by its length"),
        ("piece_ids", lambda ids: ids[::-1], "piece_ids.npy does not hold each piece"),
    ],
)
def test_verify_reads_the_ids(name, change, words, folder):
    forge(folder, f"pools/00000.{name}.npy", change)
    load_prepared(folder)
    with refused_by_verify(words):
        verify_prepared(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(0, 4), "the id 9 is there twice"),
        (put(0, 1), "the id 6 is there twice"),
        (put(0, 2**32 - 1), f"ids.npy has ids from 5 to {2**32 + 4}, not from 5 to 9"),
    ],
)
def test_verify_counts_the_rows(change, words, tmp_path):
    source = write_lengths(tmp_path / "in", [4, 6, 2, 3, 8] * 3)
    prepare_in_shards(source, tmp_path / "out", 10)
    forge(tmp_path / "out", "pools/00001.ids.npy", change)
    with refused_by_verify(words):
        verify_prepared(tmp_path / "out")


def test_ids_that_two_shards_have(tmp_path):
    ids = [100, 7, 300, 400, 500, 600, 700, 800, 900, 1000, 1100, 1200, 7, 1400, 1500]
    source = write_lengths(tmp_path / "in", LENGTHS, ids)
    prepare_in_shards(source, tmp_path / "out", 30, id_column="key")
    load_prepared(tmp_path / "out")
    with refused_by_verify("the id 7 is there twice"):
        verify_prepared(tmp_path / "out")


@settings(max_examples=200)
@given(
    ids=st.lists(st.integers(-40, 40) | st.integers(-(2**63), 2**63 - 1), max_size=60),
    unique=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=3),
    most=st.integers(1, 20),
    bits=st.integers(1, 5),
)
def test_ids_are_compared_range_by_range(ids, unique, cuts, most, bits):
    array = np.array(sorted(set(ids)) if unique else ids, np.int64)
    array = np.random.default_rng(0).permutation(array)
    runs = [verification._Run.of(part, 0) for part in np.split(array, sorted(cuts)) if len(part)]
    limits = {"_MOST_IDS": most, "_BUCKET_BITS": bits, "_BLOCK": 7}
    twice = [number for number, count in Counter(array.tolist()).items() if count > 1]
    with mock.patch.multiple(verification, **limits):
        if not twice:
            verification._check_unique(runs)
            return
        with pytest.raises(sp.SeqpackError) as caught:
            verification._check_unique(runs)
    assert str(caught.value).split()[3] in map(str, twice)


# --- far away -------------------------------------------------------------------------------


def put_all(fs, folder):
    for name, data in content(folder).items():
        fs.pipe_file(f"/data/{name}", data)


@pytest.fixture
def remote(original):
    """The directory on a file system that is not local; yields it and what was opened there."""
    fs = empty_memory()
    put_all(fs, original)
    opened = []
    fetch = type(fs).open

    def note(self, path, *args, **kwargs):
        opened.append(path.removeprefix("/data/"))
        return fetch(self, path, *args, **kwargs)

    with mock.patch.object(type(fs), "open", note):
        yield fs, opened
    fs.store.clear()


def test_a_remote_directory_is_copied_once(original, remote, tmp_path, monkeypatch):
    _, opened = remote
    digest = read_manifest(original)["digest"]
    prepared = load_prepared("memory://data", cache=tmp_path / "a")
    assert everything(prepared) == everything(load_prepared(original))
    assert content(tmp_path / "a" / digest) == content(original)
    assert set(opened) == set(content(original))
    opened.clear()
    load_prepared("memory://data", cache=tmp_path / "a")
    assert opened == ["manifest.json"]
    monkeypatch.setenv("SEQPACK_CACHE", str(tmp_path / "b"))
    verify_prepared("memory://data/")
    assert (tmp_path / "b" / digest).is_dir()
    monkeypatch.delenv("SEQPACK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_prepared("memory://data")
    assert (tmp_path / ".cache" / "seqpack_jax" / digest).is_dir()
    assert load_prepared("simplecache::memory://data", cache=tmp_path / "a").manifest


def test_a_changed_remote_directory_is_copied_anew(original, remote, tmp_path):
    fs, _ = remote
    load_prepared("memory://data", cache=tmp_path / "cache")
    source = write_lengths(tmp_path / "in", LENGTHS)
    prepare(source, tmp_path / "new", 30, length_column="length")
    fs.store.clear()
    put_all(fs, tmp_path / "new")
    prepared = load_prepared("memory://data", cache=tmp_path / "cache")
    assert everything(prepared) == everything(load_prepared(tmp_path / "new"))


def test_what_a_killed_copy_left_is_removed(original, remote, tmp_path):
    part = tmp_path / f"{read_manifest(original)['digest']}.partial"
    part.mkdir()
    (part / "half").touch()
    prepared = load_prepared("memory://data", cache=tmp_path)
    assert everything(prepared) == everything(load_prepared(original))
    assert not part.exists()


@pytest.mark.parametrize("name", ["pools/00001.ids.npy", "templates.npz"])
def test_a_damaged_remote_file_is_refused(name, remote, tmp_path):
    fs, _ = remote
    data = fs.cat_file(f"/data/{name}")
    for damaged in (data[:-1], data[:-1] + b"?"):
        fs.pipe_file(f"/data/{name}", damaged)
        with refused(f"/data/{name} is not what the manifest says"):
            load_prepared("memory://data", cache=tmp_path)
    fs.rm(f"/data/{name}")
    with refused(f"/data/{name} cannot be copied (FileNotFoundError"):
        load_prepared("memory://data", cache=tmp_path)
    fs.pipe_file(f"/data/{name}", data)
    load_prepared("memory://data", cache=tmp_path)


def test_remote_paths_that_are_none(remote, tmp_path):
    fs, _ = remote
    with refused("memory://nowhere/manifest.json cannot be read"):
        load_prepared("memory://nowhere", cache=tmp_path)
    with refused("nosuch://data cannot be opened"):
        load_prepared("nosuch://data", cache=tmp_path)
    fs.pipe_file("/data/manifest.json", b'{"packer": "batched"}')
    with refused("is a directory of PyPI seqpack"):
        load_prepared("memory://data", cache=tmp_path)
    fs.pipe_file("/data/manifest.json", b"{}")
    with refused("memory://data/manifest.json is no manifest"):
        load_prepared("memory://data", cache=tmp_path)


def test_a_cache_that_cannot_be_written(remote, tmp_path):
    (tmp_path / "file").touch()
    with refused("cannot be written", "SEQPACK_CACHE"):
        load_prepared("memory://data", cache=tmp_path / "file" / "cache")


def test_one_of_several_processes_copies(original, remote, tmp_path):
    """Threads stand for processes: the lock is one of files."""
    _, opened = remote
    loaded = []

    def load():
        loaded.append(everything(load_prepared("memory://data", cache=tmp_path)))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [everything(load_prepared(original))] * 4
    assert opened.count("counts.npy") == 1


# --- the seed's -----------------------------------------------------------------------------


def write_as_seed(folder, lengths, capacity, ids=None):
    """What `prepare.py` of PyPI seqpack 1.0.0 writes, which leaves pools of earlier runs."""
    lengths = np.array(lengths, np.int64)
    ids = np.arange(len(lengths)) if ids is None else np.array(ids)
    counts = Counter(lengths.tolist())
    templates = sp.pack_length_histogram(counts, capacity).to_counter()
    write_seed_directory(folder, lengths, ids, templates, capacity)


@settings(max_examples=25)
@given(packing=packings(), first=st.sampled_from([0, 10**12]))
def test_a_directory_of_the_seed_is_read(packing, first):
    lengths, capacity = packing
    counts, pools = sp.length_histogram_from_lengths(lengths)
    plan = sp.pack_length_histogram(counts, capacity)
    pools = sp.SequencePools(pools.ids + first, pools.starts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_as_seed(folder, lengths, capacity, first + np.arange(len(lengths)))
        prepared = load_prepared(folder)
        assert prepared.manifest["packer"] == "batched"
        assert np.array_equal(prepared.counts, counts)
        assert prepared.plan.to_counter() == plan.to_counter()
        assert_same(prepared._replace(plan=plan), counts, plan, pools)
        verify_prepared(folder)


def test_stale_pools_of_the_seed_are_left_out(tmp_path):
    write_as_seed(tmp_path, [5, 5, 3, 9], 10)
    write_as_seed(tmp_path, [5, 3], 10)
    prepared = load_prepared(tmp_path)
    assert prepared.pools.num_sequences == 2
    assert sp.materialize_epoch(prepared.plan, prepared.pools)[:].tolist() == [[0, 1]]
    (tmp_path / "pools" / "9.npy").write_bytes(b"half of a fi")
    verify_prepared(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("pools/5.npy", np.arange(3), ["pools/5.npy holds 3 ids, counts.json says 2"]),
        ("pools/5.npy", np.arange(2.0), ["pools/5.npy is no 1-D array of integers"]),
        ("pools/5.npy", np.arange(2)[:, None], ["pools/5.npy is no 1-D array of integers"]),
        ("pools/5.npy", np.array([{}, {}]), ["pools/5.npy cannot be read", "objects"]),
        ("pools/5.npy", b"", ["pools/5.npy cannot be read"]),
        ("pools/5.npy", None, ["pools/5.npy cannot be read"]),
        ("counts.json", b"{", ["counts.json cannot be read"]),
        ("counts.json", None, ["counts.json cannot be read"]),
        ("counts.json", b"[]", ["counts.json cannot be read"]),
        ("counts.json", b'{"5": 2.5}', ["does not fit together"]),
        ("counts.json", b'{"five": 2}', ["counts.json cannot be read"]),
        ("counts.json", b'{"5": 3, "3": 1, "9": 1}', ["the plan has 2 slots of length 5 for 3"]),
        ("templates.json", b"{}", ["slots of length"]),
        ("templates.json", b"[[5, 2]]", ["templates.json cannot be read"]),
        ("templates.json", b"[[[5, 5, 5], 1]]", ["holds 15 tokens of 10"]),
        ("templates.json", None, ["templates.json cannot be read"]),
        ("manifest.json", b'{"packer": "batched"}', ["max_seq_len = None"]),
        (
            "manifest.json",
            b'{"packer": "batched", "max_seq_len": 10, "n_sequences": 5}',
            ["manifest.json has n_sequences = 5, the files have 4"],
        ),
    ],
)
def test_a_damaged_directory_of_the_seed_is_refused(name, data, words, tmp_path):
    write_as_seed(tmp_path, [5, 5, 3, 9], 10)
    if data is None:
        (tmp_path / name).unlink()
    elif isinstance(data, bytes):
        (tmp_path / name).write_bytes(data)
    else:
        np.save(tmp_path / name, data, allow_pickle=True)
    with refused(*words):
        load_prepared(tmp_path)


def test_verify_finds_ids_that_the_seed_has_twice(tmp_path):
    write_as_seed(tmp_path, [5, 5, 3, 9], 10, [4, 8, 8, 1])
    with refused_by_verify("the id 8 is there twice"):
        verify_prepared(tmp_path)


def test_ids_of_the_seed_beyond_int64(tmp_path):
    write_as_seed(tmp_path, [5, 5, 3, 9], 10)
    np.save(tmp_path / "pools" / "5.npy", np.array([1, 2**63 + 5], np.uint64))
    with refused(f"pools/5.npy holds the id {2**63 + 5}, beyond int64"):
        load_prepared(tmp_path)


def test_the_counts_of_the_seed_are_pickled_once(tmp_path):
    write_as_seed(tmp_path, [8000, 5], 8192)
    prepared = load_prepared(tmp_path)
    assert prepared.counts.nbytes > 64_000
    assert len(pickle.dumps(prepared)) < 4_000
    assert everything(pickle.loads(pickle.dumps(prepared))) == everything(prepared)


# --- pickled, and replaced ------------------------------------------------------------------


def test_a_replaced_directory_is_not_unpickled(folder, tmp_path):
    prepared = load_prepared(folder)
    pickled = pickle.dumps(prepared)
    source = write_lengths(tmp_path / "in", LENGTHS[::-1])
    new = prepare(source, folder, 30, length_column="length", overwrite=True)
    digests = new.manifest["digest"], prepared.manifest["digest"]
    with refused(f"manifest.json has the digest {digests[0]}, but {digests[1]} was pickled"):
        pickle.loads(pickled)
    (folder / "manifest.json").write_text("[]")
    with refused("has the digest none"):
        pickle.loads(pickled)
    shutil.rmtree(folder)
    with refused("manifest.json cannot be read (No such file"):
        pickle.loads(pickled)


# --- paths, caches, open files --------------------------------------------------------------


@pytest.mark.parametrize("path", [3, None, b"out", ["out"]])
def test_what_is_no_path(path):
    for load, check in ((load_prepared, refused), (verify_prepared, refused_by_verify)):
        with check(f"path is a {type(path).__name__}"):
            load(path)
        with check("holds a null character"):
            load("a\0b")


@pytest.mark.parametrize("damage", ["missing", "shorter", "more"])
def test_a_damaged_copy_is_made_anew(damage, original, remote, tmp_path):
    load_prepared("memory://data", cache=tmp_path)
    cached = tmp_path / read_manifest(original)["digest"]
    path = cached / "pools" / "00001.ids.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (cached / "pools" / "mine").touch()
    prepared = load_prepared("memory://data", cache=tmp_path)
    assert everything(prepared) == everything(load_prepared(original))
    assert content(cached) == content(original)


MANY = """
import pickle, resource, sys
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
from seqpack_jax import SeqpackError, load_prepared
try:
    prepared = load_prepared(sys.argv[1])
except SeqpackError as error:
    print(error)
else:
    pickled = pickle.dumps(prepared)
    del prepared
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    print(pickle.loads(pickled).manifest["n_sequences" if hard % 2 else "sequences"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [False, True])
def test_more_files_than_may_be_open(seed, tmp_path):
    lengths = list(range(1, 201))
    if seed:
        write_as_seed(tmp_path / "out", lengths, 200)
    else:
        prepare_in_shards(write_lengths(tmp_path / "in", lengths), tmp_path / "out", 200)

    def run(hard):
        command = [sys.executable, "-c", MANY, str(tmp_path / "out"), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run(1000 + seed) == "200\n"
    assert "(Too many open files). Hint: raise `ulimit -n`." in run(64)


# --- the command line -------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(original, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["stats", str(original), "--json"]) == 141
    assert capsys.readouterr().err == ""


def test_an_empty_log_level_is_the_default(original, monkeypatch, capsys):
    monkeypatch.setenv("LOGLEVEL", "")
    assert main(["stats", str(original)]) == 0
    assert capsys.readouterr().err == ""


def test_hints_of_the_command_line_name_its_options(tmp_path, capsys):
    np.save(tmp_path / "a.npy", LENGTHS)
    argv = ["prepare", "--input", f"{tmp_path}/a.npy", "--output", f"{tmp_path}/out"]
    assert main([*argv, "--workers", "1", "--max-seq-len", "30"]) == 0
    capsys.readouterr()
    assert main([*argv, "--workers", "1", "--max-seq-len", "31"]) == 2
    assert "or pass --overwrite." in capsys.readouterr().err


def test_a_directory_that_cannot_be_listed(folder):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with mock.patch.object(Path, "iterdir", refuse), refused("out cannot be read (Permission"):
        load_prepared(folder)
