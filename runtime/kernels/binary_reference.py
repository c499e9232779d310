"""What the binary kernels compute, in plain torch: the same integers, the same roundings.

The level of a value is how many of the thresholds it exceeds, 0 to 3; where the thresholds of a channel descend, how
many of them it stays below. Weights are +1 and -1. A sum is an integer, and

    y[o] = relu?(scale[o] sum + bias[o] + relu?(residual))   (float32: each operation rounded, from left to right)
    level[o] = how many of cuts[0, o], cuts[1, o], cuts[2, o] the sum reaches (is at least)

NaN exceeds no threshold and stays below none: it counts as level 0. Infinite values are levels like others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ...ir.errors import KernelError
from . import binary_layout as layouts
from .binary_call import Call, Epilogue


def compute(call: Call) -> Tensor:
    """y of any of the operators."""
    dim = -1 if call.linear else 1
    sums = _sums(call, dim)
    if isinstance(call.end, Epilogue):
        return _ended(sums, call.end, dim)
    reached = [(sums >= _along(row, sums, dim)).to(torch.uint8) for row in call.end]
    return reached[0] + reached[1] + reached[2]


def levels_of(x: Tensor, thresholds: Tensor | None, dim: int) -> Tensor:
    """The levels of x as uint8 of its shape; those of uint8 are its two low bits.

    Args:
        x: float32 or uint8.
        thresholds: (n,) or (n, C); not used for uint8.
        dim: of x where the channels are.

    Raises:
        KernelError: thresholds that do not ascend (nor descend, where each channel has its own).
    """
    if x.dtype == torch.uint8 or thresholds is None:
        return x & 3
    edges = thresholds if thresholds.dim() == 2 else thresholds[:, None]
    flip = torch.where((edges[0] > edges[-1]) & (thresholds.dim() == 2), -1.0, 1.0)
    edges = edges * flip
    if not bool((edges[1:] >= edges[:-1]).all()) or bool(edges.isnan().any()):
        raise KernelError(
            "Thresholds of a binary layer must ascend (or descend, where each channel has its own): "
            f"they begin with {thresholds.flatten()[:3].tolist()}"
        )
    x = x * _along(flip, x, dim)
    return sum(((x > _along(row, x, dim)).to(torch.uint8) for row in edges), torch.zeros((), dtype=torch.uint8))


def _sums(call: Call, dim: int) -> Tensor:
    """Whole numbers as float64, of the shape of y."""
    header, plus = layouts.unpack(call.layout)
    weight, of = plus.double() * 2 - 1, call.window
    if (header.outputs, header.channels * header.groups) != (of.outputs, call.channels):
        raise KernelError(f"{header} was given to a layer of {of.outputs} outputs and {call.channels} channels")
    levels = levels_of(call.x, call.thresholds, dim).double()
    if call.linear:
        return F.linear(levels, weight[:, :, 0, 0])
    return F.conv2d(levels, weight, None, list(of.stride), list(of.padding), list(of.dilation), of.groups)


def _ended(sums: Tensor, end: Epilogue, dim: int) -> Tensor:
    y = sums.float() * _along(end.scale, sums, dim)
    if end.bias is not None:
        y = y + _along(end.bias, sums, dim)
    if end.residual is not None:
        y = y + (end.residual.relu() if end.residual_relu else end.residual)
    return y.relu() if end.relu else y


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """`values` in dimension `dim` of a tensor of as many dimensions as `like`; a single one serves all."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.view(shape)
