"""A prepared directory, opened: local or remote, of this library or of the seed library.

Opening checks everything but the ids themselves, and maps all arrays, so that a billion sequences
open in milliseconds; `verify_prepared` reads the rest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.arrays import ArrayParts, MappedArray, from_portable, offsets_of, to_portable
from seqpack_jax.errors import SeqpackError, fail
from seqpack_jax.feeding.manifest import (
    COUNTS,
    MANIFEST,
    POOLS,
    TEMPLATES,
    IdCoding,
    PreparationParameters,
    ShardEntry,
    canonical,
    first_piece_id,
    listed_files,
    make_manifest,
    parse_manifest,
    pool_file,
    problem_of,
    read_manifest,
    total_report,
)
from seqpack_jax.feeding.remote import local_copy
from seqpack_jax.feeding.seed_directory import is_seed_manifest, load_seed_directory
from seqpack_jax.feeding.storage import (
    AGAIN,
    INT64,
    FileEntry,
    allow_open_files,
    entry_of,
    map_array,
    map_int64,
    reading,
)
from seqpack_jax.planning.histogram import SequencePools
from seqpack_jax.planning.over_length import Pieces
from seqpack_jax.planning.plan import PackingPlan

__all__ = ["Prepared", "check_outside", "load_prepared"]

_CALLER = "load_prepared"
_PROOF = {"bound_method", "proved_optimal"}

Int64 = NDArray[np.int64]


class Prepared(NamedTuple):
    """A data set that `prepare` planned, opened by `load_prepared`.

    Arrays are memory maps, and pickled by path: what a worker process receives is small.  Where it
    is unpickled, the directory has to be the same one still: its digest is compared.

    Attributes:
        manifest: what `manifest.json` says: parameters, figures, shards, digest.
        counts: int64 `[max_len + 1]`, sequences of each length as they are packed.
        plan: which lengths share a row.
        pools: the ids of each length, in shards that are read as one.

    Example:
        >>> import tempfile
        >>> from seqpack_jax import materialize_epoch, prepare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     prepared = prepare(f"{folder}/lengths.npy", f"{folder}/prepared", 10)
        ...     materialize_epoch(prepared.plan, prepared.pools)[:].tolist()
        [[0, 3], [1, 2]]
    """

    manifest: dict[str, Any]
    counts: Int64
    plan: PackingPlan
    pools: SequencePools

    def __reduce__(self) -> tuple[Any, ...]:
        counts: Int64 | MappedArray | None = to_portable(self.counts)
        root = None
        if isinstance(counts, MappedArray):
            root = os.path.dirname(counts.path)
        elif np.array_equal(self.counts, self.pools.counts):
            counts = None
        # In bytes, so that `_restore` looks at the directory before anything in it is mapped.
        arrays = pickle.dumps((counts, self.plan, self.pools), pickle.HIGHEST_PROTOCOL)
        return _restore, (self.manifest, root, _num_maps(self.pools), arrays)


def _num_maps(pools: SequencePools) -> int:
    parts = len(pools.ids.parts) if isinstance(pools.ids, ArrayParts) else 1
    return 3 * parts  # ids and starts of sequences and pieces, and tables of pieces


def _restore(manifest: dict[str, Any], root: str | None, maps: int, arrays: bytes) -> Prepared:
    if root is not None and (digest := manifest.get("digest")) is not None:
        _check_digest(os.path.join(root, MANIFEST), digest)
    allow_open_files(maps)
    with reading(_CALLER, root or "a file of the pools"):
        counts, plan, pools = pickle.loads(arrays)
    counts = pools.counts if counts is None else from_portable(counts)
    return Prepared(manifest, counts, plan, pools)


def _check_digest(path: str, digest: str) -> None:
    """Raise if a directory is another than the one that was pickled by its path."""
    try:
        with reading(_CALLER, path), open(path, "rb") as file:
            found = json.load(file)["digest"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        found = "none"
    if found != digest:
        problem = f"{path} has the digest {found}, but {digest} was pickled"
        fail(_CALLER, problem, "the data set was replaced: load it again")


def load_prepared(
    path: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None
) -> Prepared:
    """Open a prepared directory.

    Everything is checked but the ids themselves (`verify_prepared` does that): format version,
    digests of the manifest and the small files, names, sizes and headers of all, and that counts,
    pools and plan agree.

    Time: O(shards * max_len + size of the plan), whatever the number of sequences.

    Args:
        path: a directory that `prepare` wrote, or that PyPI seqpack 1.0.0 did.  An URL of fsspec is
            copied to this host first, once: processes wait for the one that copies, and later runs
            find the copy by its digest.
        cache: where such copies are; None for the environment variable `SEQPACK_CACHE`, and without
            it `~/.cache/seqpack_jax`.

    Returns:
        A `Prepared`.

    Raises:
        SeqpackError: a file is missing, damaged, changed, or none of this directory; the message
            names it.

    Example:
        >>> import tempfile
        >>> from seqpack_jax import prepare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/lengths.npy", [7, 5, 5, 3])
        ...     _ = prepare(f"{folder}/lengths.npy", f"{folder}/prepared", max_seq_len=10)
        ...     manifest, counts, plan, pools = load_prepared(f"{folder}/prepared")
        ...     manifest["bins"], counts.tolist(), pools[5].tolist()
        (2, [0, 0, 0, 1, 0, 2, 0, 1], [1, 2])
    """
    root = local_copy(_CALLER, path, cache)
    where = root / MANIFEST
    try:
        text = where.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        fail(_CALLER, f"{where} cannot be read ({error})", "pass a directory that prepare() wrote")
    if is_seed_manifest(text):
        return Prepared(*load_seed_directory(_CALLER, root, text))
    manifest = read_manifest(_CALLER, text, str(where))
    parameters, shards, files = parse_manifest(_CALLER, manifest, str(where))
    _check_files(root, files)
    arrays = map_shards_of(root, shards, files)
    counts = map_int64(_CALLER, root / COUNTS, files[COUNTS])
    all_starts = [each.starts for shard in arrays for each in (shard.whole, shard.cut)]
    total = np.zeros(max([2, *map(len, all_starts)]) - 1, np.int64)
    for starts in all_starts:
        total[: len(starts) - 1] += np.diff(starts)
    if not np.array_equal(total, counts):
        fail(_CALLER, f"{root / COUNTS} does not count what the pools hold", AGAIN)
    plan = _load_plan(root / TEMPLATES, parameters, total)
    _check_figures(manifest, make_manifest(parameters, shards, files, plan), where)
    pools = _join(parameters, shards, arrays, total)
    pools.__dict__["_digest"] = _pools_digest(shards, files)
    return Prepared(manifest, counts, plan, pools)


def _pools_digest(shards: Sequence[ShardEntry], files: Mapping[str, FileEntry]) -> str:
    """Return the digest of the pools: of checksums, so that a billion ids need not be read.

    It does not depend on the plan, nor on the names of the input.
    """
    spans = [(shard.rows, shard.id_range) for shard in shards]
    sums = sorted((name, files[name].sha256) for name in files if name.startswith(f"{POOLS}/"))
    text = canonical(["pools", first_piece_id(shards), spans, sums])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Grouped(NamedTuple):
    """Ids, less `base`, that are grouped by length; those of length `l` start at `starts[l]`."""

    ids: NDArray[Any]
    base: int
    starts: Int64


class ShardArrays(NamedTuple):
    """The arrays of one shard.

    Attributes:
        whole: the ids of sequences.
        cut: those of pieces.
        table: int64 `[p, 4]`, the table of `Pieces`.
    """

    whole: Grouped
    cut: Grouped
    table: Int64


def map_shards_of(
    root: Path, shards: Sequence[ShardEntry], files: Mapping[str, FileEntry]
) -> list[ShardArrays]:
    """Map the arrays of all shards.

    Raises:
        SeqpackError: one has another header or size, or starts do not rise to the number of ids.
    """

    def grouped(number: int, prefix: str, coding: IdCoding, size: int, base: int) -> Grouped:
        name = pool_file(number, f"{prefix}starts")
        starts = map_int64(_CALLER, root / name, files[name])
        rising = len(starts) > 1 and starts[1] == 0 and (np.diff(starts, prepend=0) >= 0).all()
        if not rising or starts[-1] != size:
            fail(_CALLER, f"{root / name} does not rise from 0 to the {size} ids", AGAIN)
        path = root / pool_file(number, f"{prefix}ids")
        return Grouped(map_array(_CALLER, path, coding.dtype, (size,)), base, starts)

    allow_open_files(len(files))
    arrays = []
    first_row, first_piece = 0, first_piece_id(shards)
    none = Grouped(np.zeros(0, np.int64), 0, np.zeros(2, np.int64))
    for number, shard in enumerate(shards):
        coding = IdCoding.of(shard.id_range or (0, shard.rows))
        base = coding.base + (first_row if shard.id_range is None else 0)
        whole = grouped(number, "", coding, shard.sequences, base)
        cut, table = none, np.zeros((0, 4), np.int64)
        if shard.pieces:
            coding = IdCoding.of((0, shard.pieces))
            cut = grouped(number, "piece_", coding, shard.pieces, first_piece)
            path = root / pool_file(number, "pieces")
            table = map_array(_CALLER, path, INT64, (shard.pieces, 4))
        arrays.append(ShardArrays(whole, cut, table))
        first_row += shard.rows
        first_piece += shard.pieces
    return arrays


def _check_files(root: Path, files: Mapping[str, FileEntry]) -> None:
    """Check names and sizes of all files, and checksums of the small ones."""
    present: dict[str, int] = {}
    for folder, prefix in ((root, ""), (root / POOLS, f"{POOLS}/")):
        with reading(_CALLER, folder):
            for found in folder.iterdir() if folder.is_dir() else ():
                present[prefix + found.name] = found.stat().st_size if found.is_file() else -1
    if present.get(POOLS) == -1:  # a directory
        del present[POOLS]
    if missing := sorted(files.keys() - present.keys()):
        fail(_CALLER, f"{root / missing[0]} is missing ({_such(missing)})", AGAIN)
    if extra := sorted(present.keys() - files.keys() - {MANIFEST}):
        problem = f"{root / extra[0]} is no file of this data set ({_such(extra)})"
        fail(_CALLER, problem, f"remove it, or {AGAIN}")
    for name, entry in files.items():
        if present[name] != entry.bytes:
            fail(_CALLER, f"{root / name} has {present[name]} bytes, not {entry.bytes}", AGAIN)
        large = name.endswith((".ids.npy", ".piece_ids.npy", ".pieces.npy"))
        if not large and entry_of(_CALLER, root / name) != entry:
            fail(_CALLER, f"{root / name} was changed: it has another checksum", AGAIN)


def _such(names: Sequence[str]) -> str:
    return f"{len(names)} such file{'s' if len(names) > 1 else ''}"


def _load_plan(path: Path, parameters: PreparationParameters, counts: Int64) -> PackingPlan:
    try:
        plan = PackingPlan.load(path, mmap=True)
        plan.check(counts)
    except SeqpackError as error:
        fail(_CALLER, f"{path} does not fit: {problem_of(error)}", AGAIN)
    made_for = (plan.max_seq_len, plan.tolerance)
    segments = parameters.max_segments or plan.max_segments
    if made_for != (parameters.max_seq_len, parameters.tolerance) or plan.max_segments > segments:
        fail(_CALLER, f"{path} was planned with other parameters than {MANIFEST} has", AGAIN)
    return plan


def _check_figures(manifest: Mapping[str, Any], found: Mapping[str, Any], where: Path) -> None:
    """Compare the manifest with the one that the files would get."""
    names = (manifest.keys() | found.keys()) - {"digest"}
    if not _PROOF & manifest.keys():  # of an earlier release
        names -= _PROOF
    wrong = sorted(name for name in names if manifest.get(name) != found.get(name))
    if wrong:
        problem = f"{where} has {wrong[0]} = {manifest.get(wrong[0])!r}"
        fail(_CALLER, f"{problem}, the files have {found.get(wrong[0])!r}", AGAIN)


def _join(
    parameters: PreparationParameters,
    shards: Sequence[ShardEntry],
    arrays: Sequence[ShardArrays],
    counts: Int64,
) -> SequencePools:
    """Return the pools of all shards as one: of each length, sequences first, then pieces.

    So they are the same as those of the whole data set prepared in memory.
    """
    groups = [shard.whole for shard in arrays] + [shard.cut for shard in arrays]
    groups = [group for group in groups if len(group.ids)]  # nothing is no memory map
    tables = [shard.table for shard in arrays if len(shard.table)]
    return SequencePools(
        ArrayParts([group.ids for group in groups], [group.base for group in groups]),
        offsets_of(counts),
        Pieces(first_piece_id(shards), ArrayParts(tables)) if tables else None,
        parameters.over_length,
        total_report(parameters, shards),
        [group.starts for group in groups],
    )


def check_outside(caller: str, output: Path) -> None:
    """Raise if a path to be written lies in a prepared directory, which nothing may be added to."""
    for place in Path(os.path.realpath(output)).parents:
        try:
            text = (place / MANIFEST).read_bytes().decode(errors="replace")
        except OSError:  # most often there is none
            continue
        if listed_files(text) or is_seed_manifest(text):
            problem = f"the output {output} lies in the prepared directory {place}"
            fail(caller, problem, "choose another output: nothing may be added to what is prepared")
