"""Grain: every id once per epoch, known steps, and exact resume at every step."""

import json
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest
from comparing import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_directories import triplets
from strategies import random_sequences

import seqpack_jax as sp

CAPACITY = 64
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def lengths_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(2.5, 0.8, n)), 1, CAPACITY).astype(int)


def numbered(lengths):
    """Sequence `i` is `i + 1` in every token, so that a row says which sequences it holds."""
    return [np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)]


def source_of(n=120, **options):
    options = {"batch_size": 4, "seed": 3, "epochs": 2} | options
    return sp.pack_dataset(numbered(lengths_of(n)), CAPACITY, **options)


def ids_in(batches):
    """The sequences in a list of batches, checking that each is whole, in order of appearance."""
    found = []
    for batch in batches:
        rows = [np.atleast_2d(batch[name]) for name in ("tokens", "segment_ids", "positions")]
        for tokens, segments, positions in zip(*rows, strict=True):
            for segment in range(1, segments.max(initial=0) + 1):
                part = segments == segment
                assert len(set(tokens[part])) == 1
                assert positions[part].tolist() == list(range(part.sum()))
                found.append(int(tokens[part][0]) - 1)
            assert not tokens[segments == 0].any()
            assert not positions[segments == 0].any()
    return found


@settings(max_examples=40)
@given(
    n=st.integers(1, 60),
    seed=st.integers(-(2**70), 2**70),
    epochs=st.integers(1, 3),
    batch_size=st.none() | st.integers(1, 6),
    count=st.integers(1, 4),
    shuffle=st.booleans(),
    tolerance=st.integers(1, 6),
    cap=st.none() | st.integers(1, 4),
)
def test_every_sequence_once_per_epoch_over_all_shards(
    n, seed, epochs, batch_size, count, shuffle, tolerance, cap
):
    lengths = lengths_of(n)
    shards = [
        sp.pack_dataset(
            numbered(lengths),
            CAPACITY,
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            shard=(index, count),
            shuffle=shuffle,
            tolerance=tolerance,
            max_segments=cap,
        )
        for index in range(count)
    ]
    assert len({len(shard) for shard in shards}) == 1
    steps = shards[0].steps_per_epoch
    assert len(shards[0]) == epochs * steps
    for epoch in range(epochs):
        items = [s[i] for i in range(epoch * steps, (epoch + 1) * steps) for s in shards]
        assert sorted(ids_in(items)) == list(range(n))
        shape = (CAPACITY,) if batch_size is None else (batch_size, CAPACITY)
        assert all(array.shape == shape for item in items for array in item.values())
        assert all(array.dtype == np.int32 for item in items for array in item.values())
        if cap:
            assert max(item["segment_ids"].max() for item in items) <= cap


def test_a_step_is_the_same_for_any_number_of_processes():
    whole = source_of(batch_size=8)
    for count in (2, 4, 8):
        shards = [source_of(batch_size=8 // count, shard=(i, count)) for i in range(count)]
        assert len(shards[0]) == len(whole)
        for step in range(len(whole)):
            parts = [shard[step] for shard in shards]
            joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
            equal([joined], [whole[step]])


def test_drop_leaves_out_what_does_not_fill_a_step():
    padded, dropped = (source_of(n=130, epochs=1, remainder=r) for r in ("pad", "drop"))
    assert padded.plan.num_bins % 4
    assert len(dropped) == len(padded) - 1
    equal([dropped[i] for i in range(len(dropped))], [padded[i] for i in range(len(dropped))])
    with pytest.raises(sp.SeqpackError, match="no step is left"):
        source_of(n=3, batch_size=50, remainder="drop")


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("run", [3, 32])
def test_items_do_not_depend_on_the_order_of_reading(batch_size, count, run, monkeypatch):
    """Reading in order draws and fills rows in blocks, other reading by item: the same items."""
    monkeypatch.setattr("seqpack_jax.feeding.packed_source._BLOCK_ROWS", 10)
    monkeypatch.setattr("seqpack_jax.feeding.packed_source._RUN", run)
    options = {"batch_size": batch_size, "shard": (count - 1, count)}
    source = source_of(**options)
    in_order = [source[i] for i in range(len(source))]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 3)).tolist()
    equal([source[i] for i in order], [in_order[i] for i in order])
    equal([source_of(**options)[i] for i in order], [in_order[i] for i in order])


def test_threads_share_a_source():
    source = source_of(batch_size=None)
    in_order = [source[i] for i in range(len(source))]
    with ThreadPoolExecutor(8) as pool:
        equal(list(pool.map(source_of(batch_size=None).__getitem__, range(len(source)))), in_order)


def test_epochs_pair_anew():
    source = source_of()
    steps = source.steps_per_epoch
    first, second = (ids_in(source[e * steps + i] for i in range(steps)) for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_splitting_feeds_every_token():
    lengths = [200, 30, 65, 64, 1]
    sequences = random_sequences(lengths)
    source = sp.pack_dataset(sequences, CAPACITY, batch_size=2, over_length="split")
    tokens = np.concatenate(
        [b["tokens"][b["segment_ids"] > 0] for b in map(source.__getitem__, range(len(source)))]
    )
    assert sorted(tokens.tolist()) == sorted(np.concatenate(sequences).tolist())
    with pytest.raises(sp.SeqpackError, match=r"lengths\[0\] = 200, but max_seq_len is 64"):
        sp.pack_dataset(sequences, CAPACITY, batch_size=2)
    with pytest.raises(sp.SeqpackError, match="over_length = 'cut' is not known"):
        sp.pack_dataset(sequences, CAPACITY, batch_size=2, over_length="cut")


def test_lengths_can_be_given_and_are_checked_when_read():
    sequences = numbered([5, 6])
    source = sp.pack_dataset(sequences, CAPACITY, lengths=[5, 6], batch_size=1)
    assert sorted(ids_in([source[0]])) == [0, 1]
    wrong = sp.pack_dataset(sequences, CAPACITY, lengths=[5, 7], batch_size=1)
    with pytest.raises(sp.SeqpackError, match="sequence 1 has 6 tokens, but 7 were planned"):
        wrong[0]
    close = sp.pack_dataset(sequences, CAPACITY, lengths=[5, 7], batch_size=1, tolerance=4)
    assert sorted(ids_in([close[0]])) == [0, 1], "6 and 7 are planned alike"


def test_an_optimal_plan_feeds_in_fewer_rows(tmp_path):
    """In one call, and from a prepared directory: the same source."""
    lengths = triplets(60)
    sequences = numbered(lengths)
    options = {"batch_size": 4, "seed": 3, "epochs": 2}
    greedy = sp.pack_dataset(sequences, 100, **options)
    source = sp.pack_dataset(sequences, 100, algorithm="optimal", budget=2, **options)
    assert 60 <= source.plan.num_bins < greedy.plan.num_bins
    steps = source.steps_per_epoch
    batches = [source[i] for i in range(len(source))]
    for epoch in range(2):
        assert sorted(ids_in(batches[epoch * steps : (epoch + 1) * steps])) == list(range(180))
    np.save(tmp_path / "lengths.npy", lengths)
    _, _, plan, pools = sp.prepare(
        tmp_path / "lengths.npy", tmp_path / "out", 100, algorithm="optimal", budget=2
    )
    prepared = sp.PackedSource(plan, pools, sequences, **options)
    equal([prepared[i] for i in range(len(prepared))], batches)
    state = iter(dataset(prepared, 0))
    equal([next(state) for _ in range(steps)], batches[:steps])


def test_no_record_is_read_for_a_planner_that_is_missing(monkeypatch):
    def read(record):
        raise AssertionError("was read")

    monkeypatch.setitem(sys.modules, "highspy", None)
    for options, part in [
        ({"algorithm": "next_fit"}, "worst_fit_decreasing, optimal; pack_sequences has next_fit"),
        ({"budget": 5}, "budget = 5 with algorithm = 'best_fit_decreasing'"),
        ({"algorithm": "optimal", "budget": -1}, "budget = -1, but it must be above 0"),
        ({"algorithm": "optimal"}, "the package highspy.*pip install 'seqpack_jax.optimal.'"),
    ]:
        with pytest.raises(sp.SeqpackError, match=f"^pack_dataset: .*{part}"):
            sp.pack_dataset(numbered([5, 6]), CAPACITY, lengths=read, batch_size=1, **options)
    both = {"inputs": 8, "targets": 8}
    for options in ({"algorithm": "optimal"}, {"budget": 5}, {"tolerance": 2}):
        with pytest.raises(sp.SeqpackError, match=r"several capacities.*for a single"):
            sp.pack_dataset([], both, lengths=read, batch_size=1, **options)


def test_bad_arguments():
    plan, pools = source_of().plan, source_of().pools
    for options, part in [
        ({"epochs": 0}, "epochs = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"shard": (2, 2)}, r"shard\[0\] = 2"),
        ({"shard": (0, 0)}, r"shard\[1\] = 0"),
        ({"shard": 1}, "shard = 1"),
        ({"shard": (0, 1, 2)}, r"shard = \(0, 1, 2\)"),
        ({"remainder": "keep"}, "choose one of pad, drop"),
        ({"seed": 0.5}, "seed = 0.5 is not an integer"),
        ({"pad_value": 2**31}, "pad_value = 2147483648"),
    ]:
        with pytest.raises(sp.SeqpackError, match=part):
            sp.PackedSource(plan, pools, [], **options)
    other = sp.length_histogram_from_lengths([5, 6])[1]
    with pytest.raises(sp.SeqpackError, match="the plan has"):
        sp.PackedSource(plan, other, [])
    source = source_of()
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"of {len(source)}"):
            source[index]
    with pytest.raises(sp.SeqpackError, match=r"index = 1.7 is not an integer"):
        source[1.7]
    with pytest.raises(sp.SeqpackError, match="there are no sequences"):
        sp.pack_dataset([], CAPACITY, batch_size=1)
    for sequences in (3, None, iter([[1]]), [1, 2], {1}):
        with pytest.raises(sp.SeqpackError, match="cannot be counted"):
            sp.pack_dataset(sequences, CAPACITY, batch_size=1)
    with pytest.raises(sp.SeqpackError, match="there are 4 lengths, but 2 sequences"):
        sp.pack_dataset([[1], [2]], CAPACITY, lengths=[1] * 4, batch_size=1)


def test_grains_shard_options_name_a_shard():
    options = grain.sharding.ShardOptions(shard_index=1, shard_count=2)
    equal(list(source_of(shard=options)), list(source_of(shard=(1, 2))))


def test_a_missing_sequence_is_not_the_end():
    """An IndexError of the user's data would silently end an iteration."""

    class Short:
        def __len__(self):
            return 9

        def __getitem__(self, index):
            return [np.ones(4, int)][index]

    source = sp.pack_dataset(Short(), 8, lengths=[4] * 9, batch_size=2)
    with pytest.raises(sp.SeqpackError, match="is missing"):
        list(source)


def test_an_over_length_sequence_is_named_with_a_tolerance_too():
    source = sp.pack_dataset([np.ones(100, int)], 64, lengths=[64], batch_size=1, tolerance=8)
    with pytest.raises(sp.SeqpackError, match="sequence 0 has 100 tokens, but 64 were planned"):
        source[0]


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=20),
    tolerance=st.integers(1, 9),
    cap=st.none() | st.integers(1, 3),
)
def test_splitting_with_a_tolerance_and_a_cap(lengths, tolerance, cap):
    sequences = random_sequences(lengths)
    options = {"tolerance": tolerance, "max_segments": cap, "over_length": "split"}
    source = sp.pack_dataset(sequences, CAPACITY, batch_size=2, **options)
    items = list(source)
    tokens = np.concatenate([item["tokens"][item["segment_ids"] > 0] for item in items])
    assert sorted(tokens.tolist()) == sorted(np.concatenate(sequences).tolist())
    assert cap is None or max(item["segment_ids"].max() for item in items) <= cap


def test_what_was_drawn_stays_behind():
    source = source_of()
    before = len(pickle.dumps(source))
    _ = source[0], source[1], source[2]
    assert len(pickle.dumps(source)) == before


def test_repr_says_what_determines_the_items():
    base = source_of()
    assert base.plan.digest() in repr(base)
    assert repr(base) == repr(source_of())
    for options in (
        {"seed": 4},
        {"epochs": 3},
        {"batch_size": 2},
        {"shard": (0, 2)},
        {"remainder": "drop"},
        {"shuffle": False},
        {"pad_value": 1},
        {"n": 121},
    ):
        assert repr(source_of(**options)) != repr(base)
    assert isinstance(base, grain.sources.RandomAccessDataSource)


def test_what_a_worker_receives_is_small(tmp_path):
    lengths = np.full(200_000, 4)
    np.save(tmp_path / "tokens.npy", np.zeros(800_000, np.uint16))
    np.save(tmp_path / "offsets.npy", np.arange(0, 800_001, 4))
    counts, pools = sp.length_histogram_from_lengths(lengths)
    np.save(tmp_path / "ids.npy", pools.ids)
    tokens, offsets, ids = (
        np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "ids")
    )
    source = sp.PackedSource(
        sp.pack_length_histogram(counts, 512),
        sp.SequencePools(ids, pools.starts),
        sp.FlatSequences(tokens, offsets),
        batch_size=8,
    )
    data = pickle.dumps(source)
    assert len(data) < 100_000
    equal([pickle.loads(data)[5]], [source[5]])


def dataset(source, workers):
    steps = grain.MapDataset.source(source).to_iter_dataset(READ)
    return steps.mp_prefetch(grain.MultiprocessingOptions(workers)) if workers else steps


def loader(source, workers=0, operations=(), sampler=None):
    return grain.DataLoader(
        data_source=source,
        sampler=sampler or grain.samplers.SequentialSampler(len(source)),
        operations=operations,
        worker_count=workers,
        read_options=READ,
    )


def test_map_dataset_resumes_at_every_step():
    source = source_of()
    whole = [source[i] for i in range(len(source))]
    equal(list(dataset(source, 0)), whole)
    iterator = iter(dataset(source, 0))
    for step in range(len(source) + 1):
        restored = iter(dataset(source_of(), 0))
        restored.set_state(json.loads(json.dumps(iterator.get_state())))
        equal(list(restored), whole[step:])
        next(iterator, None)


def test_map_dataset_batches_rows():
    rows = source_of(batch_size=None)
    batched = grain.MapDataset.source(rows).batch(4, drop_remainder=True)
    assert sorted(ids_in(batched[i] for i in range(len(batched)))) == sorted(
        ids_in(rows[i] for i in range(4 * len(batched)))
    )
    assert batched[0]["tokens"].shape == (4, CAPACITY)


def test_data_loader_resumes_at_every_step():
    source = source_of()
    whole = [source[i] for i in range(len(source))]
    iterator = iter(loader(source))
    for step in range(len(source) + 1):
        restored = iter(loader(source_of()))
        restored.set_state(iterator.get_state())
        equal(list(restored), whole[step:])
        next(iterator, None)


def test_another_plan_is_refused_by_the_loader():
    state = iter(loader(source_of())).get_state()
    with pytest.raises(ValueError, match="PackedSource"):
        iter(loader(source_of(seed=4))).set_state(state)


@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize(
    ("kind", "workers"),
    [(dataset, 1), *(pytest.param(k, 2, marks=pytest.mark.slow) for k in (dataset, loader))],
)
def test_workers_give_the_same_batches_and_resume(kind, workers):
    source = source_of(n=60, epochs=1)
    whole = [source[i] for i in range(len(source))]
    iterator = iter(kind(source, workers))
    seen = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    equal(seen + list(iterator), whole)
    restored = iter(kind(source, workers))
    restored.set_state(state)
    equal(list(restored), whole[3:])


# --- PackOperation: records as they come -----------------------------------------------------


def records_of(n=150, seed=0):
    return [{"tokens": tokens, "name": "x"} for tokens in numbered(lengths_of(n, seed))]


class Records(list):
    def __repr__(self):
        return "Records"


def stream(n=150, workers=0, operation=None, epochs=1):
    records = Records(records_of(n))
    sampler = grain.samplers.IndexSampler(n, grain.sharding.NoSharding(), True, epochs, 5)
    operation = operation or sp.PackOperation(CAPACITY, batch_size=4)
    return loader(records, workers, [operation], sampler)


def test_the_operation_feeds_every_record_once_in_order():
    batches = list(stream())
    found = ids_in(batches)
    assert sorted(found) == list(range(150))
    assert all(b["tokens"].shape == (4, CAPACITY) for b in batches)
    # A batch takes a prefix of the stream: record sets of batches follow the sampler's order.
    sampler = grain.samplers.IndexSampler(150, grain.sharding.NoSharding(), True, 1, 5)
    order = [sampler[i].record_key for i in range(150)]
    start = 0
    for batch in batches:
        ids = ids_in([batch])
        assert set(ids) == set(order[start : start + len(ids)])
        start += len(ids)


def test_the_operation_resumes_at_every_step():
    whole = list(stream())
    iterator = iter(stream())
    for step in range(len(whole) + 1):
        restored = iter(stream())
        restored.set_state(iterator.get_state())
        equal(list(restored), whole[step:])
        next(iterator, None)


@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize(
    ("workers", "steps"),
    [(1, [2]), *(pytest.param(w, [0, 1, 2, -1], marks=pytest.mark.slow) for w in (1, 2))],
)
def test_the_operation_resumes_with_workers(workers, steps):
    iterator = iter(stream(workers=workers))
    states, whole = [iterator.get_state()], []
    for batch in iterator:
        whole.append(batch)
        states.append(iterator.get_state())
    assert sorted(ids_in(whole)) == list(range(150))
    for step in steps:
        restored = iter(stream(workers=workers))
        restored.set_state(states[step])
        equal(list(restored), whole[step:] if step >= 0 else [])


def test_the_resume_check_can_fail():
    """Grain's own operation loses the record that it carries over (reference: grain#de51221)."""

    def theirs():
        records = Records({"tokens": record["tokens"]} for record in records_of())
        operation = grain.experimental.PackAndBatchOperation({"tokens": CAPACITY}, 4)
        return loader(records, 0, [operation])

    logging.disable(logging.CRITICAL)  # it calls itself deprecated
    try:
        iterator = iter(theirs())
        next(iterator)
        restored = iter(theirs())
        restored.set_state(iterator.get_state())
        rest, found = ([batch[0]["tokens"] for batch in it] for it in (iterator, restored))
    finally:
        logging.disable(logging.NOTSET)
    assert set(np.unique(rest)) - set(np.unique(found))


def test_a_live_set_state_forgets_what_was_read():
    whole = list(stream())
    iterator = iter(stream())
    next(iterator)
    state = iterator.get_state()
    ahead = [next(iterator) for _ in range(4)]
    iterator.set_state(state)
    equal([next(iterator) for _ in range(4)], ahead)
    rest = list(iterator)
    equal(rest, whole[5:])
    iterator.set_state(state)
    equal(list(iterator), whole[1:])


def test_an_error_loses_no_record():
    records = Records(records_of(30))
    records[7] = {"tokens": np.array([2**40])}
    iterator = iter(loader(records, 0, [sp.PackOperation(CAPACITY, batch_size=4)]))
    for _ in range(2):
        with pytest.raises(sp.SeqpackError, match="the token 1099511627776, beyond int32"):
            next(iterator)


def test_one_operation_serves_many_passes():
    operation = sp.PackOperation(CAPACITY, batch_size=4)
    packing = stream(operation=operation)
    first = list(packing)
    one, two = iter(packing), iter(packing)
    interleaved = [(next(one), next(two)) for _ in first]
    equal([a for a, _ in interleaved], first)
    equal([b for _, b in interleaved], first)


def test_the_operation_beside_other_operations():
    class Double(grain.transforms.Map):
        def map(self, element):
            return element | {"tokens": np.repeat(element["tokens"], 2)[:CAPACITY]}

    class Long(grain.transforms.Filter):
        def filter(self, element):
            return len(element["tokens"]) > 6

    class Count(grain.transforms.Map):
        def map(self, element):
            return element | {"real": int((element["segment_ids"] > 0).sum())}

    def make(keep=True):
        operations = [Long(), Double(), sp.PackOperation(CAPACITY, batch_size=4), Count()]
        return loader(Records(records_of()), 0, operations)

    whole = list(make())
    assert sum(b["real"] for b in whole) == sum(
        min(2 * n, CAPACITY) for n in lengths_of(150) if n > 6
    )
    iterator = iter(make())
    for step in range(len(whole)):
        restored = iter(make())
        restored.set_state(iterator.get_state())
        assert [b["real"] for b in restored] == [b["real"] for b in whole[step:]]
        next(iterator)


def test_an_empty_stream_yields_nothing():
    class Nothing(grain.transforms.Filter):
        def filter(self, element):
            return False

    operations = [Nothing(), sp.PackOperation(CAPACITY, batch_size=4)]
    assert list(loader(Records(records_of(5)), 0, operations)) == []


def test_the_operation_works_on_a_plain_iterator():
    records = [grain.Record(grain.RecordMetadata(i), r) for i, r in enumerate(records_of(9))]
    packed = sp.PackOperation(CAPACITY, batch_size=4)(iter(records))
    assert sorted(ids_in(record.data for record in packed)) == list(range(9))


def test_the_operation_pads_and_names_its_feature():
    records = Records([{"text": np.array([5, 6])}])
    operation = sp.PackOperation(4, 2, feature="text", pad_value=-1)
    (batch,) = loader(records, 0, [operation])
    assert batch["text"].tolist() == [[5, 6, -1, -1], [-1, -1, -1, -1]]
    assert repr(pickle.loads(pickle.dumps(operation))) == repr(operation)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"tokens": np.zeros(65, int)}, "record 1 has 65 tokens, but a length is in [1, 64]"),
        ({"tokens": np.zeros(3)}, "record 1 has shape (3,) and dtype float64"),
        ({"tokens": np.zeros((2, 2), int)}, "record 1 has shape (2, 2)"),
        ({"text": np.zeros(3, int)}, "record 1 has no feature 'tokens'"),
    ],
)
def test_records_that_cannot_be_packed_are_refused(record, part):
    records = Records([{"tokens": np.ones(3, int)}, record])
    with pytest.raises(sp.SeqpackError, match="Hint") as caught:
        list(loader(records, 0, [sp.PackOperation(CAPACITY, 4)]))
    assert part in str(caught.value)
