"""Histograms of values whose range nobody knows in advance, which can be merged without error.

Each channel has bins of width 2^k that begin at multiples of it. When a value falls outside, k rises until everything
seen fits again, and neighbouring bins are added up: bins of width 2^k lie exactly within those of 2^(k+1), so nothing
is interpolated. k and all counts depend on the values alone, not on the order or the pieces in which they came.

The only error is the width of a bin: at least half of the bins lie between the lowest and the highest value (less one
at either end), so the width is below 2 (max − min) / (bins − 2). Values that differ by less than 2^-40 of the
largest magnitude share a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_RESOLUTION, _FINEST = 40, -1000


@dataclass
class Histogram:
    """Counts of the values of each channel; bin j of channel c holds [first_c + j, first_c + j + 1) · 2^exponent_c.

    Attributes:
        low, high: lowest and highest value so far, (channels,); infinite where there is none.
        exponent: k of each channel, (channels,).
        first: number of the first bin, counted from 0, (channels,).
        counts: (channels, bins).
    """

    low: Tensor
    high: Tensor
    exponent: Tensor
    first: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, channels: int, bins: int) -> Histogram:
        """No values yet."""
        none = torch.full((channels,), torch.inf, dtype=torch.float64)
        zeros = torch.zeros(channels, dtype=torch.int64)
        counts = torch.zeros(channels, bins, dtype=torch.int64)
        return cls(none, -none, torch.full_like(zeros, _FINEST), zeros, counts)

    @property
    def bins(self) -> int:
        """Number of bins of each channel."""
        return self.counts.shape[1]

    def add(self, values: Tensor) -> None:
        """Count more values, (channels, n), finite, float64, on any device."""
        if not values.shape[1]:
            return
        self._widen(values.amin(1).cpu(), values.amax(1).cpu())
        device = values.device
        scale = _power(-self.exponent).to(device)
        row = torch.arange(len(values), device=device) * self.bins - self.first.to(device)
        index = (values * scale[:, None]).floor_().long().add_(row[:, None])
        self.counts += torch.bincount(index.flatten(), minlength=self.counts.numel()).view_as(self.counts).cpu()

    def merge(self, other: Histogram) -> None:
        """Count all that another histogram of as many channels and bins has counted; that one stays as it is."""
        self._widen(other.low, other.high)
        self.counts += other._counts_in(self.exponent, self.first)

    def widths(self) -> FloatArray:
        """Width of each channel's bins, (channels,)."""
        widths: FloatArray = _power(self.exponent).numpy()
        return widths

    def edges(self, channel: int) -> FloatArray:
        """Edges of one channel's bins, (bins + 1,), rising."""
        numbers = np.arange(self.bins + 1) + int(self.first[channel])
        edges: FloatArray = numbers * self.widths()[channel]
        return edges

    def entropy(self) -> FloatArray:
        """−Σ_b p_b log p_b of each channel in nats, (channels,).

        All channels are looked at with bins of one width, the widest: how much a channel that hardly moves tells is
        measured with the yardstick of those that do.
        """
        exponent = self.exponent.max().expand_as(self.exponent)
        share = self._counts_in(exponent, self._number(self.low, exponent)).double()
        share /= share.sum(1, keepdim=True).clamp(min=1)
        entropy: FloatArray = (torch.special.entr(share).sum(1)).numpy()
        return entropy

    def _widen(self, low: Tensor, high: Tensor) -> None:
        """Make room for values between `low` and `high`, (channels,) each."""
        low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        exponent = _exponents(low, high, self.bins)
        first = self._number(low, exponent)
        if not (torch.equal(exponent, self.exponent) and torch.equal(first, self.first)):
            self.counts = self._counts_in(exponent, first)
            self.exponent, self.first = exponent, first
        self.low, self.high = low, high

    def _counts_in(self, exponent: Tensor, first: Tensor) -> Tensor:
        """The counts in bins that are as wide or wider; what is not there is zero."""
        shift = (exponent - self.exponent).clamp(0, 62)[:, None]
        numbers = (self.first[:, None] + torch.arange(self.bins)) >> shift
        place = (numbers - first[:, None]).clamp(0, self.bins - 1)  # only empty bins lie outside
        return torch.zeros_like(self.counts).scatter_add_(1, place, self.counts)

    @staticmethod
    def _number(values: Tensor, exponent: Tensor) -> Tensor:
        """Number of the bin that holds a value; 0 for none."""
        scaled = torch.where(values.isfinite(), values, 0) * _power(-exponent)
        return scaled.floor().long()


def _exponents(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The least k with which the bins of width 2^k from `low` to `high` are no more than `bins`; (channels,) each."""
    seen = low <= high
    low, high = torch.where(seen, low, 0), torch.where(seen, high, 0)
    magnitude = torch.maximum(low.abs(), high.abs())
    finest = (torch.frexp(magnitude).exponent.long() - _RESOLUTION).clamp(min=_FINEST)
    guess = torch.frexp(high - low).exponent.long() - bins.bit_length() - 1
    finest = torch.where(seen & (magnitude > 0), finest, _FINEST)
    exponent = torch.where(high > low, torch.maximum(guess, finest), finest)
    while True:
        used = Histogram._number(high, exponent) - Histogram._number(low, exponent) + 1
        if not bool((used > bins).any()):
            return exponent
        exponent = exponent + (used > bins)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent exactly; torch's ldexp and exp2 round, the former even to single precision."""
    return torch.from_numpy(np.ldexp(1.0, exponent.numpy()))
