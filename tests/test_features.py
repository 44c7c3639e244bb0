"""Records with many features: packed, and every one of them found again."""

import pickle
import re
from collections import namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seqpack_jax as sp
from seqpack_jax.arrays import offsets_of
from seqpack_jax.feeding.batch import unpack_batch, unpack_by_id
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.layout import round_up


def row_by_row(records, bins, rows, capacities, features, multiple_of, pads, max_segments):
    """Every array of a batch as nested lists, token by token; `features` gives each its rows."""
    batch = {}
    for name, lead in features.items():
        sample = records[0][name]
        if lead is None:
            empty = np.zeros_like(sample).tolist()
            found = [[records[i][name].tolist() for i in held] for held in bins]
            found += [[]] * (rows - len(bins))
            batch[name] = [row + [empty] * (max_segments - len(row)) for row in found]
            continue
        padding = np.full(sample.shape[1:], pads.get(name, 0), sample.dtype).tolist()
        batch[name] = []
        for held in [*bins, *[[]] * (rows - len(bins))]:
            row = []
            for i in held:
                tokens = records[i][name].tolist()
                row += tokens + [padding] * (round_up(len(tokens), multiple_of) - len(tokens))
            batch[name].append(row + [padding] * (capacities[lead] - len(row)))
    return batch


def greedy(lengths, capacities, multiple_of, max_segments):
    """Put records into the last bin while they fit: lists of their numbers."""
    bins, room = [], None
    for i, needs in enumerate(lengths):
        needs = [round_up(n, multiple_of) for n in needs]
        fits = bins and all(n <= r for n, r in zip(needs, room, strict=True))
        if not fits or len(bins[-1]) == max_segments:
            bins.append([])
            room = list(capacities)
        bins[-1].append(i)
        room = [r - n for n, r in zip(needs, room, strict=True)]
    return bins


KINDS = ["int32", "int64", "uint8", "float32", "float16", "bool"]


@st.composite
def packings(draw):
    """Records of random features, of one capacity or of several, and options to pack them."""
    multiple_of = draw(st.sampled_from([1, 1, 2, 3]))
    leads = draw(st.sampled_from([["tokens"], ["inputs", "targets"], ["a", "b", "c"]]))
    capacities = {name: multiple_of * draw(st.integers(2, 6)) for name in leads}
    shared = draw(st.sampled_from([[], ["mask"], ["mask", "vectors"]])) if len(leads) == 1 else []
    once = draw(st.sampled_from([[], ["weight"], ["weight", "image"]]))
    kinds = {name: draw(st.sampled_from(KINDS)) for name in [*shared, *once]}
    kinds |= {name: draw(st.sampled_from(["int32", "int64", "uint16"])) for name in leads}
    shapes = {"vectors": (2,), "image": (2, 1)}
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    records = []
    for _ in range(draw(st.integers(1, 12))):
        lengths = {name: int(rng.integers(0, capacities[name] + 1)) for name in leads}
        lengths[leads[-1]] = int(rng.integers(1, capacities[leads[-1]] + 1))
        record = {}
        for name in [*leads, *shared, *once]:
            axis = () if name in once else (lengths[name if name in leads else leads[0]],)
            values = rng.integers(0, 100, axis + shapes.get(name, ()))
            record[name] = (values % 2 if kinds[name] == "bool" else values).astype(kinds[name])
        records.append(record)
    max_segments = draw(st.integers(1, 5))
    pads = draw(st.dictionaries(st.sampled_from([*leads, *shared]), st.integers(0, 1)))
    features = {name: name for name in leads} | dict.fromkeys(shared, leads[0])
    features |= dict.fromkeys(once)
    return records, capacities, features, multiple_of, pads, max_segments


def pack(packing, extra, **options):
    records, capacities, _, multiple_of, pads, max_segments = packing
    description = make_features(
        "test",
        capacities,
        max_segments=max_segments,
        multiple_of=multiple_of,
        pad_value=pads,
        meta_features=["image"],
        **options,
    )
    read = [description.read("test", f"record {k}", record) for k, record in enumerate(records)]
    lengths = [description.lengths(record) for record in read]
    assert lengths == [tuple(len(record[name]) for name in capacities) for record in records]
    bins = greedy(lengths, capacities.values(), multiple_of, max_segments)
    ids = np.array([i for held in bins for i in held], np.int64)
    columns = description.columns("test", [read[i] for i in ids.tolist()])
    offsets = offsets_of([len(held) for held in bins])
    batch = description.pack("test", columns, offsets, len(bins) + extra, ids=ids)
    return description, bins, batch


@given(packing=packings(), extra=st.integers(0, 2))
def test_a_batch_equals_the_row_by_row_version(packing, extra):
    records, capacities, features, multiple_of, pads, max_segments = packing
    _, bins, batch = pack(packing, extra)
    rows = len(bins) + extra
    expected = row_by_row(
        records, bins, rows, capacities, features, multiple_of, pads, max_segments
    )
    for name, found in expected.items():
        dtype = np.int32 if name in capacities else records[0][name].dtype
        assert batch[name].dtype == dtype
        assert batch[name].tolist() == found
    for name in capacities:
        prefix = "" if len(capacities) == 1 else f"{name}_"
        numbered = [
            {name: np.full(len(records[i][name]), k, np.int32)}
            for held in bins
            for k, i in enumerate(held, 1)
        ]
        order = [i for held in bins for i in held]
        by_id = dict(zip(order, numbered, strict=True))
        relabelled = [by_id[i] for i in range(len(records))]
        args = (bins, rows, capacities, {name: name}, multiple_of, {}, max_segments)
        assert batch[f"{prefix}segment_ids"].tolist() == row_by_row(relabelled, *args)[name]
        counted = [{name: np.arange(len(record[name]))} for record in records]
        assert batch[f"{prefix}positions"].tolist() == row_by_row(counted, *args)[name]
    assert len(batch) == len(expected) + 2 * len(capacities)


@given(packing=packings(), extra=st.integers(0, 1))
def test_every_feature_of_every_record_comes_back(packing, extra):
    records, capacities, features, *_, max_segments = packing
    _, bins, batch = pack(packing, extra, metadata=True)
    order = [i for held in bins for i in held]
    for name, lead in features.items():
        if lead is None:
            found = unpack_by_id(batch, name, once=True)
        else:
            values = batch[name]
            found = unpack_by_id(batch, lead, values=values)
            listed = unpack_batch(batch, lead, values=values)
            assert [array.tolist() for array in listed] == [found[i].tolist() for i in order]
        assert sorted(found) == list(range(len(records)))
        for i, record in enumerate(records):
            np.testing.assert_array_equal(found[i], record[name])
    rows = len(bins) + extra
    sizes = [len(held) for held in bins] + [0] * extra
    assert batch["row_valid"].dtype == np.bool_
    assert batch["row_valid"].tolist() == [size > 0 for size in sizes]
    assert batch["ids"].dtype == np.int64
    assert [row[row >= 0].tolist() for row in batch["ids"]] == [*bins, *[[]] * extra]
    for name in capacities:
        lengths = batch["segment_lengths" if len(capacities) == 1 else f"{name}_segment_lengths"]
        assert lengths.dtype == np.int32
        assert lengths.shape == batch["ids"].shape == (rows, max_segments)
        for row, held in zip(lengths.tolist(), bins, strict=False):
            own = [len(records[i][name]) for i in held]
            assert row == own + [0] * (max_segments - len(held))
        assert lengths[len(bins) :].tolist() == [[0] * max_segments] * extra


@given(packing=packings(), data=st.data())
def test_windows_cut_what_has_tokens(packing, data):
    records, capacities, features, *_ = packing
    description, *_ = pack(packing, 0)
    record = records[0]
    cuts = {}
    for name in capacities:
        start = data.draw(st.integers(0, len(record[name])))
        cuts[name] = (start, data.draw(st.integers(start, len(record[name]))))
    read = description.read("test", "record 0", record)
    starts, stops = zip(*cuts.values(), strict=True)
    window = description.window(read, starts, stops)
    assert list(window) == list(record)
    for name, lead in features.items():
        expected = record[name] if lead is None else record[name][slice(*cuts[lead])]
        np.testing.assert_array_equal(window[name], expected)
        assert window[name].dtype == record[name].dtype


@pytest.mark.parametrize("capacities", [8, {"tokens": 8}, {"a": 8, "b": 4}])
def test_an_empty_batch_has_the_form_of_the_others(capacities):
    features = make_features(
        "test", capacities, max_segments=3, metadata=True, meta_features=("image",), pad_value=5
    )
    record = {name: np.array([1, 2]) for name in features.names}
    record |= {"image": np.ones((2, 2), np.float16), "score": 0.5}
    if features.single:
        record |= {"mask": np.ones(2, bool), "vectors": np.ones((2, 3), np.float32)}
    read = features.read("test", "record 0", record)
    ids, none = np.array([4]), np.zeros(1, np.int64)
    full = features.pack("test", features.columns("test", [read]), np.array([0, 1]), 2, ids=ids)
    empty = features.pack("test", features.columns("test", []), none, 2, ids=ids[:0], like=read)
    assert list(full) == list(empty)
    for name, array in full.items():
        assert (array.dtype, array.shape) == (empty[name].dtype, empty[name].shape)
        if name in features.names:
            assert (empty[name] == 5).all()
        else:
            assert empty[name].tolist() == np.full(array.shape, -1 * (name == "ids")).tolist()
    bare = features.pack("test", features.columns("test", []), none, 2, ids=ids[:0])
    assert {name: array.tolist() for name, array in bare.items()} == {
        name: empty[name].tolist() for name in empty if name not in ("mask", "vectors", *record)
    } | {name: empty[name].tolist() for name in features.names}


def test_nested_records_come_out_as_nested_dicts():
    pair = namedtuple("pair", "left right")
    record = {
        "text": {"tokens": [1, 2, 3], "mask": np.array([True, False, True])},
        "pair": pair(np.array([0.5, 1, 2]), (np.array([1, 2, 3], np.int8), 7)),
    }
    features = make_features("test", 4, feature="text/tokens", max_segments=2)
    read = features.read("test", "record 0", record)
    assert list(read) == ["text/tokens", "text/mask", "pair/left", "pair/right/0", "pair/right/1"]
    batch = features.pack("test", features.columns("test", [read]), np.array([0, 1]), 1)
    assert batch["text"]["tokens"].tolist() == [[1, 2, 3, 0]]
    assert batch["text"]["mask"].tolist() == [[True, False, True, False]]
    assert batch["pair"]["left"].tolist() == [[0.5, 1, 2, 0]]
    assert batch["pair"]["right"]["0"].dtype == np.int8
    assert batch["pair"]["right"]["1"].tolist() == [[7, 0]]
    assert list(batch) == ["text", "pair", "segment_ids", "positions"]
    found = unpack_batch(batch, "pair/left")
    assert [array.tolist() for array in found] == [[0.5, 1, 2]]
    # Tuples of arrays are records too, named by their places.
    features = make_features("test", 4, feature="0")
    read = features.read("test", "record 0", ([1, 2], np.array([3, 4])))
    assert {name: array.tolist() for name, array in read.items()} == {"0": [1, 2], "1": [3, 4]}


def test_bare_arrays_are_the_one_feature():
    features = make_features("test", 4)
    for record in (np.array([1, 2]), [1, 2], (1, 2), np.array([1, 2], np.uint8)):
        assert features.read("test", "r", record)["tokens"].tolist() == [1, 2]
    array = np.array([3])
    assert features.read("test", "r", {"tokens": array})["tokens"] is array
    for nothing in ([], (), np.array([]), {"tokens": []}, {"tokens": np.array([])}):
        read = features.read("test", "r", nothing)["tokens"]
        assert (read.dtype, read.shape) == (np.int64, (0,))
        assert features.lengths({"tokens": read}) == (0,)


def test_features_are_described_and_pickled():
    features = make_features(
        "test",
        {"b": 8, "a": np.int64(4)},
        max_segments=np.int32(3),
        multiple_of=2,
        pad_value={"b": np.float32(0.5), "a": 0},
        meta_features=["x"],
        metadata=1,
    )
    assert repr(features) == (
        "Features(capacities={'b': 8, 'a': 4}, tokens_only=False, max_segments=3, multiple_of=2, "
        "pad_value={'b': 0.5}, meta_features=('x',), metadata=True, key_style='default')"
    )
    assert pickle.loads(pickle.dumps(features)) == features
    assert features.names == ("b", "a")
    assert not features.single
    assert features.planned(5) == 6
    assert features.planned(np.array([1, 2, 3])).tolist() == [2, 2, 4]
    assert make_features("test", 4).planned(3) == 3


def refuses(part):
    hint = "" if "Hint: " in part else ".*Hint: "
    return pytest.raises(sp.SeqpackError, match=f"^test: {re.escape(part)}{hint}")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"max_seq_len": 0}, "max_seq_len = 0, but it must be in [1, 2147483647]"),
        ({"max_seq_len": 2**31}, "max_seq_len = 2147483648, but it must be in"),
        ({"max_seq_len": "8"}, "max_seq_len = '8' is not an integer"),
        ({"max_seq_len": {}}, "max_seq_len is empty"),
        ({"max_seq_len": {"a": 0}}, "max_seq_len['a'] = 0, but it must be in"),
        ({"max_seq_len": {3: 8}}, "max_seq_len names a feature 3"),
        ({"feature": ""}, "feature names a feature ''"),
        ({"max_segments": 0}, "max_segments = 0, but it must be at least 1"),
        ({"multiple_of": 3}, "max_seq_len = 8 of 'tokens' is no multiple of 3"),
        ({"multiple_of": 0}, "multiple_of = 0, but it must be at least 1"),
        ({"pad_value": 1.5}, "pad_value = 1.5 is not an integer"),
        ({"pad_value": None}, "pad_value = None is not an integer"),
        ({"pad_value": {"tokens": 2**31}}, "pad_value['tokens'] = 2147483648, but it must be in"),
        ({"pad_value": {"mask": "0"}}, "pad_value['mask'] = '0' is not a number"),
        ({"meta_features": ("x",)}, "meta_features without max_segments"),
        ({"metadata": True}, "metadata without max_segments"),
        ({"meta_features": "x"}, "meta_features = 'x'"),
        ({"meta_features": [1]}, "meta_features names a feature 1"),
        (
            {"meta_features": ["tokens"], "max_segments": 2},
            "feature 'tokens' has a capacity and is in meta_features",
        ),
        ({"key_style": "flax"}, "key_style = 'flax' is not known"),
    ],
)
def test_bad_descriptions_are_refused(arguments, part):
    with refuses(part):
        make_features("test", **{"max_seq_len": 8} | arguments)


ONE, TWO = {"max_seq_len": 8}, {"max_seq_len": {"a": 8, "b": 4}}


@pytest.mark.parametrize(
    ("arguments", "record", "part"),
    [
        (ONE, {"text": [1]}, "record 3 has no feature 'tokens'"),
        (ONE, [1.5], "record 3 has shape (1,) and dtype float64"),
        (ONE, [[1]], "record 3 has shape (1, 1) and dtype int64"),
        (ONE, 5, "record 3 has shape () and dtype int64"),
        (ONE, "cat", "record 3 has dtype <U3, which is not of numbers"),
        (ONE, {"tokens": 5}, "feature 'tokens' of record 3 has shape () and dtype int64"),
        (ONE, {"tokens": [1.5]}, "feature 'tokens' of record 3 has shape (1,) and dtype float64"),
        (ONE, {"tokens": [[1]]}, "feature 'tokens' of record 3 has shape (1, 1) and dtype int64"),
        (
            ONE,
            {"tokens": [1, 2], "mask": [True]},
            "feature 'mask' of record 3 has 1 entries, but 'tokens' has 2. Hint: list it in "
            "max_seq_len={feature: capacity} or in meta_features",
        ),
        (
            ONE,
            {"tokens": [1, 2], "score": 0.5},
            "feature 'score' of record 3 comes once per sequence, but max_segments is None",
        ),
        (ONE, {"tokens": [1], "name": "x"}, "feature 'name' of record 3 has dtype <U1"),
        (ONE, {"tokens": [1], "x": {"y": None}}, "feature 'x/y' of record 3 has dtype object"),
        (ONE, {"tokens": [1], "x/y": [1]}, "record 3 has a feature named 'x/y'"),
        (ONE, {"tokens": [1], "x/y": np.ones(1)}, "record 3 has a feature named 'x/y'"),
        (ONE, {"tokens": [1], 4: np.ones(1)}, "record 3 has a feature named 4"),
        (TWO, [1, 2], "record 3 is one array, but a, b have capacities"),
        (TWO, {"a": [1]}, "record 3 has no feature 'b'"),
        (TWO, {"a": [1], "b": 2}, "feature 'b' of record 3 has shape () and dtype int64"),
        (
            TWO,
            {"a": [1], "b": [2], "c": [3]},
            "feature 'c' of record 3 has 1 entries, and no capacity. Hint: list it in",
        ),
    ],
)
def test_bad_records_are_refused(arguments, record, part):
    features = make_features("test", **arguments)
    with refuses(part):
        features.read("test", "record 3", record)


def test_bad_batches_are_refused():
    features = make_features("test", 8, max_segments=2)
    arrays = [np.array([1]), np.array([2]), np.array([3])]
    with refuses("bin 0 holds 3 segments of 2"):
        features.pack("test", {"tokens": arrays}, np.array([0, 3]), 1)
    with refuses("bin 1 holds 9 tokens of 8"):
        features.pack("test", {"tokens": [arrays[0], np.arange(9)]}, np.array([0, 1, 2]), 2)
    for name in ("segment_ids", "positions"):
        with refuses(f"a feature is named {name!r}, as an array of the batch"):
            features.pack("test", {"tokens": arrays[:1], name: arrays[:1]}, np.array([0, 1]), 1)
    records = [{"tokens": arrays[0]}, {"tokens": arrays[1], "mask": arrays[1]}]
    with refuses("segment 1 of the batch has a feature 'mask', segment 0 of the batch has none"):
        features.columns("test", records)
    with refuses("record 7 has a feature 'mask', record 8 has none"):
        features.columns("test", records[::-1], lambda k: f"record {k + 7}")
    columns = {"tokens": arrays[:2], "score": [np.asarray(0.5), np.asarray(1)]}
    with refuses("feature 'score' is float64 [] in one record, int64 [] in another"):
        features.pack("test", columns, np.array([0, 2]), 1)


def test_one_pad_value_is_for_features_with_a_capacity():
    features = make_features("test", 4, pad_value=9)
    columns = {"tokens": [np.array([1])], "mask": [np.array([True])], "x": [np.array([0.5])]}
    batch = features.pack("test", columns, np.array([0, 1]), 1)
    assert batch["tokens"].tolist() == [[1, 9, 9, 9]]
    assert batch["mask"].tolist() == [[True, False, False, False]]
    assert batch["x"].tolist() == [[0.5, 0, 0, 0]]
    features = make_features("test", {"a": 2, "b": 3}, pad_value=-1)
    batch = features.pack("test", {"a": [np.ones(1)], "b": [np.array([4])]}, np.array([0, 1]), 1)
    assert batch["a"].tolist() == [[1, -1]]
    assert batch["b"].tolist() == [[4, -1, -1]]


def pack_one(record, **options):
    features = make_features("test", 4, max_segments=2, **options)
    columns = features.columns("test", [features.read("test", "r", record)])
    return features.pack("test", columns, np.array([0, 1]), 1, ids=np.array([0]))


@pytest.mark.parametrize("name", ["ids", "row_valid", "segment_lengths"])
def test_metadata_never_replaces_a_feature(name):
    for value in (77, [77]):  # once per sequence, and of every token
        assert pack_one({"tokens": [1], name: value})[name].flat[0] == 77
        with refuses(f"a feature is named {name!r}, as an array of the batch"):
            pack_one({"tokens": [1], name: value}, metadata=True)


def test_pad_values_of_other_features_are_refused():
    with refuses("pad_value names the feature 'token', which is in no record. Hint: features with"):
        pack_one({"tokens": [1]}, pad_value={"token": 5})
    with refuses("pad_value names the feature 's', which comes once per sequence"):
        pack_one({"tokens": [1], "s": 3}, pad_value={"s": -1})
    features = make_features("test", 4, pad_value={"x": 5})
    read = features.read("test", "r", {"tokens": [1], "x": [2]})
    columns, offsets = {"tokens": []}, np.zeros(1, np.int64)
    assert features.pack("test", columns, offsets, 1, like=read)["x"].tolist() == [[5, 5, 5, 5]]
    # Without segments nobody knows which features there are.
    assert list(features.pack("test", columns, offsets, 1))[1:] == ["segment_ids", "positions"]


def test_a_batch_without_tokens_of_a_feature_looks_like_the_others():
    features = make_features("test", {"a": 4, "b": 4})
    like = features.read("test", "r", {"a": [[0.5, 1]], "b": [1]})
    for nothing in ([], np.array([]), np.zeros((0, 2), np.float32)):
        read = [features.read("test", "r", {"a": nothing, "b": [2]})]
        for records in (read, [like, *read], [*read, like]):
            columns = features.columns("test", records)
            batch = features.pack("test", columns, np.array([0, len(records)]), 1, like=like)
            assert (batch["a"].dtype, batch["a"].shape) == (np.float64, (1, 4, 2))
            assert batch["a_segment_ids"].max() == max(
                [k for k, record in enumerate(records, 1) if len(record["a"])], default=0
            )
