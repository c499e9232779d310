"""The weights with which a layer gives, from the channels that are left, what it gave from all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layerwise.moments import SecondMoments

RIDGE = 1e-3
"""Weight of the ridge as a share of the features' mean variance."""


def fit(moments: SecondMoments, weight: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Least squares in closed form, with a ridge that draws towards the present weights.

    Per group, over n rows of inputs x and wanted responses y,

        min over W, b of  (1/n) Σ ‖y − W x − b‖² + λ ‖W − W₀‖²       λ = ridge · tr(C) / F

    With the means x̄, ȳ and the covariances C = (1/n) Σ (x − x̄)(x − x̄)ᵀ, D = (1/n) Σ (x − x̄)(y − ȳ)ᵀ its solution is

        W = W₀ + (D − C W₀ᵀ)ᵀ (C + λ I)⁻¹,    b = ȳ − W x̄

    so that on these rows the error of (W, b) is never above that of W₀ with any bias. Where the data say nothing (dead
    inputs, fewer rows than unknowns) the weights stay as they are, instead of shrinking to zero.

    Source: Y. He, X. Zhang, J. Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section
    3.1 (ii); A. Hoerl, R. Kennard, Ridge Regression, Technometrics 1970.

    Args:
        moments: of x (groups, F) and y (groups, O).
        weight: W₀, shape (groups, O, F).
        ridge: relative, above 0.

    Returns:
        W (groups, O, F) and b (groups, O), in double precision.
    """
    count, start = moments.count, weight.double()
    mean_x, mean_y = moments.gram[:, :-1, -1] / count, moments.cross[:, -1] / count
    covariance = moments.gram[:, :-1, :-1] / count - mean_x[:, :, None] * mean_x[:, None]
    cross = moments.cross[:, :-1] / count - mean_x[:, :, None] * mean_y[:, None]
    residual = cross - covariance @ start.mT
    change = torch.stack([_solve(c, r, ridge) for c, r in zip(covariance, residual, strict=True)])
    fitted = start + change.mT
    return fitted, mean_y - (fitted @ mean_x[..., None])[..., 0]


def _solve(covariance: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """(C + λ I)⁻¹ R for one group, (F, F) and (F, O); the ridge grows where rounding has made C indefinite."""
    scale = float(covariance.diagonal().clamp(min=0).mean()) if len(covariance) else 0.0
    if scale <= 0:
        return torch.zeros_like(residual)
    while True:
        shifted = covariance.clone()
        shifted.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed):
            return torch.cholesky_solve(residual, factor)
        ridge *= 10
