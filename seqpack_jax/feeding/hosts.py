"""Many processes: rows of each become one global batch, and all of them feed the same plan.

JAX is imported inside the functions: whoever feeds NumPy in one process does not load it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_int, fail

if TYPE_CHECKING:
    import jax

__all__ = ["check_processes", "make_global_batch", "row_shard"]

_NARROWED = {np.dtype(np.int64): np.dtype(np.int32), np.dtype(np.uint64): np.dtype(np.uint32)}
_SHOWN = 4  # different values of one name in an error
_LONGEST = 100  # characters of a value in an error


def row_shard(sharding: Any) -> tuple[int, int]:
    """Return which share of the rows of a global batch this process feeds: `(index, count)`.

    For `PackedSource(shard=...)` and `make_global_batch(shard=...)`.  With a mesh whose row axes
    run once over the processes, in their order, this is `(jax.process_index(),
    jax.process_count())`.  Processes that hold the same rows, such as those that a model or a
    sequence axis joins, have the same index, and `count` is the number of different shares.

    Time: O(devices) once per sharding.

    Args:
        sharding: a `jax.sharding.Sharding` whose first axis is that of the rows, or `(mesh, axes)`
            with the name, or a tuple of the names, of the mesh axes that share the rows.

    Returns:
        `(index, count)`: this process feeds share `index` of `count`.

    Raises:
        SeqpackError: two processes hold partly the same rows, so that no dealing fits both.

    Example:
        >>> import jax
        >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        >>> row_shard((mesh, "data"))
        (0, 1)
    """
    caller = "row_shard"
    return _share(caller, _as_sharding(caller, sharding))[:2]


def make_global_batch(batch: Any, sharding: Any, *, shard: tuple[int, int] | None = None) -> Any:
    """Put the rows that every process fed together to one batch of global JAX arrays.

    Every array `[B, ...]` of this process becomes a `jax.Array` `[count * B, ...]` over all
    processes, whose `index`-th run of `B` rows is the one of share `index`: the order in which
    `PackedSource` deals a step.  No data moves between processes.  With one process it is
    `jax.device_put`.  All processes must call it, with arrays of equal shapes.

    The first axis of the mesh may also be shared by several processes, and further axes be sharded
    (context parallelism): every process then gives whole rows, and devices take their part of them.
    A `NamedSharding` is cut to the rank of each array, so `row_valid` `[B]` can go with a sharding
    of `[B, L]`; put metadata `[B, max_segments]`, whose second axis is none of tokens, through a
    call of its own with `(mesh, axes)`.

    64-bit integers, such as `ids`: where JAX has no 64-bit types (`jax_enable_x64` is off, its
    default), it would cut them silently.  Here they become int32 (uint32) if every value fits, and
    are an error if one does not.  float64 and complex128 are refused there: they would be rounded.

    Time: O(bytes of the batch), one copy to the devices.

    Args:
        batch: a pytree of NumPy arrays `[B, ...]`, say an item of a `PackedSource`.
        sharding: a `jax.sharding.Sharding` whose first axis is that of the rows, or `(mesh, axes)`
            with the name, or a tuple of the names, of the mesh axes that share the rows.
        shard: `(index, count)`, as the source was given it.  None for the index and number of the
            processes.  It must be `row_shard(sharding)`, so that no rows are taken for other ones.

    Returns:
        The same pytree of `jax.Array`s.

    Raises:
        SeqpackError: `shard` is not that of the sharding, arrays have different numbers of rows or
            rows that the devices cannot share, or a dtype or value has no place in JAX.

    Example:
        >>> import jax
        >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        >>> rows = {"tokens": np.ones((2, 8), np.int32), "ids": np.array([[7], [9]])}
        >>> batch = make_global_batch(rows, (mesh, "data"))
        >>> {name: (array.shape, str(array.dtype)) for name, array in batch.items()}
        {'ids': ((2, 1), 'int32'), 'tokens': ((2, 8), 'int32')}
    """
    import jax

    caller = "make_global_batch"
    sharding = _as_sharding(caller, sharding)
    expected = _share(caller, sharding)
    fed = (jax.process_index(), jax.process_count()) if shard is None else tuple(shard)
    if fed != expected[:2]:
        fail(
            caller,
            f"process {jax.process_index()} feeds share {fed}, but the sharding takes share "
            f"{expected[:2]} of the rows from it",
            "pass shard=row_shard(sharding) here and to the PackedSource",
        )
    assemble: Any = jax.make_array_from_process_local_data
    rows: dict[int, str] = {}

    def place(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the batch"
        array = _in_jax_dtype(caller, name, np.asarray(leaf))
        if array.ndim == 0:
            problem = f"{name} has no axis of rows"
            fail(caller, problem, "pass arrays [B, ...]: give the PackedSource a batch_size")
        rows.setdefault(len(array), name)
        if len(rows) > 1:
            (one, first), (two, second) = list(rows.items())[:2]
            problem = f"{first} has {one} rows, {second} has {two}"
            fail(caller, problem, "pass arrays [B, ...] with one B")
        # Said in full: JAX would take a second sharded axis as one that processes share, too.
        shape = (expected.shares * len(array), *array.shape[1:])
        if shape[0] % expected.parts:
            problem = f"the {shape[0]} rows of a step do not divide over {expected.parts} devices"
            fail(caller, problem, "change batch_size")
        try:
            return assemble(_cut_to_rank(sharding, array.ndim), array, shape)
        except ValueError as error:
            problem = f"{name}, globally of shape {shape}, cannot be sharded ({error})"
            fail(caller, problem, "every sharded axis must divide evenly over its mesh axes")

    return jax.tree_util.tree_map_with_path(place, batch)


def check_processes(values: Mapping[str, str | int], *, caller: str = "check_processes") -> None:
    """Raise on every process of `jax.distributed` unless all of them have equal `values`.

    Call it before the first step with what determines the batches (digests of plan and pools, the
    seed, ...): processes that feed different plans would train on without any error.  With one
    process, or while `jax.distributed` is not initialised, it does nothing, and never starts a
    backend of JAX.  Otherwise every process must call it: it is a collective operation.

    Time: one gather of 40 bytes per process; a second one, of the values, only if they differ.

    Args:
        values: strings and integers by name.
        caller: the function that an error shall name.

    Raises:
        SeqpackError: the values differ; the message says which processes have which value of what.

    Example:
        >>> check_processes({"seed": 0, "plan": "5f0c"})
    """
    for name, value in values.items():
        if not isinstance(name, str):
            fail(caller, f"the name {name!r} is no string", "pass {name: value}")
        if not isinstance(value, str):
            check_int(caller, name, value)
    # Who has not even imported JAX cannot have initialised jax.distributed.
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    every = _gather_values({name: _plain(value) for name, value in values.items()})
    problems = _differences(every)
    if problems:
        fail(
            caller,
            f"the {len(every)} processes feed different data: {'; '.join(problems)}",
            "give all processes the same data, plan, seed and options, and the same seqpack_jax",
        )


def _plain(value: str | int) -> str | int:
    return value if isinstance(value, str) else int(value)


def _gather_values(values: dict[str, str | int]) -> list[dict[str, str | int]]:
    """Return the values of each process, in order; those of this one for all if they are equal."""
    import jax
    from jax.experimental.multihost_utils import process_allgather

    text = json.dumps(values, sort_keys=True).encode()
    # 32-bit words: JAX would cut wider ones.  The first says whose row it is: JAX orders rows by
    # its devices.
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint32)
    mine = np.array([jax.process_index(), len(text), *digest], np.uint32)
    heads = np.asarray(process_allgather(mine))
    heads = heads[np.argsort(heads[:, 0])]
    if (heads[:, 1:] == heads[0, 1:]).all():
        return [values] * len(heads)
    sent = np.zeros(int(heads[:, 1].max()) + 4, np.uint8)
    sent[:4] = np.frombuffer(np.uint32(jax.process_index()).tobytes(), np.uint8)
    sent[4 : 4 + len(text)] = np.frombuffer(text, np.uint8)
    texts = np.asarray(process_allgather(sent))
    texts = texts[np.argsort(np.ascontiguousarray(texts[:, :4]).view(np.uint32)[:, 0])]
    found = zip(texts[:, 4:], heads[:, 1].tolist(), strict=True)
    return [json.loads(row[:size].tobytes()) for row, size in found]


def _differences(every: list[dict[str, str | int]]) -> list[str]:
    """Say for each name whose value differs, which processes have which."""
    problems = []
    for name in dict.fromkeys(name for values in every for name in values):
        holders: dict[str | int | None, list[int]] = {}
        for process, values in enumerate(every):
            holders.setdefault(values.get(name), []).append(process)
        if len(holders) > 1:
            texts = [_shown(value) for value in holders]
            if len(set(texts)) < len(texts):  # 5 and '5'
                texts = [_shown(value, repr) for value in holders]
            whose = map(_ranges, holders.values())
            parts = [f"{text} on {who}" for text, who in zip(texts, whose, strict=True)]
            more = len(parts) - _SHOWN
            parts[_SHOWN:] = [f"{more} more values on others"] if more > 0 else []
            problems.append(f"{name} is {', '.join(parts)}")
    return problems


def _shown(value: str | int | None, write: Callable[[Any], str] = str) -> str:
    """Return a value for an error; of a long one its start, and what tells it from others."""
    if value is None:
        return "missing"
    text = write(value)
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{text[: _LONGEST // 2]}... ({len(text)} characters, sha256 {digest}...)"


def _ranges(processes: list[int]) -> str:
    """Write rising numbers shortly: `processes 0-3, 7`."""
    cuts = np.flatnonzero(np.diff(processes) != 1) + 1
    runs = [run.tolist() for run in np.split(np.array(processes), cuts)]
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{'process' if len(processes) == 1 else 'processes'} {', '.join(texts)}"


def _as_sharding(caller: str, sharding: Any) -> jax.sharding.Sharding:
    import jax

    if isinstance(sharding, jax.sharding.Sharding):
        return sharding
    hint = "pass a jax.sharding.Sharding, or (mesh, 'data') with the axis that shares the rows"
    pair = isinstance(sharding, tuple) and len(sharding) == 2
    if not pair or not isinstance(sharding[0], jax.sharding.Mesh):
        fail(caller, f"sharding = {sharding!r} names no mesh", hint)
    mesh, axes = sharding
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    missing = [name for name in names if name not in mesh.axis_names]
    if missing:
        problem = f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}, no {missing[0]!r}"
        fail(caller, problem, hint)
    spec: Any = jax.sharding.PartitionSpec  # not typed in every version of JAX
    return jax.sharding.NamedSharding(mesh, spec(names))


def _cut_to_rank(sharding: jax.sharding.Sharding, rank: int) -> jax.sharding.Sharding:
    import jax

    if not isinstance(sharding, jax.sharding.NamedSharding) or len(sharding.spec) <= rank:
        return sharding
    spec: Any = jax.sharding.PartitionSpec
    kept = spec(*tuple(sharding.spec)[:rank])
    return jax.sharding.NamedSharding(sharding.mesh, kept, memory_kind=sharding.memory_kind)


class _Share(NamedTuple):
    """Which share of the rows is this process's, of how many, and in how many parts all are cut."""

    place: int
    shares: int
    parts: int


@lru_cache(maxsize=16)  # a training loop asks at every step
def _share(caller: str, sharding: jax.sharding.Sharding) -> _Share:
    import jax

    # An axis as long as the devices are many divides over any mesh of them.
    rows = (len(sharding.device_set),)
    held: dict[int, set[int]] = {}  # process -> where its parts of the rows start
    places: Any = _cut_to_rank(sharding, 1).devices_indices_map(rows)
    for device, index in places.items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    shares = sorted({tuple(sorted(starts)) for starts in held.values()})
    mine = held.get(jax.process_index())
    if mine is None:
        problem = f"no device of process {jax.process_index()} is in the sharding"
        fail(caller, problem, "use a mesh over the devices of all processes")
    starts = [start for share in shares for start in share]
    if len(set(starts)) != len(starts) or len({len(share) for share in shares}) != 1:
        problem = "some processes hold partly the same rows, or more rows than others"
        fail(caller, problem, "order the mesh so that processes share all of their rows or none")
    return _Share(shares.index(tuple(sorted(mine))), len(shares), len(starts))


def _in_jax_dtype(caller: str, name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` in a dtype that JAX keeps; an error where it would change a value."""
    import jax

    # bfloat16 and its like are of kind V, too.
    if array.dtype.kind not in "biufcV" or array.dtype.type is np.void:
        fail(caller, f"{name} has dtype {array.dtype}", "leave out what is no array of numbers")
    if not array.dtype.isnative:  # as in files of another byte order
        array = array.astype(array.dtype.newbyteorder("="))
    kept = jax.dtypes.canonicalize_dtype(array.dtype)
    if kept == array.dtype:
        return array
    hint = f"cast {name}, keep it on the host, or set jax_enable_x64"
    narrow = _NARROWED.get(array.dtype)
    if narrow is None:
        fail(caller, f"{name} has dtype {array.dtype}, which JAX would make {kept}", hint)
    limits = np.iinfo(narrow)
    for value in (int(array.min(initial=0)), int(array.max(initial=0))):
        if not limits.min <= value <= limits.max:
            problem = f"{name} holds {value}, beyond {narrow}, and JAX has no {array.dtype} here"
            fail(caller, problem, hint)
    return array.astype(narrow)
