"""How sphinx builds the site: the pages stand where GitHub shows them, the reference is in docs/.

The source folder is the root of the repository, so that links between README, guides, figures and
notebooks hold in the site as they do in a checkout: `sphinx-build -c docs . build/docs`.
Nothing is fetched, and notebooks are shown with the outputs that are committed.
"""

import sys
from pathlib import Path

import seqpack_jax

sys.path.insert(0, str(Path(__file__).parent))  # for rendering.py

project = "seqpack_jax"
author = "the seqpack_jax developers"
project_copyright = f"2026, {author}"
version = release = seqpack_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "rendering",
]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "benchmarks/RESULTS.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "seqpack_jax/*.md",
]
exclude_patterns = [".*", "build", "dist", "tests"]

html_theme = "furo"
html_title = f"seqpack_jax {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False

nb_execution_mode = "off"
nb_render_markdown_format = "gfm"  # outputs hold tables
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autosummary_generate = False
autodoc_type_aliases = {name: name for name in ("ArrayLike", "Int64", "NDArray")}
napoleon_numpy_docstring = False
# As a list like that of the arguments; entries of their own would come twice.
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88
