"""What guides a selection: the targets, the teacher's class scores, and its knowledge at stage ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ....ir.graph import Graph, TensorSpec
from ....runtime.training import Objective
from ....runtime.training.features import Taps, find_node
from ....runtime.training.losses import AttentionTransfer, CrossEntropy, Hint, KnowledgeDistillation, Sum
from ...train.knowledge import find_places

Knowledge = Literal["attention", "hint", "logits", "none"]


@dataclass(frozen=True)
class Guidance:
    """L = CE + a · T² KL + b · L_knowledge.

    Args:
        knowledge: what L_knowledge is; `none` leaves cross entropy alone, without class scores too.
        places: names or glob patterns of stage ends, the same in student and teacher; None finds them.
        distill: a.
        temperature: T.
        weight: b; None for 1000 (`attention`) or 1 (`hint`).
    """

    knowledge: Knowledge
    places: tuple[str, ...] | None = None
    distill: float = 0.9
    temperature: float = 4.0
    weight: float | None = None

    def taps(self, graph: Graph, teacher: nn.Module) -> Taps | None:
        """The places in both networks, None where no features are compared."""
        if self.knowledge in ("logits", "none"):
            return None
        return find_places(graph, teacher, places=self.places)

    def objective(self, graph: Graph, taps: Taps | None) -> Objective:
        """The loss to learn from."""
        if self.knowledge == "none":
            return CrossEntropy()
        terms: list[Objective] = [CrossEntropy(), KnowledgeDistillation(self.temperature, alpha=1.0)]
        weights = [1.0, self.distill]
        if taps is not None:
            attention = self.knowledge == "attention"
            terms.append(AttentionTransfer(1.0) if attention else self._hint(graph, taps))
            weights.append(self.weight if self.weight is not None else 1000.0 if attention else 1.0)
        return Sum(terms, weights)

    def _hint(self, graph: Graph, taps: Taps) -> Objective:
        """Adapters from the student's channels to the teacher's: here both have the same, as nothing is cut yet."""
        channels = [_channels(graph, place) for place in taps.student]
        return Hint(channels, channels, 1.0)


def _channels(graph: Graph, place: str) -> int:
    spec = find_node(graph.module.graph, place).meta["spec"]
    assert isinstance(spec, TensorSpec)
    return spec.shape[1]
