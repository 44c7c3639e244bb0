"""Writes a token store (see `token_store`) block by block, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import fail
from seqpack_jax.feeding.formats import TokenBlock
from seqpack_jax.feeding.storage import npy_header
from seqpack_jax.feeding.workers import making

__all__ = ["write_store"]

_COPY_TOKENS = 1 << 22  # at once, when a store is widened


class _NpyStream:
    """A `.npy` file of a 1-D array that grows, block by block."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.rows = np.dtype(dtype).newbyteorder("<"), 0
        self.file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        self.file.write(npy_header(self.dtype.str, (self.rows,)))

    def append(self, array: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(array, self.dtype).data)
        self.rows += len(array)

    def close(self) -> None:
        if not self.file.closed:
            self.file.seek(0)  # all headers are of one size
            self._write_header()
            self.file.close()


class _StoreWriter:
    """Writes the arrays of a store, block by block."""

    def __init__(self, caller: str, directory: Path, widen: bool) -> None:
        self.caller, self.directory, self.widen = caller, directory, widen
        self.streams: dict[str, _NpyStream] = {}
        self.rows, self.end, self.last_id = 0, 0, 0
        self.rising = self.numbered = True  # the ids: as they came, and are row numbers
        self._append("offsets", np.zeros(1, np.int64), np.int64)

    def _append(self, name: str, array: NDArray[Any], dtype: Any) -> None:
        if name not in self.streams:
            self.streams[name] = _NpyStream(self.directory / f"{name}.npy", dtype)
        self.streams[name].append(array)

    def add(self, block: TokenBlock) -> None:
        if len(block.tokens):
            known, dtype = self.streams.get("tokens"), block.tokens.dtype
            if known and self.widen:
                dtype = np.promote_types(known.dtype, dtype)
            if dtype.itemsize >= 4:
                dtype = np.dtype(np.int32)
            if known and dtype != known.dtype and self.widen:
                self._widen_tokens(dtype)
            elif known:
                dtype = known.dtype
            self._check_tokens(block, dtype)
            self._append("tokens", block.tokens, dtype)
        if self.rows and ("ids" in self.streams) != (block.ids is not None):
            problem = f"ids come with some blocks, but not with all (row {self.rows})"
            fail(self.caller, problem, "pass ids with every block, or with none")
        ends = self.end + np.cumsum(block.sizes)
        self._append("offsets", ends, np.int64)
        if block.ids is not None and len(block.ids):
            self._append("ids", block.ids, np.int64)
            first = self.rows == 0 or int(block.ids[0]) > self.last_id
            self.rising &= first and bool((block.ids[1:] > block.ids[:-1]).all())
            rows = np.arange(self.rows, self.rows + len(ends))
            self.numbered &= bool((block.ids == rows).all())
            self.last_id = int(block.ids[-1])
        self.rows += len(ends)
        self.end = int(ends[-1]) if len(ends) else self.end

    def _widen_tokens(self, dtype: np.dtype[Any]) -> None:
        """Copy what there is of the tokens to a wider dtype: at most twice."""
        self.streams.pop("tokens").close()
        narrow = self.directory / "narrow.npy"
        os.replace(self.directory / "tokens.npy", narrow)
        tokens = np.load(narrow, mmap_mode="r")
        for start in range(0, len(tokens), _COPY_TOKENS):
            self._append("tokens", tokens[start : start + _COPY_TOKENS], dtype)
        narrow.unlink()

    def _check_tokens(self, block: TokenBlock, dtype: np.dtype[Any]) -> None:
        """Refuse tokens beyond the dtype of the store."""
        tokens, limits = block.tokens, np.iinfo(dtype)
        if np.can_cast(tokens.dtype, dtype):
            return
        for at in (int(tokens.argmin()), int(tokens.argmax())):
            if not limits.min <= int(tokens[at]) <= limits.max:
                row = self.rows + int(np.searchsorted(np.cumsum(block.sizes), at, side="right"))
                problem = f"row {row} holds the token {tokens[at]}, beyond {dtype.name}"
                hint = "tokens fit into int32, and all blocks into the dtype of the first"
                fail(self.caller, problem, hint)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()

    def finish(self) -> None:
        """Complete the store: sort its ids, unless they are row numbers."""
        if "tokens" not in self.streams:
            self._append("tokens", np.zeros(0, np.int32), np.int32)
        self.close()
        if "ids" not in self.streams:
            return
        path = self.directory / "ids.npy"
        if self.numbered:
            path.unlink()
        elif not self.rising:
            ids = np.load(path)
            order = np.argsort(ids, kind="stable")
            ids = ids[order]
            again = np.flatnonzero(ids[1:] == ids[:-1])
            if again.size:
                k = int(again[0])
                problem = f"id {ids[k]} comes twice, in rows {order[k]} and {order[k + 1]}"
                fail(
                    self.caller,
                    f"{problem} ({again.size} ids repeat an earlier one)",
                    "name a column of distinct ids, or none for row numbers",
                )
            np.save(path, ids)
            np.save(path.with_name("rows.npy"), order.astype(np.min_scalar_type(len(order))))


def write_store(
    caller: str, blocks: Iterable[TokenBlock], store: Path, widen: bool = False
) -> None:
    """Write a store beside its place, and move it there.

    With `widen`, the tokens are of the widest dtype of the blocks, not of that of the first.
    """
    partial = store.with_name(f".{store.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    with making(caller, store):
        partial.mkdir()
    try:
        with contextlib.closing(_StoreWriter(caller, partial, widen)) as writer:
            for block in blocks:
                writer.add(block)
            writer.finish()
        with making(caller, store):
            os.rename(partial, store)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
