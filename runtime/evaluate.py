"""Accuracy and loss of a network on a loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ..ir.errors import ModelError
from ..ir.graph import Graph
from .data import Inputs, Loader, check_targets, checked_batches, images_in
from .forward import device_of, forward, modes_restored, to_device


@dataclass(frozen=True)
class Evaluation:
    """How well a network does on a loader.

    Args:
        images: how many were looked at.
        targets: how many predictions were counted: one per image, or one per pixel where targets are maps.
        correct: how many of them were right (top-1).
        loss_sum: sum of their cross entropies in nats.
    """

    images: int
    targets: int
    correct: int
    loss_sum: float

    @property
    def accuracy(self) -> float:
        """Share of right predictions, 0-1."""
        return self.correct / self.targets

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats."""
        return self.loss_sum / self.targets


def evaluate(network: nn.Module | Graph, loader: Loader, *, name: str = "val") -> Evaluation:
    """Top-1 accuracy and cross entropy of a network in eval mode; its modes come back as they were.

    Args:
        network: gives class scores `(N, classes, *space)`.
        loader: iterable of `(inputs, targets)`, see `Data`.
        name: what to call the loader in an error.

    Raises:
        DataError: an empty loader or a bad batch.
        ModelError: outputs that are NaN or infinite.
    """
    total = Evaluation(0, 0, 0, 0.0)
    for part in evaluate_batches(network, loader, name=name):
        total = add(total, part)
    return total


def evaluate_batches(
    network: nn.Module | Graph, loader: Loader, *, name: str = "val", rank: int = 0, world: int = 1
) -> Iterator[Evaluation]:
    """`evaluate` batch by batch; of each batch only every `world`-th image from `rank` on."""
    module = network.module if isinstance(network, Graph) else network
    device = device_of(module)
    with modes_restored(module):
        module.eval()
        for index, (inputs, targets) in enumerate(checked_batches(loader, name)):
            share = slice(rank, None, world)
            if images_in(inputs) > rank:
                where = f"batch {index} of {name}"
                yield _evaluate_batch(module, _take(inputs, share, device), targets[share].to(device), where)


def add(one: Evaluation, two: Evaluation) -> Evaluation:
    """Both together."""
    return Evaluation(
        one.images + two.images, one.targets + two.targets, one.correct + two.correct, one.loss_sum + two.loss_sum
    )


def accuracy(network: nn.Module | Graph, loader: Loader) -> float:
    """Top-1 accuracy, 0-1; see `evaluate`."""
    return evaluate(network, loader).accuracy


def _take(inputs: Inputs, share: slice, device: torch.device) -> Inputs:
    if isinstance(inputs, dict):
        return to_device({name: tensor[share] for name, tensor in inputs.items()}, device)
    if isinstance(inputs, (tuple, list)):
        return to_device(tuple(tensor[share] for tensor in inputs), device)
    return to_device(inputs[share], device)


@torch.no_grad()
def _evaluate_batch(module: nn.Module, inputs: Inputs, targets: torch.Tensor, where: str) -> Evaluation:
    outputs = forward(module, inputs, where).float()
    check_targets(targets, outputs, where)
    if not bool(torch.isfinite(outputs).all()):
        raise ModelError(f"the network's outputs on {where} are NaN or infinite", hint="Look for NaN in its weights.")
    correct = int((outputs.argmax(1) == targets).sum())
    loss = float(functional.cross_entropy(outputs, targets, reduction="sum"))
    return Evaluation(len(targets), targets.numel(), correct, loss)
