"""Magnitude of a filter's weights (Li et al. 2017, "Pruning filters for efficient ConvNets")."""

from __future__ import annotations

import torch
from torch import Tensor


def l1(rows: Tensor) -> Tensor:
    """sum_i |w_i| of each row; rows (n, weights) -> (n,)."""
    norms: Tensor = torch.linalg.vector_norm(rows, ord=1, dim=1)
    return norms


def l2(rows: Tensor) -> Tensor:
    """sqrt(sum_i w_i^2) of each row; rows (n, weights) -> (n,)."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
