"""Optimal brain damage and surgeon, for whole channels.

At a minimum the gradient vanishes and removing weights w_Q costs ½ w_Qᵀ H w_Q. As Hessian H both take the empirical
Fisher matrix, the mean of g gᵀ over the gradients g of the loss of single images: it needs first derivatives only, is
never negative, and equals the Hessian where the network fits its data.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.1  # of the mean diagonal: as many images as channels are not always there


def obd(rows: Tensor, squares: Tensor) -> Tensor:
    """Σ_q ½ h_qq w_q² over the weights q of a filter, with h_qq = mean_i (∂L_i/∂w_q)²: the Hessian's diagonal alone.

    Source: Y. LeCun, J. Denker, S. Solla, "Optimal brain damage", NIPS 1989.

    Args:
        rows: weights of each filter, (n, weights).
        squares: h_qq of each, (n, weights).
    """
    return 0.5 * (squares.double() * rows.double().square()).sum(1)


def obs(slopes: Tensor) -> Tensor:
    """½ (z_c² / [H⁻¹]_cc − λ) for the gate z_c = 1 of channel c: the cost of removal if the others make up for it.

    The parameters are the gates of one dependency group (each scales all weights of its channel), and
    H = mean_i s_i s_iᵀ + λ I over the slopes s = ∂L/∂z, with λ = `DAMPING` times the mean of the diagonal: what the
    damping alone would make each channel cost. Two channels that do the same work have each a small score, for the
    other can take over.

    Source: B. Hassibi, D. Stork, "Second order derivatives for network pruning: optimal brain surgeon", NIPS 1992.

    Args:
        slopes: s_i of every image, (n, images).
    """
    slopes = slopes.double()
    fisher = slopes @ slopes.T / slopes.shape[1]
    damping = DAMPING * fisher.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=torch.float64))
    cost: Tensor = 0.5 * (1 / inverse.diagonal() - damping).clamp(min=0)
    return cost
