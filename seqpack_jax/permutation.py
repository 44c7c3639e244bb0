"""A stateless random permutation of `[0, n)`: the arithmetic behind "an epoch is not a list".

`permute(index, n, seed)` says where one index goes, without shuffling anything: no memory, no
state, the same answer on every host.  `inverse_permute` says where it came from.

Two methods share the work.  Both are exact bijections for every n, and compute with integers.

* n <= 32: hash all n slots and sort them.  All n! orders are equally likely.
* n > 32: lay the range out, row by row, in a near-square table.  Eight times (twelve for n up to
  1024), reflect every row (every column, every other time) about a pivot: a hash of seed, round
  and line, reduced to the length of that line.  This is a mixed-radix Feistel network.  The usual
  one wants a full table and walks cycles until an index falls below n; this one lets the last row
  be short, as one can reflect a line of any length.  A reflection is its own inverse: backwards,
  they undo each other.

The numbers are where bias stops mattering: with ideal pivots, the images of the worst *pair* of
indices are 2e-4 (total variation) from uniform after twelve rounds at n = 37, the worst case.  A
pair keeps a trace of where it was only while it shares a line, so this falls as `n ** (-rounds /
4)`: eight rounds leave 9e-4 at n = 100 and about 1e-5 above 1024.  It would take over 10**8 seeds
to notice.  This is for shuffling; it keeps no secrets.

References:
    Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (Feistel on `[0, n)`).
    Hoang and Rogaway, "On generalized Feistel networks", CRYPTO 2010 (mixed radices; rounds).
    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (hash).
    Lemire, "Fast random integer generation in an interval", TOMACS 2019 (hash * length >> 32).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqpack_jax.errors import check_int, fail

__all__ = [
    "PERMUTATION_VERSION",
    "inverse_permute",
    "permute",
    "random_below",
    "seed_from_components",
]

PERMUTATION_VERSION = 1
"""Saved runs name it: a change of any value of `permute` or `seed_from_components` bumps it."""

_MAX_N = 2**62 - 1  # then a line has at most 2**31 cells, and 64 bits hold a 32-bit hash times it
_MAX_SORTED_N = 32
_ROUNDS = 12
_FIRST_ROUNDS = 8  # all that an n above this needs:
_MAX_N_OF_ALL_ROUNDS = 1024
_LANES = 1 << 14  # indices worked on at a time: the buffers of a round stay in the L2 cache

# Zero-dimensional arrays: a ufunc takes them faster than NumPy scalars or Python ints.
_GAMMA = np.array(0x9E3779B97F4A7C15, np.uint64)  # SplitMix64's increment: 2**64 / golden ratio
_MIX_1 = np.array(0xBF58476D1CE4E5B9, np.uint64)
_MIX_2 = np.array(0x94D049BB133111EB, np.uint64)
_HALF = np.array(32, np.uint64)
_STEPS = np.arange(_ROUNDS, dtype=np.uint64) * _GAMMA  # modulo 2**64

_Words = NDArray[np.uint64]
_Lines = tuple[_Words, ...]
_Buffers = tuple[_Words, _Words, NDArray[np.bool_]]


def seed_from_components(*components: int) -> int:
    """Hash integers, such as `(run, epoch, worker)`, to one 64-bit seed.

    The same on every host, in every process, and in PyPI's `seqpack`.  The order of the components
    counts; no components make a seed too.

    Time: O(number of components).

    Args:
        *components: integers, Python's or NumPy's.

    Returns:
        A seed in `[0, 2**64)`.

    Raises:
        SeqpackError: a component is no integer (a bool is none).

    Example:
        >>> seed_from_components(17, 3)
        5408750508378483046
    """
    integers = [
        check_int("seed_from_components", f"components[{i}]", each)
        for i, each in enumerate(components)
    ]
    digest = blake2b(":".join(map(str, integers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def random_below(bound: ArrayLike, index: ArrayLike, seed: int) -> NDArray[np.int64]:
    """Return a random number in `[0, bound)` for each index: a hash of `(index, seed)`.

    For choices that need not be a permutation.  Time: O(size).

    Args:
        bound: int64 `[k]`, each in `[1, 2**32)`.
        index: int64 `[k]`.
        seed: a 64-bit seed.

    Example:
        >>> random_below([10, 1000], [0, 1], seed=7).tolist()
        [0, 389]
    """
    words = np.asarray(index, np.int64).reshape(-1).astype(np.uint64) * _GAMMA + np.uint64(seed)
    below = (_mix(words) >> _HALF) * np.asarray(bound, np.int64).reshape(-1).astype(np.uint64)
    return (below >> _HALF).astype(np.int64)


def permute(index: ArrayLike, n: ArrayLike, seed: ArrayLike) -> NDArray[np.int64]:
    """Return the image of `index` under the random permutation of `[0, n)` that `seed` selects.

    Use it where a shuffled range is too long to store, or only a part of it is wanted.  The three
    arguments broadcast: one call serves many ranges with seeds of their own.  A value depends on
    its own `(index, n, seed)` and on nothing else: not on the rest of the call, nor on the host.
    Permutations of two lengths are unrelated, even of one seed.

    Time: O(size) whatever n is; 50 to 150 ns per index, and at least 0.1 ms per call.

    Args:
        index: int[...], each in `[0, n)`.
        n: int[...], the lengths of the permuted ranges, each in `[1, 2**62)`.
        seed: int[...], any 64-bit integers; negative ones are taken modulo 2**64.

    Returns:
        int64[...] of the broadcast shape, each in `[0, n)`; an `np.int64` if all are scalars.

    Raises:
        SeqpackError: an argument is not integer or out of range, or the shapes do not broadcast.

    Example:
        >>> permute(range(10), n=10, seed=7).tolist()
        [1, 8, 7, 2, 5, 9, 0, 6, 4, 3]
        >>> permute(999_999_999_999, n=10**12, seed=7).item()
        632850277139
        >>> permute(0, n=[10, 100, 1000], seed=[7, 8, 9]).tolist()  # three ranges at once
        [1, 76, 478]
    """
    return _apply("permute", index, n, seed, inverse=False)


def inverse_permute(index: ArrayLike, n: ArrayLike, seed: ArrayLike) -> NDArray[np.int64]:
    """Return the index whose image under `permute` is `index`.

    Use it to find where in a shuffled range an element went, without a search.

    Time: O(size) whatever n is, as `permute`; it sorts, up to ten times slower, where n <= 32.

    Args:
        index: int[...], each in `[0, n)`.
        n: int[...], each in `[1, 2**62)`.
        seed: int[...], any 64-bit integers.

    Returns:
        int64[...] of the broadcast shape, each in `[0, n)`; an `np.int64` if all are scalars.

    Raises:
        SeqpackError: an argument is not integer or out of range, or the shapes do not broadcast.

    Example:
        >>> inverse_permute([1, 8, 7, 2, 5, 9, 0, 6, 4, 3], n=10, seed=7).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    return _apply("inverse_permute", index, n, seed, inverse=True)


def _apply(caller: str, index: Any, n: Any, seed: Any, *, inverse: bool) -> NDArray[np.int64]:
    """Check and broadcast the arguments, and work through them in pieces that fit the cache."""
    index = _as_integers(caller, "index", index)
    n = _as_integers(caller, "n", n)
    seed = _as_integers(caller, "seed", seed)
    try:
        shape = np.broadcast_shapes(index.shape, n.shape, seed.shape)
    except ValueError:
        shapes = f"index {index.shape}, n {n.shape} and seed {seed.shape}"
        fail(caller, f"the shapes of {shapes} do not broadcast", "pass one shape, or scalars")
    _check_range(caller, "n", n, 1, _MAX_N)
    _check_range(caller, "index", index, 0, n.astype(np.int64) - 1)

    indices = np.broadcast_to(index, shape).reshape(-1).astype(np.uint64)
    limits, seeds = _as_lanes(n, shape), _as_lanes(seed, shape)
    images = np.empty(indices.size, np.uint64)
    for start in range(0, indices.size, _LANES):
        lanes = slice(start, start + _LANES)
        limit = _select(limits, lanes)
        key = _mix(_select(seeds, lanes) + limit * _GAMMA)  # n too: see `permute`
        images[lanes] = _permute_lanes(indices[lanes], limit, key, inverse)
    result: NDArray[np.int64] = images.view(np.int64).reshape(shape)[()]
    return result


def _as_integers(caller: str, name: str, values: Any) -> NDArray[Any]:
    """Return `values`, of any shape, as an array of 64-bit integers or narrower ones."""
    if np.isscalar(values):
        return np.asarray(check_int(caller, name, values, -(2**63), 2**64 - 1))
    hint = f"pass {name} as an int or an array of 64-bit integers"
    try:
        array = np.asarray(values)
    except ValueError:
        fail(caller, f"{name} is ragged", hint)
    if array.size and array.dtype.kind not in "iu":
        fail(caller, f"{name} has dtype {array.dtype}, not an integer dtype", hint)
    return array if array.size else array.astype(np.int64)


def _check_range(caller: str, name: str, values: NDArray[Any], low: int, high: Any) -> None:
    """Refuse the first of `values` outside `[low, high]`, and count the others."""
    outside = (values < low) | (values > high)
    if not outside.any():
        return
    at = int(outside.argmax())
    value, limit = (np.broadcast_to(each, outside.shape).flat[at] for each in (values, high))
    place = [int(i) for i in np.unravel_index(at, outside.shape)] if outside.ndim else ""
    fail(
        caller,
        f"{name}{place} = {value}, but it must be in [{low}, {limit}] "
        f"({np.count_nonzero(outside)} of {outside.size} outside)",
        f"check what computes {name}",
    )


def _as_lanes(values: NDArray[Any], shape: tuple[int, ...]) -> _Words:
    """Flatten to words modulo 2**64; one value for all lanes stays a scalar, which is cheaper."""
    flat = values.reshape(()) if values.size == 1 else np.broadcast_to(values, shape).reshape(-1)
    return flat.astype(np.uint64)


def _select(words: _Words, lanes: Any) -> _Words:
    """Index `words` by a slice or a mask of lanes, unless it is one scalar for all of them."""
    return words[lanes] if words.ndim else words


def _mix(words: _Words) -> _Words:
    """SplitMix64's finaliser: a bijection on words, whose outputs look unrelated."""
    words = np.array(words)  # in place on a copy: NumPy warns where scalars, not arrays, overflow
    words ^= words >> np.uint64(30)
    words *= _MIX_1
    words ^= words >> np.uint64(27)
    words *= _MIX_2
    words ^= words >> np.uint64(31)
    return words


def _permute_lanes(index: _Words, n: _Words, key: _Words, inverse: bool) -> _Words:
    """Send every lane through the method that its n asks for."""
    sorts = n <= _MAX_SORTED_N
    if sorts.all():
        return _permute_by_sorting(index, n, key, inverse)
    image = _permute_by_reflecting(index, n, key, inverse)
    if sorts.any():  # few, as a rule: cheaper to do them again than to part them from the others
        lanes = np.flatnonzero(sorts)
        own = _select(key, lanes)
        image[lanes] = _permute_by_sorting(index[lanes], n[lanes], own, inverse)
    return image


def _permute_by_sorting(index: _Words, n: _Words, key: _Words, inverse: bool) -> _Words:
    """Return the rank of a slot when the slots of `[0, n)` are sorted by hash, or the inverse.

    The hashes of a lane are distinct, because `_mix` is a bijection.  Slots from n on come last,
    even after a slot whose own hash is the largest word: the order is strict, the sort stable.
    """
    slots = np.arange(n.max(), dtype=np.uint64)[:, None]
    hashes = np.where(slots < n, _mix(np.add(key, slots * _GAMMA)), np.uint64(2**64 - 1))
    if inverse:
        order = np.argsort(hashes, axis=0, kind="stable")
        image = np.take_along_axis(order, index[None], axis=0)[0]
    else:
        own = np.take_along_axis(hashes, index[None], axis=0)
        image = np.count_nonzero(hashes < own, axis=0)
    return np.asarray(image, np.uint64)


def _permute_by_reflecting(index: _Words, n: _Words, key: _Words, inverse: bool) -> _Words:
    """Run the first rounds on all lanes, and the others where n is small; or backwards."""
    needs_all = n <= _MAX_N_OF_ALL_ROUNDS
    first, others = range(_FIRST_ROUNDS), range(_FIRST_ROUNDS, _ROUNDS)
    if inverse:
        first, others = first[::-1], others[::-1]
    if not needs_all.any():
        return _run_rounds(index, n, key, first)
    lanes = np.flatnonzero(needs_all) if needs_all.ndim else slice(None)
    some_n, some_keys = _select(n, lanes), _select(key, lanes)
    if inverse:
        index = index.copy()
        index[lanes] = _run_rounds(index[lanes], some_n, some_keys, others)
        return _run_rounds(index, n, key, first)
    image = _run_rounds(index, n, key, first)
    image[lanes] = _run_rounds(image[lanes], some_n, some_keys, others)
    return image


def _run_rounds(index: _Words, n: _Words, key: _Words, rounds: range) -> _Words:
    """Run rounds of the network on the table whose rows, but for the last one, have `width`."""
    width = _ceil_sqrt(n)
    last_row = (n - 1) // width
    last_width = n - last_row * width
    # The lengths of the rows, and of the columns: `full`, but from number `edge` on `cut` less.
    rows = tuple(map(np.asarray, (width, last_row, width - last_width)))
    columns = tuple(map(np.asarray, (last_row + 1, last_width, np.uint64(1))))
    row = index // width
    column = index - row * width
    buffers = (*np.empty((2, index.size), np.uint64), np.empty(index.size, np.bool_))
    for step in rounds:
        round_key = np.asarray(key + _STEPS[step])
        if step % 2 == 0:
            _reflect(column, row, rows, round_key, buffers)
        else:
            _reflect(row, column, columns, round_key, buffers)
    return row * width + column


def _reflect(moving: _Words, line: _Words, lines: _Lines, key: _Words, buffers: _Buffers) -> None:
    """Set `moving` to `(pivot - moving) mod length` on its line, in place and in given buffers."""
    full, edge, cut = lines
    pivot, length, beyond = buffers
    # Hash the line's number to 32 bits.
    np.add(line, key, out=pivot)
    np.multiply(pivot, _MIX_1, out=pivot)
    np.right_shift(pivot, _HALF, out=length)
    np.bitwise_xor(pivot, length, out=pivot)
    np.multiply(pivot, _MIX_2, out=pivot)
    np.right_shift(pivot, _HALF, out=pivot)
    # Look up the line's length.
    np.greater_equal(line, edge, out=beyond)
    np.multiply(beyond, cut, out=length)
    np.subtract(full, length, out=length)
    # Reduce the hash to the length, and reflect.  A difference below zero wraps to a huge word.
    np.multiply(pivot, length, out=pivot)
    np.right_shift(pivot, _HALF, out=pivot)
    np.subtract(pivot, moving, out=moving)
    np.add(moving, length, out=pivot)
    np.minimum(moving, pivot, out=moving)


def _ceil_sqrt(n: _Words) -> _Words:
    """Return the square root of n, rounded up, exactly.

    Rounding n to a float, and its root again, keeps order and the roots of squares.  So the float
    is not beyond the integers next to the true root, and its floor is at most one too small.
    """
    root = np.sqrt(n).astype(np.uint64)
    return np.add(root, root * root < n)
