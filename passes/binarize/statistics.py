"""Means and variances of a network's tensors, for batch norms that are new."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor

from ...ir.graph import Graph
from ...runtime.data import Loader
from ..analyse.moments import Moments
from ..analyse.sharing import shared_list
from ..analyse.streaming import stream_each


def channel_statistics(
    graph: Graph, names: Sequence[str], loader: Loader, images: int, console: Console | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance (C,) along dimension 1 of the tensors of some nodes, from one pass over calibration images.

    Under `torchrun` every process looks at its share and gets the same result.

    Raises:
        DataError: an empty loader or a bad batch.
    """
    found: dict[str, Moments] = {}

    def look(name: str, tensor: Tensor) -> None:
        values = Moments.of(tensor.detach().double().movedim(1, 0).flatten(1), 1)
        found.setdefault(name, Moments.empty(len(values.mean))).merge(
            Moments(values.count, values.mean.cpu(), values.deviations.cpu())
        )

    stream_each(graph, loader, look, nodes=names, limit=images, title="binarize: statistics", console=console)
    first, *others = shared_list(found)
    for other in others:
        for name, moments in other.items():
            first.setdefault(name, Moments.empty(len(moments.mean))).merge(moments)
    return {
        name: (moments.mean, moments.variance.clamp(min=torch.finfo(torch.float32).tiny))
        for name, moments in first.items()
    }
