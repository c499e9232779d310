"""What `coverage.py` keeps (rows ↔ records), its table and the goals."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from .common import Row, pretty, read_rows, write_rows
from .coverage_worker import SIDES

Facts = dict[str, Any]
Records = dict[str, dict[str, Facts]]  # network → side → facts

OURS, PEER = SIDES
UNITS = {
    "cuttable": "share of MACs",
    "cuttable_refit": "share of MACs",
    "macs_left": "share of MACs",
    "distance": "relative",
    "distance_double": "relative",
    "trace_seconds": "s",
    "label_seconds": "s",
    "graph_seconds": "s",
    "cut_seconds": "s",
}
GOALS: dict[str, tuple[str, Callable[[Facts], bool | None]]] = {
    "cut": ("50 % of MACs ± 2 %", lambda facts: bool(facts.get("cut"))),
    "distance": ("< 1e-4, or < 1e-9 in double", lambda facts: exact(facts) if facts.get("cut") else None),
    "cuttable": ("CNN: ≥ 0.9", lambda facts: reach(facts) >= 0.9 if facts.get("kind") == "cnn" else None),
    "reloaded": ("equal", lambda facts: bool(facts["reloaded"])),
}


def reach(facts: Facts) -> float:
    """Share of the MACs that can be cut, by the default or with norms refitted."""
    return max(float(facts["cuttable"]), float(facts.get("cuttable_refit", 0.0)))


def silently_wrong(peer: Facts) -> bool:
    """Whether the peer's README call gave wrong numbers; a recipe lent to another network than its own is no claim."""
    return bool(peer.get("wrong")) and str(peer.get("recipe")).startswith("README")


def exact(facts: Facts) -> bool:
    """Whether the cut network equals the masked one, and both the network's own code, to the precision wanted."""
    double = facts.get("distance_double")
    oracle = facts.get("distance", 1.0) < 1e-4 if double is None else double < 1e-9
    return bool(oracle) and facts.get("trace_distance", 0.0) < 1e-4 and facts.get("original_distance", 0.0) < 1e-4


def to_rows(records: Records) -> list[Row]:
    """A row per network and metric, both sides in it."""
    rows = []
    for name, sides in sorted(records.items()):
        ours, peer = sides.get(OURS, {}), sides.get(PEER, {})
        for metric in dict.fromkeys([*ours, *peer]):
            goal, met = None, None
            if metric in GOALS and metric in ours:
                goal, judge = GOALS[metric]
                met = judge(ours)
            rows.append(Row(name, metric, ours.get(metric), UNITS.get(metric, ""), peer.get(metric), goal, met))
    return rows


def to_records(rows: list[Row]) -> Records:
    """Inverse of `to_rows`; metrics that a side does not have are absent there."""
    records: Records = {}
    for row in rows:
        if row.case == "header" or row.case.startswith("summary"):
            continue
        for side, value in ((OURS, row.value), (PEER, row.peer)):
            if value is not None:
                records.setdefault(row.case, {}).setdefault(side, {})[row.metric] = value
    return records


def load_records(path: Path) -> Records:
    """Records of a JSON file, none if it does not exist yet."""
    return to_records(read_rows(path)) if path.exists() else {}


def put_record(path: Path, head: Row, name: str, side: str, facts: Facts) -> None:
    """Write one side of one network into the file; runs that share a file do not overwrite one another."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = load_records(path)
        records.setdefault(name, {})[side] = facts
        write_rows(path, [head, *summary(records), *to_rows(records)])


COLUMNS = ("network", "kind", "exported", "labelled", "cuttable", "refit", "MACs left", "norms", "oracle", "double",
           "own code", "reloaded", "trace s", "label s", "cut s", "Torch-Pruning", "MACs left", "graph s", "prune s",
           "why not")  # fmt: skip
FIELDS = ("exported", "labelled", "cuttable", "cuttable_refit", "macs_left", "norms", "distance", "distance_double",
          "original_distance", "reloaded", "trace_seconds", "label_seconds", "cut_seconds")  # fmt: skip


def cells(name: str, sides: dict[str, Facts]) -> list[str]:
    """One line of the table: fxpress on the left, the peer on the right, then fxpress's reason or what it pinned."""
    ours, peer = sides.get(OURS, {}), sides.get(PEER, {})
    line = [name, str(ours.get("kind") or peer.get("kind") or "?")]
    line += [pretty(ours.get(field)) for field in FIELDS]
    line += [_peer_word(peer), *(pretty(peer.get(field)) for field in ("macs_left", "graph_seconds", "cut_seconds"))]
    return [*line, str(ours.get("reason") or "")]


def table(records: Records) -> Table:
    """All networks for the screen."""
    view = Table(title="Cut to 50 % of the MACs", title_justify="left")
    for column in COLUMNS:
        view.add_column(column)
    for name, sides in sorted(records.items()):
        view.add_row(*cells(name, sides))
    return view


def markdown(records: Records, head: Row) -> str:
    """The same as a page: environment, goals, all networks, and why the peer did not cut those that it did not."""
    goals = [["case", "metric", "fxpress", "Torch-Pruning", "goal", "met"]]
    goals += [
        [r.case, r.metric, pretty(r.value), pretty(r.peer), r.goal or "", pretty(r.met)] for r in summary(records)
    ]
    lines = [list(COLUMNS), *(cells(name, sides) for name, sides in sorted(records.items()))]
    refused = [["network", "Torch-Pruning"]]
    for name, sides in sorted(records.items()):
        if PEER in sides and not sides[PEER].get("cut"):
            refused.append([name, str(sides[PEER].get("reason"))])
    pinned = [["network", "pinned by fxpress"]]
    for name, sides in sorted(records.items()):
        if sides.get(OURS, {}).get("pinned"):
            pinned.append([name, str(sides[OURS]["pinned"])])
    facts = "\n".join(f"- {key}: {value}" for key, value in head.value.items())
    parts = ["# Coverage", facts, "## Goals", _grid(goals), "## Networks", _grid(lines)]
    parts += ["## What fxpress leaves alone", _grid(pinned), "## What Torch-Pruning does not cut", _grid(refused)]
    return "\n\n".join(parts) + "\n"


def _grid(lines: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "/").replace("\n", " ") for cell in line] for line in lines]
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], rule, *escaped[1:]])


def _peer_word(peer: Facts) -> str:
    if not peer:
        return ""
    return "wrong" if silently_wrong(peer) else pretty(bool(peer.get("cut")))


def summary(records: Records) -> list[Row]:
    """The goals over all networks, with what the peer reaches."""
    rows = []
    groups = {
        "torchvision": [n for n in records if n.startswith("torchvision:")],
        "timm, one per family": [n for n in records if n.startswith("timm:")],
        "timm, CNN families": [n for n in records if n.startswith("timm:") and _kind(records[n]) == "cnn"],
        "all CNNs": [n for n in records if _kind(records[n]) == "cnn"],
    }
    shares = {"torchvision": 1.0, "timm, one per family": 0.97, "timm, CNN families": 1.0}
    for label, members in groups.items():
        if members and label in shares:
            rows += _count_rows(records, label, members, shares[label])
    rows += _cnn_rows(records, groups["all CNNs"])
    rows += _wrong_rows(records)
    return rows


def _kind(sides: dict[str, Facts]) -> str:
    return next((facts["kind"] for facts in sides.values() if "kind" in facts), "?")


def succeeded(facts: Facts) -> bool:
    """Cut to the budget with the oracle passed."""
    return bool(facts.get("cut")) and exact(facts)


def _count_rows(records: Records, label: str, members: list[str], share: float) -> list[Row]:
    """Networks cut to the budget, and networks cut at all (the peer is given a ratio of channels, not a budget)."""
    ours = [records[n][OURS] for n in members if OURS in records[n]]
    peer = [records[n][PEER] for n in members if PEER in records[n]]
    good = sum(map(succeeded, ours))
    right = [facts for facts in peer if facts.get("cut")]
    halved = sum(facts["macs_left"] <= 0.51 for facts in right)
    case, goal, met = f"summary: {label}", f"≥ {share:.0%}", good >= share * len(ours) if ours else None
    value = f"{good}/{len(ours)}" if ours else None
    rows = [Row(case, "50 % of MACs left, exact", value, "networks", _of(halved, peer), goal, met)]
    return [*rows, Row(case, "cut at all, exact", value, "networks", _of(len(right), peer))]


def _of(count: int, among: list[Facts]) -> str | None:
    return f"{count}/{len(among)}" if among else None


def _cnn_rows(records: Records, members: list[str]) -> list[Row]:
    facts = [records[n][OURS] for n in members if "cuttable" in records[n].get(OURS, {})]
    if not facts:
        return []
    default = sum(fact["cuttable"] >= 0.9 for fact in facts)
    refit = sum(reach(fact) >= 0.9 for fact in facts)
    case, metric = "summary: all CNNs", "≥ 90 % of MACs can be cut"
    rows = [
        Row(case, f"{metric}, norms kept or refitted", _of(refit, facts), "networks", None, "all", refit == len(facts))
    ]
    return [*rows, Row(case, f"{metric}, norms kept", _of(default, facts), "networks")]


def _wrong_rows(records: Records) -> list[Row]:
    ours = [sides[OURS] for sides in records.values() if OURS in sides]
    peer = [sides[PEER] for sides in records.values() if PEER in sides]
    wrong = sum(bool(facts.get("cut")) and not exact(facts) for facts in ours)
    peer_wrong = sum(map(silently_wrong, peer))
    silent = sum(not facts.get("cut") and not facts.get("reason") for facts in ours)
    rows = []
    if ours:
        rows.append(Row("summary: all", "wrong cuts", wrong, "networks", peer_wrong, "0", wrong == 0))
        rows.append(Row("summary: all", "refusals without a reason", silent, "networks", None, "0", silent == 0))
    return rows
