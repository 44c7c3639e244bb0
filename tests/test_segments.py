import functools

import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.segments import (
    build_packing_attention_bias,
    build_packing_cu_seqlens,
    from_seed_ids,
    positions_from_segment_ids,
    segment_mask,
)

LENGTH = 12
BIAS_VALUES = [(jnp.float32, -(2.0**41)), (jnp.bfloat16, -(2.0**41)), (jnp.float16, -(2.0**15))]
FUNCTIONS = [
    positions_from_segment_ids,
    segment_mask,
    functools.partial(segment_mask, causal=True),
    build_packing_attention_bias,
    functools.partial(build_packing_cu_seqlens, max_segments=LENGTH),
    from_seed_ids,
]

# Rows that random ones rarely hit: padding before, between and after, one-token segments, one
# full-length segment, nothing but padding.
HAND_ROWS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3],
        [0, 1, 1, 0, 0, 2, 3, 3, 0, 4, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    ],
    np.int32,
)


@st.composite
def packed_rows(draw, rows=3):
    """Segment ids `[rows, LENGTH]`: segments in order, padding anywhere between them."""
    result = np.zeros((rows, LENGTH), np.int32)
    for row in result:
        pieces = draw(st.lists(st.tuples(st.integers(1, LENGTH), st.booleans()), max_size=LENGTH))
        start = segment = 0
        for length, real in pieces:
            segment += real
            row[start : start + length] = segment if real else 0
            start += length
            if start >= LENGTH:
                break
    return result


def count_compilations(function, batches):
    """Return how often `function` is traced for `batches`: Python runs only while tracing."""
    traces = 0

    @jax.jit
    def counted(*args):
        nonlocal traces
        traces += 1
        return function(*args)

    for batch in batches:
        jax.block_until_ready(counted(batch))
    return traces


def assert_cu_seqlens_equal(rows, max_segments):
    result = build_packing_cu_seqlens(jnp.asarray(rows), max_segments=max_segments)
    offsets, longest, overflow = model_reference.cu_seqlens(rows.tolist(), max_segments)
    assert bool(result.overflow) == overflow
    assert result.cu_seqlens.shape == (len(rows) * max_segments + 1,)
    assert {result.cu_seqlens.dtype, result.max_seqlen.dtype} == {jnp.dtype("int32")}
    if not overflow:
        assert result.cu_seqlens.tolist() == offsets
        assert int(result.max_seqlen) == longest


# --- equality with the loops ------------------------------------------------------------------


@given(packed_rows())
def test_positions_equal_the_loop(rows):
    result = positions_from_segment_ids(jnp.asarray(rows))
    assert result.dtype == jnp.int32
    assert result.tolist() == [model_reference.positions(row) for row in rows.tolist()]


@given(packed_rows(), st.booleans())
def test_masks_equal_the_loop(rows, causal):
    expected = model_reference.mask(rows.tolist(), causal)
    np.testing.assert_array_equal(segment_mask(rows, causal=causal), expected)
    bias = build_packing_attention_bias(rows, causal=causal)
    np.testing.assert_array_equal(bias, np.where(expected, 0, np.float32(-(2.0**41))))


@given(packed_rows(), st.sampled_from([1, 3, LENGTH]))
def test_cu_seqlens_equal_the_loop(rows, max_segments):
    assert_cu_seqlens_equal(rows, max_segments)


def test_hand_rows_equal_the_loop():
    expected = [model_reference.positions(row) for row in HAND_ROWS.tolist()]
    assert positions_from_segment_ids(HAND_ROWS).tolist() == expected
    for causal in (False, True):
        expected = model_reference.mask(HAND_ROWS.tolist(), causal)
        np.testing.assert_array_equal(segment_mask(HAND_ROWS, causal=causal), expected)
    for max_segments in (11, 12, 13):
        assert_cu_seqlens_equal(HAND_ROWS, max_segments)


@pytest.mark.parametrize("max_segments", [3, 4])
def test_overflow_looks_at_each_row(max_segments):
    rows = np.array([[1, 2, 3, 4], [0, 0, 0, 0], [1, 1, 1, 1]])
    result = build_packing_cu_seqlens(rows, max_segments=max_segments)
    assert bool(result.overflow) == (max_segments == 3)


def test_positions_take_any_leading_dimensions():
    rows = HAND_ROWS.reshape(2, 3, LENGTH)
    flat = positions_from_segment_ids(HAND_ROWS)
    assert positions_from_segment_ids(rows).tolist() == flat.reshape(rows.shape).tolist()
    assert from_seed_ids(rows).shape == rows.shape
    assert positions_from_segment_ids(HAND_ROWS[0]).tolist() == flat[0].tolist()


def test_one_row_is_a_batch_of_one():
    row = HAND_ROWS[1]
    assert segment_mask(row).shape == (1, 1, LENGTH, LENGTH)
    for function in FUNCTIONS[1:-1]:
        single, batch = jax.tree.leaves(function(row)), jax.tree.leaves(function(row[None]))
        jax.tree.map(np.testing.assert_array_equal, single, batch)


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int64"])
def test_ids_of_every_integer_dtype(dtype):
    for function in FUNCTIONS:
        expected = jax.tree.leaves(function(HAND_ROWS))
        result = jax.tree.leaves(function(HAND_ROWS.astype(dtype)))
        jax.tree.map(np.testing.assert_array_equal, result, expected)
        assert [leaf.dtype for leaf in result] == [leaf.dtype for leaf in expected]


# --- the seed ---------------------------------------------------------------------------------

SEED_IDS = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]])
SEED_MASK = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def test_example_of_the_seed_readme():
    ids = np.where(SEED_MASK, SEED_IDS + 1, 0)
    result = build_packing_cu_seqlens(ids, max_segments=4)
    assert result.cu_seqlens.tolist() == [0, 5, 8, 12, 14, 18, 18, 18, 18]
    assert (int(result.max_seqlen), bool(result.overflow)) == (5, False)
    assert model_reference.seed_cu_seqlens(SEED_IDS, SEED_MASK) == ([0, 5, 8, 12, 14, 18], 5)
    np.testing.assert_array_equal(from_seed_ids(SEED_IDS, SEED_MASK), ids)
    masked = build_packing_cu_seqlens(SEED_IDS + 1, SEED_MASK.astype(bool), max_segments=4)
    assert masked.cu_seqlens.tolist() == result.cu_seqlens.tolist()


def test_seed_ids_used_as_they_stand_lose_a_sequence():
    result = build_packing_cu_seqlens(SEED_IDS, SEED_MASK, max_segments=4)
    assert result.cu_seqlens.tolist()[:4] == [0, 3, 5, 9]


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
    offsets, longest = model_reference.seed_cu_seqlens(seed_ids.tolist(), real.tolist())
    result = build_packing_cu_seqlens(ids, max_segments=LENGTH)
    assert result.cu_seqlens.tolist()[: len(offsets)] == offsets
    assert int(result.max_seqlen) == longest


def test_from_seed_ids_without_mask_and_with_a_cut():
    assert from_seed_ids(np.array([0, 0, 1, 7, 7])).tolist() == [1, 1, 2, 3, 3]
    assert from_seed_ids(np.array([-1, 0, 0]), np.array([0, 1, 1])).tolist() == [0, 1, 1]
    assert from_seed_ids(np.array([0, 0, 0]), np.array([1, 0, 1])).tolist() == [1, 0, 2]


# --- finite, in every dtype -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "value"), BIAS_VALUES)
def test_bias_is_finite_and_never_empties_a_row(dtype, value):
    bias = build_packing_attention_bias(HAND_ROWS, dtype)
    assert bias.dtype == dtype
    assert set(np.unique(bias.astype(jnp.float32))) == {0.0, value}
    weights = jax.nn.softmax(bias, axis=-1)  # row 4 is padding only
    assert bool(jnp.isfinite(weights).all())
    np.testing.assert_array_equal(weights > 0, segment_mask(HAND_ROWS))


def test_bias_in_float64():
    with jax.enable_x64(True):
        bias = build_packing_attention_bias(HAND_ROWS, jnp.float64)
        assert bias.dtype == jnp.float64
        assert set(np.unique(bias)) == {0.0, -(2.0**41)}
        assert positions_from_segment_ids(HAND_ROWS.astype(np.int64)).dtype == jnp.int32
        assert build_packing_cu_seqlens(HAND_ROWS, max_segments=12).cu_seqlens.dtype == jnp.int32


# --- packed attention = each sequence alone ---------------------------------------------------

ATTENTION_ROWS = HAND_ROWS[[0, 1, 3]]


def random_qkv(shape=(3, LENGTH, 2, 4)):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) for _ in range(3)]


def packed_attention(query, key, value, *, form, causal):
    if form == "bias":
        bias = build_packing_attention_bias(ATTENTION_ROWS, causal=causal)
        return jax.nn.dot_product_attention(query, key, value, bias=bias)
    if form == "mask":
        mask = segment_mask(ATTENTION_ROWS, causal=causal)
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)  # "none": no segments


def attention_gradients(attention, qkv):
    real = (ATTENTION_ROWS > 0)[..., None, None]
    target = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(query, key, value):
        return jnp.sum(jnp.where(real, attention(query, key, value) * target, 0))

    return gradients(*qkv)


def alone_in_jax(query, key, value, *, causal):
    """Run the same attention on one sequence at a time, and lay the results into the rows."""
    result = jnp.zeros_like(query)
    for b, row in enumerate(ATTENTION_ROWS.tolist()):
        for start, stop in model_reference.runs(row):
            one = [x[b : b + 1, start:stop] for x in (query, key, value)]
            out = jax.nn.dot_product_attention(*one, is_causal=causal)
            result = result.at[b : b + 1, start:stop].set(out)
    return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["bias", "mask", "none"])
def test_packed_attention_equals_each_sequence_alone(form, causal):
    qkv, real = random_qkv(), ATTENTION_ROWS > 0
    attention = functools.partial(packed_attention, form=form, causal=causal)
    rows = ATTENTION_ROWS.tolist()
    expected = model_reference.attention_alone(*qkv, rows, causal)
    error = np.abs(np.where(real[..., None, None], attention(*qkv) - expected, 0)).max()
    alone = functools.partial(alone_in_jax, causal=causal)
    pairs = zip(attention_gradients(attention, qkv), attention_gradients(alone, qkv), strict=True)
    gradient_error = max(float(jnp.abs(packed - single).max()) for packed, single in pairs)
    if form == "none":  # the comparison can fail
        assert min(error, gradient_error) > 0.1
    else:
        assert max(error, gradient_error) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["bias", "mask"])
def test_garbage_in_padding_never_reaches_a_real_token(form, causal):
    real = (ATTENTION_ROWS > 0)[..., None, None]
    clean = random_qkv()
    dirty = [np.where(real, x, np.float32(1e9)) for x in clean]
    attention = functools.partial(packed_attention, form=form, causal=causal)
    expected, result = (np.where(real, attention(*qkv), 0) for qkv in (clean, dirty))
    np.testing.assert_array_equal(result, expected)  # bit by bit
    expected, result = (attention_gradients(attention, qkv) for qkv in (clean, dirty))
    for packed, single in zip(result, expected, strict=True):
        np.testing.assert_array_equal(packed, single)


@pytest.mark.parametrize(("dtype", "value"), BIAS_VALUES)
def test_no_nan_on_the_way(dtype, value):
    def loss(x, rows):  # every operation in `dtype`, where it overflows first
        scores = jnp.einsum("bqhd,bkhd->bhqk", x, x) + build_packing_attention_bias(rows, dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), x)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    x = jnp.asarray(random_qkv((len(HAND_ROWS), LENGTH, 2, 4))[0], dtype)
    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(loss))(x, HAND_ROWS)
        for function in FUNCTIONS:
            jax.block_until_ready(function(HAND_ROWS))
    assert bool(jnp.isfinite(gradient).all())


# --- how they compile -------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_compilation_serves_all_batches(function):
    batches = [HAND_ROWS, HAND_ROWS[::-1], np.zeros_like(HAND_ROWS)]
    assert count_compilations(function, batches) == 1


def test_the_count_of_compilations_can_be_two():
    assert count_compilations(segment_mask, [HAND_ROWS, HAND_ROWS[:3]]) == 2


@pytest.mark.parametrize("function", FUNCTIONS)
def test_vmap_over_rows_equals_a_loop(function):
    mapped = jax.tree.leaves(jax.vmap(function)(HAND_ROWS))
    looped = [jax.tree.leaves(function(row)) for row in HAND_ROWS]
    for result, rows in zip(mapped, zip(*looped, strict=True), strict=True):
        np.testing.assert_array_equal(result, np.stack(rows))


@pytest.mark.parametrize("function", [FUNCTIONS[0], FUNCTIONS[4], FUNCTIONS[5], segment_mask])
def test_compact_forms_need_no_square_of_memory(function):
    length = 4096
    compiled = jax.jit(function).lower(jax.ShapeDtypeStruct((2, length), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes
    if function is segment_mask:  # the check can fail
        assert size >= 2 * length**2
    else:
        assert size < 100 * 2 * length


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_empty_batches(shape):
    rows = np.zeros(shape, np.int32)
    assert positions_from_segment_ids(rows).shape == from_seed_ids(rows).shape == shape
    assert segment_mask(rows).shape == np.atleast_2d(rows).shape[:1] + (1,) + 2 * shape[-1:]
    result = build_packing_cu_seqlens(rows, max_segments=2)
    assert set(result.cu_seqlens.tolist()) == {0}
    assert (int(result.max_seqlen), bool(result.overflow)) == (0, False)


# --- errors -----------------------------------------------------------------------------------

NOT_ROWS = r"is int32 of shape \(1, 1, 4\), but it must be integers \[B, L\] or \[L\]. Hint: .*vmap"
DEEP = np.zeros((1, 1, 4), np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: positions_from_segment_ids(np.ones((2, 3), np.float32)),
            r"^positions_from_segment_ids: segment_ids is float32 of shape \(2, 3\), but it must "
            r"be integers \[..., L\]. Hint: pass rows of int32",
        ),
        (lambda: positions_from_segment_ids(np.int32(3)), r"is int32 of shape \(\).*Hint:"),
        (lambda: segment_mask(np.ones(3, bool)), "^segment_mask: segment_ids is bool.*Hint:"),
        (lambda: segment_mask(DEEP), NOT_ROWS),
        (
            lambda: build_packing_attention_bias(DEEP),
            "^build_packing_attention_bias: .*" + NOT_ROWS,
        ),
        (
            lambda: build_packing_attention_bias(HAND_ROWS, jnp.int32),
            r"dtype = 'int32' is not known. Hint: .*bfloat16, float32, float64, float16",
        ),
        (lambda: build_packing_attention_bias(HAND_ROWS, "float8_e4m3fn"), "'float8_e4m3fn'"),
        (
            lambda: build_packing_cu_seqlens(DEEP, max_segments=2),
            "^build_packing_cu_seqlens: segment_ids " + NOT_ROWS,
        ),
        (
            lambda: build_packing_cu_seqlens(HAND_ROWS, max_segments=0),
            r"build_packing_cu_seqlens: max_segments = 0, but it must be in \[1, 1048576\]. Hint:",
        ),
        (lambda: build_packing_cu_seqlens(HAND_ROWS, max_segments=2.5), "2.5 is not an integer"),
        (
            lambda: build_packing_cu_seqlens(HAND_ROWS, HAND_ROWS[0], max_segments=2),
            r"attention_mask is int32 of shape \(12,\), but it must be bool or integers of shape "
            r"\(6, 12\). Hint: pass 1 for real tokens",
        ),
        (
            lambda: from_seed_ids(SEED_IDS, SEED_MASK.astype(np.float32)),
            r"^from_seed_ids: attention_mask is float32 .*Hint: .*not an additive bias",
        ),
        (lambda: build_packing_attention_bias(HAND_ROWS, None), "dtype = None is not known.*Hint:"),
        (lambda: build_packing_attention_bias(HAND_ROWS, "foo"), "dtype = 'foo' is not known"),
        (lambda: from_seed_ids(np.ones(3)), "^from_seed_ids: sequence_ids is float32.*Hint:"),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()


def test_errors_come_while_tracing():
    with pytest.raises(SeqpackError, match="segment_mask: segment_ids is float32"):
        jax.eval_shape(segment_mask, jax.ShapeDtypeStruct((2, 4), jnp.float32))


@pytest.mark.parametrize("build", [build_packing_attention_bias, segment_mask])
@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_built_inside_the_step_is_not_stored(build, gradient):
    """On CPU: attention with a mask built from ids needs no more memory than without segments."""
    length, heads, width = 1024, 4, 16

    def attend(query, segment_ids):
        made = build(segment_ids, causal=True)
        name = "mask" if made.dtype == bool else "bias"
        return jax.nn.dot_product_attention(query, query, query, **{name: made}).sum()

    def plain(query, segment_ids):
        return jax.nn.dot_product_attention(query, query, query, is_causal=True).sum()

    def temporary(function):
        function = jax.grad(function) if gradient else function
        query = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(function).lower(query, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporary(attend) - temporary(plain) < length * length  # not even one byte a pair
