"""`prune-channels`: choose, cut, prove, commit."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ...ir.cost import measure_cost
from ...ir.cut import Cut
from ...ir.errors import BudgetError, CutError
from ...ir.graph import Graph
from ...ir.groups import Group, Groups, Size, find_groups
from ...ir.verify import prove_cut, refit_distance
from ...runtime.layers.channel_mask import ChannelMask
from ..base import LOSSY, Context, Pass, PassResult, Semantics, Skip
from ..budget import Budget
from ..fuse.fold_masks import fold_masks
from ..options import InvalidOptionError
from .criteria import Combine, Criterion, Source, score_classes
from .reconstruct import Compensation, compensate
from .selection import Blocks, BoolArray, fill_up, give_back, make_blocks, shortest_prefix

SLACK = 0.02  # a budget is met when what remains is at most this share below it


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
    """What may remain: `macs` and/or `params`, as a fraction or an amount; met within 2 %."""
    scope: Literal["uniform", "global"] = "uniform"
    """`uniform` shrinks all groups alike, `global` lets one threshold on normalised scores decide."""
    criterion: Criterion = "l1"
    """What says how much a channel matters; `fxpress.passes.prune.criteria` holds the formulas."""
    combine: Combine | None = None
    """What becomes of a channel that several layers hold (a residual add): by default what suits the criterion."""
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
        unmet = [m for m in self.budget.metrics if m not in ("macs", "params")] if self.budget else []
        if unmet:
            raise InvalidOptionError(f"option 'budget': given {unmet[0]!r}, allowed: 'macs', 'params'")
        if self.masks is not None and self.reconstruct != "none":
            raise InvalidOptionError(
                f"option 'reconstruct': given {self.reconstruct!r} with 'masks', where removed channels give nothing "
                "before the cut and so are not missed behind it; allowed: 'none'"
            )
        return self

    def needed(self) -> tuple[str, ...]:
        """Calibration data where something is reconstructed."""
        return self.needs if self.reconstruct == "none" else ("calibration", *self.needs)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Choose, cut, prove, reconstruct, commit."""
        for part in self.needed():
            context.data.need(part, who=self.title())
        default = (self.attention, self.norms) == ("width", "keep")
        groups = graph.analyse(find_groups) if default else find_groups(graph, self.attention, self.norms)
        eligible = [group for group in groups.groups if not self._ignored(group)]
        kept, notes = self._choose(graph, groups, eligible, context)
        cut = Cut(groups, np.flatnonzero(~kept))
        candidate = cut.apply(self.name)
        candidate.lint()
        distance = prove_cut(cut, candidate) if context.verify else None
        refitted = refit_distance(cut, candidate) if context.verify and self.norms == "refit" else None
        before, after = groups.cost(), groups.cost(kept)
        metrics: dict[str, Any] = {"macs": after.macs, "params": after.params}
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
        notes.insert(0, _describe(groups, kept, before, after))
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

    def _choose(
        self, graph: Graph, groups: Groups, eligible: list[Group], context: Context
    ) -> tuple[BoolArray, list[str]]:
        """The classes that stay, shape (groups.count,), and notes for the report."""
        if self.masks is not None:
            return _masked(graph, groups), []
        who = f"{self.title()}, option 'criterion'"
        source = Source(context.data, seed=context.seed, console=context.console, who=who)
        scores = score_classes(graph, groups, self.criterion, source=source, combining=self.combine, among=eligible)
        uniform = self.scope == "uniform"
        blocks = make_blocks(groups, eligible, scores, uniform=uniform, round_to=self.round_to, floor=self.floor)
        if self.budget is None:
            assert self.ratio is not None
            return _by_ratio(self.ratio, eligible, blocks, uniform), []
        original = measure_cost(context.original)
        limits = {m: self.budget.limit(m, getattr(original, m)) for m in self.budget.metrics}
        return _by_budget(groups, blocks, limits)


def _by_ratio(ratio: float, eligible: list[Group], blocks: Blocks, uniform: bool) -> BoolArray:
    """Blocks up to a share of each group, or of all channels together."""
    if uniform:
        return blocks.without(int(np.searchsorted(blocks.key, ratio + 1e-9, side="right")))
    target = ratio * sum(group.channels for group in eligible)
    return blocks.without(int(np.searchsorted(blocks.ends, target + 1e-9, side="right")) - 1)


def _by_budget(groups: Groups, blocks: Blocks, limits: dict[str, float]) -> tuple[BoolArray, list[str]]:
    """The shortest prefix of blocks within all limits, refined where its last block overshoots."""

    def fits(kept: BoolArray) -> bool:
        size = groups.cost(kept)
        return all(getattr(size, metric) <= limit for metric, limit in limits.items())

    def close(kept: BoolArray) -> bool:
        """Not below every limit by more than the slack."""
        size = groups.cost(kept)
        return any(getattr(size, metric) >= limit * (1 - SLACK) for metric, limit in limits.items())

    count = shortest_prefix(blocks, fits)
    kept = blocks.without(count)
    if not fits(kept):
        raise BudgetError(
            _unmet(groups.cost(kept), groups.cost(), limits),
            hint="Raise the budget, or lower floor, round_to or ignore"
            + (", or set norms to refit." if groups.labels.norms == "keep" else "."),
        )
    if count and not close(kept):
        finer = fill_up(blocks, count - 1, close, fits)
        kept = give_back(blocks, count, close, fits) if finer is None else finer
    return kept, [] if close(kept) or not count else ["widths are too coarse to come closer to the budget"]


def _unmet(least: Size, whole: Size, limits: dict[str, float]) -> str:
    parts = [
        f"{metric}: {limit:.4g} allowed, {getattr(least, metric):.4g} is the least that can be reached "
        f"({getattr(least, metric) / getattr(whole, metric):.1%} of the present {getattr(whole, metric):.4g})"
        for metric, limit in limits.items()
        if getattr(least, metric) > limit
    ]
    return f"pass 'prune-channels' cannot meet its budget ({'; '.join(parts)})"


def _masked(graph: Graph, groups: Groups) -> BoolArray:
    """The classes whose mask is not zero; a group whose masks are all zero is an error."""
    kept = np.ones(groups.count, dtype=bool)
    found = False
    for node in graph.nodes:
        layer = graph.layer(node)
        axis = groups.channels(node)
        if isinstance(layer, ChannelMask):
            found = True
            if axis is not None:
                kept[axis[1][layer.cut.cpu().numpy()]] = False
    if not found:
        raise CutError("pass 'prune-channels', option 'masks': the graph has no masks", hint="Run insert-masks first.")
    kept[groups.locked] = True
    return kept


def _describe(groups: Groups, kept: BoolArray, before: Size, after: Size) -> str:
    total = sum(group.channels for group in groups.groups)
    gone = int((~kept).sum())
    return (
        f"{gone} of {total} channels in {len(groups.groups)} groups removed; "
        f"MACs {after.macs / max(before.macs, 1):.3f}, parameters {after.params / max(before.params, 1):.3f} of before"
    )
