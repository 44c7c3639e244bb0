"""Lower bounds on the number of bins: no packing can have fewer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from seqpack_jax.errors import check_int
from seqpack_jax.planning.counts import as_counts

__all__ = ["volume_bound"]


def volume_bound(
    counts: ArrayLike | Mapping[int, int], max_seq_len: int, *, max_segments: int | None = None
) -> int:
    """Return the bins that the tokens alone need, L1; with a cap, at least those the cap needs.

    Time: O(max_len).

    Args:
        counts: int `[max_len + 1]`, how many sequences have each length, or `{length: count}`.
        max_seq_len: capacity of a bin in tokens.
        max_segments: the most sequences that a bin may hold, None for no cap.

    Returns:
        `max(ceil(tokens / max_seq_len), ceil(sequences / max_segments))`.

    Raises:
        SeqpackError: a length or a count is out of range.

    Example:
        >>> volume_bound({5: 5, 3: 3, 7: 1}, max_seq_len=10)
        5
        >>> volume_bound({1: 9}, max_seq_len=10, max_segments=2)
        5

    References:
        S. Martello, P. Toth, "Lower bounds and reduction procedures for the bin packing problem",
        1990 (the bound L1).
    """
    caller = "volume_bound"
    max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1)
    hint = "count what over_length makes of the lengths, or raise max_seq_len"
    array = as_counts(caller, counts, max_seq_len, hint=hint)
    bound = -(-int(array @ np.arange(len(array))) // max_seq_len)
    if max_segments is not None:
        max_segments = check_int(caller, "max_segments", max_segments, 1)
        bound = max(bound, -(-int(array.sum()) // max_segments))
    return bound
