"""Docstrings of the package, which mark code as Markdown does, as reStructuredText for sphinx."""

from __future__ import annotations

import itertools
import re

_HEADING = re.compile(r"([A-Z][a-z]+):")
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))")
_TABLE = re.compile(r"^\|.*(?:\n\|.*)+", flags=re.MULTILINE)


def as_restructured(docstring: str) -> str:
    """Return a docstring whose code is marked as reStructuredText marks it.

    Code between backquotes becomes a role, indented lines outside of the sections a block of code.
    "Returns" becomes a field: napoleon takes the first colon in it for the end of a type.
    """
    read: list[tuple[bool, str]] = []  # whether it is code, and the line
    section, in_block, in_example = "", False, False
    for line in docstring.split("\n"):
        if heading := _HEADING.fullmatch(line):
            section = heading[1]
        elif section == "Returns" and read[-1] == (False, ":returns:"):
            read[-1] = (False, f":returns: {line.strip()}")
            continue
        elif line and not line.startswith(" "):
            section = ""
        if not section and line.startswith("    ") and not in_block:
            read += [(False, ".. code-block:: python"), (False, "")]
        in_block = not section and (line.startswith("    ") or (in_block and not line))
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line))
        returns = heading is not None and section == "Returns"
        read.append((in_block or in_example, ":returns:" if returns else line))
    parts = itertools.groupby(read, key=lambda each: each[0])
    texts = ((is_code, "\n".join(line for _, line in group)) for is_code, group in parts)
    texts = ((is_code, text if is_code else _TABLE.sub(_table, text)) for is_code, text in texts)
    return "\n".join(text if is_code else _CODE.sub(_role, text) for is_code, text in texts)


def _table(rows: re.Match[str]) -> str:
    """Return a table of Markdown as a list."""
    head, _, *others = rows[0].splitlines()
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *others):
        first, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in cells)]
    return "\n".join(lines)


def _role(code: re.Match[str]) -> str:
    text = " ".join(code[1].split()).replace("\\", "\\\\")
    return f":name:`{text}`" + ("\\ " if code[2] else "")
