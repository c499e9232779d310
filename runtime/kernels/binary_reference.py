"""What the binary kernels compute, in plain torch: the same integers, the same two roundings.

The level of a value is how many of the thresholds it exceeds, 0 to 3. Weights are +1 and -1. A sum is an integer, and

    y[o] = scale[o] sum[o] + bias[o]                    (float32: a product, then an addition, each rounded)
    level[o] = how many of cuts[0, o], cuts[1, o], cuts[2, o] the sum reaches (is at least)

NaN exceeds no threshold: it counts as level 0. Infinite values are levels like others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from . import binary_layout as layouts


def levels_of(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The levels of x as uint8 of its shape; those of uint8 are its two low bits."""
    if x.dtype == torch.uint8:
        return x & 3
    level = torch.zeros_like(x, dtype=torch.uint8)
    for threshold in thresholds:
        level += x > torch.tensor(threshold, dtype=torch.float32)
    return level


def sums_conv2d(
    x: Tensor, layout: Tensor, thresholds: Sequence[float], stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """Whole numbers as float64 (N, out, Ho, Wo)."""
    _, plus = layouts.unpack(layout)
    weight = plus.double() * 2 - 1
    return F.conv2d(levels_of(x, thresholds).double(), weight, None, stride, padding, dilation, groups)


def sums_linear(x: Tensor, layout: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Whole numbers as float64 (…, out)."""
    _, plus = layouts.unpack(layout)
    return F.linear(levels_of(x, thresholds).double(), plus[:, :, 0, 0].double() * 2 - 1)


def scaled(sums: Tensor, scale: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """y as float32; `dim` is where the outputs are."""
    y = sums.float() * _along(scale, sums, dim)
    return y if bias is None else y + _along(bias, sums, dim)


def cut(sums: Tensor, cuts: Tensor, dim: int) -> Tensor:
    """Levels as uint8."""
    return sum(((sums >= _along(row, sums, dim)).to(torch.uint8) for row in cuts), torch.zeros((), dtype=torch.uint8))


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.view(shape)
