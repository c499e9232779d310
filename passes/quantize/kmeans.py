"""k-means over many sub-spaces at once: where the codewords of product quantization begin.

A network has thousands of small, independent problems of one size (AlexNet's fc6: 2304 sub-spaces, 4096 vectors of 4
numbers, 32 codewords each). They are solved side by side, some at a time, so that what is computed stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = 2**20
"""Scores of vectors against codewords that exist at a time: 4 MB."""

SHARE, ENOUGH = 4, 16
"""Where a quarter of the vectors gives 16 per codeword, most iterations look at that quarter alone."""


@dataclass(frozen=True)
class Clusters:
    """What k-means found.

    Attributes:
        codebook: codewords (M, K, d).
        labels: the nearest codeword of every vector, uint8 (M, n).
        distortion: sum of squared distances of all vectors from their codewords, per sub-space (M,), double.
    """

    codebook: Tensor
    labels: Tensor
    distortion: Tensor


def kmeans(
    points: Tensor, codewords: int, *, generator: torch.Generator, iterations: int = 40, tolerance: float = 1e-3
) -> Clusters:
    """Lloyd's algorithm in every sub-space, from randomly chosen vectors.

    A codeword that lost all its vectors takes the vector that is farthest from its own codeword. Vectors that occur
    several times may leave codewords without any: these stay where they are.

    Source: S. Lloyd, Least Squares Quantization in PCM, 1982; H. Jegou et al., Product Quantization for Nearest
    Neighbor Search, 2011.

    Args:
        points: vectors (M, n, d) of M sub-spaces.
        codewords: K, at most 256.
        generator: draws the vectors to begin with, on the CPU.
        iterations: at most so many; of many vectors most of them look at a quarter.
        tolerance: a group of sub-spaces is done when its distortion falls by less than this share.
    """
    _, vectors, width = points.shape
    step = max(1, SCORES // max(1, vectors * codewords))
    parts = [_solve(part, codewords, generator, iterations, tolerance) for part in torch.split(points, step)]
    if not parts:
        empty = points.new_zeros(0, codewords, width)
        return Clusters(empty, empty.new_zeros(0, vectors, dtype=torch.uint8), empty.new_zeros(0, dtype=torch.float64))
    codebooks, labels, distortions = zip(*parts, strict=True)
    return Clusters(torch.cat(codebooks), torch.cat(labels), torch.cat(distortions))


def nearest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest of K scores (.., K, n), and its index, the first where several are, as uint8; both (.., n).

    The same as `min(-2)`, made of steps that use whole vector registers: several times as fast on a CPU. The scores are
    overwritten.
    """
    words = scores.shape[-2]
    least = scores.amin(-2, keepdim=True)
    rank = torch.arange(words - 1, -1, -1, dtype=scores.dtype, device=scores.device)
    first = scores.eq_(least).mul_(rank[:, None]).amax(-2)
    return least.squeeze(-2), (words - 1 - first).to(torch.uint8)


def assign(columns: Tensor, squares: Tensor, words: Tensor, prices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nearest codeword (M, n) of (M, d, K), and what it costs (M, n): the squared distance from it, and its price.

    Args:
        columns: vectors (M, d, n).
        squares: their squared lengths (M, n).
        words: codewords.
        prices: of each codeword (M, K), none below zero; None: of distance alone.
    """
    lengths = words.square().sum(1)
    if prices is not None:
        lengths += prices
    scores = torch.baddbmm(lengths.unsqueeze(2), words.mT, columns, alpha=-2)  # |x - c|² without |x|²
    least, labels = nearest(scores)
    return labels, (least + squares).clamp_(min=0)


def totals(values: Tensor, labels: Tensor, codewords: int) -> tuple[Tensor, Tensor]:
    """Sum (M, d, K) and number (M, 1, K) of the vectors (M, d, n) that bear each label (M, n)."""
    where = labels.long().unsqueeze(1)
    sums = values.new_zeros(*values.shape[:2], codewords)
    sums.scatter_add_(2, where.expand_as(values), values)
    counts = values.new_zeros(len(values), 1, codewords)
    counts.scatter_add_(2, where, torch.ones_like(values[:, :1]))
    return sums, counts


def _solve(
    points: Tensor, codewords: int, generator: torch.Generator, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """k-means in a few sub-spaces; see `kmeans`."""
    columns = points.transpose(1, 2).contiguous()  # (M, d, n): what is done per dimension runs along the vectors
    words = _first(columns, codewords, generator)
    if columns.shape[2] >= SHARE * ENOUGH * codewords:
        words = _lloyd(columns[:, :, ::SHARE].contiguous(), words, iterations, tolerance)
        iterations = -(-iterations // SHARE)
    words = _lloyd(columns, words, iterations, tolerance)
    labels, gaps = assign(columns, columns.square().sum(1), words)
    return words.transpose(1, 2).contiguous(), labels, gaps.sum(1, dtype=torch.float64)


def _lloyd(columns: Tensor, words: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Codewords (M, d, K) after so many iterations on vectors (M, d, n), or fewer if little changes."""
    squares, last = columns.square().sum(1), float("inf")
    for _ in range(iterations):
        labels, gaps = assign(columns, squares, words)
        distortion = float(gaps.sum(dtype=torch.float64))
        if distortion >= last * (1 - tolerance):
            break
        last = distortion
        sums, counts = totals(columns, labels, words.shape[2])
        words = torch.where(counts > 0, sums / counts.clamp(min=1), words)
        _refill(words, counts[:, 0], columns, gaps)
    return words


def _first(columns: Tensor, codewords: int, generator: torch.Generator) -> Tensor:
    """Randomly chosen vectors, different ones as far as there are enough, as codewords (M, d, K)."""
    count, width, vectors = columns.shape
    order = torch.rand(count, vectors, generator=generator).argsort(1)
    chosen = order[:, torch.arange(codewords) % vectors].to(columns.device)
    return columns.gather(2, chosen.unsqueeze(1).expand(-1, width, -1))


def _refill(words: Tensor, counts: Tensor, columns: Tensor, gaps: Tensor) -> None:
    """Move codewords without vectors, words (M, d, K) in place, to the vectors with the largest gaps."""
    for number in (counts == 0).any(1).nonzero().flatten().tolist():
        empty = (counts[number] == 0).nonzero().flatten()[: gaps.shape[1]]
        far = gaps[number].topk(len(empty))
        useful = far.values > 0
        words[number][:, empty[useful]] = columns[number][:, far.indices[useful]]
