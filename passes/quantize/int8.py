"""8-bit layers in the place of plain ones, and the span of what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir.graph import Graph
from ...ir.nodes import operand
from ...runtime.data import images_in
from ...runtime.layers import Int8Conv2d, Int8Layer, Int8Linear
from ...runtime.layers.padding import numeric_padding
from ..analyse.sharing import shared_list
from ..analyse.streaming import stream_each
from ..base import Context
from ..batch import example_batch
from ..fuse.affine import is_tied

aten = torch.ops.aten
IMAGES = 512
"""Calibration images, at most, that spans are taken from."""


def unfit(graph: Graph, node: fx.Node) -> str | None:
    """Why a layer cannot have 8 bits; empty where it has them already."""
    layer = graph.layer(node)
    if isinstance(layer, Int8Layer):
        return ""
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"a {type(layer).__name__} has no 8-bit form; Conv2d and Linear have"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode!r}; 8-bit convolutions pad with zeros"
    if isinstance(layer, nn.Conv2d) and numeric_padding(layer) is None:
        return "its padding 'same' is not the same on both sides"
    if len(node.args) > 1 or node.kwargs:
        return "it is called with more than its input"
    if sum(other.op == "call_module" and other.target == node.target for other in graph.nodes) > 1:
        return "it is called several times"
    return "a parameter of it is shared with another layer" if is_tied(graph, layer) else None


def int8_layer(layer: nn.Conv2d | nn.Linear) -> Int8Layer:
    """An 8-bit layer that takes over the parameters of a plain one."""
    return Int8Linear.from_plain(layer) if isinstance(layer, nn.Linear) else Int8Conv2d.from_plain(layer)


def install_int8(graph: Graph, layers: Mapping[str, fx.Node]) -> None:
    """Put 8-bit layers in the place of plain ones, by path, in a graph that is being edited.

    What integer kernels give lies channels-last in memory: a `view` becomes the `reshape` that copies where it must.
    """
    for path, node in layers.items():
        layer: Any = graph.layer(node)
        graph.module.set_submodule(path, int8_layer(layer))
    for node in graph.nodes if layers else ():
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def observe_inputs(graph: Graph, nodes: Sequence[fx.Node], context: Context, title: str) -> str:
    """Give 8-bit layers the span of what they read in this network; what it was taken from, for the report.

    From `data.calibration`, or else `data.train`; without either, from the example inputs.
    """
    if not nodes:
        return ""
    loader = context.data.calibration if context.data.calibration is not None else context.data.train
    source, batch = "calibration images", example_batch(graph, context.inputs)
    if loader is None:
        if batch is None:
            return "8-bit layers round each batch by its own span: there is no calibration data"
        loader, source = (
            [(batch, torch.zeros(images_in(batch), dtype=torch.long))],
            "example inputs, for want of calibration data",
        )
    spans: dict[str, Tensor] = {}

    def look(name: str, tensor: Tensor) -> None:
        values = tensor[tensor.isfinite()]
        if values.numel():
            spans[name] = _joined(spans.get(name), torch.stack(torch.aminmax(values)).cpu())

    names = sorted({operand(node).name for node in nodes})
    seen = stream_each(graph, loader, look, nodes=names, limit=IMAGES, title=title, console=context.console)
    for found in shared_list(spans):
        _install(graph, nodes, found)
    return f"inputs of 8-bit layers are rounded within what they were on {seen} {source}"


def _install(graph: Graph, nodes: Sequence[fx.Node], spans: Mapping[str, Tensor]) -> None:
    for node in nodes:
        layer = graph.layer(node)
        assert isinstance(layer, Int8Layer)
        if operand(node).name in spans:
            layer.observe(spans[operand(node).name].to(layer.weight.device))


def _joined(known: Tensor | None, found: Tensor) -> Tensor:
    if known is None:
        return found
    return torch.stack([torch.minimum(known[0], found[0]), torch.maximum(known[1], found[1])])
