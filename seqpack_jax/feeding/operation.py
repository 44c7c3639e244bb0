"""Grain: an operation of a `DataLoader` that packs records as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seqpack_jax.errors import check_int
from seqpack_jax.feeding.streaming import PackingIterator
from seqpack_jax.planning.over_length import OverLength, as_policy

__all__ = ["PackOperation"]


class PackOperation:
    """A `grain.python.Operation` that packs the records of a `grain.DataLoader` as they come.

    Each batch holds the next records of the stream, as many as best fit decreasing places in
    `batch_size` rows; the last one may have empty rows.  Records are dicts; the other features of a
    record are not passed on.

    Records of more than `max_seq_len` tokens follow the over-length policy.  With `"split"` the
    pieces of a record share a batch, which therefore ends between records.  What the policy touched
    is logged at the end of the stream, at level INFO.

    Resuming is exact at any step, with any number of workers: Grain stores the position of the
    reader only, which is ahead of the packer, so the reader's `get_state` is made to answer with
    the position of the first record that is not in a batch yet.

    Args:
        max_seq_len: tokens per row.
        batch_size: rows per batch.
        feature: which entry of a record is packed, a 1-D array of integers.
        pad_value: the token on padding.
        over_length: an `OverLength`, or the name of its action.
        seed: with the index of a record in the stream (`metadata.index`) it selects the window of
            `"crop"`; in a later epoch of the sampler the index, and so the window, is another.

    Raises:
        SeqpackError: when iterating, for a record that is empty, that is over `max_seq_len` without
            a policy, that has more pieces than a batch has rows, or that is no 1-D array of
            integers.

    Example:
        >>> import grain
        >>> import numpy as np
        >>> records = [{"tokens": np.full(n, n)} for n in (5, 3, 4, 4, 6)]
        >>> loader = grain.DataLoader(
        ...     data_source=records,
        ...     sampler=grain.samplers.SequentialSampler(len(records)),
        ...     operations=[PackOperation(max_seq_len=8, batch_size=2)],
        ... )
        >>> [batch["tokens"][:, [0, -1]].tolist() for batch in loader]
        [[[5, 3], [4, 4]], [[6, 0], [0, 0]]]
    """

    def __init__(
        self,
        max_seq_len: int,
        batch_size: int,
        feature: str = "tokens",
        *,
        pad_value: int = 0,
        over_length: str | OverLength = "error",
        seed: int = 0,
    ) -> None:
        caller = "PackOperation"
        self.max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1)
        self.batch_size = check_int(caller, "batch_size", batch_size, 1)
        self.feature = feature
        self.pad_value = check_int(caller, "pad_value", pad_value, -(2**31), 2**31 - 1)
        self.over_length = as_policy(caller, over_length)
        self.over_length.check(caller, self.max_seq_len)
        self.seed = check_int(caller, "seed", seed)

    def __call__(self, input_iterator: Iterator[Any]) -> Iterator[Any]:
        """Return an iterator over packed records; the operation itself keeps no state."""
        return PackingIterator(
            input_iterator,
            self.max_seq_len,
            self.batch_size,
            self.feature,
            self.pad_value,
            self.over_length,
            self.seed,
        )

    def __repr__(self) -> str:
        return (
            f"PackOperation(max_seq_len={self.max_seq_len}, batch_size={self.batch_size}, "
            f"feature={self.feature!r}, pad_value={self.pad_value}, "
            f"over_length={self.over_length}, seed={self.seed})"
        )
