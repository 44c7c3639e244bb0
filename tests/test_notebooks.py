"""The committed notebooks are whole, and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
assert NOTEBOOKS, "an empty list would pass every test below"
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|root|home|tmp|Users|usr|opt)\b")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name),
]


def _problems(path):
    """Return what is wrong with a notebook as it stands in the file."""
    found = []
    if path.stat().st_size >= 500_000:
        found.append("the file has 500 kB or more")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not executed once from top to bottom")
    outputs = [output for cell in cells for output in cell.outputs]
    if not outputs:
        found.append("no outputs")
    for output in outputs:
        if output.output_type == "error":
            found.append(f"error: {output.evalue}")
        if output.get("name") == "stderr":
            found.append(f"stderr: {output.text}")
        if match := MACHINE_PATH.search(str(output)):
            found.append(f"a path of one machine: {match.group()}")
    return found


def test_the_committed_notebook_is_whole(path):
    assert _problems(path) == []


def test_the_notebook_runs(path, tmp_path):
    copy = Path(shutil.copy(path, tmp_path))
    command = [sys.executable, str(FOLDER / "run.py"), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert _problems(copy) == []


def test_the_tests_can_fail(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    last = next(cell for cell in reversed(notebook.cells) if cell.cell_type == "code")
    last.outputs = [nbformat.v4.new_output("stream", name="stderr", text="in /home/me/x.py\n")]
    last.execution_count = 99
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    assert _problems(copy) == [
        "not executed once from top to bottom",
        "stderr: in /home/me/x.py\n",
        "a path of one machine: /home",
    ]
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = "assert False, 'broken on purpose'"
    nbformat.write(notebook, copy)
    command = [sys.executable, str(FOLDER / "run.py"), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "broken on purpose" in result.stderr
