"""Every Python block of the README runs, in order, and prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from seqpack_jax.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks_of(page):
    """Return each block of Python code, with the text behind it that it shall print."""
    return re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", page, flags=re.DOTALL)


BLOCKS = blocks_of(README)


def run(blocks):
    """Run blocks of code in one namespace; return what each printed."""
    namespace, printed = {"__name__": "readme"}, []
    for code in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "README.md", "exec"), namespace)
        printed.append(out.getvalue())
    return printed


def wrong_blocks(blocks):
    """Return the numbers of the blocks that print something else than the text behind them."""
    printed = run(code for code, _ in blocks)
    return [k for k, (_, expected) in enumerate(blocks) if printed[k] != expected]


def test_the_blocks_run_and_print_what_they_say():
    assert len(BLOCKS) >= 3
    assert wrong_blocks(BLOCKS) == []


def test_that_check_can_fail():
    assert wrong_blocks([("print(1 + 1)\n", "2\n"), ("print(1 + 1)\n", "3\n"), ("x = 1", "")]) == [
        1
    ]


def test_the_first_screen_has_running_code_and_the_two_commands():
    screen = "\n".join(README.splitlines()[:60])
    assert "```python" in screen
    assert "make demo" in screen
    assert "make test" in screen


def test_the_commands_are_those_of_the_program(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"```text\n{capsys.readouterr().out}```\n" in README


def test_the_figures_are_those_of_the_benchmarks():
    results = (Path(__file__).parents[1] / "benchmarks" / "RESULTS.md").read_text().splitlines()
    figures = README[README.index("## Figures") : README.index("## The files")]
    rows = [line for line in figures.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert not set(rows) - set(results)


def test_every_file_is_in_the_reading_order():
    files = Path(__file__).parents[1] / "seqpack_jax"
    table = README[README.index("## The files") : README.index("`tests/reference.py`")]
    listed = set(re.findall(r"`([a-z_/]+\.py)`", table))
    found = {str(path.relative_to(files)) for path in files.rglob("*.py")}
    assert {name for name in found if not name.endswith("__init__.py")} == listed
