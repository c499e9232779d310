"""SelectionMask: one learned factor per channel, with a cut that can be taken back."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ...ir.dialect import register_layer
from ...ir.errors import OptionError
from .channel_mask import ChannelMask

LEAK = 2.0**-20  # exact in every binary format with enough exponents, bfloat16 too
Alive = Literal["none", "sums", "factors", "layers"]
ALIVE = ("none", "sums", "factors", "layers")


class SelectionMask(ChannelMask):
    """Multiplies channels with learned factors, of which some are switched off: `y[:, c] = mask[c] keep[c] x[:, c]`.

    The cut is soft: forward it is complete, backward it does not exist (a straight-through estimator, Bengio et al.
    2013),

        ∂L/∂mask[c] = Σ ∂L/∂y[:, c] · x[:, c]      ∂L/∂x[:, c] = mask[c] · ∂L/∂y[:, c]

    for channels that are cut as for those that are kept. So the factor of a channel that was cut by mistake sees what
    the loss would gain by its return, and the layers before it go on learning, until `keep` is decided anew.

    A ReLU behind the mask has no slope where its input is exactly zero, and nothing comes back through it. The leak
    changes that: in training a channel that is cut passes on `LEAK` = 2^-20 of itself, too little to be seen in a sum,
    and enough to tell the ReLU on which side it would be. In evaluation mode and without gradients it is exactly zero.

    `alive` says what of a channel that is cut goes on learning:

        none      nothing: the cut is hard
        sums      both gradients without the leak: what meets other channels in a sum before its ReLU
        factors   the factor, with the leak; the layers before get a gradient from what is on alone
        layers    factor and layers, with the leak

    Args:
        channels: number of channels C.
        dim: the dimension of the input that holds them.
        alive: see above.
    """

    keep: Tensor
    """Which channels are on, bool `(C,)`; a buffer, set from outside."""

    def __init__(self, channels: int, dim: int = 1, alive: Alive = "factors") -> None:
        super().__init__(channels, dim)
        if alive not in ALIVE:
            raise OptionError(f"alive is {alive!r}; allowed: {', '.join(ALIVE)}")
        self.alive: Alive = alive
        self.register_buffer("keep", torch.ones(channels, dtype=torch.bool))

    @property
    def factors(self) -> Tensor:
        """What channels are multiplied with, `(C,)`; 0 where cut."""
        return self.mask * self.keep

    @property
    def cut(self) -> Tensor:
        """Which channels are cut, bool `(C,)`: those switched off, and no others, however small their factor."""
        return ~self.keep

    def forward(self, x: Tensor) -> Tensor:
        """Mask a tensor of any shape whose dimension `dim` has C entries; shape and dtype stay."""
        if self.alive != "none" and self.training and torch.is_grad_enabled():
            y: Tensor = _SoftCut.apply(x, self.mask, self.keep, self.dim, self.alive)
            return y
        return x * _along(self.factors, x, self.dim)

    def extra_repr(self) -> str:
        """The arguments and the number of channels that are on, as `repr` shows them."""
        on = "" if self.keep.is_meta else f", on={int(self.keep.sum())}"
        return f"{super().extra_repr()}, alive={self.alive!r}{on}"


class _SoftCut(torch.autograd.Function):
    """`x * (mask * keep)` along a dimension, but for the leak, whose gradients are those of `x * mask`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, keep: Tensor, dim: int, alive: Alive) -> Tensor:
        ctx.save_for_backward(x, mask * keep if alive == "factors" else mask)
        ctx.dim, ctx.dtype = dim % x.dim(), mask.dtype
        return x * _along(mask * torch.where(keep, 1.0, 0.0 if alive == "sums" else LEAK), x, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,), (x, passing) = gradients, ctx.saved_tensors
        others = [d for d in range(x.dim()) if d != ctx.dim]
        by_x = gradient * _along(passing, x, ctx.dim) if ctx.needs_input_grad[0] else None
        by_mask = (gradient * x).sum(others, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        return by_x, by_mask, None, None, None


def _along(factors: Tensor, x: Tensor, dim: int) -> Tensor:
    """Factors `(C,)` in the shape that broadcasts along a dimension of x, in its dtype: autocast stays in effect."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return factors.reshape(shape).to(x.dtype)


register_layer(SelectionMask, ("channels", "dim", "alive"))
