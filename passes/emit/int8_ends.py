"""A ReLU and a max pool behind an 8-bit layer become parts of it, which writes less then, and no one has to read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx

from ...ir.graph import Graph
from ...ir.nodes import arguments
from ...runtime.kernels.int8_ops import MOST_POOLED
from ...runtime.layers import Int8Conv2d, Int8Layer

_RELU, _POOL = torch.ops.aten.relu.default, torch.ops.aten.max_pool2d.default


class Ends(NamedTuple):
    """How many operations went into layers."""

    rectifiers: int
    pools: int

    def notes(self) -> list[str]:
        """For the report."""
        named = {"ReLUs": self.rectifiers, "max pools": self.pools}
        return [f"{count} {name} became parts of 8-bit layers" for name, count in named.items() if count]


def fuse_ends(graph: Graph, author: str) -> Ends:
    """Let 8-bit layers do what alone reads them: ReLU, and max pool of a convolution, in either order."""
    rectifiers = _fuse(graph, author, _rectify)
    pools = _fuse(graph, author, _pool)
    return Ends(rectifiers + _fuse(graph, author, _rectify), pools)


def _fuse(graph: Graph, author: str, take: Callable[[fx.Node, Int8Layer], bool]) -> int:
    found = [node for node in graph.nodes if node.target in (_RELU, _POOL) and _reads_alone(graph, node)]
    count = 0
    with graph.edit(author):
        for node in found:
            source = node.all_input_nodes[0]
            layer = graph.layer(source)
            assert isinstance(layer, Int8Layer)
            if take(node, layer):
                source.meta["spec"] = node.meta["spec"]
                node.replace_all_uses_with(source)
                count += 1
    return count


def _rectify(node: fx.Node, layer: Int8Layer) -> bool:
    if node.target is not _RELU:
        return False
    layer.relu = True
    return True


def _pool(node: fx.Node, layer: Int8Layer) -> bool:
    if node.target is not _POOL or not isinstance(layer, Int8Conv2d) or layer.groups != 1 or layer.pool:
        return False
    given = arguments(node)
    pairs = [list(given[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
    kernel, stride, padding, dilation = ((pair[0], pair[-1]) for pair in (pairs[0], pairs[1] or pairs[0], *pairs[2:]))
    if given["ceil_mode"] or dilation != (1, 1) or max(kernel) > MOST_POOLED:
        return False
    layer.pool = (*kernel, *stride, *padding)
    return True


def _reads_alone(graph: Graph, node: fx.Node) -> bool:
    """Whether a node reads an 8-bit layer that has no other reader and no other call."""
    source = node.all_input_nodes[0]
    calls = sum(other.op == "call_module" and other.target == source.target for other in graph.nodes)
    return isinstance(graph.layer(source), Int8Layer) and len(source.users) == 1 and calls == 1
