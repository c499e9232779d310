"""Budgets on what must be measured: bytes of the saved file, and time.

Each is nearly a straight line in something that costs nothing to compute (bytes in parameters, time in MACs), so that a
few measurements find the shortest prefix of blocks: predict where the limit is crossed, cut and measure there, and
predict again from the two nearest measurements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from ...ir.cut import apply_cut
from ...ir.errors import BudgetError, OptionError
from ...ir.graph import Graph
from ...ir.groups import Groups
from ...runtime.data import Inputs
from ...runtime.measure import Latency, bytes_on_disk, latency_ratio
from ..base import Context
from ..batch import example_batch
from ..budget import Budget
from .selection import Blocks, BoolArray, shortest_prefix

ROUNDS, CAREFUL = 15, 41
"""Rounds of a latency measurement: while searching, and to confirm."""


@dataclass(frozen=True)
class Point:
    """A prefix of blocks that was measured.

    Args:
        blocks: its length.
        predictor: MACs or parameters of what it leaves.
        value: what was measured, in the unit of the limit.
    """

    blocks: int
    predictor: float
    value: float


class Meter(ABC):
    """Measures one metric of candidates, and finds the shortest prefix of blocks that keeps it within a limit.

    Args:
        groups: of the network that is cut.
        limit: what may remain.
        original: the metric of the network before any pass, in the same unit.
    """

    name: ClassVar[str]
    predictor: ClassVar[str]  # the metric of `groups.cost` with which it rises and falls
    slack: ClassVar[float]  # met when at most this share below the limit
    most: ClassVar[int] = 12  # measurements

    def __init__(self, groups: Groups, limit: float, original: float) -> None:
        self.groups, self.limit, self.original = groups, limit, original
        self.points: list[Point] = []
        self.found: Point | None = None

    @abstractmethod
    def measure(self, candidate: Graph) -> float:
        """The metric of a candidate, in the unit of the limit."""

    @abstractmethod
    def show(self, value: float) -> str:
        """A value with its unit."""

    def fits(self, kept: BoolArray, count: int) -> bool:
        """Whether what is kept, about a prefix of that length, is within the limit; if so it is what is reported."""
        self.found = self._point(kept, count)
        return self.found.value <= self.limit

    def search(self, blocks: Blocks, start: int) -> int:
        """The length of the shortest prefix within the limit, found by few measurements.

        Args:
            blocks: in the order in which they go.
            start: a length below which other limits are not met.

        Raises:
            BudgetError: even all blocks are not enough.
        """
        low, high = self._try(blocks, start), None
        if low.value <= self.limit:
            return self.confirm(blocks, low)
        while high is None or (high.blocks - low.blocks > 1 and len(self.points) < self.most):
            if low.blocks == len(blocks):
                raise BudgetError(self._unmet(low.value), hint=hint(self.groups))
            point = self._try(blocks, self._guess(blocks, low, high))
            if point.value > self.limit:
                low = point
                continue
            high = point
            if point.value >= self.limit * (1 - self.slack):
                break
        return self.confirm(blocks, high)

    def confirm(self, blocks: Blocks, point: Point) -> int:  # noqa: ARG002
        """A last look at what the search has found; returns the length of the prefix to take."""
        self.found = point
        return point.blocks

    def notes(self) -> list[str]:
        """For the report."""
        assert self.found is not None
        value, count = self.show(self.found.value), len(self.points)
        return [f"{self.name} {value}, allowed {self.show(self.limit)}; {count} measurements"]

    def report(self) -> dict[str, Any]:
        """What was measured, as JSON values."""
        assert self.found is not None
        return {"value": self.found.value, "limit": self.limit, "measured": [asdict(p) for p in self.points]}

    def _guess(self, blocks: Blocks, low: Point, high: Point | None) -> int:
        """The prefix at which a line through two measurements crosses the middle of what is allowed."""
        other = high or next((p for p in reversed(self.points) if p.predictor > low.predictor), None)
        if other is None or other.value == low.value:
            target = low.predictor * self._aim / low.value
        else:
            slope = (low.predictor - other.predictor) / (low.value - other.value)
            target = low.predictor + slope * (self._aim - low.value)
        count = self._down_to(blocks, target)
        if high is not None and len(self.points) > self.most // 2:
            count = (low.blocks + high.blocks) // 2  # the line does not serve: halve
        return int(np.clip(count, low.blocks + 1, len(blocks) if high is None else high.blocks - 1))

    @property
    def _aim(self) -> float:
        return self.limit * (1 - self.slack / 2)

    def _down_to(self, blocks: Blocks, target: float) -> int:
        """The shortest prefix that leaves so much of the predictor."""
        return shortest_prefix(blocks, lambda kept: getattr(self.groups.cost(kept), self.predictor) <= target)

    def _try(self, blocks: Blocks, count: int) -> Point:
        return self._point(blocks.without(count), count)

    def _point(self, kept: BoolArray, count: int) -> Point:
        candidate = apply_cut(self.groups, np.flatnonzero(~kept), "prune-channels")
        point = Point(count, getattr(self.groups.cost(kept), self.predictor), self.measure(candidate))
        self.points.append(point)
        return point

    def _unmet(self, least: float) -> str:
        return (
            f"pass 'prune-channels' cannot meet its budget ({self.name}: {self.show(self.limit)} allowed, "
            f"{self.show(least)} is the least that can be reached, {least / self.original:.1%} of the original)"
        )


class SizeMeter(Meter):
    """Bytes of the saved file, example inputs included, as the report counts them: every candidate is really saved."""

    name = "size"
    predictor = "params"
    slack = 0.02

    def measure(self, candidate: Graph) -> float:
        """Bytes."""
        return float(bytes_on_disk(candidate))

    def show(self, value: float) -> str:
        """Bytes with thousands."""
        return f"{value:,.0f} bytes"


class LatencyMeter(Meter):
    """Time of one forward pass in torch on one thread, measured in turns with the original.

    Measurements are noisy. The search takes `ROUNDS` rounds for each; what it finds is measured again with `CAREFUL`
    rounds, and where that is above the limit, more blocks go until it is not.

    Args:
        groups: of the network that is cut.
        limit: a fraction of the original's time, or milliseconds.
        reference: the original.
        inputs: a batch to time.
        absolute: whether the limit is in milliseconds.
    """

    name = "latency"
    predictor = "macs"
    slack = 0.05
    most = 8

    def __init__(self, groups: Groups, limit: float, reference: Graph, inputs: Inputs, *, absolute: bool) -> None:
        super().__init__(groups, limit, 1.0)
        self.reference, self.inputs, self.absolute = reference, inputs, absolute
        self.rounds = ROUNDS
        self.last: Latency | None = None

    def measure(self, candidate: Graph) -> float:
        """Ratio to the original, or milliseconds."""
        found = self.last = latency_ratio(candidate, self.reference, self.inputs, rounds=self.rounds)
        if self.absolute:
            self.original = found.reference_ms
        return found.candidate_ms if self.absolute else found.ratio

    def show(self, value: float) -> str:
        """Milliseconds, or the ratio."""
        return f"{value:.3f} ms" if self.absolute else f"{value:.3f} of the original's time"

    def confirm(self, blocks: Blocks, point: Point) -> int:
        """Measure with care; where that is above the limit after all, go on until it is not."""
        self.rounds, count = CAREFUL, point.blocks
        while True:
            careful = self.found = self._try(blocks, count)
            if careful.value <= self.limit:
                return count
            if count == len(blocks):
                raise BudgetError(self._unmet(careful.value), hint=hint(self.groups))
            longer = self._down_to(blocks, careful.predictor * self._aim / careful.value)
            count = min(max(longer, count + 1), len(blocks))

    def notes(self) -> list[str]:
        """For the report: the last measurement and its spread."""
        spread = (
            f"quartiles {self.last.ratio_low:.3f} to {self.last.ratio_high:.3f} of the original" if self.last else ""
        )
        return [f"{super().notes()[0]} ({spread})"]


def make_meters(budget: Budget, groups: Groups, context: Context) -> list[Meter]:
    """A meter for each metric of a budget that must be measured.

    Raises:
        OptionError: latency is limited, and example inputs are mixed of positional and keyword ones.
    """
    meters: list[Meter] = []
    if budget.size is not None:
        original = float(bytes_on_disk(context.original))
        meters.append(SizeMeter(groups, budget.limit("size", original), original))
    if budget.latency is not None:
        inputs = example_batch(context.original, context.inputs)
        if inputs is None:
            raise OptionError(
                "pass 'prune-channels', option 'budget': latency cannot be timed with positional and keyword inputs",
                hint="Trace the model with inputs of one kind, or limit macs.",
            )
        absolute = isinstance(budget.latency, str)
        limit = budget.limit("latency", 1.0)
        meters.append(LatencyMeter(groups, limit, context.original, inputs, absolute=absolute))
    return meters


def hint(groups: Groups) -> str:
    """What to do about a budget that cannot be met."""
    norms = ", or set norms to refit." if groups.labels.norms == "keep" else "."
    return f"Raise the budget, or lower floor, round_to or ignore{norms}"
