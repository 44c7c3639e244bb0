import functools
import itertools

import attention_reference
import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from packed_rows import HAND_ROWS, LENGTH, packed_rows

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.masks import build_packing_attention_bias, segment_bias, segment_mask

PADS = ["segment", "self", "empty"]
SETTINGS = list(itertools.product([True, False], [None, 1, 3, 2**31 - 1], PADS))
BIAS_VALUES = [(jnp.float32, -(2.0**41)), (jnp.bfloat16, -(2.0**41)), (jnp.float16, -(2.0**15))]


def under_all_settings(*ids, **positions):
    """Masks under each of the settings, `[setting, ...]`, to be jitted: one compilation for all."""
    masks = [segment_mask(*ids, causal=c, window=w, pad=p, **positions) for c, w, p in SETTINGS]
    return jnp.stack(masks)


all_masks = jax.jit(under_all_settings)


@jax.jit
def all_masks_by_position(ids, places):
    return under_all_settings(ids, q_positions=places)


@jax.jit
def all_cross_masks(ids, kv_ids, places, kv_places):
    return under_all_settings(ids, kv_ids, q_positions=places, kv_positions=kv_places)


def everything(rows):
    """The forms that take nothing but segment ids."""
    return [
        segment_mask(rows),
        segment_mask(rows, causal=False, pad="empty"),
        segment_mask(rows, window=3, pad="self"),
        segment_mask(rows, q_positions=rows, window=2, pad="self"),
        segment_bias(rows),
        build_packing_attention_bias(rows),
    ]


TRACED = []  # what `jitted` was compiled for


@jax.jit
def jitted(rows):
    TRACED.append(str(jax.typeof(rows)))
    return everything(rows)


def assert_equal(results, expected):
    """Compare two lists of arrays, dtypes too."""
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        np.testing.assert_array_equal(result, wanted)


def may_attend(query, key, causal, window):
    """The rule inside a segment, for two places in it."""
    near = window is None or abs(query - key) < window
    return near and (key <= query or not causal)


def slow_mask(rows, causal, window=None, pad="segment"):
    """Each pair of tokens on its own, by index: bool `[B, 1, L, L]`."""
    length = len(rows[0])
    result = np.zeros((len(rows), 1, length, length), bool)
    for b, row in enumerate(np.asarray(rows).tolist()):
        for query, key in itertools.product(range(length), repeat=2):
            if row[query] == row[key]:
                result[b, 0, query, key] = may_attend(query, key, causal, window)
            if row[query] == 0 and pad == "self":
                result[b, 0, query, key] = query == key
            if row[query] == 0 and pad == "empty":
                result[b, 0, query, key] = False
    return result


def slow_positions(rows):
    return np.array([model_reference.positions(row) for row in np.asarray(rows).tolist()], np.int32)


# --- equality with the loops, by index --------------------------------------------------------


@given(packed_rows())
@example(HAND_ROWS)
@settings(max_examples=6)
def test_masks_equal_the_loop(rows):
    masks = np.asarray(all_masks(rows))
    assert masks.dtype == bool
    for setting, mask in zip(SETTINGS, masks, strict=True):
        np.testing.assert_array_equal(mask, slow_mask(rows, *setting))


@pytest.mark.parametrize("causal", [True, False])
def test_an_older_loop_agrees(causal):
    expected = model_reference.mask(HAND_ROWS.tolist(), causal)
    np.testing.assert_array_equal(segment_mask(HAND_ROWS, causal=causal), expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"causal": False, "pad": "self"},
        {"q_positions": np.array([[0, 5, 4, 3, 2, 1, 0, 9, 8, 7, 6, 5]] * 6), "window": 3},
    ],
)
def test_the_bias_is_0_where_the_mask_is_true(setting):
    expected = np.where(segment_mask(HAND_ROWS, **setting), 0, np.float32(-(2.0**41)))
    np.testing.assert_array_equal(segment_bias(HAND_ROWS, **setting), expected)


def test_masks_are_causal_by_default_and_the_bias_of_the_seed_is_not():
    np.testing.assert_array_equal(segment_mask(HAND_ROWS), slow_mask(HAND_ROWS, True))
    np.testing.assert_array_equal(segment_bias(HAND_ROWS) == 0, slow_mask(HAND_ROWS, True))
    seed = build_packing_attention_bias(HAND_ROWS)
    np.testing.assert_array_equal(seed == 0, slow_mask(HAND_ROWS, False))
    for dtype, causal in [(jnp.float16, False), (jnp.float32, True)]:
        seed = build_packing_attention_bias(HAND_ROWS, dtype, causal=causal)
        np.testing.assert_array_equal(seed, segment_bias(HAND_ROWS, dtype, causal=causal))


@given(packed_rows())
@example(HAND_ROWS)
@settings(max_examples=25)
def test_real_tokens_are_the_same_under_every_policy(rows):
    real = (rows > 0)[:, None, :, None]
    by_index = np.asarray(all_masks(rows))
    by_position = np.asarray(all_masks_by_position(rows, slow_positions(rows)))
    expected = by_index[np.arange(len(SETTINGS)) // len(PADS) * len(PADS)] & real  # of "segment"
    np.testing.assert_array_equal(by_index & real, expected)
    np.testing.assert_array_equal(by_position & real, expected)
    for masks in (by_index, by_position):
        for (_, _, pad), has_key in zip(SETTINGS, masks.any(axis=-1)[:, :, 0], strict=True):
            np.testing.assert_array_equal(has_key, (rows > 0) | (pad != "empty"))


def test_any_leading_dimensions_and_vmap():
    flat = jitted(HAND_ROWS)
    deep = [x.reshape(2, 3, 1, LENGTH, LENGTH) for x in flat]
    assert_equal(jitted(HAND_ROWS.reshape(2, 3, LENGTH)), deep)
    mapped = jax.jit(jax.vmap(everything))(HAND_ROWS)  # ids of rank 1 are a batch of one
    assert_equal(mapped, [x[:, None] for x in flat])


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_ids_of_every_integer_dtype(dtype):
    """Positions too: unsigned ones may not wrap around below 0."""
    rows = HAND_ROWS.astype(dtype)
    expected = jitted(HAND_ROWS)
    with jax.enable_x64(dtype == "int64"):
        assert_equal(jitted(rows), expected)
        across = segment_mask(HAND_ROWS, rows, causal=False)
        places = slow_positions(HAND_ROWS).astype(dtype)
        by_place = segment_mask(rows, q_positions=places, causal=False, window=2, pad="self")
    np.testing.assert_array_equal(across, slow_mask(HAND_ROWS, False))
    np.testing.assert_array_equal(by_place, slow_mask(HAND_ROWS, False, 2, "self"))


# --- by position ------------------------------------------------------------------------------


def zigzag(parts):
    """Device `i` of `parts` holds chunks `i` and `2 parts - 1 - i`, as TE and MaxText deal them."""
    chunks = np.arange(LENGTH).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].ravel() for i in range(parts)])


def striped(parts):
    return np.arange(LENGTH).reshape(-1, parts).T.ravel()


def assert_exact_after(order, rows):
    """The mask of reordered tokens is the reordered mask; padding joins all padding of a row."""
    expected = np.array(all_masks(rows))  # equal to the loop: see above
    padding = rows == 0
    both = padding[:, None, :, None] & padding[:, None, None, :]
    expected[[pad == "segment" for _, _, pad in SETTINGS]] |= both
    made = all_masks_by_position(rows[:, order], slow_positions(rows)[:, order])
    np.testing.assert_array_equal(made, expected[..., order, :][..., order])


@given(packed_rows(), st.permutations(range(LENGTH)))
@settings(max_examples=50)
def test_positions_are_exact_after_any_permutation(rows, order):
    assert_exact_after(list(order), rows)


def test_positions_are_exact_in_packed_order_zigzag_and_striped():
    orders = [np.arange(LENGTH), zigzag(2), zigzag(3), striped(2), striped(4)]
    assert orders[1].tolist() == [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]
    assert orders[4].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    for order in orders:
        assert_exact_after(order, HAND_ROWS)


def test_the_index_is_wrong_after_a_permutation():
    order = zigzag(2)
    expected = slow_mask(HAND_ROWS, True)[:, :, order][:, :, :, order]
    assert (np.asarray(segment_mask(HAND_ROWS[:, order])) != expected).any()


@given(packed_rows(), st.lists(st.integers(0, 10**6), min_size=LENGTH + 1, max_size=LENGTH + 1))
@settings(max_examples=25)
def test_pieces_may_go_on_from_another_start(rows, starts):
    places = slow_positions(rows)
    moved = np.where(rows > 0, places + np.array(starts, np.int32)[rows], 0)
    expected = all_masks_by_position(rows, places)
    np.testing.assert_array_equal(all_masks_by_position(rows, moved), expected)


@given(packed_rows(), st.permutations(range(LENGTH)))
@settings(max_examples=25)
def test_queries_of_one_device_and_keys_of_all(rows, order):
    ids, places = rows[:, list(order)], slow_positions(rows)[:, list(order)]
    whole = np.array(all_masks_by_position(ids, places))
    alone = [pad == "self" for _, _, pad in SETTINGS]  # queries do not know which keys they are
    whole[alone] = whole[[pad == "empty" for _, _, pad in SETTINGS]]
    for part in np.split(np.arange(LENGTH), 3):
        masks = all_cross_masks(ids[:, part], ids, places[:, part], places)
        np.testing.assert_array_equal(masks, whole[..., part, :])


# --- cross attention --------------------------------------------------------------------------


def slow_cross_mask(rows, kv_rows, pad, places=None, kv_places=None, causal=False, window=None):
    result = np.zeros((len(rows), 1, rows.shape[1], kv_rows.shape[1]), bool)
    for b, query, key in np.ndindex(len(rows), rows.shape[1], kv_rows.shape[1]):
        allowed = rows[b, query] == kv_rows[b, key]
        if allowed and places is not None:
            allowed = may_attend(places[b, query], kv_places[b, key], causal, window)
        result[b, 0, query, key] = allowed and (rows[b, query] != 0 or pad == "segment")
    return result


@jax.jit
def cross_masks_by_id(rows, kv_rows):
    """A mask and a bias for each policy."""
    masks = {pad: segment_mask(rows, kv_rows, causal=False, pad=pad) for pad in PADS}
    biases = {pad: segment_bias(rows, jnp.bfloat16, kv_rows, causal=False, pad=pad) for pad in PADS}
    return masks, biases


@given(packed_rows(), packed_rows(length=8))
@settings(max_examples=10)
def test_cross_masks_equal_the_loop(rows, kv_rows):
    places, kv_places = slow_positions(rows), slow_positions(kv_rows)
    by_position = np.asarray(all_cross_masks(rows, kv_rows, places, kv_places))
    for (causal, window, pad), mask in zip(SETTINGS, by_position, strict=True):
        expected = slow_cross_mask(rows, kv_rows, pad, places, kv_places, causal, window)
        np.testing.assert_array_equal(mask, expected)
    masks, biases = cross_masks_by_id(rows, kv_rows)
    for pad in PADS:
        np.testing.assert_array_equal(masks[pad], slow_cross_mask(rows, kv_rows, pad))
        np.testing.assert_array_equal(biases[pad] == 0, masks[pad])


def test_a_segment_without_keys_has_an_empty_row():
    mask = segment_mask(np.array([[1, 2, 3]]), np.array([[1, 3, 3, 0]]), causal=False)
    assert mask[0, 0].astype(int).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]


# --- finite, in every dtype -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "value"), BIAS_VALUES)
def test_bias_is_finite_and_never_empties_a_row(dtype, value):
    bias = segment_bias(HAND_ROWS, dtype, causal=False)
    seed = build_packing_attention_bias(HAND_ROWS, dtype)
    assert_equal([seed], [bias])
    assert bias.dtype == dtype
    assert set(np.unique(bias.astype(jnp.float32))) == {0.0, value}
    weights = np.asarray(jax.jit(jax.nn.softmax)(bias).astype(jnp.float32))
    assert np.isfinite(weights).all()  # row 4 is padding only
    np.testing.assert_array_equal(weights > 0, slow_mask(HAND_ROWS, False))


def test_bias_in_float64():
    with jax.enable_x64(True):
        for bias in (segment_bias(HAND_ROWS, jnp.float64), segment_bias(HAND_ROWS, float)):
            assert bias.dtype == jnp.float64
            assert set(np.unique(bias)) == {0.0, -(2.0**41)}
        assert segment_bias(HAND_ROWS, float, mask_value=-1e300).min() == -1e300


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (jnp.float16, -1e4),
        (jnp.float16, np.finfo(np.float16).min),
        (jnp.bfloat16, -1e9),
        (jnp.bfloat16, jnp.finfo(jnp.bfloat16).min),
        (jnp.float32, float(jnp.finfo(jnp.float32).min)),
        (jnp.float32, -1000),
    ],
)
def test_mask_values_that_stay_finite(dtype, value):
    bias = segment_bias(HAND_ROWS, dtype, mask_value=value)
    assert bias.dtype == dtype
    expected = {0.0, float(np.asarray(value, np.float64).astype(dtype))}
    assert set(np.unique(bias.astype(jnp.float32))) == expected
    assert np.isfinite(list(expected)).all()


def test_a_mask_value_does_not_depend_on_how_numpy_reports_errors():
    with np.errstate(all="raise"):
        least = segment_bias(HAND_ROWS, jnp.float16, mask_value=-1e-7).min()
        assert float(least) == float(np.float16(-(2.0**-23)))
        with pytest.raises(SeqpackError, match=r"mask_value = -1e-50 is -0\.0 in float32"):
            segment_bias(HAND_ROWS, mask_value=-1e-50)


def test_a_float32_bias_stays_finite_as_bfloat16():
    cast = segment_bias(HAND_ROWS).astype(jnp.bfloat16)
    np.testing.assert_array_equal(cast, segment_bias(HAND_ROWS, jnp.bfloat16))
    smallest = segment_bias(HAND_ROWS, mask_value=float(jnp.finfo(jnp.float32).min))
    assert bool(jnp.isneginf(smallest.astype(jnp.bfloat16)).any())  # what the default avoids


def loss_with_bias(query, bias):
    """Every operation in the dtype of `query`, where it overflows first."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, query) + bias
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), query)
    return jnp.sum(out.astype(jnp.float32) ** 2)


gradient_with_bias = jax.jit(jax.value_and_grad(loss_with_bias))


def random_x(dtype=jnp.float32):
    shape = (*HAND_ROWS.shape, 2, 4)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("mask_value", [None, float(jnp.finfo(jnp.bfloat16).min)])
def test_two_biases_added_stay_finite(mask_value):
    build = functools.partial(segment_bias, HAND_ROWS, jnp.bfloat16, mask_value=mask_value)
    two = build(pad="empty") + build(window=2, pad="empty")
    _, gradient = gradient_with_bias(random_x(jnp.bfloat16), two)
    is_default = mask_value is None  # with finfo.min they add up to -inf, and to NaN
    assert bool(jnp.isfinite(two).all()) == is_default
    assert bool(jnp.isfinite(gradient).all()) == is_default


def test_masks_are_combined_as_booleans_in_float16():
    bias = segment_bias(HAND_ROWS, jnp.float16)
    assert not bool(jnp.isfinite(bias + bias).all())
    mask = segment_mask(HAND_ROWS) & segment_mask(HAND_ROWS, window=2)
    np.testing.assert_array_equal(mask, segment_mask(HAND_ROWS, window=2))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_no_nan_on_the_way(dtype):
    with jax.debug_nans(True):
        for pad in PADS:
            bias = segment_bias(HAND_ROWS, dtype, pad=pad)
            made = gradient_with_bias(random_x(dtype), bias)
            assert all(bool(jnp.isfinite(x).all()) for x in made)


def test_no_nan_in_jax_attention():
    def loss(query, rows):
        total = 0.0
        for form, pad in [("mask", "empty"), ("bias", "empty")]:
            build = segment_mask if form == "mask" else segment_bias
            made = {form: build(rows, pad=pad)}
            total += jnp.sum(jax.nn.dot_product_attention(query, query, query, **made) ** 2)
        return total

    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(loss))(random_x(), HAND_ROWS)
    assert bool(jnp.isfinite(gradient).all())


def test_the_nan_check_can_fail():
    bias = jnp.where(segment_mask(HAND_ROWS, pad="empty"), 0.0, -jnp.inf)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(jax.nn.softmax)(bias)


# --- packed attention = each sequence alone ---------------------------------------------------

ROWS = attention_reference.HARD_ROWS
KV_ROWS = np.array(  # shorter than ROWS; row 1 lacks the keys of segment 3, row 3 has two too many
    [
        [1, 1, 2, 2, 2, 3, 3, 3, 0, 0],
        [0, 1, 1, 2, 2, 4, 0, 5, 5, 5],
        [1, 2, 2, 2, 2, 0, 0, 3, 3, 0],
        [1, 1, 1, 1, 1, 1, 2, 2, 3, 0],
        [1, 1, 2, 2, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    ],
    np.int32,
)


def attend(query, key, value, *, form, dtype=np.float32, kv_rows=None, **settings):
    if form == "none":
        made = {"is_causal": settings["causal"]}
    elif form == "mask":
        made = {"mask": segment_mask(ROWS, kv_rows, **settings)}
    else:
        made = {"bias": segment_bias(ROWS, dtype, kv_rows, **settings)}
    return jax.nn.dot_product_attention(query, key, value, **made)


def errors_against_alone(form, dtype, causal, window=None, kv_rows=None, pad="segment"):
    """The largest differences of output and gradients from each sequence alone, in float64."""
    # bfloat16 keeps 8 bits: sums over 16 tokens of size 1 stay under 1e-2 when inputs are halved.
    scale = 0.5 if dtype == jnp.bfloat16 else 1
    kv_length = None if kv_rows is None else kv_rows.shape[1]
    qkv = attention_reference.random_qkv(ROWS, kv_length=kv_length)
    qkv = [jnp.asarray(scale * x, dtype) for x in qkv]
    target = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    target = jnp.asarray(scale * target, dtype)
    has_key = np.ones_like(ROWS, bool) if kv_rows is None else _has_key(ROWS, kv_rows)
    real = ((ROWS > 0) & has_key)[..., None, None]

    @jax.jit
    def run(query, key, value):
        attention = functools.partial(
            attend, form=form, dtype=dtype, kv_rows=kv_rows, causal=causal, window=window, pad=pad
        )
        out, back = jax.vjp(attention, query, key, value)
        return out, back(jnp.where(real, target, jnp.zeros((), dtype)))

    settings = {"causal": causal, "window": window, "kv_rows": kv_rows}
    exact = [np.asarray(x, np.float64) for x in (*qkv, target)]
    expected = attention_reference.attend_alone(*exact[:3], ROWS, **settings)
    expected_gradients = attention_reference.gradients_alone(*exact, ROWS, **settings)
    promotion = "strict" if dtype == jnp.float32 else "standard"  # jax.nn itself needs it
    with jax.numpy_dtype_promotion(promotion):
        out, gradients = run(*qkv)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(dtype)}
    error = np.abs(np.where(real, np.asarray(out, np.float64) - expected, 0)).max()
    pairs = zip(gradients, expected_gradients, strict=True)
    gradient_errors = [np.abs(np.asarray(a, np.float64) - b).max() for a, b in pairs]
    return error, max(gradient_errors)


def _has_key(rows, kv_rows):
    return (rows[:, :, None] == kv_rows[:, None, :]).any(axis=2)


@pytest.mark.parametrize(
    ("form", "causal", "window", "pad"),
    [
        ("mask", True, None, "segment"),
        ("bias", False, 3, "empty"),
    ],
)
def test_packed_attention_equals_each_sequence_alone(form, causal, window, pad):
    assert max(errors_against_alone(form, jnp.float32, causal, window, pad=pad)) < 1e-5


@pytest.mark.parametrize(("form", "causal", "window"), [("mask", True, None), ("bias", False, 3)])
def test_packed_attention_in_bfloat16(form, causal, window):
    assert max(errors_against_alone(form, jnp.bfloat16, causal, window)) < 1e-2


def test_attention_without_a_mask_is_wrong():
    assert min(errors_against_alone("none", jnp.float32, True)) > 0.1


@pytest.mark.parametrize(
    ("form", "dtype", "bound"), [("mask", jnp.float32, 1e-5), ("bias", jnp.bfloat16, 1e-2)]
)
def test_cross_attention_equals_each_pair_alone(form, dtype, bound):
    assert max(errors_against_alone(form, dtype, False, kv_rows=KV_ROWS)) < bound


@functools.cache
def attention_and_gradients(form, causal):
    """A jitted function from query, key and value to the outputs and gradients of real tokens."""
    real = (ROWS > 0)[..., None, None]

    @jax.jit
    def run(query, key, value):
        out, back = jax.vjp(functools.partial(attend, form=form, causal=causal), query, key, value)
        return jnp.where(real, out, 0), *back(jnp.where(real, jnp.cos(out), 0))

    return run


FORMS = pytest.mark.parametrize(("form", "causal"), [("bias", True), ("mask", False)])


@FORMS
def test_garbage_in_padding_never_reaches_a_real_token(form, causal):
    clean = attention_reference.random_qkv(ROWS)
    dirty = [np.where((ROWS > 0)[..., None, None], x, np.float32(1e9)) for x in clean]
    run = attention_and_gradients(form, causal)
    assert_equal(run(*dirty), run(*clean))  # bit by bit


@FORMS
def test_nan_in_padding_stays_in_its_row_and_must_be_cleared_before(form, causal):
    """0 x NaN is NaN in any dense attention: what the docstring warns of, and the remedy."""
    real = (ROWS > 0)[..., None, None]
    clean = attention_reference.random_qkv(ROWS)
    dirty = [np.where(real, x, np.float32(np.nan)) for x in clean]
    run = attention_and_gradients(form, causal)
    spoiled = np.isnan(run(*dirty)[0]).any(axis=(1, 2, 3))
    is_mixed = (ROWS == 0).any(axis=1) & (ROWS > 0).any(axis=1)  # `run` hides what padding gets
    assert spoiled.tolist() == is_mixed.tolist()
    cleared = [np.where(real, x, np.float32(0)) for x in dirty]
    assert_equal(run(*cleared), run(*clean))


@FORMS
def test_other_segments_never_reach_a_token(form, causal):
    """Change the tokens of one segment: all others stay equal bit by bit, gradients too."""
    qkv = attention_reference.random_qkv(ROWS)
    changed = (ROWS == 2)[..., None, None]
    run = attention_and_gradients(form, causal)
    after_change = run(*(np.where(changed, -3 * x, x) for x in qkv))
    for before, after in zip(run(*qkv), after_change, strict=True):
        kept = np.broadcast_to(~changed, before.shape)
        np.testing.assert_array_equal(np.asarray(after)[kept], np.asarray(before)[kept])
        assert (np.asarray(after)[~kept] != np.asarray(before)[~kept]).any()


# --- how they compile -------------------------------------------------------------------------


def test_one_compilation_serves_all_batches():
    for batch in (HAND_ROWS, HAND_ROWS[::-1], np.zeros_like(HAND_ROWS)):
        jax.block_until_ready(jitted(batch))
    assert TRACED.count("int32[6,12]") == 1
    jax.eval_shape(jitted, jax.ShapeDtypeStruct((7, 12), jnp.int32))
    assert TRACED[-1] == "int32[7,12]"  # another shape is another compilation


def test_rows_over_an_explicit_mesh():
    """`jax.make_mesh` makes such meshes by default; they refuse operations of unclear sharding."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    rows = jax.device_put(HAND_ROWS, NamedSharding(mesh, PartitionSpec("data")))
    expected = jitted(HAND_ROWS)
    with jax.set_mesh(mesh):
        made = jax.jit(everything)(rows)
    assert_equal(made, expected)
    assert {x.sharding.spec[:1] for x in made} == {("data",)}


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,), (1,), (2, 1)])
def test_empty_batches_and_rows_of_one_token(shape):
    expected = (*(shape[:-1] or (1,)), 1, shape[-1], shape[-1])
    made = jax.eval_shape(everything, jax.ShapeDtypeStruct(shape, jnp.int32))
    assert {x.shape for x in made} == {expected}


def plain(_):
    return {"is_causal": True}


PAIRS = 256 * 256


@functools.cache
def memory_of_step(make, gradient, length=256):
    """Bytes of temporaries, arguments and results of a jitted attention step."""

    def loss(query, ids):
        made = make(ids)
        with jax.numpy_dtype_promotion("standard"):  # a bfloat16 bias meets float32 scores
            out = jax.nn.dot_product_attention(query, query, query, **made)
        return out.astype(jnp.float32).sum()

    query = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    step = jax.jit(jax.value_and_grad(loss) if gradient else loss)
    memory = step.lower(query, ids).compile().memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes)
    return memory.temp_size_in_bytes + sum(sizes)


@pytest.mark.parametrize(
    ("make", "gradient"),
    [
        (lambda ids: {"mask": segment_mask(ids, q_positions=ids, window=7, pad="self")}, True),
        (lambda ids: {"bias": segment_bias(ids, q_positions=ids, window=7, pad="empty")}, True),
        (lambda ids: {"bias": segment_bias(ids, jnp.bfloat16)}, False),
    ],
)
def test_what_is_built_inside_the_step_adds_no_memory(make, gradient):
    """On CPU: attention with a mask built from ids needs no more memory than without segments."""
    added = memory_of_step(make, gradient) - memory_of_step(plain, gradient)
    assert added < PAIRS  # not one byte a pair


def test_the_memory_check_can_fail():
    def sorted_mask(ids):  # sorting keeps XLA from fusing it
        return {"mask": jnp.sort(segment_mask(ids), axis=-1)}

    without = memory_of_step(plain, False)
    assert memory_of_step(sorted_mask, False) - without > 0.95 * PAIRS


# --- errors -----------------------------------------------------------------------------------

POSITIONS = np.zeros((6, LENGTH), np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: segment_mask(np.ones(3, bool)),
            r"^segment_mask: segment_ids is bool of shape \(3,\), but it must be integers "
            r"\[..., L\]. Hint: pass rows of int32",
        ),
        (lambda: segment_bias(np.ones(3)), "^segment_bias: segment_ids is float32.*Hint:"),
        (
            lambda: build_packing_attention_bias(np.int32(1)),
            r"^build_packing_attention_bias: segment_ids is int32 of shape \(\).*Hint:",
        ),
        (
            lambda: segment_mask(HAND_ROWS, HAND_ROWS[:3], causal=False),
            r"^segment_mask: kv_segment_ids has shape \(3, 12\), but segment_ids has \(6, 12\). "
            "Hint: pass the same rows on both sides; only their lengths may differ",
        ),
        (lambda: segment_bias(HAND_ROWS, jnp.float32, np.ones(3)), "kv_segment_ids is float32"),
        (
            lambda: segment_mask(HAND_ROWS, HAND_ROWS),
            "^segment_mask: causal and window compare tokens of different arrays, whose index "
            "says nothing. Hint: pass causal=False, or both q_positions and kv_positions",
        ),
        (
            lambda: segment_mask(HAND_ROWS, HAND_ROWS, causal=False, window=3),
            "causal and window compare tokens of different arrays",
        ),
        (
            lambda: segment_mask(HAND_ROWS, HAND_ROWS, q_positions=POSITIONS),
            "kv_positions is missing. Hint: pass the positions of both sides or of neither",
        ),
        (
            lambda: segment_mask(HAND_ROWS, kv_positions=POSITIONS),
            "q_positions is missing. Hint:",
        ),
        (
            lambda: segment_mask(HAND_ROWS, q_positions=POSITIONS[:, :3], causal=False),
            r"q_positions has shape \(6, 3\), but its segment ids have shape \(6, 12\). Hint: pass "
            "one position per token",
        ),
        (lambda: segment_mask(HAND_ROWS, q_positions=POSITIONS / 1), "q_positions is float32"),
        (
            lambda: segment_mask(HAND_ROWS, window=0),
            "^segment_mask: window = 0, but it must be in .*Hint: check what computes window",
        ),
        (lambda: segment_bias(HAND_ROWS, window=2.5), "window = 2.5 is not an integer"),
        (
            lambda: segment_mask(HAND_ROWS, pad="none"),
            "^segment_mask: pad = 'none' is not known. Hint: choose one of segment, self, empty",
        ),
        (
            lambda: build_packing_attention_bias(HAND_ROWS, jnp.int32),
            r"^build_packing_attention_bias: dtype = 'int32' is not known. Hint: .*bfloat16, "
            "float32, float64, float16",
        ),
        (lambda: segment_bias(HAND_ROWS, "float8_e4m3fn"), "'float8_e4m3fn'"),
        (lambda: segment_bias(HAND_ROWS, None), "^segment_bias: dtype = None is not known.*Hint:"),
        (lambda: segment_bias(HAND_ROWS, "foo"), "dtype = 'foo' is not known"),
        (
            lambda: segment_bias(HAND_ROWS, jnp.float16, mask_value=-1e9),
            r"^segment_bias: mask_value = -1000000000.0 is -inf in float16, not finite and "
            "negative. Hint: leave it out to get -32768",
        ),
        (
            lambda: segment_bias(HAND_ROWS, jnp.bfloat16, mask_value=np.finfo(np.float32).min),
            "is -inf in bfloat16, not finite and negative. Hint: leave it out to get -2199023",
        ),
        (lambda: segment_bias(HAND_ROWS, mask_value=-np.inf), "mask_value = -inf is -inf in float"),
        (lambda: segment_bias(HAND_ROWS, mask_value=float("nan")), "is nan in float32"),
        (lambda: segment_bias(HAND_ROWS, mask_value=1e9), "not finite and negative"),
        (lambda: segment_bias(HAND_ROWS, mask_value=-(10**400)), "is not a number. Hint: leave it"),
        (lambda: segment_bias(HAND_ROWS, mask_value="low"), "mask_value = 'low' is not a number"),
        (lambda: segment_bias(HAND_ROWS, mask_value=(-1.0, -2.0)), "is not a number"),
        (
            lambda: segment_bias(HAND_ROWS, jnp.float64),
            "^segment_bias: dtype = 'float64', but JAX makes it float32 unless jax_enable_x64 is "
            "set. Hint: pass float32, or set jax_enable_x64",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()


def test_errors_come_while_tracing():
    rows = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    with pytest.raises(SeqpackError, match="segment_mask: segment_ids is float32"):
        jax.eval_shape(segment_mask, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    too_low = functools.partial(segment_bias, dtype=jnp.float16, mask_value=-1e9)
    with pytest.raises(SeqpackError, match="is -inf in float16"):
        jax.eval_shape(too_low, rows)
