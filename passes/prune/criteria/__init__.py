"""Criteria: what says how much a channel matters. A criterion is a pure function from a weight to a score per row.

How to add one: a function `(rows: Tensor (n, weights)) -> Tensor (n,)`, higher means keep, a row in `CRITERIA`, and
its name in `Criterion`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ....ir.graph import Graph, submodule
from ....ir.groups import Groups
from ....ir.labels import Slot
from .magnitude import l1, l2

Criterion = Literal["l1", "l2"]
CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1, "l2": l2}


def score_classes(graph: Graph, groups: Groups, criterion: Criterion) -> npt.NDArray[np.float64]:
    """Score of every class, shape (groups.count,): the mean over its channels in all layers that produce them.

    Scores are divided by the mean of their layer first, so that layers of different fan-in count alike and a global
    threshold compares like with like. A class that no weight produces (padding) scores as its group's mean, 1.
    """
    total, seen = np.zeros(groups.count), np.zeros(groups.count)
    for slot, vector in groups.labels.slots.items():
        if not _produces(graph, slot):
            continue
        weight = graph.tensor(slot.name).detach().to(torch.float32)
        scores = CRITERIA[criterion](weight.movedim(slot.dim, 0).flatten(1)).numpy().astype(np.float64)
        scores = scores / max(scores.mean(), np.finfo(np.float64).tiny)
        classes = np.broadcast_to(groups.vector(vector), scores.shape)  # one entry where all rows are of one class
        np.add.at(total, classes, scores)
        np.add.at(seen, classes, 1)
    return np.divide(total, seen, out=np.ones(groups.count), where=seen > 0)


def _produces(graph: Graph, slot: Slot) -> bool:
    """Whether a slot is the output dimension of a convolution's or linear layer's weight."""
    owner, _, leaf = slot.name.rpartition(".")
    if leaf != "weight" or slot.name.startswith("%"):
        return False
    layer = submodule(graph.module, owner)
    if isinstance(layer, nn.modules.conv._ConvNd):
        depthwise = layer.groups > 1 and layer.groups == layer.in_channels
        return slot.dim == (1 if layer.transposed and not depthwise else 0)
    return isinstance(layer, nn.Linear) and slot.dim == 0
