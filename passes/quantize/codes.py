"""Codewords and indices of one layer, while they are learned."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from .kmeans import kmeans
from .plan import Layout
from .rate import code_lengths, coded, constrained


@dataclass
class Codes:
    """A quantised weight.

    Attributes:
        codebook: codewords (M, K, d).
        labels: of every group, tap and output: uint8 (M, groups, taps, outputs).
        multiplier: μ, the squared error of the weight that is taken for one bit of an index less.
    """

    codebook: Tensor
    labels: Tensor
    multiplier: float = 0.0

    def columns(self, index: int) -> Tensor:
        """The decoded weight of one sub-space, (groups, taps * d, outputs)."""
        return gather(self.codebook[index], self.labels[index])

    def decoded(self) -> Tensor:
        """The decoded weight (groups, M * taps * d, outputs), features in the order of `Layout`."""
        return torch.cat([self.columns(index) for index in range(len(self.codebook))], 1)

    @property
    def indices(self) -> Tensor:
        """Indices as layers hold them, uint8 (taps, M, groups * outputs)."""
        return self.labels.permute(2, 0, 1, 3).flatten(2).contiguous()

    @property
    def counts(self) -> Tensor:
        """How often each codeword is named, (M, K)."""
        words = self.codebook.shape[1]
        return torch.stack([torch.bincount(part.flatten(), minlength=words) for part in self.labels.long()])

    @property
    def code_bits(self) -> float:
        """Bits of all indices with an ideal code for the layer, by the ranks of codewords in their sub-spaces."""
        counts = self.counts
        return coded(code_lengths(counts), counts)


def gather(words: Tensor, labels: Tensor) -> Tensor:
    """Codewords (K, d) by their labels (groups, taps, outputs), as columns (groups, taps * d, outputs)."""
    groups, taps, outputs = labels.shape
    found = words.t().index_select(1, labels.flatten().long())  # (d, groups * taps * outputs)
    return found.view(-1, groups, taps, outputs).permute(1, 2, 0, 3).reshape(groups, -1, outputs)


def in_order(layout: Layout, weight: Tensor) -> Tensor:
    """A weight (groups, outputs, inputs * taps) as columns (groups, M * taps * d, outputs) in the order of `Layout`."""
    order = layout.order.to(weight.device)
    columns = weight[:, :, order.clamp(min=0)].transpose(1, 2)
    return (columns * (order >= 0)[:, None]).contiguous()


def first_codes(
    layout: Layout, weight: Tensor, generator: torch.Generator, iterations: int, rate_weight: float = 0.0
) -> Codes:
    """Plain product quantization: k-means of each sub-space's vectors over all taps, outputs and groups.

    With a weight r on the rate, it goes on from there to a smaller E + μ · bits (`rate.py`), where E is the squared
    error and `bits` are those of all n indices: μ = r · 2 ln(2) / d · E₀ / n, E₀ being the error of k-means. At high
    rates one bit more divides the error by 4^(1/d): r = 1 is the slope of error over rate at the error of k-means.

    Args:
        layout: of the layer.
        weight: columns (groups, M * taps * d, outputs), in its order.
        generator: draws where k-means begins.
        iterations: of k-means, at most; the same number with the rate.
        rate_weight: r.
    """
    groups, outputs = layout.groups, layout.outputs
    by_space = weight.view(groups, layout.count, layout.taps, layout.width, outputs)
    points = by_space.permute(1, 0, 2, 4, 3).reshape(layout.count, -1, layout.width)
    found = kmeans(points, layout.words, generator=generator, iterations=iterations)
    slope = 2 * log(2) / layout.width
    multiplier = rate_weight * slope * float(found.distortion.sum()) / max(1, found.labels.numel())
    if multiplier > 0:
        found = constrained(points, found, multiplier, iterations=iterations)
    return Codes(found.codebook, found.labels.view(layout.count, groups, layout.taps, outputs), multiplier)
