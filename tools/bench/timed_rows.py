"""Rows of what was timed in turns, and the table that is drawn from them.

A row's metric is `ENGINE | MEASURE`; fxpress's numbers stand under `value`, those of others under `peer`. So a file of
rows holds all that its table shows, and a later run may replace some cases and keep the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .common import Row, pretty, show, verdict
from .engines import Engine
from .timing import Clock, Times

INT8, TORCH = "better int8", "torch fp32"
Goals = dict[str, dict[str, float]]
"""Engine → what it is compared with (`better int8` or `torch fp32`) → how many times faster is wanted."""

MEMORY = ("peak MB", "of it before loading MB")
MEASURES = ("CPU ms", "wall ms", f"times {TORCH}", f"times {INT8}", "distance")


def rows_of(
    case: str, engines: Sequence[Engine], times: Times, distances: dict[str, float], goals: Goals, threads: int
) -> list[Row]:
    """Rows of one case. Ratios are of CPU time on one thread, of wall time on more; goals belong to fxpress alone."""
    clock: Clock = "cpu" if threads == 1 else "wall"
    rivals = {INT8: better_int8(engines, times, clock), TORCH: TORCH}
    rows = []
    for engine in engines:
        wanted = goals.get(engine.name, {})
        row = _Writer(case, engine)
        rows += [row("CPU ms", times.ms(engine.name, "cpu"), "ms"), row("wall ms", times.ms(engine.name, "wall"), "ms")]
        for label, rival in rivals.items():
            ratio = times.speedup(engine.name, rival, clock)
            rows.append(row(f"times {label}", ratio, f"against {rival}", wanted.get(label)))
        rows.append(row("distance", distances[engine.name], "of the largest output"))
    return rows


def better_int8(engines: Sequence[Engine], times: Times, clock: Clock) -> str:
    """Name of the int8 engine with the least median time."""
    return min((engine.name for engine in engines if engine.kind == "int8"), key=lambda name: times.ms(name, clock))


class _Writer:
    """Makes the rows of one engine in one case."""

    def __init__(self, case: str, engine: Engine) -> None:
        self.case, self.engine = case, engine

    def __call__(self, measure: str, number: float, unit: str, goal: float | None = None) -> Row:
        ours, metric = self.engine.kind == "fxpress", f"{self.engine.name} | {measure}"
        value, peer = (number, None) if ours else (None, number)
        if goal is None:
            return Row(self.case, metric, value, unit, peer)
        return Row(self.case, metric, value, unit, peer, f"≥ {goal:g}", number >= goal)


def table(rows: Iterable[Row], title: str, measures: Sequence[str] = MEASURES) -> Table:
    """A line per case and engine, a column per measure."""
    drawn = Table(title=title, title_justify="left")
    for column in ("case", "engine", *measures, "goal", "met"):
        drawn.add_column(column, justify="right" if column in measures else "left")
    last = None
    for (case, engine), found in _lines(rows).items():
        if not set(measures) <= set(found):
            continue
        cells = [pretty(_number(found.get(measure))) for measure in measures]
        judged = [row for row in found.values() if row.goal is not None]
        goals = ", ".join(f"{name.partition(' ')[2]} {row.goal}" for name, row in found.items() if row.goal)
        met = verdict(all(bool(row.met) for row in judged)) if judged else ""
        if case != last and last is not None:
            drawn.add_section()
        drawn.add_row("" if case == last else case, engine, *cells, goals, met)
        last = case
    return drawn


def print_tables(rows: Sequence[Row], times: str, rest: str, console: Console) -> None:
    """Times, peak memory, and rows that stand for themselves, each as a table where there are any.

    Args:
        rows: of all parts that ran.
        times: title of the first table.
        rest: title of the last one.
        console: takes them.
    """
    for title, measures in ((times, MEASURES), ("Peak memory of a process", MEMORY)):
        drawn = table(rows, title, measures)
        if drawn.row_count:
            console.print(drawn)
    others = [row for row in rows if " | " not in row.metric and row.case != "header"]
    if others:
        show(others, rest, console)


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of an earlier run with those of the cases that ran again replaced, header rows by the newer ones."""
    again = {row.case for row in new}
    kept = [row for row in old if row.case not in again]
    headers = [row for row in new if row.case == "header"]
    return [*headers, *kept, *(row for row in new if row.case != "header")]


def _lines(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        engine, bar, measure = row.metric.rpartition(" | ")
        if bar:
            lines.setdefault((row.case, engine), {})[measure] = row
    return lines


def _number(row: Row | None) -> Any:
    return None if row is None else row.peer if row.value is None else row.value
