"""Window: the sizes of a convolution, as the operators take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...ir.errors import KernelError

Pair = Sequence[int]


class Window(NamedTuple):
    """Sizes of a convolution; a linear layer has one tap."""

    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def out_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(N, C, H, W) → (N, outputs, H', W').

        Raises:
            KernelError: sizes that are out of range, or an image that does not fit them.
        """
        self.check()
        if len(shape) != 4:
            raise KernelError(f"x has {len(shape)} dimensions; a convolution reads (N, C, H, W)")
        if shape[1] % self.groups or self.outputs % self.groups:
            raise KernelError(
                f"x {tuple(shape)} and {self.outputs} outputs do not make {self.groups} groups of channels"
            )
        edges = zip(shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        size = [(edge + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for edge, kernel, step, pad, gap in edges]
        if min(size) < 1:
            raise KernelError(f"Images of {tuple(shape[2:])} pixels are too small for a kernel of {tuple(self.kernel)}")
        return (shape[0], self.outputs, *size)

    def check(self) -> None:
        """Raise KernelError where sizes are out of range whatever the image."""
        if self.outputs < 1 or self.groups < 1:
            raise KernelError(f"{self.outputs} outputs, {self.groups} groups: out of range")
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise KernelError(
                f"kernel {list(self.kernel)}, stride {list(self.stride)}, padding {list(self.padding)}, "
                f"dilation {list(self.dilation)}: out of range"
            )


def pooled(shape: tuple[int, ...], pool: Sequence[int]) -> tuple[int, ...]:
    """Shape (N, C, H', W') of a max pool of outputs (N, C, H, W).

    Args:
        pool: kernel, stride and padding, two numbers each; empty for none.

    Raises:
        KernelError: other numbers, or outputs that are too small.
    """
    if not pool:
        return shape
    if len(pool) != 6 or any(2 * pool[4 + i] > pool[i] for i in range(2)):
        hint = "It is empty, or six numbers: kernel, stride and padding, the padding up to half the kernel"
        raise KernelError(f"pool is {list(pool)}", hint=hint)
    return Window(shape[1], pool[:2], pool[2:4], pool[4:]).out_shape(shape)
