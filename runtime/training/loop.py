"""The training loop: a student, an objective, and perhaps a teacher, on one process or several."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from ...ir.errors import DataError, OptionError, TrainingError
from ..data import Batch, Data, Inputs, Loader, check_targets, images_in
from ..forward import class_scores, device_of, forward, forward_any, modes_restored
from .callbacks import Callback
from .features import Taps, tapped
from .losses import CrossEntropy, Lesson, Objective
from .progress import TrainBar
from .results import EpochResult, TrainResult
from .seeds import seeded
from .settings import TrainSettings
from .share import agree_on_buffers, evaluate_shared, make_accelerator, mean, share_loader, shared_batches


def train(
    student: nn.Module,
    data: Data,
    *,
    objective: Objective | None = None,
    teacher: nn.Module | None = None,
    settings: TrainSettings | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    taps: Taps | None = None,
    console: Console | None = None,
    title: str = "training",
) -> TrainResult:
    """Train a network in place; its layers' modes, its device and the global random states come back as they were.

    Args:
        student: the network; its parameters must not be shared with the teacher's.
        data: `train` is learned from; `val` is what `keep: best` evaluates each epoch on.
        objective: cross entropy if None.
        teacher: asked in eval mode without gradients if the objective needs one; stays as it is.
        settings: the numbers of the run.
        seed: fixes order, augmentation and dropout: the same seed gives the same weights on the same machine.
        callbacks: called before and after each epoch and after each step; may bring parameter groups of their own.
        taps: places whose tensors the objective compares, see `Lesson.features`.
        console: where a progress bar is shown if it is a terminal.
        title: what the bar and errors call the run.

    Raises:
        DataError: no training data, or a bad batch.
        TrainingError: a loss that is not finite (the student is put back to the end of the last good epoch), or
            nothing to train.
    """
    settings, objective = settings or TrainSettings(), objective or CrossEntropy()
    loader = data.need("train", who=title)
    if inspect.isgenerator(loader) and settings.epochs > 1:
        raise DataError(
            f"data.train is a generator: it would be used up after the first of {settings.epochs} epochs",
            hint="Give an object that starts anew on each iter(), such as a DataLoader or a list of batches.",
        )
    helper = _check_teacher(student, teacher) if objective.needs_teacher else None
    device, start = device_of(student), time.perf_counter()
    with seeded(seed), modes_restored(student, *([helper] if helper else [])):
        val = data.val if settings.keep == "best" else None
        run = _Run(student, objective, helper, settings, make_accelerator(), loader, val, list(callbacks), taps)
        bar = TrainBar(console if run.accelerator.is_main_process else None, settings.epochs, run.steps_per_epoch)
        try:
            with bar.shown(title):
                run.all_epochs(bar)
        finally:
            student.to(device)
    rate = bar.images_per_second * run.accelerator.num_processes
    return TrainResult(run.results, run.kept, run.step, rate, time.perf_counter() - start)


@dataclass
class _Run:
    """The state of one call of `train`."""

    student: nn.Module
    objective: Objective
    teacher: nn.Module | None
    settings: TrainSettings
    accelerator: Accelerator
    loader: Loader
    val: Loader | None
    callbacks: list[Callback]
    taps: Taps | None
    results: list[EpochResult] = field(default_factory=list)
    kept: int = -1
    step: int = 0
    lr: float = 0.0

    def __post_init__(self) -> None:
        self.source = self.loader
        self.loader = share_loader(self.accelerator, self.loader)
        self.steps_per_epoch = len(self.loader) if isinstance(self.loader, Sized) else None
        self.objective.to(self.accelerator.device)
        groups = [group for callback in self.callbacks for group in callback.parameter_groups(self.student)]
        optimizer = self.settings.build_optimizer(self.student, self.objective, groups)
        model = self.student
        if self.taps is not None:
            model = tapped(self.student, self.taps.student)
        if self.teacher is not None:
            if self.taps is not None:
                self.teacher = tapped(self.teacher, self.taps.teacher)
            self.teacher.to(self.accelerator.device).eval()
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.good = _snapshot(self.student)

    def all_epochs(self, bar: TrainBar) -> None:
        """Run every epoch and leave the student in the state to keep."""
        best: tuple[float, dict[str, Tensor]] | None = None
        for epoch in range(self.settings.epochs):
            for callback in self.callbacks:
                callback.before_epoch(epoch)
            loss, accuracy = self.one_epoch(epoch, bar)
            agree_on_buffers(self.accelerator, self.student)
            found = None if self.val is None else evaluate_shared(self.accelerator, self.student, self.val)
            val = (None, None) if found is None else (found.loss, found.accuracy)
            self.results.append(EpochResult(loss, accuracy, *val))
            self.good = _snapshot(self.student)
            score = float(epoch) if found is None else found.accuracy
            if best is None or score >= best[0]:
                best, self.kept = (score, self.good), epoch
            wishes = [callback.after_epoch(self.results[-1]) for callback in self.callbacks]
            if True in wishes:
                break
        if best is not None and self.kept < len(self.results) - 1:
            self.student.load_state_dict(best[1])

    def one_epoch(self, epoch: int, bar: TrainBar) -> tuple[float, float]:
        """Mean objective and accuracy of one pass over the loader."""
        self.model.train()
        _set_epoch(self.loader, self.source, epoch)
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for batch in shared_batches(self.accelerator, self.loader, epoch):
            sums += self._learn(batch, f"batch {count} of train", self._set_lr(epoch, count))
            count, self.step = count + 1, self.step + 1
            bar.step(epoch, images_in(batch[0]), float(sums[0]) / count, float(sums[1] / sums[2]))
        if self.steps_per_epoch != count:
            self.steps_per_epoch = count
            bar.know_steps(count)
        sums = mean(self.accelerator, sums.to(self.accelerator.device))
        return float(sums[0]) / count, float(sums[1] / sums[2])

    def _learn(self, batch: Batch, where: str, epoch: float) -> Tensor:
        """One step; the loss, how many predictions were right, and how many there were, float64 on the CPU."""
        inputs, targets = batch
        with self._autocast():
            outputs, features = self._ask(self.model, inputs, where)
        check_targets(targets, outputs, where)
        teacher_outputs, teacher_features = self._ask_teacher(inputs, where)
        loss = self.objective(Lesson(outputs, targets, teacher_outputs, features, teacher_features, epoch))
        self._check_finite(loss)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        for callback in self.callbacks:
            callback.after_step(self.lr, epoch)
        correct = float((outputs.argmax(1) == targets).sum())
        return torch.tensor([loss.item(), correct, targets.numel()], dtype=torch.float64)

    @torch.no_grad()
    def _ask_teacher(self, inputs: Inputs, where: str) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        if self.teacher is None:
            return None, ()
        with self._autocast():
            return self._ask(self.teacher, inputs, f"{where} (teacher)")

    def _ask(self, network: nn.Module, inputs: Inputs, where: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Class scores, and the features at the taps."""
        if self.taps is None:
            return forward(network, inputs, where), ()
        outputs, features = forward_any(network, inputs, where)
        return class_scores(outputs), features

    def _autocast(self) -> torch.autocast:
        bf16 = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _set_lr(self, epoch: int, index: int) -> float:
        """Set the rate for the middle of this step and return where that is, in epochs.

        Without a known length, an epoch is one flat stair.
        """
        inside = (index + 0.5) / self.steps_per_epoch if self.steps_per_epoch else 0.5
        middle = epoch + min(inside, 1.0)
        self.lr = self.settings.learning_rate(min(1.0, middle / self.settings.epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        return middle

    def _check_finite(self, loss: Tensor) -> None:
        """Stop all processes if any has a bad loss, with the student as it was after the last good epoch."""
        value = float(mean(self.accelerator, loss.detach()))
        if value - value == 0:
            return
        self.student.load_state_dict(self.good)
        done = len(self.results)
        state = f"after epoch {done}" if done else "before training"
        raise TrainingError(
            f"the loss is {value} at step {self.step + 1} (epoch {done + 1}, learning rate {self.lr:.3g}); "
            f"the network was put back to its state {state}",
            hint="Lower lr, set clip_norm (for example 1.0), or lengthen warmup.",
        )


def _check_teacher(student: nn.Module, teacher: nn.Module | None) -> nn.Module:
    if teacher is None:
        raise OptionError("this objective needs a teacher and none was given")
    mine = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in mine for parameter in teacher.parameters()):
        raise OptionError("student and teacher share parameters: the teacher would change while it teaches")
    return teacher


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _set_epoch(shared: Loader, source: Loader, epoch: int) -> None:
    """Tell loader and sampler which epoch comes, if they want to know: then order depends on seed and epoch alone."""
    for one in (shared, getattr(source, "sampler", None)):
        tell = getattr(one, "set_epoch", None)
        if tell is not None:
            tell(epoch)
