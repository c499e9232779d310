"""Weights of one bit: the sign of a latent weight, times one factor per filter."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...ir.errors import OptionError

Weights = Literal["binary", "ternary"]
Scale = Literal["filter", "layer", "none"]

TERNARY = 0.7
"""Latent weights below this share of the filter's mean |W| become 0 (Li, Zhang, Liu 2016, equation 6)."""


def binarize(weight: Tensor, weights: Weights = "binary", scale: Scale = "filter") -> Tensor:
    """W_q = α b with a gradient that passes unchanged: ∂L/∂W = ∂L/∂W_q.

    Per filter i of n latent weights,

        binary    b = sign(W_i), of 0 it is +1                          α_i = mean |W_i|
        ternary   b = sign(W_i) where |W_i| > 0.7 mean |W_i|, else 0    α_i = mean |W_i| over these

    which minimise ‖W_i − α b‖² (ternary: nearly so). α is computed anew from the latent weights in every call and has
    no gradient of its own; nor is the gradient cut off where a latent weight is large.

    Source: M. Rastegari et al., XNOR-Net, ECCV 2016, equations 5 and 6; Z. Cai et al., CVPR 2017, section 3; F. Li,
    B. Zhang, B. Liu, Ternary Weight Networks, 2016.

    Args:
        weight: W, shape (O, ...), one filter per entry of its first dimension.
        weights: two values or three.
        scale: one α per `filter`, one for the whole `layer`, or `none` (α = 1).

    Returns:
        W_q of the same shape and dtype.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        passed: Tensor = _StraightThrough.apply(weight, weights, scale)
        return passed
    return _quantized(weight, weights, scale)


class _StraightThrough(torch.autograd.Function):
    """The quantized weights; their gradient is that of the latent ones."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, weights: Weights, scale: Scale) -> Tensor:  # noqa: ARG004
        return _quantized(weight, weights, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return gradients[0], None, None


def _quantized(weight: Tensor, weights: Weights, scale: Scale) -> Tensor:
    if weights == "binary":  # few passes over a large weight
        alpha = _mean_size(weight, scale)
        return torch.where(weight >= 0, alpha, -alpha)
    size = weight.abs()
    taken = (size > TERNARY * _mean_size(weight, scale if scale == "layer" else "filter")).to(weight.dtype)
    if scale == "none":
        return weight.sign() * taken
    alpha = _mean_size(weight * taken, scale) / _mean_size(taken, scale).clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.where(weight >= 0, alpha, -alpha) * taken


def _mean_size(values: Tensor, scale: Scale) -> Tensor:
    """Mean |value| per filter, (O, 1, ...), or of all; 1 without a scale."""
    if scale == "none":
        return torch.ones((), dtype=values.dtype, device=values.device)
    dims = list(range(1, values.dim())) if scale == "filter" else None
    count = values.numel() if dims is None else values[0].numel()
    total: Tensor = torch.linalg.vector_norm(values, 1, dims, keepdim=dims is not None)
    return total / max(count, 1)


def latent_of(values: Tensor, latent: Tensor, weights: Weights = "binary", scale: Scale = "filter") -> Tensor:
    """Latent weights near to given ones that `binarize` turns into wanted values.

    Args:
        values: W_q, shape (O, ...): ±α, or α, 0 and -α, with one α as `scale` says.
        latent: of the same shape and, where `weights` is `binary`, the same signs.
        weights: as of `binarize`.
        scale: likewise.
    """
    if weights == "ternary":
        return values.clone()
    if scale == "none":
        return latent.clone()
    mean = _mean_size(latent, scale)
    return torch.where(mean > 0, latent * (values.abs() / mean.clamp(min=torch.finfo(latent.dtype).tiny)), values)


def check_binary(weights: str, scale: str) -> None:
    """Refuse an unknown choice.

    Raises:
        OptionError: names it and what is allowed.
    """
    for name, value, allowed in (("weights", weights, get_args(Weights)), ("scale", scale, get_args(Scale))):
        if value not in allowed:
            raise OptionError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
