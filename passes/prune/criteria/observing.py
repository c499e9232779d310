"""Evidence from activations: one number per channel and image, from one pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ....ir.errors import DataError
from ....ir.graph import Graph
from ....ir.groups import Groups
from ....ir.labels import IntArray
from ....runtime.data import Loader
from ...analyse.sharing import shared_list
from ...analyse.streaming import stream_each
from .members import Member, Source, produces

Reduce = Callable[[str, Tensor], Tensor]
Places = dict[fx.Node, tuple[int, IntArray]]
"""Node → dimension of its tensor that holds channels, and the class of each."""

_LAYERS = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "Dropout", "Flatten", "Identity")
_OPS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "mean", "dropout", "flatten", "view",
        "reshape", "_unsafe_view", "squeeze", "unsqueeze", "permute", "transpose", "clone", "contiguous",
        "getitem")  # fmt: skip


def zero_shares(graph: Graph, groups: Groups, source: Source) -> list[Member]:
    """Share of each channel's positions that are exactly zero behind the activation, (n, images)."""
    return _observe(graph, activations(graph, groups), source, lambda _, x: (x == 0).float().mean(2))


def pooled(graph: Graph, groups: Groups, source: Source) -> list[Member]:
    """Mean of each channel over its positions behind the activation, (n, images)."""
    return _observe(graph, activations(graph, groups), source, lambda _, x: x.float().mean(2))


def responses(graph: Graph, groups: Groups, source: Source) -> list[Member]:
    """Frobenius norm of each filter's own output, its bias taken off again, (n, images)."""
    places = outputs(graph, groups)
    biases = {node.name: getattr(graph.layer(node), "bias", None) for node in places}

    def norm(name: str, x: Tensor) -> Tensor:
        bias = biases[name]
        x = x.float() if bias is None else x.float() - bias.detach().float()[:, None]
        norms: Tensor = torch.linalg.vector_norm(x, dim=2)
        return norms

    return _observe(graph, places, source, norm)


def activations(graph: Graph, groups: Groups) -> Places:
    """The maps that layers read, as they were before pooling, dropout and flattening."""
    places: Places = {}
    for sources in groups.labels.readers.values():
        for node in sources:
            place = node
            while _only_moves(graph, place) and isinstance(place.args[0], fx.Node):
                place = place.args[0]
            axis = groups.channels(place)
            if axis is not None and axis[0] and (groups.group_of[axis[1]] >= 0).any():
                places[place] = axis
    return places


def outputs(graph: Graph, groups: Groups) -> Places:
    """Outputs of the convolutions and linear layers that produce channels which could be cut."""
    owners = {slot.name.rpartition(".")[0] for slot in groups.labels.slots if produces(graph, slot)}
    places: Places = {}
    for node in graph.nodes:
        axis = groups.channels(node) if node.op == "call_module" and str(node.target) in owners else None
        if axis is not None and axis[0] and (groups.group_of[axis[1]] >= 0).any():
            places[node] = axis
    return places


def loader_of(source: Source) -> Loader:
    """The calibration batches, or else the training batches.

    Raises:
        DataError: there are neither.
    """
    loader = source.data.calibration if source.data.calibration is not None else source.data.train
    if loader is None:
        raise DataError(
            f"{source.who} needs data to calibrate with, and none was given",
            hint="Pass Data(calibration=...) or Data(train=...), or take a criterion on weights such as 'statistics'.",
        )
    return loader


def _observe(graph: Graph, places: Places, source: Source, reduce: Reduce) -> list[Member]:
    """One member per place; `reduce` maps a tensor (images, n, positions) to (images, n)."""
    found: dict[str, list[Tensor]] = {node.name: [] for node in places}
    dims = {node.name: dim for node, (dim, _) in places.items()}

    def visit(name: str, tensor: Tensor) -> None:
        channels = tensor.movedim(dims[name], 1)
        found[name].append(reduce(name, channels.reshape(*channels.shape[:2], -1)).cpu())

    stream_each(
        graph,
        loader_of(source),
        visit,
        nodes=list(found),
        limit=source.limit,
        title="activations",
        console=source.console,
    )
    parts = shared_list({name: torch.cat(values) for name, values in found.items()})
    return [
        Member(node.name, classes, (torch.cat([part[node.name] for part in parts]).T,))
        for node, (_, classes) in places.items()
    ]


def _only_moves(graph: Graph, node: fx.Node) -> bool:
    """Whether a node passes channels on pooled, reshaped or dropped out, but not as another activation."""
    if node.op == "call_module":
        return type(graph.layer(node)).__name__.startswith(_LAYERS)
    target: Any = node.target
    return node.op == "call_function" and getattr(target, "__name__", "").partition(".")[0].startswith(_OPS)
