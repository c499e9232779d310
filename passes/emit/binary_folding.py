"""From scales, steps and batch norms to integers: the algebra of packing binary layers, in double precision.

A layer with weights ±α on levels l of step Δ, behind it a batch norm s y + t, and then a quantizer with thresholds
θ_1 < θ_2 < θ_3, is a comparison of whole numbers. With S the sum of levels times signs and b the layer's bias,

    v(S) = s (α Δ S + b) + t = a S + c            level k is reached where v(S) > θ_k
    a > 0:  S ≥ cut_k, the smallest whole number with a S + c > θ_k
    a < 0:  the signs of that filter change, and with them S and a
    a = 0:  always or never

Of a tensor x that is not made by such a layer, level k is reached where x > (θ_k - c) / a, which for a < 0 turns
round. That bound is rounded to float32 in the direction that changes no comparison with a float32 x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ...runtime.layers import BinaryLayer, HalfWaveQuantizer
from ...runtime.layers.binary import binarize
from ..fuse.fold_batchnorm import affine_of

LEVELS = 3
"""Thresholds and cuts of a channel; a quantizer of one bit leaves two of them out of reach."""


class Affine(NamedTuple):
    """a x + c per channel, both `(C,)` in double precision."""

    factor: Tensor
    term: Tensor

    def then(self, after: Affine) -> Affine:
        """This one first, `after` on its result."""
        return Affine(self.factor * after.factor, self.term * after.factor + after.term)

    def stacked(self) -> Tensor:
        """Float32 `(2, C)`, each number rounded once."""
        return torch.stack([self.factor, self.term]).float()


def unchanged(channels: int = 1) -> Affine:
    """x as it is; the default broadcasts."""
    return Affine(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))


def of_norm(norm: _BatchNorm) -> Affine:
    """A batch norm in evaluation mode."""
    return Affine(*affine_of(norm))


def of_layer(layer: BinaryLayer, step: float) -> tuple[Tensor, Affine]:
    """Signs (True for +1), of the weight's shape, and what makes the layer's outputs of its sums.

    Args:
        layer: with two values of weights.
        step: Δ of the levels that it reads.
    """
    weight = layer.weight.detach().double()
    alpha = binarize(weight, "binary", layer.scale).flatten(1)[:, 0].abs() if weight[0].numel() else weight.new_zeros(0)
    bias: Any = layer.bias
    term = torch.zeros_like(alpha) if bias is None else bias.detach().double()
    return weight >= 0, Affine(alpha * step, term)


def fold_cuts(of: Affine, thresholds: tuple[float, ...], terms: int) -> tuple[Tensor, Tensor]:
    """Integer thresholds of sums S whose values are a S + c.

    Args:
        of: a and c per output.
        thresholds: θ_1 < … of the quantizer, at most three.
        terms: products of a sum, which lies in -3 terms .. 3 terms.

    Returns:
        flip: bool `(O,)`, the filters whose signs must change.
        cuts: int64 `(3, O)`, in -3 terms .. 3 terms + 1.
    """
    flip, slope = of.factor < 0, of.factor.abs()
    limit = LEVELS * terms
    cuts = torch.full((LEVELS, len(slope)), limit + 1, dtype=torch.int64)
    for row, threshold in zip(cuts, thresholds, strict=False):
        safe = torch.where(slope > 0, slope, 1.0)
        guess = ((threshold - of.term) / safe).floor().clamp(-limit - 1, limit) + 1
        guess = torch.where(safe * (guess - 1) + of.term > threshold, guess - 1, guess)  # division has rounded
        guess = torch.where(safe * guess + of.term > threshold, guess, guess + 1)
        constant = torch.where(of.term > threshold, -limit, limit + 1)
        row.copy_(torch.where(slope > 0, guess, constant).clamp(-limit, limit + 1))
    return flip, cuts


def fold_thresholds(of: Affine, thresholds: tuple[float, ...]) -> Tensor:
    """Float32 `(3, C)`: what float32 values x must exceed for the levels of a x + c; rows descend where a < 0."""
    found = torch.full((LEVELS, len(of.factor)), float("inf"))
    for row, threshold in zip(found, thresholds, strict=False):
        safe = torch.where(of.factor == 0, 1.0, of.factor)
        bound = (threshold - of.term) / safe
        constant = torch.where(of.term > threshold, -float("inf"), float("inf"))
        up, down = _rounded(bound, up=True), _rounded(bound, up=False)
        row.copy_(torch.where(of.factor == 0, constant.float(), torch.where(of.factor < 0, up, down)))
    falls = of.factor < 0
    found[len(thresholds) :, falls] = -float("inf")
    tied = falls & (found[0] <= found[-1])  # rounded to one number: they must descend to be known as such
    found[0, tied] = torch.nextafter(found[0, tied], torch.tensor(float("inf")))
    same = falls & found.isinf().all(0) & (found[0] == found[-1])
    found[:, same] = -found[:, same]  # below infinity is above minus infinity
    return found


def _rounded(value: Tensor, *, up: bool) -> Tensor:
    """The nearest float32 that is not below (`up`) or not above a double."""
    near = value.float()
    beyond = near.double() < value if up else near.double() > value
    return torch.where(beyond, torch.nextafter(near, torch.tensor(float("inf") if up else -float("inf"))), near)


def fits(quantizer: HalfWaveQuantizer) -> bool:
    """Whether the kernels know its levels."""
    return quantizer.uniform and len(quantizer.levels) <= LEVELS
