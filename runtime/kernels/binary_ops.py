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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import binary_call, library
from . import binary_reference as reference
from .binary_call import Call, Epilogue, Geometry

_LIBRARY = torch.library.Library("fxpress", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_CONV = "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"
_LINEAR = "int out_features"
_FLOAT = "(Tensor x, Tensor layout, Tensor scale, Tensor? bias, Tensor? thresholds, {}, {}) -> Tensor"
_LEVELS = "(Tensor x, Tensor layout, Tensor cuts, Tensor? thresholds, {}) -> Tensor"
_RESIDUAL = "Tensor? residual=None, bool residual_relu=False, bool relu=False"


# Arguments arrive by position, those that are as the schema's defaults may be left out at the end.
def _conv2d(
    x: Tensor, layout: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None, *rest: Any
) -> Call:
    return Call(x, layout, thresholds, Epilogue(scale, bias, *rest[6:]), Geometry(*rest[:6]), False)


def _linear(
    x: Tensor, layout: Tensor, scale: Tensor, bias: Tensor | None, thresholds: Tensor | None, *rest: Any
) -> Call:
    return Call(x, layout, thresholds, Epilogue(scale, bias, *rest[1:]), Geometry(rest[0]), True)


def _conv2d_levels(x: Tensor, layout: Tensor, cuts: Tensor, thresholds: Tensor | None, *geometry: Any) -> Call:
    return Call(x, layout, thresholds, cuts, Geometry(*geometry), False)


def _linear_levels(x: Tensor, layout: Tensor, cuts: Tensor, thresholds: Tensor | None, outputs: int) -> Call:
    return Call(x, layout, thresholds, cuts, Geometry(outputs), True)


def _run(call: Call) -> Tensor:
    if library.library() is not None:
        return binary_call.run(call)
    binary_call.check(call)
    return binary_call.empty_output(call).copy_(reference.compute(call))


def _fake(call: Call) -> Tensor:
    binary_call.check(call)
    return binary_call.empty_output(call)


def _register(name: str, schema: str, read: Callable[..., Call]) -> None:
    def impl(*arguments: Any) -> Tensor:
        return _run(read(*arguments))

    def fake(*arguments: Any) -> Tensor:
        return _fake(read(*arguments))

    _LIBRARY.define(name + schema, tags=_TAGS)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, impl, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fxpress::{name}", fake, lib=_LIBRARY)


_register("binary_conv2d", _FLOAT.format(_CONV, _RESIDUAL), _conv2d)
_register("binary_linear", _FLOAT.format(_LINEAR, _RESIDUAL), _linear)
_register("binary_conv2d_levels", _LEVELS.format(_CONV), _conv2d_levels)
_register("binary_linear_levels", _LEVELS.format(_LINEAR), _linear_levels)
