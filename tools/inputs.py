"""Example inputs: from text, and from what torchvision and timm say about their models."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import OptionError

_INPUT = re.compile(r"(\d+(?:[x,]\d+)*)(?::(\w+))?")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


def parse_input(text: str) -> Tensor:
    """`1x3x224x224` → normal random values of that shape; `1x16:int64` → zeros of another dtype.

    Raises:
        OptionError: no shape, a size of zero, or an unknown dtype.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"{text!r} is not an input", hint="Write sizes such as 1x3x224x224, or 1x16:int64")
    shape = [int(size) for size in re.split("[x,]", match[1])]
    if 0 in shape:
        raise OptionError(f"input {text!r} has a size of 0", hint="Every size must be at least 1")
    if match[2] not in (None, *_DTYPES):
        raise OptionError(f"input {text!r} has an unknown dtype {match[2]!r}", hint=f"One of {', '.join(_DTYPES)}")
    return example(shape, _DTYPES[match[2] or "float32"])


def example(shape: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The same values for the same shape: seeded normal for floats, zeros (valid indices) for integers."""
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def torchvision_inputs(name: str) -> tuple[Tensor, ...] | None:
    """One image (or clip) of the size that the model's published weights were evaluated at."""
    from torchvision import models

    weights = next(iter(models.get_model_weights(name)), None)
    if weights is None:
        return None
    preset: dict[str, Any] = getattr(weights.transforms, "keywords", {})
    size = preset.get("crop_size") or preset.get("resize_size")
    if size is None:
        return None  # detection and optical flow: several inputs, which the user must describe
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    video = "kinetics" in str(weights.meta.get("recipe", "")) or "video" in type(weights).__module__
    frames = [max(16, int(weights.meta.get("min_temporal_size", 16)))] if video else []
    return (example([1, 3, *frames, height, width]),)


def timm_inputs(model: nn.Module) -> tuple[Tensor, ...] | None:
    """One image of the size in the model's `pretrained_cfg`."""
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    return None if size is None else (example([1, *size]),)
