"""Files of lengths -> a prepared directory, shard by shard, on one machine or a cluster.

Each shard is prepared on its own, by any engine that has a `map`.  Counts add up; one plan is made
for the whole; the pools stay where they are.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np

from seqpack_jax.errors import SeqpackError, check_int, fail
from seqpack_jax.feeding.finding import Source, searched_by
from seqpack_jax.feeding.inputs import Columns, Shard, list_shards
from seqpack_jax.feeding.manifest import (
    COUNTS,
    MANIFEST,
    POOLS,
    TEMPLATES,
    PreparationParameters,
    canonical,
    difference_of,
    first_piece_id,
    listed_files,
    make_manifest,
    problem_of,
)
from seqpack_jax.feeding.prepared import Prepared, check_outside, load_prepared
from seqpack_jax.feeding.progress import progress_bar
from seqpack_jax.feeding.seed_directory import seed_files
from seqpack_jax.feeding.shards import ShardRecord, WorkDirectory, prepare_shard, shard_key
from seqpack_jax.feeding.storage import (
    INT64,
    entry_of,
    map_int64,
    write_array,
    write_bytes,
    writing,
)
from seqpack_jax.feeding.workers import file_lock, local_map, local_path
from seqpack_jax.planning.column_generation import import_highspy
from seqpack_jax.planning.over_length import OverLength
from seqpack_jax.planning.planners import Effort, plan_counts

__all__ = ["merge_shards", "prepare"]

_LOG = logging.getLogger(__name__)
_CALLER = "prepare"

MapShards: TypeAlias = Callable[
    [Callable[[Shard], ShardRecord], Sequence[Shard]], Iterator[ShardRecord]
]


def prepare(
    source: Source,
    output: str | os.PathLike[str],
    max_seq_len: int,
    *,
    length_column: str | None = None,
    tokens_column: str | None = None,
    id_column: str | None = None,
    algorithm: str = "best_fit_decreasing",
    max_segments: int | None = None,
    over_length: str | OverLength = "error",
    tolerance: int = 1,
    budget: float | None = None,
    time_limit: float | None = None,
    extra_tokens: int = 0,
    workers: int = 1,
    map_shards: MapShards | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Prepared:
    """Plan a data set that lies in files, of any size, and write plan and pools to a directory.

    The same input and parameters give the same bytes, whatever the workers, the engine, the order
    of the files in their directory, and how often the run was interrupted; but `"optimal"` plans
    differently with another version of highspy, with a `time_limit`, or when Ctrl-C ends its
    search.  `output` appears at once when all is done; until then work goes on in the hidden
    directory beside it, `.NAME.partial`.  A run that was killed is continued by the same call:
    finished shards are kept as long as their input and the parameters are the same, and so are the
    lengths of FASTA files.

    Time: O(rows): with two workers, about twice that of reading the column.  Memory: under 1 GB per
    worker, and 10 bytes per piece in a shard where sequences are split into over 50 million.

    Args:
        source: parquet, `.npy` or FASTA files: a path, a glob, a directory, or a list of these,
            local or as URLs of fsspec.
        output: a local (or shared) path for the prepared directory, outside of the directories of
            the input.
        max_seq_len: capacity of a row in tokens.
        length_column: for parquet: the integer column of lengths.
        tokens_column: for parquet, instead: a list column, whose sizes are the lengths.
        id_column: for parquet: an integer column of ids, each of them once; None numbers the rows.
            `verify_prepared` finds ids that are there twice; here only those are found of which
            there are more than lie between the lowest and the highest.
        algorithm: as in `pack_length_histogram`.
        max_segments: as in `pack_length_histogram`.
        over_length: the policy for sequences over `max_seq_len`, the name of an action or an
            `OverLength`.
        tolerance: as in `pack_length_histogram`.
        budget: as in `pack_length_histogram`.
        time_limit: seconds of wall clock, after which `"optimal"` ends with the best plan so far,
            if the budget has not ended it before; with a tolerance, of each of two plans.  What is
            found by then depends on the machine, and hosts that plan for themselves would not plan
            the same.  So only preparation has it, which makes the plan once and saves it; the same
            call on a finished directory leaves it as it is.
        extra_tokens: added to every length first, say 2 for BOS and EOS.
        workers: processes on this machine.  Scripts that use more than one start them under
            `if __name__ == "__main__":`.
        map_shards: another engine instead of them, such as `ray_map()`: a function that gets a
            picklable function and the shards, and yields the results in any order.
        overwrite: whether a prepared directory of other data at `output` may be replaced, if
            nothing else is in it.
        progress: whether to show progress on stderr; None to do so on a terminal.

    Returns:
        What `load_prepared(output)` returns.

    Raises:
        SeqpackError: an argument is out of range, highspy is missing, a file is damaged, a length
            or an id cannot be used (the message names its row and file), another run prepares the
            same `output`, `output` holds something else, lies in the input or cannot be written.

    Example:
        >>> import tempfile
        >>> import seqpack_jax as sp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 5, 5, 5, 3, 3, 3])
        ...     prepared = prepare(f"{folder}/lengths.npy", f"{folder}/prepared", 10)
        ...     epoch = sp.materialize_epoch(prepared.plan, prepared.pools)
        ...     epoch[:].tolist(), prepared.manifest["efficiency"]
        ([[0, 6], [1, 3], [2, 4], [5, 7], [8]], 0.82)
    """
    parameters = PreparationParameters(
        max_seq_len,
        Columns(length_column, tokens_column, id_column),
        over_length,  # type: ignore[arg-type]  # the name of an action becomes a policy
        extra_tokens,
        algorithm,
        max_segments,
        tolerance,
        budget,
        time_limit,
    ).checked(_CALLER)
    _check_planner(parameters)
    workers = check_int(_CALLER, "workers", workers, 1)
    target = _output_path(output)
    if (searched := searched_by(_CALLER, source, os.fspath(target))) is not None:
        problem = f"the output {target} lies in the input {searched}, and would be read as such"
        fail(_CALLER, problem, "choose a directory elsewhere")
    work = WorkDirectory(target.parent / f".{target.name}.partial")
    _check_output(target, parameters, None, overwrite)
    with _locked(work, target):
        shards = list_shards(
            source, parameters.columns, work_dir=work.lengths, progress=progress, caller=_CALLER
        )
        _check_output(target, parameters, shards, overwrite)
        if not (rows := sum(shard.rows for shard in shards)):
            _LOG.warning("no sequences in %s: the plan is empty", source)
        _LOG.info("preparing rows: %s, shards: %s", f"{rows:,}", f"{len(shards):,}")
        task = partial(prepare_shard, parameters=parameters, directory=os.fspath(work.root))
        records = []
        with progress_bar("rows", rows, progress) as advance:
            for record in (map_shards or local_map(workers))(task, shards):
                records.append(record)
                advance(record.entry.rows)
        options: Any = {"overwrite": overwrite, "progress": progress}
        merge_shards(work.root, shards, records, parameters, target, **options)
    return load_prepared(target)


def merge_shards(
    directory: str | os.PathLike[str],
    shards: Sequence[Shard],
    records: Sequence[ShardRecord],
    parameters: PreparationParameters,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Plan for all shards together, and turn the work directory into a prepared one.

    Time: O(shards * max_len), and that of `pack_length_histogram`, or less with a `time_limit`.

    Args:
        directory: where `prepare_shard` worked, on the file system of `output`; what is left of it
            is removed.
        shards: what `list_shards` returned.
        records: what `prepare_shard` returned for each of them, in any order.
        parameters: the same as there.
        output: the prepared directory; it appears at once, whole.
        overwrite: whether a prepared directory of other data may be replaced.
        progress: whether `"optimal"` shows progress on stderr; None to do so on a terminal.

    Raises:
        SeqpackError: the record of a shard is missing, is there twice, or was made from other input
            or with other parameters; `output` holds something else; highspy is missing; or there is
            no room.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     parameters = PreparationParameters(max_seq_len=10)
        ...     shards = list_shards(folder)
        ...     records = [prepare_shard(s, parameters, f"{folder}/work") for s in shards]
        ...     merge_shards(f"{folder}/work", shards, records, parameters, f"{folder}/prepared")
        ...     load_prepared(f"{folder}/prepared").plan.num_bins
        2
    """
    parameters = parameters.checked(_CALLER)
    _check_planner(parameters)
    work, target = WorkDirectory(Path(directory)), _output_path(output)
    _check_output(target, parameters, None, overwrite)
    records = sorted(records, key=lambda record: record.number)
    _check_records(shards, records, parameters)
    with writing(_CALLER, work.data):
        (work.data / POOLS).mkdir(parents=True, exist_ok=True)
    files = {name: entry for record in records for name, entry in record.files.items()}
    total = np.zeros(1, np.int64)
    for name, entry in files.items():
        if name.endswith("starts.npy"):  # those of pieces too
            counts = np.diff(map_int64(_CALLER, work.data / name, entry))
            total = np.pad(total, (0, max(0, len(counts) - len(total))))
            total[: len(counts)] += counts
    plan = plan_counts(
        _CALLER,
        total,
        parameters.max_seq_len,
        parameters.algorithm,
        parameters.max_segments,
        parameters.tolerance,
        Effort(parameters.budget, parameters.time_limit, progress),
    )
    with writing(_CALLER, work.data):
        files[COUNTS] = write_array(work.data / COUNTS, total, INT64)
        plan.save(work.data / TEMPLATES)
        files[TEMPLATES] = entry_of(_CALLER, work.data / TEMPLATES)
        manifest = make_manifest(parameters, [record.entry for record in records], files, plan)
        for path in work.data.rglob("*"):  # what earlier runs left: half a file, more shards
            if not path.is_dir() and path.relative_to(work.data).as_posix() not in files:
                path.unlink()
        write_bytes(work.data / MANIFEST, canonical(manifest).encode())
    _publish(work, target, manifest, overwrite)


def _check_planner(parameters: PreparationParameters) -> None:
    """Raise before any work is done if the planner is missing."""
    if parameters.algorithm == "optimal":  # workers and readers check parameters, but do not plan
        import_highspy(_CALLER)


def _check_records(
    shards: Sequence[Shard], records: Sequence[ShardRecord], parameters: PreparationParameters
) -> None:
    hint = "pass what prepare_shard returned for every shard, with these parameters"
    count = Counter(record.number for record in records)
    keys = {shard.number: shard_key(shard, parameters) for shard in shards}
    for number in sorted(keys.keys() | count.keys()):
        if number not in keys:
            fail(_CALLER, f"shard {number} is none of these {len(keys)} shards", hint)
        if count[number] != 1:
            problem = "is there twice" if count[number] else "is missing"
            fail(_CALLER, f"shard {number} {problem}", hint)
    for record in records:
        if record.key != keys[record.number]:
            other = json.loads(record.key)[-1] != parameters.for_shards()
            problem = "with other parameters" if other else "from another input"
            fail(_CALLER, f"shard {record.number} was prepared {problem}", hint)
    entries = [record.entry for record in records]
    spans = [entry.id_range for entry in entries if entry.id_range is not None]
    rows = sum(entry.rows for entry in entries)
    if spans:
        low, high = min(span[0] for span in spans), max(span[1] for span in spans)
        if high - low + 1 < rows:  # verify_prepared finds what this does not
            problem = f"some ids are there twice: {rows} rows have ids from {low} to {high}"
            fail(_CALLER, problem, "leave the id column out, or make its ids differ in all files")
    pieces = sum(entry.pieces for entry in entries)
    if pieces and first_piece_id(entries) + pieces > 2**63:
        fail(_CALLER, f"above the highest id is no room for {pieces} pieces", "use lower ids")


# --- the output directory ---------------------------------------------------------------------


def _output_path(output: str | os.PathLike[str]) -> Path:
    path = local_path(_CALLER, "output", output)
    target = Path(os.path.realpath(path))  # what is behind a link is replaced, not the link
    if os.path.islink(path) and not os.path.lexists(target):
        hint = f"make {target}, remove the link, or choose another output"
        fail(_CALLER, f"the output {path} is a link to nothing", hint)
    if not target.name:
        fail(_CALLER, f"the output {target} cannot be replaced", "choose another output")
    check_outside(_CALLER, target)
    return target


@contextmanager
def _locked(work: WorkDirectory, target: Path) -> Iterator[None]:
    """Keep other runs for the same output away."""
    busy = f"another run is preparing {target}", "wait for it, or choose another output"
    with file_lock(_CALLER, work.lock, busy):
        if not work.lock.exists():  # that run ended while this one waited for the file
            fail(_CALLER, *busy)
        try:
            yield
        finally:
            if not (any(work.records.glob("*")) or any(work.lengths.glob("*.npy"))):
                # Nothing to go on with.  The lock goes last: who makes a new one fills the
                # directory at once.
                _remove(work)
                with suppress(OSError):
                    work.lock.unlink()
                    work.root.rmdir()


def _check_output(
    target: Path,
    parameters: PreparationParameters,
    shards: Sequence[Shard] | None,
    overwrite: bool,
) -> None:
    """Raise before much is done if `target` can neither become the result nor be it already."""
    if not _check_ours(target) or overwrite:
        return
    saved = _load_output(target).manifest
    parts = [[[p.name, p.first_row, p.rows] for p in shard.parts] for shard in shards or ()]
    if other := difference_of(saved.get("parameters"), parameters.to_dict()):
        _refuse(target, f"was prepared with other parameters{other}")
    if shards is not None and [shard["input"] for shard in saved["shards"]] != parts:
        _refuse(target, "was prepared from another input")


def _check_ours(target: Path) -> bool:
    """Raise if anything at `target` was not written by `prepare`; return if anything is there."""
    ours: set[str] = set()
    try:
        if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
            return False
        found = {path.relative_to(target).as_posix() for path in target.rglob("*")}
        if MANIFEST in found:
            text = (target / MANIFEST).read_bytes().decode(errors="replace")
            ours = seed_files(target, text) or listed_files(text)
    except OSError as error:
        problem = f"the output {target} cannot be read ({error.strerror})"
        fail(_CALLER, problem, "choose another output, or change its rights")
    if extra := sorted(found - ours) or [""] * (not target.is_dir()):
        what = f": {extra[0]} is in it" if extra[0] else ""
        hint = "choose another output, or move away what is there"
        fail(_CALLER, f"{target} exists and is no prepared directory{what}", hint)
    return True


def _load_output(target: Path) -> Prepared:
    try:
        return load_prepared(target)
    except SeqpackError as error:
        _refuse(target, f"is damaged: {problem_of(error)}")


def _refuse(target: Path, problem: str) -> NoReturn:
    fail(_CALLER, f"{target} {problem}", "choose another output, or pass overwrite=True")


def _publish(
    work: WorkDirectory, target: Path, manifest: Mapping[str, Any], overwrite: bool
) -> None:
    """Rename the finished data to `target`, and remove what is left of the work.

    What is there stays if it is of the same data.  Its plan may be another: that of a time limit,
    or of an earlier release.
    """
    there = _check_ours(target)  # again: files may have come
    if not there or overwrite:
        replaced = work.root / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            if there:
                target.rename(replaced)
            work.data.rename(target)
        except OSError as error:
            if there and not target.exists():
                with suppress(OSError):
                    replaced.rename(target)
            problem = f"{work.data} cannot be renamed to {target} ({error.strerror})"
            fail(_CALLER, problem, "work on the file system of the output")
        rows, full = f"{manifest['bins']:,}", 100 * manifest["efficiency"]
        _LOG.info("wrote %s: %s rows, %.2f%% full", target, rows, full)
    elif _data_of(_load_output(target).manifest) != _data_of(manifest):
        _refuse(target, "holds another data set")
    else:
        _LOG.info("%s is there already", target)
    _remove(work)


def _data_of(manifest: Mapping[str, Any]) -> list[Any]:
    """Return what a manifest says of the data, and not of the plan."""
    files = {name: entry for name, entry in manifest["files"].items() if name != TEMPLATES}
    return [manifest["parameters"], manifest["shards"], files]


def _remove(work: WorkDirectory) -> None:
    for name in ("data", "records", "lengths", "replaced"):
        shutil.rmtree(work.root / name, ignore_errors=True)
    with suppress(OSError):  # something else is in it
        work.root.rmdir()
