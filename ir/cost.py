"""Parameters, multiply-accumulates and bytes, per node and in total."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .graph import Graph
from .groups import batch_size, find_groups


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node: multiply-accumulates per image, parameters and their bytes."""

    macs: float
    params: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of a graph.

    A product-quantized layer counts as it is stored and as table kernels compute it (Wu et al. 2016, section 3.3): K
    multiply-accumulates for each input to fill the tables, one for each look-up (a tap of a sub-space of an output).
    Its parameters are the codewords and the bias, which learn; its bytes hold each index in log2(K) bits. One whose
    `kernel` is `dense` or `dense-int8` counts the multiply-accumulates of its dense weight.

    Attributes:
        macs: multiply-accumulates per image of convolutions, linear layers and matrix products.
        params: parameters; a shared one counts once.
        bytes: bytes of the parameters and buffers, as a file holds them.
        per_node: the same by node name; a shared layer's parameters are counted at its first call.
    """

    macs: float
    params: int
    bytes: int
    per_node: dict[str, NodeCost]


def measure_cost(graph: Graph) -> Cost:
    """Cost of a graph on one image of its example inputs."""
    labels = graph.analyse(find_groups).labels
    macs: dict[str, float] = {}
    for term in labels.terms:
        macs[term.node.name] = macs.get(term.node.name, 0.0) + term.macs / batch_size(graph)
    seen: set[int] = set()
    per_node: dict[str, NodeCost] = {}
    for node in graph.module.graph.nodes:
        found = [pair for pair in _tensors(graph, node.op, str(node.target)) if id(pair[0]) not in seen]
        seen.update(id(tensor) for tensor, _ in found)
        params = sum(tensor.numel() for tensor, trainable in found if trainable)
        size = sum(tensor.numel() * tensor.element_size() for tensor, _ in found)
        packed = getattr(graph.layer(node), "stored_bytes", None)  # layers of fxpress.runtime say it themselves
        size = size if packed is None or not found else packed
        per_node[node.name] = NodeCost(macs.get(node.name, 0.0), params, size)
    costs = per_node.values()
    return Cost(sum(c.macs for c in costs), sum(c.params for c in costs), sum(c.bytes for c in costs), per_node)


def _tensors(graph: Graph, op: str, target: str) -> list[tuple[Tensor, bool]]:
    """Tensors that a node owns, and whether each is a parameter."""
    if op == "get_attr":
        tensor = graph.tensor(target)
        return [(tensor, any(tensor is p for p in graph.module.parameters()))]
    if op != "call_module":
        return []
    layer = graph.module.get_submodule(target)
    return [*((p, True) for p in layer.parameters()), *((b, False) for b in layer.buffers())]
