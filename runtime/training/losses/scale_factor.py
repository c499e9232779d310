"""Distillation with a scale factor: the closeness of classes is a term of its own.

Plain distillation hardly teaches how the wrong classes compare, since that part of it is weighted with the teacher's
doubt 1 − q_y. With p, q the softened outputs of student and teacher and s, t their scale factors (see `ratios.py`),

    KL(q ‖ p) = KL([q_y, 1 − q_y] ‖ [p_y, 1 − p_y]) + (1 − q_y) · KL(t ‖ s).

An error of the scale factors, without that weight, restores it. Its forms, and their gradients by z_k for k ≠ y (by z_y
it is always 0), with d_j = (z_j − v_j) / T, d̄ = Σ_j t_j d_j and e = s − t:

    kl        KL(t ‖ s)                     (s_k − t_k) / T
    logratio  ½ Σ_j t_j (d_j − d̄)²          t_k (d_k − d̄) / T
    mse       ½ Σ_j (s_j − t_j)²            (s_k / T) (e_k − Σ_j s_j e_j)

`logratio` is ¼ Σ_ij t_i t_j (log(s_i/s_j) − log(t_i/t_j))², the squared error of class-pair ratios, and the
second-order expansion of `kl` where s = t. Its gradient grows without bound, so far errors count linearly (`huber`).
`mse` loses its gradient where s_k is tiny.

Source: the idea and the name are those of C. Xu and Y. Song's distillation with a scale factor (2018), of which the
abstract alone was at hand; the formulas are our reading of it. `kl` equals the second part of decoupled distillation
(Zhao et al. 2022, https://arxiv.org/abs/2203.08679).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ....ir.errors import OptionError
from .distillation import KnowledgeDistillation
from .lesson import Lesson, Objective, ramp, teacher_scores
from .ratios import log_scale_factors, target_classes, without_targets

Form = Literal["kl", "logratio", "mse"]
Level = Literal["sample", "class", "mix"]


class ScaleFactor(Objective):
    """L = (1 − α) · CE(y, softmax z) + α · T² · KL(q ‖ p) + λ · T² · mean E(t, s).

    E is the error of the scale factors in one of the forms above. With soft targets (mixed images) the most probable
    class is the target y of the scale factors; the cross entropy takes the whole distribution.

    Args:
        form: which E.
        level: what the student's s is compared with: `sample`, the teacher's t on the same input; `class`, the mean of
            t over the training inputs of the target's class, S_y; `mix`, (1 − mix) · t + mix · S_y.
        weight: λ once the warm-up is over, at least 0.
        temperature: T, above 0, in all terms.
        alpha: α, 0-1.
        warmup_epochs: λ rises linearly from 0 over so many epochs, 0 for none.
        label_smoothing: of the cross entropy's targets.
        mix: share of S_y with `level: mix`, 0-1.
        huber: `logratio` is squared up to |d_j − d̄| = huber nats and linear beyond; None for squared everywhere.
        class_means: S, `(classes, classes)`, from `mean_scale_factors`; wanted by `class` and `mix`.

    Raises:
        OptionError: a value out of its range; when it runs, class means that are missing or of other classes.
    """

    needs_teacher = True
    class_means: Tensor | None

    def __init__(
        self,
        form: Form = "kl",
        level: Level = "sample",
        weight: float = 2.0,
        temperature: float = 4.0,
        *,
        alpha: float = 0.9,
        warmup_epochs: float = 20.0,
        label_smoothing: float = 0.0,
        mix: float = 0.5,
        huber: float | None = 5.0,
        class_means: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(form, level, weight, warmup_epochs, mix, huber)
        self.form, self.level, self.mix, self.huber = form, level, mix, huber
        self.weight, self.warmup_epochs, self.temperature = weight, warmup_epochs, temperature
        self.distillation = KnowledgeDistillation(temperature, alpha, label_smoothing)
        self.register_buffer("class_means", class_means, persistent=False)

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss.

        Raises:
            OptionError: no teacher's outputs, or outputs or class means that do not fit the student's.
        """
        base: Tensor = self.distillation(lesson)
        weight = self.weight * ramp(lesson.epoch, self.warmup_epochs)
        return base + weight * self.temperature**2 * self.error(lesson)

    def error(self, lesson: Lesson) -> Tensor:
        """Mean of E over the predictions, without weight and temperature before it."""
        classes = target_classes(lesson.outputs, lesson.targets)
        log_s = log_scale_factors(lesson.outputs, classes, self.temperature)
        log_t = log_scale_factors(teacher_scores(lesson), classes, self.temperature)
        if self.level != "sample":
            log_t = self._with_class_means(log_t, classes)
        return scale_factor_error(log_s, log_t, self.form, self.huber)

    def _with_class_means(self, log_t: Tensor, classes: Tensor) -> Tensor:
        count, means = log_t.shape[1] + 1, self.class_means
        if means is None or means.shape != (count, count):
            given = "none" if means is None else tuple(means.shape)
            raise OptionError(
                f"level {self.level!r} needs the mean scale factors of the {count} classes, ({count}, {count}), "
                f"given: {given}",
                hint="Give class_means=mean_scale_factors(...), the teacher's over the training set.",
            )
        rows = means.to(log_t)[classes].movedim(-1, 1)
        means = without_targets(rows, classes)
        share = 1.0 if self.level == "class" else self.mix
        mixed = (1 - share) * log_t.exp() + share * means
        return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()


def scale_factor_error(log_s: Tensor, log_t: Tensor, form: Form, huber: float | None = None) -> Tensor:
    """Mean over predictions of E.

    Args:
        log_s: log s of the student, `(N, C − 1, *space)`.
        log_t: log t of the teacher.
        form: see the formulas above.
        huber: bound of the squared part of `logratio`, in nats.
    """
    t = log_t.exp()
    if form == "kl":
        each = t * (log_t - log_s)
    elif form == "mse":
        each = 0.5 * (log_s.exp() - t).square()
    else:
        # log s − log t is d but for a constant per prediction, which the mean takes away
        d = log_s - log_t
        each = t * _half_square(d - (t * d).sum(1, keepdim=True), huber)
    return each.sum(1).mean()


def _half_square(values: Tensor, huber: float | None) -> Tensor:
    """½ x², and huber · (|x| − huber / 2) beyond |x| = huber."""
    if huber is None:
        return 0.5 * values.square()
    inside = values.clamp(-huber, huber)
    return inside * (values - 0.5 * inside)


def _check(form: str, level: str, weight: float, warmup_epochs: float, mix: float, huber: float | None) -> None:
    for name, value, allowed in (("form", form, get_args(Form)), ("level", level, get_args(Level))):
        if value not in allowed:
            raise OptionError(f"{name} {value!r} is unknown", hint=f"One of {', '.join(allowed)}.")
    if not weight >= 0 or not warmup_epochs >= 0:
        raise OptionError(f"weight {weight} and warmup_epochs {warmup_epochs} must be at least 0")
    if not 0 <= mix <= 1:
        raise OptionError(f"mix {mix} is out of range: from 0 to 1")
    if huber is not None and not huber > 0:
        raise OptionError(f"huber {huber} must be above 0, or None")
