"""Entropy-constrained vector quantization: a codeword that few vectors name has a long code, which has its price.

What is minimised is the Lagrangian of rate and distortion, Σ |w − c|² + μ Σ bits(c), with the length of an ideal code
bits(c) = −log2(share of the vectors that name c). Vectors, codewords and lengths are chosen in turn, each the best for
the other two: no step raises the Lagrangian.

Source: P. Chou, T. Lookabaugh, R. Gray, Entropy-Constrained Vector Quantization, IEEE Trans. ASSP 37(1), 1989.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from .kmeans import SCORES, Clusters, assign, totals


def code_lengths(counts: Tensor) -> Tensor:
    """Bits of each codeword's code (.., K) by how often it is named (.., K); infinite where it is not."""
    return -(counts / counts.sum(-1, keepdim=True)).log2()


def total_bits(counts: Tensor) -> Tensor:
    """Bits of all n codes together, double (..,), by how often each codeword is named (.., K): n times the entropy."""
    counts, number = counts.double(), counts.double().sum(-1)
    return (torch.xlogy(number, number) - torch.xlogy(counts, counts).sum(-1)) / log(2)


def constrained(
    points: Tensor, found: Clusters, multiplier: float, *, iterations: int = 40, tolerance: float = 1e-3
) -> Clusters:
    """Go on from what k-means found, with a price on the rate, in every sub-space.

    A codeword that lost all its vectors stays without: its code would be infinitely long.

    Args:
        points: vectors (M, n, d) of M sub-spaces.
        found: codewords and labels to begin with.
        multiplier: μ, squared distance per bit; above 0.
        iterations: at most so many.
        tolerance: a group of sub-spaces is done when its Lagrangian falls by less than this share.
    """
    _, vectors, _ = points.shape
    step = max(1, SCORES // max(1, vectors * found.codebook.shape[1]))
    groups = zip(*(torch.split(part, step) for part in (points, found.codebook, found.labels)), strict=True)
    parts = [_solve(some, words, labels, multiplier, iterations, tolerance) for some, words, labels in groups]
    return Clusters(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _solve(
    points: Tensor, codebook: Tensor, labels: Tensor, multiplier: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codewords, labels and distortion of a few sub-spaces; see `constrained`."""
    columns, words = points.transpose(1, 2).contiguous(), codebook.transpose(1, 2).contiguous()
    squares, last = columns.square().sum(1), float("inf")
    counts = totals(columns, labels, words.shape[2])[1][:, 0]
    for _ in range(iterations):
        labels, costs = assign(columns, squares, words, multiplier * code_lengths(counts))
        lagrangian = float(costs.sum(dtype=torch.float64))
        if lagrangian >= last * (1 - tolerance):
            break
        last = lagrangian
        sums, numbers = totals(columns, labels, words.shape[2])
        words, counts = torch.where(numbers > 0, sums / numbers.clamp(min=1), words), numbers[:, 0]
    own = words.gather(2, labels.long().unsqueeze(1).expand_as(columns))
    return words.mT.contiguous(), labels, (columns - own).square().sum((1, 2), dtype=torch.float64)
