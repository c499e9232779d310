"""BinaryLinear: a fully connected layer whose weights are ±α."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...ir.dialect import register_layer
from .binary import Scale, Weights
from .binary_layer import BinaryLayer


class BinaryLinear(BinaryLayer):
    """A fully connected layer with weights W_q = α b of latent weights W, which are what is trained.

    See `binary.binarize`. No subclass of `torch.nn.Linear`, as `BinaryConv2d` is none of `torch.nn.Conv2d`.

    Args:
        in_features: as of `torch.nn.Linear`, and so `out_features` and `bias`.
        weights: `binary`, or `ternary` with zeros between the signs.
        scale: one α per `filter` (output), one for the `layer`, or `none` (α = 1).

    Raises:
        OptionError: an unknown choice.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weights: Weights = "binary",
        scale: Scale = "filter",
    ) -> None:
        # a plain layer checks the numbers and draws the latent weights
        super().__init__(nn.Linear(in_features, out_features, bias), weights, scale)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return F.linear(x, self.binary_weight, self.bias)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        return f"{self.in_features}, {self.out_features}, weights={self.weights!r}, scale={self.scale!r}"


register_layer(BinaryLinear, ("in_features", "out_features", "bias", "weights", "scale"), ("bias",))
