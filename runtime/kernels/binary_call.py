"""One call of a binary layer: its arguments, what is checked of them, and how they reach the library."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ir.errors import KernelError
from . import library

Pair = Sequence[int]


class Geometry(NamedTuple):
    """Sizes of a convolution in the order in which the operators take them; a linear layer has one tap."""

    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


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
    geometry: Geometry
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
        """Shape of y, from arguments that `check` found right."""
        of, shape = self.geometry, self.x.shape
        if self.linear:
            return (*shape[:-1], of.outputs)
        reach = [shape[2 + i] + 2 * of.padding[i] - of.dilation[i] * (of.kernel[i] - 1) for i in range(2)]
        return (shape[0], of.outputs, *((reach[i] - 1) // of.stride[i] + 1 for i in range(2)))

    def reads_last(self) -> bool:
        """Whether x is taken channels-last: levels always are."""
        return self.linear or self.has_levels or _is_channels_last(self.x)

    def writes_last(self) -> bool:
        """Whether y lies channels-last: levels always do, float32 as x does."""
        return isinstance(self.end, Tensor) or self.reads_last()


def check(call: Call) -> None:
    """Everything that can be told without the values (fake tensors pass through here as well).

    Raises:
        KernelError: names the argument and what it must be.
    """
    _check_input(call)
    _check_geometry(call)
    outputs = call.geometry.outputs
    if isinstance(call.end, Tensor):
        _demand("cuts", call.end, torch.int32, (3, outputs))
        return
    for name in ("scale", "bias"):
        _demand(name, getattr(call.end, name), torch.float32, (outputs,))
    _demand("residual", call.end.residual, torch.float32, call.out_shape())


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


def _check_geometry(call: Call) -> None:
    of = call.geometry
    if of.outputs < 1:
        raise KernelError(f"A layer of {of.outputs} outputs")
    if min(*of.kernel, *of.stride, *of.dilation) < 1 or min(of.padding) < 0:
        raise KernelError(
            f"kernel {list(of.kernel)}, stride {list(of.stride)}, padding {list(of.padding)}, "
            f"dilation {list(of.dilation)}: out of range"
        )
    if of.groups < 1 or call.channels % of.groups or (not call.linear and min(call.out_shape()[2:]) < 1):
        raise KernelError(
            f"x {tuple(call.x.shape)} in {of.groups} groups does not fit a kernel of {list(of.kernel)}, "
            f"padding {list(of.padding)}"
        )


def _demand(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
        raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {dtype} {shape}")


def empty_output(call: Call) -> Tensor:
    """y, not yet written; on the device of x, be it a fake one."""
    last = not call.linear and call.writes_last()
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(call.out_shape(), dtype=call.dtype, device=call.x.device, memory_format=form)


@dataclass(frozen=True)
class _Plan:
    """What calls whose arguments look alike have in common: checked once, since Python would take as long as a layer.

    Args:
        shape: of y.
        form: memory format of y.
        in_form: memory format that x must have.
        sizes: of `FxpressBinaryLayer` (csrc/binary.cpp) all behind the pointers.
    """

    shape: tuple[int, ...]
    form: torch.memory_format
    in_form: torch.memory_format
    sizes: bytes


_POINTERS = struct.Struct("8P")
_SIZES = struct.Struct("=q4q3q8q8i")
_plans: dict[Any, _Plan] = {}
_MOST_PLANS = 4096


def run(call: Call) -> Tensor:
    """y, by the library.

    Raises:
        KernelError: an argument is not right.
    """
    found = library.library()
    assert found is not None
    x, layout, thresholds, end, geometry, linear = call
    threads, isa = torch.get_num_threads(), library.isa_number()
    if isinstance(end, Tensor):
        tensors: tuple[Tensor | None, ...] = (thresholds, layout, None, None, None, end)
        relus = (False, False)
    else:
        tensors, relus = (thresholds, layout, end.scale, end.bias, end.residual, None), (end.residual_relu, end.relu)
    # x is told from its strides: whether it lies channels-last
    key = (
        x.shape, x.stride(), x.dtype, *map(_look, tensors), geometry.outputs, *geometry.kernel, *geometry.stride,
        *geometry.padding, *geometry.dilation, geometry.groups, linear, relus, threads, isa,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _make_plan(call, relus, threads, isa)
        if len(_plans) > _MOST_PLANS:
            _plans.clear()
    y = torch.empty(plan.shape, dtype=call.dtype, memory_format=plan.form)
    x = x.contiguous(memory_format=plan.in_form)
    held = [None if part is None else part.contiguous() for part in tensors]
    if held[4] is not None and held[4].stride() != y.stride():
        held[4] = torch.empty_like(y).copy_(held[4])
    pointers = [0 if part is None else part.data_ptr() for part in held]
    status = found.fxpress_binary_layer(_POINTERS.pack(x.data_ptr(), *pointers, y.data_ptr()) + plan.sizes)
    if status:
        library.check(status)
    return y


def _look(tensor: Tensor | None) -> Any:
    """All of a tensor that `check` looks at."""
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _make_plan(call: Call, relus: tuple[bool, bool], threads: int, isa: int) -> _Plan:
    check(call)
    layout, thresholds, of = call.layout, call.thresholds, call.geometry
    if layout.dtype != torch.uint8 or layout.dim() != 1:
        raise KernelError(f"A layout of binary weights is 1-D uint8, not {layout.dtype} {tuple(layout.shape)}")
    shape, last = call.out_shape(), call.reads_last()
    sizes = (math.prod(shape[:-1]), call.channels, 1, 1) if call.linear else tuple(call.x.shape)
    out = (of.outputs, 1, 1) if call.linear else shape[1:]
    packed = _SIZES.pack(
        layout.numel(), *sizes, *out, *of.kernel, *of.stride, *of.padding, *of.dilation,
        2 if call.has_levels else int(last), 0 if thresholds is None else len(thresholds),
        thresholds is not None and thresholds.dim() == 2, *relus, call.linear or call.writes_last(), threads, isa,
    )  # fmt: skip
    forms = [
        torch.channels_last if flag and not call.linear else torch.contiguous_format
        for flag in (call.writes_last(), last)
    ]
    return _Plan(shape, forms[0], forms[1], packed)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
