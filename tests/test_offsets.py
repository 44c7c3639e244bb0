"""Offsets, held against loops and against what the kernels' JAX side makes of them.

The kernels need a GPU.  What JAX and TransformerEngine do to lengths and offsets before they call
them is emulated here in NumPy, at two rows and more: with one row wrong encodings look right.
"""

import functools
import importlib
import itertools
import types

import attention_reference
import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import pytest
from attention_reference import HARD_ROWS
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from packed_rows import HAND_ROWS, LENGTH, packed_rows

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.ids import from_seed_ids
from seqpack_jax.model.key_bounds import kv_bounds
from seqpack_jax.model.offsets import build_packing_cu_seqlens, cu_seqlens, seqlens_and_offsets

FUNCTIONS = {
    "seed": functools.partial(build_packing_cu_seqlens, max_segments=LENGTH),
    "seqlens": functools.partial(seqlens_and_offsets, max_segments=LENGTH),
    "cross": lambda rows: seqlens_and_offsets(rows, LENGTH, partner_segment_ids=rows[..., 2:]),
    "row": functools.partial(cu_seqlens, max_segments=LENGTH),
    "own": functools.partial(cu_seqlens, max_segments=LENGTH, padding="own_segment"),
    "flat": functools.partial(cu_seqlens, max_segments=LENGTH, layout="flat", pad_tail=-1),
    "flat own": functools.partial(
        cu_seqlens, max_segments=LENGTH, layout="flat", padding="own_segment"
    ),
}
BY_ROW = ["seqlens", "cross", "row", "own"]


@st.composite
def decoder_and_encoder(draw):
    """Two sides of rows that share some of their ids, on different lengths."""
    decoder = draw(packed_rows())
    encoder = np.concatenate([draw(packed_rows()), np.zeros((len(decoder), 4), np.int32)], axis=1)
    for row in encoder:
        for segment in draw(st.lists(st.integers(1, LENGTH), max_size=4)):
            row[row == segment] = 0
    return decoder, encoder


# --- the offsets of the seed ------------------------------------------------------------------


def assert_seed_offsets_equal(rows, max_segments):
    result = build_packing_cu_seqlens(rows, max_segments=max_segments)
    offsets, longest, overflow = model_reference.cu_seqlens(rows.tolist(), max_segments)
    assert bool(result.overflow) == overflow
    if not overflow:
        assert result.cu_seqlens.tolist() == offsets
        assert int(result.max_seqlen) == longest
    assert result.cu_seqlens.shape == (len(rows) * max_segments + 1,)
    dtypes = [field.dtype for field in result]
    assert dtypes == [jnp.int32, jnp.int32, jnp.bool_]


@given(packed_rows(), st.sampled_from([3, LENGTH]))
def test_seed_offsets_equal_the_loop(rows, max_segments):
    assert_seed_offsets_equal(rows, max_segments)


def test_seed_offsets_of_hand_rows_equal_the_loop():
    for max_segments in (3, 12):
        assert_seed_offsets_equal(HAND_ROWS, max_segments)
    assert_seed_offsets_equal(HARD_ROWS, 16)


@pytest.mark.parametrize("max_segments", [3, 4])
def test_overflow_looks_at_each_row(max_segments):
    rows = np.array([[1, 2, 3, 4], [0, 0, 0, 0], [1, 1, 1, 1]])
    result = build_packing_cu_seqlens(rows, max_segments=max_segments)
    assert bool(result.overflow) == (max_segments == 3)


SEED_IDS = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]])
SEED_MASK = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def test_example_of_the_seed_readme():
    ids = np.where(SEED_MASK, SEED_IDS + 1, 0)
    result = build_packing_cu_seqlens(ids, max_segments=4)
    assert result.cu_seqlens.tolist() == [0, 5, 8, 12, 14, 18, 18, 18, 18]
    assert (int(result.max_seqlen), bool(result.overflow)) == (5, False)
    assert model_reference.seed_cu_seqlens(SEED_IDS, SEED_MASK) == ([0, 5, 8, 12, 14, 18], 5)
    masked = build_packing_cu_seqlens(SEED_IDS + 1, SEED_MASK.astype(bool), max_segments=4)
    assert masked.cu_seqlens.tolist() == result.cu_seqlens.tolist()


def test_seed_ids_used_as_they_stand_lose_a_sequence():
    result = build_packing_cu_seqlens(SEED_IDS, SEED_MASK, max_segments=4)
    assert result.cu_seqlens.tolist()[:4] == [0, 3, 5, 9]


@given(packed_rows())
def test_offsets_of_converted_seed_ids_are_those_of_the_seed(rows):
    real = (rows > 0).astype(np.int32)
    seed_ids = np.maximum(np.maximum.accumulate(rows, axis=1) - 1, 0)  # padding reuses the last id
    offsets, longest = model_reference.seed_cu_seqlens(seed_ids.tolist(), real.tolist())
    result = build_packing_cu_seqlens(from_seed_ids(seed_ids, real), max_segments=LENGTH)
    assert result.cu_seqlens.tolist()[: len(offsets)] == offsets
    assert int(result.max_seqlen) == longest


# --- lengths and starts -----------------------------------------------------------------------


def loop_seqlens(row, max_segments, fill=-1, partner=None):
    runs = model_reference.runs(row)
    if partner is not None:
        runs = [run for run in runs if row[run[0]] in partner]
    runs = runs[:max_segments]
    missing = [fill] * (max_segments - len(runs))
    lengths, starts = [stop - start for start, stop in runs], [start for start, _ in runs]
    return lengths + missing, [*starts, *missing, fill]


@given(packed_rows(), st.sampled_from([3, LENGTH]))
def test_seqlens_and_offsets_equal_the_loop(rows, max_segments):
    fill = 0 if max_segments == 3 else -1
    result = seqlens_and_offsets(rows, max_segments, fill=fill)
    assert [field.dtype for field in result] == [jnp.int32, jnp.int32]
    expected = [loop_seqlens(row, max_segments, fill) for row in rows.tolist()]
    assert result.seqlens.tolist() == [lengths for lengths, _ in expected]
    assert result.offsets.tolist() == [starts for _, starts in expected]


@pytest.mark.parametrize("max_segments", [2, 15, 16])
def test_seqlens_and_offsets_of_hard_rows_equal_the_loop(max_segments):
    result = seqlens_and_offsets(HARD_ROWS, max_segments)
    expected = [loop_seqlens(row, max_segments) for row in HARD_ROWS.tolist()]
    assert result.seqlens.tolist() == [lengths for lengths, _ in expected]
    assert result.offsets.tolist() == [starts for _, starts in expected]


@given(decoder_and_encoder())
def test_cross_seqlens_and_offsets_equal_the_loop(sides):
    for ids, partner in (sides, sides[::-1]):
        result = seqlens_and_offsets(ids, LENGTH, partner_segment_ids=partner)
        both = zip(ids.tolist(), partner.tolist(), strict=True)
        expected = [loop_seqlens(row, LENGTH, partner=set(other) - {0}) for row, other in both]
        assert result.seqlens.tolist() == [lengths for lengths, _ in expected]
        assert result.offsets.tolist() == [starts for _, starts in expected]


# --- what JAX's cuDNN call and TransformerEngine make of them ---------------------------------


def push_left(values, keep, fill):
    flat = values.ravel()
    kept = flat[keep(flat)]
    return np.concatenate([kept, np.full(flat.size - kept.size, fill, flat.dtype)])


def flat_starts(offsets, length):
    batch = np.arange(len(offsets))[:, None]
    return np.where(offsets >= 0, offsets + batch * length, offsets)


def jax_cudnn(seqlens, offsets, length):
    """What `_fix_seqlen_offsets` of JAX hands to cuDNN, but in tokens, not in elements."""
    starts = flat_starts(offsets, length)
    lengths = push_left(seqlens, lambda values: values >= 0, 0)
    return lengths, push_left(starts, lambda values: values >= 0, len(offsets) * length)


def transformer_engine(seqlens, offsets, length):
    """What `FusedAttnFwdPrimitive.impl` of TransformerEngine hands to cuDNN."""
    starts = flat_starts(offsets, length)
    lengths = push_left(seqlens, lambda values: values > 0, 0)
    return lengths, push_left(starts, lambda values: values >= 0, len(offsets) * length)


def visited(kernel, queries, keys, length, kv_length):
    """The pairs of segments that the kernel computes, in tokens of the flattened batch."""
    sides = [
        kernel(*(np.asarray(each) for each in side), of_side)
        for side, of_side in ((queries, length), (keys, kv_length))
    ]
    (q_lengths, q_starts), (k_lengths, k_starts) = sides
    slots = [slot for slot in range(len(q_lengths)) if q_lengths[slot] > 0]
    return [
        ((q_starts[slot], q_lengths[slot]), (k_starts[slot], k_lengths[slot])) for slot in slots
    ]


def runs_of(rows):
    """Return `(row, id)` -> (first token in the flattened batch, length)."""
    found = {}
    for b, row in enumerate(rows.tolist()):
        for start, stop in model_reference.runs(row):
            found[b, row[start]] = (b * len(row) + start, stop - start)
    return found


def self_pairs(rows):
    return [(run, run) for run in runs_of(rows).values()]


KERNELS = pytest.mark.parametrize("kernel", [jax_cudnn, transformer_engine])


@KERNELS
@given(rows=packed_rows())
def test_kernels_visit_exactly_the_segments(kernel, rows):
    side = seqlens_and_offsets(rows, LENGTH)
    assert visited(kernel, side, side, LENGTH, LENGTH) == self_pairs(rows)


@KERNELS
def test_kernels_visit_exactly_the_segments_of_hard_rows(kernel):
    side = seqlens_and_offsets(HARD_ROWS, 16)
    assert visited(kernel, side, side, 16, 16) == self_pairs(HARD_ROWS)


TWO_ROWS = np.stack(
    [np.repeat([1, 2, 3, 0], [5, 9, 3, 15]), np.repeat([1, 2, 3, 4], [4, 12, 7, 9])]
)


def filled_with_zero(rows, slots):
    lengths, starts = (np.asarray(each) for each in seqlens_and_offsets(rows, slots))
    return np.where(lengths < 0, 0, lengths), starts


def with_the_last_end(rows, slots):
    """Starts and the end of the last segment, as in TransformerEngine's docstring."""
    lengths, starts = (np.array(each) for each in seqlens_and_offsets(rows, slots))
    for row, start in zip(lengths, starts, strict=True):
        count = (row > 0).sum()
        start[count] = start[count - 1] + row[count - 1]
    return lengths, starts


def flash_style(rows, slots):
    lengths, _ = seqlens_and_offsets(rows, slots)
    return lengths, cu_seqlens(rows, slots).cu_seqlens


@pytest.mark.parametrize(
    ("kernel", "encode", "first_row", "second_row"),
    [
        (jax_cudnn, seqlens_and_offsets, True, True),
        (transformer_engine, seqlens_and_offsets, True, True),
        (jax_cudnn, filled_with_zero, True, False),
        (transformer_engine, filled_with_zero, True, True),
        (jax_cudnn, with_the_last_end, True, False),
        (transformer_engine, with_the_last_end, True, False),
        (jax_cudnn, flash_style, True, False),
        (transformer_engine, flash_style, True, False),
    ],
)
def test_other_encodings_break_the_rows_behind_the_first(kernel, encode, first_row, second_row):
    side = encode(TWO_ROWS, 6)
    pairs, expected = visited(kernel, side, side, 32, 32), self_pairs(TWO_ROWS)
    assert (pairs[:3] == expected[:3]) == first_row
    assert (pairs[3:] == expected[3:]) == second_row
    one = encode(TWO_ROWS[:1], 6)
    alone = visited(kernel, one, one, 32, 32)
    assert alone == expected[:3]  # nothing to see with a batch of one row


def te_from_ids(rows, slots):
    """TransformerEngine's own conversion of ids: `bincount` and `argwhere` of `slots` places."""
    lengths, starts = [], []
    for row in rows:
        lengths.append(np.bincount(row, minlength=slots + 1)[1 : slots + 1])
        first = np.flatnonzero((np.diff(row, prepend=0) != 0) & (row != 0))[: slots + 1]
        starts.append(np.append(first, [-1] * (slots + 1 - len(first))))
    return np.array(lengths), np.array(starts)


@KERNELS
def test_a_row_with_too_many_segments_leaves_the_others_alone(kernel):
    rows = TWO_ROWS[::-1].copy()
    expected = self_pairs(rows)[:3] + self_pairs(rows)[4:]
    side = seqlens_and_offsets(rows, 3)
    assert visited(kernel, side, side, 32, 32) == expected
    enough = te_from_ids(rows, 4)
    assert visited(transformer_engine, enough, enough, 32, 32) == self_pairs(rows)
    too_few = te_from_ids(rows, 3)
    assert visited(transformer_engine, too_few, too_few, 32, 32)[3:] != expected[3:]


def cross_pairs(decoder, encoder):
    keys = runs_of(encoder)
    return [(run, keys[name]) for name, run in runs_of(decoder).items() if name in keys]


@KERNELS
@given(sides=decoder_and_encoder())
def test_cross_attention_visits_the_shared_segments(kernel, sides):
    decoder, encoder = sides
    queries = seqlens_and_offsets(decoder, LENGTH, partner_segment_ids=encoder)
    keys = seqlens_and_offsets(encoder, LENGTH, partner_segment_ids=decoder)
    pairs = visited(kernel, queries, keys, LENGTH, LENGTH + 4)
    assert pairs == cross_pairs(decoder, encoder)


DECODER = np.array([[1, 1, 2, 2, 3, 3, 3, 0], [1, 1, 1, 2, 2, 0, 3, 3]], np.int32)
ENCODER = np.array([[1, 1, 1, 3, 0, 0], [0, 2, 2, 3, 3, 3]], np.int32)


def by_id(rows, slots):
    """Segment `i` in place `i - 1`, with length 0 and no start where it is missing."""
    lengths, starts = np.zeros((len(rows), slots), int), np.full((len(rows), slots + 1), -1)
    for (b, segment), (start, length) in runs_of(rows).items():
        lengths[b, segment - 1], starts[b, segment - 1] = length, start - b * rows.shape[1]
    return lengths, starts


@KERNELS
@pytest.mark.parametrize("encode", [by_id, seqlens_and_offsets])
def test_cross_attention_by_id_or_by_rank_pairs_the_wrong_segments(kernel, encode):
    queries, keys = encode(DECODER, 3), encode(ENCODER, 3)
    pairs = visited(kernel, queries, keys, 8, 6)
    assert not set(cross_pairs(DECODER, ENCODER)) <= set(pairs)


def attend(kernel, queries, keys, query, key, value, *, causal):
    """Attention over the visited segments, as cuDNN computes it; all other outputs are NaN."""
    (batch, length, heads, size), kv_length = query.shape, key.shape[1]
    group = heads // key.shape[2]
    flat = [x.astype(np.float64).reshape(-1, *x.shape[2:]) for x in (query, key, value)]
    result = np.full((batch * length, heads, size), np.nan)
    for (start, count), (k_start, k_count) in visited(kernel, queries, keys, length, kv_length):
        allowed = np.tril(np.ones((count, k_count))) if causal else np.ones((count, k_count))
        for head in range(heads):
            q = flat[0][start : start + count, head]
            k, v = (x[k_start : k_start + k_count, head // group] for x in flat[1:])
            scores = np.where(allowed, np.exp(q @ k.T / np.sqrt(size)), 0)
            result[start : start + count, head] = scores @ v / scores.sum(axis=1, keepdims=True)
    return result.reshape(query.shape)


@KERNELS
@pytest.mark.parametrize("causal", [False, True])
def test_emulated_attention_equals_each_sequence_alone(kernel, causal):
    qkv = attention_reference.random_qkv(HARD_ROWS)
    side = seqlens_and_offsets(HARD_ROWS, 16)
    result = attend(kernel, side, side, *qkv, causal=causal)
    expected = attention_reference.attend_alone(*qkv, HARD_ROWS, causal=causal)
    np.testing.assert_array_equal(np.isnan(result).any((2, 3)), HARD_ROWS == 0)
    assert np.nanmax(np.abs(result - expected)) < 1e-5


@KERNELS
def test_emulated_cross_attention_leaves_queries_without_keys_to_the_caller(kernel):
    qkv = attention_reference.random_qkv(DECODER, kv_length=ENCODER.shape[1])
    queries = seqlens_and_offsets(DECODER, 3, partner_segment_ids=ENCODER)
    keys = seqlens_and_offsets(ENCODER, 3, partner_segment_ids=DECODER)
    result = attend(kernel, queries, keys, *qkv, causal=False)
    bounds = kv_bounds(DECODER, ENCODER, causal=False)
    has_key = np.asarray(bounds.k_start < bounds.k_end)
    assert [int(row.sum()) for row in has_key] == [5, 4]
    np.testing.assert_array_equal(np.isnan(result).any((2, 3)), ~has_key)
    result = np.where(has_key[..., None, None], result, 0)
    expected = attention_reference.attend_alone(*qkv, DECODER, causal=False, kv_rows=ENCODER)
    assert np.abs(result - expected).max() < 1e-5


def test_the_emulation_is_what_the_installed_jax_does():
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    generator = np.random.default_rng(0)
    array = types.SimpleNamespace(shape=(3, 9, 1, 1))  # one element a token
    fix = jax.jit(lambda *sides: module._fix_seqlen_offsets(*sides, array, array))
    for _ in range(20):
        seqlens = generator.integers(-1, 4, (3, 5)).astype(np.int32)
        offsets = generator.integers(-1, 9, (3, 6)).astype(np.int32)
        found = fix(seqlens, seqlens, offsets, offsets)
        expected = jax_cudnn(seqlens, offsets, 9)
        for position, each in enumerate(found):
            assert each.ravel().tolist() == expected[position // 2].tolist()


# --- offsets in the style of FlashAttention ---------------------------------------------------


def pieces(row, own):
    """The runs of a row; with `own`, those of padding, too."""
    return model_reference.runs([segment + 1 for segment in row] if own else row)


def loop_offsets(runs, slots, tail):
    offsets = [0]
    for start, stop in runs:
        offsets.append(offsets[-1] + stop - start)
    return offsets + [offsets[-1] if tail == "last" else -1] * (slots + 1 - len(offsets))


def loop_row_offsets(row, max_segments, padding, tail):
    runs = pieces(row, padding == "own_segment")
    packed = all(stop == start for (_, stop), (start, _) in itertools.pairwise(runs))
    valid = len(runs) <= max_segments and packed and (not runs or runs[0][0] == 0)
    return loop_offsets(runs, max_segments, tail), len(runs), valid


SETTINGS = [(3, "repeat", "last"), (LENGTH, "repeat", -1), (3, "own_segment", -1)]
SETTINGS.append((LENGTH, "own_segment", "last"))


def assert_row_offsets_equal(rows, max_segments, padding, tail):
    found = cu_seqlens(rows, max_segments, padding=padding, pad_tail=tail)
    assert [field.dtype for field in found] == [jnp.int32, jnp.int32, jnp.bool_]
    assert found.cu_seqlens.shape == (len(rows), max_segments + 1)
    for b, row in enumerate(rows.tolist()):
        offsets, count, valid = loop_row_offsets(row, max_segments, padding, tail)
        assert (int(found.num_segments[b]), bool(found.valid[b])) == (count, valid)
        if valid:
            assert found.cu_seqlens[b].tolist() == offsets


def assert_flat_offsets_equal(rows, max_segments, padding, tail):
    found = cu_seqlens(rows, max_segments, layout="flat", padding=padding, pad_tail=tail)
    runs = [pieces(row, padding == "own_segment") for row in rows.tolist()]
    count = sum(map(len, runs))
    assert [field.dtype for field in found] == [jnp.int32, jnp.int32, jnp.bool_]
    assert found.num_segments.tolist() == [count]
    assert bool(found.valid) == all(len(row) <= max_segments for row in runs)
    slots = len(rows) * max_segments
    assert found.cu_seqlens.shape == (slots + 1,)
    if found.valid:
        expected = loop_offsets([run for row in runs for run in row], slots, tail)
        assert found.cu_seqlens.tolist() == expected
        if padding == "own_segment":
            assert max(expected) == rows.size


@given(packed_rows(), st.sampled_from(SETTINGS))
def test_row_offsets_equal_the_loop(rows, settings):
    assert_row_offsets_equal(rows, *settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_offsets_of_hand_rows_equal_the_loop(settings):
    assert_row_offsets_equal(HAND_ROWS, *settings)
    assert_flat_offsets_equal(HAND_ROWS, *settings)


@given(packed_rows(), st.sampled_from(SETTINGS))
def test_flat_offsets_equal_the_loop(rows, settings):
    assert_flat_offsets_equal(rows, *settings)


@given(packed_rows())
def test_flat_offsets_are_those_of_the_seed(rows):
    flat = cu_seqlens(rows, LENGTH, layout="flat")
    seed = build_packing_cu_seqlens(rows, max_segments=LENGTH)
    assert flat.cu_seqlens.tolist() == seed.cu_seqlens.tolist()


# --- shapes, dtypes, compilation --------------------------------------------------------------


def assert_equal_trees(result, expected):
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["cross", "row"])
def test_any_leading_dimensions_and_vmap(name):
    function, rows = FUNCTIONS[name], jnp.asarray(HAND_ROWS)
    expected = function(rows)
    deep = function(rows.reshape(2, 3, LENGTH))
    reshaped = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), expected)
    assert_equal_trees(deep, reshaped)
    assert_equal_trees(jax.vmap(function)(rows), expected)
    assert_equal_trees(function(rows[1]), jax.tree.map(lambda leaf: leaf[1], expected))


@pytest.mark.parametrize("name", ["seed", "flat own"])
def test_flat_forms_under_vmap_are_streams_of_one_row(name):
    function, rows = FUNCTIONS[name], jnp.asarray(HAND_ROWS)
    looped = [function(row) for row in rows]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    assert_equal_trees(jax.vmap(function)(rows), stacked)
    assert_equal_trees(function(rows[1]), function(rows[1:2]))


@pytest.mark.parametrize("name", ["flat"])
def test_flat_forms_join_all_leading_dimensions(name):
    rows = jnp.asarray(HAND_ROWS)
    assert_equal_trees(FUNCTIONS[name](rows.reshape(2, 3, LENGTH)), FUNCTIONS[name](rows))


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_on_an_explicit_mesh(name):
    """`jax.make_mesh` makes such meshes by default; they refuse operations of unclear sharding."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    expected = FUNCTIONS[name](jnp.asarray(HAND_ROWS))
    with jax.set_mesh(mesh):
        rows = jax.device_put(HAND_ROWS, NamedSharding(mesh, PartitionSpec("data")))
        result = FUNCTIONS[name](rows)
    assert all(leaf.sharding.spec[0] == "data" for leaf in jax.tree.leaves(result))
    assert_equal_trees(result, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_compilation_serves_all_batches(name):
    traces = []  # Python runs only while tracing

    @jax.jit
    def counted(rows):
        traces.append(rows.shape)
        return FUNCTIONS[name](rows)

    for rows in (HAND_ROWS, HAND_ROWS[::-1].copy(), np.zeros_like(HAND_ROWS)):
        jax.block_until_ready(counted(rows))
    assert len(traces) == 1
    jax.eval_shape(counted, HAND_ROWS[:3])
    assert len(traces) == 2  # the count can be two


@pytest.mark.parametrize(
    ("dtype", "names"), [("uint8", ["cross", "flat"]), ("int64", ["seed", "cross", "flat"])]
)
def test_ids_of_every_integer_dtype(dtype, names):
    for name in names:
        expected = FUNCTIONS[name](jnp.asarray(HAND_ROWS))
        with jax.enable_x64(dtype == "int64"):
            result = FUNCTIONS[name](jnp.asarray(HAND_ROWS, dtype))
        assert_equal_trees(result, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batches(name, shape):
    result = FUNCTIONS[name](jnp.zeros(shape, jnp.int32))
    offsets, rows = (result[1] if name in ("seqlens", "cross") else result[0]), np.prod(shape[:-1])
    slots = LENGTH + 1 if name in BY_ROW else int(rows) * LENGTH + 1
    assert offsets.shape == ((*shape[:-1], slots) if name in BY_ROW else (slots,))
    assert set(np.ravel(offsets)) <= {0, -1}
    if name in ("row", "own", "flat", "flat own"):
        assert np.all(result.valid)
        assert not np.any(result.num_segments)


def test_no_nan_on_the_way():
    with jax.debug_nans(True):
        for function in FUNCTIONS.values():
            jax.block_until_ready(function(jnp.asarray(HAND_ROWS)))


@pytest.mark.parametrize("name", ["seed", "row", "flat own"])
def test_no_square_of_memory(name):
    length = 4096
    rows = jax.ShapeDtypeStruct((2, length), jnp.int32)
    memory = jax.jit(FUNCTIONS[name]).lower(rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 100 * 2 * length


def test_as_many_segments_as_tokens_need_no_square_of_memory():
    length = 4096
    rows = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def cross(rows):
        return seqlens_and_offsets(rows, length, partner_segment_ids=rows)

    memory = jax.jit(cross).lower(rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 200 * 2 * length


# --- errors -----------------------------------------------------------------------------------

FLOATS, DEEP = np.ones((2, 4), np.float32), np.zeros((1, 1, 4), np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build_packing_cu_seqlens(DEEP, max_segments=2),
            r"^build_packing_cu_seqlens: segment_ids is int32 of shape \(1, 1, 4\), but it must be "
            r"integers \[B, L\] or \[L\]. Hint: .*vmap",
        ),
        (
            lambda: build_packing_cu_seqlens(HAND_ROWS, max_segments=0),
            r"^build_packing_cu_seqlens: max_segments = 0, but .* in \[1, 1048576\]. Hint:",
        ),
        (lambda: build_packing_cu_seqlens(HAND_ROWS, max_segments=2.5), "2.5 is not an integer"),
        (
            lambda: build_packing_cu_seqlens(HAND_ROWS, HAND_ROWS[0], max_segments=2),
            r"attention_mask is int32 of shape \(12,\), but it must be bool or integers of shape "
            r"\(6, 12\). Hint: pass 1 for real tokens",
        ),
        (lambda: seqlens_and_offsets(FLOATS, 2), "^seqlens_and_offsets: segment_ids is float32"),
        (
            lambda: seqlens_and_offsets(HAND_ROWS, 0),
            r"^seqlens_and_offsets: max_segments = 0, but .* in \[1, 1048576\]. Hint:",
        ),
        (
            lambda: seqlens_and_offsets(HAND_ROWS, 2, fill=1),
            r"^seqlens_and_offsets: fill = 1, but it must be in \[-2147483648, 0\]. Hint:",
        ),
        (
            lambda: seqlens_and_offsets(HAND_ROWS, 2, partner_segment_ids=FLOATS),
            "^seqlens_and_offsets: partner_segment_ids is float32 .*Hint:",
        ),
        (
            lambda: seqlens_and_offsets(HAND_ROWS, 2, partner_segment_ids=HAND_ROWS[:2]),
            r"partner_segment_ids has shape \(2, 12\), but segment_ids \(6, 12\). Hint: .*same row",
        ),
        (lambda: cu_seqlens(FLOATS, 2), "^cu_seqlens: segment_ids is float32 .*Hint:"),
        (lambda: cu_seqlens(HAND_ROWS, 2**21), "^cu_seqlens: max_segments = 2097152, but .*Hint:"),
        (
            lambda: cu_seqlens(HAND_ROWS, 2, layout="rows"),
            "^cu_seqlens: layout = 'rows' is not known. Hint: choose one of row, flat",
        ),
        (
            lambda: cu_seqlens(HAND_ROWS, 2, padding="last"),
            "^cu_seqlens: padding = 'last' is not known. Hint: choose one of repeat, own_segment",
        ),
        (
            lambda: cu_seqlens(HAND_ROWS, 2, pad_tail=0),
            "^cu_seqlens: pad_tail = 0 is not known. Hint: choose 'last' or -1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()


def test_errors_come_while_tracing():
    with pytest.raises(SeqpackError, match="cu_seqlens: segment_ids is float32"):
        jax.eval_shape(lambda x: cu_seqlens(x, 2), jax.ShapeDtypeStruct((2, 4), jnp.float32))
