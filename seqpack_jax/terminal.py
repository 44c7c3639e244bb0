"""Where progress is shown: on stderr, and by default only if someone looks."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["is_shown", "stderr_console"]


def is_shown(show: bool | None) -> bool:
    """Return whether to show progress: as asked, or if None, when stderr is a terminal."""
    return sys.stderr.isatty() if show is None else show


def stderr_console() -> Any:
    """Return a rich console on stderr, in notebooks too, where it would take to widgets."""
    from rich.console import Console

    return Console(stderr=True, force_jupyter=False)
