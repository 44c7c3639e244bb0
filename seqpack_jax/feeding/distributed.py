"""Ray: a map over the shards of a data set on the machines of a cluster.

`prepare(..., map_shards=ray_map(...))` prepares each shard as one Ray task.  Nothing else of the
preparation knows about Ray: whatever can map a function over a list serves as well.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from seqpack_jax.errors import SeqpackError, check_int, fail

__all__ = ["MapShards", "ray_map"]

MapShards = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Applies a picklable function to each shard, anywhere, and yields the results in any order."""


def ray_map(
    *, address: str | None = None, num_workers: int | None = None, num_cpus: float = 1
) -> MapShards:
    """Return a map over shards that runs on Ray, for the `map_shards` of `prepare`.

    Ray starts, or connects, when the map is first used, unless the program has done so itself; what
    was started here is shut down at the end.  A task whose worker is lost is run again by Ray; an
    error inside a task ends the map and cancels the other tasks.  All tasks write into the output
    directory: on a cluster it must lie on storage that every machine has under the same path, and
    so must the input.  The package must be installed there as well.

    Args:
        address: of a running cluster, such as `"auto"` or `"ray://head:10001"`.  None takes that in
            the environment variable `RAY_ADDRESS`, and without one starts Ray on this machine.
        num_workers: tasks at work at one time.  None for as many as the cluster has CPUs for.
        num_cpus: CPUs that Ray sets aside for one task.

    Returns:
        A function `(fn, shards)` that yields `fn(shard)` of every shard, in the order in which they
        are done.

    Raises:
        SeqpackError: `ray` is not installed or an argument is out of range; and, when mapping, the
            `SeqpackError` of a task, as it was raised there.

    Example:
        >>> from functools import partial
        >>> on_cluster = ray_map(address="auto", num_workers=64)
        >>> # sp.prepare("/shared/lengths/*.parquet", "/shared/prepared", 2048,
        >>> #            length_column="length", map_shards=on_cluster)
    """
    caller = "ray_map"
    if num_workers is not None:
        num_workers = check_int(caller, "num_workers", num_workers, 1)
    if isinstance(num_cpus, bool) or not isinstance(num_cpus, int | float) or not num_cpus > 0:
        problem = f"num_cpus = {num_cpus!r}, but a task takes a positive number of CPUs"
        fail(caller, problem, "pass 1, more for tasks with threads, a fraction for light ones")
    try:
        import ray  # noqa: F401
    except ImportError:
        fail(caller, "ray is not installed", "pip install 'seqpack_jax[ray]'")

    def map_shards(fn: Callable[[Any], Any], shards: Sequence[Any]) -> Iterator[Any]:
        return _map(fn, shards, address, num_workers, num_cpus)

    return map_shards


def _map(
    fn: Callable[[Any], Any],
    shards: Sequence[Any],
    address: str | None,
    num_workers: int | None,
    num_cpus: float,
) -> Iterator[Any]:
    import ray

    with _running(address, num_workers, num_cpus):
        call = ray.remote(_call).options(num_cpus=num_cpus)
        function = ray.put(fn)  # once, however many tasks there are
        limit = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1) / num_cpus))
        waiting = iter(shards)
        working: list[Any] = []
        try:
            while True:
                # No more is handed out than can be worked on, so that little is to be called off.
                for shard in islice(waiting, limit - len(working)):
                    working.append(call.remote(function, shard))
                if not working:
                    return
                done, working = ray.wait(working)
                yield _result_of(done[0])
        finally:
            for task in working:
                ray.cancel(task, force=True)


def _call(fn: Callable[[Any], Any], shard: Any) -> Any:
    return fn(shard)


@contextlib.contextmanager
def _running(address: str | None, num_workers: int | None, num_cpus: float) -> Iterator[None]:
    """Connect to a cluster or start Ray on this machine, unless the program has; and undo it."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options["include_dashboard"] = False
        if num_workers is not None:
            options["num_cpus"] = math.ceil(num_workers * num_cpus)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there


def _result_of(task: Any) -> Any:
    """Return what a task returned, or raise its `SeqpackError` as this process would have."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SeqpackError):
            # Ray's own class puts the traceback of the task into the message.
            raise SeqpackError(str(error.cause)) from None
        raise
