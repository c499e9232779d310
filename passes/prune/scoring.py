"""Scores for `prune-channels`: a criterion, and the influence on the whole model where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ...ir.graph import Graph
from ...ir.groups import Group, Groups
from ...runtime.data import Data
from ..analyse.over_time import find_statistics
from ..analyse.sensitivity import layer_sensitivity
from ..base import Context
from .criteria import CRITERIA, Combine, Criterion, Source, check_criterion, describes, loader_of, score_classes
from .selection import FloatArray

Influence = Literal["none", "accuracy", "kl"]


@dataclass(frozen=True)
class Scoring:
    """How channels are scored.

    Args:
        criterion: what says how much a channel matters.
        combine: what becomes of a channel that several layers hold; None leaves it to the criterion.
        sensitivity: whether and by what a group's influence on the whole model weighs its scores.
        history: files for `criterion: statistics`.
        who: begins the errors, e.g. `pass 'prune-channels'`.
    """

    criterion: Criterion
    combine: Combine | None
    sensitivity: Influence
    history: tuple[str, ...]
    who: str

    @property
    def standard(self) -> bool:
        """Whether a threshold on the scores is one at mean - k std of every group."""
        return CRITERIA[self.criterion].scale == "standard" and self.sensitivity == "none"

    def check(self, data: Data) -> None:
        """Refuse before any work data that are not enough.

        Raises:
            DataError: says what is missing, and for which option.
        """
        check_criterion(self.criterion, self.combine, Source(data, who=f"{self.who}, option 'criterion'"))
        if self.sensitivity != "none":
            loader_of(Source(data, who=f"{self.who}, option 'sensitivity'"))

    def run(self, graph: Graph, groups: Groups, eligible: Sequence[Group], context: Context) -> Scored:
        """Score every class."""
        who = f"{self.who}, option 'criterion'"
        source = Source(context.data, seed=context.seed, console=context.console, who=who)
        found = Scored()
        if self.criterion == "statistics":
            source = self._with_history(graph, source, context, found.notes)
        found.scores = score_classes(
            graph, groups, self.criterion, source=source, combining=self.combine, among=eligible
        )
        if self.sensitivity != "none":
            self._weigh(graph, groups, eligible, source, found)
        return found

    def _with_history(self, graph: Graph, source: Source, context: Context, notes: list[str]) -> Source:
        recorded = find_statistics(graph, self.history, context.records.statistics)
        if recorded is None:
            return source
        if not self.history and not describes(recorded, graph):
            notes.append("what was recorded is of other widths and not used: statistics of the present weights")
            return source
        plural = "s" if recorded.checkpoints > 1 else ""
        notes.append(f"statistics over {recorded.checkpoints} checkpoint{plural}")
        return replace(source, recorded=recorded)

    def _weigh(self, graph: Graph, groups: Groups, eligible: Sequence[Group], source: Source, found: Scored) -> None:
        assert self.sensitivity != "none"
        scan = layer_sensitivity(
            graph,
            loader_of(source),
            found.scores,
            groups=groups,
            among=eligible,
            measure=self.sensitivity,
            console=source.console,
        )
        standard = CRITERIA[self.criterion].scale == "standard"
        found.scores = scan.weigh(found.scores, groups, standard=standard)
        found.metrics["sensitivity"] = scan.to_dict()


@dataclass
class Scored:
    """What scoring found.

    Attributes:
        scores: of every class, shape (groups.count,), higher means keep.
        notes: for the report.
        metrics: numbers for the report, as JSON values.
    """

    scores: FloatArray = field(default_factory=lambda: np.zeros(0))
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
