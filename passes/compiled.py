"""What `compile` returns and `load` reads: a network that runs, with its pipeline and report."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import fx

from ..ir.errors import ArtifactError, OptionError
from ..ir.graph import Graph
from ..runtime import artifact
from .pipeline import Pipeline
from .report import Report


class Compiled:
    """A compiled network.

    Args:
        graph: the network.
        pipeline: the passes that made it.
        report: a row per pass.
    """

    graph: Graph
    pipeline: Pipeline
    report: Report

    def __init__(self, graph: Graph, pipeline: Pipeline, report: Report) -> None:
        self.graph = graph
        self.pipeline = pipeline
        self.report = report

    @property
    def module(self) -> fx.GraphModule:
        """The network as a module that trains, exports and compiles like any other."""
        return self.graph.module

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the network on inputs as the original takes them."""
        return self.graph.module(*inputs, **keywords)

    def __repr__(self) -> str:
        passes = ", ".join(one.name for one in self.pipeline) or "no passes"
        return f"Compiled({passes}; {sum(p.numel() for p in self.module.parameters()):,} parameters)"

    def train(self, mode: bool = True) -> Compiled:
        """Set training mode: batch norm statistics move, dropout drops."""
        self.module.train(mode)
        return self

    def eval(self) -> Compiled:
        """Set evaluation mode, in which `compile` and `load` leave the network."""
        return self.train(False)

    def save(self, path: str | Path) -> None:
        """Write network, pipeline and report into one file, atomically.

        Raises:
            ArtifactError: the file cannot be written; an older one under that name is unharmed.
        """
        artifact.save(path, self.graph, pipeline=self.pipeline.to_dict(), report=self.report.to_dict())


def load(path: str | Path) -> Compiled:
    """Read a compiled network. Nothing in the file is executed, and the model's source is not needed.

    Raises:
        ArtifactError: the file is missing, truncated, corrupt, hostile or of a newer format.
    """
    loaded = artifact.load(path)
    loaded.graph.module.eval()
    return Compiled(loaded.graph, _read_pipeline(path, loaded.pipeline), _read_report(path, loaded.report))


def _read_pipeline(path: str | Path, content: dict[str, Any] | None) -> Pipeline:
    """The pipeline in the file; none where it has passes or options of another program: the network needs none."""
    try:
        return Pipeline.from_dict(content) if content else Pipeline()
    except OptionError as error:
        text = f"the pipeline in {path} is left out, the network is complete: {error.what}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return Pipeline()


def _read_report(path: str | Path, content: dict[str, Any] | None) -> Report:
    try:
        return Report.from_dict(content) if content else Report([])
    except ValueError as error:
        raise ArtifactError(f"the report in {path} is not valid: {' '.join(str(error).split())}") from None
