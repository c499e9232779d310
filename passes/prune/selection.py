"""Which channels go: blocks of channels in the order in which they matter least, and the shortest prefix in budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, gcd

import numpy as np
import numpy.typing as npt

from ...ir.groups import Group, Groups
from ...ir.labels import IntArray

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Test = Callable[[BoolArray], bool]


@dataclass(frozen=True)
class Blocks:
    """Sets of classes of one group each that go together, in the order in which they go.

    Attributes:
        group: index of each block's group, shape (blocks,).
        key: what orders them, shape (blocks,), rising.
        classes: the classes of the first block, then those of the second, and so on.
        ends: where each block's classes end in `classes`, with a leading 0, shape (blocks + 1,).
        count: number of classes of the network.
    """

    group: IntArray
    key: FloatArray
    classes: IntArray
    ends: IntArray
    count: int

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, index: int) -> IntArray:
        """Classes of one block."""
        return self.classes[self.ends[index] : self.ends[index + 1]]

    def without(self, blocks: int) -> BoolArray:
        """What is kept when the first `blocks` blocks go, shape (count,)."""
        kept = np.ones(self.count, dtype=bool)
        kept[self.classes[: self.ends[blocks]]] = False
        return kept


def make_blocks(
    groups: Groups, eligible: Sequence[Group], scores: FloatArray, *, uniform: bool, round_to: int, floor: int
) -> Blocks:
    """All blocks that may go.

    The widths that a group may take are multiples of `round_to` (and its full width), never below `floor`. With
    `uniform` a block's key is the share of the group that is gone with it, so that all groups shrink alike; otherwise
    it is the largest mean score so far, so that one threshold runs through all groups.
    """
    classes, lengths, owners, keys = [], [], [], []
    for group in eligible:
        order = group.classes[np.argsort(scores[group.classes], kind="stable")]
        gone = len(order) - np.asarray(_widths(groups, group, round_to, floor), dtype=np.int64)
        if not len(gone):
            continue
        steps = np.diff(gone, prepend=0)
        sums = np.diff(np.cumsum(scores[order])[gone - 1], prepend=0.0)
        classes.append(order[: gone[-1]])
        lengths.append(steps)
        owners.append(np.full(len(gone), group.index))
        keys.append(gone / len(order) if uniform else np.maximum.accumulate(sums / steps))
    return _sorted(classes, lengths, owners, keys, groups.count)


def _sorted(
    classes: list[IntArray], lengths: list[IntArray], owners: list[IntArray], keys: list[FloatArray], count: int
) -> Blocks:
    """Blocks of all groups in one order; those of a group stay in theirs."""
    if not classes:
        return Blocks(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), np.zeros(1, np.int64), count)
    length, key = np.concatenate(lengths), np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    members = np.concatenate(classes)[np.argsort(np.repeat(place, length), kind="stable")]
    ends = np.concatenate([[0], np.cumsum(length[order])])
    return Blocks(np.concatenate(owners)[order], key[order], members, ends, count)


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
    return max((int(np.bincount(v, minlength=groups.count)[group.classes].max()) for v in vectors), default=1)


def shortest_prefix(blocks: Blocks, fits: Test) -> int:
    """Least number of leading blocks whose removal fits, by bisection (fitting is monotone).

    Returns the number of all blocks if even that does not fit; the caller asks `fits` once more.
    """
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high) // 2
        if fits(blocks.without(middle)):
            high = middle
        else:
            low = middle + 1
    return low


def fill_up(blocks: Blocks, start: int, allowed: Test, fits: Test) -> BoolArray | None:
    """From a prefix that does not fit, go on with blocks that do not overshoot, until it fits.

    A group of which a block was passed over stays as it is. None if that leads nowhere: widths are too coarse.
    """
    kept = blocks.without(start)
    closed: set[int] = set()
    for index in range(start, len(blocks)):
        if int(blocks.group[index]) in closed:
            continue
        trial: BoolArray = kept.copy()
        trial[blocks[index]] = False
        if not allowed(trial):
            closed.add(int(blocks.group[index]))
            continue
        kept = trial
        if fits(kept):
            return kept
    return None


def give_back(blocks: Blocks, removed: int, close: Test, fits: Test) -> BoolArray:
    """Blocks that may stay after all, last removed first, as long as the budget is still met and not yet close.

    Within a group blocks come back in the reverse order of their removal only.
    """
    kept = blocks.without(removed)
    closed: set[int] = set()
    for index in range(removed - 1, -1, -1):
        if close(kept):
            break
        if int(blocks.group[index]) in closed:
            continue
        trial = kept.copy()
        trial[blocks[index]] = True
        if fits(trial):
            kept = trial
        else:
            closed.add(int(blocks.group[index]))
    return kept
