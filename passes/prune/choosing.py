"""Which classes stay: by masks, by a ratio, or by a budget on what can be computed and what must be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...ir.errors import BudgetError, CutError
from ...ir.graph import Graph
from ...ir.groups import Group, Groups, Size
from ...runtime.layers.channel_mask import ChannelMask
from .measured import Meter, hint
from .selection import Blocks, BoolArray, fill_up, give_back, shortest_prefix

SLACK = 0.02  # a budget is met when what remains is at most this share below it


@dataclass
class Choice:
    """What stays.

    Attributes:
        kept: which classes, shape (groups.count,).
        notes: for the report.
        metrics: numbers for the report: what was measured on the way.
        threshold: with one threshold through all groups, the highest score that goes; None if nothing goes.
    """

    kept: BoolArray
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    threshold: float | None = None


def by_masks(graph: Graph, groups: Groups) -> Choice:
    """The classes whose mask is not zero.

    Raises:
        CutError: there are no masks.
    """
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
    return Choice(kept)


def by_ratio(ratio: float, eligible: Sequence[Group], blocks: Blocks, *, uniform: bool) -> Choice:
    """Blocks up to a share of each group, or of all channels together."""
    if uniform:
        return _without(blocks, int(np.searchsorted(blocks.key, ratio + 1e-9, side="right")))
    target = ratio * sum(group.channels for group in eligible)
    return _without(blocks, int(np.searchsorted(blocks.ends, target + 1e-9, side="right")) - 1)


def by_budget(groups: Groups, blocks: Blocks, limits: dict[str, float], meters: Sequence[Meter] = ()) -> Choice:
    """The shortest prefix of blocks within all limits.

    What can be computed (`limits`: MACs and parameters) is met first, and refined where the last block overshoots; as
    long as a meter is above its limit, more blocks go.

    Raises:
        BudgetError: not even the removal of all blocks is enough; says what is the least that can be reached.
    """
    choice, count = _by_cost(groups, blocks, limits)
    if meters and not (limits and all(meter.fits(choice.kept, count) for meter in meters)):
        for meter in meters:
            count = meter.search(blocks, count)
        choice = _without(blocks, count)
        for meter in meters[:-1]:  # what it found may have been cut further for the others
            meter.fits(choice.kept, count)
    choice.metrics |= {meter.name: meter.report() for meter in meters}
    choice.notes += [note for meter in meters for note in meter.notes()]
    return choice


def _by_cost(groups: Groups, blocks: Blocks, limits: dict[str, float]) -> tuple[Choice, int]:
    """The shortest prefix within all computed limits, refined where its last block overshoots, and its length."""

    def fits(kept: BoolArray) -> bool:
        size = groups.cost(kept)
        return all(getattr(size, metric) <= limit for metric, limit in limits.items())

    def close(kept: BoolArray) -> bool:
        """Not below every limit by more than the slack."""
        size = groups.cost(kept)
        return any(getattr(size, metric) >= limit * (1 - SLACK) for metric, limit in limits.items())

    if not limits:
        return _without(blocks, 0), 0
    count = shortest_prefix(blocks, fits)
    choice = _without(blocks, count)
    if not fits(choice.kept):
        raise BudgetError(_unmet(groups.cost(choice.kept), groups.cost(), limits), hint=hint(groups))
    if count and not close(choice.kept):
        finer = fill_up(blocks, count - 1, close, fits)
        choice.kept = give_back(blocks, count, close, fits) if finer is None else finer
    if count and not close(choice.kept):
        choice.notes.append("widths are too coarse to come closer to the budget")
    return choice, count


def describe(groups: Groups, kept: BoolArray, before: Size, after: Size) -> str:
    """How much went."""
    total = sum(group.channels for group in groups.groups)
    gone = int((~kept).sum())
    return (
        f"{gone} of {total} channels in {len(groups.groups)} groups removed; "
        f"MACs {after.macs / max(before.macs, 1):.3f}, parameters {after.params / max(before.params, 1):.3f} of before"
    )


def _without(blocks: Blocks, count: int) -> Choice:
    return Choice(blocks.without(count), threshold=float(blocks.key[count - 1]) if count else None)


def _unmet(least: Size, whole: Size, limits: dict[str, float]) -> str:
    parts = [
        f"{metric}: {limit:.4g} allowed, {getattr(least, metric):.4g} is the least that can be reached "
        f"({getattr(least, metric) / getattr(whole, metric):.1%} of the present {getattr(whole, metric):.4g})"
        for metric, limit in limits.items()
        if getattr(least, metric) > limit
    ]
    return f"pass 'prune-channels' cannot meet its budget ({'; '.join(parts)})"
