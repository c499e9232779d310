"""What the kernels compute, in plain torch: the same tables, the same integer arithmetic.

Product quantization replaces the inner products of a layer by sums of table entries (Wu et al., CVPR 2016, section 3):

    L[m, k] = sum_j D[m, k, j] x[m d + j],    y[o] = bias[o] + sum_{taps, m} L[m, index(tap, m, o)]

The products of a table entry are added in the order of j, each rounded to float32 (no fused multiply-add), so that the
tables have the same bits on every machine. `tables="int16"` and `"int8"` round them, per image, to

    q[m, k] = round((L[m, k] - o[m]) / s),    o[m] = the middle of table m,    s = max_m half the range of table m / Q

(Q = 127 or 32767, less where 32 bits could overflow), add the q exactly as integers: y = s sum q + sum o + bias.
An image with an entry beyond 1e30, infinite or NaN, or with ranges below 1e-30, takes the float32 tables: infinite and
NaN inputs give what decode-and-compute gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...ir.errors import KernelError
from . import layout as layouts
from . import reference_conv

Tables = Literal["fp32", "int16", "int8"]
LEVELS: Final = {"int16": 32767, "int8": 127}
# bounds of the half range and of the entries between which an image is rounded; the same in csrc/pq.h
SMALLEST, LARGEST = 1e-30, 1e30


def tables_of(x: Tensor, codebook: Tensor) -> Tensor:
    """(…, M d) and (M, K, d) -> the float32 tables L (…, M, K)."""
    subspaces, _, width = codebook.shape
    parts = x.unflatten(-1, (subspaces, width))  # type: ignore[no-untyped-call]
    total: Tensor = parts[..., 0, None] * codebook[..., 0]
    for j in range(1, width):
        total = total + parts[..., j, None] * codebook[..., j]
    return total


class Quantized(NamedTuple):
    """Integer tables of a batch.

    Attributes:
        values: q as float64 (…, M, K), whole numbers.
        offsets: o (…, M).
        scale: s per image, shape of `exact`.
        exact: True where an image takes the float32 tables instead.
    """

    values: Tensor
    offsets: Tensor
    scale: Tensor
    exact: Tensor


def levels(tables: str, terms: int) -> int:
    """Q: the largest |q| such that `terms` of them never leave 32 bits."""
    return min(LEVELS[tables], (2**31 - 1) // max(terms, 1))


def quantize(table: Tensor, top: int) -> Quantized:
    """Tables (N, …, M, K) -> integers in -top..top with one scale per image."""
    low, high = table.amin(-1), table.amax(-1)
    offsets = (low + high) * 0.5
    half = (high - low) * 0.5
    largest = half.flatten(1).amax(1)
    ordinary = (table.abs() <= LARGEST).flatten(1).all(1)
    exact = ~ordinary | ~((largest == 0) | (largest >= SMALLEST))
    safe = torch.where(exact | (largest == 0), torch.ones_like(largest), largest)
    shape = (-1, *[1] * (table.dim() - 1))
    inverse = (torch.tensor(float(top)) / safe).view(shape)
    values = torch.round((table - offsets[..., None]) * inverse).clamp(-top, top)
    values = torch.where(exact.view(shape), torch.zeros_like(values), values)
    return Quantized(values.double(), offsets, safe / float(top), exact)


def pq_linear(
    x: Tensor,
    codebook: Tensor,
    layout: Tensor,
    bias: Tensor | None,
    out_features: int,
    tables: str,
    relu: bool = False,
) -> Tensor:
    """(…, in) -> (…, out); the arguments are those of `torch.ops.fxpress.pq_linear`."""
    header, indices = layouts.unpack(layout)
    header.check(codebook, out_features)
    rows = x.reshape(-1, x.shape[-1])
    rows = F.pad(rows, (0, codebook.shape[0] * codebook.shape[2] - rows.shape[1]))
    table = tables_of(rows, codebook)
    y = _look_up(table, indices[0])
    if tables != "fp32" and len(rows):
        q = quantize(table, levels(tables, codebook.shape[0]))
        total = _look_up(q.values, indices[0])
        rounded = total.float() * q.scale[:, None] + q.offsets.double().sum(1, keepdim=True).float()
        y = torch.where(q.exact[:, None], y, rounded)
    if bias is not None:
        y = y + bias
    y = y.reshape(*x.shape[:-1], out_features)
    return y.relu() if relu else y


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """(N, M, K) and (M, out) -> (N, out): sums over M, a few sub-spaces at a time to bound the memory."""
    total = table.new_zeros(len(table), indices.shape[1])
    for start in range(0, indices.shape[0], 64):
        part = indices[start : start + 64].long()
        entries = table[:, start : start + 64].gather(2, part.expand(len(table), -1, -1))
        total += entries.sum(1)
    return total


def pq_conv2d(
    x: Tensor,
    codebook: Tensor,
    layout: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    tables: str,
    relu: bool = False,
    pool: Sequence[int] = (),
) -> Tensor:
    """(N, C, H, W) -> (N, out, Ho, Wo); the arguments are those of `torch.ops.fxpress.pq_conv2d`.

    Every pixel has tables of its own; taps outside of the image are skipped. The integer tables are made otherwise than
    those of a linear layer: `reference_conv.py`.
    """
    header, indices = layouts.unpack(layout)
    wanted = (math.prod(kernel_size), *codebook.shape[:2], out_channels, groups)
    found = (header.taps, header.subspaces, header.codewords, header.outputs, header.groups)
    if wanted != found:
        raise KernelError(
            f"An index layout whose taps, sub-spaces, code words, outputs and groups are {found} does not fit a "
            f"convolution with {wanted}"
        )
    n, channels, height, width = x.shape
    pixels = x.reshape(n, groups, channels // groups, height, width).permute(0, 1, 3, 4, 2)
    pixels = F.pad(pixels, (0, codebook.shape[0] * codebook.shape[2] - channels // groups))
    geometry = (kernel_size, stride, padding, dilation)
    possible = tables != "fp32" and reference_conv.can_quantize(codebook, len(indices))
    images = [x.new_empty(0, out_channels, *_out_size(height, width, *geometry))]
    for image in (pixels[i : i + 1] for i in range(n)):
        if possible and image.numel() and reference_conv.in_range(image.abs().amax()):
            q, unit = reference_conv.quantize(image[0], codebook, tables)
            images.append(_look_up_taps(q[None], indices, *geometry).float() * unit)
        else:
            images.append(_look_up_taps(tables_of(image, codebook), indices, *geometry))
    y = torch.cat(images)
    y = y if bias is None else y + bias[:, None, None]
    y = y.relu() if relu else y
    return F.max_pool2d(y, list(pool[:2]), list(pool[2:4]), list(pool[4:])) if pool else y


def _out_size(
    height: int, width: int, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    edges = zip((height, width), kernel_size, stride, padding, dilation, strict=True)
    return [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in edges]


def _look_up_taps(
    table: Tensor, indices: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """(N, groups, H, W, M, K) and (taps, M, out) -> (N, out, Ho, Wo)."""
    n, groups = table.shape[:2]
    table = F.pad(table, (0, 0, 0, 0, padding[1], padding[1], padding[0], padding[0]))
    size = [(table.shape[2 + i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    outputs = indices.shape[2]
    total = table.new_zeros(n, groups, *size, outputs // groups)
    for tap, subspaces in enumerate(indices.long()):
        y, x = (tap // kernel_size[1]) * dilation[0], (tap % kernel_size[1]) * dilation[1]
        window = table[:, :, y :: stride[0], x :: stride[1]][:, :, : size[0], : size[1]]
        for m, index in enumerate(subspaces.view(len(subspaces), groups, -1)):
            picked = index[None, :, None, None, :].expand(n, groups, *size, -1)
            total += window[..., m, :].gather(-1, picked)
    return total.permute(0, 1, 4, 2, 3).reshape(n, outputs, *size)
