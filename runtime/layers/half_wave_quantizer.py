"""HalfWaveQuantizer: activations of 1 to 4 bits, none of them negative."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...ir.dialect import register_layer
from ...ir.errors import OptionError

ZeroBin = Literal["strict", "round"]
Backward = Literal["vanilla", "clipped", "log-tailed"]

STEPS: dict[ZeroBin, dict[int, float]] = {
    "strict": {1: 0.7979, 2: 0.538, 3: 0.3217, 4: 0.1842},
    "round": {1: 1.2240, 2: 0.6508, 3: 0.3534, 4: 0.1932},
}
"""Step Δ of least squared error for the positive half of a standard normal variable, by rule and bits.

That of 2 bits and `strict` is the published one (the optimum is 0.5388). Re-derived by Lloyd's iteration in the tests.
"""
LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.797885,),
    2: (0.317716, 1.000106, 1.893595),
    3: (0.145706, 0.441321, 0.750443, 1.085635, 1.467528, 1.938612, 2.625063),
    4: (0.070155, 0.210928, 0.353110, 0.497714, 0.645876, 0.798927, 0.958490, 1.126640,
        1.306147, 1.500912, 1.716779, 1.963224, 2.257440, 2.636614, 3.213562),
}  # fmt: skip
"""Levels of the non-uniform quantizer (Lloyd 1982; Max 1960) for the same variable."""


class HalfWaveQuantizer(nn.Module):
    """Half-wave Gaussian quantization: `Q(x) = 0` where x ≤ 0, else the nearest of 2^bits - 1 positive levels.

    With `zero_bin="strict"` every positive x takes one of the levels q_1 < … < q_n, so that the first bin is
    (0, (q_1 + q_2) / 2]; with `"round"` zero is a level like the others and Q(x) = Δ round(x / Δ), cut off at n Δ.
    Uniform levels are Δ, 2 Δ, …, n Δ. What comes in should be distributed like a standard normal variable, which a
    batch norm without affine parameters sees to: then Δ needs no data.

    Q has no slope. Its backward pass is that of a function near to it, with q_n the largest level:

        vanilla      1 for x > 0                                  (ReLU)
        clipped      1 for 0 < x ≤ q_n                            (ReLU with a ceiling; the default)
        log-tailed   1 for 0 < x ≤ q_n, 1 / (x - q_n + 1) above   (ReLU with a logarithmic tail)

    Source: Z. Cai, X. He, J. Sun, N. Vasconcelos, Deep Learning with Low Precision by Half-wave Gaussian Quantization,
    CVPR 2017, sections 4.2 and 4.3.

    Args:
        bits: 1 to 4.
        uniform: equal steps, or the levels of least error.
        zero_bin: see above; levels that are not uniform are `strict`.
        backward: see above.
        step: Δ; None takes the one of least error for bits and rule (`STEPS`). Not for levels that are not uniform.

    Attributes:
        levels: q_1 < … < q_n.
        thresholds: t_1 < … < t_n; x takes level i if it is above t_i and not above t_{i+1}.

    Raises:
        OptionError: bits outside of 1 to 4, an unknown rule, a step that is not positive, or one without effect.
    """

    def __init__(
        self,
        bits: int = 2,
        uniform: bool = True,
        zero_bin: ZeroBin = "strict",
        backward: Backward = "clipped",
        step: float | None = None,
    ) -> None:
        super().__init__()
        _check(bits, uniform, zero_bin, backward, step)
        self.bits, self.uniform = bits, uniform
        self.zero_bin: ZeroBin = zero_bin
        self.backward: Backward = backward
        self.step = (step or STEPS[zero_bin][bits]) if uniform else None
        first = self.step or 0.0
        self.levels = tuple(first * (i + 1) for i in range(2**bits - 1)) if uniform else LEVELS[bits]
        zero = self.levels[0] / 2 if zero_bin == "round" else 0.0
        self.thresholds = (zero, *((low + high) / 2 for low, high in pairwise(self.levels)))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize a floating-point tensor of any shape; shape and dtype stay, and so does NaN."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _HalfWave.apply(x, self.thresholds, self.levels, self.backward)
            return y
        return half_wave(x, self.thresholds, self.levels)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        levels = f"step={self.step}" if self.uniform else "uniform=False"
        return f"bits={self.bits}, {levels}, zero_bin={self.zero_bin!r}, backward={self.backward!r}"


def half_wave(x: Tensor, thresholds: tuple[float, ...], levels: tuple[float, ...]) -> Tensor:
    """The quantizer's values, of the shape and dtype of x.

    The largest of the levels whose thresholds are below x, by operations that torch has vector code for (with `where`,
    which takes a Python number for its one branch, this is six times as slow); `clamp` and `maximum` pass NaN on.
    """
    y, above = x.clamp(0.0, 0.0), torch.empty_like(x)
    for threshold, level in zip(thresholds, levels, strict=True):
        torch.gt(x, threshold, out=above)
        torch.maximum(y, above.mul_(level), out=y)
    return y


class _HalfWave(torch.autograd.Function):
    """`half_wave` with the slope of a function near to it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, thresholds: tuple[float, ...], levels: tuple[float, ...], backward: Backward
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.top, ctx.slope = levels[-1], backward
        return half_wave(x, thresholds, levels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        passed = torch.gt(x, 0, out=torch.empty_like(x)).mul_(gradient)
        if ctx.slope == "clipped":
            passed *= torch.le(x, ctx.top, out=torch.empty_like(x))
        if ctx.slope == "log-tailed":
            passed /= (x - (ctx.top - 1)).clamp(min=1)  # 1 up to the largest level, where the two pieces meet
        return passed, None, None, None


def _check(bits: int, uniform: bool, zero_bin: str, backward: str, step: float | None) -> None:
    if bits not in LEVELS:
        raise OptionError(f"bits is {bits!r}; allowed: 1 to 4")
    for name, value, allowed in (("zero_bin", zero_bin, get_args(ZeroBin)), ("backward", backward, get_args(Backward))):
        if value not in allowed:
            raise OptionError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    if step is not None and not (step > 0 and math.isfinite(step)):
        raise OptionError(f"step is {step!r}; it must be a positive number")
    if not uniform and (step is not None or zero_bin != "strict"):
        given = "step" if step is not None else "zero_bin"
        raise OptionError(f"{given} has no meaning for levels that are not uniform; leave it out or set uniform")


register_layer(HalfWaveQuantizer, ("bits", "uniform", "zero_bin", "backward", "step"))
