"""Sequence lengths -> the histogram that is packed, and the pools that give its counts names.

Sequences of one length are interchangeable for a packer.  So a data set is `counts`, how many
sequences have each length, which is all that planning needs, and `SequencePools`, the ids of the
sequences of each length, which an epoch draws from.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import (
    ArrayParts,
    GroupedParts,
    MappedArray,
    from_portable,
    narrow,
    offsets_of,
    to_portable,
)
from seqpack_jax.errors import MAX_LENGTH, check_int, check_integers, check_lengths, fail
from seqpack_jax.planning.counts import (
    Int64,
    as_counts,
    coarsen_counts,
    coarsen_lengths,
    plain_integers,
)
from seqpack_jax.planning.over_length import (
    NOTHING_TOUCHED,
    REFUSE,
    OverLength,
    OverLengthReport,
    Pieces,
    apply_to_lengths,
    as_policy,
)

__all__ = [
    "Int64",
    "SequencePools",
    "as_counts",
    "coarsen_counts",
    "coarsen_lengths",
    "group_ids",
    "length_histogram_from_lengths",
]

_BLOCK = 1 << 18  # ids that are hashed at once


@dataclass(frozen=True, eq=False)
class SequencePools:
    """The ids of all sequences, grouped by length.

    Attributes:
        ids: integers `[n]`, the ids by increasing length, in input order inside a length; or None
            when the sequences are numbered that way already (`identity`), which takes no memory.
        starts: int64 `[max_len + 2]`; the ids of length `l` are `ids[starts[l]:starts[l + 1]]`.
        pieces: what the ids of split sequences mean, None when nothing was split.
        over_length: the policy that says which tokens of an over-length sequence are meant.
        report: what that policy touched.
        shard_starts: for pools in shards, which are looked up as one but never merged.  Then `ids`
            is an `ArrayParts` of as many parts, and part `k` is grouped by length, from
            `shard_starts[k]`, as above; inside a length, the shards follow one another.  Given as
            int64 `[k, max_len + 2]`, or as arrays of different lengths.

    Raises:
        SeqpackError: the numbers of ids differ between `ids`, `starts` and `shard_starts`.

    Example:
        >>> _, pools = length_histogram_from_lengths([7, 5, 5, 3, 5])
        >>> pools[5].tolist(), pools.lookup(5, 2).tolist()
        ([1, 2, 4], 4)
    """

    ids: NDArray[Any] | ArrayParts | None
    starts: Int64
    pieces: Pieces | None = None
    over_length: OverLength = REFUSE
    report: OverLengthReport = NOTHING_TOUCHED
    shard_starts: GroupedParts | ArrayParts | Sequence[Int64] | Int64 | None = None

    def __post_init__(self) -> None:
        if self.ids is not None and len(self.ids) != int(self.starts[-1]):
            problem = f"there are {len(self.ids)} ids, but starts end at {self.starts[-1]}"
            fail("SequencePools", problem, "pass all ids, and starts from their counts")
        if self.shard_starts is not None:
            shards = self.shard_starts
            shards = shards if isinstance(shards, GroupedParts) else GroupedParts(shards)
            object.__setattr__(self, "shard_starts", shards)
            self._check_shards(shards)

    def _check_shards(self, shards: GroupedParts) -> None:
        sizes = shards.sizes
        if not isinstance(self.ids, ArrayParts) or not np.array_equal(
            np.diff(self.ids.starts), sizes
        ):
            problem = f"ids are not {len(sizes)} parts of the sizes that shard_starts end at"
            fail("SequencePools", problem, "pass ids=ArrayParts([the ids of each shard, ...])")
        # Equal to those of the shards, or coarser: a sequence may be planned as a longer one.
        fine = shards.starts
        coarse = np.asarray(self.starts)
        limit = fine[np.minimum(np.arange(len(coarse)), len(fine) - 1)]
        known = fine[np.minimum(np.searchsorted(fine, coarse), len(fine) - 1)]
        if (coarse > limit).any() or (coarse != known).any():
            length = max(0, int(((coarse > limit) | (coarse != known)).argmax()) - 1)
            problem = f"starts do not count the ids of length {length} as shard_starts do"
            fail("SequencePools", problem, "pass starts from the counts of all shards")

    @classmethod
    def identity(cls, counts: ArrayLike | Mapping[int, int]) -> SequencePools:
        """Pools of sequences that are numbered by increasing length.  Time: O(max_len)."""
        return cls(None, offsets_of(as_counts("SequencePools.identity", counts)))

    @classmethod
    def from_mapping(cls, pools: Mapping[int, ArrayLike]) -> SequencePools:
        """Make pools of `{length: ids}`, the form that the seed library uses, in any order.

        Memory maps stay so; other arrays are copied.

        Raises:
            SeqpackError: a length is below 1 or no integer, or ids are not integers of int64.

        Example:
            >>> pools = SequencePools.from_mapping({7: [0], 3: [6, 7, 8]})
            >>> pools.counts.tolist(), pools.lookup([3, 7], [1, 0]).tolist()
            ([0, 0, 0, 3, 0, 0, 0, 1], [7, 0])
        """
        caller = "SequencePools.from_mapping"
        if not isinstance(pools, Mapping):
            fail(caller, f"pools is a {type(pools).__name__}", "pass {length: ids}")
        keys = check_lengths(caller, plain_integers(pools), name="pools (keys)")
        parts = {
            length: _check_ids(caller, f"pools[{length}]", ids)
            for length, ids in zip(keys.tolist(), pools.values(), strict=True)
        }
        lengths = sorted(parts)
        counts = np.zeros(max(lengths, default=0) + 1, np.int64)
        counts[lengths] = [len(parts[length]) for length in lengths]
        ids: NDArray[Any] | ArrayParts = ArrayParts([parts[length] for length in lengths])
        if not any(isinstance(to_portable(part), MappedArray) for part in parts.values()):
            ids = ids[:]
        return cls(ids, offsets_of(counts))

    @classmethod
    def from_shards(cls, pools: Sequence[SequencePools], *, bases: ArrayLike) -> SequencePools:
        """Make one of the pools of several shards; they are neither merged nor copied.

        Of each length, the sequences come shard after shard, and then the pieces of split
        sequences, which are numbered anew.  So shards of consecutive sequences give the pools of
        the whole data set.

        Time: O(shards * max_len); O(n) if sequences were split, whose shards are copied.

        Args:
            pools: of one `over_length` policy each.
            bases: integers `[number of shards]`, added to the ids of each shard: how many sequences
                the shards before it have, or zeros if ids are those of the whole data set.

        Raises:
            SeqpackError: the shards differ in their policy, or bases are not one integer each.

        Example:
            >>> first, last = (length_histogram_from_lengths(n)[1] for n in ([7, 5], [5, 3, 5]))
            >>> pools = SequencePools.from_shards([first, last], bases=[0, 2])
            >>> pools[5].tolist(), pools.lookup(5, 2).tolist()
            ([1, 2, 4], 4)
        """
        caller = "SequencePools.from_shards"
        base = check_integers(caller, "bases", bases)
        if len(base) != len(pools):
            problem = f"there are {len(pools)} shards, but {len(base)} bases"
            fail(caller, problem, "pass one base per shard")
        return cls(**_join(caller, pools, base.tolist()))

    @property
    def counts(self) -> Int64:
        """int64 `[max_len + 1]`: how many sequences have each length."""
        return np.diff(self.starts)

    @property
    def num_sequences(self) -> int:
        """How many ids there are, over all lengths."""
        return int(self.starts[-1])

    def __getitem__(self, length: int) -> NDArray[Any]:
        """Return the ids of all sequences of one length: a view, where `ids` is one array."""
        length = check_int("SequencePools", "length", length)
        if not 0 <= length < len(self.starts) - 1:
            return np.zeros(0, np.int64)
        start, stop = self.starts[length : length + 2].tolist()
        if self.ids is None or self.shard_starts is not None:
            return self.lookup(length, np.arange(stop - start))
        return self.ids[start:stop]

    def lookup(self, length: ArrayLike, rank: ArrayLike) -> Int64:
        """Return the ids at `rank` of the pools of `length`; both broadcast.

        Ranks are not checked: they are in `[0, counts[length])`.

        Time: O(result), times the logarithm of `shards * max_len` for pools in shards.
        """
        return self._at(self.starts[np.asarray(length)] + np.asarray(rank))

    def _at(self, place: Int64) -> Int64:
        if isinstance(self.shard_starts, GroupedParts):
            place = self.shard_starts.places(place)
        return place if self.ids is None else np.asarray(self.ids[place], np.int64)

    def digest(self) -> str:
        """Return 32 hexadecimal digits that differ whenever the ids of a length, or pieces, do.

        Equal ids in equal order have one digest, however they are stored.  But that of a prepared
        directory is made of the checksums in its manifest, not of its ids: it is no other's.

        Time: O(n) once, about a second for 10**8 ids; O(max_len) with `identity`; O(1) if prepared.
        """
        self.__dict__["_digest"] = digest = self.__dict__.get("_digest") or _digest_of(self)
        return str(digest)

    def coarsen(self, tolerance: int, max_seq_len: int) -> SequencePools:
        """Merge the pools of lengths that are planned alike (see `coarsen_lengths`).

        Buckets are ranges of lengths and ids are stored by length, so no id moves.

        Time: O(max_len).
        """
        if tolerance == 1:
            return self
        counts = coarsen_counts(self.counts, tolerance, max_seq_len)
        return replace(self, starts=offsets_of(counts))

    def __getstate__(self) -> dict[str, Any]:
        """Store maps by path, and what the shards tell not at all."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        state["_digest"] = self.__dict__.get("_digest")
        if isinstance(self.ids, np.ndarray):
            state["ids"] = to_portable(self.ids)
        state["starts"] = to_portable(self.starts)
        shards = self.shard_starts
        if isinstance(shards, GroupedParts) and np.array_equal(self.starts, shards.starts):
            state["starts"] = None
        elif not isinstance(state["starts"], MappedArray):
            state["starts"] = zlib.compress(narrow(self.counts).astype("<i8").tobytes())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        ids, starts = state["ids"], state["starts"]
        if starts is None:
            starts = state["shard_starts"].starts
        elif isinstance(starts, bytes):
            starts = offsets_of(np.frombuffer(zlib.decompress(starts), "<i8"))
        state |= {"ids": from_portable(ids), "starts": from_portable(starts)}
        self.__dict__.update(state)


def _digest_of(pools: SequencePools) -> str:
    size, pieces = pools.num_sequences, pools.pieces or Pieces(0, np.zeros((0, 4), np.int64))
    head = (1, size, pieces.first_id, len(pieces.table))
    digest = hashlib.blake2b(repr(head).encode(), digest_size=16)
    digest.update(np.trim_zeros(pools.counts, "b").astype("<i8").tobytes())
    ids, numbered = hashlib.blake2b(), True
    for start in range(0, 0 if pools.ids is None else size, _BLOCK):
        place = np.arange(start, min(start + _BLOCK, size), dtype=np.int64)
        block = pools._at(place)
        numbered = numbered and np.array_equal(block, place)
        ids.update(block.astype("<i8").tobytes())
    digest.update(b"" if numbered else ids.digest())  # so `identity` need not be written out
    for start in range(0, len(pieces.table), _BLOCK):
        digest.update(pieces.table[start : start + _BLOCK].astype("<i8").tobytes())
    return digest.hexdigest()


def _check_ids(caller: str, name: str, ids: Any) -> NDArray[Any]:
    if isinstance(ids, list | tuple):
        ids = plain_integers(ids)
    array = check_integers(caller, name, ids)
    if array.dtype == np.uint64 and (largest := int(array.max(initial=0))) >= 1 << 63:
        fail(caller, f"{name} holds {largest}, beyond int64", "use ids below 2**63")
    return array


class _Shard(NamedTuple):
    """Ids, less `base`, that are grouped by length from `starts`."""

    ids: NDArray[Any] | range
    base: int
    starts: Int64

    def part(self, mask: NDArray[np.bool_], base: int) -> _Shard:
        ids = ArrayParts([self.ids])[np.flatnonzero(mask)]
        return _Shard(ids, base, offsets_of(mask)[self.starts])


def _shards_of(pools: SequencePools) -> list[_Shard]:
    if isinstance(pools.ids, ArrayParts) and isinstance(pools.shard_starts, GroupedParts):
        columns = pools.ids.parts, pools.ids.bases.tolist(), pools.shard_starts.parts.parts
        return [_Shard(*row) for row in zip(*columns, strict=True)]
    ids = range(pools.num_sequences) if pools.ids is None else pools.ids
    return [_Shard(ids[:] if isinstance(ids, ArrayParts) else ids, 0, pools.starts)]


def _join(caller: str, pools: Sequence[SequencePools], base: list[int]) -> dict[str, Any]:
    """Return the fields of the pools of several shards.

    Pieces become shards of their own, since inside a length they come after all whole sequences.
    """
    policy = pools[0].over_length if pools else REFUSE
    report = OverLengthReport(policy.action)
    starts = np.zeros(max((len(each.starts) for each in pools), default=2), np.int64)
    for each in pools:
        if each.over_length != policy:
            problem = f"the shards follow {policy} and {each.over_length}"
            fail(caller, problem, "prepare all shards with one over_length")
        report = report.plus(each.report)
        starts += np.pad(each.starts, (0, len(starts) - len(each.starts)), mode="edge")
    first_id = 0
    if any(each.pieces for each in pools):
        first_id = max(_end_of_ids(each) + own for each, own in zip(pools, base, strict=True))
    whole: list[_Shard] = []
    cut: list[_Shard] = []
    tables: list[Int64] = []
    for each, own in zip(pools, base, strict=True):
        if each.pieces is None:
            whole += [shard._replace(base=shard.base + own) for shard in _shards_of(each)]
            continue
        shift = first_id - each.pieces.first_id + sum(map(len, tables))
        for shard in _shards_of(each):
            is_piece = ArrayParts([shard.ids])[:] >= each.pieces.first_id - shard.base
            whole.append(shard.part(~is_piece, shard.base + own))
            cut.append(shard.part(is_piece, shard.base + shift))
        tables.append(each.pieces.table[:] + np.array([own, 0, 0, 0]))
    shards = whole + cut
    return {
        "ids": ArrayParts([shard.ids for shard in shards], [shard.base for shard in shards]),
        "starts": starts,
        "pieces": Pieces(first_id, np.concatenate(tables)) if tables else None,
        "over_length": policy,
        "report": report,
        "shard_starts": [shard.starts for shard in shards],
    }


def _end_of_ids(pools: SequencePools) -> int:
    """Return an id above those of all whole sequences."""
    if pools.pieces is not None:
        return pools.pieces.first_id
    if pools.ids is None:
        return pools.num_sequences
    return int(pools.ids[:].max(initial=-1)) + 1


def length_histogram_from_lengths(
    lengths: ArrayLike,
    max_seq_len: int | None = None,
    *,
    over_length: str | OverLength = "error",
    extra_tokens: int = 0,
) -> tuple[Int64, SequencePools]:
    """Count the sequences of each length and group their ids by length.

    One counting pass and one stable radix sort, whatever the number of distinct lengths.

    Time: O(n + max_len).  Memory beside the input: 8 bytes per sequence in the result, and 18 to 20
    at the peak, or 26 to 28 if lengths are not int64, are touched by a policy, or get extra tokens.
    Each piece of a split sequence adds 40 bytes to the result, and about 70 to the peak.

    Args:
        lengths: integers `[n]`, in tokens; sequence `i` has the id `i`.
        max_seq_len: the capacity of a row in tokens; None for no limit.
        over_length: what to do with lengths over `max_seq_len`, the name of an action or an
            `OverLength`: `"error"`, `"drop"`, `"truncate"`, `"truncate_left"`, `"crop"` or
            `"split"`.  Pieces of split sequences get ids from `n` on, and `pools.pieces` says
            where they come from; `pools.report` counts what was touched.
        extra_tokens: added to every length first, for BOS, EOS or CLS tokens that are fed but not
            counted in `lengths`.

    Returns:
        `counts`, int64 `[max_len + 1]`, and the `SequencePools`.

    Raises:
        SeqpackError: a length is not an integer, below 1, or over `max_seq_len` without a policy.

    Example:
        >>> counts, pools = length_histogram_from_lengths([7, 5, 5, 5, 5, 5, 3, 3, 3])
        >>> {l: int(c) for l, c in enumerate(counts) if c}
        {3: 3, 5: 5, 7: 1}
        >>> counts, pools = length_histogram_from_lengths([3, 9], 4, over_length="split")
        >>> pools.ids.tolist(), pools.pieces.start.tolist()
        ([4, 0, 2, 3], [0, 4, 8])
    """
    caller = "length_histogram_from_lengths"
    if max_seq_len is not None:
        max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1)
    extra_tokens = check_int(caller, "extra_tokens", extra_tokens, 0, MAX_LENGTH)
    policy = as_policy(caller, over_length)
    planned = apply_to_lengths(caller, policy, lengths, max_seq_len, extra_tokens=extra_tokens)
    counts, ids = group_ids(planned.of_ids)
    return counts, SequencePools(ids, offsets_of(counts), planned.pieces, policy, planned.report)


def group_ids(lengths: Int64) -> tuple[Int64, Int64]:
    """Return the histogram of lengths, and their indices grouped by length; 0 leaves one out."""
    counts = np.bincount(lengths, minlength=1)
    keys = lengths
    if len(counts) > 1 << 16:  # rank the distinct lengths, to sort by 16 bits all the same
        keys = (np.cumsum(counts > 0) - 1)[lengths]
    if keys.size and int(keys.max()) < 1 << 16:
        keys = keys.astype(np.uint16)  # NumPy's stable sort of 16 bits is a radix sort
    ids = np.argsort(keys, kind="stable")[counts[0] :]
    counts[0] = 0
    return counts, ids
