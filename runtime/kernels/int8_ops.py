"""The operators `torch.ops.fxpress.int8_conv2d` and `int8_linear`: 8-bit weights on 8-bit inputs, float32 in and out.

    int8_conv2d(x, weights, offset, scale, bias, inverse, zero, out_channels, kernel_size, stride, padding, dilation,
                pool, relu)
    int8_linear(x, weights, offset, scale, bias, inverse, zero, out_features, relu)

x is float32, weights (1-D int8) and offset come from `prepare_int8` (`int8_reference.py` has the formulas), scale is
the product of the steps of inputs and weights, per output, `inverse` 1 / the step of the inputs, `zero` the byte of 0.
With `inverse` 0 and `zero` 1 a convolution rounds every image by what its own finite numbers span: scale is then the
steps of the weights alone, and the offset is that of a zero of 1.
One group. Outputs of a convolution lie channels-last, whatever its input does. `pool` is empty, or kernel, stride and
padding of a max pool of its outputs, six numbers: these are then never written as a whole.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...ir.errors import KernelError
from . import int8_reference as reference
from .bound import Bound, Output, Packed, image_form, pointer, register
from .window import Window, pooled

_LAYER = struct.Struct("4P24qf3i")
MOST_POOLED = 16
"""Largest kernel of a max pool behind a convolution."""
MOST_TERMS = 1 << 16
"""Most weights of an output, whose sum of products of bytes fits 31 bits."""


class Numbers(NamedTuple):
    """What both operators read beside x, in their order."""

    weights: Tensor
    offset: Tensor
    scale: Tensor
    bias: Tensor | None
    inverse: float
    zero: int

    @property
    def own_grids(self) -> bool:
        """Whether every image is rounded by its own span."""
        return self.inverse == 0 and self.zero == 1


class _BoundInt8(Bound):
    """Both operators: their arguments are those of `Numbers`, those of `Window`, a pool of convolutions, and `relu`."""

    function = "fxpress_int8_layer"
    _of_images: ClassVar[bool] = False
    """Whether inputs are images, which can be rounded by their own spans."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        count = len(Numbers._fields)
        sizes = arguments[count:-1]
        self._numbers, self._of = Numbers(*arguments[:count]), Window(*sizes[:5])
        self._pool: Sequence[int] = sizes[5] if len(sizes) > 5 else ()
        self._relu: bool = arguments[-1]

    def _check(self, x: Tensor) -> None:
        numbers, of = self._numbers, self._of
        if x.dtype != torch.float32:
            raise KernelError(f"x is {x.dtype}", hint="The 8-bit kernels read float32")
        of.check()
        known = 0 <= numbers.zero <= 255 and 0 < numbers.inverse < float("inf")
        if not known and not (self._of_images and numbers.own_grids):
            raise KernelError(f"0 at byte {numbers.zero}, inputs times {numbers.inverse}: out of range")
        wanted = {"offset": torch.int32, "scale": torch.float32, "bias": torch.float32}
        for name, dtype in wanted.items():
            tensor = getattr(numbers, name)
            if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != (of.outputs,)):
                raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} ({of.outputs},)")
        if numbers.weights.dtype != torch.int8 or numbers.weights.dim() != 1:
            found = f"{numbers.weights.dtype} {tuple(numbers.weights.shape)}"
            raise KernelError(f"8-bit weights are 1-D int8, not {found}")

    def _pack(self, sizes: Sequence[int], channels_last: bool, pooled: Sequence[int] = (0, 0)) -> Packed:
        """`FxpressInt8Layer` in csrc/int8.cpp; `sizes` N, C, H, W, outputs, H', W'; `pooled` behind a pool."""
        numbers = self._numbers
        held = [None if part is None else part.contiguous() for part in numbers[:4]]
        window = (number for pair in self._of[1:5] for number in pair)
        pool = *(self._pool or (0,) * 6), *pooled
        constants = _LAYER.pack(
            *map(pointer, held), numbers.weights.numel(), *sizes, *window, *pool, numbers.inverse, numbers.zero,
            channels_last, self._relu,
        )  # fmt: skip
        return constants, held


class BoundInt8Conv2d(_BoundInt8):
    """int8_conv2d."""

    name, _of_images = "int8_conv2d", True

    def output(self, x: Tensor) -> Output:
        """(N, C, H, W) → (N, out, H', W'), channels-last."""
        self._check(x)
        if self._pool and max(self._pool[:2]) > MOST_POOLED:
            raise KernelError(f"pool is {list(self._pool)}", hint=f"Its kernel has up to {MOST_POOLED} pixels a side")
        return Output(pooled(self._of.out_shape(x.shape), self._pool), form=torch.channels_last)

    def in_form(self, x: Tensor) -> torch.memory_format:
        """That of x."""
        return image_form(x)

    def pack(self, x: Tensor, output: Output) -> Packed:
        """As `_pack`."""
        sums = self._of.out_shape(x.shape)
        return self._pack((*x.shape, *sums[1:]), image_form(x) == torch.channels_last, output.shape[2:])

    def reference(self, x: Tensor) -> Tensor:
        """In plain torch."""
        return reference.conv2d(x, self._numbers, self._of, self._pool, self._relu)


class BoundInt8Linear(_BoundInt8):
    """int8_linear."""

    name = "int8_linear"

    def output(self, x: Tensor) -> Output:
        """(…, in) → (…, out)."""
        self._check(x)
        return Output((*x.shape[:-1], self._of.outputs))

    def in_form(self, x: Tensor) -> torch.memory_format:  # noqa: ARG002
        """Contiguous."""
        return torch.contiguous_format

    def pack(self, x: Tensor, output: Output) -> Packed:
        """Rows lie beside each other like the pixels of one line."""
        rows, outputs = math.prod(output.shape[:-1]), self._of.outputs
        return self._pack((1, x.shape[-1], 1, rows, outputs, 1, rows), True)

    def reference(self, x: Tensor) -> Tensor:
        """In plain torch."""
        return reference.linear(x, self._numbers, self._relu)


_TENSORS = "Tensor x, Tensor weights, Tensor offset, Tensor scale, Tensor? bias, float inverse, int zero"
_CONV = "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int[] pool"
register(f"({_TENSORS}, {_CONV}, bool relu) -> Tensor", BoundInt8Conv2d)
register(f"({_TENSORS}, int out_features, bool relu) -> Tensor", BoundInt8Linear)
