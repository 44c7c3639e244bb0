"""The command line: `seqpack-jax COMMAND`.

A command is two small functions and one entry in `_COMMANDS`: one declares its arguments, one runs
it and returns the exit code.  The second imports what it needs, so that `--help` stays quick.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from seqpack_jax import __version__
from seqpack_jax.errors import SeqpackError

__all__ = ["main"]


class Command(NamedTuple):
    """One subcommand: what `--help` says, its arguments, and what it does."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the name of the program; None for those of this process.

    Returns:
        The exit code: 0; 1 when a check did not hold; 2 for bad input; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 for wrong arguments, with 0 after `--help` and `--version`.
    """
    arguments = _make_parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command].run(arguments)
    except SeqpackError as error:
        line = " ".join(str(error).split())
        print(f"seqpack-jax {arguments.command}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"seqpack-jax {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_arguments(subparser)
    return parser


# --- kinds of arguments -----------------------------------------------------------------------


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in [{low}, {high}]")
        return value

    return parse


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


# --- demo -------------------------------------------------------------------------------------


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=_positive_number, default=60.0, help="how long to train at most"
    )
    parser.add_argument("--batch-size", type=_integer(1, 4096), default=4, help="rows per batch")
    parser.add_argument(
        "--max-seq-len", type=_integer(64, 4096), default=512, help="tokens per row"
    )
    parser.add_argument(
        "--seed", type=_integer(0, 2**31 - 1), default=0, help="of the weights and the epochs"
    )
    # How the demo starts its second process.
    parser.add_argument("--resume-in", metavar="DIR", help=argparse.SUPPRESS)


def _run_demo(arguments: argparse.Namespace) -> int:
    from seqpack_jax.demo import DemoOptions, resume_in, run_demo

    if arguments.resume_in is not None:
        return resume_in(arguments.resume_in)
    options = DemoOptions(
        arguments.seconds, arguments.batch_size, arguments.max_seq_len, arguments.seed
    )
    return run_demo(options)


_COMMANDS = {
    "demo": Command(
        "pack the standard library's docstrings, feed, train, prove and resume",
        _add_demo_arguments,
        _run_demo,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
