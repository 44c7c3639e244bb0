"""Check the wheel and the sdist of `make dist`: `python .ci/check_dist.py dist ENVIRONMENT`.

What they hold and what they say, and that the first block of the README runs in a new environment
with the wheel and no extras, and prints what the README says.  The environment is kept.
"""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.message import Message
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GUIDES = {f"seqpack_jax/{name}.md" for name in ("ATTENTION", "GRAIN", "PACKING")}
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"}  # in the sdist
MADE = {"PKG-INFO", ".gitignore"}  # what hatchling puts there by itself
FIELDS = ("Summary", "Author", "License-Expression", "Keywords", "Requires-Python", "Classifier")
# A link or picture of Markdown that is not on the net, which leads nowhere on PyPI.
RELATIVE_LINK = re.compile(r"\[[^\]]+\]\((?!https?://)(?=[^)]*[./#])[\w./#-]+\)")


class Artefact(NamedTuple):
    """The files of a wheel or of an sdist, from its root, and its metadata."""

    files: set[str]
    metadata: Message


def read_wheel(path: Path) -> Artefact:
    """Return what a wheel holds; the version is left out of its names."""
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(file.read(info))
    folder = info.partition("/")[0]
    return Artefact({name.replace(folder, "dist-info") for name in names}, metadata)


def read_sdist(path: Path) -> Artefact:
    """Return what an sdist holds, from below its only folder."""
    with tarfile.open(path) as file:
        names = {entry.name.partition("/")[2] for entry in file.getmembers() if entry.isfile()}
        folder = file.getnames()[0].partition("/")[0]
        info = file.extractfile(f"{folder}/PKG-INFO")
        assert info is not None
        return Artefact(names, email.message_from_bytes(info.read()))


def file_problems(files: set[str], others: set[str], sources: set[str]) -> list[str]:
    """Return what is missing, and what should not be there.

    Args:
        files: of the artefact.
        others: what shall be in it beside the package.
        sources: the modules of the package, as the repository has them.
    """
    wanted = sources | GUIDES | {"seqpack_jax/py.typed"} | others
    found = [f"{name} is missing" for name in sorted(wanted - files)]
    return found + [f"{name} should not be there" for name in sorted(files - wanted)]


def metadata_problems(metadata: Message, version: str) -> list[str]:
    """Return what the metadata lack, and the links that break on PyPI."""
    found = [f"no {field}" for field in FIELDS if not metadata[field]]
    if metadata["Version"] != version:
        found.append(f"version {metadata['Version']}, but the package says {version}")
    text = str(metadata.get_payload())
    if metadata["Description-Content-Type"] != "text/markdown" or len(text) < 1000:
        found.append("the description is not the README")
    return found + [f"a link that breaks on PyPI: {link}" for link in RELATIVE_LINK.findall(text)]


def first_block_problems(python: Path) -> list[str]:
    """Run the first block of the README in an environment; return what is wrong with it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_readme import BLOCKS

    code, printed = BLOCKS[0]
    code += "\nimport sys\nassert 'site-packages' in sp.__file__, sp.__file__\n"
    with tempfile.TemporaryDirectory() as folder:  # away from the checkout
        command = [str(python), "-W", "error", "-c", code]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        return [f"the first block of the README fails:\n{result.stderr}"]
    return [] if result.stdout == printed else [f"the first block prints:\n{result.stdout}"]


def main(folder: Path, environment: Path) -> list[str]:
    """Return what is wrong with the artefacts in a folder; install the wheel in a new venv."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "seqpack_jax").rglob("*.py")}
    line = (ROOT / "seqpack_jax" / "__init__.py").read_text()
    version = re.findall(r'^__version__ = "(.*)"$', line, flags=re.MULTILINE)[0]
    info = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    found: list[str] = []
    for path, artefact, others in (
        (wheel, read_wheel(wheel), {f"dist-info/{name}" for name in info}),
        (sdist, read_sdist(sdist), BESIDE | MADE),
    ):
        problems = file_problems(artefact.files, others, sources)
        problems += metadata_problems(artefact.metadata, version)
        found += [f"{path.name}: {problem}" for problem in problems]
    if found:
        return found
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    python = environment.absolute() / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--upgrade", "pip"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
    return first_block_problems(python)


if __name__ == "__main__":
    problems = main(*map(Path, sys.argv[1:]))
    print(*problems or ["wheel and sdist are whole, and the README's first block runs"], sep="\n")
    sys.exit(bool(problems))
