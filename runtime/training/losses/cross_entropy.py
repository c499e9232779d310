"""Cross entropy: what the targets alone ask for."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ....ir.errors import OptionError
from .lesson import Lesson, Objective, precise


class CrossEntropy(Objective):
    """L = −mean Σ_j y_j · log softmax(z)_j, with the target distribution y = (1 − s) · target + s / classes.

    Targets are class indices `(N, *space)` (then `target` is one-hot) or probabilities `(N, classes, *space)`, as mixup
    makes them.

    Args:
        label_smoothing: s, 0-1 (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise OptionError(f"label_smoothing {label_smoothing} is out of range: at least 0 and below 1")
        self.label_smoothing = label_smoothing

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss; the teacher is not asked."""
        outputs, targets = precise(lesson.outputs), lesson.targets
        if targets.is_floating_point():
            targets = targets.to(outputs.dtype)
        return functional.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
