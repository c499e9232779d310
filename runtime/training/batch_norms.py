"""Batch norms that normalise by the whole batch, although each process holds only its share of it.

With them, N processes compute what one computes on the same batches. (`torch.nn.SyncBatchNorm` does this on GPUs and
refuses CPU tensors.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def shared_statistics(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Inside, batch norms of `module` in training mode take mean and variance over the images of all processes.

    Every process has to run them alike. With one process nothing changes.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    norms = norms if accelerator.num_processes > 1 else []
    for layer in norms:
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in norms:
            del layer.forward


def _forward(layer: _BatchNorm, x: Tensor) -> Tensor:
    """y = γ (x − μ) / √(σ² + ε) + β with μ and σ² (C,) over all positions of all processes; x `(N, C, *space)`.

    The reductions are differentiable: a process's input also moves the outputs of the others.
    """
    if not (layer.training or layer.running_mean is None):
        y: Tensor = type(layer).forward(layer, x)
        return y
    others = [d for d in range(x.dim()) if d != 1]
    precise, shape = x if x.dtype == torch.float64 else x.float(), [-1 if d == 1 else 1 for d in range(x.dim())]
    count = _total(torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device))
    mean = _total(precise.sum(others, dtype=torch.float64)) / count
    centred = precise - mean.to(precise).reshape(shape)
    variance = _total(centred.square().sum(others, dtype=torch.float64)) / count
    _remember(layer, mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
    y = centred * torch.rsqrt(variance + layer.eps).to(precise).reshape(shape)
    if layer.affine:
        y = y * layer.weight.to(precise).reshape(shape) + layer.bias.to(precise).reshape(shape)
    return y.to(x.dtype)


def _total(value: Tensor) -> Tensor:
    """Sum over the processes, with its gradient."""
    total: Tensor = all_reduce(value)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def _remember(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as `nn.BatchNorm2d` does: by `momentum`, or as a cumulative mean where it is None."""
    if layer.running_mean is None or layer.running_var is None or not layer.training:
        return
    share = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        share = 1.0 / int(layer.num_batches_tracked) if share is None else share
    layer.running_mean.lerp_(mean.to(layer.running_mean), share or 0.0)
    layer.running_var.lerp_(variance.to(layer.running_var), share or 0.0)
