"""What trainers get: keys, dtypes and shifts, written out by hand and as a property."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seqpack_jax as sp
from seqpack_jax.arrays import offsets_of
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.key_styles import KEY_STYLES

RECORDS = [{"tokens": [11, 12, 13]}, {"tokens": [21, 22]}, {"tokens": [31]}]


def pack(style, records=RECORDS, bins=((0, 1), (2,)), max_seq_len=6, **options):
    features = make_features("test", max_seq_len, key_style=style, **options)
    read = [features.read("test", f"record {i}", records[i]) for held in bins for i in held]
    columns = features.columns("test", read)
    offsets = offsets_of([len(held) for held in bins])
    ids = np.array([i for held in bins for i in held], np.int64)
    return features.pack("test", columns, offsets, len(bins), ids=ids)


def lists(batch):
    return {name: array.tolist() for name, array in batch.items()}


TOKENS = [[11, 12, 13, 21, 22, 0], [31, 0, 0, 0, 0, 0]]
IDS = [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
POSITIONS = [[0, 1, 2, 0, 1, 0], [0] * 6]

EXPECTED = {
    "default": {"tokens": TOKENS, "segment_ids": IDS, "positions": POSITIONS},
    "grain": {"tokens": TOKENS, "tokens_segment_ids": IDS, "tokens_positions": POSITIONS},
    "maxtext": {
        "inputs": TOKENS,
        "inputs_position": POSITIONS,
        "inputs_segmentation": IDS,
        "targets": [[12, 13, 0, 22, 0, 0], [0] * 6],
        "targets_position": POSITIONS,
        "targets_segmentation": [[1, 1, 0, 2, 0, 0], [0] * 6],
    },
    "t5x": {
        "decoder_input_tokens": [[0, 11, 12, 0, 21, 0], [0] * 6],
        "decoder_target_tokens": TOKENS,
        "decoder_loss_weights": [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]],
        "decoder_segment_ids": IDS,
        "decoder_positions": POSITIONS,
    },
    "levanter": {
        "tokens": TOKENS,
        "loss_mask": [[1, 1, 0, 1, 0, 0], [0] * 6],
        "segment_ids": [[0, 0, 0, 1, 1, -1], [0, -1, -1, -1, -1, -1]],
        "pos_ids": POSITIONS,
    },
    "hf": {
        "input_ids": TOKENS,
        "position_ids": POSITIONS,
        "labels": [[-100, 12, 13, -100, 22, -100], [-100] * 6],
    },
    "tunix": {
        "input_tokens": TOKENS,
        "input_mask": [[0, 1, 1, 0, 1, 0], [0] * 6],
        "segment_ids": IDS,
        "segment_positions": POSITIONS,
    },
}


@pytest.mark.parametrize("style", KEY_STYLES)
def test_one_feature(style):
    batch = pack(style)
    assert lists(batch) == EXPECTED[style]
    assert list(batch) == list(EXPECTED[style])
    for array in batch.values():
        assert (array.dtype, array.shape) == (np.int32, (2, 6))


def test_seqio_s_own_example():
    records = [
        {"inputs": [7, 8, 5, 1], "targets": [3, 9, 1]},
        {"inputs": [8, 4, 9, 3, 1], "targets": [4, 1]},
    ]
    batch = pack("t5x", records, [(0, 1)], {"inputs": 10, "targets": 7})
    assert lists(batch) == {
        "encoder_input_tokens": [[7, 8, 5, 1, 8, 4, 9, 3, 1, 0]],
        "encoder_segment_ids": [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]],
        "encoder_positions": [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]],
        "decoder_input_tokens": [[0, 3, 9, 0, 4, 0, 0]],
        "decoder_target_tokens": [[3, 9, 1, 4, 1, 0, 0]],
        "decoder_loss_weights": [[1, 1, 1, 1, 1, 0, 0]],
        "decoder_segment_ids": [[1, 1, 1, 2, 2, 0, 0]],
        "decoder_positions": [[0, 1, 2, 0, 1, 0, 0]],
    }
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_the_others_of_several_capacities():
    records = [{"inputs": [7, 8], "targets": [3]}, {"inputs": [9], "targets": [4, 5]}]
    expected = {
        "inputs": [[7, 8, 9, 0]],
        "inputs_segment_ids": [[1, 1, 2, 0]],
        "inputs_positions": [[0, 1, 0, 0]],
        "targets": [[3, 4, 5]],
        "targets_segment_ids": [[1, 2, 2]],
        "targets_positions": [[0, 0, 1]],
    }
    for style in ("default", "grain"):
        assert lists(pack(style, records, [(0, 1)], {"inputs": 4, "targets": 3})) == expected


def test_features_that_share_rows():
    records = [{"tokens": [5, 6], "x": [0.5, 1]}, {"tokens": [7], "x": [2.0]}]
    batch = pack("grain", records, [(0, 1)], 4)
    assert list(batch)[3:] == ["x", "x_segment_ids", "x_positions"]
    assert batch["x_segment_ids"].tolist() == batch["tokens_segment_ids"].tolist() == [[1, 1, 2, 0]]
    assert batch["x_positions"].tolist() == [[0, 1, 0, 0]]
    for style in KEY_STYLES:
        batch = pack(style, records, [(0, 1)], 4)
        assert batch["x"].dtype == np.float64
        assert batch["x"].tolist() == [[0.5, 1, 2, 0]]
        # What comes once per sequence keeps its name.
        options = {"max_segments": 3, "metadata": True}
        named = [{**record, "score": 1.5} for record in records]
        batch = pack(style, named, [(0, 1)], 4, **options)
        assert batch["score"].tolist() == [[1.5, 1.5, 0]]
        assert batch["ids"].tolist() == [[0, 1, -1]]
        assert batch["segment_lengths"].tolist() == [[2, 1, 0]]
        assert batch["row_valid"].tolist() == [True]


def test_own_targets_are_taken_as_they_are():
    records = [
        {"tokens": [1, 2, 3], "targets": np.array([2, 3, 9])},
        {"tokens": [4, 5], "targets": np.array([5, 8])},
    ]
    batch = pack("maxtext", records, [(0, 1)], 6)
    assert batch["targets"].tolist() == [[2, 3, 9, 5, 8, 0]]
    assert batch["targets"].dtype == np.int32
    assert batch["targets_segmentation"].tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch["inputs"].tolist() == [[1, 2, 3, 4, 5, 0]]
    masked = [
        {**record, "loss_mask": np.array(mask)}
        for record, mask in zip(records, ([0, 0, 1], [1, 0]), strict=True)
    ]
    batch = pack("maxtext", masked, [(0, 1)], 6)
    assert batch["targets_segmentation"].tolist() == [[0, 0, 1, 2, 0, 0]]
    # Under another name, or as the feature that has the capacity, they are shifted.
    batch = pack("maxtext", [{"targets": [1, 2, 3]}], [(0,)], 4, feature="targets")
    assert batch["targets"].tolist() == [[2, 3, 0, 0]]
    assert batch["inputs"].tolist() == [[1, 2, 3, 0]]


def test_own_labels_are_taken_unshifted():
    records = [{"tokens": [1, 2, 3], "labels": [-100, 2, 7]}, {"tokens": [4, 5], "labels": [4, 5]}]
    batch = pack("hf", records, [(0, 1)], 6)
    assert batch["labels"].tolist() == [[-100, 2, 7, -100, 5, -100]]
    assert batch["labels"].dtype == np.int32
    assert list(batch) == ["input_ids", "position_ids", "labels"]


def test_the_loss_mask_says_which_tokens_are_learned():
    # A prompt of two tokens and its answer of two; an answer alone.
    masks = [[False, False, True, True], [True, True]]
    tokens = [[11, 12, 13, 14], [21, 22]]
    records = [{"tokens": t, "loss_mask": m} for t, m in zip(tokens, masks, strict=True)]
    maxtext = pack("maxtext", records, [(0, 1)], 7)
    assert maxtext["targets"].tolist() == [[12, 13, 14, 0, 22, 0, 0]]
    assert maxtext["targets_segmentation"].tolist() == [[0, 1, 1, 0, 2, 0, 0]]
    t5x = pack("t5x", records, [(0, 1)], 7)
    assert t5x["decoder_loss_weights"].tolist() == [[0, 0, 1, 1, 1, 1, 0]]
    assert t5x["decoder_loss_weights"].dtype == np.int32
    levanter = pack("levanter", records, [(0, 1)], 7)
    assert levanter["loss_mask"].tolist() == [[0, 1, 1, 0, 1, 0, 0]]
    assert levanter["loss_mask"].dtype == np.int32
    hf = pack("hf", records, [(0, 1)], 7)
    assert hf["labels"].tolist() == [[-100, -100, 13, 14, -100, 22, -100]]
    tunix = pack("tunix", records, [(0, 1)], 7)
    assert tunix["input_mask"].tolist() == [[0, 0, 1, 1, 0, 1, 0]]
    weights = [("t5x", "decoder_loss_weights"), ("levanter", "loss_mask"), ("tunix", "input_mask")]
    for style, name in weights:
        halves = [{"tokens": [1, 2], "loss_mask": np.array([0.5, 0.25], np.float32)}]
        batch = pack(style, halves, [(0,)], 3)
        assert batch[name].dtype == np.float32
        expected = {"t5x": [0.5, 0.25, 0], "levanter": [0.25, 0, 0], "tunix": [0, 0.25, 0]}
        assert batch[name].tolist() == [expected[style]]
    for batch in (maxtext, t5x, hf, tunix):
        assert "loss_mask" not in batch
    assert pack("default", records, [(0, 1)], 7)["loss_mask"].dtype == np.bool_


@given(
    data=st.data(),
    capacity=st.sampled_from([4, 8, 12]),
    multiple_of=st.sampled_from([1, 2, 4]),
    pad=st.sampled_from([0, 3, -1]),
)
def test_no_target_crosses_a_boundary(data, capacity, multiple_of, pad):
    records, bins = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        bins.append([])
        room = capacity
        for length in data.draw(st.lists(st.integers(1, capacity), max_size=4)):
            if -(-length // multiple_of) * multiple_of <= room:
                room -= -(-length // multiple_of) * multiple_of
                bins[-1].append(len(records))
                # Token t of record r is 100 (r + 1) + t: it says where it comes from.
                records.append({"tokens": 100 * (len(records) + 1) + np.arange(length)})
    if not records:
        return
    styles = {
        style: pack(style, records, bins, capacity, multiple_of=multiple_of, pad_value=pad)
        for style in KEY_STYLES
    }
    default = styles["default"]
    tokens, real = default["tokens"], default["segment_ids"] > 0
    rows = range(len(tokens))
    follows = {(row, t): tokens[row][t] for row in rows for t in range(capacity) if real[row][t]}
    total = sum(len(record["tokens"]) for record in records)

    def learned(inputs, targets, counts):
        """Pairs of a token and the one that it is to predict."""
        return [
            (int(inputs[row][t]), int(targets[row][t]))
            for row in rows
            for t in range(targets.shape[1])
            if counts[row][t]
        ]

    batch = styles["maxtext"]
    assert (batch["inputs"] == tokens).all()
    pairs = learned(tokens, batch["targets"], batch["targets_segmentation"])
    expected = [(value, value + 1) for value in follows.values() if value + 1 in follows.values()]
    assert sorted(pairs) == sorted(expected)
    assert len(pairs) == total - len(records)
    kept = batch["targets_segmentation"] > 0
    assert (batch["targets_segmentation"][kept] == default["segment_ids"][kept]).all()
    assert (batch["targets"][real & ~kept] == 0).all()
    assert (batch["targets"][~real] == pad).all()

    batch = styles["levanter"]
    shifted = np.roll(batch["tokens"], -1, axis=1)  # levanter's loss rolls the tokens
    assert sorted(learned(batch["tokens"], shifted, batch["loss_mask"])) == sorted(expected)
    assert (batch["segment_ids"][~real] == -1).all()
    assert (batch["segment_ids"][real] == default["segment_ids"][real] - 1).all()

    batch = styles["hf"]  # its models compare logits [:-1] with labels [1:]
    labels = batch["labels"][:, 1:]
    assert sorted(learned(batch["input_ids"], labels, labels != -100)) == sorted(expected)

    batch = styles["tunix"]  # its loss compares logits [:-1] with tokens [1:], masked by [1:]
    targets, counts = batch["input_tokens"][:, 1:], batch["input_mask"][:, 1:]
    assert sorted(learned(batch["input_tokens"], targets, counts)) == sorted(expected)

    batch = styles["t5x"]
    weights = batch["decoder_loss_weights"]
    pairs = learned(batch["decoder_input_tokens"], batch["decoder_target_tokens"], weights)
    first = [(0, 100 * (k + 1)) for k in range(len(records))]
    assert sorted(pairs) == sorted(expected + first)


@pytest.mark.parametrize(
    ("style", "max_seq_len", "record", "part"),
    [
        ("maxtext", {"a": 2, "b": 2}, {"a": [1], "b": [1]}, "'maxtext' and capacities of a, b"),
        ("levanter", {"a": 2, "b": 2}, {"a": [1], "b": [1]}, "'levanter' and capacities of a, b"),
        ("hf", {"a": 2, "b": 2}, {"a": [1], "b": [1]}, "'hf' and capacities of a, b"),
        ("tunix", {"a": 2, "b": 2}, {"a": [1], "b": [1]}, "'tunix' and capacities of a, b"),
        ("t5x", {"a": 2, "b": 2}, {"a": [1], "b": [1]}, "'t5x' and capacities of a, b"),
        ("hf", {"a": 2}, {"a": [0.5]}, "feature 'a' is float64 [1, 2], but key_style 'hf' has"),
        ("t5x", {"a": 2}, {"a": [[1, 2]]}, "feature 'a' is int32 [1, 2, 2], but key_style 't5x'"),
        ("hf", 2, {"tokens": [1], "labels": [0.5]}, "feature 'labels' is float64 [1, 2], but"),
        ("hf", 2, {"tokens": [1], "labels": [2**31]}, "value 2147483648 of feature 'labels'"),
        ("maxtext", 2, {"tokens": [1], "targets": [0.5]}, "feature 'targets' is float64 [1, 2]"),
        ("maxtext", 2, {"tokens": [1], "inputs": [5]}, "a feature is named 'inputs'"),
        ("hf", 2, {"tokens": [1], "position_ids": [5]}, "a feature is named 'position_ids'"),
        ("grain", 2, {"tokens": [1], "tokens_positions": [5]}, "named 'tokens_positions'"),
        ("t5x", 2, {"tokens": [1], "loss_mask": [[1]]}, "feature 'loss_mask' is int64 [1, 2, 1]"),
        ("default", 2, {"tokens": [1], "positions": {"x": [5]}}, "a feature is named 'positions'"),
    ],
)
def test_what_a_style_does_not_know_is_refused(style, max_seq_len, record, part):
    with pytest.raises(sp.SeqpackError, match=f"^test: .*{re.escape(part)}.*Hint: "):
        pack(style, [record], [(0,)], max_seq_len)


def test_styles_do_not_change_what_they_are_given():
    records = [{"tokens": np.arange(3, dtype=np.int32), "loss_mask": np.ones(3, bool)}]
    for style in KEY_STYLES:
        pack(style, records, [(0,)], 3)
        assert records[0]["tokens"].tolist() == [0, 1, 2]
        assert records[0]["loss_mask"].all()


@pytest.mark.parametrize("style", KEY_STYLES)
def test_arrays_of_a_batch_share_no_memory(style):
    records = [{"tokens": np.arange(4, dtype=np.int32), "x": np.ones(4), "y": np.ones((4, 2))}]
    first, second = (
        pack(style, records, [(0,)], 4, max_segments=4, metadata=True) for _ in range(2)
    )
    arrays = [*first.values(), *second.values(), *records[0].values()]
    for k, array in enumerate(arrays):
        assert array.flags.writeable
        assert not any(np.shares_memory(array, other) for other in arrays[:k])


def test_hugging_face_finds_segments_by_positions_of_0():
    features = make_features("test", 4, key_style="hf")
    columns = {"tokens": [np.array([1, 2]), np.array([3])]}
    for firsts in ([4, 0], [0, 7]):
        problem = f"key_style 'hf' and a segment whose positions start at {max(firsts)}. Hint: "
        with pytest.raises(sp.SeqpackError, match=f"^test: {re.escape(problem)}"):
            features.pack(
                "test", columns, np.array([0, 2]), 1, first_positions=np.array(firsts, np.int64)
            )
    batch = features.pack("test", columns, np.array([0, 2]), 1, first_positions=np.zeros(2, int))
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0]]
