"""Int8Linear: a fully connected layer of 8-bit weights on 8-bit inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...ir.dialect import register_layer
from .. import kernels
from .int8_layer import Int8Layer


class Int8Linear(Int8Layer):
    """A fully connected layer of 8-bit weights on 8-bit inputs; see `Int8Layer`.

    No subclass of `torch.nn.Linear`, as `Int8Conv2d` is none of `torch.nn.Conv2d`.

    Args:
        in_features: as of `torch.nn.Linear`, and so `out_features` and `bias`.
        relu: whether negative outputs become 0.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, relu: bool = False) -> None:
        super().__init__(nn.Linear(in_features, out_features, bias), relu)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_plain(cls, layer: nn.Linear) -> Int8Linear:
        """The 8-bit form of a linear layer, whose parameters it takes over."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        made._put(layer)
        return made

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return F.linear(x, weight, self.bias)

    def _bind(self, *numbers: Any) -> kernels.Bound:
        return kernels.BoundInt8Linear(*numbers, self.out_features, self.relu)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        relu = ", relu=True" if self.relu else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{relu}"


register_layer(Int8Linear, ("in_features", "out_features", "bias", "relu"), ("bias",))
