"""Print the lower bounds of the dependencies in pyproject.toml, and of some extras, exactly."""

import tomllib
from pathlib import Path

EXTRAS = ("prepare", "fasta", "optimal", "plots")  # what the tests that are not slow need

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = list(project["dependencies"])
for extra in EXTRAS:
    requirements += project["optional-dependencies"][extra]
for requirement in requirements:
    if not requirement.startswith(project["name"]):
        print(requirement.replace(">=", "=="))
