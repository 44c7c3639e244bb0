"""Records of several features through `PackedSource`: every value once, for any way of reading."""

import json
import pickle
import threading
from collections import Counter
from typing import Any, NamedTuple

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import CAPACITY, CUTS, kept

import seqpack_jax as sp
from seqpack_jax.feeding.batch import unpack_batch, unpack_by_id
from seqpack_jax.feeding.reading import read_records
from seqpack_jax.feeding.token_store import KeyedSequences
from seqpack_jax.planning.over_length import OverLength
from seqpack_jax.planning.vectors import pack_vectors

LENGTHS = [5, 9, 16, 1, 3, 0, 7, 12, 2, 2, 8, 0, 4, 11]
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def record_of(index, length):
    """Token `t` of record `i` is `1000 * i + t`, and the other features say the same."""
    tokens = 1000 * index + np.arange(length, dtype=np.int32)
    vectors = np.stack([tokens, -tokens], axis=1).astype(np.float32)
    return {"tokens": tokens, "vectors": vectors, "weight": np.float32(index)}


def records_of(lengths):
    return [record_of(index, length) for index, length in enumerate(lengths)]


def pair_of(index, lengths):
    """A record of `inputs` and `targets`, whose tokens say where they are from."""
    one, two = lengths
    return {
        "inputs": 1000 * index + np.arange(one, dtype=np.int32),
        "targets": 1000 * index + 500 + np.arange(two, dtype=np.int64),
        "tag": np.int16(index),
    }


def segments_of(batches, feature="tokens"):
    """`(id, values)` of each segment, in order of appearance."""
    found = []
    for batch in batches:
        ids = batch["ids"][batch["ids"] >= 0].tolist()
        arrays = unpack_batch(batch, feature)
        found += [(i, a.tolist()) for i, a in zip(ids, arrays, strict=True)]
    return found


def joined(parts):
    return {
        name: joined([part[name] for part in parts])
        if isinstance(parts[0][name], dict)
        else np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }


def equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name])


# --- conservation ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any),
    action=st.sampled_from(["drop", *CUTS, "split"]),
    options=st.fixed_dictionaries(
        {
            "seed": st.integers(-5, 2**64),
            "zones": st.integers(1, 5),
            "tolerance": st.integers(1, 4),
            "multiple_of": st.sampled_from([1, 2, 8]),
            "max_segments": st.none() | st.integers(1, 4),
            "shuffle": st.booleans(),
            "read_threads": st.integers(1, 3),
        }
    ),
    batch_size=st.integers(1, 4),
    count=st.integers(1, 3),
)
def test_every_value_of_every_feature_comes_once(lengths, action, options, batch_size, count):
    if action == "drop":
        lengths = [*lengths, 3]
    policy = OverLength(action)
    shards = [
        sp.pack_dataset(
            records_of(lengths),
            CAPACITY,
            batch_size=batch_size,
            over_length=policy,
            epochs=2,
            metadata=True,
            shard=(i, count),
            **options,
        )
        for i in range(count)
    ]
    steps = shards[0].steps_per_epoch
    assert shards[0].empty_records == lengths.count(0)
    for epoch in range(2):
        items = [s[i] for i in range(epoch * steps, (epoch + 1) * steps) for s in shards]
        check_items(items, policy, lengths)
        assert all((b["segment_lengths"] > 0).sum(axis=1).any() == b["row_valid"].any()
                   for b in items)  # fmt: skip
        if options["multiple_of"] > 1:
            starts = [np.flatnonzero(np.diff(row, prepend=0) > 0)
                      for b in items for row in b["segment_ids"]]  # fmt: skip
            assert not (np.concatenate(starts) % options["multiple_of"]).any()


def check_items(items, policy, lengths):
    """Compare the segments of an epoch with what the policy keeps of each record."""
    tokens = [values for _, values in segments_of(items)]
    windows = {values[0] // 1000: values[0] % 1000 for values in tokens}
    expected = [
        segment
        for i, n in enumerate(lengths)
        if n
        for segment in kept(policy, record_of(i, n)["tokens"].tolist(), windows.get(i))
    ]
    assert sorted(tokens) == sorted(expected)
    for batch in items:
        np.testing.assert_array_equal(batch["vectors"][..., 0], batch["tokens"])
        np.testing.assert_array_equal(batch["vectors"][..., 1], -batch["tokens"])
        for row, ids in enumerate(batch["ids"]):
            sources = [batch["tokens"][row][batch["segment_ids"][row] == k + 1][0] // 1000
                       for k in range((ids >= 0).sum())]  # fmt: skip
            assert batch["weight"][row][: len(sources)].tolist() == sources
            whole = ids[: len(sources)] < len(lengths)
            assert ids[: len(sources)][whole].tolist() == np.array(sources, int)[whole].tolist()
            assert not batch["weight"][row][len(sources) :].any()


pairs = st.tuples(st.integers(0, 14), st.integers(0, 9))


@settings(max_examples=60)
@given(
    lengths=st.lists(pairs, min_size=1, max_size=20).filter(lambda each: any(map(any, each))),
    action=st.sampled_from(["drop", "truncate", "truncate_left"]),
    seed=st.integers(0, 2**32),
    zones=st.integers(1, 4),
    batch_size=st.none() | st.integers(1, 3),
    count=st.integers(1, 3),
    multiple_of=st.sampled_from([1, 2]),
)
def test_several_capacities(lengths, action, seed, zones, batch_size, count, multiple_of):
    lengths = [*lengths, (1, 2)]
    capacities = {"inputs": 10, "targets": 6}
    shards = [
        sp.pack_dataset(
            [pair_of(i, each) for i, each in enumerate(lengths)],
            capacities,
            batch_size=batch_size,
            over_length=action,
            metadata=True,
            seed=seed,
            zones=zones,
            multiple_of=multiple_of,
            shard=(i, count),
        )
        for i in range(count)
    ]
    items = [shard[i] for i in range(len(shards[0])) for shard in shards]
    if batch_size is None:
        items = [{name: array[None] for name, array in item.items()} for item in items]
    fits = [a <= 10 and b <= 6 for a, b in lengths]
    packed = [i for i, each in enumerate(lengths) if any(each) and (fits[i] or action != "drop")]
    for feature, limit in capacities.items():
        expected = []
        for i in packed:
            tokens = pair_of(i, lengths[i])[feature].tolist()
            tokens = tokens[:limit] if action != "truncate_left" else tokens[-limit:]
            expected.append((i, tokens))
        assert sorted(segments_of(items, feature)) == expected
        assert all(item[feature].dtype == np.int32 for item in items)
    tags = [i for item in items for i in item["tag"][item["ids"] >= 0].tolist()]
    assert sorted(tags) == packed
    report, over = shards[0].pools.report, [each for each in lengths if each[0] > 10 or each[1] > 6]
    lost = sum(map(sum, lengths)) - sum(
        len(tokens) for name in capacities for _, tokens in segments_of(items, name)
    )
    assert (report.sequences, report.dropped_tokens) == (len(over), lost)
    assert report.tokens == sum(map(sum, over))
    assert shards[0].empty_records == lengths.count((0, 0))


def test_nested_records_and_dtypes():
    class Pair(tuple):
        pass

    records = [
        {"tokens": np.arange(n, dtype=np.uint16), "a": {"b": np.ones(n, np.float16)}, "n": n}
        for n in (3, 2)
    ]
    item = sp.pack_dataset(records, 4, batch_size=3)[0]
    assert item["tokens"].dtype == np.int32
    assert item["a"]["b"].dtype == np.float16
    assert sorted(item["n"][:, 0].tolist()) == [0, 2, 3]
    rows = sp.pack_dataset(records, 4, batch_size=None)
    assert rows[0]["a"]["b"].shape == (4,)


def test_one_capacity_by_name_may_be_of_any_dtype():
    records = [{"x": np.full((n, 2), n, np.float64)} for n in (3, 1)]
    source = sp.pack_dataset(records, {"x": 4}, batch_size=1)
    assert source[0]["x"].tolist() == [[[3.0, 3.0]] * 3 + [[1.0, 1.0]]]
    tokens = [{"text": np.arange(n)} for n in (3, 1)]
    assert sp.pack_dataset(tokens, 4, feature="text", batch_size=1)[0]["text"].shape == (1, 4)


def test_what_several_records_differ_in_is_named():
    records = records_of([3, 4])
    del records[1]["weight"]
    source = sp.pack_dataset(records, CAPACITY, batch_size=1)
    with pytest.raises(sp.SeqpackError, match=r"sequence 0 has a feature 'weight', sequence 1"):
        source[0]
    records = records_of([3, 4])
    records[1]["vectors"] = records[1]["vectors"].astype(np.float64)
    source = sp.pack_dataset(records, CAPACITY, batch_size=1)
    with pytest.raises(sp.SeqpackError, match=r"float(32|64).*float(64|32)"):
        source[0]


# --- hosts, positions, evaluation ----------------------------------------------------------------


def source_of(lengths=LENGTHS * 4, **options):
    options = {"batch_size": 4, "seed": 3, "epochs": 2, "metadata": True, "zones": 3} | options
    return sp.pack_dataset(records_of(lengths), CAPACITY, **options)


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_a_global_batch_is_the_same_for_any_number_of_hosts(remainder):
    whole = source_of(batch_size=8, remainder=remainder)
    for count in (1, 2, 4, 8):
        shards = [
            source_of(batch_size=8 // count, shard=(i, count), remainder=remainder)
            for i in range(count)
        ]
        assert {len(shard) for shard in shards} == {len(whole)}
        for step in range(len(whole)):
            equal(joined([shard[step] for shard in shards]), whole[step])


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_starting_at_goes_on_with_the_next_row(batch_size):
    rows = source_of(batch_size=1)
    bins = rows.plan.num_bins
    every = [rows[i] for i in range(len(rows))]
    for epoch in range(3):
        for row in range(bins + 1 if epoch < 2 else 1):
            rest = source_of(batch_size=batch_size).starting_at(epoch, row)
            later = every[epoch * bins + row :]
            items = list(rest)
            assert len(items) == len(rest)
            found = Counter(i for item in items for i in item["ids"].reshape(-1).tolist())
            want = Counter(i for item in later for i in item["ids"].reshape(-1).tolist())
            found.pop(-1, None), want.pop(-1, None)
            assert found == want
            for step in range(len(rest)):
                at_epoch, at_row = rest.position(step)
                first = every[at_epoch * bins + at_row]
                item = items[step]
                item = item if batch_size is None else {n: a[0] for n, a in item.items()}
                equal(item, {n: a[0] for n, a in first.items()})
            assert rest.position(len(rest)) == (2, 0)


def test_starting_at_is_the_same_for_any_number_of_hosts():
    whole = source_of(batch_size=4).starting_at(0, 5)
    assert (whole.rows_per_step, whole.position(1)) == (4, (0, 9))
    shards = [source_of(batch_size=2, shard=(i, 2)).starting_at(0, 5) for i in range(2)]
    assert len(shards[0]) == len(whole)
    for step in range(len(whole)):
        equal(joined([shard[step] for shard in shards]), whole[step])
    again = pickle.loads(pickle.dumps(whole))
    equal(again[2], whole[2])
    assert repr(again) == repr(whole) != repr(source_of(batch_size=4))
    equal(whole.starting_at(0, 0)[0], source_of(batch_size=4)[0])


def test_drop_leaves_out_what_is_left_of_the_epoch():
    source = source_of(remainder="drop", batch_size=3)
    bins = source.plan.num_bins
    rest = source.starting_at(0, bins - 2)
    assert len(rest) == source.steps_per_epoch
    assert rest.position(0) == (1, 0)
    assert len(source.starting_at(1, bins - 2)) == 0
    assert len(source.starting_at(1, bins - 4)) == 1


def test_a_position_that_is_not_there():
    source = source_of(batch_size=4)
    bins = source.plan.num_bins
    for epoch, row, part in [
        (3, 0, "epoch = 3"),
        (-1, 0, "epoch = -1"),
        (0, bins + 1, f"rows = {bins + 1}"),
        (2, 1, "rows = 1"),
        (0, -1, "rows = -1"),
    ]:
        with pytest.raises(sp.SeqpackError, match=f"PackedSource.starting_at: {part}, but it must"):
            source.starting_at(epoch, row)
    with pytest.raises(sp.SeqpackError, match=f"index = {len(source) + 1}, but it must"):
        source.position(len(source) + 1)


def test_settings_are_json_and_name_what_determines_the_rows():
    base = source_of().settings
    assert json.loads(json.dumps(base)) == base
    for options in ({"batch_size": 2}, {"shard": (1, 2)}, {"epochs": 5}, {"remainder": "drop"}):
        assert source_of(**options).settings == base
    transform = {"transform": lambda record, rng: record}
    for options in (
        {"shuffle": False}, {"zones": 2}, {"over_length": "drop"}, {"multiple_of": 2},
        {"pad_value": 1}, {"bos_id": 1, "lengths": [3] * 9}, {"eos_id": 1, "lengths": [3] * 9},
        transform,
    ):  # fmt: skip
        lengths = {"lengths": options.get("lengths", LENGTHS * 4)}
        looks = options.keys() <= {"multiple_of", "pad_value"}  # of arrays; the plan is compared
        assert (source_of(**(options | lengths)).settings == base) == looks
        assert repr(source_of(**(options | lengths))) != repr(source_of(**lengths))
    assert "0x" not in repr(source_of(**transform)), "an address changes from run to run"
    other = sp.pack_dataset(records_of(LENGTHS[::-1] * 4), CAPACITY, batch_size=4)
    assert other.pools.digest() in repr(other) != repr(source_of(epochs=1, seed=0))


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_back_in_the_order_of_the_input(count):
    shards = [source_of(LENGTHS, shuffle=False, epochs=1, shard=(i, count)) for i in range(count)]
    found, rows = {}, 0
    for batch in (shard[i] for i in range(len(shards[0])) for shard in shards):
        results = unpack_by_id(batch, values=batch["tokens"] * 2)
        assert not found.keys() & results.keys()
        found |= results
        rows += int(batch["row_valid"].sum())
    assert sorted(found) == [i for i, n in enumerate(LENGTHS) if n]
    for index, values in found.items():
        assert values.tolist() == (2 * record_of(index, LENGTHS[index])["tokens"]).tolist()
    assert rows == shards[0].plan.num_bins


def test_fewer_rows_than_one_global_batch():
    shards = [source_of([3, 4, 16], epochs=1, shard=(i, 4)) for i in range(4)]
    assert [len(shard) for shard in shards] == [1] * 4
    items = [shard[0] for shard in shards]
    assert sorted(i for i, _ in segments_of(items)) == [0, 1, 2]
    assert [item["row_valid"].sum() for item in items] == [2, 0, 0, 0]
    for item in items[1:]:  # batches without a segment look like all others
        assert {n: (a.shape, a.dtype) for n, a in item.items()} == {
            n: (a.shape, a.dtype) for n, a in items[0].items()
        }
    with pytest.raises(sp.SeqpackError, match="the plan has 2 rows, a step takes 16: no step"):
        source_of([3, 4, 16], shard=(0, 4), remainder="drop")


# --- transforms, BOS and EOS ---------------------------------------------------------------------


def noise(record, rng):
    return record | {"vectors": rng.random((len(record["tokens"]), 2))}


def noise_of(source):
    return {
        (i // source.steps_per_epoch, index): values
        for i, item in enumerate(source)
        for index, values in segments_of([item], "vectors")
    }


def test_a_transform_draws_from_seed_epoch_and_id_alone():
    base = noise_of(source_of(transform=noise))
    assert len(base) == 2 * len([n for n in LENGTHS * 4 if n])
    assert base == noise_of(source_of(transform=noise, batch_size=3, max_segments=2, shuffle=False))
    parts = {}
    for i in range(3):
        parts |= noise_of(source_of(transform=noise, shard=(i, 3), zones=1, tolerance=4))
    assert parts == base
    assert noise_of(source_of(transform=noise, seed=4))[0, 0] != base[0, 0]
    assert base[1, 0] != base[0, 0] != base[0, 14]
    named = [sp.SequencePools.from_mapping({4: np.array([7, -7])})]
    plan = sp.pack_length_histogram(named[0].counts, CAPACITY)
    table = {7: np.zeros(4, int), -7: np.zeros(4, int)}

    def drawn(record, rng):
        return rng.integers(0, 9, len(record))

    (row,) = sp.PackedSource(plan, named[0], table, batch_size=1, transform=drawn)[0]["tokens"]
    assert row[:4].tolist() != row[4:8].tolist()


def test_a_transform_gets_what_the_source_has():
    seen = []

    def look(record, rng):
        seen.append(type(record))
        return np.frombuffer(record, np.uint8) if isinstance(record, bytes) else np.array(record)

    for sequences in ([b"abc"], [[1, 2, 3]], [np.arange(3)], [(1, 2, 3)]):
        sp.pack_dataset(sequences, 4, lengths=[3], batch_size=1, transform=look)[0]
    flat = sp.FlatSequences(np.arange(3), np.array([0, 3]))
    sp.pack_dataset(flat, 4, batch_size=1, transform=look)[0]
    assert seen == [bytes, np.ndarray, np.ndarray, tuple, np.ndarray]


class Named(NamedTuple):
    tokens: Any
    inner: Any


@pytest.mark.parametrize("kind", ["arrays", "flat", "records", "named", "lists"])
def test_a_transform_may_write_to_what_it_gets(kind):
    arrays = [np.arange(1, n + 1) for n in (3, 5, 2, 4)]
    sequences = [array.copy() for array in arrays]
    if kind == "flat":
        sequences = sp.FlatSequences(np.concatenate(arrays), np.array([0, 3, 8, 10, 14]))
    if kind == "records":
        sequences = [{"tokens": array, "inner": {"x": array.copy()}} for array in sequences]
    if kind == "lists":
        sequences = [{"tokens": array.tolist(), "inner": {"x": array}} for array in sequences]
    if kind == "named":
        sequences = [Named(array, (array.copy(),)) for array in sequences]

    def double(record, rng):
        if isinstance(record, np.ndarray):
            record *= 2
            return record
        if isinstance(record, Named):
            record.tokens[:] *= 2
            record.inner[0][:] = 7
            return record
        record["tokens"] = np.array(record["tokens"]) * 2
        record["inner"]["x"][:] = 7
        record["inner"]["y"] = record["inner"]["x"]
        return record

    before = pickle.dumps(sequences)
    source = sp.pack_dataset(sequences, 8, batch_size=2, transform=double, epochs=2, shuffle=False)
    for item in (*source, *source):
        tokens = item["tokens"]
        assert sorted(tokens[tokens > 0].tolist()) == sorted(2 * np.concatenate(arrays))
    assert pickle.dumps(sequences) == before


def test_a_transform_sees_whole_sequences_once_per_batch():
    calls = []

    def look(record, rng):
        calls.append(len(record))
        return record + 1

    source = sp.pack_dataset(
        [np.arange(40)], CAPACITY, batch_size=3, over_length="split", transform=look, eos_id=7
    )
    tokens = source[0]["tokens"][source[0]["segment_ids"] > 0]
    assert calls == [40, 40]
    assert sorted(tokens.tolist()) == sorted([*range(1, 41), 7])


@pytest.mark.parametrize("kind", ["arrays", "records", "flat"])
def test_bos_and_eos_go_around_every_sequence_and_are_counted(kind):
    lengths = [3, 16, 14, 1]
    sequences = records_of(lengths)
    if kind != "records":
        sequences = [record["tokens"] for record in sequences]
    if kind == "flat":
        sequences = sp.FlatSequences(np.concatenate(sequences), np.cumsum([0, *lengths]))
    options = {"batch_size": 2, "bos_id": 70_000, "eos_id": 5, "over_length": "truncate"}
    pads = {"tokens": -1} | ({"vectors": 0.5} if kind == "records" else {})
    options |= {"metadata": True, "pad_value": pads}
    source = sp.pack_dataset(sequences, CAPACITY, **options)
    items = list(source)
    for index, tokens in segments_of(items):
        own = record_of(index, lengths[index])["tokens"].tolist()
        assert tokens == [70_000, *own, 5][:CAPACITY]
    if kind == "records":
        for _, vectors in segments_of(items, "vectors"):
            assert vectors[0] == [0.5, 0.5] != vectors[1]
    assert source.pools.report.dropped_tokens == 2
    assert source.plan.num_tokens == 5 + 16 + 16 + 3
    with pytest.raises(sp.SeqpackError, match=r"lengths \+ 2\)\[1\] = 18, but max_seq_len is 16"):
        sp.pack_dataset(sequences, CAPACITY, batch_size=1, bos_id=1, eos_id=2)


def test_eos_of_one_of_several_features():
    records = [pair_of(i, each) for i, each in enumerate([(3, 2), (4, 0)])]
    source = sp.pack_dataset(
        records, {"inputs": 8, "targets": 4}, batch_size=1, metadata=True, eos_id={"targets": 9}
    )
    assert sorted(segments_of(source, "targets")) == [(0, [500, 501, 9]), (1, [9])]
    assert sorted(segments_of(source, "inputs")) == [(0, [0, 1, 2]), (1, [1000, 1001, 1002, 1003])]
    records[1]["targets"] = np.array([])  # of floats, but there are none
    equal(
        source[0],
        sp.PackedSource(
            source.plan,
            source.pools,
            records,
            batch_size=1,
            feature=("inputs", "targets"),
            metadata=True,
            eos_id={"targets": 9},
        )[0],
    )


def test_unplanned_ends_and_transforms_are_errors():
    sequences = [np.arange(1, 4)]
    counts, pools = sp.length_histogram_from_lengths([3])
    plan = sp.pack_length_histogram(counts, 8)
    ends = sp.PackedSource(plan, pools, sequences, eos_id=2, bos_id=1)
    with pytest.raises(sp.SeqpackError, match=r"has 5 tokens, but 3 were.*extra_tokens=2"):
        ends[0]
    counts, pools = sp.length_histogram_from_lengths([3], extra_tokens=1)
    plan = sp.pack_length_histogram(counts, 8)
    assert sp.PackedSource(plan, pools, sequences, eos_id=2)[0]["tokens"][:4].tolist() == [
        1,
        2,
        3,
        2,
    ]
    short = sp.pack_dataset(sequences, 8, batch_size=1, transform=lambda record, rng: record[1:])
    with pytest.raises(sp.SeqpackError, match="sequence 0 has 2 tokens, but 3 were planned"):
        short[0]
    broken = sp.pack_dataset(sequences, 8, batch_size=1, transform=lambda record, rng: record["x"])
    with pytest.raises(IndexError) as caught:
        broken[0]
    assert caught.value.__notes__ == ["PackedSource: while sequence 0 was transformed"]


# --- reading -------------------------------------------------------------------------------------


class Remote:
    """Records that are read one by one, by whichever thread."""

    def __init__(self, records):
        self.records, self.reads, self.threads = records, [], set()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.reads.append(index)
        self.threads.add(threading.get_ident())
        return self.records[index]


class Batched(Remote):
    def __getitems__(self, indices):
        assert all(type(index) is int for index in indices)
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Remote, Batched])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_read_in_order_and_once(kind, threads):
    options = {"batch_size": 4, "over_length": "split", "read_threads": threads}
    records = records_of([40, 3, 9, 33, 5, 0, 8])
    source = sp.pack_dataset(kind(records), CAPACITY, **options)
    measured = source.sequences.reads
    assert sorted(measured) == [0, *range(7)], "the first record says what they are like"
    plain = sp.pack_dataset(records, CAPACITY, **options)
    for step in range(len(source)):
        source.sequences.reads, source.sequences.threads = [], set()
        equal(source[step], plain[step])
        reads = source.sequences.reads
        assert len(set(reads)) == len(reads)
        if kind is Batched or threads == 1:
            assert reads == sorted(reads)
            assert source.sequences.threads == {threading.get_ident()}
        else:
            assert threading.get_ident() not in source.sequences.threads


def test_errors_of_a_source_name_the_sequence():
    class Failing(Remote):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    class FailingAtOnce(Failing):
        def __getitems__(self, indices):
            return [self[index] for index in indices]

    for kind in (Failing, FailingAtOnce):
        source = sp.pack_dataset(kind(records_of([3] * 4)), 12, lengths=[3] * 4, batch_size=1)
        with pytest.raises(OSError, match="gone") as caught:
            source[0]
        assert caught.value.__notes__ == ["PackedSource: while sequence 2 was read"]
    for kind in (Remote, Batched):
        source = sp.pack_dataset(kind(records_of([3] * 3)), 12, lengths=[3] * 3, batch_size=1)
        source.sequences.records.pop()
        with pytest.raises(sp.SeqpackError, match="PackedSource: sequence 2 is missing"):
            source[0]

    class Wary(Batched):
        def __getitems__(self, indices):
            if not indices:
                raise OSError("nothing was asked for")
            return super().__getitems__(indices)

    data = Wary(records_of([3] * 3)), 12
    source = sp.pack_dataset(*data, batch_size=1, shard=(1, 2))
    assert not source[0]["tokens"].any()
    source.sequences.__class__ = type("Never", (Wary,), {"__getitems__": lambda *_: 1 / 0})
    with pytest.raises(ZeroDivisionError) as caught:
        sp.PackedSource(source.plan, source.pools, source.sequences)[0]
    assert caught.value.__notes__ == ["PackedSource: while __getitems__ of 3 ids was called"]

    class Short(Batched):
        def __getitems__(self, indices):
            return super().__getitems__(indices)[1:]

    with pytest.raises(sp.SeqpackError, match="__getitems__ of 2 ids returned 1 records"):
        read_records("test", Short(records_of([3] * 3)), np.array([0, 1]))


def test_keyed_sequences_are_read_in_one_call():
    flat = sp.FlatSequences(np.arange(6), np.array([0, 1, 3, 6]))
    for rows in (None, np.array([2, 0, 1])):
        keyed = KeyedSequences(flat, np.array([-4, 7, 90]), rows)
        found = [array.tolist() for array in keyed.__getitems__([90, -4, 90])]
        assert found == [keyed[90].tolist(), keyed[-4].tolist(), keyed[90].tolist()]
        for missing in (8, 91, -5):
            with pytest.raises(KeyError, match=str(missing)):
                keyed.__getitems__([7, missing])
        with pytest.raises(sp.SeqpackError, match="sequence 8 is missing"):
            read_records("test", keyed, np.array([7, 8]))
    large = 2**60 + np.arange(3, dtype=np.uint64)  # floats hold one of 256 of these
    keyed = KeyedSequences(flat, large)
    for k, index in enumerate(large.tolist()):
        assert keyed[index].tolist() == flat[k].tolist()
    assert [len(each) for each in keyed.__getitems__(large[[2, 0]])] == [3, 1]
    small = KeyedSequences(flat, np.arange(3, dtype=np.uint8))
    for index in (-1, 257, 2**64):
        for sequences in (keyed, small):
            with pytest.raises(KeyError, match=str(index)):
                sequences[index]
    nothing = KeyedSequences(sp.FlatSequences([], np.array([0])), np.array([], int))
    assert nothing.__getitems__([]) == []
    with pytest.raises(KeyError, match="3"):
        nothing.__getitems__([3])


# --- lengths and plans ----------------------------------------------------------------------------


def test_lengths_are_counted_given_or_computed():
    records = [pair_of(i, each) for i, each in enumerate([(3, 2), (4, 0), (0, 0)])]
    capacities = {"inputs": 8, "targets": 4}
    expected = list(sp.pack_dataset(records, capacities, batch_size=1))
    for lengths in (
        [(3, 2), (4, 0), (0, 0)],
        np.array([(3, 2), (4, 0), (0, 0)], np.uint8),
        lambda record: (len(record["inputs"]), len(record["targets"])),
    ):
        for sequences in (records, Remote(records)):
            source = sp.pack_dataset(sequences, capacities, lengths=lengths, batch_size=1)
            assert source.empty_records == 1
            equal(source[0], expected[0])
    options = {"feature": "inputs", "lengths": lambda record: len(record["inputs"])}
    options["transform"] = lambda record, rng: {"inputs": record["inputs"]}
    one = sp.pack_dataset(records[:2], 8, batch_size=1, **options)
    assert one[0]["inputs"].shape == (1, 8)
    sizes = [3, 0, 5000, 2]
    many = Remote([np.arange(n) for n in sizes] * 2000)
    assert sp.pack_dataset(many, 5000, batch_size=1).plan.num_tokens == 2000 * sum(sizes)


@pytest.mark.parametrize(
    ("records", "max_seq_len", "options", "part"),
    [
        ([{"x": [1]}], 4, {}, "a record has no feature 'tokens'"),
        ([[1]], 4, {"lengths": [-1]}, r"lengths\[0\] = -1, but a length is at least 0"),
        ([[1]], 4, {"lengths": [0.5]}, "lengths has dtype float64"),
        ([[1]], 4, {"lengths": lambda record: 1.5}, "lengths has dtype float64"),
        ([[1]], 4, {"lengths": lambda record: True}, "lengths has dtype bool"),
        ([[1]], 4, {"lengths": lambda record: "1"}, "lengths has dtype <U1"),
        ([[1]], 4, {"lengths": lambda record: None}, "lengths has dtype object"),
        ([[1], [1, 1]], 4, {"lengths": tuple}, "lengths is ragged"),
        ([[1]], 4, {"lengths": [2**31]}, r"lengths\[0\] = 2147483648, but a length is at most"),
        ([[1]], 4, {"lengths": np.array([2**63], np.uint64)}, "but a length is at most 2147"),
        ([], 4, {}, "there are no sequences"),
        ([], {"a": 4, "b": 4}, {}, "there are no sequences"),
        ([np.ma.array([1, 2], mask=[0, 1])], 4, {"bos_id": 3}, "sequence 0 has masked entries"),
        ([[1]], 4, {"epochs": 2**63}, "9223372036854775808 epochs are .* items, more than"),
        ([[1]], 4, {"shard": (0, 2**63)}, "a step takes 9223372036854775808 rows"),
        ([[1]], 4, {"lengths": [[1, 2]]}, r"lengths has shape \(1, 2\) for 1 capacities"),
        ([[1]], {"a": 4, "b": 4}, {"lengths": [1]}, r"lengths has shape \(1,\) for 2 capacities"),
        ([[1]], {"a": 4, "b": 4}, {"lengths": [1, 1]}, r"lengths has shape \(2,\) for 2"),
        ([[]], 4, {}, "there are no sequences"),
        ([[1]], 2, {"bos_id": 1, "eos_id": 1}, "max_seq_len = 2 of 'tokens' leaves no room"),
        ([[1]], 4, {"bos_id": -1}, "bos_id = -1, but it must be in"),
        ([[1]], 4, {"eos_id": {"x": 1}}, "eos_id names a feature 'x'"),
        ([[1]], 4, {"zones": 0}, "zones = 0"),
        ([[1]], 4, {"read_threads": 0}, "read_threads = 0"),
        ([[1]], 4, {"tolerance": 0}, "tolerance = 0"),
        ([[1]], 4, {"multiple_of": 3}, "max_seq_len = 4 of 'tokens' is no multiple of 3"),
        ([[1]], 4, {"key_style": "x"}, "key_style = 'x' is not known"),
        ([[1]], 4, {"max_segments": 0}, "max_segments = 0"),
        ([[1]], 4, {"algorithm": "x"}, "algorithm = 'x' is not a planner"),
    ],
)
def test_errors_of_pack_dataset(records, max_seq_len, options, part):
    with pytest.raises(sp.SeqpackError, match=part) as caught:
        sp.pack_dataset(records, max_seq_len, batch_size=1, **options)[0]
    assert "Hint: " in str(caught.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, r"lengths\[1\] = 5 of 'targets', but max_seq_len is 4 \(1 of 2 records"),
        ({"over_length": "crop"}, "over_length = 'crop' with several capacities"),
        ({"over_length": "split"}, "over_length = 'split' with several capacities"),
        ({"over_length": "drop", "tolerance": 2}, "several capacities, with algorithm"),
        ({"over_length": "drop", "algorithm": "first_fit_decreasing"}, "several capacities, with"),
    ],
)
def test_errors_of_several_capacities(options, part):
    records = [pair_of(0, (3, 2)), pair_of(1, (3, 5))]
    with pytest.raises(sp.SeqpackError, match=part):
        sp.pack_dataset(records, {"inputs": 8, "targets": 4}, batch_size=1, **options)


@pytest.mark.parametrize(
    ("nothing", "something"),
    [
        (np.array([]), np.arange(3)),  # of floats, but there are none
        ([], np.arange(3)),
        ([], np.ones((3, 2), np.float32)),
        (np.zeros((0, 2), np.float32), np.ones((3, 2), np.float32)),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 1])
def test_batches_without_tokens_of_a_feature_are_like_others(nothing, something, batch_size):
    records = [{"a": [1, 2], "b": nothing}] * 4 + [{"a": [1, 2, 3], "b": something}]
    records += [{"a": [1, 2, 3], "b": nothing, "c": something}] * 3
    records = [{"c": nothing} | record for record in records]
    capacities = {"a": 3, "b": 4, "c": 5}
    sources = [
        sp.pack_dataset(records, capacities, batch_size=batch_size, shard=(i, 7)) for i in range(7)
    ]
    items = [item for source in sources for item in source]
    assert sum(item["b"].any() for item in items) == 1
    assert sum(item["c"].any() for item in items) == 3
    assert sum(not item["a"].any() for item in items) == 6
    kinds = [{name: (array.dtype, array.shape) for name, array in item.items()} for item in items]
    assert all(kind == kinds[0] for kind in kinds)
    dtype = np.dtype(np.float32 if something.ndim > 1 else np.int32)
    rows = () if batch_size is None else (batch_size,)
    for name in ("b", "c"):
        assert kinds[0][name] == (dtype, (*rows, capacities[name], *something.shape[1:]))
    absent = sp.pack_dataset(records[:4], capacities, batch_size=batch_size)
    assert not absent[0]["b"].any(), "if no record has any, there is nothing to be like"


def test_a_vector_plan_by_hand():
    lengths = [(3, 2), (4, 4), (2, 1)]
    records = [pair_of(i, each) for i, each in enumerate(lengths)]
    plan, pools = pack_vectors(lengths, (8, 4))
    source = sp.PackedSource(plan, pools, records, feature=("inputs", "targets"), batch_size=1)
    assert source[0]["inputs"].shape, source[0]["targets"].shape == ((1, 8), (1, 4))
    with pytest.raises(sp.SeqpackError, match="the plan has 2 capacities, feature = 'tokens'"):
        sp.PackedSource(plan, pools, records)
    with pytest.raises(sp.SeqpackError, match=r"PackedSource\.stats: the plan has several"):
        _ = source.stats
    with pytest.raises(sp.SeqpackError, match="planned lengths are no multiples of 2"):
        sp.PackedSource(plan, pools, records, feature=("inputs", "targets"), multiple_of=2)
    records[1]["targets"] = records[1]["targets"][:3]
    with pytest.raises(sp.SeqpackError, match="sequence 1 has 3 tokens of 'targets', but 4 were"):
        list(source)
    counts, pools = sp.length_histogram_from_lengths([3, 3])
    plan = sp.pack_length_histogram(counts, 8)
    with pytest.raises(sp.SeqpackError, match="max_segments = 1, but it must be at least 2"):
        sp.PackedSource(plan, pools, [[1, 2, 3]] * 2, max_segments=1)


# --- Grain ---------------------------------------------------------------------------------------


def test_map_dataset_and_its_batches():
    rows = source_of(batch_size=None)
    batched = grain.MapDataset.source(rows).batch(4)
    for step in range(rows.plan.num_bins // 4):
        equal(batched[step], source_of(batch_size=4)[step])


def test_an_elastic_iterator_deals_rows_to_hosts():
    rows = source_of(batch_size=None, epochs=1)
    dataset = grain.MapDataset.source(rows)

    def iterate(count, index):
        shard = grain.sharding.ShardOptions(shard_index=index, shard_count=count)
        return grain.experimental.ElasticIterator(dataset, 4, shard, read_options=READ)

    one = iterate(1, 0)
    for _ in range(2):
        next(one)
    state = json.loads(json.dumps(one.get_state()))
    rest = [set(ids(item)) for item in one]
    two = [iterate(2, index) for index in range(2)]
    for iterator in two:
        iterator.set_state(state)
    assert [set(ids(a)) | set(ids(b)) for a, b in zip(*two, strict=True)] == rest


def ids(batch):
    return batch["ids"][batch["ids"] >= 0].tolist()


def test_an_index_sampler_of_a_loader():
    rows = source_of(batch_size=None, epochs=1)
    sampler = grain.samplers.IndexSampler(len(rows), grain.sharding.NoSharding(), True, 1, 5)
    loader = grain.DataLoader(
        data_source=rows,
        sampler=sampler,
        operations=[grain.transforms.Batch(3)],
        worker_count=0,
        read_options=READ,
    )
    found = [i for item in loader for i in ids(item)]
    assert sorted(found) == [i for i, n in enumerate(LENGTHS * 4) if n]


@pytest.mark.slow
def test_workers_give_the_same_records():
    source = source_of(epochs=1, transform=noise)
    dataset = grain.MapDataset.source(source).to_iter_dataset(READ)
    found = list(dataset.mp_prefetch(grain.MultiprocessingOptions(2)))
    assert len(found) == len(source)
    for step, item in enumerate(found):
        equal(item, source[step])
