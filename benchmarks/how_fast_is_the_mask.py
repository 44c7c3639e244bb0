"""How fast are positions, bounds and offsets, and does a dense bias cost memory inside a step?

    python benchmarks/how_fast_is_the_mask.py

Segment ids of packed batches `[8, 2048]`, on the CPU, under jit; on one core, and on all: threads
that wake each other can cost more than the work.

Yardsticks: `ids + 1`, the least that any jitted call takes; the dense bias `[8, 1, 2048, 2048]`
that the compact forms spare; one array `[2048, 2048]` of bool; and XLA's memory analysis of one
attention layer, forward and backward, with the bias built inside against the same layer with plain
causal attention and no segments.  The latter is compiled, not run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

ONE_CORE = "--one-core"
if sys.argv[1:] == [ONE_CORE]:
    os.sched_setaffinity(0, {0})  # before JAX starts its threads

import jax
import jax.numpy as jnp
import numpy as np
from common import Row, lognormal_lengths, medians, report, show_seconds, show_speedup

import seqpack_jax as sp
from seqpack_jax.model import segments

BATCHES, ROWS, MAX_SEQ_LEN, HEADS, HEAD_DIM = 50, 8, 2048, 4, 64
MOST_SECONDS = 0.0005


def packed_batches() -> tuple[jax.Array, int]:
    """Return the segment ids of 50 batches, and the most segments that any row of the plan has."""
    lengths = lognormal_lengths(5_000, MAX_SEQ_LEN)
    counts, pools = sp.length_histogram_from_lengths(lengths)
    plan = sp.pack_length_histogram(counts, MAX_SEQ_LEN)
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    tokens = [np.ones(length, np.int32) for length in lengths]
    bins = epoch[: BATCHES * ROWS]
    packed = sp.pack_batch(bins, tokens, MAX_SEQ_LEN, lengths=lengths)
    ids = jnp.asarray(packed.segment_ids).reshape(BATCHES, ROWS, MAX_SEQ_LEN)
    return ids, plan.max_segments


def compact(ids: jax.Array, max_segments: int) -> Any:
    """Describe the segments in every way that takes memory in proportion to L."""
    positions = segments.positions_from_segment_ids(ids)
    offsets = segments.seqlens_and_offsets(ids, max_segments)
    return positions, segments.kv_bounds(ids), offsets


def time_compact() -> tuple[float, float]:
    """Return the seconds of all compact forms in one jitted function, and of the least call."""
    batches, max_segments = packed_batches()
    light = jax.jit(lambda ids: compact(ids, max_segments))
    least = jax.jit(lambda ids: ids + 1)
    light_seconds, least_seconds = medians(
        lambda: jax.block_until_ready(light(batches[0])),
        lambda: jax.block_until_ready(least(batches[0])),
        number=200,
    )
    return light_seconds, least_seconds


def time_on_one_core() -> tuple[float, float]:
    """Return `time_compact` of a process that has one core, so that none waits for another."""
    command = [sys.executable, __file__, ONE_CORE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    light, least = map(float, done.stdout.split())
    return light, least


def measure_compact() -> list[Row]:
    """Time the compact forms and the bias; look at buffers and compilations."""
    batches, max_segments = packed_batches()
    compiled = 0

    @jax.jit
    def light(ids: jax.Array) -> Any:
        nonlocal compiled
        compiled += 1  # while JAX traces, which is once per compilation
        return compact(ids, max_segments)

    @jax.jit
    def dense(ids: jax.Array) -> jax.Array:
        return segments.segment_bias(ids)

    (bias,) = medians(lambda: jax.block_until_ready(dense(batches[0])), number=5)
    for ids in batches:
        light(ids)
    buffers = light.lower(batches[0]).compile().memory_analysis().temp_size_in_bytes
    square = MAX_SEQ_LEN**2
    what = f"positions, bounds and offsets, [{ROWS}, {MAX_SEQ_LEN}]"
    times = {"one core": time_on_one_core(), "all cores": time_compact()}
    return [
        *(
            Row(
                f"{what}, {max_segments} segments at most, {cores}",
                show_seconds(ours),
                f"ids + 1: {show_seconds(least)}; dense bias: {show_seconds(bias)}",
                f"{ours / least:.1f}x; {show_speedup(ours, bias)}",
                f"< {show_seconds(MOST_SECONDS)}",
                ours < MOST_SECONDS,
            )
            for cores, (ours, least) in times.items()
        ),
        Row(
            f"{what}: buffers",
            f"{buffers / 1e6:.2f} MB",
            f"one array [L, L] of bool: {square / 1e6:.2f} MB",
            f"{buffers / square:.2f}x",
            "no [L, L]",
            buffers < square,
        ),
        Row(
            f"{what}: compilations over {len(batches)} batches with different segments",
            str(compiled),
            "-",
            "-",
            "1",
            compiled == 1,
        ),
    ]


def with_bias(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attend inside segments, by a bias built here."""
    bias = segments.segment_bias(ids)
    return jax.nn.dot_product_attention(q, k, v, bias=bias)


def with_mask(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attend inside segments, by a boolean mask built here."""
    mask = segments.segment_mask(ids)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def without_segments(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attend causally and across segments."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def backward(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return the gradients of an attention layer to q, k and v."""
    return jax.grad(lambda *given: attend(*given).sum(), argnums=(0, 1, 2))


def buffer_bytes(function: Callable[..., Any]) -> int:
    """Return the temporary memory that XLA plans for one call, beside arguments and results."""
    heads = jax.ShapeDtypeStruct((ROWS, MAX_SEQ_LEN, HEADS, HEAD_DIM), jnp.float32)
    ids = jax.ShapeDtypeStruct((ROWS, MAX_SEQ_LEN), jnp.int32)
    compiled = jax.jit(function).lower(heads, heads, heads, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure_memory() -> list[Row]:
    """Compare the buffers of an attention layer with and without segments."""
    bias_bytes, rows = ROWS * MAX_SEQ_LEN**2 * 4, []
    cases = {"forward": lambda attend: attend, "gradient": backward}
    for name, derive in cases.items():
        plain = buffer_bytes(derive(without_segments))
        for kind, attend in (("bias", with_bias), ("mask", with_mask)):
            ours = buffer_bytes(derive(attend))
            rows.append(
                Row(
                    f"buffers of attention, {name}, {kind} built inside, {HEADS} heads",
                    f"{ours / 1e6:,.0f} MB",
                    f"causal, no segments: {plain / 1e6:,.0f} MB",
                    f"{(ours - plain) / 1e6:+,.1f} MB",
                    f"less than one bias, +{bias_bytes / 1e6:.0f} MB",
                    ours - plain < bias_bytes,
                )
            )
    return rows


if __name__ == "__main__":
    if sys.argv[1:] == [ONE_CORE]:
        print(*time_compact())
        sys.exit()
    report([*measure_compact(), *measure_memory()])
