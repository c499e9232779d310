"""First-order Taylor expansion of the loss in a channel's removal.

Give every channel a gate z = 1 that multiplies it wherever a layer reads it; removal is z = 0, and to first order the
loss of image i changes by −s_i, s_i = ∂L_i/∂z = Σ_positions (∂L_i/∂a) a. The gate stands behind norm and activation of
all layers that hold the channel, so that a residual stream counts as one: the change that removal really makes.
"""

from __future__ import annotations

from torch import Tensor


def taylor(batch_means: Tensor) -> Tensor:
    """mean_b (mean_{i in b} s_i)^2 over batches b.

    At a gate right behind a batch norm s = g_γ γ + g_β β: the authors' Taylor-FO-BN; behind a ReLU, which passes what
    is positive unchanged, s is the same. Scores are in one unit, that of the loss squared, in all layers.

    Source: P. Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019.

    Args:
        batch_means: mean of s_i over each batch, (n, batches).
    """
    return batch_means.double().square().mean(1)


def taylor_abs(slopes: Tensor) -> Tensor:
    """mean_i |s_i|, then divided by the layer's L2 norm: signs of different images do not cancel.

    Source: P. Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017.

    Args:
        slopes: s_i of every image, (n, images).
    """
    return slopes.double().abs().mean(1)
