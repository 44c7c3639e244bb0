"""Execute notebooks in place: `python notebooks/run.py [NOTEBOOK ...]`, by default all of them.

Outputs are committed, since GitHub is where the notebooks are read.  What differs between two runs
for no good reason (timestamps, the version of Python) is left out of the file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TIMEOUT = 300  # seconds per cell


def run(path: Path) -> None:
    """Execute one notebook from top to bottom and write it back; a failing cell raises."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def main(arguments: list[str]) -> None:
    """Run the notebooks that are named, or all that stand beside this file."""
    folder = Path(__file__).resolve().parent
    for path in map(Path, arguments) if arguments else sorted(folder.glob("*.ipynb")):
        start = time.perf_counter()
        run(path.resolve())
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
