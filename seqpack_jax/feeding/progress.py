"""A progress bar with a rate, for everything that takes long; silent when nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from seqpack_jax.terminal import is_shown, stderr_console

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    text: str, total: int | None, show: bool | None
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr while the block runs.

    Args:
        text: what is being done.
        total: how many steps that takes; None if nobody knows.
        show: whether to show it; None to do so when stderr is a terminal.

    Yields:
        `advance(steps)`, which moves the bar on; any thread may call it.

    Example:
        >>> with progress_bar("counting", 3, show=False) as advance:
        ...     for step in range(3):
        ...         advance(1)
    """
    if not is_shown(show):
        yield lambda steps: None
        return
    from rich import progress
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            rate = task.finished_speed or task.speed
            return Text("" if rate is None else f"{rate:,.0f}/s", style="progress.data.speed")

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Rate(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=stderr_console()) as bar:
        task = bar.add_task(text, total=total)
        yield lambda steps: bar.advance(task, steps)
