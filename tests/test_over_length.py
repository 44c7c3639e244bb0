"""The over-length policy: every token is packed, dropped or repeated, and counted as such."""

import dataclasses
import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import over_length_packings

import seqpack_jax as sp
from seqpack_jax.arrays import ArrayParts
from seqpack_jax.planning.over_length import (
    ACTIONS,
    OverLength,
    OverLengthReport,
    Pieces,
    apply_to_counts,
    apply_to_lengths,
    as_policy,
    window_starts,
)


@given(packing=over_length_packings(), extra=st.integers(0, 3))
def test_each_policy_plans_what_the_slow_version_does(packing, extra):
    lengths, capacity, policy = packing
    planned = apply_to_lengths("f", policy, lengths, capacity, extra_tokens=extra)
    lengths = [length + extra for length in lengths]
    expected = reference.over_length_ids(lengths, capacity, policy)
    assert {i: n for i, n in enumerate(planned.of_ids.tolist()) if n} == {
        i: stop - start for i, (_, start, stop) in expected.items()
    }
    assert planned.report == reference.over_length_report(lengths, capacity, policy)
    held = sum(stop - start for _, start, stop in expected.values())
    report = planned.report
    assert held == sum(lengths) - report.dropped_tokens + report.repeated_tokens
    pieces = [(i, *place) for i, place in expected.items() if i >= len(lengths)]
    assert (planned.pieces is None) == (not pieces)
    if pieces:
        assert planned.pieces.first_id == len(lengths)
        assert planned.pieces.table.tolist() == [
            [source, start, stop, lengths[source]] for _, source, start, stop in pieces
        ]
        assert planned.pieces.source_id.tolist() == [source for _, source, *_ in pieces]
        assert planned.pieces.start.tolist() == [start for *_, start, _ in pieces]
        assert planned.pieces.stop.tolist() == [stop for *_, stop in pieces]
        assert planned.pieces.source_length.tolist() == [lengths[s] for _, s, *_ in pieces]


@given(packing=over_length_packings())
def test_pieces_overlap_as_told_and_cover_everything_but_a_short_tail(packing):
    lengths, capacity, policy = packing
    pieces = apply_to_lengths("f", policy, lengths, capacity).pieces
    split = [i for i, n in enumerate(lengths) if n > capacity and policy.action == "split"]
    assert split == ([] if pieces is None else np.unique(pieces.source_id).tolist())
    for index in split:
        own = pieces.table[pieces.source_id == index, 1:3].tolist()
        assert own[0][0] == 0
        assert all(0 < stop - start <= capacity for start, stop in own)
        for (start, stop), (next_start, next_stop) in pairwise(own):
            assert next_start == stop - policy.overlap
            assert start < next_start, "no piece holds another"
            assert stop < next_stop, "no piece holds another"
        rest = lengths[index] - own[-1][1]
        assert rest == 0 or rest + policy.overlap < policy.min_tail
        assert own[-1][1] - own[-1][0] >= policy.min_tail


@given(packing=over_length_packings(actions=ACTIONS))
def test_a_histogram_is_planned_as_its_sequences_are(packing):
    lengths, capacity, policy = packing
    if policy.action == "error":
        lengths = [min(length, capacity) for length in lengths]
    planned = apply_to_lengths("f", policy, lengths, capacity)
    counts, report = apply_to_counts("f", policy, np.bincount(lengths, minlength=1), capacity)
    expected = np.bincount(planned.of_ids, minlength=len(counts))
    expected[0] = 0
    assert counts.tolist() == expected[: len(counts)].tolist()
    assert not expected[len(counts) :].any()
    assert report == planned.report


def test_a_histogram_of_huge_counts_stays_exact():
    counts = np.zeros(10**6 + 1, np.int64)
    counts[[5, 10**6]] = 10**12
    policy = OverLength("split", overlap=9, min_tail=3)
    kept, report = apply_to_counts("f", policy, counts, 10)
    pieces = 10**6 - 9
    assert kept.tolist() == [0] * 5 + [10**12] + [0] * 4 + [pieces * 10**12]
    assert report == ("split", 10**12, 10**18, 0, 9 * (pieces - 1) * 10**12, pieces * 10**12)
    assert counts[10**6] == 10**12, "the input is left alone"


def test_reports_add_up():
    one, two = (OverLengthReport("split", *range(k, k + 5)) for k in (1, 10))
    assert one.plus(two) == ("split", 11, 13, 15, 17, 19)


@pytest.mark.parametrize("action", ACTIONS)
def test_windows_lie_inside_their_sequences(action):
    lengths = np.tile([3, 8, 9, 20, 500], 40)
    ids = np.arange(len(lengths))
    policy = OverLength(action)
    starts = window_starts(policy, lengths, 8, ids, key=2**64 - 1)
    assert starts.dtype == np.int64
    assert (starts >= 0).all()
    assert (starts <= np.maximum(lengths - 8, 0)).all()
    assert not starts[lengths <= 8].any()
    if action == "truncate_left":
        assert starts.tolist() == np.maximum(lengths - 8, 0).tolist()
    elif action == "crop":
        assert len(np.unique(starts[lengths == 500])) > 30
    else:
        assert not starts.any()


def test_a_window_depends_on_key_id_and_length_alone():
    policy = OverLength("crop")
    lengths, ids = np.array([500, 400, 500, 8]), np.array([7, 8, 9, 1])
    starts = window_starts(policy, lengths, 8, ids, key=5)
    for order in ([3, 1, 0, 2], [2], [0, 0]):
        again = window_starts(policy, lengths[order], 8, ids[order], key=5)
        assert again.tolist() == starts[order].tolist()
    assert (window_starts(policy, lengths, 8, ids, key=6) != starts)[:3].all()
    assert not window_starts(policy, lengths, 8, ids, key=None).any()
    # Golden: other windows would break the resuming of a run.
    assert starts.tolist() == [225, 136, 285, 0]


@pytest.mark.parametrize("spare", [1, 6, 99])
def test_windows_start_anywhere_alike(spare):
    number = 20_000
    lengths = np.full(number, 8 + spare)
    starts = window_starts(OverLength("crop"), lengths, 8, np.arange(number), key=1)
    found = np.bincount(starts, minlength=spare + 1)
    expected = number / (spare + 1)
    chi_squared = float(((found - expected) ** 2 / expected).sum())
    assert chi_squared < spare + 5 * np.sqrt(2 * spare) + 5  # five deviations
    # The windows of one sequence in two epochs have nothing to do with each other.
    other = window_starts(OverLength("crop"), lengths, 8, np.arange(number), key=2)
    assert abs(np.corrcoef(starts, other)[0, 1]) < 5 / np.sqrt(number)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"action": "cut"}, "choose one of error, drop, truncate, truncate_left, crop, split"),
        ({"action": None}, "action = None is not known"),
        ({"action": "split", "overlap": -1}, "overlap = -1"),
        ({"action": "split", "overlap": 0.5}, "overlap = 0.5 is not an integer"),
        ({"action": "split", "min_tail": 0}, "min_tail = 0"),
        ({"action": "split", "positions": "go on"}, "choose one of restart, continue"),
        ({"action": "drop", "overlap": 2}, "action 'drop' takes no overlap"),
        ({"action": "crop", "min_tail": 2}, "they belong to 'split'"),
        ({"positions": "continue"}, "action 'error' takes no overlap, min_tail or positions"),
    ],
)
def test_bad_policies(options, part):
    with pytest.raises(sp.SeqpackError, match=r"^OverLength: ") as caught:
        OverLength(**options)
    assert part in str(caught.value)


def test_options_become_plain_python():
    policy = OverLength(
        np.str_("split"), overlap=np.uint8(200), min_tail=np.int64(3), positions=np.str_("restart")
    )
    assert policy == OverLength("split", overlap=200, min_tail=3)
    assert repr(policy) == repr(OverLength("split", overlap=200, min_tail=3))
    assert json.dumps(dataclasses.asdict(policy))
    report = apply_to_lengths("f", policy, [10_000], 201).report
    assert report == apply_to_lengths("f", OverLength("split", overlap=200), [10_000], 201).report


@pytest.mark.parametrize(
    ("policy", "max_seq_len", "part"),
    [
        (OverLength("drop"), None, "over_length is 'drop', but there is no max_seq_len"),
        (OverLength("split", overlap=8), 8, "pass overlap of at most 7"),
        (OverLength("split", min_tail=9), 8, "pass min_tail of at most 8"),
    ],
)
def test_options_that_do_not_suit_the_rows(policy, max_seq_len, part):
    with pytest.raises(sp.SeqpackError, match=r"^f: ") as caught:
        apply_to_lengths("f", policy, [3], max_seq_len)
    assert part in str(caught.value)


def test_policies_by_name():
    assert as_policy("f", "drop") == OverLength("drop")
    policy = OverLength("split", overlap=3)
    assert as_policy("f", policy) is policy
    for name in ("cut", 3, None):
        with pytest.raises(sp.SeqpackError, match=r"^f: over_length = .* choose one of error, "):
            as_policy("f", name)


def test_lengths_are_checked_under_every_policy():
    for action in ACTIONS:
        for lengths, part in [
            ([3, 0], r"lengths\[1\] = 0"),
            ([2.5], "dtype float64"),
            ([2**31], "a length is at most|but max_seq_len is 8"),
        ]:
            with pytest.raises(sp.SeqpackError, match=part):
                apply_to_lengths("f", OverLength(action), lengths, 8)
    with pytest.raises(sp.SeqpackError, match=r"\(lengths \+ 2\)\[1\] = 9, but max_seq_len is 8"):
        apply_to_lengths("f", OverLength(), [3, 7], 8, extra_tokens=2)
    with pytest.raises(sp.SeqpackError, match=r": lengths\[1\] = 0"):
        apply_to_lengths("f", OverLength(), [3, 0], 8, extra_tokens=2)


def test_pieces_of_files_pickle_by_path(tmp_path):
    table = np.arange(40_000).reshape(10_000, 4)
    np.save(tmp_path / "pieces.npy", table)
    mapped = np.load(tmp_path / "pieces.npy", mmap_mode="r")
    for each in (mapped, ArrayParts([mapped])):
        data = pickle.dumps(Pieces(7, each))
        assert len(data) < 1000
        again = pickle.loads(data)
        assert again.first_id == 7
        assert again.table[[3, 9_999]].tolist() == table[[3, 9_999]].tolist()
        assert again.stop.tolist() == table[:, 2].tolist()
    assert pickle.loads(pickle.dumps(Pieces(7, table))).table.tolist() == table.tolist()
