"""An exponential moving average of a network's state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """θ̄ ← d θ̄ + (1 − d) θ after each optimiser step, with d = min(decay, (1 + t) / (10 + t)) at step t.

    The second bound lets a short run forget its first steps (as in TensorFlow's ExponentialMovingAverage). Parameters
    and floating buffers (batch statistics) are averaged, other buffers are taken as they are.

    Args:
        module: the network to follow.
        decay: 0-1, such as 0.999.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.average = snapshot(module)

    @torch.no_grad()
    def update(self) -> None:
        """Take one step into account."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the average inside the block, and what it held before on leaving."""
        before = snapshot(self.module)
        self.module.load_state_dict(self.average)
        try:
            yield
        finally:
            self.module.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        """The average and its age."""
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.steps = state["steps"]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
