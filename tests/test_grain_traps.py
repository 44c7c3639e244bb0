"""Each trap of Grain's own packers (reference/grain.md 1.4, 1.5, 2, 3), and what ours do there.

A test is named after the right behaviour; its comment names the section that has the trap.
"""

import json

import grain
import jax
import numpy as np
import pytest
from comparing import equal

import seqpack_jax as sp
from seqpack_jax.feeding.resuming import PackedDataset
from seqpack_jax.feeding.stream_dataset import PackIterDataset

L = 64
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class Records(list):
    """Records in memory, with the stable repr that a `DataLoader` compares; it counts reads."""

    reads = 0

    def __repr__(self):
        return "Records"

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def lengths_of(n, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(2.5, 0.8, n), 1, L).astype(int)


def numbered(lengths):
    """Sequence `i` is `i + 1` in every token, so that a row says which sequences it holds."""
    return [np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)]


def records_of(lengths):
    return Records({"tokens": tokens} for tokens in numbered(lengths))


# --- the flavours, all over the same sequences ---------------------------------------------------


def load(source, operations=(), workers=0, sampler=None):
    return grain.DataLoader(
        data_source=source,
        sampler=sampler or grain.samplers.SequentialSampler(len(source)),
        operations=operations,
        worker_count=workers,
        read_options=READ,
    )


def read(source, workers=0):
    steps = grain.MapDataset.source(source).to_iter_dataset(READ)
    return steps.mp_prefetch(grain.MultiprocessingOptions(workers)) if workers else steps


def operation(lengths, workers=0, **options):
    return load(records_of(lengths), [sp.PackOperation(L, 4, **options)], workers)


def stream(lengths, workers=0, **options):
    parent = grain.MapDataset.source(records_of(lengths)).to_iter_dataset(READ)
    packed = PackIterDataset(parent, L, 4, **({"window": 3} | options))
    return packed.mp_prefetch(grain.MultiprocessingOptions(workers)) if workers else packed


def source_of(lengths, **options):
    return sp.pack_dataset(numbered(lengths), L, **({"batch_size": 4, "seed": 3} | options))


def planned_reader(lengths, workers=0, **options):
    return read(source_of(lengths, **options), workers)


def planned_loader(lengths, workers=0, **options):
    return load(source_of(lengths, **options), workers=workers)


def planned_dataset(lengths, workers=0, **options):
    return PackedDataset(source_of(lengths, **options), num_workers=workers)


STREAMING = [operation, stream]
PLANNED = [planned_reader, planned_loader, planned_dataset]
FLAVOURS = STREAMING + PLANNED
flavours = pytest.mark.parametrize("make", FLAVOURS)
streaming = pytest.mark.parametrize("make", STREAMING)


def ids_in(batches):
    """The sequences in batches, row by row, checking that each is whole."""
    found = []
    for batch in batches:
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"])
        for tokens, segments, positions in zip(*rows, strict=True):
            for segment in range(1, segments.max(initial=0) + 1):
                part = segments == segment
                assert part.any(), "segment ids are consecutive"
                assert len(set(tokens[part].tolist())) == 1
                assert positions[part].tolist() == list(range(part.sum()))
                found.append(int(tokens[part][0]) - 1)
    return found


def through_json(state):
    """A state as a checkpoint gives it back; that of a `DataLoader` is bytes already."""
    return state if isinstance(state, bytes) else json.loads(json.dumps(state))


def check_resume(make):
    """Compare fresh objects, restored after each step, with an uninterrupted pass."""
    whole = list(make())
    iterator = iter(make())
    for step in range(len(whole) + 1):
        restored = iter(make())
        restored.set_state(through_json(iterator.get_state()))
        equal(list(restored), whole[step:])
        next(iterator, None)
    return whole


# --- 1.4 and 1.2: resuming -----------------------------------------------------------------------


@flavours
def test_a_resume_at_any_step_loses_nothing(make):
    # 1.4: a resumed PackAndBatchOperation lost the record that it carried over, at every step; a
    # window operation up to 60 records.
    lengths = lengths_of(120)
    whole = check_resume(lambda: make(lengths))
    assert sorted(ids_in(whole)) == list(range(120))


@pytest.mark.slow
@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize("make", [stream, planned_dataset])
def test_a_resume_with_workers_loses_nothing(make):
    # 1.4: up to one record per worker was lost, of window operations up to 110.  The operation and
    # the other readers of planned batches are in test_pipeline.py.
    lengths = lengths_of(120)
    iterator = iter(make(lengths, 2))
    seen = [next(iterator) for _ in range(3)]
    state, rest = through_json(iterator.get_state()), list(iterator)
    restored = iter(make(lengths, 2))
    restored.set_state(state)
    equal(list(restored), rest)
    assert sorted(ids_in(seen + rest)) == list(range(120))


@flavours
def test_exact_restores_where_sequences_fill_rows_and_nothing_is_left_over(make):
    # 2, bug A: ConcatThenSplit swallowed a record after a JSON restore whenever its remainder was
    # empty, at step 0 among others; where lengths divide the row, always.
    whole = check_resume(lambda: make([L // 4] * 64))
    assert sorted(ids_in(whole)) == list(range(64))
    assert len(whole) == 4


@flavours
def test_the_second_epoch_of_a_loader_is_like_the_first(make):
    # 1.2 and 1.4 (A): PackAndBatchOperation began its second pass with what the first left over.
    packing = make(lengths_of(90))
    first = list(packing)
    equal(list(packing), first)
    one, two = iter(packing), iter(packing)
    both = [(next(one), next(two)) for _ in first]
    equal([a for a, _ in both], first)
    equal([b for _, b in both], first)


@flavours
def test_a_live_set_state_forgets_what_was_read(make):
    # 1.4 (B): the batch after a live set_state was a stale one.
    packing = make(lengths_of(120))
    whole = list(packing)
    iterator = iter(packing)
    start = iterator.get_state()
    next(iterator)
    state = iterator.get_state()
    equal([next(iterator) for _ in range(4)], whole[1:5])
    iterator.set_state(state)
    equal(list(iterator), whole[1:])
    iterator.set_state(start)  # after the end, too
    equal(list(iterator), whole)


@flavours
def test_the_state_after_the_end_is_the_end(make):
    # 1.4: a carried record came up again, or never.
    iterator = iter(make(lengths_of(30)))
    assert list(iterator)
    restored = iter(make(lengths_of(30)))
    restored.set_state(through_json(iterator.get_state()))
    assert list(restored) == []


def test_what_a_loader_compares_has_no_address():
    # 1.3: on restore, Grain compares repr(source); one with an address in it is never equal.
    for one, two in [
        (source_of([3, 4]), source_of([3, 4])),
        (sp.PackOperation(L, 4), sp.PackOperation(L, 4)),
    ]:
        assert repr(one) == repr(two)
        assert " at 0x" not in repr(one)
    other = iter(load(source_of([3, 5])))
    with pytest.raises(ValueError, match="PackedSource"):
        other.set_state(iter(load(source_of([3, 4]))).get_state())


# --- 1.4: records that are not as a packer wants them --------------------------------------------


class Nothing(grain.transforms.Filter):
    def filter(self, element):
        return False


def test_everything_filtered_out_yields_nothing():
    # 1.4 (C): AttributeError: 'NoneType' object has no attribute 'get_packed_batch'.
    records = records_of([5, 6, 7])
    assert list(load(records, [Nothing(), sp.PackOperation(L, 4)])) == []
    parent = grain.MapDataset.source(records).to_iter_dataset(READ).filter(lambda record: False)
    assert list(PackIterDataset(parent, L, 4)) == []


def test_an_empty_input_yields_nothing():
    # 2: a list without batches, and no state that cannot be restored.
    assert list(stream([])) == []
    iterator = iter(stream([]))
    iterator.set_state(through_json(iterator.get_state()))
    assert list(iterator) == []
    assert list(sp.PackOperation(L, 4)(iter([]))) == []  # samplers refuse to sample from nothing


def test_a_plan_without_sequences_is_refused_by_name():
    # 2: no run of zero steps goes by in silence.
    with pytest.raises(sp.SeqpackError, match="there are no sequences"):
        source_of([])


@flavours
def test_an_over_length_record_is_named_with_what_to_do(make):
    # 1.4 (D) and 2: "Inputs to PackedBatch must be truncated to max length", without a record.
    with pytest.raises(sp.SeqpackError, match="pass over_length='drop', 'truncate'") as caught:
        list(make([5, 70, 6]))
    assert "70" in str(caught.value)
    assert "record 1" in str(caught.value) or "lengths[1]" in str(caught.value)


@flavours
@pytest.mark.parametrize(
    ("policy", "tokens"),
    [("drop", 11), ("truncate", 75), ("truncate_left", 75), ("crop", 75), ("split", 81)],
)
def test_an_over_length_policy_keeps_a_run_alive(make, policy, tokens):
    # 2: there is no option to drop, truncate or split: the whole run dies.
    batches = list(make([5, 70, 6], over_length=policy))
    assert sum(int((batch["segment_ids"] > 0).sum()) for batch in batches) == tokens


@streaming
def test_an_empty_record_burns_no_segment_id(make):
    # 1.4 (E) and 2: segment ids were [1, 1, 1, 3, 3] around an empty record.
    lengths = [3, 0, 2, 0, 4]
    (batch,) = make(lengths)
    assert sorted(ids_in([batch])) == [0, 2, 4]
    sp.validate_batch(batch)
    assert batch["segment_ids"].max() == 3


@streaming
def test_empty_records_alone_make_no_batch(make):
    # 2: a data set of empty documents gave a row of padding.
    assert list(make([0, 0, 0])) == []


@flavours
def test_every_batch_has_its_full_shape_and_empty_rows_say_so(make):
    # 1.4 (F) and 2: the last batch was ragged or had rows that nothing told apart from real ones.
    options = {"metadata": True, "max_segments": 64}
    batches = list(make(lengths_of(41), **options))
    assert {batch["tokens"].shape for batch in batches} == {(4, L)}
    for batch in batches:
        np.testing.assert_array_equal(batch["row_valid"], batch["segment_ids"].any(axis=1))
    assert sorted(ids_in(batches)) == list(range(41))


@flavours
def test_the_padding_token_is_chosen(make):
    # 1.4: "no padding id": padding was 0, a token of many vocabularies.
    for batch in make(lengths_of(41), pad_value=-7):
        padding = batch["segment_ids"] == 0
        assert padding.any()
        assert (batch["tokens"][padding] == -7).all()


def test_rows_of_long_records_do_not_come_first():
    # 1.4 and 5: "no bin shuffling": packing in decreasing order alone puts long records in front.
    (first, *_) = stream(lengths_of(400), window=8)
    (unshuffled, *_) = stream(lengths_of(400), window=8, shuffle=False)
    assert first["tokens"].tolist() != unshuffled["tokens"].tolist()
    (again, *_) = stream(lengths_of(400), window=8)
    equal([first], [again])
    (other, *_) = stream(lengths_of(400), window=8, seed=1)
    assert first["tokens"].tolist() != other["tokens"].tolist()


# --- 1.5: workers, shards, read options ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_planned_batch_is_the_same_for_any_number_of_workers(workers):
    # 1.5 and 2: each worker packed a stream of its own: other bins for each number of workers.  2,
    # and Grain's own readers: test_pipeline.py.
    lengths = lengths_of(120)
    equal(list(planned_dataset(lengths, workers)), list(planned_dataset(lengths, 0)))


@pytest.mark.slow
@pytest.mark.usefixtures("collect_at_the_end")
def test_a_position_without_workers_is_restored_with_workers():
    # 3: KeyError: 'exhausted'.
    lengths = lengths_of(120)
    whole = list(planned_dataset(lengths))
    for before, after in [(0, 1), (3, 0)]:
        iterator = iter(planned_dataset(lengths, before))
        for _ in range(3):
            next(iterator)
        restored = iter(planned_dataset(lengths, after))
        restored.set_state(through_json(iterator.get_state()))
        equal(list(restored), whole[3:])


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_all_hosts_take_as_many_steps(count, remainder):
    # 1.5 and 2: hosts packed alone, and got 16, 16 and 15 batches, or finished 3 steps apart.
    lengths = lengths_of(300)
    hosts = [
        source_of(lengths, batch_size=2, shard=(index, count), remainder=remainder)
        for index in range(count)
    ]
    assert {len(host) for host in hosts} == {hosts[0].steps_per_epoch}
    assert {len(list(read(host))) for host in hosts} == {len(hosts[0])}
    rows = sum(int(batch["segment_ids"].any(axis=1).sum()) for host in hosts for batch in host)
    lost = hosts[0].plan.num_bins - rows
    assert lost == (0 if remainder == "pad" else hosts[0].plan.num_bins % (2 * count))


def test_no_record_is_lost_if_records_do_not_divide_over_hosts():
    # 1.5: of 299 records, 4 hosts saw 296, drop_remainder=False notwithstanding.
    lengths = lengths_of(299)
    hosts = [source_of(lengths, shard=(index, 4)) for index in range(4)]
    for make in (read, load, PackedDataset):
        assert sorted(ids_in(batch for host in hosts for batch in make(host))) == list(range(299))


def test_grains_own_shards_of_the_stream_lose_nothing_either():
    # 1.5: for a stream, deal with MapDataset.slice, which keeps the remainder.
    parents = [grain.MapDataset.source(records_of(lengths_of(299)))[i::4] for i in range(4)]
    packed = [PackIterDataset(parent.to_iter_dataset(READ), L, 4) for parent in parents]
    assert sorted(ids_in(batch for shard in packed for batch in shard)) == list(range(299))


def test_reading_ahead_is_bounded_by_default():
    # 1.5: Grain's default reads 500 items ahead: 501 reads after the first.  A batch is an item.
    sequences = Records(numbered([L] * 4000))
    before = sequences.reads
    iterator = iter(PackedDataset(sp.pack_dataset(sequences, L, lengths=[L] * 4000, batch_size=4)))
    next(iterator)
    iterator.close()
    assert 4 <= sequences.reads - before <= 4 * (1 + 16 + 2)


def test_a_warning_names_the_memory_of_reading_ahead():
    # 1.5: 500 items of (16, 8192) tokens were 786 MB per process, in silence.
    source = sp.pack_dataset([np.ones(8192, int)], 8192, batch_size=16)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=700)
    with pytest.warns(UserWarning, match=r"holds up to 700 items of 1\.6 MB, 1\.1 GB"):
        PackedDataset(source, read_options=options)


# --- 2: features ---------------------------------------------------------------------------------


def pack(records, max_seq_len=8, **options):
    parent = grain.MapDataset.source(records).to_iter_dataset(READ)
    return list(PackIterDataset(parent, max_seq_len, 2, **options))


def load_packed(records, max_seq_len=8, **options):
    return list(load(Records(records), [sp.PackOperation(max_seq_len, 2, **options)]))


def plan_and_pack(records, max_seq_len=8, **options):
    lengths = [len(record["tokens"]) for record in records]
    return list(sp.pack_dataset(records, max_seq_len, lengths=lengths, batch_size=2, **options))


packers = pytest.mark.parametrize("packer", [pack, load_packed, plan_and_pack])


@packers
@pytest.mark.parametrize(
    ("first", "later", "part"),
    [
        (np.array([1, 2], np.int32), np.array([2**40]), "1099511627776"),
        (np.array([1, 2], np.int32), np.array([2.7]), "float64"),
    ],
)
def test_a_dtype_is_never_cast_in_silence(packer, first, later, part):
    # 2: int64 2**40 in a buffer of int32 became 0, 2.7 became 2.
    with pytest.raises(sp.SeqpackError, match=part):
        packer([{"tokens": first}, {"tokens": later}])


@packers
def test_a_second_feature_keeps_one_dtype(packer):
    # 2: a feature had the dtype of the first element that was seen.
    def record(dtype):
        return {"tokens": np.arange(2), "score": np.array([0.5, 2.7], dtype)}

    (batch,) = packer([record(np.float16)] * 3)
    assert batch["score"].dtype == np.float16
    with pytest.raises(sp.SeqpackError, match=r"'score'.*float") as caught:
        packer([record(np.float32), record(np.float64)])
    assert "float32" in str(caught.value)


@packers
def test_lists_are_packed(packer):
    # 2: AssertionError: <class 'list'>.
    (batch,) = packer([{"tokens": [5, 6, 7]}, {"tokens": [8]}])
    assert sorted(batch["tokens"][batch["segment_ids"] > 0].tolist()) == [5, 6, 7, 8]


@pytest.mark.parametrize("packer", [pack, load_packed])
def test_bare_arrays_are_packed(packer):
    # 2: AssertionError without a message.
    (batch,) = packer([np.array([5, 6, 7]), np.array([8])])
    assert sorted(batch["tokens"][batch["segment_ids"] > 0].tolist()) == [5, 6, 7, 8]


@packers
def test_nested_records_are_packed_and_come_out_nested(packer):
    # 2: a misleading "should be marked as a meta feature".
    records = [{"tokens": np.arange(n), "aux": {"w": np.ones(n, np.float32)}} for n in (3, 5)]
    (batch,) = packer(records)
    np.testing.assert_array_equal(batch["aux"]["w"] > 0, batch["segment_ids"] > 0)


@packers
def test_scalars_come_out_per_segment(packer):
    # 2: scalars became sequences of length 1, or vanished if length_struct had them not.
    records = [{"tokens": np.full(n, n), "tag": n, "ok": True} for n in (5, 3, 2)]
    (batch,) = packer(records, max_segments=4, metadata=True)
    assert batch["tag"].shape == batch["ok"].shape == (2, 4)
    used = batch["segment_lengths"] > 0
    np.testing.assert_array_equal(batch["tag"][used], batch["segment_lengths"][used])
    np.testing.assert_array_equal(batch["ok"], used)


@packers
def test_metadata_can_be_batched(packer):
    # 2: meta features became a Python list per row, which broke .batch().
    records = [{"tokens": np.full(4, n), "vector": np.full(3, n, np.float32)} for n in range(1, 9)]
    batches = packer(records, max_segments=2, meta_features=("vector",))
    assert len(batches) == 2
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    assert stacked["vector"].shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(stacked["vector"][..., 0], stacked["tokens"][..., [0, 4]])


@pytest.mark.parametrize("packer", [pack, load_packed])
def test_a_feature_without_a_place_is_an_error_not_left_out(packer):
    # 2: keys that length_struct did not name were dropped.
    record = {"tokens": np.arange(1, 4), "other": np.arange(5)}
    with pytest.raises(sp.SeqpackError, match=r"'other' of record 0 has 5 .* meta_features"):
        packer([record])


@packers
def test_segments_are_aligned_and_padded_as_asked(packer):
    # 2: pack_alignment_struct and padding_struct, for every packer.
    records = [{"tokens": np.full(n, n)} for n in (3, 2, 1)]
    (batch,) = packer(records, multiple_of=4, pad_value=-1)
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
        assert (starts % 4 == 0).all()
        assert (tokens[segments == 0] == -1).all()
    assert sorted(batch["tokens"][batch["segment_ids"] > 0].tolist()) == [1, 2, 2, 3, 3, 3]


@packers
@pytest.mark.parametrize("cap", [1, 2, 3])
def test_no_row_has_more_segments_than_asked(packer, cap):
    # 2 and 4: MaxText's best_fit forgot max_sequences_per_bin.
    records = [{"tokens": np.array([n])} for n in range(1, 20)]
    batches = packer(records, max_segments=cap)
    assert max(batch["segment_ids"].max() for batch in batches) == cap
    found = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    assert sorted(found.tolist()) == list(range(1, 20))


def test_features_of_different_lengths_come_once_each():
    # 2, bug B: ConcatThenSplit gave a short feature twice if another was split more than once.
    records = [{"a": np.arange(1, n + 1), "b": np.array([70 + n, 80 + n])} for n in (3, 2, 1)]
    batches = pack(records, {"a": 3, "b": 4})
    tokens = {name: np.concatenate([batch[name] for batch in batches]) for name in "ab"}
    segments = {name: np.concatenate([b[f"{name}_segment_ids"] for b in batches]) for name in "ab"}
    real = {name: tokens[name][segments[name] > 0].tolist() for name in "ab"}
    assert sorted(real["a"]) == [1, 1, 1, 2, 2, 3]
    assert sorted(real["b"]) == [71, 72, 73, 81, 82, 83]
    with pytest.raises(sp.SeqpackError, match="have their own"):
        pack(records, {"a": 3, "b": 4}, over_length="split")


@flavours
@pytest.mark.parametrize("positions", ["restart", "continue"])
def test_positions_of_split_records_go_on_if_asked(make, positions):
    # 2: positions restarted in a continued piece, against the docstring.
    policy = sp.OverLength("split", positions=positions)
    (batch,) = make([70], over_length=policy)
    assert (batch["positions"].max() == 69) == (positions == "continue")
    np.testing.assert_array_equal(np.sort(batch["tokens"][batch["segment_ids"] > 0]), [1] * 70)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_rows_is_refused_by_name(batch_size):
    # 2: num_packing_bins=0: "A failing component must be returned if no row is found."
    parent = grain.MapDataset.source([]).to_iter_dataset()
    for make in (
        lambda: PackIterDataset(parent, L, batch_size),
        lambda: sp.PackOperation(L, batch_size),
        lambda: source_of([3], batch_size=batch_size),
    ):
        with pytest.raises(sp.SeqpackError, match=f"batch_size = {batch_size}"):
            make()


# --- 2 and 3: memory, length, random access ------------------------------------------------------


@flavours
def test_a_kept_row_keeps_no_large_buffer_alive(make):
    # 2: rows were views: 8 KiB of one row kept 8 MiB of a thousand rows alive.
    for batch in make(lengths_of(41)):
        for array in batch.values():
            owner = array
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            assert owner.nbytes <= array.nbytes


@pytest.mark.parametrize("kind", [read, PackedDataset])
def test_a_single_row_owns_its_memory(kind):
    # 2: the same for rows that are batched later.
    for row in kind(source_of(lengths_of(41), batch_size=None)):
        assert row["tokens"].shape == (L,)
        for array in row.values():
            owner = array
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            assert owner.nbytes <= array.nbytes


def test_a_restore_reads_the_open_group_alone():
    # 2: a restore read and packed again all that was open.
    lengths = lengths_of(600)

    def fresh():
        records = records_of(lengths)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        parent = grain.MapDataset.source(records).to_iter_dataset(options)
        return records, iter(PackIterDataset(parent, L, 4, window=2))

    _, iterator = fresh()
    batches = [next(iterator) for _ in range(2 * 10)]
    state = through_json(iterator.get_state())
    group = len(ids_in(batches[-2:]))
    again, restored = fresh()
    restored.set_state(state)
    following = next(restored)
    assert group < again.reads <= 4 * group
    equal([next(iterator)], [following])


def test_the_parent_is_asked_for_its_state_once_per_group():
    # 2: a packer asked at every record, which with a WindowShuffle upstream copies its window.
    asked = []

    class Parent(grain.DatasetIterator):
        def __init__(self, records):
            super().__init__()
            self._records = iter(records)

        def __next__(self):
            return next(self._records)

        def get_state(self):
            asked.append(1)
            return {}

        def set_state(self, state):
            raise NotImplementedError

    class Asked(grain.IterDataset):
        def __iter__(self):
            return Parent(records_of(lengths_of(600)))

    batches = list(PackIterDataset(Asked(), L, 4, window=2))
    assert len(asked) <= len(batches) // 2 + 2


@pytest.mark.parametrize("make", PLANNED)
def test_no_row_mixes_epochs(make):
    # 2: repeat before packing puts records of two epochs into one row.
    batches = list(make(lengths_of(90), epochs=3))
    steps = len(batches) // 3
    for epoch in range(3):
        found = ids_in(batches[epoch * steps : (epoch + 1) * steps])
        assert sorted(found) == list(range(90))


def test_the_number_of_steps_is_known_and_items_are_random_access():
    # 2: len(ds) and ds[0] of a packer are TypeErrors.
    source = source_of(lengths_of(90))
    mapped = grain.MapDataset.source(source)
    assert len(mapped) == len(source) == len(list(mapped)) == source.steps_per_epoch
    equal([mapped[len(mapped) - 1]], [source[len(source) - 1]])


@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 4), (2, 2)])
def test_an_elastic_iterator_changes_the_number_of_hosts(before, after):
    # 2: ElasticIterator over a packer was built, then raised a TypeError on next.
    rows = grain.MapDataset.source(source_of(lengths_of(200), batch_size=None))

    def iterators(count):
        options = [grain.sharding.ShardOptions(index, count) for index in range(count)]
        return [grain.experimental.ElasticIterator(rows, 8, option) for option in options]

    def step(hosts):  # Grain deals rows to hosts one by one
        return np.stack([next(host)["tokens"] for host in hosts], axis=1).reshape(8, L)

    whole = iterators(1)
    expected = [step(whole) for _ in range(6)]
    hosts = iterators(before)
    for batch in expected[:3]:
        np.testing.assert_array_equal(step(hosts), batch)
    state = through_json(hosts[0].get_state())
    hosts = iterators(after)
    for host in hosts:
        host.set_state(state)
    for batch in expected[3:]:
        np.testing.assert_array_equal(step(hosts), batch)


# --- 3: permutations -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 65_537, 262_145, 1_048_577])
def test_an_epoch_holds_every_id_once_for_any_number_of_ids(n):
    # 3: index_shuffle is no bijection for n = 4^k + 1: one element twice, one never.
    counts, pools = sp.length_histogram_from_lengths(np.ones(n, np.int64))
    for max_seq_len in (1, 4):  # as many rows as ids, and a quarter
        plan = sp.pack_length_histogram(counts, max_seq_len)
        bins = sp.materialize_epoch(plan, pools, 7)[:]
        np.testing.assert_array_equal(np.sort(bins.ids), np.arange(n))


def test_every_row_of_a_large_epoch_comes_once():
    # 3: MapDataset.range(65537).shuffle(7) had 65 536 different elements.
    n = 65_537
    tokens = sp.FlatSequences(np.arange(n, dtype=np.int32), np.arange(n + 1))
    source = sp.pack_dataset(tokens, 1, batch_size=4096, seed=7)
    found = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in source])
    np.testing.assert_array_equal(np.sort(found), np.arange(n))


def test_an_epoch_of_one_seed_is_no_epoch_of_another():
    # 3: shuffle(7) in epoch 1 was shuffle(8) in epoch 0.
    lengths = lengths_of(90)
    one = source_of(lengths, seed=7, epochs=2)
    other = source_of(lengths, seed=8)
    second = [one[one.steps_per_epoch + step] for step in range(one.steps_per_epoch)]
    assert ids_in(second) != ids_in(other)
