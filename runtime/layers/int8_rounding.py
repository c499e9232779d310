"""Numbers of 8 bits: one grid for the weights of each output, one for what a layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.int8_grid import BYTES, usable
from ..kernels.int8_grid import input_grid as input_grid

LARGEST = 127
"""Weights are whole numbers from -127 to 127: symmetric, so that they need no zero point."""


class _Round(torch.autograd.Function):
    """Nearest whole number, halves to even; the gradient passes straight through (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0]


def rounded(x: Tensor) -> Tensor:
    """Nearest whole numbers, with a gradient of one."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _Round.apply(x)
        return y
    return x.round()


def weight_steps(weight: Tensor) -> Tensor:
    """Step of the grid of each output, (out,): the largest |w| becomes 127; 1 where all are zero, or nearly."""
    if weight.is_meta:  # there are no numbers; asking torch for them all the same would import its compiler
        return weight.new_empty(len(weight))
    return usable(weight.detach().flatten(1).abs().amax(1) / LARGEST)


def weight_numbers(weight: Tensor, steps: Tensor) -> Tensor:
    """Whole numbers from -127 to 127 in the dtype of the weight (out, ...), differentiable in it."""
    return rounded(weight / _per_output(steps, weight)).clamp(-LARGEST, LARGEST)


def weight_values(weight: Tensor, steps: Tensor) -> Tensor:
    """The weights that a layer computes with: whole numbers times the step of their output."""
    return weight_numbers(weight, steps) * _per_output(steps, weight)


def input_values(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """The inputs that a layer computes with; NaN counts as 0, what is beyond the span as its nearest end.

    The gradient is 1 within the span and 0 outside.
    """
    steps = torch.minimum(torch.maximum(rounded(x * step.reciprocal()), -zero), BYTES - zero)
    return torch.where(steps.isnan(), torch.zeros_like(steps), steps) * step


def _per_output(steps: Tensor, weight: Tensor) -> Tensor:
    return steps.view(-1, *[1] * (weight.dim() - 1))
