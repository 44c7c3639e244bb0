"""Grain: packed batches that go on after a restart with the very next row, whatever changed.

A position is (epoch, rows consumed), not a count of steps.  So a run may go on with other numbers
of processes, of worker processes, or of rows per batch, and no row is fed twice or left out.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import grain
import numpy as np

from seqpack_jax.errors import check_int, fail
from seqpack_jax.feeding.hosts import check_processes as compare_processes
from seqpack_jax.feeding.packed_source import PackedSource
from seqpack_jax.feeding.parcel import Parcel, SentSource, end_with_parent
from seqpack_jax.permutation import PERMUTATION_VERSION

__all__ = ["PackedDataset", "PackedIterator"]

FORMAT, VERSION = "seqpack_jax.packed", 1
_HINTS = {
    "seed": "pass the seed that the run began with",
    "plan": "plan the same lengths with the same options, or begin anew",
    "pools": "pass the same ids; pools in memory and prepared ones never have the same digest",
    "permutation": "use the seqpack_jax that wrote it, or begin anew",
    "settings": "pass the options that the run began with",
}
_MUCH = 10**9  # bytes that prefetching may hold without a warning
_READ_AHEAD = 1 << 26  # bytes per reader, by default


class PackedDataset(grain.IterDataset):  # type: ignore[misc]
    """The items of a `PackedSource` as a `grain.IterDataset` that resumes under any conditions.

    Iterators have a small JSON state, equal on all processes:

        {"format": "seqpack_jax.packed", "version": 1, "epoch": 3, "rows": 4096, "seed": 0,
         "plan": digest, "pools": digest, "permutation": 1, "settings": "{}"}

    `set_state` goes on with row 4096 of epoch 3, with any number of processes and workers, any
    `batch_size` and `remainder`, and more `epochs`.  What determines the rows must be the same, and
    else is an error; `settings` are those of the source.  Items are the same for any number of
    workers.

    It checkpoints through `grain.checkpoint`, and in both generations of Orbax.  They keep a file
    per process, which only as many processes read; to go on with more or fewer, save the state as
    JSON, once: `ocp.args.JsonSave(iterator.get_state())`.

    Transformations may follow, `PackedDataset(source).map(function)`, and run in this process;
    `.mp_prefetch` may too, but puts the number of workers into the state: `num_workers` does not.

    Worker processes receive less than 100 kB, whatever the sizes.  What is large of a source and in
    memory is written to a temporary directory (below `TMPDIR`) before the first batch, and workers
    map it.  The directory is removed with the data set, or when Python ends; if that is killed, by
    its workers, which end with it.  Programs with workers start under `if __name__ ==
    "__main__":`, and call `absl.flags.FLAGS.mark_as_parsed()` if JAX is installed.

    Time: O(1) to restore, beside the source's own.  The first state takes the digests of plan and
    pools (see `SequencePools.digest`).

    Args:
        source: a `PackedSource`, of batches or of single rows.
        num_workers: processes that read and pack; 0 for threads of this one.
        read_options: for Grain; None for 2 threads, and as many items ahead per reader as take
            about 64 MB, but 2 to 16.  Grain's own default is 500 items.
        worker_buffer_size: finished items that wait in each worker.
        check_processes: whether the processes of `jax.distributed`, if it is initialised, compare
            what they feed when the first iterator is made (see `check_processes`).

    Raises:
        SeqpackError: an argument is out of range; or processes feed different data.

    Warns:
        UserWarning: prefetched items would take more than 1 GB.

    Example:
        >>> from seqpack_jax import pack_dataset
        >>> source = pack_dataset([[5], [6], [7], [8]], 1, batch_size=1)
        >>> iterator = iter(PackedDataset(source))
        >>> next(iterator)["tokens"].tolist(), iterator.get_state()["rows"]
        ([[5]], 1)
        >>> wider = pack_dataset([[5], [6], [7], [8]], 1, batch_size=2)
        >>> other = iter(PackedDataset(wider))
        >>> other.set_state(iterator.get_state())
        >>> [item["tokens"].tolist() for item in other]
        [[[6], [7]], [[8], [0]]]
    """

    def __init__(
        self,
        source: PackedSource,
        *,
        num_workers: int = 0,
        read_options: grain.ReadOptions | None = None,
        worker_buffer_size: int = 1,
        check_processes: bool = True,
    ) -> None:
        super().__init__()
        caller = "PackedDataset"
        if not isinstance(source, PackedSource):
            problem = f"source is a {type(source).__name__}, not a PackedSource"
            fail(caller, problem, "make one with pack_dataset, or of a plan and its pools")
        self.source = source
        self.num_workers = check_int(caller, "num_workers", num_workers, 0)
        self.worker_buffer_size = check_int(caller, "worker_buffer_size", worker_buffer_size, 1)
        size = _expected_bytes(source)
        if read_options is None:
            ahead = min(max(_READ_AHEAD // size, 2), 16)
            read_options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)
        self.read_options = read_options
        self._slice = (0, 1)
        self._warned = False
        self._unchecked = bool(check_processes)
        self._warn_of(size, stacklevel=3)

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What must be the same when a run goes on, as the state has it: digests and the seed.

        Time: that of `plan.digest()` and `pools.digest()`, once.
        """
        source = self.source
        return {
            "seed": source.seed,
            "plan": source.plan.digest(),
            "pools": source.pools.digest(),
            "permutation": PERMUTATION_VERSION,
            "settings": json.dumps(source.settings, sort_keys=True),
        }

    def __iter__(self) -> PackedIterator:
        if self._unchecked:
            source = self.source
            step = {"rows_per_step": source.rows_per_step, "epochs": source.epochs}
            values = self.identity | step | {"remainder": source.remainder}
            compare_processes(values, caller="PackedDataset")
            self._unchecked = False
        return PackedIterator(self)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keep every n-th item only: Grain calls it in the workers of an `mp_prefetch` behind."""
        if sequential_slice or sl.stop is not None:
            problem = f"a worker was given {sl}, sequential_slice={sequential_slice}"
            fail("PackedDataset", problem, "use mp_prefetch without sequential_slice")
        self._slice = (sl.start or 0, sl.step or 1)

    def pipeline(self, position: tuple[int, int]) -> Iterator[Any]:
        """Return a Grain iterator over the items from a position on, without a state of its own."""
        source = self.source.starting_at(*position)
        if self.num_workers and multiprocessing.current_process().daemon:
            problem = "a worker process cannot start workers"
            fail("PackedDataset", problem, "pass num_workers=0, or leave out mp_prefetch")
        packed = SentSource(source, self._parcel, position) if self.num_workers else source
        offset, stride = self._slice
        items = grain.MapDataset.source(packed)
        items = items.slice(slice(offset, None, stride)) if stride > 1 else items
        steps = items.to_iter_dataset(self.read_options)
        if self.num_workers:
            options = grain.MultiprocessingOptions(self.num_workers, self.worker_buffer_size)
            begin = partial(end_with_parent, self._parcel.folder)
            steps = steps.mp_prefetch(options, worker_init_fn=begin)
        return iter(steps)

    @cached_property
    def _parcel(self) -> Parcel:
        return Parcel(self.source)

    @property
    def _held(self) -> int:
        """How many items are ahead of the one that is used, at most."""
        options = self.read_options
        ahead = options.prefetch_buffer_size if options.num_threads else 0
        each = ahead + self.worker_buffer_size
        return int(self.num_workers * each if self.num_workers else ahead)

    def _warn_of(self, size: int, *, stacklevel: int = 2) -> None:
        """Warn once if prefetched items of `size` bytes take too much memory."""
        if self._warned or (total := self._held * size) <= _MUCH:
            return
        self._warned = True
        warnings.warn(
            f"PackedDataset: prefetching holds up to {self._held} items of {size / 1e6:.1f} MB, "
            f"{total / 1e9:.1f} GB in all. Hint: lower prefetch_buffer_size = "
            f"{self.read_options.prefetch_buffer_size} of read_options, worker_buffer_size = "
            f"{self.worker_buffer_size}, or num_workers = {self.num_workers}.",
            stacklevel=stacklevel,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_parcel"}

    def __str__(self) -> str:
        return f"PackedDataset({self.source!r}, num_workers={self.num_workers})"


class PackedIterator(grain.DatasetIterator):  # type: ignore[misc]
    """Iterator over a `PackedDataset`; made by `iter`.

    No data are read, and no processes started, before the first `next` or `start_prefetch`.  After
    an error the same item is tried again.  Threads may share it.

    Example:
        >>> from seqpack_jax import pack_dataset
        >>> source = pack_dataset([[5], [6], [7], [8]], 1, batch_size=2)
        >>> iterator = iter(PackedDataset(source))
        >>> start = iterator.get_state()
        >>> len(list(iterator)), iterator.get_state()["epoch"]
        (2, 1)
        >>> iterator.set_state(start)
        >>> next(iterator)["tokens"].tolist()
        [[5], [6]]
    """

    def __init__(self, dataset: PackedDataset) -> None:
        self._lock = threading.RLock()
        self._steps: Any = None  # the Grain iterator, once something was read
        self._shut = False
        super().__init__()
        self._dataset = dataset
        self._go_to(dataset.source.position(0))

    def _go_to(self, position: tuple[int, int]) -> None:
        self._stop()
        self._begin, self._taken = position, 0
        self._rest = self._dataset.source.starting_at(*position)

    def _stop(self) -> None:
        """End what reads ahead, worker processes too."""
        steps, self._steps = self._steps, None
        if hasattr(steps, "close"):  # not in Grain 0.2.13, which does so when it is freed
            steps.close()

    def _started(self) -> Any:
        if self._shut:
            raise ValueError("this iterator was closed")
        if self._steps is None:
            self._steps = self._dataset.pipeline(self._begin)
        return self._steps

    def __next__(self) -> Any:
        with self._lock:
            offset, stride = self._dataset._slice
            if offset + self._taken * stride >= len(self._rest) and not self._shut:
                self._stop()
                raise StopIteration
            try:
                item = next(self._started())
            except BaseException as error:
                # What was read ahead is lost: begin again with this item, if asked to.
                self._go_to(self._position())
                _explain(error)
                raise
            self._taken += 1
            self._dataset._warn_of(_bytes_of(item))
            return item

    def _position(self) -> tuple[int, int]:
        _, stride = self._dataset._slice
        return self._rest.position(min(self._taken * stride, len(self._rest)))

    def get_state(self) -> dict[str, Any]:
        """Return where the next item starts, and of what run, as JSON has it.

        Time: O(1), after the digests were taken once.
        """
        with self._lock:
            epoch, rows = self._position()
        head = {"format": FORMAT, "version": VERSION, "epoch": epoch, "rows": rows}
        return head | self._dataset.identity

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken, by this or any other iterator over the same rows.

        Raises:
            SeqpackError: the state is of another plan, other pools, another seed or other settings,
                or of another version; or beyond the end.  The iterator stays where it is.
        """
        position = _check_state(self._dataset, state)
        with self._lock:
            self._go_to(position)

    def start_prefetch(self) -> None:
        """Start to read ahead, say while a model is restored."""
        with self._lock:
            if self._shut or not len(self._rest):
                return
            steps = self._started()
            with contextlib.suppress(NotImplementedError):  # Grain 0.2.13 without workers
                steps.get_state()  # makes the iterators that Grain starts
                steps.start_prefetch()

    def close(self) -> None:
        """End worker processes and threads; to go on is an error."""
        with self._lock:
            self._shut = True
            self._stop()

    def __del__(self) -> None:
        self.close()

    def __str__(self) -> str:
        return f"PackedIterator(num_workers={self._dataset.num_workers})"


def _explain(error: BaseException) -> None:
    """Raise a better error than Grain does, where one is known."""
    caller = "PackedDataset"
    if isinstance(error, StopIteration):
        fail(caller, "Grain left out items", "the source must return each item that it has")
    if type(error).__name__ == "UnparsedFlagAccessError":  # google/grain#1355
        problem = "Grain's workers read absl flags, which were not parsed"
        fail(caller, problem, "call absl.flags.FLAGS.mark_as_parsed() when the program starts")


def _check_state(dataset: PackedDataset, state: Any) -> tuple[int, int]:
    """Return the position in a state, if it is one of this data set."""
    caller, known = "PackedDataset.set_state", dataset.identity
    kind = state.get("format") if isinstance(state, Mapping) else type(state).__name__
    if kind != FORMAT:
        problem = f"the state has the format {kind!r}, not {FORMAT!r}"
        fail(caller, problem, "pass what get_state() of a PackedDataset's iterator returned")
    if state.get("version") != VERSION:
        problem = f"the state has version {state.get('version')!r}, this release reads {VERSION}"
        fail(caller, problem, "restore it with the release that wrote it, or update seqpack_jax")
    wrong = [name for name in known if state.get(name) != known[name]]
    if wrong:
        values = [f"{name} {state.get(name)!r}, here it is {known[name]!r}" for name in wrong]
        fail(caller, f"the state has the {'; the '.join(values)}", _HINTS[wrong[0]])
    source = dataset.source
    epoch = check_int(caller, "epoch", state.get("epoch"), 0)
    if epoch > source.epochs:
        problem = f"the state is in epoch {epoch}, the source has {source.epochs} epochs"
        fail(caller, problem, "pass at least as many epochs as before")
    limit = source.plan.num_bins if epoch < source.epochs else 0
    return epoch, check_int(caller, "rows", state.get("rows"), 0, limit)


def _expected_bytes(source: PackedSource) -> int:
    """Return the bytes of an item of three int32 arrays per feature; there may be more."""
    tokens = int(np.sum(source.plan.max_seq_len))
    return 3 * 4 * (source.batch_size or 1) * tokens


def _bytes_of(item: Any) -> int:
    if isinstance(item, Mapping):
        return sum(map(_bytes_of, item.values()))
    if isinstance(item, tuple | list):
        return sum(map(_bytes_of, item))
    return int(getattr(item, "nbytes", 0))
