"""The progress bar of a training run: epoch, loss, accuracy, images per second, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TrainBar:
    """Shows where a run is; shows nothing without a console or where that is no terminal.

    Args:
        console: where to show it.
        epochs: how many there will be.
        steps: steps per epoch if known.
    """

    def __init__(self, console: Console | None, epochs: int, steps: int | None) -> None:
        self.epochs, self.steps = epochs, steps
        visible = console is not None and console.is_terminal and not console.quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not visible,
        )
        self._task: TaskID | None = None
        self._start, self._images = time.perf_counter(), 0

    @contextlib.contextmanager
    def shown(self, title: str, done: int = 0) -> Iterator[TrainBar]:
        """Show the bar until the block is left; `done` steps were made before."""
        with self._bar:
            state = f"resumed at step {done}" if done else ""
            self._task = self._bar.add_task(title, total=self._total(), completed=done, state=state)
            self._start = time.perf_counter()
            yield self

    def step(self, epoch: int, images: int, loss: float, accuracy: float) -> None:
        """One step is done; `loss` and `accuracy` are running means of the epoch."""
        self._images += images
        rate = self._images / max(time.perf_counter() - self._start, 1e-9)
        # fits into 80 columns, with title and time left
        state = f"epoch {epoch + 1}/{self.epochs}  loss {loss:.3f}  accuracy {accuracy:.1%}  {rate:.0f} images/s"
        if self._task is not None:
            self._bar.update(self._task, advance=1, state=state)

    def know_steps(self, steps: int) -> None:
        """The first epoch has shown how many steps one has."""
        self.steps = steps
        if self._task is not None:
            self._bar.update(self._task, total=self._total())

    @property
    def images_per_second(self) -> float:
        """Since the start, evaluation included."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    def _total(self) -> int | None:
        return None if self.steps is None else self.steps * self.epochs
