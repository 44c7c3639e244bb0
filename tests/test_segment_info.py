"""One description of the segments: each method is the function of its name, under its settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import pytest
from attention_reference import HARD_ROWS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model import ids, key_bounds, masks, offsets, segments
from seqpack_jax.model.segments import SegmentInfo, segment_info

LENGTH = 16
# Encoder rows that go with HARD_ROWS: other lengths, missing segments, padding between them.
KV_ROWS = np.array(
    [
        [1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0, 0],
        [1, 1, 1, 3, 3, 3, 3, 4, 5, 0, 0, 0],
        [0, 1, 0, 2, 2, 2, 2, 0, 0, 0, 3, 3],
        [1] * 12,
        [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2],
        list(range(5, 17)),
    ],
    np.int32,
)
SETTINGS = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "window": 3},
    {"causal": False, "window": 3},
]


def assert_equal_trees(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# --- what it holds ----------------------------------------------------------------------------


def test_fields_and_defaults():
    info = segment_info(HARD_ROWS.astype(np.uint8))
    assert info.segment_ids.dtype == info.positions.dtype == jnp.int32
    assert info.segment_ids.tolist() == HARD_ROWS.tolist()
    assert info.positions.tolist() == [model_reference.positions(row) for row in HARD_ROWS.tolist()]
    assert (info.kv_segment_ids, info.kv_positions) == (None, None)
    settings = info.causal, info.window, info.max_segments, info.contiguous
    assert settings == (True, None, None, True)


def test_fields_and_defaults_of_cross_attention():
    info = segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS)
    assert info.kv_segment_ids.tolist() == KV_ROWS.tolist()
    assert info.kv_positions.tolist() == [
        model_reference.positions(row) for row in KV_ROWS.tolist()
    ]
    assert not info.causal  # a decoder sees the whole of its encoder segment
    assert segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, causal=True).causal


def test_given_positions_are_kept():
    positions = np.arange(HARD_ROWS.size, dtype=np.int8).reshape(HARD_ROWS.shape)
    info = segment_info(HARD_ROWS, positions)
    assert (info.positions.dtype, info.positions.tolist()) == (jnp.int32, positions.tolist())
    cross = segment_info(
        HARD_ROWS, positions, kv_segment_ids=KV_ROWS, kv_positions=positions[:, :12]
    )
    assert cross.kv_positions.tolist() == positions[:, :12].tolist()


# --- each method is the function of its name --------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_methods_of_self_attention(settings):
    info = segment_info(HARD_ROWS, max_segments=16, **settings)
    for pad in ("segment", "self", "empty"):
        assert_equal_trees(info.mask(pad), masks.segment_mask(HARD_ROWS, pad=pad, **settings))
        bias = masks.segment_bias(HARD_ROWS, jnp.bfloat16, mask_value=-99, pad=pad, **settings)
        assert_equal_trees(info.bias(jnp.bfloat16, pad, mask_value=-99), bias)
        bounds = key_bounds.kv_bounds(HARD_ROWS, pad=pad, **settings)
        assert_equal_trees(info.kv_bounds(pad), bounds)
        blocks = key_bounds.block_bounds(*bounds, 4, 8)
        assert_equal_trees(info.block_bounds(4, 8, pad), blocks)
    assert_equal_trees(info.mask(), info.mask("segment"))
    assert_equal_trees(info.bias(), info.bias(jnp.float32, "segment"))
    assert_equal_trees(info.kv_bounds(), info.kv_bounds("self"))
    assert_equal_trees(info.block_bounds(4, 8), info.block_bounds(4, 8, "self"))
    assert_equal_trees(info.seqlens_and_offsets(), offsets.seqlens_and_offsets(HARD_ROWS, 16))
    assert_equal_trees(info.kv_seqlens_and_offsets(), info.seqlens_and_offsets())
    assert_equal_trees(info.monotone_ids(), ids.monotone_segment_ids(HARD_ROWS))
    assert_equal_trees(info.kv_monotone_ids(), info.monotone_ids())


def test_methods_of_cross_attention():
    info = segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, max_segments=16)
    mask = masks.segment_mask(HARD_ROWS, KV_ROWS, causal=False)
    assert_equal_trees(info.mask(), mask)
    assert_equal_trees(
        info.bias(), masks.segment_bias(HARD_ROWS, kv_segment_ids=KV_ROWS, causal=False)
    )
    bounds = key_bounds.kv_bounds(HARD_ROWS, KV_ROWS, causal=False)
    assert_equal_trees(info.kv_bounds(), bounds)
    assert_equal_trees(info.block_bounds(4, 4), key_bounds.block_bounds(*bounds, 4, 4))
    queries = offsets.seqlens_and_offsets(HARD_ROWS, 16, partner_segment_ids=KV_ROWS)
    keys = offsets.seqlens_and_offsets(KV_ROWS, 16, partner_segment_ids=HARD_ROWS)
    assert_equal_trees(info.seqlens_and_offsets(), queries)
    assert_equal_trees(info.kv_seqlens_and_offsets(), keys)


@pytest.mark.parametrize("window", [None, 2])
def test_causal_cross_attention_goes_by_position(window):
    info = segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, causal=True, window=window)
    mask = np.asarray(info.mask())
    for b, (row, kv_row) in enumerate(zip(HARD_ROWS.tolist(), KV_ROWS.tolist(), strict=True)):
        places, kv_places = model_reference.positions(row), model_reference.positions(kv_row)
        for query in range(LENGTH):
            for key in range(12):
                distance = places[query] - kv_places[key]
                near = 0 <= distance < (window or LENGTH)
                allowed = row[query] == kv_row[key] and near
                if row[query]:
                    assert mask[b, 0, query, key] == allowed
    assert_equal_trees(jnp.where(info.mask(), 0.0, jnp.float32(-(2.0**41))), info.bias())


def test_monotone_ids_of_cross_attention_agree_on_both_sides():
    info = segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS)
    queries, keys = np.asarray(info.monotone_ids()), np.asarray(info.kv_monotone_ids())
    assert queries.dtype == keys.dtype == np.int32
    for row in (*queries, *keys):
        assert (np.diff(row) >= 0).all()
    same = queries[:, :, None] == keys[:, None, :]
    q_real, k_real = HARD_ROWS[:, :, None] > 0, KV_ROWS[:, None, :] > 0
    allowed = np.asarray(info.mask("empty"))[:, 0]
    np.testing.assert_array_equal(same & q_real, allowed)
    assert not (same & (q_real != k_real)).any()


# --- reordered tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_masks_stay_exact_after_any_permutation(settings):
    order = np.random.default_rng(0).permutation(LENGTH)
    before = segment_info(HARD_ROWS, **settings)
    after = segment_info(
        HARD_ROWS[:, order], before.positions[:, order], contiguous=False, **settings
    )
    real = (HARD_ROWS > 0)[:, order][:, None, :, None]
    expected = np.asarray(before.mask())[:, :, order][:, :, :, order]
    np.testing.assert_array_equal(np.where(real, after.mask(), 0), np.where(real, expected, 0))
    bias = np.where(np.asarray(after.mask()), 0, np.float32(-(2.0**41)))
    np.testing.assert_array_equal(after.bias(), bias)
    by_index = dataclasses.replace(after, contiguous=True)
    is_same = np.array_equal(np.where(real, by_index.mask(), 0), np.where(real, expected, 0))
    assert is_same == (settings == {"causal": False})  # the comparison can fail


REFUSED = {
    "kv_bounds": lambda info: info.kv_bounds(),
    "block_bounds": lambda info: info.block_bounds(4, 4),
    "seqlens_and_offsets": lambda info: info.seqlens_and_offsets(),
    "kv_seqlens_and_offsets": lambda info: info.kv_seqlens_and_offsets(),
    "monotone_ids": lambda info: info.monotone_ids(),
    "kv_monotone_ids": lambda info: info.kv_monotone_ids(),
}


@pytest.mark.parametrize("method", REFUSED)
def test_reordered_tokens_are_refused_where_order_counts(method):
    info = dataclasses.replace(segment_info(HARD_ROWS, max_segments=16), contiguous=False)
    message = rf"^SegmentInfo.{method}: contiguous is False: .*Hint: use mask\(\) or bias\(\)"
    with pytest.raises(SeqpackError, match=message):
        REFUSED[method](info)


# --- a pytree ---------------------------------------------------------------------------------


def everything(info):
    found = [info.mask(), info.bias(), info.kv_bounds(), info.block_bounds(4, 4)]
    found += [info.seqlens_and_offsets(), info.kv_seqlens_and_offsets()]
    return [*found, info.monotone_ids(), info.kv_monotone_ids()]


@pytest.mark.parametrize("kv_rows", [None, KV_ROWS], ids=["self", "cross"])
def test_through_jit_as_argument_and_result(kv_rows):
    info = segment_info(HARD_ROWS, kv_segment_ids=kv_rows, max_segments=16)
    through = jax.jit(lambda info: info)(info)
    assert isinstance(through, SegmentInfo)
    assert_equal_trees(through, info)
    assert_equal_trees(jax.jit(everything)(info), everything(info))


def test_arrays_are_leaves_and_settings_are_static():
    traces = []

    @jax.jit
    def step(info):
        traces.append(info)
        return info.mask()

    for rows in (HARD_ROWS, HARD_ROWS[::-1].copy(), np.zeros_like(HARD_ROWS)):
        step(segment_info(rows))
    assert len(traces) == 1
    step(segment_info(HARD_ROWS, window=2))
    assert len(traces) == 2
    assert len(jax.tree.leaves(traces[0])) == 2
    assert len(jax.tree.leaves(segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS))) == 4


def test_vmap_scan_and_checkpoint():
    info = segment_info(HARD_ROWS, window=4)
    expected = info.kv_bounds()
    assert_equal_trees(jax.vmap(lambda row: row.kv_bounds())(info), expected)
    _, scanned = jax.lax.scan(lambda carry, row: (carry, row.kv_bounds()), 0, info)
    assert_equal_trees(scanned, expected)
    saved = jax.checkpoint(lambda info: info.bias())
    assert_equal_trees(saved(info), info.bias())


def test_building_it_inside_jit_from_abstract_ids():
    shape = jax.ShapeDtypeStruct((2, 3, 8), jnp.int32)
    info = jax.eval_shape(functools.partial(segment_info, max_segments=3), shape)
    assert (info.positions.shape, info.max_segments) == ((2, 3, 8), 3)


COLLECTIVES = ["all-gather", "all-reduce", "all-to-all", "collective-permute"]


def mesh_of_two():
    return jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])


def test_sharded_rows_need_no_other_device():
    jitted = jax.jit(lambda rows: everything(segment_info(rows, max_segments=16)))

    def compiled(spec):
        rows = jax.device_put(HARD_ROWS, NamedSharding(mesh_of_two(), spec))
        return rows, jitted.lower(rows).compile()

    rows, by_row = compiled(PartitionSpec("data"))
    assert not [word for word in COLLECTIVES if word in by_row.as_text()]
    result = by_row(rows)
    assert all(leaf.sharding.spec[0] == "data" for leaf in jax.tree.leaves(result))
    expected = everything(segment_info(HARD_ROWS, max_segments=16))
    assert_equal_trees(jax.device_get(result), jax.device_get(expected))
    _, by_token = compiled(PartitionSpec(None, "data"))
    assert [word for word in COLLECTIVES if word in by_token.as_text()]  # the check can fail


def test_under_shard_map():
    info, spec = segment_info(HARD_ROWS, max_segments=16), PartitionSpec("data")
    mapped = jax.shard_map(everything, mesh=mesh_of_two(), in_specs=spec, out_specs=spec)
    assert_equal_trees(jax.device_get(jax.jit(mapped)(info)), jax.device_get(everything(info)))


def test_empty_batches():
    for shape in ((0, 4), (2, 0)):
        info = segment_info(np.zeros(shape, np.int32), max_segments=2)
        assert info.mask().shape == (shape[0], 1, shape[1], shape[1])
        assert info.monotone_ids().shape == info.kv_bounds().k_end.shape == shape
        assert info.seqlens_and_offsets().offsets.shape == (shape[0], 3)


# --- where users import from ------------------------------------------------------------------


def test_everything_can_be_imported_from_segments():
    for module in (ids, masks, key_bounds, offsets):
        assert set(module.__all__) <= set(segments.__all__)
        for name in module.__all__:
            assert getattr(segments, name) is getattr(module, name)
    own = {name for module in (ids, masks, key_bounds, offsets) for name in module.__all__}
    assert set(segments.__all__) - own == {"SegmentInfo", "segment_info"}


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: segment_info(np.ones((2, 3), np.float32)),
            r"^segment_info: segment_ids is float32 of shape \(2, 3\), .*Hint:",
        ),
        (
            lambda: segment_info(HARD_ROWS, HARD_ROWS[0]),
            r"^segment_info: positions has shape \(16,\), but its segment ids have \(6, 16\). Hint",
        ),
        (
            lambda: segment_info(HARD_ROWS, np.ones((6, 16), np.float32)),
            "^segment_info: positions is float32.*Hint:",
        ),
        (
            lambda: segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS[:2]),
            r"^segment_info: kv_segment_ids has shape \(2, 12\), but segment_ids has \(6, 16\). H",
        ),
        (
            lambda: segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, kv_positions=HARD_ROWS),
            r"^segment_info: kv_positions has shape \(6, 16\), .* have \(6, 12\). Hint:",
        ),
        (
            lambda: segment_info(HARD_ROWS, kv_positions=HARD_ROWS),
            "^segment_info: kv_positions came without kv_segment_ids. Hint: pass both or neither",
        ),
        (
            lambda: segment_info(HARD_ROWS, contiguous=False),
            "^segment_info: positions is None, but contiguous is False. Hint: compute them while",
        ),
        (
            lambda: segment_info(HARD_ROWS, HARD_ROWS, kv_segment_ids=KV_ROWS, contiguous=False),
            "^segment_info: kv_positions is None, but contiguous is False. Hint:",
        ),
        (lambda: segment_info(HARD_ROWS, window=0), "^segment_info: window = 0, but .*Hint:"),
        (lambda: segment_info(HARD_ROWS, max_segments=0), "^segment_info: max_segments = 0, .*Hi"),
        (
            lambda: segment_info(HARD_ROWS, causal=1),
            "^segment_info: causal = 1 is not a bool. Hint",
        ),
        (
            lambda: segment_info(HARD_ROWS, HARD_ROWS, contiguous=None),
            "^segment_info: contiguous = None is not a bool. Hint:",
        ),
        (
            lambda: segment_info(HARD_ROWS).seqlens_and_offsets(),
            "^SegmentInfo.seqlens_and_offsets: max_segments is None. Hint: pass max_segments to",
        ),
        (
            lambda: segment_info(HARD_ROWS).kv_seqlens_and_offsets(),
            "^SegmentInfo.kv_seqlens_and_offsets: max_segments is None. Hint:",
        ),
        (lambda: segment_info(HARD_ROWS).mask("none"), "pad = 'none' is not known. Hint:"),
        (
            lambda: segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, causal=True).kv_bounds(),
            "^kv_bounds: causal and window .*Hint: pass causal=False",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()
