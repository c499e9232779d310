"""`fxpress.distill`: the pass `distill` for any two networks, without a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx, nn

from ...ir.errors import OptionError
from ...ir.trace import trace
from ...runtime.data import Data, checked_batches
from ...runtime.training import Taps, TrainResult
from ...runtime.training.checkpoint import clear_checkpoints
from ...runtime.training.features import find_node
from ...runtime.training.share import make_accelerator
from ..options import brief
from ..progress import make_console
from .distill import Distill
from .knowledge import find_places, named_places
from .module_paths import output_paths


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    workdir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> TrainResult:
    """Train `student` in place to do what `teacher` does.

    On a terminal a progress bar goes to standard error (FXPRESS_PROGRESS=1 elsewhere too, 0 nowhere). Under `torchrun`
    the processes share each batch. Networks may be any modules that give class scores; with `attention` or `hint`
    their places are found by tracing both, or are named by `places` and `teacher_places`.

    Args:
        student: the network that learns.
        teacher: asked in eval mode without gradients; stays as it is.
        data: `train` is learned from; `val`, if there is one, judges each epoch.
        workdir: a directory for checkpoints and the log.
        resume: go on from the last checkpoint in `workdir`; the weights will be those of an uninterrupted run. Without
            it, a run that was kept there is forgotten.
        seed: of order, augmentation and dropout.
        options: those of the pass `distill`, such as `epochs=20, loss="scale-factor"`: see `fxpress passes distill`.

    Raises:
        OptionError: an unknown option, one that is not allowed, or a workdir of another run.
        DataError: no training data, or a bad batch.
        TrainingError: the loss became NaN or infinite; the student is as after the last good epoch.
    """
    one = Distill(**options)
    _check(student, teacher, data, workdir, resume, seed)
    folder = None if workdir is None else Path(workdir)
    if folder is not None and not resume:
        _forget(folder)
    inputs, taps = None, None
    if one.compares_features:
        inputs = _example(data)
        taps = _places(one, student, teacher, inputs)
    return one.teach(student, teacher, taps, inputs, data, seed=seed, console=make_console(), workdir=folder)


def _check(student: Any, teacher: Any, data: Any, workdir: Any, resume: bool, seed: Any) -> None:
    for name, value, kind, allowed in (
        ("student", student, nn.Module, "an nn.Module; of a graph or a compiled network its .module"),
        ("teacher", teacher, nn.Module, "an nn.Module; of a graph or a compiled network its .module"),
        ("data", data, Data, "fxpress.Data(train=, val=)"),
        ("workdir", workdir, (str, Path, type(None)), "the path of a directory"),
        ("seed", seed, int, "an integer"),
    ):
        if not isinstance(value, kind):
            raise OptionError(f"{name}={brief(value)} is a {type(value).__name__}; allowed: {allowed}")
    if resume and workdir is None:
        raise OptionError("resume=True needs a workdir", hint="Pass workdir=, the directory of the interrupted run.")


def _forget(folder: Path) -> None:
    """Remove the checkpoints of an earlier run, before any process looks for them."""
    accelerator = make_accelerator()
    if accelerator.is_main_process and folder.is_dir():
        clear_checkpoints(folder)
    accelerator.wait_for_everyone()


def _example(data: Data) -> Any:
    """Inputs of one batch; the training loader is the last to be asked, as it may be read only once per epoch."""
    loader = next(one for one in (data.calibration, data.val, data.train) if one is not None)
    return next(checked_batches(loader, "data"))[0]


def _places(one: Distill, student: nn.Module, teacher: nn.Module, inputs: Any) -> Taps:
    """Places in both networks, as paths of modules where a network is no graph."""
    if one.places is not None and not isinstance(student, fx.GraphModule):
        # named: nothing is to be found, and a network that cannot be traced may be trained all the same
        wanted = one.teacher_places if one.teacher_places is not None else one.places
        return Taps(named_places(student, one.places), named_places(teacher, wanted))
    graph = trace(student, inputs)
    taps = find_places(graph, teacher, inputs, places=one.places, teacher_places=one.teacher_places)
    nodes = [find_node(graph.module.graph, place) for place in taps.student]
    return Taps(output_paths(student, graph, nodes), taps.teacher)
