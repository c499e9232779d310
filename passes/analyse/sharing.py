"""Several processes, one result: each looks at its share of every batch, and what they found is put together.

Outside `torchrun` there is one process and all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from ...runtime.training.share import make_accelerator

T = TypeVar("T")


def processes() -> Accelerator:
    """The processes of this run: `process_index`, `num_processes`, `is_main_process`, `reduce`."""
    return make_accelerator()


def shared_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum of each tensor over the processes, the same in all of them; on its own device and in its own dtype.

    Args:
        tensors: as many, of the same shapes, in every process.
    """
    accelerator = processes()
    if accelerator.num_processes == 1:
        return list(tensors)
    return [_reduced(accelerator, tensor) for tensor in tensors]


def shared_list(value: T) -> list[T]:
    """The value of every process, in the order of their numbers; the same list in all of them.

    Args:
        value: anything that can be pickled; it goes to the other processes of this run and nowhere else.
    """
    if processes().num_processes == 1:
        return [value]
    values: list[T] = gather_object([value])
    return values


def first_ones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the first process, in all of them: for what is computed from equal numbers and must not differ.

    Args:
        tensors: as many, of the same shapes and types, in every process.
    """
    accelerator = processes()
    if accelerator.num_processes == 1:
        return list(tensors)
    return [broadcast(tensor.contiguous().to(accelerator.device)).to(tensor.device) for tensor in tensors]


def _reduced(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    # without clone, reduce would add in place on one process's tensor
    total: Any = accelerator.reduce(tensor.detach().clone().to(accelerator.device), reduction="sum")
    result: Tensor = total.to(tensor.device)
    return result


def share(tensor: Tensor, rank: int, world: int) -> Tensor:
    """This process's images of a batch: every `world`-th from `rank` on."""
    return tensor if world == 1 else tensor[rank::world]
