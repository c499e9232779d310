"""From scores per layer to one score per class: layers made comparable, members combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ....ir.groups import Groups
from ....ir.labels import IntArray
from .statistics import z_score

FloatArray = npt.NDArray[np.float64]
Combine = Literal["mean", "sum", "max"]
Scale = Literal["mean", "norm", "standard", "none"]
"""How scores of different layers are made comparable, so that one threshold can run through all of them:

- `mean`: divided by the mean of their layer, so that fan-in does not count;
- `norm`: divided by the L2 norm of their layer's scores (Molchanov et al. 2017);
- `standard`: z-scores within the group, after combination: one threshold is the cut at mean - k std of
  every group;
- `none`: as they are, for they are in one unit already.
"""

_TINY = np.finfo(np.float64).tiny


def combine(groups: Groups, scored: Sequence[tuple[IntArray, Tensor]], scale: Scale, how: Combine) -> FloatArray:
    """Score of every class, shape (groups.count,); NaN where no member holds it.

    Args:
        groups: of the network.
        scored: of each member the classes and the scores, both (n,). Several entries of one class within a member
            (the heads of an attention, the positions of a flattened map) count as their mean.
        scale: see `Scale`.
        how: what becomes of a class's several members.
    """
    total, seen = np.zeros(groups.count), np.zeros(groups.count)
    for classes, scores in scored:
        own, values = _per_class(classes, _comparable(scores.double().numpy(), scale))
        first = seen[own] == 0
        highest = np.where(first, values, np.maximum(total[own], values))
        total[own] = highest if how == "max" else total[own] + values
        seen[own] += 1
    divisor = seen if how == "mean" else np.minimum(seen, 1)
    result = np.divide(total, divisor, out=np.full(groups.count, np.nan), where=seen > 0)
    return _standardised(groups, result) if scale == "standard" else result


def fill_unseen(groups: Groups, scores: FloatArray) -> FloatArray:
    """The mean of its group, or of all, for a class that no member holds (padding with zeros)."""
    known = np.isfinite(scores)
    filled = np.where(known, scores, scores[known].mean() if known.any() else 1.0)
    for group in groups.groups:
        own = group.classes[known[group.classes]]
        if 0 < len(own) < group.channels:
            filled[np.setdiff1d(group.classes, own)] = scores[own].mean()
    return filled


def _per_class(classes: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    own, index = np.unique(classes, return_inverse=True)
    return own, np.bincount(index, weights=values) / np.bincount(index)


def _comparable(values: FloatArray, scale: Scale) -> FloatArray:
    divisor = 1.0
    if scale == "mean":
        divisor = float(values.mean())
    elif scale == "norm":
        divisor = float(np.linalg.norm(values))
    result: FloatArray = values / max(divisor, _TINY)
    return result


def _standardised(groups: Groups, scores: FloatArray) -> FloatArray:
    result: FloatArray = scores.copy()
    for group in groups.groups:
        own = group.classes[np.isfinite(scores[group.classes])]
        if len(own):
            result[own] = z_score(torch.from_numpy(scores[own])).numpy()
    return result
