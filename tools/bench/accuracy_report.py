"""Results of a protocol as rows, goals, and a page."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from ...ir.errors import OptionError
from .accuracy_data import LABELS
from .accuracy_protocol import BASE, Goal, Protocol
from .common import Row, pretty

_CORRELATIONS = {
    "overall_abs": "all channels, size of the change",
    "within_abs": "within a layer, size of the change",
    "overall": "all channels",
    "within": "within a layer",
}
Facts = dict[str, Any]
Records = dict[str, list[Facts]]
"""Name of a row (or `base`) → what was measured, an entry per seed."""

METRICS: dict[str, tuple[str, float]] = {
    "accuracy": ("%", 100.0),
    "accuracy_before_training": ("%", 100.0),
    "macs": ("of the base", 1.0),
    "parameters": ("of the base", 1.0),
    "bytes": ("of the base", 1.0),
    "latency_1": ("of the base, batch 1, 1 thread, both emitted", 1.0),
    "emitted_bytes": ("of the base, both emitted", 1.0),
    "emitted_size": ("bytes, emitted", 1.0),
    "ratio_error": ("nats", 1.0),
    "ratio_rank": ("Spearman", 1.0),
    "size_bytes": ("bytes", 1.0),
    "seconds": ("s", 1.0),
    "cpu_seconds": ("s of CPU time", 1.0),
    "pass_seconds": ("s in passes", 1.0),
}
"""Metric → unit, and the factor to it."""


def rows_of(protocol: Protocol, records: Records) -> list[Row]:
    """A row per metric of each case: the mean over the seeds, their values in the unit's column, then the goals."""
    rows = []
    for name, facts in records.items():
        for metric, (unit, factor) in METRICS.items():
            values = [factor * fact[metric] for fact in facts if fact.get(metric) is not None]
            if values:
                single = ", ".join(f"{value:.2f}" for value in values)
                rows.append(Row(name, metric, statistics.fmean(values), f"{unit}, seeds: {single}"))
    return rows + [row for goal in protocol.goals if (row := judge(goal, records)) is not None]


def judge(goal: Goal, records: Records) -> Row | None:
    """Whether a goal is met; None as long as one of its rows is missing."""
    if not records.get(goal.row) or not records.get(goal.than) or not records.get(BASE):
        return None
    _, factor = METRICS[goal.metric]
    mine, other, base = (factor * mean(records[name], goal.metric) for name in (goal.row, goal.than, BASE))
    if goal.recovers is not None:
        share = (mine - other) / (base - other) if base > other else 1.0
        wanted = f"≥ {goal.recovers:.0%} of the loss of {goal.than!r} is made good"
        return Row("goal", goal.row, share, "share", None, wanted, share >= goal.recovers)
    sign = -1 if goal.metric == "ratio_error" else 1
    gain = sign * (mine - other)
    wanted = f"{goal.metric} ≥ {goal.than!r} {goal.by:+g}" if sign > 0 else f"{goal.metric} below {goal.than!r}"
    return Row("goal", goal.row, gain, "points" if factor == 100 else "", None, wanted, gain >= goal.by)


def mean(facts: list[Facts], metric: str) -> float:
    """Mean over the seeds; NaN where it was not measured, so that no goal is met by it."""
    values = [fact[metric] for fact in facts if fact.get(metric) is not None]
    return statistics.fmean(values) if values else float("nan")


def page(protocol: Protocol, records: Records, head: Row, goals: list[Row]) -> str:
    """The table of a protocol's rows as Markdown, with what was to be reached."""
    base = mean(records[BASE], "accuracy") if records.get(BASE) else float("nan")
    columns = _columns(protocol, records, base)
    lines = [["", *columns]]
    for name, facts in records.items():
        lines.append([name, *(COLUMNS[column](facts, base) for column in columns)])
    judged = [["row", "goal", "reached", "met"]]
    judged += [[row.metric, row.goal or "", f"{pretty(row.value)} {row.unit}", pretty(row.met)] for row in goals]
    return _framed(protocol, head, [grid(lines), *(["## Goals", grid(judged)] if goals else [])])


def _columns(protocol: Protocol, records: Records, base: float) -> list[str]:
    """Those that the protocol wants, or those of `USUAL` in which something would stand."""
    unknown = [name for name in protocol.columns if name not in COLUMNS]
    if unknown:
        raise OptionError(f"there is no column {unknown[0]!r}; columns: {', '.join(COLUMNS)}")
    if protocol.columns:
        return list(protocol.columns)
    return [name for name in USUAL if any(COLUMNS[name](facts, base) for facts in records.values())]


def correlation_rows(found: list[Facts]) -> list[Row]:
    """Spearman's rho of each criterion with the change of the loss, best first."""
    best = sorted(found, key=lambda fact: -fact["overall_abs"])
    return [Row(fact["criterion"], metric, fact[metric], "Spearman") for fact in best for metric in _CORRELATIONS]


def correlation_page(protocol: Protocol, found: list[Facts], head: Row) -> str:
    """The same as Markdown."""
    best = sorted(found, key=lambda fact: -fact["overall_abs"])
    lines = [["criterion", *_CORRELATIONS.values()]]
    lines += [[fact["criterion"], *(f"{fact[metric]:+.3f}" for metric in _CORRELATIONS)] for fact in best]
    return _framed(protocol, head, [grid(lines), f"{found[0]['classes']} channels."])


def _framed(protocol: Protocol, head: Row, parts: list[str]) -> str:
    images = protocol.images
    what = f"Images: {LABELS[images.data]}, {images.train or 'all'} for training, {images.test or 'all'} for testing."
    if images.validation:
        what += f" Of those for training, {images.validation:,} are kept for validation."
    facts = "\n".join(f"- {key}: {_words(value)}" for key, value in head.value.items())
    parts = [f"# {protocol.heading}", what, protocol.note.strip(), *parts, "## Measured with", facts]
    return "\n\n".join(part for part in parts if part) + "\n"


def _words(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def grid(lines: list[list[str]]) -> str:
    """Lines of cells as a Markdown table; the first holds the titles."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _points(facts: list[Facts], metric: str) -> str:
    values = [100 * fact[metric] for fact in facts if fact.get(metric) is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _share(metric: str) -> Callable[[list[Facts], float], str]:
    def cell(facts: list[Facts], _: float) -> str:
        value = mean(facts, metric)
        return "" if value != value else f"{value:.3f}"

    return cell


def _against_base(facts: list[Facts], base: float) -> str:
    value = 100 * (mean(facts, "accuracy") - base)
    return "" if value != value else f"{value:+.2f}"


def _times_smaller(metric: str) -> Callable[[list[Facts], float], str]:
    def cell(facts: list[Facts], _: float) -> str:
        value = mean(facts, metric)
        return "" if value != value else f"{1 / value:.1f}"

    return cell


def _whole(metric: str, unit: float) -> Callable[[list[Facts], float], str]:
    def cell(facts: list[Facts], _: float) -> str:
        value = mean(facts, metric) / unit
        return "" if value != value else f"{value:,.0f}"

    return cell


COLUMNS: dict[str, Callable[[list[Facts], float], str]] = {
    "MACs": _share("macs"),
    "parameters": _share("parameters"),
    "bytes": _share("bytes"),
    "latency, batch 1": _share("latency_1"),
    "before training, %": lambda facts, _: _points(facts, "accuracy_before_training"),
    "accuracy, %": lambda facts, _: _points(facts, "accuracy"),
    "against the base": _against_base,
    "ratio error": _share("ratio_error"),
    "ratio rank": _share("ratio_rank"),
    "seeds": lambda facts, _: str(len(facts)),
    "file, kB": _whole("size_bytes", 1000),
    "times smaller": _times_smaller("bytes"),
    "emitted, kB": _whole("emitted_size", 1000),
    "emitted, times smaller": _times_smaller("emitted_bytes"),
    "CPU seconds": _whole("cpu_seconds", 1),
    "seconds in passes": _whole("pass_seconds", 1),
}
USUAL = tuple(COLUMNS)[: list(COLUMNS).index("seeds") + 1]
