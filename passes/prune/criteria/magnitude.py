"""Size and spread of a filter's weights.

Sources: H. Li et al., "Pruning filters for efficient ConvNets", 2017 (l1, l2); H. Li et al., "Pruning filters by their
standard deviation", J. Zhejiang Univ. 2019 (std).
"""

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


def std(rows: Tensor) -> Tensor:
    """sqrt(mean_i (w_i - mean w)^2) of each row; rows (n, weights) -> (n,); 0 for rows of one weight."""
    return rows.std(dim=1, correction=0)
