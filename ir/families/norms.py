"""Norms and other layers that work channel by channel, or group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ..labels import Labels, along, channel_vector, varies, varying, zeros
from ..nodes import arguments
from .pointwise import adopt


def batch_norm_op(labels: Labels, node: fx.Node) -> Any:
    """Functional batch or instance norm: channel by channel."""
    x = labels.read(node.args[0])
    vector = channel_vector(labels, x, 1)
    for parameter in node.args[1:5]:
        if isinstance(parameter, fx.Node):
            adopt(labels, labels.representative(parameter), vector)
    return along(vector, 1, x.shape)


def layer_norm_op(labels: Labels, node: fx.Node) -> Any:
    """Functional layer or RMS norm."""
    given = arguments(node)
    parameters = [given[name] for name in ("weight", "bias") if isinstance(given.get(name), fx.Node)]
    return normalized(labels, node, len(given["normalized_shape"]), parameters)


def normalized(labels: Labels, node: fx.Node, count: int, parameters: Sequence[fx.Node] = ()) -> Tensor:
    """Layer or RMS norm over the last `count` dimensions: its statistics run over all channels.

    So none can go, or (`norms="refit"`) the statistics are those of the channels that stay.
    """
    x: Tensor = labels.read(node.args[0])
    dims = range(x.dim() - count, x.dim())
    if any(varies(x, d) for d in dims):
        if labels.norms == "refit" and varying(x) == [x.dim() - 1]:
            labels.refitted[node] = x
        else:
            labels.pin(x, "is normalised over its channels, whose statistics would change")
            x = zeros(x.shape)
    for parameter in parameters:
        adopt(labels, labels.representative(parameter), x)
    return x


def group_norm_op(labels: Labels, node: fx.Node) -> Any:
    """Functional group norm."""
    vector, result = grouped_norm(labels, node, arguments(node)["num_groups"])
    for parameter in node.args[2:4]:
        if isinstance(parameter, fx.Node):
            adopt(labels, labels.representative(parameter), vector)
    return result


def grouped_norm(labels: Labels, node: fx.Node, groups: int) -> tuple[Tensor, Tensor]:
    """Group norm: whole groups can go, their statistics are their own. Returns the channel vector and the labels."""
    x = labels.read(node.args[0])
    vector = channel_vector(labels, x, 1)
    if groups == 1 and varying(vector) and labels.norms == "refit":
        result = along(vector, 1, x.shape)
        labels.refitted[node] = result
        return vector, result
    if groups == 1 and varying(vector):
        labels.pin(vector, "is normalised over all its channels, whose statistics would change")
        return zeros(vector.shape), zeros(x.shape)
    vector = labels.tie(vector.view(groups, -1), [1]).reshape(-1)
    return vector, along(vector, 1, x.shape)


def per_channel(*tensors: str, dim: int = 1) -> Callable[..., Any]:
    """Layers that work channel by channel and own one value per channel under each of the names given."""

    def rule(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
        x = labels.read(node.args[0])
        channels = getattr(layer, "dim", dim)
        vector = channel_vector(labels, x, channels)
        for name in tensors:
            value = getattr(layer, name, None)
            if value is not None and value.numel() == len(vector) > 1:
                labels.bind(f"{path}.{name}", 0, vector)
        return along(vector, channels % x.dim(), x.shape)

    return rule


def group_norm_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.GroupNorm."""
    vector, result = grouped_norm(labels, node, layer.num_groups)
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            labels.bind(f"{path}.{name}", 0, vector)
    return result


def layer_norm_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.LayerNorm and RMSNorm."""
    x = normalized(labels, node, len(layer.normalized_shape))
    if node in labels.refitted:
        for name in ("weight", "bias"):
            if getattr(layer, name, None) is not None:
                labels.bind(f"{path}.{name}", 0, channel_vector(labels, x, x.dim() - 1))
    return x


def same_layer(labels: Labels, node: fx.Node, _layer: Any, _path: str) -> Any:
    """Dropout and Identity."""
    return labels.read(node.args[0])
