"""PackIterDataset: exact resume at every step, conservation, density, and the order of a stream."""

import json
import logging
import tracemalloc

import grain
import numpy as np
import pytest
from comparing import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import CAPACITY, check_report, check_segments, coded, policies

import seqpack_jax as sp
from seqpack_jax.feeding.stream_dataset import PackIterDataset
from seqpack_jax.planning.over_length import OverLength

READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
SPLIT = OverLength("split", overlap=3, min_tail=2, positions="continue")


def lengths_of(n=90, seed=0, longest=50):
    """A third of them over-length, some of them 0."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(n) < 0.3, rng.integers(17, longest, n), rng.integers(0, 17, n))
    lengths[::11] = 0
    return lengths.tolist()


def records_of(lengths):
    """Coded tokens, features beside them, and one that comes once."""
    return [
        {
            "tokens": tokens,
            "loss": tokens.astype(np.float32) / 2,
            "vectors": np.stack([tokens, tokens], axis=1),
            "weight": np.int64(index),
        }
        for index, tokens in enumerate(coded(lengths))
    ]


def stream(records, read=READ):
    return grain.MapDataset.source(records).to_iter_dataset(read)


FLAVOURS = {
    "plain": {"shuffle": False, "window": 1, "over_length": "drop"},
    "shuffled": {"window": 3, "over_length": "truncate"},
    "crop": {"window": 2, "over_length": "crop", "seed": 7},
    "split": {"window": 3, "over_length": "split"},
    "continued": {"window": 2, "over_length": SPLIT},
    "rows": {"batch_size": None, "window": 5, "over_length": "truncate_left"},
    "one group": {"over_length": "drop"},
    "metadata": {"window": 2, "over_length": "split", "metadata": True, "key_style": "grain"},
    "aligned": {"window": 2, "over_length": "truncate", "multiple_of": 4},
    "two": {"window": 2, "max_seq_len": {"inputs": CAPACITY, "targets": 8},
            "over_length": "truncate"},
}  # fmt: skip


def flavour(name, n=70):
    options = {"max_seq_len": CAPACITY, "batch_size": 3, "max_segments": 6} | FLAVOURS[name]
    records = records_of(lengths_of(n))
    if name == "two":
        records = [{"inputs": r["tokens"], "targets": r["tokens"][::3]} for r in records]
    return PackIterDataset(stream(records), **options)


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_flavour_resumes_at_every_step(name):
    whole = list(flavour(name))
    assert len(whole) > 5 or name == "one group"
    equal(whole, list(flavour(name)))
    iterator, live = iter(flavour(name)), iter(flavour(name))
    for step in range(len(whole) + 1):
        state = through_json(iterator.get_state())
        assert state == through_json(iterator.get_state())
        restored = iter(flavour(name))
        restored.set_state(state)
        assert restored.get_state() == state
        live.set_state(state)  # each time after it was exhausted
        for again in (restored, live):
            equal(list(again), whole[step:])
            assert again.get_state()["batches"] == 0
        next(iterator, None)
        assert restored.report == live.report
        assert restored.empty_records == live.empty_records > 0
    assert iterator.report == restored.report
    assert next(iterator, None) is None
    assert len(json.dumps(state)) < 1000


@pytest.mark.parametrize("name", ["shuffled", "rows"])
def test_grains_own_check_of_checkpoints(name):
    grain.experimental.assert_equal_output_after_checkpoint(flavour(name, 40))


@pytest.mark.parametrize("name", ["shuffled", "rows"])
def test_grains_checkpoint_handler(name, tmp_path):
    """Grain's handler writes what `get_state` returns as a file of JSON."""
    whole = list(flavour(name))
    handler = grain.checkpoint.CheckpointHandler()
    iterator = iter(flavour(name))
    for step in range(4):
        (tmp_path / str(step)).mkdir()
        handler.save(tmp_path / str(step), iterator)
        restored = handler.restore(tmp_path / str(step), iter(flavour(name)))
        equal(list(restored), whole[step:])
        next(iterator)


@pytest.mark.slow
@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize(("name", "workers"), [("shuffled", 1), ("split", 2)])
def test_workers_pack_their_parts(name, workers):
    whole = flavour(name).mp_prefetch(grain.MultiprocessingOptions(workers))
    segments = sorted(s.tolist() for batch in whole for s in sp.unpack_batch(batch))
    alone = sorted(s.tolist() for batch in flavour(name) for s in sp.unpack_batch(batch))
    assert segments == alone


def every_flavour():
    """Batches of all flavours in turn, and rows by Grain's names, each with its name."""
    records = [{"x": r["tokens"], "y": r["tokens"][::2]} for r in records_of(lengths_of(70, 2, 18))]
    datasets = {name: flavour(name) for name in FLAVOURS} | {
        cls.__name__: cls(stream(records), length_struct={"x": 18, "y": 12}, num_packing_bins=7)
        for cls in (sp.FirstFitPackIterDataset, sp.BestFitPackIterDataset)
    }
    named = [
        dataset.map(lambda batch, name=name: {"flavour": name, **batch})
        for name, dataset in datasets.items()
    ]
    return grain.IterDataset.mix(named)


@pytest.mark.slow
@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize("workers", [1, 2])
def test_every_flavour_resumes_with_workers(workers):
    """One pipeline of all flavours, for what takes time is that workers start."""

    def dataset():
        return every_flavour().mp_prefetch(grain.MultiprocessingOptions(workers))

    iterator, whole, states = iter(dataset()), [], []
    while True:
        states.append(through_json(iterator.get_state()))
        if (batch := next(iterator, None)) is None:
            break
        whole.append(batch)
    names = [batch.pop("flavour") for batch in whole]
    assert len(set(names)) == len(FLAVOURS) + 2
    for step in np.linspace(1, len(whole) - 1, 8).astype(int).tolist():
        restored = iter(dataset())
        restored.set_state(states[step])
        rest = list(restored)
        assert [batch.pop("flavour") for batch in rest] == names[step:]
        equal(rest, whole[step:])


def test_followed_by_other_transformations():
    def dataset():
        counted = flavour("rows").map(lambda row: row | {"real": (row["segment_ids"] > 0).sum()})
        return counted.batch(4, drop_remainder=True)

    whole = list(dataset())
    assert whole[0]["tokens"].shape == (4, CAPACITY)
    assert whole[0]["real"].tolist() == (whole[0]["segment_ids"] > 0).sum(axis=1).tolist()
    iterator = iter(dataset())
    for step in range(len(whole)):
        restored = iter(dataset())
        restored.set_state(through_json(iterator.get_state()))
        equal(list(restored), whole[step:])
        next(iterator)


def shifted(record, rng):
    return record | {"tokens": record["tokens"] + rng.integers(100)}


def test_over_a_parent_with_a_state_of_its_own():
    """A filter and a random map below, and records mixed from two streams."""

    def dataset():
        records = records_of(lengths_of(30))
        one = stream(records[:15]).seed(3).random_map(shifted)
        two = stream(records[15:]).filter(lambda record: len(record["tokens"]) % 3)
        return PackIterDataset(
            grain.IterDataset.mix([one, two], [0.5, 0.5]),
            CAPACITY,
            2,
            window=2,
            max_segments=4,
            over_length="split",
        )

    whole = list(dataset())
    iterator = iter(dataset())
    for step in range(len(whole) + 1):
        restored = iter(dataset())
        restored.set_state(through_json(iterator.get_state()))
        equal(list(restored), whole[step:])
        next(iterator, None)


def test_iterators_of_one_dataset_are_independent():
    dataset = flavour("shuffled")
    whole = list(dataset)
    one, two = iter(dataset), iter(dataset)
    pairs = [(next(one), next(two)) for _ in whole]
    equal([a for a, _ in pairs], whole)
    equal([b for _, b in pairs], whole)


@pytest.mark.parametrize("lengths", [[], [0, 0, 0], [20, 30], [0, 20]])
def test_nothing_to_pack(lengths, caplog):
    caplog.set_level(logging.INFO, "seqpack_jax")
    dataset = PackIterDataset(stream(coded(lengths)), CAPACITY, 2, over_length="drop")
    iterator = iter(dataset)
    states = [through_json(iterator.get_state())]
    assert list(iterator) == []
    states.append(through_json(iterator.get_state()))
    assert (iterator.empty_records, iterator.report.tokens) == (lengths.count(0), sum(lengths))
    for state in states:
        restored = iter(dataset)
        restored.set_state(state)
        assert list(restored) == []
        assert restored.report == iterator.report
        assert restored.empty_records == iterator.empty_records
    expected = f"PackIterDataset: {lengths.count(0)} empty records skipped, {iterator.report}"
    assert caplog.messages == [expected] * 3 * bool(lengths)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    policy=policies(),
    batch_size=st.none() | st.integers(1, 4),
    window=st.integers(1, 4),
    shuffle=st.booleans(),
    step=st.integers(0, 5),
)
def test_every_token_once_through_any_restore(lengths, policy, batch_size, window, shuffle, step):
    rows = window * (batch_size or 1)
    if policy.action == "split":  # the pieces of a record must fit one group
        stride = CAPACITY - policy.overlap
        lengths = [min(n, CAPACITY + stride * (rows - 1)) for n in lengths]
    lengths = [*lengths, 3]

    def dataset():
        return PackIterDataset(
            stream(coded(lengths)),
            CAPACITY,
            batch_size,
            window=window,
            shuffle=shuffle,
            over_length=policy,
        )

    iterator = iter(dataset())
    batches = [batch for _, batch in zip(range(step), iterator, strict=False)]
    restored = iter(dataset())
    restored.set_state(through_json(iterator.get_state()))
    batches += restored
    if batch_size is None:
        batches = [{name: row[None] for name, row in batch.items()} for batch in batches]
    assert all(batch["tokens"].shape == (batch_size or 1, CAPACITY) for batch in batches)
    check_segments(policy, lengths, batches)
    check_report(policy, lengths, batches, restored.report)


def test_no_record_moves_more_than_a_group():
    dataset = PackIterDataset(
        stream(coded([n for n in lengths_of(600, longest=18) if 0 < n <= 16])),
        CAPACITY,
        2,
        window=4,
        max_segments=9,
        metadata=True,
    )
    batches = list(dataset)
    last = -1
    groups = [batches[k : k + 4] for k in range(0, len(batches), 4)]
    sizes = []
    for group in groups:  # each takes the records that follow those of the group before
        ids = np.concatenate([batch["ids"][batch["ids"] >= 0] for batch in group])
        assert sorted(ids) == list(range(last + 1, last + 1 + len(ids)))
        last += len(ids)
        sizes.append(len(ids))
    assert len(groups) > 5
    assert any(np.any(np.diff(g[0]["ids"][g[0]["ids"] >= 0]) < 0) for g in groups), "shuffled"


def test_denser_than_grains_best_fit_with_as_many_rows():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(300), 1, 2000)), 1, 2048).astype(int)
    records = [{"tokens": np.ones(n, np.int32)} for n in lengths]
    for rows in (8, 64):
        theirs = grain.experimental.BestFitPackIterDataset(
            stream(records), length_struct={"tokens": 2048}, num_packing_bins=rows
        )
        number = sum(1 for _ in theirs)
        mine = PackIterDataset(stream(records), 2048, rows, window=1, shuffle=False)
        assert sum(int((b["segment_ids"][:, 0] > 0).sum()) for b in mine) < number
    # A group of about 1024 records
    mine = list(PackIterDataset(stream(records[:1100]), 2048, None, window=230))
    filled = [(row["segment_ids"] > 0).mean() for row in mine[:230]]
    assert np.mean(filled) > 0.995


def test_max_segments_is_kept_in_every_flavour():
    for name, cap in (("plain", 2), ("rows", 3), ("split", 1)):
        options = {"max_seq_len": CAPACITY, "batch_size": 3} | FLAVOURS[name]
        dataset = PackIterDataset(stream(coded(lengths_of())), max_segments=cap, **options)
        assert max(batch["segment_ids"].max() for batch in dataset) == cap


def test_what_a_batch_holds():
    records = records_of([5, 0, 3, 12])
    (batch,) = PackIterDataset(
        stream(records), CAPACITY, 2, max_segments=4, metadata=True, shuffle=False, pad_value=9
    )
    assert batch["tokens"][0].tolist() == [*range(3000, 3012), *range(2000, 2003), 9]
    assert batch["ids"].tolist() == [[3, 2, -1, -1], [0, -1, -1, -1]]
    assert batch["weight"].tolist() == batch["ids"].clip(0).tolist()
    assert batch["segment_lengths"].tolist() == [[12, 3, 0, 0], [5, 0, 0, 0]]
    assert batch["loss"].dtype == np.float32
    assert batch["vectors"].shape == (2, CAPACITY, 2)
    assert batch["row_valid"].tolist() == [True, True]


def test_rows_own_their_memory():
    for row in flavour("rows"):
        assert all(array.base is None for array in row.values())


@pytest.mark.parametrize("batch_size", [4, None])
def test_an_iterator_at_its_end_holds_no_rows(batch_size):
    dataset = PackIterDataset(stream([np.ones(900, np.int32)] * 64), 1024, batch_size, window=64)
    tracemalloc.start()
    iterator = iter(dataset)
    before, _ = tracemalloc.get_traced_memory()
    for _ in iterator:
        pass
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 64 * 1024, "a row takes 12 kB, 64 of them a block"


def test_a_map_dataset_is_read_as_a_stream():
    records = grain.MapDataset.source(coded([5, 3, 9]))
    one = PackIterDataset(records, CAPACITY, 2)
    equal(list(one), list(PackIterDataset(stream(coded([5, 3, 9])), CAPACITY, 2)))


class Counting(grain.DatasetIterator):
    """An iterator over coded records that counts how it is used."""

    def __init__(self, lengths):
        super().__init__()
        self.records, self.place, self.asked, self.read = coded(lengths), 0, 0, 0

    def __next__(self):
        if self.place == len(self.records):
            raise StopIteration
        self.place, self.read = self.place + 1, self.read + 1
        return self.records[self.place - 1]

    def get_state(self):
        self.asked += 1
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


class Living(Counting):
    """Gives away, and takes over, the very state that it goes on to change."""

    def __init__(self, lengths):
        super().__init__(lengths)
        self.state = {"place": [0]}

    def __next__(self):
        if self.state["place"][0] == len(self.records):
            raise StopIteration
        self.state["place"][0] += 1
        return self.records[self.state["place"][0] - 1]

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


class LivingDataset(grain.IterDataset):
    def __iter__(self):
        return Living([n for n in lengths_of(120) if n <= 16])


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_state_is_not_that_of_a_parent_that_goes_on(batch_size):
    dataset = PackIterDataset(LivingDataset(), CAPACITY, batch_size, window=5)
    whole, iterator, states = list(dataset), iter(dataset), []
    for batch in whole:
        states.append((iterator.get_state(), through_json(iterator.get_state())))
        equal([next(iterator)], [batch])
    for step, (state, as_it_was) in enumerate(states):
        restored, again = iter(dataset), iter(dataset)
        restored.set_state(state)
        equal([next(restored)], [whole[step]])
        again.set_state(restored.get_state())
        equal(list(restored), whole[step + 1 :])
        equal(list(again), whole[step + 1 :])
        assert state == as_it_was


class CountingDataset(grain.IterDataset):
    def __init__(self, lengths):
        super().__init__()
        self.lengths = lengths

    def __iter__(self):
        self.last = Counting(self.lengths)
        return self.last


def test_the_parent_is_asked_for_its_state_once_per_group():
    parent = CountingDataset([n for n in lengths_of(900) if n <= 16])
    dataset = PackIterDataset(parent, CAPACITY, 4, window=4)
    iterator = iter(dataset)
    reader, number = parent.last, len(parent.lengths)
    batches = 0
    for _ in iterator:
        iterator.get_state()
        batches += 1
    assert reader.read == number
    assert reader.asked <= batches // 4 + 3


def test_restoring_reads_about_one_group_again():
    parent = CountingDataset([n for n in lengths_of(3000) if n <= 16])
    dataset = PackIterDataset(parent, CAPACITY, 4, window=4)
    iterator = iter(dataset)
    states, batches = [], 0
    while next(iterator, None) is not None:
        batches += 1
        states.append(iterator.get_state())
    per_group = len(parent.lengths) / (batches / 4)
    for state in states[::7]:
        restored = iter(dataset)
        restored.set_state(state)
        next(restored, None)
        assert parent.last.read < 2.5 * per_group, "what is skipped, and the group itself"


def test_a_state_of_other_settings_is_refused():
    records = coded([5, 3, 9, 12])
    base = {"max_seq_len": CAPACITY, "batch_size": 2, "window": 2}
    state = iter(PackIterDataset(stream(records), **base)).get_state()
    for options in (
        {"max_seq_len": 32},
        {"batch_size": 4, "window": 1},
        {"window": 3},
        {"seed": 1},
        {"shuffle": False},
        {"over_length": "drop"},
        {"multiple_of": 4},
        {"max_segments": 3},
        {"pad_value": 1},
    ):
        other = iter(PackIterDataset(stream(records), **(base | options)))
        mine = other.get_state()["settings"]
        with pytest.raises(sp.SeqpackError, match="with the arguments that it was saved") as caught:
            other.set_state(state)
        assert state["settings"] in str(caught.value)
        assert mine in str(caught.value)


@pytest.mark.parametrize(
    "state", [{}, {"next_index": 3}, {"format": "seqpack_jax.stream", "version": 2}, [1], None]
)
def test_a_state_of_another_format_is_refused(state):
    iterator = iter(flavour("plain"))
    with pytest.raises(sp.SeqpackError, match=r"expected \('seqpack_jax.stream', 1\)"):
        iterator.set_state(state)


@pytest.mark.parametrize("name", ["settings", "parent", "records", "skip", "counts", "batches"])
def test_a_state_that_is_not_whole_is_refused(name):
    iterator = iter(flavour("plain"))
    state = iterator.get_state()
    del state[name]
    with pytest.raises(sp.SeqpackError, match=f"PackIterDataset: the state has no '{name}'"):
        iterator.set_state(state)


def test_a_state_of_other_records_is_refused():
    iterator = iter(PackIterDataset(stream(coded([16] * 40)), CAPACITY, 2, window=4))
    for _ in range(7):
        next(iterator)
    state = iterator.get_state()
    for lengths, part in (
        ([16] * 3, "the stream ended after"),
        ([16] * 9 + [0] * 60, "3 batches into a group of 1"),
    ):
        other = iter(PackIterDataset(stream(coded(lengths)), CAPACITY, 2, window=4))
        other.set_state(state)
        with pytest.raises(sp.SeqpackError, match=part):
            next(other)


def test_a_record_that_raises_is_not_skipped():
    records = [*coded([5, 3, 16, 16]), np.ones(17, int), *coded([4])]
    iterator = iter(PackIterDataset(stream(records), CAPACITY, 1, window=1))
    found = []
    for _ in range(12):
        try:
            found.append(next(iterator))
        except sp.SeqpackError as error:
            assert "record 4 has 17 tokens" in str(error)  # noqa: PT017
            state = iterator.get_state()
    restored = iter(PackIterDataset(stream(records), CAPACITY, 1, window=1))
    restored.set_state(through_json(state))
    with pytest.raises(sp.SeqpackError, match="record 4 has 17 tokens"):
        next(restored)


def test_an_error_in_a_batch_loses_nothing():
    records = [{"tokens": np.ones(3, int)}, {"tokens": np.array([2**40])}]
    iterator = iter(PackIterDataset(stream(records), CAPACITY, 1))
    for _ in range(2):
        with pytest.raises(sp.SeqpackError, match=r"PackIterDataset: .* beyond int32"):
            next(iterator)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"parent": [1, 2]}, "parent is a list, not a grain.IterDataset"),
        ({"max_seq_len": 0}, "max_seq_len = 0"),
        ({"batch_size": 0}, "batch_size = 0, but it must be at least 1"),
        ({"window": 0}, "window = 0"),
        ({"seed": 0.5}, "seed = 0.5 is not an integer"),
        ({"over_length": "cut"}, "choose one of error, drop, truncate"),
        ({"over_length": OverLength("split", overlap=16)}, "overlap = 16, but max_seq_len is 16"),
        ({"max_seq_len": {"a": 4, "b": 4}, "over_length": "split"}, "2 features have their own"),
        ({"metadata": True}, "metadata without max_segments"),
        ({"multiple_of": 3}, "no multiple of 3"),
    ],
)
def test_bad_arguments(options, part):
    given = {"parent": stream(coded([5])), "max_seq_len": CAPACITY, "batch_size": 4} | options
    with pytest.raises(sp.SeqpackError, match="PackIterDataset: ") as caught:
        PackIterDataset(given.pop("parent"), **given)
    assert part in str(caught.value)


def test_str_says_what_determines_the_batches():
    assert str(flavour("plain")) == str(flavour("plain")) != str(flavour("shuffled"))
    assert "over_length=OverLength(action='drop'" in str(flavour("plain"))
