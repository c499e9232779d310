"""The operators `torch.ops.fxpress.int8_conv2d` and `int8_linear`: 8-bit weights on 8-bit inputs, float32 in and out.

    int8_conv2d(x, weights, offset, scale, bias, inverse, zero, out_channels, kernel_size, stride, padding, dilation,
                relu)
    int8_linear(x, weights, offset, scale, bias, inverse, zero, out_features, relu)

x is float32, weights (1-D int8) and offset come from `prepare_int8` (`int8_reference.py` has the formulas), scale is
the product of the steps of inputs and weights, per output, `inverse` 1 / the step of the inputs, `zero` the byte of 0.
One group. Outputs of a convolution lie channels-last, whatever its input does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.errors import KernelError
from . import int8_reference as reference
from . import library

Pair = Sequence[int]

_LIBRARY = torch.library.Library("fxpress", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_TENSORS = "Tensor x, Tensor weights, Tensor offset, Tensor scale, Tensor? bias, float inverse, int zero"
_CONV = "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
_LIBRARY.define(f"int8_conv2d({_TENSORS}, {_CONV}, bool relu) -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]
_LIBRARY.define(f"int8_linear({_TENSORS}, int out_features, bool relu) -> Tensor", tags=_TAGS)  # type: ignore[no-untyped-call]


class Numbers(NamedTuple):
    """What both operators read beside x, in their order."""

    weights: Tensor
    offset: Tensor
    scale: Tensor
    bias: Tensor | None
    inverse: float
    zero: int


class Window(NamedTuple):
    """Sizes of a convolution in the order in which the operator takes them; a linear layer has one tap."""

    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


def _check(x: Tensor, numbers: Numbers, of: Window) -> None:
    if x.dtype != torch.float32:
        raise KernelError(f"x is {x.dtype}", hint="The 8-bit kernels read float32")
    if of.outputs < 1 or not 0 <= numbers.zero <= 255 or not 0 < numbers.inverse < float("inf"):
        raise KernelError(
            f"{of.outputs} outputs, 0 at byte {numbers.zero}, inputs times {numbers.inverse}: out of range"
        )
    wanted = {"offset": torch.int32, "scale": torch.float32, "bias": torch.float32}
    for name, dtype in wanted.items():
        tensor = getattr(numbers, name)
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != (of.outputs,)):
            raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} ({of.outputs},)")
    if numbers.weights.dtype != torch.int8 or numbers.weights.dim() != 1:
        raise KernelError(f"8-bit weights are 1-D int8, not {numbers.weights.dtype} {tuple(numbers.weights.shape)}")


def _out_shape(x: Tensor, of: Window) -> tuple[int, ...]:
    if x.dim() != 4:
        raise KernelError(f"x has {x.dim()} dimensions; a convolution reads (N, C, H, W)")
    if min(*of.kernel, *of.stride, *of.dilation) < 1 or min(of.padding) < 0:
        raise KernelError(
            f"kernel {list(of.kernel)}, stride {list(of.stride)}, padding {list(of.padding)}, "
            f"dilation {list(of.dilation)}: out of range"
        )
    reach = [x.shape[2 + i] + 2 * of.padding[i] - of.dilation[i] * (of.kernel[i] - 1) for i in range(2)]
    if min(reach) < 1:
        raise KernelError(f"Images of {tuple(x.shape[2:])} pixels are too small for a kernel of {list(of.kernel)}")
    return (x.shape[0], of.outputs, *((reach[i] - 1) // of.stride[i] + 1 for i in range(2)))


class _Layer(ctypes.Structure):
    """`FxpressInt8Layer` in csrc/int8.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weights", "offset", "scale", "bias", "y")),
        ("weight_bytes", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("outputs", "out_height", "out_width")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "padding", "dilation")),
        ("inverse", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("zero", "channels_last", "relu", "threads", "isa")),
    )


def _call(
    found: ctypes.CDLL, x: Tensor, numbers: Numbers, of: Window, relu: bool, sizes: Pair, y: Tensor, last: bool
) -> None:
    """One call of the library; `sizes` N, C, H, W, outputs, H', W'."""
    held = [None if part is None else part.contiguous() for part in numbers[:4]]
    pointers = [None if part is None else part.data_ptr() for part in held]
    layer = _Layer(
        x.data_ptr(), *pointers, y.data_ptr(), numbers.weights.numel(), *sizes, *(tuple(pair) for pair in of[1:]),
        numbers.inverse, numbers.zero, last, relu, torch.get_num_threads(), library.isa_number(),
    )  # fmt: skip
    library.check(found.fxpress_int8_layer(ctypes.addressof(layer)))


def _conv2d(
    x: Tensor, weights: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, inverse: float, zero: int,
    out_channels: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, relu: bool,
) -> Tensor:  # fmt: skip
    numbers = Numbers(weights, offset, scale, bias, inverse, zero)
    of = Window(out_channels, kernel_size, stride, padding, dilation)
    y = _empty(x, numbers, of)
    found = library.library()
    if found is None:
        return y.copy_(reference.conv2d(x, numbers, of, relu))
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    _call(found, x, numbers, of, relu, (*x.shape, *y.shape[1:]), y, last)
    return y


def _empty(x: Tensor, numbers: Numbers, of: Window) -> Tensor:
    _check(x, numbers, of)
    return torch.empty(_out_shape(x, of), device=x.device, memory_format=torch.channels_last)


def _fake_conv2d(
    x: Tensor, weights: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, inverse: float, zero: int,
    out_channels: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, relu: bool,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    of = Window(out_channels, kernel_size, stride, padding, dilation)
    return _empty(x, Numbers(weights, offset, scale, bias, inverse, zero), of)


def _linear(
    x: Tensor, weights: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, inverse: float, zero: int,
    out_features: int, relu: bool,
) -> Tensor:  # fmt: skip
    numbers, of = Numbers(weights, offset, scale, bias, inverse, zero), Window(out_features)
    _check(x, numbers, of)
    found = library.library()
    if found is None:
        return reference.linear(x, numbers, relu)
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], out_features))
    rows = y.numel() // out_features  # they lie beside each other like the pixels of one line
    if rows:
        _call(found, x, numbers, of, relu, (1, x.shape[-1], 1, rows, out_features, 1, rows), y, True)
    return y


def _fake_linear(
    x: Tensor, weights: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, inverse: float, zero: int,
    out_features: int, relu: bool,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    _check(x, Numbers(weights, offset, scale, bias, inverse, zero), Window(out_features))
    return x.new_empty((*x.shape[:-1], out_features))


for _name, _impl, _fake in (("int8_conv2d", _conv2d, _fake_conv2d), ("int8_linear", _linear, _fake_linear)):
    _LIBRARY.impl(_name, _impl, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fxpress::{_name}", _fake, lib=_LIBRARY)
