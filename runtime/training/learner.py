"""One step of the optimiser: forward, teacher, loss, backward, over one batch or several."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data import Batch, Inputs, check_targets
from ..forward import class_scores, forward, forward_any, modes_restored, to_device
from .callbacks import Callback
from .ema import MovingAverage
from .features import Taps, tapped
from .losses import Lesson, Objective
from .mixing import Mixing, hard_targets
from .seeds import seed_all
from .settings import TrainSettings
from .share import mean
from .teacher_cache import TeacherCache


class NotFinite(Exception):  # noqa: N818 - never leaves this package
    """The loss is NaN or infinite, in whichever process."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.value = value


class Learner:
    """The student and all that changes it.

    Args:
        student: trained in place.
        objective: gives the loss; its parameters learn along.
        teacher: asked without gradients; None where the objective needs none.
        settings: the numbers of the run.
        accelerator: the processes and the device.
        callbacks: may bring parameter groups of their own.
        taps: places of knowledge in student and teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        teacher: nn.Module | None,
        settings: TrainSettings,
        accelerator: Accelerator,
        callbacks: Sequence[Callback],
        taps: Taps | None,
    ) -> None:
        self.student, self.objective, self.settings, self.accelerator = student, objective, settings, accelerator
        self.taps, self.mixing = taps, Mixing(settings)
        self.cache = TeacherCache(settings.cache_limit_bytes, _TOLERANCE[settings.precision])
        self.lr = 0.0
        objective.to(accelerator.device)
        groups = [group for callback in callbacks for group in callback.parameter_groups(student)]
        optimizer = settings.build_optimizer(student, objective, groups)
        self.teacher = None if teacher is None else self._tap(teacher, None if taps is None else taps.teacher)
        if self.teacher is not None:
            self.teacher.to(accelerator.device).eval()
        model = self._tap(student, None if taps is None else taps.student)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = MovingAverage(student, settings.ema) if settings.ema else None

    def step(self, batches: Sequence[Batch], seeds: Sequence[int], where: Sequence[str], epoch: float) -> Tensor:
        """Learn from some batches together, by the mean of their gradients.

        Args:
            batches: this process's shares.
            seeds: of dropout and mixing, one per batch.
            where: what to call each batch in an error.
            epoch: where in the run this is, a fraction.

        Returns:
            Sums over the batches of the loss, the right predictions and all predictions, float64 `(3,)`.

        Raises:
            NotFinite: before anything is changed but batch statistics.
        """
        self._set_lr(epoch)
        self.optimizer.zero_grad()
        total = torch.zeros(3, dtype=torch.float64)
        for number, (batch, seed, name) in enumerate(zip(batches, seeds, where, strict=True), start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                seed_all(seed)
                loss, tally = self._loss(batch, name, epoch)
                self.accelerator.backward(loss)
            total += tally
        self._check_finite(total[0] / len(batches))
        self._finish_gradients(len(batches))
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return total

    def state_dict(self) -> dict[str, Any]:
        """Student, optimiser, objective and average."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def _loss(self, batch: Batch, where: str, epoch: float) -> tuple[Tensor, Tensor]:
        """The loss of one batch, and it with the numbers of right and of all predictions."""
        inputs, targets = to_device(batch[0], self.accelerator.device), batch[1].to(self.accelerator.device)
        if self.mixing.active:
            inputs, targets = self._mix(inputs, targets, where)
        with self._autocast():
            outputs, features = self._ask(self.model, inputs, where)
        check_targets(hard_targets(targets), outputs, where)
        teacher_outputs, teacher_features = self._ask_teacher(inputs, where, int(epoch))
        loss = self.objective(Lesson(outputs, targets, teacher_outputs, features, teacher_features, epoch))
        right = hard_targets(targets)
        tally = [loss.item(), float((outputs.argmax(1) == right).sum()), float(right.numel())]
        return loss, torch.tensor(tally, dtype=torch.float64)

    def _mix(self, inputs: Inputs, targets: Tensor, where: str) -> Batch:
        if not self.mixing.built:
            with torch.no_grad(), modes_restored(self.student):
                outputs = forward(self.student.eval(), inputs, where)
            self.mixing.build(outputs.shape[1])
            check_targets(targets, outputs, where)
        return self.mixing((inputs, targets), where)

    @torch.no_grad()
    def _ask_teacher(self, inputs: Inputs, where: str, epoch: int) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        teacher, where = self.teacher, f"{where} (teacher)"
        if teacher is None:
            return None, ()
        with self._autocast():
            if self.settings.cache_teacher:
                return self.cache.ask(inputs, lambda images: forward(teacher, images, where), epoch), ()
            return self._ask(teacher, inputs, where)

    def _ask(self, network: nn.Module, inputs: Inputs, where: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Class scores, and the features at the taps."""
        if self.taps is None:
            return forward(network, inputs, where), ()
        outputs, features = forward_any(network, inputs, where)
        return class_scores(outputs), features

    def _tap(self, network: nn.Module, places: Sequence[str] | None) -> nn.Module:
        return network if places is None else tapped(network, places)

    def _autocast(self) -> torch.autocast:
        bf16 = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _set_lr(self, epoch: float) -> None:
        self.lr = self.settings.learning_rate(min(1.0, epoch / self.settings.epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def _check_finite(self, loss: Tensor) -> None:
        """Stop all processes if any has a bad loss."""
        value = float(mean(self.accelerator, loss.to(self.accelerator.device)))
        if value - value != 0:
            raise NotFinite(value)

    def _finish_gradients(self, batches: int) -> None:
        """Average over batches; over processes too where DDP does not know the parameters; and clip."""
        learning = [*self.model.parameters(), *self.objective.parameters()]
        grads = [parameter.grad for parameter in learning if parameter.grad is not None]
        if batches > 1:
            torch._foreach_div_(grads, float(batches))
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(mean(self.accelerator, parameter.grad))
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)


_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""How far the teacher's answers may be apart because other images were in the batch: rounding, no more."""
