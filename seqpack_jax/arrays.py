"""What the wings share on arrays: offsets of ragged ones, arrays in many files, memory maps.

Memory maps travel by path: pickling one costs its name, not its contents.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from tokenize import TokenError
from typing import IO, Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.errors import MAX_TOTAL, check_integers, fail

__all__ = [
    "ArrayParts",
    "GroupedParts",
    "MappedArray",
    "from_portable",
    "map_npz",
    "narrow",
    "offsets_of",
    "part_sums",
    "save_npz",
    "to_portable",
]

_INT64_MAX = np.iinfo(np.int64).max
_ALIGNMENT = 64  # bytes: arrays in a mapped file start at a multiple


def offsets_of(sizes: ArrayLike) -> NDArray[np.int64]:
    """Return where parts of these sizes start, and where the last ends: int64 `[k + 1]`.

    Example:
        >>> offsets_of([2, 0, 3]).tolist()
        [0, 2, 2, 5]
    """
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def part_sums(values: ArrayLike, offsets: NDArray[Any]) -> NDArray[np.int64]:
    """Return the sum of each part `values[offsets[i]:offsets[i + 1]]`: int64 `[k]`.

    Example:
        >>> part_sums([5, 3, 4], np.array([0, 2, 3])).tolist()
        [8, 4]
    """
    sums: NDArray[np.int64] = offsets_of(values)[offsets]
    return sums[1:] - sums[:-1]


def narrow(values: ArrayLike) -> NDArray[Any]:
    """Return integers, none of them negative, in the narrowest dtype that holds them.

    Example:
        >>> narrow([3, 70_000]).dtype
        dtype('uint32')
    """
    array = np.asarray(values)
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def _as_int64(caller: str, name: str, array: NDArray[Any]) -> NDArray[np.int64]:
    """Return integers as int64; those that it does not hold are an error and never wrap."""
    if array.dtype.kind == "u" and array.itemsize == 8 and array.size:
        if (largest := int(array.max())) > _INT64_MAX:
            fail(caller, f"{name} holds {largest}, beyond int64", "use ids below 2**63")
    return array.astype(np.int64, copy=False)


class MappedArray(NamedTuple):
    """Where the bytes of a memory-mapped array are: enough to map it again elsewhere."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes


def to_portable(array: NDArray[Any]) -> NDArray[Any] | MappedArray:
    """Return a `MappedArray` for a contiguous (view of a) memory map, else the array itself.

    Pickling a `numpy.memmap` copies its contents; pickling this copies about 100 bytes.

    Time: O(1).

    Example:
        >>> to_portable(np.arange(3)).tolist()
        [0, 1, 2]
    """
    if array.dtype.hasobject or not array.flags.c_contiguous:
        return array
    # `memmap.offset` of a view is that of the whole map: measure from the map that owns the file.
    owner: Any = array
    while isinstance(getattr(owner, "base", None), np.ndarray):
        owner = owner.base
    # What was written to a copy-on-write map is in no file.
    if not isinstance(owner, np.memmap) or owner.filename is None or owner.mode == "c":
        return array
    start = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    offset = int(owner.offset) + start
    return MappedArray(os.fsdecode(owner.filename), array.dtype.str, array.shape, offset)


def from_portable(value: NDArray[Any] | MappedArray) -> NDArray[Any]:
    """Map what `to_portable` described, read-only; an array is returned as it is."""
    if not isinstance(value, MappedArray):
        return value
    if 0 in value.shape:  # an empty file range cannot be mapped
        return np.zeros(value.shape, value.dtype)
    return np.memmap(value.path, value.dtype, "r", value.offset, value.shape)


class ArrayParts:
    """Arrays one after another, read as one int64 array that is never put together.

    For arrays that lie in many files: parts that are memory maps stay so, and are pickled by path,
    about 15 bytes each.

    Attributes:
        parts: integer arrays `[n_i]`, or `[n_i, c]` of equal `c`; or a Python `range`, which takes
            no memory.
        bases: int64 `[number of parts]`, added to the values of each part.
        starts: int64 `[number of parts + 1]`, where each part starts in the whole.

    Raises:
        SeqpackError: a part or a base is not of integers, parts differ in `c`, or there are other
            than one base per part; when reading, a value of dtype uint64 is 2**63 or more.

    Example:
        >>> array = ArrayParts([np.array([2, 0]), np.array([1, 0, 2], np.uint8)], bases=[0, 10])
        >>> len(array), array[[4, 0]].tolist(), array[1:4].tolist()
        (5, [12, 2], [0, 11, 10])
    """

    def __init__(
        self, parts: Sequence[NDArray[Any] | range], bases: ArrayLike | None = None
    ) -> None:
        self.parts: tuple[Any, ...] = tuple(parts)
        for k, part in enumerate(self.parts):
            if isinstance(part, range):
                if max(map(abs, (part.start, part.stop, part.step))) >= MAX_TOTAL:
                    fail("ArrayParts", f"part {k} is {part}", "pass a range inside 2**62")
            dtype, shape = _kind(part)
            if dtype.kind not in "iu" or shape[1:] != self._row_shape:
                problem = f"part {k} has dtype {dtype} and shape {shape}"
                fail("ArrayParts", problem, "pass integer arrays [n], or [n, c] of equal c")
        self.starts = offsets_of([len(part) for part in self.parts])
        self.bases = np.zeros(len(self.parts), np.int64)
        if bases is not None:
            given = _as_int64("ArrayParts", "bases", check_integers("ArrayParts", "bases", bases))
            if given.shape != self.bases.shape:
                problem = f"there are {len(self.parts)} parts, and bases of shape {given.shape}"
                fail("ArrayParts", problem, "pass one base per part")
            self.bases += given

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return _kind(self.parts[0])[1][1:] if self.parts else ()

    def _read(self, k: int, where: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        part = self.parts[k]
        if isinstance(part, range):
            place = np.arange(where.start, where.stop) if isinstance(where, slice) else where
            return place * part.step + part.start
        # Plain arrays: indexing a memmap object takes longer than the read.
        return _as_int64("ArrayParts", f"part {k}", np.asarray(part)[where])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: ArrayLike | slice) -> NDArray[np.int64]:
        """Return the values at an array of places, or of a slice: int64, a copy.

        Time: O(result + parts that it touches).
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._slice(start, max(start, stop))
            index = np.arange(start, stop, step)
        place = np.asarray(index)
        if place.size and place.dtype.kind not in "iu":
            raise IndexError(f"an index has dtype {place.dtype}, not an integer dtype")
        flat = place.reshape(-1).astype(np.int64)
        if flat.size:
            low, high, size = int(flat.min()), int(flat.max()), len(self)
            if low < -size or high >= size:
                raise IndexError(f"place {low if low < -size else high} of {size}")
            if low < 0:
                flat[flat < 0] += size
        return self._take(flat).reshape(place.shape + self._row_shape)

    def _take(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        part = np.searchsorted(self.starts, place, side="right") - 1
        counts = np.bincount(part, minlength=len(self.parts))
        ends = np.cumsum(counts)
        # The narrower the keys, the faster is a stable sort.
        order = np.argsort(part.astype(np.min_scalar_type(len(self.parts))), kind="stable")
        values = np.empty((len(place), *self._row_shape), np.int64)
        for k in np.flatnonzero(counts).tolist():
            here = order[ends[k] - counts[k] : ends[k]]
            values[here] = self._read(k, place[here] - self.starts[k]) + self.bases[k]
        return values

    def _slice(self, start: int, stop: int) -> NDArray[np.int64]:
        values = np.empty((stop - start, *self._row_shape), np.int64)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for k in range(first, len(self.parts)):
            before = int(self.starts[k])
            low, high = max(start, before), min(stop, int(self.starts[k + 1]))
            if low >= stop:
                break
            part = self._read(k, slice(low - before, high - before))
            np.add(part, self.bases[k], out=values[low - start : high - start])
        return values

    def __iter__(self) -> Iterator[NDArray[Any]]:
        raise TypeError("ArrayParts is read by slices: array[:]")

    def __getstate__(self) -> dict[str, Any]:
        """Store maps by path, in columns, so that thousands of parts stay small."""
        maps, others = [], {}
        for k, part in enumerate(self.parts):
            portable = part if isinstance(part, range) else to_portable(part)
            if not isinstance(portable, MappedArray):
                dtype, shape = _kind(part)
                if len(part):  # an empty part is nothing but its shape
                    others[k] = part
                portable = MappedArray("", dtype.str, shape, 0)
            maps.append(portable)
        # What names begin with, letter by letter: a relative path with `..` in it could lead
        # elsewhere behind a symbolic link.
        root = os.path.commonprefix([each.path for each in maps if each.path])  # noqa: RUF071
        names = [each.path[len(root) :] for each in maps]
        return {
            "root": root,
            "names": zlib.compress(os.fsencode("\0".join(names))),
            "dtypes": zlib.compress("\0".join(each.dtype for each in maps).encode()),
            "shapes": [_squeezed(column) for column in zip(*(e.shape for e in maps), strict=True)],
            "offsets": _squeezed([each.offset for each in maps]),
            # As differences (modulo 2**64), since bases often rise evenly.
            "bases": _squeezed(np.diff(self.bases, prepend=0).view(np.uint64)),
            "others": others,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        columns = (
            os.fsdecode(zlib.decompress(state["names"])).split("\0"),
            zlib.decompress(state["dtypes"]).decode().split("\0"),
            zip(*(_unsqueezed(column).tolist() for column in state["shapes"]), strict=True),
            _unsqueezed(state["offsets"]).tolist(),
        )
        parts = []
        for k, (name, dtype, shape, offset) in enumerate(zip(*columns, strict=False)):
            mapped = MappedArray(state["root"] + name, dtype, shape, offset)
            parts.append(state["others"][k] if k in state["others"] else from_portable(mapped))
        bases = np.cumsum(_unsqueezed(state["bases"]), dtype=np.uint64).view(np.int64)
        self.__init__(parts, bases)  # type: ignore[misc]


def _kind(part: NDArray[Any] | range) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the dtype and the shape of a part."""
    if isinstance(part, range):
        return np.dtype(np.int64), (len(part),)
    return part.dtype, part.shape


def _squeezed(values: ArrayLike) -> tuple[str, bytes]:
    array = narrow(values)
    return array.dtype.str, zlib.compress(array.tobytes())


def _unsqueezed(squeezed: tuple[str, bytes]) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(squeezed[1]), squeezed[0])


class _GroupIndex(NamedTuple):
    """What `GroupedParts` looks up.  A cell is the things of one key in one part, if any."""

    bounds: NDArray[np.int64]  # [cells + 1], where each cell starts in merged order
    shift: NDArray[np.int64]  # [cells], from there to where it is in the parts
    starts: NDArray[np.int64]  # [keys + 1]
    sizes: NDArray[np.int64]  # [parts]


class GroupedParts:
    """Arrays that are each grouped by a key, and are found in as if they were merged.

    In the merged array that is never made, keys rise, and the things of one key are those of part
    0, then those of part 1, and so on.  In the parts as they are, all of part 0 comes first.

    Attributes:
        parts: of each part, int64 `[keys + 1]` from 0 to its size: where its things of each key
            start.  Parts may have different numbers of keys.

    Example:
        >>> letters = ["a", "c", "c", "a", "b", "c"]  # of two parts, grouped by letter
        >>> grouped = GroupedParts([np.array([0, 1, 1, 3]), np.array([0, 1, 2, 3])])
        >>> [letters[place] for place in grouped.places(np.arange(6))], grouped.starts.tolist()
        (['a', 'a', 'b', 'c', 'c', 'c'], [0, 2, 3, 6])
    """

    def __init__(self, starts: Sequence[NDArray[Any]] | NDArray[Any] | ArrayParts) -> None:
        self.parts = starts if isinstance(starts, ArrayParts) else ArrayParts(list(starts))

    @cached_property
    def _index(self) -> _GroupIndex:
        keys, counts, places = ([np.zeros(0, np.int64)] for _ in range(3))
        sizes: list[int] = []
        first = num_keys = 0
        for k, part in enumerate(self.parts.parts):
            starts = np.asarray(part, np.int64)
            count = np.diff(starts)
            if not len(starts) or starts[0] != 0 or (count < 0).any():
                fail("GroupedParts", f"the starts of part {k} do not rise from 0", "make it again")
            some = np.flatnonzero(count)
            keys.append(some)
            counts.append(count[some])
            places.append(starts[some] + first)
            sizes.append(int(starts[-1]))
            first += sizes[-1]
            num_keys = max(num_keys, len(count))
        key = np.concatenate(keys)
        order = np.argsort(key.astype(np.min_scalar_type(num_keys)), kind="stable")
        bounds = offsets_of(np.concatenate(counts)[order])
        shift = np.concatenate(places)[order] - bounds[:-1]
        starts = bounds[np.searchsorted(key[order], np.arange(num_keys + 1))]
        return _GroupIndex(bounds, shift, starts, np.array(sizes, np.int64))

    @property
    def starts(self) -> NDArray[np.int64]:
        """int64 `[keys + 1]`: where the things of each key start in the merged array."""
        return self._index.starts

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 `[number of parts]`: things in each part."""
        return self._index.sizes

    def places(self, merged: ArrayLike) -> NDArray[np.int64]:
        """Return where, in the parts one after another, the things at `merged` places are.

        Time: O(result * log(keys * parts)), after one pass over all `parts` at the first call.
        """
        place = np.asarray(merged, np.int64)
        cell = np.searchsorted(self._index.bounds, place, side="right") - 1
        return np.asarray(place + self._index.shift[cell])

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}


def save_npz(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an uncompressed `.npz` file; equal arrays give equal bytes.

    As `numpy.savez`, but each array starts at a multiple of 64 bytes, for `map_npz`.
    """
    with open(path, "wb") as file, ZipFile(file, "w", ZIP_STORED) as members:
        for name, array in arrays.items():
            member = ZipInfo(f"{name}.npy")  # of the year 1980: no clock in the bytes
            # The padding goes into the extra field that Android's zipalign writes.
            padding = -(file.tell() + 30 + len(member.filename) + 6) % _ALIGNMENT
            member.extra = struct.pack("<3H", 0xD935, 2 + padding, _ALIGNMENT) + bytes(padding)
            with members.open(member, "w") as stream:
                np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)


def map_npz(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Map integer arrays inside an uncompressed `.npz` file, read-only, by name.

    Unlike `numpy.load`, it compares no checksums.

    Raises:
        KeyError, ValueError, OSError, BadZipFile: the file is damaged, or not such a file.
    """
    arrays = {}
    # `abspath` takes `link/..` for nothing, even where the link leads elsewhere.
    absolute = (os.path.realpath if ".." in os.fsdecode(path) else os.path.abspath)(path)
    with open(path, "rb") as file, ZipFile(file) as members:
        for name in names:
            member = members.getinfo(f"{name}.npy")
            if member.compress_type != ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            try:
                shape, dtype = _skip_headers(file, member)
            except (struct.error, SyntaxError, TokenError) as error:  # of a damaged file
                raise ValueError(f"{name} has a bad header: {error}") from error
            if dtype.kind not in "iu":
                raise ValueError(f"{name} has dtype {dtype}")
            mapped = MappedArray(absolute, dtype.str, shape, file.tell())
            arrays[name] = np.asarray(from_portable(mapped))
    return arrays


def _skip_headers(file: IO[bytes], member: ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Go to the first byte of an array in a `.npz` file, and return its shape and dtype."""
    # The header of a member has 30 bytes, the last four of them the sizes of what follows it.
    file.seek(member.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} is not known")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if by_columns:
        raise ValueError("the array is stored by columns")
    return shape, dtype
