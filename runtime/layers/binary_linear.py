"""BinaryLinear: a fully connected layer whose weights are ±α."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...ir.dialect import register_layer
from .binary import Scale, Weights, binarize, check_binary


class BinaryLinear(nn.Module):
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
        super().__init__()
        check_binary(weights, scale)
        plain = nn.Linear(in_features, out_features, bias)  # checks the numbers and draws the latent weights
        self.in_features, self.out_features = in_features, out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.weights: Weights = weights
        self.scale: Scale = scale

    @property
    def binary_weight(self) -> Tensor:
        """W_q, shape (out, in); its gradient goes to the latent weights."""
        return binarize(self.weight, self.weights, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return F.linear(x, self.binary_weight, self.bias)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        return f"{self.in_features}, {self.out_features}, weights={self.weights!r}, scale={self.scale!r}"


register_layer(BinaryLinear, ("in_features", "out_features", "bias", "weights", "scale"), ("bias",))
