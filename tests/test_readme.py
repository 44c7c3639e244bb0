"""Every Python block of the README runs, in order, and prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", README, flags=re.DOTALL)


def run(blocks):
    """Run blocks of code in one namespace; return what each printed."""
    namespace, printed = {"__name__": "readme"}, []
    for code in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "README.md", "exec"), namespace)
        printed.append(out.getvalue())
    return printed


def test_the_blocks_run_and_print_what_they_say():
    assert len(BLOCKS) >= 3
    for printed, (_, expected) in zip(run(code for code, _ in BLOCKS), BLOCKS, strict=True):
        assert printed == expected


def test_that_check_can_fail():
    assert run(["print(1 + 1)"]) != ["3\n"]


def test_the_first_screen_has_running_code_and_the_two_commands():
    screen = "\n".join(README.splitlines()[:60])
    assert "```python" in screen
    assert "make demo" in screen
    assert "make test" in screen


def test_the_figures_are_those_of_the_benchmarks():
    results = (Path(__file__).parents[1] / "benchmarks" / "RESULTS.md").read_text().splitlines()
    figures = README[README.index("## Figures") : README.index("## The files")]
    rows = [line for line in figures.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert not set(rows) - set(results)


def test_every_file_is_in_the_reading_order():
    files = Path(__file__).parents[1] / "seqpack_jax"
    listed = set(re.findall(r"`([a-z_/]+\.py)`", README[README.index("## The files") :]))
    found = {str(path.relative_to(files)) for path in files.rglob("*.py")}
    assert {name for name in found if not name.endswith("__init__.py")} <= listed
