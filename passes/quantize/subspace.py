"""One sub-space of one layer: its codewords and indices while everything else stays."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import gather
from .kmeans import nearest
from .problem import inner
from .rate import coded, of_words

STEPS = 12
"""Steps of conjugate gradients at most."""

PRECISION = 1e-3
"""They stop when the residual has fallen to this share."""


class Subspace:
    """Codewords D_k and the labels of all outputs in the features of one sub-space.

    With the Gram matrix A of these features (all taps together) and the residual Q of every output o, the error of the
    layer changes with the change δ of its weights by Σ_o δ_oᵀ A δ_o − 2 δ_oᵀ Q_o.

    *Codewords.* With the labels fixed, δ = Z e for the changes e of all codewords, Z the matrix that puts codewords
    where labels name them. The best e solves Zᵀ A Z e = Zᵀ Q. For a linear layer that is block diagonal, and in closed
    form e_k = A⁻¹ mean of Q_o over the outputs with label k. For a convolution it couples the codewords, as one filter
    has several taps: conjugate gradients solve it, preconditioned by what the solution would be without coupling, so
    that the linear layer is done in one step and no step raises the error.

    *Labels.* Tap by tap, each output takes the codeword with the least D_kᵀ A D_k − 2 D_kᵀ (Q_o + A D_old), A of that
    tap alone.

    *Rate.* With a price on ranks, a label costs what the rank of its codeword does, where the first rank has the one
    that is named most often, and what falls is the error plus the prices of all labels.

    Args:
        gram: A, (groups, taps * d, taps * d).
        residual: Q, (groups, taps * d, outputs).
        words: codewords (K, d).
        labels: uint8 (groups, taps, outputs).
        prices: of a label by its codeword's rank, in units of the error, (K,), rising; None: labels are free.
    """

    def __init__(
        self, gram: Tensor, residual: Tensor, words: Tensor, labels: Tensor, prices: Tensor | None = None
    ) -> None:
        self.gram, self.start = gram.contiguous(), residual
        self.residual, self.words, self.labels = residual.clone(), words.clone(), labels.clone()
        self.taps, self.width, self.prices = labels.shape[1], words.shape[1], prices
        blocks = [self._tap(tap) for tap in range(self.taps)]
        self.average = torch.stack([self.gram[:, own, own].mean(0) for own in blocks]).mean(0)
        self.inverse = _inverse(self.average)

    def improved(self, rounds: int) -> tuple[Tensor, float]:
        """Update codewords and labels in turn; the change of the weights (groups, taps * d, outputs), and the gain."""
        before, price = gather(self.words, self.labels), self._price()
        for _ in range(rounds):
            self._update_words()
            self._refill()
            self._update_labels()
        change = gather(self.words, self.labels) - before
        # the residual fell by A δ: δᵀ A δ − 2 δᵀ Q_before = −δᵀ (Q_before + Q_behind)
        return change, inner(change, self.start + self.residual) + price - self._price()

    def _price(self) -> float:
        """What all labels cost."""
        return 0.0 if self.prices is None else coded(self.prices, self._counts())

    def _tap(self, tap: int) -> slice:
        return slice(tap * self.width, (tap + 1) * self.width)

    # -- codewords ------------------------------------------------------------------------------------------

    def _update_words(self) -> None:
        """Solve Zᵀ A Z e = Zᵀ Q by conjugate gradients, and add e."""
        counts = self._counts().clamp(min=1)[:, None]
        change = torch.zeros_like(self.words)
        rest = self._collected(self.residual)
        ahead = rest @ self.inverse / counts
        direction, slope = ahead, inner(rest, ahead)
        enough = slope * PRECISION**2
        for _ in range(STEPS):
            pushed = self.gram @ gather(direction, self.labels)
            image = self._collected(pushed)
            bend = inner(direction, image)
            if not (slope > enough and bend > 0):
                break
            length = slope / bend
            change += length * direction
            self.residual -= length * pushed
            rest = rest - length * image
            ahead = rest @ self.inverse / counts
            last, slope = slope, inner(rest, ahead)
            direction = ahead + slope / last * direction
        self.words += change

    def _collected(self, columns: Tensor) -> Tensor:
        """Sum of columns (groups, taps * d, outputs) over the places of each codeword, (K, d)."""
        groups, _, outputs = columns.shape
        values = columns.view(groups, self.taps, self.width, outputs).permute(2, 0, 1, 3).reshape(self.width, -1)
        sums = values.new_zeros(self.width, len(self.words))
        return sums.scatter_add_(1, self._where.expand(self.width, -1), values).t().contiguous()

    @property
    def _where(self) -> Tensor:
        return self.labels.flatten().long()

    def _counts(self) -> Tensor:
        """Places of each codeword, (K,)."""
        return torch.bincount(self._where, minlength=len(self.words)).to(self.words.dtype)

    # -- codewords without any place ------------------------------------------------------------------------

    def _refill(self) -> None:
        """Give codewords that no label names the better half of the most used one, for the labels to choose.

        The vectors that the most used codeword stands for are split by the direction in which the one with the largest
        gain wants to go; the new codeword is what suits those on that side best. Nothing else changes: no error yet.
        """
        counts = self._counts()
        wanted = None
        for empty in (counts == 0).nonzero().flatten().tolist():
            if wanted is None:
                wanted = self._columns(self.residual)
            largest = int(counts.argmax())
            if int(counts[largest]) < 2:
                return
            members = wanted[:, self._where == largest]  # (d, members)
            moves = self.inverse @ members
            gains = (moves * members).sum(0)
            side = moves[:, int(gains.argmax())] @ members > 0
            if not bool(side.any()):
                return
            self.words[empty] = self.words[largest] + moves[:, side].mean(1)
            counts[largest] -= side.sum()  # the new one has no members yet, and cannot be split

    def _columns(self, values: Tensor) -> Tensor:
        """(groups, taps * d, outputs) as (d, groups * taps * outputs)."""
        groups, _, outputs = values.shape
        return values.view(groups, self.taps, self.width, outputs).permute(2, 0, 1, 3).reshape(self.width, -1)

    # -- labels ---------------------------------------------------------------------------------------------

    def _update_labels(self) -> None:
        prices = None if self.prices is None else of_words(self.prices, self._counts())[:, None]
        for tap in range(self.taps):
            own = self._tap(tap)
            gram = self.gram[:, own, own]
            old = gather(self.words, self.labels[:, tap : tap + 1])
            wanted = torch.baddbmm(self.residual[:, own], gram, old)
            lengths = ((self.words @ gram) * self.words).sum(2, keepdim=True)  # (groups, K, 1)
            if prices is not None:
                lengths += prices
            scores = torch.baddbmm(lengths, self.words.expand(len(gram), -1, -1), wanted, alpha=-2)
            self.labels[:, tap] = nearest(scores)[1]
            change = gather(self.words, self.labels[:, tap : tap + 1]) - old
            self.residual -= self.gram[:, :, own] @ change


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric matrix (d, d) in double precision; a diagonal that rounding spoilt is raised."""
    values, vectors = torch.linalg.eigh(matrix.double())
    floor = values[-1].clamp(min=torch.finfo(torch.float64).tiny) * 1e-6
    inverse: Tensor = (vectors / values.clamp(min=floor)) @ vectors.mT
    return inverse.to(matrix.dtype)
