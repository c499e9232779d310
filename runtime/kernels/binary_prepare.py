"""From the signs of a binary layer to the layout that is fastest on this machine."""

from __future__ import annotations

from torch import Tensor

from . import binary_layout as layouts
from . import library
from .binary_choice import LEAST_SPEEDUP, table_speedup


def prepare_binary_conv2d(plus: Tensor, groups: int = 1, stride: int = 1, pixels: int | None = None) -> Tensor:
    """Layout for `torch.ops.fxpress.binary_conv2d` and `binary_conv2d_levels`.

    Args:
        plus: signs (out, channels of a group, kh, kw), bool, True for +1.
        groups: of the convolution.
        stride: of the convolution along the width.
        pixels: of its output, where they are known.

    Returns:
        A 1-D uint8 tensor for this machine's best kernel; all others read it too, more slowly.

    Raises:
        KernelError: signs of another shape or type.
    """
    return layouts.pack(layouts.SIX if _by_table(plus, groups, stride, pixels) else layouts.PLANES, plus, groups)


def prepare_binary_linear(plus: Tensor) -> Tensor:
    """Layout for `torch.ops.fxpress.binary_linear` and `binary_linear_levels`; signs (out, in) as bool."""
    return layouts.pack(layouts.PLANES, plus[:, :, None, None] if plus.dim() == 2 else plus)


def _by_table(plus: Tensor, groups: int, stride: int, pixels: int | None) -> bool:
    """Whether the table kernel can compute it here, and is the faster one."""
    if library.isas()[0] != "avx512" or plus.dim() != 4 or groups > 1 or not plus.numel():
        return False
    outputs, channels, kh, kw = plus.shape
    fits = kw <= layouts.BYTE_SUMS and kh <= layouts.TABLE_ROWS and kh * kw * channels <= layouts.WORD_SUMS
    return fits and table_speedup(channels, outputs, kw, stride, pixels) >= LEAST_SPEEDUP
