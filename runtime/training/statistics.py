"""Statistics of batch norms, estimated anew."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Data
from ..forward import call, device_of, modes_restored
from .batch_norms import shared_statistics
from .seeds import seeded
from .share import make_accelerator, shared_batches


@torch.no_grad()
def reestimate_norms(module: nn.Module, data: Data, batches: int, *, seed: int = 0) -> int:
    """Replace the running statistics of all batch norms by plain means over batches of `data.train`.

    While a network is trained and cut they are moving means of what it has been. Each batch is normalised by itself, as
    in training; everything else is in evaluation mode. Under `torchrun` each process takes its share of every batch,
    and the statistics are those of the whole batch.

    Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.1.

    Args:
        module: its batch norms that keep running statistics are changed; without any, no data is read.
        data: `train` is read.
        batches: at most so many; none at all changes nothing.
        seed: fixes augmentation.

    Returns:
        How many batches were used.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms or batches == 0:
        return 0
    accelerator, device, used = make_accelerator(), device_of(module), 0
    loader = data.need("train", who="statistics of batch norms")
    momenta = [norm.momentum for norm in norms]
    with seeded(seed), modes_restored(module):
        module.to(accelerator.device).eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
        with shared_statistics(accelerator, module):
            for inputs, _ in islice(shared_batches(accelerator, loader, 0), batches):
                call(module, inputs)
                used += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.to(device)
    return used
