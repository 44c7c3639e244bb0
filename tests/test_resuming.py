"""PackedDataset: a state is a row of an epoch, and goes on exactly there, whatever else changed."""

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cloudpickle
import grain
import numpy as np
import pytest
from comparing import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_directories import prepare_in_shards, write_lengths

import seqpack_jax as sp
from seqpack_jax.feeding import parcel, resuming
from seqpack_jax.feeding.parcel import Parcel, SentSource
from seqpack_jax.feeding.resuming import PackedDataset

CAPACITY = 64
FIXTURE = Path(__file__).parent / "fixtures" / "packed_state_v1.json"


def lengths_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(2.5, 0.8, n)), 1, CAPACITY).astype(int)


def source_of(n=120, **options):
    options = {"batch_size": 4, "seed": 3, "epochs": 2} | options
    sequences = [np.full(length, i + 1, np.int32) for i, length in enumerate(lengths_of(n))]
    return sp.pack_dataset(sequences, CAPACITY, **options)


def dataset_of(*, workers=0, **options):
    return PackedDataset(source_of(**options), num_workers=workers)


def carried(state):
    """A state as a checkpoint keeps it."""
    text = json.dumps(state)
    assert len(text) < 1000
    return json.loads(text)


def rows_in(items):
    """Tokens and segment ids of every row that is not empty."""
    rows = []
    for item in items:
        for tokens, segments in zip(
            np.atleast_2d(item["tokens"]), np.atleast_2d(item["segment_ids"]), strict=True
        ):
            if segments.any():
                rows.append((tokens.tobytes(), segments.tobytes()))
    return rows


def row_stream(**options):
    """Every row of all epochs, one by one: what no restart may change."""
    return rows_in(source_of(**options, batch_size=None))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where parcels are written."""
    folder = tmp_path / "parcels"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def draw_tokens(record, rng):
    """A transformation whose draws may depend on seed, epoch and id only."""
    return rng.integers(1, 1000, len(record))


# --- exact resume ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": None, "n": 40},
        {"shard": (1, 3), "remainder": "drop"},
        {"shuffle": False, "epochs": 1},
        {"over_length": "split", "tolerance": 4},
        {"zones": 3, "metadata": True, "transform": draw_tokens, "bos_id": 7},
    ],
    ids=" ".join,
)
def test_every_step_resumes(options):
    whole = list(source_of(**options))
    iterator = iter(dataset_of(**options))
    states = []
    for step in range(len(whole) + 1):
        states.append(iterator.get_state())
        restored = iter(dataset_of(**options))
        restored.set_state(carried(states[-1]))
        assert restored.get_state() == states[-1]
        equal(list(restored), whole[step:])
        if step < len(whole):
            equal([next(iterator)], whole[step : step + 1])
    assert len({tuple(map(type, state.values())) for state in states}) == 1
    assert len({json.dumps(state) for state in states}) == len(states)
    assert next(iterator, None) is None
    assert iterator.get_state() == states[-1]


@pytest.mark.usefixtures("collect_at_the_end")
def test_workers_give_the_same_items_and_resume():
    whole = list(source_of())
    iterator = iter(dataset_of(workers=2))
    seen = [next(iterator) for _ in range(3)]
    state = carried(iterator.get_state())
    assert len(multiprocessing.active_children()) == 2
    equal(seen + list(iterator), whole)
    assert multiprocessing.active_children() == []
    without = iter(dataset_of())
    without.set_state(state)
    equal(list(without), whole[3:])


@pytest.mark.slow
@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_resume_at_eight_steps(workers):
    whole = list(source_of())
    iterator, without = iter(dataset_of(workers=workers)), iter(dataset_of())
    states = []
    for item in whole:
        assert iterator.get_state() == without.get_state()
        states.append(carried(iterator.get_state()))
        equal([next(iterator), next(without)], [item, item])
    for step in np.linspace(0, len(whole) - 1, 8).astype(int).tolist():
        restored = iter(dataset_of(workers=workers))
        restored.set_state(states[step])
        equal(list(restored), whole[step:])
    restored.set_state(iterator.get_state())
    assert list(restored) == []
    restored.set_state(states[-2])  # after the end
    equal(list(restored), whole[-2:])


def test_records_of_several_capacities_resume():
    def dataset(batch_size):
        rng = np.random.default_rng(0)
        records = [
            {"inputs": rng.integers(1, 99, a), "targets": rng.integers(1, 99, b), "score": 0.5 * b}
            for a, b in rng.integers(1, 20, (50, 2)).tolist()
        ]
        options = {"max_seq_len": {"inputs": 32, "targets": 24}, "metadata": True, "seed": 1}
        return PackedDataset(sp.pack_dataset(records, batch_size=batch_size, **options))

    whole, rows = list(dataset(4)), list(dataset(1))
    for step in range(len(whole)):
        first = iter(dataset(4))
        equal([next(first) for _ in range(step)], whole[:step])
        for batch_size, rest in ((4, whole[step:]), (1, rows[4 * step :])):
            restored = iter(dataset(batch_size))
            restored.set_state(carried(first.get_state()))
            equal(list(restored), rest)


def test_a_state_before_the_first_item_costs_nothing():
    class Unread:
        def __len__(self):
            return 40

        def __getitem__(self, index):
            raise AssertionError("read")

    source = sp.pack_dataset(Unread(), CAPACITY, lengths=[30] * 40, batch_size=2)
    iterator = iter(PackedDataset(source, num_workers=2))
    state = iterator.get_state()
    assert (state["epoch"], state["rows"]) == (0, 0)
    iterator.set_state(state | {"rows": 6})
    assert iterator.get_state()["rows"] == 6
    iterator.set_state(state | {"epoch": 1})
    assert list(iterator) == []
    assert multiprocessing.active_children() == []


def test_a_live_iterator_goes_back_and_forth():
    whole = list(source_of())
    iterator = iter(dataset_of())
    states = []
    for item in whole:
        states.append(iterator.get_state())
        equal([next(iterator)], [item])
    for step in (5, 0, len(whole) - 1, 6):
        iterator.set_state(states[step])
        equal([next(iterator), *iterator], whole[step:])
    assert list(iterator) == []


@pytest.mark.parametrize("batch_size", [1, 8])
def test_restoring_reads_nothing_at_any_step_of_a_million(batch_size):
    counts = {512: 10**9}
    plan, pools = sp.pack_length_histogram(counts, 2048), sp.SequencePools.identity(counts)
    reads = []

    class Counted:
        def __getitem__(self, index):
            reads.append(index)
            return np.full(512, index % 1000)

    source = partial(sp.PackedSource, plan, pools, Counted(), seed=1, batch_size=batch_size)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    state = iter(PackedDataset(source())).get_state()
    for step in np.random.default_rng(0).integers(0, 250_000_000 // batch_size, 10).tolist():
        iterator = iter(PackedDataset(source(), read_options=options))
        iterator.set_state(state | {"rows": step * batch_size})
        assert reads == []
        equal([next(iterator)], [source()[step]])
        assert len(reads) == 2 * 4 * batch_size  # here, and by `source()[step]`
        reads.clear()


# --- other hosts, workers, batch sizes -------------------------------------------------------


def read_on(state, options, count, steps):
    """Read some steps on `count` hosts; return the global steps, and the state of every host."""
    hosts = [iter(dataset_of(**options, shard=(index, count))) for index in range(count)]
    for host in hosts:
        if state is not None:
            host.set_state(carried(state))
    items = []
    while steps is None or len(items) < steps:
        parts = [next(host, None) for host in hosts]
        if parts[0] is None:
            assert parts == [None] * count
            break
        items.append({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
    states = [host.get_state() for host in hosts]
    assert states == states[:1] * count
    return items, states[0]


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_global_steps_are_the_same_on_any_hosts(remainder):
    options = {"n": 130, "remainder": remainder}
    whole, end = read_on(None, options | {"batch_size": 8}, 1, None)
    for count in (2, 4, 8):
        part = options | {"batch_size": 8 // count}
        items, final = read_on(None, part, count, None)
        equal(items, whole)
        assert final == end
        state, seen = None, []
        for hosts in (1, count, 8 // count):  # restarted twice, each time on other hosts
            items, state = read_on(state, options | {"batch_size": 8 // hosts}, hosts, 3)
            seen += items
        equal(seen, whole[: len(seen)])


@settings(max_examples=40)
@given(
    data=st.data(),
    n=st.integers(1, 60),
    seed=st.integers(-(2**70), 2**70),
    shuffle=st.booleans(),
)
def test_runs_go_on_with_the_next_row(data, n, seed, shuffle):
    fixed = {"n": n, "seed": seed, "shuffle": shuffle, "epochs": 2}
    expected = row_stream(**fixed)
    state, rows = None, []
    for part in range(3):
        batch_size = data.draw(st.integers(1, 6), "batch_size")
        count = data.draw(st.integers(1, 4), "hosts")
        steps = None if part == 2 else data.draw(st.integers(0, 4), "steps")
        items, state = read_on(state, fixed | {"batch_size": batch_size}, count, steps)
        rows += rows_in(items)
    assert rows == expected
    assert (state["epoch"], state["rows"]) == (2, 0)


def test_more_epochs_follow_the_end():
    whole = list(source_of(epochs=3))
    iterator = iter(dataset_of(epochs=2))
    equal(list(iterator), whole[: 2 * len(whole) // 3])
    more = iter(dataset_of(epochs=3))
    more.set_state(carried(iterator.get_state()))
    equal(list(more), whole[2 * len(whole) // 3 :])


# --- inside a Grain pipeline -----------------------------------------------------------------


def doubled(item):
    return {name: 2 * array for name, array in item.items()}


def noisy(item, rng):
    return item | {"noise": rng.random(3)}


PIPELINES = {
    "alone": lambda data: data,
    "map": lambda data: data.map(doubled),
    "random_map": lambda data: data.random_map(noisy, seed=1),
    "filter": lambda data: data.filter(lambda item: int(item["tokens"].sum()) % 3 > 0),
    "thread": lambda data: grain.experimental.ThreadPrefetchIterDataset(
        data.map(doubled), prefetch_buffer_size=3
    ),
    "batch": lambda data: data.batch(2, drop_remainder=True).map(doubled),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_transformations_behind_it_resume_at_every_step(kind):
    behind = PIPELINES[kind]
    whole = list(behind(dataset_of(n=120)))
    iterator = iter(behind(dataset_of(n=120)))
    for step in range(len(whole) + 1):
        restored = iter(behind(dataset_of(n=120)))
        restored.set_state(carried(iterator.get_state()))
        equal(list(restored), whole[step:])
        next(iterator, None)
    assert len(whole) > 4


@pytest.mark.parametrize("kind", ["alone", "map", "thread"])
def test_grains_own_check(kind):
    data = PIPELINES[kind](dataset_of(n=60))
    grain.experimental.assert_equal_output_after_checkpoint(data)


@pytest.mark.slow
@pytest.mark.usefixtures("collect_at_the_end")
def test_mp_prefetch_behind_it():
    whole = list(map(doubled, source_of(n=60)))
    pipeline = dataset_of(n=60).map(doubled).mp_prefetch(grain.MultiprocessingOptions(2))
    iterator = iter(pipeline)
    seen = [next(iterator) for _ in range(5)]
    state = carried(iterator.get_state())
    equal(seen + list(iterator), whole)
    restored = iter(pipeline)
    restored.set_state(state)
    equal(list(restored), whole[5:])


def test_workers_have_no_workers(monkeypatch):
    iterator = iter(dataset_of(workers=1))
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(sp.SeqpackError, match="a worker process cannot start workers"):
        next(iterator)
    with pytest.raises(sp.SeqpackError, match="use mp_prefetch without sequential_slice"):
        dataset_of().set_slice(slice(0, None, 2), sequential_slice=True)


def test_single_rows_are_batched_by_grain():
    rows = dataset_of(batch_size=None).batch(4, drop_remainder=True)
    assert next(iter(rows))["tokens"].shape == (4, CAPACITY)


# --- errors ----------------------------------------------------------------------------------


def test_states_of_other_runs_are_refused():
    iterator = iter(dataset_of())
    next(iterator)
    here = iterator.get_state()
    for options, names in [
        ({"n": 121}, ["plan", "pools"]),
        ({"max_segments": 2}, ["plan"]),
        ({"seed": 4}, ["seed"]),
        ({"shuffle": False}, ["settings"]),
        ({"eos_id": 1}, ["plan", "pools", "settings"]),
    ]:
        other = iter(dataset_of(**options)).get_state()
        differing = [name for name in here if name != "rows" and here[name] != other[name]]
        assert differing == names
        with pytest.raises(sp.SeqpackError, match="Hint: ") as raised:
            iterator.set_state(other)
        for name in names:
            assert f"the {name} {other[name]!r}, here it is {here[name]!r}" in str(raised.value)
    for change, part in [
        ({"format": "other"}, "the state has the format 'other', not 'seqpack_jax.packed'"),
        ({"version": 2}, "the state has version 2, this release reads 1"),
        ({"permutation": 7}, "the permutation 7, here it is 1"),
        ({"pools": None}, "the pools None, here it is '"),
        ({"epoch": 3}, "the state is in epoch 3, the source has 2 epochs"),
        ({"epoch": -1}, "epoch = -1, but it must be at least 0"),
        ({"epoch": 2, "rows": 4}, r"rows = 4, but it must be in \[0, 0\]"),
        ({"rows": 10**6}, "rows = 1000000, but it must be in"),
        ({"rows": 1.5}, "rows = 1.5 is not an integer"),
        ({"rows": None}, "rows = None is not an integer"),
    ]:
        with pytest.raises(sp.SeqpackError, match=part):
            iterator.set_state(here | change)
    for state in ({"next_index": 3}, "state", None, b"{}"):
        with pytest.raises(sp.SeqpackError, match="the state has the format"):
            iterator.set_state(state)
    assert iterator.get_state() == here
    equal([next(iterator)], [source_of()[1]])


def test_settings_are_shown_where_they_differ():
    state = iter(dataset_of(shuffle=False)).get_state()
    said = """the settings '{"shuffle": false}', here it is '{}'. Hint: pass the options"""
    with pytest.raises(sp.SeqpackError, match=re.escape(said)):
        iter(dataset_of()).set_state(state)
    iter(dataset_of(pad_value=1)).set_state(iter(dataset_of()).get_state())  # looks, not rows


def test_bad_arguments():
    for options, part in [
        ({"num_workers": -1}, "num_workers = -1"),
        ({"num_workers": 1.5}, "num_workers = 1.5 is not an integer"),
        ({"worker_buffer_size": 0}, "worker_buffer_size = 0"),
    ]:
        with pytest.raises(sp.SeqpackError, match=part):
            PackedDataset(source_of(), **options)
    with pytest.raises(sp.SeqpackError, match="source is a list, not a PackedSource"):
        PackedDataset([1, 2])


@pytest.mark.parametrize("threads", [0, 2])
def test_an_item_that_failed_is_tried_again(threads):
    class Flaky:
        failures = 0

        def __len__(self):
            return 40

        def __getitem__(self, index):
            if index == 17 and self.failures < 2:
                self.failures += 1
                raise OSError("the disk is away")
            return np.full(5, index)

    source = sp.pack_dataset(Flaky(), 8, lengths=[5] * 40, batch_size=4, seed=1)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=3 if threads else 0)
    iterator = iter(PackedDataset(source, read_options=read))
    seen, failed = [], 0
    while len(seen) < len(source):
        try:
            seen.append(next(iterator))
        except OSError:
            failed += 1
    assert failed == 2
    equal(seen, list(source))


def test_the_end_must_be_where_it_belongs(monkeypatch):
    iterator = iter(dataset_of())
    monkeypatch.setattr(PackedDataset, "pipeline", lambda self, position: iter([]))
    with pytest.raises(sp.SeqpackError, match="Grain left out items"):
        next(iterator)


def test_threads_share_an_iterator():
    whole = list(source_of(batch_size=1))
    iterator = iter(dataset_of(batch_size=1))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: (next(iterator), iterator.get_state()), range(len(whole))))
    assert list(iterator) == []
    assert sorted(rows_in(item for item, _ in found)) == sorted(rows_in(whole))


def test_a_closed_iterator():
    iterator = iter(dataset_of())
    next(iterator)
    state = iterator.get_state()
    iterator.close()
    iterator.close()
    assert iterator.get_state() == state
    with pytest.raises(ValueError, match="was closed"):
        next(iterator)
    iterator.start_prefetch()
    assert iterator._steps is None


# --- processes -------------------------------------------------------------------------------


def test_processes_are_compared_before_anything_is_read(monkeypatch):
    calls = []
    monkeypatch.setattr(resuming, "compare_processes", lambda *args, **names: calls.append(args))
    data = dataset_of()
    _ = iter(data), iter(data)
    ((values,),) = calls
    assert values == data.identity | {"rows_per_step": 4, "epochs": 2, "remainder": "pad"}
    iter(PackedDataset(source_of(), check_processes=False))
    assert len(calls) == 1


@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize("end", ["close", "garbage", "state"])
def test_no_worker_outlives_its_iterator(end, temporary):
    iterator = iter(dataset_of(workers=1, n=3000))
    iterator.start_prefetch()
    waits = 0
    while not multiprocessing.active_children():  # a thread starts it
        time.sleep(0.01)
        waits += 1
        assert waits < 1000
    next(iterator)
    folder = Path(iterator._dataset._parcel.folder)
    assert folder.parent == temporary
    if end == "close":
        iterator.close()
    if end == "state":
        iterator.set_state(iterator.get_state())
    if end == "garbage":
        del iterator
        gc.collect()
        assert not folder.exists()
    assert multiprocessing.active_children() == []


# --- what prefetching holds ------------------------------------------------------------------


def test_read_options_are_small_by_default():
    for batch_size, ahead in ((None, 16), (4, 16), (40_000, 2)):
        data = dataset_of(batch_size=batch_size, n=10)
        assert data.read_options == grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)
    own = grain.ReadOptions(num_threads=1, prefetch_buffer_size=5)
    assert PackedDataset(source_of(), read_options=own).read_options == own


def test_much_memory_is_warned_of():
    source, own = source_of(batch_size=1000), grain.ReadOptions(1, 2000)
    part = r"up to 2000 items of 0.8 MB, 1.5 GB in all. Hint: lower prefetch_buffer_size = 2000"
    with pytest.warns(UserWarning, match=part) as caught:
        data = PackedDataset(source, read_options=own)
    assert caught[0].filename == __file__
    next(iter(data))  # once is enough
    with pytest.warns(UserWarning, match="up to 1404 items"):
        PackedDataset(source, num_workers=4, read_options=grain.ReadOptions(1, 350))
    PackedDataset(source, read_options=grain.ReadOptions(0, 5000))  # no threads, nothing ahead


def test_items_that_are_larger_than_expected_are_warned_of(monkeypatch):
    data = dataset_of()
    expected = 16 * 3 * 4 * 4 * CAPACITY
    monkeypatch.setattr(resuming, "_MUCH", expected)
    next(iter(data))
    assert not data._warned
    monkeypatch.setattr(resuming, "_MUCH", expected - 1)
    with pytest.warns(UserWarning, match="prefetching holds up to 16 items"):
        next(iter(data))
    nested = {"a": {"b": np.zeros(3, np.int32)}, "c": (np.zeros(2, np.int8), 7)}
    assert resuming._bytes_of(nested) == 14


# --- what workers receive --------------------------------------------------------------------


def sources_of_many(folder):
    """A million sequences in flat arrays, and ten thousand in Python objects."""
    lengths = np.random.default_rng(0).integers(1, 9, 10**6)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (np.arange(offsets[-1]) % 50_000).astype(np.uint16)
    np.save(folder / "tokens.npy", tokens)
    mapped = np.load(folder / "tokens.npy", mmap_mode="r")
    for sequences in (sp.FlatSequences(tokens, offsets), sp.FlatSequences(mapped, offsets)):
        yield sp.pack_dataset(sequences, 512, batch_size=8, seed=1)
    for array in (tokens, mapped):
        sequences = np.split(array, offsets[1:10_000])[:-1]
        yield sp.pack_dataset(sequences, 512, batch_size=8, seed=1)


def test_workers_receive_little_of_any_source(tmp_path, temporary):
    for source in sources_of_many(tmp_path):
        parcel_ = Parcel(source)
        sent = cloudpickle.dumps(SentSource(source.starting_at(0, 24), parcel_, (0, 24)))
        assert len(sent) < 1000
        received = pickle.loads(sent)
        assert isinstance(received, sp.PackedSource)
        equal([received[0]], [source[3]])
        assert repr(received) == repr(source.starting_at(0, 24))
        assert len(pickle.dumps(source)) > 10**5  # elsewhere nothing depends on a file
        del parcel_, received
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("collect_at_the_end")
def test_what_grain_pickles_is_small(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 9, 10**6)
    tokens = np.arange(lengths.sum()) % 100
    sequences = sp.FlatSequences(tokens, np.concatenate([[0], np.cumsum(lengths)]))
    source = sp.pack_dataset(sequences, 512, batch_size=8)
    sizes, dumps = [], cloudpickle.dumps

    def measured(*args, **options):
        data = dumps(*args, **options)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(cloudpickle, "dumps", measured)
    iterator = iter(PackedDataset(source, num_workers=1))
    equal([next(iterator), next(iterator)], [source[0], source[1]])
    iterator.close()
    assert sizes
    assert max(sizes) < 100_000


def test_small_sources_need_no_files(temporary):
    source = source_of()
    sent = SentSource(source, Parcel(source), (0, 0))
    received = pickle.loads(cloudpickle.dumps(sent))
    equal(list(received), list(source))
    equal([sent[3]], [source[3]])
    assert (len(sent), repr(sent)) == (len(source), repr(source))
    assert list(temporary.iterdir()) == []


def test_arrays_in_workers_cannot_be_written_to(temporary):
    tokens = np.arange(100_000)
    source = sp.pack_dataset(sp.FlatSequences(tokens, np.arange(0, 100_001, 50)), 64, batch_size=2)
    kept = Parcel(source)
    received = pickle.loads(cloudpickle.dumps(SentSource(source, kept, (0, 0))))
    assert not received.sequences.tokens.flags.writeable
    assert received.sequences.tokens.ctypes.data % 64 == 0
    assert len(list(temporary.iterdir())) == 1


def test_what_cannot_be_sent(tmp_path, monkeypatch):
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return [1]

    with pytest.raises(sp.SeqpackError, match="cannot be pickled for worker processes"):
        Parcel(sp.pack_dataset(Locked(), 8, lengths=[1, 1, 1], batch_size=1))
    large = source_of(n=5000)
    monkeypatch.setattr(parcel, "_MUCH_TO_UNPICKLE", 10**5)
    with pytest.warns(UserWarning, match=r"each worker unpickles 0\.\d MB .* FlatSequences"):
        Parcel(large)
    monkeypatch.setattr(parcel, "_MUCH_TO_UNPICKLE", 10**8)
    monkeypatch.setattr(Parcel, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(sp.SeqpackError, match=r"0\.\d MB cannot be written to .* set TMPDIR"):
        Parcel(large)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import os, sys
import numpy as np
import seqpack_jax as sp
from seqpack_jax.feeding.parcel import Parcel
from seqpack_jax.feeding.resuming import PackedDataset
sequences = [np.ones(5, int)] * 5 + [np.ones(50, int) for _ in range(20_000)]
data = PackedDataset(sp.pack_dataset(sequences, 64, batch_size=2), num_workers=1)
folder = data._parcel.folder
if os.fork() == 0:
    sys.exit()  # runs the finalizers of this copy
os.wait()
print(os.path.exists(folder), folder)
"""


@pytest.mark.slow
def test_files_are_removed_by_their_owner_at_the_end():
    environment = dict(os.environ, PYTHONWARNINGS="ignore::DeprecationWarning")
    output = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True, env=environment)
    existed, folder = output.split()
    assert existed == "True"
    assert not os.path.exists(folder)


# --- digests of pools ------------------------------------------------------------------------


def test_pools_with_equal_ids_have_one_digest():
    lengths = np.random.default_rng(0).integers(1, 40, 3000)
    options = {"max_seq_len": 25, "over_length": "split"}
    _, pools = sp.length_histogram_from_lengths(lengths, **options)
    cuts = ((0, 1000), (1000, 1001), (1001, 3000))
    shards = [sp.length_histogram_from_lengths(lengths[a:b], **options)[1] for a, b in cuts]
    sharded = sp.SequencePools.from_shards(shards, bases=[start for start, _ in cuts])
    narrow = sp.SequencePools(pools.ids.astype(np.uint16), pools.starts, pools.pieces)
    digest = pools.digest()
    assert len(digest) == 32
    assert set(digest) <= set("0123456789abcdef")
    assert sharded.digest() == narrow.digest() == digest
    assert pickle.loads(pickle.dumps(pools)).digest() == digest
    fresh = sp.length_histogram_from_lengths(lengths, **options)[1]
    assert pickle.loads(pickle.dumps(fresh)).digest() == digest
    wide = np.append(pools.starts, pools.starts[-1])
    assert sp.SequencePools(pools.ids, wide, pools.pieces).digest() == digest


def test_pools_of_other_ids_have_other_digests():
    lengths = np.array([3, 5, 5, 2, 9])
    pools = sp.length_histogram_from_lengths(lengths)[1]
    swapped = pools.ids.copy()
    swapped[[2, 3]] = swapped[[3, 2]]
    split = sp.length_histogram_from_lengths(lengths, 5, over_length="split")[1]
    table = split.pieces.table + np.array([0, 1, 1, 2])
    moved = sp.SequencePools(split.ids, split.starts, split.pieces._replace(table=table))
    found = [
        pools,
        sp.SequencePools(swapped, pools.starts),
        sp.SequencePools(pools.ids + 1, pools.starts),
        sp.length_histogram_from_lengths([3, 5, 5, 2, 8])[1],
        sp.length_histogram_from_lengths([3, 5, 5, 2])[1],
        split,
        moved,
        sp.SequencePools.identity(pools.counts),
        pools.coarsen(2, 10),
    ]
    assert len({each.digest() for each in found}) == len(found)


def test_identity_is_no_other_than_its_ids_written_out():
    lengths = np.sort(np.random.default_rng(0).integers(1, 40, 300_000))
    written = sp.length_histogram_from_lengths(lengths)[1]
    assert written.digest() == sp.SequencePools.identity(written.counts).digest()


def test_prepared_pools_take_the_digest_of_their_files(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    options = {"max_rows": 100, "over_length": sp.OverLength("split")}
    source = write_lengths(tmp_path / "in", lengths)
    prepare_in_shards(source, tmp_path / "one", 20, **options)
    prepare_in_shards(source, tmp_path / "two", 20, **options)
    other = write_lengths(tmp_path / "other", lengths[::-1])
    prepare_in_shards(other, tmp_path / "three", 20, **options)
    monkeypatch.setattr("seqpack_jax.planning.histogram._digest_of", None)  # no id is read
    one, two, three = (sp.load_prepared(tmp_path / name).pools for name in ("one", "two", "three"))
    assert one.digest() == two.digest() != three.digest()
    assert pickle.loads(pickle.dumps(one)).digest() == one.digest()
    prepared = sp.load_prepared(tmp_path / "one")
    assert pickle.loads(pickle.dumps(prepared)).pools.digest() == one.digest()
    data = PackedDataset(sp.PackedSource(prepared.plan, prepared.pools, [], batch_size=2))
    assert data.identity["pools"] == one.digest()


# --- a state of version 1 --------------------------------------------------------------------


def fixture_source():
    """What the state in tests/fixtures was taken of: no other seed, lengths or options, ever."""
    rng = np.random.default_rng(20)
    sequences = [rng.integers(1, 1000, n) for n in rng.integers(1, 100, 300)]
    return sp.pack_dataset(
        sequences, CAPACITY, batch_size=2, seed=7, epochs=2, over_length="split", tolerance=2
    )


def digests_of(items):
    return [hashlib.sha256(b"".join(row)).hexdigest()[:16] for row in rows_in(items)]


def make_fixture():
    """Write the fixture: done once for version 1, and never again.

    The file is what users have in their checkpoints.  If the test below fails, the code is wrong:
    a release that cannot resume the state would lose their place.  A later version of the format
    gets a file of its own, beside this one.
    """
    assert not FIXTURE.exists()
    iterator = iter(PackedDataset(fixture_source()))
    for _ in range(100):
        next(iterator)
    state = iterator.get_state()
    kept = {"state": state, "rows": digests_of(next(iterator) for _ in range(10))}
    FIXTURE.write_text(json.dumps(kept, indent=1) + "\n")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_state_of_version_1_resumes(batch_size):
    saved = json.loads(FIXTURE.read_text())
    source = fixture_source()
    source = sp.PackedSource(
        source.plan, source.pools, source.sequences, seed=7, epochs=2, batch_size=batch_size
    )
    iterator = iter(PackedDataset(source))
    iterator.set_state(saved["state"])
    found = digests_of(next(iterator) for _ in range(20 // batch_size))
    assert found == saved["rows"]


def test_the_fixture_is_never_written_again():
    assert FIXTURE.exists()
    with pytest.raises(AssertionError):
        make_fixture()
