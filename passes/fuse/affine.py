"""Folding a factor and a term per channel into the layer before."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...ir.graph import Graph
from ...runtime.layers import Int8Conv2d, Int8Layer, Int8Linear
from ...runtime.layers.int8_rounding import weight_values
from ...runtime.layers.pq_layer import PQLayer

Layers = tuple[type[nn.Module], ...]

LINEAR: Layers = (_ConvNd, nn.Linear, Int8Layer)
NORMS: Layers = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


def layers_before(graph: Graph, node: fx.Node, kinds: Layers, dim: int = 1) -> list[fx.Node] | str:
    """The layer whose output only `node` reads, or the reason why there is none to fold into.

    Args:
        graph: the network.
        node: acts on every channel by itself.
        kinds: the types of layers to fold into.
        dim: the dimension that `node` takes for the channels.

    Returns:
        One node, or several in the order of their channels where `node` reads what is concatenated from them.
    """
    source = node.all_input_nodes[0]
    joined = _joined(source, dim)
    if joined is None:
        reason = _unfit(graph, source, node, kinds, dim)
        return [source] if reason is None else reason
    if len(source.users) > 1:
        return _also_read(source, node)
    if len(set(joined)) < len(joined):
        return f"{source.name} holds the same channels twice"
    reasons = (_unfit(graph, part, source, kinds, dim) for part in joined)
    return next((reason for reason in reasons if reason is not None), joined)


def _joined(source: fx.Node, dim: int) -> list[fx.Node] | None:
    """The tensors that a concatenation of channels joins; None for any other node."""
    if source.target is not torch.ops.aten.cat.default:
        return None
    rank = len(source.meta["spec"].shape)
    along = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
    assert isinstance(along, int)
    return list(source.args[0]) if along % rank == dim % rank else None  # type: ignore[arg-type]


def _also_read(source: fx.Node, reader: fx.Node) -> str:
    others = ", ".join(user.name for user in source.users if user is not reader)
    return f"the output of {source.name} is also read by {others}"


def _unfit(graph: Graph, source: fx.Node, reader: fx.Node, kinds: Layers, dim: int) -> str | None:
    """Why what `reader` does to the channels of `source` cannot be folded into it."""
    layer = graph.layer(source)
    if isinstance(layer, PQLayer):
        return f"its input {source.name} is product-quantized: outputs share codewords, none has a factor of its own"
    if isinstance(layer, Int8Layer) and layer.relu:
        return f"its input {source.name} rectifies what it gives"
    if isinstance(layer, Int8Conv2d) and layer.pool:
        return f"its input {source.name} pools what it gives"
    if layer is None or not isinstance(layer, kinds):
        return f"its input {source.name} is no {_names(kinds)}"
    if len(source.users) > 1:
        return _also_read(source, reader)
    calls = sum(other.op == "call_module" and other.target == source.target for other in graph.nodes)
    if calls > 1:
        return f"layer {source.target} is called {calls} times"
    if is_tied(graph, layer):
        return f"the weight of {source.target} is shared with another layer"
    rank = len(source.meta["spec"].shape)
    produced = rank - 1 if isinstance(layer, (nn.Linear, Int8Linear, nn.LayerNorm)) else 1
    if dim % rank != produced:
        return f"the channels of {source.name} are dimension {produced} of {rank}, not dimension {dim % rank}"
    if source.meta["spec"].dtype != reader.meta["spec"].dtype:
        return f"it changes the dtype from {source.meta['spec'].dtype} to {reader.meta['spec'].dtype}"
    return None


def fold_into(graph: Graph, sources: list[fx.Node], dim: int, scale: Tensor, shift: Tensor | None = None) -> None:
    """Give each of the layers its part of a factor and a term per channel, both `(C,)` over all of them."""
    start = 0
    for source in sources:
        layer = graph.layer(source)
        assert layer is not None
        own = slice(start, start + source.meta["spec"].shape[dim])
        fold_affine(layer, scale[own], None if shift is None else shift[own])
        start = own.stop


def fold_affine(layer: nn.Module, scale: Tensor, shift: Tensor | None = None) -> None:
    """Give `layer` the weights of `scale * layer(x) + shift`; its tensors are replaced, not written to.

    An 8-bit layer gets its rounded weights, and the factor goes to their steps: all whole numbers stay what they are.

    Args:
        layer: one of `LINEAR` or `NORMS`, with C output channels and a weight.
        scale: `(C,)`.
        shift: `(C,)`, or None for none.
    """
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        if isinstance(layer, Int8Layer):
            steps, size = layer.weight_scale, scale.abs().to(weight.dtype)
            weight = _parameter(weight_values(weight, steps), weight)
            layer.weight_scale = torch.where(size > 0, steps * size, steps)
        layer.weight = _parameter(scale_outputs(layer, weight, scale), weight)
        term = None if bias is None else scale.double() * bias.double()  # type: ignore[operator]
        if shift is not None:
            term = shift.double() if term is None else term + shift.double()
        if term is not None:
            layer.bias = _parameter(term, weight)


def scale_outputs(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight with every output channel multiplied by its factor, in double precision.

    A convolution holds `(C, in/groups, *kernel)`, a linear layer `(C, in)`, a norm `(C,)`, and a transposed convolution
    `(in, C/groups, *kernel)`, where output channel `g * C/groups + c` is column c of the rows of group g.
    """
    values, factors = weight.double(), scale.double()
    if not isinstance(layer, _ConvTransposeNd):
        return values * factors.reshape(-1, *[1] * (values.dim() - 1))
    by_group = values.reshape(layer.groups, -1, *values.shape[1:])
    return (by_group * factors.reshape(layer.groups, 1, -1, *[1] * (values.dim() - 2))).reshape(values.shape)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad)


def _names(kinds: Layers) -> str:
    return "convolution or linear layer" if kinds == LINEAR else "convolution, linear layer or norm"


def is_tied(graph: Graph, layer: nn.Module) -> bool:
    """Whether another layer, or a node of the graph itself, uses one of the layer's parameters."""
    own = {id(parameter) for parameter in layer.parameters()}
    uses = Counter(id(p) for _, p in graph.module.named_parameters(remove_duplicate=False) if id(p) in own)
    read = {id(graph.tensor(str(node.target))) for node in graph.nodes if node.op == "get_attr"}
    return any(count > 1 for count in uses.values()) or bool(own & read)
