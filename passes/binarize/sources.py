"""What a layer reads, seen from the layer: which operations a half-wave quantizer may replace, or move behind itself.

Activations are replaced. Max pools are moved in front of the batch norm: the largest value stays the largest through
any rising function, so that pooling commutes with norm (without factors) and quantizer, and the norm then sees what
the quantizer gets. Dropout, flattening and concatenations of channels pass levels on as they are, and stay behind.

    conv → BN → ReLU → max pool → layer      becomes      conv → max pool → BN → Q → layer
    (conv → ReLU, conv → ReLU) → cat → layer      becomes      (conv → BN → Q, conv → BN → Q) → cat → layer

Source of the order: Z. Cai et al., Deep Learning with Low Precision by Half-wave Gaussian Quantization, CVPR 2017,
section 5 and the authors' networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph, TensorSpec
from ...ir.nodes import arguments, operand, shape_of
from ...runtime.layers import HalfWaveQuantizer

HALF_WAVES = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish",
    "softplus",
})  # fmt: skip
"""Activations that are all but flat below zero and rise above: what a half-wave quantizer can stand for."""

_SAME = frozenset({"clone", "contiguous", "alias", "detach"})
_FLAT = frozenset({"view", "reshape", "flatten", "_unsafe_view"})

Nodes = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Leaf:
    """A tensor that is to be normalised and quantised.

    Attributes:
        node: gives it; where it is a batch norm, that one loses its factors and terms.
        pools: max pools to run before, in their order.
        activations: what the quantizer replaces, in their order.
    """

    node: fx.Node
    pools: Nodes
    activations: Nodes


@dataclass(frozen=True)
class Ready:
    """A tensor that has been quantised already, and the max pools behind it."""

    node: fx.Node
    pools: Nodes


@dataclass(frozen=True)
class Behind:
    """An operation that passes levels on (dropout, flattening), and what it reads."""

    node: fx.Node
    part: Source


@dataclass(frozen=True)
class Joined:
    """A concatenation of channels, and what it joins."""

    node: fx.Node
    parts: tuple[Source, ...]


Source = Leaf | Ready | Behind | Joined


def trace_back(graph: Graph, node: fx.Node, pools: Nodes = (), activations: Nodes = ()) -> Source:
    """What leads to the tensor of a node."""
    layer, name = graph.layer(node), op_name(node)
    if isinstance(layer, HalfWaveQuantizer):
        return Ready(node, pools)
    if activation_name(graph, node) is not None:
        return trace_back(graph, operand(node), pools, (node, *activations))
    if name.startswith("max_pool") and isinstance(node.meta["spec"], TensorSpec):
        return trace_back(graph, operand(node), (node, *pools), activations)
    if isinstance(layer, nn.Identity) or name in _SAME:
        return trace_back(graph, operand(node), pools, activations)
    if isinstance(layer, nn.modules.dropout._DropoutNd) or name == "dropout" or (not pools and _flattens(node, name)):
        return Behind(node, trace_back(graph, operand(node), pools, activations))
    if name == "cat" and _along_channels(node):
        parts: Any = arguments(node)["tensors"]
        return Joined(node, tuple(trace_back(graph, part, pools, activations) for part in parts))
    return Leaf(node, pools, activations)


def leaves(source: Source) -> list[Leaf]:
    """All tensors that are to be quantised."""
    if isinstance(source, Leaf):
        return [source]
    if isinstance(source, Behind):
        return leaves(source.part)
    return [leaf for part in source.parts for leaf in leaves(part)] if isinstance(source, Joined) else []


def is_ready(source: Source) -> bool:
    """Whether nothing is left to quantise."""
    return not leaves(source)


def norm_of(graph: Graph, leaf: Leaf) -> _BatchNorm | None:
    """The batch norm that gives a leaf's tensor, if it normalises by running statistics."""
    layer = graph.layer(leaf.node)
    return layer if isinstance(layer, _BatchNorm) and layer.running_mean is not None else None


def activation_name(graph: Graph, node: fx.Node) -> str | None:
    """Name of an activation that a half-wave quantizer can replace, None for anything else."""
    if isinstance(graph.layer(node), nn.PReLU):
        return "prelu"
    name = op_name(node)
    if name in ("clamp", "clamp_min", "hardtanh"):
        low: Any = arguments(node).get("min", arguments(node).get("min_val"))
        return name if isinstance(low, (int, float)) and low == 0 else None
    return name if name in HALF_WAVES else None


def op_name(node: fx.Node) -> str:
    """Name of a node's ATen operation without overload, empty for other nodes."""
    return node.target._schema.name.rpartition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def _flattens(node: fx.Node, name: str) -> bool:
    """Whether images (N, C, H, W) become (N, C H W)."""
    if name not in _FLAT:
        return False
    given, shape = shape_of(operand(node)), shape_of(node)
    return len(given) == 4 and shape == (given[0], given[1] * given[2] * given[3])


def _along_channels(node: fx.Node) -> bool:
    rank = len(shape_of(node))
    dim: Any = arguments(node)["dim"]
    return rank > 1 and dim % rank == 1
