"""Recording the statistics of filters while a network trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...ir.errors import OptionError
from ...runtime.training.callbacks import Callback
from ...runtime.training.results import EpochResult
from .over_time import TimeStatistics
from .weights import filters_of


class WeightRecorder(Callback):
    """Looks at all filters after each epoch; a checkpoint of `over_time.TimeStatistics` each, and none is kept.

    Args:
        network: what is trained, in place.
        skip: how many epochs at the beginning are not looked at.

    Attributes:
        statistics: what was found so far.

    Raises:
        OptionError: a network without a convolution or linear layer.
    """

    def __init__(self, network: nn.Module, skip: int = 0) -> None:
        if not filters_of(network):
            raise OptionError("the network has no convolution or linear layer whose weights could be recorded")
        self.network, self.skip = network, skip
        self.statistics, self.epochs = TimeStatistics(), 0

    def after_epoch(self, result: EpochResult) -> bool:
        """Look at the weights as they are now."""
        del result
        self.epochs += 1
        if self.epochs > self.skip:
            self.statistics.add(filters_of(self.network))
        return False

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {"epochs": self.epochs, "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from these sums."""
        self.epochs = state["epochs"]
        self.statistics = TimeStatistics.from_state(state["statistics"])
