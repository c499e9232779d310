"""The operators `torch.ops.fxpress.binary_*`: schema, checks, fake kernels.

    binary_conv2d(x, layout, scale, bias, thresholds, out_channels, kernel_size, stride, padding, dilation, groups)
    binary_linear(x, layout, scale, bias, thresholds, out_features)                                 -> float32
    binary_conv2d_levels(x, layout, cuts, thresholds, out_channels, kernel_size, ...)
    binary_linear_levels(x, layout, cuts, thresholds, out_features)                                 -> uint8 levels

x is float32, of which a value's level is how many of one to three ascending `thresholds` it exceeds, or uint8 levels.
Levels lie channels-last in memory; float32 outputs of a convolution lie as its input does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir.errors import KernelError
from . import binary_reference as reference
from . import library

_LIBRARY = torch.library.Library("fxpress", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_GEOMETRY = "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"
for _schema in (
    f"binary_conv2d(Tensor x, Tensor layout, Tensor scale, Tensor? bias, float[] thresholds, {_GEOMETRY}) -> Tensor",
    f"binary_conv2d_levels(Tensor x, Tensor layout, Tensor cuts, float[] thresholds, {_GEOMETRY}) -> Tensor",
    "binary_linear(Tensor x, Tensor layout, Tensor scale, Tensor? bias, float[] thresholds, int out_features)"
    " -> Tensor",
    "binary_linear_levels(Tensor x, Tensor layout, Tensor cuts, float[] thresholds, int out_features) -> Tensor",
):
    _LIBRARY.define(_schema, tags=_TAGS)  # type: ignore[no-untyped-call]


def _check(x: Tensor, thresholds: Sequence[float], outputs: int) -> None:
    if x.dtype not in (torch.float32, torch.uint8):
        raise KernelError(f"x is {x.dtype}", hint="The binary kernels read float32, or levels as uint8")
    if not 1 <= len(thresholds) <= 3 or list(thresholds) != sorted(thresholds):
        raise KernelError(
            f"thresholds are {list(thresholds)}", hint="One to three ascending numbers: levels are 0 to 3"
        )
    if outputs < 1:
        raise KernelError(f"A layer of {outputs} outputs")


def _check_scale(scale: Tensor, bias: Tensor | None, outputs: int) -> None:
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and (tensor.dtype != torch.float32 or tuple(tensor.shape) != (outputs,)):
            raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be float32 ({outputs},)")


def _check_cuts(cuts: Tensor, outputs: int) -> None:
    if cuts.dtype != torch.int32 or tuple(cuts.shape) != (3, outputs):
        raise KernelError(f"cuts are {cuts.dtype} {tuple(cuts.shape)}; they must be int32 (3, {outputs})")


def _out_size(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    if x.dim() != 4:
        raise KernelError(f"x has {x.dim()} dimensions; a convolution reads (N, C, H, W)")
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise KernelError(f"kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}: out of range")
    return [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _call(
    x: Tensor, kind: int, shape: Sequence[int], thresholds: Sequence[float], layout: Tensor, scale: Tensor | None,
    bias: Tensor | None, cuts: Tensor | None, y: Tensor, last: bool, out: Sequence[int], geometry: Sequence[int],
) -> None:  # fmt: skip
    """One call of the library; `shape` (N, C, H, W), `out` (outputs, height, width)."""
    found = library.library()
    assert found is not None
    if layout.dtype != torch.uint8 or layout.dim() != 1:
        raise KernelError(f"A layout of binary weights is 1-D uint8, not {layout.dtype} {tuple(layout.shape)}")
    held = [None if part is None else part.contiguous() for part in (layout, scale, bias, cuts)]
    pointers = [None if part is None else part.data_ptr() for part in held]
    numbers = (ctypes.c_int64 * 8)(*geometry)
    limits = (ctypes.c_float * 3)(*thresholds, *[float("inf")] * (3 - len(thresholds)))
    status = found.fxpress_binary_conv2d(
        x.data_ptr(), kind, *shape, ctypes.addressof(limits), pointers[0], layout.numel(), *pointers[1:], y.data_ptr(),
        last, *out, ctypes.addressof(numbers), torch.get_num_threads(), library.isa_number(),
    )  # fmt: skip
    library.check(status)


def _conv2d(
    x: Tensor, layout: Tensor, scale: Tensor | None, bias: Tensor | None, cuts: Tensor | None,
    thresholds: Sequence[float], outputs: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    size = _out_size(x, kernel, stride, padding, dilation)
    if groups < 1 or x.shape[1] % groups or min(size) < 1:
        raise KernelError(f"x {tuple(x.shape)} in {groups} groups does not fit a kernel of {kernel}, padding {padding}")
    if library.library() is None:
        sums = reference.sums_conv2d(x, layout, thresholds, stride, padding, dilation, groups)
        if cuts is None:
            assert scale is not None
            return reference.scaled(sums, scale, bias, 1)
        return reference.cut(sums, cuts, 1).contiguous(memory_format=torch.channels_last)
    last = x.dtype == torch.uint8 or _is_channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    form = torch.channels_last if last or cuts is not None else torch.contiguous_format
    dtype = torch.float32 if cuts is None else torch.uint8
    y = torch.empty(x.shape[0], outputs, *size, dtype=dtype, memory_format=form)
    kind = 2 if x.dtype == torch.uint8 else int(last)
    geometry = (*kernel, *stride, *padding, *dilation)
    out = (outputs, *size)
    _call(x, kind, tuple(x.shape), thresholds, layout, scale, bias, cuts, y, bool(last), out, geometry)
    return y


def _linear(
    x: Tensor, layout: Tensor, scale: Tensor | None, bias: Tensor | None, cuts: Tensor | None,
    thresholds: Sequence[float], outputs: int,
) -> Tensor:  # fmt: skip
    if library.library() is None:
        sums = reference.sums_linear(x, layout, thresholds)
        if cuts is None:
            assert scale is not None
            return reference.scaled(sums, scale, bias, -1)
        return reference.cut(sums, cuts, -1)
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32 if cuts is None else torch.uint8)
    shape, kind = (y.numel() // outputs, x.shape[-1], 1, 1), 2 if x.dtype == torch.uint8 else 1
    geometry = (1, 1, 1, 1, 0, 0, 1, 1)
    _call(x, kind, shape, thresholds, layout, scale, bias, cuts, y, True, (outputs, 1, 1), geometry)
    return y


def _binary_conv2d(
    x: Tensor, layout: Tensor, scale: Tensor, bias: Tensor | None, thresholds: list[float], out_channels: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    _check(x, thresholds, out_channels)
    _check_scale(scale, bias, out_channels)
    geometry = (out_channels, kernel_size, stride, padding, dilation, groups)
    return _conv2d(x, layout, scale, bias, None, thresholds, *geometry)


def _binary_conv2d_levels(
    x: Tensor, layout: Tensor, cuts: Tensor, thresholds: list[float], out_channels: int,
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    _check(x, thresholds, out_channels)
    _check_cuts(cuts, out_channels)
    geometry = (out_channels, kernel_size, stride, padding, dilation, groups)
    return _conv2d(x, layout, None, None, cuts, thresholds, *geometry)


def _binary_linear(
    x: Tensor, layout: Tensor, scale: Tensor, bias: Tensor | None, thresholds: list[float], out_features: int
) -> Tensor:
    _check(x, thresholds, out_features)
    _check_scale(scale, bias, out_features)
    return _linear(x, layout, scale, bias, None, thresholds, out_features)


def _binary_linear_levels(
    x: Tensor, layout: Tensor, cuts: Tensor, thresholds: list[float], out_features: int
) -> Tensor:
    _check(x, thresholds, out_features)
    _check_cuts(cuts, out_features)
    return _linear(x, layout, None, None, cuts, thresholds, out_features)


def _fake_conv2d(
    x: Tensor, layout: Tensor, scale: Tensor, bias: Tensor | None, thresholds: list[float], out_channels: int,  # noqa: ARG001
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    _check(x, thresholds, out_channels)
    _check_scale(scale, bias, out_channels)
    size = _out_size(x, kernel_size, stride, padding, dilation)
    last = x.dtype == torch.uint8 or _is_channels_last(x)
    form = torch.channels_last if last else torch.contiguous_format
    return x.new_empty((x.shape[0], out_channels, *size), dtype=torch.float32).contiguous(memory_format=form)


def _fake_conv2d_levels(
    x: Tensor, layout: Tensor, cuts: Tensor, thresholds: list[float], out_channels: int,  # noqa: ARG001
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    _check(x, thresholds, out_channels)
    _check_cuts(cuts, out_channels)
    size = _out_size(x, kernel_size, stride, padding, dilation)
    y = x.new_empty((x.shape[0], out_channels, *size), dtype=torch.uint8)
    return y.contiguous(memory_format=torch.channels_last)


def _fake_linear(
    x: Tensor,
    layout: Tensor,  # noqa: ARG001
    scale: Tensor,
    bias: Tensor | None,
    thresholds: list[float],
    out_features: int,
) -> Tensor:
    _check(x, thresholds, out_features)
    _check_scale(scale, bias, out_features)
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.float32)


def _fake_linear_levels(
    x: Tensor,
    layout: Tensor,  # noqa: ARG001
    cuts: Tensor,
    thresholds: list[float],
    out_features: int,
) -> Tensor:
    _check(x, thresholds, out_features)
    _check_cuts(cuts, out_features)
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.uint8)


for _name, _impl, _fake in (
    ("binary_conv2d", _binary_conv2d, _fake_conv2d),
    ("binary_conv2d_levels", _binary_conv2d_levels, _fake_conv2d_levels),
    ("binary_linear", _binary_linear, _fake_linear),
    ("binary_linear_levels", _binary_linear_levels, _fake_linear_levels),
):
    _LIBRARY.impl(_name, _impl, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fxpress::{_name}", _fake, lib=_LIBRARY)
