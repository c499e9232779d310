"""Network slimming: the factor of the batch norm tells what a channel is worth.

It means most after training with a penalty λ Σ|γ| (λ = 1e-4 for VGG, 1e-5 for ResNet in the paper). Factors are
compared as they are, through all layers, with `scope: global`.

Source: Z. Liu et al., "Learning efficient convolutional networks through network slimming", ICCV 2017.
"""

from __future__ import annotations

from torch import Tensor


def slimming(gamma: Tensor) -> Tensor:
    """|γ_j| of each channel of a batch norm; (n,) -> (n,)."""
    return gamma.abs()
