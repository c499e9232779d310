"""What one step of training knows, and what an objective is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....ir.errors import OptionError


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
    """Base of all objectives: a module `objective(lesson) -> loss`.

    The loss is a mean over the `N · space` predictions of the lesson, computed in at least float32. An objective may
    have parameters of its own (the adapters of `Hint`): they are trained with the student.

    Attributes:
        needs_teacher: whether the lesson must hold what a teacher says.
        needs_features: whether it must hold the features of both.
    """

    needs_teacher: bool = False
    needs_features: bool = False

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError


def precise(values: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: a softmax over many classes needs the mantissa."""
    return values if values.dtype == torch.float64 else values.float()


def teacher_scores(lesson: Lesson) -> Tensor:
    """The teacher's outputs, without gradient.

    Raises:
        OptionError: there are none, or they are of another shape than the student's.
    """
    outputs, teacher_outputs = lesson.outputs, lesson.teacher_outputs
    if teacher_outputs is None or teacher_outputs.shape != outputs.shape:
        given = "none" if teacher_outputs is None else tuple(teacher_outputs.shape)
        raise OptionError(
            f"distillation needs teacher outputs of the student's shape {tuple(outputs.shape)}, given: {given}",
            hint="Take a teacher with the same classes in the same order.",
        )
    return teacher_outputs.detach()


def feature_pairs(lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's tensor of each place, at least float32; the teacher's without gradient.

    Raises:
        OptionError: there are none, not as many on both sides, or of different batches.
    """
    mine, theirs = lesson.features, lesson.teacher_features
    if not mine or len(mine) != len(theirs):
        raise OptionError(
            f"a loss on features needs those of student and teacher; given: {len(mine)} and {len(theirs)}",
            hint="Name the places with taps.",
        )
    for index, (one, two) in enumerate(zip(mine, theirs, strict=True)):
        if len(one) != len(two):
            raise OptionError(
                f"features {index} of student {tuple(one.shape)} and teacher {tuple(two.shape)} are of other batches"
            )
    return [(precise(one), precise(two.detach())) for one, two in zip(mine, theirs, strict=True)]


def ramp(epoch: float, length: float) -> float:
    """Linear warm-up min(epoch / length, 1); 1 from the start where there is no length."""
    return min(epoch / length, 1.0) if length > 0 else 1.0
