"""Training objectives: what a student is asked for, given the targets and what its teacher says.

Every objective is a module `objective(lesson) -> loss`; the loss is a mean over the `N · space` predictions of the
lesson, computed in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ir.errors import OptionError


@dataclass(frozen=True)
class Lesson:
    """What one step of training knows.

    Args:
        outputs: the student's class scores z, `(N, classes, *space)`.
        targets: class indices `(N, *space)`, or probabilities of the shape of `outputs` (mixed images).
        teacher_outputs: the teacher's class scores v, of the shape of `outputs`.
        features: the student's tensors at the places of knowledge, in order.
        teacher_features: the teacher's, in the same order.
        epoch: epochs done so far, as a fraction: 1.5 is the middle of the second.
    """

    outputs: Tensor
    targets: Tensor
    teacher_outputs: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    teacher_features: tuple[Tensor, ...] = ()
    epoch: float = 0.0


class Objective(nn.Module):
    """Base of all objectives; `needs_teacher` says whether the lesson must hold what a teacher says."""

    needs_teacher: ClassVar[bool] = False

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError


class CrossEntropy(Objective):
    """L = −mean log softmax(z)_y, with the target distribution (1 − s)·onehot(y) + s / classes.

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
        return functional.cross_entropy(_precise(lesson.outputs), lesson.targets, label_smoothing=self.label_smoothing)


class KnowledgeDistillation(Objective):
    """L = (1 − α) · CE(y, softmax z) + α · T² · KL(softmax(v / T) ‖ softmax(z / T)).

    z are the student's outputs, v the teacher's. T² keeps the gradient's size when T changes: for large T the
    gradient of KL by z falls with 1 / T². (Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531)

    Args:
        temperature: T, above 0.
        alpha: α, the teacher's weight, 0-1.
        label_smoothing: of the cross entropy's targets.
    """

    needs_teacher = True

    def __init__(self, temperature: float = 4.0, alpha: float = 0.9, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise OptionError(f"temperature {temperature} must be above 0 and alpha {alpha} from 0 to 1")
        self.temperature, self.alpha = temperature, alpha
        self.cross_entropy = CrossEntropy(label_smoothing)

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss.

        Raises:
            OptionError: no teacher's outputs, or outputs of another shape than the student's.
        """
        outputs, teacher_outputs = lesson.outputs, lesson.teacher_outputs
        if teacher_outputs is None or teacher_outputs.shape != outputs.shape:
            given = "none" if teacher_outputs is None else tuple(teacher_outputs.shape)
            raise OptionError(
                f"distillation needs teacher outputs of the student's shape {tuple(outputs.shape)}, given: {given}",
                hint="Take a teacher with the same classes in the same order.",
            )
        hard: Tensor = self.cross_entropy(lesson)
        soft = soft_divergence(outputs, teacher_outputs, self.temperature)
        return (1 - self.alpha) * hard + self.alpha * self.temperature**2 * soft


def soft_divergence(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    """Mean over predictions of KL(softmax(v / T) ‖ softmax(z / T)), in nats; z, v `(N, classes, *space)`."""
    student = functional.log_softmax(_precise(outputs) / temperature, dim=1)
    teacher = functional.log_softmax(_precise(teacher_outputs) / temperature, dim=1)
    total = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return total / (outputs.numel() // outputs.shape[1])


def _precise(outputs: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: a softmax over many classes needs the mantissa."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()
