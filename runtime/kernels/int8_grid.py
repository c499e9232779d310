"""The grid of 8-bit inputs: which numbers its 256 bytes stand for."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 255


def input_grid(span: Tensor) -> tuple[Tensor, Tensor]:
    """Step s and byte z of zero for inputs between two numbers: x ≈ s (q - z), q from 0 to 255.

    Zero lies on the grid, because padding is zero; so the span is widened to hold it.

    Source: B. Jacob et al., Quantization and Training of Neural Networks, CVPR 2018, section 2.1 and equation 1.

    Args:
        span: (2,), least and largest value.
    """
    low, high = span[0].clamp(max=0), span[1].clamp(min=0)
    step = usable((high - low) / BYTES)
    return step, torch.round(-low / step).clamp(max=BYTES)


def usable(step: Tensor) -> Tensor:
    """1 in the place of steps that cannot be divided by, because they are too small or not finite."""
    return torch.where((step >= torch.finfo(step.dtype).tiny) & step.isfinite(), step, torch.ones_like(step))
