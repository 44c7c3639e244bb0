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
