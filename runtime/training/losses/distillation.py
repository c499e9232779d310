"""Distillation of class scores."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ....ir.errors import OptionError
from .cross_entropy import CrossEntropy
from .lesson import Lesson, Objective, precise, teacher_scores


class KnowledgeDistillation(Objective):
    """L = (1 − α) · CE(y, softmax z) + α · T² · KL(softmax(v / T) ‖ softmax(z / T)).

    z are the student's outputs, v the teacher's. T² keeps the gradient's size when T changes: for large T the
    gradient of KL by z falls with 1 / T². (Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531)

    Args:
        temperature: T, above 0.
        alpha: α, the teacher's weight, 0-1.
        label_smoothing: of the cross entropy's targets.
        standardise: z and v enter the second term as z-scores over the classes, `standardised(z)`: the student need not
            copy the teacher's range and shift (Sun et al. 2024, https://arxiv.org/abs/2403.01427). T = 2 and a weight
            of the second term nine times that of the first are the authors' settings.
    """

    needs_teacher = True

    def __init__(
        self, temperature: float = 4.0, alpha: float = 0.9, label_smoothing: float = 0.0, *, standardise: bool = False
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        if not 0 <= alpha <= 1:
            raise OptionError(f"alpha {alpha} is out of range: from 0 to 1")
        self.temperature, self.alpha, self.standardise = temperature, alpha, standardise
        self.cross_entropy = CrossEntropy(label_smoothing)

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss.

        Raises:
            OptionError: no teacher's outputs, or outputs of another shape than the student's.
        """
        outputs, teacher_outputs = lesson.outputs, teacher_scores(lesson)
        hard: Tensor = self.cross_entropy(lesson)
        if self.standardise:
            outputs, teacher_outputs = standardised(outputs), standardised(teacher_outputs)
        soft = soft_divergence(outputs, teacher_outputs, self.temperature)
        return (1 - self.alpha) * hard + self.alpha * self.temperature**2 * soft


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0.

    Raises:
        OptionError: it is not.
    """
    if not temperature > 0:
        raise OptionError(f"temperature {temperature} must be above 0")


def soft_divergence(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    """Mean over predictions of KL(softmax(v / T) ‖ softmax(z / T)), in nats; z, v `(N, classes, *space)`."""
    student = functional.log_softmax(precise(outputs) / temperature, dim=1)
    teacher = functional.log_softmax(precise(teacher_outputs) / temperature, dim=1)
    total = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return total / (outputs.numel() // outputs.shape[1])


def standardised(outputs: Tensor) -> Tensor:
    """(z − mean z) / (std z + 1e-7) over the classes of each prediction, `(N, classes, *space)`."""
    centred = precise(outputs) - precise(outputs).mean(1, keepdim=True)
    return centred / (centred.std(1, keepdim=True) + 1e-7)
