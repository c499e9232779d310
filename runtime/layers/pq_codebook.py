"""What product-quantized layers share in numbers: codebooks as they are stored, weights decoded from indices.

A weight matrix is split along its inputs into M sub-spaces of d inputs each; the last one may be ragged. For each
sub-space there is a codebook of K codewords, and each column of the sub-space is the codeword that its index names
(Jegou et al. 2011; for networks Wu et al., "Quantized Convolutional Neural Networks for Mobile Devices", CVPR 2016).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ...ir.errors import OptionError

Precision = Literal["fp32", "fp16", "int8"]
SIZES = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of a number of a codeword."""
MIN_CODEWORDS, MAX_CODEWORDS = 2, 256

_HALF_MAX = 65504.0  # largest finite fp16
_INT8_MAX = 127
_SMALLEST_SCALE = 2.0**-100
_SPLITTER = 2.0**7 + 1  # Veltkamp 1968: leaves 24 - 7 bits of a float32's significand


def bits(codewords: int) -> int:
    """Bits of an index: log2(K), which is a whole number (`check_choice`)."""
    return codewords.bit_length() - 1


def subspaces(inputs: int, subspace: int) -> int:
    """Number M of sub-spaces of width d over so many inputs."""
    return -(-inputs // subspace)


def check_sizes(inputs: int, subspace: int, codewords: int) -> None:
    """Raise OptionError unless the sizes make a codebook: d >= 1, K a power of two in 2..256."""
    if subspace < 1 or inputs < 1:
        raise OptionError(f"subspace is {subspace} for {inputs} inputs; both must be at least 1")
    if not MIN_CODEWORDS <= codewords <= MAX_CODEWORDS or codewords & (codewords - 1):
        raise OptionError(f"codewords is {codewords}; allowed: 2, 4, 8, 16, 32, 64, 128, 256")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise OptionError unless a value is one of a Literal's."""
    allowed = get_args(choices)
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def quantized(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codewords `(M, K, d)` as whole numbers in -127..127 (float32), and the scale of every sub-space `(M, 1, 1)`.

    A scale has 17 significant bits, so that its product with a number of 7 bits is exact in float32. That makes the
    rounding idempotent: numbers times scale, rounded again, give the same numbers and the same scale.
    """
    values = codebook.float()
    scale = values.abs().amax((1, 2), keepdim=True) / _INT8_MAX
    high = scale * _SPLITTER
    scale = (high - (high - scale)).clamp(min=_SMALLEST_SCALE)
    return (values / scale).round().clamp(-_INT8_MAX, _INT8_MAX), scale


def as_stored(codebook: Tensor, precision: Precision) -> Tensor:
    """Codewords `(M, K, d)` with the values that a file keeps of them; the gradient passes straight through.

    fp16 saturates at the largest finite number; int8 has one float32 scale per sub-space. The result has the dtype of
    the codebook, and rounding it again changes nothing.
    """
    if precision == "fp32":
        return codebook
    values = codebook.detach()
    if precision == "fp16":
        rounded = values.float().clamp(-_HALF_MAX, _HALF_MAX).half()
    else:
        numbers, scale = quantized(values)
        rounded = numbers * scale
    rounded = rounded.to(codebook.dtype)
    if not (torch.is_grad_enabled() and codebook.requires_grad):
        return rounded
    return rounded + (codebook - values)  # the difference is exactly zero: the sum keeps every bit


def decode(codebook: Tensor, indices: Tensor, inputs: int) -> Tensor:
    """Weights `(out, inputs, taps)` of a codebook `(M, K, d)` and indices `(taps, M, out)`.

    weight[o, m d + j, t] = codebook[m, indices[t, m, o], j]
    """
    taps, count, outputs = indices.shape
    words, width = codebook.shape[1:]
    first = torch.arange(0, count * words, words, device=indices.device).unsqueeze(1)
    rows = F.embedding(indices.long() + first, codebook.reshape(count * words, width))  # (taps, M, out, d)
    return rows.permute(2, 1, 3, 0).reshape(outputs, count * width, taps)[:, :inputs].contiguous()
