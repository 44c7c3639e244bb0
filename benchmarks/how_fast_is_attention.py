"""How fast is blocked attention, and what memory does it take, against dense attention?

    python benchmarks/how_fast_is_attention.py

One layer, forward and backward, 4 heads of 64, float32, on the CPU, under jit.  A row
holds 6 segments, their lengths in proportion to lognormal draws; the row of 65,536 tokens holds
those of eight rows of 8,192.

Yardsticks: `jax.nn.dot_product_attention` with the dense bias built in the same step; the same
sequences one by one and unpadded through it (`is_causal`), each length compiled before; and XLA's
memory analysis of the dense step.  The step at 65,536 is run for us, and compiled for the other.
The last rows are those where blocks have the least to skip, or the rows are too short for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    Row,
    lognormal_lengths,
    medians,
    peak_growth,
    report,
    show_seconds,
    show_speedup,
    show_times,
)

from seqpack_jax.model import segments
from seqpack_jax.model.blocked import blocked_attention

HEADS, HEAD_DIM = 4, 64
LEAST_SPEEDUP = {2048: 1.5, 8192: 4.0}
MOST_OVER_ALONE = 3.0
LONGEST = 65_536

Attend = Callable[..., jax.Array]


def packed_rows(rows: int, length: int) -> np.ndarray:
    """Return the segment ids of rows of 6 segments and 3 % of padding."""
    draws = lognormal_lengths(6 * rows, length).reshape(rows, 6)
    lengths = np.maximum(1, draws * (length * 97 // 100) // draws.sum(axis=1, keepdims=True))
    ids = np.zeros((rows, length), np.int32)
    for row, parts in zip(ids, lengths, strict=True):
        row[: parts.sum()] = np.repeat(np.arange(1, 7), parts)
    return ids


def one_long_row(parts: np.ndarray) -> np.ndarray:
    """Lay rows end to end in one, and count their segments on."""
    before = np.cumsum([0, *parts.max(axis=1)[:-1]])[:, None]
    return np.where(parts != 0, parts + before, 0).astype(np.int32).reshape(1, -1)


def with_blocks(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attend inside segments, block by block."""
    return blocked_attention(q, k, v, segments.segment_info(ids))


def with_bias(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Attend inside segments, by a bias built here."""
    bias = segments.segment_bias(ids, causal=True)
    return jax.nn.dot_product_attention(q, k, v, bias=bias)


def without_segments(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attend causally within one sequence."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def step_of(attend: Attend) -> Any:
    """Return the jitted loss and gradients of a layer."""
    return jax.jit(jax.value_and_grad(lambda *given: attend(*given).sum(), argnums=(0, 1, 2)))


def random_heads(rows: int, length: int) -> list[jax.Array]:
    """Draw query, key and value."""
    shape = (rows, length, HEADS, HEAD_DIM)
    draw = np.random.default_rng(0).standard_normal
    return [jnp.asarray(draw(shape, np.float32)) for _ in range(3)]


def runner(attend: Attend, *given: jax.Array) -> Callable[[], Any]:
    """Compile a step for arrays, and return a function that runs it on them."""
    compiled = step_of(attend).lower(*given).compile()
    return lambda: jax.block_until_ready(compiled(*given))


def run_alone(heads: list[jax.Array], ids: np.ndarray) -> Callable[[], Any]:
    """Return a function that runs the sequences of packed rows one by one."""
    steps, calls = {}, []
    for row, number in ((b, n) for b in range(len(ids)) for n in range(1, ids[b].max() + 1)):
        where = np.flatnonzero(ids[row] == number)
        parts = [each[row : row + 1, where[0] : where[-1] + 1] for each in heads]
        if len(where) not in steps:
            steps[len(where)] = step_of(without_segments).lower(*parts).compile()
        calls.append((steps[len(where)], parts))
    return lambda: jax.block_until_ready([step(*parts) for step, parts in calls])


def describe(ids: np.ndarray) -> str:
    """Say what the rows hold."""
    return f"{list(ids.shape)}, {ids.max(axis=1).mean():.1f} segments a row"


def measure_time(rows: int, length: int) -> list[Row]:
    """Time a layer on packed rows against the bias, and against the sequences alone."""
    ids, heads = packed_rows(rows, length), random_heads(rows, length)
    given = (*heads, jnp.asarray(ids))
    ours, bias, alone = medians(
        runner(with_blocks, *given), runner(with_bias, *given), run_alone(heads, ids)
    )
    least = LEAST_SPEEDUP[length]
    return [
        Row(
            f"blocked attention, {describe(ids)}",
            show_seconds(ours),
            f"dense bias built inside: {show_seconds(bias)}",
            show_speedup(ours, bias),
            f">= {least}x faster",
            bias >= least * ours,
        ),
        Row(
            "the same",
            show_seconds(ours),
            f"each sequence alone, unpadded: {show_seconds(alone)}",
            show_times(ours, alone),
            f"<= {MOST_OVER_ALONE:.0f}x as long",
            ours <= MOST_OVER_ALONE * alone,
        ),
    ]


def measure_the_rest(what: str, ids: np.ndarray) -> Row:
    """Time a layer where dense attention is at its best."""
    given = (*random_heads(*ids.shape), jnp.asarray(ids))
    ours, bias = medians(runner(with_blocks, *given), runner(with_bias, *given), number=3)
    return Row(
        f"{what}, {describe(ids)}",
        show_seconds(ours),
        f"dense bias built inside: {show_seconds(bias)}",
        show_speedup(ours, bias),
    )


def buffer_bytes(attend: Attend, length: int) -> int:
    """Return the temporary memory that XLA plans for one step, beside arguments and results."""
    heads = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = step_of(attend).lower(heads, heads, heads, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure_memory() -> list[Row]:
    """Compare the buffers of a step at three lengths, four times as long each."""
    rows, before = [], None
    for length in (2048, 8192, 32_768):
        ours, bias = buffer_bytes(with_blocks, length), buffer_bytes(with_bias, length)
        rows.append(
            Row(
                f"buffers of one row of {length:,}",
                f"{ours / 1e6:,.1f} MB",
                f"dense bias built inside: {bias / 1e6:,.0f} MB",
                "-" if before is None else f"{ours / before:.2f}x of the row before",
                "-" if before is None else "<= 4.1x",
                None if before is None else ours <= 4.1 * before,
            )
        )
        before = ours
    return rows


def measure_longest() -> Row:
    """Run a row that dense attention has no memory for."""
    ids, taken = one_long_row(packed_rows(LONGEST // 8192, 8192)), []
    run = runner(with_blocks, *random_heads(*ids.shape), jnp.asarray(ids))
    peak = peak_growth(lambda: taken.extend(medians(run)))
    bias = buffer_bytes(with_bias, LONGEST)
    return Row(
        f"blocked attention, {describe(ids)}",
        f"{show_seconds(taken[0])}, peak {peak / 1e9:.2f} GB",
        f"dense bias built inside: {bias / 1e9:,.0f} GB of buffers",
        f"{bias / peak:,.0f}x less",
        "runs, under 1 GB",
        peak < 1e9,
    )


if __name__ == "__main__":
    longest = measure_longest()  # first, while the process has freed little
    report(
        [
            *measure_time(4, 2048),
            *measure_time(1, 8192),
            *measure_memory(),
            longest,
            measure_the_rest("one full-length segment", np.ones((1, 2048), np.int32)),
            measure_the_rest("short rows", packed_rows(16, 256)),
            measure_the_rest("shorter rows", packed_rows(64, 64)),
        ]
    )
