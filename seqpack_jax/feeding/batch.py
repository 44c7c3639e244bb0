"""Bins and sequences -> one `PackedBatch` of fixed shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.errors import check_int, check_integers, fail
from seqpack_jax.feeding.features import make_features
from seqpack_jax.feeding.key_styles import PackedFeatures, fail_at_name, in_style, nested
from seqpack_jax.feeding.sequences import SequenceSource, fetch_records
from seqpack_jax.feeding.unpacking import (
    flat_names,
    unpack_batch,
    unpack_by_id,
    validate_batch,
)
from seqpack_jax.planning.bins import Bins
from seqpack_jax.planning.histogram import Int64

__all__ = [
    "PackedBatch",
    "pack_batch",
    "unpack_batch",
    "unpack_by_id",
    "validate_batch",
]

_PER_BATCH = ("segment_lengths", "ids", "row_valid")  # metadata of a batch, whatever its shape


class PackedBatch(NamedTuple):
    """Rows of packed sequences; a pytree, on the host (NumPy) as on the device (JAX).

    Attributes:
        tokens: int32 `[B, L]`.
        segment_ids: int32 `[B, L]`, 1, 2, ... in row order, 0 on padding.
        positions: int32 `[B, L]`, from 0 in every segment, 0 on padding; or, in pieces with
            continued positions, from where the piece starts in its sequence.
        features: whatever else was packed beside them, by name: `[B, L, ...]` of every token,
            `[B, max_segments, ...]` of every sequence.

    Example:
        >>> from seqpack_jax import pack_sequences
        >>> bins = pack_sequences([2, 1], max_seq_len=4)
        >>> batch = pack_batch(bins, [[7, 8], [9]], 4, lengths=[2, 1])
        >>> {name: array.tolist() for name, array in batch.asdict().items()}
        {'tokens': [[7, 8, 9, 0]], 'segment_ids': [[1, 1, 2, 0]], 'positions': [[0, 1, 0, 0]]}
        >>> batch.asdict("hf")["labels"].tolist()
        [[-100, 8, -100, -100]]
    """

    tokens: NDArray[np.int32]
    segment_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    features: dict[str, Any]

    def asdict(self, style: str = "default") -> dict[str, Any]:
        """Return the arrays by name, the form that a Grain pipeline passes on.

        Args:
            style: a key style: `"default"`, `"grain"`, `"maxtext"`, `"t5x"`, `"levanter"`, `"hf"`
                or `"tunix"`, which `help("seqpack_jax.feeding.key_styles")` describes.  All but the
                first are for arrays on the host; what `features` has of the shape `[B, L, ...]` is
                taken to be of every token, so keep `max_segments` other than `L`.

        Raises:
            SeqpackError: a feature has the name of one of the arrays of the style or is none that
                it knows, or the style is not known.
        """
        caller, shape = "PackedBatch.asdict", np.shape(self.segment_ids)
        tokens: dict[str, Any] = {"tokens": self.tokens}
        once: dict[str, Any] = {}
        for name, array in flat_names(self.features).items():
            of_tokens = style != "default" and np.shape(array)[:2] == shape
            if name in ("tokens", "segment_ids", "positions"):
                fail_at_name(caller, name)
            (tokens if of_tokens and name not in _PER_BATCH else once)[name] = array
        same = dict.fromkeys(tokens, "tokens")
        packed = PackedFeatures(
            tokens, same, {"tokens": self.segment_ids}, {"tokens": self.positions}, once
        )
        return in_style(caller, style, packed)


def pack_batch(
    bins: Bins,
    sequences: SequenceSource | Any,
    max_seq_len: int,
    *,
    lengths: ArrayLike,
    rows: int | None = None,
    pad_value: float | Mapping[str, float] = 0,
    multiple_of: int = 1,
    feature: str = "tokens",
    max_segments: int | None = None,
    meta_features: Iterable[str] = (),
    metadata: bool = False,
) -> PackedBatch:
    """Fill one row per bin with the tokens of its sequences, and with their other features.

    The over-length policy of the bins acts on the tokens: sequences that were planned cut are cut
    here, and pieces are taken out of the sequences that they were split from.  The windows of
    `"crop"` are those of `bins.key`, other ones in each epoch.

    Time: O(rows * max_seq_len), in whole arrays, and a slice per sequence and feature.

    Args:
        bins: which sequences share a row.
        sequences: a `FlatSequences`, or anything whose `[id]` is a 1-D array of integers, or a
            record: features by name, of which all that are arrays are as long as `feature`.
        max_seq_len: tokens per row.
        lengths: integers `[n]`, the tokens that `sequences` really has of each sequence, whatever
            the over-length policy: the lengths given to the planner, plus its `extra_tokens`.
        rows: rows of the batch, at least `len(bins)`; the rest are empty.  None for `len(bins)`.
        pad_value: the token on padding, or numbers by feature; other features are 0 there.
        multiple_of: every segment starts at a multiple of it, which divides `max_seq_len`; plan
            with `tolerance=multiple_of`, so that bins leave room for the gaps.
        feature: which entry of a record holds the tokens.
        max_segments: the width of what comes once per sequence: values without an axis,
            `meta_features` and metadata.
        meta_features: arrays of a record that come once per sequence.
        metadata: add `segment_lengths`, `ids` and `row_valid` to the features (see
            `make_features`).

    Returns:
        A `PackedBatch` of `[rows, max_seq_len]` arrays.  Without bins it is of empty rows, with the
        features of sequence 0.

    Raises:
        SeqpackError: a sequence does not have the length that was planned, is not a 1-D array of
            integers, or has tokens beyond int32; a feature has another length than the tokens; or
            there are more bins than rows, or a bin overflows.

    Example:
        >>> from seqpack_jax import pack_sequences
        >>> sequences = [np.array([5, 6, 7]), np.array([8]), np.array([9, 9])]
        >>> bins = pack_sequences([3, 1, 2], max_seq_len=4)
        >>> batch = pack_batch(bins, sequences, 4, lengths=[3, 1, 2])
        >>> batch.tokens.tolist(), batch.segment_ids.tolist()
        ([[5, 6, 7, 8], [9, 9, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]])
        >>> records = [{"tokens": tokens, "loss_mask": tokens > 5} for tokens in sequences]
        >>> batch = pack_batch(bins, records, 4, lengths=[3, 1, 2])
        >>> batch.features["loss_mask"].astype(int).tolist()
        [[0, 1, 1, 1], [1, 1, 0, 0]]
    """
    caller = "pack_batch"
    features = make_features(
        caller,
        check_int(caller, "max_seq_len", max_seq_len, 1),
        feature=feature,
        max_segments=max_segments,
        multiple_of=multiple_of,
        pad_value=pad_value,
        meta_features=meta_features,
        metadata=metadata,
    )
    if not isinstance(bins, Bins):
        fail(caller, f"bins is a {type(bins).__name__}, not Bins", "pass Bins(ids, offsets, ...)")
    rows = check_int(caller, "rows", len(bins) if rows is None else rows, len(bins))
    ids, planned = _true_lengths(caller, bins, lengths)
    columns, first_positions, _ = fetch_records(
        caller,
        sequences,
        ids,
        planned,
        replace(features, capacities={feature: bins.max_seq_len}),  # what the policy cuts at
        over_length=bins.over_length,
        pieces=bins.pieces,
        key=bins.key,
        exact=True,
    )
    like = None
    if not len(ids) and np.size(lengths):  # a batch without bins has the features of the others
        like = features.read(caller, "sequence 0", sequences[0])
    packed = features.pack_features(
        caller, columns, bins.offsets, rows, ids=ids, first_positions=first_positions, like=like
    )
    others = [(name, array) for name, array in packed.tokens.items() if name != feature]
    return PackedBatch(
        packed.tokens[feature],
        packed.segment_ids[feature],
        packed.positions[feature],
        nested(caller, [*others, *packed.once.items()]),
    )


def _true_lengths(caller: str, bins: Bins, lengths: ArrayLike) -> tuple[Int64, NDArray[Any]]:
    """Return the ids in bins and the true length of each, 0 for that of a piece."""
    known = check_integers(caller, "lengths", lengths)
    ids = check_integers(caller, "bins.ids", bins.ids)
    limits = f"[0, {len(known)})"
    is_piece = np.zeros(len(ids), np.bool_)
    if bins.pieces is not None:
        first, number = bins.pieces.first_id, len(bins.pieces.table)
        is_piece = (ids >= first) & (ids < first + number)
        limits += f", or in [{first}, {first + number}) for pieces"
    wrong = ~is_piece & ((ids < 0) | (ids >= len(known)))
    if wrong.any():
        at = int(wrong.argmax())
        problem = f"bins.ids[{at}] = {ids[at]}, but ids are in {limits}"
        fail(caller, problem, "pass the lengths of all sequences that were planned")
    planned = np.zeros(len(ids), np.int64)
    planned[~is_piece] = known[ids[~is_piece]]
    return ids, planned
