"""The longest prefix of a stream that fits, and the packer that records wait in."""

from itertools import accumulate

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from policy_reference import CAPACITY, check_report, check_segments, coded, policies
from strategies import packings

import seqpack_jax as sp
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.prefixes import longest_prefix, longest_vector_prefix
from seqpack_jax.feeding.streaming import StreamPacker, StreamSettings, check_policy
from seqpack_jax.planning.over_length import OverLength

caps = st.none() | st.integers(1, 6)


def check_rows(packed, lengths, capacity, rows, cap):
    """Rows hold a prefix and no more than they may; return the size of the prefix."""
    size = sum(map(len, packed))
    assert sorted(i for row in packed for i in row) == list(range(size))
    assert len(packed) <= rows
    assert all(packed)
    assert all(sum(lengths[i] for i in row) <= capacity for row in packed)
    assert cap is None or max(map(len, packed), default=0) <= cap
    return size


@given(packing=packings(), rows=st.integers(1, 6), cap=caps)
def test_a_prefix_is_packed_and_no_more_fits(packing, rows, cap):
    lengths, capacity = packing
    packed = longest_prefix(lengths, capacity, rows, None, cap)
    size = check_rows(packed, lengths, capacity, rows, cap)
    assert bool(size) == bool(lengths)
    if size < len(lengths):  # the next one fits in no row
        assert len(packed) == rows
        assert all(
            sum(lengths[i] for i in row) + lengths[size] > capacity or len(row) == cap
            for row in packed
        )


@given(packing=packings(), rows=st.integers(1, 6))
def test_a_prefix_is_about_the_longest_of_best_fit(packing, rows):
    """Best fit is not monotone, and the search stops near; what is lost is a record or two."""
    lengths, capacity = packing
    size = sum(map(len, longest_prefix(lengths, capacity, rows)))
    longest = reference.longest_prefix(lengths, capacity, rows)
    assert size >= longest - max(2, longest // 16)


@given(packing=packings(), rows=st.integers(1, 6))
def test_what_comes_after_the_volume_bound_does_not_matter(packing, rows):
    lengths, capacity = packing
    volume = rows * capacity
    bound = sum(1 for k in range(len(lengths)) if sum(lengths[: k + 1]) <= volume)
    assert longest_prefix(lengths, capacity, rows) == longest_prefix(
        lengths[: bound + 1], capacity, rows
    )


@pytest.mark.parametrize(
    ("lengths", "rows", "cap", "expected"),
    [
        ([], 2, None, []),
        ([10], 1, None, [[0]]),
        ([10, 10], 1, None, [[0]]),
        ([6, 6, 4, 4], 2, None, [[0, 3], [1, 2]]),
        ([6, 6, 6], 2, None, [[0], [1]]),
        ([1] * 25, 2, None, [list(range(10)), list(range(10, 20))]),
        ([1] * 25, 2, 3, [[0, 1, 2], [3, 4, 5]]),
        ([4, 4, 4, 2, 2, 2], 2, 2, [[0, 1], [2, 3]]),
    ],
)
def test_small_streams(lengths, rows, cap, expected):
    assert longest_prefix(lengths, 10, rows, None, cap) == expected


@given(packing=packings(), rows=st.integers(1, 6), cap=caps, data=st.data())
def test_a_prefix_ends_where_it_may(packing, rows, cap, data):
    lengths, capacity = packing
    groups = []
    while sum(groups) < len(lengths):
        groups.append(data.draw(st.integers(1, min(4, len(lengths) - sum(groups)))))
    ends = list(accumulate(groups))
    packed = longest_prefix(lengths, capacity, rows, ends, cap)
    assert check_rows(packed, lengths, capacity, rows, cap) in [0, *ends]
    if not packed and lengths:
        first = reference.best_fit_decreasing(lengths[: ends[0]], capacity)
        assert len(first) > rows or (cap or 99) < 4
    assert longest_prefix(lengths, capacity, rows, range(1, len(lengths) + 1)) == longest_prefix(
        lengths, capacity, rows
    )


@given(
    seed=st.integers(0, 999),
    size=st.integers(0, 50),
    capacities=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    rows=st.integers(1, 5),
    cap=caps,
)
def test_a_prefix_of_vectors_fits_every_capacity(seed, size, capacities, rows, cap):
    rng = np.random.default_rng(seed)
    high = np.maximum(1, np.array(capacities) * rng.choice([0.3, 1.0]))
    lengths = np.floor(rng.random((size, len(capacities))) * (high + 1)).astype(np.int64)
    lengths = np.minimum(lengths, capacities)
    lengths = lengths[lengths.any(axis=1)]
    packed = longest_vector_prefix(lengths, tuple(capacities), rows, cap)
    for column, capacity in enumerate(capacities):
        taken = check_rows(packed, lengths[:, column].tolist(), capacity, rows, cap)
    assert bool(taken) == bool(len(lengths))
    if taken < len(lengths):  # the next one fits in no row
        held = np.array([lengths[row].sum(axis=0) for row in packed])
        full = np.array([len(row) == cap for row in packed])
        assert len(packed) == rows
        assert (full | (held + lengths[taken] > capacities).any(axis=1)).all()


def test_a_feature_that_another_one_rules_costs_no_room():
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    alone = longest_prefix(lengths.tolist(), 64, 8)
    for other, capacity in ((lengths, 64), (lengths // 2, 32), (0 * lengths, 1)):
        both = np.stack([other, lengths], axis=1)
        assert longest_vector_prefix(both, (capacity, 64), 8) == alone
        assert longest_vector_prefix(both[:, ::-1], (64, capacity), 8) == alone


# --- The packer --------------------------------------------------------------------------------


def settings_of(max_seq_len=16, rows=4, policy="error", seed=0, **options):
    features = make_features("f", max_seq_len, **options)
    policy = policy if isinstance(policy, OverLength) else OverLength(policy)
    multiples = (features.multiple_of,) * len(features.capacities)
    check_policy("f", policy, features.capacities)
    return StreamSettings(
        "f", features, rows, rows, policy, seed, True, features.max_segments, multiples
    )


def groups_of(settings, records):
    """All groups of a stream, filled, and the packer."""
    packer, batches, number = StreamPacker(settings), [], 0
    records = list(enumerate(records))
    while True:
        while records and not packer.full:
            index, record = records.pop(0)
            packer.add(record, index)
        group = packer.take_group(number)
        if not group.rows:
            return batches, packer
        batches.append(group.fill(settings, 0, settings.rows, settings.rows))
        packer.drop(len(group.ids))
        number += 1


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    empty=st.sets(st.integers(0, 30), max_size=5),
    policy=policies(),
    rows=st.integers(1, 6),
    multiple_of=st.sampled_from([1, 1, 4]),
    cap=caps,
)
def test_records_become_what_the_policy_says(lengths, empty, policy, rows, multiple_of, cap):
    if policy.action == "split":  # the pieces of a record must fit one group
        stride = CAPACITY - policy.overlap
        lengths = [min(n, CAPACITY + stride * (rows - 1)) for n in lengths]
    lengths = [*lengths, 3]
    settings = settings_of(
        CAPACITY, rows, policy, seed=5, multiple_of=multiple_of, max_segments=cap
    )
    records = coded(lengths)
    for place in empty:
        records.insert(place, np.zeros(0, np.int32))
    batches, packer = groups_of(settings, records)
    assert packer.counts[0] == len(empty)
    if multiple_of == 1:
        check_segments(policy, lengths, batches)
        check_report(policy, lengths, batches, packer.report)
    last = -1
    for batch in batches:  # whole records, in the order of the stream
        ids = batch["segment_ids"]
        assert cap is None or ids.max() <= cap
        starts = np.diff(ids, axis=1, prepend=0) * (ids > 0)
        assert not (np.nonzero(starts > 0)[1] % multiple_of).any()
        sources = set((batch["tokens"][ids > 0] // 1000).tolist())
        assert min(sources) > last
        last = max(sources)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=30),
    action=st.sampled_from(["drop", "truncate", "truncate_left"]),
    rows=st.integers(1, 4),
)
def test_several_capacities_are_cut_each_by_itself(lengths, action, rows):
    capacities = {"a": 16, "b": 8}
    records = [
        {"a": 100 * i + np.arange(m), "b": 100 * i + np.arange(n)}
        for i, (m, n) in enumerate(lengths)
    ]
    batches, packer = groups_of(settings_of(capacities, rows, action), records)
    tokens = 0
    for name, capacity in capacities.items():
        expected = []
        for record in records:
            kept = record[name][-capacity:] if action == "truncate_left" else record[name]
            over = any(len(record[other]) > capacities[other] for other in capacities)
            if not (over and action == "drop"):
                expected += kept[:capacity].tolist()
        found = [b[name][b[f"{name}_segment_ids"] > 0] for b in batches]
        assert sorted(np.concatenate([*found, []]).tolist()) == sorted(expected)
        tokens += len(expected)
    over = [sum(pair) for pair in lengths if pair[0] > 16 or pair[1] > 8]
    assert packer.report[:3] == (action, len(over), sum(over))
    assert packer.report.dropped_tokens == sum(map(sum, lengths)) - tokens
    assert packer.counts[0] == lengths.count((0, 0))


def test_a_segment_has_one_id_in_all_features():
    records = [{"a": np.full(3, 1), "b": np.full(0, 1)}, {"a": np.full(2, 2), "b": np.full(2, 2)}]
    ((batch,), _) = groups_of(settings_of({"a": 8, "b": 8}, 1), records)
    assert batch["a"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch["a_segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch["b_segment_ids"].tolist() == [[2, 2, 0, 0, 0, 0, 0, 0]]


def test_windows_depend_on_the_seed_and_the_index_alone():
    def starts(rows, seed=0):
        batches, _ = groups_of(settings_of(CAPACITY, rows, "crop", seed), coded([100] * 40))
        tokens = np.concatenate([b["tokens"][:, 0][b["segment_ids"][:, 0] > 0] for b in batches])
        return {int(token) // 1000: int(token) % 1000 for token in tokens}

    assert starts(5) == starts(7)
    assert starts(5) != starts(5, seed=1)
    assert len(set(starts(5).values())) > 20


def test_rows_are_shuffled_by_seed_and_group():
    def order(seed, number):
        packer = StreamPacker(settings_of(16, 30, seed=seed))
        for index, tokens in enumerate(coded([16] * 31)):
            packer.add(tokens, index)
        return [row[0] for row in packer.take_group(number).rows]

    orders = [order(*each) for each in [(0, 0), (0, 1), (1, 0)]]
    assert orders[0] == order(0, 0)
    assert len(set(map(tuple, orders))) == 3
    assert all(sorted(each) == list(range(30)) for each in orders)
    assert orders[0][:6] == [23, 13, 5, 2, 6, 17], "checkpoints depend on it"


def test_workers_of_one_seed_shuffle_unlike_each_other():
    """In a worker, or on a host, a group has the same number and seed as elsewhere."""

    def order(lengths, number=0):
        packer = StreamPacker(settings_of(16, 200))
        for index, tokens in enumerate(coded(lengths)):
            packer.add(tokens, index)
        return np.array([row[0] for row in packer.take_group(number).rows])

    one, other = [16] * 200 + [3], [16] * 199 + [15, 3]
    assert len(order(one)) == len(order(other)) == 200
    assert order(one).tolist() == order([*one, 9]).tolist(), "what waits does not count"
    orders = [order(one), order(other), order(one, 1), order(other, 1)]
    related = np.abs(np.corrcoef(orders) - np.eye(4))
    assert related.max() < 0.3


@pytest.mark.parametrize(
    ("record", "policy", "part"),
    [
        (np.zeros(17, int), "error", "f: record 1 has 17 tokens, but a length is in [1, 16]. Hint: "
         "pass over_length='drop', 'truncate', 'truncate_left', 'crop' or 'split'."),
        (np.zeros(65, int), "split", "f: record 1 has 65 tokens, 5 pieces, but a group of whole "
         "records has 4 rows. Hint: raise batch_size, window or max_seq_len"),
        ({"text": np.zeros(3, int)}, "error", "f: record 1 has no feature 'tokens'"),
        (np.zeros(3), "error", "f: record 1 has shape (3,) and dtype float64"),
        ({"tokens": np.zeros((2, 2), int)}, "drop", "of record 1 has shape (2, 2)"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_packed_are_refused(record, policy, part):
    packer = StreamPacker(settings_of(policy=policy))
    packer.add(np.ones(3, int), 0)
    for _ in range(2):
        with pytest.raises(sp.SeqpackError) as caught:
            packer.add(record, 1)
        assert part in str(caught.value)
    assert packer.ids == [0]
    assert packer.counts == [0] * 6


def test_an_over_length_feature_is_named():
    packer = StreamPacker(settings_of({"a": 8, "b": 4}))
    with pytest.raises(
        sp.SeqpackError, match=r"record 3 has 5 tokens of 'b', but a length is in \[1, 4\]"
    ) as caught:
        packer.add({"a": np.ones(8, int), "b": np.ones(5, int)}, 3)
    assert str(caught.value).endswith("over_length='drop', 'truncate', 'truncate_left'.")


@pytest.mark.parametrize("action", ["crop", "split"])
def test_windows_of_several_capacities_are_refused(action):
    with pytest.raises(
        sp.SeqpackError, match=f"over_length is '{action}', but 2 features have their own lengths"
    ):
        settings_of({"a": 8, "b": 4}, policy=action)


def test_records_have_the_same_features():
    records = [{"tokens": np.ones(3, int), "loss": np.ones(3)}, {"tokens": np.ones(3, int)}]
    with pytest.raises(sp.SeqpackError, match="record 0 has a feature 'loss', record 1 has none"):
        groups_of(settings_of(), records)
