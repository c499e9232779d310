"""Several objectives at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ....ir.errors import OptionError
from .lesson import Lesson, Objective


class Sum(Objective):
    """L = Σ_i w_i · L_i.

    Args:
        objectives: the terms L_i, at least one.
        weights: w_i, at least 0; all 1 if None. A term of weight 0 is not computed.

    Raises:
        OptionError: no objective, a negative weight, or not as many weights as objectives.
    """

    def __init__(self, objectives: Sequence[Objective], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(objectives) if weights is None else list(weights)
        if not objectives or len(weights) != len(objectives) or not all(weight >= 0 for weight in weights):
            raise OptionError(f"a sum of {len(objectives)} objectives cannot have the weights {weights}")
        self.terms = nn.ModuleList(objectives)
        self.weights = weights
        used = [one for one, weight in zip(objectives, weights, strict=True) if weight > 0]
        self.needs_teacher = any(one.needs_teacher for one in used)
        self.needs_features = any(one.needs_features for one in used)

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss."""
        total = lesson.outputs.new_zeros(())
        for term, weight in zip(self.terms, self.weights, strict=True):
            if weight > 0:
                total = total + weight * term(lesson)
        return total
