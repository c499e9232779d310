"""Calling a network on a batch: inputs of any form, outputs to class scores, modes that come back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import DataError, ModelError
from .data.batches import Inputs


def forward(module: nn.Module, inputs: Inputs, where: str) -> Tensor:
    """Class scores `(N, classes, *space)` of a batch.

    Args:
        module: called with the tensor, the tuple as positional or the dict as keyword arguments.
        inputs: the batch.
        where: what to call the batch in an error.

    Raises:
        DataError: the network cannot take inputs of these shapes.
        ModelError: its output holds no class scores.
    """
    return class_scores(forward_any(module, inputs, where))


def forward_any(module: nn.Module, inputs: Inputs, where: str) -> Any:
    """The network's own output on a batch, whatever it is; arguments and `DataError` as for `forward`."""
    try:
        return call(module, inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = ", ".join(map(str, _shapes(inputs)))
        raise DataError(
            f"the network cannot take {where} (inputs {shapes}): {_first_line(error)}",
            hint="Compare with the example inputs that it was traced with.",
        ) from error


def call(module: nn.Module, inputs: Inputs) -> Any:
    """The network's own output on a batch."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


def class_scores(output: Any) -> Tensor:
    """The scores among a network's outputs: the tensor, the first of a tuple, `logits` or `out` of a dict.

    Raises:
        ModelError: there is no such tensor.
    """
    found = output
    if isinstance(output, dict):
        found = next((output[key] for key in ("logits", "out") if key in output), next(iter(output.values()), None))
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise ModelError(
            f"the network's output ({type(output).__name__}) holds no class scores (N, classes, ...)",
            hint="Accuracy and training need a classifier whose (first) output is such a tensor.",
        )
    return found


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The same inputs on a device."""
    if isinstance(inputs, dict):
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(tensor.to(device) for tensor in inputs)
    return inputs.to(device)


def device_of(module: nn.Module) -> torch.device:
    """Where the network's first tensor lies; the CPU if it has none."""
    first = next(iter(module.parameters()), next(iter(module.buffers()), None))
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def modes_restored(*modules: nn.Module) -> Iterator[None]:
    """Whatever `train()` and `eval()` do inside, every layer is in the mode of before on leaving."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


def _shapes(inputs: Inputs) -> list[tuple[int, ...]]:
    tensors = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    return [tuple(tensor.shape) for tensor in tensors]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
