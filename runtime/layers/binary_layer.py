"""BinaryLayer: what binary convolutions and linear layers have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .binary import Scale, Weights, binarize, check_binary, latent_of


class BinaryLayer(nn.Module):
    """Base of the layers with one-bit weights; see `binary.binarize`.

    Args:
        plain: a layer of the same sizes, whose weight and bias become this one's.
        weights: as of the layer.
        scale: likewise.

    Attributes:
        weight: the latent weights W, (out, ...), which are what is trained.
        bias: (out,) or None.

    Raises:
        OptionError: an unknown choice.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Linear | nn.Conv2d, weights: Weights, scale: Scale) -> None:
        super().__init__()
        check_binary(weights, scale)
        parameters: Any = plain.weight, plain.bias  # torch declares them as tensors
        self.weight, self.bias = parameters
        self.weights: Weights = weights
        self.scale: Scale = scale

    @property
    def binary_weight(self) -> Tensor:
        """W_q, of the shape of `weight`; its gradient goes to the latent weights."""
        return binarize(self.weight, self.weights, self.scale)

    def keep(self, whole: BinaryLayer, outputs: Tensor | None, inputs: Tensor | None) -> None:
        """After a cut: give the weights that stay the values that they had in the whole layer.

        α is a mean over the filter (or the layer), so that fewer latent weights would have another one. They are
        scaled back; of ternary weights, whose zeros depend on that mean too, W_q becomes the latent weight.

        Args:
            whole: the layer before the cut; this one holds its sliced latent weights.
            outputs: indices of the filters that stay, None for all.
            inputs: of the inputs of a group.
        """
        with torch.no_grad():
            values = whole.binary_weight
            for dim, index in ((0, outputs), (1, inputs)):
                values = values if index is None else values.index_select(dim, index)
            self.weight.copy_(latent_of(values, self.weight, self.weights, self.scale))
