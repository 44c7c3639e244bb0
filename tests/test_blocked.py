"""Blocked attention: equal to each segment alone, forward and backward, and without `[L, L]`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS, LENGTH, attend_alone, gradients_alone, random_qkv
from jax.sharding import PartitionSpec as P

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.blocked import blocked_attention
from seqpack_jax.model.segments import segment_info

# Encoder rows for HARD_ROWS: padding anywhere, segments without keys, keys without a query.
KV_ROWS = np.array(
    [
        [1, 1, 2, 2, 2, 2, 2, 3, 3, 0],
        [1, 0, 2, 2, 4, 4, 4, 5, 0, 0],
        [0, 0, 2, 3, 3, 3, 3, 3, 3, 3],
        [1] * 10,
        [1, 1, 1, 2, 2, 2, 0, 0, 0, 0],
        [0] * 10,
    ],
    np.int32,
)
SMALL = {"block_q": 4, "block_kv": 4}


@functools.partial(jax.jit, static_argnames=("scale", "block_q", "block_kv"))
def run_jitted(arrays, cotangent, info, **settings):
    def attend(*arrays):
        return blocked_attention(*arrays, info, **settings)

    output, pull = jax.vjp(attend, *arrays)
    return output, pull(cotangent)


def run(arrays, cotangent, info, **settings):
    """Return the output and the gradients to query, key and value."""
    return run_jitted(tuple(map(jnp.asarray, arrays)), jnp.asarray(cotangent), info, **settings)


def cotangent_of(query, seed=1):
    return np.random.default_rng(seed).normal(size=query.shape).astype(np.float32)


def assert_alone(result, arrays, cotangent, rows, bound=1e-5, **settings):
    """Hold output and gradients against each segment alone in float64."""
    output, gradients = result
    expected = attend_alone(*arrays, rows, **settings)
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, rtol=0, atol=bound)
    expected = gradients_alone(*arrays, cotangent, rows, **settings)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("blocks", "heads", "kv_heads"),
    [
        ((4, 4), 4, 2),
        ((5, 3), 3, 1),
        ((1, 1), 2, 1),
        ((64, 64), 4, 2),
        ((None, None), 4, 4),
    ],
)
def test_equals_each_segment_alone(blocks, heads, kv_heads):
    arrays = random_qkv(HARD_ROWS, heads, kv_heads)
    cotangent = cotangent_of(arrays[0])
    sizes = {"block_q": blocks[0], "block_kv": blocks[1]}
    result = run(arrays, cotangent, segment_info(HARD_ROWS), **sizes)
    assert_alone(result, arrays, cotangent, HARD_ROWS, causal=True)


@pytest.mark.parametrize(("window", "causal"), [(1, True), (3, True), (None, False), (3, False)])
def test_windows_and_both_directions(window, causal):
    arrays = random_qkv(HARD_ROWS)
    cotangent = cotangent_of(arrays[0])
    info = segment_info(HARD_ROWS, causal=causal, window=window)
    result = run(arrays, cotangent, info, block_q=4, block_kv=3)
    assert_alone(result, arrays, cotangent, HARD_ROWS, causal=causal, window=window)


@pytest.mark.parametrize("blocks", [(4, 4), (5, 3)])
def test_cross_attention_gives_zero_to_segments_without_keys(blocks):
    arrays = random_qkv(HARD_ROWS, kv_length=KV_ROWS.shape[1])
    cotangent = cotangent_of(arrays[0])
    info = segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, causal=False)
    result = run(arrays, cotangent, info, block_q=blocks[0], block_kv=blocks[1])
    assert_alone(result, arrays, cotangent, HARD_ROWS, causal=False, kv_rows=KV_ROWS)


def test_random_rows_longer_than_the_default_blocks():
    length, generator = 300, np.random.default_rng(3)
    lengths = generator.integers(1, 120, (2, 12))
    rows = np.zeros((2, length), np.int32)
    for row, parts in zip(rows, lengths, strict=True):
        ids = np.repeat(np.arange(1, 13), parts)[: length - 7]
        row[: len(ids)] = ids
    arrays = random_qkv(rows, heads=2, kv_heads=1)
    cotangent = cotangent_of(arrays[0])
    result = run(arrays, cotangent, segment_info(rows))
    assert_alone(result, arrays, cotangent, rows, causal=True)


def test_scale_is_that_of_the_scores():
    query, key, value = random_qkv(HARD_ROWS)
    cotangent, factor = cotangent_of(query), 0.3 * np.sqrt(query.shape[-1])
    info = segment_info(HARD_ROWS)
    output, (of_query, *others) = run((query, key, value), cotangent, info, scale=0.3, **SMALL)
    scaled = (query * factor, key, value)
    result = output, (of_query / np.float32(factor), *others)
    assert_alone(result, scaled, cotangent, HARD_ROWS, causal=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    # Rounding 4 to bfloat16 costs 1e-2 by itself, so cotangents are half the size of values.
    rows = HARD_ROWS
    arrays = [jnp.asarray(each, dtype) for each in random_qkv(rows)]
    cotangent = jnp.asarray(cotangent_of(arrays[0]) / 2, dtype)
    with jax.debug_nans(True):
        result = run(arrays, cotangent, segment_info(rows), **SMALL)
    assert all(each.dtype == dtype for each in jax.tree.leaves(result))
    arrays, cotangent = [np.asarray(each, np.float64) for each in arrays], np.asarray(cotangent)
    assert_alone(result, arrays, cotangent, rows, bound=1e-2, causal=True)


def test_large_scores_do_not_overflow():
    query, key, value = random_qkv(HARD_ROWS)
    arrays = (query * 100, key * 100, value)
    output, gradients = run(arrays, cotangent_of(query), segment_info(HARD_ROWS), **SMALL)
    expected = attend_alone(*arrays, HARD_ROWS, causal=True)
    # Rounding a score of 3e4 to float32 alone moves it by 2e-3.
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-2)
    assert all(np.isfinite(each).all() for each in gradients)


@pytest.mark.parametrize("cross", [False, True])
def test_nan_in_padding_reaches_nothing(cross):
    kv_rows = KV_ROWS if cross else HARD_ROWS
    query, key, value = random_qkv(HARD_ROWS, kv_length=kv_rows.shape[1])
    cotangent = cotangent_of(query)
    if cross:
        info = segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, causal=False)
    else:
        info = segment_info(HARD_ROWS)
    clean = run((query, key, value), cotangent, info, **SMALL)
    for array, rows in ((query, HARD_ROWS), (key, kv_rows), (value, kv_rows)):
        array[rows == 0] = np.nan
    cotangent[HARD_ROWS == 0] = np.nan
    output, gradients = run((query, key, value), cotangent, info, **SMALL)
    np.testing.assert_array_equal(output, clean[0])
    for found, wanted in zip(gradients, clean[1], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert (np.asarray(output)[HARD_ROWS == 0] == 0).all()


def test_blocks_outside_the_bounds_are_never_read():
    # NaN in real tokens: within a tile it would reach everyone, as 0 x NaN, as in dense attention.
    rows = np.array([[1] * 4 + [2] * 8 + [3] * 4, [1] * 8 + [2] * 8], np.int32)
    arrays = random_qkv(rows)
    cotangent = cotangent_of(arrays[0])
    clean = run(arrays, cotangent, segment_info(rows), **SMALL)
    for array in arrays:
        array[0, 4:12] = np.nan
    spoilt = run(arrays, cotangent, segment_info(rows), **SMALL)
    for found, wanted in zip(jax.tree.leaves(spoilt), jax.tree.leaves(clean), strict=True):
        assert np.isnan(found[0, 4:12]).all()
        np.testing.assert_array_equal(found[0, :4], wanted[0, :4])
        np.testing.assert_array_equal(found[0, 12:], wanted[0, 12:])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_causality_and_windows_skip_blocks_too():
    rows = np.ones((2, 16), np.int32)
    query, key, value = random_qkv(rows)
    cotangent = cotangent_of(query)
    info = segment_info(rows, window=4)
    clean, _ = run((query, key, value), cotangent, info, **SMALL)
    value[:, :4] = value[:, 12:] = np.nan
    spoilt, _ = run((query, key, value), cotangent, info, **SMALL)
    np.testing.assert_array_equal(spoilt[:, 8:12], clean[:, 8:12])
    assert np.isnan(spoilt[:, :8]).all()
    assert np.isnan(spoilt[:, 12:]).all()


@pytest.mark.parametrize("cross", [False, True])
def test_debug_nans_finds_none(cross):
    settings = {"kv_segment_ids": KV_ROWS, "causal": False} if cross else {}
    arrays = random_qkv(HARD_ROWS, kv_length=KV_ROWS.shape[1] if cross else LENGTH)
    with jax.debug_nans(True):
        info = segment_info(HARD_ROWS, **settings)
        output, gradients = run(arrays, cotangent_of(arrays[0]), info, **SMALL)
    assert all(np.isfinite(each).all() for each in (output, *gradients))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0)])
def test_nothing_to_attend(shape):
    rows = np.zeros(shape, np.int32)
    query, key, value = random_qkv(rows)
    output, gradients = run((query, key, value), query, segment_info(rows))
    assert output.shape == query.shape
    for found, array in zip(gradients, (query, key, value), strict=True):
        assert found.shape == array.shape


def test_no_keys_at_all():
    rows = np.ones((2, 3), np.int32)
    query, key, value = random_qkv(rows)
    info = segment_info(rows, kv_segment_ids=rows[:, :0], causal=False)
    output, gradients = run((query, key[:, :0], value[:, :0]), cotangent_of(query), info)
    assert not np.any(output)
    assert not np.any(gradients[0])


def test_vmap_over_all_arrays():
    arrays = random_qkv(HARD_ROWS)
    cotangent = cotangent_of(arrays[0])
    pairs = [each.reshape(3, 2, *each.shape[1:]) for each in (*arrays, cotangent, HARD_ROWS)]

    def attend(query, key, value, ids):
        return blocked_attention(query, key, value, segment_info(ids), **SMALL)

    @jax.jit
    def both(query, key, value, cotangent, ids):
        output, pull = jax.vjp(lambda *qkv: jax.vmap(attend)(*qkv, ids), query, key, value)
        return output, pull(cotangent)

    result = jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:]), both(*pairs))
    assert_alone(result, arrays, cotangent, HARD_ROWS, causal=True)


def test_vmap_over_queries_that_share_keys_adds_up_the_gradients():
    query, key, value = random_qkv(HARD_ROWS)
    cotangent = cotangent_of(query)
    queries = [query, 2 * query]

    @jax.jit
    def both(queries, key):
        def attend(key):
            each = functools.partial(blocked_attention, info=segment_info(HARD_ROWS), **SMALL)
            return jax.vmap(each, (0, None, None))(queries, key, jnp.asarray(value))

        output, pull = jax.vjp(attend, key)
        return output, pull(jnp.stack([cotangent, cotangent]))[0]

    output, of_key = both(jnp.stack(queries), key)
    expected = [attend_alone(each, key, value, HARD_ROWS, causal=True) for each in queries]
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)
    expected = [
        gradients_alone(each, key, value, cotangent, HARD_ROWS, causal=True)[1] for each in queries
    ]
    np.testing.assert_allclose(of_key, sum(expected), rtol=0, atol=1e-5)


def test_checkpoint_and_scan_over_layers():
    x = jnp.asarray(random_qkv(HARD_ROWS)[0])
    info = segment_info(HARD_ROWS)
    weights = np.random.default_rng(2).normal(size=(2, 8, 8)).astype(np.float32) / 4

    def layer(x, weight):
        hidden = x @ weight
        return x + blocked_attention(hidden, hidden, x, info, **SMALL), None

    @jax.jit
    def scanned(x, weights):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).mean()

    @jax.jit
    def unrolled(x, weights):
        for weight in weights:
            x, _ = layer(x, weight)
        return (x**2).mean()

    found = jax.value_and_grad(scanned, (0, 1))(x, weights)
    wanted = jax.value_and_grad(unrolled, (0, 1))(x, weights)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted[1][1]).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "check_vma", "kv_heads"),
    [("Auto", True, 2), ("Auto", True, 1), ("Auto", False, 2), ("Explicit", True, 1)],
)
def test_shard_map_over_rows_and_heads(kind, check_vma, kv_heads):
    types = (jax.sharding.AxisType[kind],) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=types)
    arrays = random_qkv(HARD_ROWS, kv_heads=kv_heads)
    cotangent = cotangent_of(arrays[0])
    split = P("rows", None, "heads", None)
    kv_split = split if kv_heads == 2 else P("rows", None, None, None)  # or one for all devices

    def local(query, key, value, ids):
        return blocked_attention(query, key, value, segment_info(ids), **SMALL)

    specs = (split, kv_split, kv_split, P("rows", None))
    attend = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=check_vma)

    @jax.jit
    def both(query, key, value, ids, cotangent):
        output, pull = jax.vjp(lambda *qkv: attend(*qkv, ids), query, key, value)
        return output, pull(cotangent)

    placed = [
        jax.device_put(each, jax.sharding.NamedSharding(mesh, spec))
        for each, spec in zip((*arrays, HARD_ROWS, cotangent), (*specs, split), strict=True)
    ]
    assert_alone(both(*placed), arrays, cotangent, HARD_ROWS, causal=True)


def test_one_compilation_for_different_segments():
    traced = []

    @jax.jit
    def attend(query, key, value, ids):
        traced.append(ids.shape)
        return blocked_attention(query, key, value, segment_info(ids), **SMALL)

    query, key, value = random_qkv(HARD_ROWS[:2])
    for rows in (HARD_ROWS[:2], HARD_ROWS[2:4], HARD_ROWS[4:]):
        output = attend(query, key, value, rows)
        expected = attend_alone(query, key, value, rows, causal=True)
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)
    assert len(traced) == 1


def compiled_gradient(length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

    def loss(query, key, value, ids):
        return blocked_attention(query, key, value, segment_info(ids)).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return step.lower(shape, shape, shape, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()


def test_memory_grows_with_the_length_and_no_array_is_square():
    length = 4096
    short, long = compiled_gradient(length // 4), compiled_gradient(length)
    small, large = (each.memory_analysis().temp_size_in_bytes for each in (short, long))
    assert large < 4.2 * small
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", long.as_text())
    sizes = [np.prod(list(map(int, shape.split(",")))) for shape in shapes]
    assert length * 2 * 8 <= max(sizes) < length * length / 16


def fails(problem, *arrays, info=None, **settings):
    info = segment_info(HARD_ROWS) if info is None else info
    with pytest.raises(SeqpackError, match=re.escape(problem)) as caught:
        blocked_attention(*arrays, info, **settings)
    assert str(caught.value).startswith("blocked_attention: ")


def test_errors_say_what_does_not_fit():
    query, key, value = map(jnp.asarray, random_qkv(HARD_ROWS))
    fails("query is float32 of shape (16, 4, 8)", query[0], key, value)
    fails("value is int32 of shape (6, 16, 2, 8)", query, key, value.astype(jnp.int32))
    mixed = "query is float32, key bfloat16, value float32"
    fails(mixed, query, key.astype(jnp.bfloat16), value)
    fails("do not fit", query[:, :, :3], key, value)
    fails("do not fit", query, key, value[..., :4])
    fails("do not fit", query, key[:3], value[:3])
    fails("do not fit", query, key[:, :, :0], value[:, :, :0])
    ids = "query has shape (6, 16, 4, 8), but its segment ids (1, 16)"
    fails(ids, query, key, value, info=segment_info(HARD_ROWS[:1]))
    ids = "key has shape (6, 16, 2, 8), but its segment ids (6, 10)"
    cross = segment_info(HARD_ROWS, kv_segment_ids=KV_ROWS, causal=False)
    fails(ids, query, key, value, info=cross)
    fails("block_q = 0, but it must be", query, key, value, block_q=0)
    fails("block_kv = 1.5 is not an integer", query, key, value, block_kv=1.5)


def test_refuses_what_bounds_cannot_say():
    query, key, value = map(jnp.asarray, random_qkv(HARD_ROWS))
    moved = segment_info(HARD_ROWS, segment_info(HARD_ROWS).positions, contiguous=False)
    with pytest.raises(SeqpackError, match="contiguous"):
        blocked_attention(query, key, value, moved)


def test_refuses_another_description():
    query, key, value = map(jnp.asarray, random_qkv(HARD_ROWS))
    fails("info is a", query, key, value, info=jnp.asarray(HARD_ROWS))


def test_forward_mode_is_an_error_not_a_wrong_number():
    arrays = tuple(map(jnp.asarray, random_qkv(HARD_ROWS)))
    attend = functools.partial(blocked_attention, info=segment_info(HARD_ROWS))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(attend, arrays, arrays)
