"""Lengths of a random-access source: the right ones, once each, in spite of crashes."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from unittest import mock

import input_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seqpack_jax.feeding.measuring as measuring
from seqpack_jax.errors import SeqpackError
from seqpack_jax.feeding.measuring import measure_lengths


class Source:
    """Item `i` is `i`; notes which items were asked for, and fails at one of them."""

    def __init__(self, size, fails_at=None, error=RuntimeError):
        self.size, self.fails_at, self.error = size, fails_at, error
        self.asked = []

    def __len__(self):
        return self.size

    def __getitem__(self, item):
        if item == self.fails_at:
            raise self.error("the disk is gone")
        self.asked.append(item)
        return item


def twice(item):
    return 2 * item


class FailsInWorkers:
    """Pickles, but does not unpickle."""

    def __len__(self):
        return 100_000

    def __reduce__(self):
        return int, ("not a number",)


class EndsTheProcess(Source):
    def __getitem__(self, item):
        os._exit(1)


@pytest.fixture
def small_chunks():
    with mock.patch.object(measuring, "_CHUNK", 10):
        yield


refused = partial(input_files.refused, caller="measure_lengths")


@given(sizes=st.lists(st.integers(0, 50), max_size=60), chunk=st.integers(1, 70))
def test_lengths_are_those_of_the_items(sizes, chunk):
    with mock.patch.object(measuring, "_CHUNK", chunk):
        lengths = measure_lengths([[0] * n for n in sizes])
        assert lengths.dtype == np.int64
        assert lengths.tolist() == sizes
        assert measure_lengths(sizes, lambda n: n + 1).tolist() == [n + 1 for n in sizes]


def test_items_are_asked_for_once_and_in_order():
    source = Source(50_000)
    assert measure_lengths(source, twice).tolist() == list(range(0, 100_000, 2))
    assert source.asked == list(range(50_000))


def test_numpy_integers_are_lengths():
    assert measure_lengths([3, 4], np.uint8).tolist() == [3, 4]
    assert measure_lengths(np.zeros((2, 5))).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (2.0, "= 2.0 is not an integer"),
        (np.float32(1), "is not an integer"),
        (True, "= True is not an integer"),
        (None, "= None is not an integer"),
        ("3", "= '3' is not an integer"),
        (-1, "= -1, but it must be in [0, 2147483647]"),
        (2**31, "= 2147483648, but it must be in"),
        (np.int64(-5), "= -5, but it must be in"),
    ],
)
def test_lengths_are_checked(bad, words):
    with refused("length_fn(source[12])", words):
        measure_lengths(range(20), lambda item: bad if item == 12 else item)


def test_the_error_of_an_item_is_chained():
    with refused("item 33 cannot be measured: KeyError: 'the disk is gone'") as caught:
        measure_lengths(Source(50, 33, KeyError), twice)
    assert isinstance(caught.value.__context__, KeyError)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (iter([[1]]), {}, "the source, of type list_iterator, has no len()"),
        ([[1]], {"workers": 0}, "workers = 0, but it must be at least 1"),
        ([[1]], {"workers": 1.5}, "workers = 1.5 is not an integer"),
        (range(100_000), {"workers": 2, "length_fn": lambda n: n}, "does not pickle"),
    ],
)
def test_arguments_are_checked(source, options, words):
    with refused(words):
        measure_lengths(source, **options)


# The cache.


def test_a_finished_cache_is_returned_at_once(tmp_path, small_chunks):
    cache = tmp_path / "new/folder/lengths.npy"
    first = measure_lengths(Source(35), twice, cache=cache)
    assert os.listdir(cache.parent) == ["lengths.npy"], "the chunks are gone"
    again = Source(35)
    second = measure_lengths(again, twice, cache=str(cache))
    assert again.asked == []
    for lengths in (first, second, np.load(cache)):
        assert lengths.tolist() == list(range(0, 70, 2))
        assert lengths.dtype == np.int64
    for lengths in (first, second):
        assert isinstance(lengths, np.memmap)
        assert not lengths.flags.writeable


def test_an_empty_source_has_a_cache(tmp_path):
    for _ in range(2):
        assert measure_lengths([], cache=tmp_path / "lengths.npy").tolist() == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_goes_on_where_it_ended(tmp_path, small_chunks, error):
    cache = tmp_path / "lengths.npy"
    with pytest.raises((SeqpackError, KeyboardInterrupt)):
        measure_lengths(Source(95, 57, error), twice, cache=cache)
    assert not cache.exists()
    again = Source(95)
    assert measure_lengths(again, twice, cache=cache).tolist() == list(range(0, 190, 2))
    assert again.asked == list(range(50, 95)), "five chunks were finished"
    assert os.listdir(tmp_path) == ["lengths.npy"]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"x" * 300])
def test_chunks_that_a_crash_damaged_are_measured_again(tmp_path, small_chunks, damage):
    cache = tmp_path / "lengths.npy"
    with refused("item 35"):
        measure_lengths(Source(50, 35), twice, cache=cache)
    chunks = tmp_path / "lengths.npy.chunks"
    (chunks / "10-of-50.npy").write_bytes(damage)
    np.save(chunks / "20-of-50.npy", np.arange(3))
    (chunks / "99.tmp").write_bytes(b"half a chunk")
    again = Source(50)
    assert measure_lengths(again, twice, cache=cache).tolist() == list(range(0, 100, 2))
    assert again.asked == list(range(10, 50))


def test_a_crash_before_the_chunks_are_removed(tmp_path, small_chunks):
    cache = tmp_path / "lengths.npy"
    with mock.patch.object(measuring.shutil, "rmtree"):
        measure_lengths(Source(20), twice, cache=cache)
    assert len(os.listdir(tmp_path)) == 2
    measure_lengths(Source(20), twice, cache=cache)
    assert os.listdir(tmp_path) == ["lengths.npy"]


def test_chunks_of_another_source_are_refused(tmp_path, small_chunks):
    cache = tmp_path / "lengths.npy"
    with refused("item 35"):
        measure_lengths(Source(50, 35), twice, cache=cache)
    with refused("lengths.npy.chunks is of 50 items, but the source has 51", "remove it"):
        measure_lengths(Source(51), twice, cache=cache)
    assert measure_lengths(Source(50), twice, cache=cache).tolist() == list(range(0, 100, 2))


class Trap:
    """Unpickling it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.arange(4), "is of 4 items, but the source has 3"),
        (np.arange(3, dtype=np.int32), "is no 1-D array of int64"),
        (np.arange(3.0), "is no 1-D array of int64"),
        (np.zeros((3, 1), np.int64), "is no 1-D array of int64"),
        (np.array([Trap()]), "cannot be read"),
        (b"", "cannot be read"),
        (b"\x93NUMPY\x01\x00", "cannot be read"),
    ],
)
def test_other_caches_are_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "lengths.npy"
    if isinstance(content, bytes):
        cache.write_bytes(content)
    else:
        np.save(cache, content, allow_pickle=True)
    source = Source(3)
    with refused("the cache ", "lengths.npy", words, "remove it, or name another cache"):
        measure_lengths(source, twice, cache=cache)
    assert source.asked == []
    assert not os.path.exists("trap")


def test_an_archive_is_no_cache(tmp_path):
    with open(tmp_path / "lengths.npy", "wb") as file:
        np.savez(file, np.arange(3))
    with refused("lengths.npy cannot be read"):
        measure_lengths(Source(3), twice, cache=tmp_path / "lengths.npy")


# Progress and processes.


def test_progress_counts_what_was_kept(tmp_path, small_chunks, capfd):
    measure_lengths(Source(95), twice)
    assert capfd.readouterr() == ("", "")
    cache = tmp_path / "lengths.npy"
    for source, count in [(Source(95, 57), "50/95"), (Source(95), "95/95")]:
        with mock.patch.object(measuring, "progress_bar", wraps=measuring.progress_bar) as bar:
            try:
                measure_lengths(source, twice, cache=cache, progress=True)
            except SeqpackError:
                assert source.fails_at is not None
        assert bar.call_args.args[1:] == (95, True)
        assert count in capfd.readouterr().err


def test_one_chunk_needs_no_processes():
    assert measure_lengths(range(10), lambda n: n, workers=8).tolist() == list(range(10))


@pytest.mark.slow
def test_processes_measure_the_same(tmp_path):
    cache = tmp_path / "lengths.npy"
    size = 9 * measuring._CHUNK + 1
    with refused("item 120000 cannot be measured: RuntimeError: the disk is gone") as caught:
        measure_lengths(Source(size, 120_000), twice, workers=2, cache=cache)
    assert "RuntimeError: the disk is gone" in str(caught.value.__cause__), "the worker's traceback"
    assert not cache.exists()
    again = Source(size)
    assert measure_lengths(again, twice, workers=2, cache=cache)[-1] == 2 * size - 2
    assert again.asked == [], "workers ask copies"
    assert np.array_equal(np.load(cache), 2 * np.arange(size))
    with refused("a worker cannot unpickle the source or length_fn: invalid literal"):
        measure_lengths(FailsInWorkers(), twice, workers=2)
    with refused("a worker process ended without a result", "__main__"):
        measure_lengths(EndsTheProcess(size), twice, workers=2)


@pytest.mark.parametrize("cache", ["file/c.npy", "/proc/no/c.npy", "", 3, "a\0b", "n" * 252])
def test_where_no_cache_can_be(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SeqpackError, match=r"measure_lengths: .*(cannot be made|is not a path)"):
        measure_lengths(["a"], cache=cache)


def test_a_second_run_waits_for_the_cache(tmp_path, small_chunks):
    cache, asked, found = tmp_path / "lengths.npy", [], []
    begun, go_on = threading.Event(), threading.Event()

    def slow(item):
        begun.set()
        go_on.wait(60)
        asked.append(item)
        return 2 * item

    def measure():
        found.append(measure_lengths(Source(35), slow, cache=cache).tolist())

    threads = [threading.Thread(target=measure) for _ in range(2)]
    threads[0].start()
    begun.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    go_on.set()
    for thread in threads:
        thread.join()
    assert asked == list(range(35)), "once"
    assert found == [list(range(0, 70, 2))] * 2
    assert os.listdir(tmp_path) == ["lengths.npy"]


def test_a_cache_needs_filelock(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert measure_lengths(["ab"]).tolist() == [2]
    with refused("filelock is not installed", "[prepare]"):
        measure_lengths(["ab"], cache=tmp_path / "lengths.npy")


CHILD = """
import signal, sys, time
from pathlib import Path
from seqpack_jax.feeding.measuring import measure_lengths

class Slow:
    def __len__(self):
        return 1_000_000
    def __getitem__(self, item):
        Path(sys.argv[1], str(item)).touch()
        time.sleep(0.05)  # a chunk takes minutes
        return "text"

if __name__ == "__main__":
    # Tests that a script runs in the background inherit an interrupt that is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    measure_lengths(Slow(), workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    (tmp_path / "items").mkdir()
    (tmp_path / "program.py").write_text(CHILD)
    program = [sys.executable, tmp_path / "program.py", tmp_path / "items"]
    child = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not os.listdir(tmp_path / "items"):
        time.sleep(0.01)
        assert child.poll() is None
    child.send_signal(number)
    child.communicate(timeout=30)  # all that hold its stdout, the workers too, have ended
    assert child.returncode != 0
