"""Several processes, one run: each learns from its share of every batch, and all hold the same network.

Under `torchrun --nproc-per-node=N` the global batch is what the loader gives, not N times that, so settings mean the
same with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...ir.errors import DataError
from ..data import Batch, Inputs, Loader, checked_batches, images_in
from ..evaluate import Evaluation, evaluate_batches
from ..forward import to_device


def make_accelerator() -> Accelerator:
    """The processes of this run; the precision is left to autocast, as accelerate fixes it once per process."""
    # without being told that it is to use the CPU, accelerate would let each process of torchrun train on its own
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, dataloader_config=DataLoaderConfiguration(split_batches=True))


def share_loader(accelerator: Accelerator, loader: Loader) -> Loader:
    """A `DataLoader` that reads only this process's share of each batch; any other iterable as it is.

    Raises:
        DataError: the batch size is no multiple of the number of processes.
    """
    if accelerator.num_processes == 1 or not isinstance(loader, DataLoader):
        return loader
    try:
        shared: Loader = accelerator.prepare_data_loader(loader)
    except ValueError as error:
        raise DataError(
            f"batches of {loader.batch_size} cannot be shared by {accelerator.num_processes} processes",
            hint="Take a batch size that is a multiple of the number of processes.",
        ) from error
    return shared


def shared_batches(accelerator: Accelerator, loader: Loader, epoch: int) -> Iterator[Batch]:
    """Checked batches of one epoch on this process's device, each cut to this process's share."""
    whole = not isinstance(loader, DataLoader) and accelerator.num_processes > 1
    for inputs, targets in checked_batches(loader, "train", epoch=epoch):
        index = _share(images_in(inputs), accelerator) if whole else None
        yield to_device(_pick(inputs, index), accelerator.device), _one(targets, index).to(accelerator.device)


def mean(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Mean of a tensor over the processes."""
    if accelerator.num_processes == 1:
        return value
    result: Tensor = accelerator.reduce(value, reduction="mean")
    return result


def agree_on_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Give every process the buffers of the first: batch statistics differ, gradients were averaged already."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            buffer.copy_(broadcast(buffer))


def evaluate_shared(accelerator: Accelerator, module: nn.Module, loader: Loader) -> Evaluation:
    """`evaluate` with the images of each batch dealt out to the processes; the same result in all."""
    rank, world = accelerator.process_index, accelerator.num_processes
    parts = list(evaluate_batches(module, loader, rank=rank, world=world))
    table = [[part.images, part.targets, part.correct, part.loss_sum] for part in parts] or [[0, 0, 0, 0.0]]
    total = torch.tensor(table, dtype=torch.float64).sum(0)
    if world > 1:
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
    images, targets, correct, loss_sum = total.tolist()
    return Evaluation(int(images), int(targets), int(correct), loss_sum)


def _share(images: int, accelerator: Accelerator) -> Tensor:
    """Indices of this process's images; every process gets as many, a remainder is filled up from the start."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return torch.arange(rank, -(-images // world) * world, world) % images


def _pick(inputs: Inputs, index: Tensor | None) -> Inputs:
    if isinstance(inputs, dict):
        return {name: _one(tensor, index) for name, tensor in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_one(tensor, index) for tensor in inputs)
    return _one(inputs, index)


def _one(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor[index]
