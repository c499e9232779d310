"""Entropy-constrained vector quantization: a codeword that few vectors name has a long code, which has its price.

What is minimised is the Lagrangian of rate and distortion, Σ |w − c|² + μ Σ bits(c). Codes are those of a file: each
sub-space numbers its codewords by how often they are named, and one code for all sub-spaces of a layer gives rank r
bits(r) = −log2(share of all vectors that name a codeword of rank r), were it ideal. Labels, codewords, ranks and
lengths are chosen in turn, each the best for the others (frequent codewords have short codes): none raises the
Lagrangian.

Source: P. Chou, T. Lookabaugh, R. Gray, Entropy-Constrained Vector Quantization, IEEE Trans. ASSP 37(1), 1989.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kmeans import SCORES, Clusters, assign, totals


def code_lengths(counts: Tensor) -> Tensor:
    """Bits of each rank's code, double (K,), by how often codewords are named (M, K); infinite where a rank is not."""
    by_rank = counts.double().sort(1, descending=True).values.sum(0)
    return -(by_rank / by_rank.sum()).log2()


def of_words(values: Tensor, counts: Tensor) -> Tensor:
    """What ranks have (K,), by codeword (.., K): the rank of each among codewords that are named so often (.., K)."""
    order = counts.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(counts).scatter_(-1, order, values.to(counts.dtype).expand_as(counts))


def coded(lengths: Tensor, counts: Tensor) -> float:
    """Sum of the lengths (K,), by rank, of all codes of codewords that are named so often (.., K)."""
    by_rank = counts.double().sort(-1, descending=True).values
    return float(torch.where(by_rank > 0, by_rank * lengths, 0.0).sum())


def constrained(
    points: Tensor, found: Clusters, multiplier: float, *, iterations: int = 40, tolerance: float = 1e-3
) -> Clusters:
    """Go on from what k-means found, with a price on the rate, in all sub-spaces of a layer together.

    Args:
        points: vectors (M, n, d) of M sub-spaces.
        found: codewords and labels to begin with.
        multiplier: μ, squared distance per bit; above 0.
        iterations: at most so many.
        tolerance: done when the Lagrangian falls by less than this share.
    """
    columns, words, labels = points.mT.contiguous(), found.codebook.mT.contiguous(), found.labels.clone()
    counts = totals(columns, labels, words.shape[2])[1][:, 0]
    step = max(1, SCORES // max(1, points.shape[1] * words.shape[2]))
    parts = [slice(first, first + step) for first in range(0, len(points), step)]
    last = float("inf")
    for _ in range(iterations):
        prices = multiplier * of_words(code_lengths(counts), counts)
        lagrangian = sum(_iterate(columns[own], words[own], labels[own], counts[own], prices[own]) for own in parts)
        if lagrangian >= last * (1 - tolerance):
            break
        last = lagrangian
    gaps = [_distortion(columns[own], words[own], labels[own]) for own in parts]
    return Clusters(words.mT.contiguous(), labels, torch.cat(gaps) if gaps else found.distortion)


def _iterate(columns: Tensor, words: Tensor, labels: Tensor, counts: Tensor, prices: Tensor) -> float:
    """Labels (M, n), then codewords (M, d, K) and counts (M, K) of a few sub-spaces anew, in place.

    Returns:
        The Lagrangian with the new labels, and codewords and prices (M, K) as they were.
    """
    chosen, costs = assign(columns, columns.square().sum(1), words, prices)
    sums, numbers = totals(columns, chosen, words.shape[2])
    words.copy_(torch.where(numbers > 0, sums / numbers.clamp(min=1), words))
    labels.copy_(chosen)
    counts.copy_(numbers[:, 0])
    return float(costs.sum(dtype=torch.float64))


def _distortion(columns: Tensor, words: Tensor, labels: Tensor) -> Tensor:
    own = words.gather(2, labels.long().unsqueeze(1).expand_as(columns))
    return (columns - own).square().sum((1, 2), dtype=torch.float64)
