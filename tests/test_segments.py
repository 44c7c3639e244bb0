"""The page `segments` as a whole: what users import from it, in one jitted step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import HAND_ROWS as ROWS

from seqpack_jax.errors import SeqpackError
from seqpack_jax.model import ids, key_bounds, masks, offsets, segments


def compact(segment_ids, max_segments):
    """Everything of O(L) that a step may want."""
    bounds = segments.kv_bounds(segment_ids)
    return {
        "positions": segments.positions_from_segment_ids(segment_ids),
        "starts": segments.segment_starts(segment_ids),
        "valid": segments.valid_tokens(segment_ids),
        "tap": segments.shift_mask(segment_ids, 1),
        "monotone": segments.monotone_segment_ids(segment_ids),
        "count": segments.num_segments(segment_ids),
        "overflow": segments.overflow(segment_ids, max_segments),
        "bounds": bounds,
        "blocks": segments.block_bounds(*bounds, block_q=4, block_kv=4),
        "both": segments.seqlens_and_offsets(segment_ids, max_segments),
        "row": segments.cu_seqlens(segment_ids, max_segments),
        "flat": segments.build_packing_cu_seqlens(segment_ids, max_segments=max_segments),
    }


def everything(segment_ids):
    dense = {
        "mask": segments.segment_mask(segment_ids),
        "bias": segments.segment_bias(segment_ids, jnp.bfloat16),
        "seed": segments.build_packing_attention_bias(segment_ids),
    }
    return compact(segment_ids, ROWS.shape[1]) | dense


TRACED = []  # what `jitted` was compiled for


@jax.jit
def jitted(rows):
    TRACED.append(str(jax.typeof(rows)))
    return everything(rows)


BATCHES = np.stack([ROWS, ROWS[::-1], np.zeros_like(ROWS)])


def assert_trees_equal(tree, expected):
    for result, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.fixture(autouse=True)
def debug_nans():
    """For all tests: to turn it on for one alone would compile the step again."""
    with jax.debug_nans(True):
        yield


def test_it_offers_every_public_function_of_its_modules():
    homes = {name: home for home in (ids, masks, key_bounds, offsets) for name in home.__all__}
    assert {*homes, "SegmentInfo", "segment_info"} == set(segments.__all__)
    for name, home in homes.items():
        assert getattr(segments, name) is getattr(home, name)


def test_all_forms_agree_on_the_segments():
    made = jax.tree.map(np.asarray, jitted(ROWS))
    real = ROWS > 0
    np.testing.assert_array_equal(made["valid"], real)
    np.testing.assert_array_equal(made["starts"].sum(axis=1), made["count"])
    np.testing.assert_array_equal(made["tap"] == 0, (made["positions"] == 0) | ~real)
    index = np.broadcast_to(np.arange(ROWS.shape[1]), ROWS.shape)
    np.testing.assert_array_equal(made["bounds"].k_start[real], (index - made["positions"])[real])
    keys = made["bounds"].k_end - made["bounds"].k_start
    np.testing.assert_array_equal(made["mask"].sum(axis=-1)[:, 0][real], keys[real])
    np.testing.assert_array_equal(made["mask"], made["bias"] == 0)
    by_monotone = segments.segment_mask(made["monotone"])
    np.testing.assert_array_equal(by_monotone[:, 0][real], made["mask"][:, 0][real])
    for row, (count, starts) in enumerate(zip(made["count"], made["starts"], strict=True)):
        lengths = made["both"].seqlens[row][:count]
        np.testing.assert_array_equal(made["both"].offsets[row][:count], np.flatnonzero(starts))
        assert lengths.sum() == real[row].sum()
    assert not made["overflow"].any()
    assert not made["flat"].overflow


def test_one_compilation_serves_all_batches():
    for batch in BATCHES:
        jax.block_until_ready(jitted(batch))
    assert TRACED.count("int32[6,12]") == 1
    jax.eval_shape(jitted, ROWS[:2])
    assert TRACED[-1] == "int32[2,12]"  # another shape is another compilation


def test_a_scan_of_vmap_over_batches_equals_a_loop():
    def step(carry, batches):
        return carry, jax.vmap(everything)(batches)

    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *map(jitted, BATCHES))
    pairs = np.stack([BATCHES, BATCHES[::-1]])  # two steps of the scan
    expected = jax.tree.map(lambda leaf: np.stack([leaf, leaf[::-1]]), looped)
    assert_trees_equal(jax.jit(lambda xs: jax.lax.scan(step, 0, xs)[1])(pairs), expected)


def collectives_in(compiled):
    """The operations between devices in a program."""
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    return [name for name in names if name in compiled.as_text()]


def test_rows_on_four_devices_need_no_communication():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows = jax.device_put(ROWS[1:5], sharding)

    def of_rows(made):
        return {name: made[name] for name in made if name != "flat"}  # one stream of all rows

    step = jax.jit(lambda ids: of_rows(everything(ids)), out_shardings=sharding)
    compiled = step.lower(rows).compile()
    assert not collectives_in(compiled)
    expected = jax.tree.map(lambda leaf: leaf[1:5], of_rows(jitted(ROWS)))
    assert_trees_equal(compiled(rows), expected)
    flat = segments.build_packing_cu_seqlens.lower(rows, max_segments=4).compile()
    assert collectives_in(flat)  # the check can fail


def memory_of(function, length):
    rows = jax.ShapeDtypeStruct((2, length), jnp.int32)
    memory = jax.jit(function).lower(rows).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_compact_forms_need_no_square_of_memory():
    assert memory_of(lambda rows: compact(rows, 32), 4096) < 100 * 2 * 4096
    assert memory_of(segments.segment_mask, 512) >= 2 * 512**2  # the check can fail


def test_errors_come_while_tracing():
    for shape in (jax.ShapeDtypeStruct((2, 4), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)):
        for name in (
            "positions_from_segment_ids",
            "segment_starts",
            "valid_tokens",
            "monotone_segment_ids",
            "num_segments",
            "segment_mask",
            "segment_bias",
            "build_packing_attention_bias",
            "kv_bounds",
        ):
            with pytest.raises(SeqpackError, match=f"^{name}: segment_ids is .* Hint: "):
                jax.eval_shape(getattr(segments, name), shape)
