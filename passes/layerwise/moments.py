"""Second moments of what a layer reads and gives: all that least squares needs, in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoments:
    """Gram matrices, by default in double precision, with a column of ones behind the features: [X 1].

    Per group G = [X 1]ᵀ [X 1], shape (groups, F + 1, F + 1), H = [X 1]ᵀ Y, (groups, F + 1, O), and the energy ΣY² of
    all, (1,), are sums over rows, so that those of parts of the data add up to those of all. Rows are never kept.

    Args:
        groups: of a grouped convolution; 1 otherwise.
        features: F, of one group.
        outputs: O, of one group.
        device: where the sums lie.
        dtype: of sums and products; the energy is always summed in double precision.
        crossed: without, H is 1ᵀ Y alone, (groups, 1, O): enough where Y is known to be X Wᵀ + b.
    """

    def __init__(
        self, groups: int, features: int, outputs: int, device: torch.device | None = None, *,
        dtype: torch.dtype = torch.float64, crossed: bool = True,
    ) -> None:  # fmt: skip
        size = features + 1
        self.crossed = crossed
        self.gram = torch.zeros(groups, size, size, dtype=dtype, device=device)
        self.cross = torch.zeros(groups, size if crossed else 1, outputs, dtype=dtype, device=device)
        self.energy = torch.zeros(1, dtype=torch.float64, device=device)

    @staticmethod
    def bytes(groups: int, features: int, outputs: int) -> int:
        """Memory of the sums."""
        return 8 * (groups * (features + 1) * (features + 1 + outputs) + 1)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows X (M, groups, F) and Y (M, groups, O) of any floating-point type."""
        dtype = self.gram.dtype
        ones = x.new_ones(*x.shape[:2], 1, dtype=dtype)
        wide, target = torch.cat([x.to(dtype), ones], 2).transpose(0, 1), y.to(dtype).transpose(0, 1)
        self.gram.baddbmm_(wide.mT, wide)
        self.cross.baddbmm_((wide if self.crossed else wide[:, :, -1:]).mT, target)
        self.energy += target.square().sum(dtype=torch.float64)

    @property
    def tensors(self) -> list[Tensor]:
        """The sums, to be added up over processes."""
        return [self.gram, self.cross, self.energy]

    def adopt(self, tensors: list[Tensor]) -> None:
        """Take over such sums."""
        self.gram, self.cross, self.energy = tensors

    @property
    def count(self) -> float:
        """Number of rows."""
        return float(self.gram[0, -1, -1])

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Relative error ‖Y − X Wᵀ − b‖ / ‖Y‖ (Frobenius) of weight (groups, O, F) and bias (groups, O)."""
        wide = torch.cat([weight.double(), bias.double()[..., None]], 2)
        gap = self.energy - 2 * (wide.mT * self.cross).sum() + ((wide @ self.gram) * wide).sum()
        energy = float(self.energy)
        return (max(float(gap), 0.0) / energy) ** 0.5 if energy > 0 else 0.0
