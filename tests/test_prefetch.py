"""What is asked of the kernel before it is read."""

import os

import numpy as np
import pytest

import seqpack_jax as sp
from seqpack_jax.feeding import packed_source
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


def bins_of(ids, rows=1):
    ids = np.asarray(ids, np.int64)
    return sp.Bins(ids, np.linspace(0, len(ids), rows + 1).astype(np.int64), 4000)


def ask(reader, *place):
    thread = reader.ask(*place)
    if thread is not None:
        thread.join()


def held(asked, ids):
    """Which of the sequences were asked for, from their first byte to their last."""
    covered = np.zeros(2_000_003 * 2 + 1, bool)
    for start, stop in asked:
        covered[start:stop] = True
    return [covered[2 * (HEAD + 1000 * i) : 2 * (HEAD + 1000 * i + 1000)].all() for i in ids]


def test_most_lie_in_a_stretch_that_is_read_once_and_the_others_are_asked_for(flat, asked):
    reader = Prefetch(flat)
    ids = np.array([*range(500, 700, 2), 3, 1990])
    ask(reader, bins_of(ids[::-1]))
    assert all(held(asked, ids))
    assert all(held(asked, range(520, 680))), "what lies between is in the stretch"
    assert not any(held(asked, [*range(4, 400), *range(800, 1980)]))
    asked.clear()
    ask(reader, bins_of([*range(501, 701, 2), 7]))
    assert sorted(asked)[0] == (2 * (HEAD + 7000), 2 * (HEAD + 8000))
    assert not any(held(asked, range(520, 680))), "the same stretch is not read again"
    asked.clear()
    ask(reader, bins_of(range(1200, 1400)))
    assert all(held(asked, range(1200, 1400))), "another zone"
    assert max(stop - start for start, stop in asked) <= 1 << 18


def test_a_stretch_that_would_not_stay_in_memory_is_not_read_whole(flat, asked, monkeypatch):
    reader = Prefetch(flat)
    monkeypatch.setattr(reader, "_widest", 1_000_000)
    ids = np.arange(0, 2000, 40)
    ask(reader, bins_of(ids))
    assert all(held(asked, ids))
    assert len(asked) == len(ids)
    assert not any(held(asked, ids + 20))


def test_what_cannot_be_asked_is_left_to_the_reader(flat, asked, tmp_path, monkeypatch):
    in_memory = sp.FlatSequences(np.arange(10), np.array([0, 4, 10]))
    for source in ([[1], [2]], in_memory):
        assert Prefetch(source).ask(bins_of([0, 1])) is None
    reader = Prefetch(flat)
    assert reader.ask(bins_of([])) is None
    ask(reader, bins_of([-1, 2000, 10**12]))
    (tmp_path / "tokens.bin").unlink()
    ask(reader, bins_of([1, 2]))
    assert asked == []
    monkeypatch.delattr(os, "posix_fadvise")
    assert Prefetch(flat).ask(bins_of([0, 1])) is None


def test_the_last_batch_shows_where_the_stretch_is(flat, asked):
    reader = Prefetch(flat, zones=8)
    before, after = [*range(100, 300)], [*range(1000, 1200)]
    ask(reader, bins_of(before + after, 2), 1)
    assert all(held(asked, range(100, 300))), "what comes before is asked for one by one"
    assert all(held(asked, range(1000, 1200)))
    assert not any(held(asked, range(400, 900))), "what lies between two zones is not"
    asked.clear()
    ask(reader, bins_of(before[::7] + after[::7], 1))
    assert not any(held(asked, range(400, 900))), "a batch of two zones shows no stretch"


def test_files_beyond_4_gigabytes_and_damaged_offsets(tmp_path, asked):
    with open(tmp_path / "tokens.bin", "wb") as file:
        file.truncate(6 << 30)  # without a byte on the disk
    tokens = np.memmap(tmp_path / "tokens.bin", np.int32, "r")
    starts = (5 << 28) + np.arange(0, 5000, 1000)
    offsets = np.array([0, *starts, len(tokens)], np.uint32)
    ask(Prefetch(sp.FlatSequences(tokens, offsets)), bins_of([2, 1]))
    assert min(asked)[0] == 5 << 30
    backwards = sp.FlatSequences(tokens[::-1], offsets)
    assert Prefetch(backwards).ask(bins_of([2, 1])) is None, "it is no map that can be made again"
    damaged = sp.FlatSequences(tokens, np.array([0, 90, 10, 1 << 40, len(tokens)]))
    ask(Prefetch(damaged), bins_of(range(4)))


@pytest.fixture
def asks(monkeypatch):
    """The ids of each call of `ask`."""
    calls = []
    original = Prefetch.ask

    def record(self, bins, *place):
        calls.append(bins.ids)
        thread = original(self, bins, *place)
        if thread is not None:
            thread.join()

    monkeypatch.setattr(Prefetch, "ask", record)
    return calls


def test_a_source_that_is_read_in_order_asks_for_whole_blocks(flat, asked, asks, monkeypatch):
    monkeypatch.setattr(packed_source, "_BLOCK_ROWS", 32)
    scattered = sp.pack_dataset(flat, 4000, batch_size=8, seed=1)
    for index in (50, 9, 30):
        assert scattered[index]["tokens"].shape == (8, 4000)
    assert asked == [], "items in no order of what memory holds are read as they are"
    scattered._cache.prefetch._large = True
    found = [scattered[index]["tokens"] for index in (1, 42, 20)]
    wanted = [ids for ids in asks[3:] for ids in ids.tolist()]
    assert all(held(asked, wanted))
    assert len(found) == 3
    assert not all(held(asked, range(2000)))
    asked.clear()
    source = sp.pack_dataset(flat, 4000, batch_size=8, seed=1, zones=4)
    whole = list(source)
    assert all(held(asked, range(2000)))
    in_memory = sp.FlatSequences(np.array(flat.tokens), flat.offsets)
    again = sp.pack_dataset(in_memory, 4000, batch_size=8, seed=1, zones=4)
    for one, two in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], two["tokens"])


def test_the_next_zone_is_read_while_this_one_is_packed(flat, asked, asks, monkeypatch):
    monkeypatch.setattr(packed_source, "_BLOCK_ROWS", 32)
    source = sp.pack_dataset(flat, 4000, batch_size=8, seed=3, zones=4, metadata=True)
    for step in range(8):  # two blocks of 32 rows; a zone has 125
        source[step]
    epoch = sp.materialize_epoch(source.plan, source.pools, seed=3, zones=4)
    start = epoch.zones.next_start(63, epoch.key, shuffle=True)
    assert (
        epoch.zones.place(np.array([start - 1]), epoch.key, shuffle=True)[0]
        == (epoch.zones.place(np.array([0]), epoch.key, shuffle=True)[0])
    )
    following = epoch[start : start + 60].ids
    assert np.mean(held(asked, following)) > 0.8
    assert len(asks) == 2, "it is not read by anyone yet"
    end = epoch.zones.next_start(len(epoch) - 1, epoch.key, shuffle=True)
    assert end == len(epoch)


def test_reading_in_no_order_reads_no_zone_ahead(flat, asked):
    counts, pools = sp.length_histogram_from_lengths(flat.lengths)
    plan = sp.pack_length_histogram(counts, 4000)
    epoch = sp.materialize_epoch(plan, pools, seed=3, zones=4)
    reader = Prefetch(flat, zones=4)
    reader._large = True
    for row in (10, 300, 480):
        bins = epoch[row : row + 2]
        asked.clear()
        assert reader.ask(bins, len(bins), epoch, row + 1) is None, "no stretch is read"
        assert all(held(asked, bins.ids))
        near = 2 * 1000 + (1 << 14)  # a sequence, and what may lie between it and the next
        assert sum(stop - start for start, stop in asked) <= near * len(bins.ids)


def test_pieces_are_asked_for_as_the_sequences_they_are_of(flat, asked, asks):
    source = sp.pack_dataset(flat, 700, batch_size=8, over_length="split", metadata=True)
    for _ in range(2):
        assert source[0]["ids"].max() >= 2000  # that of a piece
    source[1]
    ids = asks[-1]
    pieces = source.pools.pieces
    assert ids.max() >= pieces.first_id
    split = ids >= pieces.first_id
    ids[split] = pieces.source_id[ids[split] - pieces.first_id]
    assert all(held(asked, ids))
