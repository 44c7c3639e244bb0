"""PackOperation: the over-length policy on records as they come, resuming, and what it packs."""

import logging
import pickle

import grain
import numpy as np
import pytest
from comparing import equal
from hypothesis import given
from hypothesis import strategies as st
from policy_reference import CAPACITY, check_report, check_segments, coded, policies

import seqpack_jax as sp
from seqpack_jax.planning.over_length import OverLength


def records_of(arrays):
    return [
        grain.Record(grain.RecordMetadata(index), {"tokens": tokens})
        for index, tokens in enumerate(arrays)
    ]


def pack(lengths, policy, batch_size=8, **options):
    """Pack coded records through the bare operation; return batches and the iterator."""
    operation = sp.PackOperation(CAPACITY, batch_size, over_length=policy, **options)
    iterator = operation(iter(records_of(coded(lengths))))
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


def loader(records, operation, workers=0, sampler=None):
    return grain.DataLoader(
        data_source=Coded(records),
        sampler=sampler or grain.samplers.SequentialSampler(len(records)),
        operations=[operation],
        worker_count=workers,
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=2),
    )


def stream(policy, n=60, workers=0, epochs=1, seed=0, **options):
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random(n) < 0.4, rng.integers(17, 50, n), rng.integers(1, 17, n))
    lengths[::9] = 0
    return loader(
        [{"tokens": tokens, "weight": np.float32(len(tokens))} for tokens in coded(lengths)],
        sp.PackOperation(
            CAPACITY, 4, over_length=policy, seed=seed, **{"max_segments": 6} | options
        ),
        workers,
        grain.samplers.IndexSampler(n, grain.sharding.NoSharding(), True, epochs, 5),
    )


SPLIT = OverLength("split", overlap=3, min_tail=2, positions="continue")


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("drop", {}),
        ("truncate_left", {"multiple_of": 4}),
        ("crop", {"metadata": True}),
        ("split", {"max_segments": 2}),
        (SPLIT, {}),
    ],
)
def test_every_policy_resumes_at_every_step(policy, options):
    whole = list(stream(policy, **options))
    equal(whole, list(stream(policy, **options)))
    iterator = iter(stream(policy, **options))
    for step in range(len(whole) + 1):
        restored = iter(stream(policy, **options))
        restored.set_state(iterator.get_state())
        equal(list(restored), whole[step:])
        next(iterator, None)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "workers"), [("crop", 1), (SPLIT, 2)])
def test_resumes_with_workers_at_eight_steps(policy, workers):
    def iterate():
        return iter(stream(policy, n=90, workers=workers, metadata=True))

    iterator, whole, states = iterate(), [], []
    while True:
        states.append(iterator.get_state())
        if (batch := next(iterator, None)) is None:
            break
        whole.append(batch)
    segments = sorted(s.tolist() for batch in whole for s in sp.unpack_batch(batch))
    alone = stream(policy, n=90)
    assert segments == sorted(s.tolist() for batch in alone for s in sp.unpack_batch(batch))
    for step in np.linspace(1, len(whole) - 1, 8).astype(int).tolist():
        restored = iterate()
        restored.set_state(states[step])
        equal(list(restored), whole[step:])


def windows(batches):
    """The first token of each window that fills a row, in the order of the stream."""
    return [int(s[0]) for b in batches for s in sp.unpack_batch(b) if len(s) == CAPACITY]


def test_a_window_depends_on_the_seed_and_the_index_of_the_record():
    assert windows(stream("crop")) == windows(stream("crop"))
    assert windows(stream("crop")) != windows(stream("crop", seed=1))
    starts = {}
    for token in windows(stream("crop", epochs=2)):  # the second epoch has other indices
        starts.setdefault(token // 1000, []).append(token % 1000)
    twice = [found for found in starts.values() if len(found) == 2]
    assert sum(a != b for a, b in twice) > len(twice) / 2


def test_a_record_of_more_pieces_than_rows_is_refused():
    message = "record 1 has 33 tokens, 3 pieces, but a group of whole records has 2 rows"
    with pytest.raises(sp.SeqpackError, match=message) as caught:
        pack([5, 33], "split", batch_size=2)
    assert "raise batch_size" in str(caught.value)
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


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"over_length": "cut"}, "choose one of error, drop, truncate"),
        ({"over_length": OverLength("split", overlap=16)}, "overlap = 16, but max_seq_len is 16"),
        ({"seed": 0.5}, "seed = 0.5 is not an integer"),
        ({"batch_size": 0}, "batch_size = 0, but it must be at least 1"),
        ({"max_seq_len": {"a": 4, "b": 4}, "over_length": "crop"}, "2 features have their own"),
        ({"metadata": True}, "metadata without max_segments"),
        ({"features": "loss"}, "features = 'loss'"),
        ({"key_style": "torch"}, "key_style = 'torch' is not known"),
    ],
)
def test_bad_arguments(options, part):
    with pytest.raises(sp.SeqpackError, match="PackOperation: ") as caught:
        sp.PackOperation(**{"max_seq_len": CAPACITY, "batch_size": 4} | options)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"tokens": np.zeros(17, int)}, "record 1 has 17 tokens, but a length is in [1, 16]"),
        ({"tokens": np.zeros(3)}, "record 1 has shape (3,) and dtype float64"),
        ({"tokens": np.zeros((2, 2), int)}, "record 1 has shape (2, 2)"),
        ({"text": np.zeros(3, int)}, "record 1 has no feature 'tokens'"),
        (
            {"tokens": np.zeros(3, int), "loss": np.zeros(2)},
            "feature 'loss' of record 1 has 2 entr",
        ),
        (np.zeros(3), "record 1 has shape (3,) and dtype float64"),
    ],
)
def test_records_that_cannot_be_packed_are_refused(record, part):
    records = [{"tokens": np.ones(3, int)}, record]
    iterator = iter(loader(records, sp.PackOperation(CAPACITY, 4)))
    for _ in range(2):  # the record is not skipped by trying again
        with pytest.raises(sp.SeqpackError, match="Hint") as caught:
            next(iterator)
        assert part in str(caught.value)


def test_a_stream_that_is_dropped_yields_nothing():
    batches, iterator = pack([20, 30, 0], "drop")
    assert batches == []
    assert iterator.report.sequences == 2
    assert iterator.empty_records == 1


def test_what_was_touched_is_logged_once_at_the_end(caplog):
    caplog.set_level(logging.INFO, "seqpack_jax")
    _, iterator = pack([5, 20, 0, 30, 40], "drop")
    assert [next(iterator, None) for _ in range(2)] == [None, None]
    (said,) = caplog.messages
    assert said == f"PackOperation: 1 empty records skipped, {iterator.report}"
    assert "sequences=3, tokens=90, dropped_tokens=90" in said
    caplog.clear()
    pack([5, 6], "drop")
    assert not caplog.messages, "nothing was touched"


class Reader:
    """A reader that stands at a place in a list."""

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


class Living(Reader):
    """A reader that gives away the very state that it goes on to change."""

    def __init__(self, records):
        super().__init__(records)
        self.state = {"place": 0}

    def __next__(self):
        self.place = self.state["place"]
        self.state["place"] += self.place < len(self.records)
        return super().__next__()

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = dict(state)


def test_a_state_is_not_that_of_a_reader_that_goes_on():
    records = records_of(coded([5, 9, 16, 3, 4, 4, 12, 8] * 5))
    operation = sp.PackOperation(CAPACITY, 2)
    whole = [record.data for record in operation(Living(records))]
    reader = Living(records)
    iterator, states = operation(reader), []
    for batch in whole:
        states.append(reader.get_state())
        equal([next(iterator).data], [batch])
    for step, state in enumerate(states):
        again = Living(records)
        rest = operation(again)
        again.set_state(state)
        equal([record.data for record in rest], whole[step:])


def test_set_state_starts_the_report_over():
    reader = Reader(records_of(coded([20, 5, 30, 16, 16, 40])))
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


def test_the_state_is_before_a_record_that_raised():
    records = records_of(coded([16, 3, 20, 4]))
    reader = Reader(records)
    iterator = sp.PackOperation(CAPACITY, 1)(reader)
    found = [next(iterator)]
    for _ in range(2):
        with pytest.raises(sp.SeqpackError, match="record 2 has 20 tokens"):
            next(iterator)
    assert reader.get_state() == len(found)


@pytest.mark.parametrize("policy", ["truncate", SPLIT])
def test_no_more_is_read_than_a_batch_needs(policy):
    read = []

    def reader():
        for record in records_of(coded([5, 40, 16, 30, 3] * 20)):
            read.append(record)
            yield record

    for record in sp.PackOperation(CAPACITY, 4, over_length=policy)(reader()):
        fed = {int(tokens[0]) // 1000 for tokens in sp.unpack_batch(record.data)}
        assert len(read) <= max(fed) + 1 + 20, "at most what fills another batch, and one more"
        assert len(read) == 100 or len(read) > max(fed) + 1


def test_features_lie_beside_the_tokens():
    records = [
        {"tokens": np.arange(n), "loss": np.full(n, 0.5, np.float32), "name": "x", "weight": n}
        for n in (3, 0, 2)
    ]
    operation = sp.PackOperation(
        8, 2, max_segments=3, metadata=True, multiple_of=4, pad_value={"loss": -1}
    )
    (batch,) = loader(records, operation)
    assert batch["tokens"][0].tolist() == [0, 1, 2, 0, 0, 1, 0, 0]
    assert batch["loss"][0].tolist() == [0.5, 0.5, 0.5, -1, 0.5, 0.5, -1, -1]
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 0, 2, 2, 0, 0]
    assert batch["ids"].tolist() == [[0, 2, -1], [-1, -1, -1]]
    assert batch["weight"].tolist() == [[3, 2, 0], [0, 0, 0]]
    assert batch["segment_lengths"].tolist() == [[3, 2, 0], [0, 0, 0]]
    assert batch["row_valid"].tolist() == [True, False]
    assert "name" not in batch
    (batch,) = loader(records, sp.PackOperation(8, 2, features=("loss",)))
    assert batch.keys() == {"tokens", "loss", "segment_ids", "positions"}
    (batch,) = loader(records, sp.PackOperation(8, 2, features=()))
    assert batch.keys() == {"tokens", "segment_ids", "positions"}


def test_bare_arrays_several_capacities_and_key_styles():
    (batch,) = loader([np.arange(3), np.arange(2)], sp.PackOperation(8, 1, key_style="grain"))
    assert batch.keys() == {"tokens", "tokens_segment_ids", "tokens_positions"}
    records = [{"inputs": np.arange(n), "targets": np.arange(m)} for n, m in [(3, 1), (5, 9)]]
    operation = sp.PackOperation({"inputs": 8, "targets": 4}, 1, over_length="truncate")
    targets = [batch["targets"].tolist() for batch in loader(records, operation)]
    assert targets == [[[0, 0, 0, 0]], [[0, 1, 2, 3]]], "8 inputs fit, 5 targets do not"


def test_max_segments_is_kept():
    records = [{"tokens": np.ones(1 + k % 3, int)} for k in range(50)]
    batches = list(loader(records, sp.PackOperation(CAPACITY, 3, max_segments=2)))
    assert max(batch["segment_ids"].max() for batch in batches) == 2
    assert sum(batch["tokens"].sum() for batch in batches) == sum(
        len(record["tokens"]) for record in records
    )


def test_repr_says_what_determines_the_batches():
    texts = {
        repr(sp.PackOperation(CAPACITY, 4, over_length=policy, seed=seed))
        for policy, seed in [("error", 0), ("crop", 0), ("crop", 1), ("split", 0), (SPLIT, 0)]
    }
    texts |= {
        repr(sp.PackOperation(CAPACITY, 4, **options))
        for options in [{"features": ()}, {"max_segments": 2}, {"multiple_of": 4}, {"pad_value": 1}]
    }
    assert len(texts) == 9
    operation = sp.PackOperation(CAPACITY, 4, over_length=SPLIT, seed=3)
    assert repr(pickle.loads(pickle.dumps(operation))) == repr(operation)
