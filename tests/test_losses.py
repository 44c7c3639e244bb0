import functools

import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.losses import loss_weights, next_token_labels, token_mean

VOCABULARY = 7
ROWS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 0, 0],
        [0, 1, 1, 0, 2, 2, 2, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, ROWS.shape).astype(np.int32)
LOSSES = np.random.default_rng(1).uniform(1, 2, ROWS.shape).astype(np.float32)
REAL = ROWS > 0


# --- labels -----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.lists(st.integers(0, 99), min_size=8, max_size=8),
)
def test_labels_equal_the_loop(row, tokens):
    labels, weights = next_token_labels(np.array(tokens), np.array(row))
    expected = model_reference.next_token_labels(tokens, row, -100)
    assert (labels.tolist(), weights.tolist()) == expected
    assert (labels.dtype, weights.dtype) == (jnp.int32, jnp.float32)


def test_labels_by_hand():
    row, tokens = np.array([1, 1, 1, 2, 3, 3, 0, 0]), np.arange(10, 18)
    labels, weights = next_token_labels(tokens, row, ignore_index=-1)
    assert labels.tolist() == [11, 12, -1, -1, 15, -1, -1, -1]
    assert weights.tolist() == [1, 1, 0, 0, 1, 0, 0, 0]


def test_tokens_in_padding_do_not_matter():
    garbage = np.where(REAL, TOKENS, 12345)
    for clean, dirty in zip(
        next_token_labels(TOKENS, ROWS), next_token_labels(garbage, ROWS), strict=True
    ):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64"])
def test_tokens_of_every_integer_dtype(dtype):
    labels, _ = next_token_labels(TOKENS.astype(dtype), ROWS.astype(dtype))
    np.testing.assert_array_equal(labels, next_token_labels(TOKENS, ROWS)[0])
    assert labels.dtype == jnp.int32


# --- weights and the mean ---------------------------------------------------------------------


def test_mean_over_real_tokens():
    weights, denominator = loss_weights(ROWS)
    np.testing.assert_array_equal(weights, REAL.astype(np.float32))
    assert float(denominator) == REAL.sum()
    for result in (token_mean(LOSSES, weights, denominator), token_mean(LOSSES, weights)):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, LOSSES[REAL].mean(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool, jnp.bfloat16])
def test_mean_over_weighted_tokens(dtype):
    given = np.where(REAL, np.arange(8) % 3, 9).astype(dtype)
    weights, denominator = loss_weights(ROWS, given)
    expected = np.average(LOSSES[REAL], weights=given[REAL].astype(np.float32))
    np.testing.assert_allclose(token_mean(LOSSES, weights, denominator), expected, rtol=1e-6)
    assert not weights[~REAL].any()


def test_low_precision_is_summed_in_float32():
    ones = jnp.ones((2, 4096), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
    assert float(token_mean(ones, jnp.ones((2, 4096)), 1.0)) == 8192


def test_a_batch_of_padding_has_loss_and_gradient_zero():
    padding = jnp.zeros((2, 4), jnp.int32)
    with jax.debug_nans(True):
        weights, denominator = loss_weights(padding)
        loss, gradient = jax.value_and_grad(token_mean)(jnp.ones((2, 4)), weights, denominator)
    assert (float(loss), float(denominator)) == (0, 0)
    assert not gradient.any()


@pytest.mark.parametrize("reduce_denominator", [True, False])
def test_devices_add_up_to_the_global_mean(reduce_denominator):
    @functools.partial(jax.vmap, axis_name="data")  # one row per device, one of them padding
    def step(losses, rows):
        weights, denominator = loss_weights(rows)
        if reduce_denominator:
            denominator = jax.lax.psum(denominator, "data")
            return jax.lax.psum(token_mean(losses, weights, denominator), "data")
        return jax.lax.pmean(token_mean(losses, weights, denominator), "data")

    error = np.abs(step(LOSSES, ROWS) - LOSSES[REAL].mean()).max()
    assert error < 1e-6 if reduce_denominator else error > 0.1  # a mean of means is wrong


# --- NaN --------------------------------------------------------------------------------------


def test_nan_in_padding_reaches_neither_mean_nor_gradient():
    weights, denominator = loss_weights(ROWS, np.where(REAL, np.float32(1), np.nan))
    dirty = np.where(REAL, LOSSES, np.nan)
    mean = jax.value_and_grad(token_mean, argnums=(0, 1))
    expected, result = mean(LOSSES, weights, denominator), mean(dirty, weights, denominator)
    assert float(result[0]) == float(expected[0])
    np.testing.assert_array_equal(result[1][0], expected[1][0])
    assert np.isfinite(result[1][1]).all()
    assert np.isnan(np.sum(dirty * np.asarray(weights)))  # what 0 x NaN would have done


def test_nan_in_a_real_token_stays_visible():
    dirty = LOSSES.copy()
    dirty[0, 0] = np.nan
    assert np.isnan(token_mean(dirty, loss_weights(ROWS).weights))


def packed_loss(table, tokens, rows):
    """Compute the loss of a bigram model: the logits of the next token are a row of `table`."""
    labels, weights = next_token_labels(tokens, rows)
    losses = optax.softmax_cross_entropy_with_integer_labels(table[tokens], labels)
    return token_mean(losses, *loss_weights(rows, weights))


def loss_alone(table, tokens, rows):
    """Compute it one sequence at a time."""
    log_probabilities, total, count = jax.nn.log_softmax(table), 0.0, 0
    for b, row in enumerate(rows.tolist()):
        for start, stop in model_reference.runs(row):
            for token in range(start, stop - 1):
                total -= log_probabilities[tokens[b, token], tokens[b, token + 1]]
                count += 1
    return total / count


def plain_shift_loss(table, tokens, rows):
    losses = optax.softmax_cross_entropy_with_integer_labels(table[tokens], np.roll(tokens, -1, 1))
    return token_mean(losses, loss_weights(rows).weights)


@pytest.mark.parametrize("loss", [packed_loss, plain_shift_loss])
def test_packed_loss_equals_each_sequence_alone(loss):
    table = jnp.asarray(np.random.default_rng(2).normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)
    expected, expected_gradient = jax.value_and_grad(loss_alone)(table, TOKENS, ROWS)
    result, gradient = jax.value_and_grad(loss)(table, TOKENS, ROWS)
    errors = abs(result - expected), jnp.abs(gradient - expected_gradient).max()
    if loss is packed_loss:
        assert max(errors) < 1e-5
    else:  # the comparison can fail
        assert min(errors) > 1e-2


def test_the_label_minus_100_is_nan_to_optax_and_dropped():
    labels, _ = next_token_labels(TOKENS, ROWS)
    logits = jnp.zeros((*ROWS.shape, VOCABULARY))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert np.isnan(losses[labels == -100]).all()
    table = jnp.zeros((VOCABULARY, VOCABULARY))
    loss, gradient = jax.value_and_grad(packed_loss)(table, TOKENS, ROWS)
    np.testing.assert_allclose(loss, np.log(VOCABULARY), rtol=1e-6)
    assert np.isfinite(gradient).all()


# --- how they compile -------------------------------------------------------------------------


def test_one_compilation_serves_all_batches():
    traces = 0

    @jax.jit
    def step(tokens, rows):
        nonlocal traces
        traces += 1
        return packed_loss(jnp.eye(VOCABULARY), tokens, rows)

    results = [float(step(TOKENS, rows)) for rows in (ROWS, ROWS[::-1], np.zeros_like(ROWS))]
    assert traces == 1
    assert results[-1] == 0


@pytest.mark.parametrize(
    "function", [functools.partial(next_token_labels, TOKENS[0]), loss_weights]
)
def test_vmap_over_rows_equals_a_loop(function):
    mapped = jax.tree.leaves(jax.vmap(function)(ROWS))
    looped = [jax.tree.leaves(function(row)) for row in ROWS]
    for result, rows in zip(mapped, zip(*looped, strict=True), strict=True):
        np.testing.assert_array_equal(result, np.stack(rows))


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: next_token_labels(TOKENS[0], ROWS),
            r"^next_token_labels: tokens has shape \(8,\), but segment_ids has shape \(4, 8\). "
            r"Hint: pass both as",
        ),
        (lambda: next_token_labels(LOSSES, ROWS), "^next_token_labels: tokens is float32.*Hint:"),
        (lambda: next_token_labels(TOKENS, LOSSES), "^next_token_labels: segment_ids is float32"),
        (
            lambda: next_token_labels(TOKENS, ROWS, ignore_index=2**31),
            r"ignore_index = 2147483648, but it must be in \[-2147483648, 2147483647\]. Hint:",
        ),
        (lambda: loss_weights(LOSSES), "^loss_weights: segment_ids is float32.*Hint:"),
        (
            lambda: loss_weights(ROWS, LOSSES[0]),
            r"^loss_weights: weights has shape \(8,\), but segment_ids has shape \(4, 8\). Hint:",
        ),
        (
            lambda: token_mean(LOSSES[0], LOSSES),
            r"^token_mean: values has shape \(8,\), but weights has shape \(4, 8\). Hint:",
        ),
        (
            lambda: token_mean(LOSSES, LOSSES, LOSSES[0]),
            r"^token_mean: denominator has shape \(8,\), but it must be a scalar. Hint:",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()
