"""The command line: `seqpack-jax COMMAND`.

A command is a table of its arguments, a function that runs it and returns the exit code, and one
entry in `_COMMANDS`.  The function imports what it needs, so that `--help` stays quick.

What is asked for goes to stdout; logs and progress go to stderr.  The environment variable LOGLEVEL
says which logs (default INFO, also when it is empty).

Exit codes: 0; 1 when `demo` finds that a check does not hold; 2 for wrong arguments or bad input,
and so for a directory that `verify` finds damaged; 130 after Ctrl-C; 141 when what reads the output
is gone, as `head` is.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from seqpack_jax import __version__
from seqpack_jax.errors import SeqpackError, fail
from seqpack_jax.flags import Formatter, Parser, integer, name_of, positive_number, size

__all__ = ["main"]

Arguments = Mapping[str, dict[str, Any]]  # of `ArgumentParser.add_argument`, by flag


class Command(NamedTuple):
    """One subcommand: what `--help` says, its arguments, and what it does."""

    summary: str
    arguments: Arguments
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the name of the program; None for those of this process.

    Returns:
        The exit code, as the module says.

    Raises:
        SystemExit: with code 2 for wrong arguments, with 0 after `--help` and `--version`.
    """
    arguments = _make_parser().parse_args(argv)
    try:
        with _logging():
            code = _COMMANDS[arguments.command].run(arguments)
            sys.stdout.flush()
            return code
    except SeqpackError as error:
        print(f"seqpack-jax {arguments.command}: {_in_flags(error, arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"seqpack-jax {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except OSError as error:
        _give_up_stdout()
        print(f"seqpack-jax {arguments.command}: {error}", file=sys.stderr)
        return 2


def _give_up_stdout() -> None:
    """Write no more there: Python flushes it once more when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _in_flags(error: SeqpackError, arguments: argparse.Namespace) -> str:
    """Write an error in one line, with the flags of its command for the arguments of Python."""
    line = " ".join(str(error).split()).removeprefix(f"{arguments.command}: ")
    for flag in _COMMANDS[arguments.command].arguments:
        name = flag.removeprefix("--").replace("-", "_")
        line = line.replace(f"{name}=True", flag)
        line = re.sub(rf"\b{name}='(\w+)'", rf"{flag} \1", line)
    return line


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="seqpack-jax",
        description="Pack variable-length sequences into fixed-shape batches for JAX and Flax.",
    )
    parser.add_argument("--version", action="version", version=f"seqpack-jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            formatter_class=Formatter,
        )
        for flag, options in command.arguments.items():
            subparser.add_argument(flag, **options)
    return parser


@contextmanager
def _logging() -> Iterator[None]:
    """Print the logs of this package to stderr while a command runs."""
    name = os.environ.get("LOGLEVEL") or "INFO"
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        fail("LOGLEVEL", f"{name!r} is no level", "set DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("seqpack_jax")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# --- arguments of several commands ------------------------------------------------------------


_DIRECTORY: dict[str, Any] = {"metavar": "DIR", "help": "what `prepare` wrote, a path or a URL"}
_WORKERS = {**size(), "help": "processes (default: as many as CPUs)"}


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- demo -------------------------------------------------------------------------------------

_DEMO: Arguments = {
    "--seconds": {"type": positive_number, "default": 60.0, "help": "how long to train at most"},
    "--batch-size": {"type": integer(1, 4096), "default": 4, "help": "rows per batch"},
    "--max-seq-len": {"type": integer(64, 4096), "default": 512, "help": "tokens per row"},
    "--seed": {
        "type": integer(0, 2**31 - 1),
        "default": 0,
        "help": "of the weights and the epochs",
    },
    # How the demo starts its second process.
    "--resume-in": {"metavar": "DIR", "help": argparse.SUPPRESS},
}


def _run_demo(arguments: argparse.Namespace) -> int:
    from seqpack_jax.demo import DemoOptions, resume_in, run_demo

    if arguments.resume_in is not None:
        return resume_in(arguments.resume_in)
    options = DemoOptions(
        arguments.seconds, arguments.batch_size, arguments.max_seq_len, arguments.seed
    )
    return run_demo(options)


# --- prepare, stats, verify -------------------------------------------------------------------

_PREPARE: Arguments = {
    "--input": {
        "required": True,
        "nargs": "+",
        "metavar": "PATH",
        "help": "parquet, .npy or FASTA files: paths, directories, globs or URLs",
    },
    "--length-column": name_of("of parquet files: the lengths, integers"),
    "--tokens-column": name_of("of parquet files, instead: the tokens, lists"),
    "--id-column": name_of("of parquet files: the ids, integers (default: the number of the row)"),
    "--max-seq-len": {"required": True, **size(), "help": "tokens per row"},
    "--algorithm": {
        "default": "best_fit_decreasing",
        "choices": (
            "best_fit_decreasing",
            "first_fit_decreasing",
            "worst_fit_decreasing",
            "optimal",
        ),
        "help": "how to plan",
    },
    "--budget": {
        "type": positive_number,
        "metavar": "UNITS",
        "help": "of optimal: units of work of about a second each (default: 8, up to 48)",
    },
    "--time-limit": {
        "type": positive_number,
        "metavar": "SECONDS",
        "help": "of optimal: time until it ends; what it finds then depends on the machine",
    },
    "--max-segments": {**size(), "help": "the most sequences in a row"},
    "--over-length": {
        "default": "error",
        "choices": ("error", "drop", "truncate", "truncate_left", "crop", "split"),
        "help": "what becomes of sequences of more tokens than a row",
    },
    "--overlap": {**size(0), "default": 0, "help": "of split: tokens that two pieces share"},
    "--min-tail": {**size(), "default": 1, "help": "of split: tokens of a last piece at least"},
    "--positions": {
        "default": "restart",
        "choices": ("restart", "continue"),
        "help": "of split: those of a piece",
    },
    "--tolerance": {**size(), "default": 1, "help": "plan lengths as multiples of this"},
    "--extra-tokens": {**size(0), "default": 0, "help": "added to every length, as for BOS, EOS"},
    "--output": {"required": True, "metavar": "DIR", "help": "the directory to be made"},
    "--workers": _WORKERS,
    "--engine": {
        "default": "local",
        "choices": ("local", "ray"),
        "help": "where workers run: on this machine, or where RAY_ADDRESS says",
    },
    "--overwrite": {"action": "store_true", "help": "replace what was prepared at --output before"},
}


def _run_prepare(arguments: argparse.Namespace) -> int:
    from seqpack_jax.feeding.distributed import ray_map
    from seqpack_jax.feeding.preparation import prepare
    from seqpack_jax.planning.over_length import OverLength

    options = dict(vars(arguments))
    del options["command"]
    split = [options.pop(name) for name in ("over_length", "overlap", "min_tail", "positions")]
    workers = options.pop("workers")
    on_ray = options.pop("engine") == "ray"
    prepared = prepare(
        options.pop("input"),
        options.pop("output"),
        options.pop("max_seq_len"),
        over_length=OverLength(*split),
        workers=1 if on_ray else workers or _cpus(),
        map_shards=ray_map(num_workers=workers) if on_ray else None,
        **options,
    )
    _print_stats(prepared)
    return 0


def _print_stats(prepared: Any, rows_per_step: int = 1, as_json: bool = False) -> None:
    from seqpack_jax.planning.stats import PackingStats
    from seqpack_jax.report import certificate_of

    plan, report = prepared.plan, prepared.pools.report
    stats = PackingStats.from_plan(plan, rows_per_step=rows_per_step, report=report)
    proof = certificate_of(plan, stats.lower_bound)
    if as_json:
        figures = {"bound_method": proof.method, "proved_optimal": proof.proved_optimal}
        print(json.dumps(stats.to_dict() | figures, indent=1))
    else:
        print(f"{stats}\n{proof}")


_STATS: Arguments = {
    "directory": _DIRECTORY,
    "--rows-per-step": {**size(), "default": 1, "help": "rows of a global batch"},
    "--json": {"action": "store_true", "help": "print them as JSON"},
}


def _run_stats(arguments: argparse.Namespace) -> int:
    from seqpack_jax.feeding.prepared import load_prepared

    _print_stats(load_prepared(arguments.directory), arguments.rows_per_step, arguments.json)
    return 0


def _run_verify(arguments: argparse.Namespace) -> int:
    from seqpack_jax.feeding.verification import verify_prepared

    plan = verify_prepared(arguments.directory).plan
    sequences, rows = f"{plan.num_sequences:,} sequences", f"{plan.num_bins:,} rows"
    print(f"{arguments.directory} is whole: {sequences} in {rows}")
    return 0


# --- plot, report -----------------------------------------------------------------------------

_REPLACE = {"action": "store_true", "help": "replace the file at --output"}

_PLOT: Arguments = {
    "directory": _DIRECTORY,
    "--output": {"required": True, "metavar": "FILE", "help": "the picture: .png, .svg, .pdf"},
    "--rows": {**size(), "type": integer(1, 500), "default": 40, "help": "rows drawn at most"},
    "--overwrite": _REPLACE,
}

_REPORT: Arguments = {
    "directory": _DIRECTORY,
    "--output": {"default": "report.html", "metavar": "FILE", "help": "the page: .html"},
    "--overwrite": _REPLACE,
}


def _run_plot(arguments: argparse.Namespace) -> int:
    from seqpack_jax.report import write_picture

    return _write_file(write_picture, arguments)


def _run_report(arguments: argparse.Namespace) -> int:
    from seqpack_jax.report import write_report

    return _write_file(write_report, arguments)


def _write_file(write: Callable[..., Any], arguments: argparse.Namespace) -> int:
    options = dict(vars(arguments))
    del options["command"]
    write(**options)
    print(arguments.output)
    return 0


# --- export -----------------------------------------------------------------------------------

_EXPORT: Arguments = {
    "directory": _DIRECTORY,
    "--sequences": {
        "required": True,
        "nargs": "+",
        "metavar": "PATH",
        "help": "where the tokens are: parquet or FASTA files, as for prepare, or a token store",
    },
    "--tokens-column": name_of("of parquet files (default: that of the preparation)"),
    "--id-column": name_of("of parquet files (default: that of the preparation)"),
    "--epochs": {**size(), "default": 1, "help": "how often each sequence comes"},
    "--seed": {**size(0), "default": 0, "help": "of the epochs"},
    "--to": {
        "default": "arrayrecord",
        "choices": ("arrayrecord", "parquet"),
        "help": "the format of the files",
    },
    "--output": {"required": True, "metavar": "DIR", "help": "the directory to be made"},
    "--workers": _WORKERS,
    "--overwrite": {"action": "store_true", "help": "replace an earlier export at --output"},
}


def _run_export(arguments: argparse.Namespace) -> int:
    from seqpack_jax.drawing import numbered
    from seqpack_jax.feeding.export import export_rows

    manifest = export_rows(
        arguments.directory,
        arguments.sequences,
        arguments.output,
        to=arguments.to,
        epochs=arguments.epochs,
        seed=arguments.seed,
        tokens_column=arguments.tokens_column,
        id_column=arguments.id_column,
        workers=arguments.workers or _cpus(),
        overwrite=arguments.overwrite,
    )
    rows = sum(file.rows for file in manifest.files)
    files = numbered(len(manifest.files), "file")
    print(f"{arguments.output}: {numbered(rows, 'row')} in {files}")
    return 0


_COMMANDS = {
    "demo": Command(
        "pack the standard library's docstrings, feed, train, prove and resume", _DEMO, _run_demo
    ),
    "prepare": Command("plan a data set that lies in files, of any size", _PREPARE, _run_prepare),
    "stats": Command("show how full the rows of a prepared data set are", _STATS, _run_stats),
    "verify": Command(
        "read a prepared data set in full, and check all of it",
        {"directory": _DIRECTORY},
        _run_verify,
    ),
    "export": Command("write packed rows to files, in training order", _EXPORT, _run_export),
    "plot": Command("draw the lengths and rows of a prepared data set", _PLOT, _run_plot),
    "report": Command("write a page of HTML on a prepared data set", _REPORT, _run_report),
}


if __name__ == "__main__":
    sys.exit(main())
