"""Decoupled knowledge distillation: target class and other classes with weights of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ....ir.errors import OptionError
from .cross_entropy import CrossEntropy
from .distillation import check_temperature
from .lesson import Lesson, Objective, precise, ramp, teacher_scores
from .ratios import log_scale_factors, target_classes, without_targets
from .scale_factor import scale_factor_error


class DecoupledDistillation(Objective):
    """L = CE(y, softmax z) + min(epoch / warmup, 1) · T² · (α · TCKD + β · NCKD).

    TCKD = KL([q_y, 1 − q_y] ‖ [p_y, 1 − p_y]) with p, q the softened outputs of student and teacher, and
    NCKD = KL(t ‖ s) of their scale factors (see `ratios.py`). The defaults are the authors'; for ResNet-56 → ResNet-20
    on CIFAR-100 they take β = 2. With soft targets (mixed images) the most probable class is y in TCKD and NCKD.

    Source: Zhao et al. 2022, https://arxiv.org/abs/2203.08679; settings of github.com/megvii-research/mdistiller.

    Args:
        alpha: α, at least 0.
        beta: β, at least 0.
        temperature: T, above 0.
        warmup_epochs: length of the linear warm-up, 0 for none.
        label_smoothing: of the cross entropy's targets.
    """

    needs_teacher = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        warmup_epochs: float = 20.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        if not alpha >= 0 or not beta >= 0 or not warmup_epochs >= 0:
            raise OptionError(f"alpha {alpha}, beta {beta} and warmup_epochs {warmup_epochs} must be at least 0")
        self.alpha, self.beta, self.temperature, self.warmup_epochs = alpha, beta, temperature, warmup_epochs
        self.cross_entropy = CrossEntropy(label_smoothing)

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss.

        Raises:
            OptionError: no teacher's outputs, or outputs or targets of another shape than the student's.
        """
        outputs, teacher_outputs = lesson.outputs, teacher_scores(lesson)
        classes, t = target_classes(outputs, lesson.targets), self.temperature
        log_s, log_t = (log_scale_factors(one, classes, t) for one in (outputs, teacher_outputs))
        decoupled = self.alpha * target_divergence(outputs, teacher_outputs, classes, t)
        decoupled = decoupled + self.beta * scale_factor_error(log_s, log_t, "kl")
        hard: Tensor = self.cross_entropy(lesson)
        return hard + ramp(lesson.epoch, self.warmup_epochs) * t**2 * decoupled


def target_divergence(outputs: Tensor, teacher_outputs: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """TCKD: mean over predictions of KL([q_y, 1 − q_y] ‖ [p_y, 1 − p_y]).

    Args:
        outputs: the student's scores `(N, C, *space)`.
        teacher_outputs: the teacher's.
        classes: y, `(N, *space)`.
        temperature: T.
    """
    student, teacher = (_target_or_not(one, classes, temperature) for one in (outputs, teacher_outputs))
    total = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return total / classes.numel()


def _target_or_not(outputs: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """[log p_y, log(1 − p_y)] on dimension 1; no small number is made from the difference of two large ones."""
    logits = precise(outputs) / temperature
    target = logits.gather(1, classes.unsqueeze(1))
    rest = without_targets(logits, classes).logsumexp(1, keepdim=True)
    return functional.log_softmax(torch.cat([target, rest], 1), dim=1)
