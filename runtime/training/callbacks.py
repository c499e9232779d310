"""What may be hooked into a training run: parameter groups of its own, and calls before, in and after an epoch."""

from __future__ import annotations

from typing import Any

from torch import nn

from .results import EpochResult


class Callback:
    """Base of all callbacks; every method does nothing until it is overridden.

    Under `torchrun` every process makes the same calls with the same numbers.
    """

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]]:
        """Groups of the optimiser for parameters that are to be treated on their own.

        Each holds `params`, and may fix `weight_decay` (0 if it does not) and `lr_scale`: its learning rate is the
        schedule's times that (1 if it does not). The parameters are taken out of the ordinary groups.
        """
        del student
        return []

    def before_epoch(self, epoch: int) -> None:
        """Epoch number `epoch`, from 0, begins; not called again where a resumed run takes one up in the middle."""

    def after_step(self, lr: float, epoch: float) -> None:
        """The optimiser has stepped.

        Args:
            lr: learning rate of the schedule at this step.
            epoch: where in the run it was, e.g. 1.5 for the middle of the second epoch.
        """

    def after_epoch(self, result: EpochResult) -> bool:
        """An epoch is finished and evaluated; True ends the run, and the student keeps what it would keep then."""
        del result
        return False

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors, numbers, texts, and lists, tuples and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
