"""The form that every benchmark shares: rows, the header row, the table on the screen and the JSON file.

A row is `{"case", "metric", "value", "unit", "peer", "goal", "met"}`: `value` is what fxpress reached, `peer` what the
other library reached on the same case, `goal` says in words what was wanted, `met` whether it was (None: no goal).
The first row of a file, case `header`, holds machine, versions, threads and seed: numbers without them say nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "onnxruntime", "openvino", "nncf", "fxpress")


@dataclass(frozen=True)
class Row:
    """One measured number (or word) of one case."""

    case: str
    metric: str
    value: Any
    unit: str = ""
    peer: Any = None
    goal: str | None = None
    met: bool | None = None


def header(seed: int, command: str | None = None) -> Row:
    """The row that says on what and with what the other rows were measured."""
    environment = {
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "command": command or default_command(),
    }
    return Row("header", "environment", environment)


def default_command() -> str:
    """The command line of this process as one would type it again."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    return " ".join([program, *sys.argv[1:]])


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter here, of those that are installed."""
    installed = {dist.name.lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def cpu_name() -> str:
    """Name of the processor as the kernel gives it, or what `platform` knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON array, one row a line, so that two runs can be compared with `diff`; atomic."""
    lines = ",\n".join(json.dumps(asdict(row), sort_keys=False) for row in rows)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    scratch.write_text(f"[\n{lines}\n]\n")
    os.replace(scratch, path)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file written by `write_rows`."""
    return [Row(**record) for record in json.loads(path.read_text())]


def show(rows: Sequence[Row], title: str, console: Console | None = None) -> None:
    """Print rows that stand for themselves (a number, its goal) as a table."""
    table = Table(title=title, title_justify="left")
    for column in ("case", "metric", "fxpress", "unit", "peer", "goal", "met"):
        table.add_column(column, justify="right" if column in ("fxpress", "peer") else "left")
    for row in rows:
        if row.case != "header":
            table.add_row(
                row.case, row.metric, pretty(row.value), row.unit, pretty(row.peer), row.goal or "", verdict(row.met)
            )
    (console or screen()).print(table)


def screen() -> Console:
    """A console as wide as the terminal, or wide enough for the tables where output goes to a file."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=240, highlight=False)


def pretty(value: Any) -> str:
    """A cell: three significant digits for floats, yes/no for booleans, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def verdict(met: bool | None) -> str:
    """Cell of the column `met`."""
    return {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[met]


def interleaved(tasks: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of what the tasks report, run in turn, so that a busy moment of the machine hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            seconds[name].append(task())
    return {name: statistics.median(values) for name, values in seconds.items()}
