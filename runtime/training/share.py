"""Several processes, one run: each learns from its share of every batch, and all hold the same network.

Under `torchrun --nproc-per-node=N` the global batch is what the loader gives, not N times that, so settings mean the
same with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from ..data import Batch, Loader
from ..evaluate import Evaluation, evaluate_batches
from ..forward import to_device
from .ema import MovingAverage
from .feed import make_feed


def make_accelerator() -> Accelerator:
    """The processes of this run; the precision is left to autocast, as accelerate fixes it once per process."""
    # without being told that it is to use the CPU, accelerate would let each process of torchrun train on its own
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu)


def shared_batches(accelerator: Accelerator, loader: Loader, epoch: int, *, seed: int = 0) -> Iterator[Batch]:
    """Checked batches of one epoch on this process's device, each cut to this process's share."""
    feed = make_feed(loader, seed, accelerator.process_index, accelerator.num_processes)
    for inputs, targets in feed.epoch(epoch):
        yield to_device(inputs, accelerator.device), targets.to(accelerator.device)


def mean(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Mean of a tensor over the processes."""
    if accelerator.num_processes == 1:
        return value
    result: Tensor = accelerator.reduce(value, reduction="mean")
    return result


def sum_of(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    if accelerator.num_processes == 1:
        return value
    result: Tensor = accelerator.reduce(value, reduction="sum")
    return result


def agree(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process wishes it."""
    return bool(sum_of(accelerator, torch.tensor(float(wish), device=accelerator.device)) > 0)


def agree_on_buffers(accelerator: Accelerator, module: nn.Module, ema: MovingAverage | None) -> None:
    """Give every process the buffers of the first: batch statistics differ, gradients were averaged already."""
    if accelerator.num_processes > 1:
        for name, buffer in module.named_buffers():
            buffer.copy_(broadcast(buffer))
            if ema is not None and name in ema.average:
                ema.average[name].copy_(broadcast(ema.average[name]))


def evaluate_shared(accelerator: Accelerator, module: nn.Module, loader: Loader) -> Evaluation:
    """`evaluate` with the images of each batch dealt out to the processes; the same result in all."""
    rank, world = accelerator.process_index, accelerator.num_processes
    parts = list(evaluate_batches(module, loader, rank=rank, world=world))
    table = [[part.images, part.targets, part.correct, part.loss_sum] for part in parts] or [[0, 0, 0, 0.0]]
    total = sum_of(accelerator, torch.tensor(table, dtype=torch.float64).sum(0).to(accelerator.device))
    images, targets, correct, loss_sum = total.tolist()
    return Evaluation(int(images), int(targets), int(correct), loss_sum)
