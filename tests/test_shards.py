"""One shard: its memory, its room on disk; and that no shard is lost when they are put together."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from input_files import refused
from prepared_directories import content, prepare_in_shards, write_lengths

from seqpack_jax.errors import SeqpackError
from seqpack_jax.feeding import shards, verification
from seqpack_jax.feeding.inputs import Columns, list_shards
from seqpack_jax.feeding.manifest import IdCoding, PreparationParameters
from seqpack_jax.feeding.preparation import merge_shards, prepare
from seqpack_jax.feeding.shards import prepare_shard
from seqpack_jax.feeding.verification import verify_prepared
from seqpack_jax.planning.over_length import OverLength

LENGTHS = [7, 5, 5, 19, 5, 5, 3, 3, 30, 9, 1, 1, 8, 2, 10]
KEYS = [100 - 3 * i for i in range(15)]


def peak_of(function, *args):
    """The most bytes that a call holds at once."""
    tracemalloc.start()
    try:
        function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- pieces, part by part -------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 2])
def test_pieces_are_cut_part_by_part(extra, tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS, KEYS)
    policy = OverLength("split", overlap=3)
    options = {"id_column": "key", "over_length": policy, "extra_tokens": extra}
    prepare_in_shards(source, tmp_path / "all", 10, 15, **options)
    for most in (1, 3, 6):
        with mock.patch.object(shards, "_PIECES", most):
            prepare_in_shards(source, tmp_path / str(most), 10, 15, **options)
        assert content(tmp_path / str(most)) == content(tmp_path / "all")
        with mock.patch.object(verification, "_BLOCK", most):
            verify_prepared(tmp_path / "all")


def test_the_memory_of_pieces(tmp_path):
    """Two million of them."""
    np.save(tmp_path / "lengths.npy", np.full(40_000, 5000, np.int32))
    parameters = PreparationParameters(100, over_length=OverLength("split"))
    listed = list_shards(tmp_path / "lengths.npy")
    with mock.patch.multiple(shards, _PIECES=1 << 16, _BLOCK=1 << 16):
        peak = peak_of(prepare_shard, listed[0], parameters, tmp_path / "work")
    assert peak < 40e6  # 12 bytes each, and the blocks
    records = [prepare_shard(listed[0], parameters, tmp_path / "work")]
    merge_shards(tmp_path / "work", listed, records, parameters, tmp_path / "out")
    with mock.patch.object(verification, "_BLOCK", 1 << 16):
        assert peak_of(verify_prepared, tmp_path / "out") < 40e6


def test_the_memory_of_many_lengths():
    """They are not sorted all at once, however long the longest is."""
    lengths = np.random.default_rng(0).integers(1, 1 << 18, 1 << 21).astype(np.int32)
    with mock.patch.multiple(shards, _BLOCK=1 << 16, _LARGEST_BLOCK=1 << 18):
        peak = peak_of(shards._group, lengths, None, IdCoding(0, "<u4"))
    assert peak < 16 * len(lengths)


# --- no room --------------------------------------------------------------------------------

FULL = """
import resource, sys
from seqpack_jax import SeqpackError, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    prepare(sys.argv[1], sys.argv[2], 10, over_length="split")
except SeqpackError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 400_000])
def test_a_full_disk(size, tmp_path):
    """With 100 bytes not even the first shard is written, with 400,000 not its pieces."""
    np.save(tmp_path / "lengths.npy", np.full(20_000, 15))
    paths = str(tmp_path / "lengths.npy"), str(tmp_path / "out")
    command = [sys.executable, "-c", FULL, *paths, str(size)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"prepare: {tmp_path}/.out.partial")
    assert "cannot be written (File too large)" in said
    assert "make room and run it again: finished shards are kept" in said
    prepare(*paths, 10, over_length="split")


@pytest.mark.parametrize("name", ["counts.npy", "templates.npz", "manifest.json"])
def test_a_merge_without_room(name, tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)
    (tmp_path / ".out.partial" / "data" / name).mkdir(parents=True)
    with refused(
        "cannot be written (Is a directory)", "finished shards are kept", caller="prepare"
    ):
        prepare(source, tmp_path / "out", 30, length_column="length")


def test_a_work_directory_that_cannot_be_made(tmp_path):
    write_lengths(tmp_path / "in", LENGTHS)
    parameters = PreparationParameters(30, Columns(length="length"))
    (shard,) = list_shards(tmp_path / "in", parameters.columns)
    (tmp_path / "file").touch()
    with refused("file", "cannot be written (Not a directory)", caller="prepare"):
        prepare_shard(shard, parameters, tmp_path / "file" / "work")


# --- all shards, each once ------------------------------------------------------------------


def test_an_engine_that_loses_shards(tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)
    losses = {
        "shard 2 is missing": lambda function, listed: map(function, listed[:-1]),
        "shard 0 is missing": lambda function, listed: iter(()),
        "shard 1 is there twice": lambda function, listed: map(function, [*listed, listed[1]]),
    }
    for problem, map_shards in losses.items():
        with refused(problem, caller="prepare"):
            prepare_in_shards(source, tmp_path / "out", 30, map_shards=map_shards)
        assert not (tmp_path / "out").exists()


def test_records_of_other_shards(tmp_path):
    parameters = PreparationParameters(30, Columns(length="length"))
    listed, records = [], []
    for name, lengths in (("a", LENGTHS), ("b", LENGTHS[::-1])):
        source = write_lengths(tmp_path / name, lengths)
        found = list_shards(source, parameters.columns, max_rows=5)
        listed.append(found)
        records.append([prepare_shard(shard, parameters, tmp_path / "work") for shard in found])

    def merge(*which):
        merge_shards(tmp_path / "work", listed[0], which, parameters, tmp_path / "out")

    first, other = records
    with refused("shard 2 is missing", caller="prepare"):
        merge(*first[:2])
    with refused("shard 1 was prepared from another input", caller="prepare"):
        merge(first[0], other[1], first[2])
    with refused("shard 3 is none of these 3 shards", caller="prepare"):
        merge(*first, first[0]._replace(number=3))
    assert not (tmp_path / "out").exists()


def test_the_old_result_comes_back_when_the_new_one_cannot(tmp_path):
    source = write_lengths(tmp_path / "in", LENGTHS)
    prepare(source, tmp_path / "out", 30, length_column="length")
    old = content(tmp_path / "out")
    rename = Path.rename

    def refuse_data(path, target):
        if path.name == "data":
            raise OSError(18, "Invalid cross-device link")
        return rename(path, target)

    with mock.patch.object(Path, "rename", refuse_data), pytest.raises(SeqpackError, match="link"):
        prepare(source, tmp_path / "out", 40, length_column="length", overwrite=True)
    assert content(tmp_path / "out") == old
