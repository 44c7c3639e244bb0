"""Commands, their help, and what wrong arguments get."""

import subprocess
import sys

import pytest

import seqpack_jax
from seqpack_jax import cli
from seqpack_jax.cli import main
from seqpack_jax.demo import DemoOptions

OPTIONS = {"demo": ["--seconds", "--batch-size", "--max-seq-len", "--seed"]}


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
    for option in OPTIONS[name]:
        assert option in printed
    assert "resume" not in printed.split("options:")[1]  # hidden: only the demo itself uses it


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
        "    main(['demo', '--help'])\n"
        "except SystemExit:\n"
        "    loaded = {'jax', 'flax', 'optax', 'grain', 'rich'} & set(sys.modules)\n"
        "    sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
