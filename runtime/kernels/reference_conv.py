"""The integer tables of the convolution, in plain torch: the same numbers, bit by bit, as every kernel.

A pixel's tables are many, so that a second pass over them costs as much as making them. They are therefore made from
16-bit numbers, and go to bytes in registers with a scale that is known before the first of them is made:

    s = round(x fs), fs = S / max|x|;   c = round(D fd), fd = C / max|D|;   a[m, k] = sum_j c[m, k, j] s[m d + j], exact
    A = max|a| over the image, its groups, sub-spaces and code words

    "int8":  q = floor(((a >> h) w + 2^14) / 2^15) in -64..63,   h: A >> h < 2^15,   w = floor(127 2^14 / (A >> h))
    "int16": q = round(a 8191 / A) in -8191..8191
    y = unit sum q + bias,   unit = the value of one step, 2^(15 + h) / (w fs fd) or A / (8191 fs fd)

With l = ceil(log2 d), C = 2^min(14, (31 - l) / 2) - 1 and S = 2^min(14, (30 - l) / 2) - 1 in whole numbers: a never
leaves 32 bits. Sums of q are exact. "int8" has 7 bits, because two entries are added as bytes.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

# |x| and |D| between which all scales are normal numbers; the same in csrc/pq_conv_call.h
SMALLEST, LARGEST = 1e-30, 1e30
MIDDLE: Final = 64


class Scale(NamedTuple):
    """How the tables of one image become small integers.

    Attributes:
        shift, multiplier: h and w of "int8".
        factor: of "int16".
        unit: what one step of q is worth in y.
    """

    shift: int
    multiplier: int
    factor: Tensor
    unit: Tensor


def tops(width: int) -> tuple[int, int]:
    """S and C for sub-spaces of that width."""
    log = max(0, width - 1).bit_length()
    return 2 ** min(14, (30 - log) // 2) - 1, 2 ** min(14, (31 - log) // 2) - 1


def in_range(largest: Tensor) -> bool:
    """Whether integer tables can hold numbers up to `largest`; NaN and infinity are not in range."""
    value = float(largest)
    return value == 0 or SMALLEST <= value <= LARGEST


def can_quantize(codebook: Tensor, taps: int) -> bool:
    """Whether there is an integer table for that codebook at all."""
    subspaces, _, width = codebook.shape
    few = width <= 4096 and taps * (-(-subspaces // 4) * 4) < 2**17
    return few and in_range(codebook.abs().amax())


def round16(values: Tensor, top: int) -> tuple[Tensor, float]:
    """Whole numbers of at most `top`, and their scale as a float32."""
    largest = values.abs().amax()
    scale = torch.zeros(()) if largest == 0 else torch.tensor(float(top)) / largest
    return torch.round(values * scale), float(scale)


def scale_of(most: int, tables: str, product: float) -> Scale:
    """The scale for tables whose largest |a| is `most`; `product` is fs fd."""
    shift = 0
    while most >> shift >= 1 << 15:
        shift += 1
    multiplier = min(32767, (127 << 14) // (most >> shift)) if most else 0
    factor = torch.tensor(float(MIDDLE * 128 - 1)) / torch.tensor(float(most)) if most else torch.zeros(())
    step = math.ldexp(multiplier, -15 - shift) if tables == "int8" else float(factor)
    total = step * product
    return Scale(shift, multiplier, factor, torch.tensor(1 / total if total > 0 else 0.0))


def quantize(pixels: Tensor, codebook: Tensor, tables: str) -> tuple[Tensor, Tensor]:
    """Tables of one image.

    Args:
        pixels: (groups, H, W, M d), padded with zeros to whole sub-spaces.
        codebook: (M, K, d), in range, as the image is.
        tables: "int8" or "int16".

    Returns:
        q (groups, H, W, M, K) as float64, whole numbers, and unit.
    """
    sample_top, code_top = tops(codebook.shape[2])
    samples, fs = round16(pixels, sample_top)
    codes, fd = round16(codebook, code_top)
    parts = samples.double().unflatten(-1, (codebook.shape[0], -1))  # type: ignore[no-untyped-call]
    a = torch.einsum("ghwmj,mkj->ghwmk", parts, codes.double())
    scale = scale_of(int(a.abs().amax()) if a.numel() else 0, tables, fs * fd)
    if tables == "int8":
        q = (((a.long() >> scale.shift) * scale.multiplier + 2**14) >> 15).double()
    else:
        q = torch.round(a.float() * scale.factor).double()
    return q, scale.unit
