"""The callback that lets channels select themselves while a network trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ....runtime.training.callbacks import Callback
from ....runtime.training.results import EpochResult
from ..selection import BoolArray, FloatArray
from .masks import ClassMasks
from .schedule import Schedule
from .threshold import Choice, savings, select, within

MEMORY = 0.99
"""Decay per step of the mean of squared influences."""
TAU_MAX = 0.1
"""τ of `threshold: median`, as a share of the median importance."""


@dataclass(frozen=True)
class Rules:
    """What decides.

    Args:
        limits: metric → what may remain in the end.
        score: `saliency` or `magnitude`, see `SelectChannels`.
        threshold: `budget` or `median`.
        hard: cut once, at the end of the free phase, and for good.
        sparsity: how far the factor of a channel of mean saving would shrink over the ramp by λ alone.
        lr_scale: learning rate of the masks over that of the weights.
        round_to, floor: of the widths in the end; before, only `floor` counts.
        stable: epochs without a change after which the run ends; None for never.
    """

    limits: dict[str, float]
    score: Literal["saliency", "magnitude"] = "saliency"
    threshold: Literal["budget", "median"] = "budget"
    hard: bool = False
    sparsity: float = 0.5
    lr_scale: float = 1.0
    round_to: int = 1
    floor: int = 1
    stable: int | None = 5


@dataclass
class Selector(Callback):
    """Watches the masks' gradients, shrinks the masks, moves the threshold, and stops when all is settled.

    Every number that it decides by is the same in all processes: factors and averaged gradients are.
    """

    masks: ClassMasks
    rules: Rules
    schedule: Schedule
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = self.masks.groups
        self.whole = groups.cost()
        self.kept: BoolArray = self.masks.kept()
        self.weights = savings(self.masks, self.kept, list(self.rules.limits))
        self.squares: FloatArray = np.zeros(groups.count)
        self.slopes: FloatArray = np.zeros(groups.count)
        self.seen, self.gain, self.lam, self.tau = 0.0, 1.0, 0.0, 0.0
        self.ticks, self.progress, self.settled, self.unchanged = 0, 0.0, False, 0
        self.cut, self.returned, self.moved = 0, 0, False

    # -- hooks ---------------------------------------------------------------------------------------------------

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]]:
        """The masks have a learning rate of their own and no weight decay."""
        del student
        return [{"params": self.masks.parameters, "lr_scale": self.rules.lr_scale, "weight_decay": 0.0}]

    def after_step(self, lr: float, epoch: float) -> None:
        """Note the influences, shrink, and re-evaluate the threshold where that is due."""
        before, self.progress = self.progress, self.schedule.progress(epoch)
        influences = self.masks.influences()
        self.squares = MEMORY * self.squares + (1 - MEMORY) * influences**2
        self.slopes = MEMORY * self.slopes + (1 - MEMORY) * influences
        self.seen = MEMORY * self.seen + 1 - MEMORY
        if self.settled:
            return
        self._shrink(lr * self.rules.lr_scale, self.progress - before)
        self.masks.restrain()
        due = self.schedule.tick(epoch)
        if self.progress >= self.schedule.free and due > self.ticks:
            self.evaluate()
        self.ticks = due

    def after_epoch(self, result: EpochResult) -> bool:
        """Write the history; stop when the choice has not changed for `stable` epochs and the budget is met."""
        del result
        self.unchanged = 0 if self.moved else self.unchanged + 1
        self.history.append(self._record())
        self.cut, self.returned, self.moved = 0, 0, False
        met = within(self.masks.groups, self.kept, self.rules.limits)
        return self.rules.stable is not None and self.unchanged >= self.rules.stable and met

    def finish(self) -> None:
        """Meet the budget and the widths asked for, where the run ended before they were."""
        if not self.settled:
            self.progress = 1.0
            self.evaluate()
            if self.history:
                self.history[-1] |= self._record() | {"cut": self.history[-1]["cut"] + self.cut}

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on; factors and switches are in the network."""
        state = {name: getattr(self, name) for name in self._SCALARS}
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in self._ARRAYS}
        return {**state, **arrays, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run."""
        for name in self._SCALARS:
            setattr(self, name, state[name])
        self.history = list(state["history"])
        for name in self._ARRAYS:
            setattr(self, name, state[name].numpy())
        self.masks.switch(self.kept)
        if self.settled:
            self._settle()

    _ARRAYS = ("squares", "slopes", "kept", "weights")
    _SCALARS = ("seen", "gain", "lam", "tau", "ticks", "progress", "settled", "unchanged", "cut", "returned", "moved")

    # -- decisions -----------------------------------------------------------------------------------------------

    def importance(self) -> FloatArray:
        """Importance of every class, shape (count,): see `SelectChannels`."""
        if self.rules.score == "magnitude":
            return self.masks.magnitudes()
        seen = max(self.seen, 1e-12)
        # of what is off only the part that would lower the loss counts: without it the rest of the network is not at
        # rest, and the mere size of its slopes would bring everything back in turn
        change = np.where(self.kept, np.sqrt(self.squares / seen), np.maximum(-self.slopes / seen, 0))
        importance: FloatArray = change / np.sqrt(np.maximum(self.weights, 1e-12))
        return importance

    def evaluate(self) -> None:
        """Find the threshold for the present limits and switch channels by it."""
        schedule, rules = self.schedule, self.rules
        last = self.progress > 1 - schedule.settle or rules.hard
        tightness = 1.0 if last else schedule.tightness(self.progress)
        limits = {m: limit + (getattr(self.whole, m) - limit) * (1 - tightness) for m, limit in rules.limits.items()}
        choice = self._choose(limits, tightness, last)
        self._switch(choice)
        self._control(limits)
        self.weights = savings(self.masks, self.kept, list(rules.limits))
        if last:
            self._settle()

    def _settle(self) -> None:
        """What is off is off for good: the rest is learned without gradients from it."""
        self.settled = True
        self.masks.harden()

    def _choose(self, limits: dict[str, float], tightness: float, last: bool) -> Choice:
        importance, rules = self.importance(), self.rules
        round_to = rules.round_to if tightness == 1 else 1
        if last or rules.threshold == "budget":
            return select(self.masks, importance, limits, round_to=round_to, floor=rules.floor)
        cap = tightness * TAU_MAX * float(np.median(importance[self.masks.selectable]))
        return select(self.masks, importance, rules.limits, cap=cap, round_to=round_to, floor=rules.floor)

    def _switch(self, choice: Choice) -> None:
        selectable = self.masks.selectable
        cut = int((self.kept & ~choice.kept & selectable).sum())
        returned = int((~self.kept & choice.kept & selectable).sum())
        self.cut, self.returned = self.cut + cut, self.returned + returned
        self.moved = self.moved or cut + returned > 0
        self.kept, self.tau = choice.kept, choice.tau
        self.masks.switch(choice.kept)

    def _control(self, limits: dict[str, float]) -> None:
        """The budget's hold on λ.

        `budget`: the threshold meets the limits, and λ only prepares what goes next: it falls in proportion to what is
        left to cut, `gain = log(M / b) / log(M₀ / b)`, and is 0 at the budget. `median`: only λ brings the cost down;
        it is multiplied by the ratio of the present cost to the present limit, squared, between a half and two.
        """
        size, ends = self.masks.groups.cost(self.kept), self.rules.limits
        left = max(np.log(max(getattr(size, m), 1.0) / end) for m, end in ends.items())
        if self.rules.threshold == "budget" or left <= 0:
            whole = max(np.log(getattr(self.whole, m) / end) for m, end in ends.items())
            self.gain = float(np.clip(left / max(whole, 1e-9), 0.0, 1.0))
            return
        excess = max(np.log(max(getattr(size, m), 1.0) / limit) for m, limit in limits.items())
        self.gain = max(self.gain, 1e-3) * float(np.clip(np.exp(2 * excess), 0.5, 2.0))

    def _shrink(self, lr: float, share: float) -> None:
        """The proximal step; at gain 1, λ is such that a channel of mean saving shrinks by `sparsity` over the ramp.

        What is off is spared, as a factor of 0 would keep its layers from learning; with `magnitude` it is not, or what
        is off would return because the rest has shrunk.
        """
        if lr <= 0 or self.rules.sparsity == 0:
            return
        self.lam = self.gain * self.rules.sparsity * share / (self.schedule.ramp * lr)
        shrinking = self.kept | (self.rules.score == "magnitude")
        self.masks.shrink(lr * self.lam * self.weights * shrinking)

    def _record(self) -> dict[str, float]:
        size, on = self.masks.groups.cost(self.kept), self.kept & self.masks.selectable
        return {
            "epoch": self.progress * self.schedule.epochs,
            "macs": size.macs / max(self.whole.macs, 1.0),
            "params": size.params / max(self.whole.params, 1.0),
            "channels": int(on.sum()),
            "cut": self.cut,
            "returned": self.returned,
            "tau": self.tau,
            "lam": self.lam,
        }
