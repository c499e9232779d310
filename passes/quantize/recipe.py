"""How codewords and indices are learned, as the pass hands it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["none", "layer", "accumulated"]


@dataclass(frozen=True)
class Recipe:
    """How codewords and indices are learned.

    Attributes:
        correction: `none`, `layer` or `accumulated`.
        sweeps: of error correction.
        ridge: λ as a share of the mean square of the inputs, or None.
        images: of calibration.
        positions: of a convolution's output, per image.
        refit: whether the bias is fitted anew.
        entropy: whether a file holds the indices entropy coded.
        rate_weight: r of `first_codes`.
        iterations: of k-means.
        seed: of k-means.
    """

    correction: Kind
    sweeps: int
    ridge: float | None
    images: int
    positions: int
    refit: bool
    entropy: bool
    rate_weight: float
    iterations: int
    seed: int
