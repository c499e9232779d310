"""`compile`: trace a model, run a pipeline over it, and prove and measure what each pass did."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..ir.errors import OptionError
from ..ir.graph import Graph
from ..runtime.data import Data
from .base import TRAINING, Context, Pass
from .clone import clone_graph
from .compiled import Compiled, load
from .measuring import Measurements
from .opening import open_model
from .options import brief
from .pipeline import Pipeline, PipelineLike
from .progress import make_console, show_row
from .records import Records
from .report import Report, Row
from .runner import run_pass
from .seeding import pass_seed
from .workdir import Workdir, fingerprint

__all__ = ["Compiled", "compile", "load"]


def compile(  # noqa: A001 - the name of the contract
    model: Any,
    passes: PipelineLike,
    example_inputs: Any,
    *,
    data: Data | None = None,
    teacher: nn.Module | Graph | Compiled | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    verify: bool = True,
    seed: int = 0,
) -> Compiled:
    """Compile a network: trace it, run the passes in order, and report what each one did. The model is left untouched.

    On a terminal a line per pass goes to standard error; the environment variable FXPRESS_PROGRESS=1 shows it
    elsewhere too, FXPRESS_PROGRESS=0 nowhere.

    Args:
        model: an `nn.Module`, `fx.GraphModule`, `ExportedProgram`, `Graph`, or something already compiled.
        passes: pass objects, names or `{name: options}` in a list; a `Pipeline`; or a path to a .yaml or .toml file.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; None for a network that is
            traced already and knows its own.
        data: batches to train, validate and calibrate with; accuracy is measured where `data.val` is given.
        teacher: the network that training passes learn from; the model itself as it came in where None.
        workdir: a directory that keeps the network as each finished pass left it.
        resume: go on behind the last finished pass in `workdir`; the result equals that of an uninterrupted run.
        verify: prove EXACT passes equal on the example inputs and measure the distance of LOSSY ones.
        seed: python, numpy and torch are seeded before every pass from this; if 0, from the pipeline's own seed.

    Returns:
        The compiled network in evaluation mode, with its report.

    Raises:
        OptionError: an unknown pass or option, or a value that is not allowed.
        TraceError, ModelError: the model cannot be traced, or its weights or example inputs are unsound.
        FxpressError: of whatever kind a pass raises, naming the pass; snapshots in `workdir` stay.
    """
    pipeline = Pipeline.of(passes)
    data = Data() if data is None else data
    _check_arguments(data, teacher, workdir, resume, seed)
    _check_needs(pipeline, data)
    console = make_console()
    started = time.perf_counter()
    with console.status("trace"):
        original, gap = open_model(model, example_inputs, verify=verify)
    seconds = time.perf_counter() - started
    context = Context(
        original=original,
        data=data,
        teacher=_as_module(teacher) or original.module,
        inputs=example_inputs,
        seed=seed or pipeline.seed or 0,
        verify=verify,
        console=console,
        records=Records(None if workdir is None else Path(workdir)),
    )
    run = _Run(pipeline, context, None if workdir is None else Path(workdir))
    run.begin(gap, seconds, resume=resume)
    return run.finish()


class _Run:
    """One run of a pipeline: the network on its way, the rows so far, and where both are kept."""

    def __init__(self, pipeline: Pipeline, context: Context, workdir: Path | None) -> None:
        self.pipeline, self.context = pipeline, context
        self.measurements = Measurements(context)
        self.graph = clone_graph(context.original)
        self.report = Report([], self.measurements.environment(context.seed))
        self.workdir: Workdir | None = None
        if workdir is not None:
            self.workdir = Workdir(workdir, pipeline, fingerprint(context.original), context.seed)
        self.finished = 0

    def begin(self, gap: float | None, seconds: float, *, resume: bool) -> None:
        """Take up the last snapshot, or begin with the row of the network as traced."""
        snapshot = self.workdir.resume() if self.workdir and resume else None
        if snapshot is not None:
            self.graph, self.report, self.finished = snapshot.graph, snapshot.report, snapshot.finished
            self.context.console.print(f"resumed behind {self.report.rows[-1].name}")
            return
        if self.workdir and not resume:  # a first pass that was interrupted may have left checkpoints
            self.workdir.start()
        self.context.records.clear()
        self._add(self.measurements.first_row(gap, seconds))

    def finish(self) -> Compiled:
        """Run the passes that are not finished yet."""
        for index, one in enumerate(self.pipeline, start=1):
            if index > self.finished:
                self._step(index, one)
        if not self.pipeline.passes:
            self.measurements.time(self.report.rows[0], self.report.rows[0], self.graph, careful=False)
        self.graph.module.eval()
        return Compiled(self.graph, self.pipeline, self.report)

    def _step(self, index: int, one: Pass) -> None:
        context = replace(
            self.context,
            seed=pass_seed(self.context.seed, index, one.name),
            workdir=self.workdir.scratch(index) if self.workdir else None,
        )
        # a pass that trains shows a progress bar of its own
        waiting = nullcontext() if one.meaning() is TRAINING else context.console.status(one.name)
        with waiting:
            result, seconds = run_pass(one, self.graph, context)
        row = self.measurements.row(one, self.graph, result, seconds)
        self.measurements.time(row, self.report.rows[0], self.graph, careful=index == len(self.pipeline))
        self._add(row)
        if self.workdir:
            self.workdir.save(index, self.graph, self.report)

    def _add(self, row: Row) -> None:
        show_row(self.context.console, row, self.report.rows[-1] if self.report.rows else None)
        self.report.rows.append(row)


def _check_arguments(data: Any, teacher: Any, workdir: Any, resume: bool, seed: int) -> None:
    checks: tuple[tuple[str, Any, tuple[type, ...], str], ...] = (
        ("data", data, (Data,), "fxpress.Data(train=, val=, calibration=)"),
        ("teacher", teacher, (nn.Module, Graph, Compiled, type(None)), "a module or a compiled network"),
        ("workdir", workdir, (str, Path, type(None)), "the path of a directory"),
        ("seed", seed, (int,), "an integer >= 0"),
    )
    for name, value, kinds, allowed in checks:
        if not isinstance(value, kinds):
            raise OptionError(f"{name}={brief(value)} is a {type(value).__name__}; allowed: {allowed}")
    if seed < 0:
        raise OptionError(f"seed={seed} is negative; allowed: an integer >= 0")
    if resume and workdir is None:
        raise OptionError("resume=True needs a workdir", hint="Pass workdir=, the directory of the interrupted run.")


def _check_needs(pipeline: Pipeline, data: Data) -> None:
    """Refuse before hours of other passes what is sure to fail: a pass without its data."""
    for one in pipeline:
        one.check_data(data)


def _as_module(teacher: nn.Module | Graph | Compiled | None) -> nn.Module | None:
    return teacher.module if isinstance(teacher, (Graph, Compiled)) else teacher
