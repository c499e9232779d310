"""Example inputs: what a network was traced with, of which a file keeps as much as it takes to trace it again.

Floating-point inputs of more than a few numbers are described and not stored, for one image of 224² would be larger
than many a compressed network. A row of the tensor table then has, instead of a checksum,

    "drawn": {"mean": 0.0, "std": 1.0}       normal numbers with exactly this mean and standard deviation
    "drawn": {"mean": 0.45}                  where no number was negative: absolute values of normal ones

Mean and deviation have two significant digits. The numbers come from a generator whose seed is the input's own number,
so every load gives the same. Integers, bools, short inputs, numbers that are not finite and very long inputs are stored
as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import JSON, FormatError, check_object
from .tensors import Record, describe, describe_form, read_form

INPUTS = "inputs/"  # names of example inputs; no path of a module has a slash
_FEW = 256  # bytes: what is not longer is stored
_MOST = 1 << 24  # numbers: what is longer is stored, so that a file of a kilobyte cannot ask for gigabytes
_DIGITS = 2
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


@dataclass
class Drawn:
    """An example input that is drawn when a file is loaded."""

    form: Record
    number: int
    mean: float
    std: float | None

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype that takes no memory."""
        return self.form.meta()

    def make(self) -> Tensor:
        """The numbers."""
        generator = torch.Generator().manual_seed(self.number)
        values = torch.randn(self.form.shape, generator=generator)
        if self.std is None:
            values = values.abs_()
            values *= self.mean / max(float(values.mean()), 1e-30)
        else:
            std, mean = torch.std_mean(values, correction=0)
            values = values.sub_(mean).mul_(self.std / float(std)).add_(self.mean)
        return self.form.fill(values.to(self.form.dtype))


def describe_example(name: str, tensor: Tensor, *, exact: bool) -> tuple[dict[str, JSON], bool]:
    """Row of an example input in the tensor table, and whether its data are stored."""
    if exact or not _can_be_drawn(tensor):
        return describe(name, tensor), True
    values = tensor.detach().double()
    mean, std = float(values.mean()), float(values.std(correction=0))
    if float(values.min()) >= 0:
        drawn = {"mean": _rounded(mean, mean)}
    else:
        size = max(abs(mean), std)
        drawn = {"mean": _rounded(mean, size), "std": _rounded(std, std)}
    return {**describe_form(tensor), "drawn": drawn}, False


def _can_be_drawn(tensor: Tensor) -> bool:
    few = tensor.numel() * tensor.element_size() <= _FEW
    return tensor.dtype in _FLOATS and not few and tensor.numel() <= _MOST and bool(tensor.isfinite().all())


def _rounded(value: float, size: float) -> float:
    """A number with two digits of those of `size`, and no negative zero."""
    return round(value, _DIGITS - 1 - math.floor(math.log10(size))) + 0.0 if size > 0 else 0.0


def read_drawn(name: str, row: dict[str, JSON]) -> Drawn:
    """A row with an entry `drawn`; the inverse of `describe_example`."""
    what = f"example input {name[:200]!r}"
    check_object(row, what, {"dtype": str, "shape": list, "drawn": dict}, {"channels_last": bool})
    drawn = check_object(row["drawn"], what, {"mean": float}, {"std": float})
    form = read_form(name, row)
    number = name.removeprefix(INPUTS)
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise FormatError(f"{what} has no number")
    if form.dtype not in _FLOATS or not 2 <= math.prod(form.shape) <= _MOST:
        raise FormatError(f"{what} of {form.dtype} and {math.prod(form.shape)} numbers cannot be drawn")
    return Drawn(form, int(number), drawn["mean"], drawn.get("std"))
