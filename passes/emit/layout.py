"""Contiguous or channels-last: measured on the example inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ...ir.graph import Graph
from ...runtime.data import Inputs
from ...runtime.measure import latency_ratio

Layout = Literal["contiguous", "channels-last"]

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
    """

    layout: Layout
    reason: str
    ratio: float | None = None


def choose_layout(graph: Graph, wish: Literal["auto", "contiguous", "channels-last"], batch: Inputs | None) -> Choice:
    """The wish, or for `auto` what is faster on the batch; not measured where there is none."""
    if wish != "auto":
        return Choice(wish, f"{wish} as asked for")
    if not any(tensor.dim() == 4 for tensor in graph.module.parameters()):
        return Choice("contiguous", "contiguous: no weight has an image layout")
    if batch is None:
        return Choice("contiguous", "contiguous: not measured, the inputs mix positional and keyword ones")
    candidate = graph.copy()
    set_channels_last(candidate, "emit")
    latency = latency_ratio(candidate, graph, batch, rounds=ROUNDS)
    layout: Layout = "channels-last" if latency.ratio <= WORTHWHILE else "contiguous"
    return Choice(layout, f"{layout}: channels-last takes {latency.ratio:.2f} of the contiguous time", latency.ratio)


def set_channels_last(graph: Graph, author: str) -> None:
    """Lay out 4-d weights channels-last; convolutions then keep their outputs so.

    A `view` that merges channels with space (flatten before a linear layer) cannot be one on such tensors: it becomes
    the `reshape` that copies where it must.
    """
    with graph.edit(author):
        for node in graph.nodes:
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default
    fresh: dict[int, nn.Parameter] = {}
    for module in graph.module.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 4:
                module._parameters[name] = fresh.setdefault(id(parameter), _channels_last(parameter))


def _channels_last(parameter: nn.Parameter) -> nn.Parameter:
    value = parameter.detach().contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)
