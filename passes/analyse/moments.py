"""Mean and variance of a stream, merged piece by piece in double precision.

Two pieces with counts n_a, n_b, means μ_a, μ_b and sums of squared deviations Q_a, Q_b make one with

    n = n_a + n_b,   δ = μ_b − μ_a,   μ = μ_a + δ n_b / n,   Q = Q_a + Q_b + δ² n_a n_b / n,

which never subtracts large numbers of nearly the same size, as the textbook's sum of squares does.

Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, mean and squared deviations of many values at once.

    Attributes:
        count: values so far.
        mean: their mean, any shape, float64.
        deviations: Σ (x − mean)², the same shape.
    """

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def empty(cls, *shape: int) -> Moments:
        """No values yet."""
        return cls(0, torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor, dim: int = 0) -> Moments:
        """Of the values along one dimension, float64."""
        mean = values.mean(dim)
        return cls(values.shape[dim], mean, (values - mean.unsqueeze(dim)).square_().sum(dim))

    def merge(self, other: Moments) -> None:
        """Count all that another has counted; that one stays as it is."""
        count = self.count + other.count
        if not other.count:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.deviations = self.deviations + other.deviations + delta.square() * (self.count * other.count / count)
        self.count = count

    @property
    def variance(self) -> Tensor:
        """Σ (x − mean)² / count, of the values themselves, not an estimate for others."""
        return self.deviations / max(self.count, 1)
