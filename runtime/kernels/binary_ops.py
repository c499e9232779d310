"""The operators `torch.ops.fxpress.binary_*`: schemas, implementations, fake kernels.

    binary_conv2d(x, layout, scale, bias, thresholds, out_channels, kernel_size, stride, padding, dilation, groups,
                  residual=None, residual_relu=False, relu=False)                                  -> float32
    binary_linear(x, layout, scale, bias, thresholds, out_features,
                  residual=None, residual_relu=False, relu=False)                                  -> float32
    binary_conv2d_levels(x, layout, cuts, thresholds, out_channels, kernel_size, ..., groups)      -> uint8 levels
    binary_linear_levels(x, layout, cuts, thresholds, out_features)                                -> uint8 levels

x is uint8 levels (thresholds then do not matter and may be None), or float32: a value's level is how many of one to
three ascending thresholds it exceeds. `thresholds` is float32 (n,), or (n, C) for a layer that has a batch norm folded
into them; a channel whose thresholds descend (the scale of its norm is negative) counts those that x stays below. A
single descending threshold is followed by a row of -inf. `cuts` is int32 (3, outputs).
Levels lie channels-last in memory; float32 outputs of a convolution lie as its input does. `residual` is of y's shape.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from . import binary_call
from . import binary_reference as reference
from .binary_call import Call, Epilogue
from .bound import Bound, Output, Packed, register
from .window import Window


class _BoundBinary(Bound):
    """All four: their arguments begin with layout, scale and bias or cuts, thresholds, and sizes."""

    function = "fxpress_binary_layer"
    linear: ClassVar[bool]
    levels: ClassVar[bool]
    """Whether y are levels."""

    def _call(self, x: Tensor) -> Call:
        begin = 3 if self.levels else 4  # where the sizes are
        end = begin + (1 if self.linear else len(Window._fields))
        layout, *numbers, thresholds = self.arguments[:begin]
        # residual and what belongs to it may be left out
        made = numbers[0] if self.levels else Epilogue(*numbers, *self.arguments[end:])
        return Call(x, layout, thresholds, made, Window(*self.arguments[begin:end]), self.linear)

    def output(self, x: Tensor) -> Output:
        """As `binary_call.output`."""
        return binary_call.output(self._call(x))

    def in_form(self, x: Tensor) -> torch.memory_format:
        """Levels of an image are read channels-last, float32 as it lies."""
        last = not self.linear and self._call(x).reads_last()
        return torch.channels_last if last else torch.contiguous_format

    def pack(self, x: Tensor, output: Output) -> Packed:
        """As `binary_call.pack`."""
        return binary_call.pack(self._call(x), output)

    def reference(self, x: Tensor) -> Tensor:
        """In plain torch."""
        return reference.compute(self._call(x))


class BoundBinaryConv2d(_BoundBinary):
    """binary_conv2d."""

    name, linear, levels = "binary_conv2d", False, False


class BoundBinaryLinear(_BoundBinary):
    """binary_linear."""

    name, linear, levels = "binary_linear", True, False


class BoundBinaryConv2dLevels(_BoundBinary):
    """binary_conv2d_levels."""

    name, linear, levels = "binary_conv2d_levels", False, True


class BoundBinaryLinearLevels(_BoundBinary):
    """binary_linear_levels."""

    name, linear, levels = "binary_linear_levels", True, True


_CONV = "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"
_LINEAR = "int out_features"
_FLOAT = "(Tensor x, Tensor layout, Tensor scale, Tensor? bias, Tensor? thresholds, {}, {}) -> Tensor"
_LEVELS = "(Tensor x, Tensor layout, Tensor cuts, Tensor? thresholds, {}) -> Tensor"
_RESIDUAL = "Tensor? residual=None, bool residual_relu=False, bool relu=False"
register(_FLOAT.format(_CONV, _RESIDUAL), BoundBinaryConv2d)
register(_FLOAT.format(_LINEAR, _RESIDUAL), BoundBinaryLinear)
register(_LEVELS.format(_CONV), BoundBinaryConv2dLevels)
register(_LEVELS.format(_LINEAR), BoundBinaryLinearLevels)
