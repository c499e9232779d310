"""Error correction: codewords and indices by the error of the layer's response, sub-space by sub-space.

Source: J. Wu et al., Quantized Convolutional Neural Networks for Mobile Devices, CVPR 2016, section 3.2. They keep
activations and descend on them; here Gram matrices take their place, the codewords of a convolution, which all taps
share, are found together, and a step that would raise the error is not made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Codes
from .problem import Problem
from .rate import code_lengths, coded
from .subspace import Subspace

ROWS = 256
"""Features whose residual is held at a time."""


class Correction:
    """Block coordinate descent on ‖Y − X Ŵ‖² + λ ‖W − Ŵ‖² + μ bits over the sub-spaces of one layer.

    The residual Q = Xᵀ(Y − X Ŵ) + λ (W − Ŵ) = G Δ + S says how the error falls with each weight. It is made for the
    features of a few sub-spaces by one matrix product, and kept up to date while these are treated one by one: a sweep
    over a layer costs inputs² × outputs multiply-accumulates, all of it in large products.

    μ is 0 unless the codes have a price on their rate, and then the same price in units of the response: errors of the
    weight that know nothing of each other give the response, per squared error, the mean of G's diagonal.

    Args:
        problem: what to minimise.
        codes: where to begin; changed in place.
        rounds: times that codewords and indices of a sub-space are updated in turn before the next one's.
    """

    def __init__(self, problem: Problem, codes: Codes, *, rounds: int = 1) -> None:
        self.problem, self.codes, self.rounds = problem, codes, rounds
        self.gap = problem.weight - codes.decoded()
        self.multiplier = codes.multiplier * float(problem.gram.diagonal(dim1=1, dim2=2).mean(dtype=torch.float64))
        self.first = problem.error(self.gap)
        """The error to begin with, without the rate."""
        self.errors = [self.first]
        """What is minimised, to begin with and behind each sweep; never rises."""
        self.prices: Tensor | None = None
        if self.multiplier:
            self.prices = self.multiplier * code_lengths(codes.counts)
            self.errors[0] += coded(self.prices, codes.counts)

    def sweep(self) -> float:
        """Treat every sub-space once; return what is minimised, behind it."""
        error, height = self.errors[-1], self._height
        per_block = max(1, ROWS // height)
        for first in range(0, len(self.codes.codebook), per_block):
            last = min(first + per_block, len(self.codes.codebook))
            error -= self._block(first, last)
        if self.prices is not None:
            error -= self._recode(self.prices)
        self.errors.append(min(max(error, 0.0), self.errors[-1]))
        return self.errors[-1]

    def _recode(self, old: Tensor) -> float:
        """Give the labels that there are now the code that suits them; return what that saves."""
        counts = self.codes.counts
        self.prices = self.multiplier * code_lengths(counts)
        return coded(old, counts) - coded(self.prices, counts)

    @property
    def _height(self) -> int:
        """Features of one sub-space."""
        return self.codes.labels.shape[2] * self.codes.codebook.shape[2]

    def _block(self, first: int, last: int) -> float:
        """Treat some sub-spaces in a row; return by how much less is left of what is minimised."""
        height, gained = self._height, 0.0
        rows = slice(first * height, last * height)
        gram = self.problem.gram[:, rows]
        residual = gram @ self.gap
        if self.problem.drift is not None:
            residual += self.problem.drift[:, rows]
        for index in range(first, last):
            own = slice(index * height, (index + 1) * height)
            here = slice(own.start - rows.start, own.stop - rows.start)
            space = Subspace(
                gram[:, here, own],
                residual[:, here],
                self.codes.codebook[index],
                self.codes.labels[index],
                self.prices,
            )
            change, gain = space.improved(self.rounds)
            if gain <= 0:
                continue
            gained += gain
            self.codes.codebook[index], self.codes.labels[index] = space.words, space.labels
            self.gap[:, own] -= change
            residual[:, here.stop :] -= gram[:, here.stop :, own] @ change
        return gained
