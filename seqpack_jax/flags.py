"""Kinds of arguments of the command line, and a parser that says what is wrong in one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["Formatter", "Parser", "integer", "name_of", "positive_number", "size"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return what reads an integer in `[low, high]`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in [{low}, {high}]")
        return value

    return parse


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


def size(low: int = 1) -> dict[str, Any]:
    """Return the options of an argument that is a size, at least `low`."""
    return {"type": integer(low, 2**31 - 1), "metavar": "N"}


def name_of(what: str) -> dict[str, Any]:
    """Return the options of an argument that is a name."""
    return {"metavar": "NAME", "help": what}
