"""Prepare small data sets in many shards, and compare what comes out: what several tests share."""

import json
from functools import partial
from unittest import mock

import numpy as np
import pyarrow as pa
from input_files import write

import seqpack_jax as sp
from seqpack_jax.feeding import preparation
from seqpack_jax.feeding.inputs import list_shards
from seqpack_jax.feeding.manifest import canonical, digest_of
from seqpack_jax.feeding.preparation import prepare


def write_lengths(folder, lengths, ids=None, files=3, **options):
    """Write a column of lengths, and perhaps one of ids, to some parquet files."""
    for number, part in enumerate(np.array_split(np.arange(len(lengths)), files)):
        columns = {} if ids is None else {"key": pa.array([ids[i] for i in part], pa.int64())}
        rows = [lengths[i] for i in part]
        write(f"{folder}/{number}.parquet", rows, **columns, **options)
    return str(folder)


def prepare_in_shards(source, output, capacity, max_rows=5, **options):
    """Prepare in shards of so few rows; a `length_column` is understood for parquet files."""
    small = partial(list_shards, max_rows=max_rows)
    options = {"length_column": "length", **options}
    with mock.patch.object(preparation, "list_shards", small):
        return prepare(source, output, capacity, **options)


def triplets(number, seed=0):
    """So many times three lengths whose sum is 100, in any order; greedy packers miss them."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(26, 38, (2, number))
    lengths = np.concatenate([first, second, 100 - first - second])
    return rng.permutation(lengths)


def content(folder):
    """The bytes of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_same(prepared, counts, plan, pools):
    """Assert that counts, plan, pools and a drawn epoch are equal."""
    assert np.array_equal(prepared.counts, counts)
    assert prepared.plan.digest() == plan.digest()
    assert prepared.plan.certificate == plan.certificate
    assert prepared.plan.tolerance_rows == plan.tolerance_rows
    assert (prepared.pools.over_length, prepared.pools.report) == (pools.over_length, pools.report)
    for length in range(len(counts)):
        assert np.array_equal(prepared.pools[length], pools[length])
    assert (prepared.pools.pieces is None) == (pools.pieces is None)
    if pools.pieces is not None:
        assert prepared.pools.pieces.first_id == pools.pieces.first_id
        assert np.array_equal(prepared.pools.pieces.table[:], pools.pieces.table[:])
    for seed in (None, 3):
        epochs = [sp.materialize_epoch(plan, each, seed) for each in (prepared.pools, pools)]
        assert epochs[0][:].tolist() == epochs[1][:].tolist()


def read_manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def seal(folder, manifest):
    """Write a manifest with the digest that it has to have, as a forger would."""
    manifest["digest"] = digest_of(manifest)
    (folder / "manifest.json").write_text(canonical(manifest))
