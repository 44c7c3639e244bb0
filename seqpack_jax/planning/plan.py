"""`PackingPlan`: which lengths share a bin, and its `Certificate`."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.arrays import (
    MappedArray,
    from_portable,
    map_npz,
    narrow,
    offsets_of,
    part_sums,
    save_npz,
    to_portable,
)
from seqpack_jax.errors import (
    MAX_LENGTH,
    MAX_TOTAL,
    check_int,
    check_integers,
    check_lengths,
    check_offsets,
    fail,
)
from seqpack_jax.planning.counts import Int64, as_counts, coarsen_counts

__all__ = ["Certificate", "PackingPlan"]

# What NumPy and zipfile raise for files that are not what they should be.
_DAMAGE = (KeyError, TypeError, ValueError, OSError, EOFError, RuntimeError, BadZipFile, zlib.error)

_FORMAT = 1  # of the file that `PackingPlan.save` writes
_ARRAYS = {"lengths": np.int32, "offsets": np.int64, "multiplicity": np.int64}


class Certificate(NamedTuple):
    """How far a plan is from the fewest bins possible.

    Attributes:
        bins: the number of bins of the plan.
        lower_bound: no packing of these sequences has fewer bins than this.
        method: what proved the bound.
        proved_optimal: whether `bins == lower_bound`.

    Example:
        >>> print(Certificate(40_631, 39_713, "volume", proved_optimal=False))
        40,631 rows; lower bound 39,713 (volume): at most 918 too many
    """

    bins: int
    lower_bound: int
    method: str
    proved_optimal: bool

    def __str__(self) -> str:
        gap = self.bins - self.lower_bound
        verdict = "optimal" if self.proved_optimal else f"at most {gap:,} too many"
        return f"{self.bins:,} rows; lower bound {self.lower_bound:,} ({self.method}): {verdict}"


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Which lengths share a bin: templates, and how many bins are made after each.

    A plan says nothing of ids; `materialize_epoch` draws those from the pools, anew every epoch.
    Its size depends on the number of distinct lengths, not on the number of sequences.

    Attributes:
        max_seq_len: capacity of a bin in tokens.
        lengths: int32 `[k]`, the templates one after another, each in descending order.
        offsets: int64 `[t + 1]`; template `i` is `lengths[offsets[i]:offsets[i + 1]]`.
        multiplicity: int64 `[t]`, the number of bins of each template.
        num_tokens: tokens in all sequences; below the sum of the templates if `tolerance > 1`.
        tolerance: sequences were planned as the next multiple of this many tokens.
        certificate: what is known of the fewest bins possible, if anything.
        tolerance_rows: how many bins fewer a plan with a tolerance of 1 would have.

    Example:
        >>> from seqpack_jax import pack_length_histogram
        >>> plan = pack_length_histogram({5: 5, 3: 3, 7: 1}, max_seq_len=10)
        >>> dict(plan.to_counter())
        {(7, 3): 1, (5, 5): 2, (5, 3): 1, (3,): 1}
        >>> plan.num_bins, plan.num_sequences, plan.num_tokens, plan.efficiency
        (5, 9, 41, 0.82)
    """

    max_seq_len: int
    lengths: NDArray[np.int32]
    offsets: Int64
    multiplicity: Int64
    num_tokens: int
    tolerance: int = 1
    certificate: Certificate | None = None
    tolerance_rows: int = 0

    def __post_init__(self) -> None:
        # As Python integers, whose text the digest takes; others are for `check` to find.
        for name in ("max_seq_len", "num_tokens", "tolerance", "tolerance_rows"):
            if isinstance(value := getattr(self, name), int | np.integer):
                # Any tolerance above `max_seq_len` means the same; a file holds 64 bits.
                value = min(int(value), MAX_LENGTH) if name == "tolerance" else int(value)
                object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is derived, and store the arrays as narrow as they are."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(to_portable(self.lengths), MappedArray):
            return state | {name: to_portable(state[name]) for name in _ARRAYS}
        return state | {name: narrow(state[name]) for name in _ARRAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, dtype in _ARRAYS.items():
            state[name] = from_portable(state[name]).astype(dtype, copy=False)
        self.__dict__.update(state)

    @property
    def num_templates(self) -> int:
        """How many different bins there are."""
        return len(self.multiplicity)

    @cached_property
    def sizes(self) -> Int64:
        """int64 `[t]`: sequences per bin of each template."""
        return np.diff(self.offsets)

    @cached_property
    def fills(self) -> Int64:
        """int64 `[t]`: planned tokens per bin of each template."""
        return part_sums(self.lengths, self.offsets)

    @cached_property
    def bin_starts(self) -> Int64:
        """int64 `[t + 1]`: bins `bin_starts[i]` to `bin_starts[i + 1]` follow template `i`."""
        return offsets_of(self.multiplicity)

    @cached_property
    def slot_starts(self) -> Int64:
        """int64 `[k]`: bin `b` of a template fills slot `j` with rank `slot_starts[j] + b`.

        The rank is that in the pool of `lengths[j]`: slots of one length take consecutive stretches
        of its pool, in the order of the templates.
        """
        order = np.argsort(self.lengths, kind="stable")
        bins = np.repeat(self.multiplicity, self.sizes)[order]
        ranks = np.cumsum(bins) - bins
        new_length = np.diff(self.lengths[order], prepend=0) > 0
        ranks -= np.maximum.accumulate(np.where(new_length, ranks, 0))
        starts = np.empty_like(ranks)
        starts[order] = ranks
        return starts

    @property
    def num_bins(self) -> int:
        """Bins over all templates: the rows of one epoch."""
        return int(self.bin_starts[-1])

    @property
    def num_sequences(self) -> int:
        """Sequences over all bins."""
        return int(self.sizes @ self.multiplicity)

    @property
    def max_segments(self) -> int:
        """The most sequences that any bin holds."""
        return int(self.sizes.max(initial=0))

    @property
    def efficiency(self) -> float:
        """Tokens / capacity over all bins, in `[0, 1]`; 1.0 for an empty plan."""
        return self.num_tokens / (self.num_bins * self.max_seq_len) if self.num_bins else 1.0

    @property
    def counts(self) -> Int64:
        """int64 `[max_len + 1]`: how many slots of each planned length there are."""
        counts = np.zeros(int(self.lengths.max(initial=0)) + 1, np.int64)
        np.add.at(counts, self.lengths, np.repeat(self.multiplicity, self.sizes))
        return counts

    def digest(self) -> str:
        """Return 32 hexadecimal digits that differ whenever the bins of an epoch could differ."""
        head = (_FORMAT, self.max_seq_len, self.tolerance, self.num_tokens, self.num_templates)
        digest = hashlib.blake2b(repr(head).encode(), digest_size=16)
        digest.update(self.lengths.astype("<i4").tobytes())
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.multiplicity.astype("<i8").tobytes())
        return digest.hexdigest()

    def check(self, counts: ArrayLike | Mapping[int, int] | None = None) -> None:
        """Raise `SeqpackError` unless the plan is whole and, if given, packs exactly `counts`.

        Time: O(size of the plan + max_len).
        """
        self._check("PackingPlan.check")
        if counts is not None:
            self._check_counts("PackingPlan.check", counts)

    def _check(self, caller: str) -> None:
        hint = "the plan is damaged; make it again"
        check_int(caller, "max_seq_len", self.max_seq_len, 1, MAX_LENGTH)
        check_int(caller, "tolerance", self.tolerance, 1)
        check_int(caller, "num_tokens", self.num_tokens, 0)
        for name in _ARRAYS:
            check_integers(caller, name, getattr(self, name))
        check_offsets(caller, self.offsets, len(self.lengths), len(self.multiplicity), hint)
        if len(self.multiplicity) and int(self.multiplicity.min()) < 1:
            i = int(self.multiplicity.argmin())
            fail(caller, f"multiplicity[{i}] = {self.multiplicity[i]}, below 1", hint)
        if len(self.lengths) and int(self.lengths.min()) < 1:
            j = int(self.lengths.argmin())
            fail(caller, f"lengths[{j}] = {self.lengths[j]}, below 1", hint)
        rising = np.diff(self.lengths) > 0
        rising[self.offsets[1:-1] - 1] = False
        if rising.any():
            fail(caller, f"lengths[{int(rising.argmax())}] is below its successor", hint)
        if len(self.fills) and int(self.fills.max()) > self.max_seq_len:
            i, fill = int(self.fills.argmax()), int(self.fills.max())
            fail(caller, f"template {i} holds {fill} tokens of {self.max_seq_len}", hint)
        slots = float(self.fills.astype(float) @ self.multiplicity.astype(float))
        if slots >= MAX_TOTAL:
            fail(caller, f"the plan is for {slots:.3g} tokens, beyond the limit of 2**62", hint)
        held = int(self.fills @ self.multiplicity)
        if self.num_tokens > held or (self.tolerance == 1 and self.num_tokens != held):
            fail(caller, f"num_tokens = {self.num_tokens}, the templates hold {held}", hint)
        rows = check_int(caller, "tolerance_rows", self.tolerance_rows)
        if rows > self.num_bins or (rows and self.tolerance == 1):
            problem = f"tolerance_rows = {rows}, at tolerance {self.tolerance}"
            fail(caller, f"{problem} and {self.num_bins} bins", hint)

    def _check_counts(self, caller: str, given: ArrayLike | Mapping[int, int]) -> None:
        hint = "make the plan from the counts of these very sequences"
        counts = as_counts(caller, given, self.max_seq_len, hint=hint)
        tokens = int(counts @ np.arange(len(counts)))
        coarse = coarsen_counts(counts, self.tolerance, self.max_seq_len)
        slots = self.counts
        size = max(len(slots), len(coarse))
        difference = np.pad(slots, (0, size - len(slots)))
        difference -= np.pad(coarse, (0, size - len(coarse)))
        if difference.any():
            length = int(np.flatnonzero(difference)[0])
            have = int(coarse[length]) if length < len(coarse) else 0
            fail(
                caller,
                f"the plan has {have + int(difference[length])} slots of length {length} for "
                f"{have} sequences ({int(np.count_nonzero(difference))} lengths differ)",
                hint,
            )
        if tokens != self.num_tokens:
            fail(
                caller,
                f"the plan is for {self.num_tokens} tokens, the counts have {tokens}",
                hint,
            )

    def to_counter(self) -> Counter[tuple[int, ...]]:
        """Return `{template: multiplicity}`, the form that the seed library uses."""
        values, bounds = self.lengths.tolist(), self.offsets.tolist()
        templates = (tuple(values[a:b]) for a, b in pairwise(bounds))
        return Counter(dict(zip(templates, self.multiplicity.tolist(), strict=True)))

    @classmethod
    def from_counter(cls, counter: Mapping[tuple[int, ...], int], max_seq_len: int) -> PackingPlan:
        """Make a plan of `{template: multiplicity}`; lengths may be in any order.

        Templates are taken in falling order, so equal counters make equal plans.

        Raises:
            SeqpackError: a template is empty, over `max_seq_len` or holds anything but lengths of
                at least 1, or a multiplicity is negative or no integer.
        """
        caller = "PackingPlan.from_counter"
        max_seq_len = check_int(caller, "max_seq_len", max_seq_len, 1, MAX_LENGTH)
        if not isinstance(counter, Mapping):
            problem = f"counter is a {type(counter).__name__}"
            fail(caller, problem, "pass {(length, ...): bins}")
        merged: Counter[tuple[int, ...]] = Counter()
        for template, count in counter.items():
            if not isinstance(template, tuple):
                fail(caller, f"{template!r} is not a template", "pass {(length, ...): bins}")
            lengths_of = [check_int(caller, f"a length of {template}", each) for each in template]
            count = check_int(caller, f"counter[{template}]", count, 0, MAX_TOTAL)
            if count:  # arithmetic with counters leaves zeros behind
                merged[tuple(sorted(lengths_of, reverse=True))] += count
        merged = Counter(dict(sorted(merged.items(), reverse=True)))
        sizes = np.array([len(template) for template in merged], np.int64)
        flat = [length for template in merged for length in template]
        longer = "raise max_seq_len"
        lengths = check_lengths(caller, flat, max_seq_len, hint=longer).astype(np.int32)
        offsets = offsets_of(sizes)
        multiplicity = check_integers(caller, "counter (values)", list(merged.values()))
        multiplicity = multiplicity.astype(np.int64)
        tokens = int(np.repeat(multiplicity, sizes) @ lengths.astype(np.int64))
        plan = cls(max_seq_len, lengths, offsets, multiplicity, tokens)
        plan._check(caller)
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to one `.npz` file, whole or not at all; equal plans give equal bytes."""
        target = Path(path)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
        head = [_FORMAT, self.max_seq_len, self.num_tokens, self.tolerance, self.tolerance_rows]
        certificate = self.certificate or Certificate(self.num_bins, 0, "", proved_optimal=False)
        arrays: dict[str, Any] = {
            "head": np.array(head, np.int64),
            "lengths": self.lengths,
            "offsets": self.offsets,
            "multiplicity": self.multiplicity,
            "digest": np.array(self.digest()),
            "bound": np.array(certificate.lower_bound, np.int64),
            "method": np.array(certificate.method),
        }
        save_npz(temporary, arrays)
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> PackingPlan:
        """Read what `save` wrote.

        Args:
            path: of the file.
            mmap: map the arrays instead of copying them, so that processes on one host share them
                and the plan is pickled by path.

        Raises:
            SeqpackError: the file is damaged, of another format, or not a plan at all.
        """
        caller, hint = "PackingPlan.load", "make the plan again"
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                copied = [name for name in file.files if not (mmap and name in _ARRAYS)]
                saved = {name: file[name] for name in copied}
            if mmap:
                saved |= map_npz(path, list(_ARRAYS))
            version, *head = saved["head"].tolist()
            arrays = {
                name: saved[name].astype(dtype, casting="equiv", copy=False)
                for name, dtype in _ARRAYS.items()
            }
            if version == _FORMAT:
                max_seq_len, num_tokens, tolerance, tolerance_rows = head
            digest, bound = str(saved["digest"]), int(saved["bound"])
            method = str(saved["method"])
        except FileNotFoundError:
            fail(caller, f"{path} does not exist", "save a plan there first")
        except _DAMAGE as error:
            fail(caller, f"{path} is not a saved plan ({error})", hint)
        if version != _FORMAT:
            fail(caller, f"{path} has format {version}, not {_FORMAT}", hint)
        plan = cls(
            max_seq_len,
            **arrays,
            num_tokens=num_tokens,
            tolerance=tolerance,
            tolerance_rows=tolerance_rows,
        )
        plan._check(caller)
        if plan.digest() != digest:
            fail(caller, f"{path} says digest {digest}, but has {plan.digest()}", hint)
        if not method:
            return plan
        bins = plan.num_bins
        if not -(-plan.num_tokens // plan.max_seq_len) <= bound <= bins:
            fail(caller, f"{path} has the lower bound {bound} for {bins} bins", hint)
        return replace(plan, certificate=Certificate(bins, bound, method, bins == bound))
