"""Contiguous or channels-last, with the kernels that suit each: measured on the example inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ...ir.graph import Graph
from ...runtime.data import Inputs
from ...runtime.layers.pq_conv2d import PQConv2d
from ...runtime.measure import latency_ratio
from .kernels import KernelChoice, Tables, choose_kernels

Layout = Literal["contiguous", "channels-last"]
aten = torch.ops.aten

WORTHWHILE = 0.97
"""Channels-last is taken where its share of the contiguous time is at most this."""
ROUNDS = 11


@dataclass(frozen=True)
class Choice:
    """A layout and why.

    Args:
        layout: the layout.
        reason: for the report.
        ratio: channels-last time / contiguous time, None where it was not measured.
        kernels: how the product-quantized layers run in that layout.
    """

    layout: Layout
    reason: str
    ratio: float | None = None
    kernels: list[KernelChoice] = field(default_factory=list)


def choose_layout(
    graph: Graph,
    wish: Literal["auto", "contiguous", "channels-last"],
    batch: Inputs | None,
    kernels: Literal["auto", "dense", "table"] = "auto",
    tables: Tables = "fp32",
) -> Choice:
    """Put the graph into the layout that is wished, or for `auto` the faster one on the batch.

    Which kernel is faster depends on the layout, and which layout on the kernels: so kernels are chosen in both, and
    the two networks that come out are compared. Nothing is measured where there is no batch.
    """
    if wish == "auto" and batch is not None and _has_images(graph):
        return _faster(graph, batch, kernels, tables)
    layout: Layout = "contiguous" if wish == "auto" else wish
    reason = f"{wish} as asked for"
    if wish == "auto":
        images = _has_images(graph)
        why = "not measured, the inputs mix positional and keyword ones" if images else "no weight has an image layout"
        reason = f"contiguous: {why}"
    if layout == "channels-last":
        set_channels_last(graph, "emit")
    return Choice(layout, reason, kernels=choose_kernels(graph, kernels, tables, batch))


def _faster(graph: Graph, batch: Inputs, kernels: Literal["auto", "dense", "table"], tables: Tables) -> Choice:
    candidate = graph.copy()
    set_channels_last(candidate, "emit")
    chosen: dict[Layout, list[KernelChoice]] = {
        "contiguous": choose_kernels(graph, kernels, tables, batch),
        "channels-last": choose_kernels(candidate, kernels, tables, batch),
    }
    ratio = latency_ratio(candidate, graph, batch, rounds=ROUNDS).ratio
    layout: Layout = "channels-last" if ratio <= WORTHWHILE else "contiguous"
    if layout == "channels-last":
        graph.adopt(candidate)
    reason = f"{layout}: channels-last takes {ratio:.2f} of the contiguous time"
    return Choice(layout, reason, ratio, chosen[layout])


def _has_images(graph: Graph) -> bool:
    modules = list(graph.module.modules())
    return any(isinstance(m, PQConv2d) or any(p.dim() == 4 for p in m.parameters(recurse=False)) for m in modules)


def set_channels_last(graph: Graph, author: str) -> None:
    """Lay out 4-d weights channels-last; convolutions then keep their outputs so.

    A `view` that merges channels with space (flatten before a linear layer) cannot be one on such tensors: it becomes
    the `reshape` that copies where it must. A product-quantized convolution has no weight to lay out: one that reads an
    input of the network writes channels-last whatever it reads.
    """
    with graph.edit(author):
        for node in graph.nodes:
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
            layer = graph.layer(node)
            if isinstance(layer, PQConv2d) and node.all_input_nodes[0].op == "placeholder":
                layer.channels_last = True
    fresh: dict[int, nn.Parameter] = {}
    for module in graph.module.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 4:
                module._parameters[name] = fresh.setdefault(id(parameter), _channels_last(parameter))


def _channels_last(parameter: nn.Parameter) -> nn.Parameter:
    value = parameter.detach().contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
