"""What a pass is: options as a frozen model, a meaning, and a `run` that edits the graph.

A pass is one small file. Its class derives from `Pass`; the fields are its options; `name`, `semantics` and `preserves`
say what the pipeline may expect of it. `run` edits the graph that it is given (through `Graph.edit` or
`Graph.adopt`) and returns what it did as data.
"""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from torch import nn

from ..ir.graph import Graph
from ..runtime.data import Data
from .options import Options
from .records import Records


class Semantics(enum.Enum):
    """What a pass does to the function that the network computes."""

    EXACT = "exact"
    """The same function: equal outputs are proven on the example inputs."""
    LOSSY = "lossy"
    """Another function: the distance of the outputs is measured and reported."""
    TRAINING = "training"
    """The structure stays and the values are learned anew."""


EXACT, LOSSY, TRAINING = Semantics.EXACT, Semantics.LOSSY, Semantics.TRAINING


@dataclass(frozen=True)
class Skip:
    """A place that a pass left alone.

    Args:
        node: name of the node or layer.
        reason: why, in words that a reader without the source can use.
    """

    node: str
    reason: str


@dataclass
class PassResult:
    """What a pass did.

    Args:
        notes: short sentences for the report, e.g. `folded 20 of 20`.
        skips: what it left alone, and why.
        distance: the distance that the pass proved or measured itself (masked against cut), relative max-norm;
            None lets the pipeline measure output against output.
        metrics: further numbers for the report and for other programs (JSON values), e.g. the loss per epoch.
        proven: whether an exact pass has proven itself, in a way that suits it better than equal outputs, which are
            then measured and reported alone: quantizers turn rounding into steps.
    """

    notes: list[str] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    distance: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    proven: bool = False


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the graph.

    Args:
        original: the network as traced, before any pass; never edited. The reference for budgets and distances.
        data: training, validation and calibration batches, if the caller gave some.
        teacher: the network to learn from; the original's module where the caller gave none.
        inputs: the example inputs as the caller gave them, or None where the network brought its own.
        seed: seed of this pass; python, numpy and torch are seeded with it before `run`.
        verify: whether structural passes must prove themselves before they commit.
        console: where progress is shown; quiet when not on a terminal.
        workdir: a directory that this pass may use for checkpoints, or None.
        records: what earlier passes left for this one, and this one may leave.
    """

    original: Graph
    data: Data = field(default_factory=Data)
    teacher: nn.Module | None = None
    inputs: Any = None
    seed: int = 0
    verify: bool = True
    console: Console = field(default_factory=lambda: Console(quiet=True))
    workdir: Path | None = None
    records: Records = field(default_factory=Records)


class Pass(Options):
    """Base of all passes.

    A subclass sets `name` (as in pipeline files), `semantics`, and, where they are not empty, `preserves`: the analyses
    (functions of the graph) whose cached results still hold after `run` although the graph was edited; and `needs`:
    the parts of the data without which it cannot run, checked before the first pass of a pipeline. Where that depends
    on the options, it overrides `needed` instead.
    """

    name: ClassVar[str]
    semantics: ClassVar[Semantics]
    preserves: ClassVar[tuple[Callable[[Graph], Any], ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, graph: Graph, context: Context) -> PassResult:
        """Edit `graph` in place; on an exception the pipeline restores the graph of before."""

    @classmethod
    def title(cls) -> str:
        """What an error calls this pass."""
        return f"pass {cls.name!r}"

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    def meaning(self) -> Semantics:
        """What it does to the function with these options."""
        return self.semantics

    def needed(self) -> tuple[str, ...]:
        """The parts of the data without which it cannot run with these options."""
        return self.needs

    def check_data(self, data: Data) -> None:
        """Refuse, before the first pass of a pipeline, data without which this one cannot run.

        Raises:
            DataError: says what is missing.
        """
        for part in self.needed():
            data.need(part, who=self.title())

    def settings(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON values."""
        options: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return options
