import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from packed_rows import HAND_ROWS, LENGTH, packed_rows

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model.key_bounds import BlockBounds, KeyBounds, block_bounds, kv_bounds
from seqpack_jax.model.masks import segment_mask

PADS = ["segment", "self", "empty"]
SETTINGS = list(itertools.product([True, False], [None, 1, 3, 2**31 - 1], PADS))
BLOCKS = [(1, 1), (4, 3), (5, 2), (16, 7), (3, 2**31 - 1)]


@jax.jit
def all_bounds(rows):
    """Bounds under all settings, in one compilation."""
    return [kv_bounds(rows, causal=c, window=w, pad=p) for c, w, p in SETTINGS]


@jax.jit
def all_masks(rows):
    return [segment_mask(rows, causal=c, window=w, pad=p) for c, w, p in SETTINGS]


@jax.jit
def all_blocks(k_start, k_end):
    return [block_bounds(k_start, k_end, *sizes) for sizes in BLOCKS]


@jax.jit
def cross_bounds(rows, kv_rows):
    return [kv_bounds(rows, kv_rows, causal=False, pad=pad) for pad in PADS]


def everything(rows):
    """Bounds of every kind, those of blocks at the end."""
    bounds = kv_bounds(rows)
    return [
        bounds,
        kv_bounds(rows, causal=False, window=3, pad="segment"),
        kv_bounds(rows, rows[..., ::2], causal=False),
        block_bounds(*bounds, 5, 4),
    ]


TRACED = []  # what `jitted` was compiled for


@jax.jit
def jitted(rows):
    TRACED.append(str(jax.typeof(rows)))
    return everything(rows)


def slow_bounds(rows, causal, window, pad):
    """Walk from each token to both sides while the next token is allowed."""
    k_start, k_end = np.zeros(rows.shape, np.int32), np.zeros(rows.shape, np.int32)
    for b, query in np.ndindex(rows.shape):
        row, first, last = rows[b], query, query
        reach = rows.shape[1] if window is None else window - 1
        if row[query] == 0 and pad == "self":
            reach = 0
        while first > 0 and row[first - 1] == row[query] and query - first < reach:
            first -= 1
        while not causal and last + 1 < len(row) and row[last + 1] == row[query]:
            if last - query >= reach:
                break
            last += 1
        if row[query] != 0 or pad != "empty":
            k_start[b, query], k_end[b, query] = first, last + 1
    return k_start, k_end


def slow_block_bounds(start, end, block_q, block_kv):
    """Collect the blocks of all keys of all queries of each block."""
    blocks = -(-start.shape[1] // block_q)
    lo, hi = np.zeros((len(start), blocks), np.int32), np.zeros((len(start), blocks), np.int32)
    for b, block in np.ndindex(lo.shape):
        visited = set()
        for query in range(block * block_q, min((block + 1) * block_q, start.shape[1])):
            visited |= {key // block_kv for key in range(start[b, query], end[b, query])}
        if visited:
            lo[b, block], hi[b, block] = min(visited), max(visited) + 1
    return lo, hi


def mask_of_bounds(bounds, keys=LENGTH):
    index = np.arange(keys)
    start, end = (np.asarray(x)[:, None, :, None] for x in bounds)
    return (start <= index) & (index < end)


def assert_equal(bounds, expected):
    """Compare trees of int32 arrays."""
    for result, wanted in zip(jax.tree.leaves(bounds), jax.tree.leaves(expected), strict=True):
        assert result.dtype == jnp.int32
        np.testing.assert_array_equal(result, wanted)


# --- bounds of each token ---------------------------------------------------------------------


@given(packed_rows())
@example(HAND_ROWS)
@settings(max_examples=12)
def test_bounds_equal_the_loop(rows):
    for setting, bounds in zip(SETTINGS, all_bounds(rows), strict=True):
        assert_equal(bounds, slow_bounds(rows, *setting))


def runs_of(rows):
    """Ids that make each run of padding, too, a segment of its own, as bounds must."""
    return np.cumsum(np.diff(rows, axis=1, prepend=-1) != 0, axis=1, dtype=np.int32)


@given(packed_rows())
@example(HAND_ROWS)
@settings(max_examples=30)
def test_bounds_equal_the_mask_by_ids(rows):
    masks = all_masks(rows)
    real = np.broadcast_to((rows > 0)[:, None, :, None], masks[0].shape)
    forms = zip(SETTINGS, all_bounds(rows), masks, all_masks(runs_of(rows)), strict=True)
    for (_, _, pad), bounds, mask, by_run in forms:
        result = mask_of_bounds(bounds)
        np.testing.assert_array_equal(result, by_run if pad == "segment" else mask)
        np.testing.assert_array_equal(result[real], np.asarray(mask)[real])


def test_defaults():
    assert_equal(kv_bounds(HAND_ROWS), slow_bounds(HAND_ROWS, True, None, "self"))


def slow_cross_bounds(rows, kv_rows):
    k_start, k_end = np.zeros(rows.shape, np.int32), np.zeros(rows.shape, np.int32)
    for b, query in np.ndindex(rows.shape):
        keys = np.flatnonzero(kv_rows[b] == rows[b, query])
        if rows[b, query] != 0 and len(keys):
            k_start[b, query], k_end[b, query] = keys[0], keys[-1] + 1
    return k_start, k_end


@given(packed_rows(), packed_rows(length=8), st.lists(st.integers(0, 12), max_size=6))
@settings(max_examples=50)
def test_cross_bounds_equal_the_loop_and_the_mask(rows, kv_rows, gone):
    kv_rows = np.where(np.isin(kv_rows, gone), 0, kv_rows)  # segments without keys in between
    expected = slow_cross_bounds(rows, kv_rows)
    assert_equal(cross_bounds(rows, kv_rows), [expected] * len(PADS))
    mask = segment_mask(rows, kv_rows, causal=False, pad="empty")
    np.testing.assert_array_equal(mask_of_bounds(expected, keys=8), mask)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_a_segment_of_the_largest_id_of_its_dtype(dtype):
    rows = np.array([[1, 255, 255, 0]], np.uint8)
    bounds = kv_bounds(rows.astype(dtype), rows, causal=False)
    assert_equal(bounds, slow_cross_bounds(rows, rows))


# --- bounds of blocks -------------------------------------------------------------------------


@st.composite
def intervals(draw, length=13):
    """Any half-open intervals `[2, length]`, many of them empty."""
    ends = st.lists(st.integers(0, 16), min_size=2 * length, max_size=2 * length)
    start, end = (np.array(draw(ends), np.int32).reshape(2, length) for _ in range(2))
    return start, end


@given(intervals())
@settings(max_examples=50)
def test_block_bounds_equal_the_loop(pair):
    for sizes, blocks in zip(BLOCKS, all_blocks(*pair), strict=True):
        assert_equal(blocks, slow_block_bounds(*pair, *sizes))


def expand(blocks, block_q, block_kv):
    """Which pairs of tokens lie in a visited pair of blocks: bool `[B, 1, L, L]`."""
    index = np.arange(LENGTH)
    lo, hi = (np.asarray(x)[:, index // block_q][:, None, :, None] for x in blocks)
    return (lo <= index // block_kv) & (index // block_kv < hi)


@given(packed_rows(), packed_rows())
@settings(max_examples=8)
def test_no_key_outside_the_blocks_is_allowed(rows, kv_rows):
    for bounds in (*all_bounds(rows), cross_bounds(rows, kv_rows)[0]):
        mask = mask_of_bounds(bounds)  # equal to that by ids: see above
        for sizes, blocks in zip(BLOCKS, all_blocks(*bounds), strict=True):
            visited = expand(blocks, *sizes)
            assert not (mask & ~visited).any()
            if sizes == (1, 1):
                np.testing.assert_array_equal(visited, mask)


def test_empty_intervals_do_not_widen_their_block():
    """With padding at the front and the back, and a block of nothing else."""
    rows = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]])
    blocks = block_bounds(*kv_bounds(rows, pad="empty"), block_q=4, block_kv=2)
    assert (blocks.lo.tolist(), blocks.hi.tolist()) == ([[0, 3, 3]], [[0, 4, 5]])
    start, end = np.array([7, 4, 0]), np.array([7, 6, 0])
    blocks = block_bounds(start, end, 3, 2)
    assert (blocks.lo.tolist(), blocks.hi.tolist()) == ([2], [3])
    blocks = block_bounds(start[::2], end[::2], 1, 2)
    assert (blocks.lo.tolist(), blocks.hi.tolist()) == ([0, 0], [0, 0])


# --- how they compile -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_ids_of_every_integer_dtype(dtype):
    with jax.enable_x64(dtype == "int64"):
        result = jitted(HAND_ROWS.astype(dtype))
    assert_equal(result, jitted(HAND_ROWS))


def test_any_leading_dimensions():
    flat = jitted(HAND_ROWS)
    deep = jitted(HAND_ROWS.reshape(2, 3, LENGTH))
    assert_equal(deep, jax.tree.map(lambda x: x.reshape(2, 3, x.shape[-1]), flat))


def test_rows_over_an_explicit_mesh():
    """`jax.make_mesh` makes such meshes by default; they refuse operations of unclear sharding."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    rows = jax.device_put(HAND_ROWS, NamedSharding(mesh, PartitionSpec("data")))
    expected = jitted(HAND_ROWS)
    with jax.set_mesh(mesh):
        made = jax.jit(everything)(rows)  # not `jitted`, which has a program for this shape
    assert_equal(made, expected)
    assert {x.sharding.spec[:1] for x in jax.tree.leaves(made)} == {("data",)}


def test_under_shard_map_and_vmap():
    """So that each row comes alone, with rank 1."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("data")
    mapped = jax.shard_map(jax.vmap(everything), mesh=mesh, in_specs=spec, out_specs=spec)
    assert_equal(jax.jit(mapped)(HAND_ROWS), jitted(HAND_ROWS))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,), (1,)])
def test_empty_batches_and_rows_of_one_token(shape):
    *bounds, blocks = jax.eval_shape(everything, jax.ShapeDtypeStruct(shape, jnp.int32))
    assert {x.shape for x in jax.tree.leaves(bounds)} == {shape}
    assert blocks.lo.shape == blocks.hi.shape == (*shape[:-1], -(-shape[-1] // 5))


def test_without_keys():
    bounds = kv_bounds(np.ones((2, 3), np.int32), np.zeros((2, 0), np.int32), causal=False)
    assert_equal(bounds, (np.zeros((2, 3)), np.zeros((2, 3))))


def test_one_compilation_serves_all_batches():
    for batch in (HAND_ROWS, HAND_ROWS[::-1], np.zeros_like(HAND_ROWS)):
        jax.block_until_ready(jitted(batch))
    assert TRACED.count("int32[6,12]") == 1
    jax.eval_shape(jitted, jax.ShapeDtypeStruct((7, 12), jnp.int32))
    assert TRACED[-1] == "int32[7,12]"  # another shape is another compilation


def test_cross_bounds_need_no_square_of_memory():
    """For the other forms see `test_segments`."""
    length = 4096
    shape = jax.ShapeDtypeStruct((2, length), jnp.int32)
    memory = kv_bounds.lower(shape, shape, causal=False).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 100 * 2 * length


def test_types():
    made = jax.eval_shape(everything, HAND_ROWS)
    assert [type(x) for x in made] == [KeyBounds] * 3 + [BlockBounds]


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kv_bounds(np.ones((2, 3))),
            r"^kv_bounds: segment_ids is float32 of shape \(2, 3\), but it must be integers "
            r"\[..., L\]. Hint:",
        ),
        (lambda: kv_bounds(HAND_ROWS, HAND_ROWS > 0, causal=False), "kv_segment_ids is bool"),
        (
            lambda: kv_bounds(HAND_ROWS, HAND_ROWS[:3], causal=False),
            r"^kv_bounds: kv_segment_ids has shape \(3, 12\), but segment_ids has \(6, 12\). Hint:",
        ),
        (
            lambda: kv_bounds(HAND_ROWS, HAND_ROWS),
            "^kv_bounds: causal and window compare tokens of different arrays, whose index says "
            "nothing. Hint: pass causal=False and window=None with kv_segment_ids",
        ),
        (lambda: kv_bounds(HAND_ROWS, HAND_ROWS, causal=False, window=2), "causal and window"),
        (lambda: kv_bounds(HAND_ROWS, window=0), "^kv_bounds: window = 0, but it must be in"),
        (lambda: kv_bounds(HAND_ROWS, window=1.5), "window = 1.5 is not an integer. Hint:"),
        (
            lambda: kv_bounds(HAND_ROWS, pad="none"),
            "^kv_bounds: pad = 'none' is not known. Hint: choose one of segment, self, empty",
        ),
        (
            lambda: block_bounds(HAND_ROWS, HAND_ROWS[0], 2, 2),
            r"^block_bounds: k_start has shape \(6, 12\), but k_end has shape \(12,\). Hint: pass "
            "the two fields of one KeyBounds",
        ),
        (lambda: block_bounds(HAND_ROWS / 1, HAND_ROWS, 2, 2), "k_start is float32"),
        (lambda: block_bounds(HAND_ROWS, HAND_ROWS, 0, 2), "block_q = 0, but it must be"),
        (lambda: block_bounds(HAND_ROWS, HAND_ROWS, 2, "3"), "block_kv = '3' is not an integer"),
    ],
)
def test_errors(call, message):
    with pytest.raises(SeqpackError, match=message):
        call()


def test_errors_come_while_tracing():
    with pytest.raises(SeqpackError, match="kv_bounds: segment_ids is float32"):
        jax.eval_shape(kv_bounds, jax.ShapeDtypeStruct((2, 4), jnp.float32))
