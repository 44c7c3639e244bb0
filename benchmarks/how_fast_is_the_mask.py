"""How fast are positions and offsets, and does a dense bias cost memory inside a jitted step?

    python benchmarks/how_fast_is_the_mask.py

Segment ids of a packed batch `[8, 2048]`, on the CPU, under jit.

Yardsticks: the dense bias `[8, 1, 2048, 2048]` that positions and offsets spare; and XLA's memory
analysis of one attention layer, forward and backward, with the bias built inside against the same
layer with plain causal attention and no segments.  The latter is compiled, not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Row, lognormal_lengths, medians, report, show_seconds, show_speedup

import seqpack_jax as sp
from seqpack_jax.model import segments

ROWS, MAX_SEQ_LEN, HEADS, HEAD_DIM = 8, 2048, 4, 64
MOST_SECONDS = 0.0005


def packed_rows() -> tuple[jax.Array, int]:
    """Return the segment ids of one batch, and the most segments that any row of the plan has."""
    lengths = lognormal_lengths(5_000, MAX_SEQ_LEN)
    counts, pools = sp.length_histogram_from_lengths(lengths)
    plan = sp.pack_length_histogram(counts, MAX_SEQ_LEN)
    bins = sp.materialize_epoch(plan, pools, seed=0)[:ROWS]
    tokens = [np.ones(length, np.int32) for length in lengths]
    batch = sp.pack_batch(bins, tokens, MAX_SEQ_LEN, lengths=lengths)
    return jnp.asarray(batch.segment_ids), plan.max_segments


def measure_time(segment_ids: jax.Array, max_segments: int) -> Row:
    """Time positions and offsets in one jitted function, and the bias in another."""

    @jax.jit
    def light(ids: jax.Array) -> Any:
        offsets = sp.build_packing_cu_seqlens(ids, max_segments=max_segments)
        return segments.positions_from_segment_ids(ids), offsets

    @jax.jit
    def dense(ids: jax.Array) -> jax.Array:
        return sp.build_packing_attention_bias(ids, causal=True)

    ours, bias = medians(
        lambda: jax.block_until_ready(light(segment_ids)),
        lambda: jax.block_until_ready(dense(segment_ids)),
        number=20,
    )
    return Row(
        f"positions and cu_seqlens, [{ROWS}, {MAX_SEQ_LEN}], {max_segments} segments at most",
        show_seconds(ours),
        f"dense causal bias, float32: {show_seconds(bias)}",
        show_speedup(ours, bias),
        f"< {show_seconds(MOST_SECONDS)}",
        ours < MOST_SECONDS,
    )


def with_bias(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attend inside segments, by a bias built here."""
    bias = sp.build_packing_attention_bias(ids, causal=True)
    return jax.nn.dot_product_attention(q, k, v, bias=bias)


def with_mask(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attend inside segments, by a boolean mask built here."""
    mask = segments.segment_mask(ids, causal=True)
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
    report([measure_time(*packed_rows()), *measure_memory()])
