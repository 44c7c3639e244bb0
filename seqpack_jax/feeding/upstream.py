"""Sequences that others wrote: records of random-access files, and several sources as one.

What is opened here, in `token_files` and in `tables` is handed to `pack_dataset` or `PackedSource`:
it has `len()`, `[id]` and `lengths`, reads many ids at once, and is pickled by path.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import check_int, check_integers, fail
from seqpack_jax.feeding.layout import entries_of
from seqpack_jax.feeding.reading import read_records

__all__ = ["JoinedSequences", "RecordSequences", "places_of"]

_BLOCK_RECORDS = 4096  # that a thread measures at once
_THREADS = 4  # that read a part of joined sources without `__getitems__`

Int64 = NDArray[np.int64]


class JoinedSequences:
    """Several sources of sequences, one after another: the ids of each go on from the one before.

    For data sets in many files.  What is pickled is as small as that of the parts, compressed.
    The ids of a part are read in the order of storage, by one call of its `__getitems__`, else by a
    few threads.

    Time: O(log parts) to find a sequence.

    Attributes:
        parts: sources with `len()` and `[id]`.  The lengths of one without `lengths` are counted;
            those of records are of the feature `"tokens"`.

    Raises:
        SeqpackError: there are no parts; when lengths are counted, a record has no tokens.

    Example:
        >>> joined = JoinedSequences([[np.array([7, 8]), np.array([9])], [np.array([5, 5, 5])]])
        >>> len(joined), joined[2].tolist(), [tokens.tolist() for tokens in joined[0:2]]
        (3, [5, 5, 5], [[7, 8], [9]])
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        if not self.parts:
            fail("JoinedSequences", "there are no parts", "pass at least one source")
        self._starts = offsets_of([len(part) for part in self.parts])

    @property
    def lengths(self) -> Int64:
        """int64 `[n]`: tokens of each sequence.  Time: O(n)."""
        found = [part.lengths if hasattr(part, "lengths") else _sizes(part) for part in self.parts]
        return np.concatenate(found)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int | slice) -> Any:
        """Return one sequence, or those of a slice as a list."""
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        place = int(places_of("JoinedSequences", [index], len(self))[0])
        k = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.parts[k][place - int(self._starts[k])]

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Return the sequences of these ids, in their order; of each part by one call."""
        places = places_of("JoinedSequences", ids, len(self))
        of_part = np.searchsorted(self._starts, places, side="right") - 1
        found: list[Any] = [None] * len(places)
        for k in np.unique(of_part).tolist():
            where = np.flatnonzero(of_part == k)
            where = where[np.argsort(places[where], kind="stable")]
            part, inner = self.parts[k], places[where] - self._starts[k]
            values = read_records("JoinedSequences", part, inner, _THREADS)
            for place, value in zip(where.tolist(), values, strict=True):
                found[place] = value
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": zlib.compress(pickle.dumps(self.parts))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(pickle.loads(zlib.decompress(state["parts"])))  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"JoinedSequences({len(self.parts)} parts, {len(self)} sequences)"


def _sizes(part: Any) -> Int64:
    sizes = (_count("JoinedSequences", part[k], "tokens", k) for k in range(len(part)))
    return np.fromiter(sizes, np.int64, len(part))


def _count(caller: str, record: Any, feature: str, index: int) -> int:
    """Return how many tokens a record has: an array, or a dict or tuple with a feature "a/b"."""
    found, path = record, feature.split("/")
    while (entries := entries_of(found)) is not None and path:
        names = {str(name): value for name, value in entries.items()}
        if path[0] not in names:
            problem = f"record {index} has no feature {feature!r}, but {sorted(names)}"
            fail(caller, problem, "name one of them as RecordSequences(..., feature=...)")
        found = names[path.pop(0)]
    is_array = hasattr(found, "__len__") and getattr(found, "ndim", 1) > 0
    if entries is not None or isinstance(found, str | bytes) or not is_array:
        problem = f"record {index} is a {type(found).__name__}, not an array of tokens"
        fail(caller, problem, "pass RecordSequences a function that decodes records")
    return len(found)


def places_of(caller: str, ids: ArrayLike, size: int) -> Int64:
    """Return ids as int64 `[k]`, if all are in `[0, size)`.

    Raises:
        IndexError: one is not.
        SeqpackError: they are no integers.
    """
    places: Int64 = check_integers(caller, "ids", ids).astype(np.int64, copy=False)
    wrong = (places < 0) | (places >= size)
    if wrong.any():
        raise IndexError(f"sequence {places[wrong.argmax()]} of {size}")
    return places


class RecordSequences:
    """Records of a random-access source, decoded: ArrayRecord files, or whatever else has `[id]`.

    `grain.sources.ArrayRecordDataSource(paths)` returns bytes; `decode` makes a record of them.
    Several are read by one call where the source has `__getitems__`, else by a few threads.

    Args:
        source: has `len()` and `[id]`.
        decode: makes an array of tokens, or a dict of features, of what the source returns; None
            where it returns these itself.  It is pickled for workers: a function of a module.
        feature: which feature of a dict or tuple counts for the length; in nested ones "a/b".
        length_of: the length, in tokens, of what the source returns, where that is quicker than
            `decode`, for example `lambda record: len(record) // 4`.
        lengths: integers `[n]`, if they are known.
        threads: that read a source without `__getitems__`, and that measure lengths.

    Raises:
        SeqpackError: `lengths` are not as many as records; when measuring, a record has no such
            feature or is none, or `length_of` returns something else than an integer from 0.

    Example:
        >>> records = [np.array([7, 8], "<i4").tobytes(), np.array([9], "<i4").tobytes()]
        >>> sequences = RecordSequences(records, lambda record: np.frombuffer(record, "<i4"))
        >>> sequences.lengths.tolist(), sequences[0].tolist()
        ([2, 1], [7, 8])
    """

    def __init__(
        self,
        source: Any,
        decode: Callable[[Any], Any] | None = None,
        *,
        feature: str = "tokens",
        length_of: Callable[[Any], int] | None = None,
        lengths: ArrayLike | None = None,
        threads: int = 8,
    ) -> None:
        caller = "RecordSequences"
        self.source, self.decode = source, decode
        self.feature, self.length_of = feature, length_of
        self.threads = check_int(caller, "threads", threads, 1)
        self._lengths: Int64 | None = None
        if lengths is not None:
            given = check_integers(caller, "lengths", lengths).astype(np.int64)
            if len(given) != len(source):
                problem = f"there are {len(given)} lengths, but {len(source)} records"
                fail(caller, problem, "pass one length per record")
            self._lengths = given

    @property
    def lengths(self) -> Int64:
        """int64 `[n]`: tokens of each record.  Time: O(n); the first time it reads all records."""
        if self._lengths is None:
            starts = range(0, len(self), _BLOCK_RECORDS)
            with ThreadPoolExecutor(self.threads) as pool:
                found = [np.zeros(0, np.int64), *pool.map(self._measure, starts)]
            self._lengths = np.concatenate(found)
        return self._lengths

    def _measure(self, start: int) -> Int64:
        ids = range(start, min(start + _BLOCK_RECORDS, len(self)))
        records = read_records("RecordSequences", self.source, np.array(ids, np.int64))
        sizes = map(self._length, ids, records)
        return np.fromiter(sizes, np.int64, len(ids))

    def _length(self, index: int, raw: Any) -> int:
        caller = "RecordSequences"
        if self.length_of is not None:
            return check_int(caller, f"length_of(record {index})", self.length_of(raw), 0)
        return _count(caller, self._decoded(index, raw), self.feature, index)

    def _decoded(self, index: int, raw: Any) -> Any:
        if self.decode is None:
            return raw
        try:
            return self.decode(raw)
        except Exception as error:
            error.add_note(f"RecordSequences: while record {index} was decoded")
            raise

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """Return one record, decoded."""
        place = int(places_of("RecordSequences", [index], len(self))[0])
        return self._decoded(place, self.source[place])

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        """Return the records of these ids, in their order, read in the order of storage."""
        places = places_of("RecordSequences", ids, len(self))
        order = np.argsort(places, kind="stable")
        rising = places[order]
        records = read_records("RecordSequences", self.source, rising, self.threads)
        found: list[Any] = [None] * len(places)
        for place, index, record in zip(order.tolist(), rising.tolist(), records, strict=True):
            found[place] = self._decoded(index, record)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lengths": None}  # who reads needs no lengths

    def __repr__(self) -> str:
        return f"RecordSequences({self.source!r})"
