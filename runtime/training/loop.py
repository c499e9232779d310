"""The training loop: a student, an objective, and perhaps a teacher, on one process or several."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ...ir.errors import DataError, OptionError
from ..data import Data
from ..forward import device_of, modes_restored
from .batch_norms import shared_statistics
from .callbacks import Callback
from .checkpoint import Checkpoints, describe, options_of
from .features import Taps
from .learner import Learner
from .log import Log
from .losses import CrossEntropy, Objective
from .progress import TrainBar
from .results import TrainResult
from .run import Run
from .seeds import seeded
from .settings import TrainSettings
from .share import make_accelerator


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
    checkpoints: Path | None = None,
    log: Path | None = None,
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
        checkpoints: folder in which the run is kept; if it holds a checkpoint of the same run, the run goes on from it
            and ends with the very weights of an uninterrupted one.
        log: folder for `steps.csv`, `epochs.csv` and TensorBoard events.
        console: where a progress bar is shown if it is a terminal.
        title: what the bar and errors call the run.

    Raises:
        DataError: no training data, or a bad batch.
        OptionError: what is asked for does not fit together, or the checkpoints are of another run.
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
    _check_options(settings, objective, taps, data)
    device, start = device_of(student), time.perf_counter()
    with seeded(seed), modes_restored(student, *([helper] if helper else [])):
        store = None
        if checkpoints is not None:
            store = Checkpoints(checkpoints, _identity(student, objective, helper, settings, seed, callbacks, taps))
        learner = Learner(student, objective, helper, settings, make_accelerator(), callbacks, taps)
        try:
            run = Run(learner, loader, data.val if settings.keep == "best" else None, seed, callbacks, store)
            with shared_statistics(learner.accelerator, student):
                rate = _carry_out(run, log, console, title)
        finally:
            student.to(device)
    seconds = time.perf_counter() - start
    cached = learner.cache.report if settings.cache_teacher else None
    return TrainResult(run.results, run.kept, run.step, rate, run.seconds + seconds, cached)


def _carry_out(run: Run, log: Path | None, console: Console | None, title: str) -> float:
    """Run it, shown and logged by the first process; images per second."""
    main = run.accelerator.is_main_process
    run.resume()
    run.log = Log(log, run.step, run.epoch) if log is not None and main else None
    bar = TrainBar(console if main else None, run.settings.epochs, run.steps_per_epoch)
    try:
        with bar.shown(title, run.step):
            run.all_epochs(bar)
    finally:
        if run.log is not None:
            run.log.close()
    processes: int = run.accelerator.num_processes
    return bar.images_per_second * processes


def _check_teacher(student: nn.Module, teacher: nn.Module | None) -> nn.Module:
    if teacher is None:
        raise OptionError("this objective needs a teacher and none was given")
    mine = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in mine for parameter in teacher.parameters()):
        raise OptionError("student and teacher share parameters: the teacher would change while it teaches")
    return teacher


def _check_options(settings: TrainSettings, objective: Objective, taps: Taps | None, data: Data) -> None:
    """Refuse before the first step what could not work later."""
    if objective.needs_features and taps is None:
        raise OptionError("this objective compares features and no places were given", hint="Give taps.")
    if settings.cache_teacher and taps is not None:
        raise OptionError(
            "cache_teacher keeps the teacher's outputs and not its features, which take far more memory",
            hint="Leave out cache_teacher, or the terms that compare features.",
        )
    if settings.cache_teacher and not objective.needs_teacher:
        raise OptionError("cache_teacher: this objective asks no teacher", hint="Leave it out.")
    if settings.patience is not None and data.val is None:
        raise OptionError("patience needs images to judge each epoch by", hint="Pass Data(val=...).")


def _identity(
    student: nn.Module,
    objective: Objective,
    teacher: nn.Module | None,
    settings: TrainSettings,
    seed: int,
    callbacks: Sequence[Callback],
    taps: Taps | None,
) -> dict[str, Any]:
    """What two runs must have in common for one to go on from the other's checkpoints."""
    changeable = ("checkpoint_every", "cache_limit_bytes", "log_every")
    numbers = {name: value for name, value in asdict(settings).items() if name not in changeable}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()},
        "seed": seed,
        "student": describe(student),
        "teacher": None if teacher is None else describe(teacher, values=True),
        "objective": options_of(objective),
        "callbacks": [type(callback).__name__ for callback in callbacks],
        "taps": None if taps is None else [list(taps.student), list(taps.teacher)],
    }
