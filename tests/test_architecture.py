"""The rules of the house: imports go down, importing is light, every public name has an example."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import seqpack_jax

ROOT = Path(seqpack_jax.__file__).parent

# In the order of DESIGN.md: a module may import what stands above it, as far as its wing allows.
ORDER = [
    "errors",
    "arrays",
    "permutation",
    "terminal",
    "planning.over_length",
    "planning.counts",
    "planning.histogram",
    "planning.bins",
    "planning.plan",
    "planning.heuristics",
    "planning.bounds",
    "planning.knapsack",
    "planning.column_generation",
    "planning.rounding",
    "planning.closing",
    "planning.optimal",
    "planning.planners",
    "planning.vector_fit",
    "planning.vectors",
    "planning.stats",
    "planning.packers",
    "planning.changeover",
    "feeding.zones",
    "feeding.epoch",
    "feeding.layout",
    "feeding.key_styles",
    "feeding.features",
    "feeding.reading",
    "feeding.sequences",
    "feeding.unpacking",
    "feeding.batch",
    "feeding.prefixes",
    "feeding.streaming",
    "feeding.stream_dataset",
    "feeding.grain_packers",
    "feeding.operation",
    "feeding.prefetch",
    "feeding.schedule",
    "feeding.packed_source",
    "feeding.pipeline",
    "feeding.hosts",
    "feeding.parcel",
    "feeding.resuming",
    "feeding.progress",
    "feeding.formats",
    "feeding.parquet",
    "feeding.finding",
    "feeding.inputs",
    "feeding.workers",
    "feeding.measuring",
    "feeding.storage",
    "feeding.manifest",
    "feeding.shards",
    "feeding.seed_directory",
    "feeding.remote",
    "feeding.prepared",
    "feeding.verification",
    "feeding.preparation",
    "feeding.row_files",
    "feeding.store_writer",
    "feeding.token_store",
    "feeding.upstream",
    "feeding.token_files",
    "feeding.list_columns",
    "feeding.tables",
    "feeding.export",
    "feeding.distributed",
    "model.ids",
    "model.masks",
    "model.key_bounds",
    "model.offsets",
    "model.segments",
    "model.reductions",
    "model.losses",
    "model.context_parallel",
    "model.rope",
    "model.blocked",
    "model.adapters",
    "model.kernel_adapters",
    "model.dispatch",
    "model.attention",
    "trial",
    "diagnosis",
    "testing",
    "drawing",
    "plots",
    "report",
    "demo_model",
    "demo",
    "flags",
    "cli",
    "__main__",
]
GROUND = ["errors", "arrays", "permutation", "terminal"]
WINGS = {"planning": ["planning"], "feeding": ["feeding", "planning"], "model": ["model"]}
EDGES = [
    *("trial", "diagnosis", "testing", "drawing", "plots", "report"),
    *("demo_model", "demo", "flags", "cli", "__main__"),
]
# What a module may import beside NumPy, and those of the model wing JAX.
OPTIONAL = {
    "terminal": {"rich"},
    "planning.column_generation": {"highspy"},
    "planning.optimal": {"rich"},
    "feeding.grain_packers": {"grain"},
    "feeding.hosts": {"jax"},
    "feeding.parcel": {"cloudpickle"},
    "feeding.list_columns": {"pyarrow"},
    "feeding.resuming": {"grain"},
    "feeding.stream_dataset": {"grain"},
    "feeding.tables": {"pyarrow"},
    "feeding.progress": {"rich"},
    "feeding.formats": {"dnaio", "fsspec"},
    "feeding.parquet": {"fsspec", "pyarrow"},
    "feeding.workers": {"filelock"},
    "feeding.shards": {"pyarrow"},
    "feeding.remote": {"filelock"},
    "feeding.row_files": {"array_record", "pyarrow"},
    "feeding.distributed": {"ray"},
    "model.losses": {"optax"},
    "model.attention": {"flax"},
    "model.dispatch": {"tokamax"},
    "model.kernel_adapters": {"tokamax", "transformer_engine"},
    "drawing": {"matplotlib"},
    "plots": {"matplotlib"},
    "report": {"matplotlib"},
}


def modules():
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
    }
    return sorted(found)


def imports(source):
    """Every module that `source` imports, wherever in it: `(inside the package, outside)`."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module
            names = [f"{base}.{alias.name}" for alias in node.names]
            if base != "seqpack_jax" and base.startswith("seqpack_jax"):
                names.append(base)
        for name in names:
            package, _, rest = name.partition(".")
            if package != "seqpack_jax":
                outside.add(package)
                continue
            if not rest:
                inside.add("the package itself")  # its lazy names lead past every rule
                continue
            match = [known for known in ORDER if rest == known or rest.startswith(f"{known}.")]
            inside |= set(match) if match else {rest}
    return inside, outside


def may_import(module):
    wing = module.split(".")[0]
    above = ORDER[: ORDER.index(module)]
    if module in EDGES:
        return set(above)
    if module in GROUND:
        return {"errors"} & set(above)
    allowed = WINGS[wing]
    return {name for name in above if name in GROUND or name.split(".")[0] in allowed}


def violations(module, source):
    inside, outside = imports(source)
    wrong = {name for name in inside if name not in may_import(module) and name != "__version__"}
    libraries = {"numpy"} | set(sys.stdlib_module_names) - {"importlib"}
    if module in EDGES:
        libraries |= {"jax", "flax", "optax", "grain", "rich", "absl"}
    elif module.startswith("model."):
        libraries |= {"jax"}
    libraries |= OPTIONAL.get(module, set())
    return wrong | (outside - libraries)


def test_every_module_has_its_place():
    assert set(modules()) == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert violations(module, path.read_text()) == set()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("planning.plan", "from seqpack_jax.planning import packers"),
        ("planning.plan", "import seqpack_jax.planning.packers"),
        ("planning.plan", "from seqpack_jax.planning.packers import pack_sequences"),
        ("planning.packers", "from seqpack_jax.feeding.epoch import Epoch"),
        ("planning.packers", "def f():\n    import jax"),
        ("planning.packers", "import seqpack_jax as sp"),
        ("planning.packers", "import importlib"),
        ("model.segments", "from seqpack_jax.planning.plan import Bins"),
        ("model.segments", "import flax"),
        ("feeding.epoch", "import grain"),
        ("feeding.pipeline", "from seqpack_jax.cli import main"),
        ("errors", "from seqpack_jax.permutation import permute"),
    ],
)
def test_the_import_check_can_fail(module, line):
    assert violations(module, line)


@pytest.mark.parametrize("wing", WINGS)
def test_wings_import_nothing_by_themselves(wing):
    assert imports((ROOT / wing / "__init__.py").read_text()) == (set(), set())


@pytest.mark.parametrize("module", ORDER)
def test_files_are_short(module):
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert len(path.read_text().splitlines()) <= 420


def loaded_by(statement):
    """Which of the heavy libraries a fresh Python holds after `statement`."""
    heavy = {
        "jax",
        "flax",
        "grain",
        "pyarrow",
        "ray",
        "fsspec",
        "filelock",
        "dnaio",
        "rich",
        "highspy",
        "matplotlib",
    }
    code = f"import sys; {statement}; print(*({heavy} & set(sys.modules)))"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_importing_the_package_is_light():
    plan = "import seqpack_jax as sp; sp.pack_sequences([3, 4], 8); sp.SeqpackError"
    assert loaded_by(plan) == set()
    assert loaded_by("import seqpack_jax as sp; sp.prepare; sp.export_rows; sp.ray_map") == set()


def test_the_lightness_check_can_fail():
    assert "jax" in loaded_by("import seqpack_jax as sp; sp.from_seed_ids")


def test_lazy_names_match_the_type_checkers_view():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name: node.module for node in block.body for alias in node.names}
    homes = {name: f"seqpack_jax.{home}" for name, home in seqpack_jax._HOME_OF.items()}
    assert declared == homes
    assert sorted(homes) == seqpack_jax.__all__
    for name in homes:
        assert getattr(seqpack_jax, name) is getattr(importlib.import_module(homes[name]), name)
    assert {seqpack_jax.planning, seqpack_jax.feeding, seqpack_jax.model} <= set(
        sys.modules.values()
    )
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = seqpack_jax.no_such_name
    assert set(seqpack_jax.__all__) <= set(dir(seqpack_jax))


def test_no_public_name_is_a_submodule():
    submodules = {info.name for info in pkgutil.walk_packages(seqpack_jax.__path__)}
    submodules |= {name.split(".")[-1] for name in ORDER}
    assert not submodules & set(seqpack_jax.__all__)
