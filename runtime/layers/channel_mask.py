"""ChannelMask: one factor per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ir.dialect import register_layer


class ChannelMask(nn.Module):
    """Multiplies every channel with its own factor: `y[:, c] = mask[c] * x[:, c]`.

    A channel whose factor is zero contributes nothing behind the mask and can be cut; any other factor can be folded
    into the weights around it. The factors are a parameter, so that they can be learned; they begin at one. One
    mask may serve several places of a network (a residual stream and all who add to it): then all of them call the
    same layer.

    Args:
        channels: number of channels C.
        dim: the dimension of the input that holds them; 1 in `(N, C, H, W)`, -1 in `(N, L, C)`.
    """

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.dim = dim
        self.mask = nn.Parameter(torch.ones(channels))

    @property
    def factors(self) -> Tensor:
        """What channels are multiplied with, `(C,)`."""
        return self.mask

    @property
    def cut(self) -> Tensor:
        """Which channels are zero behind the mask, bool `(C,)`."""
        return self.mask.detach() == 0

    def forward(self, x: Tensor) -> Tensor:
        """Mask a tensor of any shape whose dimension `dim` has C entries; the shape stays."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x * self.mask.reshape(shape)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        return f"{self.channels}, dim={self.dim}"


register_layer(ChannelMask, ("channels", "dim"))
