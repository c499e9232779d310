"""What a student has learned of how its teacher compares the classes: measured on held-out data."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ....ir.errors import OptionError
from .ratios import target_classes, without_targets


def ratio_error(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, top: int = 5) -> float:
    """Mean |log r^S − log r^T| of the class pairs among the teacher's `top` classes that are not the target.

    r_ij = p_i / p_j = exp(z_i − z_j): for every prediction, all pairs i < j of those classes. 0 where the ratios agree,
    whatever the targets' scores; exactly 0 where there are no pairs (two classes).

    Args:
        student_logits: z, `(N, classes, *space)`.
        teacher_logits: v, of the same shape.
        targets: as in `target_classes`.
        top: how many classes, at least 2; all if there are fewer.

    Raises:
        OptionError: shapes that do not fit.
    """
    student, teacher = _others(student_logits, teacher_logits, targets)
    if top < 2:
        raise OptionError(f"top {top}: a ratio needs two classes")
    chosen = teacher.topk(min(top, teacher.shape[1]), dim=1).indices
    gaps = (student - teacher).gather(1, chosen)
    count = gaps.shape[1]
    pairs = (gaps.unsqueeze(1) - gaps.unsqueeze(2)).abs()
    return float(pairs.sum((1, 2)).mean()) / (count * (count - 1)) if count > 1 else 0.0


def rank_correlation(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> float:
    """Mean Spearman correlation of s and t over the classes that are not the target, −1 to 1.

    Ranks do not depend on the temperature. Predictions where s or t has no order (two classes, all equal) do not count;
    NaN if there are no others.

    Args:
        student_logits: z, `(N, classes, *space)`.
        teacher_logits: v, of the same shape.
        targets: as in `target_classes`.

    Raises:
        OptionError: shapes that do not fit.
    """
    from scipy import stats  # takes 60 MB and a second, which `fxpress.load` would have to wait for

    student, teacher = _others(student_logits, teacher_logits, targets)
    ranks = [stats.rankdata(one.cpu().numpy(), axis=1) for one in (student, teacher)]
    one, two = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    sizes = np.sqrt((one**2).sum(1) * (two**2).sum(1))
    ordered = sizes > 0
    if not ordered.any():
        return float("nan")
    return float(((one * two).sum(1)[ordered] / sizes[ordered]).mean())


def _others(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the classes that are not the target, float64, one row for each prediction."""
    if student.shape != teacher.shape:
        raise OptionError(
            f"scores of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
        )
    classes = target_classes(student, targets)
    rows = [without_targets(one.detach().double(), classes).movedim(1, -1).flatten(0, -2) for one in (student, teacher)]
    return rows[0], rows[1]
