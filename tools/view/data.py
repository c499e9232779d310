"""A graph as JSON values for the page: nodes with shapes, costs and groups, groups with their members, totals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir.cost import Cost, measure_cost
from ...ir.graph import Graph
from ...ir.groups import Groups, find_groups
from ...ir.labels import varying
from ...ir.reasons import Locked, Reason, find_locked
from ...passes.report import Report, scans_of
from ..explain import layer_of, title_of_locked
from .blocks import blocks_of
from .kinds import detail_of, dtype_name, kind_of, operation_of, specs_of, title_of

JSON = dict[str, Any]


def page_data(graph: Graph, name: str, report: Report | None = None) -> JSON:
    """Everything that the page shows.

    Args:
        graph: the network; `node.meta["channels_before"]` tells how many channels a node had before it was cut.
        name: title of the page.
        report: what the passes did.
    """
    groups, cost = graph.analyse(find_groups), graph.analyse(measure_cost)
    locked = find_locked(groups)
    nodes = _nodes(graph, groups, cost)
    index = {node["name"]: node["id"] for node in nodes}
    group_rows = _groups(groups, locked, index)
    for row in group_rows:
        for member in row["members"]:
            nodes[member]["groups"].append(row["id"])
    _explain_ungrouped(graph, nodes, group_rows)
    return {
        "name": name,
        "totals": _totals(groups, cost, nodes),
        "nodes": nodes,
        "groups": group_rows,
        "report": _report(report) if report is not None and report.rows else None,
        "sensitivity": [] if report is None else _sensitivity(report, groups),
        "original": _original(report) if report is not None and report.rows else None,
        "batch": _batch(graph),
    }


def _nodes(graph: Graph, groups: Groups, cost: Cost) -> list[JSON]:
    blocks = blocks_of(graph.nodes, lambda node: _is_heavy(graph, node))
    index = {node: i for i, node in enumerate(graph.nodes)}
    return [
        {
            "id": i,
            "inputs": [index[source] for source in node.all_input_nodes],
            "blocks": blocks[node.name],
            "groups": [],
            "why": None,
            **_node(graph, node, groups, cost),
        }
        for node, i in index.items()
    ]


def _is_heavy(graph: Graph, node: fx.Node) -> bool:
    """Whether a node computes something of its own or joins branches, rather than treat what one other gives."""
    kind = kind_of(node, title_of(graph, node))
    return kind in ("conv", "linear") or (kind == "join" and sum(bool(specs_of(n)) for n in node.all_input_nodes) > 1)


def _node(graph: Graph, node: fx.Node, groups: Groups, cost: Cost) -> JSON:
    title, layer = title_of(graph, node), graph.layer(node)
    sources = node.all_input_nodes if node.op == "output" else [node]
    specs = [spec for source in sources for spec in specs_of(source)]
    own = cost.per_node.get(node.name)
    channels = _channels(graph, groups, node)
    return {
        "name": node.name,
        "title": title,
        "kind": kind_of(node, title),
        "op": type(layer).__name__ if layer is not None else operation_of(node),
        "layer": "" if layer is None else str(layer),
        "detail": detail_of(layer),
        "path": str(node.target) if layer is not None else str(node.meta.get("path") or ""),
        "source": str(node.meta.get("source") or ""),
        "shapes": [list(spec.shape) for spec in specs],
        "dtypes": [dtype_name(spec.dtype) for spec in specs],
        "macs": 0 if own is None else own.macs,
        "params": 0 if own is None else own.params,
        "bytes": 0 if own is None else own.bytes,
        "channels": channels,
        "before": None if channels is None else max(channels, int(node.meta.get("channels_before", channels))),
    }


def _channels(graph: Graph, groups: Groups, node: fx.Node) -> int | None:
    """Channels of a node's one tensor: along the dimension that has labels, else as its layer has them."""
    specs, layer = specs_of(node), graph.layer(node)
    if len(specs) != 1 or node.op in ("get_attr", "output"):
        return None
    shape = specs[0].shape
    labels = groups.labels.constants.get(node, groups.labels.values.get(node))
    dims = varying(labels) if isinstance(labels, Tensor) else []
    if len(dims) == 1:
        return shape[dims[0]]
    if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.Embedding)):
        return shape[-1]
    is_image = len(shape) in (4, 5) and (layer is not None or node.op == "placeholder")
    if is_image:
        return shape[1]
    same = [source for source in node.all_input_nodes if [s.shape for s in specs_of(source)] == [shape]]
    return _channels(graph, groups, same[0]) if same else None


def _groups(groups: Groups, locked: list[Locked], index: dict[str, int]) -> list[JSON]:
    rows: list[JSON] = []
    for group in groups.groups:
        saving = groups.saving(group)
        name, size = layer_of(groups.graph, group.name), (saving.macs, saving.params)
        rows.append(_group(len(rows), name, group.channels, group.members, *size, index, ()))
    for found in locked:
        name = title_of_locked(groups.graph, found)
        size = (found.macs, found.params)
        rows.append(_group(len(rows), name, found.channels, tuple(found.members), *size, index, found.reasons))
    return rows


def _group(
    number: int,
    name: str,
    channels: int,
    members: tuple[str, ...],
    macs: float,
    params: float,
    index: dict[str, int],
    reasons: tuple[Reason, ...],
) -> JSON:
    return {
        "id": number,
        "name": name,
        "channels": channels,
        "members": [index[member] for member in dict.fromkeys(members) if member in index],
        "macs": round(macs),
        "params": round(params),
        "cuttable": not reasons,
        "reasons": [vars(reason) for reason in reasons],
    }


def _explain_ungrouped(graph: Graph, nodes: list[JSON], groups: list[JSON]) -> None:
    """Why a tensor without any group cannot be cut: what it is computed from has a reason, up to the inputs."""
    for node, row in zip(graph.nodes, nodes, strict=True):
        if row["groups"] or row["kind"] in ("size", "param"):
            continue
        if node.op == "placeholder":
            row["why"] = {"node": node.name, "op": "input", "source": "", "text": "is an input of the network",
                          "hint": "What a layer reads from outside keeps its shape."}  # fmt: skip
            continue
        row["why"] = next(filter(None, (_known_reason(nodes[i], groups) for i in row["inputs"])), None)


def _known_reason(row: JSON, groups: list[JSON]) -> JSON | None:
    reasons: list[JSON] = [reason for i in row["groups"] for reason in groups[i]["reasons"]]
    return reasons[0] if reasons else row["why"]


def _report(report: Report) -> JSON:
    """The columns that fit beside the drawing, as text."""
    first = report.rows[0]
    rows = [
        [
            row.name,
            f"{row.macs / first.macs:.0%}" if first.macs else "",
            f"{row.parameters / first.parameters:.0%}" if first.parameters else "",
            "" if row.accuracy is None else f"{row.accuracy:.2%}",
            "" if row.latency_ratio is None else f"{row.latency_ratio:.2f}",
        ]
        for row in report.rows
    ]
    return {"columns": ["pass", "MACs", "params", "accuracy", "latency"], "rows": rows}


def _sensitivity(report: Report, groups: Groups) -> list[JSON]:
    """The scans that passes made; a group that is still there under its name can be shown in the drawing."""
    known = {group.name: group.index for group in groups.groups}
    found: list[JSON] = []
    for row, scan in scans_of(report):
        content = scan.to_dict()
        for group in content["groups"]:
            group["id"] = known.get(group["name"])
        found.append({"pass": row.name, **content})
    return found


def _original(report: Report) -> JSON:
    """Parameters and MACs of the network as it was traced."""
    return {"params": report.rows[0].parameters, "macs": report.rows[0].macs}


def _batch(graph: Graph) -> int | None:
    """Images in the example inputs where the network takes any number of them; the page writes N for it."""
    shapes = (spec.shape for node in graph.nodes if node.op == "placeholder" for spec in specs_of(node))
    return next((shape[0] for shape in shapes if shape), None) if graph.dynamic_batch else None


def _totals(groups: Groups, cost: Cost, nodes: list[JSON]) -> JSON:
    made = [row for row in nodes if row["params"] and row["before"]]
    before = sum(row["before"] for row in made)
    return {
        "macs": cost.macs,
        "params": cost.params,
        "bytes": cost.bytes,
        "cuttable_macs": groups.cuttable_macs if math.isfinite(groups.cuttable_macs) else 0.0,
        "kept": sum(row["channels"] for row in made) / before if before else None,
        "torch": torch.__version__,
    }
