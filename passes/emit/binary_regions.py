"""Which nodes a packed binary network can hold, and the largest pieces of a graph that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph, TensorSpec
from ...ir.nodes import arguments, operand, shape_of
from ...runtime.layers import BinaryConv2d, BinaryLayer, BinaryLinear, HalfWaveQuantizer
from ..binarize.sources import op_name
from .binary_folding import fits

END = 2**63 - 1


class Region:
    """A set of nodes that become one packed network.

    Attributes:
        nodes: in the order of the graph.
        inputs: nodes outside that it reads, in the order of the graph.
        outputs: its nodes that something outside reads.
    """

    def __init__(self, graph: Graph, members: set[fx.Node]) -> None:
        order = graph.nodes
        self.nodes = [node for node in order if node in members]
        read = {source for node in self.nodes for source in node.all_input_nodes}
        self.inputs = [node for node in order if node in read - members]
        self.outputs = [node for node in self.nodes if set(node.users) - members]

    def __contains__(self, node: object) -> bool:
        return node in self._members

    @property
    def _members(self) -> set[fx.Node]:
        return set(self.nodes)


def find_regions(graph: Graph) -> tuple[list[Region], dict[str, str]]:
    """Regions with at least one binary layer, and why other binary layers are in none: layer → reason."""
    steps = level_steps(graph)
    reasons: dict[str, str] = {}
    able: set[fx.Node] = set()
    for node in graph.nodes:
        reason = why_not(graph, node, steps)
        if reason is None:
            able.add(node)
        elif isinstance(graph.layer(node), BinaryLayer):
            reasons[str(node.target)] = reason
    partitioner = CapabilityBasedPartitioner(graph.module, _Able(able), allows_single_node_partition=True)
    found = [Region(graph, set(part.nodes)) for part in partitioner.propose_partitions()]
    regions = [part for part in found if any(isinstance(graph.layer(node), BinaryLayer) for node in part.nodes)]
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(regions, key=lambda region: order[region.nodes[0]]), reasons


class _Able(OperatorSupportBase):
    def __init__(self, nodes: set[fx.Node]) -> None:
        self._nodes = nodes

    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: fx.Node) -> bool:  # noqa: ARG002
        """Whether a node may be in a region."""
        return node in self._nodes


def level_steps(graph: Graph) -> dict[fx.Node, float]:
    """Nodes whose values are levels, with their step: quantizers, and what passes their levels on."""
    steps: dict[fx.Node, float] = {}
    for node in graph.nodes:
        layer = graph.layer(node)
        if isinstance(layer, HalfWaveQuantizer) and fits(layer):
            assert layer.step is not None
            steps[node] = layer.step
        elif op_name(node) in ("max_pool2d", "cat", "flatten", "view", "reshape") and _passes(node):
            found = {steps.get(source) for source in node.all_input_nodes}
            step = found.pop() if len(found) == 1 else None
            if step is not None:
                steps[node] = step
    return steps


def _passes(node: fx.Node) -> bool:
    return _OPERATIONS[op_name(node)](node) is None if op_name(node) in _OPERATIONS else False


# What can be in a region ----------------------------------------------------------------------------------------------


def why_not(graph: Graph, node: fx.Node, steps: dict[fx.Node, float]) -> str | None:
    """Why a node cannot be part of a packed network; None if it can."""
    if node.op not in ("call_module", "call_function"):
        return "it is no operation"
    if not all(_is_plain(each) for each in (node, *node.all_input_nodes)) or not node.all_input_nodes:
        return "its input or output is no float32 tensor (N, C) or (N, C, H, W)"
    layer = graph.layer(node)
    if isinstance(layer, BinaryLayer):
        return _why_not_layer(layer, node, steps)
    if isinstance(layer, HalfWaveQuantizer):
        return None if fits(layer) else "its levels are not 1 to 3 equal steps"
    if isinstance(layer, _BatchNorm):
        return None if layer.running_mean is not None else "it normalises by the batch"
    rule = _OPERATIONS.get(op_name(node))
    return rule(node) if rule is not None else "the packed network has no such operation"


def _is_plain(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return isinstance(spec, TensorSpec) and spec.dtype == torch.float32 and len(spec.shape) in (2, 4)


def _why_not_layer(layer: BinaryLayer, node: fx.Node, steps: dict[fx.Node, float]) -> str | None:
    if layer.weights != "binary":
        return "its weights have three values"
    if layer.weight.dtype != torch.float32:
        return f"its weights are {str(layer.weight.dtype).removeprefix('torch.')}"
    source = operand(node)
    if source not in steps:
        return "what it reads is not quantised, or to more than 2 bits, unequal steps or steps of several sizes"
    rank = 2 if isinstance(layer, BinaryLinear) else 4
    return (
        None
        if len(shape_of(source)) == rank and isinstance(layer, (BinaryConv2d, BinaryLinear))
        else "it does not read one tensor of (N, C) or images"
    )


def _pool(node: fx.Node) -> str | None:
    given = arguments(node)
    fine = isinstance(node.meta["spec"], TensorSpec) and len(shape_of(node)) == 4 and not given.get("divisor_override")
    return None if fine and (op_name(node) == "max_pool2d" or not given["ceil_mode"]) else "an unusual pool"


def _add(node: fx.Node) -> str | None:
    given = arguments(node)
    both = isinstance(given["other"], fx.Node) and isinstance(given["self"], fx.Node)
    if both and given["alpha"] == 1 and shape_of(given["other"]) == shape_of(given["self"]):
        return None
    return "it adds what is not of the same shape"


def _global_average(node: fx.Node) -> str | None:
    given = arguments(node)
    size = [n if isinstance(n, int) else 0 for n in given["output_size"]]
    return None if len(shape_of(node)) == 4 and set(size) == {1} else "an average of several windows"


def _mean(node: fx.Node) -> str | None:
    given, rank = arguments(node), len(shape_of(operand(node)))
    dims = sorted(dim % rank for dim in given["dim"] or [])
    return None if rank == 4 and dims == [2, 3] and given.get("dtype") is None else "a mean of other dimensions"


def _slice(node: fx.Node) -> str | None:
    given = arguments(node)
    whole = given["start"] in (0, None) and (given["end"] is None or given["end"] == END)
    static = isinstance(given["step"], int) and isinstance(given["dim"], int)
    return None if whole and static and len(shape_of(node)) == 4 and given["dim"] % 4 > 1 else "a part of a tensor"


def _pad(node: fx.Node) -> str | None:
    given = arguments(node)
    pad: Any = list(given["pad"])
    zeros = given.get("mode", "constant") == "constant" and not given["value"]
    channels = len(pad) == 6 and not any(pad[:4]) and all(isinstance(n, int) and n >= 0 for n in pad)
    return None if zeros and channels and len(shape_of(node)) == 4 else "it pads other than channels with zeros"


def _cat(node: fx.Node) -> str | None:
    rank, dim = len(shape_of(node)), arguments(node)["dim"]
    same = all(len(shape_of(source)) == rank for source in node.all_input_nodes)
    return None if dim % rank == 1 and same else "it joins other than channels"


def _flatten(node: fx.Node) -> str | None:
    given, made = shape_of(operand(node)), shape_of(node)
    fine = len(given) == 4 and made == (given[0], given[1] * given[2] * given[3])
    return None if fine else "it changes the shape"


_OPERATIONS: dict[str, Any] = {
    "relu": lambda node: None,  # noqa: ARG005
    "add": _add,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _global_average,
    "mean": _mean,
    "slice": _slice,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "cat": _cat,
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view"), _flatten),
}
