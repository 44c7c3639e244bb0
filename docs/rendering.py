"""The part of the site that is the project's own: lists of names, and how docstrings are read.

A page lists public names in a block that starts with three backquotes and `{names} MODULE`; an
empty one stands for the module's `__all__`.  The site then has a table of them, and each in full.
Constants, which have no docstrings, are listed as `NAME: what it is.`
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

from docstrings import as_restructured
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

_BLOCK = re.compile(r"^```\{names\} (\S+)\n(.*?)```$", flags=re.MULTILINE | re.DOTALL)
_COLON = "\N{FULLWIDTH COLON}"
# Methods that Python calls by itself, shown where they have a docstring.
_SPECIAL = "__call__, __getitem__, __getitems__, __iter__"
_CONTENTS = """
```{toctree}
:hidden:
:caption: Guides
seqpack_jax/PACKING
seqpack_jax/GRAIN
seqpack_jax/ATTENTION
benchmarks/RESULTS
CHANGELOG
```

```{toctree}
:hidden:
:caption: Reference
docs/planning
docs/feeding
docs/preparation
docs/model
docs/losses
docs/attention
docs/plots
docs/testing
```

```{toctree}
:hidden:
:glob:
:caption: Notebooks
notebooks/*
```
"""


def names_on_pages(folder: Path) -> list[tuple[str, str]]:
    """Return `(module, name)` of everything that the pages of a folder list, in their order."""
    pages = [page.read_text() for page in sorted(folder.glob("*.md"))]
    blocks = [block for page in pages for block in _BLOCK.findall(page)]
    return [(module, name) for module, names in blocks for name in _listed(module, names)]


def _listed(module: str, names: str) -> dict[str, str]:
    """Return `{name: words}` of a block; only constants have words."""
    lines = names.splitlines() or importlib.import_module(module).__all__
    return {line.split(":")[0]: line.partition(": ")[2] for line in lines}


def _write_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill in the names of a page, and put the contents of the site on the first."""
    source[0] = _BLOCK.sub(_expand, source[0])
    if page == app.config.root_doc:
        source[0] += _CONTENTS


def _expand(block: re.Match[str]) -> str:
    """Return a table of the names of a block, and behind it each in full."""
    module, names = block[1], _listed(block[1], block[2])
    lines = [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {name}" for name, words in names.items() if not words]
    for name, words in names.items():
        lines += ["", *_entry(module, name, words)]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def _entry(module: str, name: str, words: str) -> list[str]:
    """Return the directive that renders a name; a second name of a function leads to the first."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:", f"   :special-members: {_SPECIAL}"]
    if words:
        return [f".. py:data:: {name}", f"   :value: {value!r}", "", f"   {as_restructured(words)}"]
    if value.__name__ != name:
        return [
            f".. py:function:: {name}(...)",
            "",
            f"   Another name of :name:`{value.__name__}`.",
        ]
    return [f".. autofunction:: {name}"]


class _AsWritten(NamedTuple):
    """An annotation that prints as its source: `ArrayLike`, not what that stands for."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _as_written(annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return annotation
    text = getattr(annotation, "__forward_arg__", annotation)  # of a NamedTuple
    return _AsWritten(text if isinstance(text, str) else inspect.formatannotation(text))


def _without_address(default: Any) -> Any:
    """Return a default value that prints alike in every process."""
    if inspect.isclass(default) and default is not inspect.Parameter.empty:
        return _AsWritten(f"{default.__module__}.{default.__name__}")
    return _AsWritten("...") if inspect.isroutine(default) else default


def _write_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returned: str
) -> tuple[str, str | None] | None:
    """Return the signature in the words of the source."""
    if what not in ("class", "function", "method") or name.endswith("Error"):
        return None
    has_init = what == "class" and inspect.isfunction(value.__init__)
    found = inspect.signature(value.__init__ if has_init else value)
    parameters = [
        each.replace(
            annotation=_as_written(each.annotation), default=_without_address(each.default)
        )
        for each in found.parameters.values()
        if each.name not in ("self", "cls")
    ]
    gives = found.return_annotation
    shown = inspect.Signature(parameters)
    if what == "class" or gives in (inspect.Signature.empty, None, "None"):
        return str(shown), None
    return str(shown), repr(_as_written(gives))


def _read_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Turn what docstrings take from Markdown into reStructuredText, before napoleon reads it."""
    lines[:] = as_restructured("\n".join(lines)).split("\n")
    if what == "property":  # napoleon would take "int64 [t]: sizes" for a type
        lines[0] = lines[0].replace(": ", _COLON)


def _restore_colons(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = [line.replace(_COLON, ": ") for line in lines]


class _NameRole(SphinxRole):
    """Code: a link where it is a public name, maybe with a method of it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the node for the text of this role."""
        code = nodes.literal(self.text, self.text, classes=["docutils"])
        parts = re.fullmatch(r"(?:\w+\.)*?([A-Za-z]\w+)((?:\.\w+)*)(?:\(\))?", self.text)
        if parts is None or parts[1] not in _homes():
            return [code], []
        target = f"{_homes()[parts[1]]}.{parts[1]}{parts[2]}"
        link = addnodes.pending_xref("", code, refdomain="py", reftype="obj", reftarget=target)
        link["refdoc"] = self.env.docname
        return [link], []


@functools.cache
def _homes() -> dict[str, str]:
    """Return the module under which the pages list each name."""
    return {name: module for module, name in names_on_pages(Path(__file__).parent)}


def _is_skipped(
    app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out the fields of a NamedTuple, which the docstring of the class explains."""
    is_field = (getattr(value, "__doc__", None) or "").startswith("Alias for field number")
    return True if is_field else None


def _write_index(app: Sphinx, problem: Exception | None) -> None:
    """Make index.html lead to the first page."""
    if problem is None and app.builder.format == "html":
        first = f"{app.config.root_doc}.html"
        page = f'<!doctype html>\n<meta http-equiv="refresh" content="0; url={first}">\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above with sphinx."""
    app.add_role("name", _NameRole())
    app.connect("source-read", _write_page)
    app.connect("autodoc-process-signature", _write_signature)
    app.connect("autodoc-process-docstring", _read_docstring, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", _restore_colons, priority=600)
    app.connect("autodoc-skip-member", _is_skipped)
    app.connect("build-finished", _write_index)
    return {"parallel_read_safe": True}
