"""What a channel's activations say: how often they are zero, how much they vary, how evenly they spread.

Each function takes one number per channel and image, (n, images), as `observing.py` gathers them.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 100


def apoz(zero_shares: Tensor) -> Tensor:
    """1 − APoZ_j: the share of a channel's activations, over images and positions, that is not zero.

    APoZ is the average percentage of zeros behind the activation; the paper cuts where it is above mean + std of its
    layer, so that scores are compared in standard deviations.

    Source: H. Hu et al., "Network trimming", 2016.

    Args:
        zero_shares: share of the positions of channel j that are zero, per image, (n, images).
    """
    return 1 - zero_shares.double().mean(1)


def variance(responses: Tensor) -> Tensor:
    """var_i ||W_j ∗ X_i||_F over images i: a filter whose response does not change tells nothing about the image.

    Source: A. Polyak & L. Wolf, "Channel-level acceleration of deep face representations", 2015.

    Args:
        responses: Frobenius norm of the filter's own output, before bias, norm and activation, (n, images).
    """
    return responses.double().var(1, correction=0)


def entropy(pooled: Tensor) -> Tensor:
    """−Σ_b p_b ln p_b, with p_b the share of images whose pooled activation falls into bin b of `BINS`.

    The bins divide the range of each channel's own values, so that the scale of a channel does not count.

    Source: J.-H. Luo & J. Wu, "An entropy-based pruning method for CNN compression", 2017.

    Args:
        pooled: mean of channel j over positions, per image, (n, images).
    """
    values = pooled.double()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    place = (values - low) / torch.where(high > low, high - low, 1) * BINS
    bins = torch.zeros(len(values), BINS, dtype=torch.float64)
    bins.scatter_add_(1, place.long().clamp(max=BINS - 1), torch.ones_like(values))
    nats: Tensor = torch.special.entr(bins / values.shape[1]).sum(1)
    return nats
