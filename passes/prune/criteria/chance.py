"""Random scores: what every criterion has to beat."""

from __future__ import annotations

from torch import Tensor


def random(draws: Tensor) -> Tensor:
    """Independent draws, uniform in [0, 1), seeded with the pass; (n,) -> (n,)."""
    return draws
