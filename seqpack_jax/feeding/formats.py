"""Input files: how they are opened, and what `.npy` and FASTA files hold.

Paths are whatever fsspec opens.  Everything is read in blocks of bounded memory, from any row on,
and what a library raises on a damaged file becomes an error that names the file.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import MAX_LENGTH, SeqpackError, fail

__all__ = [
    "BLOCK_ROWS",
    "BLOCK_TOKENS",
    "Columns",
    "InputFile",
    "Part",
    "Place",
    "TokenBlock",
    "as_int32_or_int64",
    "fail_changed",
    "fasta_tokens",
    "filesystem",
    "glob_regex",
    "is_local",
    "kind_of",
    "naming",
    "npy_lengths",
    "npy_rows",
    "opened",
    "write_fasta_lengths",
]

BLOCK_ROWS = 1 << 18  # rows read at once: 1 MB of int32 stays in the cache of a core
BLOCK_TOKENS = 1 << 22  # tokens read at once, as far as the longest sequences allow
_DAMAGED = "it may be damaged or cut short: write it again, or leave it out"
_SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "npy": (".npy",),
    "fasta": (".fasta", ".fa", ".faa", ".fna", ".fas"),
}
_FASTA_BYTES = 1 << 20  # read at once
_OTHER = "\x1a"  # stands for bytes that are no ASCII
_ASCII = bytes(range(128)) + _OTHER.encode() * 128
_PARSING = threading.Lock()  # Python 3.11 may fail where two threads parse literals at once
_MARKS = {ord("*"): None, ord("-"): None}

Array = NDArray[Any]


class Columns(NamedTuple):
    """Which columns of parquet files are read: one of `length` and `tokens`, and perhaps `id`.

    `.npy` and FASTA files have no columns: `Columns()`.

    Attributes:
        length: a column of integers, the length of each sequence in tokens.
        tokens: a column of lists, the tokens of each sequence; their sizes are its lengths.
        id: a column of integers, the id of each sequence; None for the number of its row.

    Example:
        >>> Columns(length="num_tokens")
        Columns(length='num_tokens', tokens=None, id=None)
    """

    length: str | None = None
    tokens: str | None = None
    id: str | None = None


class InputFile(NamedTuple):
    """One file of the input.

    Attributes:
        url: the path or URL that led to it, by which fsspec finds its file system anywhere.
        path: where it is inside of that file system.
        name: its path below the root of the input, the same wherever that lies.
    """

    url: str
    path: str
    name: str


class Part(NamedTuple):
    """Some consecutive rows of one input file: `[first_row, first_row + rows)`.

    Attributes:
        file: the input file.
        first_row: where the rows begin in it.
        rows: how many there are.
        lengths: for FASTA, the local `.npy` of the lengths of all records.
    """

    file: InputFile
    first_row: int
    rows: int
    lengths: str | None = None

    @property
    def name(self) -> str:
        """The name of the input file."""
        return self.file.name


class TokenBlock(NamedTuple):
    """The tokens of some consecutive sequences.

    Attributes:
        tokens: integers `[sum(sizes)]`, of the dtype of the file; uint8 letters for FASTA.
        sizes: int64 `[k]`, how many of them each sequence has.
        ids: int64 `[k]`, or None when sequences are numbered by row.
    """

    tokens: Array
    sizes: NDArray[np.int64]
    ids: NDArray[np.int64] | None


class Place(NamedTuple):
    """Where a block of rows comes from, to name one of them in an error."""

    caller: str
    name: str  # of the file
    row: int  # the first of the block, in the file
    number: int  # the same, in the whole input

    def fail(self, index: int, problem: str, hint: str) -> NoReturn:
        """Raise the error on row `index` of the block."""
        row = f"row {self.number + index} (row {self.row + index} of {self.name})"
        fail(self.caller, f"{problem} in {row}", hint)


def kind_of(path: str) -> str | None:
    """Return the kind of a file by its suffix: `"parquet"`, `"npy"`, `"fasta"` or None.

    Example:
        >>> kind_of("a/b.FASTA.gz"), kind_of("b.csv")
        ('fasta', None)
    """
    lower = path.lower()
    for kind, suffixes in _SUFFIXES.items():
        if lower.endswith(suffixes):
            return kind
    return "fasta" if lower.removesuffix(".gz").endswith(_SUFFIXES["fasta"]) else None


def filesystem(caller: str, url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path inside of it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        fail(caller, "fsspec is not installed", "pip install 'seqpack_jax[prepare]'")
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except Exception as error:
        hint = "install what it names" if isinstance(error, ImportError) else "check the path"
        fail(caller, f"{url} cannot be opened: {_first_line(error)}", hint)
    return found


def is_local(fs: Any) -> bool:
    """Return whether paths of an fsspec file system are those of this machine."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Return the expression that whole paths match where they match a glob of fsspec."""
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern))


def _first_line(error: Exception) -> str:
    text = (str(error) or "no more is known").splitlines()[0].rstrip(". ")
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def naming(caller: str, name: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into the error of `caller` on that file."""
    try:
        yield
    except (SeqpackError, MemoryError):
        raise
    except Exception as error:
        fail(caller, f"{name} cannot be read: {_first_line(error)}", _DAMAGED)


@contextlib.contextmanager
def opened(caller: str, file: InputFile) -> Iterator[Any]:
    """Open a file for reading, as a seekable binary stream."""
    with naming(caller, file.name):
        fs, path = filesystem(caller, file.url)[0], file.path
        with fs.open(path, "rb") as stream:
            yield stream


def fail_changed(caller: str, part: Part, rows: int) -> NoReturn:
    """Raise the error on a file that has fewer rows than when it was counted."""
    fail(
        caller,
        f"{part.name} has {rows} rows, but it had {part.first_row + part.rows} or more",
        "it was changed while it was read: start again",
    )


def as_int32_or_int64(place: Place, what: str, values: Array) -> Array:
    """Return integers of any dtype as int32, or as int64 if they need it.

    Raises:
        SeqpackError: a value is over int64.
    """
    if values.dtype.kind == "u" and int(values.max(initial=0)) >= 2**63:
        index = int(values.argmax())
        place.fail(index, f"{what} is {values[index]}, beyond int64,", "lengths and ids are int64")
    dtype = np.int32 if np.can_cast(values.dtype, np.int32) else np.int64
    return values.astype(dtype, copy=False)


def npy_rows(caller: str, file: InputFile) -> int:
    """Return how many integers a `.npy` file holds, from its header.

    Raises:
        SeqpackError: it is not a 1-D array of integers, or not of the size that its header says.
    """
    with opened(caller, file) as stream:
        return _read_npy_header(caller, file.name, stream)[1]


def npy_lengths(caller: str, part: Part, number: int) -> Iterator[Array]:
    """Read the lengths of a part of a `.npy` file, int32 or int64 `[k]`, block by block.

    By reads of byte ranges, which need no more memory than a block, unlike the pages of a map.

    Args:
        caller: the public function that an error shall name.
        part: rows of a `.npy` file.
        number: the row of its first row in the whole input.

    Raises:
        SeqpackError: the file is damaged or was changed, or a length is over int64.
    """
    stop = part.first_row + part.rows
    with opened(caller, part.file) as file:
        dtype, rows = _read_npy_header(caller, part.name, file)
        if rows < stop:
            fail_changed(caller, part, rows)
        file.seek(part.first_row * dtype.itemsize, os.SEEK_CUR)
        for row in range(part.first_row, stop, BLOCK_ROWS):
            size = min(BLOCK_ROWS, stop - row)
            values = np.frombuffer(file.read(size * dtype.itemsize), dtype, size)
            place = Place(caller, part.name, row, number + row - part.first_row)
            yield as_int32_or_int64(place, "the length", values)


def _read_npy_header(caller: str, name: str, file: Any) -> tuple[np.dtype[Any], int]:
    """Return dtype and rows of an open `.npy`, and leave it at its data; never unpickles."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        fail(caller, f"{name} has version {version} of .npy", "write it with numpy.save")
    size = file.read(2 if version == (1, 0) else 4)
    header = io.BytesIO(size + file.read(int.from_bytes(size, "little")))
    with _PARSING:
        shape, _, dtype = readers[version](header)
    if len(shape) != 1 or dtype.kind not in "iu":
        fail(
            caller,
            f"{name} holds an array of shape {shape} and dtype {dtype}, not [n] integers",
            "save the lengths as one 1-D array of integers",
        )
    begin = file.tell()
    size = file.seek(0, os.SEEK_END) - begin
    if size != shape[0] * dtype.itemsize:
        expected = f"{shape[0]} values of {dtype.itemsize} bytes"
        fail(caller, f"{name} has {size} bytes of data, but its header says {expected}", _DAMAGED)
    file.seek(begin)
    return dtype, shape[0]


def write_fasta_lengths(
    caller: str, file: InputFile, output: str, advance: Callable[[int], None] = lambda bytes_: None
) -> None:
    """Write the residues per record of a FASTA file to the `.npy` file `output`, as int32 `[n]`.

    Residues are letters, `*` and `-`.  White space in their lines does not count.  The file appears
    when it is complete.  `advance` is told how many bytes of the file were read.

    Time: O(size of the file).  Memory: one record.

    Raises:
        SeqpackError: the file is damaged, or a record has no residues, too many, or other letters.
    """
    temporary = f"{output}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as stream:
            rows = 0
            _write_npy_header(stream, rows)
            sizes = map(len, _fasta_records(caller, file, advance))
            while block := np.array(list(islice(sizes, BLOCK_ROWS)), np.int32).tobytes():
                stream.write(block)
                rows += len(block) // 4
            stream.seek(0)
            _write_npy_header(stream, rows)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, output)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_npy_header(file: Any, rows: int) -> None:
    """Write a header whose size does not depend on `rows`: NumPy leaves room for the digits."""
    header = {"descr": "<i4", "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)


def fasta_tokens(caller: str, part: Part) -> Iterator[TokenBlock]:
    """Read the residues of a part of a FASTA file as uint8 codes of letters, block by block.

    Time: O(size of the file), for what is before the part has to be read, too.

    Raises:
        SeqpackError: the file is damaged, or a record has no residues or too many.
    """
    held: list[str] = []
    size = 0
    stop = part.first_row + part.rows
    for residues in islice(_fasta_records(caller, part.file), part.first_row, stop):
        if held and size + len(residues) > BLOCK_TOKENS:
            yield _letters(held)
            held, size = [], 0
        held.append(residues)
        size += len(residues)
    if held:
        yield _letters(held)


def _letters(records: list[str]) -> TokenBlock:
    tokens = np.frombuffer("".join(records).encode("ascii"), np.uint8)
    return TokenBlock(tokens, np.fromiter(map(len, records), np.int64, len(records)), None)


class _Filtered(io.RawIOBase):
    """A binary stream whose chunks pass through a function, which keeps their sizes."""

    def __init__(self, stream: Any, change: Callable[[bytes], bytes]) -> None:
        self.stream, self.change = stream, change

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.change(self.stream.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)


def _filtered(stream: Any, change: Callable[[bytes], bytes]) -> Any:
    return io.BufferedReader(_Filtered(stream, change), _FASTA_BYTES)


def _fasta_records(
    caller: str, file: InputFile, advance: Callable[[int], None] = lambda bytes_: None
) -> Iterator[str]:
    """Read the residues of each record, without line breaks and white space."""
    try:
        from dnaio import FastaReader
    except ImportError:
        fail(caller, "dnaio is not installed", "pip install 'seqpack_jax[fasta]'")

    def told(data: bytes) -> bytes:
        advance(len(data))
        return data

    with contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(opened(caller, file))
        stream = _filtered(stream, told)
        if file.path.lower().endswith(".gz"):
            stream = stack.enter_context(gzip.open(stream))
        # Titles may be in any encoding; what is no ASCII in residues is refused.
        stream = _filtered(stream, lambda data: data.translate(_ASCII))
        records = FastaReader(stream, sequence_class=lambda title, residues, _: (title, residues))
        for row, (title, residues) in enumerate(records):
            if not residues.isalpha():
                residues = "".join(residues.split())
            if not (residues.translate(_MARKS).isalpha() and len(residues) <= MAX_LENGTH):
                if wrong := _problem_of(residues):
                    record = f"record {row} of {file.name}, {title[:60].replace(_OTHER, '?')!r},"
                    fail(caller, f"{record} {wrong}", "leave it out of the file, or mend it")
            yield residues


def _problem_of(residues: str) -> str | None:
    """Say what is wrong with a record, if anything."""
    if not residues:
        return "has no residues"
    if len(residues) > MAX_LENGTH:
        return f"has {len(residues)} residues, but the limit is {MAX_LENGTH}"
    if _OTHER in residues:
        return "has letters outside of ASCII"
    wrong = re.sub("[A-Za-z*-]", "", residues)
    return f"has {wrong[0]!r} among its residues, which are letters, * and -" if wrong else None
