"""The log of a run: `steps.csv` and `epochs.csv`, and the same numbers as TensorBoard events."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ir.errors import OptionError
from ..atomic import write_atomically

STEP_COLUMNS = ("step", "epoch", "lr", "loss", "accuracy", "images_per_second")
EPOCH_COLUMNS = ("step", "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "seconds")


class Log:
    """Writes the rows of a run.

    Rows after `step` or `epoch` are of a run that was interrupted behind its last checkpoint: they are taken out of
    the CSV files, and marked as overtaken in the TensorBoard events.

    Args:
        folder: made where it does not exist.
        step: optimiser steps that were done when the run was taken up, 0 for a new run: it starts the files anew.
        epoch: whole epochs that were done then. A checkpoint behind the last step of an epoch is not yet its end:
            the row of that epoch has the same step and is written again (TensorBoard keeps both, which are equal).
    """

    def __init__(self, folder: Path, step: int, epoch: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"the log folder {folder} cannot be made: {error.strerror}") from None
        self._tables = {
            "steps": _Table(folder / "steps.csv", STEP_COLUMNS, "step", step),
            "epochs": _Table(folder / "epochs.csv", EPOCH_COLUMNS, "epoch", epoch),
        }
        # takes a second to import, and only who wants a log waits for it
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def step(self, row: Mapping[str, float]) -> None:
        """Some steps are done; `row` has STEP_COLUMNS."""
        self._tables["steps"].add(row)
        self._scalars({f"train/{name}": row[name] for name in ("loss", "accuracy", "lr", "images_per_second")}, row)

    def epoch(self, row: Mapping[str, float | None]) -> None:
        """An epoch is done; `row` has EPOCH_COLUMNS, empty where a value is None."""
        self._tables["epochs"].add(row)
        shown = {
            "epoch/loss": "loss",
            "epoch/accuracy": "accuracy",
            "val/loss": "val_loss",
            "val/accuracy": "val_accuracy",
        }
        self._scalars({name: row[column] for name, column in shown.items()}, row)

    def flush(self) -> None:
        """All rows are on their way to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """No more rows."""
        self._writer.close()
        for table in self._tables.values():
            table.close()

    def _scalars(self, values: Mapping[str, float | None], row: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["step"])


class _Table:
    """One CSV file that grows by whole lines; of those that it has, the ones up to `last` in a column stay."""

    def __init__(self, path: Path, columns: tuple[str, ...], column: str, last: int) -> None:
        self.columns = columns
        write_atomically(path, [_text(columns, _rows_until(path, columns, column, last)).encode()])
        self._stream = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._stream, columns)

    def add(self, row: Mapping[str, Any]) -> None:
        """One line, handed to the system at once: a kill does not take it back."""
        self._writer.writerow({name: row[name] for name in self.columns})
        self._stream.flush()

    def close(self) -> None:
        """No more lines."""
        self._stream.close()


def _text(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _rows_until(path: Path, columns: tuple[str, ...], column: str, last: int) -> list[dict[str, str]]:
    """The whole rows of a file up to a step or an epoch."""
    if last == 0 or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if set(row) == set(columns) and None not in row.values()]
    return [row for row in rows if row[column].isdigit() and int(row[column]) <= last]
