import functools

import jax
import jax.numpy as jnp
import model_reference
import numpy as np
import optax
import pytest
from attention_reference import HARD_ROWS, attend_alone, gradients_alone, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.context_parallel import reorder_context_parallel
from seqpack_jax.model.losses import loss_weights, next_token_labels, token_mean
from seqpack_jax.model.reductions import segment_sum
from seqpack_jax.model.segments import (
    positions_from_segment_ids,
    segment_info,
    segment_mask,
)

STRATEGIES = ["zigzag", "striped"]
VOCABULARY = 7
WHOLE, OVER_CONTEXT = PartitionSpec(), PartitionSpec(None, "context")
POSITIONS = np.array([model_reference.positions(row) for row in HARD_ROWS], np.int32)


# --- slow and obvious ---------------------------------------------------------------------------


def order_of(length, cp_size, strategy, stripe_size=1):
    """Return which token stands where, device after device."""
    order = []
    for device in range(cp_size):
        if strategy == "zigzag":
            chunk = length // (2 * cp_size)
            for index in (device, 2 * cp_size - 1 - device):
                order += range(index * chunk, (index + 1) * chunk)
        else:
            for start in range(device * stripe_size, length, cp_size * stripe_size):
                order += range(start, start + stripe_size)
    return np.array(order)


def maxtext_inverse(cp_size):
    """Return where MaxText and TransformerEngine find the chunks to put back, for even `cp_size`.

    They write out the inverse of the zigzag as a rule of its own: pairs of chunks, from the front
    for the first half of the row, from the back for the second.
    """
    front = [(4 * pair, 4 * pair + 2) for pair in range(cp_size // 2)]
    back = [(2 * cp_size - 1 - chunk, 2 * cp_size - 1 - other) for chunk, other in front]
    return np.array(front + back).ravel()


def pairs_of(row):
    """Return for each token how many tokens it attends to, causally."""
    return np.where(row > 0, np.array(model_reference.positions(row)) + 1, 0)


# --- the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cp_size", "strategy", "stripe_size", "expected"),
    [
        # The examples in MaxText's docstring and in TransformerEngine's developer notes.
        (2, "zigzag", 1, [0, 1, 6, 7, 2, 3, 4, 5]),
        (4, "striped", 1, [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]),
        (2, "striped", 2, [0, 1, 4, 5, 2, 3, 6, 7]),
        (3, "zigzag", 1, [0, 5, 1, 4, 2, 3]),
    ],
)
def test_published_examples(cp_size, strategy, stripe_size, expected):
    tokens = np.arange(len(expected))[None]
    result = reorder_context_parallel(tokens, cp_size, strategy, stripe_size=stripe_size)
    assert result[0].tolist() == expected
    assert order_of(len(expected), cp_size, strategy, stripe_size).tolist() == expected


@settings(max_examples=15)
@given(
    st.integers(1, 5), st.sampled_from(STRATEGIES), st.integers(1, 3), st.integers(1, 3), st.data()
)
def test_order_and_inverse(cp_size, strategy, stripe_size, times, data):
    stripe_size = 1 if strategy == "zigzag" else stripe_size
    length = times * cp_size * (2 if strategy == "zigzag" else stripe_size)
    axis = data.draw(st.integers(-3, 2))
    shape = [2, 3, 2]
    shape[axis] = length
    array = np.arange(np.prod(shape)).reshape(shape)
    options = {"axis": axis, "stripe_size": stripe_size}
    result = reorder_context_parallel(array, cp_size, strategy, **options)
    order = order_of(length, cp_size, strategy, stripe_size)
    if cp_size == 1:
        order = np.arange(length)
    np.testing.assert_array_equal(result, array.take(order, axis=axis))
    back = reorder_context_parallel(result, cp_size, strategy, inverse=True, **options)
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("cp_size", [2, 4, 6])
def test_inverse_is_that_of_maxtext(cp_size):
    chunks = np.arange(2 * cp_size)
    result = reorder_context_parallel(chunks, cp_size, axis=0, inverse=True)
    np.testing.assert_array_equal(result, chunks[maxtext_inverse(cp_size)])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tree_moves_together(strategy):
    tokens = np.arange(HARD_ROWS.size, dtype=np.int32).reshape(HARD_ROWS.shape)
    labels, weights = next_token_labels(tokens, HARD_ROWS)
    info = segment_info(HARD_ROWS, causal=True, window=3, max_segments=16)
    tree = {
        "tokens": tokens,
        "labels": (labels, weights),
        "mask": HARD_ROWS > 0,
        "half": jnp.asarray(np.random.default_rng(0).normal(size=(6, 16, 3)), jnp.bfloat16),
        "nothing": None,
        "info": info,
    }
    result = reorder_context_parallel(tree, 4, strategy)
    order = order_of(16, 4, strategy)
    assert (result["info"].contiguous, info.contiguous, result["nothing"]) == (False, True, None)
    moved = result["info"]
    assert (moved.causal, moved.window, moved.max_segments) == (True, 3, 16)
    for found, whole in zip(jax.tree.leaves(result), jax.tree.leaves(tree), strict=True):
        assert found.dtype == whole.dtype
        np.testing.assert_array_equal(found, np.asarray(whole)[:, order])
    back = reorder_context_parallel(result, 4, strategy, inverse=True)
    assert back["info"].contiguous
    for found, whole in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(found, whole)


def test_one_device_changes_nothing():
    info = segment_info(HARD_ROWS[:, :15])  # of no even length
    result = reorder_context_parallel(info, 1)
    assert result.contiguous
    np.testing.assert_array_equal(result.segment_ids, info.segment_ids)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_is_the_inverse(strategy):
    array, cotangent = np.random.default_rng(0).normal(size=(2, 2, 16)).astype(np.float32)
    _, pull = jax.vjp(lambda array: reorder_context_parallel(array, 4, strategy), array)
    expected = reorder_context_parallel(cotangent, 4, strategy, inverse=True)
    np.testing.assert_array_equal(pull(cotangent)[0], expected)


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("causal", "window", "pad"), [(True, None, "self"), (True, 3, "empty"), (False, 2, "self")]
)
def test_mask_by_position_is_the_reordered_mask(strategy, causal, window, pad):
    info = segment_info(HARD_ROWS, causal=causal, window=window)
    order = order_of(16, 4, strategy)
    expected = np.asarray(info.mask(pad))[:, :, order][..., order]
    result = reorder_context_parallel(info, 4, strategy)
    np.testing.assert_array_equal(result.mask(pad), expected)
    np.testing.assert_array_equal(result.bias(jnp.bfloat16, pad) == 0, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_goes_by_index_is_refused_or_wrong(strategy):
    info = reorder_context_parallel(segment_info(HARD_ROWS, max_segments=16), 4, strategy)
    for method in (
        info.kv_bounds,
        functools.partial(info.block_bounds, 4, 4),
        info.seqlens_and_offsets,
        info.monotone_ids,
    ):
        with pytest.raises(SeqpackError, match=r"reordered.*Hint: use mask\(\)"):
            method()
    by_index = segment_mask(info.segment_ids, causal=True, pad="empty")
    assert (by_index != info.mask("empty")).any()
    computed_again = positions_from_segment_ids(info.segment_ids)
    assert (computed_again != info.positions).any()


# --- attention on four devices ------------------------------------------------------------------


def mesh_of(**axes):
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def attend_shared(query, key, value, info):
    """Attend from this device's tokens to those of all devices."""
    everything = key, value, info.segment_ids, info.positions
    key, value, ids, positions = jax.lax.all_gather(everything, "context", axis=1, tiled=True)
    mask = segment_mask(
        info.segment_ids,
        ids,
        q_positions=info.positions,
        kv_positions=positions,
        causal=info.causal,
        window=info.window,
    )
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def sharded_attention(strategy, cp_size, mesh, spec, info, stripe_size=1):
    """Return attention `(query, key, value) -> output`, in the order of the rows, over devices."""
    reorder = functools.partial(
        reorder_context_parallel, cp_size=cp_size, strategy=strategy, stripe_size=stripe_size
    )
    shared = jax.shard_map(attend_shared, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)

    def attend(query, key, value):
        return reorder(shared(*reorder((query, key, value, info))), inverse=True)

    return attend


@pytest.mark.parametrize(
    ("strategy", "devices", "stripe_size", "causal", "window"),
    [
        ("zigzag", {"context": 4}, 1, True, None),
        ("zigzag", {"data": 2, "context": 2}, 1, False, 2),
        ("striped", {"context": 4}, 2, True, 3),
    ],
)
def test_attention_over_devices_equals_each_sequence_alone(
    strategy, devices, stripe_size, causal, window
):
    spec = PartitionSpec("data" if "data" in devices else None, "context")
    info = segment_info(HARD_ROWS, causal=causal, window=window)
    attend = sharded_attention(
        strategy, devices["context"], mesh_of(**devices), spec, info, stripe_size
    )
    qkv = random_qkv(HARD_ROWS)
    real = (HARD_ROWS > 0)[..., None, None]
    cotangent = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32) * real

    @jax.jit
    def both(query, key, value):
        output, pull = jax.vjp(attend, query, key, value)
        return output, pull(cotangent)

    output, gradients = both(*qkv)
    expected = attend_alone(*qkv, HARD_ROWS, causal=causal, window=window)
    assert np.abs(np.where(real, output - expected, 0)).max() < 1e-5
    assert np.isfinite(output).all()
    alone = gradients_alone(*qkv, cotangent, HARD_ROWS, causal=causal, window=window)
    for gradient, expected in zip(gradients, alone, strict=True):
        assert np.abs(gradient - expected).max() < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cross_attention_reorders_both_sides(strategy):
    kv_rows = np.zeros((len(HARD_ROWS), 24), np.int32)
    kv_rows[:, :20] = np.repeat([5, 1, 2, 3], 5)  # encoder segments of other lengths
    kv_rows[0, :20] = np.repeat([1, 2, 3, 4], 5)
    info = segment_info(HARD_ROWS, kv_segment_ids=kv_rows, causal=False)
    query, key, value = random_qkv(HARD_ROWS, kv_length=24)
    moved = reorder_context_parallel((query, key, value, info), 4, strategy)
    order, kv_order = order_of(16, 4, strategy), order_of(24, 4, strategy)
    np.testing.assert_array_equal(moved[3].kv_segment_ids, kv_rows[:, kv_order])
    np.testing.assert_array_equal(moved[3].kv_positions, info.kv_positions[:, kv_order])
    attend = jax.jit(jax.nn.dot_product_attention)
    output = attend(*moved[:3], mask=moved[3].mask("empty"))
    seen = np.asarray(info.mask("empty")).any(axis=-1)[:, 0, order, None, None]
    expected = attend_alone(query, key, value, HARD_ROWS, causal=False, kv_rows=kv_rows)
    assert np.abs(np.where(seen, output - expected[:, order], 0)).max() < 1e-5


# --- a loss over four devices -------------------------------------------------------------------


def token_losses(table, tokens, labels, positions):
    """Losses of a bigram model, of which the logits grow along each sequence."""
    logits = table[tokens] * (1 + positions[..., None].astype(jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))


def whole_loss(table, tokens, rows):
    labels, weights = next_token_labels(tokens, rows)
    weights, denominator = loss_weights(rows, weights, reduction="segment")
    losses = token_losses(table, tokens, labels, positions_from_segment_ids(rows))
    return token_mean(losses, weights, denominator), segment_sum(losses * weights, rows, 16)


def sharded_loss(table, tokens, rows, labels_after=False):
    labels, weights = next_token_labels(tokens, rows)
    weights, denominator = loss_weights(rows, weights, reduction="segment")
    tokens, labels, weights, info = reorder_context_parallel(
        (tokens, labels, weights, segment_info(rows)), 4, "striped"
    )
    if labels_after:
        labels, weights = next_token_labels(tokens, info.segment_ids)

    def local(table, tokens, labels, weights, info):
        losses = token_losses(table, tokens, labels, info.positions)
        sums = segment_sum(losses * weights, info.segment_ids, 16), token_mean(losses, weights, 1.0)
        return jax.lax.psum(sums, "context")

    step = jax.shard_map(
        local,
        mesh=mesh_of(context=4),
        in_specs=(WHOLE, *[OVER_CONTEXT] * 4),
        out_specs=(WHOLE, WHOLE),
    )
    of_segments, total = step(table, tokens, labels, weights, info)
    return total / denominator, of_segments


def test_loss_over_devices_equals_the_loss_of_whole_rows():
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, HARD_ROWS.shape).astype(np.int32)
    table = np.random.default_rng(2).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    whole, shared = (
        jax.jit(jax.value_and_grad(loss, has_aux=True)) for loss in (whole_loss, sharded_loss)
    )
    (expected, of_segments), gradient = whole(table, tokens, HARD_ROWS)
    (loss, found_of_segments), found = shared(table, tokens, HARD_ROWS)
    assert abs(float(loss - expected)) < 1e-5
    np.testing.assert_allclose(found_of_segments, of_segments, atol=1e-5)
    assert np.abs(found - gradient).max() < 1e-5
    late = functools.partial(sharded_loss, labels_after=True)
    wrong, _ = jax.jit(late)(table, tokens, HARD_ROWS)
    assert abs(float(wrong - expected)) > 1e-2  # the comparison can fail


# --- work per device ----------------------------------------------------------------------------


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
def test_zigzag_shares_one_segment_equally(cp_size):
    row = np.ones(96, int)
    work = reorder_context_parallel(pairs_of(row), cp_size, axis=0).reshape(cp_size, -1).sum(axis=1)
    assert len(set(work.tolist())) == 1
    in_order = pairs_of(row).reshape(cp_size, -1).sum(axis=1)
    assert in_order[-1] > 1.4 * in_order.mean()


def test_striped_shares_packed_rows_nearly_equally():
    row = np.repeat([1, 2, 3, 4, 0], [150, 20, 5, 71, 10])

    def busiest(strategy, stripe_size=1):
        work = reorder_context_parallel(pairs_of(row), 8, strategy, axis=0, stripe_size=stripe_size)
        work = np.asarray(work).reshape(8, -1).sum(axis=1)
        return work.max() / work.mean()

    assert busiest("striped") < 1.1 < busiest("striped", 8) < busiest("zigzag")


# --- how it compiles ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("inverse", [False, True])
def test_no_table_no_gather_one_compilation(strategy, inverse):
    traces = 0

    @jax.jit
    def counted(rows):
        nonlocal traces
        traces += 1
        return reorder_context_parallel(rows, 4, strategy, inverse=inverse)

    for rows in (HARD_ROWS, HARD_ROWS[::-1].copy(), 0 * HARD_ROWS):
        counted(rows)
    assert traces == 1
    program = jax.make_jaxpr(counted)(HARD_ROWS)
    assert "gather" not in str(program)
    assert program.consts == []


def test_rows_on_four_devices_need_no_communication():
    rows = np.concatenate([HARD_ROWS, HARD_ROWS[:2]])
    sharded = jax.device_put(rows, NamedSharding(mesh_of(data=4), PartitionSpec("data")))
    for strategy in STRATEGIES:
        reorder = functools.partial(reorder_context_parallel, cp_size=4, strategy=strategy)
        compiled = jax.jit(reorder).lower(sharded).compile()
        for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert collective not in compiled.as_text()
        np.testing.assert_array_equal(compiled(sharded), reorder(rows))


def test_plain_jit_over_the_sequence_axis_is_exact_and_talks():
    sharding = NamedSharding(mesh_of(context=4), OVER_CONTEXT)
    rows, tokens = (jax.device_put(each, sharding) for each in (HARD_ROWS, POSITIONS))

    def build(rows, tokens):
        return positions_from_segment_ids(rows), segment_mask(rows), next_token_labels(tokens, rows)

    expected = jax.jit(build)(HARD_ROWS, POSITIONS)
    compiled = jax.jit(build).lower(rows, tokens).compile()
    for found, each in zip(
        jax.tree.leaves(compiled(rows, tokens)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(found, each)
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert any(collective in compiled.as_text() for collective in collectives)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reorder_context_parallel({"tokens": HARD_ROWS[:, :12]}, 4),
            r"^reorder_context_parallel: tree\['tokens'\] has 12 tokens along axis 1, but zigzag "
            r"over 4 devices needs multiples of 8. Hint: pack with a max_seq_len that 8 divides.",
        ),
        (
            lambda: reorder_context_parallel((HARD_ROWS, HARD_ROWS), 4, "striped", stripe_size=3),
            r"tree\[0\] has 16 tokens along axis 1, but striped over 4 devices needs",
        ),
        (
            lambda: reorder_context_parallel(segment_info(HARD_ROWS[:, :6]), 4),
            r"tree.segment_ids has 6 tokens along axis 1",
        ),
        (
            lambda: reorder_context_parallel({"denominator": jnp.float32(3)}, 4),
            r"tree\['denominator'\] has shape \(\), without axis 1. Hint: leave out",
        ),
        (
            lambda: reorder_context_parallel(HARD_ROWS, 4, axis=-3),
            r"tree has shape \(6, 16\), without axis -3",
        ),
        (
            lambda: reorder_context_parallel(HARD_ROWS, 4, "ring"),
            "strategy = 'ring' is not known. Hint: choose one of zigzag, striped",
        ),
        (
            lambda: reorder_context_parallel(HARD_ROWS, 4, stripe_size=2),
            "stripe_size = 2, but zigzag has no stripes. Hint: pass strategy='striped'",
        ),
        (
            lambda: reorder_context_parallel(HARD_ROWS, 4, "striped", stripe_size=0),
            "stripe_size = 0, but it must be at least 1",
        ),
        (lambda: reorder_context_parallel(HARD_ROWS, 0), "cp_size = 0, but it must be at least 1"),
        (lambda: reorder_context_parallel(HARD_ROWS, 4, axis=1.5), "axis = 1.5 is not an integer"),
        (
            lambda: reorder_context_parallel(
                reorder_context_parallel(segment_info(HARD_ROWS), 4), 4
            ),
            r"a SegmentInfo is reordered already \(contiguous=False\). Hint: reorder everything",
        ),
        (
            lambda: reorder_context_parallel(segment_info(HARD_ROWS), 4, inverse=True),
            r"a SegmentInfo is in the order of the rows \(contiguous=True\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()
