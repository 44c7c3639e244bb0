"""What `make dist` checks of wheel and sdist, and the citation file."""

import importlib.util
import io
import re
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import seqpack_jax

ROOT = Path(__file__).parents[1]
SOURCES = {"seqpack_jax/__init__.py", "seqpack_jax/model/masks.py"}
GUIDES = {f"seqpack_jax/{name}.md" for name in ("ATTENTION", "GRAIN", "PACKING")}
FILES = SOURCES | GUIDES | {"seqpack_jax/py.typed"}


@pytest.fixture(scope="module")
def check():
    """Return `.ci/check_dist.py`."""
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / ".ci" / "check_dist.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a NamedTuple looks for its module there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_whole_artefact_has_no_problems(check):
    assert check.file_problems(FILES | {"LICENSE"}, {"LICENSE"}, SOURCES) == []


@pytest.mark.parametrize("name", sorted(FILES | {"LICENSE"}))
def test_missing_files_are_found(check, name):
    files = (FILES | {"LICENSE"}) - {name}
    assert check.file_problems(files, {"LICENSE"}, SOURCES) == [f"{name} is missing"]


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_plan.py",
        "notebooks/1.ipynb",
        "benchmarks/run_all.py",
        "seqpack_jax/lengths.npy",
        "seqpack_jax/tests/lengths.csv",
    ],
)
def test_files_that_should_not_be_there_are_found(check, name):
    assert check.file_problems(FILES | {name}, set(), SOURCES) == [f"{name} should not be there"]


def test_modules_of_other_origin_are_found(check):
    found = check.file_problems(FILES | {"seqpack_jax/old.py"}, set(), SOURCES)
    assert found == ["seqpack_jax/old.py should not be there"]


def _metadata(text):
    metadata = Message()
    for field in ("Summary", "Author", "License-Expression", "Keywords", "Requires-Python"):
        metadata[field] = "something"
    metadata["Classifier"] = "Typing :: Typed"
    metadata["Version"] = "0.1.0"
    metadata["Description-Content-Type"] = "text/markdown"
    metadata.set_payload(text)
    return metadata


def test_the_metadata_are_checked(check):
    text = "Text with [a link](https://example.org) and `x[0](y)`.\n" * 50
    metadata = _metadata(text)
    assert check.metadata_problems(metadata, "0.1.0") == []
    assert check.metadata_problems(metadata, "0.2.0") == [
        "version 0.1.0, but the package says 0.2.0"
    ]
    assert check.metadata_problems(_metadata("short"), "0.1.0") == [
        "the description is not the README"
    ]
    for link in ("[x](PACKING.md)", "![x](a/b.png)", "[x](#limits)", "[x](a/b.md#c)"):
        assert check.metadata_problems(_metadata(text + link), "0.1.0") == [
            f"a link that breaks on PyPI: {link.removeprefix('!')}"
        ]
    del metadata["Author"]
    assert check.metadata_problems(metadata, "0.1.0") == ["no Author"]


def test_wheels_and_sdists_are_read(check, tmp_path):
    wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("seqpack_jax/__init__.py", "")
        file.writestr("seqpack_jax-0.1.0.dist-info/METADATA", "Version: 0.1.0\n\ntext")
    with tarfile.open(sdist, "w:gz") as file:
        for name, text in (("PKG-INFO", b"Version: 0.1.0\n\ntext"), ("LICENSE", b"")):
            entry = tarfile.TarInfo(f"seqpack_jax-0.1.0/{name}")
            entry.size = len(text)
            file.addfile(entry, io.BytesIO(text))
    read = check.read_wheel(wheel)
    assert read.files == {"seqpack_jax/__init__.py", "dist-info/METADATA"}
    assert check.read_sdist(sdist).files == {"PKG-INFO", "LICENSE"}
    for each in (read, check.read_sdist(sdist)):
        assert each.metadata["Version"] == "0.1.0"
        assert each.metadata.get_payload() == "text"


def test_the_first_block_is_run_and_compared(check, monkeypatch):
    import test_readme

    python = Path(sys.executable)
    # This interpreter may have the package from a checkout; what is installed is checked there.
    here = "import sys, types; sp = types.SimpleNamespace(__file__='site-packages')\n"
    monkeypatch.setattr(test_readme, "BLOCKS", [(here + "print(1 + 1)\n", "2\n")])
    assert check.first_block_problems(python) == []
    monkeypatch.setattr(test_readme, "BLOCKS", [(here + "print(1 + 1)\n", "3\n")])
    assert check.first_block_problems(python) == ["the first block prints:\n2\n"]
    monkeypatch.setattr(test_readme, "BLOCKS", [("import no_such_module\n", "")])
    (problem,) = check.first_block_problems(python)
    assert problem.startswith("the first block of the README fails:")
    assert "no_such_module" in problem
    checkout = here.replace("site-packages", "/src/seqpack_jax/__init__.py")
    monkeypatch.setattr(test_readme, "BLOCKS", [(checkout, "")])
    assert "AssertionError: /src/seqpack_jax" in check.first_block_problems(python)[0]


def test_the_citation_is_of_this_version_and_names_the_seed():
    citation = (ROOT / "CITATION.cff").read_text()
    versions = re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE)
    assert versions == [seqpack_jax.__version__]
    assert citation.startswith("cff-version: 1.2.0\n")
    assert "family-names: Alsamkary" in citation
    assert "doi: 10.5281/zenodo.20530927" in citation
