"""The statistical criterion: how large, how varied and how settled a filter is among the filters of its layer.

    u_j = zl(M_j) + zl(S_j) − κ zl(V_j),    κ = 0.25,    zl = z-score within the layer,

with m_{j,e} = mean_i |w_i| and s_{j,e} = std_i w_i of filter j at checkpoint e, and over the checkpoints
M_j = mean_e m, S_j = mean_e s, V_j = std_e(m) / M_j: a filter that still wanders late in training has not found a task.
From a single checkpoint V is not known and its term is dropped.

The cut that belongs to it removes u_j < μ_l − k σ_l in every layer l, with ONE k for the whole network, found by
bisection on the budget. `score_classes` therefore gives (u_j − μ_g) / σ_g within each dependency group g: with
`scope: global` one threshold −k runs through all groups, which is the cut above; with `scope: uniform` every group
loses the same share, its least u_j first, and no k takes part.

Source: Yang, Lan & Chen, "Statistics-based kernel pruning", 2018. The paper's formula is not public; this reading keeps
its idea, statistics of the parameters during training, in the form of the z-scores above.
"""

from __future__ import annotations

import torch
from torch import Tensor

KAPPA = 0.25
_ROUNDING = 1e-6  # relative to the mean: what differs by less is one value


def statistics(mean: Tensor, std: Tensor, instability: Tensor | None = None) -> Tensor:
    """u_j of every filter of one layer.

    Args:
        mean: M_j, (n,).
        std: S_j, (n,).
        instability: V_j, (n,), or None for a single checkpoint.

    Returns:
        (n,), in standard deviations.
    """
    scores = z_score(mean) + z_score(std)
    return scores if instability is None else scores - KAPPA * z_score(instability)


def z_score(values: Tensor) -> Tensor:
    """(v − mean v) / std v, (n,) -> (n,); zeros where all values are one but for rounding."""
    values = values.double()
    centred, spread = values - values.mean(), values.std(correction=0)
    if float(spread) <= _ROUNDING * float(values.abs().mean()):
        return torch.zeros_like(values)
    return centred / spread
