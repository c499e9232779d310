"""A ReLU behind an 8-bit layer becomes a part of it."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.graph import Graph
from ...runtime.layers import Int8Layer

_RELU = torch.ops.aten.relu.default


def fuse_rectifiers(graph: Graph, author: str) -> int:
    """Let 8-bit layers write rectified sums, where a ReLU alone reads them; returns how many ReLUs went."""
    found = [node for node in graph.nodes if node.target is _RELU and _reads_alone(graph, node)]
    with graph.edit(author):
        for node in found:
            source = node.all_input_nodes[0]
            layer = graph.layer(source)
            assert isinstance(layer, Int8Layer)
            layer.relu = True
            node.replace_all_uses_with(source)
    return len(found)


def _reads_alone(graph: Graph, node: fx.Node) -> bool:
    """Whether a node reads an 8-bit layer that has no other reader and no other call."""
    source = node.all_input_nodes[0]
    calls = sum(other.op == "call_module" and other.target == source.target for other in graph.nodes)
    return isinstance(graph.layer(source), Int8Layer) and len(source.users) == 1 and calls == 1
