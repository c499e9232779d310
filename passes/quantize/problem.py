"""What error correction minimises: how far a quantised layer's response is from the wanted one, as matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layerwise.moments import SecondMoments
from .codes import in_order
from .plan import Layout

COLUMNS = 2**22
"""Numbers of a product of the Gram matrix that exist at a time."""

SMALLEST = 1e-4
"""Least λ, as a share of the features' mean square."""


@dataclass
class Problem:
    """Least squares in terms of the gap between a layer's weight W and its quantised form Ŵ.

    For inputs X and wanted responses Y, with Δ = W − Ŵ, G = XᵀX + λ I and S = Xᵀ(Y − X W),

        ‖Y − X Ŵ‖² + λ ‖W − Ŵ‖²  =  ⟨Δ, G Δ⟩ + 2 ⟨S, Δ⟩ + ‖Y − X W‖²

    Where the inputs are those of the original network, Y = X W: S and the last term are zero.

    Attributes:
        gram: G, (groups, F, F) in the order of the layout.
        weight: W, (groups, F, outputs).
        drift: S, (groups, F, outputs), or None where it is zero.
        floor: ‖Y − X W‖².
        energy: ‖Y‖², what errors are compared with.
        ridge: λ.
    """

    gram: Tensor
    weight: Tensor
    drift: Tensor | None
    floor: float
    energy: float
    ridge: float

    def error(self, gap: Tensor) -> float:
        """‖Y − X Ŵ‖² + λ ‖Δ‖² of a gap Δ (groups, F, outputs); sums in double precision."""
        total, step = self.floor, max(1, COLUMNS // gap.shape[1])
        for part in range(0, gap.shape[2], step):
            own = gap[:, :, part : part + step]
            pull = self.gram @ own
            if self.drift is not None:
                pull += 2 * self.drift[:, :, part : part + step]
            total += inner(own, pull)
        return max(total, 0.0)

    def response_error(self, gap: Tensor, error: float) -> float:
        """Relative error ‖Y − X Ŵ‖ / ‖Y‖ where `error` is that of `error`."""
        return self.relative(error - self.ridge * inner(gap, gap))

    def relative(self, error: float) -> float:
        """√(error / ‖Y‖²); 0 where there is no response."""
        return (max(error, 0.0) / self.energy) ** 0.5 if self.energy > 0 else 0.0


def inner(a: Tensor, b: Tensor) -> float:
    """Sum of the products of two tensors' elements, in double precision."""
    return float((a * b).sum(dtype=torch.float64))


def shrinkage(gram: Tensor, samples: float) -> float:
    """λ that a Gram matrix of few samples needs, as a share of the features' mean square: ρ / (1 − ρ).

    Few images leave directions of the inputs in which they show nothing, and a layer that is fitted to them would put
    its error there. With G towards its mean diagonal by the share ρ it is, among such mixtures and for normal features,
    closest to the covariance of all images. With p features, n samples and S = G / n,

        ρ = ((1 − 2/p) tr(S²) + tr(S)²) / ((n + 1 − 2/p) (tr(S²) − tr(S)² / p)),    at most 1/2

    Source: Y. Chen et al., Shrinkage Algorithms for MMSE Covariance Estimation, 2010, equation (23) (OAS).

    Args:
        gram: (groups, F, F), of any scale; groups share one λ.
        samples: number of rows X that G is made of.
    """
    features = gram.shape[1]
    parts = torch.split(gram, 256, 1)  # in double precision the whole may not fit into memory
    squares = sum(float(part.norm(dtype=torch.float64)) ** 2 for part in parts)
    traces = float(gram.diagonal(dim1=1, dim2=2).sum(1).double().square().sum())
    spread = squares - traces / features
    if spread <= 0:
        return SMALLEST
    rho = ((1 - 2 / features) * squares + traces) / ((samples + 1 - 2 / features) * spread)
    rho = min(rho, 0.5)
    return max(rho / (1 - rho), SMALLEST)


def make_problem(
    layout: Layout,
    moments: SecondMoments,
    weight: Tensor,
    bias: Tensor,
    *,
    ridge: float | None,
    centred: bool,
) -> Problem:
    """A layer's problem from sums over its inputs and wanted responses; the sums are used up.

    Args:
        layout: of the layer.
        moments: of inputs X (n, groups, features) and responses Y; with cross products where Y is not X W + b.
        weight: the layer's (groups, outputs, features).
        bias: the layer's (groups, outputs).
        ridge: λ as a share of the features' mean square (or variance, if centred); None takes what `shrinkage` says.
        centred: whether a new bias makes good what the means of X and Y allow; otherwise the bias stays.
    """
    count, own = moments.count, weight.to(moments.gram.dtype)
    sums, totals = moments.gram[:, :-1, -1].clone(), moments.cross[:, -1].clone()
    gram, energy = moments.gram[:, :-1, :-1], float(moments.energy)
    if centred:
        gram.baddbmm_(sums[:, :, None], sums[:, None] / -count)
        energy -= float(totals.double().square().sum()) / count
    else:  # Y − b is wanted of X Ŵ
        energy += float((count * bias.double() - 2 * totals.double()).mul(bias.double()).sum())
    drift, floor = None, 0.0
    if moments.crossed:
        shift = totals / count if centred else bias.to(totals.dtype)
        cross = moments.cross[:, :-1] - sums[:, :, None] * shift[:, None]
        drift = cross - gram @ own.mT
        floor = max(energy - inner(own.mT, drift + cross), 0.0)
        drift = _rows_in_order(layout, drift)
    share = shrinkage(gram, count) if ridge is None else ridge
    strength = share * float(gram.diagonal(dim1=1, dim2=2).double().mean())
    gram = _both_in_order(layout, gram)
    gram.diagonal(dim1=1, dim2=2).add_(strength)
    return Problem(gram, in_order(layout, own), drift, floor, max(energy, 0.0), strength)


def _rows_in_order(layout: Layout, values: Tensor) -> Tensor:
    """Features (groups, features, ..) in the order of the layout; those that only fill a sub-space are zero."""
    order = layout.order.to(values.device)
    found = values.index_select(1, order.clamp(min=0))
    found[:, order < 0] = 0
    return found


def _both_in_order(layout: Layout, gram: Tensor) -> Tensor:
    if layout.taps == 1 and layout.inputs % layout.width == 0:
        return gram  # as it lies: it may be gigabytes
    return _rows_in_order(layout, _rows_in_order(layout, gram).mT).mT.contiguous()
