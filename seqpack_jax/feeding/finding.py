"""Finding input files: what paths, directories, globs and URLs stand for, each file once."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any, NoReturn, TypeAlias

from seqpack_jax.errors import SeqpackError, fail
from seqpack_jax.feeding.formats import InputFile, filesystem, glob_regex, is_local, kind_of

__all__ = ["Source", "find_files", "searched_by"]

_THREADS = 32  # that list directories: most of the time they wait
_KINDS = "parquet (.parquet, .pq), .npy or FASTA (.fasta, .fa, .faa, .fna, .fas, each also .gz)"
_OURS = ("counts.npy", "pools/00000.ids.npy")  # what a glob may find in a prepared directory

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_files(caller: str, source: Source) -> list[InputFile]:
    """Return the files of the input by name, all of one kind.

    Local paths are normalised, and a file that several paths of the source lead to, be it over
    links, is read once.  Links inside a directory are names of their own: those who keep data sets
    as links to blobs count on each.

    Raises:
        SeqpackError: there is none, a directory cannot be listed, or they are of several kinds.
    """
    urls = _urls(caller, source)
    paths_of: dict[str, list[str]] = {}  # by the file behind them
    url_of: dict[str, str] = {}
    roots, others = [], 0
    first = None
    for url in urls:
        fs, path = filesystem(caller, url)
        first = first or fs
        if fs != first:
            problem = f"{urls[0]} and {url} are on different file systems"
            fail(caller, problem, "prepare them one by one, or copy one of them")
        root, paths = _expand(caller, url, fs, path)
        known = sorted({path for path in paths if kind_of(path) is not None})
        roots.append(root)
        others += len(set(paths)) - len(known)
        behind = defaultdict(list)
        for path in known:
            url_of.setdefault(path, url)
            behind[os.path.realpath(path) if is_local(fs) and len(urls) > 1 else path].append(path)
        for file, names in behind.items():
            # Not the first, so that the order of the source does not matter.
            paths_of[file] = min(paths_of.get(file, names), names, key=lambda n: (-len(n), n))
    if not paths_of:
        hint = f"input files are {_KINDS}"
        fail(caller, f"no input file in {source} ({others} files of other kinds)", hint)
    root = posixpath.commonpath(roots)
    found = [path for names in paths_of.values() for path in names]
    files = [InputFile(url_of[path], path, path[len(root) :].lstrip("/")) for path in found]
    files.sort(key=lambda file: file.name)
    other = [file for file in files if kind_of(file.path) != kind_of(files[0].path)]
    if other:
        problem = f"{files[0].name} and {other[0].name} are of different kinds"
        fail(caller, problem, "pass files of one kind, for example as DIR/*.parquet")
    return files


def searched_by(caller: str, source: Source, target: str) -> str | None:
    """Return the directory or glob of a source that would find files in a local directory, if any.

    Args:
        caller: the public function that an error shall name.
        source: as for `find_files`.
        target: a real path; it need not exist.
    """
    for url in _urls(caller, source):
        fs, path = filesystem(caller, url)
        if not is_local(fs):
            continue
        path = _normal(path)
        glob = not fs.isdir(path) and _is_pattern(path)
        root = _root(path) if glob else path
        real = os.path.realpath(root)
        if fs.isfile(path) or posixpath.commonpath([real, target]) != real:
            continue
        below = target[len(real) :].strip("/")
        if not glob:
            if not _hidden(below):
                return url
        elif _spelled(path, root) or not _hidden(below):
            names = below.split("/")
            found = ["/".join(names[:k]) for k in range(1, len(names) + 1)]
            found += [f"{below}/{name}" for name in _OURS]
            if any(glob_regex(path).match(f"{root.rstrip('/')}/{name}") for name in found):
                return url
    return None


def _urls(caller: str, source: Source) -> list[str]:
    given: Sequence[Any] = source if isinstance(source, list | tuple) else [source]
    for each in given:
        if not isinstance(each, str | os.PathLike):
            fail(caller, f"{each!r} is not a path", "pass a path, a glob, a URL, or a list of them")
        if not os.fspath(each):
            fail(caller, f"input = {each!r} is not a path", "pass a path, a glob or a URL")
        if "\0" in str(each):
            fail(caller, f"{each!r} is no path: it has a zero byte", "check what makes the path")
    return [os.fspath(each) for each in given]


def _expand(caller: str, url: str, fs: Any, inner: str) -> tuple[str, list[str]]:
    """Return the directory that names are relative to, and the files of one path or glob."""
    try:
        if is_local(fs):
            inner = _normal(inner)
        fs.invalidate_cache()  # a listing that fsspec remembers may be old
        if fs.isfile(inner):
            if kind_of(inner) is None:
                fail(caller, f"the kind of {url} is unknown", f"input files are {_KINDS}")
            return inner.rpartition("/")[0], [inner]
        if fs.isdir(inner):
            return inner, _files_below(caller, fs, inner)
        if not _is_pattern(inner):
            fail(caller, f"{url} does not exist", "check the path and your rights to it")
        return _expand_glob(caller, fs, inner)
    except SeqpackError:
        raise
    except Exception as error:  # each fsspec file system has its own
        _fail_listing(caller, url, error)


def _expand_glob(caller: str, fs: Any, inner: str) -> tuple[str, list[str]]:
    """Like `fs.glob`, which passes over what it cannot list, and lists what cannot match."""
    root = _root(inner)
    if not fs.isdir(root):
        return root, []
    names = inner[len(root) :].strip("/").split("/")
    any_depth = "**" in names
    patterns = [glob_regex(name) for name in takewhile(lambda name: name != "**", names)]
    spelled = _spelled(inner, root)

    def may_match(path: str) -> bool:
        parts = path[len(root) :].strip("/").split("/")
        deep_enough = any_depth or len(parts) < len(names)
        same = all(p.match(part) for p, part in zip(patterns, parts, strict=False))
        return deep_enough and same and (spelled or not _hidden(parts[-1]))

    files, folders = _walk(caller, fs, root, may_match)
    whole = glob_regex(inner)
    found = [path for path in files if whole.match(path)]
    for folder in folders:
        if whole.match(folder) and (spelled or not _hidden(folder[len(root) :])):
            found += _files_below(caller, fs, folder)
    return root, found if spelled else _visible(root, found)


def _files_below(caller: str, fs: Any, root: str) -> list[str]:
    visible = _walk(caller, fs, root, lambda path: not _hidden(path.rpartition("/")[2]))[0]
    return _visible(root, visible)


def _walk(
    caller: str, fs: Any, root: str, enter: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """List the files and the directories below `root`, level by level, many at a time.

    Links to directories are followed, but not in circles.  Not by `fs.find`, which passes over the
    directories that it cannot list.

    Raises:
        SeqpackError: a directory that was entered cannot be listed.
    """

    def listed(folder: tuple[str, tuple[str, ...]]) -> list[dict[str, Any]]:
        try:
            infos: list[dict[str, Any]] = fs.ls(folder[0], detail=True)
        except Exception as error:
            _fail_listing(caller, folder[0] or "/", error)
        return infos

    files: list[str] = []
    folders: list[str] = []
    level: list[tuple[str, tuple[str, ...]]] = [(root, (os.path.realpath(root),))]
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:
            below: list[tuple[str, tuple[str, ...]]] = []
            for (folder, above), infos in zip(level, pool.map(listed, level), strict=True):
                for info in infos:
                    path = info["name"].rstrip("/")
                    link = bool(info.get("islink")) and fs.isdir(path)
                    if path.strip("/") == folder.strip("/"):
                        continue  # object stores have files that stand for directories
                    if not (link or info["type"] == "directory"):
                        files.append(path)
                        continue
                    name = path.rpartition("/")[2]
                    real = os.path.realpath(path) if link else f"{above[-1].rstrip('/')}/{name}"
                    if real not in above:
                        folders.append(path)
                        if enter(path):
                            below.append((path, (*above, real)))
            level = below
    return files, folders


def _fail_listing(caller: str, path: str, error: Exception) -> NoReturn:
    problem = f"{path} cannot be listed: {error or type(error).__name__}"
    fail(caller, problem, "check your rights to it, or pass files or a glob that leave it out")


def _normal(path: str) -> str:
    """Return a local path without `.`, `..` and double slashes."""
    head, dots, rest = path.rpartition("/..")
    if dots and rest[:1] in ("", "/") and not _is_pattern(head):
        path = os.path.realpath(head + dots) + rest  # of a link, it is the parent of its target
    return "/" + posixpath.normpath(path).lstrip("/") if path[:1] == "/" else path


def _is_pattern(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def _root(pattern: str) -> str:
    root = "/".join(takewhile(lambda name: not _is_pattern(name), pattern.split("/")))
    return root or ("/" if pattern[:1] == "/" else "")


def _spelled(pattern: str, root: str) -> bool:
    """Whether a glob spells out a name that is passed over otherwise."""
    return _hidden(pattern[len(root) :])


def _hidden(path: str) -> bool:
    return any(name[:1] in {"_", "."} for name in path.split("/") if name)


def _visible(root: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not _hidden(path[len(root) :])]
