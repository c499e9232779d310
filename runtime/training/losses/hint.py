"""Hints: the student's features are to predict the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ....ir.errors import OptionError
from .lesson import Lesson, Objective, feature_pairs


class Hint(Objective):
    """L = weight · mean_k mean (r_k(F_k^S) − F_k^T)², the inner mean over all elements.

    r_k is an adapter, a 1×1 convolution with bias from the student's channels to the teacher's. The adapters are
    parameters of this objective: they are trained with the student and thrown away with it.

    Source: FitNets, Romero et al. 2015, https://arxiv.org/abs/1412.6550; weight 100 as in github.com/megvii-research/
    mdistiller. This is the term alone: add it to others with `Sum`.

    Args:
        student_channels: of each place.
        teacher_channels: of each place.
        weight: at least 0.
    """

    needs_teacher = True
    needs_features = True

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], weight: float = 100.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise OptionError(f"weight {weight} must be at least 0")
        if not student_channels or len(student_channels) != len(teacher_channels):
            raise OptionError(
                f"hints need the channels of student and teacher at each place; given: {len(student_channels)} and "
                f"{len(teacher_channels)} places"
            )
        self.weight = weight
        pairs = zip(student_channels, teacher_channels, strict=True)
        # positions in one row, so that images, sequences and volumes need no adapter of their own
        self.adapters = nn.ModuleList(nn.Conv1d(mine, theirs, 1) for mine, theirs in pairs)

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss.

        Raises:
            OptionError: no features, or features of other channels or positions than the adapters are for.
        """
        pairs = feature_pairs(lesson)
        if len(pairs) != len(self.adapters):
            raise OptionError(f"hints for {len(self.adapters)} places were given the features of {len(pairs)}")
        terms = [_distance(adapter, *pair) for adapter, pair in zip(self.adapters, pairs, strict=True)]
        return self.weight * sum(terms[1:], terms[0]) / len(terms)


def _distance(adapter: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    assert isinstance(adapter, nn.Conv1d)
    expected = (adapter.in_channels, adapter.out_channels)
    if (student.shape[1], teacher.shape[1]) != expected or student.shape[2:] != teacher.shape[2:]:
        raise OptionError(
            f"a hint from {expected[0]} to {expected[1]} channels was given features {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}",
            hint="Their positions must agree: name places of equal resolution.",
        )
    adapted: Tensor = adapter(student.flatten(2) if student.ndim > 2 else student.unsqueeze(2))
    return (adapted - teacher.reshape(adapted.shape)).square().mean()
