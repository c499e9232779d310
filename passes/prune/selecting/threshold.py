"""Which channels are on: one threshold on the importance of all classes, found on the cost of what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....ir.groups import Groups, Size
from ..selection import BoolArray, FloatArray, fill_up, give_back, make_blocks, shortest_prefix
from .masks import ClassMasks

HYSTERESIS = 1.1
"""A channel that is off returns when its importance is so many times the threshold."""
SLACK = 0.02
"""What is kept lies at most this share below a limit, where widths allow it."""


@dataclass(frozen=True)
class Choice:
    """What is on, and the threshold τ that says so."""

    kept: BoolArray
    tau: float


def select(
    masks: ClassMasks,
    importance: FloatArray,
    limits: dict[str, float],
    *,
    cap: float = np.inf,
    round_to: int = 1,
    floor: int = 1,
) -> Choice:
    """Keep the classes with importance ≥ τ, for the least τ whose network is within the limits.

    A class that is off needs `HYSTERESIS · τ` to return. τ is found by bisection over the values of importance; where
    the last class overshoots the limits, smaller ones go in its place.

    Args:
        masks: also says what is on now.
        importance: of each class, shape (count,).
        limits: metric → what may remain.
        cap: τ is at most this, whatever the limits say.
        round_to, floor: see `prune-channels`.
    """
    groups = masks.groups
    level = np.where(masks.kept(), importance, importance / HYSTERESIS)
    blocks = make_blocks(groups, masks.eligible, level, uniform=False, round_to=round_to, floor=floor)

    def fits(kept: BoolArray) -> bool:
        return within(groups, kept, limits)

    def close(kept: BoolArray) -> bool:
        size = groups.cost(kept)
        return any(getattr(size, metric) >= limit * (1 - SLACK) for metric, limit in limits.items())

    count = min(shortest_prefix(blocks, fits), int(np.searchsorted(blocks.key, cap)))
    kept = blocks.without(count)
    if count and fits(kept) and not close(kept):
        finer = fill_up(blocks, count - 1, close, fits)
        kept = give_back(blocks, count, close, fits) if finer is None else finer
    return Choice(kept, float(blocks.key[count - 1]) if count else 0.0)


def within(groups: Groups, kept: BoolArray, limits: dict[str, float]) -> bool:
    """Whether a network of the kept classes is within all limits."""
    size = groups.cost(kept)
    return all(getattr(size, metric) <= limit for metric, limit in limits.items())


def least(masks: ClassMasks, *, round_to: int, floor: int) -> Size:
    """Cost of the smallest network that can be selected."""
    blocks = make_blocks(
        masks.groups, masks.eligible, np.zeros(masks.groups.count), uniform=False, round_to=round_to, floor=floor
    )
    return masks.groups.cost(blocks.without(len(blocks)))


def savings(masks: ClassMasks, kept: BoolArray, metrics: list[str]) -> FloatArray:
    """What one more channel saves, over the mean of all channels that are on: w, shape (count,).

    The saving counts every layer that the class reaches through its dependency group, at the present widths of their
    other dimensions; with several metrics it is the mean of their shares. 0 for classes that may not be cut.
    """
    groups, weights = masks.groups, np.zeros(masks.groups.count)
    whole = groups.cost(kept)
    for group in masks.eligible:
        less = kept.copy()
        less[group.classes[kept[group.classes]][:1]] = False
        size = groups.cost(less)
        shares = [(getattr(whole, m) - getattr(size, m)) / max(getattr(whole, m), 1.0) for m in metrics]
        weights[group.classes] = max(float(np.mean(shares)), 1e-12)
    mean: float = weights[kept & masks.selectable].mean()
    return weights / mean
