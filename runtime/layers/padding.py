"""Padding in words, in numbers."""

from __future__ import annotations

from torch import nn


def numeric_padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    """Padding of both dimensions as numbers; None where it differs from side to side."""
    if not isinstance(layer.padding, str):
        return layer.padding[0], layer.padding[1]
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "valid":
        return 0, 0
    return None if any(r % 2 for r in reach) else (reach[0] // 2, reach[1] // 2)
