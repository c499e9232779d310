"""Mixup and CutMix: images of a batch are mixed, and their targets become probabilities."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ir.errors import OptionError
from ..data import Batch
from .settings import TrainSettings


class Mixing:
    """torchvision's MixUp and CutMix as the settings want them.

    x' = λ x + (1 − λ) x̃ with the batch shifted by one image as x̃, or a rectangle of x̃ with a share 1 − λ of the area;
    y' = λ onehot(y) + (1 − λ) onehot(ỹ), λ from Beta(α, α).

    Args:
        settings: with `mixup` and `cutmix`.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.alphas = {"MixUp": settings.mixup, "CutMix": settings.cutmix}
        self._transform: Any = None

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return any(self.alphas.values())

    def build(self, classes: int) -> None:
        """Get to know how long a target is."""
        from torchvision.transforms import v2

        kinds = [getattr(v2, name)(alpha=alpha, num_classes=classes) for name, alpha in self.alphas.items() if alpha]
        self._transform = v2.RandomChoice(kinds) if len(kinds) > 1 else kinds[0]

    @property
    def built(self) -> bool:
        """Whether `build` was called."""
        return self._transform is not None

    def __call__(self, batch: Batch, where: str) -> tuple[Tensor, Tensor]:
        """Images `(N, C, H, W)` and targets `(N,)` → images of the same shape and targets `(N, classes)`.

        Raises:
            OptionError: inputs or targets of another form.
        """
        inputs, targets = batch
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point() or targets.ndim != 1:
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise OptionError(
                f"mixup and cutmix need images (N, C, H, W) with one target each; {where} has inputs {shape} "
                f"and targets {tuple(targets.shape)}",
                hint="Leave mixup and cutmix out.",
            )
        mixed: tuple[Tensor, Tensor] = self._transform(inputs, targets)
        return mixed


def hard_targets(targets: Tensor) -> Tensor:
    """Class indices: as they are, or of each distribution `(N, classes, ...)` the class with the largest share."""
    return targets.argmax(1) if targets.is_floating_point() else targets
