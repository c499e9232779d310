"""FPGM: filters near the geometric median of their layer can be replaced by the others.

Source: Y. He et al., "Filter pruning via geometric median", CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fpgm(rows: Tensor) -> Tensor:
    """sum_k ||F_j − F_k||_2 of each row, over all rows of the layer; rows (n, weights) -> (n,)."""
    rows = rows.double()  # in single precision, equal filters would not be at distance 0
    return torch.cdist(rows, rows).sum(1)
