"""Our masks in tokamax's own operations, those that run on a CPU."""

import functools

import attention_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS
from tokamax._src.ops.attention.api import IMPLEMENTATIONS

from seqpack_jax.model.kernel_adapters import to_tokamax_mask
from seqpack_jax.model.segments import segment_info

NAMES = ("xla", "xla_chunked")
# Compiling is what takes the time here.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def lenient():
    """Tokamax promotes dtypes and ranks, while it traces and when it is lowered."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with jax.debug_nans(True):
            yield


@functools.cache
def attention(name):
    """Return a jitted function: output, and gradients of what has a key."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(query, key, value, cotangent, info):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            mask = to_tokamax_mask(info)
            bounds = info.kv_bounds("empty")
        seen = (bounds.k_end > bounds.k_start)[..., None, None]

        def attend(*arrays):
            return jnp.where(seen, IMPLEMENTATIONS[name](*arrays, mask=mask), 0)

        output, back = jax.vjp(attend, query, key, value)
        return output, back(cotangent)

    return run


def assert_close(
    name, rows, tolerance=1e-5, *, dtype=jnp.float32, size=1.0, kv_rows=None, **settings
):
    """Compare values and gradients with each segment alone; inputs are of about this size."""
    kv_length = None if kv_rows is None else kv_rows.shape[1]
    arrays = attention_reference.random_qkv(rows, kv_length=kv_length)
    arrays = [jnp.asarray(each * size, dtype) for each in arrays]
    draws = np.random.default_rng(1).normal(size=arrays[0].shape)
    cotangent = jnp.asarray(draws * size, dtype)
    info = segment_info(rows, kv_segment_ids=kv_rows, **settings)
    output, gradients = attention(name)(*arrays, cotangent, info)
    exact = [np.asarray(each, np.float64) for each in (*arrays, cotangent)]
    mode = {"causal": info.causal, "window": info.window, "kv_rows": kv_rows}
    expected = [
        attention_reference.attend_alone(*exact[:3], rows, **mode),
        *attention_reference.gradients_alone(*exact, rows, **mode),
    ]
    for ours, theirs in zip([output, *gradients], expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "causal", "window"),
    [
        ("xla", True, 3),
        ("xla", False, None),
        ("xla_chunked", True, None),
        ("xla_chunked", False, 3),
    ],
)
def test_each_segment_is_alone(name, causal, window):
    """Two heads share a key head; one row is all padding, one a single segment."""
    assert_close(name, HARD_ROWS, causal=causal, window=window)


def test_rows_of_several_chunks():
    """`xla_chunked` takes 128 queries and 128 keys at a time."""
    assert_close("xla_chunked", np.repeat(HARD_ROWS[[0, 2]], 20, axis=1))


@pytest.mark.parametrize(
    ("name", "causal", "window"), [("xla", False, 3), ("xla_chunked", True, None)]
)
def test_bfloat16(name, causal, window):
    """Of inputs of size a half: the sums of four gradients of size 1 are rounded by 0.02."""
    mode = {"causal": causal, "window": window}
    assert_close(name, HARD_ROWS, 1e-2, dtype=jnp.bfloat16, size=0.5, **mode)


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_another_row_of_segments(name):
    """Segments on one side only, and rows of padding on either side."""
    keys = np.array(
        [
            [1, 1, 2, 3, 3, 3, 0, 0],
            [0, 2, 2, 3, 0, 5, 5, 5],
            [1, 2, 2, 3, 4, 4, 4, 4],
            [0] * 8,
            [1, 1, 1, 2, 2, 2, 2, 2],
            [2, 4, 6, 8, 10, 12, 14, 16],
        ],
        np.int32,
    )
    assert_close(name, HARD_ROWS, kv_rows=keys, causal=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_query_without_keys_gets_the_mean_of_all_values(name):
    """Finite, and not 0: that is why it has to be left out of the loss."""
    ids, kv_ids = jnp.array([[1, 2], [2, 1]]), jnp.array([[1, 1], [1, 1]])
    info = segment_info(ids, kv_segment_ids=kv_ids, causal=False)
    value = jnp.array([[[[1.0]], [[3.0]]], [[[5.0]], [[9.0]]]])
    run = jax.jit(IMPLEMENTATIONS[name], compiler_options=QUICKLY)
    output = run(value, value, value, mask=to_tokamax_mask(info))
    np.testing.assert_allclose([output[0, 1], output[1, 0]], [[[2.0]], [[7.0]]], rtol=1e-6)


def test_one_compilation_for_all_batches():
    arrays = attention_reference.random_qkv(HARD_ROWS)
    run = attention("xla_chunked")
    sizes = []
    for rows in (HARD_ROWS, HARD_ROWS[::-1], np.zeros_like(HARD_ROWS)):
        jax.block_until_ready(run(*arrays, np.ones_like(arrays[0]), segment_info(rows)))
        sizes.append(run._cache_size())
    assert sizes == sizes[:1] * 3
