"""The attention layer: packed rows against each sequence alone, parameters' gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS, attend_alone, gradients_alone
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from model_reference import runs

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model import (
    adapters,
    attention,
    blocked,
    dispatch,
    kernel_adapters,
    rope,
)
from seqpack_jax.model.attention import PackedSelfAttention, to_flax_mask
from seqpack_jax.model.segments import segment_info

WIDTH = 12


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """What XLA optimizes is tested in tests/test_dispatch.py; here, how the layer is put together.

    It halves the time of this file, which is mostly compilation.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SEGMENTS = [(b, *run) for b, row in enumerate(HARD_ROWS) for run in runs(row)]


def random_x(rows=HARD_ROWS, seed=0):
    draw = np.random.default_rng(seed).normal
    return draw(size=(*rows.shape, WIDTH)).astype(np.float32)


def layer_of(seed=3, **options):
    options = {"num_kv_heads": 2, "head_dim": 6, "out_features": 10, **options}
    return PackedSelfAttention(4, WIDTH, rngs=nnx.Rngs(seed), **options)


def parameters(layer):
    """Return float64 arrays by name, such as `query/kernel`."""
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {"/".join(path): np.asarray(leaf[...], np.float64) for path, leaf in flat}


def alone(layer, x, cotangent, causal=True, window=None, theta=10_000.0):
    """Return float64 output `[B, L, out]`, and the gradients of parameters and x, by the book.

    Padding counts as 0; only attention mixes tokens, and there each segment is on its own.
    """
    weights = parameters(layer)
    real = (HARD_ROWS != 0)[..., None]
    x, cotangent = (np.where(real, np.asarray(each, np.float64), 0) for each in (x, cotangent))
    names = ("query", "key", "value")
    biases = {name: weights.get(f"{name}/bias", np.zeros(1)) for name in (*names, "out")}
    qkv = [
        np.einsum("bld,dnh->blnh", x, weights[f"{name}/kernel"]) + biases[name] for name in names
    ]
    if theta is not None:
        qkv[:2] = turned(qkv[0], theta), turned(qkv[1], theta)
    who = {"causal": causal, "window": window}
    mixed = attend_alone(*qkv, HARD_ROWS, **who)
    output = np.einsum("blnh,nhd->bld", mixed, weights["out/kernel"]) + biases["out"]
    of_mixed = np.einsum("bld,nhd->blnh", cotangent, weights["out/kernel"])
    of_qkv = gradients_alone(*qkv, of_mixed, HARD_ROWS, **who)
    if theta is not None:
        of_qkv[:2] = turned(of_qkv[0], theta, back=True), turned(of_qkv[1], theta, back=True)
    of_weights = {"out/kernel": np.einsum("blnh,bld->nhd", mixed, cotangent)}
    of_weights["out/bias"] = cotangent.sum((0, 1))
    of_x = np.zeros_like(x)
    for name, of_one in zip(names, of_qkv, strict=True):
        of_weights[f"{name}/kernel"] = np.einsum("bld,blnh->dnh", x, of_one)
        of_weights[f"{name}/bias"] = of_one.sum((0, 1))
        of_x += np.einsum("blnh,dnh->bld", of_one, weights[f"{name}/kernel"])
    return output, {name: of_weights[name] for name in weights}, of_x


def turned(x, theta, back=False):
    """Turn each pair of features by the position of its token in its segment."""
    half = x.shape[-1] // 2
    result = np.array(x)
    for b, start, stop in SEGMENTS:
        angle = np.arange(stop - start)[:, None] * theta ** (-np.arange(half) / half)[None, :]
        turn = np.exp((-1j if back else 1j) * angle)[:, None, :]
        pairs = (x[b, start:stop, :, :half] + 1j * x[b, start:stop, :, half:]) * turn
        result[b, start:stop] = np.concatenate([pairs.real, pairs.imag], axis=-1)
    return result


@nnx.jit
def packed(layer, x, info, cotangent):
    """Return output, gradients of the parameters, and of x."""

    def run(state, x):
        return nnx.merge(graph, state)(x, info)

    graph, state = nnx.split(layer)
    output, back = jax.vjp(run, state, x)
    return output, *back(cotangent)


@nnx.jit
def forward(layer, x, info):
    return layer(x, info)


def check(layer, x, info, atol=1e-5, **expectation):
    cotangent = np.random.default_rng(5).normal(size=(*x.shape[:2], 10)).astype(np.float32) / 8
    output, of_weights, of_x = packed(layer, x, info, jnp.asarray(cotangent, x.dtype))
    wanted = alone(layer, x.astype(np.float32), cotangent, **expectation)
    real = HARD_ROWS != 0
    flat = nnx.to_flat_state(of_weights)
    found = {"/".join(path): np.asarray(leaf[...], np.float64) for path, leaf in flat}
    assert set(found) == set(wanted[1])
    assert not np.asarray(output)[~real].any()  # also with a bias
    pairs = [(np.asarray(output, np.float64)[real], wanted[0][real])]
    pairs += [(np.asarray(of_x, np.float64), wanted[2])]
    pairs += [(found[name], wanted[1][name]) for name in found]
    for one, two in pairs:
        assert np.abs(one - two).max() < atol


BIASED = {"num_kv_heads": None, "use_bias": True, "bias_init": nnx.initializers.normal()}


@pytest.mark.parametrize(
    ("options", "expectation"),
    [
        ({}, {}),
        ({"implementation": "blocked", **BIASED}, {}),
        ({"num_kv_heads": 1, "head_dim": 3, "rope_theta": None}, {"theta": None, "causal": False}),
        ({"rope_theta": 50, "window": 3}, {"theta": 50.0, "window": 3}),
    ],
)
def test_packed_equals_alone(options, expectation):
    # The window of a layer replaces that of info.
    window = 5 if "window" in options else None
    info = segment_info(HARD_ROWS, causal=expectation.get("causal", True), window=window)
    check(layer_of(**options), random_x(), info, **expectation)


def test_bfloat16():
    layer, info = layer_of(param_dtype=jnp.bfloat16), segment_info(HARD_ROWS)
    check(layer, jnp.asarray(random_x() / 4, jnp.bfloat16), info, atol=1e-2)
    mixed = layer_of(dtype=jnp.bfloat16)
    assert mixed.query.kernel[...].dtype == jnp.float32
    assert jax.eval_shape(lambda x: mixed(x, info), random_x()).dtype == jnp.bfloat16


def test_default_sizes_and_names_are_those_of_flax():
    ours = PackedSelfAttention(4, WIDTH, rope_theta=None, rngs=nnx.Rngs(0))
    flax = nnx.MultiHeadAttention(4, WIDTH, use_bias=False, decode=False, rngs=nnx.Rngs(0))
    shapes = {name: each.shape for name, each in parameters(ours).items()}
    assert shapes == {name: each.shape for name, each in parameters(flax).items()}
    nnx.update(ours, nnx.state(flax, nnx.Param))
    x, info = random_x(), segment_info(HARD_ROWS)
    real = HARD_ROWS != 0
    expected = nnx.jit(lambda flax, x: flax(x, mask=to_flax_mask(info)))(flax, x)
    np.testing.assert_allclose(forward(ours, x, info)[real], expected[real], atol=1e-5)


def test_initializers():
    ones, twos = nnx.initializers.ones_init(), nnx.initializers.constant(2.0)
    made = parameters(layer_of(use_bias=True, kernel_init=ones, bias_init=twos))
    assert {name: each.mean() for name, each in made.items()} == {
        f"{name}/{kind}": value
        for name in ("query", "key", "value", "out")
        for kind, value in (("kernel", 1.0), ("bias", 2.0))
    }
    made = parameters(layer_of(use_bias=True, out_kernel_init=ones, out_bias_init=twos))
    assert (made["out/kernel"].mean(), made["out/bias"].mean()) == (1.0, 2.0)
    assert (made["query/bias"].mean(), made["key/kernel"].mean() < 0.5) == (0.0, True)
    assert layer_of(param_dtype=jnp.bfloat16).out.kernel[...].dtype == jnp.bfloat16


@pytest.mark.parametrize("options", [{}, {"implementation": "blocked", **BIASED}])
def test_no_leak(options):
    """Change one segment: everything else stays bit-equal, also the gradient to the input."""
    layer, info, x = layer_of(**options), segment_info(HARD_ROWS), random_x()
    cotangent = np.ones((*HARD_ROWS.shape, 10), np.float32)
    other = HARD_ROWS == 2
    changed = np.where(other[..., None], x * 2 + 1, x)
    before, after = packed(layer, x, info, cotangent), packed(layer, changed, info, cotangent)
    for one, two in ((before[0], after[0]), (before[2], after[2])):
        one, two = np.asarray(one), np.asarray(two)
        np.testing.assert_array_equal(one[~other], two[~other])
        assert (one[other] != two[other]).any()


@pytest.mark.parametrize("options", [{}, {"implementation": "blocked", **BIASED}])
def test_nan_in_the_padding_reaches_no_gradient(options):
    """NaN in the input and in the gradient from above, as a loss that divides by 0 there has it."""
    layer, info, x = layer_of(**options), segment_info(HARD_ROWS), random_x()
    cotangent = np.ones((*HARD_ROWS.shape, 10), np.float32)
    clean = packed(layer, x, info, cotangent)
    x, cotangent = (
        np.where((HARD_ROWS == 0)[..., None], np.float32(np.nan), each) for each in (x, cotangent)
    )
    with jax.debug_nans(True):
        dirty = packed(layer, x, info, cotangent)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_one_compilation_for_all_segments():
    traced = []

    @nnx.jit
    def step(layer, x, info):
        traced.append(info)
        return layer(x, info)

    layer, x = layer_of(), random_x()
    for shift in range(5):
        order = np.roll(np.arange(len(x)), shift)
        expected = forward(layer, x[order], segment_info(HARD_ROWS[order]))
        found = step(layer, x[order], segment_info(HARD_ROWS[order]))
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found, forward(layer, x, segment_info(HARD_ROWS))[order])
    assert len(traced) == 1


def test_scan_over_layers_with_remat():
    """Two layers as one stacked module under `nnx.scan` and `nnx.remat`: same as one by one."""
    rngs = nnx.Rngs(7)

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return PackedSelfAttention(2, WIDTH, rope_theta=None, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
    @nnx.remat
    def forward(x, layer, info):
        return x + layer(x, info)

    stacked, x, info = make(rngs), random_x(), segment_info(HARD_ROWS)
    graph, state = nnx.split(stacked)

    def scanned(state, x, info):
        return jnp.sum(forward(x, nnx.merge(graph, state), info) ** 2)

    def one_by_one(state, x, info):
        for i in range(2):
            layer = nnx.merge(graph, jax.tree.map(lambda each, i=i: each[i], state))
            x = x + layer(x, info)
        return jnp.sum(x**2)

    found = jax.jit(jax.value_and_grad(scanned))(state, x, info)
    wanted = jax.jit(jax.value_and_grad(one_by_one))(state, x, info)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-3)


def test_rows_on_several_devices():
    """Dense under plain jit, blocked under shard_map: parameters on all devices, rows on one."""
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = np.concatenate([HARD_ROWS, HARD_ROWS[:2]])
    x = random_x(rows)
    expected = forward(layer_of(), x, segment_info(rows))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    placed, ids = jax.device_put((x, rows), by_row)
    spec = PartitionSpec("data")

    def run(state, x, ids):
        return nnx.merge(graph, state)(x, segment_info(ids))

    for implementation in ("dense", "blocked"):
        graph, state = nnx.split(layer_of(implementation=implementation))
        step = run
        if implementation == "blocked":
            specs = (PartitionSpec(), spec, spec)
            step = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec)
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(step).lower(state, placed, ids).compile()
        hlo = compiled.as_text()
        assert not [
            name for name in ("all-reduce", "all-gather", "all-to-all", "permute(") if name in hlo
        ]
        output = compiled(state, placed, ids)
        assert output.sharding.is_equivalent_to(by_row, 3)
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_shuffled_tokens():
    """After a context-parallel reorder: positions and ids move along, and nothing else changes."""
    order = np.random.default_rng(2).permutation(HARD_ROWS.shape[1])
    plain = segment_info(HARD_ROWS)
    ids, positions = HARD_ROWS[:, order], np.asarray(plain.positions)[:, order]
    info = segment_info(ids, positions, contiguous=False)
    x = random_x()
    expected = np.asarray(forward(layer_of(), x, plain))[:, order]
    np.testing.assert_allclose(forward(layer_of(), x[:, order], info), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads = 0, but it must be at least 1"),
        ({"in_features": 2.0}, "in_features = 2.0 is not an integer"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3 does not divide num_heads = 4"),
        ({"in_features": 10, "head_dim": None}, "num_heads = 4 does not divide in_features = 10"),
        ({"head_dim": 3}, "head_dim = 3 is odd.*Hint: choose an even head_dim, or rope_theta=None"),
        ({"head_dim": 0}, "head_dim = 0, but it must be at least 1"),
        ({"out_features": 0}, "out_features = 0, but it must be at least 1"),
        ({"rope_theta": 0}, "rope_theta = 0. Hint: pass a number over 0"),
        ({"window": 0}, "window = 0, but it must be at least 1"),
        ({"implementation": "flash"}, "implementation = 'flash' is not known"),
    ],
)
def test_arguments_are_checked(options, message):
    options = {"num_heads": 4, "in_features": WIDTH, "head_dim": 6, **options}
    with pytest.raises(SeqpackError, match=f"PackedSelfAttention: {message}"):
        PackedSelfAttention(rngs=nnx.Rngs(0), **options)


def test_inputs_are_checked():
    layer, info, x = layer_of(), segment_info(HARD_ROWS), random_x()
    with pytest.raises(SeqpackError, match=r"info is a ndarray. Hint: pass what segment_info"):
        layer(x, HARD_ROWS)
    with pytest.raises(
        SeqpackError, match=r"x has shape \(6, 16, 5\), but .*ask for \(6, 16, 12\)"
    ):
        layer(x[..., :5], info)
    with pytest.raises(SeqpackError, match=r"x has shape \(2, 16, 12\)"):
        layer(x[:2], info)
    cross = segment_info(HARD_ROWS, kv_segment_ids=HARD_ROWS, causal=False)
    with pytest.raises(SeqpackError, match="info has kv_segment_ids, but self-attention has keys"):
        layer(x, cross)
    with pytest.raises(SeqpackError, match="'splash' needs lengths that are multiples of 128"):
        layer_of(implementation="splash")(x, info)


def test_one_import_gives_every_door():
    for module in (adapters, blocked, dispatch, kernel_adapters, rope):
        for name in module.__all__:
            assert getattr(attention, name) is getattr(module, name)
            assert name in attention.__all__
