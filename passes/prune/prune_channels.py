"""`prune-channels`: choose, cut, prove, commit."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ...ir.cost import measure_cost
from ...ir.cut import Cut
from ...ir.graph import Graph
from ...ir.groups import Group, Groups, find_groups
from ...ir.verify import prove_cut, refit_distance
from ...runtime.data import Data
from ..base import LOSSY, Context, Pass, PassResult, Semantics, Skip
from ..budget import Budget
from ..fuse.fold_masks import fold_masks
from ..options import InvalidOptionError
from .choosing import Choice, by_budget, by_masks, by_ratio, describe
from .criteria import CRITERIA, Combine, Criterion
from .measured import make_meters
from .reconstruct import Compensation, compensate
from .scoring import Influence, Scoring
from .selection import make_blocks


class PruneChannels(Pass):
    """Remove channels with everything that depends on them: rows, columns, norms, other summands of a residual add.

    Channels are ordered by a criterion (Li et al. 2017 for `l1`), least first; the shortest prefix of that order that
    meets the ratio or the budget goes. The network with the channels removed is proven equal to the one in which they
    are masked to zero where they are read; only then it replaces the graph.
    """

    name: ClassVar[str] = "prune-channels"
    semantics: ClassVar[Semantics] = LOSSY

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of channels to remove (0 to 1): of every group (`uniform`), or of all together (`global`)."""
    budget: Budget | None = None
    """What may remain: `macs`, `params` and `size` of the file, met within 2 %; measured `latency`, met within 5 %."""
    scope: Literal["uniform", "global"] = "uniform"
    """`uniform` shrinks all groups alike, `global` lets one threshold on normalised scores decide. With `statistics`
    and `apoz` the threshold is at mean - k std of every group, with one k found by bisection."""
    criterion: Criterion = "l1"
    """What says how much a channel matters; `fxpress.passes.prune.criteria` holds the formulas."""
    combine: Combine | None = None
    """What becomes of a channel that several layers hold (a residual add): by default what suits the criterion."""
    sensitivity: Influence = "none"
    """With `scope: global`, weigh scores by how much the whole network suffers when their group alone is cut: in
    accuracy, or in divergence of its outputs (`kl`), on calibration images or else training images."""
    history: tuple[str, ...] = ()
    """For `criterion: statistics`: a file that `distill` recorded, or checkpoints of this network while it learned; by
    default what an earlier `distill` with `record: true` left, or else the present weights alone."""
    round_to: Annotated[int, Field(ge=1, le=1024)] = 1
    """Widths become multiples of this many channels."""
    floor: Annotated[int, Field(ge=1)] = 1
    """No group keeps fewer channels than this."""
    masks: Literal["given", "learned"] | None = None
    """Remove the channels whose mask is zero, as `insert-masks` or `select-channels` set them, and fold the others."""
    reconstruct: Literal["none", "bias", "least-squares"] = "none"
    """Make up for what is gone, without training, on `data.calibration`: `bias` puts the mean of removed channels into
    the constants of the layers that read them, `least-squares` gives these layers new weights for what stays."""
    sequential: bool = True
    """Whether `least-squares` goes layer by layer, each learning from what the layers before it now give; without, one
    pass over the data is enough for all."""
    ignore: tuple[str, ...] = ()
    """Layers, by name or glob pattern, whose output channels all stay."""
    attention: Literal["width", "heads"] = "width"
    """Cut attention by the width inside all heads alike, or by whole heads."""

    norms: Literal["keep", "refit"] = "keep"
    """`keep` leaves channels that a layer norm normalises; `refit` cuts them: the norm runs over those that stay."""

    @model_validator(mode="after")
    def _check(self) -> PruneChannels:
        given = [name for name in ("ratio", "budget", "masks") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidOptionError(
                f"exactly one of 'ratio', 'budget' and 'masks' is needed; given: {given or 'none'}"
            )
        if self.history and self.criterion != "statistics":
            raise InvalidOptionError("option 'history' is for 'criterion: statistics' alone")
        if self.sensitivity != "none" and (self.scope != "global" or self.masks is not None):
            raise InvalidOptionError(
                f"option 'sensitivity': given {self.sensitivity!r}; it weighs layers against each other and so needs "
                "'scope: global' and a ratio or budget"
            )
        if self.combine is not None and CRITERIA[self.criterion].combine is None:
            raise InvalidOptionError(
                f"option 'combine': {self.criterion!r} sees a channel as one through all layers, nothing to combine"
            )
        if self.masks is not None and self.reconstruct != "none":
            raise InvalidOptionError(
                f"option 'reconstruct': given {self.reconstruct!r} with 'masks', where removed channels give nothing "
                "before the cut and so are not missed behind it; allowed: 'none'"
            )
        return self

    def needed(self) -> tuple[str, ...]:
        """Calibration data where something is reconstructed."""
        return self.needs if self.reconstruct == "none" else ("calibration", *self.needs)

    def check_data(self, data: Data) -> None:
        """Also what the criterion looks at."""
        super().check_data(data)
        if self.masks is None:
            self._scoring.check(data)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Choose, cut, prove, reconstruct, commit."""
        self.check_data(context.data)
        default = (self.attention, self.norms) == ("width", "keep")
        groups = graph.analyse(find_groups) if default else find_groups(graph, self.attention, self.norms)
        eligible = [group for group in groups.groups if not self._ignored(group)]
        choice = self._choose(graph, groups, eligible, context)
        kept, notes = choice.kept, choice.notes
        cut = Cut(groups, np.flatnonzero(~kept))
        candidate = cut.apply(self.name)
        candidate.lint()
        distance = prove_cut(cut, candidate) if context.verify else None
        refitted = refit_distance(cut, candidate) if context.verify and self.norms == "refit" else None
        before, after = groups.cost(), groups.cost(kept)
        metrics: dict[str, Any] = {"macs": after.macs, "params": after.params, **choice.metrics}
        missed: list[Skip] = []
        if self.reconstruct != "none":
            found = self._compensate(cut, candidate, context)
            notes, missed = notes + found.notes, found.skips
            metrics |= {"reconstruct": found.metrics, "params": measure_cost(candidate).params}  # biases may be new
        graph.adopt(candidate)
        if self.masks is not None:
            folded, skips = fold_masks(graph, self.name)
            notes.append(f"{folded} masks folded")
        else:
            skips = []
        notes.insert(0, describe(groups, kept, before, after))
        if refitted is not None:
            notes.append(
                f"norms now take their statistics over fewer channels, which changes the output by {refitted:.1e}"
            )
        skips += [Skip(group.name, "ignored by option") for group in groups.groups if group not in eligible]
        return PassResult(notes, skips + missed, distance, metrics)

    def _compensate(self, cut: Cut, candidate: Graph, context: Context) -> Compensation:
        assert self.reconstruct != "none"
        return compensate(
            cut,
            candidate,
            context.data.need("calibration", who=self.title()),
            method=self.reconstruct,
            sequential=self.sequential,
            validation=context.data.val,
            console=context.console,
        )

    def _ignored(self, group: Group) -> bool:
        layers = {slot.name.rpartition(".")[0] for slot in group.slots}
        return any(fnmatchcase(layer, pattern) for layer in layers for pattern in self.ignore)

    def _choose(self, graph: Graph, groups: Groups, eligible: list[Group], context: Context) -> Choice:
        """The classes that stay."""
        if self.masks is not None:
            return by_masks(graph, groups)
        scored = self._scoring.run(graph, groups, eligible, context)
        uniform = self.scope == "uniform"
        blocks = make_blocks(groups, eligible, scored.scores, uniform=uniform, round_to=self.round_to, floor=self.floor)
        if self.budget is None:
            assert self.ratio is not None
            choice = by_ratio(self.ratio, eligible, blocks, uniform=uniform)
        else:
            choice = by_budget(groups, blocks, self._limits(context), make_meters(self.budget, groups, context))
        choice.notes, choice.metrics = scored.notes + choice.notes, scored.metrics | choice.metrics
        if not uniform and choice.threshold is not None:
            choice.metrics["threshold"] = choice.threshold
            if self._scoring.standard:
                choice.notes.append(f"cut at mean - k std of every group with k = {-choice.threshold:.3f}")
        return choice

    @property
    def _scoring(self) -> Scoring:
        return Scoring(self.criterion, self.combine, self.sensitivity, self.history, self.title())

    def _limits(self, context: Context) -> dict[str, float]:
        """What may remain of what can be computed."""
        assert self.budget is not None
        original = measure_cost(context.original)
        computed = [metric for metric in self.budget.metrics if metric in ("macs", "params")]
        return {metric: self.budget.limit(metric, getattr(original, metric)) for metric in computed}
