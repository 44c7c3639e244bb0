"""Grain's packing datasets by their names: the same keys, dtypes and shapes, and every token."""

import inspect
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import seqpack_jax as sp
from seqpack_jax.feeding.grain_packers import BestFitPackIterDataset, FirstFitPackIterDataset

READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
THEIRS = {
    FirstFitPackIterDataset: grain.experimental.FirstFitPackIterDataset,
    BestFitPackIterDataset: grain.experimental.BestFitPackIterDataset,
}
both = pytest.mark.parametrize("mine", THEIRS)


def stream(records):
    return grain.MapDataset.source(records).to_iter_dataset(READ)


def records_of(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "inputs": np.full(rng.integers(1, 12), index + 1, np.int32),
            "targets": np.full(rng.integers(1, 7), index + 1, np.int64),
            "vectors": np.full((rng.integers(1, 7), 2), index + 1, np.float32),
            "scalar": index + 1,
            "tag": "x",
        }
        for index in range(n)
    ]


def segments(rows, name, length):
    """What the segments of a feature hold, and which of other features lie with them."""
    found = []
    for row in rows:
        ids, positions = row[f"{name}_segment_ids"], row[f"{name}_positions"]
        assert ids.shape == positions.shape == row[name].shape[:1] == (length,)
        for segment in range(1, ids.max(initial=0) + 1):
            part = ids == segment
            assert positions[part].tolist() == list(range(part.sum()))
            found.append(row[name][part].tolist())
    return sorted(found)


@both
@pytest.mark.parametrize(
    "length_struct",
    [
        {"inputs": 16},
        {"inputs": 16, "targets": 8},
        {"vectors": 8, "inputs": 12, "scalar": 4},
    ],
)
@pytest.mark.parametrize("cap", [None, 3])
def test_keys_dtypes_shapes_and_tokens_are_those_of_grain(mine, length_struct, cap):
    options = {"length_struct": length_struct, "num_packing_bins": 5, "max_sequences_per_bin": cap}
    theirs = list(THEIRS[mine](stream(records_of()), **options))
    rows = list(mine(stream(records_of()), **options))
    form = [[(name, a.dtype, a.shape) for name, a in sorted(r.items())] for r in (theirs[0],)]
    for row in rows:
        assert [(name, a.dtype, a.shape) for name, a in sorted(row.items())] == form[0]
    for name, length in length_struct.items():
        assert segments(rows, name, length) == segments(theirs, name, length)
    assert len(rows) <= len(theirs)


@both
def test_arguments_are_those_of_grain(mine):
    ours = inspect.signature(mine).parameters
    grains = inspect.signature(THEIRS[mine]).parameters
    assert set(grains) <= set(ours)
    for name, parameter in grains.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 99),
    bins=st.integers(1, 9),
    alignment=st.sampled_from([1, 3, 4]),
    pad=st.integers(-3, 3),
    cap=st.none() | st.integers(1, 4),
)
def test_alignment_and_padding(seed, bins, alignment, pad, cap):
    rows = list(
        BestFitPackIterDataset(
            stream(records_of(seed=seed)),
            length_struct={"inputs": 14, "targets": 9},
            num_packing_bins=bins,
            pack_alignment_struct={"inputs": alignment, "targets": 1},
            padding_struct={"inputs": pad, "targets": None},
            max_sequences_per_bin=cap,
        )
    )
    expected = sorted(record["inputs"].tolist() for record in records_of(seed=seed))
    assert segments(rows, "inputs", 14) == expected
    for row in rows:
        ids = row["inputs_segment_ids"]
        starts = np.flatnonzero((np.diff(ids, prepend=0) != 0) & (ids > 0))
        assert not (starts % alignment).any()
        assert (row["inputs"][ids == 0] == pad).all()
        assert (row["targets"][row["targets_segment_ids"] == 0] == 0).all()
        assert cap is None or ids.max() <= cap


def test_meta_features():
    options = {
        "length_struct": {"inputs": 16, "targets": 16},
        "num_packing_bins": 4,
        "meta_features": ("targets", "scalar"),
        "shuffle_bins": False,
    }
    lists = list(FirstFitPackIterDataset(stream(records_of()), **options))
    assert lists[0].keys() == {
        "inputs", "inputs_segment_ids", "inputs_positions", "targets", "scalar",
    }  # fmt: skip
    assert isinstance(lists[0]["scalar"], list)
    rows = FirstFitPackIterDataset(stream(records_of()), max_sequences_per_bin=4, **options)
    found = []
    for batch in rows.batch(2):
        assert batch["scalar"].shape == (len(batch["inputs"]), 4)
        sizes = batch["inputs_segment_ids"].max(axis=1)
        for row, size, scalars in zip(batch["inputs"], sizes, batch["scalar"], strict=True):
            assert scalars[:size].tolist() == list(dict.fromkeys(row[row > 0].tolist()))
            assert not scalars[size:].any()
            found += scalars[:size].tolist()
    assert sorted(found) == list(range(1, 61))


def test_meta_features_in_grains_form():
    """Newer Grain packs entries beside length_struct, as lists; older Grain refuses them."""
    options = {"num_packing_bins": 4, "meta_features": ("tag",), "length_struct": {"inputs": 16}}
    (*_, row) = FirstFitPackIterDataset(stream(records_of()), **options)
    assert row["tag"] == ["x"] * row["inputs_segment_ids"].max()


def test_rows_are_ordered_by_a_feature():
    options = {"length_struct": {"inputs": 12}, "num_packing_bins": 50}

    def means(group_by, shuffle=True):
        rows = FirstFitPackIterDataset(
            stream(records_of()),
            shuffle_bins_group_by_feature=group_by,
            shuffle_bins=shuffle,
            **options,
        )
        return [np.mean(np.setdiff1d(row["inputs"], [0])) for row in rows]

    assert means("inputs") == sorted(means(None)) == sorted(means("inputs", False))
    assert means(None) != means("inputs") != means("inputs", False)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"inputs": np.ones(3)}, "record 1 has no feature 'tag'. Hint: rows are ordered by it"),
        ({"inputs": np.ones(3), "tag": "x"}, "feature 'tag' of record 1 has dtype <U1"),
    ],
)
def test_rows_are_ordered_by_numbers_that_records_have(record, part):
    iterator = iter(
        FirstFitPackIterDataset(
            stream([{"inputs": np.ones(9), "tag": 1}, record]),
            length_struct={"inputs": 10},
            num_packing_bins=2,
            meta_features=("tag",),
            shuffle_bins_group_by_feature="tag",
        )
    )
    for _ in range(2):
        with pytest.raises(sp.SeqpackError, match="FirstFitPackIterDataset: ") as caught:
            next(iterator)
        assert part in str(caught.value)


@both
def test_resumes_at_every_step(mine):
    def dataset():
        return mine(
            stream(records_of()), length_struct={"inputs": 16, "targets": 8}, num_packing_bins=6
        )

    whole = list(dataset())
    iterator = iter(dataset())
    for step in range(len(whole) + 1):
        restored = iter(dataset())
        restored.set_state(json.loads(json.dumps(iterator.get_state())))
        rest = list(restored)
        assert len(rest) == len(whole) - step
        for a, b in zip(rest, whole[step:], strict=True):
            assert a.keys() == b.keys()
            assert all((a[name] == b[name]).all() for name in a)
        next(iterator, None)


def test_dtypes_are_kept_and_never_cast():
    wide = [{"x": np.full(3, 2**40)}, {"x": np.full(2, 2**41)}]
    (row,) = FirstFitPackIterDataset(stream(wide), length_struct={"x": 8}, num_packing_bins=1)
    assert row["x"].tolist() == [2**40] * 3 + [2**41] * 2 + [0] * 3
    mixed = [{"x": np.full(3, 1, np.int32)}, {"x": np.full(2, 2**40)}]
    with pytest.raises(
        sp.SeqpackError, match="feature 'x' has dtype int32 in one record, int64 in another"
    ):
        list(FirstFitPackIterDataset(stream(mixed), length_struct={"x": 8}, num_packing_bins=1))


def test_empty_records_use_no_segment_id():
    records = [{"x": np.ones(n, int)} for n in (2, 0, 3)]
    iterator = iter(
        FirstFitPackIterDataset(stream(records), length_struct={"x": 6}, num_packing_bins=1)
    )
    (row,) = iterator
    assert row["x_segment_ids"].tolist() == [1, 1, 1, 2, 2, 0]
    assert iterator.empty_records == 1


@both
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"length_struct": 8}, "length_struct is a int. Hint: pass {feature: tokens per row}"),
        ({"length_struct": {}}, "is empty"),
        ({"length_struct": {"inputs": {"a": 8}}}, "is not an integer"),
        ({"num_packing_bins": 0}, "num_packing_bins = 0, but it must be at least 1"),
        ({"max_sequences_per_bin": 0}, "= 0, but it must be at least 1"),
        ({"seed": "a"}, "seed = 'a' is not an integer"),
        ({"meta_features": "tag"}, "meta_features = 'tag'"),
        ({"pack_alignment_struct": {"x": 2}}, "pack_alignment_struct names 'x', which is not in"),
        ({"pack_alignment_struct": {"inputs": 0}}, "pack_alignment_struct['inputs'] = 0"),
        ({"padding_struct": {"x": 2}}, "padding_struct names 'x', which is not in length_struct"),
        ({"shuffle_bins_group_by_feature": "x"}, "shuffle_bins_group_by_feature = 'x' is not"),
        ({"parent": [1]}, "parent is a list, not a grain.IterDataset"),
    ],
)
def test_bad_arguments(mine, options, part):
    given = {"parent": stream(records_of()), "length_struct": {"inputs": 8}, "num_packing_bins": 2}
    given |= options
    with pytest.raises(sp.SeqpackError, match=mine.__name__) as caught:
        mine(given.pop("parent"), **given)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        (np.ones(3), "record 0 is a ndarray. Hint: pack dicts of features"),
        ({"x": np.ones(3)}, "record 0 has no feature 'inputs'"),
        ({"inputs": "text"}, "feature 'inputs' of record 0 has dtype"),
        ({"inputs": np.ones(9)}, "record 0 has 9 tokens, but a length is in [1, 8]"),
    ],
)
def test_records_that_cannot_be_packed_are_refused(record, part):
    dataset = FirstFitPackIterDataset(
        stream([record]), length_struct={"inputs": 8}, num_packing_bins=2
    )
    with pytest.raises(sp.SeqpackError) as caught:
        list(dataset)
    assert part in str(caught.value)
