import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.reductions import gather_last, segment_mean, segment_sum, unpack_segments

LENGTH = HARD_ROWS.shape[1]
SEGMENTS = 16  # as many as the last row holds
FUNCTIONS = [segment_sum, segment_mean, gather_last, unpack_segments]


# --- slow and obvious ---------------------------------------------------------------------------


def segments_of(values, row, max_segments):
    """Return the list of the values of each slot, in float64, empty where there is no segment."""
    slots = [[] for _ in range(max_segments)]
    for value, segment in zip(np.asarray(values, np.float64), row, strict=True):
        if 1 <= segment <= max_segments:
            slots[segment - 1].append(value)
    return slots


def oracle(function, values, rows, max_segments, max_seq_len=None):
    """Return what `function` must, for values `[B, L, ...]`, slot by slot."""
    features = values.shape[2:]
    shape = {unpack_segments: (max_seq_len or rows.shape[1], *features)}.get(function, features)
    result = np.zeros((len(rows), max_segments, *shape))
    for b, row in enumerate(rows):
        for slot, found in enumerate(segments_of(values[b], row, max_segments)):
            if not found:
                continue
            if function is segment_sum:
                result[b, slot] = np.sum(found, axis=0)
            elif function is segment_mean:
                result[b, slot] = np.mean(found, axis=0)
            elif function is gather_last:
                result[b, slot] = found[-1]
            else:
                kept = found[: shape[0]]
                result[b, slot, : len(kept)] = kept
    return result


@functools.partial(jax.jit, static_argnames=("max_segments",))
def all_four(values, rows, max_segments):
    """Return the results of all functions, at the price of one compilation."""
    return [function(values, rows, max_segments) for function in FUNCTIONS]


def sums_of_squares(values, rows, max_segments):
    # The square has the gradient 2 x: a NaN that was only hidden in the result comes back.
    results = all_four(values, rows, max_segments)
    return [jnp.sum(each**2, axis=tuple(range(1, each.ndim))) for each in results]


@functools.partial(jax.jit, static_argnames=("max_segments",))
def squares_and_gradients(values, rows, max_segments):
    """Return for each function the sum of squares of each row, and its gradient."""
    totals, pull = jax.vjp(lambda values: sums_of_squares(values, rows, max_segments), values)
    zeros = [jnp.zeros_like(each) for each in totals]
    one = [[*zeros[:i], jnp.ones_like(zeros[i]), *zeros[i + 1 :]] for i in range(len(zeros))]
    return totals, [pull(each)[0] for each in one]


def random_values(rows, features=(), seed=0):
    return np.random.default_rng(seed).normal(size=(*rows.shape, *features)).astype(np.float32)


@st.composite
def packed_rows(draw, rows=3, length=12):
    """Segment ids `[rows, length]`: segments in order, padding anywhere between them."""
    result = np.zeros((rows, length), np.int32)
    for row in result:
        start = segment = 0
        for size, real in draw(st.lists(st.tuples(st.integers(1, length), st.booleans()))):
            segment += real
            row[start : start + size] = segment if real else 0
            start += size
            if start >= length:
                break
    return result


# --- equal to the loops -------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "max_segments"), [((), 1), ((2,), 3), ((2, 3), SEGMENTS + 4)])
def test_equals_the_loop_on_hard_rows(features, max_segments):
    values = random_values(HARD_ROWS, features)
    for function, result in zip(FUNCTIONS, all_four(values, HARD_ROWS, max_segments), strict=True):
        assert result.dtype == jnp.float32
        expected = oracle(function, values, HARD_ROWS, max_segments)
        np.testing.assert_allclose(result, expected, atol=1e-5)
        assert result.shape == expected.shape


@settings(max_examples=50)
@given(rows=packed_rows())
def test_equals_the_loop_on_random_rows(rows):
    values = random_values(rows)
    for function, result in zip(FUNCTIONS, all_four(values, rows, 4), strict=True):
        np.testing.assert_allclose(result, oracle(function, values, rows, 4), atol=1e-5)


@pytest.mark.parametrize("max_seq_len", [1, 3, LENGTH + 5])
def test_unpacked_rows_are_cut_or_filled_up(max_seq_len):
    values = random_values(HARD_ROWS, (2,))
    result = unpack_segments(values, HARD_ROWS, 5, max_seq_len=max_seq_len)
    np.testing.assert_array_equal(
        result, oracle(unpack_segments, values, HARD_ROWS, 5, max_seq_len).astype(np.float32)
    )


def test_by_hand():
    row = np.array([1, 1, 0, 2, 2, 2, 0])
    values = np.array([1, 2, 9, 3, 4, 8, 9])
    assert segment_sum(values, row, 3).tolist() == [3, 15, 0]
    assert segment_mean(values, row, 3).tolist() == [1.5, 5, 0]
    assert gather_last(values, row, 3).tolist() == [2, 8, 0]
    assert unpack_segments(values, row, 2, 4).tolist() == [[1, 2, 0, 0], [3, 4, 8, 0]]


def test_lengths_are_sums_of_a_mask():
    lengths = segment_sum(HARD_ROWS > 0, HARD_ROWS, SEGMENTS)
    assert lengths.dtype == jnp.int32
    for row, found in zip(HARD_ROWS, lengths, strict=True):
        assert found.tolist() == np.bincount(row, minlength=SEGMENTS + 1)[1:].tolist()


def test_segments_over_the_limit_are_dropped_and_change_nothing():
    values = random_values(HARD_ROWS, (2,))
    all_slots, three = (all_four(values, HARD_ROWS, slots) for slots in (SEGMENTS, 3))
    for result, expected in zip(three, all_slots, strict=True):
        np.testing.assert_array_equal(result, expected[:, :3])


def test_sums_go_by_id_in_any_order():
    values = random_values(HARD_ROWS, (2,))
    order = np.random.default_rng(3).permutation(LENGTH)
    shuffled = all_four(values[:, order], HARD_ROWS[:, order], SEGMENTS)
    for result, expected in zip(
        shuffled[:2], all_four(values, HARD_ROWS, SEGMENTS)[:2], strict=True
    ):
        np.testing.assert_allclose(result, expected, atol=1e-6)


# --- gradients and NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_equal_the_transpose_of_the_loop(function):
    rows, slots, features = HARD_ROWS, 5, (2,)
    values = random_values(rows, features)
    shape = function(values, rows, slots).shape
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def dot(values):
        return jnp.sum(function(values, rows, slots) * cotangent)

    expected = np.zeros(values.shape)
    for b, i in np.ndindex(rows.shape):  # all are linear: probe them with one token at a time
        probe = np.zeros(values.shape)
        probe[b, i] = 1
        weighted = oracle(function, probe, rows, slots) * cotangent
        axes = tuple(range(weighted.ndim - len(features)))
        expected[b, i] = weighted.sum(axis=axes)
    np.testing.assert_allclose(jax.jit(jax.grad(dot))(values), expected, atol=1e-5)


def test_nan_in_padding_reaches_neither_results_nor_gradients():
    values = random_values(HARD_ROWS, (2,))
    junk = np.array([np.nan, np.inf], np.float32)
    dirty = np.where(HARD_ROWS[..., None] > 0, values, junk)
    clean = squares_and_gradients(values, HARD_ROWS, SEGMENTS)
    for result, expected in zip(
        jax.tree.leaves(squares_and_gradients(dirty, HARD_ROWS, SEGMENTS)),
        jax.tree.leaves(clean),
        strict=True,
    ):
        np.testing.assert_array_equal(result, expected)
    for gradient in clean[1]:
        assert gradient.any()
        assert not gradient[HARD_ROWS == 0].any()


def test_nan_in_a_segment_stays_in_its_segment():
    values = random_values(HARD_ROWS, (2,))
    values[0, 7] = np.nan  # the middle of segment 2
    values[0, 12] = np.nan  # its last token
    for each in all_four(values, HARD_ROWS, SEGMENTS):
        result = np.array(each)
        assert np.isnan(result[0, 1]).any()
        result[0, 1] = 0
        assert np.isfinite(result).all()


def test_debug_nans_finds_nothing_in_padding():
    with jax.debug_nans(True):
        for rows in (np.zeros((2, 4), np.int32), np.array([[1, 1, 0, 0], [0, 0, 0, 1]], np.int32)):
            values = np.where(rows > 0, np.float32(1), np.float32(np.nan))
            for result in jax.tree.leaves(squares_and_gradients(values, rows, 3)):
                assert np.isfinite(result).all()
                assert bool(np.any(result)) == bool(rows.any())


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint8])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtype_of_the_result(function, dtype):
    values = jax.ShapeDtypeStruct(HARD_ROWS.shape, dtype)
    expected = jnp.float32
    if function is not segment_mean or jnp.issubdtype(dtype, jnp.floating):
        expected = dtype
    result = jax.eval_shape(functools.partial(function, max_segments=2), values, HARD_ROWS)
    assert result.dtype == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_added_up_in_float32(dtype):
    rows = np.repeat([[1, 2]], [4000, 96], axis=1)
    values = jnp.asarray(np.random.default_rng(0).uniform(1, 2, rows.shape), dtype)
    for function in (segment_sum, segment_mean):  # a bfloat16 sum of ones stops at 256
        result = np.asarray(function(values, rows, 3), np.float64)
        expected = oracle(function, np.asarray(values, np.float32), rows, 3)
        np.testing.assert_allclose(result, expected, rtol=1e-2)


@pytest.mark.parametrize("function", [gather_last, unpack_segments])
def test_bool_is_moved_as_it_is(function):
    values = HARD_ROWS % 2 == 0
    result = function(values, HARD_ROWS, SEGMENTS)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, oracle(function, values, HARD_ROWS, SEGMENTS) > 0)


def test_ids_of_a_dtype_that_does_not_hold_the_limit():
    values = random_values(HARD_ROWS, (2,))
    expected = all_four(values, HARD_ROWS, SEGMENTS)
    for result, each in zip(
        all_four(values, HARD_ROWS.astype(np.uint8), 300), expected, strict=True
    ):
        np.testing.assert_array_equal(result[:, :SEGMENTS], each)
        assert not result[:, SEGMENTS:].any()


# --- how they compile ---------------------------------------------------------------------------


def test_one_compilation_serves_all_batches():
    traces = 0

    @jax.jit
    def counted(values, rows):
        nonlocal traces
        traces += 1
        return all_four(values, rows, 3)

    for rows in (HARD_ROWS, HARD_ROWS[::-1], np.zeros_like(HARD_ROWS)):
        counted(random_values(rows, (2,)), rows)
    assert traces == 1


def test_any_leading_axes():
    values = random_values(HARD_ROWS, (2,))
    rows = HARD_ROWS.reshape(2, 3, LENGTH)
    for batch, deep, one, mapped, none in zip(
        all_four(values, HARD_ROWS, 3),
        all_four(values.reshape(*rows.shape, 2), rows, 3),
        all_four(values[1], HARD_ROWS[1], 3),
        jax.vmap(functools.partial(all_four, max_segments=3))(values, HARD_ROWS),
        all_four(values[:0], HARD_ROWS[:0], 3),
        strict=True,
    ):
        np.testing.assert_array_equal(deep, batch.reshape(2, 3, *batch.shape[1:]))
        np.testing.assert_array_equal(one, batch[1])
        np.testing.assert_array_equal(mapped, batch)
        assert none.shape == (0, *batch.shape[1:])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_four_devices_need_no_communication(axis_type):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(axis_type,))
    rows = np.concatenate([HARD_ROWS, HARD_ROWS[:2]])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    values = random_values(rows, (2,))
    sharded = jax.device_put((values, rows), sharding)
    with jax.set_mesh(mesh):
        step = jax.jit(squares_and_gradients, static_argnums=2, out_shardings=sharding)
        compiled = step.lower(*sharded, 3).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    for found, expected in zip(
        jax.tree.leaves(compiled(*sharded)),
        jax.tree.leaves(squares_and_gradients(values, rows, 3)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_no_array_of_tokens_times_segments():
    rows = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    values = jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    compiled = segment_sum.lower(values, rows, 512).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 8 < 4096 * 512 / 4


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors(function):
    name, values = function.__name__, random_values(HARD_ROWS)
    with pytest.raises(SeqpackError, match=f"^{name}: segment_ids is float32.*Hint:"):
        function(values, values, 4)
    message = rf"^{name}: values has shape \(16,\), but segment_ids has shape \(6, 16\). Hint:"
    with pytest.raises(SeqpackError, match=message):
        function(values[0], HARD_ROWS, 4)
    with pytest.raises(SeqpackError, match=f"^{name}: max_segments = 0, but it must be in .*Hint"):
        function(values, HARD_ROWS, 0)
    with pytest.raises(SeqpackError, match=f"^{name}: max_segments = 1.5 is not an integer"):
        function(values, HARD_ROWS, 1.5)


def test_error_of_the_length_of_new_rows():
    with pytest.raises(
        SeqpackError, match=r"^unpack_segments: max_seq_len = 0, but it must be in \["
    ):
        unpack_segments(HARD_ROWS, HARD_ROWS, 2, max_seq_len=0)
