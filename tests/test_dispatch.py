"""`packed_attention`: every implementation that runs on a CPU against each sequence alone."""

import functools
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS, attend_alone, gradients_alone, random_qkv
from jax.sharding import NamedSharding, PartitionSpec

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model import dispatch
from seqpack_jax.model.dispatch import (
    BLOCKED_FROM,
    IMPLEMENTATIONS,
    choose_implementation,
    packed_attention,
)
from seqpack_jax.model.segments import segment_info

# The splash kernel asks for multiples of 128 tokens.  Padding everywhere, nothing else, many
# segments.
LONG_ROWS = np.array([np.repeat(HARD_ROWS[2], 8), [0] * 128, range(1, 129)], np.int32)
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 2e-3}


@functools.partial(jax.jit, static_argnames=("implementation", "scale"))
def _attend(arrays, info, cotangent, implementation, scale):
    options = {"implementation": implementation, "scale": scale, "interpret": True}
    output, back = jax.vjp(lambda *qkv: packed_attention(*qkv, info, **options), *arrays)
    return output, back(cotangent)


def attend(arrays, info, cotangent, *, implementation, scale=None):
    """Return output and gradients of q, k and v, none of them NaN; compiled once per shape."""
    with jax.debug_nans(True):
        return _attend(tuple(arrays), info, cotangent, implementation, scale)


def rows_and_heads(implementation):
    """Return rows, and heads of queries and keys: small where a kernel is interpreted."""
    return (LONG_ROWS, 2, 1) if implementation == "splash" else (HARD_ROWS, 4, 2)


def check(
    rows, heads=4, kv_heads=2, dtype=jnp.float32, kv_rows=None, causal=True, window=None, **options
):
    """Compare output and gradients with each sequence alone; padding gives 0 and has gradient 0."""
    length = None if kv_rows is None else kv_rows.shape[1]
    arrays = random_qkv(rows, heads, kv_heads, kv_length=length)
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape).astype(np.float32)
    # Gradients of size 1, so that the bound on the error is relative to 1 in half precision too.
    *arrays, cotangent = tuple(jnp.asarray(each / 2, dtype) for each in (*arrays, cotangent))
    info = segment_info(rows, kv_segment_ids=kv_rows, causal=causal, window=window)
    output, gradients = attend(arrays, info, cotangent, **options)
    who = {"causal": causal, "window": window, "kv_rows": kv_rows}
    exact = [np.asarray(each.astype(jnp.float32)) for each in (*arrays, cotangent)]
    # Another scale is another query.
    factor = options.get("scale", arrays[0].shape[-1] ** -0.5) * arrays[0].shape[-1] ** 0.5
    exact[0] = exact[0] * factor
    expected = [attend_alone(*exact[:3], rows, **who), *gradients_alone(*exact, rows, **who)]
    expected[1] = expected[1] * factor
    for found, wanted in zip([output, *gradients], expected, strict=True):
        assert found.dtype == dtype
        error = np.abs(np.asarray(found.astype(jnp.float32)) - wanted).max()
        assert error < BOUNDS[dtype]
    padding = rows == 0
    assert not np.asarray(output)[padding].any()
    assert not np.asarray(gradients[0])[padding].any()
    assert not np.asarray(gradients[2])[padding if kv_rows is None else kv_rows == 0].any()


@pytest.mark.parametrize(
    ("implementation", "causal", "window", "kv_heads", "options"),
    [
        ("dense", True, None, 2, {}),
        ("dense", False, 1, 4, {}),
        ("dense", True, 3, 1, {"scale": 0.25}),
        ("blocked", True, None, 2, {}),  # tests/test_blocked.py has more
        ("blocked", False, 3, 1, {"scale": 0.25}),
    ],
)
def test_equals_alone(implementation, causal, window, kv_heads, options):
    who = {"causal": causal, "window": window, "implementation": implementation}
    check(HARD_ROWS, 4, kv_heads, **who, **options)


def test_splash_equals_alone():
    check(LONG_ROWS, 2, 1, implementation="splash")


def test_splash_in_tiles_of_256_both_ways_with_a_window():
    rows = np.repeat(HARD_ROWS[[1, 3]], 16, axis=1)
    options = {"causal": False, "window": 3, "scale": 0.25, "implementation": "splash"}
    check(rows, 2, 2, jnp.bfloat16, **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    check(HARD_ROWS, dtype=dtype, implementation="dense")


def test_bfloat16_under_the_default_promotion():
    """The other branch: under strict promotion the dense form computes in float32."""
    with jax.numpy_dtype_promotion("standard"):
        check(HARD_ROWS, dtype=jnp.bfloat16, implementation="dense")


def test_float64():
    """JAX has its softmax in float32, and under strict promotion all else must follow."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(each, jnp.float64) for each in random_qkv(HARD_ROWS)]
        info = segment_info(HARD_ROWS)
        output, gradients = attend(arrays, info, arrays[0], implementation="dense")
        assert {each.dtype for each in (output, *gradients)} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(output, attend_alone(*arrays, HARD_ROWS, causal=True), atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_in_nothing_out(implementation, monkeypatch):
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    for batch, length in ((0, 128), (2, 0)):
        array = jnp.ones((batch, length, 2, 8))
        info = segment_info(jnp.ones((batch, length), jnp.int32))
        output = packed_attention(array, array, array, info, implementation=implementation)
        assert output.shape == array.shape


@pytest.mark.parametrize("implementation", ["dense", "blocked", "splash"])
def test_encoder_decoder(implementation):
    rows = HARD_ROWS
    kv_rows = np.zeros((6, 24), np.int32)
    kv_rows[0, 2:14] = [1] * 5 + [2] * 1 + [3] * 6
    kv_rows[1, :20] = [1] * 4 + [2] * 4 + [4] * 4 + [5] * 8  # nothing for segment 3
    kv_rows[2, 23] = 2  # nothing for 1 and 3
    kv_rows[3, :] = 1
    kv_rows[4, :4] = 1  # only padding asks
    _, *heads = rows_and_heads(implementation)
    if implementation == "splash":
        rows = np.repeat(rows[:3], 8, axis=1)
        kv_rows = np.pad(np.repeat(kv_rows[:3], 8, axis=1), ((0, 0), (64, 0)))
    check(rows, *heads, kv_rows=kv_rows, causal=False, implementation=implementation)


def test_encoder_decoder_with_causality_by_position():
    rows, kv_rows = HARD_ROWS, HARD_ROWS[:, ::-1].copy()  # contiguous, in falling order
    info = segment_info(rows)
    at = np.asarray(info.positions)
    places = {"kv_segment_ids": kv_rows, "kv_positions": at[:, ::-1].copy()}
    kv_info = segment_info(rows, at, causal=True, **places)
    query, key, value = random_qkv(rows)
    turned = [np.flip(each, 1) for each in (key, value)]
    expected = attend_alone(query, key, value, rows, causal=True)
    output = jax.jit(packed_attention)(query, *turned, kv_info)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    with pytest.raises(SeqpackError, match="'blocked' cannot mask by position"):
        packed_attention(query, *turned, kv_info, implementation="blocked")


def test_tokens_in_any_order():
    order = np.random.default_rng(1).permutation(HARD_ROWS.shape[1])
    positions = np.asarray(segment_info(HARD_ROWS).positions)
    info = segment_info(HARD_ROWS[:, order], positions[:, order], window=3, contiguous=False)
    arrays = random_qkv(HARD_ROWS)
    expected = attend_alone(*arrays, HARD_ROWS, causal=True, window=3)[:, order]
    shuffled = [each[:, order] for each in arrays]
    np.testing.assert_allclose(jax.jit(packed_attention)(*shuffled, info), expected, atol=1e-5)
    for implementation in ("blocked", "splash", "tokamax"):
        with pytest.raises(SeqpackError, match=f"'{implementation}' needs contiguous segments"):
            packed_attention(*shuffled, info, implementation=implementation)


@pytest.mark.parametrize("implementation", ["dense", "blocked", "splash"])
def test_nan_in_the_padding_reaches_nothing(implementation):
    rows, *heads = rows_and_heads(implementation)
    info, options = segment_info(rows), {"implementation": implementation}
    arrays = random_qkv(rows, *heads)
    cotangent = arrays[0][:, ::-1]
    padding = (rows == 0)[..., None, None]
    planted = [np.where(padding, np.float32(np.nan), each) for each in (*arrays, cotangent)]
    clean = attend(arrays, info, cotangent, **options)
    dirty = attend(planted[:3], info, planted[3], **options)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("implementation", ["dense", "blocked", "splash"])
def test_one_segment_sees_nothing_of_another(implementation):
    rows, *heads = rows_and_heads(implementation)
    info, options = segment_info(rows), {"implementation": implementation}
    arrays = random_qkv(rows, *heads)
    cotangent = arrays[0][:, ::-1]
    other = (rows == 2)[..., None, None]
    changed = [np.where(other, each * 3 + 1, each) for each in (*arrays, cotangent)]
    before = attend(arrays, info, cotangent, **options)
    after = attend(changed[:3], info, changed[3], **options)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        one, two = np.asarray(one), np.asarray(two)
        np.testing.assert_array_equal(one[rows != 2], two[rows != 2])
        assert (one[rows == 2] != two[rows == 2]).any()


def test_one_compilation():
    traced = []

    @jax.jit
    def step(query, key, value, info):
        traced.append(info)
        return packed_attention(query, key, value, info, implementation="blocked")

    arrays = random_qkv(HARD_ROWS)
    for shift in range(6):
        rows = np.roll(HARD_ROWS, shift, axis=0)
        expected = attend_alone(*arrays, rows, causal=True)
        np.testing.assert_allclose(step(*arrays, segment_info(rows)), expected, atol=1e-5)
    assert len(traced) == step._cache_size() == 1


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def test_rows_on_several_devices_need_no_collectives():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = np.concatenate([HARD_ROWS, HARD_ROWS[:2]])
    arrays = random_qkv(rows)
    expected = attend_alone(*arrays, rows, causal=True)
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    *placed, ids = jax.device_put((*arrays, rows), by_row)

    def dense(query, key, value, ids):
        return packed_attention(query, key, value, segment_info(ids), implementation="dense")

    def blocked(query, key, value, ids):
        return packed_attention(query, key, value, segment_info(ids), implementation="blocked")

    spec = PartitionSpec("data")
    mapped = jax.shard_map(blocked, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)

    def step(function, *arrays):
        output, back = jax.vjp(function, *arrays)
        return output, back(output)[:3]

    for function in (dense, mapped):
        compiled = jax.jit(functools.partial(step, function)).lower(*placed, ids).compile()
        hlo = compiled.as_text()
        assert not [name for name in COLLECTIVES if name in hlo]
        output, gradients = compiled(*placed, ids)
        for each in (output, *gradients):
            assert each.sharding.is_equivalent_to(by_row, each.ndim)
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_long_rows_never_hold_the_square():
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    query = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)

    def holds_it(implementation):
        def step(query, ids):
            options = {"implementation": implementation}
            return jnp.sum(packed_attention(query, query, query, segment_info(ids), **options))

        return "4096x4096x" in jax.jit(jax.grad(step)).lower(query, ids).as_text()

    assert holds_it("dense")
    assert not holds_it(None)


def shapes(length=256, kv_length=None, size=64, dtype=jnp.bfloat16):
    query = jax.ShapeDtypeStruct((2, length, 8, size), dtype)
    return query, jax.ShapeDtypeStruct((2, kv_length or length, 2, size), dtype)


def plain_info(length=256, **options):
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    return jax.eval_shape(lambda ids: segment_info(ids, **options), ids)


def test_choice_on_cpu(monkeypatch):
    assert jax.default_backend() == "cpu"
    below = BLOCKED_FROM - 1
    assert choose_implementation(*shapes(below), plain_info(below)) == "dense"
    assert choose_implementation(*shapes(BLOCKED_FROM), plain_info(BLOCKED_FROM)) == "blocked"
    monkeypatch.setattr(dispatch, "BLOCKED_FROM", 8)
    encoder = jnp.ones((2, 8), jnp.int32)
    info = plain_info(4, kv_segment_ids=encoder, causal=False)
    assert choose_implementation(*shapes(4, 8), info) == "blocked"
    shuffled = plain_info(8, positions=jnp.zeros((2, 8), jnp.int32), contiguous=False)
    assert choose_implementation(*shapes(8), shuffled) == "dense"


def test_choice_on_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose_implementation(*shapes(), plain_info()) == "splash"
    assert choose_implementation(*shapes(200), plain_info(200)) == "dense"
    assert choose_implementation(*shapes(dtype=jnp.float64), plain_info()) == "dense"
    assert choose_implementation(*shapes(2000), plain_info(2000)) == "dense"
    assert choose_implementation(*shapes(2050), plain_info(2050)) == "blocked"
    encoder = jnp.ones((2, 100), jnp.int32)
    info = plain_info(kv_segment_ids=encoder, causal=False)
    assert choose_implementation(*shapes(256, 100), info) == "dense"


TOKAMAX_PARTS = ("_src", "_src.ops", "_src.ops.attention")
TOKAMAX_PARTS += tuple(f"_src.ops.attention.{name}" for name in ("api", "base"))


@pytest.mark.parametrize("installed", [True, False])
def test_choice_on_gpu(monkeypatch, installed):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        check_choice_on_gpu(monkeypatch, installed)


def check_choice_on_gpu(monkeypatch, installed):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name in ("tokamax", *(f"tokamax.{part}" for part in TOKAMAX_PARTS)):
        # None in sys.modules makes the import raise ImportError.
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if installed else None)
    with_kernel = "tokamax" if installed else "cudnn"
    assert choose_implementation(*shapes(), plain_info()) == with_kernel
    without = "tokamax" if installed else "dense"
    assert choose_implementation(*shapes(dtype=jnp.float32), plain_info()) == without
    assert choose_implementation(*shapes(size=256), plain_info()) == without
    assert choose_implementation(*shapes(255), plain_info(255)) == without
    shuffled = plain_info(positions=jnp.zeros((2, 256), jnp.int32), contiguous=False)
    assert choose_implementation(*shapes(), shuffled) == "cudnn"


def test_cudnn_gets_the_whole_mask_as_bool(monkeypatch):
    """The kernel needs a GPU: the form of the call is checked, its result computed by XLA."""
    calls, xla = [], jax.nn.dot_product_attention

    def record(*arguments, implementation, **options):
        calls.append((implementation, options))
        wide = xla(*(each.astype(jnp.float32) for each in arguments), **options)
        return wide.astype(arguments[0].dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    check(HARD_ROWS, dtype=jnp.bfloat16, window=3, implementation="cudnn")
    for implementation, options in calls:
        assert implementation == "cudnn"
        assert set(options) == {"scale", "mask"}
        assert options["mask"].shape == (6, 1, 16, 16)
        assert options["mask"].dtype == bool
    assert calls


def test_refusals(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    wide = jnp.ones((2, 16, 1, 260), jnp.bfloat16)
    narrow = jnp.ones((2, 16, 1, 8))
    info = segment_info(HARD_ROWS[:2])
    for implementation, array, message in [
        ("splash", narrow, "'splash' needs lengths that are multiples of 128, but they are 16 and"),
        ("cudnn", narrow, "'cudnn' needs bfloat16 or float16, but query is float32"),
        ("cudnn", wide, "needs even lengths and heads of 8, 16, ... 256 features.*heads have 260"),
        ("tokamax", narrow, "'tokamax' needs tokamax, which cannot be imported"),
        ("flash", narrow, "implementation = 'flash' is not known. Hint: choose one of dense, b"),
    ]:
        with pytest.raises(SeqpackError, match=rf"packed_attention: .*{message}"):
            packed_attention(array, array, array, info, implementation=implementation)
    assert IMPLEMENTATIONS == ("dense", "blocked", "splash", "cudnn", "tokamax")


@pytest.mark.parametrize(
    ("query", "key", "value", "message"),
    [
        ((2, 16, 4, 8), (2, 16, 3, 8), (2, 16, 3, 8), r"query \(2, 16, 4, 8\), key .*do not fit"),
        ((2, 16, 4, 8), (2, 16, 4, 6), (2, 16, 4, 6), "do not fit. Hint: pass .B, L, N, H. and"),
        ((2, 16, 4, 8), (2, 16, 4, 8), (2, 16, 2, 8), "do not fit"),
        ((2, 16, 4, 8), (1, 16, 4, 8), (1, 16, 4, 8), "do not fit"),
        ((2, 16, 8), (2, 16, 8), (2, 16, 8), r"query is float32 of shape \(2, 16, 8\), but it mu"),
        ((2, 8, 4, 8), (2, 16, 4, 8), (2, 16, 4, 8), r"query has shape .*segment ids \(2, 16\)"),
        ((2, 16, 4, 8), (2, 8, 4, 8), (2, 8, 4, 8), r"key has shape .*segment ids \(2, 16\)"),
    ],
)
def test_shapes_are_checked(query, key, value, message):
    arrays = [jnp.ones(shape) for shape in (query, key, value)]
    with pytest.raises(SeqpackError, match=f"packed_attention: .*{message}"):
        packed_attention(*arrays, segment_info(HARD_ROWS[:2]))


def test_dtypes_and_info_are_checked():
    array = jnp.ones((2, 16, 1, 8))
    info = segment_info(HARD_ROWS[:2])
    with pytest.raises(SeqpackError, match=r"query is float32, key float16, value float32. Hint"):
        packed_attention(array, array.astype(jnp.float16), array, info)
    with pytest.raises(SeqpackError, match="query is int32 of shape"):
        packed_attention(array.astype(jnp.int32), array, array, info)
    with pytest.raises(SeqpackError, match=r"info is a ndarray. Hint: pass what segment_info ret"):
        packed_attention(array, array, array, HARD_ROWS[:2])
