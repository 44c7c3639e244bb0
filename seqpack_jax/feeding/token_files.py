"""Files of nothing but tokens: nanoGPT's and llm.c's `.bin`, and Megatron's indexed data sets."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from seqpack_jax.arrays import offsets_of
from seqpack_jax.errors import check_choice, check_int, check_integers, fail
from seqpack_jax.feeding.inputs import Source
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.feeding.storage import INT64, write_array
from seqpack_jax.feeding.upstream import JoinedSequences
from seqpack_jax.feeding.workers import file_lock, local_path, making

__all__ = ["kept_file", "list_files", "open_flat", "open_megatron"]

_VERSION = 1  # of the files that are kept in a work directory; part of their names
_BLOCK_TOKENS = 1 << 22  # tokens that are searched at once

_LLMC_HEADER = 1024  # bytes: 256 int32, of which the first three say something
_LLMC_TOKENS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by (magic, version)
_LLMC_EVAL = 20240522

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}

Int64 = NDArray[np.int64]


class _Flat(NamedTuple):
    """A file of tokens: where they begin, and what they are."""

    path: Path
    dtype: np.dtype[Any]
    offset: int  # bytes
    tokens: int
    separator_at: str  # as those who write such files have it


def open_flat(
    path: Source,
    *,
    dtype: DTypeLike | None = None,
    offsets: ArrayLike | str | os.PathLike[str] | None = None,
    separator: int | None = None,
    separator_at: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
) -> FlatSequences | JoinedSequences:
    """Memory-map a file of nothing but tokens, as nanoGPT's and llm.c's `.bin` files are.

    Where each sequence begins is either given, or found by the token that separates documents,
    which stays part of them.  It is looked for once: the offsets are kept in `work_dir`, and found
    again as long as the file is unchanged.

    The header of llm.c's files (256 int32: 20240520 and version 1 before uint16 tokens, 20240801
    and version 7 before uint32) is recognised.

    Time: O(tokens) where offsets have to be found, else O(sequences).  Memory: 16 bytes per
    sequence and a block of tokens, while offsets are found; afterwards all is mapped.

    Args:
        path: a local file; with `separator` also a glob or a list of files, whose ids go on from
            one to the next.  A document that was cut between two files is two sequences.
        dtype: of the tokens, an integer dtype such as `np.uint16`; None for a file with a header.
        offsets: integers `[n + 1]`, rising from 0 to the number of tokens, or the `.npy` file of
            them, which is mapped.  An array in memory is pickled as it is.
        separator: the end-of-text token.
        separator_at: `"end"` if each document ends with it (nanoGPT), `"start"` if each begins with
            it (llm.c); None for what the writer of the format does.
        work_dir: where offsets that were found are kept.  It need not exist.

    Returns:
        A `FlatSequences`, or for several files a `JoinedSequences` of them.

    Raises:
        SeqpackError: a file is missing or cut short, the dtype is missing or not that of the
            header, the separator occurs in no file, offsets do not fit, or `work_dir` is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.array([5, 6, 0, 7, 0, 8], np.uint16).tofile(f"{folder}/train.bin")
        ...     sequences = open_flat(
        ...         f"{folder}/train.bin", dtype=np.uint16, separator=0, work_dir=folder
        ...     )
        ...     [tokens.tolist() for tokens in sequences]
        [[5, 6, 0], [7, 0], [8]]
    """
    caller = "open_flat"
    files = [_flat_file(caller, file, dtype) for file in list_files(caller, path)]
    if (offsets is None) == (separator is None):
        problem = "offsets and separator are both " + ("missing" if offsets is None else "given")
        fail(caller, problem, "pass offsets=..., or separator=the end-of-text token")
    if offsets is not None:
        if len(files) > 1:
            problem = f"there are {len(files)} files, and offsets of one"
            fail(caller, problem, "open them one by one, and join them by JoinedSequences")
        if isinstance(offsets, str | os.PathLike):
            given = _map_npy(caller, Path(offsets))
        else:
            given = check_integers(caller, "offsets", offsets)
        if len(given) and (given[1:] < given[:-1]).any():
            k = int((given[1:] < given[:-1]).argmax())
            fail(caller, f"offsets fall from {given[k]} to {given[k + 1]}", "pass rising offsets")
        return FlatSequences(_map_tokens(files[0]), given)
    token = check_int(caller, "separator", separator)
    if separator_at is not None:
        check_choice(caller, "separator_at", separator_at, ("start", "end"))
    parts, is_there = [], not any(file.tokens for file in files)
    for file in files:
        tokens, at = _map_tokens(file), separator_at or file.separator_at
        found = _kept_offsets(
            caller,
            work_dir,
            file.path,
            [file.dtype.str, file.offset, token, at],
            partial(_cut, tokens, token, at),
        )
        parts.append(FlatSequences(tokens, found))
        is_there |= len(found) > 2 or token in (*tokens[:1].tolist(), *tokens[-1:].tolist())
    if not is_there:  # a file of several may be the inside of one document
        where = files[0].path if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
        problem = f"token {token} occurs nowhere in {where}, read as {files[0].dtype}"
        fail(caller, problem, "check separator and dtype")
    return parts[0] if len(parts) == 1 else JoinedSequences(parts)


def _cut(tokens: NDArray[Any], separator: int, at: str) -> Int64:
    """Return the offsets of documents that are separated by a token: int64 `[n + 1]`."""
    limits = np.iinfo(tokens.dtype)
    found = [np.zeros(1, np.int64)]
    if limits.min <= separator <= limits.max:
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            block = np.flatnonzero(tokens[start : start + _BLOCK_TOKENS] == separator)
            found.append(block + (start + (at == "end")))
    if not len(tokens):
        return found[0]
    offsets: Int64 = np.concatenate([*found, np.full(1, len(tokens), np.int64)])
    # Of documents without tokens there are none: two separators in a row are a document of one.
    return offsets[int(offsets[1] == 0) : len(offsets) - int(offsets[-2] == len(tokens))]


def _flat_file(caller: str, path: Path, dtype: DTypeLike | None) -> _Flat:
    """Find out what is in a file, by its header or by `dtype`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LLMC_HEADER)
    magic, version, tokens = struct.unpack("<3i", start[:12]) if len(start) >= 12 else (0, 0, 0)
    held = _LLMC_TOKENS.get((magic, version))
    # Tokens that happen to look like a header do not also give the size of their file.
    if held is not None and size == _LLMC_HEADER + tokens * np.dtype(held).itemsize:
        if dtype is not None and np.dtype(dtype) != np.dtype(held):
            problem = f"{path} is a file of llm.c with {np.dtype(held)}, not {np.dtype(dtype)}"
            fail(caller, problem, "leave dtype out")
        return _Flat(path, np.dtype(held), _LLMC_HEADER, tokens, "start")
    if dtype is None:
        problem = f"{path} has no header of llm.c that says what its tokens are"
        hint = "pass dtype=np.uint16 or whatever they were written as"
        if held is not None:
            problem = f"{path} has {size} bytes, but its header says {tokens} tokens of {held[1:]}"
            hint = "it may be cut short: write it again"
        elif magic == _LLMC_EVAL:
            problem = f"{path} is an evaluation file of llm.c, which holds no plain tokens"
            hint = "open files of magic number 20240520 or 20240801"
        fail(caller, problem, hint)
    kind = np.dtype(dtype)
    if kind.kind not in "iu":
        fail(caller, f"dtype = {kind} is no integer dtype", "tokens are integers")
    if size % kind.itemsize:
        problem = f"{path} has {size} bytes, which is no multiple of {kind.itemsize}"
        fail(caller, problem, f"its tokens are no {kind}, or it is cut short")
    return _Flat(path, kind, 0, size // kind.itemsize, "end")


def _map_tokens(file: _Flat) -> NDArray[Any]:
    if not file.tokens:  # an empty file range cannot be mapped
        return np.zeros(0, file.dtype)
    return np.memmap(file.path, file.dtype, "r", file.offset, (file.tokens,))


def _map_npy(caller: str, path: Path, hint: str = "pass a .npy file of integers") -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        fail(caller, f"{path} cannot be read ({error})", hint)
    return check_integers(caller, str(path), array)


def list_files(caller: str, source: Source) -> list[Path]:
    """Return the local files that a path, a glob or a list of these stands for.

    Raises:
        SeqpackError: there is none, or one is missing or a directory.
    """
    several = isinstance(source, Sequence) and not isinstance(source, str)
    sources: list[Any] = list(source) if several else [source]  # type: ignore[arg-type]
    found: list[Path] = []
    for each in sources:
        path = local_path(caller, "path", each)
        if path.exists() or not glob.has_magic(str(path)):
            found.append(path)
            continue
        found += map(Path, sorted(glob.glob(str(path), recursive=True)))
    if not found:
        fail(caller, f"no file at {source}", "check the path")
    for path in found:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            fail(caller, f"{path} {what}", "pass a file, a glob or a list of files")
    return found


def _kept_offsets(
    caller: str,
    work_dir: str | os.PathLike[str] | None,
    path: Path,
    facts: list[Any],
    make: Callable[[], Int64],
) -> NDArray[Any]:
    """Map the offsets that were found before for this file and facts, or find and keep them."""
    name = f"where the sequences of {path} begin has to be found first"
    hint = "pass work_dir=..., where the offsets are kept"
    if work_dir is None:
        fail(caller, name, hint)

    def write(target: Path) -> None:
        write_array(target, make(), INT64)

    kept = kept_file(caller, work_dir, path, "offsets", ".npy", facts, write)
    return _map_npy(caller, kept, "delete it, so that it is made again")


def kept_file(
    caller: str,
    work_dir: str | os.PathLike[str],
    path: Path,
    kind: str,
    suffix: str,
    facts: Any,
    write: Callable[[Path], object],
) -> Path:
    """Return what was made of an input file before, or make it: once, by one process.

    It is made again when the input file, by its path, size and time of change, or the facts differ.

    Args:
        caller: the public function that an error shall name.
        work_dir: where it is kept.  It need not exist.
        path: the input file.
        kind: what its name shall begin with.
        suffix: and end with.
        facts: what else it depends on, as JSON has it.
        write: makes the file, whole or not at all.
    """
    work, state = local_path(caller, "work_dir", work_dir), path.stat()
    facts = [_VERSION, facts, os.path.realpath(path), state.st_size, state.st_mtime_ns]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    target = work / f"{kind}-{digest}{suffix}"
    with making(caller, work):
        work.mkdir(parents=True, exist_ok=True)
        with file_lock(caller, work / f".{target.name}.lock"):
            if not target.exists():
                write(target)
                now = path.stat()
                if (now.st_size, now.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
                    target.unlink()
                    fail(caller, f"{path} was changed while it was read", "open it again")
    return target


# --- Megatron -----------------------------------------------------------------------------------


def open_megatron(
    prefix: str | os.PathLike[str],
    *,
    documents: bool = False,
    work_dir: str | os.PathLike[str],
) -> FlatSequences:
    """Memory-map an indexed data set of Megatron-LM: `PREFIX.bin` and `PREFIX.idx`.

    The `.idx` holds the header `MMIDIDX`, version 1, the code of the dtype, and the size of each
    sequence, where it begins, and which sequences each document has.

    Time: O(sequences), once; the offsets are then kept in `work_dir`.

    Args:
        prefix: the path of both files without their suffix, or that of either of them.
        documents: True to take the sequences of a document (its sentences, if it was split) as one.
        work_dir: where the offsets are kept.  It need not exist.

    Returns:
        The sequences, or the documents, of the dtype that they were written as.

    Raises:
        SeqpackError: a file is missing, damaged, or does not fit the other.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.array([7, 8, 9], np.uint16).tofile(f"{folder}/x.bin")
        ...     header = b"MMIDIDX" + bytes(2) + np.uint64(1).tobytes() + bytes([8])
        ...     index = [np.array([2, 2]), np.array([2, 1], "i4"), np.array([0, 4, 0, 2])]
        ...     with open(f"{folder}/x.idx", "wb") as file:
        ...         _ = file.write(header + b"".join(array.tobytes() for array in index))
        ...     sequences = open_megatron(f"{folder}/x", work_dir=folder)
        ...     [tokens.tolist() for tokens in sequences]
        [[7, 8], [9]]
    """
    caller = "open_megatron"
    path = local_path(caller, "prefix", prefix)
    base = str(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
    index, data = list_files(caller, [f"{base}.idx", f"{base}.bin"])
    with index.open("rb") as file:
        start = file.read(_MEGATRON_HEADER.size)
    if len(start) < _MEGATRON_HEADER.size or not start.startswith(_MEGATRON_MAGIC):
        old = " (it is of the old format TNTIDX)" if start.startswith(b"TNTIDX") else ""
        problem = f"{index} does not begin with MMIDIDX{old}"
        fail(caller, problem, "pass what Megatron's preprocess_data wrote")
    _, version, code, sequences, stops = _MEGATRON_HEADER.unpack(start)
    held = _MEGATRON_DTYPES.get(code)
    if version != 1 or held is None:
        fail(caller, f"{index} has version {version} and dtype {code}", "version 1 is read")
    kind = np.dtype(held)
    if kind.kind not in "iu":
        fail(caller, f"{data} holds {kind}", "tokens are integers")
    size, needed = index.stat().st_size, len(start) + 12 * sequences + 8 * stops
    if size not in (needed, needed + sequences):  # a byte per sequence, its mode, may follow
        problem = f"{index} has {size} bytes, but {sequences} sequences take {needed}"
        fail(caller, problem, "it may be cut short: write it again")
    if (stored := data.stat().st_size) % kind.itemsize:
        fail(caller, f"{data} has {stored} bytes of {kind}", "it may be cut short: write it again")

    def find() -> Int64:
        return _megatron_offsets(caller, index, sequences, stops, kind.itemsize, documents)

    offsets = _kept_offsets(caller, work_dir, index, [bool(documents)], find)
    tokens = stored // kind.itemsize
    if (planned := int(offsets[-1])) != tokens:
        problem = f"{data} has {tokens} tokens, but by its index {planned}"
        fail(caller, problem, "pass the .bin and .idx that were written together")
    return FlatSequences(_map_tokens(_Flat(data, kind, 0, tokens, "end")), offsets)


def _megatron_offsets(
    caller: str, index: Path, sequences: int, stops: int, itemsize: int, documents: bool
) -> Int64:
    """Return where each sequence or document begins, in tokens, from the arrays of the index."""
    with index.open("rb") as file:
        file.seek(_MEGATRON_HEADER.size)
        sizes = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        ends = np.fromfile(file, "<i8", stops)
    offsets: Int64 = offsets_of(sizes)
    if (sizes < 0).any() or not np.array_equal(pointers, offsets[:-1] * itemsize):
        problem = f"the sequences of {index} do not follow one another"
        fail(caller, problem, "it may be damaged: write it again")
    if not documents:
        return offsets
    if not stops or ends[0] != 0 or ends[-1] != sequences or (ends[1:] < ends[:-1]).any():
        problem = f"the documents of {index} do not cover its {sequences} sequences"
        fail(caller, problem, "it may be damaged, or open it with documents=False")
    starts: Int64 = offsets[ends]
    return starts
