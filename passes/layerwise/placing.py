"""Where new weights and new constants go."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ...ir.graph import Graph
from .patches import Reading


def set_weight(layer: Reading, weight: Tensor) -> None:
    """Replace a layer's weight by one of the same shape."""
    layer.weight = _parameter(weight, layer.weight)


def add_constant(graph: Graph, node: fx.Node, constant: Tensor) -> str:
    """Let the layer at a node give `layer(x) + constant`, constant (out,); say where it went.

    A bias takes it where there is one. Where there is none and only a batch norm with running statistics reads the
    layer, the running mean takes it (`bn(y + c)` with mean μ is `bn(y)` with mean μ − c): the network keeps its
    parameters, and training, which would cancel a bias there, starts from the right mean. Otherwise a bias is made.

    Returns:
        `bias`, `running mean` or `new bias`.
    """
    layer = graph.layer(node)
    assert isinstance(layer, (_ConvNd, nn.Linear))
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias.detach().double() + constant.double(), layer.bias)
        return "bias"
    norm = _norm_behind(graph, node)
    if norm is not None:
        mean = norm.running_mean
        assert mean is not None
        norm.running_mean = (mean.double() - constant.double()).to(mean.dtype)
        return "running mean"
    layer.bias = _parameter(constant, layer.weight)
    return "new bias"


def _norm_behind(graph: Graph, node: fx.Node) -> _BatchNorm | None:
    """The batch norm that alone reads a node, keeps running statistics and is called nowhere else."""
    users = list(node.users)
    norm = graph.layer(users[0]) if len(users) == 1 else None
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return None
    spec = node.meta["spec"]
    if isinstance(graph.layer(node), nn.Linear) and len(spec.shape) != 2:
        return None  # its channels are dimension 1, those of the linear layer the last
    calls = sum(other.op == "call_module" and other.target == users[0].target for other in graph.nodes)
    return norm if calls == 1 else None


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.dtype), requires_grad=like.requires_grad)


def bias_of(layer: Reading) -> Tensor:
    """The layer's bias, or zeros, shape (out,), in double precision."""
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if layer.bias is None:
        return torch.zeros(width, dtype=torch.float64, device=layer.weight.device)
    return layer.bias.detach().double()
