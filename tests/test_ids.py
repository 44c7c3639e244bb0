"""Ids of tokens, and the layers beside attention that need them: equal to each sequence alone."""

import functools

import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import pytest
from attention_reference import HARD_ROWS
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from packed_rows import HAND_ROWS, LENGTH, packed_rows

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.ids import (
    from_seed_ids,
    monotone_segment_ids,
    num_segments,
    overflow,
    positions_from_segment_ids,
    segment_starts,
    shift_mask,
    valid_tokens,
)

FUNCTIONS = {
    "positions": positions_from_segment_ids,
    "from_seed": from_seed_ids,
    "starts": segment_starts,
    "valid": valid_tokens,
    "count": num_segments,
    "overflow": functools.partial(overflow, max_segments=3),
    "monotone": monotone_segment_ids,
    "shift": functools.partial(shift_mask, k=2),
    "ahead": functools.partial(shift_mask, k=-1),
}


# --- loops ------------------------------------------------------------------------------------


def loop_starts(row):
    starts = [start for start, _ in model_reference.runs(row)]
    return [token in starts for token in range(len(row))]


def loop_monotone(row):
    starts, result, count = loop_starts(row), [], 0
    for token, segment in enumerate(row):
        count += starts[token] or segment == 0
        result.append(count)
    return result


def loop_shift(row, k):
    result = []
    for token in range(len(row)):
        other = token - k
        inside = any(
            start <= token < stop and start <= other < stop
            for start, stop in model_reference.runs(row)
        )
        result.append(inside)
    return result


LOOPS = {
    "positions": model_reference.positions,
    "starts": loop_starts,
    "valid": lambda row: [segment > 0 for segment in row],
    "count": lambda row: len(model_reference.runs(row)),
    "overflow": lambda row: len(model_reference.runs(row)) > 3,
    "monotone": loop_monotone,
    "shift": functools.partial(loop_shift, k=2),
    "ahead": functools.partial(loop_shift, k=-1),
}
DTYPES = dict.fromkeys(LOOPS, np.int32) | dict.fromkeys(
    ["starts", "valid", "overflow", "shift", "ahead"], np.bool_
)


@pytest.mark.parametrize("name", LOOPS)
@given(rows=packed_rows())
def test_random_rows_equal_the_loop(name, rows):
    result = FUNCTIONS[name](rows)
    assert result.dtype == DTYPES[name]
    assert result.tolist() == [LOOPS[name](row) for row in rows.tolist()]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("rows", [HAND_ROWS, HARD_ROWS], ids=["hand", "hard"])
def test_hand_rows_equal_the_loop(name, rows):
    assert FUNCTIONS[name](rows).tolist() == [LOOPS[name](row) for row in rows.tolist()]


@given(packed_rows())
def test_monotone_ids_allow_the_same_real_pairs(rows):
    ids = np.asarray(monotone_segment_ids(rows))
    assert (np.diff(ids) >= 0).all()
    assert (ids[:, :1] == 1).all()
    same = ids[:, :, None] == ids[:, None, :]
    alone = np.eye(LENGTH, dtype=bool)[None]
    real = rows > 0
    pairs = np.where(real[:, :, None], rows[:, :, None] == rows[:, None, :], alone)
    np.testing.assert_array_equal(same, pairs)


@pytest.mark.parametrize("k", [0, 1, 3, LENGTH - 1, LENGTH, 2**31 - 1, -3, -LENGTH, -(2**31)])
def test_shift_mask_of_any_reach(k):
    expected = [loop_shift(row, k) for row in HAND_ROWS.tolist()]
    assert shift_mask(HAND_ROWS, k).tolist() == expected


@pytest.mark.parametrize("max_segments", [3, 4])
def test_overflow_begins_behind_the_last_place(max_segments):
    rows = np.array([[1, 2, 3, 4], [0, 0, 0, 0], [1, 0, 2, 2]])
    assert overflow(rows, max_segments).tolist() == [max_segments == 3, False, False]


# --- the seed ---------------------------------------------------------------------------------

SEED_IDS = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]])
SEED_MASK = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def test_example_of_the_seed_readme():
    ids = np.where(SEED_MASK, SEED_IDS + 1, 0)
    np.testing.assert_array_equal(from_seed_ids(SEED_IDS, SEED_MASK), ids)


@given(packed_rows())
def test_from_seed_ids_inverts_the_seed_convention(rows):
    real = (rows > 0).astype(np.int32)
    seed_ids = np.maximum(np.maximum.accumulate(rows, axis=1) - 1, 0)  # padding reuses the last id
    ids = from_seed_ids(seed_ids, real)
    assert ids.dtype == jnp.int32
    dense = [model_reference.runs(row) for row in rows.tolist()]
    assert [model_reference.runs(row) for row in ids.tolist()] == dense
    assert [sorted(set(row) - {0}) for row in ids.tolist()] == [
        list(range(1, len(row) + 1)) for row in dense
    ]


def test_from_seed_ids_without_mask_and_with_a_cut():
    assert from_seed_ids(np.array([0, 0, 1, 7, 7])).tolist() == [1, 1, 2, 3, 3]
    assert from_seed_ids(np.array([-1, 0, 0]), np.array([0, 1, 1])).tolist() == [0, 1, 1]
    assert from_seed_ids(np.array([0, 0, 0]), np.array([1, 0, 1])).tolist() == [1, 0, 2]


# --- layers that mix tokens: outputs and gradients equal to each sequence alone ----------------
# A layer is `layer(weights, x, ids)` over one row `[L, C]`.  Its other form, `alone(weights, x)`,
# is the plain layer over one whole sequence: a loop over its tokens, in NumPy.

WIDTH = 4


def join(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]


def parallel_scan(weights, x, ids):
    """Mamba's recurrence by `lax.associative_scan`."""
    decay = jnp.where(segment_starts(ids)[:, None], 0.0, jax.nn.sigmoid(x @ weights[0]))
    return jax.lax.associative_scan(join, (decay, x @ weights[1]))[1]


def sequential_scan(weights, x, ids):
    """Mamba's recurrence by `lax.scan`."""

    def step(state, token):
        decay, value, start = token
        state = decay * jnp.where(start, 0.0, state) + value
        return state, state

    tokens = jax.nn.sigmoid(x @ weights[0]), x @ weights[1], segment_starts(ids)
    return jax.lax.scan(step, jnp.zeros(x.shape[1], x.dtype), tokens)[1]


def scan_alone(weights, x):
    state, result = np.zeros(WIDTH), []
    for token in x:
        state = state / (1 + np.exp(-token @ weights[0])) + token @ weights[1]
        result.append(state)
    return np.stack(result)


def backward_scan(weights, x, ids):
    """The same recurrence from right to left."""
    return sequential_scan(weights, x[::-1], ids[::-1])[::-1]


def backward_scan_alone(weights, x):
    return scan_alone(weights, x[::-1])[::-1]


def recurrent(weights, x, ids):
    """Elman's network (1990)."""

    def step(state, token):
        value, start = token
        state = jnp.tanh(value + jnp.where(start, 0.0, state) @ weights[0])
        return state, state

    state = jnp.zeros(x.shape[1], x.dtype)
    return jax.lax.scan(step, state, (x @ weights[1], segment_starts(ids)))[1]


def recurrent_alone(weights, x):
    state, result = np.zeros(WIDTH), []
    for token in x:
        state = np.tanh(token @ weights[1] + state @ weights[0])
        result.append(state)
    return np.stack(result)


def linear_attention(weights, x, ids):
    """Linear attention (Katharopoulos, 2020): sums of outer products, read by the query."""
    query, key = x @ weights[0], x @ weights[1]
    keep = jnp.where(segment_starts(ids), 0.0, 1.0)[:, None, None]
    outer = key[:, :, None] * x[:, None, :]
    return jnp.einsum("lk,lkv->lv", query, jax.lax.associative_scan(join, (keep, outer))[1])


def linear_attention_alone(weights, x):
    state, result = np.zeros((WIDTH, WIDTH)), []
    for token in x:
        state = state + np.outer(token @ weights[1], token)
        result.append((token @ weights[0]) @ state)
    return np.stack(result)


def shifted(x, ids, k):
    return jnp.where(shift_mask(ids, k)[:, None], jnp.roll(x, k, axis=0), 0.0)


def token_shift(weights, x, ids):
    """The token shift of RWKV: part of each channel from the token before."""
    return x @ weights[0] + shifted(x, ids, 1) @ weights[1]


def token_shift_alone(weights, x):
    before = [np.zeros(WIDTH), *x[:-1]]
    return np.stack([a @ weights[0] + b @ weights[1] for a, b in zip(x, before, strict=True)])


def causal_convolution(weights, x, ids):
    """A causal depthwise convolution of width 4, as in Mamba."""
    return sum(shifted(x, ids, k) * weights[0, k][None] for k in range(4))


def causal_convolution_alone(weights, x):
    result = np.zeros_like(x)
    for token in range(len(x)):
        for k in range(min(4, token + 1)):
            result[token] += x[token - k] * weights[0, k]
    return result


def centred_convolution(weights, x, ids):
    """A depthwise convolution over the token before, the token and the token behind."""
    return sum(shifted(x, ids, k) * weights[0, k + 1][None] for k in (-1, 0, 1))


def centred_convolution_alone(weights, x):
    result = np.zeros_like(x)
    for token in range(len(x)):
        for k in (-1, 0, 1):
            if 0 <= token - k < len(x):
                result[token] += x[token - k] * weights[0, k + 1]
    return result


LAYERS = {
    "parallel scan": (parallel_scan, scan_alone),
    "sequential scan": (sequential_scan, scan_alone),
    "backward scan": (backward_scan, backward_scan_alone),
    "recurrent network": (recurrent, recurrent_alone),
    "linear attention": (linear_attention, linear_attention_alone),
    "token shift": (token_shift, token_shift_alone),
    "causal convolution": (causal_convolution, causal_convolution_alone),
    "centred convolution": (centred_convolution, centred_convolution_alone),
}


def random_layer_inputs():
    draw = np.random.default_rng(0).normal
    weights = draw(scale=0.5, size=(2, WIDTH, WIDTH))
    x, cotangent = (draw(size=(*HARD_ROWS.shape, WIDTH)) for _ in range(2))
    return weights, x, cotangent


def differences(function, at, step=1e-6):
    """Return the gradient of `function` by central differences; in float64 good to about 1e-9."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        ahead, behind = at.copy(), at.copy()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


@functools.cache
def layer_alone(name):
    """Run each sequence alone in float64; return outputs, and gradients to weights and x."""
    layer, (weights, x, cotangent) = LAYERS[name][1], random_layer_inputs()
    output, of_weights, of_x = np.zeros_like(x), np.zeros_like(weights), np.zeros_like(x)
    for b, row in enumerate(HARD_ROWS.tolist()):
        for start, stop in model_reference.runs(row):
            part = b, slice(start, stop)
            one, back = x[part], cotangent[part]
            output[part] = layer(weights, one)
            of_weights += differences(
                lambda w, one=one, back=back: np.sum(layer(w, one) * back), weights
            )
            of_x[part] = differences(lambda a, back=back: np.sum(layer(weights, a) * back), one)
    return output, of_weights, of_x


@functools.cache
def compiled(name):
    """One step of a layer over rows of ids, its inputs cleared at padding as documented."""
    layer = LAYERS[name][0]

    def loss(weights, x, cotangent, rows, real):
        cleared = jnp.where(real[..., None], x, 0.0)
        output = jax.vmap(layer, (None, 0, 0))(weights, cleared, rows)
        output = jnp.where(real[..., None], output, 0.0)
        return jnp.sum(output * cotangent), output

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def layer_packed(name, rows=HARD_ROWS, in_padding=0.0):
    """Run the rows together in float32; return what `layer_alone` does."""
    weights, x, cotangent = (each.astype(np.float32) for each in random_layer_inputs())
    real = valid_tokens(HARD_ROWS)
    x = np.where(real[..., None], x, np.float32(in_padding))
    gradients, output = compiled(name)(weights, x, cotangent, rows, real)
    return output, *gradients


def distances(name, result):
    pairs = zip(result, layer_alone(name), strict=True)
    return [
        np.abs(packed - single).max() / max(1, np.abs(single).max()) for packed, single in pairs
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_each_sequence_alone(name):
    with jax.debug_nans(True):
        result = layer_packed(name)
    assert max(distances(name, result)) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_resets_are_caught(name):
    assert min(distances(name, layer_packed(name, rows=np.ones_like(HARD_ROWS)))) > 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_nan_at_padding_reaches_no_layer(name):
    clean, dirty = (layer_packed(name, in_padding=value) for value in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)  # bit by bit


# --- layers that count tokens -----------------------------------------------------------------

EXPERTS = 3


@jax.jit
def route(experts, capacity, valid):
    """Top-1 routing of a stream of tokens: which of them find room in their expert."""
    one_hot = jax.nn.one_hot(experts.ravel(), EXPERTS, dtype=jnp.int32)
    chosen = jnp.where(valid.reshape(-1, 1), one_hot, 0)
    place = jnp.sum(jnp.cumsum(chosen, axis=0) * chosen, axis=1)  # from 1; 0 on padding
    return (valid.ravel() & (place <= capacity)).reshape(experts.shape)


def route_in_a_loop(experts, rows, capacity):
    room, kept = [capacity] * EXPERTS, np.zeros(rows.shape, bool)
    for b, token in np.argwhere(rows > 0):
        if room[experts[b, token]] > 0:
            room[experts[b, token]] -= 1
            kept[b, token] = True
    return kept


@given(packed_rows(), st.integers(0, 2**32), st.integers(1, 8))
def test_padding_takes_no_capacity_of_experts(rows, seed, capacity):
    experts = np.random.default_rng(seed).integers(0, EXPERTS, rows.shape)
    kept = route(jnp.asarray(experts), capacity, valid_tokens(rows))
    np.testing.assert_array_equal(kept, route_in_a_loop(experts, rows, capacity))


def test_padding_that_is_routed_is_caught():
    experts = np.zeros(HAND_ROWS.shape, np.int32)
    rows = HAND_ROWS[::-1]  # padding first
    kept = route(jnp.asarray(experts), 4, jnp.ones(rows.shape, bool))
    assert route_in_a_loop(experts, rows, 4).sum() == 4
    assert int(jnp.sum(kept & valid_tokens(rows))) == 0


def batch_moments(x, rows):
    valid = valid_tokens(rows)[..., None]
    x = jnp.where(valid, x, 0.0)
    return jnp.mean(x, (0, 1), where=valid), jnp.var(x, (0, 1), where=valid)


def test_batch_statistics_and_their_gradients_are_those_of_real_tokens():
    _, x, cotangent = random_layer_inputs()
    real, weights = HARD_ROWS > 0, cotangent[0, :2].astype(np.float32)
    tokens = x[real]
    mean = tokens.mean(axis=0)
    of_x = np.zeros_like(x)
    of_x[real] = (weights[0] + 2 * weights[1] * (tokens - mean)) / len(tokens)

    def error(in_padding, rows):
        def loss(x):
            found = batch_moments(x, rows)
            return jnp.sum(found[0] * weights[0] + found[1] * weights[1]), found

        dirty = np.where(real[..., None], x, in_padding).astype(np.float32)
        gradient, found = jax.jit(jax.grad(loss, has_aux=True))(dirty)
        pairs = (found[0], mean), (found[1], tokens.var(axis=0)), (gradient, of_x)
        return max(np.abs(packed - single).max() for packed, single in pairs)

    assert error(np.nan, HARD_ROWS) < 1e-5
    assert error(5.0, np.ones_like(HARD_ROWS)) > 0.1  # the comparison can fail


def test_batch_norm_of_flax_takes_valid_tokens():
    _, x, _ = random_layer_inputs()
    real = HARD_ROWS > 0
    norm = nnx.BatchNorm(WIDTH, use_running_average=False, rngs=nnx.Rngs(0))
    result = norm(jnp.asarray(x, jnp.float32), mask=valid_tokens(HARD_ROWS)[..., None])
    tokens = x[real]
    expected = (tokens - tokens.mean(axis=0)) / np.sqrt(tokens.var(axis=0) + 1e-5)
    assert np.abs(np.asarray(result)[real] - expected).max() < 1e-5


# --- shapes, dtypes, compilation --------------------------------------------------------------


def count_compilations(function, batches):
    traces = []  # Python runs only while tracing

    @jax.jit
    def counted(rows):
        traces.append(rows.shape)
        return function(rows)

    for rows in batches:
        jax.block_until_ready(counted(rows))
    return len(traces)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_leading_dimensions_and_vmap(name):
    function = FUNCTIONS[name]
    expected = np.asarray(function(HAND_ROWS))
    deep = function(HAND_ROWS.reshape(2, 3, LENGTH))
    np.testing.assert_array_equal(deep, expected.reshape(2, 3, *expected.shape[1:]))
    np.testing.assert_array_equal(jax.vmap(function)(HAND_ROWS), expected)
    np.testing.assert_array_equal(np.stack([function(row) for row in HAND_ROWS]), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_on_an_explicit_mesh(name):
    """`jax.make_mesh` makes such meshes by default; they refuse operations of unclear sharding."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    expected = FUNCTIONS[name](HAND_ROWS)
    with jax.set_mesh(mesh):
        rows = jax.device_put(HAND_ROWS, NamedSharding(mesh, PartitionSpec("data")))
        result = FUNCTIONS[name](rows)
    assert all(leaf.sharding.spec[0] == "data" for leaf in jax.tree.leaves(result))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_compilation_serves_all_batches(name):
    batches = [HAND_ROWS, HAND_ROWS[::-1].copy(), np.zeros_like(HAND_ROWS)]
    assert count_compilations(FUNCTIONS[name], batches) == 1


def test_the_count_of_compilations_can_be_two():
    assert count_compilations(segment_starts, [HAND_ROWS, HAND_ROWS[:3]]) == 2


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64", "uint64"])
def test_ids_of_every_integer_dtype(dtype):
    with jax.enable_x64("64" in dtype):
        for function in FUNCTIONS.values():
            expected, result = function(HAND_ROWS), function(HAND_ROWS.astype(dtype))
            assert result.dtype == expected.dtype
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,), (2, 0, 4)])
def test_empty_batches(name, shape):
    result = FUNCTIONS[name](np.zeros(shape, np.int32))
    assert result.shape == (shape[:-1] if name in ("count", "overflow") else shape)
    assert not np.asarray(result).any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_square_of_memory(name):
    length = 4096
    rows = jax.ShapeDtypeStruct((2, length), jnp.int32)
    memory = jax.jit(FUNCTIONS[name]).lower(rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 100 * 2 * length


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: positions_from_segment_ids(np.ones((2, 3), np.float32)),
            r"^positions_from_segment_ids: segment_ids is float32 of shape \(2, 3\), but it must "
            r"be integers \[..., L\]. Hint: pass rows of int32",
        ),
        (lambda: positions_from_segment_ids(np.int32(3)), r"is int32 of shape \(\).*Hint:"),
        (lambda: segment_starts(np.ones(3, bool)), "^segment_starts: segment_ids is bool.*Hint:"),
        (lambda: valid_tokens(np.ones(3)), "^valid_tokens: segment_ids is float32.*Hint:"),
        (lambda: num_segments(np.int32(1)), "^num_segments: segment_ids is int32 of shape .*Hint:"),
        (lambda: monotone_segment_ids(np.ones(3)), "^monotone_segment_ids: segment_ids is .*Hint:"),
        (lambda: overflow(np.ones(3), 2), "^overflow: segment_ids is float32.*Hint:"),
        (lambda: overflow(HAND_ROWS, 0), r"^overflow: max_segments = 0, .*\[1, 1048576\]. Hint:"),
        (lambda: shift_mask(np.ones(3), 1), "^shift_mask: segment_ids is float32.*Hint:"),
        (lambda: shift_mask(HAND_ROWS, 1.5), "^shift_mask: k = 1.5 is not an integer. Hint:"),
        (lambda: shift_mask(HAND_ROWS, 2**31), "^shift_mask: k = 2147483648, but .*Hint:"),
        (
            lambda: from_seed_ids(SEED_IDS, SEED_MASK.astype(np.float32)),
            r"^from_seed_ids: attention_mask is float32 .*Hint: .*not an additive bias",
        ),
        (
            lambda: from_seed_ids(SEED_IDS, SEED_MASK[0]),
            r"^from_seed_ids: attention_mask is int.* of shape \(10,\), .*shape \(2, 10\). Hint:",
        ),
        (lambda: from_seed_ids(np.ones(3)), "^from_seed_ids: sequence_ids is float32.*Hint:"),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()


def test_errors_come_while_tracing():
    with pytest.raises(SeqpackError, match="segment_starts: segment_ids is float32"):
        jax.eval_shape(segment_starts, jax.ShapeDtypeStruct((2, 4), jnp.float32))
