"""Whether a change did any good: a loss on images that it was not made from; and loaders that give parts of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...ir.errors import DataError
from ...runtime.data import Batch, Data, Inputs, Loader, images_in
from ...runtime.forward import call, device_of, modes_restored, to_device
from ...runtime.training.share import evaluate_shared, make_accelerator
from ..analyse.sharing import share, shared_sum
from ..analyse.streaming import limited, limited_batches

EVERY = 5


@dataclass(frozen=True)
class Part:
    """A loader's batches up to so many images; of these, all, or those that are (not) held out: every fifth."""

    loader: Loader
    images: int
    held: bool | None = None
    name: str = "calibration"

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(limited_batches(self.loader, self.name, self.images)):
            if self.held is None or self.held == (index % EVERY == 1):
                yield batch


@dataclass(frozen=True)
class First:
    """The first batches of a loader, anew each time."""

    loader: Loader
    batches: int

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.loader), self.batches)

    def __len__(self) -> int:
        return self.batches


class Judge:
    """The loss by which changes are kept: cross entropy on `data.val`, or else, on every fifth batch of
    `data.calibration`, which is then not learned from, KL(teacher ‖ network).

    Args:
        data: validation or calibration images.
        images: at most so many of them.
        teacher: what outputs are held against without targets.

    Attributes:
        name: what the loss is.
        learned: what may be learned from, in so many `batches`.

    Raises:
        DataError: there are not two batches of calibration images and none for validation.
    """

    def __init__(self, data: Data, images: int, teacher: nn.Module, who: str) -> None:
        calibration, val = data.need("calibration", who=who), data.val
        self.teacher, self.validated = teacher, data.val is not None
        self.name = "validation loss" if self.validated else "divergence from the teacher on held-out images"
        self.learned = Part(calibration, images, None if self.validated else False)
        self._judged = Part(calibration, images, True) if val is None else Part(val, images, name="val")
        if not self.validated and next(iter(self._judged), None) is None:
            raise DataError(
                f"{who} keeps only what helps on held-out images, and calibration is a single batch",
                hint="Give Data(val=...), or calibration images in several batches.",
            )
        self.batches = sum(1 for _ in self.learned)

    def loss(self, network: nn.Module) -> float:
        """In nats; the same in all processes."""
        if self.validated:
            return evaluate_shared(make_accelerator(), network, self._judged).loss
        sums = torch.zeros(2, dtype=torch.float64)
        accelerator = make_accelerator()
        for inputs in limited(self._judged, "calibration", None):
            if images_in(inputs) > accelerator.process_index:
                sums += self._divergence(network, inputs, accelerator.process_index, accelerator.num_processes)
        (total,) = shared_sum([sums])
        return float(total[0] / total[1].clamp(min=1))

    @torch.no_grad()
    def _divergence(self, network: nn.Module, inputs: Inputs, rank: int, world: int) -> torch.Tensor:
        """Sum over images, and their number."""
        found = []
        mine = pytree.tree_map(lambda tensor: share(tensor, rank, world), inputs)
        for module in (self.teacher, network):
            with modes_restored(module):
                module.eval()
                found.append(call(module, to_device(mine, device_of(module))).double().log_softmax(1).cpu())
        gap = (found[0].exp() * (found[0] - found[1])).sum(1)
        return torch.tensor([float(gap.sum()), gap.numel()], dtype=torch.float64)
