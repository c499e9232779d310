"""A progress bar for work on a loader: what is done, images per second, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Step = Callable[[int], None]


@contextlib.contextmanager
def counted(console: Console | None, title: str, total: int | None) -> Iterator[Step]:
    """Show a bar until the block is left; the function given is called after each step with its number of images.

    Args:
        console: where to show it; nothing is shown without one or where that is no terminal.
        title: what is done.
        total: number of steps if known.
    """
    visible = console is not None and console.is_terminal and not console.quiet
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not visible,
    )
    with bar:
        task, start, images = bar.add_task(title, total=total, state=""), time.perf_counter(), 0

        def step(count: int) -> None:
            nonlocal images
            images += count
            rate = images / max(time.perf_counter() - start, 1e-9)
            bar.update(task, advance=1, state=f"{rate:.0f} images/s")

        yield step
