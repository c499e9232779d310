"""A progress bar over layers that says what is done to each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bar:
    """Layers done of all; `say` tells what is going on, `done` that a layer is finished."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def say(self, state: str) -> None:
        """Show what is being done, e.g. `fc6: sweep 2 of 3`."""
        self._progress.update(self._task, state=state)

    def done(self) -> None:
        """One more layer is finished."""
        self._progress.update(self._task, advance=1)


@contextlib.contextmanager
def layer_bar(console: Console | None, title: str, total: int) -> Iterator[Bar]:
    """Show a bar until the block is left.

    Args:
        console: where; nothing is shown without one or where that is no terminal.
        title: what is done to the layers.
        total: number of layers.
    """
    visible = console is not None and console.is_terminal and not console.quiet
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not visible,
    )
    with progress:
        yield Bar(progress, progress.add_task(title, total=total, state=""))
