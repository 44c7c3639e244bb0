"""Processes of this machine that share work: no more than a map over a list."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue
from typing import TypeVar

from seqpack_jax.errors import fail

__all__ = ["local_map"]

_Shard = TypeVar("_Shard")
_Result = TypeVar("_Result")


def local_map(
    workers: int,
) -> Callable[[Callable[[_Shard], _Result], Sequence[_Shard]], Iterator[_Result]]:
    """Return a map over shards that runs in `workers` processes of this machine.

    This process is one of them.  The others end with it, however it ends, and leave Ctrl-C to it.
    Results come as they are done.

    Raises:
        SeqpackError: when mapping, that of a shard, or a worker died.

    Example:
        >>> sorted(local_map(1)(lambda shard: shard + 1, [1, 2]))
        [2, 3]
    """

    def map_shards(
        function: Callable[[_Shard], _Result], shards: Sequence[_Shard]
    ) -> Iterator[_Result]:
        todo = deque(shards)
        others = min(workers, len(shards)) - 1
        if others < 1:
            yield from map(function, shards)
            return
        done: SimpleQueue[Future[_Result]] = SimpleQueue()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(others, context, _serve_parent) as pool:
            for _ in range(others):
                threading.Thread(target=_keep_busy, args=(pool, function, todo, done)).start()
            try:
                for _ in shards:
                    if done.empty() and (shard := _next_of(todo)) is not None:
                        yield function(shard)
                    else:
                        yield done.get().result()
            except BrokenProcessPool:
                fail(
                    "local_map",
                    "a worker process died",
                    "look for what killed it (memory?) and run again, finished shards are kept; a "
                    "script starts workers under `if __name__ == '__main__':` only",
                )
            finally:
                todo.clear()

    return map_shards


def _keep_busy(
    pool: ProcessPoolExecutor,
    function: Callable[[_Shard], _Result],
    todo: deque[_Shard],
    done: SimpleQueue[Future[_Result]],
) -> None:
    """Hand a process one shard after another until there are no more, or one fails."""
    while (shard := _next_of(todo)) is not None:
        future: Future[_Result] = Future()
        try:
            future.set_result(pool.submit(function, shard).result())
        except BaseException as error:  # it is raised where results are taken
            todo.clear()
            future.set_exception(error)
        done.put(future)


def _next_of(todo: deque[_Shard]) -> _Shard | None:
    try:
        return todo.popleft()
    except IndexError:
        return None


def _serve_parent() -> None:
    """Make a worker process end with the one that started it, even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
