"""What processes of this machine share: work, by a map over a list, and files, under a lock."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from seqpack_jax.errors import fail

__all__ = ["file_lock", "local_map", "local_path", "making", "serve_parent", "way_out"]

_Shard = TypeVar("_Shard")
_Result = TypeVar("_Result")


def local_map(
    workers: int,
) -> Callable[[Callable[[_Shard], _Result], Sequence[_Shard]], Iterator[_Result]]:
    """Return a map over shards that runs in `workers` processes of this machine.

    This process is one of them.  The others end with it, however it ends, and leave Ctrl-C to it.
    Results come as they are done.

    Args:
        workers: number of processes; with 1, nothing is started.

    Returns:
        `map_shards(function, shards)`, which returns an iterator over the results; `prepare` takes
        it.

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
        with ProcessPoolExecutor(others, context, serve_parent) as pool:
            try:
                with _ctrl_c_ignored():
                    for _ in range(others):
                        pool.submit(int)  # starts a process
                for _ in range(others):
                    threading.Thread(target=_keep_busy, args=(pool, function, todo, done)).start()
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


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Let processes that are started ignore Ctrl-C from their first moment, as they inherit it."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield  # only the main thread may change it, and only what Python has set
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


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


def serve_parent() -> None:
    """Make a worker process end with the one that started it, even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# Files.


def local_path(caller: str, name: str, value: Any) -> Path:
    """Return the path that an argument names, with `~` expanded.

    Raises:
        SeqpackError: it is no path, or a URL.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        fail(caller, f"{name} = {value!r} is not a path", f"pass {name} as a str or a Path")
    if "://" in path:
        problem = f"the {name} {path} is no local path"
        fail(caller, problem, "write to a local or mounted directory, and copy it")
    return Path(os.path.expanduser(path))


def way_out(error: OSError, what: str) -> str:
    """Return the hint on an error of the file system: `what` is the path that was chosen."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room, and run it again"
    return f"choose another {what}, or change its rights"


@contextmanager
def making(caller: str, path: Path) -> Iterator[None]:
    """Turn what the file system raises into the error of `caller` on the path that is made."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        fail(caller, f"{path} cannot be made ({reason})", way_out(error, "path"))


@contextmanager
def file_lock(caller: str, path: Path, busy: tuple[str, str] | None = None) -> Iterator[None]:
    """Hold the lock `path`, which no other process holds at the same time.

    Args:
        caller: the public function that an error shall name.
        path: a file, which may be removed while the lock is held.  Its directory is made.
        busy: problem and hint of the error if another process holds it; None to wait for it.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        fail(caller, "filelock is not installed", "pip install 'seqpack_jax[prepare]'")
    with making(caller, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=-1 if busy is None else 0)
    with making(caller, path):
        while not lock.is_locked:
            try:
                lock.acquire()
            except (Timeout, FileNotFoundError):  # it just finished, and removed the directory
                if busy is not None:
                    fail(caller, *busy)
                path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        lock.release()
