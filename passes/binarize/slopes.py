"""What is left, behind a quantizer, of the activation before: its slope, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.graph import Graph
from ...runtime.layers.half_wave_quantizer import HalfWaveQuantizer

REACH, POINTS = 6.0, 1201
FLOOR = 0.05
"""Slopes are not let nearer to 0 than this share of their mean: a weight of 0 has no sign."""


def slopes(
    graph: Graph, activations: Sequence[fx.Node], quantizer: HalfWaveQuantizer, scale: Tensor, shift: Tensor
) -> Tensor:
    """Factors with which the levels of a quantizer stand best for an activation, (C,).

    With z standard normal, a channel of the trained network is a(s z + t) for its activation a; now it is Q(z). Of all
    c + f Q(z) the one nearest to it in the mean square has

        f = Cov(a(s z + t), Q(z)) / Var Q(z)

    so that f W is where weights W that read the channel begin (c is removed by the batch norm behind them). A channel
    with a negative factor s, which a norm without one turns round, gets a negative f.

    Args:
        graph: the network.
        activations: nodes of it, applied one after the other; none: a is the identity.
        quantizer: Q.
        scale: s, (C,).
        shift: t, (C,).
    """
    z = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density = density / density.sum()
    levels = quantizer(z)
    levels = levels - density @ levels
    values = scale.double().cpu() * z[:, None] + shift.double().cpu()
    for node in activations:
        values = _applied(graph, node, values)
    found = (density * levels) @ values / (density @ levels.square())
    least = FLOOR * float(found.abs().mean())
    return torch.where(found.abs() < least, torch.where(found < 0, -least, least), found)


@torch.no_grad()
def _applied(graph: Graph, node: fx.Node, values: Tensor) -> Tensor:
    """An activation of the network on values (points, C)."""
    layer = graph.layer(node)
    if layer is not None:  # PReLU
        weight: Any = layer.weight
        return torch.where(values > 0, values, values * weight.double().cpu())
    rest = fx.map_arg(node.args[1:], lambda source: graph.tensor(str(source.target)).double().cpu().flatten())
    function: Any = node.target
    result: Tensor = function(values, *rest, **node.kwargs)
    return result
