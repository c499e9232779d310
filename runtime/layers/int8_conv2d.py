"""Int8Conv2d: a convolution of 8-bit weights on 8-bit inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ...ir.dialect import register_layer
from ...ir.errors import OptionError
from .. import kernels
from ..kernels.window import Window
from .int8_layer import Int8Layer
from .padding import numeric_padding

Size = int | tuple[int, int]


class Int8Conv2d(Int8Layer):
    """A convolution of 8-bit weights on 8-bit inputs; see `Int8Layer`.

    No subclass of `torch.nn.Conv2d`, so that nobody who looks for one takes its weights for those that are used.

    Args:
        in_channels: as of `torch.nn.Conv2d`, and so all up to `bias`.
        relu: whether negative outputs become 0.
        pool: kernel, stride and padding, (height, width) each, of a max pool of the outputs; empty for none. The layer
            then gives what the pool does, and its own outputs are never written to memory as a whole.

    Raises:
        OptionError: padding that is no number, a pool that is no six of them.
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
        relu: bool = False,
        pool: Sequence[int] = (),
    ) -> None:
        if isinstance(padding, str):
            raise OptionError(f"padding is {padding!r}; allowed: numbers", hint="'valid' is 0, 'same' half the kernel.")
        if len(pool) not in (0, 6):
            raise OptionError(f"pool is {pool}; allowed: six numbers, kernel, stride and padding, or none")
        sizes = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        super().__init__(nn.Conv2d(*sizes), relu)
        self.pool = tuple(pool)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)

    @classmethod
    def from_plain(cls, layer: nn.Conv2d) -> Int8Conv2d:
        """The 8-bit form of a convolution, whose parameters it takes over.

        Raises:
            OptionError: padding that differs from side to side.
        """
        padded = numeric_padding(layer)
        window: tuple[Any, ...] = layer.kernel_size, layer.stride, padded or layer.padding, layer.dilation
        kernel, stride, padding, dilation = window
        sizes = layer.in_channels, layer.out_channels, kernel, stride, padding, dilation
        with torch.device("meta"):
            made = cls(*sizes, layer.groups, layer.bias is not None)
        made._put(layer)
        return made

    def _by_integers(self, x: Tensor) -> bool:
        return self.groups == 1 and x.dim() == 4 and super()._by_integers(x)

    def sums_shape(self, images: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the convolution's outputs, before a pool, for images (N, in, H, W)."""
        window = Window(self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        return window.out_shape(images)

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H', W'); a ReLU may as well come behind the pool."""
        y = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return F.max_pool2d(y, self.pool[:2], self.pool[2:4], self.pool[4:]) if self.pool else y

    def _bind(self, *numbers: Any) -> kernels.Bound:
        window = self.kernel_size, self.stride, self.padding, self.dilation
        return kernels.BoundInt8Conv2d(*numbers, self.out_channels, *window, self.pool, self.relu)

    def _ends(self) -> tuple[Any, ...]:
        return (self.relu, self.pool)

    def _dilation(self) -> int:
        return int(self.dilation[1])

    def prepare(self) -> None:
        """As of `Int8Layer`; groups run in float32."""
        if self.groups == 1:
            super().prepare()

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        size = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}"
        ends = f"{', relu=True' if self.relu else ''}{f', pool={self.pool}' if self.pool else ''}"
        return f"{size}, padding={self.padding}, groups={self.groups}{ends}"


_FIELDS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
register_layer(Int8Conv2d, (*_FIELDS, "relu", "pool"), ("bias",))
