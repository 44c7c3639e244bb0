"""One description of the segments of a batch, from which every form of masking is made.

`segment_info` keeps the ids and positions of a batch with what is static about its attention:
causal or not, the window, the most segments in a row.  Its methods build what a consumer takes,
always under these settings.  The functions behind them can be imported from here, too.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from seqpack_jax.errors import check_int, fail
from seqpack_jax.model.ids import (
    check_ids,
    from_seed_ids,
    monotone_segment_ids,
    num_segments,
    overflow,
    positions_from_segment_ids,
    segment_starts,
    shift_mask,
    valid_tokens,
)
from seqpack_jax.model.key_bounds import BlockBounds, KeyBounds, block_bounds, kv_bounds
from seqpack_jax.model.masks import build_packing_attention_bias, segment_bias, segment_mask
from seqpack_jax.model.offsets import (
    CuSeqlens,
    SegmentOffsets,
    SeqlensAndOffsets,
    build_packing_cu_seqlens,
    cu_seqlens,
    seqlens_and_offsets,
)

__all__ = [
    "BlockBounds",
    "CuSeqlens",
    "KeyBounds",
    "SegmentInfo",
    "SegmentOffsets",
    "SeqlensAndOffsets",
    "block_bounds",
    "build_packing_attention_bias",
    "build_packing_cu_seqlens",
    "cu_seqlens",
    "from_seed_ids",
    "kv_bounds",
    "monotone_segment_ids",
    "num_segments",
    "overflow",
    "positions_from_segment_ids",
    "segment_bias",
    "segment_info",
    "segment_mask",
    "segment_starts",
    "seqlens_and_offsets",
    "shift_mask",
    "valid_tokens",
]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segment_ids", "positions", "kv_segment_ids", "kv_positions"],
    meta_fields=["causal", "window", "max_segments", "contiguous"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class SegmentInfo:
    """The segments of a batch and how their tokens attend, as a pytree; see `segment_info`.

    It passes through `jit`, `vmap`, `scan`, `checkpoint` and `shard_map`, as argument or result.
    The arrays are its leaves; the other fields are static, and changing one compiles anew.  It
    stores no mask: each method builds its result where it is called, so call it inside the jitted
    step.  Methods differ from the functions of the same name only in taking the settings from here.

    Build it before the sequence axis is sharded: ids of neighbouring tokens are compared.  Over the
    batch axis no device needs another.

    Attributes:
        segment_ids: int32 `[..., L]`, 0 = padding.
        positions: int32 `[..., L]`, rising by 1 inside each segment.
        kv_segment_ids: int32 `[..., S]` of the keys in cross attention, else None.
        kv_positions: int32 `[..., S]` in cross attention, else None.
        causal: whether keys later than the query are hidden.
        window: a token sees itself and the `window - 1` tokens before it (and after it, unless
            `causal`), or None for no limit.
        max_segments: the most segments in any row; None where no method needs it.
        contiguous: whether the tokens still stand in packed order.  After a context-parallel
            reorder they do not; then only `mask` and `bias` work, which compare positions.

    Example:
        >>> info = segment_info(jnp.array([[1, 1, 2, 0]]), causal=False, max_segments=2)
        >>> jax.jit(lambda info: info.mask())(info)[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        >>> info.kv_bounds().k_end.tolist(), info.seqlens_and_offsets().seqlens.tolist()
        ([[2, 2, 3, 4]], [[2, 1]])
    """

    segment_ids: Array
    positions: Array
    kv_segment_ids: Array | None
    kv_positions: Array | None
    causal: bool
    window: int | None
    max_segments: int | None
    contiguous: bool

    def mask(self, pad: str = "segment") -> Array:
        """Return `segment_mask`: bool `[..., 1, Lq, Lk]`, True = may attend.

        By index where that is the same, which XLA fuses best, else by position.
        """
        query, key = self._places()
        mask: Array = segment_mask(
            self.segment_ids,
            self.kv_segment_ids,
            q_positions=query,
            kv_positions=key,
            causal=self.causal,
            window=self.window,
            pad=pad,
        )
        return mask

    def bias(
        self,
        dtype: DTypeLike = jnp.float32,
        pad: str = "segment",
        mask_value: float | None = None,
    ) -> Array:
        """Return `segment_bias`: `dtype` `[..., 1, Lq, Lk]`, 0 where `mask` is True."""
        query, key = self._places()
        bias: Array = segment_bias(
            self.segment_ids,
            dtype,
            self.kv_segment_ids,
            mask_value=mask_value,
            q_positions=query,
            kv_positions=key,
            causal=self.causal,
            window=self.window,
            pad=pad,
        )
        return bias

    def kv_bounds(self, pad: str = "self") -> KeyBounds:
        """Return `kv_bounds`: the interval of keys of each query, int32 `[..., Lq]`."""
        self._check_contiguous("kv_bounds")
        bounds: KeyBounds = kv_bounds(
            self.segment_ids,
            self.kv_segment_ids,
            causal=self.causal,
            window=self.window,
            pad=pad,
        )
        return bounds

    def block_bounds(self, block_q: int, block_kv: int, pad: str = "self") -> BlockBounds:
        """Return `block_bounds` of `kv_bounds(pad)`: int32 `[..., ceil(Lq / block_q)]`."""
        self._check_contiguous("block_bounds")
        blocks: BlockBounds = block_bounds(*self.kv_bounds(pad), block_q, block_kv)
        return blocks

    def seqlens_and_offsets(self) -> SeqlensAndOffsets:
        """Return `seqlens_and_offsets` of the queries, filled with -1.

        In cross attention only of segments that have keys: set the output of the others to 0.
        """
        return self._seqlens("seqlens_and_offsets", self.segment_ids, self.kv_segment_ids)

    def kv_seqlens_and_offsets(self) -> SeqlensAndOffsets:
        """Return `seqlens_and_offsets` of the keys; slot for slot they go with the queries'."""
        method = "kv_seqlens_and_offsets"
        if self.kv_segment_ids is None:
            return self._seqlens(method, self.segment_ids, None)
        return self._seqlens(method, self.kv_segment_ids, self.segment_ids)

    def monotone_ids(self) -> Array:
        """Return ids of the queries that never fall along the row: int32 `[..., Lq]`.

        They equal those of `kv_monotone_ids` for exactly the pairs of real tokens that share a
        segment; no real token shares one with padding.  In self-attention these are
        `monotone_segment_ids`.  In cross attention, whose sides must agree, segment `i` is `2 * i`
        and padding an odd number; the ids must rise along the row.
        """
        self._check_contiguous("monotone_ids")
        return _monotone(self.segment_ids, self.kv_segment_ids is not None)

    def kv_monotone_ids(self) -> Array:
        """Return the ids of the keys that go with `monotone_ids`: int32 `[..., Lk]`."""
        self._check_contiguous("kv_monotone_ids")
        if self.kv_segment_ids is None:
            return _monotone(self.segment_ids, False)
        return _monotone(self.kv_segment_ids, True)

    def _places(self) -> tuple[Array | None, Array | None]:
        """Return the positions of both sides if the index cannot tell who is earlier."""
        is_cross = self.kv_segment_ids is not None
        if self.contiguous and not (is_cross and (self.causal or self.window is not None)):
            return None, None
        return self.positions, self.kv_positions if is_cross else self.positions

    def _seqlens(self, method: str, ids: Array, partner: Array | None) -> SeqlensAndOffsets:
        self._check_contiguous(method)
        if self.max_segments is None:
            hint = "pass max_segments to segment_info, the number that the rows were packed with"
            fail(f"SegmentInfo.{method}", "max_segments is None", hint)
        found: SeqlensAndOffsets = seqlens_and_offsets(
            ids, self.max_segments, partner_segment_ids=partner
        )
        return found

    def _check_contiguous(self, method: str) -> None:
        if not self.contiguous:
            problem = "contiguous is False: a segment of reordered tokens is no interval of the row"
            hint = "use mask() or bias(), which compare positions, or undo the reorder first"
            fail(f"SegmentInfo.{method}", problem, hint)


def segment_info(
    segment_ids: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    kv_segment_ids: ArrayLike | None = None,
    kv_positions: ArrayLike | None = None,
    causal: bool | None = None,
    window: int | None = None,
    max_segments: int | None = None,
    contiguous: bool = True,
) -> SegmentInfo:
    """Describe the segments of a batch once, for all its layers and every kind of attention.

    Time and memory: O(B L).

    Args:
        segment_ids: integers `[..., L]`, any leading dimensions; 0 = padding.
        positions: integers `[..., L]`, as the batch has them.  Without them, counted from the ids.
        kv_segment_ids: integers `[..., S]`, in cross attention: decoder segment `i` attends to
            encoder segment `i`.  A segment may be missing there; its queries then have no keys.
        kv_positions: integers `[..., S]`; without them, counted from `kv_segment_ids`.
        causal: static; whether keys later than the query are hidden.  By default True, and False
            with `kv_segment_ids`: a decoder sees the whole of its encoder segment.
        window: static; a token sees itself and the `window - 1` tokens before it, and also the
            `window - 1` after it unless `causal`.  None: no limit.
        max_segments: static; the most segments in any row, as the rows were packed.
        contiguous: static; False for tokens that are not in packed order any more.

    Returns:
        A `SegmentInfo`.

    Raises:
        SeqpackError: ids or positions are not integers, or their shapes do not fit; positions are
            missing though `contiguous` is False; `kv_positions` without `kv_segment_ids`; `window`
            or `max_segments` is not an integer of at least 1, or `causal` or `contiguous` no bool.

    Example:
        >>> info = segment_info(jnp.array([[1, 1, 2, 0]]), window=4)
        >>> info.positions.tolist(), info.causal
        ([[0, 1, 0, 0]], True)

        Encoder-decoder:

        >>> decoder, encoder = jnp.array([[1, 2, 2]]), jnp.array([[1, 1, 2, 0]])
        >>> segment_info(decoder, kv_segment_ids=encoder).kv_bounds().k_end.tolist()
        [[2, 3, 3]]
    """
    caller = "segment_info"
    ids = check_ids(caller, "segment_ids", segment_ids).astype(jnp.int32)
    kv_ids = None
    if kv_segment_ids is not None:
        kv_ids = check_ids(caller, "kv_segment_ids", kv_segment_ids).astype(jnp.int32)
        if kv_ids.shape[:-1] != ids.shape[:-1]:
            problem = f"kv_segment_ids has shape {kv_ids.shape}, but segment_ids has {ids.shape}"
            fail(caller, problem, "pass the same rows on both sides; only their lengths may differ")
    elif kv_positions is not None:
        fail(caller, "kv_positions came without kv_segment_ids", "pass both or neither")
    for name, flag in (("causal", causal), ("contiguous", contiguous)):
        if not (isinstance(flag, bool) or (flag is None and name == "causal")):
            fail(caller, f"{name} = {flag!r} is not a bool", "it is static: pass True or False")
    if window is not None:
        window = check_int(caller, "window", window, 1, 2**31 - 1)
    if max_segments is not None:
        max_segments = check_int(caller, "max_segments", max_segments, 1, 2**20)
    places = _positions(caller, "positions", positions, ids, contiguous)
    kv_places = None
    if kv_ids is not None:
        kv_places = _positions(caller, "kv_positions", kv_positions, kv_ids, contiguous)
    is_causal = kv_ids is None if causal is None else causal
    return SegmentInfo(ids, places, kv_ids, kv_places, is_causal, window, max_segments, contiguous)


def _positions(
    caller: str, name: str, given: ArrayLike | None, ids: Array, contiguous: bool
) -> Array:
    """Return the given positions as int32, or those that contiguous ids imply."""
    if given is not None:
        places = check_ids(caller, name, given).astype(jnp.int32)
        if places.shape != ids.shape:
            problem = f"{name} has shape {places.shape}, but its segment ids have {ids.shape}"
            fail(caller, problem, "pass one position per token")
        return places
    if not contiguous:
        hint = "compute them while the tokens are in packed order, and reorder them along"
        fail(caller, f"{name} is None, but contiguous is False", hint)
    counted: Array = positions_from_segment_ids(ids)
    return counted


def _monotone(ids: Array, is_cross: bool) -> Array:
    if not is_cross:
        monotone: Array = monotone_segment_ids(ids)
        return monotone
    doubled = 2 * ids  # 0 on padding, which takes the id before it, and 1 more
    return jnp.where(ids != 0, doubled, jax.lax.cummax(doubled, axis=ids.ndim - 1) + 1)
