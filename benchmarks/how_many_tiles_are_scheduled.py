"""How many tiles does a TPU kernel schedule for a packed row, and what do ids and order change?

    python benchmarks/how_many_tiles_are_scheduled.py    # needs tokamax 0.0.17, Python 3.12

The splash attention of tokamax skips the tiles of a causal mask in which no segment meets itself.
It compares the smallest and largest id of each block, so padding with the id 0 at the end of a row
overlaps all segments before it; and rows under one `vmap` share a schedule, the union of theirs.
Tiles are counted by its own scheduling function, on the CPU: nothing is timed, and the same comes
out each time.

Rows of 8192 tokens in blocks of 512, lognormal lengths of 8192 / 6 tokens in the mean, the last of
a row cut where the real tokens end.  Targets are the figures of a table that was made before this
library (from the same draws), within 1 %.  Then rows as this library packs them, uncut.

Yardstick: for each way of numbering padding, the tiles that hold an allowed pair, where padding is
a segment; for shared schedules, padding with 0; for an order, the order in which lengths came.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Row, quiet_grain, report, token_records
from numpy.typing import NDArray

import seqpack_jax as sp
from seqpack_jax.model.segments import monotone_segment_ids

MAX_SEQ_LEN, BLOCK, ROWS, SEED = 8192, 512, 64, 1
BLOCKS = MAX_SEQ_LEN // BLOCK
Ids = NDArray[np.int32]
Counter = Callable[[Ids, int], float]


class Known(NamedTuple):
    """The figures of the earlier table, for rows of one fill."""

    fill: float
    needed: float
    zero: float
    last: float
    own: float
    zero_4: float
    own_4: float
    zero_8: float
    own_8: float
    last_8: float
    longest_first_8: float


KNOWN = (
    Known(1.00, 54.5, 54.5, 54.5, 54.5, 86.1, 86.1, 108.2, 108.2, 108.2, 95.8),
    Known(0.93, 50.8, 61.5, 50.8, 49.8, 88.0, 80.1, 101.8, 97.2, 98.2, 87.0),
    Known(0.70, 49.9, 57.8, 49.9, 39.9, 72.9, 57.8, 77.8, 64.2, 74.2, 67.9),
)


def scheduler() -> Counter | None:
    """Return a function that counts tiles per row, or None if this tokamax does not skip any."""
    try:
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            base,
            splash_attention_kernel,
            splash_attention_mask,
            splash_attention_mask_info,
        )

        refine = splash_attention_kernel._refine_mask_info_with_segments
    except (ImportError, AttributeError):
        return None
    causal = splash_attention_mask.CausalMask((MAX_SEQ_LEN, MAX_SEQ_LEN))
    static, _ = splash_attention_mask_info.process_mask(causal, (BLOCK, BLOCK))
    blocks = {"q_blocks": BLOCKS, "kv_blocks": BLOCKS, "bq": BLOCK, "bkv": BLOCK}

    def tiles(ids: jax.Array) -> jax.Array:
        refined, *_ = refine(static, base.SegmentIds(ids, ids), is_dkv=False, **blocks)
        return refined.num_active_blocks[0]

    # The inner map is the vmap of a user: its rows share a schedule.  The outer one is ours.
    shared = jax.jit(lambda rows: jax.lax.map(jax.vmap(tiles), rows))

    def count(ids: Ids, batch: int) -> float:
        return float(shared(jnp.asarray(ids).reshape(-1, batch, MAX_SEQ_LEN)).mean())

    return count


def drawn_lengths(rng: np.random.Generator, size: int) -> NDArray[np.int64]:
    """Draw lognormal lengths of a sixth of a row in the mean."""
    draws = rng.lognormal(np.log(MAX_SEQ_LEN / 6) - 0.5, 1.0, size)
    return np.clip(draws, 1, MAX_SEQ_LEN).astype(np.int64)


def rows_of_fill(fill: float) -> list[list[int]]:
    """Draw rows of `fill * MAX_SEQ_LEN` real tokens, the last segment cut to end there."""
    rng, rows = np.random.default_rng(SEED), []
    for _ in range(ROWS):
        row: list[int] = []
        while sum(row) < int(fill * MAX_SEQ_LEN):
            row += drawn_lengths(rng, 1).tolist()
        row[-1] -= sum(row) - int(fill * MAX_SEQ_LEN)
        rows.append(row)
    return rows


def ids_of(rows: list[list[int]]) -> Ids:
    """Lay out rows of these lengths, in this order."""
    lengths = np.concatenate(rows)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    bins = sp.Bins(np.arange(len(lengths)), offsets, MAX_SEQ_LEN)
    tokens = [np.ones(length, np.int32) for length in lengths]
    return sp.pack_batch(bins, tokens, MAX_SEQ_LEN, lengths=lengths).segment_ids


def lengths_in(ids: Ids) -> list[list[int]]:
    """Return the lengths of the segments of each row."""
    return [np.bincount(row[row > 0])[1:].tolist() for row in ids]


def longest_first(ids: Ids) -> Ids:
    """Return the same segments, the longest of a row first."""
    return ids_of([sorted(row, reverse=True) for row in lengths_in(ids)])


def padding_last(ids: Ids) -> Ids:
    """Number the padding behind the last segment as one more segment."""
    return np.where(ids == 0, ids.max(axis=1, keepdims=True) + 1, ids)


def padding_own(ids: Ids) -> Ids:
    """Give each padding token an id of its own: what `to_splash` passes."""
    return np.asarray(monotone_segment_ids(ids))


def needed_tiles(ids: Ids) -> float:
    """Count the causal tiles of a row in which some query may attend to some key."""
    blocks = padding_last(ids).reshape(-1, BLOCKS, BLOCK)
    held = [[set(block.tolist()) for block in row] for row in blocks]
    pairs = [(q, k) for q in range(BLOCKS) for k in range(q + 1)]
    return sum(not row[q].isdisjoint(row[k]) for row in held for q, k in pairs) / len(held)


def compare(what: str, ours: float, yardstick: str, base: float, known: float = 0) -> Row:
    """Make a row of the table; `known` is what should come out."""
    target = f"{known} ± 1 %" if known else "-"
    reached = abs(ours / known - 1) < 0.01 if known else None
    ratio = f"{ours / base:.2f}x"
    return Row(what, f"{ours:.1f}", f"{yardstick}: {base:.1f}", ratio, target, reached)


def measure_ids(count: Counter, known: Known) -> list[Row]:
    """Compare the ways of numbering padding, and the two orders, at one fill."""
    ids = ids_of(rows_of_fill(known.fill))
    last, own, fill = padding_last(ids), padding_own(ids), f"fill {known.fill:.2f}"
    needed, causal = needed_tiles(ids), BLOCKS * (BLOCKS + 1) / 2
    zero = {batch: count(ids, batch) for batch in (4, 8)}
    rows = [
        compare(f"{fill}: really needed", needed, "causal", causal, known.needed),
        compare(f"{fill}: padding 0", count(ids, 1), "needed", needed, known.zero),
        compare(f"{fill}: padding last id + 1", count(last, 1), "needed", needed, known.last),
        compare(f"{fill}: own ids (to_splash)", count(own, 1), "needed", needed, known.own),
    ]
    for batch, *figures in ((4, known.zero_4, known.own_4), (8, known.zero_8, known.own_8)):
        what = f"{fill}, {batch} rows share"
        rows.append(compare(f"{what}: padding 0", zero[batch], "needed", needed, figures[0]))
        ours = count(own, batch)
        rows.append(compare(f"{what}: own ids", ours, "padding 0", zero[batch], figures[1]))
    what, as_drawn = f"{fill}, 8 rows share, padding last id + 1", count(last, 8)
    ordered = count(padding_last(longest_first(ids)), 8)
    return [
        *rows,
        compare(what, as_drawn, "padding 0", zero[8], known.last_8),
        compare(f"{what}, longest first", ordered, "drawn", as_drawn, known.longest_first_8),
    ]


def packed_rows(lengths: NDArray[np.int64]) -> dict[str, Ids]:
    """Pack lengths by a plan, from a stream, and in the order in which they come."""
    counts, pools = sp.length_histogram_from_lengths(lengths)
    plan = sp.pack_length_histogram(counts, MAX_SEQ_LEN)
    tokens = [np.ones(length, np.int32) for length in lengths]
    planned = sp.materialize_epoch(plan, pools, seed=0)[:ROWS]
    in_order = sp.pack_sequences(lengths, MAX_SEQ_LEN, algorithm="next_fit")[:ROWS]
    quiet_grain()
    import grain

    records = grain.MapDataset.source(token_records(lengths)).to_iter_dataset()
    stream = iter(sp.PackIterDataset(records, MAX_SEQ_LEN, ROWS, window=1))
    return {
        "a plan": sp.pack_batch(planned, tokens, MAX_SEQ_LEN, lengths=lengths).segment_ids,
        "a stream": next(stream)["segment_ids"],
        "next fit": sp.pack_batch(in_order, tokens, MAX_SEQ_LEN, lengths=lengths).segment_ids,
    }


def measure_packers(count: Counter) -> list[Row]:
    """Count the tiles of rows as they are packed, and what the order inside of them changes."""
    rows, shuffle = [], np.random.default_rng(SEED).permutation
    for name, ids in packed_rows(drawn_lengths(np.random.default_rng(SEED), 2_000)).items():
        lengths, own = lengths_in(ids), padding_own(ids)
        falling = np.mean([np.all(np.diff(row) <= 0) for row in lengths])
        what = f"rows of {name}, fill {np.mean(ids > 0):.3f}, {falling:.0%} longest first: own ids"
        rows.append(compare(what, count(own, 1), "padding 0", count(ids, 1)))
        base = count(padding_own(ids_of([shuffle(row).tolist() for row in lengths])), 8)
        shared = count(own, 8)
        rows.append(compare("these, 8 rows share", shared, "random order", base))
        ordered = count(padding_own(longest_first(ids)), 8)
        rows.append(compare("these, 8 rows share, longest first", ordered, "as packed", shared))
    return rows


def main() -> None:
    """Print the table, or what it would need."""
    count = scheduler()
    if count is None:
        print("Not run: it needs tokamax 0.0.17 or later, which needs Python 3.12.")
        sys.exit(0)
    table: list[Row] = [row for known in KNOWN for row in measure_ids(count, known)]
    report([*table, *measure_packers(count)])


if __name__ == "__main__":
    main()
