"""`packed_attention` through tokamax, as installed here (not on the oldest versions allowed)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS, random_qkv
from test_dispatch import attend, check
from tokamax._src.ops.attention import api

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.dispatch import choose_implementation, packed_attention
from seqpack_jax.model.segments import segment_info


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def default_promotion():
    """Tokamax mixes dtypes and ranks itself."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("causal", "window", "kv_heads"), [(True, None, 2), (False, 3, 4)])
def test_equals_alone(causal, window, kv_heads):
    options = {"causal": causal, "window": window, "implementation": "tokamax"}
    check(HARD_ROWS, 4, kv_heads, **options)


def test_bfloat16():
    check(HARD_ROWS, 2, 1, jnp.bfloat16, implementation="tokamax")


def test_encoder_decoder():
    kv_rows = np.zeros((6, 24), np.int32)
    kv_rows[0, 2:14] = [1] * 5 + [2] * 1 + [3] * 6
    kv_rows[1, :20] = [1] * 4 + [2] * 4 + [4] * 4 + [5] * 8
    kv_rows[3, :] = 1
    check(HARD_ROWS, kv_rows=kv_rows, causal=False, implementation="tokamax")


def test_no_nan_from_the_padding():
    info, arrays = segment_info(HARD_ROWS), random_qkv(HARD_ROWS)
    clean = attend(arrays, info, arrays[0], implementation="tokamax")
    padding = (HARD_ROWS == 0)[..., None, None]
    planted = tuple(np.where(padding, np.float32(np.nan), each) for each in arrays)
    dirty = attend(planted, info, planted[0], implementation="tokamax")
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_under_checkpoint():
    """The mask is made inside: tokamax is traced again when that is gone, if it is closed over."""
    info, arrays = segment_info(HARD_ROWS), random_qkv(HARD_ROWS)

    @jax.checkpoint
    def again(query, key, value, info):
        return packed_attention(query, key, value, info, implementation="tokamax")

    total = jax.jit(lambda *qkv: jax.vjp(lambda *qkv: again(*qkv, info), *qkv)[1](qkv[0]))
    _, expected = attend(arrays, info, arrays[0], implementation="tokamax")
    for found, wanted in zip(total(*arrays), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_strict_promotion_is_refused_and_never_chosen(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    info = segment_info(HARD_ROWS)
    query, key, value = (jnp.asarray(each) for each in random_qkv(HARD_ROWS))
    assert choose_implementation(query, key, info) == "tokamax"
    for strict in (jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")):
        with strict:
            assert choose_implementation(query, key, info) == "dense"
            with pytest.raises(SeqpackError, match="'tokamax' needs the default jax_numpy_dtype"):
                packed_attention(query, key, value, info, implementation="tokamax")


def test_the_first_operation_that_can_is_taken(monkeypatch):
    """On a GPU: mosaic, else triton, else the XLA form; each says by an error that it cannot."""
    asked = []

    def operation(name, *, able):
        def run(query, key, value, *, mask, logits_scale):
            asked.append(name)
            if not able:
                raise NotImplementedError(name)
            return query

        return run

    info, arrays = segment_info(HARD_ROWS), random_qkv(HARD_ROWS)
    names = ["mosaic_gpu", "triton", "xla_chunked"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for first, name in enumerate(names):
        fakes = {each: operation(each, able=each == name) for each in names}
        monkeypatch.setattr(api, "IMPLEMENTATIONS", fakes)
        packed_attention(*arrays, info)
        assert asked == names[: first + 1]
        asked.clear()
