"""One call of a binary layer: its arguments, what is checked of them, and what the library reads."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.errors import KernelError
from .bound import Output, Packed, is_channels_last, pointer
from .window import Window

_LAYER = struct.Struct("6P16q6i")


class Epilogue(NamedTuple):
    """y = relu?(scale[o] sum + bias[o] + relu?(residual)), float32."""

    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None = None
    residual_relu: bool = False
    relu: bool = False


class Call(NamedTuple):
    """Arguments of any of the four operators.

    x is (N, C, H, W), or (…, C) where the layer is linear; `end` holds the cuts (3, outputs) where y are levels.
    """

    x: Tensor
    layout: Tensor
    thresholds: Tensor | None
    end: Epilogue | Tensor
    window: Window
    linear: bool

    @property
    def has_levels(self) -> bool:
        """Whether x holds levels."""
        return self.x.dtype == torch.uint8

    @property
    def channels(self) -> int:
        """Of x."""
        return self.x.shape[-1 if self.linear else 1]

    @property
    def dtype(self) -> torch.dtype:
        """Of y."""
        return torch.uint8 if isinstance(self.end, Tensor) else torch.float32

    def out_shape(self) -> tuple[int, ...]:
        """Shape of y."""
        if self.linear:
            return (*self.x.shape[:-1], self.window.outputs)
        return self.window.out_shape(self.x.shape)

    def reads_last(self) -> bool:
        """Whether x is taken channels-last: levels always are."""
        return self.linear or self.has_levels or is_channels_last(self.x)

    def writes_last(self) -> bool:
        """Whether y lies channels-last: levels always do, float32 as x does."""
        return isinstance(self.end, Tensor) or self.reads_last()


def check(call: Call) -> None:
    """Everything that can be told without the values (fake tensors pass through here as well).

    Raises:
        KernelError: names the argument and what it must be.
    """
    _check_input(call)
    call.window.check()
    shape, outputs = call.out_shape(), call.window.outputs
    if isinstance(call.end, Tensor):
        _demand("cuts", call.end, torch.int32, (3, outputs))
        return
    for name in ("scale", "bias"):
        _demand(name, getattr(call.end, name), torch.float32, (outputs,))
    _demand("residual", call.end.residual, torch.float32, shape)


def _check_input(call: Call) -> None:
    if call.x.dtype not in (torch.float32, torch.uint8):
        raise KernelError(f"x is {call.x.dtype}", hint="The binary kernels read float32, or levels as uint8")
    if not call.linear and call.x.dim() != 4:
        raise KernelError(f"x has {call.x.dim()} dimensions; a convolution reads (N, C, H, W)")
    thresholds, channels = call.thresholds, call.channels
    if thresholds is None:
        if not call.has_levels:
            raise KernelError("A float32 x without thresholds", hint="Only uint8 levels go without")
        return
    shape = tuple(thresholds.shape)
    fits = len(shape) in (1, 2) and 1 <= shape[0] <= 3 and shape[1:] in ((), (channels,))
    if not fits or thresholds.dtype != torch.float32:
        raise KernelError(
            f"thresholds are {thresholds.dtype} {shape}; they must be float32 (n,) or (n, {channels}), n from 1 to 3"
        )


def _demand(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
        raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}")


def output(call: Call) -> Output:
    """What y will be; checks everything.

    Raises:
        KernelError: an argument is not right.
    """
    check(call)
    last = not call.linear and call.writes_last()
    return Output(call.out_shape(), call.dtype, torch.channels_last if last else torch.contiguous_format)


def pack(call: Call, made: Output) -> Packed:
    """`FxpressBinaryLayer` in csrc/binary.cpp behind its head, and the tensors to which it points."""
    layout, thresholds, of, end = call.layout, call.thresholds, call.window, call.end
    if layout.dtype != torch.uint8 or layout.dim() != 1:
        raise KernelError(f"A layout of binary weights is 1-D uint8, not {layout.dtype} {tuple(layout.shape)}")
    if isinstance(end, Tensor):
        held, relus = _contiguous(thresholds, layout, None, None, None, end), (False, False)
    else:
        residual = None if end.residual is None else end.residual.contiguous(memory_format=made.form)
        held = [*_contiguous(thresholds, layout, end.scale, end.bias), residual, None]
        relus = (end.residual_relu, end.relu)
    shape = made.shape
    sizes = (math.prod(shape[:-1]), call.channels, 1, 1) if call.linear else tuple(call.x.shape)
    out = (of.outputs, 1, 1) if call.linear else shape[1:]
    constants = _LAYER.pack(
        *map(pointer, held), layout.numel(), *sizes, *out, *of.kernel, *of.stride, *of.padding,
        *of.dilation, 2 if call.has_levels else int(call.reads_last()),
        0 if thresholds is None else len(thresholds), thresholds is not None and thresholds.dim() == 2, *relus,
        call.linear or call.writes_last(),
    )  # fmt: skip
    return constants, held


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
