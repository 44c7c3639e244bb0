"""What is asked of the kernel before it is read."""

import os

import numpy as np
import pytest

import seqpack_jax as sp
from seqpack_jax.feeding.prefetch import Prefetch

HEAD = 3  # tokens of the file before those of the sequences


@pytest.fixture
def flat(tmp_path):
    """2,000 sequences of a thousand tokens each, in a memory-mapped file."""
    path = tmp_path / "tokens.bin"
    tokens = np.arange(2_000_003, dtype=np.uint16)
    tokens.tofile(path)
    mapped = np.memmap(path, np.uint16, "r")
    return sp.FlatSequences(mapped[HEAD:], np.arange(2001) * 1000)


@pytest.fixture
def asked(monkeypatch):
    """Every request, `(first byte, byte behind the last)`."""
    requests = []
    advise = os.posix_fadvise

    def record(file, offset, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        advise(file, offset, size, advice)
        requests.append((offset, offset + size))

    monkeypatch.setattr(os, "posix_fadvise", record)
    return requests


def held(asked, ids):
    """Which of the sequences were asked for, from their first byte to their last."""
    covered = np.zeros(2_000_003 * 2 + 1, bool)
    for start, stop in asked:
        covered[start:stop] = True
    return [covered[2 * (HEAD + 1000 * i) : 2 * (HEAD + 1000 * i + 1000)].all() for i in ids]


def test_most_lie_in_a_stretch_that_is_read_once_and_the_others_are_asked_for(flat, asked):
    reader = Prefetch(flat)
    ids = np.array([*range(500, 700, 2), 3, 1990])
    reader.ask(ids[::-1]).join()
    assert all(held(asked, ids))
    assert all(held(asked, range(520, 680))), "what lies between is in the stretch"
    assert not any(held(asked, [*range(4, 400), *range(800, 1980)]))
    asked.clear()
    reader.ask(np.array([*range(501, 701, 2), 7])).join()
    assert sorted(asked)[0] == (2 * (HEAD + 7000), 2 * (HEAD + 8000))
    assert not any(held(asked, range(520, 680))), "the same stretch is not read again"
    asked.clear()
    reader.ask(np.arange(1200, 1400)).join()
    assert all(held(asked, range(1200, 1400))), "another zone"
    assert max(stop - start for start, stop in asked) <= 1 << 18


def test_a_stretch_that_would_not_stay_in_memory_is_not_read_whole(flat, asked, monkeypatch):
    reader = Prefetch(flat)
    monkeypatch.setattr(reader, "_memory", 1_000_000)
    ids = np.arange(0, 2000, 40)
    reader.ask(ids).join()
    assert all(held(asked, ids))
    assert len(asked) == len(ids)
    assert not any(held(asked, ids + 20))


def test_what_cannot_be_asked_is_left_to_the_reader(flat, asked, tmp_path, monkeypatch):
    in_memory = sp.FlatSequences(np.arange(10), np.array([0, 4, 10]))
    for source in ([[1], [2]], in_memory):
        assert Prefetch(source).ask(np.array([0, 1])) is None
    reader = Prefetch(flat)
    assert reader.ask(np.array([], np.int64)) is None
    reader.ask(np.array([-1, 2000, 10**12])).join()
    (tmp_path / "tokens.bin").unlink()
    reader.ask(np.array([1, 2])).join()
    assert asked == []
    monkeypatch.delattr(os, "posix_fadvise")
    assert Prefetch(flat).ask(np.array([0, 1])) is None


@pytest.fixture
def asks(monkeypatch):
    """The ids of each call of `ask`."""
    calls = []
    ask = Prefetch.ask

    def record(self, ids):
        calls.append(ids)
        thread = ask(self, ids)
        if thread is not None:
            thread.join()

    monkeypatch.setattr(Prefetch, "ask", record)
    return calls


def test_a_source_that_is_read_in_order_asks_for_whole_blocks(flat, asked, asks):
    source = sp.pack_dataset(flat, 4000, batch_size=8, seed=1, zones=4)
    assert source[30]["tokens"].shape == source[3]["tokens"].shape
    assert asks == [], "items in no order are read as they are"
    whole = list(source)
    assert all(held(asked, range(2000)))
    in_memory = sp.FlatSequences(np.array(flat.tokens), flat.offsets)
    again = sp.pack_dataset(in_memory, 4000, batch_size=8, seed=1, zones=4)
    for one, two in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], two["tokens"])


def test_pieces_are_asked_for_as_the_sequences_they_are_of(flat, asked, asks):
    source = sp.pack_dataset(flat, 700, batch_size=8, over_length="split", metadata=True)
    for _ in range(2):
        assert source[0]["ids"].max() >= 2000  # that of a piece
    source[1]
    (ids,) = asks
    assert 0 <= ids.min() <= ids.max() < 2000
    assert all(held(asked, ids))
