"""What criteria look at in the graph itself: the filters, the batch norms, and draws for `random`.

A `Member` is one place that holds channels, with what a criterion reads there. A class of channels has as many members
as places: a residual stream is written by many layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ....ir.graph import Graph, submodule
from ....ir.groups import Groups
from ....ir.labels import IntArray, Slot
from ....runtime.data import Data
from ....runtime.layers.pq_layer import PQLayer
from ...analyse.over_time import FilterHistory, TimeStatistics
from ...analyse.weights import filters_of


@dataclass(frozen=True)
class Member:
    """One place of the network that holds channels.

    Args:
        name: of the layer or node.
        classes: class of each of its n channels, (n,); 0 where it cannot be cut.
        evidence: the arguments of the criterion, each with n entries along dimension 0.
    """

    name: str
    classes: IntArray
    evidence: tuple[Tensor, ...]


TRAINING_IMAGES = 1024


@dataclass(frozen=True)
class Source:
    """What criteria may draw on besides the graph.

    Args:
        data: its calibration batches, or else its training batches.
        images: at most so many of them; None takes all calibration images, or `TRAINING_IMAGES` where there are none.
        seed: of random scores.
        recorded: what became of the filters while the network learned; None knows the present weights alone.
        console: where progress is shown.
        who: begins the errors, e.g. `pass 'prune-channels', option 'criterion'`.
    """

    data: Data = field(default_factory=Data)
    images: int | None = None
    seed: int = 0
    recorded: TimeStatistics | None = None
    console: Console = field(default_factory=lambda: Console(quiet=True))
    who: str = "option 'criterion'"

    @property
    def limit(self) -> int | None:
        """At most so many images; None for all."""
        return TRAINING_IMAGES if self.images is None and self.data.calibration is None else self.images


def filters(graph: Graph, groups: Groups, source: Source) -> list[Member]:  # noqa: ARG001
    """The weights of every layer that produces channels, a row per channel: (n, weights) in single precision."""
    members = []
    for slot, vector in groups.labels.slots.items():
        if produces(graph, slot):
            rows = _weight(graph, slot).detach().float().flatten(1)
            members.append(Member(slot.name, _spread(groups.vector(vector), len(rows)), (rows,)))
    return members


def _weight(graph: Graph, slot: Slot) -> Tensor:
    """The weight of a slot, output channels first; of a product-quantized layer the decoded one."""
    layer = submodule(graph.module, slot.name.rpartition(".")[0])
    return layer.decoded() if isinstance(layer, PQLayer) else graph.tensor(slot.name).movedim(slot.dim, 0)


def moments(graph: Graph, groups: Groups, source: Source) -> list[Member]:
    """Mean |w| and standard deviation of every filter, and its instability where it was recorded, (n,) each."""
    members = []
    for member in filters(graph, groups, source):
        rows = member.evidence[0].double()
        past = source.recorded.filters(member.name, len(rows)) if source.recorded is not None else None
        found = (rows.abs().mean(1), rows.std(1, correction=0)) if past is None else _history(past)
        members.append(Member(member.name, member.classes, found))
    return members


def _history(past: FilterHistory) -> tuple[Tensor, ...]:
    instability = () if past.instability is None else (past.instability,)
    return tuple(map(torch.from_numpy, (past.mean, past.std, *instability)))


def describes(recorded: TimeStatistics, graph: Graph) -> bool:
    """Whether recorded statistics are of this network's filters, and not of those before a cut."""
    present = filters_of(graph.module)
    return all(name in present and len(present[name]) == len(past.mean) for name, past in recorded.history.items())


def norms(graph: Graph, groups: Groups, source: Source) -> list[Member]:  # noqa: ARG001
    """The factors γ of every batch norm, (n,)."""
    members = []
    for slot, vector in groups.labels.slots.items():
        owner, _, leaf = slot.name.rpartition(".")
        if leaf == "weight" and isinstance(submodule(graph.module, owner), _NormBase):
            gamma = graph.tensor(slot.name).detach().float()
            members.append(Member(slot.name, _spread(groups.vector(vector), len(gamma)), (gamma,)))
    return members


def draws(graph: Graph, groups: Groups, source: Source) -> list[Member]:  # noqa: ARG001
    """A number for every class that can be cut, drawn with the source's seed."""
    generator = torch.Generator().manual_seed(source.seed)
    return [
        Member(group.name, group.classes, (torch.rand(group.channels, generator=generator),)) for group in groups.groups
    ]


def produces(graph: Graph, slot: Slot) -> bool:
    """Whether a slot is the output dimension of a convolution's or linear layer's weight, or of quantized indices."""
    owner, _, leaf = slot.name.rpartition(".")
    if leaf not in ("weight", "indices") or slot.name.startswith("%"):
        return False
    layer = submodule(graph.module, owner)
    if isinstance(layer, PQLayer):
        return tuple(slot) == (f"{owner}.indices", 2)
    if isinstance(layer, nn.modules.conv._ConvNd):
        depthwise = layer.groups > 1 and layer.groups == layer.in_channels
        return slot.dim == (1 if layer.transposed and not depthwise else 0)
    return isinstance(layer, nn.Linear) and slot.dim == 0


def _spread(classes: IntArray, count: int) -> IntArray:
    """One class per channel, also where all are of one."""
    return np.broadcast_to(classes, (count,))
