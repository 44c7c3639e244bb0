"""Prepared directories on other hosts: copied once to this one, checked on the way."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from seqpack_jax.errors import fail
from seqpack_jax.feeding.formats import filesystem, is_local
from seqpack_jax.feeding.manifest import MANIFEST, parse_manifest, read_manifest
from seqpack_jax.feeding.progress import progress_bar
from seqpack_jax.feeding.seed_directory import is_seed_manifest
from seqpack_jax.feeding.storage import FileEntry

__all__ = ["local_copy"]

_CHUNK = 1 << 23  # bytes that are copied at once


def local_copy(
    caller: str, path: str | os.PathLike[str], cache: str | os.PathLike[str] | None
) -> Path:
    """Return a local path as it is, and for a URL that of its copy in the cache.

    The first process that asks for a URL copies it; the others on this host wait.  Copies are found
    by the digest in the manifest, which is all that is read of a URL that was copied before.  A
    copy that lacks a file, or has one of another size, is made anew.

    Raises:
        SeqpackError: `path` is none, or a file cannot be read or is not what the manifest says.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        fail(caller, f"path is a {type(path).__name__}", "pass a string or a pathlib.Path")
    path = os.fspath(path)
    if "\0" in path:
        fail(caller, f"path = {path!r} holds a null character", "pass the name of a directory")
    if "://" not in path and "::" not in path:
        return Path(os.path.expanduser(path))
    fs, root = filesystem(caller, path)
    if is_local(fs):
        return Path(root)
    try:
        with fs.open(f"{root}/{MANIFEST}", "rb") as file:
            text = file.read().decode()
    except Exception as error:  # whatever the file system raises
        problem = f"{path}/{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        fail(caller, problem, "pass a directory that prepare() wrote")
    if is_seed_manifest(text):
        fail(caller, f"{path} is a directory of PyPI seqpack", "copy it here, and load the copy")
    manifest = read_manifest(caller, text, f"{path}/{MANIFEST}")
    files = parse_manifest(caller, manifest, f"{path}/{MANIFEST}")[2]
    folder = Path(cache or os.environ.get("SEQPACK_CACHE") or Path.home() / ".cache/seqpack_jax")
    copy = folder / str(manifest["digest"])
    if _is_whole(copy, files, text):
        return copy
    try:
        from filelock import FileLock
    except ImportError:
        fail(caller, "filelock is not installed", "pip install 'seqpack_jax[prepare]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):
            if not _is_whole(copy, files, text):
                shutil.rmtree(copy, ignore_errors=True)
                part = _copy(caller, fs, root, files, copy)
                (part / MANIFEST).write_bytes(text.encode())
                part.rename(copy)
    except OSError as error:
        hint = "pass another cache, or set SEQPACK_CACHE"
        fail(caller, f"{folder} cannot be written ({error})", hint)
    return copy


def _is_whole(copy: Path, files: dict[str, FileEntry], manifest: str) -> bool:
    """Return whether a copy has the files that it should have, in their sizes."""
    sizes = {name: entry.bytes for name, entry in files.items()}
    sizes[MANIFEST] = len(manifest.encode())
    try:
        found = [path for path in copy.rglob("*") if not path.is_dir()]
        return sizes == {path.relative_to(copy).as_posix(): path.stat().st_size for path in found}
    except OSError:  # another process is just making it anew
        return False


def _copy(caller: str, fs: Any, root: str, files: dict[str, FileEntry], copy: Path) -> Path:
    """Copy all files but the manifest to a directory beside `copy`, and return it."""
    part = copy.with_name(f"{copy.name}.partial")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    (part / "pools").mkdir(parents=True)
    total = sum(entry.bytes for entry in files.values())
    with progress_bar(f"bytes of {root}", total, None) as advance:
        for name, entry in files.items():
            digest, size = hashlib.sha256(), 0
            try:
                with fs.open(f"{root}/{name}", "rb") as source, (part / name).open("wb") as target:
                    while chunk := source.read(_CHUNK):
                        target.write(chunk)
                        digest.update(chunk)
                        size += len(chunk)
                        advance(len(chunk))
            except Exception as error:
                problem = f"{root}/{name} cannot be copied ({type(error).__name__}: {error})"
                fail(caller, problem, "look whether it is there, and for room here")
            if FileEntry(size, digest.hexdigest()) != entry:
                fail(caller, f"{root}/{name} is not what the manifest says", "write it there again")
    return part
