"""The over-length policy acts on the tokens: what it keeps, and what it refuses."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import CAPACITY, CUTS, check_report, check_segments, coded, policies

import seqpack_jax as sp
from seqpack_jax.arrays import ArrayParts
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.sequences import fetch_records
from seqpack_jax.planning.over_length import OverLength, Pieces


def flat(sequences):
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
    return sp.FlatSequences(np.concatenate(sequences), offsets)


lengths_lists = st.lists(st.integers(1, 70), min_size=1, max_size=12)


@given(lengths=lengths_lists, policy=policies(), key=st.none() | st.integers(0, 2**64 - 1))
def test_pack_batch_keeps_what_the_policy_says(lengths, policy, key):
    sequences = coded(lengths)
    bins = replace(sp.pack_sequences(lengths, CAPACITY, over_length=policy), key=key)
    arguments = {"lengths": lengths, "rows": len(bins) + 1}
    batch = sp.pack_batch(bins, sequences, CAPACITY, **arguments)
    windows = check_segments(policy, lengths, [batch.asdict()])
    if key is None:
        assert not any(windows.values())
    check_report(policy, lengths, [batch], bins.report)
    again = sp.pack_batch(bins, flat(sequences), CAPACITY, **arguments)
    assert again.tokens.tolist() == batch.tokens.tolist()
    parts = [sp.pack_batch(bins[i : i + 1], sequences, CAPACITY, lengths=lengths)
             for i in range(len(bins))]  # fmt: skip
    assert [part.tokens[0].tolist() for part in parts] == batch.tokens[: len(bins)].tolist()


@settings(max_examples=60)
@given(
    lengths=lengths_lists,
    policy=policies(),
    tolerance=st.integers(1, 5),
    cap=st.none() | st.integers(1, 3),
    seed=st.integers(0, 2**32),
    count=st.integers(1, 3),
    batch_size=st.integers(1, 3),
)
def test_a_source_keeps_what_the_policy_says(
    lengths, policy, tolerance, cap, seed, count, batch_size
):
    if policy.action == "drop":
        lengths = [*lengths, 3]
    shards = [
        sp.pack_dataset(
            coded(lengths),
            CAPACITY,
            batch_size=batch_size,
            seed=seed,
            epochs=2,
            tolerance=tolerance,
            max_segments=cap,
            over_length=policy,
            shard=(shard, count),
        )
        for shard in range(count)
    ]
    steps = shards[0].steps_per_epoch
    for epoch in range(2):
        steps_of = range(epoch * steps, (epoch + 1) * steps)
        batches = [shard[step] for step in steps_of for shard in shards]
        check_segments(policy, lengths, batches)
        check_report(policy, lengths, batches, shards[0].pools.report)
    stats = shards[0].stats
    assert stats.report[1:] == shards[0].pools.report[1:]
    assert stats.rows_per_step == count * batch_size
    assert stats.num_bins == shards[0].plan.num_bins


def source_of(lengths, policy, **options):
    options = {"batch_size": 1} | options
    return sp.pack_dataset(coded(lengths), CAPACITY, over_length=policy, **options)


def windows_of(source):
    """`{(epoch, sequence): start}` of the windows that a source of crops keeps."""
    windows = {}
    for index, item in enumerate(source):
        item = {name: np.atleast_2d(array) for name, array in item.items()}
        for tokens in sp.unpack_batch(item):
            sequence, start = divmod(int(tokens[0]), 1000)
            windows[index // source.steps_per_epoch, sequence] = start
    return windows


LONG = [40, 17, 5, 300, 16, 40, 900, 3]


def test_a_window_depends_on_seed_epoch_and_id_alone():
    expected = windows_of(source_of(LONG, "crop", seed=4, epochs=3))
    for options in ({"batch_size": 3}, {"batch_size": None}, {"tolerance": 4}, {"shuffle": False}):
        assert windows_of(source_of(LONG, "crop", seed=4, epochs=3, **options)) == expected
    shards = [source_of(LONG, "crop", seed=4, epochs=3, shard=(i, 3)) for i in range(3)]
    merged = {}
    for shard in shards:
        merged |= windows_of(pickle.loads(pickle.dumps(shard)))
    assert merged == expected
    assert windows_of(source_of(LONG, "crop", seed=5, epochs=3)) != expected
    for sequence in (0, 3, 6):
        assert len({expected[epoch, sequence] for epoch in range(3)}) > 1
    assert expected[0, 0] != expected[0, 5] or expected[1, 0] != expected[1, 5], "equal lengths"


def test_every_token_comes_with_enough_epochs():
    source = source_of([CAPACITY + 4, 2 * CAPACITY], "crop", epochs=300)
    seen = np.unique(np.concatenate([sp.unpack_batch(item).tokens for item in source]))
    assert seen.tolist() == np.concatenate(coded([CAPACITY + 4, 2 * CAPACITY])).tolist()
    starts = [start for (_, sequence), start in windows_of(source).items() if sequence == 0]
    counts = np.bincount(starts)
    assert len(counts) == 5
    assert counts.min() > 30, "uniform: 60 each"


def test_windows_of_pack_batch_and_of_a_source_are_the_same():
    source = source_of(LONG, "crop", seed=9, epochs=2)
    windows = []
    for number in range(2):
        epoch = sp.materialize_epoch(source.plan, source.pools, seed=9, epoch=number)
        batch = sp.pack_batch(epoch[0 : len(epoch)], coded(LONG), 16, lengths=LONG)
        steps = range(number * len(epoch), (number + 1) * len(epoch))
        rows = np.concatenate([source[step]["tokens"] for step in steps])
        assert batch.tokens.tolist() == rows.tolist()
        windows.append(check_segments(OverLength("crop"), LONG, [batch.asdict()]))
    assert windows[0] != windows[1]


def test_the_seed_of_bins_selects_their_windows():
    windows = []
    for seed in (None, 1, 2):
        bins = sp.pack_sequences(LONG, CAPACITY, seed=seed, over_length="crop")
        batch = sp.pack_batch(bins, coded(LONG), CAPACITY, lengths=LONG)
        windows.append(check_segments(OverLength("crop"), LONG, [batch.asdict()]))
    assert not any(windows[0].values())
    assert windows[1] != windows[2]
    assert all(any(each.values()) for each in windows[1:])


@pytest.mark.parametrize("action", CUTS)
@pytest.mark.parametrize("tolerance", [1, 4])
def test_what_is_cut_may_be_longer_but_never_shorter(action, tolerance):
    """The plan knows of a long sequence only that it fills a row."""
    lengths = [40, 9]
    make = {"lengths": lengths, "over_length": action, "batch_size": 1, "tolerance": tolerance}
    for tokens in (np.arange(17), np.arange(500)):
        source = sp.pack_dataset([tokens, np.arange(9)], CAPACITY, **make)
        assert {len(s) for item in source for s in sp.unpack_batch(item)} == {CAPACITY, 9}
    for tokens, part in [
        ([np.arange(12), np.arange(9)], "sequence 0 has 12 tokens, but 16 were planned"),
        ([np.arange(40), np.arange(40)], "sequence 1 has 40 tokens, but"),
        ([np.arange(40), np.arange(8)], "sequence 1 has 8 tokens, but"),
    ]:
        with pytest.raises(sp.SeqpackError, match="special tokens") as caught:
            list(sp.pack_dataset(tokens, CAPACITY, **make))
        assert part in str(caught.value)


@pytest.mark.parametrize("action", CUTS)
def test_pack_batch_knows_the_true_length_of_what_is_cut(action):
    bins = sp.pack_sequences([40, 9], CAPACITY, over_length=action)
    with pytest.raises(sp.SeqpackError, match="sequence 0 has 41 tokens, but 40 were planned"):
        sp.pack_batch(bins, coded([41, 9]), CAPACITY, lengths=[40, 9])
    bins = sp.pack_sequences([16, 9], CAPACITY, over_length=action)
    with pytest.raises(sp.SeqpackError, match="sequence 0 has 17 tokens, but 16 were planned"):
        sp.pack_batch(bins, coded([17, 9]), CAPACITY, lengths=[16, 9])


@pytest.mark.parametrize("change", [-30, -1, 1, 5])
@pytest.mark.parametrize("tolerance", [1, 4])
def test_a_split_sequence_of_another_length_is_refused(change, tolerance):
    options = {"lengths": [40, 2], "over_length": "split", "tolerance": tolerance}
    source = sp.pack_dataset(coded([40 + change, 2]), CAPACITY, batch_size=1, **options)
    with pytest.raises(sp.SeqpackError, match=f"sequence 0 has {40 + change} tokens, but 40 were"):
        list(source)
    bins = sp.pack_sequences([40, 2], CAPACITY, over_length="split")
    with pytest.raises(sp.SeqpackError, match=f"sequence 0 has {40 + change} tokens, but 40 were"):
        sp.pack_batch(bins, coded([40 + change, 2]), CAPACITY, lengths=[40, 2])


@pytest.mark.parametrize("action", ["error", "drop"])
def test_nothing_is_cut_without_a_policy_that_says_so(action):
    source = source_of([16, 40], "drop") if action == "drop" else source_of([16, 4], "error")
    longer = sp.PackedSource(source.plan, source.pools, coded([17, 4]), batch_size=1)
    with pytest.raises(sp.SeqpackError, match="sequence 0 has 17 tokens, but 16 were planned"):
        list(longer)


def test_when_all_is_dropped_nothing_is_left():
    with pytest.raises(sp.SeqpackError, match="no sequences left: all 2 were over-length and drop"):
        source_of([40, 50], "drop")


class Table:
    """Sequences by ids that are no row numbers."""

    def __init__(self, ids, sequences):
        self.by_id = dict(zip(ids, sequences, strict=True))

    def __getitem__(self, index):
        return self.by_id[index]


@pytest.mark.parametrize("policy", ["crop", OverLength("split", positions="continue")])
def test_ids_are_any_integers(policy):
    policy = OverLength(policy) if isinstance(policy, str) else policy
    rng = np.random.default_rng(0)
    ids = rng.permutation(10**12 + 7 * np.arange(len(LONG)))
    _, pools = sp.length_histogram_from_lengths(LONG, CAPACITY, over_length=policy)
    first_id, pieces = int(ids.max()) + 5, pools.pieces
    own = pools.ids[:]
    named = np.where(own < len(LONG), ids[np.minimum(own, len(LONG) - 1)], own)
    if pieces is not None:
        named[own >= len(LONG)] += first_id - len(LONG)
        table = pieces.table[:].copy()
        table[:, 0] = ids[table[:, 0]]
        pieces = Pieces(first_id, ArrayParts([table[:3], table[3:]]))
    other = sp.SequencePools(named, pools.starts, pieces, pools.over_length, pools.report)
    plan = sp.pack_length_histogram(pools.counts, CAPACITY)
    source = sp.PackedSource(plan, other, Table(ids.tolist(), coded(LONG)), batch_size=2)
    check_segments(policy, LONG, list(source))
    again = pickle.loads(pickle.dumps(source))
    assert again[1]["tokens"].tolist() == source[1]["tokens"].tolist()
    if policy.action == "split":
        same = sp.PackedSource(plan, pools, coded(LONG), batch_size=2)
        assert [i["tokens"].tolist() for i in same] == [i["tokens"].tolist() for i in source]


def test_the_policy_is_part_of_what_determines_items():
    whole = [CAPACITY, 3]
    texts = {repr(source_of(whole, policy)) for policy in ("error", "drop", "crop", "truncate")}
    texts |= {repr(source_of(whole, OverLength("split", overlap=k))) for k in (0, 1)}
    assert len(texts) == 6


def test_pieces_are_read_from_the_table_of_the_bins():
    bins = sp.pack_sequences([40, 2], CAPACITY, over_length="split")
    sequences = coded([40, 2])
    far = sp.Bins(np.array([5]), np.array([0, 1]), CAPACITY, *(bins.pieces, bins.over_length))
    message = r"bins.ids\[0\] = 5, but ids are in \[0, 2\), or in \[2, 5\) for pieces"
    with pytest.raises(sp.SeqpackError, match=message):
        sp.pack_batch(far, sequences, CAPACITY, lengths=[40, 2])


class Counting:
    """Sequences that remember which of them were read."""

    def __init__(self, sequences):
        self.sequences, self.reads = sequences, []

    def __getitem__(self, index):
        self.reads.append(index)
        return self.sequences[index]


def test_the_sequence_of_several_pieces_is_read_once():
    lengths = [40, 2, 100, 16]
    bins = sp.pack_sequences(lengths, CAPACITY, over_length="split")
    sequences = Counting(coded(lengths))
    batch = sp.pack_batch(bins, sequences, CAPACITY, lengths=lengths)
    assert sorted(sequences.reads) == [0, 1, 2, 3]
    check_segments(OverLength("split"), lengths, [batch.asdict()])


@pytest.mark.parametrize("kind", [list, tuple, np.array, flat])
def test_ids_below_zero_do_not_count_from_the_end(kind):
    pools = sp.SequencePools.from_mapping({4: np.array([0, -1])})
    plan = sp.pack_length_histogram(pools.counts, CAPACITY)
    source = sp.PackedSource(plan, pools, kind(coded([4, 4])), batch_size=1)
    with pytest.raises(sp.SeqpackError, match="sequence -1 is missing"):
        source[0]
    named = Table([0, -1], coded([4, 4]))
    row = sp.PackedSource(plan, pools, named, batch_size=1)[0]["tokens"][0, :8]
    assert sorted(row.tolist()) == [0, 1, 2, 3, 1000, 1001, 1002, 1003]


def test_rows_may_be_longer_than_those_that_were_planned():
    """Tokens are cut as the plan says, whatever the shape of the batch."""
    bins = sp.pack_sequences([40, 2], CAPACITY, over_length="truncate")
    batch = sp.pack_batch(bins, coded([40, 2]), 20, lengths=[40, 2])
    assert batch.tokens.shape == (2, 20)
    check_segments(OverLength("truncate"), [40, 2], [batch.asdict()])


def test_pieces_of_a_plan_for_longer_rows():
    """Sequences split for short rows may be packed into long ones, with a tolerance too."""
    counts, pools = sp.length_histogram_from_lengths([42, 2], CAPACITY, over_length="split")
    plan = sp.pack_length_histogram(counts, 64, tolerance=8)
    source = sp.PackedSource(plan, pools, coded([42, 2]), batch_size=1)
    check_segments(OverLength("split"), [42, 2], list(source))


def test_first_positions_are_only_those_of_pieces():
    policy = OverLength("split", positions="continue")
    bins = sp.pack_sequences([40, 2], CAPACITY, over_length=policy)
    common = {"over_length": policy, "pieces": bins.pieces, "key": None}

    def fetch(*ids):
        planned = np.array([2] * len(ids))
        features = make_features("test", 16)
        return fetch_records("test", coded([40, 2]), np.array(ids), planned, features, **common)

    assert fetch(1).first_positions is None
    assert fetch(3, 1, 2, 4).first_positions.tolist() == [16, 0, 0, 32]
    assert [len(array) for array in fetch(3, 1, 4).columns["tokens"]] == [16, 2, 8]
    assert fetch(3, 1, 4).ids.tolist() == [0, 1, 0]


# --- FlatSequences ----------------------------------------------------------------------------


def test_flat_sequences_check_their_ends():
    with pytest.raises(sp.SeqpackError, match="offsets run from 0 to 6, but there are 5 tokens"):
        sp.FlatSequences(np.arange(5), np.array([0, 6]))
    with pytest.raises(sp.SeqpackError, match="offsets run from 3 to 5"):
        sp.FlatSequences(np.arange(5), np.cumsum([3, 2]))  # the leading 0 forgotten
    with pytest.raises(sp.SeqpackError, match="offsets run from 0 to 4, but there are 5 tokens"):
        sp.FlatSequences(np.arange(5), np.array([0, 4]))
    with pytest.raises(sp.SeqpackError, match="offsets are empty"):
        sp.FlatSequences(np.arange(5), np.array([], np.int64))
    with pytest.raises(sp.SeqpackError, match="tokens has dtype float64"):
        sp.FlatSequences(np.zeros(5), np.array([0, 5]))
    sequences = sp.FlatSequences(np.arange(5), np.array([0, 2, 5]))
    assert sequences.lengths.tolist() == [2, 3]
    assert [each.tolist() for each in sequences] == [[0, 1], [2, 3, 4]]
    for index in (2, -1):
        with pytest.raises(IndexError, match="of 2"):
            sequences[index]
    with pytest.raises(sp.SeqpackError, match=r"index = 0.5 is not an integer"):
        sequences[0.5]
    many = sp.FlatSequences(np.arange(300), np.arange(301))
    assert many[np.uint8(255)].tolist() == [255]


def test_memory_mapped_sequences_travel_by_path(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(50_000, dtype=np.uint16))
    np.save(tmp_path / "offsets.npy", np.arange(0, 50_001, 5))
    tokens, offsets = (np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("tokens", "offsets"))
    sequences = sp.FlatSequences(tokens, offsets)
    data = pickle.dumps(sequences)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again[7].tolist() == [35, 36, 37, 38, 39]
    bins = sp.pack_sequences(again.lengths[:6], 10)
    batch = sp.pack_batch(bins, again, 10, lengths=again.lengths)
    assert sorted(batch.tokens.reshape(-1).tolist()) == list(range(30))
