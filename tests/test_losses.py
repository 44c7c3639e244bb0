import functools

import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import optax
import pytest
from attention_reference import HARD_ROWS
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.losses import (
    loss_weights,
    next_token_labels,
    packed_cross_entropy,
    segment_log_probs,
    token_mean,
)

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
REDUCTIONS = ["token", "segment", "row"]


# --- slow and obvious ---------------------------------------------------------------------------


def weights_by_loops(rows, weights, reduction):
    """Return weights `[B, L]` and their denominator, in float64."""
    result, denominator = np.zeros(rows.shape), 0.0
    for b, row in enumerate(rows):
        tokens = [list(range(*run)) for run in model_reference.runs(row)]
        row_of_tokens = [i for segment in tokens for i in segment]
        groups = {
            "token": [[i] for i in row_of_tokens],
            "segment": tokens,
            "row": [row_of_tokens],
        }[reduction]
        for group in groups:
            total = sum(float(weights[b, i]) for i in group)
            denominator += total if reduction == "token" else float(total != 0)
            for i in group:
                scale = 1 if reduction == "token" or not total else total
                result[b, i] = weights[b, i] / scale
    return result, denominator


def losses_alone(logits, tokens, rows):
    """Return the cross entropy of each token's prediction and its gradient, sequence by sequence.

    float64 `[B, L]` and `[B, L, V]`; 0 where nothing is predicted.
    """
    logits = np.asarray(logits, np.float64)
    losses, gradients = np.zeros(rows.shape), np.zeros(logits.shape)
    for b, row in enumerate(rows):
        for start, stop in model_reference.runs(row):
            sequence, scores = tokens[b, start:stop], logits[b, start:stop]
            for i in range(len(sequence) - 1):
                exponential = np.exp(scores[i] - scores[i].max())
                probabilities = exponential / exponential.sum()
                losses[b, start + i] = -np.log(probabilities[sequence[i + 1]])
                probabilities[sequence[i + 1]] -= 1
                gradients[b, start + i] = probabilities
    return losses, gradients


def random_batch(rows, vocabulary=VOCABULARY, seed=5):
    """Return float32 logits `[B, L, V]` and tokens `[B, L]`."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(*rows.shape, vocabulary)).astype(np.float32)
    return logits, draw.integers(0, vocabulary, rows.shape).astype(np.int32)


def moved_to_predictions(weights, rows):
    """Return the weight of each token at the token that predicts it, 0 where nothing is."""
    result = np.zeros(rows.shape)
    for b, row in enumerate(rows):
        for start, stop in model_reference.runs(row):
            result[b, start : stop - 1] = weights[b, start + 1 : stop]
    return result


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


# --- weights by segment and by row --------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_equal_the_loops(reduction, weighted):
    rows = HARD_ROWS
    weights = np.random.default_rng(3).integers(0, 3, rows.shape) if weighted else None
    result = loss_weights(rows, weights, reduction=reduction)
    given = np.ones(rows.shape) if weights is None else weights
    expected, denominator = weights_by_loops(rows, given, reduction)
    np.testing.assert_allclose(result.weights, expected, atol=1e-6)
    np.testing.assert_allclose(result.denominator, denominator, rtol=1e-6)
    np.testing.assert_allclose(np.sum(result.weights), denominator, rtol=1e-6)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.sampled_from(REDUCTIONS))
def test_weights_equal_the_loops_on_random_runs(row, reduction):
    rows = np.array([row, row[::-1]])  # ids neither in order nor without gaps
    result = loss_weights(rows, reduction=reduction)
    expected, denominator = weights_by_loops(rows, np.ones(rows.shape), reduction)
    np.testing.assert_allclose(result.weights, expected, atol=1e-6)
    assert float(result.denominator) == pytest.approx(denominator)


def test_segments_and_rows_without_any_weight_do_not_count():
    weights = np.array([[0, 0, 0, 1, 1, 0, 9, 9]])
    for reduction, expected in {"token": 2, "segment": 1, "row": 1}.items():
        result = loss_weights(ROWS[:1], weights, reduction=reduction)
        assert float(result.denominator) == expected
        assert np.flatnonzero(result.weights).tolist() == [3, 4]
        assert float(loss_weights(ROWS, 0 * ROWS, reduction=reduction).denominator) == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_weights_in_padding_are_ignored(reduction):
    clean = loss_weights(ROWS, LOSSES, reduction=reduction)
    dirty = loss_weights(ROWS, np.where(REAL, LOSSES, np.nan), reduction=reduction)
    for found, expected in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(found, expected)


def normalisation_example():
    """Losses of two rows of 30 tokens, 58 of them real, that have four different means."""
    rows = np.array([[1] * 26 + [2] * 4, [1] * 25 + [2] * 3 + [0] * 2])
    values = np.array([[0, 1.2, 4.935], [99, 1.3776, 2.2034]])
    return rows, np.take_along_axis(values, rows, axis=1).astype(np.float32)


def test_the_same_losses_have_four_means():
    rows, losses = normalisation_example()
    means = {
        reduction: float(token_mean(losses, *loss_weights(rows, reduction=reduction)))
        for reduction in REDUCTIONS
    }
    means["padding counted"] = float(np.sum(losses * (rows > 0)) / rows.size)
    assert {name: round(mean, 3) for name, mean in means.items()} == {
        "token": 1.586,
        "row": 1.582,
        "segment": 2.429,
        "padding counted": 1.533,
    }


@functools.cache
def split_step(devices, rows_at_a_time, reduction):
    """A loss of `[B, L]` losses: rows over devices, micro-batches on each, and their gradient."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

    def local(losses, rows):
        chunks = range(0, len(rows), rows_at_a_time)
        given = [loss_weights(rows[i : i + rows_at_a_time], reduction=reduction) for i in chunks]
        denominator = jax.lax.psum(sum(each.denominator for each in given), "data")
        parts = [
            token_mean(losses[i : i + rows_at_a_time], each.weights, denominator)
            for i, each in zip(chunks, given, strict=True)
        ]
        return jax.lax.psum(sum(parts), "data")

    over_rows = PartitionSpec("data")
    step = jax.shard_map(
        local, mesh=mesh, in_specs=(over_rows, over_rows), out_specs=PartitionSpec()
    )
    return jax.jit(jax.value_and_grad(step))


@pytest.mark.parametrize(
    ("reduction", "devices", "rows_at_a_time"),
    [("token", 4, 1), ("row", 4, 1), ("segment", 4, 2), ("segment", 4, 1), ("segment", 1, 4)],
)
def test_any_split_over_devices_and_micro_batches_gives_one_number(
    reduction, devices, rows_at_a_time
):
    rows = np.concatenate([HARD_ROWS, HARD_ROWS[2:4]])  # one is padding
    losses = np.random.default_rng(7).uniform(1, 9, rows.shape).astype(np.float32)
    weights, denominator = weights_by_loops(rows, np.ones(rows.shape), reduction)
    expected = (losses * weights).sum() / denominator
    for seed in range(3):  # which rows share a device
        order = np.random.default_rng(seed).permutation(len(rows))
        step = split_step(devices, rows_at_a_time, reduction)
        loss, gradient = step(losses[order], rows[order])
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, weights[order] / denominator, rtol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_means_of_rows_depend_on_the_packing_and_no_others(reduction):
    one_row = np.array([[1, 1, 1, 2, 3, 3], [0, 0, 0, 0, 0, 0]])
    two_rows = np.array([[1, 1, 1, 2, 0, 0], [1, 1, 0, 0, 0, 0]])
    means = []
    for rows in (one_row, two_rows):
        losses = np.zeros(rows.shape, np.float32)
        losses[rows > 0] = [1, 2, 3, 4, 5, 6]
        means.append(float(token_mean(losses, *loss_weights(rows, reduction=reduction))))
    assert (abs(means[0] - means[1]) < 1e-6) == (reduction != "row")


# --- cross entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "weighted", "dtype", "bound"),
    [
        ("token", False, jnp.float32, 1e-5),
        ("token", True, jnp.float32, 1e-5),
        ("segment", True, jnp.float32, 1e-5),
        ("row", True, jnp.float32, 1e-5),
        ("segment", False, jnp.bfloat16, 1e-2),
    ],
)
def test_cross_entropy_equals_each_sequence_alone(reduction, weighted, dtype, bound):
    logits, tokens = random_batch(HARD_ROWS)
    logits = jnp.asarray(logits, dtype)
    weights = np.random.default_rng(3).integers(0, 3, HARD_ROWS.shape) if weighted else None
    given = np.ones(HARD_ROWS.shape) if weights is None else weights

    def mean(logits):
        result = packed_cross_entropy(logits, tokens, HARD_ROWS, weights, reduction=reduction)
        return token_mean(*result), result

    (loss, result), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(logits)
    alone, gradients = losses_alone(logits, tokens, HARD_ROWS)
    expected, denominator = weights_by_loops(
        HARD_ROWS, moved_to_predictions(given, HARD_ROWS), reduction
    )
    np.testing.assert_allclose(result.losses, alone * (expected != 0), atol=1e-5)
    np.testing.assert_allclose(result.weights, expected, atol=1e-6)
    np.testing.assert_allclose(loss, (alone * expected).sum() / denominator, atol=1e-5)
    error = np.asarray(gradient, np.float64) - gradients * expected[..., None] / denominator
    assert np.abs(error).max() * denominator < bound  # the bound is on gradients of size 1
    assert (gradient.dtype, result.losses.dtype) == (dtype, jnp.float32)


def test_weights_are_those_of_the_predicted_tokens():
    rows, prompt = np.array([[1, 1, 1, 1, 2, 2, 2, 0]]), np.array([[1, 1, 0, 0, 1, 0, 0, 1]])
    logits, tokens = random_batch(rows)
    result = packed_cross_entropy(logits, tokens, rows, 1 - prompt)
    # Token 1 is the last of the prompt: it predicts the first of the answer.
    assert np.flatnonzero(result.weights).tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 128])  # of 128, -100 is a class
def test_what_predicts_nothing_does_not_matter(vocabulary):
    logits, tokens = random_batch(HARD_ROWS, vocabulary)
    weights = np.random.default_rng(3).integers(0, 2, HARD_ROWS.shape)
    counts = moved_to_predictions(weights, HARD_ROWS) != 0
    dirty = np.where(counts[..., None], logits, np.float32(np.nan))
    garbage = np.where(HARD_ROWS > 0, tokens, 10**6)
    dirty_weights = np.where(HARD_ROWS > 0, weights, np.nan)

    def losses(logits, tokens, weights):
        result = packed_cross_entropy(logits, tokens, HARD_ROWS, weights)
        scores = segment_log_probs(logits, tokens, HARD_ROWS, 16, weights)
        return token_mean(*result) + jnp.sum(scores**2), (result.losses, scores)

    function = jax.jit(jax.value_and_grad(losses, has_aux=True))
    clean = jax.tree.leaves(function(logits, tokens, weights.astype(np.float32)))
    with jax.debug_nans(True):
        found = jax.tree.leaves(function(dirty, garbage, dirty_weights.astype(np.float32)))
    for result, expected in zip(found, clean, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_nan_logits_that_count_stay_visible():
    logits, tokens = random_batch(HARD_ROWS)
    logits[0, 0] = np.nan
    assert np.isnan(token_mean(*packed_cross_entropy(logits, tokens, HARD_ROWS)))
    scores = segment_log_probs(logits, tokens, HARD_ROWS, 16)
    assert np.argwhere(np.isnan(scores)).tolist() == [[0, 0]]


@pytest.mark.parametrize("rows", [np.zeros((2, 4), np.int32), np.array([[1, 2, 3, 0]] * 2)])
def test_batches_that_predict_nothing_have_loss_and_gradient_zero(rows):
    logits, tokens = random_batch(rows)

    def loss(logits):
        scores = segment_log_probs(logits, tokens, rows, 4)
        return token_mean(*packed_cross_entropy(logits, tokens, rows)) + scores.sum()

    with jax.debug_nans(True):
        result, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert float(result) == 0
    assert not gradient.any()


def test_no_one_hot_labels_and_few_copies_of_the_logits():
    shape, size = (1, 256, 4096), 4 * 256 * 4096
    logits = jax.ShapeDtypeStruct(shape, jnp.float32)
    tokens = jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def loss(logits, tokens, rows):
        return token_mean(*packed_cross_entropy(logits, tokens, rows))

    compiled = jax.jit(jax.grad(loss)).lower(logits, tokens, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * size


# --- log-probabilities of segments --------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_segments", "dtype", "bound"), [(3, jnp.float32, 1e-5), (16, jnp.bfloat16, 1e-2)]
)
def test_log_probs_equal_each_sequence_alone(max_segments, dtype, bound):
    logits, tokens = random_batch(HARD_ROWS)
    logits = jnp.asarray(logits, dtype)
    weights = np.random.default_rng(3).integers(0, 3, HARD_ROWS.shape)
    shape = (len(HARD_ROWS), max_segments)
    cotangent = np.random.default_rng(4).normal(size=shape).astype(np.float32)

    @jax.jit
    def both(logits):
        scores, pull = jax.vjp(
            lambda logits: segment_log_probs(logits, tokens, HARD_ROWS, max_segments, weights),
            logits,
        )
        return scores, pull(cotangent)[0]

    scores, gradient = both(logits)
    alone, gradients = losses_alone(logits, tokens, HARD_ROWS)
    moved = moved_to_predictions(weights, HARD_ROWS)
    expected, expected_gradient = np.zeros(shape), np.zeros(gradients.shape)
    for b, i in np.ndindex(HARD_ROWS.shape):
        slot = HARD_ROWS[b, i] - 1
        if 0 <= slot < max_segments:
            expected[b, slot] -= alone[b, i] * moved[b, i]
            expected_gradient[b, i] = -gradients[b, i] * moved[b, i] * cotangent[b, slot]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.dtype == jnp.float32
    assert not np.signbit(scores[expected == 0]).any()  # no -0.0 where nothing is predicted
    error = np.asarray(gradient, np.float64) - expected_gradient
    scale = np.abs(expected_gradient).max()
    assert np.abs(error).max() / scale < bound  # relative to gradients of size 1


def test_dpo_of_pairs_in_one_row_equals_pairs_alone():
    rows = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4], [1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0]])
    (logits, tokens), (reference, _) = random_batch(rows), random_batch(rows, seed=6)

    def packed(logits):
        ratios = segment_log_probs(logits, tokens, rows, 6)
        ratios -= segment_log_probs(reference, tokens, rows, 6)
        losses = -jax.nn.log_sigmoid(0.1 * (ratios[:, 0::2] - ratios[:, 1::2]))
        exists = np.arange(2, 7, 2) <= rows.max(axis=1, keepdims=True)
        return jnp.sum(jnp.where(exists, losses, 0.0)) / 3

    expected, expected_gradient = 0.0, np.zeros(logits.shape)
    (of_policy, slopes), (of_reference, _) = (
        losses_alone(each, tokens, rows) for each in (logits, reference)
    )
    for b, chosen in [(0, 1), (0, 3), (1, 1)]:
        pair = [slice(*model_reference.runs(rows[b])[chosen - 1 + i]) for i in range(2)]
        better, worse = ((of_reference - of_policy)[b, tokens].sum() for tokens in pair)
        surprise = 1 / (1 + np.exp(0.1 * (better - worse)))
        expected -= np.log(1 - surprise) / 3
        for run, sign in zip(pair, (1, -1), strict=True):
            expected_gradient[b, run] = sign * surprise * 0.1 / 3 * slopes[b, run]
    result, gradient = jax.jit(jax.value_and_grad(packed))(logits)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


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
    """Compute it and its gradient one sequence at a time, in float64."""
    losses, slopes = losses_alone(table[tokens], tokens, rows)
    count = moved_to_predictions(np.ones(rows.shape), rows).sum()
    gradient = np.zeros(table.shape)
    np.add.at(gradient, tokens, slopes / count)
    return losses.sum() / count, gradient


def plain_shift_loss(table, tokens, rows):
    losses = optax.softmax_cross_entropy_with_integer_labels(table[tokens], jnp.roll(tokens, -1, 1))
    return token_mean(losses, loss_weights(rows).weights)


@pytest.mark.parametrize("loss", [packed_loss, plain_shift_loss])
def test_packed_loss_equals_each_sequence_alone(loss):
    table = np.random.default_rng(2).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    expected, expected_gradient = loss_alone(table, TOKENS, ROWS)
    result, gradient = jax.jit(jax.value_and_grad(loss))(table, TOKENS, ROWS)
    errors = abs(float(result) - expected), np.abs(gradient - expected_gradient).max()
    if loss is packed_loss:
        assert max(errors) < 1e-5
    else:  # the comparison can fail
        assert min(errors) > 1e-2


def test_the_label_minus_100_is_nan_to_optax_and_dropped():
    labels, _ = next_token_labels(TOKENS, ROWS)
    logits = jnp.zeros((*ROWS.shape, VOCABULARY))
    losses = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits, labels)
    assert np.isnan(np.asarray(losses)[np.asarray(labels) == -100]).all()
    table = np.zeros((VOCABULARY, VOCABULARY), np.float32)
    loss, gradient = jax.jit(jax.value_and_grad(packed_loss))(table, TOKENS, ROWS)
    np.testing.assert_allclose(loss, np.log(VOCABULARY), rtol=1e-6)
    assert np.isfinite(gradient).all()


# --- how they compile -------------------------------------------------------------------------


def test_one_compilation_serves_all_batches():
    traces = 0

    @jax.jit
    def step(tokens, rows):
        nonlocal traces
        traces += 1
        table = jnp.eye(VOCABULARY)
        losses = packed_cross_entropy(table[tokens], tokens, rows, reduction="segment")
        scores = segment_log_probs(table[tokens], tokens, rows, 4)
        return packed_loss(table, tokens, rows) + token_mean(*losses) + scores.sum()

    results = [float(step(TOKENS, rows)) for rows in (ROWS, ROWS[::-1], np.zeros_like(ROWS))]
    assert traces == 1
    assert results[-1] == 0


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(next_token_labels, TOKENS[0]),
        functools.partial(loss_weights, reduction="segment"),
        functools.partial(loss_weights, reduction="row"),
        functools.partial(packed_cross_entropy, np.eye(VOCABULARY)[TOKENS[0]], TOKENS[0]),
        functools.partial(
            segment_log_probs, np.eye(VOCABULARY)[TOKENS[0]], TOKENS[0], max_segments=3
        ),
    ],
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
            lambda: loss_weights(ROWS, reduction="mean"),
            "^loss_weights: reduction = 'mean' is not known. Hint: choose one of token, segment",
        ),
        (
            lambda: packed_cross_entropy(LOSSES, TOKENS, ROWS),
            r"^packed_cross_entropy: logits is float32 of shape \(4, 8\), but segment_ids has "
            r"shape \(4, 8\). Hint: pass logits as floats \[..., L, V\]",
        ),
        (
            lambda: packed_cross_entropy(ROWS[..., None], TOKENS, ROWS),
            "^packed_cross_entropy: logits is int32",
        ),
        (
            lambda: packed_cross_entropy(LOSSES[..., None], LOSSES, ROWS),
            "^packed_cross_entropy: tokens is float32",
        ),
        (
            lambda: packed_cross_entropy(LOSSES[..., None], TOKENS[0], ROWS),
            r"^packed_cross_entropy: tokens has shape \(8,\), but segment_ids",
        ),
        (
            lambda: packed_cross_entropy(LOSSES[..., None], TOKENS, ROWS, LOSSES[0]),
            r"^packed_cross_entropy: weights has shape \(8,\), but segment_ids",
        ),
        (
            lambda: packed_cross_entropy(LOSSES[..., None], TOKENS, ROWS, reduction="sum"),
            "^packed_cross_entropy: reduction = 'sum' is not known",
        ),
        (
            lambda: segment_log_probs(LOSSES, TOKENS, ROWS, 3),
            "^segment_log_probs: logits is float32",
        ),
        (
            lambda: segment_log_probs(LOSSES[..., None], TOKENS, ROWS, 0),
            "^segment_log_probs: max_segments = 0, but it must be in",
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
