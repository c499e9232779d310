"""What the 8-bit kernels compute, in plain torch: the same integers, the same roundings; and how weights lie.

    q = min(max(round(x · inverse), -zero), 255 - zero) + zero          bytes; halves to even, NaN counts as 0
    y[o] = relu?(scale[o] (Σ q w[o] + offset[o]) + bias[o])      offset[o] = -zero Σ w[o]; zero padding is q = zero
    max pool: the largest y of a window, found by the largest sum, or the least where scale[o] is negative

Where images have their own grids (`inverse` 0, `zero` 1), each one's step and zero are those of `input_grid` for its
finite numbers: `inverse` is 1 / step, the offset is taken times zero, the scale times step.

Sums are exact integers of 32 bits, and float32 operations are rounded one by one, from left to right.

Weights lie as [output / 16][segment][dword][16][4] bytes: four bytes of input meet 16 outputs. A segment is what lies
side by side in a channels-last image: the kw · C bytes of a row of the kernel, or, where that is dilated, the C of a
tap; filled up with zeros to whole dwords.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ...ir.errors import KernelError
from .int8_grid import input_grid
from .window import Window

if TYPE_CHECKING:
    from .int8_ops import Numbers

LANES = 16


def prepare_int8(weight: Tensor, zero: int, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """Weights as the kernels read them, 1-D int8, and their offset, int32 (out,).

    Args:
        weight: int8 (out, in) or (out, in, kh, kw), of a convolution of one group.
        zero: byte that 0 becomes in the inputs.
        dilation: of the convolution along the width.

    Raises:
        KernelError: weights of another type or shape.
    """
    if weight.dtype != torch.int8 or weight.dim() not in (2, 4) or not weight.numel():
        raise KernelError(
            f"8-bit weights are int8 (out, in) or (out, in, kh, kw), not {weight.dtype} {tuple(weight.shape)}"
        )
    offset = -zero * weight.flatten(1).sum(1, dtype=torch.int64)
    return _segments(weight, dilation), offset.to(torch.int32)


def _segments(weight: Tensor, dilation: int) -> Tensor:
    taps = weight[:, None, None] if weight.dim() == 2 else weight.permute(0, 2, 3, 1)  # (out, kh, kw, in)
    apart = dilation > 1 and taps.shape[2] > 1
    runs = taps.flatten(1, 2) if apart else taps.flatten(2, 3)  # (out, segment, bytes)
    runs = F.pad(runs, (0, -runs.shape[2] % 4, 0, 0, 0, -runs.shape[0] % LANES))
    blocks = runs.unflatten(0, (-1, LANES)).unflatten(3, (-1, 4))  # type: ignore[no-untyped-call]
    flat: Tensor = blocks.permute(0, 2, 3, 1, 4).contiguous().flatten()
    return flat


def _weight(numbers: Numbers, of: Window, channels: int) -> Tensor:
    """The inverse of `_segments`, (out, in, kh, kw)."""
    kh, kw = of.kernel
    apart = of.dilation[1] > 1 and kw > 1
    segments, width = kh * (kw if apart else 1), channels * (1 if apart else kw)
    blocks = -(-of.outputs // LANES)
    if numbers.weights.numel() != blocks * LANES * segments * -(-width // 4) * 4:
        raise KernelError(f"8-bit weights of {numbers.weights.numel()} bytes do not fit {of} and {channels} channels")
    runs = numbers.weights.view(blocks, segments, -1, LANES, 4).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
    return runs[: of.outputs, :, :width].reshape(of.outputs, kh, kw, channels).permute(0, 3, 1, 2)


def _rounded(x: Tensor, numbers: Numbers) -> Tensor:
    """q - zero in double precision."""
    steps = torch.round(x * numbers.inverse).clamp(-numbers.zero, 255 - numbers.zero)
    return torch.where(steps.isnan(), 0.0, steps).double()


def _ended(sums: Tensor, numbers: Numbers, relu: bool, dim: int) -> Tensor:
    shape = [1] * sums.dim()
    shape[dim] = -1
    y = sums.float() * numbers.scale.view(shape)
    y = y if numbers.bias is None else y + numbers.bias.view(shape)
    return y.relu() if relu else y


def _of_image(image: Tensor, numbers: Numbers) -> Numbers:
    """The numbers for an image that is rounded by its own span."""
    step, zero = input_grid(torch.stack(torch.aminmax(image.nan_to_num(0, 0, 0))))
    byte = int(zero)
    offset, scale = byte * numbers.offset, step * numbers.scale
    return numbers._replace(offset=offset, scale=scale, inverse=float(step.reciprocal()), zero=byte)


def conv2d(x: Tensor, numbers: Numbers, of: Window, pool: Sequence[int], relu: bool) -> Tensor:
    """(N, C, H, W) → (N, out, H', W'); `pool` six numbers or none."""
    if numbers.own_grids and x.numel():
        return torch.cat([conv2d(image, _of_image(image, numbers), of, pool, relu) for image in torch.split(x, 1)])
    weight = _weight(numbers, of, x.shape[1]).double()
    sums = F.conv2d(_rounded(x, numbers), weight, None, list(of.stride), list(of.padding), list(of.dilation))
    if not pool:
        return _ended(sums, numbers, relu, 1)
    turns = torch.where(numbers.scale < 0, -1.0, 1.0).double().view(-1, 1, 1)
    largest = F.max_pool2d(sums * turns, list(pool[:2]), list(pool[2:4]), list(pool[4:]))
    return _ended(largest * turns, numbers, relu, 1)


def linear(x: Tensor, numbers: Numbers, relu: bool) -> Tensor:
    """(..., in) → (..., out)."""
    weight = _weight(numbers, Window(len(numbers.scale)), x.shape[-1])[:, :, 0, 0].double()
    return _ended(F.linear(_rounded(x, numbers), weight), numbers, relu, -1)
