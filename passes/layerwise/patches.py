"""What a layer reads for each of its outputs: the rows X and the weight matrix W with `layer(x) = X Wᵀ + b`.

For a convolution a row holds the input under the kernel (im2col); a transposed convolution is one over its input with
zeros between the pixels, and the kernel turned round; a linear layer reads its input as it is. Convolutions in groups
have rows and weights of their own per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Reading = _ConvNd | nn.Linear
"""The layers whose outputs are rows times weights."""

CHUNK = 4_000_000  # numbers of X that exist at a time


def weight_rows(layer: Reading, weight: Tensor | None = None) -> Tensor:
    """W, shape (groups, out/groups, features): features are input channels of the group times kernel positions."""
    weight = layer.weight.detach() if weight is None else weight
    if isinstance(layer, nn.Linear):
        return weight[None]
    groups = layer.groups
    if not layer.transposed:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    by_group = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)  # (groups, out/groups, in/groups, *kernel)
    turned: Tensor = by_group.flip(_kernel_dims(by_group)).flatten(3).flatten(2)
    return turned


def weight_of_rows(layer: Reading, rows: Tensor) -> Tensor:
    """The inverse of `weight_rows`: a weight in the layer's own shape, up to its number of inputs."""
    if isinstance(layer, nn.Linear):
        return rows[0]
    kernel = layer.kernel_size
    by_group = rows.reshape(*rows.shape[:2], -1, *kernel)
    if not layer.transposed:
        return by_group.flatten(0, 1)
    return by_group.flip(_kernel_dims(by_group)).transpose(1, 2).flatten(0, 1)


def _kernel_dims(weight: Tensor) -> list[int]:
    return list(range(3, weight.dim()))


def rows(layer: Reading, x: Tensor, y: Tensor, positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of X with the responses that belong to them, a part of the batch at a time.

    Args:
        layer: reads `x`, whose number of channels need not be the layer's.
        x: input, (N, C, *space) of a convolution, (N, ..., features) of a linear layer.
        y: output, (N, O, *space) or (N, ..., O).
        positions: at most this many output positions per image are taken, the same of every image.

    Yields:
        X (M, groups, features) and Y (M, groups, out/groups).
    """
    if isinstance(layer, nn.Linear):
        windows, y, kernel, groups = _channels_first(x), _channels_first(y), 1, 1
    else:
        windows, kernel, groups = _windows(layer, x), prod(layer.kernel_size), layer.groups
    space = tuple(y.shape[2:])
    chosen = choose_positions(prod(space), positions)
    where = tuple(torch.from_numpy(index) for index in np.unravel_index(chosen.numpy(), space))
    step = max(1, CHUNK // max(1, windows.shape[1] * kernel * len(chosen)))
    for start in range(0, len(x), step):
        index: tuple[slice | Tensor, ...] = (slice(start, start + step), slice(None), *where)
        taken, target = (t[index].transpose(1, 2) for t in (windows, y))
        count = taken.shape[0] * taken.shape[1]
        yield taken.reshape(count, groups, -1), target.reshape(count, groups, -1)


def _channels_first(x: Tensor) -> Tensor:
    """(N, ..., C) as (N, C, positions)."""
    return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)


def choose_positions(count: int, limit: int) -> Tensor:
    """Indices of at most `limit` of `count` positions, rising; always the same ones."""
    if count <= limit:
        return torch.arange(count)
    return torch.from_numpy(np.sort(np.random.default_rng(count).choice(count, limit, replace=False)))


def _windows(layer: _ConvNd, x: Tensor) -> Tensor:
    """The input under the kernel at every output position, a view of shape (N, C, *space, *kernel)."""
    x = _spread(layer, x) if layer.transposed else _padded(layer, x)
    for dim, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        step = 1 if layer.transposed else stride
        x = x.unfold(dim + 2, dilation * (size - 1) + 1, step)[..., ::dilation]
    return x


def _padded(layer: _ConvNd, x: Tensor) -> Tensor:
    """The input with the layer's own padding around it."""
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if isinstance(layer.padding, str):
        return F.pad(x, layer._reversed_padding_repeated_twice)
    return F.pad(x, [p for size in reversed(layer.padding) for p in (size, size)])


def _spread(layer: _ConvNd, x: Tensor) -> Tensor:
    """The input of a transposed convolution as its kernel, turned round, slides over it: with zeros in between."""
    assert not isinstance(layer.padding, str)
    sizes = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], layer.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spaced: list[slice] = [slice(None), slice(None), *(slice(None, None, stride) for stride in layer.stride)]
    spread[tuple(spaced)] = x
    amounts: list[int] = []
    sides = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    for size, dilation, padding, extra in reversed(list(sides)):
        reach = dilation * (size - 1) - padding
        amounts += [reach, reach + extra]
    return F.pad(spread, amounts)
