"""What the steps of a binarized network compute, in plain torch; `emit` proves networks by it in double precision.

    levels        of float x: how many of three thresholds of its channel it exceeds (stays below, where they descend)
    conv_levels   s = sum of levels times signs; level = how many of the cuts of its output s reaches
    conv          relu?(scale s + bias + relu?(added))
    affine        relu?(factor x + term)          add   relu?(x + relu?(y))          decode   level times step

Pools, mean, flatten and cat as in torch; `shortcut` takes every stride-th pixel and adds channels of zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .binary_reference import levels_of
from .network_program import Program, Step

Values = list[Tensor]
Parts = tuple[Tensor, ...]


def compute(program: Program, parts: list[Parts], inputs: Values) -> Values:
    """Outputs (N, C, H, W) of a network, for inputs of the same form."""
    values = list(inputs)
    for step, tensors in zip(program.steps, parts, strict=True):
        values.append(run_step(step, tensors, [values[at] for at in step.operands()], inputs[0].dtype))
    return [values[step["x"]] for step in program.outputs]


def run_step(step: Step, parts: Parts, read: Values, dtype: torch.dtype) -> Tensor:
    """The value that one step makes.

    Args:
        step: what to compute.
        parts: its tensors.
        read: what it reads, (N, C, H, W): uint8 levels, or floats of `dtype`.
        dtype: of the floats that come out: float32 rounds as the library does.
    """
    if step.kind in ("conv", "conv_levels"):
        return _conv(step, parts, read, dtype)
    return _STEPS[step.kind](step, parts, read).to(torch.uint8 if _makes_levels(step, read) else dtype)


def _makes_levels(step: Step, read: Values) -> bool:
    return step.kind == "levels" or (read[0].dtype == torch.uint8 and step.kind != "decode")


def _conv(step: Step, parts: Parts, read: Values, dtype: torch.dtype) -> Tensor:
    weight = parts[0].double() * 2 - 1
    geometry = (list(step["stride"]), list(step["padding"]), list(step["dilation"]), step["groups"])
    sums = F.conv2d(read[0].double(), weight, None, *geometry)
    if step.kind == "conv_levels":
        reached = [(sums >= _along(row)).to(torch.uint8) for row in parts[1]]
        return reached[0] + reached[1] + reached[2]
    y = sums.to(dtype) * _along(parts[1][0]).to(dtype) + _along(parts[1][1]).to(dtype)
    if len(read) == 2:
        y = y + (read[1].relu() if step["added_relu"] else read[1])
    return y.relu() if step["relu"] else y


def _affine(step: Step, parts: Parts, read: Values) -> Tensor:
    y = read[0] * _along(parts[0][0]) + _along(parts[0][1])
    return y.relu() if step["relu"] else y


def _add(step: Step, parts: Parts, read: Values) -> Tensor:  # noqa: ARG001
    x, y = read if len(read) == 2 else read * 2
    y = x + (y.relu() if step["y_relu"] else y)
    return y.relu() if step["relu"] else y


def _max_pool(step: Step, parts: Parts, read: Values) -> Tensor:  # noqa: ARG001
    x = read[0]
    kernel, stride, padding, dilation = (step[name] for name in ("kernel", "stride", "padding", "dilation"))
    x = x.float() if x.dtype == torch.uint8 else x
    pooled: Tensor = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode=bool(step["ceil"]))
    return pooled


def _average_pool(step: Step, parts: Parts, read: Values) -> Tensor:  # noqa: ARG001
    kernel, stride, padding = (step[name] for name in ("kernel", "stride", "padding"))
    return F.avg_pool2d(read[0], kernel, stride, padding, count_include_pad=bool(step["count_padding"]))


def _shortcut(step: Step, parts: Parts, read: Values) -> Tensor:  # noqa: ARG001
    down, right = step["stride"]
    return F.pad(read[0][:, :, ::down, ::right], (0, 0, 0, 0, step["before"], step["after"]))


_STEPS: dict[str, Callable[[Step, Parts, Values], Tensor]] = {
    "levels": lambda step, parts, read: levels_of(read[0], parts[0].to(read[0].dtype), 1),  # noqa: ARG005
    "affine": _affine,
    "add": _add,
    "relu": lambda step, parts, read: read[0].relu(),  # noqa: ARG005
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "mean": lambda step, parts, read: read[0].mean((2, 3), keepdim=True),  # noqa: ARG005
    "shortcut": _shortcut,
    "cat": lambda step, parts, read: torch.cat(read, 1),  # noqa: ARG005
    "flatten": lambda step, parts, read: read[0].flatten(1)[:, :, None, None],  # noqa: ARG005
    "decode": lambda step, parts, read: read[0] * parts[0],  # noqa: ARG005
}


def _along(values: Tensor) -> Tensor:
    return values[:, None, None]
