"""What compilation did to the network: one row per pass."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .analyse.chart import sensitivity_table, sensitivity_title
from .analyse.sensitivity import Sensitivity
from .base import Skip


@dataclass
class Row:
    """The network after one pass; the first row is the network as traced.

    Args:
        name: the pass, or `trace`.
        semantics: `exact`, `lossy` or `training`.
        options: the pass's options that differ from their defaults.
        parameters: number of parameters.
        macs: multiply-accumulates of one image.
        size_bytes: bytes of the network saved as an .fxp file.
        accuracy: share of validation images with the right first answer, 0-1; None without validation data.
        latency_ms: median time of one forward pass of the example inputs; None where it was not measured.
        latency_ratio: that time as a share of the original's, both measured interleaved in one run.
        distance: relative max-norm; of the masked to the cut network (prune-channels) or of the outputs behind the
            pass to those before it; None for training passes and without verification.
        seconds: wall time of the pass itself, without measurements.
        notes: what the pass says it did.
        skips: what it left alone, and why.
        metrics: further numbers of the pass; of a lossy one `output_distance`, that of the outputs in any case.
    """

    name: str
    semantics: str
    options: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    macs: int = 0
    size_bytes: int = 0
    accuracy: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    distance: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Rows in the order of the passes, and what they were measured on.

    Args:
        rows: `rows[0]` is the network as traced, `rows[-1]` what was compiled.
        environment: versions, processor, threads, and the seed.
    """

    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Row:
        """The last row of that name.

        Raises:
            KeyError: no pass of that name ran.
        """
        for row in reversed(self.rows):
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; rows: {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """The inverse of `to_dict`.

        Raises:
            ValueError: content of another form.
        """
        return TypeAdapter(cls).validate_python(content)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))

    def __rich__(self) -> RenderableType:
        lines = [line for row in self.rows for line in _remarks(row)]
        return Group(self._table(), *([Text()] if lines else []), *lines, *self._charts(), *self._footer())

    def _table(self) -> Table:
        columns = {title: [text(row, self.rows[0]) for row in self.rows] for title, text in _COLUMNS.items()}
        shown = {title: cells for title, cells in columns.items() if any(cells)}
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for title in shown:
            table.add_column(title, justify="left" if title == "pass" else "right", no_wrap=True)
        for index, cells in enumerate(zip(*shown.values(), strict=True)):
            table.add_row(*map(Text, cells), style="bold" if index == len(self.rows) - 1 else None)
        return table

    def _charts(self) -> list[RenderableType]:
        """The sensitivity scans of the passes that made one."""
        charts: list[RenderableType] = []
        for row, scan in scans_of(self):
            title = Text.assemble((f"{row.name}: ", "bold"), sensitivity_title(scan))
            charts += [Text(), title, sensitivity_table(scan)]
        return charts

    def _footer(self) -> list[Text]:
        environment = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return [Text(), Text(environment, style="dim")] if environment else []


def scans_of(report: Report) -> list[tuple[Row, Sensitivity]]:
    """The sensitivity scans in a report, each with the row of its pass; content of another form is passed over."""
    found = []
    for row in report.rows:
        if "sensitivity" in row.metrics:
            with contextlib.suppress(ValidationError):  # from a file that somebody else wrote
                found.append((row, Sensitivity.from_dict(row.metrics["sensitivity"])))
    return found


def short(number: float) -> str:
    """A count with three digits: `1.82G`, `11.7M`, `812`."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor * 0.9995:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"


def _share(value: float, original: float) -> str:
    return f"{short(value)} {value / original:4.0%}" if original else short(value)


def _remarks(row: Row) -> list[Text]:
    """Notes and skips of one pass; equal reasons of skips are told together, and of many only the first few."""
    reasons: dict[str, list[str]] = {}
    for skip in row.skips:
        reasons.setdefault(skip.reason, []).append(skip.node)
    skipped = [f"skipped {_some(nodes)}: {reason}" for reason, nodes in reasons.items()]
    if len(skipped) > _SKIPS:
        rest = sum(len(nodes) for nodes in list(reasons.values())[_SKIPS:])
        skipped[_SKIPS:] = [f"skipped {rest} more: see the skips of this row in the report's JSON"]
    return [Text.assemble((f"{row.name}: ", "bold"), text) for text in (*row.notes, *skipped)]


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_SKIPS = 3
_COLUMNS: dict[str, Callable[[Row, Row], str]] = {
    "pass": lambda row, _: row.name,
    "parameters": lambda row, first: _share(row.parameters, first.parameters),
    "MACs": lambda row, first: _share(row.macs, first.macs),
    "bytes": lambda row, first: _share(row.size_bytes, first.size_bytes),
    "accuracy": lambda row, _: "" if row.accuracy is None else f"{row.accuracy:.2%}",
    "latency ms": lambda row, _: "" if row.latency_ms is None else f"{row.latency_ms:.3g}",
    "ratio": lambda row, _: "" if row.latency_ratio is None else f"{row.latency_ratio:.2f}",
    "distance": lambda row, _: "" if row.distance is None else f"{row.distance:.0e}",
    "seconds": lambda row, _: f"{row.seconds:.1f}",
}
