"""PQConv2d: a convolution whose weight is made of codewords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ...ir.dialect import register_layer
from ...ir.errors import OptionError
from .. import kernels
from ..kernels.int8_ops import MOST_POOLED, MOST_TERMS
from .int8_rounding import weight_numbers, weight_steps
from .pq_layer import ATTRIBUTES, OPTIONS, PQLayer

Pair = int | tuple[int, int]
_SHAPE = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")


class PQConv2d(PQLayer):
    """A product-quantized convolution (Wu et al., CVPR 2016): all taps and groups share the codebooks.

        y[n, o, q] = bias[o] + Σ_t Σ_m codebook[m, indices[t, m, o], :] · x[n, group(o) + m d : .. + d, s q + t]

    Taps run over the kernel row by row; what lies outside the image counts as zero.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in torch.nn.Conv2d.
        pool: kernel, stride and padding, (height, width) each, of a max pool behind the ReLU; empty for none. The layer
            then gives what the pool does, and kernels of fxpress never write its own outputs to memory as a whole.
        channels_last: whether the outputs lie channels-last whatever the images do (`emit` asks for it where a network
            begins); else they lie as the images.
        **options: `subspace`, `codewords`, `codebook`, `entropy`, `kernel`, `tables`, `relu`, as in `PQLayer`.

    Raises:
        OptionError: a depthwise convolution, kernel `dense-int8` for what it cannot run, or a value out of its range.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1, padding: Pair | str = 0,
        dilation: Pair = 1, groups: int = 1, bias: bool = True, pool: Sequence[int] = (), channels_last: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        _check(in_channels, out_channels, groups, padding)
        size = _pair(kernel_size)
        super().__init__(in_channels // groups, out_channels, size[0] * size[1], bias, **options)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = size, _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.pool, self.channels_last = tuple(pool), channels_last
        _check_pool(self.pool, self.relu)
        if self.kernel == "dense-int8" and self.no_int8():
            raise OptionError(f"kernel is 'dense-int8'; {self.no_int8()}")

    @classmethod
    def from_weights(cls, layer: nn.Conv2d, codebook: Tensor, indices: Tensor, /, **options: Any) -> PQConv2d:
        """The layer that takes the place of `layer`, with its bias, dtype, device and mode.

        Args:
            codebook: `(M, K, d)`; sizes are read from it.
            indices: `(taps, M, out)`, of any whole-number dtype.
            **options: `codebook` (what a file keeps), `entropy`, `kernel`, `tables`, `relu`, `pool`.

        Raises:
            OptionError: a depthwise convolution, a padding mode other than zeros, or shapes that do not fit.
        """
        if layer.padding_mode != "zeros":
            raise OptionError(f"padding_mode is {layer.padding_mode!r}; a PQConv2d pads with zeros alone")
        given = {f: getattr(layer, f) for f in _SHAPE} | {"bias": layer.bias is not None}
        made = cls(**given, subspace=codebook.shape[2], codewords=codebook.shape[1], **options)
        made._put(layer, codebook, indices)
        return made

    @property
    def inputs(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    def dense(self) -> nn.Module:
        """The torch.nn.Conv2d that computes the same."""
        given = {f: getattr(self, f) for f in _SHAPE} | {"bias": self.bias is not None}
        return self._take_over(nn.Conv2d(**given, device="meta"))

    def fit(self, inputs: int, outputs: int) -> None:
        """State the sizes of tensors that were cut."""
        self.forget()
        self.in_channels, self.out_channels = inputs * self.groups, outputs

    def decoded(self) -> Tensor:
        """The dense weight `(out, in / groups, kh, kw)`, differentiable in the codebook."""
        weight = super().decoded()
        return weight.reshape(*weight.shape[:2], *self.kernel_size)

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """`(N, in, H, W)` -> `(N, out, H', W')`, or both without N."""
        padding = self._even_padding()
        x = self._padded(x)
        if self.channels_last and x.dim() == 4:  # outputs follow
            x = x.contiguous(memory_format=torch.channels_last)
        return self.finish(F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups))

    def finish(self, y: Tensor) -> Tensor:
        """What follows the sums: the ReLU and the pool, if the layer has them."""
        y = super().finish(y)
        return F.max_pool2d(y, self.pool[:2], self.pool[2:4], self.pool[4:]) if self.pool else y

    def sums_shape(self, images: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the convolution's outputs, before a pool, for images (N, in, H, W) or (in, H, W)."""
        added = self._both_sides() if isinstance(self.padding, str) else [2 * edge for edge in self.padding]
        edges = zip(images[-2:], added, self.kernel_size, self.stride, self.dilation, strict=True)
        size = [(n + more - gap * (kernel - 1) - 1) // step + 1 for n, more, kernel, step, gap in edges]
        return (*images[:-3], self.out_channels, *size)

    def no_int8(self) -> str | None:
        """Why `dense-int8` cannot run this layer; None where it can."""
        if self.groups > 1:
            return f"there are {self.groups} groups, and it takes one"
        if self.inputs * len(self.indices) > MOST_TERMS:
            return f"an output has {self.inputs * len(self.indices)} weights, and it takes {MOST_TERMS}"
        if self.pool and max(self.pool[:2]) > MOST_POOLED:
            return f"the pool is {self.pool[:2]}, and it takes {MOST_POOLED} pixels a side"
        return None

    def _computed(self, x: Tensor, kernel: kernels.Bound) -> Tensor:
        x = self._padded(x)
        y = kernel(x) if x.dim() == 4 else kernel(x.unsqueeze(0)).squeeze(0)
        if self.kernel == "dense-int8" and not self.channels_last and x.is_contiguous():
            return y.contiguous()  # that kernel writes channels-last alone
        return y

    def _bind(self) -> kernels.Bound:
        return self._bind_int8() if self.kernel == "dense-int8" else self._bind_table()

    def _bind_int8(self) -> kernels.Bound:
        weight = self.decoded()
        steps = weight_steps(weight)
        numbers = weight_numbers(weight, steps).to(torch.int8)
        layout, offset = kernels.prepare_int8(numbers, 1, int(self.dilation[1]))
        window = self.out_channels, self.kernel_size, self.stride, self._even_padding(), self.dilation
        return kernels.BoundInt8Conv2d(layout, offset, steps, self.bias, 0.0, 1, *window, self.pool, self.relu)

    def _bind_table(self) -> kernels.Bound:
        codebook = kernels.prepare_codebook(self.stored_codebook())
        layout = kernels.prepare_conv2d(self.indices, self.codewords, self.tables, self.groups)
        window = self.kernel_size, self.stride, self._even_padding(), self.dilation
        sizes = self.out_channels, *window, self.groups
        ends = self.relu, self.pool, self.channels_last
        return kernels.BoundPQConv2d(codebook, layout, self.bias, *sizes, self.tables, *ends)

    def _both_sides(self) -> tuple[int, int]:
        """Rows and columns that a padding in words adds to both sides together."""
        sizes = zip(self.kernel_size, self.dilation, strict=True)
        height, width = (step * (size - 1) if self.padding == "same" else 0 for size, step in sizes)
        return height, width

    def _even_padding(self) -> tuple[int, int]:
        """What is added to either side."""
        if isinstance(self.padding, str):
            height, width = self._both_sides()
            return height // 2, width // 2
        rows, columns = self.padding
        return rows, columns

    def _padded(self, x: Tensor) -> Tensor:
        """Input with what padding "same" adds to one side more than to the other."""
        if not isinstance(self.padding, str):
            return x
        height, width = self._both_sides()
        return F.pad(x, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        shape = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}"
        rest = f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        ends = f"{f', pool={self.pool}' if self.pool else ''}{', channels_last=True' if self.channels_last else ''}"
        return f"{self.in_channels}, {self.out_channels}, {shape}, {rest}, {self._options_repr()}{ends}"


def _check(in_channels: int, out_channels: int, groups: int, padding: Pair | str) -> None:
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise OptionError(f"{in_channels} input and {out_channels} output channels do not make {groups} groups")
    if groups > 1 and groups == in_channels:
        raise OptionError(
            f"a depthwise convolution ({groups} groups of one channel) cannot be product-quantized",
            hint="Its sub-spaces have a single input each: indices are no smaller than quantised weights. Skip it.",
        )
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise OptionError(f"padding is {padding!r}; allowed: numbers, 'same', 'valid'")


def _check_pool(pool: tuple[int, ...], relu: bool) -> None:
    if not pool:
        return
    whole = len(pool) == 6 and all(type(number) is int for number in pool)
    if not whole or min(pool[:4]) < 1 or any(not 0 <= 2 * pool[4 + i] <= pool[i] for i in range(2)):
        raise OptionError(
            f"pool is {pool}; allowed: kernel, stride and padding, two whole numbers each",
            hint="The padding is at most half the kernel.",
        )
    if not relu:
        raise OptionError("pool asks for relu", hint="Leave the pool to a layer of its own.")


register_layer(PQConv2d, (*_SHAPE, *OPTIONS, "pool", "channels_last"), ("bias",), ATTRIBUTES)
