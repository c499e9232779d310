"""A layer that is measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerCase:
    """A layer and its input.

    Args:
        name: as the table shows it.
        layer: a dense layer of that shape.
        shape: of the input, without the batch.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    shape: tuple[int, ...]
