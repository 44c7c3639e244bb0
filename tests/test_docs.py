"""Every public name says what it does, takes and returns, has an example, and is on the site."""

import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The modules that users name; what else the package holds is reached through these.
MODULES = [
    "seqpack_jax",
    "seqpack_jax.model.segments",
    "seqpack_jax.model.losses",
    "seqpack_jax.model.reductions",
    "seqpack_jax.model.attention",
    "seqpack_jax.model.context_parallel",
    "seqpack_jax.plots",
    "seqpack_jax.testing",
]


def public_names():
    """Return `{name: value}`: a thing that several modules export has the name of the first."""
    found, seen = {}, {}
    for module in MODULES:
        home = importlib.import_module(module)
        for name in home.__all__:
            value = getattr(home, name)
            if seen.setdefault((id(value), name), module) == module:
                found[f"{module}.{name}"] = value
    return found


PUBLIC = public_names()
CONSTANTS = {name for name, value in PUBLIC.items() if not callable(value)}


def sections_of(doc):
    """Return `{heading: text}` of a docstring; what stands before any heading is under ""."""
    parts = re.split(r"^([A-Z][a-z]+):\n(?=    )", f"{doc}\n", flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def names_in(section):
    """Return the names that a section explains: those before a colon, not indented further."""
    return set(re.findall(r"^    \**(\w+):", section, flags=re.MULTILINE))


def parameters_of(value):
    if not inspect.isclass(value):
        return set(inspect.signature(value).parameters)
    if issubclass(value, Exception):
        return set()
    if hasattr(value, "_fields"):  # a NamedTuple
        return set(value._fields)
    return set(inspect.signature(value.__init__).parameters) - {"self"}


def docstring_problems(value):
    """Return what the docstring of a function or a class lacks."""
    doc = inspect.getdoc(value)
    if not doc:
        return ["no docstring"]
    sections = sections_of(doc)
    found = [] if doc.split("\n\n")[0].endswith(".") else ["no summary"]
    explained = names_in(sections.get("Args", "") + sections.get("Attributes", ""))
    found += [f"nothing on {name}" for name in sorted(parameters_of(value) - explained)]
    if not inspect.isclass(value):
        gives = inspect.signature(value).return_annotation
        if gives not in (None, "None") and "Returns" not in sections:
            found.append("no Returns")
    if not doctest.DocTestParser().get_examples(sections.get("Example", "")):
        found.append("no Example")
    return found


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - CONSTANTS))
def test_public_names_are_explained(name):
    assert docstring_problems(PUBLIC[name]) == []


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - CONSTANTS))
def test_methods_of_public_classes_are_explained(name):
    members = vars(PUBLIC[name]) if inspect.isclass(PUBLIC[name]) else {}
    named = {key for key in members if not key.startswith("_")} - set(parameters_of(PUBLIC[name]))
    assert {key for key in named if not inspect.getdoc(members[key])} == set()


def _explained(first: int, second: int = 0) -> int:
    """Do something.

    Args:
        first: one thing.
        second: another.

    Returns:
        A number.

    Example:
        >>> 1 + 1
        2
    """


def _without(text, replacement=""):
    def function(first: int, second: int = 0) -> int: ...

    function.__doc__ = _explained.__doc__.replace(text, replacement)
    return function


def test_the_check_can_fail():
    assert docstring_problems(_explained) == []
    assert docstring_problems(_without(_explained.__doc__)) == ["no docstring"]
    assert docstring_problems(_without("something.", "something")) == ["no summary"]
    assert docstring_problems(_without("second: another.")) == ["nothing on second"]
    assert docstring_problems(_without("Returns:", "Gives:")) == ["no Returns"]
    assert docstring_problems(_without(">>> 1 + 1")) == ["no Example"]


def names_on(pages):
    """Return the names that pages of the site list in their `{names}` blocks."""
    blocks = re.findall(r"^```\{names\} (\S+)\n(.*?)```$", pages, flags=re.DOTALL | re.MULTILINE)
    found = []
    for module, names in blocks:
        listed = names.splitlines() or importlib.import_module(module).__all__
        found += [f"{module}.{line.split(':')[0]}" for line in listed]
    return sorted(found)


PAGES = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))


def test_every_public_name_is_on_one_page():
    assert names_on(PAGES) == sorted(PUBLIC)


def test_that_check_can_fail():
    assert names_on(PAGES.replace("\npack_vectors\n", "\n")) != sorted(PUBLIC)
    assert names_on(PAGES.replace("\npack_vectors\n", "\npack_vectors\npack_vectors\n")) != (
        sorted(PUBLIC)
    )


@pytest.fixture
def docstrings():
    """Return the module of the site that reads docstrings."""
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_restructured_text(docstrings):
    doc = """Do `f(x)` to `array`s:

    f(x)

    g(x, `y`)

| name | what |
|---|---|
| `a` | one |

Args:
    x: `[B,
        L]`, and `"\\n"`.

Returns:
    int `[n]`: lengths.
    More.

Example:
    >>> "`a`"
    '`a`'
"""
    assert (
        docstrings.as_restructured(doc)
        == """Do :name:`f(x)` to :name:`array`\\ s:

.. code-block:: python

    f(x)

    g(x, `y`)

.. list-table::
   :header-rows: 1

   * - name
     - what
   * - :name:`a`
     - one

Args:
    x: :name:`[B, L]`, and :name:`"\\\\n"`.

:returns: int :name:`[n]`: lengths.
    More.

Example:
    >>> "`a`"
    '`a`'
"""
    )


def build(source, target):
    """Build a site; return what is wrong with it."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs"]
    command += ["-d", target / "doctrees", source, target / "site"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (not result.stderr)
    return result.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    assert build(ROOT, tmp_path) == ""
    site = tmp_path / "site"
    for page in ("index", "README", "CHANGELOG", "seqpack_jax/PACKING", "benchmarks/RESULTS"):
        assert (site / f"{page}.html").is_file()
    html = "".join(page.read_text() for page in (site / "docs").glob("*.html"))
    assert {name: html.count(f'id="{name}"') for name in PUBLIC} == dict.fromkeys(PUBLIC, 1)
    for page in site.rglob("*.html"):  # tables and formulas that came out as they were written
        assert not re.search(r"<p>([|]|[$]{2})", page.read_text()), page


@pytest.mark.slow
def test_that_build_can_fail(tmp_path):
    (tmp_path / "README.md").write_text("# Title\n\nSee [what is missing](missing.md).\n")
    assert "missing.md" in build(tmp_path, tmp_path)
