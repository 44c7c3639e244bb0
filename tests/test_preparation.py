"""Preparation: what it makes of files is what planning in memory makes, whatever happens to it."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_files import refused, write
from prepared_directories import (
    assert_same,
    content,
    prepare_in_shards,
    read_manifest,
    seal,
    triplets,
    write_lengths,
)
from strategies import algorithms, caps, over_length_packings

import seqpack_jax as sp
from seqpack_jax.feeding import formats, preparation, shards
from seqpack_jax.feeding.inputs import Columns, list_shards, read_shard
from seqpack_jax.feeding.manifest import IdCoding, PreparationParameters
from seqpack_jax.feeding.preparation import merge_shards, prepare
from seqpack_jax.feeding.prepared import load_prepared
from seqpack_jax.feeding.shards import prepare_shard
from seqpack_jax.feeding.storage import entry_of
from seqpack_jax.feeding.verification import verify_prepared
from seqpack_jax.feeding.workers import local_map
from seqpack_jax.planning.over_length import OverLength
from seqpack_jax.planning.plan import Certificate
from seqpack_jax.planning.planners import plan_counts

LENGTHS = [7, 5, 5, 5, 5, 5, 3, 3, 3, 9, 1, 1, 8, 2, 10]

refused = partial(refused, caller="prepare")


# --- the same as in memory ------------------------------------------------------------------


@settings(max_examples=30)
@given(
    packing=over_length_packings(actions=("error", "drop", "truncate", "crop", "split")),
    extra=st.integers(0, 2),
    tolerance=st.integers(1, 4),
    algorithm=algorithms,
    cap=caps,
    files=st.integers(1, 3),
    max_rows=st.integers(1, 40),
)
def test_a_directory_holds_what_planning_in_memory_makes(
    packing, extra, tolerance, algorithm, cap, files, max_rows
):
    lengths, capacity, policy = packing
    if policy.action == "error":
        capacity = max([capacity, *(n + extra for n in lengths)])
    counts, pools = sp.length_histogram_from_lengths(
        lengths, capacity, over_length=policy, extra_tokens=extra
    )
    planning = {"algorithm": algorithm, "max_segments": cap, "tolerance": tolerance}
    plan = sp.pack_length_histogram(counts, capacity, **planning)
    with tempfile.TemporaryDirectory() as folder:
        source = write_lengths(f"{folder}/in", lengths, files=files, row_group_size=4)
        output = f"{folder}/out"
        options = {"over_length": policy, "extra_tokens": extra, **planning}
        prepared = prepare_in_shards(source, output, capacity, max_rows, **options)
        assert_same(prepared, counts, plan, pools)
        assert_same(verify_prepared(output), counts, plan, pools)
        manifest = prepared.manifest
        assert manifest["rows"] == len(lengths)
        assert [shard["rows"] for shard in manifest["shards"]] == [
            shard.rows for shard in list_shards(source, Columns("length"), max_rows=max_rows)
        ]
        assert manifest["sequences"] == plan.num_sequences
        assert manifest["tokens"] == plan.num_tokens == counts @ np.arange(len(counts))
        assert manifest["bins"] == plan.num_bins
        proof = manifest["lower_bound"], manifest["bound_method"], manifest["proved_optimal"]
        assert (plan.num_bins, *proof) == plan.certificate
        assert manifest["report"]["sequences"] == pools.report.sequences
        assert sorted(os.listdir(folder)) == ["in", "out"]


@settings(max_examples=30)
@given(
    packing=over_length_packings(actions=("error", "drop", "truncate", "split")),
    low=st.sampled_from([0, -(2**63), -5, 2**40, 2**62]),
    step=st.sampled_from([1, 3, 2**33]),
    max_rows=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_ids_of_a_column_stand_for_the_rows(packing, low, step, max_rows, seed):
    lengths, capacity, policy = packing
    if policy.action == "error":
        capacity = max([capacity, *lengths])
    ids = low + step * np.random.default_rng(seed).permutation(len(lengths))
    counts, rows = sp.length_histogram_from_lengths(lengths, capacity, over_length=policy)
    first_piece = int(ids.max(initial=-1)) + 1

    def named(row):
        known = [*ids.tolist(), *range(first_piece, first_piece + len(rows.ids))]
        return np.array([known[r] for r in row.tolist()], np.int64)

    pieces = rows.pieces
    if pieces is not None:
        table = pieces.table[:].copy()
        table[:, 0] = ids[table[:, 0]]
        pieces = sp.Pieces(first_piece, table)
    pools = sp.SequencePools(named(rows.ids), rows.starts, pieces, rows.over_length, rows.report)
    plan = sp.pack_length_histogram(counts, capacity)
    with tempfile.TemporaryDirectory() as folder:
        source = write_lengths(f"{folder}/in", lengths, ids)
        options = {"id_column": "key", "over_length": policy}
        prepared = prepare_in_shards(source, f"{folder}/out", capacity, max_rows, **options)
        assert_same(prepared, counts, plan, pools)
        assert_same(verify_prepared(f"{folder}/out"), counts, plan, pools)


def test_ids_take_four_bytes_where_they_lie_close(tmp_path):
    for name, ids, dtype in (
        ("rows", None, "<u4"),
        ("near", [2**60 + i for i in range(15)], "<u4"),
        ("far", [2**33 * i for i in range(15)], "<i8"),
    ):
        source = write_lengths(tmp_path / name, LENGTHS, ids)
        options = {} if ids is None else {"id_column": "key"}
        prepare_in_shards(source, tmp_path / "out", 10, overwrite=True, **options)
        for path in (tmp_path / "out" / "pools").glob("*.ids.npy"):
            assert np.load(path).dtype == np.dtype(dtype)
    npy = list((tmp_path / "out").rglob("*.npy"))
    assert len(npy) == 1 + 2 * 3
    for path in npy:  # other NumPys read the headers that are spelled out here
        assert np.load(path, allow_pickle=False).ndim == 1


@settings(max_examples=30)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 300, 70_000, 70_001, 2**20]), max_size=60),
    block=st.sampled_from([1, 7, 1 << 19]),
    low=st.sampled_from([None, 0, 2**40]),
)
def test_grouping_is_a_stable_sort(lengths, block, low):
    ids = None if low is None else low + np.arange(len(lengths))[::-1]
    array = np.array(lengths, np.int32)
    coding = IdCoding(low or 0, "<u4")
    with mock.patch.object(shards, "_BLOCK", block):
        starts, grouped = shards._group(np.where(array == 2, 0, array), ids, coding)
    places = [i for i in np.argsort(array, kind="stable").tolist() if lengths[i] != 2]
    expected = places if ids is None else [ids[i] - low for i in places]
    assert grouped.tolist() == expected
    assert grouped.dtype == np.uint32
    for length, count in zip(*np.unique(array[array != 2], return_counts=True), strict=True):
        assert starts[length + 1] - starts[length] == count


@pytest.mark.parametrize(
    ("dtype", "longest"), [(np.uint16, 50), (np.uint16, 65_535), (np.int32, 40), (np.int32, 2**21)]
)
def test_grouping_many_is_a_stable_sort(dtype, longest):
    """So many that pyarrow counts lengths instead of comparing them."""
    lengths = np.random.default_rng(0).integers(1, longest + 1, 20_000).astype(dtype)
    with mock.patch.object(shards, "_BLOCK", 3000):
        starts, grouped = shards._group(lengths, None, IdCoding(0, "<u4"))
    assert np.array_equal(grouped, np.argsort(lengths, kind="stable"))
    assert np.array_equal(np.diff(starts), np.bincount(lengths))


def test_lists_and_npy_files_are_measured(tmp_path):
    tokens = pa.array([list(range(n)) for n in LENGTHS])
    table = write(tmp_path / "tokens.parquet", LENGTHS, tokens=tokens)
    np.save(tmp_path / "lengths.npy", np.array(LENGTHS, np.uint8))
    (tmp_path / "letters.fasta").write_text("".join(f">x\n{'M' * n}\n" for n in LENGTHS))
    by_column = prepare(table, tmp_path / "a", 10, length_column="length")
    by_list = prepare(table, tmp_path / "b", 10, tokens_column="tokens")
    by_npy = prepare(tmp_path / "lengths.npy", tmp_path / "c", 10)
    by_fasta = prepare(tmp_path / "letters.fasta", tmp_path / "d", 10)
    for other in (by_list, by_npy, by_fasta):
        assert_same(other, by_column.counts, by_column.plan, by_column.pools)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a", "b", "c", "d"]


def test_no_rows_at_all(tmp_path, caplog):
    source = write_lengths(tmp_path / "in", [])
    prepared = prepare(source, tmp_path / "out", 10, length_column="length")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"no sequences in {source}: the plan is empty"
    assert (prepared.plan.num_bins, prepared.pools.num_sequences) == (0, 0)
    assert prepared.manifest["shards"] == []
    assert len(sp.materialize_epoch(prepared.plan, prepared.pools, 0)) == 0
    verify_prepared(tmp_path / "out")


# --- the same bytes -------------------------------------------------------------------------


def test_bytes_depend_on_neither_place_nor_order_of_the_files(tmp_path):
    for name, order in (("a", (0, 1, 2)), ("deeper/b", (2, 0, 1))):
        for number in order:
            write(f"{tmp_path}/{name}/in/{number}.parquet", LENGTHS[5 * number : 5 * number + 5])
        prepare_in_shards(tmp_path / name / "in", tmp_path / name / "out", 10)
    first = content(tmp_path / "a" / "out")
    assert first == content(tmp_path / "deeper" / "b" / "out")
    assert [b for b in first.values() if str(tmp_path).encode() in b] == []
    assert sorted(first) == [
        "counts.npy",
        "manifest.json",
        *(f"pools/0000{k}.{kind}.npy" for k in range(3) for kind in ("ids", "starts")),
        "templates.npz",
    ]
    shard = json.loads(first["manifest.json"])["shards"][1]
    assert (shard["input"], shard["rows"]) == ([["1.parquet", 0, 5]], 5)


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_workers(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 30, 300)
    source = write_lengths(tmp_path / "in", lengths, lengths.cumsum())
    options = {"id_column": "key", "over_length": OverLength("split", overlap=2), "max_rows": 40}
    for workers in (1, 2, 3):
        output = tmp_path / str(workers)
        prepare_in_shards(source, output, 16, workers=workers, **options)
        assert content(output) == content(tmp_path / "1")


def test_any_map_will_do(tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)

    def backwards(function, shards):
        return (function(shard) for shard in reversed(shards))

    prepare_in_shards(source, tmp_path / "a", 10)
    prepare_in_shards(source, tmp_path / "b", 10, map_shards=backwards)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_shards_by_hand(tmp_path):
    """As users of Spark or Beam do it."""
    source = write_lengths(tmp_path / "in", LENGTHS)
    parameters = PreparationParameters(10, Columns(length="length"), OverLength("drop"))
    listed = list_shards(source, parameters.columns, max_rows=5)
    records = [prepare_shard(shard, parameters, tmp_path / "work") for shard in listed]
    (tmp_path / "work" / "mine").touch()
    merge = partial(merge_shards, tmp_path / "work", listed, parameters=parameters)
    with refused("shard 1 is missing"):
        merge([records[0], records[2]], output=tmp_path / "a")
    with refused("shard 0 is there twice"):
        merge([records[0], records[1], records[0]], output=tmp_path / "a")
    with refused("shard 0 was prepared with other parameters"):
        other = parameters._replace(extra_tokens=1)
        merge_shards(tmp_path / "work", listed, records, other, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    merge(records[::-1], output=tmp_path / "a")
    prepare_in_shards(source, tmp_path / "b", 10, over_length="drop")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["mine"]


# --- optimal plans --------------------------------------------------------------------------

OPTIMAL = {"algorithm": "optimal", "budget": 2}


@pytest.fixture
def hard(tmp_path):
    """A file of 300 lengths for which best fit decreasing does not find the 100 rows."""
    np.save(tmp_path / "hard.npy", triplets(100))
    return str(tmp_path / "hard.npy")


def test_an_optimal_plan_is_saved_with_its_certificate(hard, tmp_path):
    greedy = prepare(hard, tmp_path / "greedy", 100)
    prepared = prepare(hard, tmp_path / "out", 100, **OPTIMAL)
    assert greedy.plan.certificate.lower_bound == 100
    assert 100 <= prepared.plan.num_bins < greedy.plan.num_bins
    counts, pools = sp.length_histogram_from_lengths(triplets(100), 100)
    plan = sp.pack_length_histogram(counts, 100, **OPTIMAL)
    for found in (prepared, load_prepared(tmp_path / "out"), verify_prepared(tmp_path / "out")):
        assert_same(found, counts, plan, pools)
        certificate, manifest = found.plan.certificate, found.manifest
        assert certificate.bins == manifest["bins"] == plan.num_bins
        assert certificate.lower_bound == manifest["lower_bound"] == 100
        assert certificate.method == manifest["bound_method"] == "volume"
        assert certificate.proved_optimal is manifest["proved_optimal"] is (plan.num_bins == 100)


def test_an_optimal_plan_gives_epochs_as_any_other(hard, tmp_path):
    prepared = prepare(hard, tmp_path / "out", 100, **OPTIMAL)
    lengths = triplets(100)
    drawn = []
    for epoch in range(2):
        rows = sp.materialize_epoch(prepared.plan, prepared.pools, 3, epoch=epoch)[:].tolist()
        assert sorted(row for held in rows for row in held) == list(range(300))
        assert max(lengths[held].sum() for held in rows) <= 100
        drawn.append(rows)
    assert drawn[0] != drawn[1]


@pytest.mark.slow
def test_bytes_of_an_optimal_plan_do_not_depend_on_the_workers(hard, tmp_path):
    for workers in (1, 2):
        options = {"length_column": None, "workers": workers, **OPTIMAL}
        prepare_in_shards(hard, tmp_path / str(workers), 100, 40, **options)
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_what_ends_the_search_is_a_parameter_of_the_plan(hard, tmp_path):
    for options in ({}, {"budget": 2}, {"time_limit": 60}, {"budget": 2.5, "time_limit": 60.5}):
        output = tmp_path / "-".join(["out", *options])
        saved = prepare(hard, output, 100, algorithm="optimal", **options).manifest["parameters"]
        names = ("algorithm", "budget", "time_limit")
        assert {name: saved[name] for name in names if name in saved} == {
            "algorithm": "optimal",
            **options,
        }
        found = PreparationParameters.from_dict("test", saved)
        assert found == PreparationParameters(100, algorithm="optimal", **options).checked("test")
        assert found.for_shards() == PreparationParameters(100).checked("test").for_shards()
        assert found.to_dict() == saved
        for changed in ({"budget": 2.25}, {"time_limit": 61}):
            with refused("was prepared with other parameters", "overwrite=True"):
                prepare(hard, output, 100, algorithm="optimal", **options | changed)


def test_parameters_are_saved_as_before_there_were_optimal_plans():
    """So directories of earlier releases have the same parameters, and shards the same keys."""
    assert list(PreparationParameters(10).to_dict()) == [
        "max_seq_len",
        "length_column",
        "tokens_column",
        "id_column",
        "over_length",
        "extra_tokens",
        "algorithm",
        "max_segments",
        "tolerance",
    ]


def test_progress_and_limits_reach_the_planner(hard, tmp_path):
    seen = []

    def note(*args):
        seen.append((args[0], args[3], args[-1]))
        return plan_counts(*args[:3], "best_fit_decreasing", *args[4:6])

    options = {"algorithm": "optimal", "budget": 3, "time_limit": 4.5}
    with mock.patch.object(preparation, "plan_counts", note):
        prepare(hard, tmp_path / "a", 100, **options, progress=False)
        prepare(hard, tmp_path / "b", 100)
    assert seen == [
        ("prepare", "optimal", (3.0, 4.5, False)),
        ("prepare", "best_fit_decreasing", (None, None, None)),
    ]


def test_a_search_is_not_repeated_where_it_would_end_elsewhere(hard, tmp_path):
    """A time limit ends it at another plan each time: that of the first call stays."""
    options = {**OPTIMAL, "time_limit": 60}
    first = prepare(hard, tmp_path / "out", 100, **options)
    before = content(tmp_path / "out")
    inode = (tmp_path / "out").stat().st_ino

    def too_late(caller, counts, max_seq_len, *args):
        return plan_counts(caller, counts, max_seq_len, "worst_fit_decreasing", None, 1)

    with mock.patch.object(preparation, "plan_counts", too_late):
        again = prepare(hard, tmp_path / "out", 100, **options)
        assert again.plan.digest() == first.plan.digest()
        assert content(tmp_path / "out") == before
        assert (tmp_path / "out").stat().st_ino == inode
        replaced = prepare(hard, tmp_path / "out", 100, **options, overwrite=True)
    assert replaced.plan.num_bins > first.plan.num_bins
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard.npy", "out"]
    np.save(hard, triplets(100)[::-1])  # as many rows of the same lengths: other data
    with refused("out holds another data set", "overwrite=True"):
        prepare(hard, tmp_path / "out", 100, **options)


def as_before(folder):
    """Make a directory one of an earlier release: it knew of the volume alone."""
    manifest = read_manifest(folder)
    plan = load_prepared(folder).plan
    volume = -(-plan.num_tokens // plan.max_seq_len)
    proof = Certificate(plan.num_bins, volume, "volume", volume == plan.num_bins)
    replace(plan, certificate=proof).save(folder / "templates.npz")
    manifest["files"]["templates.npz"] = entry_of("test", folder / "templates.npz")._asdict()
    manifest["lower_bound"] = volume
    del manifest["bound_method"], manifest["proved_optimal"]
    seal(folder, manifest)


def test_a_directory_of_an_earlier_release_is_read_and_stays(tmp_path):
    np.save(tmp_path / "in.npy", [6, 6, 6, 1])
    prepared = prepare(tmp_path / "in.npy", tmp_path / "out", 10)
    assert prepared.manifest["bound_method"] == "Martello-Toth L2"
    as_before(tmp_path / "out")
    before = content(tmp_path / "out")
    for found in (
        load_prepared(tmp_path / "out"),
        verify_prepared(tmp_path / "out"),
        prepare(tmp_path / "in.npy", tmp_path / "out", 10),
    ):
        assert found.plan.digest() == prepared.plan.digest()
        assert found.plan.certificate == Certificate(3, 2, "volume", proved_optimal=False)
        assert "proved_optimal" not in found.manifest
    assert content(tmp_path / "out") == before


def test_without_highspy(hard, tmp_path, monkeypatch):
    """No work is done that could not be finished; what is finished can be read."""
    prepare(hard, tmp_path / "out", 100, **OPTIMAL)
    before = content(tmp_path / "out")
    listed = list_shards(hard)
    parameters = PreparationParameters(100, algorithm="optimal")
    records = [prepare_shard(shard, parameters, tmp_path / "work") for shard in listed]
    work = content(tmp_path / "work")
    monkeypatch.setitem(sys.modules, "highspy", None)
    words = "the package highspy", "Hint: pip install 'seqpack_jax[optimal]'"
    with mock.patch.object(preparation, "list_shards", side_effect=AssertionError("was read")):
        for output in ("out", "new"):
            with refused(*words):
                prepare(hard, tmp_path / output, 100, **OPTIMAL)
    with refused(*words):
        merge_shards(tmp_path / "work", listed, records, parameters, tmp_path / "new")
    assert content(tmp_path / "work") == work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard.npy", "out", "work"]
    # Workers need it as little as readers do.
    assert [prepare_shard(shard, parameters, tmp_path / "work") for shard in listed] == records
    assert load_prepared(tmp_path / "out").manifest["parameters"]["algorithm"] == "optimal"
    verify_prepared(tmp_path / "out")
    assert content(tmp_path / "out") == before


# --- interrupted ----------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def stop_after(number):
    """A map that prepares so many shards and breaks down."""

    def map_shards(function, shards):
        for shard in shards[:number]:
            yield function(shard)
        raise Interrupted

    return map_shards


def reading(read):
    """Note the numbers of the shards that are read."""

    def note(shard, columns):
        read.append(shard.number)
        return read_shard(shard, columns)

    return mock.patch.object(shards, "read_shard", note)


@pytest.fixture
def interrupted(tmp_path):
    """Input of three shards, whose preparation broke down after two, and the expected bytes."""
    source = write_lengths(tmp_path / "in", LENGTHS)
    prepare_in_shards(source, tmp_path / "undisturbed", 10)
    with pytest.raises(Interrupted):
        prepare_in_shards(source, tmp_path / "out", 10, map_shards=stop_after(2))
    assert not (tmp_path / "out").exists()
    return source


def continue_in(tmp_path, source, capacity=10, **options):
    """Prepare again; return which shards were read."""
    read = []
    with reading(read):
        prepare_in_shards(source, tmp_path / "out", capacity, **options)
    assert not (tmp_path / ".out.partial").exists()
    return read


def test_finished_shards_are_kept(interrupted, tmp_path):
    assert continue_in(tmp_path, interrupted, **OPTIMAL, time_limit=60) == [2]
    assert load_prepared(tmp_path / "out").manifest["parameters"]["budget"] == 2
    assert continue_in(tmp_path, interrupted, overwrite=True) == [0, 1, 2]
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("options", [{"extra_tokens": 1}, {"over_length": "drop"}])
def test_shards_of_other_parameters_are_made_again(options, interrupted, tmp_path):
    assert continue_in(tmp_path, interrupted, 11, **options) == [0, 1, 2]
    prepare_in_shards(interrupted, tmp_path / "new", 11, **options)
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_shards_of_changed_files_are_made_again(interrupted, tmp_path):
    write(f"{interrupted}/1.parquet", [4, 4, 4, 4, 4])
    assert continue_in(tmp_path, interrupted) == [1, 2]
    prepare_in_shards(interrupted, tmp_path / "new", 10)
    assert content(tmp_path / "out") == content(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("data/pools/00001.ids.npy", lambda data: data[:-1]),
        ("data/pools/00001.starts.npy", lambda data: data[:-1] + b"\1"),
        ("data/pools/00001.ids.npy", None),
        ("records/00001.json", lambda data: data[:-9]),
        ("records/00001.json", lambda data: b"[]"),
        ("records/00001.json", lambda data: b"{}"),
        ("records/00001.json", lambda data: b"\xff"),
        ("records/00001.json", lambda data: data.replace(b'"rows": 5', b'"rows": "5"')),
        ("records/00001.json", lambda data: data.replace(b'"number": 1', b'"number": 0')),
    ],
)
def test_damaged_work_is_made_again(name, damage, interrupted, tmp_path):
    path = tmp_path / ".out.partial" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    assert 1 in continue_in(tmp_path, interrupted)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_nothing_of_earlier_runs_gets_in(interrupted, tmp_path):
    pools = tmp_path / ".out.partial" / "data" / "pools"
    (pools / "00000.pieces.npy").write_bytes(b"of a run that split")
    (pools / "00007.ids.npy").write_bytes(b"of a run with more shards")
    (pools / "00000.ids.npy.1234.tmp").write_bytes(b"half a fi")
    continue_in(tmp_path, interrupted)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_failure_without_results_leaves_nothing(tmp_path):
    source = write_lengths(tmp_path / "in", [0, 1], files=1)
    with refused("row 0"):
        prepare(source, tmp_path / "out", 10, length_column="length")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_failed_run_is_over_before_another_begins(tmp_path):
    """What the next run has written must not go with what the failed one leaves."""
    bad = write_lengths(tmp_path / "bad", [11], files=1)
    good = write_lengths(tmp_path / "good", LENGTHS)
    removed = []

    def rmtree(path, *args, **options):
        with refused("another run is preparing"):
            prepare_in_shards(good, tmp_path / "out", 10)
        removed.append(path.name)
        remove(path, *args, **options)

    remove = shutil.rmtree
    with mock.patch.object(shutil, "rmtree", rmtree), refused("row 0"):
        prepare_in_shards(bad, tmp_path / "out", 10)
    assert "data" in removed
    prepare_in_shards(good, tmp_path / "out", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "out"]


def test_a_lock_of_a_run_that_just_ended_is_none(tmp_path):
    """It waited for a file that was removed meanwhile: others may hold the new one."""
    source = write_lengths(tmp_path / "in", LENGTHS)

    @contextmanager
    def removed(caller, path, busy):
        yield

    with mock.patch.object(preparation, "file_lock", removed), refused("another run is preparing"):
        prepare_in_shards(source, tmp_path / "out", 10)
    assert not (tmp_path / "out").exists()


def test_counted_fasta_files_are_not_counted_again(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMKV\n>b\nM\n")
    with refused("has length 3"):
        prepare(path, tmp_path / "out", 2)
    with mock.patch.object(formats, "_fasta_records", side_effect=AssertionError("was read")):
        prepare(path, tmp_path / "out", 3)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.fasta", "out"]


def test_only_one_run_at_a_time(interrupted, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".out.partial" / "lock"), refused("another run is preparing", "out"):
        prepare_in_shards(interrupted, tmp_path / "out", 10)
    assert continue_in(tmp_path, interrupted) == [2]


# --- what is at the output ------------------------------------------------------------------


@pytest.fixture
def there(tmp_path):
    """Input, and its prepared directory at `out`."""
    source = write_lengths(tmp_path / "in", LENGTHS)
    prepare_in_shards(source, tmp_path / "out", 10)
    return source


def test_the_same_again_changes_nothing(there, tmp_path):
    before = content(tmp_path / "out")
    inode = (tmp_path / "out").stat().st_ino
    assert continue_in(tmp_path, there) == [0, 1, 2]
    assert content(tmp_path / "out") == before
    assert (tmp_path / "out").stat().st_ino == inode


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 11},
        {"algorithm": "worst_fit_decreasing"},
        {"algorithm": "optimal"},
        {"over_length": "drop"},
        {"tolerance": 2},
        {"max_segments": 3},
    ],
)
def test_a_directory_of_other_parameters_is_not_replaced(options, there, tmp_path):
    before = content(tmp_path / "out")
    capacity = options.pop("capacity", 10)
    with mock.patch.object(shards, "read_shard", side_effect=AssertionError("was read")):
        with refused("out was prepared with other parameters", "overwrite=True"):
            prepare_in_shards(there, tmp_path / "out", capacity, **options)
    assert content(tmp_path / "out") == before
    assert not (tmp_path / ".out.partial").exists()
    prepare_in_shards(there, tmp_path / "out", capacity, **options, overwrite=True)
    assert content(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_directory_of_another_input_is_not_replaced(there, tmp_path):
    write(f"{there}/3.parquet", [4])
    with mock.patch.object(shards, "read_shard", side_effect=AssertionError("was read")):
        with refused("out was prepared from another input", "overwrite=True"):
            prepare_in_shards(there, tmp_path / "out", 10)
    os.unlink(f"{there}/3.parquet")
    write(f"{there}/2.parquet", [4, 4, 4, 4, 4])
    before = content(tmp_path / "out")
    with refused("out holds another data set", "overwrite=True"):
        prepare_in_shards(there, tmp_path / "out", 10)
    assert content(tmp_path / "out") == before
    assert continue_in(tmp_path, there, overwrite=True) == []  # its shards were kept


def test_a_damaged_directory_is_not_taken_for_the_result(there, tmp_path):
    path = tmp_path / "out" / "counts.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with refused("out is damaged", "counts.npy has 215 bytes, not 216", "overwrite=True"):
        prepare_in_shards(there, tmp_path / "out", 10)
    prepare_in_shards(there, tmp_path / "out", 10, overwrite=True)
    verify_prepared(tmp_path / "out")


def test_nothing_else_is_replaced(there, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "empty").mkdir()
    for name in ("home", "file"):
        with refused(f"{name} exists and is no prepared directory"):
            prepare_in_shards(there, tmp_path / name, 10, overwrite=True)
    with refused("s3://bucket/out is no local path"):
        prepare_in_shards(there, "s3://bucket/out", 10)
    with refused("cannot be made"):
        prepare_in_shards(there, tmp_path / "file" / "out", 10)
    prepare_in_shards(there, tmp_path / "empty", 10)
    assert content(tmp_path / "empty") == content(tmp_path / "out")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_files_of_others_are_not_deleted(there, tmp_path):
    out = tmp_path / "out"
    for name, is_folder in (("pools/thesis.txt", False), ("pools/new", True), ("my.npy", False)):
        (out / name).mkdir() if is_folder else (out / name).write_text("dear")
        for overwrite in (False, True):
            with refused("out exists and is no prepared directory", f"{name} is in it"):
                prepare_in_shards(there, out, 11, overwrite=overwrite)
        (out / name).rmdir() if is_folder else (out / name).unlink()
    manifest = (out / "manifest.json").read_bytes()
    for data in (b"{}", b"\xff", b"[]", None):
        (out / "manifest.json").unlink()
        if data is not None:
            (out / "manifest.json").write_bytes(data)
        with refused("out exists and is no prepared directory", "counts.npy is in it"):
            prepare_in_shards(there, out, 11, overwrite=True)
        (out / "manifest.json").write_bytes(manifest)
    assert not (tmp_path / ".out.partial").exists()
    prepare_in_shards(there, out, 11, overwrite=True)


def test_a_file_that_comes_while_it_is_prepared_is_not_deleted(there, tmp_path):
    def put_a_letter(function, shards):
        yield from map(function, shards)
        (tmp_path / "out" / "letter.txt").write_text("dear")

    with refused("letter.txt is in it"):
        prepare_in_shards(there, tmp_path / "out", 11, overwrite=True, map_shards=put_a_letter)
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


def test_a_directory_of_the_seed_is_replaced(there, tmp_path):
    seed = tmp_path / "seed"
    (seed / "pools").mkdir(parents=True)
    (seed / "manifest.json").write_text('{"packer": "batched"}')
    for name in ("counts.json", "templates.json", "pools/7.npy", "pools/x.npy"):
        (seed / name).touch()
    with refused("pools/x.npy is in it"):
        prepare_in_shards(there, seed, 10, overwrite=True)
    (seed / "pools/x.npy").unlink()
    with refused("seed is damaged", "overwrite=True"):
        prepare_in_shards(there, seed, 10)
    prepare_in_shards(there, seed, 10, overwrite=True)
    assert content(seed) == content(tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in", "in/out"),
        ("in", "in/deep/er"),
        ("in/.", "in/../in/out"),
        ("link", "in/out"),
        ("in", "link/out"),
        (["one.npy", "in"], "in/out"),
        ("in/*", "in/out"),
        ("in/**/*.npy", "in/out"),
        ("in/*/*.npy", "in/out"),
        ("*/*", "in/deep/er"),
        ("file:in", "in/out"),
    ],
)
def test_an_output_among_the_input_is_refused(source, output, tmp_path, monkeypatch):
    np.save(tmp_path / "one.npy", LENGTHS)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    np.save(tmp_path / "in" / "0.npy", LENGTHS)
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    if source == "file:in":
        source = f"file://{tmp_path}/in"
    with refused("the output", "lies in the input", "choose a directory elsewhere"):
        prepare(source, output, 10)
    assert sorted(os.listdir(tmp_path / "in")) == ["0.npy", "deep"]
    for elsewhere in ("out", "in/_out", "inner"):
        prepare("in", elsewhere, 10)
        prepare("in/*.npy", elsewhere, 10)
    prepare("in/*.npy", "in/beside", 10)
    prepare("in/0.npy", "in/beside", 10)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (None, "output = None is not a path"),
        (b"out", "output = b'out' is not a path"),
        ("", "output = '' is not a path"),
        ("a\0b", "is not a path"),
        ("/", "the output / cannot be replaced"),
        ("dangling", "dangling is a link to nothing"),
        ("x" * 300, "File name too long"),
        ("in/0.parquet/out", "lies in the input"),
    ],
)
def test_outputs_that_are_none(output, words, tmp_path, monkeypatch):
    write_lengths(tmp_path / "in", LENGTHS, files=1)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    with refused(words):
        prepare("in/*.parquet", output, 10, length_column="length")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "in"]


@pytest.mark.parametrize("source", ["", [""], ["in", ""]])
def test_an_empty_name_is_no_input(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    with refused("input = '' is not a path"):
        prepare(source, "out", 10)


@pytest.mark.parametrize("output", ["rows", "pools/rows", "a/b"])
def test_nothing_is_put_into_a_prepared_directory(output, there, tmp_path):
    other = write_lengths(tmp_path / "other", LENGTHS)
    before = sorted(tmp_path.rglob("*"))
    with refused("lies in the prepared directory", "nothing may be added to what is prepared"):
        prepare(other, tmp_path / "out" / output, 10, length_column="length")
    assert sorted(tmp_path.rglob("*")) == before
    verify_prepared(tmp_path / "out")


def test_the_first_other_parameter_is_named(tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)
    prepare(source, tmp_path / "out", 10, length_column="length", over_length="drop")
    for options, words in [
        ({"max_seq_len": 12, "tolerance": 2}, "(max_seq_len = 10, not 12)"),
        ({"over_length": "crop"}, "(over_length: action = 'drop', not 'crop')"),
        ({"algorithm": "optimal", "budget": 3}, "(algorithm = 'best_fit_decreasing', not 'opt"),
    ]:
        options = {"max_seq_len": 10, "over_length": "drop", **options}
        with refused("was prepared with other parameters", words):
            prepare(source, tmp_path / "out", length_column="length", **options)


def test_without_filelock_nothing_is_left(tmp_path, monkeypatch):
    source = write_lengths(tmp_path / "in", LENGTHS)
    monkeypatch.setitem(sys.modules, "filelock", None)
    with refused("filelock is not installed", "seqpack_jax[prepare]"):
        prepare(source, tmp_path / "out", 10, length_column="length")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "make room, and run it again"),
        (errno.EACCES, "choose another path, or change its rights"),
    ],
)
def test_hints_fit_what_the_file_system_says(number, words, tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)
    error = OSError(number, os.strerror(number))
    with mock.patch.object(Path, "mkdir", side_effect=error):
        with refused("cannot be made", os.strerror(number), words):
            prepare(source, tmp_path / "out", 10, length_column="length")


@pytest.mark.parametrize("name", ["lock", "out"])
def test_an_output_without_rights(name, tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)
    (tmp_path / "out").mkdir()
    open_, iterdir = os.open, Path.iterdir

    def refuse(path, *args, **options):
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied", str(path))
        return (iterdir if isinstance(path, Path) else open_)(path, *args, **options)

    with mock.patch.object(os, "open", refuse), mock.patch.object(Path, "iterdir", refuse):
        with refused(name, "Permission denied"):
            prepare_in_shards(source, tmp_path / "out", 10)


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    source = write_lengths(tmp_path / "in", LENGTHS)
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_in_shards(source, "~/out", 10)
    assert content(tmp_path / "out")
    assert load_prepared("~/out").plan.max_seq_len == 10


def test_a_link_is_followed(there, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").rename(tmp_path / "disk" / "out")
    (tmp_path / "out").symlink_to("disk/out")
    prepare_in_shards(there, tmp_path / "out", 11, overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert load_prepared(tmp_path / "out").plan.max_seq_len == 11


def test_a_kill_between_the_two_renames_of_an_overwrite(there, tmp_path):
    rename = Path.rename

    def break_down(path, target):
        if path.name == "data":
            raise Interrupted
        return rename(path, target)

    with mock.patch.object(Path, "rename", break_down), pytest.raises(Interrupted):
        prepare_in_shards(there, tmp_path / "out", 11, overwrite=True)
    assert not (tmp_path / "out").exists()
    assert continue_in(tmp_path, there, 11) == []
    assert load_prepared(tmp_path / "out").plan.max_seq_len == 11


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "kind", "options", "words"),
    [
        ([4, 4, 0, 4], None, {}, ["row 7 (row 2 of 1.parquet) has length 0", "at least 1"]),
        ([4, -3, 4, -1], None, {}, ["row 6 (row 1 of 1.parquet) has length -3", "(2 of the 4"]),
        ([4, 4, 4, 11], None, {}, ["row 8 (row 3 of 1.parquet) has length 11", "is 10 (1 of the"]),
        ([9], None, {"extra_tokens": 2}, ["row 5", "length 9 and 2 extra tokens", "is 10"]),
        ([0], None, {"extra_tokens": 2, "over_length": "drop"}, ["row 5", "has length 0"]),
        ([2**31], pa.int64(), {"over_length": "drop"}, ["row 5", f"at most {2**31 - 1}"]),
        ([4, None], None, {}, ["null", "row 6 (row 1 of 1.parquet)"]),
        ([2.5], pa.float64(), {}, ["1.parquet", "double"]),
        (["4"], pa.string(), {}, ["1.parquet", "string"]),
    ],
)
def test_bad_lengths(lengths, kind, options, words, tmp_path):
    write(tmp_path / "in" / "0.parquet", [1, 2, 3, 4, 5])
    write(tmp_path / "in" / "1.parquet", lengths, kind=kind)
    with refused(*words):
        prepare(tmp_path / "in", tmp_path / "out", 10, length_column="length", **options)
    assert not (tmp_path / "out").exists()


def test_over_length_names_the_policies(tmp_path):
    source = write_lengths(tmp_path / "in", [4, 700, 20], files=1)
    with refused() as caught:
        prepare(source, tmp_path / "out", 512, length_column="length")
    assert str(caught.value) == (
        "prepare: row 1 (row 1 of 0.parquet) has length 700, but max_seq_len is 512 (1 of the 3 "
        "rows from 0 on are wrong). Hint: pass over_length='drop', 'truncate', 'crop' or 'split', "
        "or raise max_seq_len."
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_seq_len": 0}, "max_seq_len = 0"),
        ({"max_seq_len": 2.5}, "max_seq_len = 2.5"),
        (
            {"algorithm": "next_fit"},
            "best_fit_decreasing, first_fit_decreasing, worst_fit_decreasing, optimal",
        ),
        ({"budget": 5}, "budget = 5 with algorithm = 'best_fit_decreasing'"),
        ({"time_limit": 5}, "time_limit = 5 with algorithm = 'best_fit_decreasing'"),
        ({"algorithm": "optimal", "budget": 0}, "budget = 0, but it must be above 0"),
        ({"algorithm": "optimal", "budget": "5"}, "budget = '5' is not a number"),
        ({"algorithm": "optimal", "time_limit": -1.5}, "time_limit = -1.5, but it must be"),
        ({"algorithm": "optimal", "time_limit": float("nan")}, "time_limit = nan"),
        ({"algorithm": "optimal", "time_limit": float("inf")}, "time_limit = inf"),
        ({"max_segments": 0}, "max_segments = 0"),
        ({"over_length": "ignore"}, "over_length = 'ignore'"),
        ({"over_length": OverLength("split", overlap=10)}, "overlap = 10"),
        ({"tolerance": 0}, "tolerance = 0"),
        ({"extra_tokens": -1}, "extra_tokens = -1"),
        ({"workers": 0}, "workers = 0"),
        ({"length_column": None}, "but neither"),
        ({"length_column": 5}, "length_column = 5"),
        ({"length_column": "size"}, "no column 'size'"),
        ({"tokens_column": "tokens"}, "but both"),
        ({"id_column": "key"}, "no column 'key'"),
    ],
)
def test_bad_arguments(options, words, tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)
    options = {"max_seq_len": 10, "length_column": "length", **options}
    with refused(words):
        prepare(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_ids_that_begin_anew_in_every_file(tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS, [0, 1, 2, 3, 4] * 3)
    with refused("some ids are there twice: 15 rows have ids from 0 to 4"):
        prepare(source, tmp_path / "out", 10, length_column="length", id_column="key")


def test_ids_of_pieces_need_room(tmp_path):
    source = write_lengths(tmp_path / "in", [9, 9], [0, 2**63 - 2], files=1)
    options = {"length_column": "length", "id_column": "key", "over_length": "split"}
    with refused("no room for 6 pieces"):
        prepare(source, tmp_path / "out", 4, **options)
    prepare(source, tmp_path / "out", 9, **options)


# --- workers --------------------------------------------------------------------------------


def refuse_the_third(number):
    if number == 3:
        raise sp.SeqpackError("docs: shard 3 is bad. Hint: mend it.")
    return number


def die_unless(pid, number):
    if os.getpid() != pid:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(0.05)
    return number


@pytest.mark.slow
def test_errors_of_workers_are_those_of_this_process():
    for workers in (1, 2, 3):
        with pytest.raises(sp.SeqpackError, match=r"^docs: shard 3 is bad. Hint: mend it.$"):
            list(local_map(workers)(refuse_the_third, range(5)))
        assert sorted(local_map(workers)(refuse_the_third, [1, 2, 4])) == [1, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_a_worker_that_dies_is_an_error(workers):
    die = partial(die_unless, os.getpid())
    with refused("a worker process died", "finished shards are kept", caller="local_map"):
        list(local_map(workers)(die, range(8)))


def ignores_ctrl_c(number):
    threading.Event().wait(0.05)
    return os.getpid(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.slow
def test_processes_are_started_while_ctrl_c_is_ignored(monkeypatch):
    seen = []
    spawn = multiprocessing.get_context("spawn").Process.start

    def start(process):
        seen.append(signal.getsignal(signal.SIGINT))
        spawn(process)

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", start)
    before = signal.getsignal(signal.SIGINT)
    found = dict(local_map(3)(ignores_ctrl_c, range(40)))
    assert seen == [signal.SIG_IGN] * 2
    assert signal.getsignal(signal.SIGINT) == before != signal.SIG_IGN
    assert found.pop(os.getpid()) is False
    assert set(found.values()) <= {True}


# --- what is said ---------------------------------------------------------------------------


def test_it_logs_and_is_quiet_otherwise(tmp_path, caplog, capsys):
    source = write_lengths(tmp_path / "in", LENGTHS)
    with caplog.at_level(logging.INFO, "seqpack_jax"):
        prepare_in_shards(source, tmp_path / "out", 10)
    assert [record.getMessage() for record in caplog.records] == [
        "preparing rows: 15, shards: 3",
        f"wrote {tmp_path / 'out'}: 8 rows, 90.00% full",
    ]
    assert capsys.readouterr() == ("", "")
    caplog.clear()
    with caplog.at_level(logging.INFO, "seqpack_jax"):
        prepare_in_shards(source, tmp_path / "out", 10)
    assert caplog.records[-1].getMessage() == f"{tmp_path / 'out'} is there already"
    prepare_in_shards(source, tmp_path / "out", 10, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "15/15" in printed.err
