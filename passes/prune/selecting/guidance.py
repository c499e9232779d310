"""What guides a selection: the targets, the teacher's class scores, and its knowledge at stage ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ....ir.graph import Graph
from ....runtime.forward import call, modes_restored
from ....runtime.training import CrossEntropy, KnowledgeDistillation, Objective, Taps
from ....runtime.training.features import tapped
from ....runtime.training.losses import AttentionTransfer, Hint, Sum
from ....runtime.training.seeds import seeded
from ...train.knowledge import find_places

Knowledge = Literal["attention", "hint", "logits", "none"]
WEIGHTS = {"attention": 1000.0, "hint": 1.0}


@dataclass(frozen=True)
class Guidance:
    """L = CE + a · T² KL + b · L_knowledge.

    Args:
        knowledge: what L_knowledge is; `none` leaves cross entropy alone, without class scores too.
        places: names or glob patterns of places in the student; None finds them.
        teacher_places: the same in the teacher; None where they have the same names.
        distill: a.
        temperature: T.
        weight: b; None for that of `WEIGHTS`.
        label_smoothing: of the cross entropy's targets.
    """

    knowledge: Knowledge
    places: tuple[str, ...] | None = None
    teacher_places: tuple[str, ...] | None = None
    distill: float = 0.9
    temperature: float = 4.0
    weight: float | None = None
    label_smoothing: float = 0.0

    def taps(self, graph: Graph, teacher: nn.Module) -> Taps | None:
        """The places in both networks, None where no features are compared."""
        if self.knowledge in ("logits", "none"):
            return None
        return find_places(graph, teacher, places=self.places, teacher_places=self.teacher_places)

    def objective(self, graph: Graph, teacher: nn.Module, taps: Taps | None, seed: int) -> Objective:
        """The loss to learn from; `seed` is that of the adapters."""
        hard = CrossEntropy(self.label_smoothing)
        if self.knowledge == "none":
            return hard
        terms: list[Objective] = [hard, KnowledgeDistillation(self.temperature, alpha=1.0)]
        weights = [1.0, self.distill]
        if taps is not None:
            terms.append(self._knowledge(graph, teacher, taps, seed))
            weights.append(WEIGHTS[self.knowledge] if self.weight is None else self.weight)
        return Sum(terms, weights)

    def _knowledge(self, graph: Graph, teacher: nn.Module, taps: Taps, seed: int) -> Objective:
        if self.knowledge == "attention":
            return AttentionTransfer(1.0)
        with seeded(seed):
            return Hint(_channels(graph, graph.module, taps.student), _channels(graph, teacher, taps.teacher), 1.0)


def _channels(graph: Graph, network: nn.Module, places: Sequence[str]) -> list[int]:
    """Sizes of dimension 1 of the tensors at some places, on the example inputs of the graph."""
    twin = tapped(network, places)
    with torch.no_grad(), modes_restored(twin):
        features: tuple[Tensor, ...] = call(twin.eval(), graph.example_kwargs or graph.example_args)[1]
    return [feature.shape[1] for feature in features]
