"""A ReLU and a max pool behind a layer become parts of it, which writes less then, and no one has to read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import fx

from ...ir.graph import Graph
from ...ir.nodes import arguments
from ...runtime.kernels.int8_ops import MOST_POOLED
from ...runtime.layers import Int8Conv2d, Int8Layer
from ...runtime.layers.pq_conv2d import PQConv2d
from ...runtime.layers.pq_layer import PQLayer

_RELU, _POOL = torch.ops.aten.relu.default, torch.ops.aten.max_pool2d.default


def fuse_epilogues(graph: Graph, author: str) -> Counter[str]:
    """Let layers do what alone reads them: ReLU, and max pool of a convolution.

    8-bit layers take them in either order, product-quantized ones that a kernel of ours runs a pool behind a ReLU.

    Returns:
        How many `ReLUs` and `max pools` went.
    """
    rectifiers = _fuse(graph, author, _rectify)
    pools = _fuse(graph, author, _pool)
    return Counter({"ReLUs": rectifiers + _fuse(graph, author, _rectify), "max pools": pools})


def _fuse(graph: Graph, author: str, take: Callable[[fx.Node, Int8Layer | PQLayer], bool]) -> int:
    found = [node for node in graph.nodes if node.target in (_RELU, _POOL) and _reads_alone(graph, node)]
    count = 0
    with graph.edit(author):
        for node in found:
            source = node.all_input_nodes[0]
            layer = graph.layer(source)
            assert isinstance(layer, Int8Layer | PQLayer)
            if take(node, layer):
                source.meta["spec"] = node.meta["spec"]
                node.replace_all_uses_with(source)
                count += 1
    return count


def _rectify(node: fx.Node, layer: Int8Layer | PQLayer) -> bool:
    if node.target is not _RELU:
        return False
    layer.relu = True
    return True


def _pool(node: fx.Node, layer: Int8Layer | PQLayer) -> bool:
    if node.target is not _POOL or not isinstance(layer, Int8Conv2d | PQConv2d) or layer.pool:
        return False
    given = arguments(node)
    pairs = [list(given[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
    kernel, stride, padding, dilation = ((pair[0], pair[-1]) for pair in (pairs[0], pairs[1] or pairs[0], *pairs[2:]))
    if given["ceil_mode"] or dilation != (1, 1) or not _takes_pool(layer, max(kernel)):
        return False
    layer.pool = (*kernel, *stride, *padding)
    return True


def _takes_pool(layer: Int8Conv2d | PQConv2d, kernel: int) -> bool:
    if isinstance(layer, PQConv2d):
        return layer.relu and (layer.kernel == "table" or kernel <= MOST_POOLED)
    return layer.groups == 1 and kernel <= MOST_POOLED


def _reads_alone(graph: Graph, node: fx.Node) -> bool:
    """Whether a node reads a layer that can take it, and that has no other reader and no other call."""
    source = node.all_input_nodes[0]
    layer = graph.layer(source)
    if not (isinstance(layer, Int8Layer) or (isinstance(layer, PQLayer) and layer.by_kernel)):
        return False
    calls = sum(other.op == "call_module" and other.target == source.target for other in graph.nodes)
    return len(source.users) == 1 and calls == 1
