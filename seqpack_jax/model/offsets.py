"""From segment ids to the offsets that variable-length attention kernels take.

Three forms, since the kernels disagree: `seqlens_and_offsets` for cuDNN and TransformerEngine,
`cu_seqlens` for FlashAttention and its kin, `build_packing_cu_seqlens` as the seed has it.  Each
holds at most `max_segments` segments of a row.  Where a row has more, what it says of that row must
not be used; nothing can raise inside jit, so refuse such rows on the host (`pack_sequences` takes
`max_segments`, too), or watch `overflow`.

All functions are pure and jitted.  Shapes and dtypes are checked while tracing, values are not, so
one compilation serves every batch of a shape.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from seqpack_jax.errors import check_choice, check_int, fail
from seqpack_jax.model.ids import check_ids, real_tokens, run_starts
from seqpack_jax.model.key_bounds import search_rows

__all__ = [
    "CuSeqlens",
    "SegmentOffsets",
    "SeqlensAndOffsets",
    "build_packing_cu_seqlens",
    "cu_seqlens",
    "seqlens_and_offsets",
]


class CuSeqlens(NamedTuple):
    """Where each segment starts in the stream of a batch's tokens without padding.

    Attributes:
        cu_seqlens: int32 `[B * max_segments + 1]`; segment `i`, counted row after row, is
            `[cu_seqlens[i], cu_seqlens[i + 1])`; the end of the last segment is repeated.
        max_seqlen: int32 scalar, the tokens in the longest segment; 0 without any.
        overflow: bool scalar, True when some row holds more than `max_segments` segments: then
            some may be missing, and the other two fields must not be used.

    Example:
        >>> segment_ids = jnp.array([[1, 1, 1, 2, 0, 0]])
        >>> offsets = build_packing_cu_seqlens(segment_ids, max_segments=3)
        >>> offsets.cu_seqlens.tolist(), int(offsets.max_seqlen), bool(offsets.overflow)
        ([0, 3, 4, 4], 3, False)
    """

    cu_seqlens: Array
    max_seqlen: Array
    overflow: Array


class SeqlensAndOffsets(NamedTuple):
    """The length and the start of each segment, row by row.

    Attributes:
        seqlens: int32 `[..., M]`; the tokens of the row's segments, then `fill`.
        offsets: int32 `[..., M + 1]`; their first tokens, then `fill`.  Starts only: the end of
            the last segment is not among them, and the last place always holds `fill`.

    Example:
        >>> lengths, starts = seqlens_and_offsets(jnp.array([[1, 1, 2, 0]]), max_segments=3)
        >>> lengths.tolist(), starts.tolist()
        ([[2, 1, -1]], [[0, 2, -1, -1]])
    """

    seqlens: Array
    offsets: Array


class SegmentOffsets(NamedTuple):
    """Offsets in the style of FlashAttention, with what a kernel needs to trust them.

    Attributes:
        cu_seqlens: int32 `[..., M + 1]` in rows, `[B * M + 1]` flat; segment `i` is
            `[cu_seqlens[i], cu_seqlens[i + 1])`, and the last offset, or -1, fills the rest.
        num_segments: int32 `[...]` in rows, `[1]` flat (as ragged kernels take it); how many
            segments there are, also where they are more than fit.
        valid: bool `[...]` in rows, a scalar flat; False where the offsets must not be used.

    Example:
        >>> offsets = cu_seqlens(jnp.array([[1, 1, 2, 0], [1, 0, 2, 2]]), max_segments=2)
        >>> offsets.cu_seqlens.tolist(), offsets.num_segments.tolist(), offsets.valid.tolist()
        ([[0, 2, 3], [0, 1, 3]], [2, 2], [True, False])
    """

    cu_seqlens: Array
    num_segments: Array
    valid: Array


class _Runs(NamedTuple):
    """The runs of equal ids, on the tokens that count."""

    starts: Array  # bool [..., L], the first token of a run
    goes_on: Array  # bool [..., L], any but the last token of a run
    found: Array  # int32 [...], how many runs


@functools.partial(jax.jit, static_argnames=("max_segments",))
def build_packing_cu_seqlens(
    segment_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, max_segments: int
) -> CuSeqlens:
    """Find the offsets of all segments in the stream of real tokens, for varlen attention.

    Kernels that take `cu_seqlens` (FlashAttention and its kin) read the rows end to end, without
    padding.  Rows on several devices are several streams: call this under `jax.shard_map`.  No
    value can raise inside jit: keep to `max_segments` where rows are packed, and watch `overflow`.

    Time: O(B L + B max_segments log(B L)).  Memory: O(B L + B max_segments).

    Args:
        segment_ids: integers `[B, L]`, or `[L]` for one row.
        attention_mask: bool or integers of the same shape; 0 marks padding, as an id of 0 does.  A
            token masked out inside a segment cuts it in two.
        max_segments: static; the most segments in any *row*, in `[1, 2**20]`.

    Returns:
        A `CuSeqlens`.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or 2, `attention_mask` not bool or
            integers of its shape, or `max_segments` not an integer of at least 1.

    Example:
        >>> segment_ids = jnp.array([[1, 1, 2, 2, 2, 0], [1, 0, 2, 2, 2, 2]])
        >>> build_packing_cu_seqlens(segment_ids, max_segments=3).cu_seqlens.tolist()
        [0, 2, 5, 6, 10, 10, 10]
    """
    caller = "build_packing_cu_seqlens"
    ids = check_ids(caller, "segment_ids", segment_ids, max_rank=2)
    max_segments = check_int(caller, "max_segments", max_segments, 1, 2**20)
    ids = jnp.atleast_2d(jnp.where(real_tokens(caller, ids, attention_mask), ids, 0))
    runs = _mark_runs(ids, ids != 0)
    start, end = _find_runs(runs.starts.ravel(), runs.goes_on.ravel(), ids.shape[0] * max_segments)
    too_many = jnp.any(runs.found > max_segments)
    return CuSeqlens(_cumulate(end - start), jnp.max(end - start, initial=0), too_many)


@functools.partial(jax.jit, static_argnames=("max_segments", "fill"))
def seqlens_and_offsets(
    segment_ids: ArrayLike,
    max_segments: int,
    *,
    fill: int = -1,
    partner_segment_ids: ArrayLike | None = None,
) -> SeqlensAndOffsets:
    """Find the length and the start of each segment, as cuDNN and TransformerEngine take them.

    Both flatten the rows and push the valid entries of lengths and of starts together, each array
    on its own.  So the two must hold equally many valid entries.  A 0 among the lengths, the end of
    the last segment among the starts, or the repeated end of `cu_seqlens` shifts the starts of all
    rows behind it; with a batch of one row nobody notices.

    In cross attention slot `i` of the queries attends to slot `i` of the keys.  Call this once
    per side, with the other side as `partner_segment_ids`: segments whose id is missing there are
    left out, since a length of 0 would be pushed out of one side only.  The kernel then does not
    visit queries without keys; set their output to 0, where `kv_bounds` has no key for them.

    A row with more segments than `max_segments` loses those behind it; other rows stay right.
    TransformerEngine's own conversion of ids corrupts the other rows as well.

    Time: O(B L + B M log L), M = `max_segments`.  Memory: O(B L + B M).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions; 0 = padding.
        max_segments: static; the most segments in any row, in `[1, 2**20]`.  Kernels allocate for
            all of them, and compile longer: 32 to 64 is usual.  JAX's cuDNN call takes rows for
            packed only from 2 on.
        fill: static; what stands in the places without a segment, at most 0.  Both kernels need it
            negative; 0 is for computing with the lengths.
        partner_segment_ids: integers `[..., S]`; the ids of the other side in cross attention.
            On both sides they rise along the row.

    Returns:
        A `SeqlensAndOffsets`.

    Raises:
        SeqpackError: ids are not integers of rank 1 or more, or differ in leading dimensions; or
            `max_segments` or `fill` is not an integer in its range.

    Example:
        >>> lengths, starts = seqlens_and_offsets(jnp.array([1, 0, 2, 2, 2]), max_segments=3)
        >>> lengths.tolist(), starts.tolist()
        ([1, 3, -1], [0, 2, -1, -1])

        Encoder-decoder: no encoder token belongs to the second segment.

        >>> decoder, encoder = jnp.array([1, 1, 2, 2, 3, 3]), jnp.array([1, 3, 3, 3])
        >>> queries = seqlens_and_offsets(decoder, 3, partner_segment_ids=encoder)
        >>> keys = seqlens_and_offsets(encoder, 3, partner_segment_ids=decoder)
        >>> queries.offsets.tolist(), keys.offsets.tolist()
        ([0, 4, -1, -1], [0, 1, -1, -1])
        >>> queries.seqlens.tolist(), keys.seqlens.tolist()
        ([2, 2, -1], [1, 3, -1])
    """
    caller = "seqlens_and_offsets"
    ids = check_ids(caller, "segment_ids", segment_ids)
    max_segments = check_int(caller, "max_segments", max_segments, 1, 2**20)
    fill = check_int(caller, "fill", fill, -(2**31), 0)
    start, end = _find_segments(ids, max_segments)
    if partner_segment_ids is not None:
        partner = check_ids(caller, "partner_segment_ids", partner_segment_ids)
        if partner.shape[:-1] != ids.shape[:-1]:
            problem = f"partner_segment_ids has shape {partner.shape}, but segment_ids {ids.shape}"
            fail(caller, problem, "pass the same rows on both sides; only their lengths may differ")
        start, end = _keep_shared(ids, start, end, partner)
    exists = start < end
    no_end = jnp.full_like(start[..., :1], fill)
    offsets = jnp.concatenate([jnp.where(exists, start, fill), no_end], axis=-1)
    return SeqlensAndOffsets(jnp.where(exists, end - start, fill), offsets)


@functools.partial(jax.jit, static_argnames=("max_segments", "layout", "padding", "pad_tail"))
def cu_seqlens(
    segment_ids: ArrayLike,
    max_segments: int,
    *,
    layout: str = "row",
    padding: str = "repeat",
    pad_tail: Literal["last", -1] = "last",
) -> SegmentOffsets:
    """Find the offsets of the segments, as FlashAttention and ragged kernels take them.

    Such offsets cannot say that something stands between two segments.  By default (`padding=
    "repeat"`) rows must hold their segments from the first token on and padding only behind them;
    for others `valid` is False.  The flat layout instead speaks of the stream of all real tokens,
    from which padding was removed, as `build_packing_cu_seqlens` does.  `padding="own_segment"`
    fits every row and keeps the tokens where they are: runs of padding are segments too, and the
    kernel writes every token.  Rows on several devices are several flat streams: call this under
    `jax.shard_map`.

    Time: O(B L + B M log(B L)), M = `max_segments`.  Memory: O(B L + B M).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions; 0 = padding.
        max_segments: static; the most segments in any row, in `[1, 2**20]`; with
            `padding="own_segment"` including runs of padding.
        layout: static; "row", one vector of offsets per row; "flat", one for all rows end to end.
        padding: static; "repeat" or "own_segment", see above.
        pad_tail: static; what follows the last offset: "last", its repetition, or -1.

    Returns:
        A `SegmentOffsets`.

    Raises:
        SeqpackError: `segment_ids` is not integers of rank 1 or more, `max_segments` not an
            integer in its range, or another argument is not one of those listed.

    Example:
        >>> segment_ids = jnp.array([[1, 1, 2, 0], [1, 0, 2, 2]])
        >>> cu_seqlens(segment_ids, 3, padding="own_segment").cu_seqlens.tolist()
        [[0, 2, 3, 4], [0, 1, 2, 4]]
        >>> flat = cu_seqlens(segment_ids, 3, layout="flat", padding="own_segment", pad_tail=-1)
        >>> flat.cu_seqlens.tolist(), flat.num_segments.tolist(), bool(flat.valid)
        ([0, 2, 3, 4, 5, 6, 8], [6], True)
        >>> cu_seqlens(segment_ids, 3, layout="flat", pad_tail=-1).cu_seqlens.tolist()
        [0, 2, 3, 4, 6, -1, -1]
    """
    caller = "cu_seqlens"
    ids = check_ids(caller, "segment_ids", segment_ids)
    max_segments = check_int(caller, "max_segments", max_segments, 1, 2**20)
    is_flat = check_choice(caller, "layout", layout, ("row", "flat")) == "flat"
    padding = check_choice(caller, "padding", padding, ("repeat", "own_segment"))
    if pad_tail not in ("last", -1):
        fail(caller, f"pad_tail = {pad_tail!r} is not known", "choose 'last' or -1")
    counts = jnp.ones(ids.shape, bool) if padding == "own_segment" else ids != 0
    starts, goes_on, found = _mark_runs(ids, counts)
    valid = found <= max_segments
    if is_flat:
        starts, goes_on = starts.ravel(), goes_on.ravel()
        slots, valid = valid.size * max_segments, jnp.all(valid)
        found = jnp.sum(found, dtype=jnp.int32).reshape(1)
    else:
        slots = max_segments
    start, end = _find_runs(starts, goes_on, slots)
    offsets = _cumulate(end - start)
    if not is_flat:
        valid &= jnp.all((start == offsets[..., :-1]) | (start == end), axis=-1)
    if pad_tail == -1:
        place = jax.lax.broadcasted_iota(jnp.int32, offsets.shape, offsets.ndim - 1)
        offsets = jnp.where(place <= (found if is_flat else found[..., None]), offsets, -1)
    return SegmentOffsets(offsets, found, valid)


def _mark_runs(ids: Array, counts: Array) -> _Runs:
    """Mark the runs of equal ids on the tokens that count."""
    first = run_starts(ids)
    last = jnp.concatenate([first[..., 1:], jnp.ones_like(first[..., :1])], axis=-1)
    starts = first & counts
    return _Runs(starts, counts & ~last, jnp.sum(starts, axis=-1, dtype=jnp.int32))


def _find_runs(starts: Array, goes_on: Array, slots: int) -> tuple[Array, Array]:
    """Return where the first, second, ... run starts and ends, or twice the size where none does.

    By search in running counts: no scatter, which TPUs do one update at a time.
    """
    started = jnp.cumsum(starts, axis=-1, dtype=jnp.int32)
    ended = started - goes_on.astype(jnp.int32)
    ranks = _ranks(slots, starts.ndim)
    start, last = search_rows(started, ranks), search_rows(ended, ranks)
    return start, jnp.minimum(last + 1, starts.shape[-1])


def _ranks(slots: int, rank: int) -> Array:
    """Return 1, 2, ... for all rows: int32 `[1, ..., slots]`."""
    return jnp.arange(1, slots + 1, dtype=jnp.int32).reshape((1,) * (rank - 1) + (slots,))


def _find_segments(ids: Array, max_segments: int) -> tuple[Array, Array]:
    runs = _mark_runs(ids, ids != 0)
    return _find_runs(runs.starts, runs.goes_on, max_segments)


def _keep_shared(ids: Array, start: Array, end: Array, partner: Array) -> tuple[Array, Array]:
    """Keep the segments whose id is one of `partner`, moved together; twice `L` where none is."""
    slots, length = start.shape[-1], ids.shape[-1]
    own = _ids_of(ids, start, end)
    others = _ids_of(partner, *_find_segments(partner, slots))
    at = jnp.minimum(search_rows(others, own), slots - 1)
    found = jnp.take_along_axis(others, at, axis=-1)
    kept = jnp.cumsum((found == own) & (start < end), axis=-1, dtype=jnp.int32)
    slot = search_rows(kept, _ranks(slots, kept.ndim))
    none = jnp.full_like(start[..., :1], length)
    moved = (jnp.concatenate([each, none], axis=-1) for each in (start, end))
    start, end = (jnp.take_along_axis(each, slot, axis=-1) for each in moved)
    return start, end


def _ids_of(ids: Array, start: Array, end: Array) -> Array:
    """Return the id of each slot, and the largest int32 on slots without a segment."""
    padded = jnp.concatenate([ids.astype(jnp.int32), jnp.zeros_like(start[..., :1])], axis=-1)
    of_slot = jnp.take_along_axis(padded, start, axis=-1)
    return jnp.where(start < end, of_slot, 2**31 - 1)


def _cumulate(lengths: Array) -> Array:
    """Return the running sum of the lengths, with a 0 before it."""
    total = jnp.cumsum(lengths, axis=-1, dtype=jnp.int32)
    return jnp.pad(total, [(0, 0)] * (total.ndim - 1) + [(1, 0)])
