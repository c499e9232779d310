"""From a layer's indices to the layout that is fastest on this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout as layouts
from .library import isa


def prepare_linear(indices: Tensor, codewords: int, tables: str = "fp32") -> Tensor:
    """Index layout for `torch.ops.fxpress.pq_linear`.

    Args:
        indices: uint8 (1, M, out), each below `codewords`.
        codewords: K, a power of two from 2 to 256.
        tables: "fp32", "int16" or "int8": what the layout is to be fast for; it is right for all of them.

    Returns:
        A 1-D uint8 tensor for this machine's best instruction set; others read it too, more slowly.

    Raises:
        KernelError: indices of another shape or type, or out of range.
    """
    return layouts.pack(_linear_layout(codewords, tables, isa()), indices, codewords)


def _linear_layout(codewords: int, tables: str, isa: str) -> int:
    """Number of the layout that the kernels of an instruction set read the fastest."""
    if isa == "avx512":
        return layouts.LANES if codewords <= 32 else layouts.ROWS
    if isa == "avx2":
        return layouts.PAIRS if codewords <= 16 and tables != "fp32" else layouts.ROWS
    return layouts.PLAIN


def prepare_conv2d(indices: Tensor, codewords: int, tables: str = "fp32", groups: int = 1) -> Tensor:
    """Index layout for `torch.ops.fxpress.pq_conv2d`; as `prepare_linear`, with indices (taps, M, out)."""
    return layouts.pack(_conv_layout(codewords, tables, isa(), indices.shape[1:2]), indices, codewords, groups)


def _conv_layout(codewords: int, tables: str, isa: str, subspaces: torch.Size) -> int:
    if tables == "fp32" or isa == "none":
        return layouts.PLAIN
    if isa == "avx512" and subspaces != (1,):  # a single sub-space has no neighbours
        return layouts.CONV4 if codewords <= 32 else layouts.CONV2 if codewords == 64 else layouts.CONV1
    return layouts.CONV1


def prepare_codebook(codebook: Tensor) -> Tensor:
    """The same codebook (M, K, d), same values and shape, with the K code words next to each other in memory.

    The kernels accept any codebook; with this one they need not transpose it at every call.
    """
    return codebook.detach().transpose(1, 2).contiguous().transpose(1, 2)
