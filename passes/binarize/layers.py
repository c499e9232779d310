"""Layers with one-bit weights in the place of plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph
from ...runtime.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from ...runtime.layers.binary import Scale, Weights
from ...runtime.layers.padding import numeric_padding
from .sources import op_name


def binary_layer(layer: nn.Conv2d | nn.Linear, weights: Weights, scale: Scale) -> BinaryLayer:
    """A binary layer whose latent weights are those of a plain one."""
    with torch.device("meta"):
        fresh: BinaryLayer
        if isinstance(layer, nn.Conv2d):
            padding = numeric_padding(layer)
            assert padding is not None
            sizes = layer.in_channels, layer.out_channels, (layer.kernel_size[0], layer.kernel_size[1])
            stride, dilation = (layer.stride[0], layer.stride[1]), (layer.dilation[0], layer.dilation[1])
            bias = layer.bias is not None
            fresh = BinaryConv2d(*sizes, stride, padding, dilation, layer.groups, bias, weights, scale)
        else:
            fresh = BinaryLinear(layer.in_features, layer.out_features, layer.bias is not None, weights, scale)
    parameters: Any = layer.weight, layer.bias
    fresh.weight, fresh.bias = parameters
    return fresh.train(layer.training)


def scale_inputs(layer: nn.Conv2d | nn.Linear, slope: Tensor) -> None:
    """Multiply the weights that read each input channel by its factor, (in,); the parameter is replaced."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.weight.detach().double()
    by_group = weight.view(groups, -1, *weight.shape[1:])
    factor = slope.to(weight.device).view(groups, 1, -1, *[1] * (weight.dim() - 2))
    value = (by_group * factor).view(weight.shape).to(layer.weight.dtype)
    layer.weight = nn.Parameter(value, requires_grad=layer.weight.requires_grad)


def drop_bias(graph: Graph, node: fx.Node) -> bool:
    """Take a layer's bias away where only batch norms follow, which remove it: their running means take it over."""
    layer = graph.layer(node)
    assert isinstance(layer, BinaryLayer)
    norms = norms_behind(graph, node)
    if layer.bias is None or norms is None:
        return False
    bias = layer.bias.detach()
    for norm in norms:
        assert norm.running_mean is not None
        norm.running_mean = norm.running_mean - bias.to(norm.running_mean.dtype)
    layer.bias = None
    return True


def norms_behind(graph: Graph, node: fx.Node) -> list[_BatchNorm] | None:
    """The batch norms that read a node, directly or through max pools; None where anything else reads it too."""
    found: list[_BatchNorm] = []
    for user in node.users:
        norm = graph.layer(user)
        if op_name(user).startswith("max_pool"):
            behind = norms_behind(graph, user)
            if behind is None:
                return None
            found += behind
        elif isinstance(norm, _BatchNorm) and norm.running_mean is not None and not _called_again(graph, user):
            found.append(norm)
        else:
            return None
    return list({id(norm): norm for norm in found}.values()) or None


def _called_again(graph: Graph, node: fx.Node) -> bool:
    return sum(other.op == "call_module" and other.target == node.target for other in graph.nodes) > 1
