"""The longest prefix of a stream that fits, and what the over-length policy does to records."""

import logging
import pickle
from itertools import accumulate

import grain
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from policy_reference import CAPACITY, check_report, check_segments, coded, policies
from strategies import packings

import seqpack_jax as sp
from seqpack_jax.feeding.streaming import longest_prefix
from seqpack_jax.planning.over_length import OverLength


@given(packing=packings(), rows=st.integers(1, 6))
def test_a_prefix_is_packed_by_best_fit(packing, rows):
    lengths, capacity = packing
    packed = longest_prefix(lengths, capacity, rows)
    size = sum(map(len, packed))
    assert sorted(i for row in packed for i in row) == list(range(size))
    assert len(packed) <= rows
    assert all(sum(lengths[i] for i in row) <= capacity for row in packed)
    assert bool(size) == bool(lengths)
    expected = reference.best_fit_decreasing(lengths[:size], capacity)
    assert sorted(sum(lengths[i] for i in row) for row in packed) == sorted(map(sum, expected))
    longest = reference.longest_prefix(lengths, capacity, rows)
    assert size <= longest
    if size < longest:  # best fit is not monotone: more may fit again after one that does not
        assert len(reference.best_fit_decreasing(lengths[: size + 1], capacity)) > rows


@given(packing=packings(), rows=st.integers(1, 6))
def test_what_comes_after_the_volume_bound_does_not_matter(packing, rows):
    lengths, capacity = packing
    volume = rows * capacity
    bound = sum(1 for k in range(len(lengths)) if sum(lengths[: k + 1]) <= volume)
    assert longest_prefix(lengths, capacity, rows) == longest_prefix(
        lengths[:bound], capacity, rows
    )


@pytest.mark.parametrize(
    ("lengths", "rows", "expected"),
    [
        ([], 2, []),
        ([10], 1, [[0]]),
        ([10, 10], 1, [[0]]),
        ([6, 6, 4, 4], 2, [[0, 3], [1, 2]]),
        ([6, 6, 6], 2, [[0], [1]]),
        ([1] * 25, 2, [list(range(10)), list(range(10, 20))]),
    ],
)
def test_small_streams(lengths, rows, expected):
    assert longest_prefix(lengths, 10, rows) == expected


@given(packing=packings(), rows=st.integers(1, 6), data=st.data())
def test_a_prefix_ends_where_it_may(packing, rows, data):
    lengths, capacity = packing
    groups = []
    while sum(groups) < len(lengths):
        groups.append(data.draw(st.integers(1, min(4, len(lengths) - sum(groups)))))
    ends = list(accumulate(groups))
    packed = longest_prefix(lengths, capacity, rows, ends)
    size = sum(map(len, packed))
    assert sorted(i for row in packed for i in row) == list(range(size))
    assert all(sum(lengths[i] for i in row) <= capacity for row in packed)
    assert len(packed) <= rows
    assert size in [0, *ends]
    fits = {
        end: len(reference.best_fit_decreasing(lengths[:end], capacity)) <= rows for end in ends
    }
    assert size == 0 or fits[size]
    more = next((end for end in ends if end > size), None)
    assert more is None or not fits[more], "one record more would fit"
    assert longest_prefix(lengths, capacity, rows, range(1, len(lengths) + 1)) == longest_prefix(
        lengths, capacity, rows
    )


# --- PackOperation: the over-length policy on records as they come ----------------------------


def pack(lengths, policy, batch_size=8, **options):
    """Pack coded records through the bare operation; return batches and the iterator."""
    operation = sp.PackOperation(CAPACITY, batch_size, over_length=policy, **options)
    records = [
        grain.Record(grain.RecordMetadata(index), {"tokens": tokens})
        for index, tokens in enumerate(coded(lengths))
    ]
    iterator = operation(iter(records))
    return [record.data for record in iterator], iterator


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    policy=policies(),
    batch_size=st.integers(1, 6),
)
def test_records_become_what_the_policy_says(lengths, policy, batch_size):
    if policy.action == "split":  # the pieces of a record must fit one batch
        stride = CAPACITY - policy.overlap
        lengths = [min(n, CAPACITY + stride * (batch_size - 1)) for n in lengths]
    lengths = [*lengths, 3]
    batches, iterator = pack(lengths, policy, batch_size)
    check_segments(policy, lengths, batches)
    check_report(policy, lengths, batches, iterator.report)
    last = -1
    for batch in batches:  # whole records, in the order of the stream
        sources = {int(tokens[0]) // 1000 for tokens in sp.unpack_batch(batch)}
        assert min(sources) > last
        last = max(sources)


class Coded(list):
    def __repr__(self):
        return "Coded"


def stream(policy, n=60, workers=0, epochs=1, seed=0):
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random(n) < 0.4, rng.integers(17, 50, n), rng.integers(1, 17, n))
    return grain.DataLoader(
        data_source=Coded({"tokens": tokens} for tokens in coded(lengths)),
        sampler=grain.samplers.IndexSampler(n, grain.sharding.NoSharding(), True, epochs, 5),
        operations=[sp.PackOperation(CAPACITY, 4, over_length=policy, seed=seed)],
        worker_count=workers,
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2),
    )


def same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


SPLIT = OverLength("split", overlap=3, min_tail=2, positions="continue")


@pytest.mark.parametrize("policy", ["drop", "truncate_left", "crop", "split", SPLIT])
def test_every_policy_resumes_at_every_step(policy):
    whole = list(stream(policy))
    iterator = iter(stream(policy))
    for step in range(len(whole) + 1):
        restored = iter(stream(policy))
        restored.set_state(iterator.get_state())
        same(list(restored), whole[step:])
        next(iterator, None)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["crop", SPLIT])
def test_every_policy_resumes_with_workers(policy):
    iterator = iter(stream(policy, workers=2))
    whole = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    whole += iterator
    restored = iter(stream(policy, workers=2))
    restored.set_state(state)
    same(list(restored), whole[3:])
    segments = sorted(s.tolist() for batch in whole for s in sp.unpack_batch(batch))
    alone = stream(policy)
    assert segments == sorted(s.tolist() for batch in alone for s in sp.unpack_batch(batch))


def windows(batches):
    """The first token of each window that fills a row, in the order of the stream."""
    return [int(s[0]) for b in batches for s in sp.unpack_batch(b) if len(s) == CAPACITY]


def test_a_window_depends_on_the_seed_and_the_index_of_the_record():
    assert windows(stream("crop")) == windows(stream("crop"))
    assert windows(stream("crop")) != windows(stream("crop", seed=1))
    lengths = [100] * 40
    batches, _ = pack(lengths, "crop", batch_size=5)
    expected = {token // 1000: token % 1000 for token in windows(batches)}
    assert len(set(expected.values())) > 20
    other, _ = pack(lengths, "crop", batch_size=7)
    assert {token // 1000: token % 1000 for token in windows(other)} == expected
    starts = {}
    for token in windows(stream("crop", epochs=2)):  # the second epoch has other indices
        starts.setdefault(token // 1000, []).append(token % 1000)
    twice = [found for found in starts.values() if len(found) == 2]
    assert sum(a != b for a, b in twice) > len(twice) / 2


def test_a_record_of_more_pieces_than_rows_is_refused():
    message = "record 1 has 33 tokens, 3 pieces, but a batch of whole records has 2 rows"
    with pytest.raises(sp.SeqpackError, match=message) as caught:
        pack([5, 33], "split", batch_size=2)
    assert "raise batch_size or max_seq_len" in str(caught.value)
    batches, _ = pack([5, 33], "split", batch_size=3)
    assert [len(sp.unpack_batch(batch)) for batch in batches] == [4]


def test_the_pieces_of_a_record_wait_for_a_batch_that_takes_all():
    batches, _ = pack([10, 20, 20], "split", batch_size=3)
    found = [[s.tolist() for s in sp.unpack_batch(batch)] for batch in batches]
    sources = [sorted({tokens[0] // 1000 for tokens in batch}) for batch in found]
    assert sources == [[0, 1], [2]]


def test_without_a_policy_over_length_records_are_refused():
    with pytest.raises(sp.SeqpackError, match=r"record 1 has 17 tokens.*pass over_length='drop'"):
        pack([5, 17], "error")
    with pytest.raises(sp.SeqpackError, match="record 1 has 0 tokens"):
        pack([5, 0], "drop")
    for policy, part in [
        ("cut", "choose one of error, drop, truncate"),
        (OverLength("split", overlap=CAPACITY), "overlap = 16, but max_seq_len is 16"),
    ]:
        with pytest.raises(sp.SeqpackError, match=part):
            sp.PackOperation(CAPACITY, 4, over_length=policy)
    with pytest.raises(sp.SeqpackError, match=r"seed = 0.5 is not an integer"):
        sp.PackOperation(CAPACITY, 4, seed=0.5)


def test_a_stream_that_is_dropped_yields_nothing():
    batches, iterator = pack([20, 30], "drop")
    assert batches == []
    assert iterator.report.sequences == 2


def test_what_was_touched_is_logged_once_at_the_end(caplog):
    caplog.set_level(logging.INFO, "seqpack_jax")
    _, iterator = pack([5, 20, 30, 40], "drop")
    assert [next(iterator, None) for _ in range(2)] == [None, None]
    (said,) = caplog.messages
    assert said == f"PackOperation: {iterator.report}"
    assert "sequences=3, tokens=90, dropped_tokens=90" in said
    caplog.clear()
    pack([5, 6], "drop")
    assert not caplog.messages, "nothing was touched"


def test_set_state_starts_the_report_over():
    class Reader:
        def __init__(self, records):
            self.records, self.place = records, 0

        def __next__(self):
            if self.place == len(self.records):
                raise StopIteration
            self.place += 1
            return self.records[self.place - 1]

        def get_state(self):
            return self.place

        def set_state(self, place):
            self.place = place

    tokens = coded([20, 5, 30, 16, 16, 40])
    reader = Reader([grain.Record(grain.RecordMetadata(i), {"tokens": t})
                     for i, t in enumerate(tokens)])  # fmt: skip
    iterator = sp.PackOperation(CAPACITY, 1, over_length="drop")(reader)
    next(iterator)
    state = reader.get_state()
    assert state == 3, "before the first record that waits; dropped ones do not"
    list(iterator)
    assert iterator.report.tokens == 20 + 30 + 40
    reader.set_state(state)
    assert iterator.report.tokens == 0
    assert len(list(iterator)) == 2
    assert iterator.report.tokens == 40


@pytest.mark.parametrize("policy", ["truncate", SPLIT])
def test_no_more_is_read_than_a_batch_needs(policy):
    read = []

    def reader():
        for index, tokens in enumerate(coded([5, 40, 16, 30, 3] * 20)):
            read.append(index)
            yield grain.Record(grain.RecordMetadata(index), {"tokens": tokens})

    for record in sp.PackOperation(CAPACITY, 4, over_length=policy)(reader()):
        fed = {int(tokens[0]) // 1000 for tokens in sp.unpack_batch(record.data)}
        assert len(read) <= max(fed) + 1 + 20, "at most what fills another batch, and one more"
        assert len(read) == 100 or len(read) > max(fed) + 1


def test_repr_says_what_determines_the_batches():
    texts = {
        repr(sp.PackOperation(CAPACITY, 4, over_length=policy, seed=seed))
        for policy, seed in [("error", 0), ("crop", 0), ("crop", 1), ("split", 0), (SPLIT, 0)]
    }
    assert len(texts) == 5
    operation = sp.PackOperation(CAPACITY, 4, over_length=SPLIT, seed=3)
    assert repr(pickle.loads(pickle.dumps(operation))) == repr(operation)
