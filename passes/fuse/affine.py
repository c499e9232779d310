"""Folding a factor and a term per output channel into the layer that produces the channels."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...ir.graph import Graph

Producer = _ConvNd | nn.Linear


def producer_before(graph: Graph, node: fx.Node, dim: int = 1) -> fx.Node | str:
    """The convolution or linear layer whose output only `node` reads, or the reason why there is none to fold into.

    Args:
        graph: the network.
        node: acts on every channel by itself.
        dim: the dimension that `node` takes for the channels.
    """
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return "its input is no node"
    layer = graph.layer(source)
    if not isinstance(layer, (_ConvNd, nn.Linear)):
        return f"its input {source.name} is no convolution or linear layer"
    if len(source.users) > 1:
        others = ", ".join(user.name for user in source.users if user is not node)
        return f"the output of {source.name} is also read by {others}"
    if _calls(graph)[str(source.target)] > 1:
        return f"layer {source.target} is called {_calls(graph)[str(source.target)]} times"
    if _is_tied(graph, layer):
        return f"the weight of {source.target} is shared with another layer"
    rank = len(source.meta["spec"].shape)
    produced = rank - 1 if isinstance(layer, nn.Linear) else 1
    if dim % rank != produced:
        return f"the channels of {source.name} are dimension {produced} of {rank}, not dimension {dim % rank}"
    if source.meta["spec"].dtype != node.meta["spec"].dtype:
        return f"it changes the dtype from {source.meta['spec'].dtype} to {node.meta['spec'].dtype}"
    return source


def fold_affine(layer: Producer, scale: Tensor, shift: Tensor | None) -> None:
    """Give `layer` the weights of `scale * layer(x) + shift`; its tensors are replaced, not written to.

    Args:
        layer: with C output channels.
        scale: `(C,)`.
        shift: `(C,)`, or None for none.
    """
    with torch.no_grad():
        layer.weight = _parameter(scale_outputs(layer, scale), layer.weight)
        bias = None if layer.bias is None else scale.double() * layer.bias.double()
        if shift is not None:
            bias = shift.double() if bias is None else bias + shift.double()
        if bias is not None:
            layer.bias = _parameter(bias, layer.weight)


def scale_outputs(layer: Producer, scale: Tensor) -> Tensor:
    """The weight with every output channel multiplied by its factor, in double precision.

    A convolution holds `(C, in/groups, *kernel)`, a linear layer `(C, in)`, and a transposed convolution
    `(in, C/groups, *kernel)`, where output channel `g * C/groups + c` is column c of the rows of group g.
    """
    weight, factors = layer.weight.double(), scale.double()
    if not isinstance(layer, _ConvTransposeNd):
        return weight * factors.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return (by_group * factors.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)


def _calls(graph: Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _is_tied(graph: Graph, layer: Producer) -> bool:
    """Whether another layer, or a node of the graph itself, uses one of the layer's parameters."""
    own = {id(parameter) for parameter in layer.parameters()}
    uses = Counter(id(p) for _, p in graph.module.named_parameters(remove_duplicate=False) if id(p) in own)
    read = {id(graph.tensor(str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    return any(count > 1 for count in uses.values()) or bool(own & read)
