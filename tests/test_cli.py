"""Commands, their help, and what wrong arguments get."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from input_files import write
from pyarrow import parquet as pq

import seqpack_jax
import seqpack_jax as sp
from seqpack_jax import cli
from seqpack_jax.cli import main
from seqpack_jax.demo import DemoOptions
from seqpack_jax.planning.plan import Certificate
from seqpack_jax.planning.planners import ALGORITHMS

OPTIONS = {
    "demo": "--seconds --batch-size --max-seq-len --seed",
    "prepare": (
        "--input --length-column --tokens-column --id-column --max-seq-len --algorithm "
        "--budget --time-limit --max-segments --over-length --overlap --min-tail --positions "
        "--tolerance --extra-tokens --output --workers --engine --overwrite"
    ),
    "stats": "DIR --rows-per-step --json",
    "verify": "DIR",
    "export": (
        "DIR --sequences --tokens-column --id-column --epochs --seed --to --output --workers "
        "--overwrite"
    ),
    "plot": "DIR --output --rows --overwrite",
    "report": "DIR --output --overwrite",
}


def _exit(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code


def test_help_lists_every_command(capsys):
    assert _exit(["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("usage: seqpack-jax")
    for name, command in cli._COMMANDS.items():
        assert f"{name} {command.summary}" in printed


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_help_of_every_command(name, capsys):
    assert _exit([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: seqpack-jax {name}")
    shown = printed.split("\n\n", 2)[2]
    assert [word for word in OPTIONS[name].split() if f"  {word}" not in shown] == []
    assert shown.count("\n  -") == 1 + OPTIONS[name].count("--")  # and `--help`; none is hidden
    assert "resume" not in shown  # hidden: only the demo itself uses it
    assert "None" not in shown


def test_version(capsys):
    assert _exit(["--version"]) == 0
    assert capsys.readouterr().out == f"seqpack-jax {seqpack_jax.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--secnods", "5"], "unrecognized arguments: --secnods"),
        (["demo", "--seconds", "soon"], "argument --seconds: 'soon' is not a number"),
        (["demo", "--seconds", "0"], "argument --seconds: 0 is not above 0 and finite"),
        (["demo", "--seconds", "nan"], "argument --seconds: nan is not above 0 and finite"),
        (["demo", "--seconds", "inf"], "argument --seconds: inf is not above 0 and finite"),
        (["demo", "--batch-size", "0"], "argument --batch-size: 0 is not in [1, 4096]"),
        (["demo", "--batch-size", "2.5"], "argument --batch-size: '2.5' is not an integer"),
        (["demo", "--max-seq-len", "63"], "argument --max-seq-len: 63 is not in [64, 4096]"),
        (["demo", "--seed", "-1"], "argument --seed: -1 is not in [0, 2147483647]"),
        (["demo", "--seed"], "argument --seed: expected one argument"),
        (["prepare"], "arguments are required: --input, --max-seq-len, --output"),
        (["prepare", "--max-seq-len", "0"], "argument --max-seq-len: 0 is not in [1, 2147483647]"),
        (["prepare", "--over-length", "cut"], "argument --over-length: invalid choice: 'cut'"),
        (["prepare", "--algorithm", "next_fit"], "argument --algorithm: invalid choice"),
        (["prepare", "--budget", "0"], "argument --budget: 0 is not above 0 and finite"),
        (["prepare", "--time-limit", "1m"], "argument --time-limit: '1m' is not a number"),
        (["prepare", "--engine", "spark"], "argument --engine: invalid choice: 'spark'"),
        (["stats"], "the following arguments are required: DIR"),
        (["verify"], "the following arguments are required: DIR"),
        (["export", "DIR"], "arguments are required: --sequences, --output"),
        (["export", "DIR", "--to", "csv"], "argument --to: invalid choice: 'csv'"),
        (["plot"], "the following arguments are required: DIR, --output"),
        (["plot", "DIR"], "the following arguments are required: --output"),
        (["plot", "DIR", "--rows", "0"], "argument --rows: 0 is not in [1, 500]"),
        (["plot", "DIR", "--rows", "all"], "argument --rows: 'all' is not an integer"),
        (["plot", "DIR", "--output"], "argument --output: expected one argument"),
        (["report"], "the following arguments are required: DIR"),
        (["report", "DIR", "--rows", "3"], "unrecognized arguments: --rows 3"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    assert _exit(argv) == 2
    assert message in capsys.readouterr().err


def test_options_reach_the_demo(monkeypatch):
    seen = []
    monkeypatch.setattr("seqpack_jax.demo.run_demo", lambda options: seen.append(options) or 0)
    assert main(["demo"]) == 0
    argv = "demo --seconds 1.5 --batch-size 2 --max-seq-len 128 --seed 7".split()
    assert main(argv) == 0
    assert seen == [DemoOptions(), DemoOptions(1.5, 2, 128, 7)]


def test_an_exit_code_is_passed_on(monkeypatch):
    monkeypatch.setattr("seqpack_jax.demo.run_demo", lambda options: 1)
    assert main(["demo"]) == 1


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["demo", "--resume-in", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"seqpack-jax demo: resume_in: {tmp_path} holds no checkpoint. "
        "Hint: pass a folder that the demo wrote.\n"
    )


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from seqpack_jax.cli import main\n"
        "try:\n"
        "    main(['prepare', '--help'])\n"
        "except SystemExit:\n"
        "    heavy = {'jax', 'flax', 'optax', 'grain', 'rich', 'pyarrow', 'fsspec', 'ray'}\n"
        "    heavy |= {'highspy', 'matplotlib'}\n"
        "    loaded = heavy & set(sys.modules)\n"
        "    sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- prepare, stats, verify -----------------------------------------------------------------

LENGTHS = [7, 5, 5, 5, 5, 5, 3, 3, 3]


@pytest.fixture
def data(tmp_path):
    """The words of a command that prepares a small data set."""
    write(tmp_path / "in.parquet", LENGTHS)
    command = f"prepare --input {tmp_path}/in.parquet --length-column length --workers 1"
    return f"{command} --output {tmp_path}/out --max-seq-len".split()


def test_prepare_stats_and_verify(data, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main([*data, "10"]) == 0
    plan = sp.pack_length_histogram(np.bincount(LENGTHS), 10)
    stats = sp.PackingStats.from_plan(plan)
    assert capsys.readouterr() == (
        f"{stats}\n{plan.certificate}\n",
        f"preparing rows: 9, shards: 1\nwrote {out}: 5 rows, 82.00% full\n",
    )
    assert sp.load_prepared(out).plan.digest() == plan.digest()
    assert main(["stats", out]) == 0
    assert capsys.readouterr() == (f"{stats}\n{plan.certificate}\n", "")
    assert main(["stats", out, "--rows-per-step", "2", "--json"]) == 0
    stats = sp.PackingStats.from_plan(plan, rows_per_step=2)
    proof = {"bound_method": "volume", "proved_optimal": True}
    assert json.loads(capsys.readouterr().out) == stats.to_dict() | proof
    assert main(["verify", out]) == 0
    assert capsys.readouterr() == (f"{out} is whole: 9 sequences in 5 rows\n", "")


def test_every_option_reaches_prepare(data, monkeypatch, tmp_path, capsys):
    seen = []

    def note(*args, **kwargs):
        seen.append((args, kwargs))
        return sp.load_prepared(tmp_path / "out")

    assert main([*data, "10"]) == 0
    monkeypatch.setattr("seqpack_jax.feeding.preparation.prepare", note)
    defaults = {
        "length_column": None,
        "tokens_column": None,
        "id_column": None,
        "algorithm": "best_fit_decreasing",
        "budget": None,
        "time_limit": None,
        "max_segments": None,
        "over_length": sp.OverLength(),
        "tolerance": 1,
        "extra_tokens": 0,
        "workers": len(os.sched_getaffinity(0)),
        "map_shards": None,
        "overwrite": False,
    }
    assert main("prepare --input a b/*.npy --output c --max-seq-len 12".split()) == 0
    assert seen.pop() == ((["a", "b/*.npy"], "c", 12), defaults)
    argv = (
        "prepare --input a --tokens-column t --id-column i --max-seq-len 12 --output c "
        "--algorithm optimal --budget 2.5 --time-limit 60 --max-segments 7 --over-length split "
        "--overlap 3 --min-tail 4 --positions continue --tolerance 5 --extra-tokens 2 --workers 3 "
        "--overwrite"
    )
    assert main(argv.split()) == 0
    assert seen.pop() == (
        (["a"], "c", 12),
        {
            **defaults,
            "tokens_column": "t",
            "id_column": "i",
            "algorithm": "optimal",
            "budget": 2.5,
            "time_limit": 60.0,
            "max_segments": 7,
            "over_length": sp.OverLength("split", overlap=3, min_tail=4, positions="continue"),
            "tolerance": 5,
            "extra_tokens": 2,
            "workers": 3,
            "overwrite": True,
        },
    )
    monkeypatch.setattr("seqpack_jax.feeding.distributed.ray_map", lambda **options: options)
    argv = "prepare --input a --output c --max-seq-len 12 --engine ray".split()
    assert main(argv) == 0
    assert seen.pop()[1] == {**defaults, "workers": 1, "map_shards": {"num_workers": None}}
    assert main([*argv, "--workers", "5"]) == 0
    assert seen.pop()[1] == {**defaults, "workers": 1, "map_shards": {"num_workers": 5}}


def test_every_algorithm_may_be_chosen():
    assert cli._PREPARE["--algorithm"]["choices"] == ALGORITHMS


def test_an_optimal_plan_and_its_proof(data, tmp_path, capsys):
    write(tmp_path / "in.parquet", [4, 4, 3, 3, 3, 3])  # best fit puts 4 and 4 together
    out = str(tmp_path / "out")
    assert main([*data, "10", *"--algorithm optimal --budget 1 --time-limit 60".split()]) == 0
    proof = sp.load_prepared(out).plan.certificate
    assert capsys.readouterr().out.splitlines()[-1] == str(proof)
    assert (proof.bins, proof.lower_bound, proof.proved_optimal) == (2, 2, True)
    assert main(["stats", out, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["bound_method"], figures["proved_optimal"]) == (proof.method, True)
    assert (figures["num_bins"], figures["lower_bound"], figures["gap"]) == (2, 2, 0)


def test_what_optimal_plans_need(data, tmp_path, monkeypatch, capsys):
    assert main([*data, "10", "--budget", "5"]) == 2
    error = capsys.readouterr().err
    assert "prepare: budget = 5.0 with algorithm = 'best_fit_decreasing'. Hint: leave" in error
    monkeypatch.setitem(sys.modules, "highspy", None)
    assert main([*data, "10", "--algorithm", "optimal"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("seqpack-jax prepare: algorithm = ")
    assert "the package highspy" in printed.err
    assert printed.err.endswith(" Hint: pip install 'seqpack_jax[optimal]'.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


@pytest.mark.parametrize(("tolerance", "bins"), [(1, 3), (4, 4)])
def test_the_proof_is_that_of_the_bound_that_is_shown(tolerance, bins, monkeypatch, capsys):
    """Plans of earlier releases know the volume alone, those of the seed library not even that."""
    plan = sp.pack_length_histogram({6: 3, 1: 2}, 10, tolerance=tolerance)
    assert plan.certificate == Certificate(bins, 3, "Martello-Toth L2", bins == 3)
    weaker = Certificate(bins, 2, "volume", proved_optimal=False)
    for saved in (plan.certificate, weaker, None):
        found = dataclasses.replace(plan, certificate=saved)
        prepared = SimpleNamespace(plan=found, pools=SimpleNamespace(report=sp.OverLengthReport()))
        monkeypatch.setattr("seqpack_jax.feeding.prepared.load_prepared", lambda _, p=prepared: p)
        best = plan.certificate if tolerance == 1 else saved or weaker
        assert main(["stats", "DIR"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1] == str(best)
        assert any(f"bound:       {best.lower_bound} (" in line for line in printed)
        assert main(["stats", "DIR", "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["lower_bound"] == best.lower_bound
        assert figures["bound_method"] == best.method
        assert figures["proved_optimal"] is best.proved_optimal


def test_options_of_split_belong_to_it(data, capsys):
    assert main([*data, "10", "--overlap", "3"]) == 2
    assert "takes no overlap" in capsys.readouterr().err


def test_errors_of_data_are_one_line(data, tmp_path, capsys):
    assert main([*data, "6"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("seqpack-jax prepare: row 0 (row 0 of in.parquet) has length 7")
    for command in ("stats", "verify"):
        assert main([command, str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"seqpack-jax {command}: load_prepared: {tmp_path}/manifest.json")


def test_loglevel(data, monkeypatch, capsys):
    before = logging.getLogger("seqpack_jax").handlers[:]
    for level, logs in (("warning", 0), ("DEBUG", 2)):
        monkeypatch.setenv("LOGLEVEL", level)
        assert main([*data, "10"]) == 0
        assert len(capsys.readouterr().err.splitlines()) == logs
    monkeypatch.setenv("LOGLEVEL", "LOUD")
    assert main([*data, "10"]) == 2
    assert "LOGLEVEL: 'LOUD' is no level" in capsys.readouterr().err
    assert logging.getLogger("seqpack_jax").handlers == before


# --- plot, report ---------------------------------------------------------------------------


def test_plot_and_report(data, tmp_path, monkeypatch, capsys):
    assert main([*data, "10"]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main("plot out --output plan.png".split()) == 0
    assert capsys.readouterr() == ("plan.png\n", "")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main("report out".split()) == 0
    assert capsys.readouterr() == ("report.html\n", "")
    page = (tmp_path / "report.html").read_text()
    assert "9 sequences in 5 rows of 10 tokens, 82.00 % full" in page
    assert main("report out --output other.htm".split()) == 0
    assert (tmp_path / "other.htm").read_text() == page
    assert main("verify out".split()) == 0


def test_options_reach_plot_and_report(monkeypatch, capsys):
    seen = []
    for name in ("write_picture", "write_report"):
        monkeypatch.setattr(f"seqpack_jax.report.{name}", lambda **options: seen.append(options))
    assert main("plot a --output b.svg".split()) == 0
    common = {"directory": "a", "output": "b.svg", "overwrite": False}
    assert seen.pop() == {**common, "rows": 40}
    assert main("plot a --output b.svg --rows 7 --overwrite".split()) == 0
    assert seen.pop() == {**common, "rows": 7, "overwrite": True}
    assert main("report a".split()) == 0
    assert seen.pop() == {**common, "output": "report.html"}
    assert main("report a --output b.html --overwrite".split()) == 0
    assert seen.pop() == {"directory": "a", "output": "b.html", "overwrite": True}


@pytest.mark.parametrize(("command", "name"), [("plot", "x.png"), ("report", "x.html")])
def test_errors_of_plot_and_report_are_one_line(command, name, data, tmp_path, monkeypatch, capsys):
    assert main([*data, "10"]) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("mine")
    cases = {
        f"out --output {name}": f"{name} exists. Hint: choose another output, or pass --overwrite.",
        "out --output x.gif": "the output x.gif does not end in .",
        f"out --output none/{name}": "the directory none of the output does not exist. Hint: make",
        f"out --output out/{name}": f"the output out/{name} lies in the prepared directory",
        f"none --output new{name}": "load_prepared: none/manifest.json cannot be read",
        f"in.parquet --output new{name}": "load_prepared: in.parquet/manifest.json cannot be read",
    }
    for arguments, problem in cases.items():
        assert main([command, *arguments.split()]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"seqpack-jax {command}: ")
        assert problem in printed.err
        assert printed.err.count("\n") == 1
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.parquet", "out", name])
    assert main([command, "out", "--output", name, "--overwrite"]) == 0
    assert (tmp_path / name).read_bytes() != b"mine"
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([command, "out", "--output", f"new{name}"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("is not installed. Hint: pip install 'seqpack_jax[plots]'.\n")


# --- export ---------------------------------------------------------------------------------


def test_options_reach_export(monkeypatch, capsys):
    seen = []

    def note(*args, **kwargs):
        seen.append((args, kwargs))
        return SimpleNamespace(files=[SimpleNamespace(rows=1200), SimpleNamespace(rows=34)])

    monkeypatch.setattr("seqpack_jax.feeding.export.export_rows", note)
    defaults = {
        "to": "arrayrecord",
        "epochs": 1,
        "seed": 0,
        "tokens_column": None,
        "id_column": None,
        "workers": len(os.sched_getaffinity(0)),
        "overwrite": False,
    }
    assert main("export a --sequences b --output c".split()) == 0
    assert seen.pop() == (("a", ["b"], "c"), defaults)
    assert capsys.readouterr() == ("c: 1,234 rows in 2 files\n", "")
    argv = "export a --sequences b d --tokens-column t --id-column i --epochs 3 --seed 4"
    assert main(f"{argv} --to parquet --output c --workers 2 --overwrite".split()) == 0
    changed = {"to": "parquet", "epochs": 3, "seed": 4, "tokens_column": "t", "id_column": "i"}
    assert seen.pop() == (("a", ["b", "d"], "c"), {**changed, "workers": 2, "overwrite": True})


def test_export_reads_back(tmp_path, capsys):
    tokens = pa.array([list(range(1, n + 1)) for n in LENGTHS])
    write(tmp_path / "in.parquet", LENGTHS, tokens=tokens)
    folder = str(tmp_path)
    argv = f"prepare --input {folder}/in.parquet --tokens-column tokens --max-seq-len 10"
    assert main(f"{argv} --output {folder}/plan --workers 1".split()) == 0
    argv = f"export {folder}/plan --sequences {folder}/in.parquet --to parquet --workers 1"
    assert main(f"{argv} --output {folder}/rows --epochs 2".split()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}/rows: 10 rows in 2 files"
    table = pa.concat_tables(
        [pq.read_table(path) for path in (tmp_path / "rows").glob("*.parquet")]
    )
    assert sum(map(sum, table["tokens"].to_pylist())) == 2 * sum(n * (n + 1) // 2 for n in LENGTHS)


def test_hints_name_flags(data, capsys):
    assert main([*data, "6"]) == 2
    assert "Hint: pass --over-length drop" in capsys.readouterr().err
    assert main([*data, "10", "--budget", "3"]) == 2
    assert "or pass --algorithm optimal" in capsys.readouterr().err


def test_wrong_arguments_are_one_line(capsys):
    for argv in ([], ["prepare"], ["stats", "x", "--rows-per-step", "0"], ["nothing"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("seqpack-jax")
        assert line.endswith("--help")


def test_a_full_place_behind_stdout_is_one_line(data):
    assert main([*data, "10"]) == 0
    program = "import sys; from seqpack_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", program, "stats", str(data[-2])],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr.splitlines() == ["seqpack-jax stats: [Errno 28] No space left on device"]


def test_the_package_runs_as_a_program():
    command = [sys.executable, "-m", "seqpack_jax", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"seqpack-jax {seqpack_jax.__version__}\n"
