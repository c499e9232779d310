"""BinaryConv2d: a convolution whose weights are ±α."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ...ir.dialect import register_layer
from ...ir.errors import OptionError
from .binary import Scale, Weights
from .binary_layer import BinaryLayer

Size = int | tuple[int, int]


class BinaryConv2d(BinaryLayer):
    """A convolution with weights W_q = α b of latent weights W, which are what is trained (see `binary.binarize`).

    Padding is with zeros and adds nothing: zero is a level of the activations. This is no subclass of
    `torch.nn.Conv2d`, so that nobody who looks for one takes the latent weights for those that are used.

    Args:
        in_channels: as of `torch.nn.Conv2d`, and so all up to `bias`.
        weights: `binary`, or `ternary` with zeros between the signs.
        scale: one α per `filter`, one for the `layer`, or `none` (α = 1).

    Raises:
        OptionError: an unknown choice, or padding that is no number.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        weights: Weights = "binary",
        scale: Scale = "filter",
    ) -> None:
        if isinstance(padding, str):
            raise OptionError(f"padding is {padding!r}; allowed: numbers", hint="'valid' is 0, 'same' half the kernel.")
        # a plain layer checks the numbers and draws the latent weights
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        super().__init__(plain, weights, scale)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H', W')."""
        weight = self.binary_weight
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        size = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}"
        return f"{size}, padding={self.padding}, groups={self.groups}, weights={self.weights!r}, scale={self.scale!r}"


_FIELDS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
register_layer(BinaryConv2d, (*_FIELDS, "weights", "scale"), ("bias",))
