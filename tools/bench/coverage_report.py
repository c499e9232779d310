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
    "cuttable": ("CNN: ≥ 0.9", lambda facts: facts["cuttable"] >= 0.9 if facts.get("kind") == "cnn" else None),
    "reloaded": ("equal", lambda facts: bool(facts["reloaded"])),
}


def exact(facts: Facts) -> bool:
    """Whether the cut network equals the masked one to the precision wanted of it."""
    double = facts.get("distance_double")
    return bool(facts.get("distance", 1.0) < 1e-4 and (double is None or double < 1e-9)) or bool(
        double is not None and double < 1e-9
    )


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


def table(records: Records) -> Table:
    """One line per network, fxpress on the left, the peer on the right."""
    view = Table(title="Cut to 50 % of the MACs", title_justify="left")
    for column in ("network", "kind", "cuttable", "MACs left", "distance", "double", "reloaded", "trace s", "label s"):
        view.add_column(column)
    for column in ("cut s", "Torch-Pruning", "MACs left", "graph s", "cut s", "why not"):
        view.add_column(column)
    for name, sides in sorted(records.items()):
        ours, peer = sides.get(OURS, {}), sides.get(PEER, {})
        fields = ("cuttable", "macs_left", "distance", "distance_double", "reloaded", "trace_seconds", "label_seconds")
        cells = [name, str(ours.get("kind") or peer.get("kind") or "?")]
        cells += [pretty(ours.get(field)) for field in (*fields, "cut_seconds")]
        cells += [
            _peer_word(peer),
            *(pretty(peer.get(field)) for field in ("macs_left", "graph_seconds", "cut_seconds")),
        ]
        view.add_row(*cells, _why(ours))
    return view


def _peer_word(peer: Facts) -> str:
    if not peer:
        return ""
    return "wrong" if peer.get("wrong") else pretty(bool(peer.get("cut")))


def _why(ours: Facts) -> str:
    return str(ours.get("reason") or "")


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
            rows.append(_count_row(records, label, members, shares[label]))
    rows += _cnn_rows(records, groups["all CNNs"])
    rows += _wrong_rows(records)
    return rows


def _kind(sides: dict[str, Facts]) -> str:
    return next((facts["kind"] for facts in sides.values() if "kind" in facts), "?")


def succeeded(facts: Facts) -> bool:
    """Cut to the budget with the oracle passed."""
    return bool(facts.get("cut")) and exact(facts)


def _count_row(records: Records, label: str, members: list[str], share: float) -> Row:
    ours = [records[n][OURS] for n in members if OURS in records[n]]
    peer = [records[n][PEER] for n in members if PEER in records[n]]
    good = sum(map(succeeded, ours))
    right = sum(bool(facts.get("cut")) for facts in peer)
    return Row(
        f"summary: {label}",
        "cut to 50 % MACs, exact",
        f"{good}/{len(ours)}" if ours else None,
        "networks",
        f"{right}/{len(peer)}" if peer else None,
        f"≥ {share:.0%}",
        good >= share * len(ours) if ours else None,
    )


def _cnn_rows(records: Records, members: list[str]) -> list[Row]:
    facts = [records[n][OURS] for n in members if "cuttable" in records[n].get(OURS, {})]
    if not facts:
        return []
    reach = sum(fact["cuttable"] >= 0.9 for fact in facts)
    goal, met = "all", reach == len(facts)
    return [Row("summary: all CNNs", "≥ 90 % of MACs can be cut", f"{reach}/{len(facts)}", "networks", None, goal, met)]


def _wrong_rows(records: Records) -> list[Row]:
    ours = [sides[OURS] for sides in records.values() if OURS in sides]
    peer = [sides[PEER] for sides in records.values() if PEER in sides]
    wrong = sum(bool(facts.get("cut")) and not exact(facts) for facts in ours)
    peer_wrong = sum(bool(facts.get("wrong")) for facts in peer)
    silent = sum(not facts.get("cut") and not facts.get("reason") for facts in ours)
    rows = []
    if ours:
        rows.append(Row("summary: all", "wrong cuts", wrong, "networks", peer_wrong, "0", wrong == 0))
        rows.append(Row("summary: all", "refusals without a reason", silent, "networks", None, "0", silent == 0))
    return rows
