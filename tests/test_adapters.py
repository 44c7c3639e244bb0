import contextlib
import functools
import subprocess
import sys
import warnings

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS, attend_alone, gradients_alone, random_qkv
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.adapters import (
    splash_mask,
    to_flax_mask,
    to_jax_nn,
    to_pallas_gpu,
    to_splash,
    to_tpu_flash,
)
from seqpack_jax.model.segments import monotone_segment_ids, segment_info

with warnings.catch_warnings():
    # JAX 0.12 deprecates the module in favour of tokamax; it still works, and 0.8.1 is supported.
    warnings.filterwarnings("ignore", "jax.experimental.pallas.ops.gpu.attention is deprecated")
    from jax.experimental.pallas.ops.gpu.attention import mha

# As many heads as rows: a mask [B, L, L] would be taken for one mask per head, silently.
HEADS = len(HARD_ROWS)
SIZE = 8
F32, BF16 = 1e-5, 1e-2
# Compiling is what takes the time here.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


# --- the consumers: `attend(query, key, value, info)`, [B, L, N, H] ------------------------------


def linen_mask(query, key, value, info):
    return flax.linen.dot_product_attention(query, key, value, mask=to_flax_mask(info))


def linen_bias(query, key, value, info):
    # In float32 the bias of to_jax_nn; cast to float16 it would hold -inf.
    return flax.linen.dot_product_attention(query, key, value, bias=info.bias(query.dtype))


def nnx_mask(query, key, value, info):
    return nnx.dot_product_attention(query, key, value, mask=to_flax_mask(info))


def nnx_bias(query, key, value, info):
    return nnx.dot_product_attention(query, key, value, **to_jax_nn(info))


def nnx_mask_own_softmax(query, key, value, info):
    """The way of training with dropout, which does not lead to `jax.nn`."""
    mask = to_flax_mask(info)
    return nnx.dot_product_attention(
        query, key, value, mask=mask, dropout_rate=0.5, deterministic=True
    )


def jax_nn_bias(query, key, value, info):
    return jax.nn.dot_product_attention(query, key, value, **to_jax_nn(info))


def jax_nn_mask(query, key, value, info):
    """The arguments meant for cuDNN, run by XLA."""
    return jax.nn.dot_product_attention(query, key, value, **to_jax_nn(info, "cudnn"))


def identity(key, shape, dtype=jnp.float32, *_, **__):
    return jnp.eye(*shape, dtype=dtype)


def linen_layer(query, key, value, info):
    """Projections that do nothing leave the attention inside the layer."""
    features = query.shape[-2] * query.shape[-1]
    layer = flax.linen.MultiHeadDotProductAttention(
        HEADS, dtype=query.dtype, kernel_init=identity, use_bias=False, deterministic=True
    )
    inputs = [each.reshape(*each.shape[:2], features) for each in (query, key, value)]
    mask = to_flax_mask(info)
    weights = layer.init(jax.random.key(0), *inputs, mask=mask)
    return layer.apply(weights, *inputs, mask=mask).reshape(query.shape)


def nnx_layer(query, key, value, info):
    features = query.shape[-2] * query.shape[-1]
    layer = nnx.MultiHeadAttention(
        HEADS,
        features,
        dtype=query.dtype,
        kernel_init=identity,
        use_bias=False,
        decode=False,
        rngs=nnx.Rngs(0),
    )
    inputs = (each.reshape(*each.shape[:2], features) for each in (query, key, value))
    return layer(*inputs, mask=to_flax_mask(info)).reshape(query.shape)


def heads_first(*arrays):
    return [array.transpose(0, 2, 1, 3) for array in arrays]


def tpu_splash(query, key, value, info):
    mask = splash_mask(info, query.shape[2])
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=True)
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    arrays = heads_first(query, key, value)
    (output,) = heads_first(jax.vmap(kernel)(*arrays, to_splash(info)))
    return output


def tpu_flash(query, key, value, info):
    scale = query.shape[-1] ** -0.5
    arrays = heads_first(query, key, value)
    (output,) = heads_first(flash_attention(*arrays, sm_scale=scale, **to_tpu_flash(info)))
    return output


def pallas_gpu(query, key, value, info):
    scale = query.shape[-1] ** -0.5
    return mha(query, key, value, sm_scale=scale, interpret=True, **to_pallas_gpu(info))


# Those that take fewer heads of keys get them; nnx does in newer versions only.
GROUPED = [jax_nn_bias, jax_nn_mask]
if "num_kv_heads" in nnx.MultiHeadAttention.__init__.__annotations__:
    GROUPED += [nnx_mask, nnx_bias]
DENSE = [linen_mask, linen_bias, linen_layer, nnx_mask, nnx_bias, nnx_mask_own_softmax, nnx_layer]
DENSE += [jax_nn_bias, jax_nn_mask]
# Of those, the ones that differ in more than what was seen in float32.
IN_BFLOAT16 = [linen_mask, nnx_mask_own_softmax, jax_nn_bias, jax_nn_mask]
KERNELS = [tpu_splash, tpu_flash, pallas_gpu]


# --- how they are run -----------------------------------------------------------------------------


def long_rows(length):
    """What HARD_ROWS has, over tiles of 128 tokens."""
    times = length // 16
    large, small = np.repeat(HARD_ROWS[2], times), HARD_ROWS[1]
    small = np.concatenate([small + small.max() * i for i in range(times)])
    small[-5:] = 0
    one, none = np.ones(length), np.zeros(length)
    return np.stack([large, small, one, none, np.arange(1, length + 1)]).astype(np.int32)


def rows_of(attend):
    if attend is tpu_flash:
        return long_rows(128)[[0, 3]]  # its interpret mode is slow
    if attend is tpu_splash:
        return long_rows(128)
    return long_rows(256) if attend in KERNELS else HARD_ROWS


def draw(attend, rows, kv_length=None):
    """Return query, key, value and cotangent, which is 0 on padding."""
    heads, kv_heads, size = HEADS, 2 if attend in GROUPED else HEADS, SIZE
    if attend in KERNELS:
        heads, kv_heads, size = 2, 2, 32
    if attend is tpu_flash:
        heads, kv_heads = 1, 1
    if attend is tpu_splash:
        heads, kv_heads, size = 2, 1, 128
    arrays = random_qkv(rows, heads, kv_heads, size, kv_length=kv_length)
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    return *arrays, cotangent * at(rows != 0)


def at(tokens):
    """Shape `[B, L]` as `[B, L, 1, 1]`."""
    return tokens[..., None, None]


def in_interpret_mode(attend):
    return pltpu.force_tpu_interpret_mode() if attend is tpu_flash else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def forward_and_backward(attend, query, key, value, cotangent, info):
    output, backward = jax.vjp(lambda *arrays: attend(*arrays, info), query, key, value)
    return output, backward(cotangent)


def run(attend, arrays, rows, **settings):
    """Return the output and the gradients of query, key and value."""
    info = segment_info(rows, **settings)
    with in_interpret_mode(attend):
        return jax.device_get(forward_and_backward(attend, *arrays, info))


def assert_close(found, expected, bound):
    assert found.shape == expected.shape
    assert np.abs(found.astype(np.float64) - expected).max() < bound


def assert_equals_alone(attend, arrays, rows, bound, tokens=None, **settings):
    """Compare with each segment on its own: outputs of real `tokens`, all gradients."""
    output, gradients = run(attend, arrays, rows, **settings)
    assert output.dtype == arrays[0].dtype
    assert all(np.isfinite(each).all() for each in (output, *gradients))
    tokens = at(rows != 0 if tokens is None else tokens)
    is_cross = "kv_segment_ids" in settings
    options = {"causal": settings.get("causal", not is_cross), "window": settings.get("window")}
    options["kv_rows"] = settings.get("kv_segment_ids")
    expected = attend_alone(*arrays[:3], rows, **options)
    assert_close(np.where(tokens, output, 0), np.where(tokens, expected, 0), bound)
    for found, wanted in zip(gradients, gradients_alone(*arrays, rows, **options), strict=True):
        assert_close(found, wanted, bound)


# --- equal to each sequence alone -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("attend", "causal", "window"),
    [
        *((attend, True, None) for attend in DENSE),
        (nnx_layer, False, None),
        (jax_nn_mask, True, 3),
        (linen_layer, False, 3),
        (jax_nn_bias, False, 3),
    ],
)
def test_dense_attention_equals_alone(attend, causal, window):
    arrays = draw(attend, HARD_ROWS)
    assert_equals_alone(attend, arrays, HARD_ROWS, F32, causal=causal, window=window)


@pytest.mark.parametrize(
    ("attend", "rows", "causal", "window"),
    [
        (tpu_splash, rows_of(tpu_splash), True, None),
        pytest.param(tpu_splash, long_rows(256), True, None, marks=pytest.mark.slow),
        pytest.param(tpu_splash, long_rows(128), True, 40, marks=pytest.mark.slow),
        pytest.param(tpu_splash, long_rows(256), True, 1, marks=pytest.mark.slow),  # skips a tile
        pytest.param(tpu_splash, long_rows(256), False, 40, marks=pytest.mark.slow),
        pytest.param(tpu_splash, long_rows(256), False, None, marks=pytest.mark.slow),
        (tpu_flash, rows_of(tpu_flash), True, None),
        pytest.param(tpu_flash, long_rows(256), False, None, marks=pytest.mark.slow),
        (pallas_gpu, rows_of(pallas_gpu), True, None),
        pytest.param(pallas_gpu, long_rows(128), False, None, marks=pytest.mark.slow),
    ],
)
def test_kernels_equal_alone(attend, rows, causal, window):
    arrays = draw(attend, rows)
    assert_equals_alone(attend, arrays, rows, F32, causal=causal, window=window)


@pytest.mark.parametrize(
    "attend",
    [*IN_BFLOAT16, *(pytest.param(each, marks=pytest.mark.slow) for each in KERNELS)],
)
def test_bfloat16_equals_alone(attend):
    rows = long_rows(128) if attend in KERNELS else HARD_ROWS
    # bfloat16 itself rounds numbers of size 2 by up to 0.008: values and cotangents of size 1 / 4
    # keep outputs and gradients below 1.
    scales = (1, 1, 0.25, 0.25)
    arrays = zip(draw(attend, rows), scales, strict=True)
    arrays = [(each * np.float32(scale)).astype(jnp.bfloat16) for each, scale in arrays]
    # jax.nn itself adds bfloat16 and float32.
    with jax.numpy_dtype_promotion("standard"):
        assert_equals_alone(attend, arrays, rows, BF16)


@pytest.mark.parametrize("attend", [pytest.param(tpu_flash, marks=pytest.mark.slow), pallas_gpu])
def test_kernels_take_raw_and_monotone_ids(attend):
    rows = rows_of(attend)
    arrays = draw(attend, rows)
    monotone = np.asarray(monotone_segment_ids(rows))
    assert (monotone != rows).any()
    found = jax.tree.leaves(run(attend, arrays, monotone))
    expected = jax.tree.leaves(run(attend, arrays, rows))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one * at(rows != 0), other * at(rows != 0))


@pytest.mark.parametrize("attend", [tpu_splash, pallas_gpu])
def test_kernels_follow_tokens_that_moved(attend):
    """Without `causal` and `window` the order of tokens does not matter; the ids are raw."""
    rows = long_rows(128)[[0, 1, 3]]
    *arrays, _ = draw(attend, rows)
    order = np.random.default_rng(2).permutation(128)
    moved = rows[:, order]
    info = segment_info(moved, np.zeros_like(moved), causal=False, contiguous=False)
    output = jax.jit(attend, compiler_options=QUICKLY)(*(each[:, order] for each in arrays), info)
    expected = attend_alone(*arrays, rows, causal=False)[:, order]
    assert_close(np.asarray(output) * at(moved != 0), expected, F32)


# --- nothing leaks --------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [*DENSE, *KERNELS])
def test_segments_do_not_see_each_other_nor_padding(attend):
    rows = rows_of(attend)
    query, key, value, cotangent = draw(attend, rows)
    others = at(rows > 1)
    cotangent *= others
    arrays = (query, key, value)
    garbage = [np.where(others, each, 50 * each + 3).astype(np.float32) for each in arrays]
    output, gradients = run(attend, (*arrays, cotangent), rows)
    changed, changed_gradients = run(attend, (*garbage, cotangent), rows)
    assert (changed != output).any()
    for found, expected in zip((changed, *changed_gradients), (output, *gradients), strict=True):
        np.testing.assert_array_equal(found * others, expected * others)
    for gradient in (*gradients, *changed_gradients):
        assert not np.any(gradient * ~others)


def test_the_leak_test_can_fail():
    def leaky(query, key, value, info):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    with pytest.raises(AssertionError):
        test_segments_do_not_see_each_other_nor_padding(leaky)


@pytest.mark.parametrize(
    ("attend", "dtype"),
    [
        (linen_mask, jnp.float16),
        (linen_bias, jnp.float16),
        (jax_nn_bias, jnp.bfloat16),  # its float16 does not run on a CPU
    ],
)
def test_no_nan_appears_anywhere(attend, dtype):
    rows = HARD_ROWS[[2, 4]]
    arrays = [each.astype(dtype) for each in draw(attend, rows)]
    with jax.debug_nans(True), jax.debug_infs(True), jax.numpy_dtype_promotion("standard"):
        output, gradients = run(attend, arrays, rows)
    assert all(np.isfinite(each).all() for each in (output, *gradients))
    # A row of nothing but padding is one segment of padding: its gradients are those of no loss.
    assert not any(np.any(each[1]) for each in gradients)


# --- encoder-decoder, and tokens that moved ----------------------------------------------------


# Segments without keys, keys without queries, padding between segments.
CROSS_ROWS = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 0, 2, 3, 4, 4, 4]], np.int32)
CROSS_KEYS = np.array(
    [[1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 0, 0], [0, 1, 2, 2, 2, 0, 4, 4, 4, 4, 5, 0]], np.int32
)


@pytest.mark.parametrize(
    ("attend", "causal"),
    [
        (linen_mask, False),
        (nnx_mask, True),
        (jax_nn_bias, False),
        (jax_nn_bias, True),
        (jax_nn_mask, False),
    ],
)
def test_encoder_decoder_equals_alone(attend, causal):
    assert_cross_equals_alone(attend, CROSS_ROWS, CROSS_KEYS, causal=causal)


@pytest.mark.parametrize("attend", [tpu_splash, pytest.param(tpu_flash, marks=pytest.mark.slow)])
def test_encoder_decoder_kernels_equal_alone(attend):
    rows, keys = np.repeat(CROSS_ROWS, 16, axis=1), np.repeat(CROSS_KEYS, 16, axis=1)
    keys = np.pad(keys, ((0, 0), (32, 32)))
    assert (rows.shape, keys.shape) == ((2, 128), (2, 256))
    assert_cross_equals_alone(attend, rows, keys)


def assert_cross_equals_alone(attend, rows, keys, **settings):
    has_key = np.stack([(row != 0) & np.isin(row, k) for row, k in zip(rows, keys, strict=True)])
    assert (has_key != (rows != 0)).any()
    query, key, value, cotangent = draw(attend, rows, keys.shape[1])
    arrays = (query, key, value, cotangent * at(has_key))
    assert_equals_alone(attend, arrays, rows, F32, has_key, kv_segment_ids=keys, **settings)


@pytest.mark.parametrize(("attend", "window"), [(linen_mask, None), (jax_nn_bias, 3)])
def test_dense_attention_follows_tokens_that_moved(attend, window):
    arrays = draw(attend, HARD_ROWS)
    order = np.random.default_rng(2).permutation(HARD_ROWS.shape[1])
    moved = [each[:, order] for each in arrays]
    positions = segment_info(HARD_ROWS).positions[:, order]
    output, gradients = run(
        attend, moved, HARD_ROWS[:, order], positions=positions, contiguous=False, window=window
    )
    options = {"causal": True, "window": window}
    expected = attend_alone(*arrays[:3], HARD_ROWS, **options)[:, order]
    assert_close(output * at(HARD_ROWS[:, order] != 0), expected, F32)
    wanted = gradients_alone(*arrays, HARD_ROWS, **options)
    for found, each in zip(gradients, wanted, strict=True):
        assert_close(found, each[:, order], F32)


# --- what they return -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "contiguous"),
    [(HARD_ROWS, True), (HARD_ROWS[0], False), (HARD_ROWS.astype(np.int64), True)],
)
def test_masks_are_bool_and_biases_finite_of_rank_4(rows, contiguous):
    info = segment_info(rows, np.zeros(rows.shape, np.int32), contiguous=contiguous)
    shape = (len(np.atleast_2d(rows)), 1, rows.shape[-1], rows.shape[-1])
    mask = to_flax_mask(info)
    assert (mask.shape, mask.dtype) == (shape, bool)
    (bias,) = to_jax_nn(info).values()
    assert (bias.shape, bias.dtype, bias.min()) == (shape, jnp.float32, -(2.0**41))
    np.testing.assert_array_equal(bias == 0, mask)
    assert mask.any(axis=-1).all()


def test_cudnn_gets_a_whole_mask_and_no_bias():
    arguments = to_jax_nn(segment_info(np.ones((2, 16), np.int32), causal=False), "cudnn")
    assert list(arguments) == ["mask"]
    assert arguments["mask"].shape == (2, 1, 16, 16)  # not along one axis: jax-ml/jax#28974


def test_the_cudnn_form_reaches_cudnn(monkeypatch):
    """The checks of the GPU are left out, those of shapes and dtypes are not; nothing runs."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(private, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda _: False, raising=False)

    def cudnn(query, key, value, info):
        return jax.nn.dot_product_attention(
            query, key, value, implementation="cudnn", **to_jax_nn(info, "cudnn")
        )

    info = segment_info(CROSS_ROWS, kv_segment_ids=CROSS_KEYS)
    arrays = draw(jax_nn_mask, CROSS_ROWS, CROSS_KEYS.shape[1])
    arrays = [each.astype(jnp.bfloat16) for each in arrays]
    step = jax.jit(forward_and_backward.__wrapped__, static_argnums=0)
    lowered = step.trace(cudnn, *arrays, info).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in lowered.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2
    assert all("tensor<2x1x8x12xbf16>" in call for call in calls)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3), (False, 3)])
def test_splash_masks_say_what_the_segments_do_not(causal, window):
    one = np.ones((2, 16), np.int32)
    info = segment_info(one, causal=causal, window=window)
    mask = splash_mask(info, 3)
    assert mask.shape == (3, 16, 16)
    for head in range(3):
        found = mask[head, 0:16, 0:16]
        np.testing.assert_array_equal(found, info.mask()[0, 0])


def test_splash_mask_of_an_encoder_and_a_decoder():
    info = segment_info(CROSS_ROWS, kv_segment_ids=CROSS_KEYS)
    mask = splash_mask(info, 1)
    assert mask.shape == (1, 8, 12)
    assert mask[0, 0:8, 0:12].all()


def test_ids_of_reordered_rows_stay_as_they_are():
    order = np.random.default_rng(2).permutation(HARD_ROWS.shape[1])
    rows = HARD_ROWS[:, order]
    info = segment_info(rows, np.zeros_like(rows), causal=False, contiguous=False)
    flash, gpu = to_tpu_flash(info), to_pallas_gpu(info)
    assert not flash["causal"]
    assert not gpu["causal"]
    found = (*to_splash(info), *flash["segment_ids"], gpu["segment_ids"])
    for ids in found:
        np.testing.assert_array_equal(ids, rows)
        assert ids.dtype == jnp.int32


def test_adapters_map_over_rows():
    info = segment_info(HARD_ROWS)
    by_row = jax.vmap(lambda row: (to_flax_mask(row)[0], to_jax_nn(row)["bias"][0], to_splash(row)))
    mask, bias, ids = by_row(info)
    np.testing.assert_array_equal(mask, to_flax_mask(info))
    np.testing.assert_array_equal(bias, to_jax_nn(info)["bias"])
    np.testing.assert_array_equal(ids, to_splash(info))


@pytest.mark.parametrize("adapt", [to_flax_mask, to_jax_nn, to_splash, to_tpu_flash, to_pallas_gpu])
def test_one_compilation_serves_all_segments(adapt):
    traced = []

    @jax.jit
    def step(info):
        traced.append(info)
        return adapt(info)

    for rows in (HARD_ROWS, HARD_ROWS[::-1], np.zeros_like(HARD_ROWS)):
        step(segment_info(rows))
    assert len(traced) == 1


def test_kernels_are_imported_when_they_are_asked_for():
    code = (
        "import sys, seqpack_jax.model.adapters; print([m for m in sys.modules if 'pallas' in m])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- what they refuse -----------------------------------------------------------------------------


WINDOW = segment_info(HARD_ROWS, window=4)
MOVED = segment_info(HARD_ROWS, np.zeros_like(HARD_ROWS), contiguous=False)
MOVED_WINDOW = segment_info(
    HARD_ROWS, np.zeros_like(HARD_ROWS), causal=False, window=4, contiguous=False
)
CROSS = segment_info(CROSS_ROWS, kv_segment_ids=CROSS_KEYS)
CROSS_CAUSAL = segment_info(CROSS_ROWS, kv_segment_ids=CROSS_KEYS, causal=True)
DEEP = segment_info(HARD_ROWS[None])
FLAT = segment_info(HARD_ROWS[0])
splash_mask_of_2_heads = functools.partial(splash_mask, heads=2)


@pytest.mark.parametrize(
    ("adapt", "info", "message"),
    [
        (to_tpu_flash, WINDOW, "to_tpu_flash: the kernel knows no window. Hint: use to_splash"),
        (to_pallas_gpu, WINDOW, "to_pallas_gpu: the kernel knows no window. Hint: use to_tokamax"),
        (
            to_pallas_gpu,
            segment_info(HARD_ROWS.repeat(3, axis=1)),
            "rows of 48 tokens, .* tiles of 32",
        ),
        (to_pallas_gpu, CROSS, "one array of ids for queries and keys alike. Hint: use to_flax"),
        (to_splash, MOVED, r"causal=True after a reorder \(contiguous=False\).*by position"),
        (splash_mask_of_2_heads, MOVED, "splash_mask: info has causal=True after a reorder"),
        (to_splash, MOVED_WINDOW, "window=4 after a reorder.*by index. Hint: use to_flax_mask or"),
        (to_tpu_flash, MOVED, "to_tpu_flash: info has causal=True after a reorder"),
        (to_pallas_gpu, MOVED, "to_pallas_gpu: info has causal=True after a reorder"),
        (to_splash, CROSS_CAUSAL, "to_splash: info has causal=True between different rows"),
        (splash_mask_of_2_heads, CROSS_CAUSAL, "splash_mask: info has causal=True between"),
        (to_tpu_flash, CROSS_CAUSAL, "to_tpu_flash: info has causal=True between different rows"),
        (to_flax_mask, DEEP, r"shape \(1, 6, 16\), but they must be \[B, L\] or \[L\].*vmap"),
        (to_jax_nn, DEEP, r"to_jax_nn: info has segment ids of shape \(1, 6, 16\)"),
        (to_splash, DEEP, r"to_splash: info has segment ids of shape \(1, 6, 16\)"),
        (to_tpu_flash, FLAT, r"shape \(16,\), but they must be \[B, L\]\. Hint"),
        (to_pallas_gpu, FLAT, r"shape \(16,\), but they must be \[B, L\]\. Hint"),
        (to_flax_mask, HARD_ROWS, "to_flax_mask: info is a ndarray. Hint: pass what segment_info"),
        (to_jax_nn, HARD_ROWS, "to_jax_nn: info is a ndarray"),
        (to_splash, HARD_ROWS, "to_splash: info is a ndarray"),
        (to_tpu_flash, HARD_ROWS, "to_tpu_flash: info is a ndarray"),
        (to_pallas_gpu, HARD_ROWS, "to_pallas_gpu: info is a ndarray"),
        (functools.partial(to_jax_nn, implementation="te"), CROSS, "implementation = 'te' is not"),
        (functools.partial(splash_mask, heads=0), CROSS, "heads = 0, but it must be at least 1"),
    ],
)
def test_what_they_refuse(adapt, info, message):
    with pytest.raises(SeqpackError, match=message):
        adapt(info)
