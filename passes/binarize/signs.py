"""Least squares over signs and one factor: the mathematics of `alternate-update`.

For one filter, over rows x of inputs and the responses y that are wanted,

    min over α, b of  f(α, b) = ‖y − α X b‖² = yᵀy − 2 α bᵀh + α² bᵀG b     b ∈ {−1, +1}ⁿ,  G = XᵀX,  h = Xᵀy

is solved by turns: α = bᵀh / bᵀG b for the signs as they are, and one coordinate after the other, for that α, by

    b_i = sign(α (h_i − α Σ_{j≠i} G_ij b_j))

Both lower f or leave it, and there are finitely many sign vectors: it ends. With G = c I the answer is XNOR's closed
form, b = sign(h), α = mean |h| / c.

A batch norm behind the layer removes the mean of the response, and its scale: there G and h are centred, or else the
mean of the inputs, which are never negative, would outweigh all that tells images apart.

Sources: Zhang, Yan and Zhang 2021 (alternating update; the formulas are our reading of the abstract); M. Rastegari et
al., XNOR-Net, 2016, equation 7; Q. Hu, P. Wang, J. Cheng, From Hashing to CNNs, 2018 (coordinate updates of signs).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...ir.errors import VerifyError

BLOCK = 64
ROUNDING = 1e-12
"""A flip has to gain more than this share of the squares it is made of, or rounding could turn it back and forth."""


@dataclass(frozen=True)
class SignFit:
    """What was found.

    Attributes:
        alpha: α of each filter, (O,), not negative; 0 where inputs or responses are all zero.
        signs: b, (n, O).
        losses: Σ over filters of f − yᵀy: at the start (signs with the factor that they had), with the best factor for
            them, and after every sweep; never rising.
        flips: signs that changed, per sweep.
        margins: (n, O), not negative: how far each sign is from turning, see `margins`.
    """

    alpha: Tensor
    signs: Tensor
    losses: list[float]
    flips: list[int]
    margins: Tensor


def fit_signs(gram: Tensor, cross: Tensor, alpha: Tensor, signs: Tensor, sweeps: int) -> SignFit:
    """Signs and factors of O filters by turns, until no sign flips or for so many sweeps.

    Within a block of coordinates G b is kept by rank-one updates of the block alone; for all others it is a matrix
    product per block, so that a sweep costs n² O multiply-adds, nearly all of them in matrix products.

    Args:
        gram: G, (n, n), symmetric, float64.
        cross: h, (n, O), float64.
        alpha: factors to begin with, (O,).
        signs: b to begin with, (n, O).
        sweeps: at most so many.

    Raises:
        VerifyError: the loss rose, which arithmetic forbids: the matrices are not sums over the same rows.
    """
    b = signs.double().clone()
    losses = [_loss(alpha.double(), b, cross, gram @ b)]
    product = gram @ b  # G b, kept up to date
    factor = best_factor(b, cross, product)
    turned = factor < 0
    b[:, turned] *= -1
    product[:, turned] *= -1
    factor = factor.abs()
    losses.append(_loss(factor, b, cross, product))
    flips, active = list[int](), factor.nonzero().flatten()
    while len(active) and len(flips) < sweeps:
        part, inner = b[:, active], product[:, active]
        changed = _sweep(gram, cross[:, active], factor[active], part, inner)
        b[:, active], product[:, active] = part, inner
        factor[active] = best_factor(part, cross[:, active], inner)
        flips.append(int(changed.sum()))
        losses.append(_loss(factor, b, cross, product))
        active = active[changed > 0]
    _check(losses, cross, b, factor)
    return SignFit(factor, b, losses, flips, margins(gram, cross, factor, b, product))


def margins(gram: Tensor, cross: Tensor, alpha: Tensor, signs: Tensor, product: Tensor) -> Tensor:
    """Size of the real number that would stand best in the place of α b_i while the others stay, (n, O).

    That number is w_i = (h_i − α Σ_{j≠i} G_ij b_j) / G_ii, whose sign b_i has once no sign flips; f rises by
    4 α |w_i| G_ii if the sign turns. Where it still has the other sign, or an input is always zero, it is 0.
    """
    own = gram.diagonal()[:, None]
    best = (cross - alpha * (product - own * signs)) / own.clamp(min=torch.finfo(own.dtype).tiny)
    return torch.where(own > 0, (signs * best).clamp(min=0), 0.0)


def best_factor(signs: Tensor, cross: Tensor, product: Tensor) -> Tensor:
    """α = bᵀh / bᵀG b of each filter, (O,); 0 where X b is zero."""
    energy = (signs * product).sum(0)
    return torch.where(energy > 0, (signs * cross).sum(0) / energy.clamp(min=torch.finfo(energy.dtype).tiny), 0.0)


def _sweep(gram: Tensor, cross: Tensor, alpha: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """All coordinates once, in place of `b` and `product`; flips per filter, (O,)."""
    flips = torch.zeros_like(alpha)
    for start in range(0, len(gram), BLOCK):
        block = slice(start, start + BLOCK)
        own, before, local = gram[block, block], b[block].clone(), product[block].clone()
        for i in range(len(own)):
            sign, fixed = b[start + i], alpha * own[i, i]
            # f falls by 4 α times this if the sign flips
            gain = -(sign * (cross[start + i] - alpha * local[i]) + fixed)
            flip = gain > ROUNDING * (cross[start + i].abs() + fixed)
            step = torch.where(flip, -2 * sign, 0.0)
            local.addr_(own[:, i], step)
            sign.add_(step)
            flips += flip
        product.addmm_(gram[:, block], b[block] - before)
    return flips


def _loss(alpha: Tensor, signs: Tensor, cross: Tensor, product: Tensor) -> float:
    """Σ over filters of f − yᵀy."""
    return float((alpha.square() * (signs * product).sum(0) - 2 * alpha * (signs * cross).sum(0)).sum())


def _check(losses: list[float], cross: Tensor, signs: Tensor, alpha: Tensor) -> None:
    size = float((alpha * (signs * cross).abs().sum(0)).sum()) + abs(losses[0])
    for before, behind in pairwise(losses):
        if behind > before + 1e-9 * size:
            raise VerifyError(
                f"the error of the signs rose from {before:.6g} to {behind:.6g}",
                hint="Report it together with the layer: Gram matrix and cross products do not belong together.",
            )
