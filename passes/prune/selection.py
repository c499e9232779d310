"""Which channels go: blocks of channels in the order in which they matter least, and the shortest prefix in budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from math import ceil, gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...ir.groups import Group, Groups
from ...ir.labels import IntArray

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class Block(NamedTuple):
    """Classes of one group that go together; `key` orders all blocks, least first."""

    group: int
    classes: IntArray
    key: float


def make_blocks(
    groups: Groups, eligible: Sequence[Group], scores: FloatArray, *, uniform: bool, round_to: int, floor: int
) -> list[Block]:
    """All blocks that may go, in the order in which they go.

    The widths that a group may take are multiples of `round_to` (and its full width), never below `floor`. With
    `uniform` a block's key is the share of the group that is gone with it, so that all groups shrink alike; otherwise
    it is the largest mean score so far, so that one threshold runs through all groups.
    """
    blocks: list[Block] = []
    for group in eligible:
        order = group.classes[np.argsort(scores[group.classes], kind="stable")]
        widths = _widths(groups, group, round_to, floor)
        if not len(widths):
            continue
        bounds = [0, *(len(order) - width for width in widths)]
        pieces = np.split(order, bounds[1:])[:-1]
        if uniform:
            keys = [bound / len(order) for bound in bounds[1:]]
        else:
            sums = np.add.reduceat(scores[order], bounds[:-1])[: len(pieces)]
            sums[-1] = scores[pieces[-1]].sum()
            keys = np.maximum.accumulate(sums / np.diff(bounds)).tolist()
        blocks += map(Block, repeat(group.index), pieces, keys)
    return sorted(blocks, key=lambda block: block.key)


def _widths(groups: Groups, group: Group, round_to: int, floor: int) -> range:
    """Numbers of classes below the full one that a group may keep, falling."""
    channels = 1 if round_to == floor == 1 else _channels_per_class(groups, group)
    step = round_to // gcd(round_to, channels)
    least = max(step, ceil(max(1, floor) / channels / step) * step)
    most = (group.channels - 1) // step * step
    return range(most, least - 1, -step)


def _channels_per_class(groups: Groups, group: Group) -> int:
    """Most channels that one class of a group stands for in any parameter (the heads of an attention, say)."""
    vectors = (groups.vector(groups.labels.slots[slot]) for slot in group.slots)
    return max((np.bincount(v, minlength=groups.count)[group.classes].max() for v in vectors), default=1)


def shortest_prefix(blocks: Sequence[Block], fits: Callable[[BoolArray], bool], count: int) -> tuple[int, BoolArray]:
    """Least number of leading blocks whose removal fits, by bisection (fitting is monotone), and what is kept then.

    Returns all blocks if even that does not fit; the caller asks `fits` once more.
    """
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high) // 2
        if fits(keep_all_but(blocks[:middle], count)):
            high = middle
        else:
            low = middle + 1
    return low, keep_all_but(blocks[:low], count)


def keep_all_but(blocks: Sequence[Block], count: int) -> BoolArray:
    """True for every class outside of `blocks`, shape (count,)."""
    kept = np.ones(count, dtype=bool)
    for block in blocks:
        kept[block.classes] = False
    return kept


def fill_up(
    blocks: Sequence[Block],
    start: int,
    kept: BoolArray,
    allowed: Callable[[BoolArray], bool],
    fits: Callable[[BoolArray], bool],
) -> BoolArray | None:
    """From the last prefix that does not fit, go on with blocks that do not overshoot, until it fits.

    A group of which a block was passed over stays as it is. None if that leads nowhere: widths are too coarse.
    """
    closed: set[int] = set()
    for block in blocks[start:]:
        if block.group in closed:
            continue
        trial = kept.copy()
        trial[block.classes] = False
        if not allowed(trial):
            closed.add(block.group)
            continue
        kept = trial
        if fits(kept):
            return kept
    return None


def give_back(
    removed: Sequence[Block], kept: BoolArray, close: Callable[[BoolArray], bool], fits: Callable[[BoolArray], bool]
) -> BoolArray:
    """Blocks that may stay after all, last removed first, as long as the budget is still met and not yet close.

    Within a group blocks come back in the reverse order of their removal only.
    """
    closed: set[int] = set()
    for block in reversed(removed):
        if close(kept):
            break
        if block.group in closed:
            continue
        trial = kept.copy()
        trial[block.classes] = True
        if fits(trial):
            kept = trial
        else:
            closed.add(block.group)
    return kept
