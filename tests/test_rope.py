"""Rotary positions: against a loop in float64, relative, packed as alone, exact in any dtype."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.rope import apply_rope
from seqpack_jax.model.segments import positions_from_segment_ids


def rotated_slowly(x, positions, theta=10_000.0):
    """Turn each pair (i, i + H / 2) of each token as a complex number, one by one."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape[:-1]):
        position = int(np.asarray(positions)[index[:-1]])
        for i in range(half):
            angle = position * theta ** (-2 * i / x.shape[-1])
            pair = complex(x[index][i], x[index][i + half])
            turned = pair * complex(math.cos(angle), math.sin(angle))
            result[index][i], result[index][i + half] = turned.real, turned.imag
    return result


def random_x(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("theta", [10_000.0, 5_000_000_000, np.float32(7.5)])
def test_equals_the_loop(theta):
    x = random_x(2, 6, 3, 8)
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [5, 6, 7, 0, 900, 4095]])
    expected = rotated_slowly(x, positions, float(theta))
    np.testing.assert_allclose(apply_rope(x, positions, theta=theta), expected, atol=5e-4)
    small = jnp.minimum(positions, 9)
    expected = rotated_slowly(x, small, float(theta))
    np.testing.assert_allclose(apply_rope(x, small, theta=theta), expected, atol=1e-5)


def test_any_leading_dimensions():
    x, positions = random_x(2, 3, 4, 2, 6), np.arange(24).reshape(2, 3, 4)
    whole = apply_rope(x, positions)
    np.testing.assert_array_equal(whole[1, 2], apply_rope(x[1, 2], positions[1, 2]))
    np.testing.assert_array_equal(whole, jax.vmap(apply_rope)(x, positions))


def test_position_0_changes_nothing_and_length_is_kept():
    x = random_x(5, 2, 8)
    np.testing.assert_array_equal(apply_rope(x, jnp.zeros(5, jnp.int32)), x)
    turned = apply_rope(x, jnp.arange(5) * 1000)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), 1e-6)


def test_scores_depend_on_the_distance_alone():
    query, key = random_x(1, 1, 16), random_x(1, 1, 16, seed=1)

    def score(at_query, at_key):
        turned = apply_rope(query, jnp.array([at_query])), apply_rope(key, jnp.array([at_key]))
        return float(jnp.sum(turned[0] * turned[1]))

    for distance in (-3, 0, 1, 17):
        at = [score(start + 3 + distance, start + 3) for start in (0, 1, 20, 100)]
        np.testing.assert_allclose(at, at[0], atol=1e-4)
    assert abs(score(5, 3) - score(3, 5)) > 0.1


def test_a_packed_segment_is_bit_equal_to_the_sequence_alone():
    rows = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [0, 1, 2, 2, 0, 3, 3, 3]])
    x = random_x(2, 8, 2, 4)
    packed = apply_rope(x, positions_from_segment_ids(rows))
    for row, start, stop in [(0, 0, 3), (0, 3, 7), (1, 1, 2), (1, 2, 4), (1, 5, 8)]:
        alone = apply_rope(x[row, start:stop], jnp.arange(stop - start))
        np.testing.assert_array_equal(packed[row, start:stop], alone)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_angles_are_float32_whatever_the_dtype(dtype):
    x = jnp.asarray(random_x(4, 2, 8), dtype)
    positions = jnp.array([4091, 4092, 4093, 100_003])  # no bfloat16 holds them
    turned = apply_rope(x, positions)
    assert turned.dtype == dtype
    exact = apply_rope(x.astype(jnp.float32), positions)
    np.testing.assert_array_equal(turned, exact.astype(dtype))  # one rounding, at the end
    slow = rotated_slowly(x.astype(jnp.float32), positions)
    error = np.abs(np.asarray(turned, np.float64) - slow).max()
    assert error < (0.03 if dtype == jnp.bfloat16 else 0.02)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(random_x(3, 1, 4), jnp.float64)
        turned = apply_rope(x, jnp.arange(3))
        assert turned.dtype == jnp.float64
        np.testing.assert_allclose(turned, rotated_slowly(x, np.arange(3)), atol=1e-6)


def test_the_gradient_is_the_rotation_back():
    x, cotangent = random_x(3, 2, 6), random_x(3, 2, 6, seed=1)
    positions = jnp.array([0, 1, 50])
    gradient = jax.grad(lambda x: jnp.sum(apply_rope(x, positions) * cotangent))(x)
    np.testing.assert_allclose(gradient, apply_rope(cotangent, -positions), atol=1e-6)


@pytest.mark.parametrize(
    ("x", "positions", "options", "message"),
    [
        ((4, 2, 3), (4,), {}, "x has 3 features per head, but they are rotated in pairs"),
        ((4, 2), (4,), {}, r"x is float32 of shape \(4, 2\), but it must be floats \[..., L, N"),
        ((2, 4, 1, 2), (4,), {}, r"positions are int32 of shape \(4,\).*integers of shape \(2, 4"),
        ((4, 1, 2), (5,), {}, r"needs integers of shape \(4,\). Hint: pass the positions of"),
        ((4, 1, 2), (4,), {"theta": 0.0}, "theta = 0.0. Hint: pass a number over 0"),
        ((4, 1, 2), (4,), {"theta": True}, "theta = True"),
        ((4, 1, 2), (4,), {"theta": math.inf}, "theta = inf"),
        ((4, 1, 2), (4,), {"theta": "big"}, "theta = 'big'"),
        ((4, 1, 2), (4,), {"theta": [1.0]}, r"theta = \[1.0\]"),
    ],
)
def test_errors(x, positions, options, message):
    with pytest.raises(SeqpackError, match=rf"apply_rope: .*{message}"):
        apply_rope(jnp.ones(x), jnp.zeros(positions, jnp.int32), **options)


def test_dtypes_are_checked():
    x, positions = jnp.ones((4, 1, 2)), jnp.arange(4)
    with pytest.raises(SeqpackError, match="x is int32"):
        apply_rope(x.astype(jnp.int32), positions)
    with pytest.raises(SeqpackError, match="positions are float32"):
        apply_rope(x, positions.astype(jnp.float32))
